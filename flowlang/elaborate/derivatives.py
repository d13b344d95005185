"""`grad(f)`, `jvp`, `vjp`, `jacobian`, `divergence`, `derivative`: functions differentiated in their first argument, as calls.

The function becomes a region of its own, and the call runs a program of that region that carries tangents
(forward mode). A gradient is one pass along all unit vectors, so its cost grows with the size of the argument.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowlang.elaborate.calls import Arguments, apply
from flowlang.elaborate.values import (
    POISON,
    Absent,
    Builtin,
    BuiltinNet,
    Declared,
    Derivative,
    Instance,
    Local,
    LogProb,
    PathFunction,
    Pending,
    Poison,
    Tensor,
    describe,
)
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Region
from flowlang.ir.interval import closed
from flowlang.ir.tangents import DIRECTION, Tangents, basis
from flowlang.ir.types import SCALAR, TensorType, TupleType
from flowlang.source import Span

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

FUNCTIONS = (Local, Instance, Declared, Builtin, BuiltinNet, LogProb, PathFunction, Derivative)
EXAMPLES = {
    "grad": "`grad(f)(x)`", "derivative": "`derivative(f)(t)`", "divergence": "`divergence(v)(x, t)`",
    "jvp": "`jvp(f, x, v)`", "vjp": "`vjp(f, x, w)`", "jacobian": "`jacobian(f)(x)`",
}  # fmt: skip


def differentiated(kind: str) -> Any:
    """The builtin of that name: a function of a function, or with more arguments its value at once."""

    def call(body: Body, args: Arguments) -> Any:
        span = args.span
        assert span is not None
        if not args.positional or args.keywords or not isinstance(args.positional[0], FUNCTIONS):
            found = f", and this is {describe(args.positional[0])}" if args.positional else ""
            raise body.fail("FL0211", f"`{kind}` takes a function{found}", span, suggestion=f"as in {EXAMPLES[kind]}")
        made = Derivative(kind, args.positional[0], span)
        if len(args.positional) == 1:
            return made
        return call_derivative(body, made, Arguments(args.positional[1:], args.spans[1:], {}, {}, (), span))

    return call


def call_derivative(body: Body, made: Derivative, args: Arguments) -> Any:
    span = args.span
    assert span is not None
    kind = made.kind
    least = 2 if kind in ("jvp", "vjp") else 1
    if args.keywords or len(args.positional) < least:
        raise body.fail("FL0203", f"`{kind}` takes a function, then {'its arguments, the direction second' if least == 2 else 'its arguments'}",
                        span, suggestion=f"as in {EXAMPLES[kind]}")  # fmt: skip
    values = [body.tensor(v, s) for v, s in zip(args.positional, args.spans, strict=True)]
    x, rest = values[0], values[1:]
    along = rest.pop(0) if least == 2 else None
    t = body.b.type(x)
    if t.kind != "real":
        raise body.fail(
            "FL0306",
            f"`{kind}` differentiates in a real value, and this is `{t}`",
            args.spans[0],
            suggestion="as in `grad(f)(x)` for `x: R[D]`",
        )
    if kind == "derivative" and t.axes:
        raise body.fail("FL0306", f"`derivative` is in a number, and this is `{t}`", args.spans[0],
                        suggestion="`grad` gives the slopes of a number in a tensor, `jvp` those along a direction")  # fmt: skip
    node = body.graph[x]
    within = (node.attrs["lo"], node.attrs["hi"]) if node.op == "within" else None
    inner = region_of(body, made, t, rest, span, within)
    if inner is None:
        return POISON
    region = inner.region
    result = region.graph[region.outputs[0]].tensor
    name = body.fresh_child_name("derivative")
    from flowlang.elaborate.statements import adopt_body

    adopt_body(body, inner, name, 1, span)
    operands = [*rest, *inner.captures.keys()]
    what = Call(body, name, region, x, operands, span)
    if kind == "divergence":
        if set(result.axes) != set(t.axes):
            raise body.fail(
                "FL0306",
                f"a field has the type of its place, and this goes from `{t}` to `{result}`",
                span,
                suggestion="give the field a result with the axes of its input",
            )
        return Tensor(what.run(Tangents((0,), t.count, trace=True), None, (result, SCALAR)), body)
    if kind == "jvp":
        assert along is not None
        return Tensor(
            what.run(Tangents((0,)), fit_direction(body, along, t, "jvp", args.spans[1]), (result, result)), body
        )
    if kind == "derivative":
        return Tensor(what.run(Tangents((0,)), body.b.const(1.0), (result, result)), body)
    if kind == "grad" and result.axes:
        raise body.fail("FL0306", f"`grad` takes a function that gives one number for each sample, and this gives `{result}`", span,
                        suggestion="sum it, or take `vjp(f, x, w)`")  # fmt: skip
    how = Tangents((0,), t.count) if t.axes else Tangents((0,))
    start = body.b.op("order", basis(body.b, t), names=(DIRECTION, *t.names)) if t.axes else body.b.const(1.0)
    slopes = what.run(how, start, (result, how.type(result)))
    if kind == "jacobian":
        return Tensor(with_primes(body, slopes, t, span), body)
    if kind == "vjp":
        assert along is not None
        weights = fit_direction(body, along, result, "vjp", args.spans[1])
        if result.axes:
            slopes = body.b.op("contract", slopes, weights, axes=result.names, span=span)
        else:
            slopes = body.b.mul(slopes, weights)
    return Tensor(shaped(body, slopes, t, span), body)


class Call:
    """A call of a function's region in forward mode."""

    def __init__(self, body: Body, child: str, region: Region, x: int, context: list[int], span: Span):
        self.body, self.child, self.region, self.x, self.context, self.span = body, child, region, x, context, span

    def run(self, how: Tangents, tangent: int | None, types: tuple[TensorType, TensorType]) -> int:
        """The second result: the tangent of the function's value, or the trace."""
        body = self.body
        if tangent is not None:
            wanted = how.type(body.b.type(self.x))
            if body.b.type(tangent).axes != wanted.axes:
                tangent = body.b.op("expand", tangent, axes=tuple((a.name, a.size) for a in wanted.axes))
        inputs = (self.x, *([] if tangent is None else [tangent]), *self.context)
        attrs = {"child": self.child, "region": self.region, "method": how.method, "lifted": (), "tangents": how}
        node = body.graph.add("call", inputs, TupleType(types), attrs, span=self.span)
        return body.b.op_get(node.id, 1, self.span)


