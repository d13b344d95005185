"""Building graphs: type inference, merging of equal nodes, smart constructors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from flowlang.ir.graph import Graph, Node, result_batched
from flowlang.ir.ops import OPS
from flowlang.ir.types import Axis, TensorType, TupleType, Type
from flowlang.source import Span


def _freeze(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, float | int):
        return (type(value).__name__, repr(value))
    return value if isinstance(value, Hashable) else id(value)


class Builder:
    """Adds ops to a graph. Equal pure nodes become one; ids are ints into `graph`."""

    def __init__(self, graph: Graph, span: Span | None = None):
        self.graph = graph
        self.span = span
        self._known: dict[Hashable, int] = {}

    def type(self, id: int) -> TensorType:
        return self.graph[id].tensor

    def op(self, name: str, *inputs: int, span: Span | None = None, label: str | None = None, **attrs: Any) -> int:
        """The node for `name(inputs; attrs)`; raises OpProblem when the types do not fit."""
        op = OPS[name]
        if op.simplify is not None:
            simpler = op.simplify(self, inputs, attrs)
            if simpler is not None:
                return simpler
        key = (name, inputs, _freeze(attrs)) if op.pure else None
        if key is not None and key in self._known:
            return self._known[key]
        type_ = op.infer([self.graph[i].type for i in inputs], attrs)  # type: ignore[misc]
        batched = False if op.pools else None
        node = self.graph.add(name, inputs, type_, attrs, span=span or self.span, label=label, batched=batched)
        if key is not None:
            self._known[key] = node.id
        return node.id

    def leaf(
        self, op: str, type: Type, *, batched: bool, span: Span | None = None, label: str | None = None, **attrs: Any
    ) -> int:
        """A node without operands whose type is given (input, param, state, const, draw)."""
        return self.graph.add(op, (), type, attrs, span=span or self.span, label=label, batched=batched).id

    def const(self, value: float | int | bool) -> int:
        kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "real"
        key = ("const", kind, repr(value))
        if key not in self._known:
            self._known[key] = self.leaf("const", TensorType((), kind), batched=False, value=value)
        return self._known[key]

    def const_value(self, id: int) -> float | int | bool | None:
        """The value of a scalar constant node, else None."""
        node = self.graph[id]
        if node.op == "const" and not node.tensor.axes:
            value = node.attrs["value"]
            assert isinstance(value, float | int | bool)
            return value
        return None

    def copy(self, node: Node, inputs: Sequence[int]) -> int:
        """The same op on other inputs (attributes, span and label kept)."""
        if not node.inputs and node.op not in ("const", "index"):
            return self.leaf(
                node.op, node.type, batched=node.batched, span=node.span, label=node.label, **dict(node.attrs)
            )
        if node.op == "const":
            key = ("const", _freeze(node.attrs.get("value")), node.type)
            if not node.tensor.axes:
                return self.const(node.attrs["value"])
            if key not in self._known:
                self._known[key] = self.leaf("const", node.type, batched=False, span=node.span, **dict(node.attrs))
            return self._known[key]
        if OPS[node.op].made:
            return self.graph.add(
                node.op, tuple(inputs), node.type, dict(node.attrs), span=node.span, label=node.label,
                batched=node.batched,
            ).id  # fmt: skip
        new = self.op(node.op, *inputs, span=node.span, label=node.label, **dict(node.attrs))
        if node.label:
            self.graph.relabel(new, node.label)
        return new

    def op_get(self, call: int, index: int, span: Span | None = None) -> int:
        """One result of a call that has several."""
        key = ("get", call, index)
        if key not in self._known:
            type_ = self.graph[call].type
            assert isinstance(type_, TupleType)
            batched = result_batched(self.graph, self.graph[call], index)
            self._known[key] = self.graph.add(
                "get", (call,), type_.items[index], {"index": index}, span=span, batched=batched
            ).id
        return self._known[key]

    # Shorthands that rules use a lot.

    def add(self, a: int, b: int) -> int:
        return self.op("add", a, b)

    def sub(self, a: int, b: int) -> int:
        return self.op("sub", a, b)

    def mul(self, a: int, b: int) -> int:
        return self.op("mul", a, b)

    def div(self, a: int, b: int) -> int:
        return self.op("div", a, b)

    def neg(self, a: int) -> int:
        return self.op("neg", a)

    def log_abs(self, a: int) -> int:
        return self.op("log_abs", a)

    def sum_all(self, id: int) -> int:
        """The sum over every axis (a scalar for each sample)."""
        names = self.type(id).names
        return self.op("sum", id, axes=names) if names else id

    def expand(self, id: int, type: TensorType) -> int:
        """Broadcast to a type that has at least the axes of the value, and in its order."""
        return self.op("expand", id, axes=tuple((a.name, a.size) for a in type.axes))

    def onehot(self, id: int, axis: str, size: int) -> int:
        """1 where the index along a new axis is the whole number, 0 elsewhere."""
        same = self.op("eq", id, self.op("index", axis=axis, size=size))
        return self.op("where", same, self.const(1.0), self.const(0.0))

    def total(self, id: int, over: Sequence[Axis]) -> int:
        """The value expanded over axes and summed: missing axes become a factor."""
        have = set(self.type(id).names)
        factor = 1
        for axis in over:
            if axis.name not in have:
                factor *= axis.size
        value = self.sum_all(id)
        return value if factor == 1 else self.mul(value, self.const(float(factor)))
