"""Elementwise ops: operands are aligned by axis name and broadcast along axes that they lack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import inf, pi
from typing import TYPE_CHECKING, Any

from flowlang.ir import interval as iv
from flowlang.ir.interval import NONNEGATIVE, POSITIVE, REAL, UNIT, Interval, closed, opened
from flowlang.ir.ops.base import Attrs, Facts, LocalLogDet, Need, Op, OpProblem
from flowlang.ir.relation import Relation, Support
from flowlang.ir.types import Axis, TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node

OPS: list[Op] = []
TINY = 1e-300


# ---- shared rules -------------------------------------------------------------------------------


def aligned(types: Sequence[TensorType], kind: str) -> TensorType:
    """The left operand's axes, then new ones of the next operands; equal names need equal sizes."""
    axes: list[Axis] = []
    sizes: dict[str, int] = {}
    for t in types:
        for a in t.axes:
            if a.name not in sizes:
                sizes[a.name] = a.size
                axes.append(a)
            elif sizes[a.name] != a.size:
                raise OpProblem(
                    "FL0301",
                    f"axis `{a.name}` has size {sizes[a.name]} and size {a.size}",
                    suggestion="sizes agree where values meet; slice, join or rename one of them",
                )
    return TensorType(tuple(axes), kind)


def real_result(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return aligned(types, "real")


def number_result(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return aligned(types, "int" if all(t.kind == "int" for t in types) else "real")


def bool_result(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return aligned(types, "bool")


def where_result(types: Sequence[TensorType], attrs: Attrs) -> Type:
    kind = "int" if all(t.kind == "int" for t in types[1:]) else "real"
    return aligned(types, kind)


def depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes)


def depend_product(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    """a·b depends on a only where b is not zero."""
    found = Relation.equal(node.tensor.axes, types[slot].axes)
    for k, s in enumerate(supports):
        if k != slot and s is not None:
            found = found.meet(s.constraints(node.tensor.names, types[slot].names))
    return found


def support_keep(node: Node, types: Sequence[TensorType], supports: Sequence[Support | None]) -> Support | None:
    return supports[0]


def support_product(node: Node, types: Sequence[TensorType], supports: Sequence[Support | None]) -> Support | None:
    out: Support | None = None
    for s in supports:
        if s is not None:
            out = s.meet(out)
    return out


def broadcast_cost(node: Node, type_: TensorType) -> float:
    """Broadcasting over n entries costs sqrt(n) in the l2 norm."""
    return math.sqrt(max(node.tensor.count, 1) / max(type_.count, 1))


def flops(weight: int) -> Callable[[Node, Sequence[TensorType]], int]:
    return lambda node, types: weight * node.tensor.count


# ---- unary --------------------------------------------------------------------------------------

Unary = Callable[["Builder", int, int], int]  # (b, x, out) -> value
Slope = Callable[["Builder", int, int], "int | None"]  # None: flat to whoever differentiates


def safe(f: Callable[[float], float], at_lo: float, at_hi: float) -> Callable[[float], float]:
    """f with limits at the infinities and overflow taken as infinite."""

    def g(v: float) -> float:
        if v == inf:
            return at_hi
        if v == -inf:
            return at_lo
        try:
            return f(v)
        except OverflowError:
            return at_hi if v > 0 else at_lo
        except ValueError:
            return at_lo if v <= 0 else at_hi

    return g


def unary(
    name: str,
    *,
    bounds: Callable[[Interval], Interval],
    d: Slope | None = None,
    total: Need | None = None,
    inverse: Callable[[Builder, int, Attrs], int] | None = None,
    needs: Need | None = None,
    log_slope: Unary | None = None,
    log_cost: str = "D",
    continuous: bool = True,
    lipschitz: float | None = None,
    zero: bool = False,
    weight: int = 4,
    why: str | None = None,
    simplify: Callable[[Builder, Sequence[int], Attrs], int | None] | None = None,
    infer: Any = real_result,
) -> None:
    def jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, tangent: int) -> int | None:
        assert d is not None
        slope = d(b, args[0], out)
        return None if slope is None else b.mul(slope, tangent)

    def invert(b: Builder, node: Node, slot: int, args: Sequence[int | None], out: int) -> int:
        assert inverse is not None
        return inverse(b, out, node.attrs)

    def log_det(b: Builder, node: Node, slot: int, args: Sequence[int], out: int) -> LocalLogDet:
        return LocalLogDet(log_slope(b, args[0], out) if log_slope is not None else None)

    def lip(node: Node, types: Sequence[TensorType], slot: int, ivs: Sequence[Interval]) -> float | None:
        return lipschitz

    why_not: dict[str, str] = {}
    if inverse is None:
        why_not["invert"] = why or f"`{name}` is not injective"
    if d is None:
        why_not["jvp"] = f"`{name}` has no derivative that is a graph"
    if lipschitz is None:
        why_not["lipschitz"] = f"`{name}` has no global Lipschitz constant"
    OPS.append(
        Op(
            name, infer, depend, elementwise=True,
            support=support_keep if zero else None,
            interval=lambda ivs, types, node: bounds(ivs[0]),
            total=None if total is None else (lambda node, types: (total,)),
            continuous=lambda slot: continuous,
            jvp=jvp if d is not None else None,
            invert=invert if inverse is not None else None,
            needs=None if inverse is None else (lambda node, slot, facts: (needs,) if needs is not None else ()),
            log_det=log_det if inverse is not None else None,
            log_det_cost=log_cost if log_slope is not None else "0",
            cost=flops(weight), lipschitz=lip if lipschitz is not None else None, simplify=simplify, why_not=why_not,
        )
    )  # fmt: skip


def mono(f: Callable[[float], float], lo: float, hi: float) -> Callable[[Interval], Interval]:
    g = safe(f, lo, hi)

    def bounds(a: Interval) -> Interval:
        found = iv.monotone(a, g)
        # Rounding may reach a limit that the function never attains.
        lo_open = found.lo_open or (found.lo == lo and a.lo != -inf)
        hi_open = found.hi_open or (found.hi == hi and a.hi != inf)
        return Interval(found.lo, found.hi, lo_open, hi_open)

    return bounds


def within(a: Interval, bounds: Callable[[Interval], Interval], domain: Interval) -> Interval:
    met = a.meet(domain)
    return bounds(met) if met is not None else REAL


def on(domain: Interval, bounds: Callable[[Interval], Interval]) -> Callable[[Interval], Interval]:
    """Bounds of a partial function: the operand is first met with its domain (closed for limits)."""
    wide = Interval(domain.lo, domain.hi)
    return lambda a: within(a, bounds, wide)


def pointy(name: str) -> Callable[[Builder, int, Attrs], int]:
    return lambda b, y, attrs: b.op(name, y)


def log_sigmoid_f(v: float) -> float:
    return -math.log1p(math.exp(-v)) if v > -30 else v - math.log1p(math.exp(v))


def softplus_f(v: float) -> float:
    return v + math.log1p(math.exp(-v)) if v > 0 else math.log1p(math.exp(v))


def sigmoid_f(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v > -700 else 0.0


def wave(a: Interval, f: Callable[[float], float], peak: float, trough: float) -> Interval:
    """Bounds of sin or cos: extrema at peak + 2πk and trough + 2πk."""
    if not a.finite or a.hi - a.lo >= 2 * pi:
        return closed(-1, 1)
    values = [f(a.lo), f(a.hi)]
    lo, hi = min(values), max(values)
    for at, v in ((peak, 1.0), (trough, -1.0)):
        k = math.ceil((a.lo - at) / (2 * pi))
        if at + 2 * pi * k <= a.hi:
            lo, hi = min(lo, v), max(hi, v)
    pad = 1e-12
    return closed(max(lo - pad, -1.0), min(hi + pad, 1.0))


def absolute(a: Interval) -> Interval:
    if a.lo >= 0:
        return a
    if a.hi <= 0:
        return iv.neg(a)
    top, is_closed = max((-a.lo, not a.lo_open), (a.hi, not a.hi_open))
    return Interval(0.0, top, False, not is_closed)


def even_monotone(f: Callable[[float], float]) -> Callable[[Interval], Interval]:
    g = safe(f, inf, inf)
    return lambda a: iv.monotone(absolute(a), g)


def _fold_neg(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    inner = b.graph[args[0]]
    if inner.op == "neg":
        return inner.inputs[0]
    value = b.const_value(args[0])
    return b.const(-value) if value is not None and not isinstance(value, bool) else None


def _fold_log(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    inner = b.graph[args[0]]
    if inner.op == "exp":
        return inner.inputs[0]
    if inner.op == "sigmoid":
        return b.op("log_sigmoid", inner.inputs[0])
    if inner.op == "softmax" and "causal" not in inner.attrs:
        return b.op("log_softmax", inner.inputs[0], axis=inner.attrs["axis"])
    return None


def _logit_of_mixture(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    from flowlang.ir.ops.mixtures import logit_of_mixture

    return logit_of_mixture(b, args, attrs)


def _fold_log_abs(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    inner = b.graph[args[0]]
    match inner.op:
        case "exp" | "sigmoid":
            return _fold_log(b, args, attrs)
        case "neg":
            return b.op("log_abs", inner.inputs[0])
        case "reciprocal":
            return b.neg(b.op("log_abs", inner.inputs[0]))
        case "const":
            value = b.const_value(args[0])
            if value:
                return b.const(math.log(abs(value)))
    return None


def _neg_cost(b: Builder, x: int, out: int) -> int:
    return b.const(-1.0)


unary(
    "neg",
    bounds=iv.neg,
    d=_neg_cost,
    inverse=pointy("neg"),
    lipschitz=1.0,
    zero=True,
    weight=1,
    simplify=_fold_neg,
    infer=number_result,
)
unary(
    "identity",
    bounds=lambda a: a,
    d=lambda b, x, y: b.const(1.0),
    inverse=lambda b, y, at: y,
    lipschitz=1.0,
    zero=True,
    weight=0,
    simplify=lambda b, args, at: args[0],
)


def _within(attrs: Attrs) -> Interval:
    return closed(attrs["lo"], attrs["hi"])


# within(x; lo, hi): x, shown to lie there, which lets formulas that hold on that interval use it.
OPS.append(Op(
    "within", real_result, depend, elementwise=True, interval=lambda ivs, t, n: ivs[0].meet(_within(n.attrs)) or _within(n.attrs),
    total=lambda node, types: (Need(0, _within(node.attrs), words=f"a value in {_within(node.attrs)}"),),
    jvp=lambda b, node, args, out, slot, t: t, lipschitz=lambda node, types, slot, ivs: 1.0,
    invert=lambda b, node, slot, args, out: out, needs=lambda node, slot, facts: (),
    log_det=lambda b, node, slot, args, out: LocalLogDet(None), log_det_cost="0",
    support=lambda node, types, supports: supports[0],
))  # fmt: skip
unary("exp", bounds=mono(math.exp, 0.0, inf), d=lambda b, x, y: y, inverse=pointy("log"), log_slope=lambda b, x, y: x)
# log(exp(-x)·I0(x)) of the modified Bessel function: the normaliser of von Mises.
unary(
    "log_bessel_i0e",
    bounds=lambda a: Interval(-inf, 0.0, True, False),
    why="`log_bessel_i0e` is even",
)

unary(
    "log",
    bounds=on(POSITIVE, mono(math.log, -inf, inf)),
    d=lambda b, x, y: b.op("reciprocal", x),
    total=Need(0, POSITIVE, words="a positive argument"),
    inverse=pointy("exp"),
    log_slope=lambda b, x, y: b.neg(y),
    simplify=_fold_log,
)
unary(
    "log_abs",
    bounds=on(REAL, lambda a: mono(math.log, -inf, inf)(absolute(a))),
    d=lambda b, x, y: b.op("reciprocal", x),
    total=Need(0, nonzero=True, words="a nonzero argument"),
    simplify=_fold_log_abs,
)
unary(
    "log1p",
    bounds=on(Interval(-1, inf, True, True), mono(math.log1p, -inf, inf)),
    d=lambda b, x, y: b.op("reciprocal", b.add(x, b.const(1.0))),
    total=Need(0, Interval(-1, inf, True, True), words="an argument above -1"),
    inverse=pointy("expm1"),
    log_slope=lambda b, x, y: b.neg(y),
    zero=True,
)
unary(
    "expm1",
    bounds=mono(math.expm1, -1.0, inf),
    d=lambda b, x, y: b.op("exp", x),
    inverse=pointy("log1p"),
    log_slope=lambda b, x, y: x,
    zero=True,
)
unary(
    "sqrt",
    bounds=on(NONNEGATIVE, mono(math.sqrt, 0.0, inf)),
    d=lambda b, x, y: b.div(b.const(0.5), y),
    total=Need(0, NONNEGATIVE, words="an argument of at least 0"),
    inverse=pointy("square"),
    needs=Need(0, POSITIVE, words="may be zero"),
    log_slope=lambda b, x, y: b.neg(b.add(b.log_abs(y), b.const(math.log(2)))),
    zero=True,
)
unary(
    "square",
    bounds=iv.square,
    d=lambda b, x, y: b.mul(b.const(2.0), x),
    inverse=pointy("sqrt"),
    needs=Need(0, POSITIVE, words="may be negative or zero, where x and -x have one square"),
    log_slope=lambda b, x, y: b.add(b.log_abs(x), b.const(math.log(2))),
    zero=True,
    weight=1,
    infer=number_result,
)
unary(
    "abs",
    bounds=absolute,
    d=lambda b, x, y: b.op("sign", x),
    inverse=lambda b, y, at: y,
    needs=Need(0, POSITIVE, words="may be negative, where x and -x have one absolute value"),
    lipschitz=1.0,
    zero=True,
    weight=1,
    infer=number_result,
)
unary(
    "sign",
    bounds=lambda a: closed(1, 1) if a.positive else closed(-1, -1) if a.negative else closed(-1, 1),
    continuous=False,
    zero=True,
    weight=1,
    why="`sign` forgets the size",
)


def _reciprocal_bounds(a: Interval) -> Interval:
    return iv.reciprocal(a) or REAL


unary(
    "reciprocal",
    bounds=_reciprocal_bounds,
    d=lambda b, x, y: b.neg(b.op("square", y)),
    total=Need(0, nonzero=True, words="a nonzero argument"),
    inverse=pointy("reciprocal"),
    log_slope=lambda b, x, y: b.mul(b.const(-2.0), b.log_abs(x)),
)
unary(
    "sin",
    bounds=lambda a: wave(a, math.sin, pi / 2, -pi / 2),
    d=lambda b, x, y: b.op("cos", x),
    lipschitz=1.0,
    zero=True,
)
unary("cos", bounds=lambda a: wave(a, math.cos, 0.0, pi), d=lambda b, x, y: b.neg(b.op("sin", x)), lipschitz=1.0)
unary(
    "tan",
    bounds=on(opened(-pi / 2, pi / 2), lambda a: Interval(-inf, inf, True, True)),
    d=lambda b, x, y: b.add(b.const(1.0), b.op("square", y)),
    total=Need(0, opened(-pi / 2, pi / 2), words="an argument between -π/2 and π/2"),
    inverse=pointy("atan"),
    log_slope=lambda b, x, y: b.op("log1p", b.op("square", y)),
    zero=True,
)
unary(
    "atan",
    bounds=mono(math.atan, -pi / 2, pi / 2),
    d=lambda b, x, y: b.op("reciprocal", b.add(b.const(1.0), b.op("square", x))),
    inverse=pointy("tan"),
    log_slope=lambda b, x, y: b.neg(b.op("log1p", b.op("square", x))),
    lipschitz=1.0,
    zero=True,
)
unary(
    "sinh",
    bounds=mono(math.sinh, -inf, inf),
    d=lambda b, x, y: b.op("cosh", x),
    inverse=pointy("asinh"),
    log_slope=lambda b, x, y: b.op("log_cosh", x),
    zero=True,
)
unary("cosh", bounds=even_monotone(math.cosh), d=lambda b, x, y: b.op("sinh", x))
unary(
    "log_cosh",
    bounds=even_monotone(lambda v: v + math.log1p(math.exp(-2 * v)) - math.log(2)),
    d=lambda b, x, y: b.op("tanh", x),
    lipschitz=1.0,
    zero=True,
)
unary(
    "asinh",
    bounds=mono(math.asinh, -inf, inf),
    d=lambda b, x, y: b.op("reciprocal", b.op("cosh", y)),
    inverse=pointy("sinh"),
    log_slope=lambda b, x, y: b.neg(b.op("log_cosh", y)),
    lipschitz=1.0,
    zero=True,
)
unary(
    "tanh",
    bounds=mono(math.tanh, -1.0, 1.0),
    d=lambda b, x, y: b.op("tanh_slope", x),
    inverse=pointy("atanh"),
    log_slope=lambda b, x, y: b.op("log_tanh_slope", x),
    lipschitz=1.0,
    zero=True,
)


def _sech2(v: float) -> float:
    return 1 / math.cosh(v) ** 2


def _decreasing_even(f: Callable[[float], float], far: float) -> Callable[[Interval], Interval]:
    """Bounds of an even function that falls away from 0 towards `far`."""
    g = safe(f, far, far)

    def bounds(a: Interval) -> Interval:
        found = iv.monotone(absolute(a), g, decreasing=True)
        return Interval(found.lo, found.hi, found.lo_open or found.lo == far, found.hi_open)

    return bounds


unary(
    "tanh_slope",
    bounds=_decreasing_even(_sech2, 0.0),
    d=lambda b, x, y: b.mul(b.const(-2.0), b.mul(b.op("tanh", x), y)),
    lipschitz=0.77,
)
unary(
    "log_tanh_slope",
    bounds=_decreasing_even(lambda v: -2 * (v + math.log1p(math.exp(-2 * v)) - math.log(2)), -inf),
    d=lambda b, x, y: b.mul(b.const(-2.0), b.op("tanh", x)),
    lipschitz=2.0,
    zero=True,
)
unary(
    "atanh",
    bounds=on(opened(-1, 1), mono(math.atanh, -inf, inf)),
    d=lambda b, x, y: b.op("square", b.op("cosh", y)),
    total=Need(0, opened(-1, 1), words="an argument between -1 and 1"),
    inverse=pointy("tanh"),
    log_slope=lambda b, x, y: b.neg(b.op("log_tanh_slope", y)),
    zero=True,
)
unary(
    "sigmoid",
    bounds=mono(sigmoid_f, 0.0, 1.0),
    d=lambda b, x, y: b.op("sigmoid_slope", x),
    inverse=pointy("logit"),
    log_slope=lambda b, x, y: b.op("log_sigmoid_slope", x),
    lipschitz=0.25,
)
unary(
    "sigmoid_slope",
    bounds=_decreasing_even(lambda v: 0.25 / math.cosh(v / 2) ** 2, 0.0),
    d=lambda b, x, y: b.mul(y, b.neg(b.op("tanh", b.mul(x, b.const(0.5))))),
    lipschitz=0.0963,
)
unary(
    "log_sigmoid_slope",
    bounds=_decreasing_even(lambda v: -2 * softplus_f(v) + v, -inf),
    d=lambda b, x, y: b.neg(b.op("tanh", b.mul(x, b.const(0.5)))),
    lipschitz=1.0,
)
unary(
    "log_sigmoid",
    bounds=mono(log_sigmoid_f, -inf, 0.0),
    d=lambda b, x, y: b.op("sigmoid", b.neg(x)),
    inverse=lambda b, y, at: b.neg(b.op("softplus_inverse", b.neg(y))),
    log_slope=lambda b, x, y: b.op("log_sigmoid", b.neg(x)),
    lipschitz=1.0,
)
unary(
    "logit",
    bounds=on(UNIT, mono(lambda p: math.log(p) - math.log1p(-p), -inf, inf)),
    d=lambda b, x, y: b.op("reciprocal", b.mul(x, b.sub(b.const(1.0), x))),
    total=Need(0, UNIT, words="an argument between 0 and 1"),
    inverse=pointy("sigmoid"),
    log_slope=lambda b, x, y: b.neg(b.op("log_sigmoid_slope", y)),
    simplify=_logit_of_mixture,
)
unary(
    "softplus",
    bounds=mono(softplus_f, 0.0, inf),
    d=lambda b, x, y: b.op("sigmoid", x),
    inverse=pointy("softplus_inverse"),
    log_slope=lambda b, x, y: b.op("log_sigmoid", x),
    lipschitz=1.0,
)
unary(
    "softplus_inverse",
    bounds=on(POSITIVE, mono(lambda v: v + math.log(-math.expm1(-v)), -inf, inf)),
    d=lambda b, x, y: b.op("reciprocal", b.op("sigmoid", y)),
    total=Need(0, POSITIVE, words="a positive argument"),
    inverse=pointy("softplus"),
    log_slope=lambda b, x, y: b.neg(b.op("log_sigmoid", y)),
)
unary(
    "erf",
    bounds=mono(math.erf, -1.0, 1.0),
    d=lambda b, x, y: b.mul(b.const(2 / math.sqrt(pi)), b.op("exp", b.neg(b.op("square", x)))),
    inverse=pointy("erfinv"),
    log_slope=lambda b, x, y: b.sub(b.const(math.log(2 / math.sqrt(pi))), b.op("square", x)),
    lipschitz=2 / math.sqrt(pi),
    zero=True,
)
unary(
    "erfinv",
    bounds=on(opened(-1, 1), lambda a: REAL),
    d=lambda b, x, y: b.mul(b.const(math.sqrt(pi) / 2), b.op("exp", b.op("square", y))),
    total=Need(0, opened(-1, 1), words="an argument between -1 and 1"),
    inverse=pointy("erf"),
    log_slope=lambda b, x, y: b.add(b.const(math.log(math.sqrt(pi) / 2)), b.op("square", y)),
    zero=True,
)
unary(
    "relu",
    bounds=lambda a: iv.maximum(a, iv.point(0.0)),
    d=lambda b, x, y: b.op("gt", x, b.const(0.0)),
    lipschitz=1.0,
    zero=True,
    weight=1,
    why="`relu` sends every negative number to 0",
)


def _bump(low: float, f: Callable[[float], float], at: float) -> Callable[[Interval], Interval]:
    """Bounds of silu, gelu, mish: fall to `low` at `at`, then rise."""

    def at_end(v: float) -> float:
        return 0.0 if v == -inf else inf if v == inf else f(v) if v > -700 else 0.0

    def bounds(a: Interval) -> Interval:
        lo, hi = at_end(a.lo), at_end(a.hi)
        least = low if a.lo <= at <= a.hi else min(lo, hi)
        return Interval(least, max(lo, hi), False, a.hi_open and hi == inf)

    return bounds


unary(
    "silu",
    bounds=_bump(-0.2784645428, lambda v: v * sigmoid_f(v), -1.278464543),
    d=lambda b, x, y: b.add(b.op("sigmoid", x), b.mul(x, b.op("sigmoid_slope", x))),
    lipschitz=1.09984,
    zero=True,
    why="`silu` is not monotone",
)
unary(
    "gelu",
    bounds=_bump(-0.1699712074, lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))), -0.7517915246),
    d=lambda b, x, y: b.add(
        b.mul(b.const(0.5), b.add(b.const(1.0), b.op("erf", b.mul(x, b.const(1 / math.sqrt(2)))))),
        b.mul(b.mul(x, b.op("exp", b.mul(b.op("square", x), b.const(-0.5)))), b.const(1 / math.sqrt(2 * pi))),
    ),
    lipschitz=1.12904,
    zero=True,
    why="`gelu` is not monotone",
)
unary(
    "floor",
    bounds=lambda a: Interval(a.lo - 1 if a.lo != -inf else -inf, a.hi, a.lo == -inf, a.hi_open),
    continuous=False,
    zero=True,
    weight=1,
    why="`floor` is piecewise constant",
)


def _whole_bounds(a: Interval) -> Interval:
    hi = a.hi if a.hi == inf else float(math.ceil(a.hi) - 1 if a.hi_open else math.floor(a.hi))
    return Interval(a.lo if a.lo == -inf else float(math.floor(a.lo)), hi, a.lo == -inf, hi == inf)


# The two parts of a sum of a whole number and one in (0, 1); that the fraction is never 0 holds almost everywhere.
unary(
    "whole_part",
    bounds=_whole_bounds,
    continuous=False,
    weight=1,
    why="`whole_part` forgets the fraction",
    infer=lambda types, attrs: types[0].as_kind("int"),
)
unary(
    "fraction_part",
    bounds=lambda a: UNIT,
    continuous=False,
    weight=1,
    why="`fraction_part` forgets the whole part",
)
unary(
    "round",
    bounds=lambda a: iv.add(a, closed(-0.5, 0.5)),
    continuous=False,
    zero=True,
    weight=1,
    why="`round` is piecewise constant",
)
unary(
    "stop",
    bounds=lambda a: a,
    d=lambda b, x, y: None,
    zero=True,
    weight=0,
    why="`stop` hides the gradient of its value",
)
unary(
    "not", bounds=lambda a: closed(0, 1), continuous=False, weight=1, infer=bool_result, why="a condition is no number"
)
unary(
    "asin",
    bounds=on(closed(-1, 1), mono(math.asin, -pi / 2, pi / 2)),
    total=Need(0, closed(-1, 1), words="an argument between -1 and 1"),
    zero=True,
    why="`asin` has no slope at its ends",
)
unary(
    "acos",
    bounds=on(closed(-1, 1), lambda a: closed(0, pi)),
    total=Need(0, closed(-1, 1), words="an argument between -1 and 1"),
    why="`acos` has no slope at its ends",
)

unary(
    "lgamma",
    bounds=lambda a: REAL,
    total=Need(0, POSITIVE, words="a positive argument"),
    why="`lgamma` is not monotone",
)

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _elu_bounds(alpha: float, scale: float = 1.0) -> Callable[[Interval], Interval]:
    return mono(lambda v: scale * (v if v > 0 else alpha * math.expm1(v)), -alpha * scale, inf)


def _clipped_exp(b: Builder, x: int) -> int:
    return b.op("exp", b.op("min", x, b.const(0.0)))


unary(
    "selu",
    bounds=_elu_bounds(SELU_ALPHA, SELU_SCALE),
    lipschitz=SELU_SCALE * SELU_ALPHA,
    zero=True,
    d=lambda b, x, y: b.mul(
        b.const(SELU_SCALE),
        b.op("where", b.op("gt", x, b.const(0.0)), b.const(1.0), b.mul(b.const(SELU_ALPHA), _clipped_exp(b, x))),
    ),
    why="`selu` has a kink",
)


# Unary with an attribute.


def _leaky() -> Op:
    def bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
        s = float(node.attrs["slope"])
        if s <= 0:
            return REAL
        return iv.monotone(ivs[0], lambda v: v if v >= 0 else s * v)

    def slope(b: Builder, node: Node, x: int) -> int:
        return b.op("where", b.op("gt", x, b.const(0.0)), b.const(1.0), b.const(float(node.attrs["slope"])))

    def needs(node: Node, slot: int, facts: Facts) -> Sequence[Need] | str:
        return () if float(node.attrs["slope"]) > 0 else "`leaky_relu` with a slope of 0 or less is not injective"

    return Op(
        "leaky_relu", real_result, depend, elementwise=True, support=support_keep, interval=bounds,
        jvp=lambda b, node, args, out, slot, t: b.mul(slope(b, node, args[0]), t),
        invert=lambda b, node, slot, args, out: b.op("leaky_relu", out, slope=1 / float(node.attrs["slope"])),
        needs=needs,
        log_det=lambda b, node, slot, args, out: LocalLogDet(b.log_abs(slope(b, node, args[0]))),
        lipschitz=lambda node, types, slot, ivs: max(1.0, abs(float(node.attrs["slope"]))), cost=flops(2),
    )  # fmt: skip


def _elu() -> Op:
    def bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
        return _elu_bounds(float(node.attrs["alpha"]))(ivs[0])

    def slope(b: Builder, node: Node, x: int) -> int:
        alpha = float(node.attrs["alpha"])
        if alpha == 1.0:
            return _clipped_exp(b, x)
        return b.op("where", b.op("gt", x, b.const(0.0)), b.const(1.0), b.mul(b.const(alpha), _clipped_exp(b, x)))

    return Op(
        "elu", real_result, depend, elementwise=True, support=support_keep, interval=bounds,
        jvp=lambda b, node, args, out, slot, t: b.mul(slope(b, node, args[0]), t),
        lipschitz=lambda node, types, slot, ivs: max(1.0, abs(float(node.attrs["alpha"]))), cost=flops(4),
        why_not={"invert": "solved as a scalar map"},
    )  # fmt: skip


def _clamp() -> Op:
    def bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
        lo, hi = float(node.attrs["lo"]), float(node.attrs["hi"])
        a = ivs[0]
        return Interval(
            min(max(a.lo, lo), hi), min(max(a.hi, lo), hi), a.lo_open and a.lo >= lo, a.hi_open and a.hi <= hi
        )

    return Op(
        "clamp", real_result, depend, elementwise=True, interval=bounds,
        lipschitz=lambda node, types, slot, ivs: 1.0, cost=flops(2),
        jvp=lambda b, node, args, out, slot, t: b.mul(
            b.op("and", b.op("ge", args[0], b.const(float(node.attrs["lo"]))),
                 b.op("le", args[0], b.const(float(node.attrs["hi"])))), t),
        why_not={"invert": "`clamp` is constant outside its bounds"},
    )  # fmt: skip


OPS.extend([_leaky(), _elu(), _clamp()])


# ---- binary -------------------------------------------------------------------------------------


def _number(v: float | int | bool | None) -> bool:
    return v is not None and not isinstance(v, bool)


def _simple_add(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    x, y = b.const_value(args[0]), b.const_value(args[1])
    if _number(x) and _number(y):
        return b.const(x + y)  # type: ignore[operator]
    if x == 0 and _number(x) and b.type(args[1]).kind == "real":
        return args[1]
    if y == 0 and _number(y) and b.type(args[0]).kind == "real":
        return args[0]
    return _merge_choices(b, b.graph[args[0]], b.graph[args[1]])


def _merge_choices(b: Builder, x: Node, y: Node) -> int | None:
    """where(c, t, 0) + where(c, 0, s) is where(c, t, s): the slopes of two branches."""
    if x.op != "where" or y.op != "where" or x.inputs[0] != y.inputs[0] or x.tensor != y.tensor:
        return None
    for p, q in ((x, y), (y, x)):
        if b.const_value(p.inputs[2]) == 0 and b.const_value(q.inputs[1]) == 0:
            found = b.op("where", x.inputs[0], p.inputs[1], q.inputs[2])
            return found if b.type(found) == x.tensor else None
    return None


def _simple_sub(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    x, y = b.const_value(args[0]), b.const_value(args[1])
    if _number(x) and _number(y):
        return b.const(x - y)  # type: ignore[operator]
    if y == 0 and _number(y) and b.type(args[0]).kind == "real":
        return args[0]
    if x == 0 and _number(x) and b.type(args[1]).kind == "real":
        return b.neg(args[1])
    return None


def _simple_mul(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    x, y = b.const_value(args[0]), b.const_value(args[1])
    if _number(x) and _number(y):
        return b.const(x * y)  # type: ignore[operator]
    for value, other in ((x, args[1]), (y, args[0])):
        if _number(value) and value == 1 and b.type(other).kind == "real":
            return other
        if _number(value) and value == -1 and b.type(other).kind == "real":
            return b.neg(other)
    if args[0] == args[1]:
        return b.op("square", args[0])
    return None


def _simple_div(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    x, y = b.const_value(args[0]), b.const_value(args[1])
    if _number(x) and _number(y) and y:
        return b.const(x / y)  # type: ignore[operator]
    if _number(y) and y == 1 and b.type(args[0]).kind == "real":
        return args[0]
    if _number(y) and y and b.type(args[0]).kind == "real" and math.log2(abs(y)).is_integer():
        return b.mul(args[0], b.const(1.0 / y))  # exact
    if _number(x) and x == 1 and b.type(args[1]).kind == "real":
        return b.op("reciprocal", args[1])
    return None


def _simple_pow(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    y = b.const_value(args[1])
    match y:
        case 1:
            return args[0]
        case 2:
            return b.op("square", args[0])
        case 0.5:
            return b.op("sqrt", args[0])
        case -1:
            return b.op("reciprocal", args[0])
    return None


def _linear_jvp(sign: Sequence[float]) -> Any:
    def jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, tangent: int) -> int | None:
        t = tangent if sign[slot] > 0 else b.neg(tangent)
        return b.expand(t, b.type(out))

    return jvp


def _lip_linear(node: Node, types: Sequence[TensorType], slot: int, ivs: Sequence[Interval]) -> float | None:
    return broadcast_cost(node, types[slot])


def largest(a: Interval) -> float:
    return max(abs(a.lo), abs(a.hi))


def _lip_mul(node: Node, types: Sequence[TensorType], slot: int, ivs: Sequence[Interval]) -> float | None:
    bound = largest(ivs[1 - slot])
    return None if bound == inf else bound * broadcast_cost(node, types[slot])


def _lip_div(node: Node, types: Sequence[TensorType], slot: int, ivs: Sequence[Interval]) -> float | None:
    if slot == 1:
        return None
    other = iv.reciprocal(ivs[1])
    return None if other is None or largest(other) == inf else largest(other) * broadcast_cost(node, types[0])


def binary_needs(make: Callable[[int], Sequence[Need]]) -> Callable[[Node, int, Facts], Sequence[Need] | str]:
    return lambda node, slot, facts: make(slot)


def none_needed(slot: int) -> Sequence[Need]:
    return ()


def reorder(b: Builder, value: int, like: TensorType) -> int:
    names = like.names
    return value if b.type(value).names == names else b.op("order", value, names=names)


OPS.append(Op(
    "add", number_result, depend, elementwise=True, interval=lambda ivs, t, n: iv.add(*ivs), jvp=_linear_jvp((1, 1)),
    invert=lambda b, node, slot, args, out: b.sub(out, args[1 - slot]),  # type: ignore[arg-type]
    needs=binary_needs(none_needed), log_det=lambda b, node, slot, args, out: LocalLogDet(None), log_det_cost="0",
    lipschitz=_lip_linear, cost=flops(1), simplify=_simple_add,
))  # fmt: skip
OPS.append(Op(
    "sub", number_result, depend, elementwise=True, interval=lambda ivs, t, n: iv.sub(*ivs), jvp=_linear_jvp((1, -1)),
    invert=lambda b, node, slot, args, out: b.add(out, args[1]) if slot == 0 else b.sub(args[0], out),  # type: ignore[arg-type]
    needs=binary_needs(none_needed), log_det=lambda b, node, slot, args, out: LocalLogDet(None), log_det_cost="0",
    lipschitz=_lip_linear, cost=flops(1), simplify=_simple_sub,
))  # fmt: skip
OPS.append(Op(
    "mul", number_result, depend_product, elementwise=True, support=support_product,
    interval=lambda ivs, t, n: iv.mul(*ivs),
    jvp=lambda b, node, args, out, slot, t: b.expand(b.mul(args[1 - slot], t), b.type(out)),
    invert=lambda b, node, slot, args, out: b.div(out, args[1 - slot]),  # type: ignore[arg-type]
    needs=binary_needs(lambda slot: (Need(1 - slot, nonzero=True, words="may be zero"),)),
    log_det=lambda b, node, slot, args, out: LocalLogDet(b.log_abs(args[1 - slot])),
    lipschitz=_lip_mul, cost=flops(1), simplify=_simple_mul,
))  # fmt: skip


def _div_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    other = iv.reciprocal(ivs[1])
    return iv.mul(ivs[0], other) if other is not None else REAL


def _div_support(node: Node, types: Sequence[TensorType], supports: Sequence[Support | None]) -> Support | None:
    return supports[0]


OPS.append(Op(
    "div", real_result, depend, elementwise=True, support=_div_support, interval=_div_bounds,
    total=lambda node, types: (Need(1, nonzero=True, words="a divisor that is never zero"),),
    jvp=lambda b, node, args, out, slot, t: b.expand(
        b.div(t, args[1]) if slot == 0 else b.neg(b.mul(out, b.div(t, args[1]))), b.type(out)),
    invert=lambda b, node, slot, args, out: b.mul(out, args[1]) if slot == 0 else b.div(args[0], out),  # type: ignore[arg-type]
    needs=binary_needs(lambda slot: () if slot == 0 else (Need(0, nonzero=True, words="may be zero"),)),
    log_det=lambda b, node, slot, args, out: LocalLogDet(
        b.neg(b.log_abs(args[1])) if slot == 0
        else b.sub(b.log_abs(args[0]), b.mul(b.const(2.0), b.log_abs(args[1])))),
    lipschitz=_lip_div, cost=flops(1), simplify=_simple_div,
))  # fmt: skip


def _exponent(node: Node, attrs: Attrs) -> float | None:
    value = node.attrs.get("exponent")
    return float(value) if value is not None else None


def _pow_total(node: Node, types: Sequence[TensorType]) -> Sequence[Need]:
    e = _exponent(node, node.attrs)
    if e is None:
        return (Need(0, POSITIVE, words="a positive base"),)
    if e.is_integer():
        return () if e >= 0 else (Need(0, nonzero=True, words="a nonzero base"),)
    if e > 0:
        return (Need(0, NONNEGATIVE, words="a base of at least 0"),)
    return (Need(0, POSITIVE, words="a positive base"),)


def _pow_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    e, a = _exponent(node, node.attrs), ivs[0]
    if e is None:
        return POSITIVE
    power = abs(e)

    def f(v: float) -> float:
        try:
            return math.copysign(abs(v) ** power, v)
        except OverflowError:
            return math.copysign(inf, v)

    if e.is_integer() and int(power) % 2 == 0:
        found = iv.monotone(absolute(a), f)
    else:
        found = iv.monotone(a, f)
    return found if e > 0 else iv.reciprocal(found) or REAL


def _pow_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return aligned(types, "real")


def _pow_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    x, y = b.const_value(args[0]), b.const_value(args[1]) if len(args) > 1 else None
    if len(args) > 1 and _number(y):
        found = _simple_pow(b, args, attrs)
        if found is not None:
            return found
        if _number(x):
            try:
                value = float(x) ** float(y)  # type: ignore[arg-type]
            except (OverflowError, ZeroDivisionError):
                return None
            return b.const(value) if isinstance(value, float) else None
        return b.op("pow", args[0], exponent=float(y))  # type: ignore[arg-type]
    return None


def _pow_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    e = _exponent(node, node.attrs)
    if e is not None:
        return b.mul(b.mul(b.const(e), b.op("pow", args[0], b.const(e - 1))), t)
    if slot == 0:
        return b.expand(b.mul(b.div(b.mul(args[1], out), args[0]), t), b.type(out))
    return b.expand(b.mul(b.mul(out, b.op("log", args[0])), t), b.type(out))


def _pow_needs(node: Node, slot: int, facts: Facts) -> Sequence[Need] | str:
    if _exponent(node, node.attrs) is None:
        return "a power with a varying exponent has no inverse rule"
    if _exponent(node, node.attrs) == 0:
        return "the power 0 is constant"
    return (Need(0, POSITIVE, words="may be negative or zero, where this power is not strictly monotone"),)


def _pow_log_det(b: Builder, node: Node, slot: int, args: Sequence[int], out: int) -> LocalLogDet:
    e = float(node.attrs["exponent"])
    return LocalLogDet(b.add(b.mul(b.const(e - 1), b.op("log_abs", args[0])), b.const(math.log(abs(e)))))


OPS.append(Op(
    "pow", _pow_infer, depend, elementwise=True, interval=_pow_bounds, total=_pow_total, jvp=_pow_jvp,
    invert=lambda b, node, slot, args, out: b.op("pow", out, b.const(1.0 / float(node.attrs["exponent"]))),
    needs=_pow_needs, log_det=_pow_log_det, cost=flops(8), simplify=_pow_simplify,
    why_not={"lipschitz": "powers have no global constant"},
))  # fmt: skip


def _extremum(name: str, bounds: Callable[[Interval, Interval], Interval], cmp: str) -> Op:
    def jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
        chosen = b.op(cmp, args[0], args[1])
        zero = b.const(0.0)
        return b.expand(b.op("where", chosen, t, zero) if slot == 0 else b.op("where", chosen, zero, t), b.type(out))

    def fold(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
        x, y = b.const_value(args[0]), b.const_value(args[1])
        if _number(x) and _number(y):
            return b.const(min(x, y) if name == "min" else max(x, y))  # type: ignore[type-var, arg-type]
        return None

    return Op(
        name, number_result, depend, elementwise=True, interval=lambda ivs, t, n: bounds(*ivs), jvp=jvp,
        lipschitz=_lip_linear, cost=flops(1), simplify=fold,
        why_not={"invert": f"`{name}` shows only one of its operands"},
    )  # fmt: skip


OPS.append(_extremum("min", iv.minimum, "le"))
OPS.append(_extremum("max", iv.maximum, "ge"))


def _mod_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int:
    """Of x - m·floor(x / m), between its jumps."""
    found = t if slot == 0 else b.mul(t, b.op("div", b.sub(out, args[0]), args[1]))
    found = b.expand(found, b.type(out))
    names = b.type(out).names
    return found if b.type(found).names == names else b.op("order", found, names=names)


def _mod_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    top = ivs[1].hi
    return Interval(0.0, top, False, True) if ivs[1].positive else REAL


OPS.append(Op(
    "mod", number_result, depend, elementwise=True, interval=_mod_bounds, continuous=lambda slot: False, cost=flops(4),
    total=lambda node, types: (Need(1, nonzero=True, words="a divisor that is never zero"),),
    jvp=_mod_jvp, why_not={"invert": "`mod` wraps around", "lipschitz": "`mod` jumps"},
))  # fmt: skip

CIRCLE = Interval(-pi, pi, False, True)


def _rotate_needs(node: Node, slot: int, facts: Facts) -> Sequence[Need] | str:
    if slot == 1:
        return "only the angle can be told from `rotate`, not by how much it was turned"
    return (Need(0, CIRCLE, words="may leave [-π, π), the domain `Torus`"),)


# rotate(x, t): x + t brought back to [-π, π). A bijection of the circle, though it jumps as a map of numbers.
OPS.append(Op(
    "rotate", number_result, depend, elementwise=True, interval=lambda ivs, t, n: CIRCLE, continuous=lambda slot: False,
    jvp=_linear_jvp((1, 1)), invert=lambda b, node, slot, args, out: b.op("rotate", out, b.neg(args[1])),  # type: ignore[arg-type]
    needs=_rotate_needs, log_det=lambda b, node, slot, args, out: LocalLogDet(None), log_det_cost="0", cost=flops(5),
    why_not={"lipschitz": "`rotate` jumps as a map of numbers"},
))  # fmt: skip

for _name in ("lt", "le", "gt", "ge", "eq", "ne", "and", "or"):
    OPS.append(Op(
        _name, bool_result, depend, elementwise=True, interval=lambda ivs, t, n: closed(0, 1),
        continuous=lambda slot: False, cost=flops(1),
        why_not={"invert": "a condition is no number", "jvp": "a condition jumps", "lipschitz": "a condition jumps"},
    ))  # fmt: skip


def _where_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    if slot == 0:
        return None
    zero = b.const(0.0)
    return b.expand(b.op("where", args[0], *((t, zero) if slot == 1 else (zero, t))), b.type(out))


OPS.append(Op(
    "where", where_result, depend, elementwise=True, interval=lambda ivs, t, n: ivs[1].union(ivs[2]), jvp=_where_jvp,
    continuous=lambda slot: slot != 0, cost=flops(1),
    lipschitz=lambda node, types, slot, ivs: None if slot == 0 else broadcast_cost(node, types[slot]),
    why_not={"invert": "`where` shows only one of its branches"},
))  # fmt: skip
OPS.append(Op(
    "surrogate", lambda types, attrs: aligned(types, "real"), depend, elementwise=True, interval=lambda ivs, t, n: ivs[0],
    jvp=lambda b, node, args, out, slot, t: None if slot == 0 else b.expand(t, b.type(out)),
    continuous=lambda slot: slot != 0, cost=flops(0),
    why_not={"invert": "the gradient of a surrogate is another function's", "lipschitz": "its value may jump"},
))  # fmt: skip
