"""`integrate(v, x, t = a -> b, solver)`: velocity fields as regions of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import FlowError
from flowlang.elaborate.calls import Arguments, apply
from flowlang.elaborate.jumps import is_jump, jumps
from flowlang.elaborate.stepping import refuse_words
from flowlang.elaborate.steps import Rule, step_rule
from flowlang.elaborate.stochastic import SENSES, is_stochastic, stochastic
from flowlang.elaborate.tableaus import read_tableau, tableau_of
from flowlang.elaborate.values import (
    POISON,
    Declared,
    Instance,
    Local,
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
from flowlang.ir.graph import Child, Graph, Region
from flowlang.ir.interval import closed
from flowlang.ir.tableau import Tableau
from flowlang.ir.tangents import probes_of, trace_method
from flowlang.ir.types import SCALAR, Axis, TensorType, TupleType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

GRADIENTS = ("through", "adjoint", "reversible")
INTEGRATE_OPTIONS = (("trace", ("exact", "hutchinson", "hutchpp")), ("gradient", GRADIENTS), ("sense", SENSES))
MOST_PROBES = 16  # they are made orthogonal one by one
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}


def integrate(body: Body, args: Arguments) -> Any:
    """The value at the end of a trajectory, a bijection of its start; or its values `at` several times.

    `solver` has a fixed number of `steps`, or `times`, or tolerances when it holds an error estimate.
    """
    span = args.span
    assert span is not None
    known = ("t", "solver", "trace", "log_det", "at", "gradient", "noise", "sense", "increments", "probes")
    args.only(body, "integrate", known)
    if not 2 <= len(args.positional) <= 3:
        raise body.fail("FL0203", "`integrate` takes a field, a value and a solver", span,
                        suggestion="as in `integrate(v, x, t = 0 -> 1, rk4(steps = 20))`")  # fmt: skip
    start, stop = times(body, args, span)
    solver = args.keywords.get("solver", args.positional[2] if len(args.positional) == 3 else None)
    x = state_of(body, args.positional[1], args.spans[1])
    solver = solver_instance(body, solver, span)
    assert isinstance(solver.target, Declared)
    if is_jump(solver.target.declaration):
        return jumps(body, args, solver, x, step_times(body, solver, (start, stop)))
    if noisy(body, args, solver):
        return stochastic(body, args, solver, x, (start, stop), step_times(body, solver, (start, stop)))
    method = solver_attributes(body, solver, span, (start, stop), x.type)
    at = observed(body, args, (min(start, stop), max(start, stop)), span)
    gradient = args.keywords.get("gradient")
    gradient = gradient.word if isinstance(gradient, Option) else "through"
    if gradient == "reversible":
        told = args.keyword_spans.get("gradient", span)
        if "steps" not in method:
            raise body.fail("FL0203", "a reversible gradient needs a number of steps: a step whose size is chosen cannot be undone", told,
                            suggestion="as in `rk4(steps = 20)`, or `gradient = adjoint`")  # fmt: skip
        if at is not None:
            raise body.fail("FL0202", "a reversible gradient is for the end of a trajectory, not for its values `at` times", told,
                            suggestion="`gradient = adjoint`")  # fmt: skip
    inner = field_body(body, args.positional[0], x.type, (min(start, stop), max(start, stop)), span)
    if inner is None:
        return POISON
    rule = method.pop("rule", None)
    if rule is not None and (gradient != "through" or at is not None):
        what = f"`gradient = {gradient}`" if gradient != "through" else "`at`"
        raise body.fail(
            "FL0902", f"{what} with a step rule has no meaning yet", span, suggestion="use a tableau, such as `rk4`"
        )
    if "tableau" in method and not method["tableau"].explicit and (gradient != "through" or at is not None):
        what = f"`gradient = {gradient}`" if gradient != "through" else "`at`"
        raise body.fail(
            "FL0902",
            f"{what} with an implicit method has no meaning yet",
            span,
            suggestion="use an explicit one, such as `rk4`",
        )
    name = body.fresh_child_name("field")
    from flowlang.elaborate.statements import adopt_body

    adopt_body(body, inner, name, 1, span)
    trace = args.keywords.get("trace")
    attrs = {
        "child": name, "region": inner.region, "method": "forward", "start": start, "stop": stop, **method,
        "trace": trace.word if isinstance(trace, Option) else "exact", "gradient": gradient,
    }  # fmt: skip
    if attrs["trace"] == "hutchpp":
        attrs["probes"] = probes(body, args)
    elif "probes" in args.keywords:
        raise body.fail(
            "FL0202",
            "`probes` is for `trace = hutchpp`",
            args.keyword_spans["probes"],
            suggestion="leave `probes` out, or say `trace = hutchpp`",
        )
    if rule is not None:
        attrs |= add_rule(body, rule, span)
    inputs = (x.id, *inner.captures.keys())
    if weighed(body, args):
        if at is not None:
            raise body.fail(
                "FL0202",
                "`log_det` is for the end of a trajectory, not for its values `at` times",
                span,
                suggestion="leave `at` or `log_det` out",
            )
        if attrs.get("indexed") or not attrs.get("linear", True):
            raise body.fail(
                "FL0902",
                f"the steps of `{attrs['solver']}` carry no log-det",
                span,
                suggestion="use a tableau, such as `rk4`",
            )
        return with_log_det(body, inputs, x.type, attrs, span)
    if at is None:
        node = body.graph.add("integrate", inputs, x.type, attrs, span=span)
        return Tensor(node.id, body)
    axis = Axis("T", len(at)) if isinstance(at, tuple) else at.type.axes[0]
    if x.type.has(axis.name):
        raise body.fail("FL0307", f"the times are along `{axis.name}`, and what is integrated has that axis itself", span,
                        suggestion="rename one of them, as in `at = times[T -> S]`")  # fmt: skip
    type_ = TensorType((axis, *x.type.axes), x.type.kind)
    given, how = ((), {"at": at}) if isinstance(at, tuple) else ((at.id,), {"timed": True})
    node = body.graph.add("integrate", (*inputs, *given), type_, {**attrs, **how}, span=span)
    return Tensor(node.id, body)


def add_rule(body: Body, rule: Rule, span: Span) -> dict[str, Any]:
    """The regions of a step rule as children; networks that were given to the solver are handed to them."""
    names = []
    for region in rule.regions:
        names.append(body.fresh_child_name(region.name))
        body.region.children[names[-1]] = Child(names[-1], region, bindings=body.bind_shared(rule.solver, region, span))
    evaluations = sum(n.op == "evaluate" for n in rule.regions[-1].graph)
    return {
        "rule": tuple(names), "rule_regions": rule.regions, "linear": rule.linear, "indexed": rule.indexed, "evaluations": evaluations,
    }  # fmt: skip


def observed(body: Body, args: Arguments, ends: tuple[float, float], span: Span) -> Tensor | tuple[float, ...] | None:
    """The times `at` which values are asked for: a tensor with one axis, or a list, whose axis is `T`."""
    at = args.keywords.get("at")
    if at is None:
        return None
    where = args.keyword_spans["at"]
    if isinstance(at, list) and at and all(isinstance(v, int | float) and not isinstance(v, bool) for v in at):
        outside = next((v for v in at if not ends[0] <= v <= ends[1]), None)
        if outside is not None:
            raise body.fail(
                "FL0305",
                f"{outside} is not between the times {ends[0]} and {ends[1]} of `integrate`",
                where,
                suggestion="let `t` reach as far as the times",
            )
        return tuple(float(v) for v in at)
    found = Tensor(body.tensor(at, where), body)
    if len(found.type.axes) != 1 or found.type.kind != "real":
        raise body.fail("FL0306", f"the times `at` which values are asked for have one axis, and this is `{found.type}`", where,
                        suggestion="as in `at = [0, 0.5, 1]`, or a tensor `R[T]`")  # fmt: skip
    return found


def probes(body: Body, args: Arguments) -> int:
    """How many directions Hutch++ sketches with, and as many that it averages over."""
    found = args.keywords.get("probes", 1)
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= MOST_PROBES:
        raise body.fail(
            "FL0305",
            f"`probes` is a whole number from 1 to {MOST_PROBES}",
            args.keyword_spans["probes"],
            suggestion="as in `probes = 2`",
        )
    return found


def weighed(body: Body, args: Arguments) -> bool:
    found = args.keywords.get("log_det", False)
    if not isinstance(found, bool):
        raise body.fail("FL0306", f"`log_det` is `true` or `false`, and this is {describe(found)}", args.keyword_spans["log_det"],
                        suggestion="as in `z, log_det = integrate(v, x, t = 1 -> 0, solver, log_det = true)`")  # fmt: skip
    return found


def with_log_det(body: Body, inputs: tuple[int, ...], state: TensorType, attrs: dict[str, Any], span: Span) -> Tuple:
    """The end of the trajectory, and the integral of the field's divergence along it (Chen et al. 2018)."""
    attrs |= {"method": trace_method(attrs, state.count), "log_det": True}
    noise = probes_of(attrs["method"], state)
    if noise is not None:
        shape = {"kind": "normal", "axes": tuple((a.name, a.size) for a in noise.axes)}
        inputs = (inputs[0], body.graph.add("random_like", (), noise, shape, batched=True).id, *inputs[1:])
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


