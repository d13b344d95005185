"""Whether a polynomial of one variable vanishes on an interval: Sturm's theorem, in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import inf

from flowlang.ir.interval import Interval

Coefficients = list[Fraction]  # of the powers, the constant first; the last is not 0


def trimmed(p: Coefficients) -> Coefficients:
    while p and not p[-1]:
        p = p[:-1]
    return p


def derived(p: Coefficients) -> Coefficients:
    return [k * c for k, c in enumerate(p)][1:]


def remainder(p: Coefficients, q: Coefficients) -> Coefficients:
    p = list(p)
    while len(p) >= len(q):
        factor = p[-1] / q[-1]
        for k, c in enumerate(q):
            p[len(p) - len(q) + k] -= factor * c
        p = trimmed(p[:-1])
    return p


def sign_at(p: Coefficients, x: float) -> int:
    """The sign at a number, or towards an infinity."""
    if x in (inf, -inf):
        value = p[-1] * (-1 if x < 0 and len(p) % 2 == 0 else 1)
    else:
        value = Fraction(0)
        for c in reversed(p):
            value = value * Fraction(x) + c
    return (value > 0) - (value < 0)


def roots(p: Coefficients, domain: Interval) -> int:
    """How many different roots lie inside, at ends that belong to the interval too."""
    p = trimmed(p)
    chain = [p, trimmed(derived(p))]
    while chain[-1]:
        chain.append(trimmed([-c for c in remainder(chain[-2], chain[-1])]))
    chain = chain[:-1]

    def changes(x: float) -> int:
        signs = [s for q in chain if (s := sign_at(q, x))]
        return sum(a != b for a, b in pairwise(signs))

    # Sturm counts the roots in (lo, hi].
    found = changes(domain.lo) - changes(domain.hi)
    if domain.hi_open and domain.hi != inf and sign_at(p, domain.hi) == 0:
        found -= 1
    if not domain.lo_open and domain.lo != -inf and sign_at(p, domain.lo) == 0:
        found += 1
    return found


def constant_sign(p: Coefficients, domain: Interval) -> int:
    """The sign that the polynomial keeps on an interval; 0 where it vanishes somewhere."""
    p = trimmed(p)
    if not p or roots(p, domain):
        return 0
    return sign_at(p, inside(domain))


def inside(domain: Interval) -> float:
    """A number of the interval's inside."""
    if domain.finite:
        return (domain.lo + domain.hi) / 2
    if domain.lo > -inf:
        return domain.lo + 1.0
    return domain.hi - 1.0 if domain.hi < inf else 0.0
