"""`residual_log_det(g, x)`: log|det(I + dg/dx)| of a contraction g, by a power series of random length or exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowlang.elaborate.calls import Arguments, apply
from flowlang.elaborate.fields import spec_of
from flowlang.elaborate.values import Option, Pending, Poison, Tensor
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph
from flowlang.ir.ops.control import Series
from flowlang.ir.program import Program
from flowlang.ir.types import SCALAR, TensorType, same_axes
from flowlang.source import Span

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

SERIES_OPTIONS = (("law", ("geometric", "poisson", "exact")),)
WORDS = ("law", "rate", "terms", "inference", "samples", "surrogate")


def residual_log_det(body: Body, args: Arguments) -> Any:
    """One number for each sample. `law`, `rate` and `terms` say how the series is cut, `inference` its terms then."""
    span = args.span
    assert span is not None
    args.only(body, "residual_log_det", WORDS)
    if len(args.positional) != 2:
        raise body.fail("FL0203", "`residual_log_det` takes a network and a value", span,
                        suggestion="as in `residual_log_det(g, x, terms = 2)`")  # fmt: skip
    series = series_of(body, args, span)
    x = Tensor(body.tensor(args.positional[1], args.spans[1]), body)
    made = apply(body, body.capture(args.positional[0]), [x], {}, span)
    if isinstance(made, Pending):
        (made,) = made.resolve([spec_of(x.type)])
    if isinstance(made, Poison):
        return made
    value = body.tensor(made, span)
    have = body.b.type(value)
    if not same_axes(have, x.type):
        raise body.fail(
            "FL0308",
            f"`residual_log_det` needs a map of `{x.type}` to itself, and this gives `{have}`",
            span,
            suggestion="give a map whose result has the type of its input",
        )
    program, outer = between(body, x.id, value, x.type)
    attrs = {"body": program, "series": series}
    return Tensor(body.graph.add("estimate_log_det", (x.id, *outer), SCALAR, attrs, span=span).id, body)


def series_of(body: Body, args: Arguments, span: Span) -> Series:
    given = args.keywords
    law = given["law"].word if isinstance(given.get("law"), Option) else "geometric"
    rate = given.get("rate", 2 if law == "poisson" else 0.5)
    terms, samples = given.get("terms", 10), given.get("samples", 1)
    later, surrogate = given.get("inference", terms), given.get("surrogate", False)
    whole = all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in (terms, later, samples))
    if not whole or samples < 1:
        raise body.fail(
            "FL0305", "`terms`, `inference` and `samples` are whole numbers", span, suggestion="as in `terms = 10`"
        )
    if not isinstance(rate, int | float) or isinstance(rate, bool) or rate <= 0 or (law == "geometric" and rate >= 1):
        raise body.fail(
            "FL0305",
            "`rate` is a mean above 0 for a Poisson law, and between 0 and 1 for a geometric one",
            span,
            suggestion="as in `rate = 2` for `poisson`, `rate = 0.5` for `geometric`",
        )
    if not isinstance(surrogate, bool):
        raise body.fail("FL0305", "`surrogate` is `true` or `false`", span, suggestion="write one of them")
    return Series(law, float(rate), terms, later, samples, surrogate)


def between(body: Body, entry: int, value: int, t: TensorType) -> tuple[Program, list[int]]:
    """What leads from `entry` to `value` as a program of its own, and the values outside that it reads."""
    graph = Graph()
    b = Builder(graph)
    label = body.graph[entry].label or "u"
    env = {entry: b.leaf("input", t, batched=True, label=label, name=label, role="map")}
    inputs, outer = [env[entry]], list[int]()
    needed = body.graph.reachable([value])
    moving = {entry}
    for n in sorted(needed):
        if any(i in moving for i in body.graph[n].inputs):
            moving.add(n)

    def inside(n: int) -> int:
        if n not in env:
            node = body.graph[n]
            if node.op == "const" and not node.tensor.axes:
                env[n] = b.copy(node, ())
            else:
                known = node.label or f"v{n}"
                env[n] = b.leaf("input", node.type, batched=node.batched, label=node.label, name=known, role="context")
                inputs.append(env[n])
                outer.append(n)
        return env[n]

    for n in sorted(moving - {entry}):
        node = body.graph[n]
        if node.op == "get":
            env[n] = b.op_get(inside(node.inputs[0]), node.attrs["index"], node.span)
        elif node.op in ("call", "repeat"):
            operands = tuple(inside(i) for i in node.inputs)
            env[n] = graph.add(node.op, operands, node.type, dict(node.attrs), span=node.span, label=node.label).id
        else:
            env[n] = b.copy(node, [inside(i) for i in node.inputs])
    result = b.expand(inside(value), t)
    if b.type(result).names != t.names:
        result = b.op("order", result, names=t.names)
    return Program("body", body.region, graph, inputs, [result]), outer
