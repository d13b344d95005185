"""Scalar maps: pointwise and strictly monotone in each entry, solved by bracketing (ANALYSIS.md A6, A9c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowlang.analysis.ranges import Ranges
from flowlang.derive import explain
from flowlang.derive.jvp import NoDerivative, tangent
from flowlang.derive.plan import Scalar
from flowlang.derive.rational import NoRational, add, coefficients, derivative, mul, read, variable
from flowlang.derive.sturm import constant_sign
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node
from flowlang.ir.interval import REAL, Interval, point, split
from flowlang.ir.ops import OPS
from flowlang.ir.types import TensorType

if TYPE_CHECKING:
    from flowlang.derive.problem import Problem
    from flowlang.derive.search import Inverter

SUBDIVISIONS = 64
SOME = 1e-300  # of a bound below that is known to be positive, and nothing more
NOWHERE = Interval(0.0, 0.0, True, True)
COMPARISONS = ("lt", "le", "gt", "ge")
# Known values enter a proof as bounded inputs; of these the structure says more than the bounds (A9d).
KEPT = ("const", "param", "softmax", "order", "rename", "expand")


def scalar_map(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> Scalar | None:
    graph = inv.graph
    e = exits[0]
    if len(exits) > 1 or not same_axes(inv, u, e):
        return None
    path = inv.between(p, u, exits)
    if not pointwise(inv, p, u, path) or not inv.sound_region(p, u, path):
        return None
    proof = Proof(inv, u, e, path)
    for n in path:
        if n != u and not proof.continuous(graph[n]):
            p.notes.append(explain.not_continuous(inv, graph[n]))
            return None
    if proof.slope is None:
        if proof.blocked is not None:
            p.notes.append(explain.no_derivative(inv, proof.blocked))
        return None
    domain = inv.interval(u)
    sign = proof.sign(domain)
    if sign == 0:
        p.notes.append(explain.not_monotone(inv, u, e, path, proof.bounds))
        return None
    return Scalar(u, e, tuple(path), sign > 0, domain, proof.image(domain, sign), proof.assumed())


def same_axes(inv: Inverter, u: int, e: int) -> bool:
    """A6: the exit has u's axes."""
    return set(inv.graph[u].tensor.axes) == set(inv.graph[e].tensor.axes)


def pointwise(inv: Inverter, p: Problem, u: int, path: list[int]) -> bool:
    """A6: every relation between entry and exit is equality along every axis of the entry."""
    dependence = inv.dependence(u, p.cut)
    for n in path:
        if n == u:
            continue
        if inv.graph[n].op in ("call", "repeat", "get"):
            return False
        relation = dependence.of(n)
        if relation is None or not relation.pointwise():
            return False
    return True


