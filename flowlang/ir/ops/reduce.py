"""Reductions and ops along axes: sums, products, contractions, softmax, cumulative sums, sorting."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, sqrt
from typing import TYPE_CHECKING

from flowlang.ir import interval as iv
from flowlang.ir.domains import Domain
from flowlang.ir.interval import NONNEGATIVE, REAL, UNIT, Interval, closed, point
from flowlang.ir.ops.base import Attrs, Facts, LocalLogDet, Need, Op, OpProblem
from flowlang.ir.ops.shape import need, no_needs, zero_log_det
from flowlang.ir.relation import Key, Matrix, Relation, Support, compare
from flowlang.ir.types import TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node

OPS: list[Op] = []


def _reduce_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    for n in attrs["axes"]:
        need(types[0], n)
    return types[0].without(attrs["axes"])


def _int_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    found = _reduce_infer(types, attrs)
    assert isinstance(found, TensorType)
    return found.as_kind("int")


def _bool_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    found = _reduce_infer(types, attrs)
    assert isinstance(found, TensorType)
    return found.as_kind("bool")


def _depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    found = Relation.equal(node.tensor.axes, types[0].axes)
    if supports[0] is not None:
        found = found.meet(supports[0].constraints(node.tensor.names, types[0].names))
    return found


def count_of(types: Sequence[TensorType], node: Node) -> int:
    n = 1
    for a in node.attrs["axes"]:
        n *= types[0].size(a)
    return n


def scaled(a: Interval, n: int) -> Interval:
    return iv.mul(a, point(float(n))) if n else point(0.0)


def cost(node: Node, types: Sequence[TensorType]) -> int:
    return sum(t.count for t in types)


def one(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    return ivs[0]


def simplify_empty(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    return args[0] if not attrs["axes"] else None


def _same(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    return b.op(node.op, t, **dict(node.attrs))


OPS.append(Op(
    "sum", _reduce_infer, _depend, interval=lambda ivs, types, node: scaled(ivs[0], count_of(types, node)), jvp=_same,
    lipschitz=lambda node, types, slot, ivs: sqrt(count_of(types, node)), cost=cost, simplify=simplify_empty,
    why_not={"invert": "a sum forgets how it is shared out"},
))  # fmt: skip
OPS.append(Op(
    "mean", _reduce_infer, _depend, interval=one, jvp=_same, cost=cost, simplify=simplify_empty,
    lipschitz=lambda node, types, slot, ivs: 1 / sqrt(count_of(types, node)),
    why_not={"invert": "a mean forgets how it is shared out"},
))  # fmt: skip


# The Euclidean norm over axes, with slope 0 at 0; and the vector over it, a fixed unit vector at 0.
def _length_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    axes = node.attrs["axes"]
    return b.op("contract", b.op("normalize", args[0], axes=axes), t, axes=axes)


OPS.append(Op(
    "length", _reduce_infer, _depend, interval=lambda ivs, types, node: NONNEGATIVE, jvp=_length_jvp, cost=cost,
    lipschitz=lambda node, types, slot, ivs: 1.0, why_not={"invert": "a length forgets the direction"},
))  # fmt: skip


def _normalize_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    for n in attrs["axes"]:
        need(types[0], n)
    return types[0]


OPS.append(Op(
    "normalize", _normalize_infer, lambda node, types, slot, supports: Relation.equal(
        node.tensor.axes, types[0].axes, but=tuple(node.attrs["axes"])),
    interval=lambda ivs, types, node: closed(-1, 1), cost=cost,
    why_not={"invert": "a direction forgets the length", "jvp": "not needed so far", "lipschitz": "it jumps at 0"},
))  # fmt: skip


# Statistics over the batch and, with it, over axes. One value for the whole batch: a bijector may use one
# only through `running`, whose state stands for it wherever a single sample must be invertible.
POOLED = {"invert": "a statistic of the batch", "jvp": "it couples the samples of a batch",
          "lipschitz": "it couples the samples of a batch"}  # fmt: skip
OPS.append(Op(
    "batch_mean", _reduce_infer, _depend, interval=one, cost=cost, pools=True, why_not=POOLED,
))  # fmt: skip
OPS.append(Op(
    "batch_var", _reduce_infer, _depend, interval=lambda ivs, types, node: NONNEGATIVE,
    cost=lambda node, types: 3 * types[0].count, pools=True, why_not=POOLED,
))  # fmt: skip


def _total_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    """Of any number of terms, one at least."""
    low, high = scaled(ivs[0], count_of(types, node)), ivs[0]
    lo, lo_open = (low.lo, low.lo_open) if high.lo >= 0 else (-inf, True)
    hi, hi_open = (low.hi, low.hi_open) if high.hi <= 0 else (inf, True)
    return Interval(lo, hi, lo_open, hi_open)


OPS.append(Op(
    "batch_sum", _reduce_infer, _depend, interval=_total_bounds, cost=cost, pools=True, why_not=POOLED,
))  # fmt: skip
for _name in ("batch_max", "batch_min"):
    OPS.append(Op(_name, _reduce_infer, _depend, interval=one, cost=cost, pools=True, why_not=POOLED))


def _prod_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    n = count_of(types, node)
    if n > 64:
        return Interval(0, inf, True, True) if ivs[0].positive else REAL
    out = point(1.0)
    for _ in range(n):
        out = iv.mul(out, ivs[0])
    return out


OPS.append(Op(
    "prod", _reduce_infer, _depend, interval=_prod_bounds, cost=cost, simplify=simplify_empty,
    why_not={"invert": "a product forgets its factors", "jvp": "not needed so far", "lipschitz": "unbounded factors"},
))  # fmt: skip
for _name in ("reduce_max", "reduce_min"):
    OPS.append(Op(
        _name, _reduce_infer, _depend, interval=one, cost=cost, simplify=simplify_empty,
        lipschitz=lambda node, types, slot, ivs: 1.0,
        why_not={"invert": "an extremum forgets the rest", "jvp": "not needed so far"},
    ))  # fmt: skip


def _logsumexp_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    n = max(count_of(types, node), 1)
    return iv.add(ivs[0], point(log(n)))


def _logsumexp_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    weights = b.op("exp", b.sub(args[0], out))
    return b.op("sum", b.mul(weights, t), axes=node.attrs["axes"])


OPS.append(Op(
    "logsumexp", _reduce_infer, _depend, interval=_logsumexp_bounds, jvp=_logsumexp_jvp, cost=cost, simplify=simplify_empty,
    lipschitz=lambda node, types, slot, ivs: 1.0, why_not={"invert": "it forgets how it is shared out"},
))  # fmt: skip


def _var_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    axes = node.attrs["axes"]
    rest = max(b.type(args[0]).count // max(b.type(out).count, 1) - node.attrs.get("ddof", 0), 1)
    centred = b.sub(args[0], b.op("mean", args[0], axes=axes))
    return b.mul(b.op("contract", centred, t, axes=axes), b.const(2.0 / rest))


OPS.append(Op(
    "var", _reduce_infer, _depend, interval=lambda ivs, types, node: NONNEGATIVE, cost=cost, jvp=_var_jvp,
    simplify=lambda b, args, attrs: None if attrs["axes"] else b.expand(b.const(0.0), b.type(args[0])),  # of one value
    why_not={"invert": "a variance forgets its data", "lipschitz": "it is quadratic"},
))  # fmt: skip
OPS.append(Op(
    "argmax", _int_infer, _depend, interval=lambda ivs, types, node: closed(0, max(count_of(types, node) - 1, 0)), cost=cost,
    continuous=lambda slot: False,
    why_not={"invert": "an index forgets the value", "jvp": "an index jumps", "lipschitz": "an index jumps"},
))  # fmt: skip
for _name in ("any", "all"):
    OPS.append(Op(
        _name, _bool_infer, _depend, interval=lambda ivs, types, node: closed(0, 1), cost=cost, continuous=lambda slot: False,
        why_not={"invert": "a condition is no number", "jvp": "a condition jumps", "lipschitz": "a condition jumps"},
    ))  # fmt: skip


# ---- contraction --------------------------------------------------------------------------------


def _contract_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    a, c = types
    for n in attrs["axes"]:
        if need(a, n) != need(c, n):
            raise OpProblem(
                "FL0301",
                f"axis `{n}` has size {a.size(n)} and size {c.size(n)}",
                suggestion="sizes agree where values meet",
            )
    for x in a.axes:
        if c.has(x.name) and c.size(x.name) != x.size:
            raise OpProblem(
                "FL0301",
                f"axis `{x.name}` has size {x.size} and size {c.size(x.name)}",
                suggestion="sizes agree where values meet",
            )
    left = a.without(attrs["axes"])
    rest = [x for x in c.without(attrs["axes"]).axes if not left.has(x.name)]
    return TensorType((*left.axes, *rest))


def _contract_depend(
    node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]
) -> Relation:
    found = Relation.equal(node.tensor.axes, types[slot].axes)
    for k, s in enumerate(supports):
        if s is not None:
            found = found.meet(s.constraints(node.tensor.names, types[slot].names) if k != slot else {})
    return found


def contracted(types: Sequence[TensorType], node: Node) -> int:
    n = 1
    for a in node.attrs["axes"]:
        n *= types[0].size(a)
    return n


def _contract_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    operands = (t, args[1]) if slot == 0 else (args[0], t)
    value = b.op("contract", *operands, axes=node.attrs["axes"])
    return value if b.type(value).names == b.type(out).names else b.op("order", value, names=b.type(out).names)


def matrix_operand(node: Node, slot: int, facts: Facts) -> tuple[str, str] | str:
    """For a product with a structured square matrix: (structure, its other axis); else why not."""
    weight = facts.node(node.inputs[1 - slot])
    renames: dict[str, str] = {}
    while weight.op in ("rename", "order"):
        if weight.op == "rename":
            for o, n in weight.attrs["pairs"]:
                renames[o] = renames.pop(n, n)
        weight = facts.node(weight.inputs[0])
    domain = weight.attrs.get("domain")
    if weight.op != "param" or not isinstance(domain, Domain) or not domain.is_matrix or domain.structure == "stiefel":
        return "the matrix of this product is not known to be invertible"
    if len(node.attrs["axes"]) != 1:
        return "only one axis can be solved for in a matrix product"
    axis = node.attrs["axes"][0]
    pair = [renames.get(n, n) for n in weight.tensor.names[-2:]]
    if axis not in pair:
        return f"`{axis}` is not an axis of the matrix"
    other = pair[1 - pair.index(axis)]
    value = facts.node(node.inputs[slot]).tensor
    if value.has(other):
        return f"`{other}` is an axis of the value as well"
    batch = [renames.get(n, n) for n in weight.tensor.names[:-2]]
    if any(not value.has(n) for n in batch):
        return "the value lacks an axis of the matrix"
    return str(domain.structure), other


def _contract_needs(node: Node, slot: int, facts: Facts) -> Sequence[Need] | str:
    found = matrix_operand(node, slot, facts)
    return found if isinstance(found, str) else ()


def _contract_invert(b: Builder, node: Node, slot: int, args: Sequence[int | None], out: int) -> int:
    axis = node.attrs["axes"][0]
    w = args[1 - slot]
    assert w is not None
    have = [n for n in b.type(w).names[-2:] if n != axis]
    return b.op("matrix_solve", w, out, axis=axis, given=have[0])


def _contract_log_det(b: Builder, node: Node, slot: int, args: Sequence[int], out: int) -> LocalLogDet:
    axis = node.attrs["axes"][0]
    return LocalLogDet(b.op("matrix_log_det", args[1 - slot]), (axis,))


def _contract_class(node: Node, slot: int, facts: Facts) -> str:
    found = matrix_operand(node, slot, facts)
    if isinstance(found, str):
        return "D"
    if found[0] == "dense":
        value = facts.node(node.inputs[slot]).tensor
        return f"D3:{value.size(node.attrs['axes'][0])}"
    return "0" if found[0] in ("orthogonal", "unit_lower") else "D"


def _contract_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    return scaled(iv.mul(ivs[0], ivs[1]), contracted(types, node))


def _contract_lip(node: Node, types: Sequence[TensorType], slot: int, ivs: Sequence[Interval]) -> float | None:
    other = ivs[1 - slot]
    bound = max(abs(other.lo), abs(other.hi))
    if bound == inf:
        return None
    return bound * sqrt(types[1 - slot].count)


OPS.append(Op(
    "contract", _contract_infer, _contract_depend, interval=_contract_bounds, jvp=_contract_jvp, invert=_contract_invert,
    needs=_contract_needs, log_det=_contract_log_det, log_det_cost=_contract_class, lipschitz=_contract_lip,
    cost=lambda node, types: 2 * node.tensor.count * contracted(types, node),
))  # fmt: skip


# ---- along one axis -----------------------------------------------------------------------------


def _axis_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    need(types[0], attrs["axis"])
    return types[0].as_kind("real")


def _mixed(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    """Every entry along the axis; with `causal`, those up to the query's index."""
    axis = node.attrs["axis"]
    extra: dict[Key, Matrix | None] = {}
    query = node.attrs.get("causal")
    if query is not None:
        extra[(query, axis)] = compare(node.tensor.size(query), ">=")
    return Relation.equal(node.tensor.axes, types[0].axes, but=(axis,), extra=extra)


