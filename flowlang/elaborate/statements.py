"""Statements of bodies and chains."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

from flowlang import limits
from flowlang.diagnostics import Label
from flowlang.elaborate.axes import words
from flowlang.elaborate.calls import apply, instance_of
from flowlang.elaborate.parts import whole
from flowlang.elaborate.scope import did_you_mean
from flowlang.elaborate.types import evaluate_type, is_optional, is_tensor_type
from flowlang.elaborate.unread import look_up_names
from flowlang.elaborate.values import (
    ABSENT,
    POISON,
    WITNESS,
    AppliedBuiltin,
    Bracketed,
    Builtin,
    BuiltinNet,
    Declared,
    DistributionValue,
    FirstBatch,
    Instance,
    Local,
    Pending,
    Poison,
    Static,
    Tensor,
    Tuple,
    TypeSpec,
    describe,
)
from flowlang.elaborate.weights import SCHEMES, Fans, scheme_start
from flowlang.ir.check import after
from flowlang.ir.distributions import COMBINED, DISTRIBUTIONS
from flowlang.ir.domains import Domain, domain
from flowlang.ir.graph import BaseDistribution, Child, Draw, Emission, Graph, Region, Start, Step
from flowlang.ir.ops.base import OpProblem
from flowlang.ir.types import SCALAR, TensorType, TupleType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

NOTHING = object()


def run_statements(body: Body, statements: tuple[tree.Statement, ...]) -> Any:
    """Runs a body; its result is the value of the last expression, named or not."""
    result: Any = NOTHING
    for k, statement in enumerate(statements):
        value = run_one(body, statement, last=k == len(statements) - 1)
        if value is not NOTHING:
            result = value
    return result


def run_one(body: Body, statement: tree.Statement, *, last: bool) -> Any:
    from flowlang.elaborate.body import Fail, Poisoned

    try:
        return run(body, statement, last=last)
    except Fail as e:
        body.report(e.diagnostic)
    except Poisoned:
        body.region.broken = True
    except OpProblem as e:
        body.report(body.diagnostic(e.code, e.message, statement.span, suggestion=e.suggestion, notes=e.notes))
    body.lose(statement)
    for name in bound_names(statement):
        body.names[name] = POISON
        body.used.add(name)
    if body.chain_value is None and body.region.kind == "flow":
        body.chain_value = POISON  # it may have been the `data`
    return POISON


def bound_names(statement: tree.Statement) -> list[str]:
    """The names that a statement binds or updates, those inside its blocks too."""
    match statement:
        case tree.Bind():
            return [t.name for t in statement.targets]
        case tree.Declare():
            return [e.name for e in statement.entries]
        case tree.Declaration():
            return [statement.name]
        case tree.Invalid():
            return list(statement.names)
        case tree.If():
            return [n for s in (*statement.then, *statement.orelse) for n in bound_names(s)]
        case tree.Repeat() | tree.For() | tree.Scan():
            return [n for s in statement.body for n in bound_names(s)]
    return []


def run(body: Body, statement: tree.Statement, *, last: bool) -> Any:
    match statement:
        case tree.Bind():
            return bind(body, statement)
        case tree.ExprStatement():
            return expression(body, statement, last)
        case tree.Declare():
            declare(body, statement)
        case tree.Base():
            base(body, statement)
        case tree.Emit():
            emit(body, statement)
        case tree.Require():
            body.elab.requirements.setdefault(id(body.region), []).append((statement, body))
        case tree.If():
            from flowlang.elaborate.scans import run_by_mode, training_first

            first = training_first(statement.condition)
            if first is not None:
                return run_by_mode(body, statement, first)
            branch, other = statement.then, statement.orelse
            if not body.static_bool(statement.condition):
                branch, other = other, branch
            look_up_names(body, other)
            if body.chain_value is not None:
                run_statements(body, branch)
                return NOTHING
            return run_statements(body, branch)
        case tree.For():
            return run_for(body, statement)
        case tree.Repeat():
            return run_repeat(body, statement)
        case tree.Declaration():
            body.names[statement.name] = Local(statement, body)
            body.used.add(statement.name)
        case tree.Scan():
            from flowlang.elaborate.scans import run_scan

            return run_scan(body, statement)
        case tree.Tableau():
            raise body.fail(
                "FL0902", "a tableau has no meaning yet", statement.span, suggestion="it belongs in a `solver`"
            )
        case tree.Import():
            raise body.fail(
                "FL0106",
                "`import` stands at the top of a file",
                statement.span,
                suggestion="move it above the declarations",
            )
        case tree.Invalid():
            if body.chain_value is not None:
                step_failed(body)
            raise_poison()
    return NOTHING


# ---- bindings -----------------------------------------------------------------------------------


def target_types(body: Body, statement: tree.Bind) -> list[tree.Expr] | None:
    """A type covers every name since the last typed one."""
    types: list[tree.Expr | None] = [t.type for t in statement.targets]
    if not any(t is not None for t in types):
        return None
    for k in range(len(types) - 2, -1, -1):
        if types[k] is None:
            types[k] = types[k + 1]
    if types[-1] is None:
        raise body.fail(
            "FL0306",
            f"`{statement.targets[-1].name}` has no type",
            statement.targets[-1].span,
            suggestion="the last name must have one: `a, b: R[D] = ..` covers both",
        )
    return [t for t in types if t is not None]


def bind(body: Body, statement: tree.Bind) -> Any:
    targets = statement.targets
    if statement.op != ":=" and any(t.index for t in targets):
        raise body.fail(
            "FL0307",
            "a part is updated, and not bound",
            statement.span,
            suggestion="write `x[M = k] := v`, after `x = ..`",
        )
    if statement.op == "~":
        return draw(body, statement)
    if statement.op == ":=":
        for t in targets:
            if body.find(t.name) is None:
                raise body.fail(
                    "FL0201",
                    f"`{t.name}` is updated before it is bound",
                    t.span,
                    suggestion=did_you_mean(t.name, body.names) or f"bind it first: `{t.name} = ...`",
                )
    else:
        for t in targets:
            if t.name in body.axes and body.find(t.name) is None:
                raise body.fail(
                    "FL0206",
                    f"`{t.name}` is an axis here, and cannot name a value as well",
                    t.span,
                    suggestion="choose another name",
                )
    types = target_types(body, statement)
    if len(statement.values) == 1:
        expr = statement.values[0]
        if types is not None:
            values = body.typed(expr, types)
        else:
            value = body.ev(expr)
            if len(targets) == 1:
                values = [value]
            elif isinstance(value, Poison):
                values = [POISON] * len(targets)
            elif isinstance(value, Tuple | list):
                values = list(value.items) if isinstance(value, Tuple) else list(value)
            elif isinstance(value, Pending) and value.name == WITNESS:
                raise_poison()
            else:
                raise body.fail(
                    "FL0308",
                    f"{len(targets)} names for {describe(value)}",
                    statement.span,
                    suggestion="only a call that gives several values takes several names",
                )
    else:
        values = []
        for k, e in enumerate(statement.values):
            values.extend(body.typed(e, [types[k]]) if types is not None and k < len(types) else [body.ev(e)])
    if len(values) != len(targets):
        raise body.fail(
            "FL0308",
            f"{len(targets)} names for {len(values)} values",
            statement.span,
            suggestion="give one name for each value",
        )
    if any(isinstance(v, Poison) for v in values):
        body.lose(statement)
    for t, v in zip(targets, values, strict=True):
        if t.index and not isinstance(v, Poison):
            v = whole(body, t, body.tensor(v, t.span))
        bind_name(body, t, v, statement.op)
    return values[0] if len(values) == 1 else Tuple(tuple(values))


def bind_name(body: Body, target: tree.Target, value: Any, op: str) -> None:
    name = target.name
    if isinstance(value, FirstBatch):
        restart(body, target, value, op)
        return
    value = own(body, name, value, target.span)
    if isinstance(value, Tensor):
        value = body.capture(value)
        body.graph.relabel(value.id, name)
    if op == "=" and name in body.names:
        body.used.add(name)
    body.names[name] = value
    if op == "=":
        body.bound_spans[name] = target.span
        body.used.discard(name)


def own(body: Body, name: str, value: Any, span: Span) -> Any:
    """What is bound to a name is an instance of this body, wherever it is used; so is each item of a list."""
    if isinstance(value, list):
        return [own(body, name, item, span) for item in value]
    value = instance_of(body.elab, value, span)
    if isinstance(value, Instance) and value.owner is None:
        value.owner, value.label, value.name = body, name, body.fresh_child_name(name)
    return value


def draw(body: Body, statement: tree.Bind) -> Any:
    if len(statement.targets) != 1 or len(statement.values) != 1:
        raise body.fail(
            "FL0308", "one name is drawn at a time", statement.span, suggestion="write one draw for each name"
        )
    target = statement.targets[0]
    dist = distribution(body, statement.values[0])
    if dist is None:
        raise_poison()
    assert dist is not None
    drawn = body.draw(target, dist, statement.span)
    if drawn is not None:
        bind_name(body, target, drawn, "=")
        return drawn
    spec = evaluate_type(body, target.type) if target.type is not None else None
    arguments = distribution_arguments(body, dist)
    type_ = draw_type(body, spec, arguments, statement.span, dist.law.event_axes)
    if is_network(body):  # noise that nothing is weighed by
        body.b.span = statement.span
        noise = Tensor(dist.law.draw(body.b, type_, dict(arguments)), body)
        bind_name(body, target, noise, "=")
        return noise
    support = dist.law.support({k: body.b.const_value(i) for k, i in arguments})
    surface = domain("Sphere") if dist.law.name == "uniform_sphere" else None
    value = body.b.leaf(
        "input", type_, batched=True, span=statement.span, label=target.name, name=target.name, role="draw",
        domain=surface or Domain("R", (), support),
    )  # fmt: skip
    body.region.draws.append(Draw(value, dist.law, arguments, statement.span))
    result = Tensor(value, body)
    bind_name(body, target, result, "=")
    return result


def is_network(body: Body | None) -> bool:
    """Whether a body is a net's or a norm's: a loop inside a bijector is the bijector's."""
    kinds = []
    while body is not None:
        kinds.append(body.region.kind)
        body = body.scope
    return kinds[0] in ("net", "norm") and not {"bijector", "chain", "flow"} & set(kinds)


