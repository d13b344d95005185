"""Rational functions of one variable with proofs of sign: enough to see that radial maps are monotone.

Coefficients are polynomials in other scalars ("atoms") with known bounds. A polynomial all of whose
coefficients are non-negative once every atom is written as its bound plus a non-negative remainder is
non-negative; no more is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import inf

from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph
from flowlang.ir.interval import Interval

Monomial = tuple[tuple[int, int], ...]  # (atom, power), sorted; the variable is VARIABLE
Polynomial = Mapping[Monomial, float]
VARIABLE = -1
MOST_TERMS = 200
MOST_POWER = 16


class NoRational(Exception):
    """The value is no small rational function."""


def constant(value: float) -> Polynomial:
    return {(): value} if value else {}


def atom(id: int) -> Polynomial:
    return {((id, 1),): 1.0}


def add(p: Polynomial, q: Polynomial, sign: float = 1.0) -> Polynomial:
    out = dict(p)
    for m, c in q.items():
        out[m] = out.get(m, 0.0) + sign * c
    return {m: c for m, c in out.items() if c}


def mul(p: Polynomial, q: Polynomial) -> Polynomial:
    if len(p) * len(q) > MOST_TERMS:
        raise NoRational
    out: dict[Monomial, float] = {}
    for m, c in p.items():
        for n, d in q.items():
            powers = dict(m)
            for a, e in n:
                powers[a] = powers.get(a, 0) + e
            key = tuple(sorted(powers.items()))
            out[key] = out.get(key, 0.0) + c * d
    return {m: c for m, c in out.items() if c}


def derivative(p: Polynomial) -> Polynomial:
    """With respect to the variable."""
    out: dict[Monomial, float] = {}
    for m, c in p.items():
        powers = dict(m)
        e = powers.get(VARIABLE, 0)
        if e:
            powers[VARIABLE] = e - 1
            key = tuple(sorted((a, k) for a, k in powers.items() if k))
            out[key] = out.get(key, 0.0) + e * c
    return out


def coefficients(p: Polynomial) -> list[Fraction]:
    """Of the powers of the variable, the constant first, where all of them are numbers."""
    out: dict[int, Fraction] = {}
    for m, c in p.items():
        if any(a != VARIABLE for a, _ in m):
            raise NoRational
        out[sum(e for _, e in m)] = Fraction(c)
    return [out.get(k, Fraction(0)) for k in range(max(out, default=-1) + 1)]


def by_degree(p: Polynomial) -> dict[int, Polynomial]:
    """The coefficient of each power of the variable."""
    out: dict[int, dict[Monomial, float]] = {}
    for m, c in p.items():
        powers = dict(m)
        e = powers.pop(VARIABLE, 0)
        out.setdefault(e, {})[tuple(sorted(powers.items()))] = c
    return dict(out)


def positive(p: Polynomial, bounds: Callable[[int], Interval]) -> bool:
    """Whether p > 0 for every non-negative value of the variable and every atom in its bounds."""
    strict: dict[int, bool] = {VARIABLE: False}
    for a in {a for m in p for a, _ in m if a != VARIABLE}:
        iv = bounds(a)
        if iv.lo > -inf:
            shift, sign, strict[a] = iv.lo, 1.0, iv.lo_open
        elif iv.hi < inf:
            shift, sign, strict[a] = iv.hi, -1.0, iv.hi_open
        else:
            return False
        p = substitute(p, a, shift, sign)
    if any(c < 0 for c in p.values()):
        return False
    return any(all(strict[a] for a, _ in m) for m in p)


def substitute(p: Polynomial, a: int, shift: float, sign: float) -> Polynomial:
    """Atom a replaced by shift + sign·a."""
    new = add(constant(shift), {((a, 1),): sign})
    out: Polynomial = {}
    for m, c in p.items():
        powers = dict(m)
        e = powers.pop(a, 0)
        term: Polynomial = {tuple(sorted(powers.items())): c}
        for _ in range(e):
            term = mul(term, new)
        out = add(out, term)
    return out


@dataclass(frozen=True)
class Rational:
    over: Polynomial
    under: Polynomial

    def __add__(self, o: Rational) -> Rational:
        if self.under == o.under:
            return Rational(add(self.over, o.over), self.under)
        return Rational(add(mul(self.over, o.under), mul(o.over, self.under)), mul(self.under, o.under))

    def __mul__(self, o: Rational) -> Rational:
        return Rational(mul(self.over, o.over), mul(self.under, o.under))

    def __neg__(self) -> Rational:
        return Rational(mul(constant(-1.0), self.over), self.under)

    def inverse(self) -> Rational:
        if not self.over:
            raise NoRational
        return Rational(self.under, self.over)


def number(value: float) -> Rational:
    return Rational(constant(value), constant(1.0))


def variable(power: int = 1) -> Rational:
    return Rational({((VARIABLE, power),): 1.0}, constant(1.0))


def read(graph: Graph, n: int, known: Mapping[int, Rational], inside: Callable[[int], bool]) -> Rational:
    """A scalar as a rational function of the variable; values that do not depend on it and have no arithmetic are atoms."""
    if n in known:
        return known[n]
    node = graph[n]
    args = node.inputs
    match node.op:
        case "const" if not node.tensor.axes:
            return number(float(node.attrs["value"]))
        case "add":
            return read(graph, args[0], known, inside) + read(graph, args[1], known, inside)
        case "sub":
            return read(graph, args[0], known, inside) + -read(graph, args[1], known, inside)
        case "mul":
            return read(graph, args[0], known, inside) * read(graph, args[1], known, inside)
        case "div":
            return read(graph, args[0], known, inside) * read(graph, args[1], known, inside).inverse()
        case "neg":
            return -read(graph, args[0], known, inside)
        case "reciprocal":
            return read(graph, args[0], known, inside).inverse()
        case "square":
            value = read(graph, args[0], known, inside)
            return value * value
        case "pow":
            power = node.attrs.get("exponent")
            if isinstance(power, int | float) and power == int(power) and 1 <= power <= MOST_POWER:
                value = out = read(graph, args[0], known, inside)
                for _ in range(int(power) - 1):
                    out = out * value
                return out
    if inside(n) or node.tensor.axes:
        raise NoRational
    return Rational(atom(n), constant(1.0))


def write(b: Builder, p: Polynomial, value: Callable[[int], int]) -> int:
    """The polynomial as a graph; `value` gives the node of an atom or of the variable."""
    out: int | None = None
    for m, c in sorted(p.items()):
        term: int | None = b.const(c) if c != 1 or not m else None
        for a, e in m:
            for _ in range(abs(e)):
                v = value(a)
                if e < 0:
                    term = b.div(b.const(1.0) if term is None else term, v)
                else:
                    term = v if term is None else b.mul(term, v)
        assert term is not None
        out = term if out is None else b.add(out, term)
    return b.const(0.0) if out is None else out


__all__ = [
    "VARIABLE",
    "NoRational",
    "Polynomial",
    "Rational",
    "add",
    "by_degree",
    "coefficients",
    "derivative",
    "mul",
    "number",
    "positive",
    "read",
    "variable",
    "write",
]