def _causal_support(node: Node, types: Sequence[TensorType], supports: Sequence[Support | None]) -> Support | None:
    query = node.attrs.get("causal")
    if query is None:
        return None
    lower = compare(node.tensor.size(query), ">=")
    return Support.of({(query, node.attrs["axis"]): lower}) if lower is not None else None


def _softmax_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    axis = node.attrs["axis"]
    return b.mul(out, b.sub(t, b.op("contract", out, t, axes=(axis,))))


def _log_softmax_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    axis = node.attrs["axis"]
    return b.sub(t, b.op("contract", b.op("exp", out), t, axes=(axis,)))


def _soft_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    if types[0].size(node.attrs["axis"]) == 1:
        return point(1.0)
    return closed(0, 1) if "causal" in node.attrs else UNIT


OPS.append(Op(
    "softmax", _axis_infer, _mixed, support=_causal_support, interval=_soft_bounds, jvp=_softmax_jvp,
    lipschitz=lambda node, types, slot, ivs: 0.5, cost=lambda node, types: 5 * node.tensor.count,
    why_not={"invert": "`softmax` forgets the common level"},
))  # fmt: skip
OPS.append(Op(
    "log_softmax", _axis_infer, _mixed, interval=lambda ivs, types, node: Interval(-inf, 0.0, True, False),
    jvp=_log_softmax_jvp,
    # The slope I - 1pᵀ is an oblique projection, of norm √n ‖p‖ ≤ √n.
    lipschitz=lambda node, types, slot, ivs: sqrt(types[0].size(node.attrs["axis"])), cost=lambda node, types: 5 * node.tensor.count,
    why_not={"invert": "`log_softmax` forgets the common level"},
))  # fmt: skip


