"""`integrate(v, x, t = a -> b, solver)`: velocity fields as regions of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import FlowError
from flowlang.elaborate.calls import Arguments, apply
from flowlang.elaborate.tableaus import read_tableau, tableau_of
from flowlang.elaborate.values import (
    POISON,
    Declared,
    Instance,
    Option,
    Pending,
    Poison,
    Tensor,
    Transition,
    Tuple,
    TypeSpec,
    describe,
)
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Region
from flowlang.ir.interval import closed
from flowlang.ir.tableau import Tableau
from flowlang.ir.types import SCALAR, TensorType, TupleType
from flowlang.source import Span

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

INTEGRATE_OPTIONS = (("trace", ("exact", "hutchinson")),)
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}


def integrate(body: Body, args: Arguments) -> Any:
    """The value at the end of a trajectory; a bijection of its start.

    `solver` has a fixed number of `steps`, or tolerances when it holds an error estimate.
    """
    span = args.span
    assert span is not None
    known = ("t", "solver", "trace", "log_det")
    for name in args.keywords:
        if name not in known:
            raise body.fail(
                "FL0202", f"`integrate` has no argument `{name}`", args.keyword_spans[name],
                suggestion=f"its keyword arguments are {', '.join(f'`{n}`' for n in known)}",
            )  # fmt: skip
    if not 2 <= len(args.positional) <= 3:
        raise body.fail("FL0203", "`integrate` takes a field, a value and a solver", span,
                        suggestion="as in `integrate(v, x, t = 0 -> 1, rk4(steps = 20))`")  # fmt: skip
    start, stop = times(body, args, span)
    solver = args.keywords.get("solver", args.positional[2] if len(args.positional) == 3 else None)
    method = solver_attributes(body, solver, span)
    x = state_of(body, args.positional[1], args.spans[1])
    inner = field_body(body, args.positional[0], x.type, (min(start, stop), max(start, stop)), span)
    if inner is None:
        return POISON
    name = body.fresh_child_name("field")
    from flowlang.elaborate.statements import adopt_body

    adopt_body(body, inner, name, 1, span)
    trace = args.keywords.get("trace")
    attrs = {
        "child": name, "region": inner.region, "method": "forward", "start": start, "stop": stop, **method,
        "trace": trace.word if isinstance(trace, Option) else "exact",
    }  # fmt: skip
    inputs = (x.id, *inner.captures.keys())
    if weighed(body, args):
        return with_log_det(body, inputs, x.type, attrs, span)
    node = body.graph.add("integrate", inputs, x.type, attrs, span=span)
    return Tensor(node.id, body)


def weighed(body: Body, args: Arguments) -> bool:
    found = args.keywords.get("log_det", False)
    if not isinstance(found, bool):
        raise body.fail("FL0306", f"`log_det` is `true` or `false`, and this is {describe(found)}", args.keyword_spans["log_det"],
                        suggestion="as in `z, log_det = integrate(v, x, t = 1 -> 0, solver, log_det = true)`")  # fmt: skip
    return found


def with_log_det(body: Body, inputs: tuple[int, ...], state: TensorType, attrs: dict[str, Any], span: Span) -> Tuple:
    """The end of the trajectory, and the integral of the field's divergence along it (Chen et al. 2018)."""
    attrs |= {"method": "divergence", "log_det": True}
    if attrs["trace"] == "hutchinson":
        attrs["method"] = "divergence_along"
        shape = {"kind": "normal", "axes": tuple((a.name, a.size) for a in state.axes)}
        inputs = (inputs[0], body.graph.add("random_like", (), TensorType(state.axes), shape, batched=True).id, *inputs[1:])
    whole = body.graph.add("integrate", inputs, TupleType((state, SCALAR)), attrs, span=span)
    return Tuple(tuple(Tensor(body.b.op_get(whole.id, k, span), body) for k in range(2)))


def state_of(body: Body, value: Any, span: Span) -> Tensor:
    """What is integrated: one tensor."""
    if isinstance(value, Tuple):
        raise body.not_yet("integrate of several", "integrating several values at once has no meaning yet", span)
    return Tensor(body.tensor(value, span), body)


