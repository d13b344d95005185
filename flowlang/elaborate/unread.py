"""The branch of a static `if` that is not taken: its names are looked up all the same.

Nothing in it is evaluated, since its sizes and types may make sense only where it is taken. A name that no
scope knows is an error in any case, and a name that is read there counts as read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from flowlang.elaborate.calls import option_words
from flowlang.elaborate.later import introduced_axes, later_family, walk
from flowlang.elaborate.scope import name_help
from flowlang.elaborate.taps import is_request
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body


def look_up_names(body: Body, statements: tuple[tree.Statement, ...]) -> None:
    """Reports each unknown name of a branch once."""
    if body.module.source.library or not statements:
        return
    own = bound_inside(statements)
    visible = body.visible_names() | own | introduced_axes(statements) | body.module.broken
    told: set[str] = set()
    for name in value_names(body, statements):
        mark_read(body, name.id)
        if name.id in visible or name.id in told or later_family(name.id) or body.is_lost(name.id):
            continue
        told.add(name.id)
        body.report(
            body.diagnostic("FL0201", f"unknown name `{name.id}`", name.span, suggestion=name_help(name.id, visible))
        )


def mark_read(body: Body, name: str) -> None:
    scope: Body | None = body
    while scope is not None:
        if name in scope.names:
            scope.used.add(name)
            return
        scope = scope.scope


def bound_inside(statements: tuple[tree.Statement, ...]) -> set[str]:
    names: set[str] = set()
    for node in walk(statements):
        match node:
            case tree.Target() | tree.Entry() | tree.Parameter() | tree.Declaration():
                names.add(node.name)
            case tree.For() | tree.Comprehension() | tree.Invalid():
                names |= set(node.names)
    return names


def value_names(body: Body, node: Any) -> Iterator[tree.Name]:
    """The names in a tree that stand for values: no axes, types, keywords, words of options or starts."""
    todo = [node]
    while todo:
        at = todo.pop()
        match at:
            case tuple() | list():
                todo.extend(reversed(at))
            case tree.Name():
                yield at
            case tree.Require():
                pass
            case tree.Bind():
                todo.extend((at.values, [i.eq for t in at.targets for i in t.index]))
            case tree.Entry():
                todo.append(at.value if at.op == "=" else None)
            case tree.Parameter():
                todo.append(None if is_word(at.default) else at.default)
            case tree.Result():
                pass
            case tree.Attribute():
                todo.append(at.value)
            case tree.Brackets():
                todo.extend((at.value, [part for i in at.items for part in axis_values(i)]))
            case tree.Call():
                todo.extend((at.fn, list(arguments(body, at))))
            case tree.Paren():
                todo.append([i.left for i in at.items])
            case _ if is_dataclass(at) and type(at).__module__ == tree.__name__:
                todo.append([getattr(at, f.name) for f in fields(at)])


def is_word(expr: tree.Expr | None) -> bool:
    return isinstance(expr, tree.Name)  # it may be a word of the parameter's `one_of`


def axis_values(item: tree.Item) -> Iterator[tree.Expr | None]:
    """Sizes, indices and ranges in brackets; a bare name is an axis."""
    if isinstance(item.left, tree.Binary):
        yield item.left.right  # `C / groups`
    elif isinstance(item.left, tree.Range):
        yield item.left
    yield item.eq
    yield item.arrow_eq
    if isinstance(item.arrow, tree.Paren):
        for part in item.arrow.items:
            yield part.eq


def arguments(body: Body, call: tree.Call) -> Iterator[tree.Expr | None]:
    words: dict[str, tuple[str, ...]] | None = None
    callee = call.fn.value if isinstance(call.fn, tree.Brackets) else call.fn
    if isinstance(callee, tree.Name):
        fn = body.module.names.get(callee.id) or body.elab.global_name(callee.id)
        words = option_words(fn) if fn is not None else None
    if is_request(callee):  # what stands in them are names of the network's body
        yield from (item.eq for item in call.items)
        return
    for item in call.items:
        keyword = item.eq is not None and isinstance(item.left, tree.Name)
        if not keyword:
            yield item.left
        elif not isinstance(item.eq, tree.Name) or (words is not None and item.left.id not in words):  # type: ignore[union-attr]
            yield item.eq
        yield item.arrow
