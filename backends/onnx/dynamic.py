"""Models whose axes of open size stay open: one graph made from the graphs of several sizes.

Types in the IR have concrete sizes, so a program is lowered at a few sizes of the open axes ("points"), chosen so
that no two axes, nor their product, go together. The graphs must be the same but for numbers. Each number that
differs is written as an expression of the axes (`H / 2`, `H * W`, `T - 1`), computed in the model from the shape
of an input; an array whose extent differs must be constant, affine or a step along it. One point more than an
expression has unknowns, and a small one, check it. What has no such form is refused with its place in the spec,
so that no size of a witness is ever left in a model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from flowlang.backends.onnx.graph import BOOL, INT, REAL, Body, Builder, Dim, Node, Shape, Value
from flowlang.backends.onnx.lower import Unlowered

Point = Mapping[str, int]  # an axis's size
# Of each axis, at the points: of different remainders by small numbers, so that no rule by parity looks like a constant,
# and no powers of two, whose quotients are written as products.
SIZES = ((5, 6, 13), (11, 7, 18), (19, 30, 23), (34, 37, 27))
MULTIPLES = (1, 2, 4, 8, 16, 32, 3)  # that a map may ask of a size (blocks, scales)
MOST_NUMBERS = 16  # that differ in one constant
WAY_AROUND = "export with fixed sizes: `--dynamic none`, or `dynamic=()` from Python"


@dataclass(frozen=True)
class Size:
    """factor · (product of axes)^power + offset."""

    axes: tuple[str, ...]
    factor: Fraction
    offset: Fraction

    def at(self, p: Point) -> Fraction:
        return self.factor * math.prod(p[a] for a in self.axes) + self.offset

    def __str__(self) -> str:
        up, down = self.factor.numerator, self.factor.denominator
        text = "*".join([*([str(up)] if up != 1 else []), *self.axes])
        text += f"/{down}" if down != 1 else ""
        return text + (f"{'+' if self.offset > 0 else '-'}{abs(self.offset)}" if self.offset else "")


def products(axes: Sequence[str]) -> list[tuple[str, ...]]:
    return [c for n in range(1, len(axes) + 1) for c in itertools.combinations(axes, n)]


def fit_size(values: Sequence[int], points: Sequence[Point]) -> Size | None:
    """The expression of whole numbers, from the first two points; the others must agree."""
    for axes in products(list(points[0])):
        m = [math.prod(p[a] for a in axes) for p in points]
        if m[0] == m[1]:
            continue
        factor = Fraction(values[1] - values[0], m[1] - m[0])
        found = Size(axes, factor, values[0] - factor * m[0])
        if factor and found.offset.denominator == 1 and all(
            found.at(p) == v for p, v in zip(points, values, strict=True)
        ):  # fmt: skip
            return found
    return None


# How a number may depend on a product of axes: by a power, by its logarithm, or by both (the log-det of a scale 1/sqrt(T)).
GROWTH: dict[str, Callable[[float], float]] = {
    "m": lambda m: m, "1/m": lambda m: 1 / m, "1/sqrt(m)": lambda m: m**-0.5, "sqrt(m)": lambda m: m**0.5,
    "log(m)": math.log, "m*log(m)": lambda m: m * math.log(m), "m*m": lambda m: m * m, "1/(m*m)": lambda m: m**-2,
}  # fmt: skip


@dataclass(frozen=True)
class Amount:
    """factor · growth(product of axes) + offset, arrays of real numbers."""

    axes: tuple[str, ...]
    growth: str
    factor: Any
    offset: Any


def fit_amount(arrays: Sequence[Any], points: Sequence[Point]) -> Amount | None:
    for axes, growth in itertools.product(products(list(points[0])), GROWTH):
        m = [GROWTH[growth](float(math.prod(p[a] for a in axes))) for p in points]
        if m[0] == m[1]:
            continue
        with np.errstate(invalid="ignore"):
            factor = (arrays[1] - arrays[0]) / (m[1] - m[0])
            offset = arrays[0] - factor * m[0]
            offset = np.where(np.abs(offset) <= 1e-9 * np.abs(factor), 0.0, offset)
            if all(np.allclose(factor * k + offset, a, rtol=1e-9, atol=1e-12) for k, a in zip(m, arrays, strict=True)):
                return Amount(axes, growth, factor, offset)
    return None


class General:
    """The base graph, whose numbers become expressions, beside the graphs of the other points."""

    def __init__(self, points: Sequence[Point], builders: Sequence[Builder], data: Any):
        self.points, self.builders, self.g = points, builders, builders[0]
        self.axes = list(points[0])
        self.partner: list[dict[int, Value]] = [{} for _ in builders]
        self.keep: list[Any] = []
        self.uses: list[tuple[Node, int, list[Value]]] = []
        self.shapes: list[tuple[Value, Shape]] = []
        self.sizes: dict[Size, Value] = {}
        self.last: Node | None = None
        self.inputs = list(self.g.stack[0].inputs)
        self.origin = data  # what a refusal without a place of its own points at

    def refuse(self, reason: str, node: Node | None = None) -> Unlowered:
        at = node or self.last
        if at is not None and at.origin is not None and at.origin.span is not None:
            self.origin = at.origin
        named = ", ".join(f"`{a}`" for a in self.axes)
        return Unlowered(self.origin, f"with {named} of any size, {reason}", WAY_AROUND)

    # ---- comparing ----------------------------------------------------------------------------------------

    def compare(self, outputs: Sequence[Mapping[str, Value]]) -> None:
        """Finds what differs; raises Unlowered where the graphs themselves do."""
        mains = [b.stack[0] for b in self.builders]
        first = next((n for n in mains[0].nodes), None)
        self.last = first
        self.body(mains)
        for key in outputs[0]:
            self.operand([o[key] for o in outputs], None)

    def body(self, bodies: Sequence[Body]) -> None:
        for values in zip(*(b.inputs for b in bodies), strict=True):
            self.made(values)
        for k, nodes in enumerate(itertools.zip_longest(*(b.nodes for b in bodies))):
            node = nodes[0]
            self.last = node or bodies[0].nodes[k - 1]
            if any(n is None for n in nodes):
                raise self.refuse("the graph has a part for each index")
            self.node(nodes)
        for values in zip(*(b.outputs for b in bodies), strict=True):
            self.operand(values, None)

    def node(self, nodes: Sequence[Node]) -> None:
        node = nodes[0]
        for n in nodes[1:]:
            if (n.op, n.domain, len(n.inputs), len(n.outputs)) != (
                node.op,
                node.domain,
                len(node.inputs),
                len(node.outputs),
            ):
                raise self.refuse("other operations are needed at other sizes", node)
            if n.attrs != node.attrs:
                raise self.refuse(f"`{node.op}` has other attributes at other sizes", node)
        for slot, values in enumerate(zip(*(n.inputs for n in nodes), strict=True)):
            if any(v is None for v in values):
                if not all(v is None for v in values):
                    raise self.refuse("other operands are needed at other sizes", node)
                continue
            constants = self.operand([v for v in values if v is not None], node)
            if constants is not None:
                self.uses.append((node, slot, constants))
        for inner in node.bodies:
            self.body([n.bodies[inner] for n in nodes])
            self.last = node
        for outs in zip(*(n.outputs for n in nodes), strict=True):
            self.made(outs)

    def made(self, values: Sequence[Value]) -> None:
        for k, v in enumerate(values):
            self.partner[k][id(v)] = values[0]
        self.shapes.append((values[0], self.shape([v.shape for v in values])))

    def operand(self, values: Sequence[Value], node: Node | None) -> list[Value] | None:
        """The constants, where they differ; other operands must correspond."""
        if any(v.array is not None for v in values):
            if any(v.array is None for v in values):
                raise self.refuse("a value is constant at some sizes", node)
            first = values[0].array
            if all(v.array is not None and v.array.shape == first.shape and _equal(v.array, first) for v in values[1:]):
                return None
            if node is None:
                raise self.refuse("a result does not depend on the input")
            return list(values)
        if any(self.partner[k].get(id(v)) is not values[0] for k, v in enumerate(values)):
            raise self.refuse("values go other ways at other sizes", node)
        return None

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        out: list[Dim] = []
        for dims in zip(*shapes, strict=True):
            numbers = [d for d in dims if isinstance(d, int)]
            if len(numbers) < len(dims) or len(set(numbers)) == 1:
                out.append(self.merged(dims))
                continue
            found = fit_size(numbers, self.points)
            if found is None:
                raise self.refuse(f"a size ({numbers[0]} at {_told(self.points[0])}) is no simple expression of it")
            out.append(str(found))
        return tuple(out)

    def merged(self, dims: Sequence[Dim]) -> Dim:
        """A name; or the name of a product with the batch, as a flattened batch has it."""
        return dims[0] if len(set(dims)) == 1 else "*".join(map(str, ["merged", *sorted(self.axes)]))

    # ---- rewriting ------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Writes the expressions into the base graph; where there is none for something, the graph stays as it was."""
        g, main = self.g, self.g.stack[0]
        before, known, inputs = main.nodes, main.known, list(main.inputs)
        main.nodes, main.known = [], {}
        scopes, g.scopes, g.group = g.scopes, ["sizes"], None
        renewed: dict[tuple[int, ...], Value] = {}
        try:
            for node, _, values in self.uses:
                key = tuple(map(id, values))
                self.last = node
                if key not in renewed:
                    renewed[key] = self.constant([v.array for v in values], values[0].kind)
        except Unlowered:
            main.nodes, main.known, main.inputs = before, known, inputs
            raise
        finally:
            g.scopes = scopes
        for node, slot, values in self.uses:
            node.inputs[slot] = renewed[tuple(map(id, values))]
        main.nodes += before
        for v, shape in self.shapes:
            v.shape = shape

    def axis(self, name: str) -> Value:
        """The size of an axis, int64 `[1]`, from the shape of an input, or an input of that name."""
        key = Size((name,), Fraction(1), Fraction(0))
        if key in self.sizes:
            return self.sizes[key]
        g = self.g
        shaped = {id(v): s for v, s in self.shapes}
        for v in self.inputs:
            for k, d in enumerate(shaped[id(v)]):
                numbers = [self.dim_at(v, k, j) for j in range(len(self.points))]
                if not isinstance(d, str) or None in numbers:
                    continue
                found = fit_size([n for n in numbers if n is not None], self.points)
                if found is not None and found.axes == (name,):
                    size = g.op("Shape", v, shape=(1,), kind=INT, start=k, end=k + 1)
                    back = self.scaled(size, 1 / found.factor, -found.offset / found.factor)
                    return self.sizes.setdefault(key, back)
        if any(i.name == name for i in g.stack[0].inputs):
            raise self.refuse(f"`{name}` is an input already, and none tells the axis's size")
        given = g.input(name, (1,), INT)
        self.shapes.append((given, (1,)))
        return self.sizes.setdefault(key, given)

    def dim_at(self, v: Value, k: int, j: int) -> int | None:
        other = next(w for w in self.builders[j].stack[0].inputs if self.partner[j].get(id(w)) is v)
        d = other.shape[k]
        return d if isinstance(d, int) else None

    def scaled(self, v: Value, factor: Fraction, offset: Fraction) -> Value:
        """factor · v + offset, which is whole at every size that the spec allows."""
        g = self.g
        if factor.numerator != 1:
            v = g.binary("Mul", v, g.const([factor.numerator], INT), INT)
        extra = offset * factor.denominator
        if extra:
            v = g.binary("Add", v, g.const([int(extra)], INT), INT)
        return g.binary("Div", v, g.const([factor.denominator], INT), INT) if factor.denominator != 1 else v

    def size(self, s: Size) -> Value:
        """An expression as int64 `[1]`."""
        if s not in self.sizes:
            whole = self.product(s.axes)
            self.sizes[s] = self.scaled(whole, s.factor, s.offset)
        return self.sizes[s]

    def product(self, axes: Sequence[str]) -> Value:
        found = self.axis(axes[0])
        for a in axes[1:]:
            found = self.g.binary("Mul", found, self.axis(a), INT)
        return found

    def constant(self, arrays: Sequence[Any], kind: str) -> Value:
        if len({a.shape for a in arrays}) == 1:
            return self.numbers(arrays, kind)
        if len({a.ndim for a in arrays}) > 1:
            raise self.refuse("a constant has other axes at other sizes")
        return self.extended(arrays, kind)

    def numbers(self, arrays: Sequence[Any], kind: str) -> Value:
        """A constant of one shape, whose numbers differ."""
        g = self.g
        if all(_equal(a, arrays[0]) for a in arrays[1:]):
            return g.const(arrays[0], kind)
        if kind == REAL:
            found = fit_amount(arrays, self.points)
            if found is None:
                raise self.refuse("a number in the map is no simple expression of it")
            m = self.grown(g.cast(self.product(found.axes), REAL), found.growth)
            m = m if arrays[0].ndim else g.squeeze(m, [-1])
            return g.add(g.mul(m, g.const(found.factor)), g.const(found.offset))
        if kind == BOOL or arrays[0].size > MOST_NUMBERS:
            raise self.refuse("a table of the map depends on it")
        parts: list[Value] = []
        for values in zip(*(a.reshape(-1).tolist() for a in arrays), strict=True):
            if len(set(values)) == 1:
                parts.append(g.ints([values[0]]))
                continue
            size = fit_size(values, self.points)
            if size is None:
                raise self.refuse(f"a size ({values[0]} at {_told(self.points[0])}) is no simple expression of it")
            parts.append(self.size(size))
        flat = parts[0] if len(parts) == 1 else g.op("Concat", *parts, shape=(len(parts),), kind=INT, axis=0)
        return flat if arrays[0].ndim == 1 else g.reshape(flat, arrays[0].shape)

    def grown(self, m: Value, growth: str) -> Value:
        g = self.g
        if "sqrt" in growth:
            m = g.unary("Sqrt", m)
        if growth.endswith("log(m)"):
            return g.mul(m, g.unary("Log", m)) if growth.startswith("m") else g.unary("Log", m)
        if "m*m" in growth:
            m = g.mul(m, m)
        return g.unary("Reciprocal", m) if growth.startswith("1/") else m

    def extended(self, arrays: Sequence[Any], kind: str) -> Value:
        """A constant whose extent differs: the same, affine, or a step, along the axes where it does."""
        g, rank = self.g, arrays[0].ndim
        shape = self.shape([a.shape for a in arrays])
        open_axes = [k for k, d in enumerate(shape) if isinstance(d, str)]
        flat = [k for k in open_axes if all(_flat_along(a, k) for a in arrays)]
        small = [_first(a, flat) for a in arrays]
        rest = [k for k in open_axes if k not in flat]
        if not rest:
            made = self.constant(small, kind)
        elif len(rest) == 1:
            made = self.affine(small, rest[0], kind)
        elif len(rest) == 2:
            made = self.step(small, rest[0], rest[1], kind)
        else:
            raise self.refuse("a table of the map depends on it")
        if not flat:
            return made
        target = [self.dim([a.shape[k] for a in arrays]) for k in range(rank)]
        wanted = target[0] if rank == 1 else g.op("Concat", *target, shape=(rank,), kind=INT, axis=0)
        return g.op("Expand", made, wanted, shape=shape, kind=kind)

    def dim(self, sizes: Sequence[int]) -> Value:
        if len(set(sizes)) == 1:
            return self.g.ints([sizes[0]])
        found = fit_size(sizes, self.points)
        assert found is not None
        return self.size(found)

    def places(self, sizes: Sequence[int], axis: int, rank: int) -> Value:
        """0, 1, .. along an axis, int64."""
        g = self.g
        stop = g.squeeze(self.dim(sizes), [-1])
        name = str(fit_size(sizes, self.points))
        found = g.op("Range", g.const(0, INT), stop, g.const(1, INT), shape=(name,), kind=INT)
        axes = [k - rank for k in range(rank) if k != axis]
        return g.unsqueeze(found, axes)

    def affine(self, arrays: Sequence[Any], axis: int, kind: str) -> Value:
        """first + place · step along one axis."""
        g, rank = self.g, arrays[0].ndim
        if kind == BOOL:
            raise self.refuse("a table of the map depends on it")
        firsts, steps = [], []
        for a in arrays:
            if a.shape[axis] < 2:  # a single place tells no step: a larger point does
                raise self.refuse("a table of the map depends on it")
            first = a.take([0], axis)
            step = a.take([1], axis) - first
            index = np.arange(a.shape[axis]).reshape([-1 if k == axis else 1 for k in range(rank)])
            if not np.allclose(first + index * step, a, rtol=1e-12, atol=1e-12):
                raise self.refuse("a table of the map depends on it")
            firsts.append(first)
            steps.append(step)
        place = self.places([a.shape[axis] for a in arrays], axis, rank)
        first, step = self.constant(firsts, kind), self.constant(steps, kind)
        if kind == REAL:
            return g.add(g.mul(g.cast(place, REAL), step), first)
        if not (step.array is not None and (step.array == 1).all()):
            place = g.binary("Mul", place, step, INT)
        if first.array is not None and not first.array.any() and first.array.size == 1:
            return place
        return g.binary("Add", place, first, INT)

    def step(self, arrays: Sequence[Any], row: int, col: int, kind: str) -> Value:
        """A matrix with two values, by whether the column is beyond the row (causal masks), or is the row (identity)."""
        g, rank = self.g, arrays[0].ndim
        forms = {_step_form(a, row, col) for a in arrays}
        if len(forms) != 1 or None in forms:
            raise self.refuse("a table of the map depends on it")
        (form,) = forms
        assert form is not None
        op, at, yes, no = form
        rows, cols = ([a.shape[k] for a in arrays] for k in (row, col))
        off = g.binary("Sub", self.places(cols, col, rank), self.places(rows, row, rank), INT)
        where = g.binary(op, off, g.const(at, INT), BOOL)
        if kind == BOOL:
            return where if yes else g.unary("Not", where, BOOL)
        return g.op("Where", where, g.const(yes, kind), g.const(no, kind), shape=where.shape, kind=kind)