def draw_type(
    body: Body, spec: Any, arguments: tuple[tuple[str, int], ...], span: Span, hidden: tuple[str, ...]
) -> TensorType:
    if isinstance(spec, TypeSpec):
        axes = list(spec.axes)
        if spec.rest:
            axes[spec.rest_at : spec.rest_at] = [(a.name, a.size) for a in body.rest]
        for n, s in axes:
            if s is None:
                raise body.fail(
                    "FL0310", f"the size of axis `{n}` is open", span, suggestion=f"write it, as in `{n} = 8`"
                )
        return TensorType.of(*((n, s) for n, s in axes if s is not None))
    best = SCALAR
    for _, id in arguments:
        found = body.b.type(id).without(hidden)
        if found.rank > best.rank:
            best = found
    return best.as_kind("real")


def distribution(body: Body, expr: tree.Expr) -> DistributionValue | None:
    """The distribution an expression names; None after a reported error."""
    value = body.ev(expr)
    if isinstance(value, Poison):
        return None
    if isinstance(value, Builtin) and value.kind == "distribution":
        return bare_distribution(body, value, expr.span)
    if isinstance(value, DistributionValue):
        return value
    raise body.fail(
        "FL0211",
        f"a distribution is needed here, and this is {describe(value)}",
        expr.span,
        suggestion=f"distributions are {', '.join(f'`{d}`' for d in sorted([*DISTRIBUTIONS, *COMBINED]))}",
    )