def solver_instance(body: Body, solver: Any, span: Span) -> Instance:
    """The solver that `integrate` was given, behind its aliases."""
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
    return solver


def noisy(body: Body, args: Arguments, solver: Instance) -> bool:
    """Whether the equation has noise; the solver has to be for the one or the other."""
    assert isinstance(solver.target, Declared)
    name, made = solver.target.name, is_stochastic(solver.target.declaration)
    if "noise" in args.keywords and not made:
        raise body.fail(
            "FL0211",
            f"`{name}` solves equations without noise",
            solver.span,
            suggestion="use `euler_maruyama`, `stochastic_heun` or `milstein`",
        )
    if made and "noise" not in args.keywords:
        raise body.fail(
            "FL0203",
            f"`{name}` solves equations with noise, and there is none",
            solver.span,
            suggestion="give it, as in `noise = 0.5`, or use `rk4`",
        )
    if not made:
        refuse_words(body, args, ("sense", "increments"), "equations with noise", "leave `{}` out, or give `noise`")
    return made


def step_times(body: Body, solver: Instance, ends: tuple[float, float]) -> tuple[float, ...]:
    """The times between which a solver of given steps steps, in the direction of travel."""
    assert isinstance(solver.target, Declared)
    own = next((p.default for ps in solver.target.declaration.parameters for p in ps if p.name == "steps"), None)
    found = step_options(body, solver, ends) or ({"steps": int(own.value)} if isinstance(own, tree.Number) else {})
    if "steps" not in found:
        raise body.fail(
            "FL0203",
            f"`{solver.target.name}` needs a number of steps",
            solver.span,
            suggestion=f"as in `{solver.target.name}(steps = 100)`",
        )
    start, stop = ends
    if "times" in found:
        return tuple(sorted(found["times"], reverse=stop < start))
    n = found["steps"]
    return (*(start + k * (stop - start) / n for k in range(n)), stop)