def _step_form(a: Any, row: int, col: int) -> tuple[str, int, Any, Any] | None:
    """(comparison of column - row, with what, value where it holds, value elsewhere)."""
    if a.size != a.shape[row] * a.shape[col]:
        return None
    m = a.reshape(a.shape[row], a.shape[col])
    off = np.arange(m.shape[1])[None, :] - np.arange(m.shape[0])[:, None]
    values = list(dict.fromkeys(m.reshape(-1).tolist()))
    if len(values) != 2:
        return None
    for yes, no in (values, values[::-1]):
        holds = off[m == yes]
        for op, at, test in (
            ("Greater", int(holds.min()) - 1, off > holds.min() - 1),
            ("Equal", int(holds[0]), off == holds[0]),
        ):
            if (test == (m == yes)).all():
                return op, at, yes, no
    return None


def _equal(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _flat_along(a: Any, axis: int) -> bool:
    return bool((a == a.take([0], axis)).all())


def _first(a: Any, axes: Sequence[int]) -> Any:
    return a[tuple(slice(0, 1) if k in axes else slice(None) for k in range(a.ndim))]


def _told(p: Point) -> str:
    return ", ".join(f"{k} = {v}" for k, v in p.items())


def points_of(multiples: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes at which a program is lowered."""
    return [{a: SIZES[k][j] * m for k, (a, m) in enumerate(multiples.items())} for j in range(3)]


def small_points(multiples: Mapping[str, int]) -> list[dict[str, int]]:
    """The smallest sizes, from below."""
    return [{a: (s + k) * m for k, (a, m) in enumerate(multiples.items())} for s in (1, 2, 3)]


class OtherWeights(Exception):
    """At another size the flow has other weights."""


def multiple_of(at: Callable[[Point], object | None], axis: str) -> int | None:
    """The number of which sizes of an axis must be multiples; None where weights depend on it, or nothing else fits."""
    for m in MULTIPLES:
        try:
            # Two sizes, as one of them may be that of the weights.
            if all(at({axis: n * m}) is not None for n in SIZES[0][:2]):
                return m
        except OtherWeights:
            return None
    return None


__all__ = ["WAY_AROUND", "General", "OtherWeights", "Point", "multiple_of", "points_of", "small_points"]