def bare_distribution(body: Body, builtin: Builtin, span: Span) -> DistributionValue:
    law = DISTRIBUTIONS.get(builtin.name)
    needed = [n for n, (default, _) in law.parameters.items() if default is None] if law is not None else []
    if law is None or needed:
        words = f"needs {', '.join(f'`{n}`' for n in needed)}" if needed else "needs its arguments"
        raise body.fail("FL0203", f"`{builtin.name}` {words}", span, suggestion=DISTRIBUTION_HINTS.get(builtin.name))
    return DistributionValue(law, (), span)


DISTRIBUTION_HINTS = {
    "student_t": "as in `student_t(df = 5)`",
    "multivariate_normal": "as in `multivariate_normal(scale_tril = L)` with `param L: LowerTriangular[D', D]`",
    "mixture": "as in `mixture[K](logits = w, normal(mean = m, scale = s))`, m and s having the axis K",
    "categorical": "as in `categorical[K](logits = w)`",
}


def distribution_arguments(
    body: Body, dist: DistributionValue, value: TensorType | None = None
) -> tuple[tuple[str, int], ...]:
    """The arguments as values here; each may vary along the axes of the value alone."""
    found = tuple((n, body.tensor(body.capture(v), dist.span)) for n, v in dist.arguments)
    if value is not None:
        for name, id in found:
            own = set(body.b.type(id).names) - set(dist.law.event_axes)
            if name in dist.law.matrices:
                own.discard(body.b.type(id).names[-2])
            extra = sorted(n for n in own if not value.has(n))
            if extra:
                raise body.fail(
                    "FL0307",
                    f"`{name}` of `{dist.name}` has an axis `{extra[0]}`, which the value `{value}` lacks",
                    dist.span,
                    suggestion="give the drawn value that axis, or reduce over it",
                )
            for a in body.b.type(id).axes:
                if value.has(a.name) and value.size(a.name) != a.size:
                    raise body.fail(
                        "FL0301",
                        f"axis `{a.name}` has size {a.size} in `{name}` of `{dist.name}`, and {value.size(a.name)} in the value",
                        dist.span,
                        suggestion="the parameters of a distribution have the sizes of its value",
                    )
    return found


def expression(body: Body, statement: tree.ExprStatement, last: bool) -> Any:
    if body.chain_value is not None:
        for e in statement.values:
            run_step(body, e)
        return NOTHING
    if body.region.kind == "flow":
        raise body.fail(
            "FL0212", f"the flow `{body.region.name}` has no `data` before its first step", statement.span,
            suggestion="begin with `data x: R[D = 2]`",
        )  # fmt: skip
    if not last:
        for e in statement.values:
            body.ev(e)
        raise body.fail(
            "FL0209",
            "the value of this expression goes nowhere",
            statement.span,
            suggestion="bind it to a name, or remove it; a line that begins with `-` begins a new statement",
        )
    values = [body.ev(e) for e in statement.values]
    return values[0] if len(values) == 1 else Tuple(tuple(values))


# ---- declarations inside bodies -----------------------------------------------------------------


def declare(body: Body, statement: tree.Declare) -> None:
    from flowlang.elaborate.body import Fail
    from flowlang.elaborate.steps import RuleBody

    for entry in statement.entries:
        try:
            if statement.word in ("data", "given"):
                declare_input(body, statement.word, entry)
            elif statement.word == "state" and isinstance(body, RuleBody):
                body.declare_state(entry)
            else:
                declare_param(body, statement.word, entry)
        except Fail as e:
            body.report(e.diagnostic)
            body.lose(entry)
            body.names[entry.name] = POISON
            if statement.word == "data" and body.region.kind == "flow":
                body.chain_value = POISON


def check_new(body: Body, name: str, span: Span) -> None:
    if name in body.bound_spans:
        raise body.fail(
            "FL0204",
            f"`{name}` is declared twice",
            span,
            labels=(Label(body.bound_spans[name], "first here"),),
            suggestion="give one of them another name",
        )
    body.bound_spans[name] = span
    body.used.add(name)


