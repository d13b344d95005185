"""Types as written become specs: a domain with axes, or a static type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowlang import limits
from flowlang.elaborate.scope import name_help
from flowlang.elaborate.values import Option, Poison, Poisoned, Static, Tensor, TypeSpec, describe
from flowlang.ir.domains import DOMAIN_NAMES, Domain, domain
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

STATIC_TYPES = (
    "int", "real", "bool", "text", "net", "norm", "bijector", "flow", "solver", "path", "model", "fn", "manifold",
    "distribution", "dataset", "graph", "word",
)  # fmt: skip


def head(expr: tree.Expr) -> tree.Expr:
    """The type without `?`, axes and arguments."""
    while True:
        match expr:
            case tree.Optional():
                expr = expr.type
            case tree.Brackets():
                expr = expr.value
            case tree.Call():
                expr = expr.fn
            case _:
                return expr


def is_tensor_type(expr: tree.Expr | None) -> bool:
    """Whether a parameter of this type is a tensor (else it is static)."""
    if expr is None:
        return False
    h = head(expr)
    return isinstance(h, tree.Name) and h.id in DOMAIN_NAMES


def is_optional(expr: tree.Expr | None) -> bool:
    return isinstance(expr, tree.Optional)


def one_of_words(expr: tree.Expr | None) -> tuple[str, ...]:
    """The words of `one_of(a, b)`, else nothing."""
    if isinstance(expr, tree.Optional):
        expr = expr.type
    if isinstance(expr, tree.Call) and isinstance(expr.fn, tree.Name) and expr.fn.id == "one_of":
        return tuple(i.left.id for i in expr.items if isinstance(i.left, tree.Name))
    return ()


def evaluate_type(body: Body, expr: tree.Expr) -> TypeSpec | Static:
    """The spec of a type; raises the body's Fail where it makes no sense."""
    optional = False
    if isinstance(expr, tree.Optional):
        optional, expr = True, expr.type
    match expr:
        case tree.ListExpr(items=(element,)):
            inner = evaluate_type(body, element)
            return Static("list", element=inner if isinstance(inner, Static) else None, optional=optional)
        case tree.Call(fn=tree.Name(id="one_of")):
            return Static("one_of", options=one_of_words(expr), optional=optional)
        case tree.Call(fn=tree.Name(id="like")):
            return like(body, expr, optional)
    items: tuple[tree.Item, ...] = ()
    bracketed = isinstance(expr, tree.Brackets)
    if isinstance(expr, tree.Brackets):
        items, expr = expr.items, expr.value
    if isinstance(expr, tree.Name) and expr.id in STATIC_TYPES and not bracketed:
        return Static(expr.id, optional=optional)
    axes, rest, rest_at = axis_specs(body, items)
    return TypeSpec(domain_of(body, expr), axes, rest, optional, rest_at)


def like(body: Body, expr: tree.Call, optional: bool) -> TypeSpec:
    if len(expr.items) != 1 or expr.items[0].left is None:
        raise body.fail("FL0306", "`like` takes one value", expr.span, suggestion="as in `state m: like(x) = 0`")
    value = body.ev(expr.items[0].left)
    if not isinstance(value, Tensor):
        raise body.fail(
            "FL0306",
            f"`like` takes a tensor, and this is {describe(value)}",
            expr.span,
            suggestion="as in `state m: like(x) = 0`",
        )
    return TypeSpec(domain("R") or Domain("R"), tuple((a.name, a.size) for a in value.type.axes), optional=optional)


def domain_of(body: Body, expr: tree.Expr) -> Domain:
    args: list[float | int | str] = []
    name_expr = expr
    if isinstance(expr, tree.Call):
        name_expr = expr.fn
        for item in expr.items:
            args.extend(domain_argument(body, item))
    if not isinstance(name_expr, tree.Name):
        raise body.fail("FL0306", "a type is needed here", expr.span, suggestion="as in `R[D]` or `Positive[D]`")
    try:
        found = domain(name_expr.id, tuple(args))
    except ValueError as e:
        raise body.fail(
            "FL0311",
            str(e),
            expr.span,
            suggestion="`Positive`, `Unit`, `Interval(a, b)` and `Int(a..b)` are domains; the language page lists all",
        ) from None
    if found is None:
        if name_expr.id in DOMAIN_NAMES:
            raise body.fail(
                "FL0902",
                f"the domain `{name_expr.id}` has no meaning yet",
                expr.span,
                suggestion="use another domain, as `R` or `Positive`",
            )
        raise body.fail(
            "FL0201",
            f"unknown type `{name_expr.id}`",
            name_expr.span,
            suggestion=name_help(name_expr.id, (*DOMAIN_NAMES, *STATIC_TYPES)),
        )
    return found


