"""The order of a step rule, by exact power series in the step size.

The rule runs on generic polynomial fields with rational coefficients; its result and the exact solution
(by Picard's iteration) are compared coefficient by coefficient. For a rule that carries state over steps
the error after the first step may be O(h^p), and later steps may each add O(h^(p+1)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import cos, exp, log, sin, sqrt
from typing import Any

TERMS = 7  # coefficients kept: orders up to 5 are told apart
CLOSE = 1e-9  # where a function of the rule made the coefficients floats
STEPS = 4  # of a rule whose steps are all alike after the first

Number = Fraction | float | int


@dataclass(frozen=True, slots=True)
class Series:
    """Σ c_k h^k, cut after TERMS coefficients; Fractions where the rule is rational."""

    c: tuple[Number, ...]

    @staticmethod
    def of(*c: Number) -> Series:
        return Series((*c, *(Fraction(0),) * (TERMS - len(c))))

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Vector):
            return other + self
        o = _series(other)
        return Series(tuple(a + b for a, b in zip(self.c, o.c, strict=True)))

    __radd__ = __add__

    def __neg__(self) -> Series:
        return Series(tuple(-a for a in self.c))

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, other: Any) -> Any:
        return (-self) + other

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Vector):
            return other * self
        o = _series(other)
        out: list[Number] = []
        for k in range(TERMS):
            out.append(sum((self.c[i] * o.c[k - i] for i in range(k + 1)), Fraction(0)))
        return Series(tuple(out))

    __rmul__ = __mul__

    def inverse(self) -> Series:
        if self.c[0] == 0:
            raise ZeroDivisionError
        out: list[Number] = [1 / self.c[0]]
        for k in range(1, TERMS):
            out.append(-sum((self.c[i] * out[k - i] for i in range(1, k + 1)), Fraction(0)) / self.c[0])
        return Series(tuple(out))

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, int | float | Fraction):
            return self * (1 / Fraction(other) if not isinstance(other, float) else 1 / other)
        return self * _series(other).inverse()

    def __rtruediv__(self, other: Any) -> Any:
        return self.inverse() * other

    def __pow__(self, n: Any) -> Series:
        n = int(n) if isinstance(n, Fraction) and n.denominator == 1 else n
        if not isinstance(n, int):
            raise TypeError
        base, out = (self if n >= 0 else self.inverse()), Series.of(Fraction(1))
        for _ in range(abs(n)):
            out = out * base
        return out


def _series(value: Any) -> Series:
    if isinstance(value, Series):
        return value
    if isinstance(value, int | float | Fraction):
        return Series.of(Fraction(value) if isinstance(value, int) else value)
    raise TypeError


@dataclass(frozen=True, slots=True)
class Vector:
    """The state: one series for each coordinate."""

    items: tuple[Series, ...]

    def _zip(self, other: Any, f: Callable[[Any, Any], Any]) -> Vector:
        if isinstance(other, Vector):
            return Vector(tuple(f(a, b) for a, b in zip(self.items, other.items, strict=True)))
        return Vector(tuple(f(a, other) for a in self.items))

    def __add__(self, other: Any) -> Vector:
        return self._zip(other, lambda a, b: a + b)

    __radd__ = __add__

    def __neg__(self) -> Vector:
        return Vector(tuple(-a for a in self.items))

    def __sub__(self, other: Any) -> Vector:
        return self._zip(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Vector:
        return (-self) + other

    def __mul__(self, other: Any) -> Vector:
        return self._zip(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Vector:
        return self._zip(other, lambda a, b: a / b)

    def __pow__(self, n: Any) -> Vector:
        return Vector(tuple(a**n for a in self.items))


def _recurrence(value: Any, at: Callable[[float], float], derivative: Callable[[Series], Series]) -> Any:
    """f(series) from f' as a function of f and the series: k·f_k = Σ i·s_i·(f')_{k-i}."""
    if isinstance(value, Vector):
        return Vector(tuple(_recurrence(a, at, derivative) for a in value.items))
    if isinstance(value, int | float | Fraction):
        return at(float(value))
    s = _series(value)
    out: list[Number] = [at(float(s.c[0]))]
    for k in range(1, TERMS):
        slope = derivative(Series.of(*out))
        out.append(sum((i * s.c[i] * slope.c[k - i] for i in range(1, k + 1)), 0.0) / k)
    return Series(tuple(out))


def series_exp(value: Any) -> Any:
    return _recurrence(value, exp, lambda f: f)


def series_sqrt(value: Any) -> Any:
    return _recurrence(value, sqrt, lambda f: (2 * f).inverse())


def series_log(value: Any) -> Any:
    return _recurrence(value, log, lambda f: series_exp(-f))


def _circular(value: Any) -> tuple[Any, Any]:
    s = _series(value)
    out_s: list[Number] = [sin(float(s.c[0]))]
    out_c: list[Number] = [cos(float(s.c[0]))]
    for k in range(1, TERMS):
        out_s.append(sum((i * s.c[i] * out_c[k - i] for i in range(1, k + 1)), 0.0) / k)
        out_c.append(-sum((i * s.c[i] * out_s[k - i] for i in range(1, k + 1)), 0.0) / k)
    return Series(tuple(out_s)), Series(tuple(out_c))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": series_exp,
    "log": series_log,
    "sqrt": series_sqrt,
    "sin": lambda v: _circular(v)[0],
    "cos": lambda v: _circular(v)[1],
}


# ---- fields and their exact solutions -----------------------------------------------------------

DIM = 2
DEGREE = 4


def _stream(seed: int) -> Callable[[], Fraction]:
    state = seed * 2654435761 % 2**32

    def draw() -> Fraction:
        nonlocal state
        state = (1103515245 * state + 12345) % 2**31
        return Fraction((state >> 8) % 19 - 9, 8)

    return draw


def generic_field(seed: int) -> Callable[[Any, Any], Vector]:
    """v(x, t): a dense polynomial of degree 4 in two coordinates and time, its coefficients fixed by the seed."""
    draw = _stream(seed)
    powers = [(i, j, k) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i) for k in range(DEGREE + 1 - i - j)]
    coefficients = [[draw() for _ in powers] for _ in range(DIM)]

    def field(x: Any, t: Any) -> Vector:
        if not isinstance(x, Vector):
            raise TypeError("a field takes a vector")
        xs = [_powers(x.items[d]) for d in range(DIM)]
        ts = _powers(_series(t))
        terms = [xs[0][i] * xs[1][j] * ts[k] for i, j, k in powers]
        out = []
        for row in coefficients:
            total = Series.of(Fraction(0))
            for c, term in zip(row, terms, strict=True):
                total = total + term * c
            out.append(total)
        return Vector(tuple(out))

    return field


def _powers(s: Series) -> list[Series]:
    out = [Series.of(Fraction(1))]
    for _ in range(DEGREE):
        out.append(out[-1] * s)
    return out


START = (Fraction(1, 3), Fraction(-1, 5))
TIME = Fraction(1, 7)


def exact_solution(field: Callable[[Any, Any], Vector]) -> Vector:
    """y(TIME + h) of y' = v(y, t), y(TIME) = START."""
    y = Vector(tuple(Series.of(v) for v in START))
    time = Series.of(TIME, Fraction(1))
    for _ in range(TERMS - 1):
        slope = field(y, time)
        y = Vector(
            tuple(
                Series((start, *(s.c[k] / (k + 1) for k in range(TERMS - 1))))
                for start, s in zip(START, slope.items, strict=True)
            )
        )
    return y