def declare_input(body: Body, word: str, entry: tree.Entry) -> None:
    if body.region.kind != "flow":
        raise body.fail(
            "FL0106",
            f"`{word}` belongs in a flow",
            entry.span,
            suggestion="a bijector's inputs stand in its parameter list: `bijector b(x: R[D]) { .. }`",
        )
    check_new(body, entry.name, entry.span)
    if entry.type is None:
        raise body.fail(
            "FL0306",
            f"`{entry.name}` needs a type, as in `{word} {entry.name}: R[D = 2]`",
            entry.span,
            suggestion="a domain with axes, as `R[D]`, `Positive[D]` or `Invertible[D', D]`",
        )
    if word == "data" and body.region.steps:
        raise body.fail(
            "FL0106",
            "`data` after a step is never mapped by it",
            entry.span,
            suggestion="declare all data before the first step",
        )
    spec = evaluate_type(body, entry.type)
    if isinstance(spec, Static):
        raise body.fail(
            "FL0306",
            f"`{spec.name}` is not a tensor type",
            entry.type.span,
            suggestion="a tensor's type is a domain with axes, as in `R[D = 2]`",
        )
    axes: list[tuple[str, int]] = []
    for n, s in spec.axes:
        size = body.elab.size_override(body, n, s, entry)
        if size == 0:
            raise body.fail(
                "FL0307", f"axis `{n}` of a flow's input has size 0", entry.span, suggestion="give it at least 1"
            )
        axes.append((n, size))
        if word == "data" or n not in body.axes:
            body.axes[n] = size
    if spec.rest:
        raise body.fail(
            "FL0307",
            "`..` cannot stand in a flow's inputs",
            entry.type.span,
            suggestion="name each axis, as in `data x: R[D = 2]`",
        )
    type_ = TensorType.of(*axes, kind=spec.domain.kind)
    role = "map" if word == "data" else "context"
    id = body.b.leaf(
        "input", type_, batched=True, span=entry.span, label=entry.name, name=entry.name, role=role, domain=spec.domain,
        given=word == "given",
    )  # fmt: skip
    value = Tensor(id, body)
    if word == "data":
        body.region.inputs.append(id)
        before = body.chain_value
        if not isinstance(before, Poison):
            body.chain_value = value if before is None else Tuple((*parts(before), value))
        body.names[entry.name] = value
    else:
        body.region.context.append(id)
        body.names[entry.name] = value


def declare_param(body: Body, word: str, entry: tree.Entry) -> None:
    check_new(body, entry.name, entry.span)
    if entry.type is None:
        raise body.fail(
            "FL0306",
            f"`{entry.name}` needs a type, as in `param {entry.name}: R[D] = 0`",
            entry.span,
            suggestion="a domain with axes, as `R[D]`, `Positive[D]` or `Invertible[D', D]`",
        )
    spec = evaluate_type(body, entry.type)
    if isinstance(spec, Static):
        raise body.fail(
            "FL0306",
            f"`{spec.name}` is not a tensor type",
            entry.type.span,
            suggestion="a tensor's type is a domain with axes, as in `R[D = 2]`",
        )
    axes = [*spec.axes]
    if spec.rest:
        axes[spec.rest_at : spec.rest_at] = [(a.name, a.size) for a in body.rest]
    for n, s in axes:
        if s is None:
            raise body.fail(
                "FL0310",
                f"the size of axis `{n}` is open",
                entry.type.span,
                suggestion=f"write `{n} = ...` in the type",
            )
    type_ = TensorType.of(*((n, s) for n, s in axes if s is not None), kind=spec.domain.kind)
    if type_.count > body.elab.parameter_limit:
        raise body.fail(
            "FL0901",
            f"`{entry.name}` would have {type_.count:,} elements, above the limit of {body.elab.parameter_limit:,}",
            entry.span,
            suggestion="choose smaller sizes, or raise `max_parameters`",
        )
    check_matrix(body, spec.domain, type_, entry)
    init = initial_value(body, spec.domain, entry, type_)
    start = init.value if isinstance(init, FirstBatch) else init if isinstance(init, Tensor) else None
    if start is not None:
        assert entry.value is not None
        check_first_batch(body, start, type_, spec.domain, entry.name, entry.value.span)
        init = init.before if isinstance(init, FirstBatch) else default_start(spec.domain)
        if init is None:
            raise body.fail(
                "FL0305", f"what `{entry.name}` is before the first batch is not told", entry.value.span,
                suggestion="as in `first_batch(1 / std[B](x), 1)`",
            )  # fmt: skip
    id = body.b.leaf(
        "param" if word == "param" else "state", type_, batched=False, span=entry.span, label=entry.name,
        name=entry.name, domain=spec.domain, init=init,
    )  # fmt: skip
    if word == "state":
        body.states[entry.name] = id
    if start is not None:
        body.region.starts.append(Start(id, start.id))
    for n, s in axes:
        if s is not None and n not in body.axes and not n.endswith("'"):
            body.axes[n] = s
    body.names[entry.name] = Tensor(id, body)


def restart(body: Body, target: tree.Target, value: FirstBatch, op: str) -> None:
    """`W := first_batch(e)`: where the first batch puts a parameter that has a start, by which e may be made.

    What reads the name afterwards reads a second leaf of the same parameter, so that e can read the first.
    """
    held = body.names.get(target.name)
    node = body.graph[held.id] if isinstance(held, Tensor) and held.body is body else None
    if (
        op != ":="
        or value.before is not None
        or node is None
        or node.op != "param"
        or node.attrs["name"] != target.name
    ):
        raise body.fail(
            "FL0306", "`first_batch` starts a parameter of this declaration", target.span,
            suggestion="as in `param g: R[D] = first_batch(1 / std[B](x), 1)`, or `W := first_batch(W * s)` after `param W`",
        )  # fmt: skip
    check_first_batch(body, value.value, node.tensor, node.attrs["domain"], target.name, target.span)
    attrs = {**node.attrs, "again": True}
    id = body.b.leaf("param", node.type, batched=False, span=target.span, label=target.name, **attrs)
    body.region.starts.append(Start(id, value.value.id))
    body.names[target.name] = Tensor(id, body)