def fit_direction(body: Body, value: int, t: TensorType, name: str, span: Span) -> int:
    have = body.b.type(value)
    if set(have.axes) != set(t.axes):
        raise body.fail(
            "FL0301",
            f"the direction of `{name}` is `{have}`, and it goes along `{t}`",
            span,
            suggestion="give the direction the axes and sizes of the place",
        )
    return body.b.op("order", value, names=t.names) if have.names != t.names else value


def with_primes(body: Body, slopes: int, t: TensorType, span: Span) -> int:
    """Slopes along each entry of the argument, whose axes come last and have a prime: `R[E, D']` for `R[D]` to `R[E]`."""
    if not t.axes:
        return slopes
    into = tuple((f"{a.name}'", a.size) for a in t.axes)
    taken = next((n for n, _ in into if body.b.type(slopes).has(n)), None)
    if taken is not None:
        raise body.fail("FL0307", f"the axis `{taken}` of the derivatives is one of the result's too", span,
                        suggestion="rename it in the function's result")  # fmt: skip
    if t.rank == 1:
        made = body.b.op("rename", slopes, pairs=((DIRECTION, into[0][0]),), span=span)
    else:
        made = body.b.op("split", slopes, axis=DIRECTION, into=into, span=span)
    own = {n for n, _ in into}
    order = (*(n for n in body.b.type(made).names if n not in own), *(n for n, _ in into))
    return body.b.op("order", made, names=order, span=span)


def shaped(body: Body, slopes: int, t: TensorType, span: Span) -> int:
    """A value with one entry for each direction, as a value with the axes of the argument."""
    if not t.axes:
        return slopes
    if t.rank == 1:
        return body.b.op("rename", slopes, pairs=((DIRECTION, t.names[0]),), span=span)
    return body.b.op("split", slopes, axis=DIRECTION, into=tuple((a.name, a.size) for a in t.axes), span=span)


def region_of(
    body: Body, made: Derivative, t: TensorType, rest: list[int], span: Span, within: tuple[float, float] | None = None
) -> Body | None:
    """The function as a region: its first argument maps, the others are context. None after a reported error.

    `within`: the ends between which the first argument was shown to lie.
    """
    from flowlang.elaborate.body import Body as MakeBody

    region = Region("function", "net", Graph(), span=span, library=body.region.library)
    region.signature = f"function of {body.region.signature or body.region.name}"
    inner = MakeBody(body.elab, region, body.module, parent=body, anchor=body.anchor)
    held = {} if within is None else {"domain": Domain("Interval", within, closed(*within))}
    x = Tensor(inner.b.leaf("input", t, batched=True, span=span, label="x", name="x", role="map", **held), inner)
    others = []
    for k, other in enumerate(rest):
        label = f"y{k}" if k else "y"
        domain = body.graph[other].attrs.get("domain")
        known = {} if domain is None else {"domain": domain}
        leaf = inner.b.leaf(
            "input", body.b.type(other), batched=True, span=span, label=label, name=label, role="context", **known
        )
        others.append(Tensor(leaf, inner))
    region.inputs, region.context = [x.id], [o.id for o in others]
    value = apply(inner, inner.capture(made.fn), [x, *others], {}, span)
    if isinstance(value, Poison) or region.broken:
        body.region.broken = True
        return None
    if isinstance(value, Pending) and (value.fallback is None or made.kind == "grad"):
        from flowlang.elaborate.fields import spec_of

        (value,) = value.resolve([spec_of(SCALAR if made.kind in ("grad", "derivative") else t)])
    region.outputs = [inner.tensor(value, span)]
    return inner


def frozen(body: Body, args: Arguments) -> Any:
    """`frozen(v)`: the network, whose parameters get no gradient where it is called so."""
    span = args.span
    assert span is not None
    value = args.positional[0] if len(args.positional) == 1 and not args.keywords else None
    if isinstance(value, Absent | Poison):
        return value
    if not isinstance(value, Instance) or value.kind not in ("net", "norm"):
        found = f", and this is {describe(value)}" if value is not None else ""
        raise body.fail("FL0211", f"`frozen` takes a network{found}", span, suggestion="as in `frozen(v)(x, t)`")
    if value.owner is None and not value.shared:
        value = body.capture(value)
    return replace(value, span=span, frozen=True)


__all__ = ["call_derivative", "differentiated", "frozen"]
