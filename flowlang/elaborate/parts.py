"""Updates of a part: `x[M = k] := v` is x with v at the index k, or in a range, of the axis M."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate.values import Poison, Tensor
from flowlang.ir.types import TensorType
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body


def whole(body: Body, target: tree.Target, value: int) -> Tensor | Poison:
    """The whole value of the target's name, whose part at the index is `value`."""
    name = tree.Name(target.name, span=target.span)
    old, part = body.ev(name), body.ev(tree.Brackets(name, target.index, span=target.span))
    if isinstance(old, Poison) or isinstance(part, Poison):
        return Poison()
    if not isinstance(old, Tensor) or not isinstance(part, Tensor):
        raise body.fail(
            "FL0306", "a part is updated of a tensor alone", target.span, suggestion="bind the name to a tensor first"
        )
    if any(i.arrow is not None or i.eq is None or not isinstance(i.left, tree.Name) for i in target.index):
        raise body.fail(
            "FL0307",
            "what is updated is an index or a range of an axis",
            target.span,
            suggestion="as in `x[M = k] := v`",
        )
    b = body.b
    x, t, inner, given = old.id if old.body is body else body.capture(old).id, old.type, part.type, b.type(value)
    for a in given.axes:
        if not inner.has(a.name) or inner.size(a.name) != a.size:
            raise body.fail("FL0301", f"this part is `{inner}`, and the new value `{given}`", target.span,
                            suggestion="give a value of the part's axes and sizes, or of fewer axes")  # fmt: skip
    ranges = [i for i in target.index if isinstance(i.eq, tree.Range)]
    if ranges and len(target.index) > 1:
        raise body.fail("FL0902", "an update of a range and of an index at once has no meaning yet", target.span,
                        suggestion="update the range of one axis, or an index of each")  # fmt: skip
    if ranges:
        item = ranges[0]
        assert isinstance(item.eq, tree.Range)
        axis = axis_rules.axis_name(body, tree.Item(item.left, span=item.span))
        n, size = t.size(axis), inner.size(axis)
        start = 0 if item.eq.start is None else body.static_int(item.eq.start)
        start += n if start < 0 else 0
        full = b.expand(value, TensorType(inner.axes, given.kind))
        parts = [b.op("slice", x, axis=axis, start=0, stop=start)] if start else []
        parts += [full, *([b.op("slice", x, axis=axis, start=start + size, stop=n)] if start + size < n else [])]
        return Tensor(b.op("join", *parts, axis=axis, span=target.span) if len(parts) > 1 else full, body)
    chosen: int | None = None
    for item in target.index:
        assert item.eq is not None
        axis = axis_rules.axis_name(body, tree.Item(item.left, span=item.span))
        at = body.ev(item.eq)
        if isinstance(at, int) and at < 0:
            at += t.size(axis)
        here = b.op("eq", b.op("index", axis=axis, size=t.size(axis), span=item.span), body.tensor(at, item.span))
        chosen = here if chosen is None else b.op("and", b.expand(chosen, t), b.expand(here, t))
    assert chosen is not None
    kept = b.op("where", b.expand(chosen, t), b.expand(value, TensorType(t.axes, given.kind)), x, span=target.span)
    return Tensor(kept, body)
