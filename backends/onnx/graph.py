"""An ONNX graph under construction: values with known shapes, folding, sharing, hoisting.

A `Value` is either a constant (a numpy array, float64 while the graph is made) or the result of a node.
An op whose operands are all constants is computed at once, so weight-only subgraphs never reach the model.
Equal ops become one node. Inside a loop's body, an op that needs nothing of the body is put outside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Dim = int | str
Shape = tuple[Dim, ...]
Array = Any

REAL, INT, BOOL = "real", "int", "bool"


@dataclass(eq=False)
class Value:
    """A tensor of the model. Symbolic dims are names, as "batch"."""

    shape: Shape
    kind: str = REAL
    array: Array | None = None
    level: int = 0
    node: Node | None = None
    name: str = ""

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def constant(self) -> bool:
        return self.array is not None


@dataclass(eq=False)
class Node:
    op: str
    inputs: list[Value | None]
    outputs: list[Value]
    attrs: dict[str, Any]
    scope: str
    hint: str
    bodies: dict[str, Body] = field(default_factory=dict)
    group: tuple[int, str] | None = None  # nodes that were made together, and as what
    domain: str = ""
    origin: Any = None  # the node of the IR that it was made for


@dataclass(eq=False)
class Body:
    """The graph of a loop's body, or the model's main graph."""

    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    known: dict[Hashable, list[Value]] = field(default_factory=dict)


def every_node(body: Body) -> Iterator[Node]:
    for node in body.nodes:
        yield node
        for inner in node.bodies.values():
            yield from every_node(inner)


def bodies(body: Body) -> Iterator[Body]:
    yield body
    for node in body.nodes:
        for inner in node.bodies.values():
            yield from bodies(inner)


def use_counts(body: Body) -> Counter[int]:
    uses = Counter(id(v) for node in every_node(body) for v in node.inputs)
    uses.update(id(o) for b in bodies(body) for o in b.outputs)
    return uses


def readers_of(part: Body) -> dict[int, list[Node]]:
    """The nodes of one body that read each value, by its id; each once."""
    found: dict[int, list[Node]] = {}
    for node in part.nodes:
        for v in {id(v): v for v in node.inputs if v is not None}.values():
            found.setdefault(id(v), []).append(node)
    return found


def broadcast(*shapes: Shape) -> Shape:
    """The common shape, numpy's rule; a symbolic dim wins over 1."""
    rank = max(len(s) for s in shapes)
    out: list[Dim] = []
    for k in range(rank):
        dims = {s[len(s) - rank + k] for s in shapes if len(s) - rank + k >= 0} - {1}
        assert len(dims) <= 1, f"shapes {shapes} do not broadcast"
        out.append(dims.pop() if dims else 1)
    return tuple(out)


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x) if np.size(x) else x


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _log_sum_exp(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    top = x.max(axis=axes, keepdims=True)
    out = np.log(np.exp(x - top).sum(axis=axes, keepdims=True)) + top
    return out if keep else np.squeeze(out, axis=axes)


def _cumsum(x: Array, axis: Array, exclusive: int = 0, reverse: int = 0) -> Array:
    a = int(axis)
    y = np.flip(x, a) if reverse else x
    z = np.cumsum(y, a)
    z = z - y if exclusive else z
    return np.flip(z, a) if reverse else z


def _slice(x: Array, starts: Array, ends: Array, axes: Array, steps: Array | None = None) -> Array:
    index = [slice(None)] * x.ndim
    for k, axis in enumerate(axes):
        step = 1 if steps is None else int(steps[k])
        end: int | None = int(ends[k])
        if step < 0 and end is not None and end < -x.shape[int(axis)]:
            end = None
        index[int(axis)] = slice(int(starts[k]), end, step)
    return x[tuple(index)]


def _reduce(fn: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, axes, keepdims=1: fn(x, axis=tuple(int(a) for a in axes), keepdims=bool(keepdims))


# What an op with constant operands evaluates to (float64); ops that are missing here are simply not folded.
FOLD: dict[str, Callable[..., Array]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power, "Neg": np.negative,
    "Abs": np.abs, "Sign": np.sign, "Exp": np.exp, "Log": np.log, "Sqrt": np.sqrt, "Reciprocal": np.reciprocal,
    "Sin": np.sin, "Cos": np.cos, "Tan": np.tan, "Sinh": np.sinh, "Cosh": np.cosh, "Tanh": np.tanh, "Asin": np.arcsin,
    "Acos": np.arccos, "Atan": np.arctan, "Asinh": np.arcsinh, "Atanh": np.arctanh, "Floor": np.floor, "Round": np.rint,
    "Min": np.minimum, "Max": np.maximum, "Not": np.logical_not, "And": np.logical_and, "Or": np.logical_or,
    "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal,
    "Equal": np.equal, "Where": np.where, "MatMul": np.matmul, "Erf": _erf,
    "Sigmoid": lambda x: np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))),
    "Softplus": lambda x: np.logaddexp(x, 0.0), "Relu": lambda x: np.maximum(x, 0.0),
    "LeakyRelu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "Elu": lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0.0))),
    "Selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0.0))),
    "Clip": lambda x, lo=None, hi=None: np.clip(x, lo, hi),
    "Softmax": lambda x, axis: _softmax(x, axis),
    "LogSoftmax": lambda x, axis: x - _log_sum_exp(x, (axis,), True),
    "ReduceSum": _reduce(np.sum), "ReduceMean": _reduce(np.mean), "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min), "ReduceProd": _reduce(np.prod),
    "ReduceSumSquare": _reduce(lambda x, axis, keepdims: np.sum(x * x, axis=axis, keepdims=keepdims)),
    "ReduceLogSumExp": lambda x, axes, keepdims=1: _log_sum_exp(x, tuple(int(a) for a in axes), bool(keepdims)),
    "CumSum": _cumsum, "Slice": _slice,
    "Transpose": lambda x, perm: np.transpose(x, perm),
    "Unsqueeze": lambda x, axes: np.expand_dims(x, tuple(int(a) for a in axes)),
    "Squeeze": lambda x, axes: np.squeeze(x, tuple(int(a) for a in axes)),
    "Concat": lambda *xs, axis: np.concatenate(xs, axis),
    "Gather": lambda x, i, axis: np.take(x, i, axis),
    "GatherElements": lambda x, i, axis: np.take_along_axis(x, i, axis),
}  # fmt: skip