def _cumsum_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    axis = node.attrs["axis"]
    cmp = {(False, False): ">=", (True, False): ">", (False, True): "<=", (True, True): "<"}[
        (bool(node.attrs.get("exclusive")), bool(node.attrs.get("reverse")))
    ]
    return Relation.equal(
        node.tensor.axes, types[0].axes, but=(axis,), extra={(axis, axis): compare(node.tensor.size(axis), cmp)}
    )


def _cumsum_bounds(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    n = node.tensor.size(node.attrs["axis"])
    least = point(0.0) if node.attrs.get("exclusive") else ivs[0]
    return least.union(scaled(ivs[0], n))


def _cumsum_needs(node: Node, slot: int, facts: Facts) -> Sequence[Need] | str:
    return "an exclusive `cumsum` drops the last entry" if node.attrs.get("exclusive") else ()


def _cumsum_invert(b: Builder, node: Node, slot: int, args: Sequence[int | None], out: int) -> int:
    k = -1 if node.attrs.get("reverse") else 1
    return b.sub(out, b.op("shift", out, axis=node.attrs["axis"], k=k))


OPS.append(Op(
    "cumsum", _axis_infer, _cumsum_depend, interval=_cumsum_bounds, jvp=_same, invert=_cumsum_invert, needs=_cumsum_needs,
    log_det=zero_log_det, log_det_cost="0", cost=cost,
    lipschitz=lambda node, types, slot, ivs: float(node.tensor.size(node.attrs["axis"])),
))  # fmt: skip
OPS.append(Op(
    "sort", _axis_infer, _mixed, interval=one, lipschitz=lambda node, types, slot, ivs: 1.0, cost=cost,
    why_not={"invert": "`sort` forgets the order", "jvp": "not needed so far"},
))  # fmt: skip

__all__ = ["LocalLogDet", "no_needs"]