class Proof:
    """A copy of a pointwise path with its derivative, for bounding the slope."""

    def __init__(self, inv: Inverter, u: int, e: int, path: list[int]):
        self.source = inv.graph
        self.graph = Graph()
        b = Builder(self.graph)
        self.entry = u
        self.path = set(path)
        self.env: dict[int, int] = {}
        self.inputs: dict[int, Interval] = {}
        self.outer: dict[int, int] = {}
        for n in sorted(inv.graph.reachable([e])):
            node = inv.graph[n]
            if not isinstance(node.type, TensorType):
                continue
            inside = n in self.path and n != u
            kept = node.op in KEPT and all(i in self.env and i not in self.path for i in node.inputs)
            if inside or kept:
                self.env[n] = b.copy(node, [self.env[i] for i in node.inputs])
            else:
                self.env[n] = b.leaf("input", node.type, batched=True, name=f"v{n}")
                self.inputs[self.env[n]] = inv.interval(n)
                self.outer[n] = self.env[n]
        self.u, self.e = self.env[u], self.env[e]
        self.ranges = Ranges(self.graph, self.inputs, inv.ranges.call_bounds)
        self.blocked: int | None = None
        self.slope: int | None = None
        self.bounds: Interval | None = None
        self.least = 0.0  # a bound below of |slope|
        try:
            self.slope = tangent(b, inv.graph, self.env, self.path, u, e)
        except NoDerivative as stop:
            self.blocked = stop.node

    def assumed(self) -> tuple[tuple[int, Interval], ...]:
        """The known values that the proof reads, with the bounds it takes for granted."""
        read = {i for n in self.path if n != self.entry for i in self.source[n].inputs} - self.path
        return tuple((n, self.inputs[self.env[n]]) for n in sorted(read) if self.env[n] in self.inputs)

    # ---- continuity -----------------------------------------------------------------------------

    def continuous(self, node: Node) -> bool:
        """A6: no jump in an operand on the path; `where` on u only if its branches meet."""
        slots = [k for k, i in enumerate(node.inputs) if i in self.path]
        if node.op in COMPARISONS:
            return all(u.op == "where" and s == 0 for u, s in self.source.users(node.id) if u.id in self.path)
        return all(OPS[node.op].continuous(k) or (node.op == "where" and self.branches_meet(node)) for k in slots)

    def branches_meet(self, node: Node) -> bool:
        """`where(u > k, a, b)` for a number k where a and b are one number."""
        test = self.source[node.inputs[0]]
        if test.op not in COMPARISONS or self.entry not in test.inputs:
            return False
        other = self.source[test.inputs[1 - test.inputs.index(self.entry)]]
        if other.op != "const" or other.tensor.axes:
            return False
        at = point(float(other.attrs["value"]))
        a, b = (self.ranges.with_override(self.env[i], self.u, at) for i in node.inputs[1:])
        return a.is_point and a == b

    # ---- slope and image ------------------------------------------------------------------------

    def sign(self, domain: Interval) -> int:
        """+1 or -1 when the slope keeps that sign on the whole domain, else 0."""
        assert self.slope is not None
        self.bounds = self.ranges.interval(self.slope)
        pieces = [self.bounds]
        if not one_sign(pieces):
            pieces = [self.ranges.with_override(self.slope, self.u, piece) for piece in split(domain, SUBDIVISIONS)]
        found = one_sign(pieces)
        if not found:
            return self.rational_sign(domain)
        self.least = min(min(abs(iv.lo), abs(iv.hi)) for iv in pieces)
        return found

    def rational_sign(self, domain: Interval) -> int:
        """The slope's sign where the map is a ratio of two polynomials with numbers as coefficients, exactly."""
        try:
            found = read(self.graph, self.e, {self.u: variable()}, lambda n: True)
            over = mul(derivative(found.over), found.under)
            slope = coefficients(add(over, mul(found.over, derivative(found.under)), -1.0))
            under = coefficients(found.under)
        except NoRational:
            return 0
        if not slope or not constant_sign(under, domain):
            return 0
        sign = constant_sign(slope, domain)
        if sign and len(slope) >= 2 * len(under) - 1:
            self.least = SOME  # it has a limit other than 0 at both infinities, and no zero
        return sign

    def image(self, domain: Interval, sign: int) -> Interval:
        """What the map surely reaches (A9c): R if the slope stays away from 0 on R, or is one number for all of R;
        else what lies between its limits at the ends of the domain."""
        assert self.slope is not None
        if domain == REAL and (self.least > 0 or self.slope not in self.graph.descendants([self.u])):
            return REAL
        at_lo = self.ranges.with_override(self.e, self.u, point(domain.lo))
        at_hi = self.ranges.with_override(self.e, self.u, point(domain.hi))
        low, high = (at_lo, at_hi) if sign > 0 else (at_hi, at_lo)
        return Interval(low.hi, high.lo, True, True) if low.hi < high.lo else NOWHERE


def one_sign(pieces: list[Interval]) -> int:
    """A6: the sign of a slope whose bounds exclude 0 everywhere, open and closed ends told apart; else 0."""
    signs = {iv.sign for iv in pieces}
    return signs.pop() if len(signs) == 1 else 0
