"""Probability paths between a source x0 (t = 0) and data x1 (t = 1), symbolically in t.

For an affine path x_t = α(t)·x1 + σ(t)·x0 everything follows from α and σ: velocity, score, the
conversions between predictions, the signal-to-noise ratio (Lipman et al. 2024, arXiv 2412.06264, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy as sp
from sympy.core.function import AppliedUndef

from flowlang.elaborate.paths import lies_between, scale_and_mean

t, x0, x1 = sp.symbols("t x0 x1", real=True)
x = sp.Symbol("x", real=True)
GRID = 96
LARGEST = 10**3  # integers inside trigonometric functions, which sympy would expand as multiples of an angle


def tidy(e: Any) -> Any:
    """The expression simplified, unless that could take for ever."""
    turning = e.atoms(sp.sin, sp.cos, sp.tan)
    if any(abs(n.p) > LARGEST or n.q > LARGEST for f in turning for n in f.atoms(sp.Rational)):
        return e
    return sp.simplify(sp.piecewise_fold(e) if e.has(sp.Piecewise) else e)


@dataclass(frozen=True)
class SymbolicPath:
    """x_t as an expression in t, x0 and x1; functions in it are networks, of which the identities alone are known."""

    expression: Any
    identities: tuple[tuple[Any, Any], ...] = ()

    @cached_property
    def networks(self) -> set[Any]:
        return set(self.expression.atoms(AppliedUndef))

    def known(self, e: Any) -> Any:
        """An expression with what the identities say put in."""
        for _ in range(len(self.identities) + 1):
            e = e.xreplace(dict(self.identities))
        return e

    @cached_property
    def affine(self) -> tuple[Any, Any] | None:
        """(α, σ) of x_t = α·x1 + σ·x0; None for a path of another form."""
        if any(f.has(x0, x1) for f in self.networks):
            return None
        e = sp.expand(self.expression)
        alpha, sigma = tidy(sp.diff(e, x1)), tidy(sp.diff(e, x0))
        if alpha.has(x0, x1) or sigma.has(x0, x1) or tidy(e - alpha * x1 - sigma * x0) != 0:
            return None
        return alpha, sigma

    @cached_property
    def velocity(self) -> Any:
        """d x_t / dt at fixed x0 and x1."""
        return tidy(sp.diff(self.expression, t))

    def at(self, time: int) -> Any:
        found = self.expression.subs(t, time)
        if found.has(sp.nan, sp.zoo, sp.oo) and not self.networks:
            found = sp.limit(self.expression, t, time, "+" if time == 0 else "-")
        return tidy(self.known(found))

    def residual(self, time: int) -> Any:
        """What is missing at an end: 0 where the path arrives."""
        return tidy(self.at(time) - (x0 if time == 0 else x1))

    @cached_property
    def convex(self) -> bool:
        """Whether x_t lies between x0 and x1, so that it stays in every convex domain that holds them."""
        return not self.networks and self.affine is not None and lies_between(*self.affine)

    @cached_property
    def gaussian(self) -> tuple[Any, Any] | None:
        """(σ, μ) of x_t = σ(t, x1)·x0 + μ(t, x1), where networks may read t and x1; None for another form."""
        found = scale_and_mean(self.expression)
        return None if found is None else (tidy(found[0]), tidy(found[1]))

    @cached_property
    def field(self) -> Any:
        """The conditional velocity u_t(x | x1) = σ'/σ·(x - α·x1) + α'·x1, from x instead of x0; None if not affine."""
        if self.affine is None:
            return None
        alpha, sigma = self.affine
        return tidy(sp.diff(sigma, t) / sigma * (x - alpha * x1) + sp.diff(alpha, t) * x1)

    @cached_property
    def signal_to_noise(self) -> Any:
        if self.affine is None:
            return None
        alpha, sigma = self.affine
        return tidy(alpha**2 / sigma**2)

    def irregular(self) -> tuple[float, str] | None:
        """A time inside (0, 1) where the path or its velocity is not a finite real number, with what is wrong."""
        for place in self.stand_ins():
            found = rough(place)
            if found is not None:
                return found
        return None

    def stand_ins(self) -> tuple[Any, ...]:
        """The expression, with smooth functions of either sign in the place of networks."""
        if not self.networks:
            return (self.expression,)
        names = sorted({f.func.__name__ for f in self.networks})

        def smooth(sign: int) -> Any:
            return lambda f: (
                sign * sp.sin(sum((k + 1) * a for k, a in enumerate(f.args)) / 2 + 1 + names.index(f.func.__name__))
            )

        return tuple(self.expression.replace(lambda e: isinstance(e, AppliedUndef), smooth(sign)) for sign in (1, -1))

    def jump(self) -> Any:
        """A time inside (0, 1) where pieces of the path do not meet; None for a path without such pieces."""
        times = {
            s
            for r in self.expression.atoms(sp.core.relational.Relational)
            for s in sp.solve(r.lhs - r.rhs, t)
            if s.is_number and s.is_real and 0 < s < 1
        }
        near = sp.Rational(1, 10**9)
        for time in sorted(times):
            ends = [chosen(self.expression, time + e).subs(t, time) for e in (-near, near)]
            if tidy(ends[1] - ends[0]) != 0:
                return time
        return None

    def snr_turns(self) -> float | None:
        """A time where the signal-to-noise ratio does not grow; None where it grows throughout."""
        if self.networks:
            return None
        ratio = self.signal_to_noise
        if ratio is None or self.affine is None or self.affine[1] == 0 or ratio.has(sp.zoo, sp.nan, sp.oo):
            return None
        f = sp.lambdify(t, ratio, "mpmath")
        last: float | None = None
        for k in range(1, GRID):
            try:
                value = complex(f(k / GRID)).real
            except (ZeroDivisionError, ValueError, OverflowError, TypeError):
                continue  # beyond floats there
            if last is not None and value < last * (1 - 1e-12):
                return k / GRID
            last = value
        return None


@dataclass(frozen=True)
class MixturePath:
    """x_t drawn entry by entry: x1 with the weight b(t), else x0, with a(t) = 1 - b(t)."""

    a: Any
    b: Any
    rest: Any = 0

    @property
    def missing(self) -> Any:
        """What the weights lack to 1."""
        return tidy(1 - self.a - self.b - self.rest)

    @property
    def pace(self) -> Any:
        """b' / a: the rate at which an entry that is still x0's goes over to x1."""
        return tidy(sp.diff(self.b, t) / self.a)

    def residual(self, time: int) -> Any:
        return tidy(self.b.subs(t, time) - time)

    def beyond(self) -> tuple[float, str] | None:
        """A time inside (0, 1) where a weight is no probability or falls, with what is wrong."""
        found = rough(self.b)
        if found is not None:
            return found[0], "the weight of x1 is not a finite real number, or its slope is not"
        weight, slope = (sp.lambdify(t, e, "mpmath") for e in (self.b, sp.diff(self.b, t)))
        for k in range(1, GRID):
            if not -SLACK <= float(weight(k / GRID)) <= 1 + SLACK:
                return k / GRID, f"the weight of x1 is {float(weight(k / GRID)):.3g}, and is to be a probability"
            if float(slope(k / GRID)) < -SLACK:
                return k / GRID, "the weight of x1 falls, so that entries would jump at a rate below 0"
        return None


SLACK = 1e-9


def rough(expression: Any) -> tuple[float, str] | None:
    """A time inside (0, 1) where an expression or its derivative is not a finite real number, with what is wrong."""
    for name, e in (("the path", expression), ("its velocity", sp.diff(expression, t))):
        if e.has(sp.zoo, sp.nan, sp.oo, -sp.oo):
            return 1 / GRID, name
        f = sp.lambdify((t, x0, x1), e, "mpmath")
        for k in range(1, GRID):
            time = k / GRID
            try:
                value = complex(f(time, 0.7, -1.3))
            except (ZeroDivisionError, ValueError, OverflowError, TypeError):
                return time, name
            if value.imag != 0 or value != value or abs(value) == float("inf"):
                return time, name
    return None


def chosen(e: Any, time: Any) -> Any:
    """An expression with the pieces that hold at a time."""
    while found := e.atoms(sp.Piecewise):
        e = e.xreplace({p: next(v for v, c in p.args if bool(c.subs(t, time))) for p in found})
    return e


def conversions(path: SymbolicPath) -> dict[str, Any]:
    """For an affine path: velocity from each prediction and each prediction from velocity (v, noise x0, data x1, score s).

    Keys `a_from_b`; expressions in t, x and the symbol of b.
    """
    assert path.affine is not None
    alpha, sigma = path.affine
    da, ds = sp.diff(alpha, t), sp.diff(sigma, t)
    v, s = sp.symbols("v s", real=True)
    wronskian = tidy(sigma * da - ds * alpha)
    out = {
        "data_from_velocity": (sigma * v - ds * x) / wronskian,
        "noise_from_velocity": (da * x - alpha * v) / wronskian,
        "velocity_from_data": ds / sigma * x + wronskian / sigma * x1,
        "velocity_from_noise": da / alpha * x - wronskian / alpha * x0,
        "score_from_noise": -x0 / sigma,
        "noise_from_score": -sigma * s,
        "velocity_from_score": da / alpha * x + wronskian * sigma / alpha * s,
        "score_from_velocity": -(da * x - alpha * v) / (wronskian * sigma),
    }
    return {k: tidy(e) for k, e in out.items()}


def text(expression: Any) -> str:
    """An expression in the spec's notation."""
    try:
        shown = str(expression)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return "a number too long to show"
    return shown.replace("**", " ^ ").replace("*", " * ").replace("pi", "π")


__all__ = ["MixturePath", "SymbolicPath", "conversions", "text"]
