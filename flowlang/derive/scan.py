"""Scans: slice after slice along one axis, or several in lexicographic order (ANALYSIS.md A5)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from flowlang.analysis.dependence import Dependence
from flowlang.derive.plan import Order, Scan
from flowlang.derive.problem import Problem, ScanContext
from flowlang.ir.relation import Relation, compare, full, subset
from flowlang.ir.types import TensorType

if TYPE_CHECKING:
    from flowlang.derive.search import Inverter

MAX_LEVELLED = 1 << 20  # pairs of slices looked at for independence; beyond it, one slice a round


def scan(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> Scan | None:
    dependence = inv.dependence(u, p.cut)
    region = inv.between(p, u, exits)
    if not inv.sound_region(p, u, region):
        return None
    for order in orders(inv, p, u, exits):
        carriers = carry(inv, dependence, u, exits, order, region)
        if carriers is not None:
            step = scan_along(inv, p, u, exits, order, carriers, region, dependence)
            if step is not None:
                return step
    return None


def orders(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> Iterator[Order]:
    """Single axes, then lexicographic orders of several: raster scans."""
    t = inv.graph[u].tensor
    scanned = {axis for c in p.scans for axis in c.carriers.get(u, ())}
    names = [a.name for a in t.axes if a.name not in scanned and all(inv.graph[e].tensor.has(a.name) for e in exits)]
    for k in range(1, len(names) + 1):
        for axes in itertools.permutations(names, k):
            for reverse in itertools.product((False, True), repeat=k):
                yield tuple(zip(axes, reverse, strict=True))


def carry(
    inv: Inverter, dependence: Dependence, u: int, exits: tuple[int, ...], order: Order, region: list[int]
) -> dict[int, tuple[str, ...]] | None:
    """The axes of each usable node along the scanned ones; None when an exit lies outside the order (A5.1)."""
    axes = tuple(a for a, _ in order)
    carriers: dict[int, tuple[str, ...]] = {u: axes}
    for n in region:
        relation = dependence.of(n) if isinstance(inv.graph[n].type, TensorType) else None
        if n in exits:
            if relation is None or not exit_within(relation, axes, order):
                return None
            carriers[n] = axes
        elif n != u and relation is not None:
            choices = [axes] if len(order) > 1 else [axes, *((r,) for r in inv.graph[n].tensor.names)]
            found = next((c for c in choices if usable(relation, c, order)), None)
            if found is not None:
                carriers[n] = found
    return carriers


def exit_within(relation: Relation, rows: tuple[str, ...], order: Order) -> bool:
    """A5.1: an exit reads what stands before it, or at it."""
    return same_sizes(relation, rows, order) and not_after(relation, rows, order)


def usable(relation: Relation, rows: tuple[str, ...], order: Order) -> bool:
    """A5.2: a relation that reaches later slices makes the node unusable."""
    return same_sizes(relation, rows, order) and not_after(relation, rows, order)


def same_sizes(relation: Relation, rows: tuple[str, ...], order: Order) -> bool:
    sizes = {a.name: a.size for a in relation.rows}
    wanted = {a.name: a.size for a in relation.cols}
    return all(sizes.get(r) == wanted[a] for r, (a, _) in zip(rows, order, strict=True))


def not_after(relation: Relation, rows: tuple[str, ...], order: Order) -> bool:
    """Whether everything that a slice reads stands before it or at it."""
    sizes = {a.name: a.size for a in relation.rows}
    for part in relation.parts:
        for row, (axis, reverse) in zip(rows, order, strict=True):
            n = sizes[row]
            found = relation.pairs(part, row, axis, n) or full(n, n)
            upto, before = compare(n, "<=" if reverse else ">="), compare(n, "<" if reverse else ">")
            if upto is None or before is None or not subset(found, upto):
                return False
            if subset(found, before):
                break
    return True


def strict(relation: Relation, rows: tuple[str, ...], order: Order) -> bool:
    """A5.2: nothing is left of it at the slice itself."""
    for row, (axis, _) in zip(rows, order, strict=True):
        relation = relation.restrict_equal(row, axis)
    return relation.is_empty()


def scan_along(
    inv: Inverter, p: Problem, u: int, exits: tuple[int, ...], order: Order, carriers: dict[int, tuple[str, ...]],
    region: list[int], dependence: Dependence,
) -> Scan | None:  # fmt: skip
    graph = inv.graph
    inside = [n for n in region if n not in exits and isinstance(graph[n].type, TensorType)]
    independent = {n for n in inside if reads_nothing(dependence.of(n))}
    dropped = independent | {n for n in inside if n in carriers and drops(dependence.of(n), carriers[n], order)}
    if not dropped:
        return None
    for n in region:  # a call whose every result is dropped is dropped with them
        gets = [x.id for x, _ in graph.users(n) if x.op == "get" and x.id in region]
        if gets and not isinstance(graph[n].type, TensorType) and all(x in dropped for x in gets):
            dropped.add(n)
    inner = Problem(
        Counter(exits), frozenset([u]), {n for n in region if n not in dropped and n not in exits},
        (*p.scans, ScanContext(carriers)), p.cut | dropped, p.slice_known | (dropped - independent) | set(exits),
    )  # fmt: skip
    for n in region:
        if n != u and n in inner.unknown and inv.computable(inner, graph[n]):
            inner.unknown.discard(n)
            inner.slice_known.add(n)
    if not inv.propagate(inner):
        p.conditions.extend(inner.conditions)
        p.notes.extend(inner.notes)
        return None
    levels = rounds(
        graph[u].tensor, order, [(carriers[n], r) for n in sorted(dropped) if n in carriers and (r := dependence.of(n))]
    )
    return Scan(u, exits, order, tuple(inner.steps), inv.interval(u), tuple(sorted(dropped)), tuple(region), levels)


def reads_nothing(relation: Relation | None) -> bool:
    """A11: what does not depend on the unknown is known, at every slice (a network over one index may be)."""
    return relation is None


def drops(relation: Relation | None, rows: tuple[str, ...], order: Order) -> bool:
    return relation is not None and strict(relation, rows, order)


# ---- which slices are independent ---------------------------------------------------------------


def rounds(t: TensorType, order: Order, read: Sequence[tuple[tuple[str, ...], Relation]]) -> tuple[int, ...]:
    """For each slice, numbered along the order, the round in which all that it reads is known.

    A minimum lag k lets k slices go at once, and what reads above and to the left goes by anti-diagonals.
    `read` has the dropped values: the axes that carry the order's, and the relation on the entry.
    """
    axes = [axis for axis, _ in order]
    sizes = [t.size(axis) for axis in axes]
    count = prod(sizes)
    kinds = {
        tuple(relation.pairs(part, row, axis, n) for row, axis, n in zip(rows, axes, sizes, strict=True))
        for rows, relation in read
        for part in relation.parts
    }
    direction = [reverse for _, reverse in order]
    steps = [
        [m.bits() if m is not None else ((1 << n) - 1,) * n for m, n in zip(kind, sizes, strict=True)] for kind in kinds
    ]
    work = sum(prod(sum(b.bit_count() for b in bits) for bits in kind) for kind in steps)
    if work > MAX_LEVELLED:
        return one_by_one(count, order)
    places = list(
        itertools.product(*(range(n)[::-1] if r else range(n) for n, r in zip(sizes, direction, strict=True)))
    )
    level: dict[tuple[int, ...], int] = {}
    for place in places:
        here = 0
        for kind in steps:
            sources = [indices(bits[i]) for bits, i in zip(kind, place, strict=True)]
            for source in itertools.product(*sources):
                if source not in level:
                    return one_by_one(count, order)  # wider than the order by the axes taken alone
                here = max(here, level[source] + 1)
        level[place] = here
    # A single axis keeps its own indices; several are merged in the order's direction.
    return tuple(level[p] for p in (sorted(places) if len(order) == 1 else places))


def one_by_one(count: int, order: Order) -> tuple[int, ...]:
    forward = tuple(range(count))
    return forward[::-1] if len(order) == 1 and order[0][1] else forward


def indices(bits: int) -> list[int]:
    out = []
    while bits:
        low = bits & -bits
        out.append(low.bit_length() - 1)
        bits ^= low
    return out
