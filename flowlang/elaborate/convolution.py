"""Convolutions, their transposes and pools over one to three named axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate.calls import Arguments
from flowlang.elaborate.networks import flag, free_name, keywords, split_arguments
from flowlang.elaborate.results import cut, pieces_of
from flowlang.elaborate.values import AppliedBuiltin, Builtin, BuiltinNet, Instance, Pending, Tensor
from flowlang.elaborate.weights import Fans, Holder, net_bias, net_weight
from flowlang.ir.types import TensorType
from flowlang.source import Span

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

OPTIONS = ("out", "kernel", "stride", "padding", "dilation", "groups", "bias", "weight", "start", "causal")
KERNEL_AXES = ("kd", "kh", "kw")


def numbers(body: Body, name: str, key: str, value: Any, count: int, least: int, span: Span) -> tuple[int, ...]:
    """One whole number for every axis of space, or a list of one for each."""
    values = value if isinstance(value, list) else [value] * count
    good = all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)
    if not good or len(values) != count:
        words = f"a whole number from {least} on" + (f", or a list of {count}" if count > 1 else "")
        raise body.fail(
            "FL0306", f"`{key}` of `{name}` is {words}", span, suggestion="give a whole number in that range"
        )
    return tuple(values)


def space_of(
    body: Body, name: str, t: TensorType, args: Arguments, inst_axes: Any, kernel: Any
) -> tuple[str, list[str]]:
    """The channel axis and the axes of space: as written, or the last ones (two of space where there are two)."""
    assert args.span is not None
    items = args.axes or inst_axes
    if items:
        channel, *space = [axis_rules.axis_name(body, i, name) for i in items]
    else:
        count = len(kernel) if isinstance(kernel, list) else min(t.rank - 1, 2)
        if count < 1 or t.rank < count + 1:
            raise body.fail(
                "FL0307",
                f"`{name}` takes channels and axes of space, and this value has {axis_rules.words(t)}",
                args.span,
                suggestion="as in `x: R[C, H, W]`",
            )
        channel, *space = t.names[-1 - count :]
    if not 1 <= len(space) <= 3:
        raise body.fail("FL0307", f"`{name}` takes a channel axis and one to three axes of space", args.span,
                        suggestion=f"as in `{name}[C, H, W](..)`")  # fmt: skip
    for n in (channel, *space):
        axis_rules.need_axis(body, t, n, args.span)
    return channel, space


def same(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Zeros that keep the size before striding; the larger half after an even window."""
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    return tuple((r // 2, r - r // 2) for r in reach)


def times_stride(
    kernel: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """What a transposed convolution cuts off so that a size n becomes n · stride; the larger half before."""
    spare = [(k - 1) * d + 1 - s for k, d, s in zip(kernel, dilation, stride, strict=True)]
    return tuple((max(r - r // 2, 0), r // 2 if r >= 0 else r) for r in spare)


def looking_back(
    body: Body, op: str, options: dict[str, Any], space: list[str], padding: tuple[tuple[int, int], ...], span: Span
) -> tuple[tuple[int, int], ...]:
    """`causal = "H W"`: along these axes all zeros stand before the first entry, so that no later one is read."""
    told = options["causal"]
    names = told.split() if isinstance(told, str) else []
    if op != "conv" or not names or any(n not in space for n in names):
        raise body.fail("FL0307", "`causal` of `conv` names axes of space", span,
                        suggestion=f'as in `conv(x, causal = "{" ".join(space)}")`')  # fmt: skip
    if "padding" in options:
        raise body.fail(
            "FL0306", "`causal` says where zeros stand; `padding` says it twice", span, suggestion="leave out `padding`"
        )
    return tuple((sum(p), 0) if s in names else p for s, p in zip(space, padding, strict=True))


def convolution(op: str) -> Any:
    transposed = op == "conv_transpose"

    def call(body: Body, inst: Instance, args: Arguments) -> Any:
        """`conv(x, out, kernel = 3)`: pads with zeros to keep the size; `conv_transpose` makes it stride times as large.

        `causal = "H W"` puts the zeros of a `conv` before the first entry along these axes.
        """
        assert args.span is not None
        span = args.span
        options = keywords(body, inst, args, OPTIONS)
        tensors, rest = split_arguments(args)
        if isinstance(args.keywords.get("weight"), Tensor) and not tensors and inst.arguments:
            raise body.fail(
                "FL0203",
                f"`{op}` needs the value that it is applied to",
                span,
                suggestion="as in `conv(x, 16, kernel = 3)`",
            )
        for v, where in rest:
            if isinstance(v, int) and not isinstance(v, bool) and v > 0:
                options["out"] = v
            else:
                raise body.fail(
                    "FL0306",
                    f"`{op}` takes the number of its output channels",
                    where,
                    suggestion="as in `conv(16, kernel = 3)`",
                )
        if not tensors:
            return Instance(inst.target, options, span, args.axes or inst.axes)
        x = body.tensor(*tensors[0])
        t = body.b.type(x)
        groups = numbers(body, op, "groups", options.get("groups", 1), 1, 1, span)[0]
        given = weight_given(body, options.get("weight"), transposed, groups, span)
        if given is not None:
            options["kernel"], options["out"] = list(given.kernel), given.out
        channel, space = space_of(body, op, t, args, inst.axes, options.get("kernel"))
        n = len(space)
        kernel = numbers(body, op, "kernel", options.get("kernel", 3), n, 1, span)
        stride = numbers(body, op, "stride", options.get("stride", 1), n, 1, span)
        dilation = numbers(body, op, "dilation", options.get("dilation", 1), n, 1, span)
        if "padding" in options:
            padding = tuple((p, p) for p in numbers(body, op, "padding", options["padding"], n, 0, span))
        else:
            padding = times_stride(kernel, dilation, stride) if transposed else same(kernel, dilation)
        if options.get("causal") is not None:
            padding = looking_back(body, op, options, space, padding, span)
        size = t.size(channel)
        if size % groups:
            raise body.fail(
                "FL0301",
                f"{size} channels do not split into {groups} groups",
                span,
                suggestion="choose a number of groups that divides both numbers of channels",
            )
        attrs: dict[str, Any] = {
            "channel": channel,
            "space": tuple(space),
            "stride": stride,
            "dilation": dilation,
            "padding": padding,
            "groups": groups,
        }

        def build(total: int) -> int:
            if total % groups:
                raise body.fail(
                    "FL0301",
                    f"{total} channels do not split into {groups} groups",
                    span,
                    suggestion="choose a number of groups that divides both numbers of channels",
                )
            holder = Holder(body, inst, op, span)
            out = free_name(t, f"{channel}^")
            window = tuple(zip(KERNEL_AXES[-n:], kernel, strict=True))
            fans = Fans(size // groups * math.prod(kernel), total // groups * math.prod(kernel))
            if given is not None:
                w = given.id
            else:
                pair = (
                    ((channel, size), (out, total // groups))
                    if transposed
                    else ((out, total), (channel, size // groups))
                )
                w = net_weight(holder, (*pair, *window), out, fans, options)
            inputs = [x, w]
            if flag(options.get("bias", True)):
                inputs.append(net_bias(holder, ((out, total),), fans, options))
            return body.b.op(op, *inputs, **attrs, span=span)

        if "out" in options:
            return Tensor(build(numbers(body, op, "out", options["out"], 1, 1, span)[0]), body)

        def resolve(wanted: list[Any]) -> list[Any]:
            pieces, total = pieces_of(body, wanted, set(t.names) - {channel}, span)
            return cut(body, build(total), channel, pieces, wanted, span)

        return Pending(resolve, span, op, lambda: resolve([TensorType(t.axes)])[0])

    return call


class GivenWeight:
    """A kernel that the author computes: its axes are the unit's, the inputs' and the window's, in this order.

    With axes `C'` and `C` these are the unit's and the inputs', wherever they stand, as in a matrix product.
    """

    def __init__(self, id: int, t: TensorType, transposed: bool, groups: int):
        self.id, self.kernel = id, t.shape[2:]
        self.out = t.shape[1] * groups if transposed else t.shape[0]


def weight_given(body: Body, value: Any, transposed: bool, groups: int, span: Span) -> GivenWeight | None:
    if not isinstance(value, Tensor):
        return None
    id = body.tensor(body.capture(value), span)
    t = body.b.type(id)
    primed = [n for n in t.names if t.has(f"{n}'")]
    if len(primed) == 1:
        pair = [f"{primed[0]}'", primed[0]]
        names = (*(reversed(pair) if transposed else pair), *(n for n in t.names if n not in pair))
        id = body.b.op("order", id, names=names, span=span)
        t = body.b.type(id)
    if not 3 <= t.rank <= 5 or body.graph[id].batched:
        raise body.fail(
            "FL0307",
            f"a kernel has two axes of channels and those of the window, and is one for all samples; this is `{t}`",
            span,
            suggestion="as in `param K: R[C', C, h = 3, w = 3]`",
        )
    return GivenWeight(id, t, transposed, groups)


# ---- pools --------------------------------------------------------------------------------------


def pool(name: str, op: str) -> Any:
    def call(body: Body, args: Arguments) -> Any:
        """`max_pool(x, 2)`: the window moves by its own size unless `stride` is given; nothing is padded."""
        assert args.span is not None
        tensors = [(v, s) for v, s in zip(args.positional, args.spans, strict=True) if isinstance(v, Tensor | Pending)]
        statics = [v for v in args.positional if not isinstance(v, Tensor | Pending)]
        if not tensors:
            return AppliedBuiltin(
                POOLS[name], tuple(args.positional), tuple(args.keywords.items()), args.axes, args.span
            )
        given = dict(args.keywords)
        if len(statics) == 1 and "kernel" not in given:
            given["kernel"] = statics.pop()
        if len(tensors) > 1 or statics or "kernel" not in given or set(given) - {"kernel", "stride", "padding"}:
            raise body.fail("FL0202", f"`{name}` takes a value, its window, and `stride` and `padding`", args.span,
                            suggestion=f"as in `{name}(x, 3, stride = 2, padding = 1)`")  # fmt: skip
        x = body.tensor(*tensors[0])
        t = body.b.type(x)
        if args.axes:
            space = [axis_rules.axis_name(body, i, name) for i in args.axes]
        else:
            _, space = space_of(body, name, t, args, (), given["kernel"])
        for s in space:
            axis_rules.need_axis(body, t, s, args.span)
        n = len(space)
        kernel = numbers(body, name, "kernel", given["kernel"], n, 1, args.span)
        stride = numbers(body, name, "stride", given.get("stride", list(kernel)), n, 1, args.span)
        padding = numbers(body, name, "padding", given.get("padding", 0), n, 0, args.span)
        return body.node(
            op, x, space=tuple(space), kernel=kernel, stride=stride, dilation=(1,) * n, padding=tuple((p, p) for p in padding),
            span=args.span,
        )  # fmt: skip

    return call


POOLS = {name: Builtin(name, pool(name, op)) for name, op in (("max_pool", "max_pool"), ("avg_pool", "mean_pool"))}
CONVOLUTIONS = {op: BuiltinNet(op, ("x", "out", "kernel"), convolution(op)) for op in ("conv", "conv_transpose")}
