"""Windows that move over one to three axes: convolution, its transpose, pooling.

Attributes: `channel` (but for pools), `space` (the axes that the window moves along), and for each of them
`stride`, `dilation` and `padding` (before, after). Zeros stand outside; a pool leaves out what lies outside.
The kernel of `conv` is [out, in / groups, *window]; that of `conv_transpose` [in, out / groups, *window].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING

from flowlang.ir.interval import REAL
from flowlang.ir.ops.base import Attrs, NoTangent, Op, OpProblem
from flowlang.ir.ops.shape import need
from flowlang.ir.relation import MAX_BITS, Matrix, Relation, Support, matrix
from flowlang.ir.types import TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node

OPS: list[Op] = []


def window_of(types: Sequence[TensorType], attrs: Attrs) -> tuple[int, ...]:
    return attrs["kernel"] if "kernel" in attrs else types[1].shape[2:]


def _moved(types: Sequence[TensorType], attrs: Attrs, out: TensorType) -> TensorType:
    """The result's sizes along the axes of space."""
    window = window_of(types, attrs)
    for k, s in enumerate(attrs["space"]):
        size, reach = need(types[0], s), (window[k] - 1) * attrs["dilation"][k] + 1
        before, after = attrs["padding"][k]
        made = (size + before + after - reach) // attrs["stride"][k] + 1
        if made < 1:
            raise OpProblem("FL0301", f"a window of {reach} does not fit axis `{s}` of size {size}",
                            suggestion="use a smaller window, or pad")  # fmt: skip
        out = out.resized(s, made)
    return out


def _conv_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, w, channel = types[0], types[1], attrs["channel"]
    if need(x, channel) != w.axes[1].size * attrs["groups"]:
        expected = w.axes[1].size * attrs["groups"]
        raise OpProblem(
            "FL0301",
            f"axis `{channel}` has size {x.size(channel)}, and the kernel expects {expected}",
            suggestion="give the kernel that many input channels, or change the value's",
        )
    return _moved(types, attrs, x.resized(channel, w.axes[0].size))


def _transpose_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    x, w, channel = types[0], types[1], attrs["channel"]
    if need(x, channel) != w.axes[0].size:
        raise OpProblem(
            "FL0301",
            f"axis `{channel}` has size {x.size(channel)}, and the kernel expects {w.axes[0].size}",
            suggestion="give the kernel that many input channels, or change the value's",
        )
    out = x.resized(channel, w.axes[1].size * attrs["groups"])
    for k, s in enumerate(attrs["space"]):
        reach = (w.axes[2 + k].size - 1) * attrs["dilation"][k] + 1
        made = (need(x, s) - 1) * attrs["stride"][k] + reach - sum(attrs["padding"][k])
        if made < 1:
            raise OpProblem(
                "FL0301", f"nothing of axis `{s}` would be left", suggestion="choose a smaller kernel or stride, or pad"
            )
        out = out.resized(s, made)
    return out


def live_taps(kernel: TensorType, support: Support | None) -> list[list[int]]:
    """Boxes that hold every tap of a kernel which may be other than 0: for each axis of space, a set of places."""
    space = [a.name for a in kernel.axes[2:]]
    sets = [(1 << a.size) - 1 for a in kernel.axes[2:]]
    if support is None:
        return [sets]
    found = support.constraints(space, space)
    for k, n in enumerate(space):
        alone = found.get((n, None))
        if alone is not None:
            sets[k] &= sum(1 << i for i, r in enumerate(alone.bits()) if r)
    pair = found.get((space[0], space[1])) if len(space) >= 2 else None
    if pair is None:
        return [sets]
    boxes: dict[int, int] = {}  # what the rows have in common -> the rows
    for i, r in enumerate(pair.bits()):
        if sets[0] >> i & 1 and r & sets[1]:
            boxes[r & sets[1]] = boxes.get(r & sets[1], 0) | 1 << i
    return [[rows, cols, *sets[2:]] for cols, rows in boxes.items()]


