"""Orders of a step rule for dx = v dt + g dW, by exact series in the root of the step (Milstein 1995; Kloeden & Platen 1992).

With s² = h and dw = s·ξ, ξ standard normal, one step of the rule is a series in s whose coefficients are polynomials in ξ.
The rule runs on generic polynomial equations of two coordinates, each with noise of its own that depends on it alone:

- weak order p: the moments of a step's increment agree with the exact ones, which the generator gives, to h^p;
- strong order 1/2: s·ξ and the mean of s² agree with the Ito-Taylor series; strong order 1: all of s² agrees. Higher orders
  need iterated integrals that a rule of dw alone does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

from flowlang.analysis.series import _stream

CUT = 4  # powers of s that are kept: weak orders up to 2 are told apart
DIM = 2
DEGREE = 3
START = (Fraction(1, 3), Fraction(-1, 5))
TIME = Fraction(1, 7)

Powers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Poly:
    """A polynomial with exact coefficients: exponents -> coefficient. `cut` drops higher powers of the first variable."""

    terms: dict[Powers, Fraction]
    cut: int | None = None

    def of(self, terms: dict[Powers, Fraction]) -> Poly:
        return Poly({k: c for k, c in terms.items() if c and (self.cut is None or k[0] <= self.cut)}, self.cut)

    def lifted(self, other: Any) -> Poly:
        if isinstance(other, Poly):
            return other
        if isinstance(other, int | Fraction) and not isinstance(other, bool):
            width = len(next(iter(self.terms), (0,) * (DIM + 1)))
            return self.of({(0,) * width: Fraction(other)})
        raise TypeError

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Pair):
            return other + self
        terms = dict(self.terms)
        for k, c in self.lifted(other).terms.items():
            terms[k] = terms.get(k, Fraction(0)) + c
        return self.of(terms)

    __radd__ = __add__

    def __neg__(self) -> Poly:
        return self.of({k: -c for k, c in self.terms.items()})

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, other: Any) -> Any:
        return (-self) + other

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Pair):
            return other * self
        terms: dict[Powers, Fraction] = {}
        for (a, p), (b, q) in product(self.terms.items(), self.lifted(other).terms.items()):
            if self.cut is None or a[0] + b[0] <= self.cut:
                k = tuple(i + j for i, j in zip(a, b, strict=True))
                terms[k] = terms.get(k, Fraction(0)) + p * q
        return self.of(terms)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Poly:
        if not isinstance(other, int | Fraction):
            raise TypeError
        return self * (1 / Fraction(other))

    def __pow__(self, n: Any) -> Poly:
        if n != int(n) or n < 0:
            raise TypeError
        out = self.lifted(1)
        for _ in range(int(n)):
            out = out * self
        return out

    def slope(self, k: int) -> Poly:
        return self.of({(*p[:k], p[k] - 1, *p[k + 1 :]): c * p[k] for p, c in self.terms.items() if p[k]})

    def at(self, values: Sequence[Any]) -> Any:
        total: Any = Fraction(0)
        known: dict[tuple[int, int], Any] = {}
        for p, c in self.terms.items():
            term: Any = c
            for k, e in enumerate(p):
                if e:
                    if (k, e) not in known:
                        known[k, e] = values[k] ** e
                    term = known[k, e] * term
            total = term + total
        return total


@dataclass(frozen=True, slots=True)
class Pair:
    """A value for each coordinate."""

    items: tuple[Any, ...]

    def both(self, other: Any, f: Callable[[Any, Any], Any]) -> Pair:
        others = other.items if isinstance(other, Pair) else (other,) * DIM
        return Pair(tuple(f(a, b) for a, b in zip(self.items, others, strict=True)))

    def __add__(self, other: Any) -> Pair:
        return self.both(other, lambda a, b: a + b)

    __radd__ = __add__

    def __neg__(self) -> Pair:
        return Pair(tuple(-a for a in self.items))

    def __sub__(self, other: Any) -> Pair:
        return self + (-other)

    def __rsub__(self, other: Any) -> Pair:
        return (-self) + other

    def __mul__(self, other: Any) -> Pair:
        return self.both(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Pair:
        return self.both(other, lambda a, b: a / b)

    def __pow__(self, n: Any) -> Pair:
        return Pair(tuple(a**n for a in self.items))


def series(terms: dict[Powers, Fraction]) -> Poly:
    """A series in s and the two noises."""
    return Poly(terms, CUT)


@dataclass(frozen=True)
class Equation:
    """dx_i = v_i(x, t) dt + g_i(x_i, t) dW_i; polynomials in x1, x2 and t, all less where a step begins."""

    drift: tuple[Poly, Poly]
    noise: tuple[Poly, Poly]

    def ito(self, sense: str) -> tuple[Poly, ...]:
        """The drift in Ito's sense."""
        if sense == "ito":
            return self.drift
        return tuple(v + g * g.slope(i) / 2 for i, (v, g) in enumerate(zip(self.drift, self.noise, strict=True)))


def generic(seed: int, additive: bool) -> Equation:
    draw = _stream(seed)

    def poly(variables: Sequence[int]) -> Poly:
        powers = [
            p
            for p in product(range(DEGREE + 1), repeat=DIM + 1)
            if sum(p) <= DEGREE and all(not e or k in variables for k, e in enumerate(p))
        ]
        return Poly({p: c for p in powers if (c := draw())})

    drift = poly((0, 1, 2)), poly((0, 1, 2))
    own = ((2,), (2,)) if additive else ((0, 2), (1, 2))
    return Equation(drift, (poly(own[0]), poly(own[1])))


Rule = Callable[..., Any]


