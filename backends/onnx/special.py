"""Functions that ONNX, or onnxruntime in float64, lacks: from what there is, to the precision of the dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from flowlang.backends.onnx.graph import BOOL, Builder, Value

Unary = Callable[[Builder, Value], Value]


def log1p(g: Builder, x: Value) -> Value:
    """log(1 + x), also for small x: Kahan's quotient x·log(u)/(u - 1) with u = 1 + x as rounded."""
    if x.array is not None:
        return g.const(np.log1p(x.array))
    u = g.add(x, 1.0)
    near = g.binary("Equal", u, 1.0, BOOL)
    quotient = g.mul(g.unary("Log", u), g.div(x, g.where(near, 1.0, g.sub(u, 1.0))))
    # At infinity the quotient is inf·(inf/inf).
    far = g.binary("Greater", u, 1.0 / g.eps**2, BOOL)
    return g.where(near, x, g.where(far, g.unary("Log", u), quotient))


def expm1(g: Builder, x: Value) -> Value:
    """exp(x) - 1 = tanh(x/2)·(exp(x) + 1), without cancellation."""
    if x.array is not None:
        return g.const(np.expm1(x.array))
    return g.mul(g.unary("Tanh", g.mul(x, 0.5)), g.add(g.unary("Exp", x), 1.0))


def log_sigmoid(g: Builder, x: Value) -> Value:
    return g.neg(g.unary("Softplus", g.neg(x)))


def log_cosh(g: Builder, x: Value) -> Value:
    a = g.unary("Abs", x)
    return g.add(a, g.sub(g.unary("Softplus", g.mul(a, -2.0)), math.log(2)))


def log_tanh_slope(g: Builder, x: Value) -> Value:
    return g.mul(log_cosh(g, x), -2.0)


def tanh_slope(g: Builder, x: Value) -> Value:
    return g.unary("Exp", log_tanh_slope(g, x))


def sigmoid(g: Builder, x: Value) -> Value:
    """1/(1 + exp(-x)): onnxruntime's `Sigmoid` is 0 from about -18 on, and maps take its logarithm."""
    return g.unary("Reciprocal", g.add(g.unary("Exp", g.neg(x)), 1.0))


def sigmoid_slope(g: Builder, x: Value) -> Value:
    return g.unary("Exp", log_sigmoid_slope(g, x))


def log_sigmoid_slope(g: Builder, x: Value) -> Value:
    return g.neg(g.add(g.unary("Softplus", x), g.unary("Softplus", g.neg(x))))


def log_abs(g: Builder, x: Value) -> Value:
    return g.unary("Log", g.unary("Abs", x))


def logit(g: Builder, x: Value) -> Value:
    return g.unary("Log", g.div(x, g.sub(1.0, x)))


def softplus_inverse(g: Builder, y: Value) -> Value:
    """y + log(1 - exp(-y)), stable for small y."""
    rest = g.mul(g.unary("Tanh", g.mul(y, 0.5)), g.add(g.unary("Exp", g.neg(y)), 1.0))
    return g.add(y, g.unary("Log", rest))


def silu(g: Builder, x: Value) -> Value:
    return g.mul(x, g.unary("Sigmoid", x))


def gelu(g: Builder, x: Value) -> Value:
    return g.mul(g.mul(x, 0.5), g.add(erf(g, g.mul(x, 1 / math.sqrt(2))), 1.0))


def selu(g: Builder, x: Value) -> Value:
    if g.dtype == "float32" or x.array is not None:
        return g.unary("Selu", x)
    return g.mul(elu(g, x, 1.6732632423543772), 1.0507009873554805)


def elu(g: Builder, x: Value, alpha: float) -> Value:
    if g.dtype == "float32" or x.array is not None:
        return g.unary("Elu", x, alpha=alpha)
    return g.where(g.binary("Greater", x, 0.0, BOOL), x, g.mul(expm1(g, g.clip(x, None, 0.0)), alpha))


def native(op: str, otherwise: Unary) -> Unary:
    """The op itself in float32; onnxruntime lacks it in float64."""

    def make(g: Builder, x: Value) -> Value:
        return g.unary(op, x) if g.dtype == "float32" or x.array is not None else otherwise(g, x)

    return make


def _sinh(g: Builder, x: Value) -> Value:
    """(expm1(a) - expm1(-a))/2 with a = |x|."""
    a = g.unary("Abs", x)
    half = g.mul(g.sub(expm1(g, a), expm1(g, g.neg(a))), 0.5)
    return g.mul(g.unary("Sign", x), half)


def _cosh(g: Builder, x: Value) -> Value:
    return g.mul(g.add(g.unary("Exp", x), g.unary("Exp", g.neg(x))), 0.5)


def _tan(g: Builder, x: Value) -> Value:
    return g.div(g.unary("Sin", x), g.unary("Cos", x))


