"""`logit_mixture(p, t)` along an axis: logit(Σ softmax(p) · sigmoid(t)), the logit of a logistic mixture's CDF.

Written with `logit`, the sum rounds to 0 or 1 a few scales from the means. `logit` of such a sum becomes
this op, whose value and weights are differences of logarithms (ANALYSIS.md A13): with
a = log Σ π σ(t), c = log Σ π σ(-t) it is a - c, and its derivative by t_k is exp(log π_k + log σ'(t_k) - a - c),
by p_k exp(log π_k + log σ(t_k) - a) - exp(log π_k + log σ(-t_k) - c).
The result lies between the least and the greatest t_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowlang.ir.ops.base import Attrs, Op
from flowlang.ir.ops.elementwise import aligned
from flowlang.ir.ops.shape import need
from flowlang.ir.relation import Relation, Support
from flowlang.ir.types import TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node

OPS: list[Op] = []


def _infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    for t in types:
        need(t, attrs["axis"])
    return aligned(types, "real").without((attrs["axis"],))


def _depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes)


def _jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    axis = node.attrs["axis"]
    share = b.op("log_softmax", args[0], axis=axis)
    below = b.add(share, b.op("log_sigmoid", args[1]))
    above = b.add(share, b.op("log_sigmoid", b.neg(args[1])))
    low, high = (b.op("logsumexp", v, axes=(axis,)) for v in (below, above))
    if slot == 0:
        weight = b.sub(b.op("exp", b.sub(below, low)), b.op("exp", b.sub(above, high)))
    else:
        slope = b.add(share, b.op("log_sigmoid_slope", args[1]))
        weight = b.op("exp", b.sub(slope, b.add(low, high)))
    found = b.op("sum", b.mul(weight, t), axes=(axis,))
    return b.op("order", found, names=node.tensor.names)


OPS.append(Op(
    "logit_mixture", _infer, _depend, interval=lambda ivs, types, node: ivs[1], jvp=_jvp,
    cost=lambda node, types: 12 * max(t.count for t in types),
    why_not={"invert": "one value of a mixture does not tell its parts", "lipschitz": "no constant is known"},
))  # fmt: skip


def logit_of_mixture(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    """`logit` of a contraction of a softmax with sigmoids over the softmax's axis."""
    total = b.graph[args[0]]
    if total.op != "contract" or len(total.attrs["axes"]) != 1:
        return None
    (axis,) = total.attrs["axes"]
    for weights, parts in (total.inputs, total.inputs[::-1]):
        soft, sigmoid = b.graph[weights], b.graph[parts]
        if (
            soft.op == "softmax"
            and soft.attrs["axis"] == axis
            and "causal" not in soft.attrs
            and sigmoid.op == "sigmoid"
        ):
            found = b.op("logit_mixture", soft.inputs[0], sigmoid.inputs[0], axis=axis)
            return b.op("order", found, names=total.tensor.names)
    return None
