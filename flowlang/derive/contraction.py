"""Contractions x + g(x) with a certified constant below 1, solved by fixed-point iteration (ANALYSIS.md A7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowlang.derive import explain
from flowlang.derive.plan import FixedPoint
from flowlang.ir.interval import REAL
from flowlang.ir.lipschitz import constant

if TYPE_CHECKING:
    from flowlang.derive.problem import Problem
    from flowlang.derive.search import Inverter


def contraction(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> FixedPoint | None:
    graph, e = inv.graph, exits[0]
    node = graph[e]
    if len(exits) > 1 or p.scans or node.op not in ("add", "sub") or u not in node.inputs or inv.interval(u) != REAL:
        return None
    slot = node.inputs.index(u)
    g = node.inputs[1 - slot]
    same = set(graph[g].tensor.axes) == set(graph[u].tensor.axes)
    if g == u or not same or (node.op == "sub" and slot == 1):
        return None
    path = inv.between(p, u, exits)
    if not inv.sound_region(p, path):
        return None
    found = constant(graph, u, g, inv.interval, inv.analyses.lipschitz)
    if found is None:
        return None
    if not contracts(found):
        p.notes.append(explain.not_contractive(inv, u, e, found))
        return None
    return FixedPoint(u, e, g, tuple(path), found, node.op == "sub")


def contracts(constant: float) -> bool:
    return constant < 1
