"""Dependence: on which indices of an entry value each value depends (A1, A2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flowlang.analysis.constants import Constants, holds, support_of
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.ops import OPS
from flowlang.ir.relation import Relation, Support
from flowlang.ir.tangents import plain_method
from flowlang.ir.types import Axis, TensorType, result_axes

REPEAT_ROUNDS = 64  # beyond this many distinct rounds a repeated relation is taken as full


@dataclass
class Summaries:
    """Relations of region results on region inputs, computed once for each region."""

    _known: dict[int, tuple[Region, list[list[Relation | None]]]] = field(default_factory=dict)  # alive with its region

    def of(self, region: Region) -> list[list[Relation | None]]:
        """[result][argument] -> relation or None for no dependence; arguments: inputs, then context."""
        if id(region) not in self._known:
            arguments = [*region.inputs, *region.context]
            results = [*region.outputs, *(e.value for e in region.emissions)]
            per_argument = [Dependence(region.graph, a, self).all(results) for a in arguments]
            table = [[per_argument[k][r] for k in range(len(arguments))] for r in range(len(results))]
            self._known[id(region)] = (region, table)
        return self._known[id(region)][1]


class Supports:
    """Where the nodes of one graph are exactly zero."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.constants = Constants(graph)
        self._known: dict[int, Support | None] = {}

    def of(self, id: int) -> Support | None:
        if id not in self._known:
            for i in self.graph.pending(id, self._known):
                self._known[i] = self.evaluate(self.graph[i])
        return self._known[id]

    def evaluate(self, node: Node) -> Support | None:
        constant = self.constants.support(node.id)
        if constant is not None:
            return constant
        if node.op == "where":
            return self.chosen(node)
        op = OPS.get(node.op)
        if op is None or op.support is None:
            return None
        types = [self.graph[i].tensor for i in node.inputs]
        return op.support(node, types, [self._known[i] for i in node.inputs])

    def chosen(self, node: Node) -> Support | None:
        """A choice by a constant condition: what may be other than 0 in either branch, where that branch is taken."""
        condition, *branches = node.inputs
        table = self.constants.of(condition)
        if table is None or not 1 <= len(table.axes) <= 2:
            return None
        taken = ([bool(v) for v in table.values], [not v for v in table.values])
        zeros = [(c := self.constants.of(i)) is not None and not any(c.values) for i in branches]
        inner = [self._known[i] for i in branches]
        if any(zeros):
            k = zeros.index(False) if False in zeros else 0
            return support_of(table.axes, taken[k] if False in zeros else [False] * len(taken[0])).meet(inner[k])
        held = [
            [x and y for x, y in zip(t, holds(s, table.axes), strict=True)] for t, s in zip(taken, inner, strict=True)
        ]
        either = [x or y for x, y in zip(*held, strict=True)]
        return None if all(either) else support_of(table.axes, either)


class Dependence:
    """Relations of the nodes of one graph on one entry node. `cut` nodes count as independent of it."""

    def __init__(self, graph: Graph, entry: int, summaries: Summaries, cut: Iterable[int] = ()):
        self.graph = graph
        self.entry = entry
        self.summaries = summaries
        self.cut = frozenset(cut) - {entry}
        self.cols = graph[entry].tensor.axes
        self._known: dict[int, Relation | None] = {entry: Relation.equal(self.cols, self.cols)}
        self.supports = Supports(graph)

    def all(self, ids: Sequence[int]) -> list[Relation | None]:
        return [self.of(i) for i in ids]

    def of(self, id: int) -> Relation | None:
        """The relation of a node on the entry; None when it does not depend on it."""
        if id not in self._known:
            for i in self.graph.pending(id, self._known):
                self._known[i] = None if i < self.entry or i in self.cut else self.evaluate(self.graph[i])
        return self._known[id]

    def evaluate(self, node: Node) -> Relation | None:
        total: Relation | None = None
        for slot, i in enumerate(node.inputs):
            inner = self._known.get(i)
            if inner is None:
                continue
            if node.op == "get":
                return self.call_result(self.graph[node.inputs[0]], node.attrs["index"])
            if node.op in ("call", "repeat", "scan", "choose"):
                if not isinstance(node.type, TensorType):
                    return Relation.full((), self.cols)  # a marker: results are read by `get`
                return self.call_result(node, 0)
            local = local_relation(self.graph, node, slot, [self.supports.of(j) for j in node.inputs])
            if local is None:
                continue
            found = local.compose(inner)
            if not found.is_empty():
                total = found if total is None else total.union(found)
        return total

    def call_result(self, node: Node, index: int) -> Relation | None:
        total: Relation | None = None
        for slot, i in enumerate(node.inputs):
            inner = self._known.get(i)
            if inner is None:
                continue
            local = call_relation(self.graph, node, index, slot, self.summaries)
            if local is None:
                continue
            found = local.compose(inner)
            if not found.is_empty():
                total = found if total is None else total.union(found)
        return total


