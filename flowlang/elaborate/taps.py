"""`v.tap(blocks[2..].V)` and `v.with(blocks[2..].V = values)`: named inner values of a net, read or replaced.

A place is a name of the net's body, or of one that it calls: `h`, `blocks[0].V`, `attention.q`. A name means what
it is bound to when its body ends. A list of networks, or a range of it, is as many places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowlang.elaborate.scope import name_help
from flowlang.elaborate.values import Declared, Instance, Poison, RangeValue, TapRequest, Tensor, describe
from flowlang.ir.graph import Region
from flowlang.ir.taps import Place, Taps, place_type
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

WORDS = ("tap", "with")
EXAMPLES = {"tap": "`v.tap(blocks[0].V)(x)`", "with": "`v.with(blocks[0].V = w)(x)`"}


def is_request(expr: tree.Expr) -> bool:
    """Whether a call's callee is `..tap` or `..with`, whose arguments are places."""
    return isinstance(expr, tree.Attribute) and expr.name in WORDS


def tapped(body: Body, value: Any, word: str, items: tuple[tree.Item, ...], span: Span) -> Any:
    """The network with what a call of it is to read or replace besides."""
    if isinstance(value, Poison):
        return value
    if word == "with" and isinstance(value, Instance | Declared) and value.kind in ("flow", "bijector"):
        raise body.fail(
            "FL0902",
            f"another part in {describe(value)} has no meaning yet",
            span,
            suggestion="make the part a parameter, and give it there",
        )
    if not isinstance(value, Instance) or value.kind not in ("net", "norm"):
        raise body.fail(
            "FL0211",
            f"`{word}` belongs to a network, and this is {describe(value)}",
            span,
            suggestion=f"as in {EXAMPLES[word]}",
        )
    if value.owner is None and not value.shared:
        value = body.capture(value)
    reads: list[tree.Expr] = []
    writes: list[tuple[tree.Expr, Any]] = []
    for item in items:
        if word == "with" and isinstance(item.left, tree.Name) and item.left.id == "parameters" and item.eq is not None:
            raise body.fail("FL0902", "a network with parameters that are given has no meaning yet", item.span,
                            suggestion="write the network as a `net` that takes its weights as tensors")  # fmt: skip
        fits = (
            item.left is not None
            and item.arrow is None
            and item.type is None
            and (item.eq is not None) == (word == "with")
        )
        if not fits or item.left is None:
            what = "places" if word == "tap" else "places with their values"
            raise body.fail("FL0202", f"`{word}` takes {what}", item.span, suggestion=f"as in {EXAMPLES[word]}")
        if item.eq is None:
            reads.append(item.left)
            continue
        found = body.ev(item.eq)
        if isinstance(found, Poison):
            return found
        writes.append((item.left, found))
    if not items:
        raise body.fail("FL0203", f"`{word}` names at least one place", span, suggestion=f"as in {EXAMPLES[word]}")
    known = value.taps or TapRequest()
    return replace(value, taps=TapRequest((*known.reads, *reads), (*known.writes, *writes)))


def resolve(body: Body, inst: Instance, region: Region, span: Span) -> tuple[Taps, list[int], list[int | None]]:
    """A request in a net's region: places, the values that replace, and how many values each word reads (None: one alone)."""
    assert inst.taps is not None
    reads: list[Place] = []
    shape: list[int | None] = []
    for expr in inst.taps.reads:
        places, many = places_of(body, region, expr)
        reads += places
        shape.append(len(places) if many else None)
    writes: list[Place] = []
    values: list[int] = []
    for expr, given in inst.taps.writes:
        places, many = places_of(body, region, expr)
        told = given if isinstance(given, list) else [given]
        if many != isinstance(given, list) or len(told) != len(places):
            count = f"{len(places)} values" if many else "one value"
            raise body.fail("FL0308", f"this is {count}, and {describe(given) if not isinstance(given, list) else f'{len(given)} are given'}", expr.span,
                            suggestion="give a list with one value for each place, as `tap` gives it")  # fmt: skip
        for place, v in zip(places, told, strict=True):
            writes.append(place)
            values.append(fitted(body, region, place, v, expr.span))
    for places in (reads, writes):
        if len(set(places)) != len(places):
            raise body.fail("FL0204", "one place is named twice", span, suggestion="name each place once")
    return Taps(tuple(reads), tuple(writes)), values, shape