def times(body: Body, args: Arguments, span: Span) -> tuple[float, float]:
    t = args.keywords.get("t")
    if t is None:
        return 0.0, 1.0
    ends = (t.start, t.stop) if isinstance(t, Transition) else ()
    if not ends or not all(isinstance(e, int | float) and not isinstance(e, bool) for e in ends):
        raise body.fail("FL0305", "the times of `integrate` are two numbers", args.keyword_spans.get("t", span),
                        suggestion="as in `t = 0 -> 1`")  # fmt: skip
    if ends[0] == ends[1]:
        raise body.fail(
            "FL0305",
            "`integrate` goes from one time to another, and these are equal",
            args.keyword_spans["t"],
            suggestion="as in `t = 0 -> 1`",
        )
    return float(ends[0]), float(ends[1])


def solver_attributes(body: Body, solver: Any, span: Span) -> dict[str, Any]:
    """The tableau, with steps or tolerances."""
    if isinstance(solver, Declared):
        solver = Instance(solver, {}, span)
    if (
        isinstance(solver, Instance)
        and isinstance(solver.target, Declared)
        and solver.target.declaration.alias is not None
    ):
        solver = body.elab.resolve_alias(solver.target)
    if not isinstance(solver, Instance) or not isinstance(solver.target, Declared) or solver.kind != "solver":
        raise body.fail(
            "FL0211", f"`integrate` needs a solver, and this is {describe(solver)}" if solver is not None
            else "`integrate` needs a solver", span, suggestion="as in `rk4(steps = 20)` or `dopri5(rtol = 1e-5, atol = 1e-5)`",
        )  # fmt: skip
    declaration = solver.target.declaration
    name = declaration.name
    if tableau_of(declaration) is None:
        raise body.fail("FL0902", f"integrating by a step rule such as `{name}` has no meaning yet", solver.span, suggestion="choose a tableau, as `rk4(steps = 8)` or `dopri5`")
    try:
        tableau: Tableau = read_tableau(declaration, solver.arguments)
    except FlowError as e:
        body.elab.report.extend(e.diagnostics)
        raise poisoned() from None
    if not tableau.explicit:
        raise body.fail("FL0902", f"integrating by an implicit method such as `{name}` has no meaning yet", solver.span, suggestion="choose an explicit method, as `rk4(steps = 8)` or `dopri5`")
    options = solver.arguments
    if "steps" in options:
        if "rtol" in options or "atol" in options:
            raise body.fail("FL0202", f"`{name}` takes a number of steps or tolerances, not both", solver.span, suggestion="keep `steps` for fixed steps, or `rtol` and `atol` for adaptive ones")
        return {"solver": name, "tableau": tableau, "steps": options["steps"]}
    if tableau.embedded is None:
        raise body.fail(
            "FL0203", f"`{name}` has no error estimate, and needs a number of steps", solver.span,
            suggestion=f"as in `{name}(steps = 20)`; `dopri5` chooses its steps by tolerances",
        )  # fmt: skip
    return {"solver": name, "tableau": tableau, **{k: float(options.get(k, v)) for k, v in TOLERANCES.items()}}


def poisoned() -> Exception:
    from flowlang.elaborate.body import Poisoned

    return Poisoned()


def field_body(body: Body, fn: Any, state: TensorType, times: tuple[float, float], span: Span) -> Body | None:
    """The field v(x, t) for t between two times, as a region: x and t in, x's derivative out.

    None after a reported error.
    """
    from flowlang.elaborate.body import Body as MakeBody

    region = Region("field", "net", Graph(), span=span, library=body.region.library)
    region.signature = f"field of {body.region.signature or body.region.name}"
    inner = MakeBody(body.elab, region, body.module, parent=body, anchor=body.anchor)
    real = TensorType(state.axes)
    x = Tensor(inner.b.leaf("input", real, batched=True, span=span, label="x", name="x", role="map"), inner)
    time = Domain("Interval", times, closed(*times))
    t = Tensor(
        inner.b.leaf("input", SCALAR, batched=True, span=span, label="t", name="t", role="context", domain=time), inner
    )
    region.inputs, region.context = [x.id], [t.id]
    value = apply(inner, inner.capture(fn), [x, t], {}, span)
    if isinstance(value, Poison) or region.broken:
        body.region.broken = True
        return None
    domain = spec_of(real)
    if isinstance(value, Pending):
        (value,) = value.resolve([domain])
    (value,) = inner.fit(value, [domain], span)
    if isinstance(value, Poison):
        body.region.broken = True
        return None
    region.outputs = [inner.tensor(value, span)]
    return inner


def spec_of(t: TensorType) -> TypeSpec:
    from flowlang.ir.domains import R

    return TypeSpec(R, tuple((a.name, a.size) for a in t.axes))
