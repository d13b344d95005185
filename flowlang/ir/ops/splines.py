"""Monotone splines on [-bound, bound] with identity tails: elementwise in x, raw parameters along one axis.

Rational-quadratic, cubic, quadratic and linear: Durkan et al. 2019 (Neural Spline Flows) and
Müller et al. 2019 (Neural Importance Sampling). All map R onto R, strictly increasing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowlang.ir.interval import REAL, Interval
from flowlang.ir.ops.base import Attrs, Facts, LocalLogDet, Need, Op, OpProblem
from flowlang.ir.relation import Relation, Support
from flowlang.ir.types import TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node

OPS: list[Op] = []

# kind -> number of raw parameters along the axis, for K bins, as offsets to K.
SPLINES: dict[str, tuple[int | None, ...]] = {
    "rqs": (0, 0, -1),  # widths, heights, interior slopes
    "linear_spline": (0,),
    "quadratic_spline": (0, 1),  # widths, heights at the knots
    "cubic_spline": (0, 0, None),  # widths, heights, two end slopes
}


def _infer(kind: str) -> object:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
        x, *params = types
        out = list(x.axes)
        sizes = {a.name: a.size for a in x.axes}
        bins = params[0].axes[-1].size if params[0].axes else 0
        for offset, p in zip(SPLINES[kind], params, strict=True):
            if not p.axes:
                raise OpProblem("FL0307", f"the parameters of `{kind}` need their axis of bins")
            axis = p.axes[-1]
            wanted = 2 if offset is None else bins + offset
            if axis.size != wanted:
                raise OpProblem(
                    "FL0301",
                    f"`{kind}` with {bins} bins needs {wanted} values along `{axis.name}`, and gets {axis.size}",
                )
            for a in p.axes[:-1]:
                if a.name not in sizes:
                    sizes[a.name] = a.size
                    out.append(a)
                elif sizes[a.name] != a.size:
                    raise OpProblem("FL0301", f"axis `{a.name}` has size {sizes[a.name]} and size {a.size}")
        return TensorType(tuple(out))

    return infer


def _depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes)


def _bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    bound = float(node.attrs.get("bound", 3.0))
    inner = Interval(-bound, bound)
    if ivs[0].within(inner):
        return inner
    return ivs[0].union(inner) if ivs[0].meet(inner) is not None else ivs[0]


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
            return None
        return b.mul(b.op("exp", slope(b, node, args[0], args[1:])), t)

    infer = _infer(kind)
    cost = 40
    OPS.append(Op(
        kind, infer, _depend, interval=_bounds, jvp=jvp, invert=invert, needs=_needs,  # type: ignore[arg-type]
        log_det=lambda b, node, slot, args, out: LocalLogDet(slope(b, node, args[0], args[1:])),
        cost=lambda node, types: cost * node.tensor.count + 4 * sum(t.count for t in types[1:]),
        why_not={"lipschitz": "the slope is bounded by parameters only"},
    ))  # fmt: skip
    OPS.append(Op(
        f"{kind}_inverse", infer, _depend, interval=_bounds, cost=lambda node, types: cost * node.tensor.count,  # type: ignore[arg-type]
        why_not={"invert": "made by inversion only", "jvp": "made by inversion only", "lipschitz": "no bound is known"},
    ))  # fmt: skip
    OPS.append(Op(
        f"{kind}_log_slope", infer, _depend, interval=lambda ivs, types, node: REAL,  # type: ignore[arg-type]
        cost=lambda node, types: 0,
        why_not={"invert": "no map", "jvp": "second derivatives are not needed", "lipschitz": "no bound is known"},
    ))  # fmt: skip


for _kind in SPLINES:
    _make(_kind)
