"""Parts that are jointly affine in as many unknown parts: one block with a small determinant (ANALYSIS.md A11).

Haar wavelets, Givens rotations and other small mixings of slices. Entry for entry, exit i is a sum over j of c_ij times
unknown j, plus what is known. The c_ij are polynomials in known values with known bounds; their determinant must exclude
0, by its bounds once sin² + cos² is 1. The inverse is Cramer's rule.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

from flowlang.derive import explain
from flowlang.derive.plan import Block, Failure
from flowlang.derive.problem import Problem
from flowlang.derive.rational import NoRational, Polynomial, add, atom, constant, mul, write
from flowlang.ir import interval as iv
from flowlang.ir.graph import Graph, Node
from flowlang.ir.interval import Interval, point
from flowlang.ir.types import TensorType

if TYPE_CHECKING:
    from flowlang.derive.replay import Replay
    from flowlang.derive.search import Inverter

MOST_PARTS = 4
REST = -1  # the known part of an affine form
Form = dict[int, Polynomial]
LINEAR = ("add", "sub", "neg", "mul", "div", "order", "identity")


def block(inv: Inverter, p: Problem) -> Block | None:
    """The first set of members that are jointly affine in equally many unknown values."""
    stuck = [m for m in sorted(p.members) if m not in p.targets and inv.real(m)]
    if len(stuck) < 2:
        return None
    forms = {m: f for m in stuck if (f := affine(inv, p, m)) is not None and m not in f}
    for exits in groups(forms):
        entries = sorted({u for e in exits for u in forms[e]} - {REST})
        if len(entries) != len(exits) or not 2 <= len(exits) <= MOST_PARTS:
            continue
        rows = [forms[e] for e in exits]
        try:
            det = determinant([[row.get(u, {}) for u in entries] for row in rows])
            one = circular(inv, det)
        except NoRational:
            continue
        if not regular(bounds(inv, one)):
            p.notes.append(singular(inv, exits, entries, one))
            continue
        given = tuple(tuple(tuple(row.get(u, {}).items()) for u in (*entries, REST)) for row in rows)
        return Block(tuple(entries), tuple(exits), given, one.get((), 0.0) if set(one) <= {()} else None)
    return None


def groups(forms: dict[int, Form]) -> list[tuple[int, ...]]:
    """Members that share unknown values, directly or through others."""
    out: list[set[int]] = []
    for m in forms:
        touching = [g for g in out if any((set(forms[m]) & set(forms[o])) - {REST} for o in g)]
        out = [g for g in out if g not in touching] + [{m}.union(*touching)]
    return [tuple(sorted(g)) for g in out]


def alike(graph: Graph, part: int, exit: int) -> bool:
    """A3: every part has the axes of the exit, so that none is broadcast."""
    return set(graph[part].tensor.axes) == set(graph[exit].tensor.axes)


def affine(inv: Inverter, p: Problem, m: int) -> Form | None:
    """The member as a sum of unknown values with known coefficients; None where it is none, or crosses slices."""
    graph = inv.graph
    known: dict[int, Form] = {}

    def known_part(i: int) -> Polynomial:
        node = graph[i]
        value = node.attrs["value"] if node.op == "const" and not node.tensor.axes else None
        return constant(float(value)) if isinstance(value, int | float) else atom(i)

    def form(i: int) -> Form:
        if i in known:
            return known[i]
        return {i: constant(1.0)} if i in p.unknown else {REST: known_part(i)}

    def linear(node: Node) -> bool:
        if node.op not in LINEAR or not isinstance(node.type, TensorType):
            return False
        slots = [k for k, i in enumerate(node.inputs) if i in p.unknown]
        local = all(
            inv.within_slice(p, node.id, k) for k, i in enumerate(node.inputs) if i in p.slice_known or k in slots
        )
        fits = len(slots) <= 1 if node.op == "mul" else slots in ([], [0]) if node.op == "div" else True
        return bool(slots) and local and fits and all(alike(graph, node.inputs[k], m) for k in slots)

    below = inside(inv, p, m, linear)
    if not below:
        return None
    try:
        for n in sorted(below):
            node = graph[n]
            parts = [form(i) for i in node.inputs]
            match node.op:
                case "add" | "sub":
                    known[n] = combined(parts[0], parts[1], 1.0 if node.op == "add" else -1.0)
                case "neg":
                    known[n] = combined({}, parts[0], -1.0)
                case "mul":
                    scale, value = sorted(parts, key=lambda f: set(f) != {REST})
                    known[n] = {u: mul(q, scale[REST]) for u, q in value.items()}
                case "div":
                    known[n] = {u: mul(q, inverted(parts[1][REST])) for u, q in parts[0].items()}
                case _:
                    known[n] = parts[0]
    except NoRational:
        return None
    return {u: q for u, q in known[m].items() if q}


def inside(inv: Inverter, p: Problem, m: int, linear: object) -> set[int]:
    """The linear nodes between a member and the unknown values that it is a sum of."""
    assert callable(linear)
    out: set[int] = set()
    stack = [m]
    while stack:
        n = stack.pop()
        if n in out or not linear(inv.graph[n]):
            continue
        out.add(n)
        stack.extend(i for i in inv.graph[n].inputs if i in p.unknown)
    return out


def combined(a: Form, c: Form, sign: float) -> Form:
    return {u: add(a.get(u, {}), c.get(u, {}), sign) for u in sorted({*a, *c})}


def inverted(q: Polynomial) -> Polynomial:
    """1/q for one term."""
    if len(q) != 1:
        raise NoRational
    ((m, c),) = q.items()
    if not c:
        raise NoRational
    return {tuple((a, -e) for a, e in m): 1.0 / c}


def determinant(rows: list[list[Polynomial]]) -> Polynomial:
    """By Leibniz' sum over permutations."""
    out: Polynomial = {}
    for order in permutations(range(len(rows))):
        inversions = sum(order[i] > order[j] for i in range(len(order)) for j in range(i + 1, len(order)))
        term: Polynomial = constant(-1.0 if inversions % 2 else 1.0)
        for row, j in zip(rows, order, strict=True):
            term = mul(term, row[j])
        out = add(out, term)
    return out


