"""Contractions x + g(x) with a certified constant below 1, solved by fixed-point iteration (ANALYSIS.md A7)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

from flowlang.derive import explain
from flowlang.derive.plan import FixedPoint
from flowlang.ir.interval import REAL
from flowlang.ir.lipschitz import Orders, constant
from flowlang.ir.types import TensorType

if TYPE_CHECKING:
    from flowlang.derive.problem import Problem
    from flowlang.derive.search import Inverter


def contraction(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> FixedPoint | None:
    e = exits[0]
    if len(exits) > 1 or p.scans or inv.interval(u) != REAL or not same_axes(inv.graph[u].tensor, inv.graph[e].tensor):
        return None
    terms = summands(inv, u, e)
    path = inv.between(p, u, exits)
    if terms is None or not inv.sound_region(p, u, path):
        return None
    found = residual_constant(inv, u, e, terms)
    if found is None or not contracts(found):
        found = constant_in_some_norm(inv, p, u, e, terms) or found
    if found is None:
        return None
    if not contracts(found):
        p.notes.append(explain.not_contractive(inv, u, e, found))
        return None
    return FixedPoint(u, e, terms, tuple(path), found)


def same_axes(a: TensorType, b: TensorType) -> bool:
    return set(a.axes) == set(b.axes)


def summands(inv: Inverter, u: int, e: int) -> tuple[tuple[int, bool], ...] | None:
    """The terms besides u of a sum that holds u once, each with whether it is subtracted."""
    out: list[tuple[int, bool]] = []
    found = 0
    stack = [(e, False)]
    while stack:
        n, negative = stack.pop()
        node = inv.graph[n]
        if n == u:
            if negative or found:
                return None
            found += 1
        elif node.op in ("add", "sub") and u in inv.graph.reachable([n]):
            stack.append((node.inputs[0], negative))
            stack.append((node.inputs[1], negative != (node.op == "sub")))
        else:
            out.append((n, negative))
    return tuple(reversed(out)) if found and out else None


def residual_constant(inv: Inverter, u: int, e: int, terms: Sequence[tuple[int, bool]]) -> float | None:
    """A7: constants add; a term that is broadcast over n entries costs √n."""
    total = 0.0
    for g, _ in terms:
        found = constant(inv.graph, u, g, inv.interval, inv.analyses.lipschitz)
        if found is None:
            return None
        total += found * broadcast_cost(inv.graph[g].tensor, inv.graph[e].tensor)
    return total


def constant_in_some_norm(inv: Inverter, p: Problem, u: int, e: int, terms: Sequence[tuple[int, bool]]) -> float | None:
    """A7: the same in a norm that the weights tell; None where it is none, or not below 1."""
    orders = Orders(lambda region: inv.analyses.ranges(region).interval)
    total = 0.0
    for g, _ in terms:
        found = orders.constant(inv.region, inv.graph, u, g)
        if orders.apart:
            p.notes.append(explain.norms_apart(inv, u, e))
        if found is None or not same_axes(inv.graph[g].tensor, inv.graph[e].tensor):
            return None
        total += found
    return total if contracts(total) else None


def broadcast_cost(narrow: TensorType, wide: TensorType) -> float:
    return sqrt(max(wide.count, 1) / max(narrow.count, 1))


def contracts(constant: float) -> bool:
    return constant < 1
