"""Matrices: masks, structured solves and determinants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowlang.ir.domains import Domain
from flowlang.ir.interval import REAL, Interval, point
from flowlang.ir.ops.base import Attrs, Need, Op, OpProblem
from flowlang.ir.ops.shape import need
from flowlang.ir.relation import MAX_BITS, Matrix, Relation, Support, compare, matrix
from flowlang.ir.types import Axis, TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node

OPS: list[Op] = []


def _leaf_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    raise AssertionError("leaves have no operands")


def _param_support(node: Node, types: Sequence[TensorType], supports: Sequence[Support | None]) -> Support | None:
    domain = node.attrs.get("domain")
    if isinstance(domain, Domain) and domain.structure in ("lower", "unit_lower"):
        row, col = node.tensor.axes[-2:]
        lower = compare(row.size, ">=")
        return Support.of({(row.name, col.name): lower}) if lower is not None else None
    return None


def _input_support(node: Node, types: Sequence[TensorType], supports: Sequence[Support | None]) -> Support | None:
    """What was known of a value that a solver's body captures."""
    found = node.attrs.get("support")
    return found if isinstance(found, Support) else None


_LEAF_SUPPORT = {"param": _param_support, "input": _input_support}
LEAF = {
    "interval": "its domain or value, read by the range analysis", "invert": "a leaf has no operand",
    "jvp": "a leaf has no operand", "lipschitz": "a leaf has no operand", "infer": "made with its type",
}  # fmt: skip


def _no_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    raise AssertionError("leaves are made with their type")


for _name in ("input", "param", "state", "const"):
    OPS.append(Op(_name, _no_infer, _leaf_depend, support=_LEAF_SUPPORT.get(_name), why_not=LEAF))


def _by_name(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes)


# ---- masks by degree (MADE) ---------------------------------------------------------------------


def mask_rows(attrs: Attrs) -> Matrix | None:
    """Row r sees column c when its degree is at least (strictly: above) the column's."""
    rows, cols = attrs["row_degrees"], attrs["col_degrees"]
    if len(rows) * len(cols) > MAX_BITS:
        return None
    memo: dict[int, int] = {}
    for d in set(rows):
        bits = 0
        for j, c in enumerate(cols):
            if d > c or (d == c and not attrs["strict"]):
                bits |= 1 << j
        memo[d] = bits
    return matrix(len(rows), len(cols), (memo[d] for d in rows))


def _mask_support(node: Node, types: Sequence[TensorType], supports: Sequence[Support | None]) -> Support | None:
    found = mask_rows(node.attrs)
    if found is None:
        return supports[0]
    return Support.of({(node.attrs["row"], node.attrs["col"]): found}).meet(supports[0])


def _same_type(types: Sequence[TensorType], attrs: Attrs) -> Type:
    need(types[0], attrs["row"])
    need(types[0], attrs["col"])
    return types[0]


OPS.append(Op(
    "masked", _same_type, _by_name, support=_mask_support, interval=lambda ivs, types, node: ivs[0].union(point(0.0)),
    jvp=lambda b, node, args, out, slot, t: b.op("masked", t, **dict(node.attrs)),
    lipschitz=lambda node, types, slot, ivs: 1.0, cost=lambda node, types: node.tensor.count,
    why_not={"invert": "a mask forgets what it hides"},
))  # fmt: skip


# The diagonal of a matrix parameter, along its rows' axis; its sign is known by the matrix's domain.
def _diagonal_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return types[0].without((attrs["col"],))


OPS.append(Op(
    "diagonal", _diagonal_infer, _by_name, interval=lambda ivs, types, node: node.attrs.get("bounds", ivs[0]),
    cost=lambda node, types: node.tensor.count,
    jvp=lambda b, node, args, out, slot, t: b.op("diagonal", t, row=node.attrs["row"], col=node.attrs["col"]),
    lipschitz=lambda node, types, slot, ivs: 1.0, why_not={"invert": "a diagonal forgets the rest"},
))  # fmt: skip


# ---- structured solves (made by the inverse of a contraction) -----------------------------------


def _solve_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    w, y = types
    axes = [Axis(attrs["axis"], w.size(attrs["axis"])) if a.name == attrs["given"] else a for a in y.axes]
    return TensorType(tuple(axes))


def _solve_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes, but=(node.attrs["axis"],))


