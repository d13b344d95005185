"""Intervals of extended reals with open and closed ends: the value domain of range analysis.

An interval bounds every element of a tensor. Values are finite reals unless an end is a closed
infinity, which only limit evaluation uses (`point(inf)`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import inf, isinf, isnan


@dataclass(frozen=True, slots=True)
class Interval:
    lo: float
    hi: float
    lo_open: bool = False
    hi_open: bool = False

    @property
    def is_point(self) -> bool:
        return self.lo == self.hi

    @property
    def finite(self) -> bool:
        return not isinf(self.lo) and not isinf(self.hi)

    def contains(self, value: float) -> bool:
        above = value > self.lo or (value == self.lo and not self.lo_open)
        below = value < self.hi or (value == self.hi and not self.hi_open)
        return above and below

    def within(self, other: Interval) -> bool:
        """Subset."""
        lo = self.lo > other.lo or (self.lo == other.lo and (self.lo_open or not other.lo_open))
        hi = self.hi < other.hi or (self.hi == other.hi and (self.hi_open or not other.hi_open))
        return lo and hi

    @property
    def positive(self) -> bool:
        return self.lo > 0 or (self.lo == 0 and self.lo_open)

    @property
    def negative(self) -> bool:
        return self.hi < 0 or (self.hi == 0 and self.hi_open)

    @property
    def nonzero(self) -> bool:
        return self.positive or self.negative

    @property
    def sign(self) -> int:
        return 1 if self.positive else -1 if self.negative else 0

    def union(self, other: Interval) -> Interval:
        lo, lo_open = min((self.lo, self.lo_open), (other.lo, other.lo_open))
        hi, hi_closed = max((self.hi, not self.hi_open), (other.hi, not other.hi_open))
        return Interval(lo, hi, lo_open, not hi_closed)

    def meet(self, other: Interval) -> Interval | None:
        lo, lo_open = max((self.lo, self.lo_open), (other.lo, other.lo_open))
        hi, hi_closed = min((self.hi, not self.hi_open), (other.hi, not other.hi_open))
        hi_open = not hi_closed
        if lo > hi or (lo == hi and (lo_open or hi_open)):
            return None
        return Interval(lo, hi, lo_open, hi_open)

    def _number(self, v: float) -> str:
        if isinf(v):
            return "∞" if v > 0 else "-∞"
        return f"{v:g}"

    def __str__(self) -> str:
        if self == REAL:
            return "R"
        if self == POSITIVE:
            return "Positive"
        left, right = "(" if self.lo_open else "[", ")" if self.hi_open else "]"
        return f"{left}{self._number(self.lo)}, {self._number(self.hi)}{right}"


REAL = Interval(-inf, inf, True, True)
POSITIVE = Interval(0.0, inf, True, True)
NONNEGATIVE = Interval(0.0, inf, False, True)
UNIT = Interval(0.0, 1.0, True, True)


def point(value: float) -> Interval:
    return Interval(float(value), float(value))


def closed(lo: float, hi: float) -> Interval:
    return Interval(lo, hi)


def opened(lo: float, hi: float) -> Interval:
    return Interval(lo, hi, True, True)


def _times(a: float, a_open: bool, b: float, b_open: bool) -> tuple[float, bool] | None:
    """An end of a product; None for 0·∞ with both ends attained (undefined)."""
    if a == 0 or b == 0:
        zero_closed = (a == 0 and not a_open) or (b == 0 and not b_open)
        if (isinf(a) and not a_open) or (isinf(b) and not b_open):
            return None
        return 0.0, not zero_closed
    return a * b, a_open or b_open


def add(a: Interval, b: Interval) -> Interval:
    lo, hi = a.lo + b.lo, a.hi + b.hi
    if isnan(lo):
        lo = -inf
    if isnan(hi):
        hi = inf
    # A closed infinity (a limit point) absorbs any finite value of the other operand.
    lo_open = (a.lo_open or b.lo_open) and not _absorbs(a.lo, a.lo_open, b) and not _absorbs(b.lo, b.lo_open, a)
    hi_open = (a.hi_open or b.hi_open) and not _absorbs(a.hi, a.hi_open, b) and not _absorbs(b.hi, b.hi_open, a)
    if a.is_point and isinf(a.lo) and (b.finite or not _touches(b, -a.lo)):
        return a
    if b.is_point and isinf(b.lo) and (a.finite or not _touches(a, -b.lo)):
        return b
    return Interval(lo, hi, lo_open, hi_open)


def _absorbs(end: float, is_open: bool, other: Interval) -> bool:
    return isinf(end) and not is_open and not _touches(other, -end)


def _touches(iv: Interval, infinity: float) -> bool:
    """Whether the interval attains that infinity."""
    return (iv.lo == infinity and not iv.lo_open) or (iv.hi == infinity and not iv.hi_open)


def neg(a: Interval) -> Interval:
    return Interval(-a.hi, -a.lo, a.hi_open, a.lo_open)


def sub(a: Interval, b: Interval) -> Interval:
    return add(a, neg(b))


def mul(a: Interval, b: Interval) -> Interval:
    for p, q in ((a, b), (b, a)):
        if p.is_point and isinf(p.lo) and not p.lo_open:  # a limit point
            if q.positive:
                return p
            if q.negative:
                return neg(p)
            return Interval(-inf, inf)
        if p.is_point and p.lo == 0:
            return point(0.0) if not (_touches(q, inf) or _touches(q, -inf)) else Interval(-inf, inf)
    ends = [
        _times(x, xo, y, yo)
        for x, xo in ((a.lo, a.lo_open), (a.hi, a.hi_open))
        for y, yo in ((b.lo, b.lo_open), (b.hi, b.hi_open))
    ]
    if any(e is None for e in ends):
        return Interval(-inf, inf)
    known = [e for e in ends if e is not None]
    lo, lo_open = min(known)
    hi, hi_closed = max((v, not o) for v, o in known)
    # An interior zero makes a zero end attained.
    inner = (a.contains(0) and not (b.is_point and isinf(b.lo))) or b.contains(0)
    if inner and lo == 0:
        lo_open = False
    if inner and hi == 0:
        hi_closed = True
    return Interval(lo, hi, lo_open, not hi_closed)


def reciprocal(a: Interval) -> Interval | None:
    """1/a; None if 0 may be attained, or nothing but 0 is near."""
    if not a.nonzero or a.lo == a.hi == 0:
        return None
    if a.positive:
        hi, hi_open = (inf, True) if a.lo == 0 else (1 / a.lo, a.lo_open)
        lo, lo_open = (0.0, a.hi_open) if isinf(a.hi) else (1 / a.hi, a.hi_open)
        return Interval(lo, hi, lo_open, hi_open)
    return neg(reciprocal(neg(a)) or REAL)


def square(a: Interval) -> Interval:
    if a.lo >= 0:
        return Interval(a.lo * a.lo, a.hi * a.hi, a.lo_open, a.hi_open)
    if a.hi <= 0:
        return square(neg(a))
    top, top_closed = max((abs(a.lo), not a.lo_open), (abs(a.hi), not a.hi_open))
    return Interval(0.0, top * top, False, not top_closed)


def minimum(a: Interval, b: Interval) -> Interval:
    lo, lo_open = min((a.lo, a.lo_open), (b.lo, b.lo_open))
    hi, hi_closed = min((a.hi, not a.hi_open), (b.hi, not b.hi_open))
    return Interval(lo, hi, lo_open, not hi_closed)


def maximum(a: Interval, b: Interval) -> Interval:
    return neg(minimum(neg(a), neg(b)))


def monotone(a: Interval, f: object, *, decreasing: bool = False) -> Interval:
    """The image under a monotone continuous function defined (with limits) on the closed interval."""
    assert callable(f)
    lo, hi = f(a.lo), f(a.hi)
    if decreasing:
        return Interval(hi, lo, a.hi_open, a.lo_open)
    return Interval(lo, hi, a.lo_open, a.hi_open)


def split(a: Interval, parts: int) -> list[Interval]:
    """Cover of an interval by pieces; unbounded sides are cut at powers of two."""
    cuts: list[float] = []
    if a.finite:
        cuts = [a.lo + (a.hi - a.lo) * k / parts for k in range(1, parts)]
    else:
        scale = [0.0]
        for k in range(parts // 4 + 1):
            r = 8.0 * 2.0 ** (k - parts // 4)
            scale += [r, -r]
        scale += [16.0, -16.0, 64.0, -64.0]
        cuts = sorted(c for c in set(scale) if a.lo < c < a.hi)
    ends = [(a.lo, a.lo_open), *((c, False) for c in cuts), (a.hi, a.hi_open)]
    return [Interval(p, q, po, qo) for (p, po), (q, qo) in itertools.pairwise(ends)]