def check_first_batch(body: Body, start: Tensor, type_: TensorType, domain: Domain, name: str, span: Span) -> None:
    """A start that is computed: a statistic of the first batch, with the parameter's axes."""
    if body.graph[start.id].batched:
        raise body.fail(
            "FL0305",
            f"the start of `{name}` is a value of each sample, and a parameter is one for all",
            span,
            suggestion="reduce over the batch, as in `= mean[B](x)`",
        )
    if not set(start.type.axes) <= set(type_.axes):
        raise body.fail(
            "FL0301",
            f"the start of `{name}` is `{start.type}`, not `{type_}`",
            span,
            suggestion="a start has the type of what it starts, or is one number",
        )
    if domain.structure is not None:
        raise body.fail(
            "FL0902",
            f"a `{domain.name}` cannot start from the first batch yet",
            span,
            suggestion="start it from a number or a draw",
        )


def check_matrix(body: Body, domain: Domain, type_: TensorType, entry: tree.Entry) -> None:
    from flowlang.ir.domains import SQUARE_STRUCTURES

    if domain.structure == "stiefel" and (type_.rank < 2 or type_.axes[-1].size > type_.axes[-2].size):
        raise body.fail(
            "FL0311", f"`Stiefel` has orthonormal columns, at most as many as rows, and this is `{type_}`", entry.span,
            suggestion="write `Stiefel[D, K = k]` with k at most D",
        )  # fmt: skip
    if domain.structure in SQUARE_STRUCTURES:
        if type_.rank < 2:
            raise body.fail(
                "FL0311",
                f"`{domain.name}` is a matrix and needs two axes, as in `[D', D]`",
                entry.span,
                suggestion="a second axis of the same size has a prime",
            )
        a, b = type_.axes[-2], type_.axes[-1]
        if a.size != b.size:
            raise body.fail(
                "FL0311",
                f"`{domain.name}` is square, and this has {a.size} x {b.size}",
                entry.span,
                suggestion="as in `[D', D]`, whose sizes are equal",
            )


def initial_value(body: Body, domain: Domain, entry: tree.Entry, type_: TensorType) -> Any:
    if entry.value is None:
        return default_start(domain)
    if entry.op == "=":
        value = body.ev(entry.value)
        if isinstance(value, Poison):
            return 0.0
        if isinstance(value, bool | int | float):
            if domain.structure is None and not domain.interval.contains(float(value)):
                raise body.fail(
                    "FL0311",
                    f"{value:g} is not in `{domain}`",
                    entry.value.span,
                    suggestion="start inside the domain, or declare another one",
                )
            return float(value)
        if isinstance(value, list):
            return ("values", tuple(value))
        if isinstance(value, Tensor | FirstBatch):
            return value
        if isinstance(value, Builtin) and value.name in ("zeros", "ones"):
            return 0.0 if value.name == "zeros" else 1.0
        raise body.fail(
            "FL0305",
            f"a start is a number or a list, and this is {describe(value)}",
            entry.value.span,
            suggestion="as in `= 0`, `= [1, 2]`, or a random start as `~ normal(0, 1)`",
        )
    name, args = start_call(body, entry.value)
    if name in SCHEMES and domain.structure in (None, "lipschitz"):
        shape = type_.shape or (1,)
        window = prod(shape[2:])
        into = prod(shape[1:])
        return scheme_start(name, args[0], Fans(into, shape[0] * window))
    if name in SCHEMES:
        args = ()
    if name == "identity" and (type_.rank < 2 or type_.shape[-1] != type_.shape[-2]):
        raise body.fail(
            "FL0305",
            f"`identity` starts square matrices, and this is `{type_}`",
            entry.value.span,
            suggestion="two axes of one size stand last, as in `R[D', D]`",
        )
    return (name, *args)


STARTS = {
    "normal": (0.0, 1.0),
    "uniform": (0.0, 1.0),
    "unit_normal": (),
    "identity": (),
    **{name: (gain,) for name, gain in SCHEMES.items()},
}


def start_call(body: Body, expr: tree.Expr) -> tuple[str, tuple[float, ...]]:
    name_expr = expr.fn if isinstance(expr, tree.Call) else expr
    if not isinstance(name_expr, tree.Name) or name_expr.id not in STARTS:
        raise body.fail(
            "FL0201",
            "unknown start of a parameter",
            expr.span,
            suggestion=f"starts are {', '.join(f'`{s}`' for s in STARTS)}",
        )
    args: list[float] = []
    if isinstance(expr, tree.Call):
        for item in expr.items:
            gain = isinstance(item.left, tree.Name) and item.left.id == "gain" and item.eq is not None
            value = body.ev(item.eq if gain and item.eq is not None else item.left) if item.left is not None else None
            if not isinstance(value, int | float):
                raise body.fail("FL0305", "a start takes numbers", item.span, suggestion="as in `~ normal(0, 0.1)`")
            args.append(float(value))
    return name_expr.id, tuple(args) + STARTS[name_expr.id][len(args) :]