OPS.append(Op(
    "matrix_solve", _solve_infer, _solve_depend, interval=lambda ivs, types, node: REAL,
    cost=lambda node, types: node.tensor.count * node.tensor.size(node.attrs["axis"]),
    why_not={"invert": "made by inversion only", "jvp": "made by inversion only", "lipschitz": "no bound is known"},
))  # fmt: skip


def _det_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return TensorType(types[0].axes[:-2])


OPS.append(Op(
    "matrix_log_det", _det_infer, _by_name, interval=lambda ivs, types, node: REAL,
    cost=lambda node, types: types[0].axes[-1].size,
    why_not={"invert": "a determinant forgets its matrix", "jvp": "parameters only", "lipschitz": "parameters only"},
))  # fmt: skip


# ---- determinants of values ---------------------------------------------------------------------


def _square(t: TensorType, attrs: Attrs, what: str, function: str) -> tuple[str, str]:
    row, col = attrs["row"], attrs["col"]
    need(t, row)
    need(t, col)
    if row == col or t.size(row) != t.size(col):
        raise OpProblem("FL0311", f"{what} is of a square matrix, and `{row}` and `{col}` of `{t}` are not one",
                        suggestion=f"name two axes of one size, as in `{function}[D', D](M)`")  # fmt: skip
    return row, col


def _values_det_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    return types[0].without(_square(types[0], attrs, "a determinant", "det"))


def _values_det_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    """A determinant is linear in each column: the sum over columns of that with the tangent's column put there."""
    row, col = node.attrs["row"], node.attrs["col"]
    size = b.type(args[0]).size(col)
    total: int | None = None
    for k in range(size):
        here = b.op("eq", b.op("index", axis=col, size=size), b.const(k))
        part = b.op("det", b.op("where", here, t, args[0]), row=row, col=col)
        total = part if total is None else b.add(total, part)
    return total


# det(M; row, col): of matrices that are values, such as small Jacobians.
OPS.append(Op(
    "det", _values_det_infer, _by_name, interval=lambda ivs, types, node: REAL, jvp=_values_det_jvp,
    cost=lambda node, types: types[0].count * types[0].size(node.attrs["col"]),
    why_not={"invert": "a determinant forgets its matrix", "lipschitz": "its slope grows with the entries"},
))  # fmt: skip


# ---- functions of symmetric matrices ------------------------------------------------------------


def _eigen_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    _square(types[0], attrs, f"`{attrs['function']}`", attrs["function"])
    return types[0]


def _eigen_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes, but=(node.attrs["row"], node.attrs["col"]))


# eigen(M; row, col, function, power, floor): the symmetric part of M with a function applied to its eigenvalues: `matrix_exp`;
# `matrix_log` and `matrix_power`, for which eigenvalues below `floor` count as `floor`.
OPS.append(Op(
    "eigen", _eigen_infer, _eigen_depend, interval=lambda ivs, types, node: REAL,
    cost=lambda node, types: 10 * types[0].count * types[0].size(node.attrs["col"]),
    why_not={"invert": "another function of the matrix gives it back, where it was symmetric", "jvp": "its eigenvectors are no value of the graph",
             "lipschitz": "no bound is known"},
))  # fmt: skip


# ---- weights with a bounded spectral norm -------------------------------------------------------


def _bounded_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    for t in types[1:]:
        if t.axes:
            raise OpProblem(
                "FL0301",
                f"the order of a norm is one number, and this is `{t}`",
                suggestion="give a number of at least 1",
            )
    return types[0]


def _bounded_total(node: Node, types: Sequence[TensorType]) -> Sequence[Need]:
    return [Need(slot, ORDERS, words="an order of at least 1") for slot in range(1, len(types))]


ORDERS = Interval(1.0, math.inf)

# W · min(1, bound / ‖W‖), the matrix being `out` against all other axes. With one operand the norm is the spectral one, exact
# (SVD); with orders p and q behind, a bound of the norm from lp to lq (`induced_norm` in the runtime);
# with `space`, that of the convolution of a value of these sizes by the kernel [out, in, *window].
OPS.append(Op(
    "norm_bounded", _bounded_infer, _by_name, interval=lambda ivs, types, node: ivs[0].union(point(0.0)),
    support=lambda node, types, supports: supports[0], lipschitz=None, total=_bounded_total,
    cost=lambda node, types: 4 * types[0].count,
    why_not={"invert": "parameters only", "jvp": "parameters only", "lipschitz": "parameters only"},
))  # fmt: skip
