"""Borders and sizes along axes: `pad` and `resize`, written in ops that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate.types import static_size
from flowlang.elaborate.values import Builtin, Option, Tensor, describe
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body
    from flowlang.elaborate.calls import Arguments

BORDERS = ("zeros", "reflect", "replicate", "circular")
METHODS = ("nearest", "linear")


def pad(body: Body, args: Arguments) -> Any:
    """`pad[H, W](x, 2, border = reflect)`: entries before and after, one number or `[before, after]` for each axis alike."""
    where = args.span
    assert where is not None
    args.only(body, "pad", ("border",))
    amount = args.positional[1] if len(args.positional) == 2 else None
    pair = [amount, amount] if isinstance(amount, int) and not isinstance(amount, bool) else amount
    if (
        not isinstance(pair, list)
        or len(pair) != 2
        or not all(isinstance(v, int) and v >= 0 for v in pair)
        or not args.axes
    ):
        raise body.fail("FL0203", "`pad` takes axes, a value and how many entries are added", where,
                        suggestion="as in `pad[H, W](x, 2)`, or `pad[T](x, [3, 0])` for before and after")  # fmt: skip
    x = body.tensor(args.positional[0], args.spans[0])
    border = args.keywords.get("border")
    for item in args.axes:
        axis = axis_rules.axis_name(body, item, "pad")
        n = axis_rules.need_axis(body, body.b.type(x), axis, item.span)
        most = {"reflect": n - 1, "circular": n}.get(border.word if isinstance(border, Option) else "zeros")
        if most is not None and max(pair) > most:
            raise body.fail("FL0312", f"axis `{axis}` of size {n} has no {max(pair)} entries beside its border", item.span,
                            suggestion=f"add at most {most}, or take `border = replicate`")  # fmt: skip
        x = padded(body, x, axis, pair[0], pair[1], border.word if isinstance(border, Option) else "zeros", where)
    return Tensor(x, body)


def padded(body: Body, x: int, axis: str, before: int, after: int, border: str, where: Span) -> int:
    n = body.b.type(x).size(axis)

    def part(start: int, stop: int, turned: bool = False) -> int:
        made = body.b.op("slice", x, axis=axis, start=start, stop=stop, span=where)
        return body.b.op("reverse", made, axis=axis, span=where) if turned else made

    def filled(count: int, at: int) -> int:
        axes = tuple((a.name, count if a.name == axis else a.size) for a in body.b.type(x).axes)
        if border == "zeros":
            return body.b.op("expand", body.b.const(0.0), axes=axes, span=where)
        return body.b.op("expand", body.b.op("pick", x, axis=axis, index=at, span=where), axes=axes, span=where)

    left, right = {
        "reflect": (lambda: part(1, before + 1, True), lambda: part(n - 1 - after, n - 1, True)),
        "circular": (lambda: part(n - before, n), lambda: part(0, after)),
    }.get(border, (lambda: filled(before, 0), lambda: filled(after, n - 1)))
    parts = [*([left()] if before else []), x, *([right()] if after else [])]
    return body.b.op("join", *parts, axis=axis, span=where) if len(parts) > 1 else x


def resize(body: Body, args: Arguments) -> Any:
    """`resize[H = 8, W = 8](x, method = linear)`: places are the middles of equal cells, as in torch's `interpolate`."""
    where = args.span
    assert where is not None
    args.only(body, "resize", ("method",))
    if len(args.positional) != 1 or not args.axes or any(i.eq is None for i in args.axes):
        raise body.fail(
            "FL0203",
            "`resize` takes axes with their new sizes, and a value",
            where,
            suggestion="as in `resize[H = 8, W = 8](x)`",
        )
    method = args.keywords.get("method")
    x = body.tensor(args.positional[0], args.spans[0])
    if body.b.type(x).kind != "real":
        raise body.fail("FL0306", f"`resize` takes real values, and this is {describe(args.positional[0])}", args.spans[0],
                        suggestion="make it real first, as by `1.0 * x`")  # fmt: skip
    for item in args.axes:
        axis = axis_rules.axis_name(body, tree.Item(item.left, span=item.span))
        n = axis_rules.need_axis(body, body.b.type(x), axis, item.span)
        assert item.eq is not None
        size = static_size(body, item.eq)
        if min(size, n) < 1:
            raise body.fail(
                "FL0312",
                f"axis `{axis}` of size {n} has no {size} places",
                item.span,
                suggestion="choose a size of at least 1",
            )
        x = resized(body, x, axis, size, method.word if isinstance(method, Option) else "nearest", where)
    return Tensor(x, body)


def resized(body: Body, x: int, axis: str, size: int, method: str, where: Span) -> int:
    """A product with a matrix of constants, one row for each new place."""
    b, t = body.b, body.b.type(x)
    n = t.size(axis)
    if size == n:
        return x
    new = f"{axis}~new"
    old = b.op("index", axis=axis, size=n, span=where)
    at = b.op("index", axis=new, size=size, span=where)
    if method == "nearest":
        at = b.op("floor", b.mul(at, b.const(n / size)))
        both = ((new, size), (axis, n))
        same = b.op("eq", b.op("expand", at, axes=both), b.op("expand", old, axes=both))
        weights = b.op("where", same, b.const(1.0), b.const(0.0))
    else:
        at = b.op(
            "clamp", b.sub(b.mul(b.add(at, b.const(0.5)), b.const(n / size)), b.const(0.5)), lo=0.0, hi=float(n - 1)
        )
        both = ((new, size), (axis, n))
        off = b.op("abs", b.sub(b.op("expand", at, axes=both), b.op("expand", old, axes=both)))
        weights = b.op("relu", b.sub(b.const(1.0), off))
    made = b.op("contract", x, weights, axes=(axis,), span=where)
    made = b.op("rename", made, pairs=((new, axis),), span=where)
    return b.op("order", made, names=t.names, span=where)


GRIDS = {
    "pad": Builtin("pad", pad, options=(("border", BORDERS),)),
    "resize": Builtin("resize", resize, options=(("method", METHODS),)),
}
