"""Axes of values: brackets on a tensor, and bringing a value to a declared type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowlang.elaborate.forms import example
from flowlang.elaborate.scope import name_help
from flowlang.elaborate.types import checked_size
from flowlang.elaborate.values import POISON, Pending, Poison, RangeValue, Tensor, TypeSpec, describe
from flowlang.ir.types import TensorType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body


def words(t: TensorType) -> str:
    return ", ".join(f"`{n}`" for n in t.names) or "none"


def need_axis(body: Body, t: TensorType, name: str, span: Span) -> int:
    if not t.has(name):
        raise body.fail(
            "FL0302",
            f"this value has no axis `{name}`; its axes are {words(t)}",
            span,
            suggestion=name_help(name, t.names),
        )
    return t.size(name)


def index_tensor(body: Body, value: Tensor, items: tuple[tree.Item, ...]) -> Any:
    """`x[D -> (h = 4, d), (i, j) -> T]`, `x[T = 0]`, `x[T = 1..]`, `x[T = idx]`: left to right."""
    result: Any = value
    for item in items:
        result = index_one(body, result, item)
        if isinstance(result, Poison):
            return POISON
    return result


def index_one(body: Body, x: Tensor, item: tree.Item) -> Any:
    left, arrow = item.left, item.arrow
    if arrow is None:
        if isinstance(left, tree.Name) and item.eq is not None:
            return select(body, x, left.id, item.eq, item.span)
        raise body.fail(
            "FL0307",
            "brackets on a value rename, split, merge, slice or gather",
            item.span,
            suggestion="write `x[D -> E]`, `x[D -> (h = 4, d)]`, `x[(h, d) -> D]`, `x[T = 0]` or `x[T = 1..]`",
        )
    if item.eq is not None or item.arrow_eq is not None:
        raise body.fail(
            "FL0307",
            "a size cannot stand here",
            item.span,
            suggestion="sizes stand in a group, as in `x[D -> (h = 2, d)]`",
        )
    if isinstance(left, tree.Paren):
        if not isinstance(arrow, tree.Name):
            raise body.fail("FL0307", "axes are merged into one name", item.span, suggestion="as in `x[(i, j) -> T]`")
        return merge(body, x, [axis_name(body, i) for i in left.items], arrow.id, item.span)
    if not isinstance(left, tree.Name):
        raise body.fail("FL0307", "an axis is a name", item.span, suggestion="as in `x[D -> E]`")
    if isinstance(arrow, tree.Paren):
        if not arrow.items:
            raise body.fail(
                "FL0307",
                "an axis cannot be renamed to nothing",
                item.span,
                suggestion="as in `x[D -> E]`; a reduction such as `sum[D](x)` takes an axis away",
            )
        return split(body, x, left.id, arrow.items, item.span)
    if isinstance(arrow, tree.Name):
        need_axis(body, x.type, left.id, item.span)
        if arrow.id == left.id:
            return x
        if x.type.has(arrow.id):
            raise body.fail(
                "FL0307",
                f"axis `{arrow.id}` is there already",
                item.span,
                suggestion="choose another name, or a prime as in `D'`",
            )
        return body.node("rename", body.tensor(x, item.span), pairs=((left.id, arrow.id),), span=item.span)
    raise body.fail(
        "FL0307",
        "an axis becomes a name or a group of names",
        item.span,
        suggestion="as in `x[D -> E]` or `x[D -> (h = 2, d)]`",
    )


def axis_name(body: Body, item: tree.Item, of: str | None = None) -> str:
    """An axis that brackets name, of the built-in function `of` if it is one's."""
    if isinstance(item.left, tree.Name) and item.eq is None and item.arrow is None:
        return item.left.id
    advice = "as in `x[D -> E]`" if of is None else example(of)
    raise body.fail("FL0307", "an axis is a name", item.span, suggestion=advice)