def _asinh(g: Builder, x: Value) -> Value:
    """sign(x)·log1p(a + a²/(1 + sqrt(a² + 1))), a = |x|."""
    a = g.unary("Abs", x)
    root = g.unary("Sqrt", g.add(g.mul(a, a), 1.0))
    return g.mul(g.unary("Sign", x), log1p(g, g.add(a, g.div(g.mul(a, a), g.add(root, 1.0)))))


def _atanh(g: Builder, x: Value) -> Value:
    a = g.unary("Abs", x)
    return g.mul(g.mul(g.unary("Sign", x), 0.5), log1p(g, g.div(g.mul(a, 2.0), g.sub(1.0, a))))


def erf(g: Builder, x: Value) -> Value:
    """In float64 by two rational functions of Cody 1969."""
    if g.dtype == "float32" or x.array is not None:
        return g.unary("Erf", x)
    return _erf64(g, x)


def polynomials(g: Builder, x: Value, *tables: list[float]) -> list[Value]:
    """Several polynomials (coefficients from the constant term up) at once: powers, then one product."""
    degree = max(len(t) for t in tables)
    powers = g.binary("Pow", g.unsqueeze(x, [-1]), g.const(np.arange(degree)))
    matrix = np.zeros((degree, len(tables)))
    for k, t in enumerate(tables):
        matrix[: len(t), k] = t
    if powers.rank == 1:
        powers = g.unsqueeze(powers, [-2])
        found = g.squeeze(g.matmul(powers, g.const(matrix)), [-2])
    else:
        found = g.matmul(powers, g.const(matrix))
    return [g.squeeze(p, [-1]) for p in g.split(found, found.rank - 1, [1] * len(tables))]


# erf on [0, 0.5] and erfc on [0.5, 4]: Cody, "Rational Chebyshev approximations for the error function",
# Math. Comp. 23 (1969). Constant term first.
ERF_NUM = [
    3209.377589138469472562,
    377.4852376853020208137,
    113.8641541510501556495,
    3.161123743870565596947,
    0.1857777061846031526730,
]
ERF_DEN = [2844.236833439170622273, 1282.616526077372275645, 244.0246379344441733056, 23.60129095234412093499, 1.0]
ERFC_NUM = [
    1230.339354797997253, 2051.0783778260714807, 1712.0476126340706, 881.95222124176909, 298.6351381974001311,
    66.11919063714162948, 8.883149794388375941, 0.5641884969886700893, 2.153115354744038463e-8,
]  # fmt: skip
ERFC_DEN = [
    1230.339354803749420, 3439.367674143721637, 4362.619090143247158, 3290.799235733459627, 1621.389574566690190,
    537.1811018620098575, 117.6939508913124993, 15.74492611070983473, 1.0,
]  # fmt: skip


def _erf64(g: Builder, x: Value) -> Value:
    a = g.unary("Abs", x)
    small = g.clip(a, None, 0.5)
    num, den = polynomials(g, g.mul(small, small), ERF_NUM, ERF_DEN)
    near = g.div(g.mul(small, num), den)
    large = g.clip(a, 0.5, 6.0)  # 1 - erf(6) is below the precision, and beyond 4 a few digits of it suffice
    num, den = polynomials(g, large, ERFC_NUM, ERFC_DEN)
    far = g.sub(1.0, g.mul(g.unary("Exp", g.neg(g.mul(large, large))), g.div(num, den)))
    value = g.where(g.binary("LessOrEqual", a, 0.5, BOOL), near, far)
    return g.mul(g.unary("Sign", x), value)


# The normal quantile, algorithm AS 241 (Wichura 1988, PPND16): central part, then two tails. Constant term first.
CENTRE = (
    [3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125, 45921.953931549871457,
     67265.770927008700853, 33430.575583588128105, 2509.0809287301226727],
    [1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077, 21213.794301586595867,
     39307.895800092710610, 28729.085735721942674, 5226.4952788528545610],
)  # fmt: skip
TAIL = (
    [1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504, 1.27045825245236838258,
     0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4],
    [1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550, 0.148103976427480074590,
     0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9],
)  # fmt: skip
FAR_TAIL = (
    [6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 0.296560571828504891230,
     0.0265321895265761230930, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7],
    [1.0, 0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525, 7.86869131145613259100e-4,
     1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15],
)  # fmt: skip


def erfinv(g: Builder, y: Value) -> Value:
    """The normal quantile of (1 + y)/2, over sqrt(2)."""
    q = g.mul(y, 0.5)
    num, den = polynomials(g, g.sub(0.180625, g.mul(q, q)), *CENTRE)
    centre = g.div(g.mul(q, num), den)
    a = g.unary("Abs", y)
    r = g.unary("Sqrt", g.neg(g.unary("Log", g.mul(g.sub(1.0, a), 0.5))))
    num, den = polynomials(g, g.sub(g.clip(r, None, 5.0), 1.6), *TAIL)
    near = g.div(num, den)
    num, den = polynomials(g, g.sub(g.clip(r, 5.0, 40.0), 5.0), *FAR_TAIL)
    tail = g.where(g.binary("LessOrEqual", r, 5.0, BOOL), near, g.div(num, den))
    tail = g.where(g.binary("Equal", a, 1.0, BOOL), math.inf, tail)
    value = g.where(g.binary("LessOrEqual", a, 0.85, BOOL), centre, g.mul(g.unary("Sign", y), tail))
    return g.mul(value, 1 / math.sqrt(2))


