"""Distributions of bases, draws and emissions: their parameters, supports, densities and samples as graphs.

A distribution is elementwise or joint: its log density keeps the axes over which entries are
independent, and has summed over those that it couples. What is left is summed for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, lgamma, log, pi
from typing import TYPE_CHECKING

from flowlang.ir.interval import POSITIVE, REAL, Interval, closed, opened
from flowlang.ir.types import TensorType

if TYPE_CHECKING:
    from flowlang.ir.build import Builder

Arguments = Mapping[str, int]
Known = Mapping[str, float | None]
Parameter = tuple[float | None, Interval]  # default value (None: must be given), and where it must lie


@dataclass(frozen=True, eq=False)
class Distribution:
    """A distribution over values of one tensor type.

    parameters  names in order, each with its default and where its values must lie
    support     of each entry, from the parameters that are known numbers (None where unknown)
    log_prob    (builder, value, arguments) -> log density; axes that it couples are summed already
    sample      (builder, type, arguments) -> a reparametrised sample of that type
    discrete    values are whole numbers and `log_prob` is a log probability
    matrices    parameters that must be constrained matrices (`LowerTriangular`)
    event_axes  axes of arguments that the value lacks: a mixture's components
    """

    name: str
    parameters: Mapping[str, Parameter]
    support: Callable[[Known], Interval]
    log_prob: Callable[[Builder, int, Arguments], int]
    sample: Callable[[Builder, TensorType, Arguments], int]
    discrete: bool = False
    matrices: tuple[str, ...] = ()
    event_axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def total_log_prob(self, b: Builder, value: int, arguments: Arguments) -> int:
        """log p of each sample: a value without axes."""
        return b.sum_all(self.log_prob(b, value, self.complete(b, arguments)))

    def draw(self, b: Builder, type: TensorType, arguments: Arguments) -> int:
        """A sample with exactly that type."""
        value = self.sample(b, type, self.complete(b, arguments))
        return b.op("order", b.expand(value, type), names=type.names)

    def complete(self, b: Builder, arguments: Arguments) -> dict[str, int]:
        """Arguments with defaults, but for those whose absence makes a shorter formula."""
        out = dict(arguments)
        for name, (default, _) in self.parameters.items():
            if name not in out and default is not None and name not in ("mean", "scale", "rate"):
                out[name] = b.const(default)
        return out


def noise(b: Builder, kind: str, type: TensorType, *shape: int) -> int:
    """Standard noise of a kind; `shape` are the parameters that no transform can supply."""
    axes = tuple((a.name, a.size) for a in type.axes)
    return b.graph.add("random_like", shape, type.as_kind("real"), {"kind": kind, "axes": axes}, batched=True).id


# ---- location and scale -------------------------------------------------------------------------


def centre(b: Builder, x: int, a: Arguments) -> int:
    if "mean" in a:
        x = b.sub(x, a["mean"])
    return b.div(x, a["scale"]) if "scale" in a else x


def less_log(b: Builder, value: int, a: Arguments, scale: str = "scale") -> int:
    return b.sub(value, b.op("log", a[scale])) if scale in a else value


def move(b: Builder, z: int, a: Arguments) -> int:
    if "scale" in a:
        z = b.mul(z, a["scale"])
    return b.add(z, a["mean"]) if "mean" in a else z


def located(name: str, standard: Callable[[Builder, int], int]) -> Distribution:
    """A location-scale family on the reals, from the log density of its standard member."""
    return Distribution(
        name,
        {"mean": ANY, "scale": SCALE},
        whole,
        lambda b, x, a: less_log(b, standard(b, centre(b, x, a)), a),
        lambda b, t, a: move(b, noise(b, name, t), a),
    )


def _normal(b: Builder, z: int) -> int:
    return b.sub(b.mul(b.const(-0.5), b.op("square", z)), b.const(0.5 * log(2 * pi)))


def _laplace(b: Builder, z: int) -> int:
    return b.sub(b.neg(b.op("abs", z)), b.const(log(2)))


def _logistic(b: Builder, z: int) -> int:
    return b.op("log_sigmoid_slope", z)


def _student(b: Builder, x: int, a: Arguments) -> int:
    df = a["df"]
    z = centre(b, x, a)
    half = b.mul(b.add(df, b.const(1.0)), b.const(0.5))
    norm = b.sub(b.op("lgamma", half), b.op("lgamma", b.mul(df, b.const(0.5))))
    norm = b.sub(norm, b.mul(b.const(0.5), b.op("log", b.mul(df, b.const(pi)))))
    body = b.mul(half, b.op("log1p", b.div(b.op("square", z), df)))
    return less_log(b, b.sub(norm, body), a)


# ---- bounded and periodic -----------------------------------------------------------------------


def _uniform(b: Builder, x: int, a: Arguments) -> int:
    lo, hi = a["lo"], a["hi"]
    inside = b.op("and", b.op("ge", x, lo), b.op("le", x, hi))
    return guarded(b, x, inside, b.neg(b.op("log", b.sub(hi, lo))))


def _uniform_sphere(b: Builder, x: int, a: Arguments) -> int:
    """With respect to the surface of the unit sphere of the last axis; nothing off it."""
    axis = b.type(x).axes[-1]
    area = log(2) + axis.size / 2 * log(pi) - lgamma(axis.size / 2)
    size = b.op("sum", b.op("square", x), axes=(axis.name,))
    near = b.op("lt", b.op("abs", b.sub(size, b.const(1.0))), b.const(1e-3))
    return guarded(b, size, near, b.const(-area))


def _uniform_sphere_sample(b: Builder, t: TensorType, a: Arguments) -> int:
    return b.op("normalize", noise(b, "normal", t), axes=t.names[-1:])


def _exponential(b: Builder, x: int, a: Arguments) -> int:
    value = b.neg(b.mul(x, a["rate"]) if "rate" in a else x)
    value = b.add(value, b.op("log", a["rate"])) if "rate" in a else value
    return guarded(b, x, b.op("ge", x, b.const(0.0)), value)


def _exponential_sample(b: Builder, z: int, a: Arguments) -> int:
    return b.div(z, a["rate"]) if "rate" in a else z


def guarded(b: Builder, x: int, inside: int, value: int) -> int:
    """The value inside, -inf outside; NaN stays NaN (a comparison alone would call it outside)."""
    outside = b.op("where", b.op("eq", x, x), b.const(-inf), x)
    return b.op("where", inside, value, outside)


def _von_mises(b: Builder, x: int, a: Arguments) -> int:
    """κ·cos(x - μ) - log(2π·I0(κ)), both parts scaled by exp(-κ) so that nothing overflows."""
    k = a["concentration"]
    angle = b.sub(x, a["mean"]) if "mean" in a else x
    # cos - 1 = -2·sin²(angle/2) keeps its digits near the mode.
    fall = b.mul(b.const(-2.0), b.op("square", b.op("sin", b.mul(angle, b.const(0.5)))))
    return b.sub(b.sub(b.mul(k, fall), b.const(log(2 * pi))), b.op("log_bessel_i0e", k))


def _von_mises_sample(b: Builder, t: TensorType, a: Arguments) -> int:
    z = noise(b, "von_mises", t, a["concentration"])
    return b.op("rotate", z, a["mean"]) if "mean" in a else z


# ---- several entries at once --------------------------------------------------------------------


def _triangle(b: Builder, a: Arguments) -> tuple[int, str, str]:
    """The factor of a covariance, with its row and column axes."""
    factor = a["scale_tril"]
    row, column = b.type(factor).names[-2:]
    return factor, row, column


def _multivariate(b: Builder, x: int, a: Arguments) -> int:
    factor, row, column = _triangle(b, a)
    d = b.sub(x, a["mean"]) if "mean" in a else x
    z = b.op("matrix_solve", factor, b.op("rename", d, pairs=((column, row),)), axis=column, given=row)
    each = b.op("sum", _normal(b, z), axes=(column,))
    return b.sub(each, b.op("matrix_log_det", factor))


def _multivariate_sample(b: Builder, t: TensorType, a: Arguments) -> int:
    factor, row, column = _triangle(b, a)
    z = b.op("contract", factor, noise(b, "normal", t), axes=(column,))
    z = b.op("rename", z, pairs=((row, column),))
    return b.add(z, a["mean"]) if "mean" in a else z


def mixture(inner: Distribution, axis: str) -> Distribution:
    """A mixture along `axis` with weights softmax(logits).

    One component is chosen for all entries at the axes that `logits` lacks. Samples carry gradients to
    the components' parameters and none to the logits (the choice is discrete); log_prob carries both.
    """

    def own(a: Arguments) -> dict[str, int]:
        return {k: v for k, v in a.items() if k != "logits"}

    def log_prob(b: Builder, x: int, a: Arguments) -> int:
        each = inner.log_prob(b, x, inner.complete(b, own(a)))
        weights = b.op("log_softmax", a["logits"], axis=axis)
        coupled = tuple(n for n in b.type(each).names if not b.type(weights).has(n))
        each = b.op("sum", each, axes=coupled) if coupled else each
        return b.op("logsumexp", b.add(each, weights), axes=(axis,))

    def sample(b: Builder, t: TensorType, a: Arguments) -> int:
        choice = noise(b, "onehot", b.type(a["logits"]), along(b, a["logits"], axis))
        if axis != b.type(a["logits"]).names[-1]:
            choice = b.op("order", choice, names=b.type(a["logits"]).names)
        whole_type = t.with_axis(axis, b.type(a["logits"]).size(axis))
        return b.op("contract", inner.draw(b, whole_type, own(a)), choice, axes=(axis,))

    return Distribution(
        f"mixture of {inner.name}",
        {"logits": (None, REAL), **inner.parameters},
        inner.support,
        log_prob,
        sample,
        inner.discrete,
        inner.matrices,
        (axis, *inner.event_axes),
    )


def along(b: Builder, x: int, axis: str) -> int:
    """The value with one axis last."""
    names = (*(n for n in b.type(x).names if n != axis), axis)
    return b.op("order", x, names=names) if names != b.type(x).names else x


# ---- whole numbers ------------------------------------------------------------------------------


def _bernoulli(b: Builder, x: int, a: Arguments) -> int:
    logits = a["logits"]
    return b.sub(b.mul(x, logits), b.op("softplus", logits))


def _bernoulli_sample(b: Builder, t: TensorType, a: Arguments) -> int:
    one = b.op("lt", noise(b, "uniform", t), b.op("sigmoid", a["logits"]))
    return b.op("where", one, b.const(1.0), b.const(0.0))


def categorical(axis: str) -> Distribution:
    """Whole numbers below the size of `axis`, with log weights `logits` along it."""

    def log_prob(b: Builder, x: int, a: Arguments) -> int:
        size = b.type(a["logits"]).size(axis)
        hit = b.op("eq", x, b.op("index", axis=axis, size=size))
        chosen = b.op("where", hit, b.op("log_softmax", a["logits"], axis=axis), b.const(0.0))
        return b.op("sum", chosen, axes=(axis,))

    def sample(b: Builder, t: TensorType, a: Arguments) -> int:
        size = b.type(a["logits"]).size(axis)
        choice = noise(b, "onehot", t.with_axis(axis, size), along(b, a["logits"], axis))
        return b.op("sum", b.mul(choice, b.op("index", axis=axis, size=size)), axes=(axis,))

    return Distribution(
        "categorical", {"logits": (None, REAL)}, lambda a: closed(0, inf), log_prob, sample, True, event_axes=(axis,)
    )


# ---- the table ----------------------------------------------------------------------------------

ANY: Parameter = (0.0, REAL)
SCALE: Parameter = (1.0, POSITIVE)
CIRCLE = Interval(-pi, pi, False, True)


def whole(a: Known) -> Interval:
    return REAL


def _between(a: Known) -> Interval:
    lo, hi = a.get("lo", 0.0), a.get("hi", 1.0)
    if lo is None or hi is None or not lo < hi:
        return Interval(0.0, 0.0)  # unknown ends: nothing can be shown to lie on them
    return opened(lo, hi)


DISTRIBUTIONS: dict[str, Distribution] = {
    d.name: d
    for d in (
        located("normal", _normal),
        located("laplace", _laplace),
        located("logistic", _logistic),
        Distribution(
            "student_t", {"df": (None, POSITIVE), "mean": ANY, "scale": SCALE}, whole, _student,
            lambda b, t, a: move(b, noise(b, "student_t", t, a["df"]), a),
        ),
        Distribution(
            "uniform", {"lo": (0.0, REAL), "hi": (1.0, REAL)}, _between, _uniform,
            lambda b, t, a: b.add(a["lo"], b.mul(noise(b, "uniform", t), b.sub(a["hi"], a["lo"]))),
        ),
        Distribution("uniform_sphere", {}, lambda a: closed(-1, 1), _uniform_sphere, _uniform_sphere_sample),
        Distribution(
            "exponential", {"rate": SCALE}, lambda a: POSITIVE, _exponential,
            lambda b, t, a: _exponential_sample(b, noise(b, "exponential", t), a),
        ),
        Distribution(
            "von_mises", {"mean": ANY, "concentration": (1.0, POSITIVE)}, lambda a: CIRCLE, _von_mises, _von_mises_sample
        ),
        Distribution(
            "multivariate_normal", {"mean": ANY, "scale_tril": (None, REAL)}, whole, _multivariate, _multivariate_sample,
            matrices=("scale_tril",),
        ),
        Distribution(
            "bernoulli", {"logits": ANY}, lambda a: closed(0, 1), _bernoulli, _bernoulli_sample, discrete=True
        ),
    )
}  # fmt: skip

# Made of an axis, and perhaps of another distribution.
COMBINED = ("mixture", "categorical")
