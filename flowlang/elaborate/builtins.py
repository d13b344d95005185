"""Functions of the language that are ops, or that make structure: nothing here knows a library entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate.calls import Arguments, apply
from flowlang.elaborate.convolution import CONVOLUTIONS, POOLS
from flowlang.elaborate.derivatives import differentiated, frozen
from flowlang.elaborate.fields import INTEGRATE_OPTIONS, integrate
from flowlang.elaborate.followers import follower
from flowlang.elaborate.forms import example
from flowlang.elaborate.grids import GRIDS
from flowlang.elaborate.networks import NETWORKS
from flowlang.elaborate.series import SERIES_OPTIONS, residual_log_det
from flowlang.elaborate.stochastic import draws
from flowlang.elaborate.types import static_size
from flowlang.elaborate.values import (
    ABSENT,
    POISON,
    Absent,
    AppliedBuiltin,
    Bracketed,
    Builtin,
    Declared,
    DistributionValue,
    FirstBatch,
    Instance,
    Pending,
    Poison,
    Tensor,
    Tuple,
    describe,
)
from flowlang.elaborate.weights import SCHEMES, scheme
from flowlang.ir.distributions import DISTRIBUTIONS, Distribution, categorical, mixture
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Update
from flowlang.ir.interval import REAL, Interval
from flowlang.ir.ops import OPS
from flowlang.ir.ops.splines import SPLINES
from flowlang.ir.types import TensorType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

Fn = Callable[["Body", Arguments], Any]


# ---- helpers ------------------------------------------------------------------------------------


def span(args: Arguments) -> Span:
    assert args.span is not None
    return args.span


def expect(
    body: Body, args: Arguments, name: str, least: int, most: int | None = None, words: tuple[str, ...] = ()
) -> None:
    """Counts positional arguments and refuses unknown keywords."""
    args.only(body, name, words)
    most = least if most is None else most
    if not least <= len(args.positional) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise body.fail(
            "FL0203",
            f"`{name}` takes {wanted} values, and gets {len(args.positional)}",
            span(args),
            suggestion=example(name),
        )


def axis_list(body: Body, args: Arguments, name: str) -> list[str]:
    return [axis_rules.axis_name(body, i, name) for i in args.axes]


def one_axis(body: Body, args: Arguments, t: TensorType, name: str) -> str:
    names = axis_list(body, args, name)
    if not names and t.rank == 1:
        return t.names[0]
    if len(names) != 1:
        raise body.fail(
            "FL0307", f"`{name}` works along one axis, and it must be named", span(args),
            suggestion=f"as in `{name}[{t.names[0] if t.names else 'D'}](..)`",
        )  # fmt: skip
    axis_rules.need_axis(body, t, names[0], span(args))
    return names[0]


def operand(body: Body, args: Arguments, k: int = 0) -> int:
    return body.tensor(args.positional[k], args.spans[k])


# ---- elementwise --------------------------------------------------------------------------------

UNARY = [
    "exp",
    "log",
    "log1p",
    "expm1",
    "sqrt",
    "abs",
    "sign",
    "square",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "asinh",
    "tanh",
    "atanh",
    "atan",
    "sigmoid",
    "logit",
    "softplus",
    "softplus_inverse",
    "relu",
    "selu",
    "silu",
    "gelu",
    "erf",
    "erfinv",
    "floor",
    "round",
    "reciprocal",
]

STATIC_MATH: dict[str, Callable[[float], float]] = {
    "exp": math.exp, "log": math.log, "log1p": math.log1p, "expm1": math.expm1, "sqrt": math.sqrt, "abs": abs,
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "sinh": math.sinh, "cosh": math.cosh, "tanh": math.tanh,
    "floor": lambda v: math.floor(v), "round": lambda v: round(v), "square": lambda v: v * v,
}  # fmt: skip


def unary(name: str) -> Fn:
    def call(body: Body, args: Arguments) -> Any:
        expect(body, args, name, 1)
        value = args.positional[0]
        if isinstance(value, Pending):
            return body.later(value, lambda v: body.node(name, body.tensor(v, args.spans[0]), span=span(args)))
        if isinstance(value, int | float) and not isinstance(value, bool) and name in STATIC_MATH:
            try:
                return STATIC_MATH[name](value)
            except (ValueError, OverflowError):
                raise body.fail(
                    "FL0305",
                    f"`{name}` is not defined at {value:g}",
                    span(args),
                    suggestion="choose a number in its domain",
                ) from None
        return body.node(name, operand(body, args), span=span(args))

    return call


def slope_function(name: str, attr: str, default: float) -> Fn:
    """`leaky_relu(x)`, `leaky_relu(x, 0.1)`, or `leaky_relu(0.1)` waiting for its tensor."""

    def call(body: Body, args: Arguments) -> Any:
        numbers = [v for v in args.positional if isinstance(v, int | float)]
        tensors = [(v, s) for v, s in zip(args.positional, args.spans, strict=True) if isinstance(v, Tensor | Pending)]
        if not tensors:
            return AppliedBuiltin(
                BUILTINS[name], tuple(args.positional), tuple(args.keywords.items()), args.axes, span(args)
            )
        expect(body, args, name, 1, 2, (attr,))
        value = float(args.keywords.get(attr, numbers[0] if numbers else default))
        x, where = tensors[0]
        if isinstance(x, Pending):
            return body.later(x, lambda v: body.node(name, body.tensor(v, where), span=span(args), **{attr: value}))
        return body.node(name, body.tensor(x, where), span=span(args), **{attr: value})

    return call


def clamp(body: Body, args: Arguments) -> Any:
    expect(body, args, "clamp", 3)
    lo, hi = args.positional[1:]
    if not all(isinstance(v, int | float) for v in (lo, hi)):
        raise body.fail(
            "FL0305", "`clamp` takes two numbers after its value", span(args), suggestion="as in `clamp(x, -1, 1)`"
        )
    return body.node("clamp", operand(body, args), lo=float(lo), hi=float(hi), span=span(args))


def where(body: Body, args: Arguments) -> Any:
    expect(body, args, "where", 3)
    a, b, c = (operand(body, args, k) for k in range(3))
    made = body.node("where", a, b, c, span=span(args))
    if isinstance(args.positional[0], bool):  # known while compiling, as where an option is one of the conditions
        chosen = body.b.expand(b if args.positional[0] else c, made.type)
        return Tensor(chosen, body) if body.b.type(chosen) == made.type else made
    return made


def surrogate(body: Body, args: Arguments) -> Any:
    """`surrogate(value = z > 0.5, gradient = s)`: the one's value with the other's gradient."""
    names = ("value", "gradient")
    expect(body, args, "surrogate", 0, 2, names)
    given = {**dict(zip(names, args.positional, strict=False)), **args.keywords}
    if set(given) != set(names):
        raise body.fail(
            "FL0203",
            "`surrogate` takes `value` and `gradient`",
            span(args),
            suggestion="as in `surrogate(value = step, gradient = sigmoid(x))`",
        )
    return body.node("surrogate", *(body.tensor(given[n], span(args)) for n in names), span=span(args))


def binary(name: str) -> Fn:
    def call(body: Body, args: Arguments) -> Any:
        expect(body, args, name, 2)
        a, b = args.positional
        if isinstance(a, int | float) and isinstance(b, int | float):
            if name == "mod":
                if b == 0:
                    raise body.fail("FL0305", "`mod` by zero", span(args), suggestion="choose another divisor")
                return a % b
            return min(a, b) if name == "min" else max(a, b)
        return body.node(name, operand(body, args), operand(body, args, 1), span=span(args))

    return call


def rotate(body: Body, args: Arguments) -> Any:
    """`rotate(x, t)`: the angle x turned by t, kept in [-π, π)."""
    expect(body, args, "rotate", 2)
    return body.node("rotate", operand(body, args), operand(body, args, 1), span=span(args))


def extremum(name: str) -> Fn:
    """`max(a, b)` elementwise; `max[D](x)` reduces; `max(list)` of numbers."""

    def call(body: Body, args: Arguments) -> Any:
        if args.axes or (len(args.positional) == 1 and isinstance(args.positional[0], Tensor)):
            return reduction(f"reduce_{name}")(body, args)
        if len(args.positional) == 1 and isinstance(args.positional[0], list):
            return (max if name == "max" else min)(args.positional[0])
        return binary(name)(body, args)

    return call


# ---- reductions ---------------------------------------------------------------------------------


POOLED = ("mean", "var", "std", "sum", "max", "min")  # over the batch too


def reduced_axes(body: Body, args: Arguments, t: TensorType, name: str) -> tuple[str, ...]:
    if not args.axes:
        return t.names
    names: list[str] = []
    for item in args.axes:
        if isinstance(item.left, tree.Ellipsis):
            if not body.names_rest():
                raise body.fail(
                    "FL0307", "`..` stands for no axes here: the type of no parameter has it", item.span,
                    suggestion=f"name the axes, as in `{name}[{', '.join(t.names) or 'D'}](..)`, or take `x: R[D, ..]`",
                )  # fmt: skip
            names.extend(a.name for a in body.rest)
            continue
        if not isinstance(item.left, tree.Name):
            raise body.fail(
                "FL0307",
                "a reduction names axes, as in `sum[D](x)`, or groups, as in `var[C / 8](x)`",
                item.span,
                suggestion="name the axis to reduce in the brackets",
            )
        if item.left.id == "B" and name in POOLED:
            continue
        if item.left.id == "B":
            raise body.fail(
                "FL0902",
                f"`{name}` over the batch has no meaning yet",
                item.span,
                suggestion="reduce with `mean`, `var`, `sum`, `max` or `min`",
            )
        names.append(item.left.id)
    for n in names:
        axis_rules.need_axis(body, t, n, span(args))
    return tuple(names)


def reduction(op: str) -> Fn:
    shown = op.removeprefix("reduce_")

    def call(body: Body, args: Arguments) -> Any:
        expect(body, args, shown, 1, 1, ("ddof",) if op in ("var", "std") else ())
        x = operand(body, args)
        if any(grouped(i) for i in args.axes):
            return within_groups(body, args, x, lambda inner: call(body, inner))
        t = body.b.type(x)
        names = reduced_axes(body, args, t, shown)
        pooled = any(isinstance(i.left, tree.Name) and i.left.id == "B" for i in args.axes)
        if pooled and op == "sum" and not body.graph[x].batched:
            raise body.fail("FL0307", "this value is one for the whole batch, whose samples a sum would count", span(args),
                            suggestion="multiply by a value that each sample has, or take `mean[B]`")  # fmt: skip
        if op == "sum" and not pooled:
            return sum_of(body, x, names, span(args))
        ddof = args.keywords.get("ddof", 0)
        if not isinstance(ddof, int) or isinstance(ddof, bool) or ddof < 0:
            raise body.fail("FL0306", f"`ddof` of `{shown}` is a whole number from 0 on, and this is {describe(ddof)}", span(args),
                            suggestion="as in `ddof = 1`")  # fmt: skip
        extra: dict[str, Any] = {"ddof": ddof} if op in ("var", "std") else {}
        moment = f"batch_{op.removeprefix('reduce_').replace('std', 'var')}" if pooled else op.replace("std", "var")
        if pooled or op == "std":
            value = body.b.op(moment, x, axes=names, span=span(args), **extra)
            return body.node("sqrt", value, span=span(args)) if op == "std" else Tensor(value, body)
        return body.node(op, x, axes=names, span=span(args), **extra)

    return call


def grouped(item: tree.Item) -> bool:
    return isinstance(item.left, tree.Binary) and item.left.op == "/"


def within_groups(body: Body, args: Arguments, x: int, reduce: Callable[[Arguments], Any]) -> Tensor:
    """`var[H, W, C / 8](x)`: C is cut into 8 groups, and each index of C gets its group's value."""
    where = span(args)
    axes: list[tree.Item] = []
    groups: list[tuple[str, str, str]] = []
    for item in args.axes:
        if not grouped(item):
            axes.append(item)
            continue
        assert isinstance(item.left, tree.Binary)
        if not isinstance(item.left.left, tree.Name):
            raise body.fail(
                "FL0307",
                "groups are those of an axis, as in `C / 8`",
                item.span,
                suggestion="write an axis, a slash and a number",
            )
        name, count = item.left.left.id, body.static_int(item.left.right)
        size = axis_rules.need_axis(body, body.b.type(x), name, item.span)
        if count < 1 or size % count:
            raise body.fail(
                "FL0312", f"axis `{name}` of size {size} does not divide into {count} groups", item.span,
                suggestion=f"choose a number of groups that divides {size}",
            )  # fmt: skip
        outer, inner = f"{name}~groups", f"{name}~"
        x = body.b.op("split", x, axis=name, into=((outer, count), (inner, size // count)), span=where)
        axes.append(tree.Item(tree.Name(inner, span=item.span), span=item.span))
        groups.append((name, outer, inner))
    sizes = {n: body.b.type(x).size(n) for _, _, n in groups}
    reduced = reduce(
        Arguments([Tensor(x, body)], args.spans, args.keywords, args.keyword_spans, tuple(axes), args.span)
    )
    value = body.tensor(reduced, where)
    for name, outer, inner in groups:
        wide = [(a.name, a.size) for a in body.b.type(value).axes]
        wide.insert([n for n, _ in wide].index(outer) + 1, (inner, sizes[inner]))
        value = body.b.op("expand", value, axes=tuple(wide), span=where)
        value = body.b.op("merge", value, axes=(outer, inner), into=name, span=where)
    return Tensor(value, body)


def euclidean(op: str) -> Fn:
    """`length[D](x)`, the Euclidean norm over D; `normalize[D](x)`, x over it."""

    def call(body: Body, args: Arguments) -> Any:
        expect(body, args, op, 1)
        x = operand(body, args)
        return body.node(op, x, axes=reduced_axes(body, args, body.b.type(x), op), span=span(args))

    return call


def sum_of(body: Body, x: int, names: tuple[str, ...], where: Span) -> Tensor:
    """A sum; the sum of a product over axes that both factors have is a contraction."""
    node = body.graph[x]
    if node.op == "mul" and names and node.label is None:
        a, b = node.inputs
        ta, tb = body.b.type(a), body.b.type(b)
        if all(ta.has(n) and tb.has(n) for n in names):
            value = body.b.op("contract", a, b, axes=names, span=where)
            return primed(body, value, names, where)
    value = body.b.op("sum", x, axes=names, span=where) if names else x
    return primed(body, value, names, where)


def primed(body: Body, id: int, names: tuple[str, ...], where: Span) -> Tensor:
    """A reduction over D turns `D'` into `D`."""
    t = body.b.type(id)
    pairs = tuple((f"{n}'", n) for n in names if t.has(f"{n}'") and not t.has(n))
    if pairs:
        id = body.b.op("rename", id, pairs=pairs, span=where)
    return Tensor(id, body)


def along(op: str, **defaults: Any) -> Fn:
    def call(body: Body, args: Arguments) -> Any:
        expect(body, args, op, 1, 1, tuple(defaults))
        x = operand(body, args)
        axis = one_axis(body, args, body.b.type(x), op)
        return body.node(op, x, axis=axis, span=span(args), **{**defaults, **args.keywords})

    return call


def softmax(op: str) -> Fn:
    def call(body: Body, args: Arguments) -> Any:
        expect(body, args, op, 1, 1, ("causal",))
        opened = args.positional[0]
        if isinstance(opened, Pending):  # it keeps its axes: what sizes the result sizes the network
            return body.later(opened, lambda v: call(body, replace(args, positional=[v])))
        x = operand(body, args)
        t = body.b.type(x)
        axis = one_axis(body, args, t, op)
        query = args.keywords.get("causal")
        if query is None:
            return body.node(op, x, axis=axis, span=span(args))
        if not isinstance(query, str) or not t.has(query) or t.size(query) != t.size(axis):
            raise body.fail(
                "FL0307", "`causal` names the axis of queries, of the same size", span(args),
                suggestion='as in `softmax[S](a, causal = "T")`',
            )  # fmt: skip
        return body.node(op, x, axis=axis, causal=query, span=span(args))

    return call


# ---- structure ----------------------------------------------------------------------------------


def halves(body: Body, args: Arguments) -> Any:
    expect(body, args, "halves", 1)
    x = operand(body, args)
    t = body.b.type(x)
    axis = one_axis(body, args, t, "halves")
    n = t.size(axis)
    if n < 2:
        raise body.fail(
            "FL0307",
            f"axis `{axis}` of size {n} has no halves",
            span(args),
            suggestion="a coupling needs at least two coordinates; an elementwise step such as `rqs_elementwise` serves one",
        )
    cut = (n + 1) // 2  # the larger half first
    first = body.node("slice", x, axis=axis, start=0, stop=cut, span=span(args))
    second = body.node("slice", x, axis=axis, start=cut, stop=n, span=span(args))
    return Tuple((first, second))


def join(body: Body, args: Arguments) -> Any:
    if args.keywords:
        expect(body, args, "join", 1, None)
    values = args.positional
    if len(values) == 1 and isinstance(values[0], list):
        if not args.axes and all(not isinstance(v, Tensor) for v in values[0]):
            return values[0]
        args = Arguments(list(values[0]), [args.spans[0]] * len(values[0]), {}, {}, args.axes, args.span)
        values = args.positional
    if values and all(isinstance(v, list) for v in values):
        body.elab.count_items(body, sum(len(v) for v in values), span(args))
        return [x for v in values for x in v]
    present = [(v, s) for v, s in zip(values, args.spans, strict=True) if not isinstance(v, Absent)]
    if not present:
        raise body.fail("FL0203", "`join` needs values", span(args), suggestion="as in `join[D](a, b)`")
    ids = [body.tensor(v, s) for v, s in present]
    types = [body.b.type(i) for i in ids]
    names = axis_list(body, args, "join")
    if names:
        axis = names[0]
    elif all(t.rank <= 1 for t in types) and any(t.rank == 1 for t in types):
        axis = next(t.names[0] for t in types if t.rank == 1)
    else:
        raise body.fail("FL0307", "`join` needs its axis", span(args), suggestion="as in `join[D](a, b)`")
    if not names:  # vectors of different names: along the first one's axis
        for k, t in enumerate(types):
            if t.rank == 1 and t.names[0] != axis:
                ids[k] = body.b.op("rename", ids[k], pairs=((t.names[0], axis),))
                types[k] = body.b.type(ids[k])
    frame: dict[str, int] = {}
    for t, (_, s) in zip(types, present, strict=True):
        for a in t.axes:
            if a.name != axis and frame.setdefault(a.name, a.size) != a.size:
                raise body.fail(
                    "FL0301",
                    f"axis `{a.name}` has sizes {frame[a.name]} and {a.size} in the parts of a join",
                    s,
                    suggestion="parts of a join agree in all other axes; slice or reshape one of them",
                )
    lead = next((t for t in types if t.has(axis)), types[0])
    order = [n for n in lead.names if n == axis or n in frame]
    order += [n for n in frame if n not in order]
    if axis not in order:
        order.append(axis)
    out: list[int] = []
    for i, t in zip(ids, types, strict=True):
        full = tuple((n, t.size(n) if t.has(n) else (1 if n == axis else frame[n])) for n in order)
        i = body.b.op("expand", i, axes=full)
        out.append(body.b.op("order", i, names=tuple(order)))
    if len(out) == 1:
        return Tensor(out[0], body)
    return body.node("join", *out, axis=axis, span=span(args))


def stack(body: Body, args: Arguments) -> Any:
    values = args.positional
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not values:
        raise body.fail("FL0203", "`stack` needs values", span(args), suggestion="as in `stack[D](a, b)`")
    names = axis_list(body, args, "stack")
    if len(names) != 1:
        raise body.fail("FL0307", "`stack` needs the new axis", span(args), suggestion="as in `stack[K](a, b)`")
    ids = [body.tensor(v, span(args)) for v in values]
    frame: dict[str, int] = {}
    for i in ids:
        for a in body.b.type(i).axes:
            if frame.setdefault(a.name, a.size) != a.size:
                raise body.fail(
                    "FL0301",
                    f"axis `{a.name}` has sizes {frame[a.name]} and {a.size} in a stack",
                    span(args),
                    suggestion="parts of a stack have the same axes and sizes",
                )
    if names[0] in frame:
        raise body.fail(
            "FL0307",
            f"axis `{names[0]}` is there already",
            span(args),
            suggestion="choose a new name for the stacked axis",
        )
    full = tuple(frame.items())
    out = [body.b.op("order", body.b.op("expand", i, axes=full), names=tuple(frame)) for i in ids]
    return body.node("stack", *out, axis=names[0], span=span(args))


def reverse(body: Body, args: Arguments) -> Any:
    expect(body, args, "reverse", 1)
    x = operand(body, args)
    t = body.b.type(x)
    if not args.axes and t.rank > 1:
        for n in t.names:
            x = body.b.op("reverse", x, axis=n, span=span(args))
        return Tensor(x, body)
    return body.node("reverse", x, axis=one_axis(body, args, t, "reverse"), span=span(args))


def matrix_axes(body: Body, args: Arguments, x: int, function: str) -> tuple[str, str]:
    """The two axes of matrices: those in brackets, or all that the value has."""
    t, names = body.b.type(x), axis_list(body, args, function)
    if not names and t.rank == 2:
        names = list(t.names)
    if len(names) != 2:
        raise body.fail(
            "FL0307",
            f"`{function}` is of a matrix, whose two axes must be named",
            span(args),
            suggestion=f"as in `{function}[D', D](M)`",
        )
    for n in names:
        axis_rules.need_axis(body, t, n, span(args))
    return names[0], names[1]


def det(body: Body, args: Arguments) -> Any:
    """`det[D', D](M)`: the determinant of matrices along two axes."""
    expect(body, args, "det", 1)
    x = operand(body, args)
    row, col = matrix_axes(body, args, x, "det")
    return body.node("det", x, row=row, col=col, span=span(args))


def eigen(function: str) -> Fn:
    """`matrix_log[D', D](M, floor = 1e-12)` and its like: functions of the eigenvalues of symmetric matrices."""

    def call(body: Body, args: Arguments) -> Any:
        powers = function == "matrix_power"
        expect(body, args, function, 2 if powers and "power" not in args.keywords else 1, 2 if powers else 1,
               () if function == "matrix_exp" else ("power", "floor") if powers else ("floor",))  # fmt: skip
        x = operand(body, args)
        row, col = matrix_axes(body, args, x, function)
        numbers = {"floor": args.keywords.get("floor", 1e-12), "power": args.keywords.get("power", 1)}
        if len(args.positional) > 1:
            numbers["power"] = args.positional[1]
        for k, v in numbers.items():
            if not isinstance(v, int | float) or isinstance(v, bool) or (k == "floor" and v <= 0):
                raise body.fail(
                    "FL0306",
                    f"`{k}` of `{function}` is a {'positive ' if k == 'floor' else ''}number",
                    args.keyword_spans.get(k, span(args)),
                    suggestion=f"as in `{k} = {'1e-6' if k == 'floor' else '0.5'}`; a power that is computed is `matrix_exp(p * matrix_log(M))`",
                )
        return body.node(
            "eigen", x, row=row, col=col, function=function, power=float(numbers["power"]), floor=float(numbers["floor"]),
            span=span(args),
        )  # fmt: skip

    return call


def induced(body: Body, args: Arguments) -> Any:
    """`induced[D](W, c, p, q)`: the weight scaled so that its norm from lp over D to lq over its other axes is at most c.

    `induced[C, h, w](K, c, p, q, H, W)`: the same of a kernel [out, in, *window] as the convolution of a value of sizes H, W.
    """
    expect(body, args, "induced", 4, 3 + max(len(args.axes), 1))
    weight = operand(body, args)
    limit = args.positional[1]
    if not isinstance(limit, int | float) or isinstance(limit, bool) or limit <= 0:
        raise body.fail(
            "FL0305",
            "the bound of `induced` is a number above 0",
            span(args),
            suggestion="as in `induced[D](W, 0.97, p, q)`",
        )
    names = axis_list(body, args, "induced")
    if not names:
        raise body.fail(
            "FL0307", "`induced` names the axes that its weight is summed over", span(args), suggestion="as in `induced[D](W, 0.97, p, q)`"
        )  # fmt: skip
    for n in names:
        axis_rules.need_axis(body, body.b.type(weight), n, span(args))
    space = args.positional[4:]
    sizes = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in space)
    kernel = tuple(names) == body.b.type(weight).names[1:] and len(space) == len(names) - 1
    if space and not (sizes and kernel):
        raise body.fail(
            "FL0305",
            "behind the orders of `induced` stand the sizes of what a kernel [out, in, window] moves over: one for each axis of its window, summed with `in`",
            span(args),
            suggestion="as in `induced[C, h, w](K, 0.97, p, q, x.H, x.W)`",
        )  # fmt: skip
    orders = [body.tensor(v, args.spans[2 + k]) for k, v in enumerate(args.positional[2:4])]
    for k, i in enumerate((weight, *orders)):
        if body.graph[i].batched:
            what = "the weight" if k == 0 else "an order"
            raise body.fail(
                "FL0306", f"{what} of `induced` is one for all samples, and this is one for each", span(args),
                suggestion="give parameters, or numbers",
            )  # fmt: skip
    where = {"space": tuple(space)} if space else {}
    return body.node("norm_bounded", weight, *orders, axes=tuple(names), bound=float(limit), span=span(args), **where)


def shift(body: Body, args: Arguments) -> Any:
    expect(body, args, "shift", 2)
    x = operand(body, args)
    k = args.positional[1]
    if not isinstance(k, int) or isinstance(k, bool):
        raise body.fail(
            "FL0305", "`shift` takes a whole number of places", span(args), suggestion="as in `shift[T](x, 1)`"
        )
    return body.node("shift", x, axis=one_axis(body, args, body.b.type(x), "shift"), k=k, span=span(args))


def permute(body: Body, args: Arguments) -> Any:
    """A fixed permutation along an axis: given by a list, or drawn once from `seed`."""
    import random

    tensors = [v for v in args.positional if isinstance(v, Tensor)]
    if not tensors:
        return AppliedBuiltin(
            BUILTINS["permute"], tuple(args.positional), tuple(args.keywords.items()), args.axes, span(args)
        )
    expect(body, args, "permute", 1, 2, ("order", "seed"))
    x = body.tensor(tensors[0], span(args))
    axis = one_axis(body, args, body.b.type(x), "permute")
    n = body.b.type(x).size(axis)
    body.elab.count_items(body, n, span(args))
    given = next((v for v in args.positional if isinstance(v, list)), args.keywords.get("order"))
    seed = args.keywords.get("seed", 0)
    if not isinstance(seed, int):
        where = args.keyword_spans["seed"]
        raise body.fail(
            "FL0305", f"a seed is a whole number, and this is {describe(seed)}", where, suggestion="as in `seed = 0`"
        )
    if given is None:
        order = list(range(n))
        random.Random(seed).shuffle(order)
    else:
        order = list(given) if isinstance(given, list) else []
    if not all(isinstance(k, int) for k in order) or sorted(order) != list(range(n)):
        raise body.fail(
            "FL0305",
            f"an order of axis `{axis}` names each of 0..{n} once",
            span(args),
            suggestion="as in `permute[D]([1, 0])` for two",
        )
    return body.node("permute", x, axis=axis, order=tuple(order), span=span(args))


def constant_like(value: float) -> Fn:
    name = "zeros" if value == 0 else "ones"

    def call(body: Body, args: Arguments) -> Any:
        if args.axes and not args.positional:
            axes = []
            for item in args.axes:
                if isinstance(item.left, tree.Ellipsis):
                    axes += [(a.name, a.size) for a in body.rest]
                    continue
                if not isinstance(item.left, tree.Name):
                    raise body.fail("FL0307", "an axis is a name", item.span, suggestion="as in `zeros[D = 2]`")
                size = static_size(body, item.eq) if item.eq is not None else body.axes.get(item.left.id)
                if size is None:
                    raise body.fail(
                        "FL0310",
                        f"the size of axis `{item.left.id}` is open",
                        item.span,
                        suggestion="write a number, or a size as `x.D`",
                    )
                axes.append((item.left.id, size))
            return body.node("expand", body.b.const(value), axes=tuple(axes), span=span(args))
        expect(body, args, name, 1)
        t = body.b.type(operand(body, args))
        return body.node("expand", body.b.const(value), axes=tuple((a.name, a.size) for a in t.axes), span=span(args))

    return call


def index(body: Body, args: Arguments) -> Any:
    expect(body, args, "index", 1)
    t = body.b.type(operand(body, args))
    axis = one_axis(body, args, t, "index")
    return body.node("index", axis=axis, size=t.size(axis), span=span(args))


def sized_axis(body: Body, args: Arguments, name: str) -> tuple[str, int]:
    """`checker[D]`, `onehot[K = 10]`: one axis, which has a size here or is given one."""
    item = args.axes[0] if len(args.axes) == 1 else None
    if item is None or not isinstance(item.left, tree.Name):
        raise body.fail("FL0307", f"`{name}` needs one axis", span(args), suggestion=f"as in `{name}[D]`")
    axis = item.left.id
    known = static_size(body, item.eq) if item.eq is not None else body.axes.get(axis)
    if known is None:
        raise body.fail(
            "FL0310", f"the size of axis `{axis}` is open", item.span, suggestion=f"as in `{name}[{axis} = 4]`"
        )
    return axis, known


def onehot(body: Body, args: Arguments) -> Any:
    """`onehot[K = 10](k)`: 1 where K's index is the whole number k, 0 elsewhere."""
    expect(body, args, "onehot", 1)
    k = operand(body, args)
    axis, count = sized_axis(body, args, "onehot")
    if body.b.type(k).has(axis):
        raise body.fail("FL0307", f"axis `{axis}` is there already", args.spans[0], suggestion="name another axis")
    return Tensor(body.b.onehot(k, axis, count), body)


def checker(body: Body, args: Arguments) -> Any:
    """1, 0, 1, ... along an axis."""
    expect(body, args, "checker", 0, 1)
    if args.positional:
        t = body.b.type(operand(body, args))
        axis = one_axis(body, args, t, "checker")
        count = t.size(axis)
    else:
        axis, count = sized_axis(body, args, "checker")
    i = body.b.op("index", axis=axis, size=count)
    odd = body.b.op("mod", i, body.b.const(2))
    return body.node("sub", body.b.const(1.0), odd, span=span(args))


def size(body: Body, args: Arguments) -> Any:
    expect(body, args, "size", 1)
    value = args.positional[0]
    if isinstance(value, list):
        return len(value)
    t = body.b.type(operand(body, args))
    if not args.axes:
        return t.count
    return t.size(one_axis(body, args, t, "size"))


def present(body: Body, args: Arguments) -> Any:
    expect(body, args, "present", 1)
    return not isinstance(args.positional[0], Absent)


def spline(op: str) -> Fn:
    """Monotone splines, elementwise in x with raw parameters along one axis: `rqs[K](x, widths, heights, slopes, bound)`."""
    kind = SPLINES[op]

    def call(body: Body, args: Arguments) -> Any:
        tensors = [(v, s) for v, s in zip(args.positional, args.spans, strict=True) if isinstance(v, Tensor | Pending)]
        numbers = [v for v in args.positional if isinstance(v, int | float) and not isinstance(v, bool)]
        args.only(body, op, kind.numbers)
        for k, v in args.keywords.items():
            if not isinstance(v, int | float) or isinstance(v, bool):
                raise body.fail(
                    "FL0306", f"`{k}` of `{op}` is a number", args.keyword_spans[k], suggestion=f"as in `{k} = 0.5`"
                )
        if len(tensors) != 1 + len(kind.raw) or len(tensors) + len(numbers) != len(args.positional) or len(numbers) > 1:
            raise body.fail(
                "FL0203",
                f"`{op}` takes x and {len(kind.raw)} parameters: {', '.join(kind.raw)}",
                span(args),
                suggestion="give them all, or use `rqs_coupling` and its like, whose networks do",
            )
        names = axis_list(body, args, op)
        if len(names) != 1:
            raise body.fail(
                "FL0307", f"`{op}` needs the axis of its bins", span(args), suggestion=f"as in `{op}[K](..)`"
            )
        ids = [body.tensor(v, s) for v, s in tensors]
        attrs = {k: float(v) for k, v in args.keywords.items()}
        if numbers:
            attrs["bound"] = float(numbers[0])
        return body.node(op, *ids, axis=names[0], span=span(args), **attrs)

    return call


# ---- steps and higher-order functions -----------------------------------------------------------


def rearrange(body: Body, args: Arguments) -> Any:
    tensors = [v for v in args.positional if isinstance(v, Tensor)]
    if len(tensors) != 1 or len(args.positional) != 1:
        raise body.fail(
            "FL0202",
            "`rearrange` takes only axes, as in `rearrange[D -> (h = 2, d)]`",
            span(args),
            suggestion="give the axes in the brackets and the value after them",
        )
    return axis_rules.index_tensor(body, tensors[0], args.axes)


def elementwise(body: Body, args: Arguments) -> Any:
    """`elementwise(f)` as a step: f applied to every coordinate."""
    tensors = [v for v in args.positional if isinstance(v, Tensor)]
    functions = [v for v in args.positional if not isinstance(v, Tensor)]
    if len(functions) != 1:
        raise body.fail(
            "FL0203",
            "`elementwise` takes one function, as in `elementwise(softplus)`",
            span(args),
            suggestion="a map of your own is a `bijector`, as in `bijector bend(x: R[D]) { x + tanh(x) / 2 }`",
        )
    if not tensors:
        return AppliedBuiltin(BUILTINS["elementwise"], tuple(functions), (), args.axes, span(args))
    return apply(body, functions[0], [tensors[0]], {}, span(args))


def inverse(body: Body, args: Arguments) -> Any:
    """`inverse(b)`: the bijector the other way round."""
    expect(body, args, "inverse", 1)
    value = args.positional[0]
    axes: tuple[tree.Item, ...] = ()
    if isinstance(value, Bracketed):
        value, axes = value.fn, value.items
    if isinstance(value, Declared):
        alias = body.elab.resolve_alias(value)
        value = alias if alias is not None else value
    if isinstance(value, Declared):
        value = Instance(value, {}, span(args), axes)
    if isinstance(value, Poison):
        return POISON
    if isinstance(value, Instance) and value.kind == "bijector":
        return Instance(
            value.target, value.arguments, span(args), axes or value.axes, owner=value.owner, name=value.name, label=value.label,
            inverted=not value.inverted,
        )  # fmt: skip
    raise body.fail(
        "FL0211",
        f"`inverse` takes a bijector, and this is {describe(value)}",
        span(args),
        suggestion="as in `inverse(squeeze(2))`",
    )


def lipschitz(body: Body, args: Arguments) -> Any:
    """`lipschitz(f, c)`: f with its weights scaled so that its certified constant is at most c."""
    expect(body, args, "lipschitz", 2)
    value, limit = args.positional
    if isinstance(value, Declared):
        value = Instance(value, {}, span(args))
    if not isinstance(value, Instance) or value.kind not in ("net", "norm"):
        raise body.fail(
            "FL0211",
            f"`lipschitz` takes a network, and this is {describe(value)}",
            span(args),
            suggestion="as in `lipschitz(mlp(64), 0.97)`",
        )
    if not isinstance(limit, int | float) or isinstance(limit, bool) or limit <= 0:
        raise body.fail(
            "FL0305",
            "the bound of `lipschitz` is a number above 0",
            span(args),
            suggestion="as in `lipschitz(f, 0.97)`",
        )
    return Instance(
        value.target, value.arguments, span(args), value.axes, owner=value.owner, name=value.name, label=value.label, shared=value.shared,
        lipschitz=float(limit), frozen=value.frozen,
    )  # fmt: skip


def first_batch(body: Body, args: Arguments) -> FirstBatch:
    """`param g: R[D] = first_batch(1 / std[B](x), 1)`: the start by the first batch, and what holds before it.

    `W := first_batch(W * s)` for a parameter with a start of its own, which it may read.
    """
    expect(body, args, "first_batch", 1, 2)
    if len(args.positional) == 1:
        return FirstBatch(Tensor(body.tensor(args.positional[0], args.spans[0]), body), None)
    value, before = args.positional
    if not isinstance(before, int | float) or isinstance(before, bool):
        raise body.fail(
            "FL0305",
            f"what holds before the first batch is a number, and this is {describe(before)}",
            args.spans[1],
            suggestion="as in `first_batch(1 / std[B](x), 1)`",
        )
    return FirstBatch(Tensor(body.tensor(value, args.spans[0]), body), float(before))


def running(body: Body, args: Arguments) -> Any:
    """`running(mean[B](x), momentum)`: the batch's statistic when training, its running mean after.

    The state is read before it is written. `unbiased = true` lets the running variance divide by n - 1.
    """
    expect(body, args, "running", 1, 2, ("momentum", "unbiased"))
    where = span(args)
    live = operand(body, args)
    node = body.graph[live]
    if node.batched:
        raise body.fail(
            "FL0306", "`running` follows a statistic of the batch, and this is a value of each sample", where,
            suggestion="reduce over `B` too, as in `running(mean[B](x), 0.1)`",
        )  # fmt: skip
    momentum = args.keywords.get("momentum", args.positional[1] if len(args.positional) > 1 else 0.1)
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 < momentum <= 1:
        raise body.fail(
            "FL0305",
            "`momentum` is the weight of the new value, above 0 and at most 1",
            where,
            suggestion="as in `running(mean[B](x), 0.1)`",
        )
    target = live
    if args.keywords.get("unbiased"):
        if node.op != "batch_var":
            raise body.fail(
                "FL0305",
                "`unbiased` belongs to a variance, as in `running(var[B](x), 0.1, unbiased = true)`",
                where,
                suggestion="leave it out",
            )
        target = body.b.op("batch_var", *node.inputs, **{**node.attrs, "ddof": 1})
    bounds = OPS[node.op].interval
    types = [body.b.type(i) for i in node.inputs]
    found = bounds([own_bounds(body, i) for i in node.inputs], types, node) if bounds is not None else REAL
    kind = {"batch_mean": "mean", "batch_var": "var"}.get(node.op, "value")
    known = {body.graph[u.state].attrs["name"] for u in body.region.updates}
    name = next(
        n for k in range(1, len(known) + 2) if (n := f"running_{kind}" + (f"_{k}" if k > 1 else "")) not in known
    )
    state = body.b.leaf(
        "state", node.type, batched=False, span=where, name=name, domain=Domain("R", (), found),
        init=1.0 if kind == "var" else 0.0,
    )  # fmt: skip
    kept = body.b.mul(state, body.b.const(1.0 - float(momentum)))
    new = body.b.add(kept, body.b.mul(target, body.b.const(float(momentum))))
    body.region.updates.append(Update(state, new, live))
    return Tensor(state, body)


def own_bounds(body: Body, id: int) -> Interval:
    """Bounds of a value that its op alone gives, as of a square."""
    node = body.graph[id]
    rule = OPS[node.op].interval
    types = [t for i in node.inputs if isinstance(t := body.graph[i].type, TensorType)]
    if rule is None or not types or len(types) != len(node.inputs):
        return REAL
    return rule([REAL] * len(types), types, node)


def stop(body: Body, args: Arguments) -> Any:
    expect(body, args, "stop", 1)
    return body.node("stop", operand(body, args), span=span(args))


def paired(body: Body, args: Arguments) -> Any:
    """`paired[B](x0, x1)`: the draws x0, each beside the x1 of the batch that makes the sum of |x0 - x1|² least."""
    where = span(args)
    expect(body, args, "paired", 2)
    if axis_list(body, args, "paired") != ["B"]:
        raise body.fail("FL0307", "`paired` pairs the samples of a batch, whose axis is named", where,
                        suggestion="as in `paired[B](x0, x1)`")  # fmt: skip
    if not draws(body):
        raise body.fail("FL0410", "`paired` makes each sample hang on the others, and only programs of a model may", where,
                        suggestion="pair draws with data in a `def loss` of a `model`")  # fmt: skip
    x, y = operand(body, args), operand(body, args, 1)
    have, want = body.b.type(x), body.b.type(y)
    if set(have.axes) != set(want.axes):
        raise body.fail("FL0301", f"`paired` compares values of one type, and these are `{have}` and `{want}`", where,
                        suggestion="give both the same axes")  # fmt: skip
    if not (body.graph[x].batched and body.graph[y].batched):
        raise body.fail("FL0307", "a value that is one for the whole batch cannot be paired", where,
                        suggestion="pair draws with data, as in `paired[B](x0, x1)`")  # fmt: skip
    y = y if have.names == want.names else body.b.op("order", y, names=have.names)
    return Tensor(body.graph.add("paired", (x, y), have, {}, span=where, batched=True).id, body)


def named_arguments(body: Body, args: Arguments, name: str, names: list[str]) -> dict[str, Any]:
    """Numbers and tensors by the names of a distribution's parameters."""
    args.only(body, name, names)
    values: dict[str, Any] = dict(args.keywords)
    free = [n for n in names if n not in values]
    if len(args.positional) > len(free):
        raise body.fail("FL0202", f"`{name}` takes {len(names)} arguments", span(args), suggestion="leave out the rest")
    values.update(zip(free, args.positional, strict=False))
    for k, v in values.items():
        if not isinstance(v, Tensor | int | float | Pending):
            raise body.fail(
                "FL0306",
                f"`{k}` of `{name}` is a number or a tensor, and this is {describe(v)}",
                span(args),
                suggestion=f"as in `{name}({k} = 0.5)`",
            )
    return {n: values[n] for n in names if n in values}


def complete(body: Body, args: Arguments, law: Distribution, values: dict[str, Any]) -> DistributionValue:
    for n, (default, _) in law.parameters.items():
        if default is None and n not in values:
            raise body.fail(
                "FL0203", f"`{law.name}` needs `{n}`", span(args), suggestion=f"as in `{law.name}({n} = ..)`"
            )
    for n in law.matrices:
        node = body.graph[operand_id(body, values[n], span(args))]
        domain = node.attrs.get("domain")
        if not isinstance(domain, Domain) or domain.structure not in ("lower", "unit_lower"):
            raise body.fail(
                "FL0311",
                f"`{n}` of `{law.name}` is a lower-triangular matrix with a positive diagonal",
                span(args),
                suggestion=f"declare it so: `param {node.label or 'L'}: LowerTriangular[D', D]`",
            )
    return DistributionValue(law, tuple(values.items()), span(args))


def operand_id(body: Body, value: Any, where: Span) -> int:
    return body.tensor(body.capture(value), where)


def distribution(name: str) -> Fn:
    def call(body: Body, args: Arguments) -> Any:
        law = DISTRIBUTIONS[name]
        return complete(body, args, law, named_arguments(body, args, name, list(law.parameters)))

    return call


def logits_axis(body: Body, args: Arguments, logits: Any, name: str) -> str:
    """The axis of the alternatives: in brackets, or the only one that the logits have."""
    t = body.b.type(operand_id(body, logits, span(args)))
    names = axis_list(body, args, name)
    if len(names) == 1 and t.has(names[0]):
        return names[0]
    if not names and t.rank == 1:
        return t.names[0]
    raise body.fail(
        "FL0307", f"`{name}` runs over one axis of its logits, and these are `{t}`", span(args),
        suggestion=f"name it, as in `{name}[K](..)`",
    )  # fmt: skip


def mixture_of(body: Body, args: Arguments) -> Any:
    """`mixture[K](logits = w, normal(mean = m, scale = s))`: the components lie along K."""
    logits = args.keywords.get("logits")
    rest = list(args.positional)
    if logits is None and rest:
        logits = rest.pop(0)
    unknown = [k for k in args.keywords if k != "logits"]
    inner = rest[0] if len(rest) == 1 else None
    if unknown or not isinstance(logits, Tensor) or not isinstance(inner, DistributionValue):
        raise body.fail(
            "FL0203", "`mixture` takes logits and the distribution of its components", span(args),
            suggestion="as in `mixture[K](logits = w, normal(mean = m, scale = s))`, m and s having the axis K",
        )  # fmt: skip
    law = mixture(inner.law, logits_axis(body, args, logits, "mixture"))
    return complete(body, args, law, {"logits": logits, **dict(inner.arguments)})


def categorical_of(body: Body, args: Arguments) -> Any:
    """`categorical[K](logits = w)`: whole numbers below K's size."""
    values = named_arguments(body, args, "categorical", ["logits"])
    if not isinstance(values.get("logits"), Tensor):
        raise body.fail(
            "FL0203", "`categorical` needs `logits`, a tensor", span(args), suggestion="as in `categorical(logits = w)`"
        )
    return complete(body, args, categorical(logits_axis(body, args, values["logits"], "categorical")), values)


def _table() -> dict[str, Any]:
    table: dict[str, Any] = {}

    def put(name: str, fn: Fn, *, step: bool = False, kind: str = "function", each: bool = False) -> None:
        assert name not in table, name
        table[name] = Builtin(name, fn, kind, step, each=each)

    for name in UNARY:
        put(name, unary(name), each=True)
    put("leaky_relu", slope_function("leaky_relu", "slope", 0.01), each=True)
    put("elu", slope_function("elu", "alpha", 1.0), each=True)
    put("clamp", clamp)
    put("where", where)
    put("surrogate", surrogate)
    put("mod", binary("mod"))
    put("rotate", rotate)
    put("min", extremum("min"))
    put("max", extremum("max"))
    for name in ("sum", "mean", "var", "std", "prod", "logsumexp", "argmax", "any", "all"):
        put(name, reduction(name))
    put("length", euclidean("length"))
    put("normalize", euclidean("normalize"))
    put("softmax", softmax("softmax"))
    put("log_softmax", softmax("log_softmax"))
    put("cumsum", along("cumsum", exclusive=False, reverse=False))
    put("sort", along("sort"))
    put("halves", halves)
    put("join", join)
    put("stack", stack)
    put("det", det)
    for word in ("matrix_exp", "matrix_log", "matrix_power"):
        put(word, eigen(word))
    put("reverse", reverse, step=True)
    put("shift", shift)
    put("permute", permute, step=True)
    put("zeros", constant_like(0.0))
    put("ones", constant_like(1.0))
    put("index", index)
    table.update(GRIDS)
    put("checker", checker)
    put("onehot", onehot)
    put("size", size)
    put("present", present)
    for name in SPLINES:
        put(name, spline(name))
    put("rearrange", rearrange, step=True)
    put("elementwise", elementwise, step=True)
    put("inverse", inverse)
    put("stop", stop)
    put("running", running)
    put("paired", paired)
    put("first_batch", first_batch)
    put("lipschitz", lipschitz)
    put("induced", induced)
    for name in ("grad", "jvp", "vjp", "jacobian", "divergence", "derivative"):
        put(name, differentiated(name))
    put("frozen", frozen)
    for kind in ("ema", "copy"):
        put(kind, follower(kind))
    for name in DISTRIBUTIONS:
        put(name, distribution(name), kind="distribution")
    table["integrate"] = Builtin("integrate", integrate, options=INTEGRATE_OPTIONS)
    table["residual_log_det"] = Builtin("residual_log_det", residual_log_det, options=SERIES_OPTIONS)
    put("mixture", mixture_of, kind="distribution")
    put("categorical", categorical_of, kind="distribution")
    for name in SCHEMES:
        put(name, scheme(name), kind="start")
    table.update({**NETWORKS, **CONVOLUTIONS, **POOLS})
    table.update({"true": True, "false": False, "π": math.pi, "pi": math.pi, "none": ABSENT, "inf": math.inf})
    return table


BUILTINS = _table()
