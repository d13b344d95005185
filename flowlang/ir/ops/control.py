"""Ops that run other graphs: calls, copies, and the solvers that inversion makes.

Their relations and bounds come from the regions they run; see `analysis`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowlang.ir.ops.base import Attrs, Op
from flowlang.ir.relation import Relation, Support
from flowlang.ir.types import TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.graph import Node

OPS: list[Op] = []


@dataclass(frozen=True)
class Series:
    """How `estimate_log_det` finds log|det(I + J)|: `terms` of the power series always, and more by Russian roulette.

    `law` of their number: geometric or poisson with `rate`; `exact` takes the whole Jacobian. `later`: the terms at
    inference. `surrogate`: the value is what the Neumann series differentiates, not the log-det.
    """

    law: str = "geometric"
    rate: float = 0.5
    terms: int = 10
    later: int = 10
    samples: int = 1
    surrogate: bool = False


def _made(types: Sequence[TensorType], attrs: Attrs) -> Type:
    raise AssertionError("made with its type")


def _full(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.full(node.tensor.axes if isinstance(node.type, TensorType) else (), types[slot].axes)


WHY = {
    "infer": "made with its type", "interval": "from the region it runs", "invert": "the region's inverse",
    "jvp": "the region is inlined", "lipschitz": "from the region it runs",
}  # fmt: skip

# evaluate: the field that is integrated, in a solver's step; its first input stands for the field.
# integrate: the value at `stop` of x' = v(x, t, ..) with the value at `start`; by the tableau or the rule's
# regions in given steps, or by a pair in adaptive ones; or its values at other times.
# call: an instance applied to tensors; repeat: equal copies one after the other; get: one of several results;
# scan_solve: slice after slice along an axis; bracket_solve: a monotone scalar equation for each entry;
# fixed_point_solve: x + g(x) = y for a contraction g; estimate_log_det: of the identity plus a contraction;
# running(live, new): a state's value in training, and what replaces it after; start(value): a parameter put there;
# scan: a region's copy for each slice along `axis` (`B`: for each sample), `carried` values handed on, others stacked;
# choose: two lists of values, one for training and one for inference.
for _name in (
    "call",
    "repeat",
    "get",
    "scan_solve",
    "bracket_solve",
    "fixed_point_solve",
    "estimate_log_det",
    "random_like",
    "running",
    "start",
    "integrate",
    "evaluate",
    "scan",
    "choose",
):
    OPS.append(Op(_name, _made, _full, pure=_name in ("get",), made=True, why_not=WHY))

ACROSS = "moves values between samples, which rules for one sample cannot say"
# paired(x, y): x's samples in the order of the batch in which the sum of |x - y|² is least.
OPS.append(
    Op("paired", _made, _full, interval=lambda operands, types, node: operands[0], pure=False, made=True,
       cost=lambda node, types: 3 * types[0].count, why_not=dict.fromkeys(("infer", "jvp", "invert", "lipschitz"), ACROSS))
)  # fmt: skip
