"""Values that are the same for every input and every parameter: numbers and masks made of them and of indices.

Small tables only: enough for the masks that authors write, never a cost worth measuring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from flowlang.ir.graph import Graph, Node
from flowlang.ir.relation import Matrix, Support, matrix
from flowlang.ir.types import Axis, TensorType

MAX_ENTRIES = 4096

FOLD: dict[str, Callable[..., float]] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "mod": lambda x, y: x % y,
    "min": min, "max": max, "lt": lambda x, y: float(x < y), "le": lambda x, y: float(x <= y), "gt": lambda x, y: float(x > y),
    "ge": lambda x, y: float(x >= y), "eq": lambda x, y: float(x == y), "ne": lambda x, y: float(x != y),
    "and": lambda x, y: float(bool(x) and bool(y)), "or": lambda x, y: float(bool(x) or bool(y)), "not": lambda x: float(not x),
    "neg": lambda x: -x, "abs": abs, "where": lambda c, x, y: x if c else y,
}  # fmt: skip
MOVES = ("order", "rename", "expand", "reverse")


@dataclass(frozen=True)
class Table:
    """A constant value, entries in the order of its axes."""

    axes: tuple[Axis, ...]
    values: tuple[float, ...]

    def at(self, where: dict[str, int]) -> float:
        place = 0
        for a in self.axes:
            place = place * a.size + where[a.name]
        return self.values[place]


class Constants:
    """Tables of the nodes of one graph, made when asked for; None for what is not constant or too large."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._known: dict[int, Table | None] = {}

    def of(self, id: int) -> Table | None:
        if id not in self._known:
            for i in self.graph.pending(id, self._known):
                self._known[i] = self.evaluate(self.graph[i])
        return self._known[id]

    def evaluate(self, node: Node) -> Table | None:
        if node.batched or not isinstance(node.type, TensorType) or node.tensor.count > MAX_ENTRIES:
            return None
        axes = node.tensor.axes
        if node.op == "const":
            return Table((), (float(node.attrs["value"]),)) if not axes else None
        if node.op == "index":
            return Table(axes, tuple(map(float, range(int(node.attrs["size"])))))
        operands = [self._known.get(i) for i in node.inputs]
        tables = [t for t in operands if t is not None]
        if not tables or len(tables) < len(operands) or (node.op not in FOLD and node.op not in MOVES):
            return None
        try:
            return Table(
                axes,
                tuple(self.entry(node, tables, dict(zip(node.tensor.names, i, strict=True))) for i in places(axes)),
            )
        except ZeroDivisionError:
            return None

    def entry(self, node: Node, tables: list[Table], where: dict[str, int]) -> float:
        if node.op == "rename":
            back = {new: old for old, new in node.attrs["pairs"]}
            where = {back.get(n, n): i for n, i in where.items()}
        elif node.op == "reverse":
            axis = node.attrs["axis"]
            where = {**where, axis: node.tensor.size(axis) - 1 - where[axis]}
        args = [t.at(where) for t in tables]
        return args[0] if node.op in MOVES else float(FOLD[node.op](*args))

    def support(self, id: int) -> Support | None:
        """Where a constant is not 0, if it varies along one axis or two."""
        table = self.of(id)
        if table is None or not 1 <= len(table.axes) <= 2 or all(table.values):
            return None
        return support_of(table.axes, [bool(v) for v in table.values])


def places(axes: tuple[Axis, ...]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(a.size) for a in axes))


def support_of(axes: tuple[Axis, ...], kept: list[bool]) -> Support:
    width = axes[1].size if len(axes) == 2 else 1
    bits = [sum(1 << j for j in range(width) if kept[i * width + j]) for i in range(axes[0].size)]
    found: Matrix = matrix(axes[0].size, width, bits)
    return Support.of({(axes[0].name, axes[1].name if len(axes) == 2 else None): found})


def holds(support: Support | None, axes: tuple[Axis, ...]) -> list[bool]:
    """At each place of these axes, whether what a support says of them alone allows a value other than 0."""
    if support is None:
        return [True] * prod(a.size for a in axes)
    names = [a.name for a in axes]
    told = [(k, m) for k, m in support.parts if k[0] in names and (k[1] is None or k[1] in names)]
    out = []
    for place in places(axes):
        where = dict(zip(names, place, strict=True))
        out.append(all(m.has(where[r], where[c] if c is not None else 0) for (r, c), m in told if r is not None))
    return out
