"""Distributions of bases, draws and emissions: their parameters, supports and densities as graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, log, pi
from typing import TYPE_CHECKING

from flowlang.ir.interval import POSITIVE, REAL, Interval, opened

if TYPE_CHECKING:
    from flowlang.ir.build import Builder

Arguments = Mapping[str, int]


@dataclass(frozen=True)
class Distribution:
    """An elementwise distribution on reals.

    parameters  names in order with default values (None: must be given) and where they must lie
    support     from the parameters that are known numbers (None where unknown)
    log_prob    (builder, value, arguments) -> elementwise log density
    noise       the standard noise that `sample` needs: a kind of the op `random_like`
    transform   (builder, noise, arguments) -> a sample
    """

    name: str
    parameters: dict[str, tuple[float | None, Interval]]
    support: Callable[[Mapping[str, float | None]], Interval]
    log_prob: Callable[[Builder, int, Arguments], int]
    noise: str
    transform: Callable[[Builder, int, Arguments], int]


def _centre(b: Builder, x: int, a: Arguments, mean: str = "mean", scale: str = "scale") -> int:
    if mean in a:
        x = b.sub(x, a[mean])
    return b.div(x, a[scale]) if scale in a else x


def _scaled_log(b: Builder, value: int, a: Arguments, scale: str = "scale") -> int:
    return b.sub(value, b.op("log", a[scale])) if scale in a else value


def _move(b: Builder, z: int, a: Arguments, mean: str = "mean", scale: str = "scale") -> int:
    if scale in a:
        z = b.mul(z, a[scale])
    return b.add(z, a[mean]) if mean in a else z


def _normal(b: Builder, x: int, a: Arguments) -> int:
    z = _centre(b, x, a)
    core = b.sub(b.mul(b.const(-0.5), b.op("square", z)), b.const(0.5 * log(2 * pi)))
    return _scaled_log(b, core, a)


def _laplace(b: Builder, x: int, a: Arguments) -> int:
    return _scaled_log(b, b.sub(b.neg(b.op("abs", _centre(b, x, a))), b.const(log(2))), a)


def _logistic(b: Builder, x: int, a: Arguments) -> int:
    return _scaled_log(b, b.op("log_sigmoid_slope", _centre(b, x, a)), a)


def _student(b: Builder, x: int, a: Arguments) -> int:
    df = a["df"]
    z = _centre(b, x, a)
    half = b.mul(b.add(df, b.const(1.0)), b.const(0.5))
    norm = b.sub(b.op("lgamma", half), b.op("lgamma", b.mul(df, b.const(0.5))))
    norm = b.sub(norm, b.mul(b.const(0.5), b.op("log", b.mul(df, b.const(pi)))))
    body = b.mul(half, b.op("log1p", b.div(b.op("square", z), df)))
    return _scaled_log(b, b.sub(norm, body), a)


def _uniform(b: Builder, x: int, a: Arguments) -> int:
    lo, hi = a["lo"], a["hi"]
    inside = b.op("and", b.op("ge", x, lo), b.op("le", x, hi))
    level = b.neg(b.op("log", b.sub(hi, lo)))
    return b.op("where", inside, level, b.const(-inf))


def _exponential(b: Builder, x: int, a: Arguments) -> int:
    value = b.neg(b.mul(x, a["rate"]) if "rate" in a else x)
    value = b.add(value, b.op("log", a["rate"])) if "rate" in a else value
    return b.op("where", b.op("ge", x, b.const(0.0)), value, b.const(-inf))


ANY = (0.0, REAL)
SCALE = (1.0, POSITIVE)


def _whole(a: Mapping[str, float | None]) -> Interval:
    return REAL


def _between(a: Mapping[str, float | None]) -> Interval:
    lo, hi = a.get("lo", 0.0), a.get("hi", 1.0)
    if lo is None or hi is None or not lo < hi:
        return Interval(0.0, 0.0)  # unknown ends: nothing can be shown to lie on them
    return opened(lo, hi)


DISTRIBUTIONS: dict[str, Distribution] = {
    d.name: d
    for d in (
        Distribution("normal", {"mean": ANY, "scale": SCALE}, _whole, _normal, "normal", _move),
        Distribution("laplace", {"mean": ANY, "scale": SCALE}, _whole, _laplace, "laplace", _move),
        Distribution("logistic", {"mean": ANY, "scale": SCALE}, _whole, _logistic, "logistic", _move),
        Distribution("student_t", {"df": (None, POSITIVE), "mean": ANY, "scale": SCALE}, _whole, _student, "student_t", _move),
        Distribution(
            "uniform", {"lo": (0.0, REAL), "hi": (1.0, REAL)}, _between, _uniform, "uniform",
            lambda b, z, a: b.add(a["lo"], b.mul(z, b.sub(a["hi"], a["lo"]))),
        ),
        Distribution(
            "exponential", {"rate": SCALE}, lambda a: POSITIVE, _exponential, "exponential",
            lambda b, z, a: b.div(z, a["rate"]) if "rate" in a else z,
        ),
    )
}  # fmt: skip