def _seen(node: Node, types: Sequence[TensorType], k: int, taps: int, *, transposed: bool) -> Matrix | None:
    """Which indices of the operand each index of the result reads through some taps, along the k-th axis of space."""
    axis = node.attrs["space"][k]
    n, m = node.tensor.size(axis), types[0].size(axis)
    if n * m > MAX_BITS:
        return None
    stride, dilation, before = node.attrs["stride"][k], node.attrs["dilation"][k], node.attrs["padding"][k][0]
    rows = [0] * n
    few, many = (m, n) if transposed else (n, m)
    for i in range(few):
        for tap in range(window_of(types, node.attrs)[k]):
            j = i * stride + tap * dilation - before
            if taps >> tap & 1 and 0 <= j < many:
                if transposed:
                    rows[j] |= 1 << i
                else:
                    rows[i] |= 1 << j
    return matrix(n, m, rows)


def _depend(transposed: bool, lost: bool):  # type: ignore[no-untyped-def]
    """A place reads those that the window's taps reach; taps that a constant mask makes 0 reach nothing."""

    def rule(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
        rows, cols = node.tensor.axes, types[slot].axes
        if slot:
            return Relation.full(rows, cols)
        space = node.attrs["space"]
        every = [(1 << n) - 1 for n in window_of(types, node.attrs)]
        total = Relation.empty(rows, cols)
        for box in live_taps(types[1], supports[1]) if lost else [every]:
            extra: dict[tuple[str | None, str | None], Matrix | None] = {
                (s, s): _seen(node, types, k, box[k], transposed=transposed) for k, s in enumerate(space)
            }
            but = (node.attrs["channel"], *space) if lost else tuple(space)
            found = Relation.equal(rows, cols, but=but, extra=extra)
            total = found if total.is_empty() else total if found.is_empty() else total.union(found)
        return total

    return rule


def _linear_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    if slot:
        raise NoTangent
    return b.op(node.op, t, *args[1:2], **dict(node.attrs))


OPS.append(Op(
    "conv", _conv_infer, _depend(False, True), interval=lambda ivs, types, node: REAL, jvp=_linear_jvp,
    cost=lambda node, types: 2 * node.tensor.count * prod(a.size for a in types[1].axes[1:]),
    why_not={"invert": "no structure of the kernel is known", "lipschitz": "no certified bound yet"},
))  # fmt: skip
OPS.append(Op(
    "conv_transpose", _transpose_infer, _depend(True, True), interval=lambda ivs, types, node: REAL, jvp=_linear_jvp,
    cost=lambda node, types: 2 * types[0].count * prod(a.size for a in types[1].axes[1:]),
    why_not={"invert": "no structure of the kernel is known", "lipschitz": "no certified bound yet"},
))  # fmt: skip


# ---- pooling ------------------------------------------------------------------------------------


def _pool_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    for k, (before, after) in enumerate(attrs["padding"]):
        if max(before, after) >= attrs["kernel"][k]:
            raise OpProblem(
                "FL0301", "a window would hold nothing but padding", suggestion="pad by less than the window"
            )
    return _moved(types, attrs, types[0])


def _pool_lipschitz(node: Node, types: Sequence[TensorType], slot: int, intervals: Sequence[object]) -> float | None:
    """An entry is seen by at most `times` windows; a mean without padding divides by all of the window."""
    pairs = zip(node.attrs["kernel"], node.attrs["stride"], strict=True)
    times = prod(-(-k // s) for k, s in pairs)
    whole = node.op == "mean_pool" and not any(map(any, node.attrs["padding"]))
    return sqrt(times / prod(node.attrs["kernel"]) if whole else times)


POOL: dict[str, str] = {"invert": "a window keeps one number"}
for _name, _jvp, _why in (
    ("max_pool", None, {**POOL, "jvp": "which entry is largest is not kept"}), ("mean_pool", _linear_jvp, POOL),
):  # fmt: skip
    OPS.append(Op(
        _name, _pool_infer, _depend(False, False), interval=lambda ivs, types, node: ivs[0], jvp=_jvp,
        cost=lambda node, types: node.tensor.count * prod(node.attrs["kernel"]), lipschitz=_pool_lipschitz,
        why_not=_why,
    ))  # fmt: skip
