"""One flat result of a network as the several values that are wanted of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate.values import Tensor, TypeSpec
from flowlang.ir.types import TensorType
from flowlang.source import Span

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

Piece = tuple[list[tuple[str, int]], list[str]]


def wanted_axes(body: Body, w: Any) -> list[tuple[str, int | None]]:
    if isinstance(w, TensorType):
        return [(a.name, a.size) for a in w.axes]
    assert isinstance(w, TypeSpec)
    axes = list(w.axes)
    if w.rest:
        axes[w.rest_at : w.rest_at] = [(a.name, a.size) for a in body.rest]
    return axes


def pieces_of(body: Body, wanted: list[Any], keep: set[str], span: Span) -> tuple[list[Piece], int]:
    """For each wanted result, its axes that the network makes; and the number of values in all."""
    pieces: list[Piece] = []
    total = 0
    for w in wanted:
        axes = wanted_axes(body, w)
        part: list[tuple[str, int]] = []
        for n, s in axes:
            if n in keep:
                continue
            if s is None:
                raise body.fail("FL0310", f"the size of axis `{n}` is open", span, suggestion=f"write `{n} = ...`")
            part.append((n, s))
        pieces.append((part, [n for n, _ in axes]))
        total += math.prod(s for _, s in part)
    return pieces, total


def cut(body: Body, id: int, axis: str, pieces: list[Piece], wanted: list[Any], span: Span) -> list[Any]:
    """Cuts a flat result along `axis` into the wanted values."""
    out: list[Any] = []
    start = 0
    for (part, order), w in zip(pieces, wanted, strict=True):
        count = math.prod(s for _, s in part)
        v = id
        if len(pieces) > 1:
            v = body.b.op("slice", v, axis=axis, start=start, stop=start + count, span=span)
        start += count
        if not part:
            v = body.b.op("pick", v, axis=axis, index=0, span=span)
        elif len(part) == 1:
            if part[0][0] != axis:
                v = body.b.op("rename", v, pairs=((axis, part[0][0]),), span=span)
        else:
            v = body.b.op("split", v, axis=axis, into=tuple(part), span=span)
        have = body.b.type(v).names
        names = tuple(n for n in order if n in have) + tuple(n for n in have if n not in order)
        if names != have:
            v = body.b.op("order", v, names=names, span=span)
        out.append(axis_rules.conform(body, Tensor(v, body), w, span) if isinstance(w, TypeSpec) else Tensor(v, body))
    return out