def default_start(domain: Domain) -> Any:
    match domain.structure:
        case "plu" | "dense" | "orthogonal" | "stiefel":
            return ("orthogonal",)
        case "lower" | "unit_lower" | "spd":
            return ("identity",)
        case "simplex":
            return None
        case "sphere" | "lipschitz":
            return ("normal", 0.0, 1.0)
    iv = domain.interval
    if iv.contains(0.0):
        return 0.0
    if iv.finite:
        return (iv.lo + iv.hi) / 2
    return 1.0


def emit(body: Body, statement: tree.Emit) -> None:
    value = body.ev(statement.value)
    dist = distribution(body, statement.distribution)
    if isinstance(value, Poison) or dist is None:
        raise_poison()
    assert dist is not None
    id = body.tensor(value, statement.value.span)
    check_whole(body, dist, body.b.type(id))
    body.region.emissions.append(
        Emission(id, dist.law, distribution_arguments(body, dist, body.b.type(id)), statement.span)
    )


def check_whole(body: Body, dist: DistributionValue, value: TensorType) -> None:
    """A3: whole numbers have probabilities, real ones densities."""
    if dist.law.discrete == (value.kind != "real"):
        return
    if dist.law.discrete:
        raise body.fail(
            "FL0408",
            f"`{dist.name}` is a distribution of whole numbers, and the value is `{value}`",
            dist.span,
            suggestion="draw into an `Int(a..b)`, or use a distribution on the reals",
        )
    raise body.fail(
        "FL0408", f"`{dist.name}` is a distribution of real numbers, and the value `{value}` is whole", dist.span,
        suggestion="dequantise it first, as by `uniform_dequantise`",
    )  # fmt: skip


def raise_poison() -> NoReturn:
    from flowlang.elaborate.body import Poisoned

    raise Poisoned


def base(body: Body, statement: tree.Base) -> None:
    if body.region.kind != "flow":
        raise body.fail(
            "FL0106", "`base` belongs in a flow", statement.span, suggestion="draw with `~`, as in `z ~ normal`"
        )
    if body.region.base is not None:
        raise body.fail("FL0204", "a flow has one `base`", statement.span, suggestion="remove the other one")
    if body.chain_value is None:
        raise body.fail(
            "FL0212", "a flow needs `data` before its base", statement.span, suggestion="begin with `data x: R[D = 2]`"
        )
    found = [distribution(body, v) for v in statement.values]
    if None in found or isinstance(body.chain_value, Poison):
        raise_poison()
    values = parts(body.chain_value)
    if len(found) != len(values):
        raise body.fail(
            "FL0308", f"the chain ends in {len(values)} values, and `base` names {len(found)} distributions", statement.span,
            suggestion="give one distribution for each of the data, in their order, as in `base normal, uniform_sphere`",
        )  # fmt: skip
    laws = []
    for value, dist in zip(values, found, strict=True):
        assert dist is not None
        arguments = distribution_arguments(body, dist, value.type)
        check_whole(body, dist, value.type)
        laws.append((value.id, dist.law, arguments))
    _, law, arguments = laws[0]
    body.region.base = BaseDistribution(law, arguments, statement.span)
    # The others leave beside it, each under its own.
    body.region.emissions += [Emission(id, law, arguments, statement.span) for id, law, arguments in laws[1:]]


# ---- chains -------------------------------------------------------------------------------------


def run_step(body: Body, expr: tree.Expr) -> None:
    """One expression of a chain: a bijector applied to the chain's value."""
    if body.region.base is not None:
        raise body.fail("FL0106", "a step after `base` is never reached", expr.span, suggestion="move it above `base`")
    assert body.chain_value is not None
    x = body.chain_value
    fn = body.ev(expr)
    if isinstance(fn, Poison) or isinstance(x, Poison):
        step_failed(body)
        return
    values = parts(x)
    step = step_function(body, fn, expr)
    check_arity(body, step, len(values), expr)
    result = apply(body, step, list(values), context_for(body, fn), expr.span, [expr.span] * len(values))
    if isinstance(result, Poison):
        step_failed(body)
        return
    if not isinstance(result, Tensor | Tuple) or len(parts(result)) != len(values):
        many = "one value" if len(values) == 1 else f"{len(values)} values"
        raise body.fail(
            "FL0211",
            f"a step gives {many}, and this gives {describe(result)}",
            expr.span,
            suggestion="name its other values and join what goes on",
        )
    after = tuple(body.capture(v) for v in parts(result))
    body.chain_value = after[0] if len(after) == 1 else Tuple(after)
    body.region.steps.append(Step(expr.span.text, values[0].id, after[0].id, span=expr.span))


def parts(value: Tensor | Tuple) -> tuple[Tensor, ...]:
    """The values that a chain maps: one, or those of a flow with several `data`."""
    if isinstance(value, Tensor):
        return (value,)
    assert all(isinstance(v, Tensor) for v in value.items)
    return value.items


def check_arity(body: Body, step: Any, count: int, expr: tree.Expr) -> None:
    """A step maps as many values as the chain has."""
    inner = step.fn if isinstance(step, Bracketed) else step
    target = inner.target if isinstance(inner, Instance) else inner
    least = takes = 1
    if isinstance(target, Declared):
        if target.declaration.alias is not None:
            return  # what it stands for is asked when it is called
        mapped = [p for ps in target.declaration.parameters for p in ps if is_tensor_type(p.type) and not p.given]
        takes = len(mapped) or count  # a chain maps what it is given
        least = sum(not is_optional(p.type) for p in mapped) or takes
    if not least <= count <= takes:
        raise body.fail(
            "FL0211", f"`{target.name}` maps {takes} value{'s' * (takes > 1)}, and the chain has {count}", expr.span,
            suggestion="map all of them, as by `bijector b(x: R[D], y: R[E]) { affine_coupling(x), y }`",
        )  # fmt: skip