def circular(inv: Inverter, q: Polynomial) -> Polynomial:
    """With sin² written as 1 - cos² wherever both are of one value."""
    cosines = {inv.graph[a].inputs[0]: a for m in q for a, _ in m if inv.graph[a].op == "cos"}
    out: Polynomial = {}
    for m, c in q.items():
        powers = dict(m)
        term: Polynomial = {(): c}
        for a, e in m:
            cosine = cosines.get(inv.graph[a].inputs[0]) if inv.graph[a].op == "sin" else None
            if cosine is not None and e >= 2:
                powers[a] = e % 2
                for _ in range(e // 2):
                    term = mul(term, add(constant(1.0), {((cosine, 2),): 1.0}, -1.0))
        out = add(out, mul(term, {tuple(sorted((a, e) for a, e in powers.items() if e)): 1.0}))
    return {m: c for m, c in out.items() if abs(c) > 1e-12}


def bounds(inv: Inverter, q: Polynomial) -> Interval:
    out = point(0.0)
    for m, c in q.items():
        term = point(c)
        for a, e in m:
            base: Interval | None = inv.interval(a)
            if e < 0:
                base = iv.reciprocal(base) if base is not None else None
            if base is None:
                return iv.REAL
            for _ in range(abs(e) // 2):
                term = iv.mul(term, iv.square(base))
            if e % 2:
                term = iv.mul(term, base)
        out = iv.add(out, term)
    return out


def regular(found: Interval) -> bool:
    """A11: the determinant excludes 0."""
    return found.nonzero and (abs(found.lo) > 1e-9 or abs(found.hi) > 1e-9)


def singular(inv: Inverter, exits: tuple[int, ...], entries: list[int], det: Polynomial) -> Failure:
    names = " and ".join(explain.called(inv, u) for u in entries)
    found = bounds(inv, det)
    value = f"is {found.lo:g}" if found.is_point else f"lies in {found}"
    return Failure(
        "FL0403", f"not invertible: these sums of {names} may be dependent: their determinant {value}",
        inv.graph[exits[-1]].span,
        suggestion="choose coefficients whose determinant is never 0, as in a rotation by an angle",
    )  # fmt: skip


# ---- replay -------------------------------------------------------------------------------------


def coefficients(r: Replay, step: Block) -> list[list[int]]:
    return [[write(r.b, dict(q), r.value) for q in row] for row in step.rows]


def solve_block(r: Replay, step: Block) -> None:
    """Cramer's rule: the unknown parts from the exits."""
    b, n = r.b, len(step.exits)
    rows = coefficients(r, step)
    left = [b.sub(r.value(e), row[n]) for e, row in zip(step.exits, rows, strict=True)]
    det = whole(r, step, [row[:n] for row in rows])
    for j, u in enumerate(step.entries):
        total: int | None = None
        for i in range(n):
            minor = [[rows[a][c] for c in range(n) if c != j] for a in range(n) if a != i]
            term = b.mul(expanded(r, minor), left[i])
            term = b.neg(term) if (i + j) % 2 else term
            total = term if total is None else b.add(total, term)
        assert total is not None
        r.bind(r.source[u], b.div(total, det))


def weigh_block(r: Replay, step: Block) -> None:
    det = whole(r, step, [row[: len(step.exits)] for row in coefficients(r, step)])
    r.weights.append(r.b.total(r.b.log_abs(det), r.source[step.entries[0]].tensor.axes))


def whole(r: Replay, step: Block, rows: list[list[int]]) -> int:
    """The determinant: a number where it was proved to be one."""
    return expanded(r, rows) if step.determinant is None else r.b.const(step.determinant)


def expanded(r: Replay, rows: list[list[int]]) -> int:
    """A small determinant as a graph, along its first row."""
    b = r.b
    if not rows:
        return b.const(1.0)
    if len(rows) == 1:
        return rows[0][0]
    total: int | None = None
    for j, c in enumerate(rows[0]):
        if b.const_value(c) == 0:
            continue
        term = b.mul(c, expanded(r, [[row[k] for k in range(len(rows)) if k != j] for row in rows[1:]]))
        term = b.neg(term) if j % 2 else term
        total = term if total is None else b.add(total, term)
    return b.const(0.0) if total is None else total


__all__ = ["block", "regular", "solve_block", "weigh_block"]