def split(body: Body, x: Tensor, name: str, parts: tuple[tree.Item, ...], span: Span) -> Tensor:
    total = need_axis(body, x.type, name, span)
    sizes: list[tuple[str, int | None]] = []
    for part in parts:
        if not isinstance(part.left, tree.Name):
            raise body.fail("FL0307", "an axis is a name", part.span, suggestion="as in `x[D -> E]`")
        # Without a written size, a name already in use as a size keeps it; one part may stay open.
        size = checked_size(body, body.static_int(part.eq), part.span) if part.eq is not None else None
        sizes.append((part.left.id, size))
    known = 1
    for _, s in sizes:
        known *= s if s is not None else 1
    open_parts = [n for n, s in sizes if s is None]
    if len(open_parts) > 1:
        resolved = [(n, s if s is not None else body.axes.get(n)) for n, s in sizes]
        if sum(s is None for _, s in resolved) > 1:
            raise body.fail(
                "FL0310",
                f"the sizes of {', '.join(f'`{n}`' for n in open_parts)} are open",
                span,
                suggestion="give all sizes but one, as in `x[D -> (h = 2, d)]`",
            )
        sizes = resolved
        known = 1
        for _, s in sizes:
            known *= s if s is not None else 1
        open_parts = [n for n, s in sizes if s is None]
    if known <= 0 or total % known or (not open_parts and known != total):
        raise body.fail(
            "FL0312",
            f"axis `{name}` of size {total} does not split into parts of {known}",
            span,
            suggestion="choose sizes whose product is the axis's size",
        )
    into = tuple((n, s if s is not None else total // known) for n, s in sizes)
    for n, _ in into:
        if n != name and x.type.has(n):
            raise body.fail("FL0307", f"axis `{n}` is there already", span, suggestion="choose another name")
    if len(into) == 1:
        if into[0][0] == name:
            return x
        return body.node("rename", body.tensor(x, span), pairs=((name, into[0][0]),), span=span)
    return body.node("split", body.tensor(x, span), axis=name, into=into, span=span)


def merge(body: Body, x: Tensor, names: list[str], into: str, span: Span) -> Tensor:
    for n in names:
        need_axis(body, x.type, n, span)
    if len(set(names)) != len(names):
        raise body.fail("FL0307", "an axis stands twice in this group", span, suggestion="give each part its own name")
    if x.type.has(into) and into not in names:
        raise body.fail(
            "FL0307", f"axis `{into}` is there already", span, suggestion="choose another name for the merged axis"
        )
    if len(names) == 1:
        if names[0] == into:
            return x
        return body.node("rename", body.tensor(x, span), pairs=((names[0], into),), span=span)
    # The group's axes stand together, in the group's order, where the first of them stood.
    rest = [n for n in x.type.names if n not in names]
    at = sum(1 for n in x.type.names[: x.type.position(names[0])] if n not in names)
    order = (*rest[:at], *names, *rest[at:])
    id = body.b.op("order", body.tensor(x, span), names=order, span=span)
    return body.node("merge", id, axes=tuple(names), into=into, span=span)


def select(body: Body, x: Tensor, name: str, index: tree.Expr, span: Span) -> Any:
    size = need_axis(body, x.type, name, span)
    value = body.ev(index)
    if isinstance(value, Poison):
        return POISON
    id = body.tensor(x, span)
    if isinstance(value, RangeValue):
        start = clip(value.start if value.start is not None else 0, size)
        stop = clip(value.stop if value.stop is not None else size, size)
        if stop < start or (value.stop or 0) > size or start > size:
            raise body.fail(
                "FL0307",
                f"{start}..{stop} is outside axis `{name}` of size {size}",
                span,
                suggestion=f"indices of `{name}` run from 0 to {size - 1}; `a..b` leaves b out",
            )
        return body.node("slice", id, axis=name, start=start, stop=stop, span=span)
    if isinstance(value, bool):
        raise body.fail("FL0305", "an index is a whole number", span, suggestion="as in `x[T = 0]`")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        if not -size <= value < size:
            raise body.fail(
                "FL0307",
                f"index {value} is outside axis `{name}` of size {size}",
                span,
                suggestion=f"indices of `{name}` run from 0 to {size - 1}, and -1 is the last",
            )
        return body.node("pick", id, axis=name, index=value % size, span=span)
    if isinstance(value, Tensor):
        return body.node("gather", id, body.tensor(value, span), axis=name, span=span)
    raise body.fail(
        "FL0305",
        f"an index is a whole number, a range or a tensor, and this is {describe(value)}",
        span,
        suggestion="as in `x[T = 0]`, `x[T = 1..]` or `x[T = idx]`",
    )


def clip(i: int, size: int) -> int:
    return i + size if i < 0 else i


def conform(body: Body, value: Any, spec: TypeSpec, span: Span) -> Any:
    """The value as the declared type says: same axes by name, sizes equal, in the declared order."""
    if isinstance(value, Poison):
        return POISON
    if isinstance(value, Pending):
        return value.resolve([spec])[0]
    if isinstance(value, int) and not isinstance(value, bool) and spec.domain.kind == "real":
        value = float(value)  # `s: R[D] = 0`: the type says that it is a real number
    id = body.tensor(value, span)
    t = body.b.type(id)
    names = [n for n, _ in spec.axes]
    for n, size in spec.axes:
        if not t.has(n):
            # A constant or a value that lacks the axis is broadcast along it.
            if size is None:
                raise body.fail(
                    "FL0302",
                    f"the value has no axis `{n}`; its axes are {words(t)}",
                    span,
                    suggestion="name one of its axes, or rename one, as in `x[D -> E]`",
                )
            continue
        if size is not None and t.size(n) != size:
            raise body.fail(
                "FL0301",
                f"axis `{n}` has size {t.size(n)} here, and {size} in the declared type",
                span,
                notes=(f"the value: `{t}`",),
                suggestion=f"write `{n} = {t.size(n)}`, or change the value",
            )
    extra = [n for n in t.names if n not in names]
    if extra and not spec.rest:
        raise body.fail(
            "FL0308",
            f"the value has the axis `{extra[0]}`, which the declared type lacks",
            span,
            notes=(f"the value: `{t}`",),
            suggestion=f"reduce it, as in `sum[{extra[0]}](..)`, or add it to the type",
        )
    missing = [(n, s) for n, s in spec.axes if not t.has(n)]
    if missing:
        full = tuple((n, t.size(n) if t.has(n) else (s or 1)) for n, s in spec.axes)
        full += tuple((n, t.size(n)) for n in extra)
        id = body.b.op("expand", id, axes=full, span=span)
    order = tuple(names[: spec.rest_at]) + tuple(extra) + tuple(names[spec.rest_at :])
    if order != body.b.type(id).names:
        id = body.b.op("order", id, names=order, span=span)
    body.record_axes(spec)
    return Tensor(id, body)
