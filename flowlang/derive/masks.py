"""A constant 0/1 mask along an axis as a split of its index set (ANALYSIS.md A11): RealNVP's printed form.

Values with that axis are held in two parts, where the mask is 1 and where it is 0, as long as ops are
elementwise; there a product with the mask is the value or zero. Other ops see the parts joined again.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowlang.analysis.constants import FOLD, Constants
from flowlang.derive.forms import moved
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.ops import OPS
from flowlang.ir.types import TensorType

Part = int | float  # a value of the new graph, or a number that fills the part
Parts = tuple[Part, Part]


def split_by_mask(region: Region) -> Region | None:
    """The region with values along the first constant mask's axis in two parts; None without a mask."""
    folded = constants(region.graph)
    for n, values in sorted(folded.items()):
        if set(values) == {0.0, 1.0} and region.graph[n].tensor.rank == 1:
            return _Splitter(region, folded, region.graph[n].tensor.names[0], values).run()
    return None


def constants(graph: Graph) -> dict[int, tuple[float, ...]]:
    """Values of nodes that are numbers or constant along one axis."""
    tables = Constants(graph)
    return {n.id: t.values for n in graph if (t := tables.of(n.id)) is not None and len(t.axes) <= 1}


class _Splitter:
    def __init__(self, region: Region, folded: dict[int, tuple[float, ...]], axis: str, mask: Sequence[float]):
        self.region, self.source, self.folded = region, region.graph, folded
        self.axis, self.mask = axis, mask
        self.order = [i for v in (1.0, 0.0) for i, m in enumerate(mask) if m == v]
        self.ones = self.order.index(next(i for i, m in enumerate(mask) if m == 0.0))
        self.b = Builder(Graph())
        self.whole: dict[int, int] = {}
        self.parts: dict[int, Parts] = {}

    def run(self) -> Region:
        for node in self.source:
            self.b.span = node.span
            if node.op == "input" and self.fits(node.type):
                self.whole[node.id] = self.b.copy(node, ())
                self.parts[node.id] = self.cut(self.whole[node.id])
            elif not self.split(node):
                self.copy(node)
        region = self.region
        ends = [*region.outputs, *region.inputs, *region.context]
        ends += [s for step in region.steps for s in (step.before, step.after)]
        for value, arguments in [(x.value, x.arguments) for x in region.emissions] + [
            (x.value, x.arguments) for x in region.draws
        ]:
            ends += [value, *(i for _, i in arguments)]
        ends += [i for _, i in region.base.arguments] if region.base is not None else []
        return moved(region, self.b.graph, {n: self.joined(n) for n in ends})

    def fits(self, t: object) -> bool:
        return isinstance(t, TensorType) and t.has(self.axis) and t.size(self.axis) == len(self.mask)

    def cut(self, value: int) -> Parts:
        b, n = self.b, len(self.mask)
        ordered = b.op("permute", value, axis=self.axis, order=tuple(self.order))
        return (
            b.op("slice", ordered, axis=self.axis, start=0, stop=self.ones),
            b.op("slice", ordered, axis=self.axis, start=self.ones, stop=n),
        )

    def split(self, node: Node) -> bool:
        """Whether the node is elementwise and could be held in parts."""
        values = self.folded.get(node.id)
        if values is not None and len(values) == len(self.mask) and self.fits(node.type):
            groups = [{values[i] for i in self.order[: self.ones]}, {values[i] for i in self.order[self.ones :]}]
            if all(len(g) == 1 for g in groups):
                self.parts[node.id] = (groups[0].pop(), groups[1].pop())
                return True
        op = OPS.get(node.op)
        if (
            op is None
            or not op.elementwise
            or not self.fits(node.type)
            or not any(i in self.parts for i in node.inputs)
        ):
            return False
        operands = [self.operand(i) for i in node.inputs]
        made = tuple(self.apply(node, [p[k] for p in operands], k) for k in (0, 1))
        self.parts[node.id] = (made[0], made[1])
        return True

    def operand(self, n: int) -> Parts:
        if n not in self.parts:
            whole = self.joined(n)
            self.parts[n] = self.cut(whole) if self.fits(self.source[n].type) else (whole, whole)
        return self.parts[n]

    def apply(self, node: Node, args: list[Part], k: int) -> Part:
        numbers = [a for a in args if isinstance(a, float)]
        if len(numbers) == len(args) and node.op in FOLD:
            return float(FOLD[node.op](*numbers))
        if node.op == "mul" and 0.0 in numbers:
            return 0.0
        if (
            node.op in ("mul", "add", "sub")
            and isinstance(args[1], float)
            and args[1] == (1.0 if node.op == "mul" else 0.0)
        ):
            return self.full(args[0], node, k)
        if node.op in ("mul", "add") and isinstance(args[0], float) and args[0] == (1.0 if node.op == "mul" else 0.0):
            return self.full(args[1], node, k)
        return self.full(self.b.copy(node, [self.b.const(a) if isinstance(a, float) else a for a in args]), node, k)

    def full(self, value: Part, node: Node, k: int) -> int:
        """The value with all axes of the node's result, in their order."""
        size = self.ones if k == 0 else len(self.mask) - self.ones
        t = node.tensor.resized(self.axis, size)
        id = self.b.const(value) if isinstance(value, float) else value
        id = self.b.expand(id, t)
        return id if self.b.type(id).names == t.names else self.b.op("order", id, names=t.names)

    def joined(self, n: int) -> int:
        """The value in one piece, in its own order."""
        if n not in self.whole:
            node = self.source[n]
            pieces = [self.full(p, node, k) for k, p in enumerate(self.parts[n])]
            whole = self.b.op("join", *pieces, axis=self.axis)
            back = [self.order.index(i) for i in range(len(self.order))]
            self.whole[n] = self.b.op("permute", whole, axis=self.axis, order=tuple(back))
            if node.label:
                self.b.graph.relabel(self.whole[n], node.label)
        return self.whole[n]

    def copy(self, node: Node) -> None:
        inputs = [self.joined(i) for i in node.inputs]
        if not isinstance(node.type, TensorType) or "region" in node.attrs or node.op == "get":
            self.whole[node.id] = self.b.graph.again(node, inputs)
        else:
            self.whole[node.id] = self.b.copy(node, inputs)