def first_difference(v: Vector) -> int:
    """The lowest power of h that is there; TERMS where none is."""
    for k in range(TERMS):
        for s in v.items:
            value = s.c[k]
            if (value != 0) if isinstance(value, Fraction | int) else abs(value) > CLOSE:
                return k
    return TERMS


@dataclass(frozen=True)
class Change:
    """A smooth change of time and scale, s(r)·x(T(r)), by polynomials in r with generic coefficients, which a rule is told at so
    many `places` in each step: at k the values T, s and their slopes."""

    places: int
    time: tuple[Fraction, ...] = (
        TIME,
        Fraction(5, 4),
        Fraction(-3, 8),
        Fraction(7, 8),
        Fraction(-1, 2),
        Fraction(5, 8),
    )
    scale: tuple[Fraction, ...] = (
        Fraction(3, 4),
        Fraction(-5, 8),
        Fraction(7, 4),
        Fraction(-9, 8),
        Fraction(3, 8),
        Fraction(1, 4),
    )

    def at(self, k: Any) -> tuple[Series, ...]:
        r = Series.of(Fraction(0), Fraction(k) / self.places)
        slopes = [tuple(i * c for i, c in enumerate(p))[1:] for p in (self.time, self.scale)]
        return tuple(composed(p, r) for p in (self.time, self.scale, *slopes))

    def passed(self, steps: int) -> Series:
        """The time that so many steps take."""
        return self.at(steps * self.places)[0] - self.time[0]


def composed(outer: Sequence[Number], inner: Series) -> Series:
    """Σ c_k·inner^k."""
    out = Series.of(Fraction(0))
    for c in reversed(outer):
        out = out * inner + c
    return out


StepRule = Callable[[Callable[[Any, Any], Vector], Vector, Series, Series, int], Vector]


def rule_order(
    steps_of: Callable[[], StepRule], seeds: Sequence[int] = (1, 2), steps: int = STEPS, change: Change | None = None
) -> int:
    """The order of a rule. `steps_of()` gives a fresh rule (with fresh state): (v, x, t, h, i) -> next x.

    Under a change of time the steps lead to where the solution is at the changed times.
    """
    best = TERMS
    for seed in seeds:
        field = generic_field(seed)
        exact = exact_solution(field)
        rule = steps_of()
        h = Series.of(Fraction(0), Fraction(1))
        x = Vector(tuple(Series.of(v) for v in START))
        before: Vector | None = None
        for i in range(steps):
            x = rule(field, x, Series.of(TIME, Fraction(i)), h, i)
            error = x - Vector(
                tuple(scaled(s, i + 1) if change is None else composed(s.c, change.passed(i + 1)) for s in exact.items)
            )
            best = min(best, first_difference(error) if before is None else first_difference(error - before) - 1)
            before = error
    return max(min(best, TERMS - 2), 0)


def scaled(s: Series, factor: int) -> Series:
    """The series of h ↦ s(factor·h)."""
    return Series(tuple(c * factor**k for k, c in enumerate(s.c)))


__all__ = ["FUNCTIONS", "Change", "Series", "Vector", "rule_order"]
