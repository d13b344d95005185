"""Interval analysis: bounds of every value, and whether every partial op is defined (A9a)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flowlang.ir.domains import Domain
from flowlang.ir.graph import BaseDistribution, Draw, Emission, Graph, Node, Region
from flowlang.ir.interval import NONNEGATIVE, REAL, Interval, closed, point
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import Need

NOISE = {"uniform": closed(0.0, 1.0), "exponential": NONNEGATIVE}  # bounds of standard noise
Bounds = Interval | tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class Violation:
    """A partial op whose operand may leave its domain."""

    node: Node
    need: Need
    found: Interval
    graph: Graph


def number(value: object) -> Iterable[float]:
    if isinstance(value, tuple | list):
        for v in value:
            yield from number(v)
    elif isinstance(value, bool | int | float):
        yield float(value)


class Ranges:
    """Bounds of the nodes of one graph, for given bounds of its inputs. Lazy and memoised."""

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[int, Interval],
        call_bounds: Callable[[Node, Sequence[Interval]], tuple[Interval, ...]],
    ):
        self.graph = graph
        self.inputs = dict(inputs)
        self.call_bounds = call_bounds
        self.violations: list[Violation] = []
        self._known: dict[int, Bounds] = {}

    def node(self, id: int) -> Node:
        return self.graph[id]

    def interval(self, id: int) -> Interval:
        bounds = self.bounds(id)
        return bounds if isinstance(bounds, Interval) else bounds[0]

    def bounds(self, id: int) -> Bounds:
        if id not in self._known:
            # Iterative: chains may be longer than the recursion limit.
            for i in self.graph.pending(id, self._known):
                self._known[i] = self.evaluate(self.graph[i], self._known, self.violations)
        return self._known[id]

    def evaluate(self, node: Node, known: Mapping[int, Bounds], violations: list[Violation] | None) -> Bounds:
        if node.id in self.inputs:
            return self.inputs[node.id]
        match node.op:
            case (
                "input" | "param" | "state" | "running"
            ):  # the domain of a running value holds the batch's statistic too
                return leaf_bounds(node)
            case "const":
                values = list(number(node.attrs["value"]))
                return closed(min(values), max(values)) if values else REAL
            case "random_like" if node.attrs["kind"] in NOISE:
                return NOISE[node.attrs["kind"]]
            case "index":
                return closed(0, max(int(node.attrs["size"]) - 1, 0))
            case "get":
                inner = known[node.inputs[0]]
                return inner if isinstance(inner, Interval) else inner[node.attrs["index"]]
        operands = [b if isinstance(b := known[i], Interval) else b[0] for i in node.inputs]
        if node.op == "choose":
            half = len(operands) // 2
            return tuple(a.union(b) for a, b in zip(operands[:half], operands[half:], strict=True))
        if node.op in ("call", "repeat", "scan") or "body" in node.attrs:
            found = self.call_bounds(node, operands)
            return found[0] if len(found) == 1 else found
        op = OPS[node.op]
        types = [self.graph[i].tensor for i in node.inputs]
        if violations is not None and op.total is not None:
            for need in op.total(node, types):
                if not need.holds(operands[need.slot]):
                    if node.attrs.get("proved"):  # shown by other means than intervals, as of a path's formula
                        return REAL
                    violations.append(Violation(node, need, operands[need.slot], self.graph))
                    return REAL
        hull = hull_operand(self.graph, node)
        if hull is not None:
            return operands[hull]
        ends = weighed_ends(self.graph, node) if node.attrs.get("between") else ()
        if ends:
            low, high = (b if isinstance(b := known[i], Interval) else b[0] for i in ends)
            return low.union(high)
        if op.interval is None:
            return REAL
        return op.interval(operands, types, node)

    def with_override(self, target: int, u: int, value: Interval) -> Interval:
        """Bounds of `target` when `u` is narrowed; only what depends on u is evaluated again."""
        self.bounds(target)
        needed = sorted(self.graph.reachable([target]))
        local: dict[int, Bounds] = {u: value}
        changed = {u}
        for i in needed:
            if i == u:
                continue
            node = self.graph[i]
            if any(j in changed for j in node.inputs):
                merged = _Overlay(local, self._known)
                local[i] = self.evaluate(node, merged, None)
                changed.add(i)
        found = local.get(target, self._known.get(target, REAL))
        return found if isinstance(found, Interval) else found[0]


class _Overlay(dict[int, Bounds]):
    def __init__(self, top: Mapping[int, Bounds], below: Mapping[int, Bounds]):
        super().__init__()
        self._top, self._below = top, below

    def __getitem__(self, key: int) -> Bounds:
        return self._top[key] if key in self._top else self._below[key]


def leaf_bounds(node: Node) -> Interval:
    domain = node.attrs.get("domain")
    if isinstance(domain, Domain):
        return domain.interval
    return REAL


def hull_operand(graph: Graph, node: Node) -> int | None:
    """For a sum with simplex weights, the operand that is weighed (A9d); else None."""
    if node.op != "contract" or len(node.attrs["axes"]) != 1:
        return None
    axis = node.attrs["axes"][0]
    for slot in (0, 1):
        weight = graph[node.inputs[slot]]
        while weight.op in ("order", "expand"):
            weight = graph[weight.inputs[0]]
        if weight.op == "softmax" and weight.attrs["axis"] == axis:
            return 1 - slot
        domain = weight.attrs.get("domain")
        simplex = weight.op == "param" and isinstance(domain, Domain) and domain.structure == "simplex"
        if simplex and weight.tensor.names[-1:] == (axis,):
            return 1 - slot
    return None


def weighed_ends(graph: Graph, node: Node) -> tuple[int, ...]:
    """The values of a sum of two with weights that are numbers: of one that lies between them the bounds are theirs."""
    found = []
    for i in node.inputs if node.op in ("add", "sub") else ():
        part = graph[i]
        values = [k for k in part.inputs if part.op == "mul" and graph[k].tensor.axes]
        if len(values) != 1:
            return ()
        found.append(values[0])
    return tuple(found)


def law_support(graph: Graph, law: Emission | Draw | BaseDistribution) -> Interval:
    """The support of what is drawn, emitted or leaves as base."""
    assert law.distribution is not None
    arguments: dict[str, float | None] = {}
    for name, id in law.arguments:
        node = graph[id]
        arguments[name] = float(node.attrs["value"]) if node.op == "const" and not node.tensor.axes else None
    return law.distribution.support(arguments)


def base_support(region: Region) -> Interval:
    """The support of a flow's base."""
    assert region.base is not None
    return law_support(region.graph, region.base)


__all__ = ["Ranges", "Violation", "base_support", "hull_operand", "law_support", "point"]