def one_step(rule: Rule, e: Equation) -> Pair:
    """The rule's step from START at TIME, as series."""
    s2, one = series({(2, 0, 0): Fraction(1)}), (0,) * (DIM + 1)
    x = Pair(tuple(series({one: c}) for c in START))
    dw = Pair((series({(1, 1, 0): Fraction(1)}), series({(1, 0, 1): Fraction(1)})))

    def field(polys: Sequence[Poly]) -> Callable[[Any, Any], Pair]:
        def call(value: Any, time: Any) -> Pair:
            if not isinstance(value, Pair) or isinstance(time, Pair):
                raise TypeError
            place = [a - c for a, c in zip([*value.items, time], [*START, TIME], strict=True)]
            return Pair(tuple(series({one: Fraction(1)}) * p.at(place) for p in polys))

        return call

    level = field(e.noise)

    def noise(value: Any, time: Any, increment: Any = None) -> Any:
        found = level(value, time)
        return found if increment is None else found * increment

    slopes = field([g.slope(i) for i, g in enumerate(e.noise)])
    found = rule(
        field(e.drift), noise, lambda value, along, time: slopes(value, time) * along, x, series({one: TIME}), s2, dw
    )
    if not isinstance(found, Pair) or any(isinstance(i, Pair) for i in found.items):
        raise TypeError
    return found


def expected(p: Poly) -> dict[int, Fraction]:
    """The mean over the noises, power of s by power of s."""
    out: dict[int, Fraction] = {}
    for (k, *noises), c in p.terms.items():
        weight = Fraction(1)
        for n in noises:
            for j in range(n - 1, 0, -2):
                weight *= j
            if n % 2:
                weight = Fraction(0)
        out[k] = out.get(k, Fraction(0)) + c * weight
    return out


def generator(u: Poly, drift: Sequence[Poly], noise: Sequence[Poly], degree: int) -> Poly:
    """∂u/∂t + v·∇u + Σ g_i²/2 ∂²u/∂x_i², its terms up to a degree."""
    out = u.slope(DIM)
    for i in range(DIM):
        squared = times(noise[i], noise[i], degree)
        out = out + times(drift[i], u.slope(i), degree) + times(squared, u.slope(i).slope(i) / 2, degree)
    return out


def times(a: Poly, b: Poly, degree: int) -> Poly:
    terms: dict[Powers, Fraction] = {}
    for (p, c), (q, d) in product(a.terms.items(), b.terms.items()):
        if sum(p) + sum(q) <= degree:
            k = tuple(i + j for i, j in zip(p, q, strict=True))
            terms[k] = terms.get(k, Fraction(0)) + c * d
    return Poly(terms)


def weak_order(step: Pair, e: Equation, sense: str) -> int:
    """By the moments of the increment, of degree up to CUT: higher ones begin beyond what is kept."""
    drift, best = e.ito(sense), CUT // 2
    moved = [x - c for x, c in zip(step.items, START, strict=True)]
    for powers in product(range(CUT + 1), repeat=DIM):
        if not 0 < sum(powers) <= CUT:
            continue
        have = moved[0].lifted(1)
        for i, n in enumerate(powers):
            have = have * moved[i] ** n
        u = Poly({(*powers, 0): Fraction(1)})
        mean, factor = expected(have), Fraction(1)
        for k in range(CUT + 1):
            want = Fraction(0)
            if k % 2 == 0:
                want = factor * start(u)
                u, factor = generator(u, drift, e.noise, CUT - k - 2), factor / (k // 2 + 1)
            if mean.get(k, Fraction(0)) != want:
                best = min(best, max((k + 1) // 2 - 1, 0))
                break
    return best


def start(p: Poly) -> Fraction:
    return p.terms.get((0,) * (DIM + 1), Fraction(0))


def strong_order(step: Pair, e: Equation, sense: str) -> Fraction:
    drift = e.ito(sense)
    first = second = centred = True
    for i, x in enumerate(step.items):
        g, slope, v = start(e.noise[i]), start(e.noise[i].slope(i)), start(drift[i])
        noise = tuple(int(k == i) for k in range(DIM))
        want = {(1, *noise): g, (2, 0, 0): v - g * slope / 2, (2, *(2 * n for n in noise)): g * slope / 2}
        have = x.terms
        first = first and {k: c for k, c in have.items() if k[0] == 1} == {
            k: c for k, c in want.items() if k[0] == 1 and c
        }
        second = second and {k: c for k, c in have.items() if k[0] == 2} == {
            k: c for k, c in want.items() if k[0] == 2 and c
        }
        centred = centred and expected(x).get(2, Fraction(0)) == v
    if not (first and centred):
        return Fraction(0)
    return Fraction(1) if second else Fraction(1, 2)


def stochastic_orders(rule: Rule, seeds: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Weak and strong orders in the sense in which the rule converges, and those for noise that does not depend on x."""
    found: dict[str, dict[str, Any]] = {}
    for sense in ("ito", "stratonovich"):
        orders = [
            (weak_order(s, e, sense), strong_order(s, e, sense))
            for seed in seeds
            for e in [generic(seed, False)]
            for s in [one_step(rule, e)]
        ]
        found[sense] = {"weak": min(w for w, _ in orders), "strong": min(s for _, s in orders)}
    sense = max(found, key=lambda k: (found[k]["weak"], found[k]["strong"]))
    still = [
        (weak_order(s, e, "ito"), strong_order(s, e, "ito"))
        for seed in seeds
        for e in [generic(seed, True)]
        for s in [one_step(rule, e)]
    ]
    return {
        **found[sense],
        "sense": sense,
        "additive_weak": min(w for w, _ in still),
        "additive_strong": min(s for _, s in still),
    }


__all__ = ["stochastic_orders"]
