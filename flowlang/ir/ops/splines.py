"""Monotone splines: elementwise in x, with raw parameters along an axis of bins that x does not have.

Rational-quadratic (also on a circle), cubic, quadratic and linear: Durkan et al. 2019 (Neural Spline
Flows; Cubic-Spline Flows), Müller et al. 2019 (Neural Importance Sampling), Rezende et al. 2020
(Normalizing Flows on Tori and Spheres). All but the circular one map R onto R, strictly increasing, and
are the identity outside (-bound, bound).

What raw parameters mean (B = bound, K bins, n = softmax over the bins, all on [-B, B]):
  widths, heights   2B (least + (1 - least K) n(raw)), least = `min_width` or `min_height`
  slopes            `min_slope` + softplus(raw + log(exp(1 - min_slope) - 1)): raw 0 is slope 1; 1 at -B and B
  quadratic         slopes at the knots min + (1 - min) v / v̄, v = 1e-3 + softplus(raw), v̄ its mean over the box
  cubic             two end slopes 3 (min + (1 - 2 min) sigmoid(raw + c)) times the secant there, raw 0 being the
                    secant; inner slopes by Steffen's rule (1990)
  circular          as rational-quadratic with K slopes, the last knot being the first
So every raw parameter 0 is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING

from flowlang.ir.interval import REAL, Interval
from flowlang.ir.ops.base import Attrs, Facts, LocalLogDet, Need, NoTangent, Op, OpProblem
from flowlang.ir.relation import Relation, Support
from flowlang.ir.types import Axis, TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node

OPS: list[Op] = []


@dataclass(frozen=True)
class SplineKind:
    """Raw parameters by name: K + offset values along the axis of bins, or a fixed number; and numbers with defaults."""

    raw: dict[str, int | Fixed]
    numbers: dict[str, float]


@dataclass(frozen=True)
class Fixed:
    count: int


LEAST = 1e-3
_BINS = {"min_width": LEAST, "min_height": LEAST, "min_slope": LEAST}
SPLINES: dict[str, SplineKind] = {
    "rqs": SplineKind({"widths": 0, "heights": 0, "slopes": -1}, {"bound": 3.0, **_BINS}),
    "rqs_circular": SplineKind({"widths": 0, "heights": 0, "slopes": 0}, {"bound": pi, **_BINS}),
    "linear_spline": SplineKind({"heights": 0}, {"bound": 3.0, "min_height": LEAST}),
    "quadratic_spline": SplineKind({"widths": 0, "heights": 1}, {"bound": 3.0, "min_width": LEAST, "min_slope": LEAST}),
    "cubic_spline": SplineKind({"widths": 0, "heights": 0, "ends": Fixed(2)}, {"bound": 3.0, **_BINS}),
}


def kind_of(op: str) -> str:
    """The spline that an op (the map, its inverse, its log-slope) belongs to."""
    return op.removesuffix("_inverse").removesuffix("_log_slope")


def numbers_of(node: Node) -> dict[str, float]:
    """The numbers of a spline, defaults included."""
    return {k: float(node.attrs.get(k, v)) for k, v in SPLINES[kind_of(node.op)].numbers.items()}


def bin_axis(x: TensorType, param: TensorType, attrs: Attrs) -> Axis | None:
    """The axis of bins of a raw parameter: the named one, or else the last that x lacks."""
    own = [a for a in param.axes if not x.has(a.name)]
    return next((a for a in own if a.name == attrs.get("axis")), own[-1] if own else None)


def _infer(kind: str) -> object:
    spec = SPLINES[kind]

    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        x, *params = types
        out = list(x.axes)
        sizes = {a.name: a.size for a in x.axes}
        bins = 0
        for (name, offset), p in zip(spec.raw.items(), params, strict=True):
            axis = bin_axis(x, p, attrs)
            if axis is None:
                raise OpProblem(
                    "FL0307",
                    f"`{name}` of `{kind}` need an axis of bins, which x does not have",
                    suggestion="as in `widths: R[D, K = 8]` for `x: R[D]`",
                )
            bins = bins or axis.size
            wanted = offset.count if isinstance(offset, Fixed) else bins + offset
            if axis.size != wanted:
                raise OpProblem(
                    "FL0301",
                    f"`{kind}` with {bins} bins needs {wanted} {name} along `{axis.name}`, and gets {axis.size}",
                    suggestion="give that many along the axis of bins",
                )
            for a in p.axes:
                if a is axis:
                    continue
                if a.name not in sizes:
                    sizes[a.name] = a.size
                    out.append(a)
                elif sizes[a.name] != a.size:
                    raise OpProblem(
                        "FL0301",
                        f"axis `{a.name}` has size {sizes[a.name]} and size {a.size}",
                        suggestion="the tables have the sizes of x, and one axis of bins",
                    )
        for k in ("min_width", "min_height"):
            least = float(attrs.get(k, spec.numbers.get(k, 0)))
            if not 0 <= least * bins < 1:
                raise OpProblem(
                    "FL0305",
                    f"{bins} bins of at least {least:g} of the box do not fit into it (`{k}`)",
                    suggestion="fewer bins or a smaller least width",
                )
        if not 0 < float(attrs.get("min_slope", LEAST)) < 1 / 3 or not float(attrs.get("bound", 1.0)) > 0:
            raise OpProblem(
                "FL0305",
                "`min_slope` lies between 0 and 1/3, and `bound` is above 0",
                suggestion="leave both out for the usual ones",
            )
        return TensorType(tuple(out))

    return infer


def _depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes)


def _bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    bound = numbers_of(node)["bound"]
    if kind_of(node.op) == "rqs_circular":
        return circle(bound)
    inner = Interval(-bound, bound)
    if ivs[0].within(inner):
        return inner
    return ivs[0].union(inner) if ivs[0].meet(inner) is not None else ivs[0]


def circle(bound: float) -> Interval:
    return Interval(-bound, bound, False, True)


def _on_circle(node: Node, types: Sequence[TensorType]) -> Sequence[Need]:
    bound = numbers_of(node)["bound"]
    return (Need(0, circle(bound), words=f"values of the circle [-{bound:g}, {bound:g})"),)


def _needs(node: Node, slot: int, facts: Facts) -> Sequence[Need] | str:
    if slot:
        return "the parameters of a spline cannot be told from its value"
    if facts.node(node.inputs[0]).tensor.names != node.tensor.names:
        return "it is broadcast here"
    return ()


def _make(kind: str) -> None:
    def invert(b: Builder, node: Node, slot: int, args: Sequence[int | None], out: int) -> int:
        params = [a for a in args[1:] if a is not None]
        return b.op(f"{kind}_inverse", out, *params, **dict(node.attrs))

    def slope(b: Builder, node: Node, x: int, params: Sequence[int]) -> int:
        return b.op(f"{kind}_log_slope", x, *params, **dict(node.attrs))

    def jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
        if slot:
            raise NoTangent
        return b.mul(b.op("exp", slope(b, node, args[0], args[1:])), t)

    infer = _infer(kind)
    circular = kind == "rqs_circular"
    cost = 40
    OPS.append(Op(
        kind, infer, _depend, interval=_bounds, jvp=jvp, invert=invert, needs=_needs,  # type: ignore[arg-type]
        total=_on_circle if circular else None,
        log_det=lambda b, node, slot, args, out: LocalLogDet(slope(b, node, args[0], args[1:])),
        cost=lambda node, types: cost * node.tensor.count + 4 * sum(t.count for t in types[1:]),
        why_not={"lipschitz": "the slope is bounded by parameters only"},
    ))  # fmt: skip
    OPS.append(Op(
        f"{kind}_inverse", infer, _depend, interval=_bounds, total=_on_circle if circular else None,  # type: ignore[arg-type]
        cost=lambda node, types: cost * node.tensor.count,
        why_not={"invert": "made by inversion only", "jvp": "made by inversion only", "lipschitz": "no bound is known"},
    ))  # fmt: skip
    OPS.append(Op(
        f"{kind}_log_slope", infer, _depend, interval=lambda ivs, types, node: REAL,  # type: ignore[arg-type]
        cost=lambda node, types: 10 * node.tensor.count,  # the bin comes from the value itself
        why_not={"invert": "no map", "jvp": "second derivatives are not needed", "lipschitz": "no bound is known"},
    ))  # fmt: skip


for _kind in SPLINES:
    _make(_kind)