class Builder:
    """Adds nodes. `dtype` is the model's: float32 or float64."""

    def __init__(self, dtype: str = "float32", opset: int = 18):
        self.dtype, self.opset = dtype, opset
        self.stack: list[Body] = [Body()]
        self.scopes: list[str] = []
        self.batch: Value | None = None  # the batch size, int64 of shape [1]
        self.group: tuple[int, str] | None = None
        self.origin: Any = None  # the IR node that is being lowered
        self._constants: dict[Hashable, Value] = {}
        self._numbers: dict[tuple[str, float | int | bool], Value] = {}

    # ---- constants --------------------------------------------------------------------------------

    def const(self, array: Array, kind: str = REAL, name: str = "") -> Value:
        a = np.asarray(array, dtype={REAL: np.float64, INT: np.int64, BOOL: np.bool_}[kind])
        if a.size > 64:
            return Value(a.shape, kind, a, name=name)
        key = (kind, a.shape, a.tobytes())
        if key not in self._constants:
            self._constants[key] = Value(a.shape, kind, a, name=name)
        return self._constants[key]

    def ints(self, values: Sequence[int]) -> Value:
        return self.const(list(values), INT)

    @property
    def eps(self) -> float:
        return float(np.finfo(self.dtype).eps)

    @property
    def tiny(self) -> float:
        return float(np.finfo(self.dtype).tiny)

    # ---- nodes ------------------------------------------------------------------------------------

    def input(self, name: str, shape: Shape, kind: str = REAL) -> Value:
        v = Value(shape, kind, level=0, name=name)
        self.stack[0].inputs.append(v)
        return v

    def op(self, op: str, *inputs: Value | None, shape: Shape, kind: str = REAL, **attrs: Any) -> Value:
        return self.multi(op, *inputs, shapes=[shape], kind=kind, **attrs)[0]

    def multi(
        self, op: str, *inputs: Value | None, shapes: Sequence[Shape], kind: str = REAL, pure: bool = True, **attrs: Any
    ) -> list[Value]:
        """The results of a node; folded, shared, and put as far out as its operands allow."""
        if op in FOLD and len(shapes) == 1 and all(v is None or v.array is not None for v in inputs):
            with np.errstate(all="ignore"):
                found = FOLD[op](*(None if v is None else v.array for v in inputs), **attrs)
            return [self.const(found, kind)]
        level = max((v.level for v in inputs if v is not None), default=0) if pure else len(self.stack) - 1
        key = (op, tuple(id(v) for v in inputs), tuple(sorted((k, _frozen(v)) for k, v in attrs.items())))
        if pure:
            for body in self.stack[: level + 1]:
                if key in body.known:
                    return body.known[key]
        node = Node(op, list(inputs), [], attrs, "/".join(self.scopes), op, group=self.group, origin=self.origin)
        node.outputs = [Value(tuple(s), kind, level=level, node=node) for s in shapes]
        self.stack[level].nodes.append(node)
        if pure:
            self.stack[level].known[key] = node.outputs
        return node.outputs

    # ---- elementwise ------------------------------------------------------------------------------

    def unary(self, op: str, x: Value, kind: str = REAL, **attrs: Any) -> Value:
        return self.op(op, x, shape=x.shape, kind=kind, **attrs)

    def binary(self, op: str, a: Value | float, b: Value | float, kind: str = REAL) -> Value:
        x, y = self.value(a), self.value(b)
        return self.op(op, x, y, shape=broadcast(x.shape, y.shape), kind=kind)

    def value(self, v: Value | float) -> Value:
        return v if isinstance(v, Value) else self.const(float(v))

    def add(self, a: Value | float, b: Value | float) -> Value:
        x, y = self.value(a), self.value(b)
        if is_number(y, 0.0):
            return x
        if is_number(x, 0.0):
            return y
        return self._add_flat(x, y) or self.binary("Add", x, y)

    def _add_flat(self, x: Value, y: Value) -> Value | None:
        """A bias on a linear layer whose results were split is added before the split, where it joins the product."""
        parts = unflattened(x)
        if parts is None or y.shape != parts or (y.array is None and row_of(y) is None):
            return None
        assert x.node is not None
        flat = x.node.inputs[0]
        assert flat is not None
        if flat.node is None or flat.node.op != "MatMul":
            return None
        return self.reshape(self.add(flat, self.reshape(y, (flat.shape[-1],))), x.shape)

    def sub(self, a: Value | float, b: Value | float) -> Value:
        x, y = self.value(a), self.value(b)
        if is_number(x, 0.0):
            return self.neg(y)
        return x if is_number(y, 0.0) else self.binary("Sub", x, y)

    def mul(self, a: Value | float, b: Value | float) -> Value:
        x, y = self.value(a), self.value(b)
        if is_number(y, 1.0):
            return x
        return y if is_number(x, 1.0) else self.binary("Mul", x, y)

    def div(self, a: Value | float, b: Value | float) -> Value:
        x, y = self.value(a), self.value(b)
        if y.array is not None and x.array is None and np.all(np.isfinite(1 / np.where(y.array == 0, 1, y.array))):
            return x if is_number(y, 1.0) else self.binary("Div", x, y)
        return self.binary("Div", x, y)

    def neg(self, x: Value) -> Value:
        if x.node is not None and x.node.op == "Neg" and x.node.inputs[0] is not None:
            return x.node.inputs[0]
        return self.unary("Neg", x)

    def where(self, c: Value, a: Value | float, b: Value | float) -> Value:
        x, y = self.value(a), self.value(b)
        if c.array is not None and c.array.all() and broadcast(c.shape, x.shape, y.shape) == x.shape:
            return x
        return self.op("Where", c, x, y, shape=broadcast(c.shape, x.shape, y.shape), kind=x.kind)

    def clip(self, x: Value, lo: float | None, hi: float | None) -> Value:
        low = None if lo is None or lo == -math.inf else self.const(lo)
        high = None if hi is None or hi == math.inf else self.const(hi)
        if low is None and high is None:
            return x
        return self.op("Clip", x, *([low] if high is None else [low, high]), shape=x.shape)

    def cast(self, x: Value, kind: str) -> Value:
        if x.kind == kind:
            return x
        if x.array is not None:
            return self.const(np.trunc(x.array) if kind == INT else x.array, kind)
        return self.op("Cast", x, shape=x.shape, kind=kind, to=kind)

    # ---- along axes -------------------------------------------------------------------------------

    def reduce(self, op: str, x: Value, axes: Sequence[int], keep: bool = False) -> Value:
        """`axes` count from the end (negative)."""
        at = sorted(a % x.rank for a in axes)
        if not at:
            return x
        if x.node is not None and x.array is None and x.node.op in ("Squeeze", "Unsqueeze") and not keep:
            merged = self._reduce_through(op, x, at)
            if merged is not None:
                return merged
        shape = tuple(1 if k in at else d for k, d in enumerate(x.shape) if keep or k not in at)
        return self.op(op, x, self.ints([a - x.rank for a in at]), shape=shape, kind=x.kind, keepdims=int(keep))

    def _reduce_through(self, op: str, x: Value, at: list[int]) -> Value | None:
        """A reduction of a squeezed value reduces the value itself."""
        assert x.node is not None
        source, axes = x.node.inputs[0], x.node.inputs[1]
        if x.node.op != "Squeeze" or op not in ("ReduceSum", "ReduceMax") or source is None or axes is None:
            return None
        gone = {int(a) % source.rank for a in np.asarray(axes.array)}
        left = [k for k in range(source.rank) if k not in gone]
        return self.reduce(op, source, [k - source.rank for k in sorted(gone | {left[a] for a in at})])

    def softmax(self, x: Value, axis: int, log: bool = False) -> Value:
        return self.op("LogSoftmax" if log else "Softmax", x, shape=x.shape, axis=axis % x.rank)

    def cumsum(self, x: Value, axis: int, exclusive: bool = False, reverse: bool = False) -> Value:
        attrs = {k: 1 for k, on in (("exclusive", exclusive), ("reverse", reverse)) if on}
        return self.op("CumSum", x, self.const(axis % x.rank, INT), shape=x.shape, **attrs)

    # ---- structure --------------------------------------------------------------------------------

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        if list(perm) == list(range(x.rank)):
            return x
        if x.node is not None and x.array is None and x.node.op == "Transpose":
            source, first = x.node.inputs[0], x.node.attrs["perm"]
            assert source is not None
            return self.transpose(source, [first[p] for p in perm])
        table = row_of(x)
        if table is not None and x.node is not None:
            turned_table = self.const(np.transpose(table, [0, *(p + 1 for p in perm)]), x.kind)
            return self.op("Gather", turned_table, x.node.inputs[1], shape=turned_table.shape[1:], kind=x.kind, axis=0)
        return self.op("Transpose", x, shape=tuple(x.shape[p] for p in perm), kind=x.kind, perm=tuple(perm))

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """Symbolic dims: where the operand has one in the same place it is kept, one other is inferred."""
        target = tuple(shape)
        if target == x.shape:
            return x
        if x.array is not None:
            return self.const(x.array.reshape([d if isinstance(d, int) else -1 for d in target]), x.kind)
        if x.node is not None and x.node.op == "Reshape" and x.node.inputs[0] is not None:
            x = x.node.inputs[0]
            if target == x.shape:
                return x
        table = row_of(x)
        if table is not None and x.node is not None:
            flat = self.const(table.reshape((table.shape[0], *target)), x.kind)
            return self.op("Gather", flat, x.node.inputs[1], shape=target, kind=x.kind, axis=0)
        numbers: list[int] = []
        for k, d in enumerate(target):
            if isinstance(d, int):
                numbers.append(d)
            else:
                same = k < x.rank and x.shape[k] == d
                numbers.append(0 if same else -1)
        assert numbers.count(-1) <= 1, f"cannot reshape {x.shape} to {target}"
        return self.op("Reshape", x, self.ints(numbers), shape=target, kind=x.kind)

    def unsqueeze(self, x: Value, axes: Sequence[int]) -> Value:
        """Axes count in the result, from the end (negative)."""
        if not axes:
            return x
        rank = x.rank + len(axes)
        at = sorted(a % rank for a in axes)
        dims = iter(x.shape)
        shape = tuple(1 if k in at else next(dims) for k in range(rank))
        if x.node is not None and x.array is None and x.node.op in ("Squeeze", "Reshape"):
            source = x.node.inputs[0]
            # Not across groups: equal groups should stay equal.
            if source is not None and source.shape == shape and x.node.group == self.group:
                return source
        return self.op("Unsqueeze", x, self.ints([a - rank for a in at]), shape=shape, kind=x.kind)

    def squeeze(self, x: Value, axes: Sequence[int]) -> Value:
        if not axes:
            return x
        at = sorted(a % x.rank for a in axes)
        shape = tuple(d for k, d in enumerate(x.shape) if k not in at)
        if x.node is not None and x.array is None and x.node.op == "Unsqueeze":
            source = x.node.inputs[0]
            if source is not None and source.shape == shape:
                return source
        return self.op("Squeeze", x, self.ints([a - x.rank for a in at]), shape=shape, kind=x.kind)

    def expand(self, x: Value, shape: Sequence[Dim]) -> Value:
        """Broadcast to a shape; the batch is read from an input where the value has none."""
        target = tuple(shape)
        if x.shape == target:
            return x
        padded: Shape = (1,) * (len(target) - x.rank) + x.shape
        need = [k for k, d in enumerate(target) if isinstance(d, str) and padded[k] != d]
        if x.array is not None and not any(isinstance(d, str) for d in target):
            return self.const(np.broadcast_to(x.array, target), x.kind)
        if not need:
            numbers = [1 if isinstance(d, str) else d for d in target]
            return self.op("Expand", x, self.ints(numbers), shape=target, kind=x.kind)
        return self.op("Expand", x, self.shape_of(target), shape=target, kind=x.kind)

    def shape_of(self, shape: Sequence[Dim]) -> Value:
        """A shape as an int64 tensor."""
        if all(isinstance(d, int) for d in shape):
            return self.ints([d for d in shape if isinstance(d, int)])
        parts: list[Value] = []
        run: list[int] = []
        for d in shape:
            if isinstance(d, int):
                run.append(d)
                continue
            assert self.batch is not None, f"the size of `{d}` is not known here"
            assert d == "batch", d
            parts += ([self.ints(run)] if run else []) + [self.batch]
            run = []
        parts += [self.ints(run)] if run else []
        if len(parts) == 1:
            return parts[0]
        return self.op("Concat", *parts, shape=(len(tuple(shape)),), kind=INT, axis=0)

    def filled(self, value: float, shape: Sequence[Dim]) -> Value:
        """A constant of a shape that may be symbolic."""
        return self.expand(self.const(value), shape)

    def slice(self, x: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        n = x.shape[axis]
        assert isinstance(n, int)
        if start == 0 and stop == n and step == 1:
            return x
        size = max(0, -(-(stop - start) // step))
        shape = list(x.shape)
        shape[axis] = size
        if x.node is not None and x.array is None and x.node.op == "Slice" and step == 1 and len(x.node.inputs) == 4:
            source, starts, _, axes = x.node.inputs
            if source is not None and starts is not None and axes is not None and starts.array is not None:
                old = np.asarray(axes.array)
                if old.size == 1 and int(old[0]) == axis % x.rank - x.rank:
                    first = int(starts.array[0])
                    return self.slice(source, axis, first + start, first + stop)
        through = self._slice_through(x, axis, start, stop) if step == 1 else None
        if through is not None:
            return through
        index = [self.ints([start]), self.ints([stop]), self.ints([axis % x.rank - x.rank])]
        if step != 1:
            index.append(self.ints([step]))
        return self.op("Slice", x, *index, shape=tuple(shape), kind=x.kind)

    def _slice_through(self, x: Value, axis: int, start: int, stop: int) -> Value | None:
        """A slice that is one part of a join, or a part turned round, is read from the part."""
        node, at = x.node, axis % x.rank
        if node is None or x.array is not None:
            return None
        if node.op == "Concat" and node.attrs["axis"] == at:
            place = 0
            for part in node.inputs:
                assert part is not None
                n = part.shape[at]
                assert isinstance(n, int)
                if place <= start and stop <= place + n:
                    return self.slice(part, axis, start - place, stop - place)
                place += n
        if turned(x) == at - x.rank:
            source, n = node.inputs[0], x.shape[at]
            assert isinstance(n, int)
            if source is not None and source.node is not None and source.node.op == "Concat":
                part = self._slice_through(source, axis, n - stop, n - start)
                return self.flip(part, axis) if part is not None else None
        return None

    def flip(self, x: Value, axis: int) -> Value:
        if x.shape[axis] == 1:
            return x
        if turned(x) == axis % x.rank - x.rank and x.node is not None and x.node.inputs[0] is not None:
            return x.node.inputs[0]
        n = x.shape[axis]
        assert isinstance(n, int)
        index = [self.ints([n - 1]), self.ints([-n - 1]), self.ints([axis % x.rank - x.rank]), self.ints([-1])]
        return self.op("Slice", x, *index, shape=x.shape, kind=x.kind)

    def pick(self, x: Value, axis: int, index: int) -> Value:
        """One index of an axis, which goes."""
        parts = unflattened(x)
        if parts is not None and x.node is not None and x.node.inputs[0] is not None and axis % x.rank == x.rank - 2:
            width = parts[-1]
            assert isinstance(width, int)
            return self.slice(x.node.inputs[0], -1, index * width, (index + 1) * width)
        shape = tuple(d for k, d in enumerate(x.shape) if k != axis % x.rank)
        return self.op("Gather", x, self.const(index, INT), shape=shape, kind=x.kind, axis=axis % x.rank)

    def take(self, x: Value, axis: int, index: Sequence[int]) -> Value:
        shape = list(x.shape)
        shape[axis] = len(index)
        return self.op("Gather", x, self.ints(index), shape=tuple(shape), kind=x.kind, axis=axis % x.rank)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """Joins along an axis (from the end); the other dims are broadcast first."""
        if len(parts) == 1:
            return parts[0]
        rank = max(p.rank for p in parts)
        at = axis % rank
        flat = [((1,) * (rank - p.rank) + p.shape) for p in parts]
        common = broadcast(*(tuple(1 if k == at else d for k, d in enumerate(s)) for s in flat))
        full = [
            self.expand(p, tuple(s[at] if k == at else d for k, d in enumerate(common)))
            for p, s in zip(parts, flat, strict=True)
        ]
        total = sum(d for s in flat if isinstance(d := s[at], int))
        shape = tuple(total if k == at else d for k, d in enumerate(common))
        return self.op("Concat", *full, shape=shape, kind=parts[0].kind, axis=at)

    def split(self, x: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
        if x.array is not None:
            cuts = np.cumsum(list(sizes))[:-1]
            return [self.const(p, x.kind) for p in np.split(x.array, cuts, axis)]
        shapes = [tuple(n if k == axis % x.rank else d for k, d in enumerate(x.shape)) for n in sizes]
        return self.multi("Split", x, self.ints(sizes), shapes=shapes, kind=x.kind, axis=axis % x.rank)

    def matmul(self, a: Value, b: Value) -> Value:
        """Stacks of matrices, batch dims broadcast. A constant matrix takes in a reversal or permutation before it."""
        if b.array is not None and b.rank == 2 and a.node is not None and a.array is None:
            source = a.node.inputs[0] if a.node.inputs else None
            if turned(a) == -1 and source is not None:
                return self.matmul(source, self.const(b.array[::-1]))
            order = permuted(a)
            if order is not None and source is not None:
                matrix = np.zeros_like(b.array)
                matrix[order] = b.array
                return self.matmul(source, self.const(matrix))
        lead = broadcast(a.shape[:-2], b.shape[:-2])
        return self.op("MatMul", a, b, shape=(*lead, a.shape[-2], b.shape[-1]))

    def gather_elements(self, x: Value, index: Value, axis: int) -> Value:
        return self.op("GatherElements", x, index, shape=index.shape, axis=axis % x.rank)

    # ---- loops ------------------------------------------------------------------------------------

    def mark(self) -> int:
        """How many bodies are open."""
        return len(self.stack)

    def undo(self, mark: int) -> None:
        """Closes bodies that were begun and given up; what they put outside is pruned when nothing reads it."""
        del self.stack[mark:]

    def loop(
        self,
        rounds: int | Value,
        carried: Sequence[Value],
        run: Callable[[Value, list[Value]], tuple[Value | None, list[Value]]],
        hint: str,
    ) -> list[Value]:
        """`Loop` of at most `rounds` rounds: `run(i, values)` gives whether to go on, and the new values.

        Values that it gives beyond those carried come out stacked along a new first axis.
        """
        level = len(self.stack)
        i = Value((), INT, level=level, name="")
        go = Value((), BOOL, level=level, name="")
        inside = [Value(v.shape, v.kind, level=level) for v in carried]
        body = Body([i, go, *inside])
        self.stack.append(body)
        go_on, results = run(i, inside)
        if go_on is None:
            go_on = self.op("Identity", go, shape=(), kind=BOOL)
        results = [*(self.expand(r, c.shape) for r, c in zip(results, carried, strict=False)), *results[len(carried) :]]
        # A loop's results are nodes of its body.
        body.outputs = [
            v if v.level == level and v.node is not None else self._here("Identity", v) for v in [go_on, *results]
        ]
        seen: set[int] = set()
        for k, v in enumerate(body.outputs):
            if id(v) in seen:
                body.outputs[k] = self._here("Identity", v)
            seen.add(id(body.outputs[k]))
        self.stack.pop()
        count = self.const(rounds, INT) if isinstance(rounds, int) else rounds
        here = len(self.stack) - 1
        node = Node(
            "Loop", [count, None, *carried], [], {}, "/".join(self.scopes), hint, {"body": body}, origin=self.origin
        )
        node.outputs = [Value(v.shape, v.kind, level=here, node=node) for v in carried]
        for r in results[len(carried) :]:
            assert isinstance(rounds, int)
            node.outputs.append(Value((rounds, *r.shape), r.kind, level=here, node=node))
        self.stack[-1].nodes.append(node)
        return node.outputs

    def _here(self, op: str, v: Value) -> Value:
        return self.multi(op, v, shapes=[v.shape], kind=v.kind, pure=False)[0]


def row_of(v: Value) -> Array | None:
    """The constant of whose rows (along the first axis) a value is one: its form can be changed beforehand."""
    node = v.node
    if node is None or v.array is not None or node.op != "Gather" or node.attrs["axis"] != 0:
        return None
    table, index = node.inputs[0], node.inputs[1]
    return table.array if table is not None and index is not None and index.rank == 0 else None


def unflattened(v: Value) -> Shape | None:
    """The two axes into which the last one of another value was split to give this."""
    node = v.node
    if node is None or v.array is not None or node.op != "Reshape" or v.rank < 2:
        return None
    source = node.inputs[0]
    if source is None or source.array is not None or source.shape[:-1] != v.shape[:-2]:
        return None
    return v.shape[-2:] if all(isinstance(d, int) for d in v.shape[-2:]) and isinstance(source.shape[-1], int) else None


def turned(v: Value) -> int | None:
    """The axis (from the end) along which a value is another one reversed whole."""
    node = v.node
    if node is None or v.array is not None or node.op != "Slice" or len(node.inputs) != 5:
        return None
    axes, source = node.inputs[3], node.inputs[0]
    if axes is None or axes.array is None or source is None or source.shape != v.shape:
        return None
    return int(axes.array[0])


def permuted(v: Value) -> Array | None:
    """The order in which a value has another one's entries along the last axis."""
    node = v.node
    if node is None or node.op != "Gather" or node.attrs["axis"] != v.rank - 1:
        return None
    index, source = node.inputs[1], node.inputs[0]
    if index is None or index.array is None or source is None or source.shape != v.shape:
        return None
    return index.array if sorted(index.array.tolist()) == list(range(len(index.array))) else None


def is_number(v: Value, number: float) -> bool:
    return v.array is not None and v.array.ndim == 0 and v.kind == REAL and float(v.array) == number


def _frozen(v: Any) -> Hashable:
    return tuple(v) if isinstance(v, list) else v
