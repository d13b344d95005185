"""Networks that make parameters in Python: `linear` and `autoregressive_mlp` (`conv` stands in convolution.py).

All others (`mlp`, `transformer`, `conv_net`, ...) are library entries written in the language.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate.calls import Arguments, Formal, join_inputs
from flowlang.elaborate.results import cut, pieces_of, wanted_axes
from flowlang.elaborate.types import static_size
from flowlang.elaborate.values import (
    Absent,
    BuiltinNet,
    Instance,
    Option,
    Pending,
    Tensor,
)
from flowlang.elaborate.weights import Axes, Fans, Holder, make_param, net_bias, net_weight, start_of
from flowlang.ir.types import TensorType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body


def free_name(t: TensorType, base: str) -> str:
    name = base
    while t.has(name):
        name += "_"
    return name


def split_arguments(args: Arguments) -> tuple[list[tuple[Any, Span]], list[tuple[Any, Span]]]:
    pairs = list(zip(args.positional, args.spans, strict=True))
    tensors = [(v, s) for v, s in pairs if isinstance(v, Tensor | Pending | Absent)]
    return tensors, [p for p in pairs if p not in tensors]


def keywords(body: Body, inst: Instance, args: Arguments, known: tuple[str, ...]) -> dict[str, Any]:
    args.only(body, inst.target.name, known)
    merged = {**inst.arguments, **args.keywords}
    return {k: (v.word if isinstance(v, Option) else v) for k, v in merged.items()}


def flag(value: Any) -> bool:
    return not (value is False or isinstance(value, Absent))


# ---- linear -------------------------------------------------------------------------------------


def linear(body: Body, inst: Instance, args: Arguments) -> Any:
    """`linear[D -> E](x)`: consumes D, or the only axis absent from the declared result."""
    assert args.span is not None
    span = args.span
    options = keywords(body, inst, args, ("bias", "weight", "start"))
    tensors, rest = split_arguments(args)
    if rest:
        raise body.fail(
            "FL0202",
            "`linear` takes its sizes in brackets, as in `linear[D -> E = 64]`",
            rest[0][1],
            suggestion="move the sizes into the brackets",
        )
    items = args.axes or inst.axes
    if not tensors:
        return Instance(inst.target, options, span, items)  # a fresh one
    value, where = tensors[0]
    x = body.tensor(value, where)
    item = items[0] if items else None
    source = (
        axis_rules.axis_name(body, tree.Item(item.left, span=item.span)) if item and item.left is not None else None
    )
    before = {a.name: a.size for a in body.b.type(x).axes}  # `D -> D` has the first input's size, others joined or not
    if len(tensors) > 1:
        first = source or (body.b.type(x).names[0] if body.b.type(x).rank else "D")
        formal = Formal("x", [(first, tree.Item(None, span=span))], False, "real", False, False)
        x = join_inputs(body, formal, x, tensors[1:], {first: first}, span, "linear")
    if source is None and not body.b.type(x).rank:  # a number, as a time: an axis of size 1
        source = "one"
        x = body.b.op("expand", x, axes=((source, 1),), span=span)
    t = body.b.type(x)
    if source is not None:
        axis_rules.need_axis(body, t, source, span)

    def resolve(wanted: list[Any]) -> list[Any]:
        axis = source
        if axis is None:
            named = {n for w in wanted for n, _ in wanted_axes(body, w)}
            absent = [n for n in t.names if n not in named]
            if len(absent) != 1:
                if t.rank == 1:
                    absent = list(t.names)
                else:
                    raise body.fail(
                        "FL0307", "`linear` must be told which axis it consumes", span,
                        suggestion=f"as in `linear[{t.names[-1] if t.names else 'D'}](..)`",
                    )  # fmt: skip
            axis = absent[0]
        keep = set(t.names) - {axis}
        pieces, total = pieces_of(body, wanted, keep, span)
        flat = linear_node(body, inst, x, axis, total, options, span)
        return cut(body, flat, free_name(t, "out"), pieces, wanted, span)

    if item is not None and item.arrow is not None:
        if isinstance(item.arrow, tree.Paren) and not item.arrow.items:
            axis = source or t.names[-1]
            return resolve([TensorType(t.without([axis]).axes)])[0]
        if not isinstance(item.arrow, tree.Name):
            raise body.fail("FL0307", "`linear` makes one axis", item.span, suggestion="as in `linear[D -> E = 64]`")
        size: int | None
        if item.arrow_eq is not None:
            size = static_size(body, item.arrow_eq)
        elif item.arrow.id == source:
            size = before.get(source, t.size(source))
        else:
            known = body.find(item.arrow.id)
            size = known if isinstance(known, int) else body.axes.get(item.arrow.id)
        if size is not None:
            axis = source or (t.names[-1] if t.rank else "D")
            if not t.rank:
                x = body.b.op("expand", x, axes=(("D", 1),))
                t = body.b.type(x)
            # The new axis stands where the consumed one stood.
            names = [(item.arrow.id if a.name == axis else a.name, size if a.name == axis else a.size) for a in t.axes]
            if len({n for n, _ in names}) != len(names):
                raise body.fail(
                    "FL0307",
                    f"axis `{item.arrow.id}` is there already",
                    item.span,
                    suggestion="choose another name for the new axis",
                )
            set(t.names) - {axis}
            pieces = [([(item.arrow.id, size)], [n for n, _ in names])]
            flat = linear_node(body, inst, x, axis, size, options, span)
            return cut(body, flat, free_name(t, "out"), pieces, [TensorType.of(*names)], span)[0]

    def same() -> Any:
        axis = source or (t.names[-1] if t.rank == 1 else None)
        if axis is None or (item is not None and item.arrow is not None):
            raise body.fail(
                "FL0304", "the output size of `linear` is open", span, suggestion="as in `linear[D -> E = 64]`"
            )
        return resolve([TensorType(t.axes)])[0] if source is None else resolve_same(axis)

    def resolve_same(axis: str) -> Any:
        flat = linear_node(body, inst, x, axis, t.size(axis), options, span)
        pieces = [([(axis, t.size(axis))], list(t.names))]
        return cut(body, flat, free_name(t, "out"), pieces, [TensorType(t.axes)], span)[0]

    return Pending(resolve, span, "linear", same if t.rank else None)


def linear_node(body: Body, inst: Instance, x: int, axis: str, total: int, options: dict[str, Any], span: Span) -> int:
    """Σ_axis x · W + b with a flat result axis `out`."""
    t = body.b.type(x)
    out, fan = free_name(t, "out"), t.size(axis)
    fans, holder = Fans(fan, total), Holder(body, inst, "linear", span)
    w = net_weight(holder, ((out, total), (axis, fan)), out, fans, options)
    if inst.lipschitz is not None:
        w = body.b.op("norm_bounded", w, axes=(axis,), bound=inst.lipschitz, span=span)
    y = body.b.op("contract", x, w, axes=(axis,), span=span)
    if not flag(options.get("bias", True)):
        return y
    return body.b.op("add", y, net_bias(holder, ((out, total),), fans, options), span=span)


# ---- autoregressive MLP -------------------------------------------------------------------------


def autoregressive_mlp(body: Body, inst: Instance, args: Arguments) -> Any:
    """Masked MLP (MADE, Germain et al. 2015): the result at index i of the axis depends on x before i only.

    Every hidden unit has a degree d and sees inputs 0..d; outputs at i see hidden units of degree < i.
    Context joins the first layer unmasked. `blocks` pre-activation residual blocks of two masked layers
    follow the hidden layers (Durkan et al. 2019).
    """
    assert args.span is not None
    span = args.span
    options = keywords(body, inst, args, ("hidden", "act", "weight", "blocks"))
    tensors, rest = split_arguments(args)
    for v, where in rest:
        if isinstance(v, list):
            options["hidden"] = v
        elif isinstance(v, int) and not isinstance(v, bool):
            options["hidden"] = [*options.get("hidden", []), v]
        else:
            raise body.fail(
                "FL0306",
                "`autoregressive_mlp` takes the widths of its hidden layers",
                where,
                suggestion="as in `autoregressive_mlp[D](x, [64, 64])`",
            )
    items = args.axes or inst.axes
    if not tensors:
        return Instance(inst.target, options, span, items)  # a fresh one
    x = body.tensor(*tensors[0])
    t = body.b.type(x)
    axis = axis_rules.axis_name(body, items[0], "autoregressive_mlp") if items else t.names[0] if t.rank == 1 else None
    if axis is None:
        raise body.fail(
            "FL0307", "`autoregressive_mlp` must be told its axis", span, suggestion="as in `autoregressive_mlp[D](x)`"
        )
    axis_rules.need_axis(body, t, axis, span)
    context = [body.tensor(v, s) for v, s in tensors[1:] if not isinstance(v, Absent)]
    hidden, blocks = options.get("hidden", [64, 64]), options.get("blocks", 0)
    if not isinstance(hidden, list) or not all(isinstance(h, int) and h > 0 for h in hidden):
        raise body.fail(
            "FL0306", "`hidden` is a list of widths, as in `[64, 64]`", span, suggestion="as in `mlp(64, 64)`"
        )
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 0 or (blocks and not hidden):
        raise body.fail(
            "FL0306",
            "`blocks` is a number of residual blocks, after at least one hidden layer",
            span,
            suggestion="as in `autoregressive_mlp[D](x, hidden = [64], blocks = 1)`",
        )
    made = Made(Holder(body, inst, "made", span), axis, context, options)

    def resolve(wanted: list[Any]) -> list[Any]:
        pieces, total = pieces_of(body, wanted, set(t.names), span)
        body.elab.count_items(body, t.size(axis) + sum(hidden), span)  # degrees, one for each unit
        y, per = made.build(x, hidden, blocks, total)
        return cut(body, y, per, pieces, wanted, span)

    return Pending(resolve, span, "autoregressive_mlp", lambda: resolve([TensorType(t.axes)])[0])


class Made:
    """The layers of one `autoregressive_mlp`."""

    def __init__(self, holder: Holder, axis: str, context: list[int], options: dict[str, Any]) -> None:
        self.holder, self.body, self.span = holder, holder.body, holder.span
        self.axis, self.context, self.options = axis, context, options
        self.count = 0

    def weight(self, part: str, axes: Axes, start: Any) -> int:
        return self.holder.weight(
            part, axes, lambda home, name: make_param(home, f"{name}_{part}", axes, start, self.span)
        )

    def act(self, h: int) -> int:
        from flowlang.elaborate.calls import apply

        body = self.body
        act = self.options.get("act") or body.elab.global_name("silu")
        return body.tensor(apply(body, act, [Tensor(h, body)], {}, self.span), self.span)

    def layer(
        self, h: int, before: str, rows: tuple[tuple[str, int], ...], degrees: tuple[tuple[int, ...], tuple[int, ...]],
        name: str, *, strict: bool, start: Any, bias: Any,
    ) -> int:  # fmt: skip
        """Σ W h + b over `before`, with W zero where the row's degree (the last axis of `rows`) is too small."""
        body, span = self.body, self.span
        size = body.b.type(h).size(before)
        w = self.weight(f"weight{name}", (*rows, (before, size)), start)
        w = body.b.op(
            "masked", w, row=rows[-1][0], col=before, row_degrees=degrees[0], col_degrees=degrees[1], strict=strict
        )
        b = self.weight(f"bias{name}", rows, bias)
        return body.b.op("add", body.b.op("contract", h, w, axes=(before,), span=span), b, span=span)

    def hidden_layer(
        self, h: int, before: str, width: int, known: tuple[int, ...], own: tuple[int, ...]
    ) -> tuple[int, str]:
        self.body.elab.count_round(self.body, self.span)  # layers are written out
        self.count += 1
        unit = free_name(self.body.b.type(h), f"H{self.count}")
        start = start_of(self.body, None, Fans(self.body.b.type(h).size(before), width), self.span)
        name = str(self.count)
        h = self.layer(h, before, ((unit, width),), (own, known), name, strict=False, start=start, bias=start)
        return h, unit

    def build(self, x: int, hidden: list[int], blocks: int, total: int) -> tuple[int, str]:
        """`total` values for each index of the axis, and the name of their axis, which comes first."""
        body, span, axis = self.body, self.span, self.axis
        size = body.b.type(x).size(axis)
        h, before, degrees = x, axis, tuple(range(size))
        for k, width in enumerate(hidden):
            own = tuple(j * max(size - 1, 1) // width for j in range(width))
            if k:
                h = self.act(h)
            h, before = self.hidden_layer(h, before, width, degrees, own)
            degrees = own
            if k == 0:
                for j, c in enumerate(self.context):
                    h = self.add_context(h, c, before, width, f"context{j + 1}")
        for _ in range(blocks):
            width, inner, unit = hidden[-1], h, before
            for _ in range(2):
                inner, unit = self.hidden_layer(self.act(inner), unit, width, degrees, degrees)
            h = body.b.op("add", h, body.b.op("rename", inner, pairs=((unit, before),), span=span), span=span)
        if hidden:
            h = self.act(h)
        made = body.b.type(h)
        out, per = free_name(made, f"{axis}^"), free_name(made, "out")
        scale = self.options.get("weight")
        # The axis comes last, so that each of the `total` values is a contiguous slice.
        y = self.layer(
            h, before, ((per, total), (out, size)), (tuple(range(size)), degrees), "_out", strict=True,
            start=start_of(body, scale, Fans(made.size(before), total), span), bias=0.0,
        )  # fmt: skip
        if not hidden:
            for j, c in enumerate(self.context):
                y = self.add_context(y, c, per, total, f"context{j + 1}")
        return body.b.op("rename", y, pairs=((out, axis),), span=span), per

    def add_context(self, h: int, c: int, unit: str, width: int, name: str) -> int:
        """h plus an unmasked linear map of the context."""
        body, span = self.body, self.span
        tc = body.b.type(c)
        shared = {n for n in tc.names if body.b.type(h).has(n)}
        own = [n for n in tc.names if n not in shared]
        if not own:
            if tc.rank:  # the context has the same axis names: it enters as a vector of its own
                pairs = tuple((n, f"{n}_given") for n in tc.names)
                return self.add_context(h, body.b.op("rename", c, pairs=pairs), unit, width, name)
            c = body.b.op("expand", c, axes=(("given", 1),))
            own, tc = ["given"], body.b.type(c)
        fan = math.prod(tc.size(n) for n in own)
        start = start_of(body, None, Fans(fan, width), span)
        w = self.weight(name, ((unit, width), *((n, tc.size(n)) for n in own)), start)
        return body.b.op("add", h, body.b.op("contract", c, w, axes=tuple(own), span=span), span=span)


NETWORKS: dict[str, Any] = {
    "linear": BuiltinNet("linear", ("x",), linear),
    "autoregressive_mlp": BuiltinNet("autoregressive_mlp", ("x", "hidden"), autoregressive_mlp),
}