def step_failed(body: Body) -> None:
    """The chain goes on after a step in error, so that later mistakes are told too.

    A step on vectors hardly ever changes their type; what one on images would have made, nobody knows.
    """
    body.region.broken = True
    value = body.chain_value
    if isinstance(value, Tuple) or (isinstance(value, Tensor) and value.type.rank > 1):
        body.chain_value = POISON


def step_help(body: Body, function: Builtin) -> str:
    """What to write in place of a function that stands alone in a chain."""
    if function.each:
        return f"`elementwise({function.name})` applies an elementwise function to every coordinate"
    alike = {n: body.elab.global_name(n) for n in sorted(body.visible_names()) if n.startswith(f"{function.name}_")}
    steps = [f"`{n}`" for n, v in alike.items() if isinstance(v, Declared) and v.kind == "bijector"]
    if steps:
        return f"steps with such a name are {', '.join(steps[:3])}"
    return "use it inside a bijector, which gives its result"


def step_function(body: Body, fn: Any, expr: tree.Expr) -> Any:
    inner = fn.fn if isinstance(fn, Bracketed) else fn
    if isinstance(inner, AppliedBuiltin):
        inner = inner.builtin
    if isinstance(inner, Builtin) and not inner.step:
        raise body.fail(
            "FL0211",
            f"{describe(inner)} is not a step",
            expr.span,
            suggestion=step_help(body, inner),
        )
    if isinstance(inner, Declared | Instance | BuiltinNet):
        kind = inner.kind
        if kind not in ("bijector", "const"):
            raise body.fail(
                "FL0211",
                f"{describe(inner)} cannot stand in a chain, which needs bijectors",
                expr.span,
                suggestion="use it inside a bijector, for instance as the network of a coupling",
            )
        return fn
    if isinstance(inner, Builtin):
        return fn
    raise body.fail(
        "FL0211",
        f"a step is a bijector, and this is {describe(fn)}",
        expr.span,
        suggestion="apply a bijector, as in `affine_coupling`; a map of your own is a `bijector` declaration",
    )


def context_for(body: Body, fn: Any) -> dict[str, Any]:
    """The flow's `given` inputs that a step takes by name."""
    inner = fn.fn if isinstance(fn, Bracketed) else fn
    target = inner.target if isinstance(inner, Instance) else inner
    bound = inner.arguments if isinstance(inner, Instance) else {}
    if not isinstance(target, Declared):
        return {}
    out: dict[str, Any] = {}
    for ps in target.declaration.parameters:
        for p in ps:
            if p.given and p.name not in bound:
                value = body.context_values().get(p.name)
                if value is not None:
                    out[p.name] = value
    return out


def run_for(body: Body, statement: tree.For) -> Any:
    if statement.until is not None:
        raise body.fail(
            "FL0902", "`until` has no meaning yet", statement.until.span, suggestion="repeat a fixed number of times"
        )
    for value in body.iterate(statement.iterable):
        body.elab.count_round(body, statement.span)
        body.bind_loop(statement.names, value, statement.span)
        run_statements(body, statement.body)
        if body.region.broken:
            body.names |= {n: POISON for n in updated_names(statement.body) if n in body.names}
            break
    return NOTHING


def run_repeat(body: Body, statement: tree.Repeat) -> Any:
    if statement.until is not None:
        raise body.fail(
            "FL0902", "`until` has no meaning yet", statement.until.span, suggestion="repeat a fixed number of times"
        )
    count = body.static_int(statement.count)
    if count < 0:
        raise body.fail("FL0305", f"{count} copies make no sense", statement.count.span, suggestion="give 0 or more")
    if count > limits.REPEAT_COUNT:
        raise body.fail(
            "FL0901",
            f"{count:,} copies exceed the limit of {limits.REPEAT_COUNT:,}",
            statement.count.span,
            suggestion=f"write at most {limits.REPEAT_COUNT:,}",
        )
    body.elab.multiply(body, count, statement.count.span)
    try:
        if body.chain_value is not None:
            repeat_chain(body, statement, count)
            return NOTHING
        return repeat_body(body, statement, count)
    finally:
        body.elab.unmultiply(count)


def inner_body(body: Body, statement: tree.Repeat, kind: str) -> Body:
    from flowlang.elaborate.body import Body as MakeBody

    region = Region(f"{body.region.name}_block", kind, Graph(), span=statement.span, library=body.region.library)
    region.signature = f"repeat in {body.region.signature or body.region.name}"
    return MakeBody(body.elab, region, body.module, parent=body, anchor=body.anchor)