def fitted(body: Body, region: Region, place: Place, value: Any, span: Span) -> int:
    """A value with the axes that the place has."""
    id = body.tensor(value, span)
    have, wanted = body.b.type(id), place_type(region, place)
    if set(have.axes) != set(wanted.axes) or have.kind != wanted.kind:
        raise body.fail("FL0301", f"the value at this place is `{wanted}`, and `{have}` is to replace it", span,
                        suggestion="give it the axes and sizes of the place")  # fmt: skip
    return body.b.op("order", id, names=wanted.names) if have.names != wanted.names else id


def places_of(body: Body, region: Region, expr: tree.Expr) -> tuple[list[Place], bool]:
    """The values that a place names, and whether it names a list of them."""
    found, many = walk(body, region, expr)
    out: list[Place] = []
    for calls, inner, thing in found:
        if not isinstance(thing, int):
            raise body.fail("FL0306", f"`{thing}` is a network, and a place is a value in one", expr.span,
                            suggestion=f"name a value of its body, as in `{thing}.{next(names_in(body, inner.children[thing].region), 'h')}`")  # fmt: skip
        out.append((*calls, thing))
    return out, many


Found = tuple[Place, Region, int | str]


def walk(body: Body, region: Region, expr: tree.Expr) -> tuple[list[Found], bool]:
    match expr:
        case tree.Name():
            things, many = named(body, region, expr.id, expr.span)
            return [((), region, t) for t in things], many
        case tree.Brackets() if len(expr.items) == 1 and expr.items[0].left is not None:
            found, many = walk(body, region, expr.value)
            index = body.ev(expr.items[0].left)
            if many and isinstance(index, RangeValue):
                return found[index.start : index.stop], True
            if many and isinstance(index, int) and not isinstance(index, bool) and -len(found) <= index < len(found):
                return [found[index]], False
            where = f"a list of {len(found)}" if many else "no list"
            raise body.fail("FL0307", f"this place is {where}, and {describe(index)} picks nothing of it", expr.span,
                            suggestion="as in `blocks[0]`, or `blocks[2..]` for all from the third on")  # fmt: skip
        case tree.Attribute():
            found, many = walk(body, region, expr.value)
            out: list[Found] = []
            for calls, at, thing in found:
                if isinstance(thing, int):
                    raise body.fail(
                        "FL0306",
                        "this place is a value, and has no names inside",
                        expr.span,
                        suggestion="only networks have places inside",
                    )
                call, inner = entered(body, at, thing, expr.span)
                things, several = named(body, inner, expr.name, expr.span)
                many = many or several
                out += [((*calls, call), inner, t) for t in things]
            return out, many
    raise body.fail(
        "FL0306",
        "this names no place",
        expr.span,
        suggestion=f"a place is a name of the network's body, as in {EXAMPLES['tap']}",
    )


def named(body: Body, region: Region, name: str, span: Span) -> tuple[list[int | str], bool]:
    """What a name of a region's body stands for: a value, a network, or a list of them."""
    thing = body.elab.places.get(region, {}).get(name)
    if thing is None and name in region.children:  # a call that has no name goes by its declaration's
        thing = name
    if thing is None:
        raise body.fail("FL0201", f"`{region.name}` has no value or network named `{name}`", span,
                        suggestion=name_help(name, names_in(body, region)))  # fmt: skip
    return (list(thing), True) if isinstance(thing, tuple) else ([thing], False)


def names_in(body: Body, region: Region) -> Iterator[str]:
    yield from body.elab.places.get(region, {})
    yield from region.children


def entered(body: Body, region: Region, child: str, span: Span) -> tuple[int, Region]:
    """The one call of a child, and the region it runs."""
    users = [n for n in region.graph if n.attrs.get("child") == child]
    inner = region.children[child].region
    plain = len(users) == 1 and users[0].op == "call" and users[0].attrs.get("method", "forward") == "forward"
    if not plain or inner.kind not in ("net", "norm") or "backward" in inner.rules:
        why = "is called more than once" if len(users) > 1 else "is no plain call of a network"
        raise body.fail("FL0902", f"`{child}` of `{region.name}` {why}: a place inside it has no meaning yet", span,
                        suggestion="write copies by `for`, as in `for b in blocks { h := b(h) }`, so that each is a place of its own")  # fmt: skip
    return users[0].id, inner


def record(body: Body) -> dict[str, Any]:
    """The names of a body that has ended: values as nodes, networks as children, lists as tuples of them."""

    def known(value: Any) -> Any:
        match value:
            case Tensor() if value.body is body:
                return value.id
            case Instance() if value.name in body.region.children:
                return value.name
            case list() if value and all((k := known(v)) is not None and not isinstance(k, tuple) for v in value):
                return tuple(known(v) for v in value)
        return None

    return {n: k for n, v in body.names.items() if (k := known(v)) is not None}