def local_relation(graph: Graph, node: Node, slot: int, supports: Sequence[Support | None]) -> Relation | None:
    """How a result index depends on an index of one operand."""
    if "body" in node.attrs:
        return Relation.full(node.tensor.axes, graph[node.inputs[slot]].tensor.axes)
    op = OPS[node.op]
    types = [graph[i].tensor for i in node.inputs]
    found = op.depend(node, types, slot, supports)
    return None if found.is_empty() else found


def call_relation(graph: Graph, node: Node, index: int, slot: int, summaries: Summaries) -> Relation | None:
    """The local relation of a call's result on an argument: the callee's summary, lifted axes equal."""
    result = result_axes(node.type, index)
    argument = graph[node.inputs[slot]].tensor.axes
    if node.op == "scan":
        return Relation.full(result, argument)
    if node.op == "choose":
        return Relation.equal(result, argument) if slot % (len(node.inputs) // 2) == index else None
    region: Region = node.attrs["region"]
    if plain_method(node.attrs) != "forward":
        return Relation.full(result, argument)
    if node.op == "repeat":
        return repeat_relation(graph, node, index, slot, summaries)
    inner = summaries.of(region)[index][slot]
    if inner is None:
        return None
    return lift(inner, result, argument, [n for n, _ in node.attrs.get("lifted", ())])


def lift(inner: Relation, result: tuple[Axis, ...], argument: tuple[Axis, ...], lifted: list[str]) -> Relation:
    if not lifted:
        return inner
    return inner.lifted(result, argument, [n for n in lifted if any(a.name == n for a in argument)])


def repeat_relation(graph: Graph, node: Node, index: int, slot: int, summaries: Summaries) -> Relation | None:
    """n copies in a row: the body's relation composed with itself until it stays."""
    region: Region = node.attrs["region"]
    carried = int(node.attrs["carried"])
    table = summaries.of(region)
    count = int(node.attrs["count"])
    argument = graph[node.inputs[slot]].tensor.axes
    state: list[Relation | None] = [
        Relation.equal(graph[node.inputs[k]].tensor.axes, argument) if k == slot else None for k in range(carried)
    ]
    total = state
    for _ in range(min(count, REPEAT_ROUNDS)):
        new: list[Relation | None] = []
        for r in range(carried):
            found: Relation | None = None
            for k in range(carried):
                step, before = table[r][k], total[k]
                if step is not None and before is not None:
                    part = step.compose(before)
                    found = part if found is None else found.union(part)
            if slot >= carried and table[r][slot] is not None:
                outer = table[r][slot]
                assert outer is not None
                found = outer if found is None else found.union(outer)
            new.append(None if found is None or found.is_empty() else found)
        if new == total:
            break
        total = new
    else:
        if count > REPEAT_ROUNDS:
            return Relation.full(result_axes(node.type, index), argument)
    return total[index]