def solver_attributes(
    body: Body, solver: Instance, span: Span, ends: tuple[float, float], state: TensorType
) -> dict[str, Any]:
    """The tableau, with steps, times or tolerances."""
    assert isinstance(solver.target, Declared)
    declaration = solver.target.declaration
    name = declaration.name
    rule: Rule | None = None
    tableau: Tableau | None = None
    if tableau_of(declaration) is None:
        rule = step_rule(body, solver, state)
        if rule is None:
            raise poisoned()
    else:
        try:
            tableau = read_tableau(declaration, solver.arguments)
        except FlowError as e:
            body.elab.report.extend(e.diagnostics)
            raise poisoned() from None
    how: dict[str, Any] = {"solver": name, "tableau": tableau} if rule is None else {"solver": name, "rule": rule}
    options = solver.arguments
    shared = {"shared": True} if options.get("shared") and "shared" not in own_parameters(declaration) else {}
    found = step_options(body, solver, ends)
    if shared and (found or tableau is None or tableau.embedded is None or not tableau.explicit):
        raise body.fail("FL0202", "`shared` is for steps whose size is chosen by tolerances", solver.span,
                        suggestion="leave it out: steps that are given are the same for all samples")  # fmt: skip
    if found:
        return {**how, **found}
    own = next((p.default for ps in declaration.parameters for p in ps if p.name == "steps"), None)
    if rule is not None and isinstance(own, tree.Number):
        return {**how, "steps": int(own.value)}
    if tableau is None or tableau.embedded is None or not tableau.explicit:
        raise body.fail(
            "FL0203", f"`{name}` has no error estimate, and needs a number of steps", solver.span,
            suggestion=f"as in `{name}(steps = 20)`; `dopri5` chooses its steps by tolerances",
        )  # fmt: skip
    most = {"max_steps": options["max_steps"]} if "max_steps" in options else {}
    return {**how, **{k: float(options.get(k, v)) for k, v in TOLERANCES.items()}, **most, **shared}