def repeat_chain(body: Body, statement: tree.Repeat, count: int) -> None:
    """`repeat n { steps }`: one region for all copies when a copy gives back the type it takes."""
    assert body.chain_value is not None
    x = body.chain_value
    if count == 0 or not statement.body:
        return
    if isinstance(x, Poison):
        run_statements(body, statement.body)  # for the names in it
        return
    if count > 1:
        inner = inner_body(body, statement, "chain")
        values = parts(x)
        chain_inputs(inner, [(v.type, body.graph[v.id].batched) for v in values], statement.span)
        run_statements(inner, statement.body)
        out = inner.chain_value
        if inner.region.broken or not isinstance(out, Tensor | Tuple):
            step_failed(body)
            return
        if [v.type for v in parts(out)] == [v.type for v in values] and not inner.region.emissions:
            inner.region.outputs = [v.id for v in parts(out)]
            ids = repeat_node(body, inner, [v.id for v in values], count, statement.span)
            made = tuple(Tensor(i, body) for i in ids)
            body.chain_value = made[0] if len(made) == 1 else Tuple(made)
            first = statement.body[0].span.until(statement.body[-1].span)
            body.region.steps.append(Step(first.text, values[0].id, ids[0], count, inner.region, statement.span))
            return
    for _ in range(count):
        body.elab.count_round(body, statement.span)
        run_statements(body, statement.body)
        if body.region.broken:
            return


def chain_inputs(body: Body, types: Sequence[tuple[TensorType, bool]], span: Span) -> None:
    """The values that a chain by itself begins with."""
    made = tuple(
        new_input(body, "x" if not k else f"x{k + 1}", t, batched, span) for k, (t, batched) in enumerate(types)
    )
    body.region.inputs = [v.id for v in made]
    body.chain_value = made[0] if len(made) == 1 else Tuple(made)


def new_input(
    body: Body, name: str, type_: TensorType, batched: bool, span: Span, domain: Domain | None = None
) -> Tensor:
    known = {} if domain is None else {"domain": domain}
    id = body.b.leaf("input", type_, batched=batched, span=span, label=name, name=name, role="map", **known)
    return Tensor(id, body)


def repeat_node(body: Body, inner: Body, carried: list[int], count: int, span: Span) -> list[int]:
    """The `repeat` node for a finished inner body, its captures wired to this body's values."""
    region = inner.region
    name = body.fresh_child_name("blocks" if "blocks" not in body.region.children else "more_blocks")
    adopt_body(body, inner, name, count, span)
    types = tuple(region.graph[i].tensor for i in region.outputs)
    attrs = {"child": name, "region": region, "count": count, "method": "forward", "carried": len(carried)}
    type_: Any = types[0] if len(types) == 1 else TupleType(types)
    inputs = (*carried, *inner.captures.keys())
    node = body.graph.add("repeat", inputs, type_, attrs, span=span)
    if len(types) == 1:
        return [node.id]
    return [body.graph.add("get", (node.id,), t, {"index": k}, span=span).id for k, t in enumerate(types)]


def adopt_body(body: Body, inner: Body, name: str, count: int, span: Span) -> None:
    """Makes a finished inner body a child: its captures become context, shared networks are handed in."""
    region = inner.region
    region.context.extend(inner.captures.values())
    bindings: dict[str, str] = {}
    for shared, outer in inner.captured_instances.values():
        assert shared.name is not None
        child = region.children.get(shared.name)
        if child is not None:
            bindings[shared.name] = body.adopt(outer, child.region, span).name
        if child is not None or isinstance(outer.target, BuiltinNet):  # whose weights are captured as values
            body.elab.note_shared(body, outer, count)
    body.region.children[name] = Child(name, after(region), False, bindings, count)


def repeat_body(body: Body, statement: tree.Repeat, count: int) -> Any:
    """`repeat n { h := .. }` in a net: a loop over copies when the carried values keep their types."""
    updated = [n for n in updated_names(statement.body) if body.find(n) is not None]
    tensors = [n for n in updated if isinstance(body.find(n), Tensor)]
    if count > 1 and updated and updated == tensors:
        inner = inner_body(body, statement, "net")
        before: dict[str, Tensor] = {}
        for n in tensors:
            outer = body.capture(body.find(n))
            before[n] = outer
            inner.names[n] = new_input(inner, n, outer.type, body.graph[outer.id].batched, statement.span)
            inner.region.inputs.append(inner.names[n].id)
        run_statements(inner, statement.body)
        if inner.region.broken:
            body.region.broken = True
            return NOTHING
        finish_inner(inner)
        after = [inner.names[n] for n in tensors]
        if all(isinstance(v, Tensor) and v.type == before[n].type for n, v in zip(tensors, after, strict=True)):
            inner.region.outputs = [v.id for v in after]
            ids = repeat_node(body, inner, [before[n].id for n in tensors], count, statement.span)
            for n, id in zip(tensors, ids, strict=True):
                body.names[n] = Tensor(id, body)
                body.graph.relabel(id, n)
            last = body.names[tensors[-1]]
            return last if len(tensors) == 1 else NOTHING
    result: Any = NOTHING
    for _ in range(count):
        body.elab.count_round(body, statement.span)
        result = run_statements(body, statement.body)
        if body.region.broken:
            break
    return result


def finish_inner(inner: Body) -> None:
    from flowlang.elaborate.scans import finish_states

    finish_states(inner)


def updated_names(statements: tuple[tree.Statement, ...]) -> list[str]:
    names: list[str] = []
    for s in statements:
        found: list[str] = []
        match s:
            case tree.Bind(op=":="):
                found = [t.name for t in s.targets]
            case tree.If():
                found = updated_names(s.then) + updated_names(s.orelse)
            case tree.Repeat() | tree.For() | tree.Scan():
                found = updated_names(s.body)
        names.extend(n for n in found if n not in names)
    return names


__all__ = ["ABSENT", "NOTHING", "run_statements", "words"]