def lgamma(g: Builder, x: Value) -> Value:
    """log Γ for positive arguments: Stirling's series at x + 8, less the logs of the factors between."""
    if x.array is not None:
        return g.const(np.vectorize(math.lgamma, otypes=[np.float64])(x.array))
    factors = g.add(g.unsqueeze(x, [-1]), g.const(np.arange(8.0)))
    logs = g.reduce("ReduceSum", g.unary("Log", factors), [-1])
    z = g.add(x, 8.0)
    inverse = g.div(1.0, z)
    square = g.mul(inverse, inverse)
    (series,) = polynomials(g, square, [1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360])
    main = g.add(g.sub(g.mul(g.sub(z, 0.5), g.unary("Log", z)), z), 0.5 * math.log(2 * math.pi))
    return g.sub(g.add(main, g.mul(series, inverse)), logs)


def _asin(g: Builder, x: Value) -> Value:
    """2·atan(x / (1 + sqrt(1 - x²)))."""
    root = g.unary("Sqrt", g.sub(1.0, g.mul(x, x)))
    return g.mul(atan(g, g.div(x, g.add(root, 1.0))), 2.0)


def _acos(g: Builder, x: Value) -> Value:
    return g.sub(math.pi / 2, _asin(g, x))


def atan(g: Builder, x: Value) -> Value:
    if g.dtype == "float32" or x.array is not None:
        return g.unary("Atan", x)
    return _atan64(g, x)


def _atan64(g: Builder, x: Value) -> Value:
    """Argument halved four times, then the series: atan x = 2·atan(x/(1 + sqrt(1 + x²)))."""
    a = g.unary("Abs", x)
    big = g.binary("Greater", a, 1.0, BOOL)
    t = g.where(big, g.div(1.0, a), a)
    for _ in range(4):
        t = g.div(t, g.add(g.unary("Sqrt", g.add(g.mul(t, t), 1.0)), 1.0))
    (series,) = polynomials(g, g.mul(t, t), [(-1) ** k / (2 * k + 1) for k in range(8)])
    value = g.mul(g.mul(t, series), 16.0)
    return g.mul(g.unary("Sign", x), g.where(big, g.sub(math.pi / 2, value), value))


def log_bessel_i0e(g: Builder, x: Value) -> Value:
    """log(exp(-x)·I0(x)) for x >= 0: the trapezoid rule on I0's integral, and the asymptotic series from 200 on."""
    nodes = 64
    angle = np.pi * np.arange(nodes + 1) / nodes
    weight = np.full(nodes + 1, 1 / nodes)
    weight[[0, -1]] /= 2
    near = g.clip(x, None, 400.0)
    terms = g.add(g.mul(g.unsqueeze(near, [-1]), g.const(np.cos(angle) - 1)), g.const(np.log(weight)))
    integral = g.reduce("ReduceLogSumExp", terms, [-1])
    far = g.clip(x, 100.0, None)
    (series,) = polynomials(g, g.div(1.0, far), [1.0, 1 / 8, 9 / 128, 225 / 3072, 11025 / 98304, 893025 / 3932160])
    tail = g.sub(g.unary("Log", series), g.mul(g.unary("Log", g.mul(far, 2 * math.pi)), 0.5))
    return g.where(g.binary("Less", x, 200.0, BOOL), integral, tail)


UNARY: dict[str, Unary] = {
    "log1p": log1p, "expm1": expm1, "log_sigmoid": log_sigmoid, "log_cosh": log_cosh, "log_tanh_slope": log_tanh_slope,
    "sigmoid": sigmoid, "tanh_slope": tanh_slope, "sigmoid_slope": sigmoid_slope, "log_sigmoid_slope": log_sigmoid_slope, "log_abs": log_abs,
    "logit": logit, "softplus_inverse": softplus_inverse, "silu": silu, "gelu": gelu, "selu": selu, "erf": erf,
    "erfinv": erfinv, "lgamma": lgamma, "log_bessel_i0e": log_bessel_i0e, "sinh": native("Sinh", _sinh), "cosh": native("Cosh", _cosh),
    "tan": native("Tan", _tan), "asinh": native("Asinh", _asinh), "atanh": native("Atanh", _atanh),
    "asin": native("Asin", _asin), "acos": native("Acos", _acos), "atan": atan,
}  # fmt: skip