def own_parameters(declaration: tree.Declaration) -> set[str]:
    return {p.name for ps in declaration.parameters for p in ps}


def step_options(body: Body, solver: Instance, ends: tuple[float, float]) -> dict[str, Any]:
    """The steps or times that a solver was given; nothing where it has neither."""
    options, name = solver.arguments, solver.target.name
    given = [n for n in ("steps", "times", "rtol") if n in options or (n == "rtol" and "atol" in options)]
    if len(given) > 1:
        words = {"steps": "a number of steps", "times": "times", "rtol": "tolerances"}
        raise body.fail(
            "FL0202",
            f"`{name}` takes {words[given[0]]} or {words[given[1]]}, not both",
            solver.span,
            suggestion=f"leave out `{given[1]}`",
        )
    if "steps" in options:
        return {"steps": options["steps"]}
    if "times" in options:
        found = sorted({float(v) for v in options["times"]})
        if (found[0], found[-1]) != (min(ends), max(ends)):
            raise body.fail(
                "FL0305", f"the times of `{name}` go from {found[0]:g} to {found[-1]:g}, and `integrate` from {ends[0]:g} to {ends[1]:g}",
                solver.span, suggestion="the first and last of the times are those of `integrate`",
            )  # fmt: skip
        return {"steps": len(found) - 1, "times": tuple(found)}
    return {}


def poisoned() -> Exception:
    from flowlang.elaborate.body import Poisoned

    return Poisoned()


def field_body(
    body: Body, fn: Any, state: TensorType, times: tuple[float, float], span: Span, *, free: bool = False
) -> Body | None:
    """The field v(x, t) for t between two times, as a region: x and t in, x's derivative out.

    `free`: what comes out may have another type. None after a reported error.
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
    # A net of one value would take the time as a part of it; a local function of one does not depend on time.
    timeless = isinstance(fn, Local) and len(own_parameters(fn.declaration)) == 1
    value = apply(inner, inner.capture(fn), [x] if timeless else [x, t], {}, span)
    if isinstance(value, Poison) or region.broken:
        body.region.broken = True
        return None
    domain = spec_of(real)
    if isinstance(value, Pending):
        (value,) = value.resolve([domain])
    if not free:
        (value,) = inner.fit(value, [domain], span)
    if isinstance(value, Poison):
        body.region.broken = True
        return None
    region.outputs = [inner.tensor(value, span)]
    return inner


def spec_of(t: TensorType) -> TypeSpec:
    from flowlang.ir.domains import R

    return TypeSpec(R, tuple((a.name, a.size) for a in t.axes))