def domain_argument(body: Body, item: tree.Item) -> list[float | int | str]:
    expr = item.eq if item.eq is not None else item.left
    if isinstance(expr, tree.Range):
        start = body.static_int(expr.start) if expr.start is not None else 0
        if expr.stop is None:
            raise body.fail("FL0305", "this range has no end", expr.span, suggestion="write both ends, as in `0..4`")
        return [start, body.static_int(expr.stop)]
    if isinstance(expr, tree.Name) and body.find(expr.id) is None and expr.id not in body.axes:
        return [expr.id]
    if expr is None:
        return []
    value = body.ev(expr)
    if isinstance(value, Option):
        return [value.word]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    raise body.fail(
        "FL0305",
        f"a domain takes numbers, and this is {describe(value)}",
        expr.span,
        suggestion="as in `Interval(0, 1)`",
    )


def axis_specs(body: Body, items: tuple[tree.Item, ...]) -> tuple[tuple[tuple[str, int | None], ...], bool, int]:
    axes: list[tuple[str, int | None]] = []
    rest, rest_at = False, 0
    if len(items) > limits.RANK:
        raise body.fail(
            "FL0901",
            f"{len(items)} axes exceed the limit of {limits.RANK}",
            items[0].span,
            suggestion="merge some, as in `x[(i, j) -> T]`",
        )
    for item in items:
        if isinstance(item.left, tree.Ellipsis):
            rest, rest_at = True, len(axes)
            continue
        name, size = axis_spec(body, item, [n for n, _ in axes])
        if any(n == name for n, _ in axes):
            raise body.fail(
                "FL0307",
                f"axis `{name}` stands twice in one type",
                item.span,
                suggestion="a second axis of the same size has a prime, as in `R[D', D]`",
            )
        axes.append((name, size))
    return tuple(axes), rest, rest_at


def axis_spec(body: Body, item: tree.Item, before: list[str]) -> tuple[str, int | None]:
    left = item.left
    if isinstance(left, tree.Attribute):  # R[b.D]: axis D with b's size
        size = body.ev(left)
        if isinstance(size, Poison):
            raise Poisoned
        if not isinstance(size, int):
            raise body.fail(
                "FL0302",
                f"`{left.name}` has no size here",
                item.span,
                suggestion="write a number, or a parameter of type `int`",
            )
        return left.name, size
    if not isinstance(left, tree.Name):
        if isinstance(left, tree.Brackets):
            raise body.not_yet("A[..]", "a family of axes, as `A[0..N]`, has no meaning yet", item.span)
        raise body.fail(
            "FL0307",
            "an axis is a name, as in `R[D]` or `R[D = 2]`",
            item.span,
            suggestion="put the size behind the name",
        )
    if item.eq is not None:
        if isinstance(item.eq, tree.Name) and item.eq.id == "ragged":
            raise body.fail(
                "FL0902", "ragged axes have no meaning yet", item.span, suggestion="give the axis a size and pad to it"
            )
        return left.id, static_size(body, item.eq)
    known = known_size(body, left.id)
    return left.id, known if known is None else checked_size(body, known, item.span)


def known_size(body: Body, name: str) -> int | None:
    value = body.find(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if name in body.axes:
        return body.axes[name]
    if name.endswith("'"):
        return known_size(body, name.rstrip("'"))
    return None


def static_size(body: Body, expr: tree.Expr) -> int:
    """The size of an axis, as written."""
    value = body.ev(expr)
    if isinstance(value, float) and not value.is_integer():
        raise body.fail(
            "FL0312", f"an axis would have the size {value:g}", expr.span,
            suggestion="choose sizes that divide", 
        )  # fmt: skip
    return checked_size(body, body.static_int(expr), expr.span)


def checked_size(body: Body, size: int, span: Span) -> int:
    if size < 0:
        raise body.fail("FL0307", f"an axis of size {size} makes no sense", span, suggestion="give at least 1")
    if size > limits.AXIS_SIZE:
        raise body.fail(
            "FL0901",
            f"an axis of size {size} exceeds the limit of {limits.AXIS_SIZE}",
            span,
            suggestion="choose a smaller size",
        )
    return size
