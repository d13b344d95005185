"""Calls: arguments to parameters, axes of the caller to axes of the callee, instances to regions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate import taps as tap_rules
from flowlang.elaborate.later import ARGUMENTS
from flowlang.elaborate.paths import call_path
from flowlang.elaborate.results import cut, pieces_of
from flowlang.elaborate.scope import NAMES, close_names, did_you_mean, item_name, name_help
from flowlang.elaborate.types import is_optional, is_tensor_type, one_of_words, static_size
from flowlang.elaborate.values import (
    ABSENT,
    LATER,
    POISON,
    WITNESS,
    Absent,
    AppliedBuiltin,
    Bracketed,
    Builtin,
    BuiltinNet,
    Declared,
    Derivative,
    Instance,
    Local,
    LogProb,
    Option,
    PathFunction,
    Pending,
    Poison,
    Poisoned,
    Tensor,
    Transition,
    Tuple,
    TypeSpec,
    describe,
)
from flowlang.elaborate.weights import lend
from flowlang.ir.graph import Emission, Region
from flowlang.ir.noise import draws
from flowlang.ir.ops.base import OpProblem
from flowlang.ir.tangents import FROZEN
from flowlang.ir.taps import method_of, place_type
from flowlang.ir.types import LIFTED, TensorType, TupleType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body
    from flowlang.elaborate.elaborator import Elaborator


REDUCTIONS = ("sum", "mean", "max", "min", "prod", "logsumexp")


@dataclass
class Arguments:
    """Evaluated arguments of one call, with the places they stand at."""

    positional: list[Any] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)
    keyword_spans: dict[str, Span] = field(default_factory=dict)
    axes: tuple[tree.Item, ...] = ()
    span: Span | None = None

    @property
    def poisoned(self) -> bool:
        return any(isinstance(v, Poison) for v in (*self.positional, *self.keywords.values()))

    def only(self, body: Body, name: str, known: Collection[str]) -> None:
        """Refuses a keyword that `name` does not have."""
        for k in self.keywords:
            if k not in known:
                advice = name_help(k, known) if known else NAMES.get(k, "leave it out")
                raise body.fail("FL0202", f"`{name}` has no argument `{k}`", self.keyword_spans[k], suggestion=advice)


def make_call(body: Body, expr: tree.Call) -> Any:
    if isinstance(expr.fn, tree.Attribute) and tap_rules.is_request(expr.fn):
        return tap_rules.tapped(body, body.ev(expr.fn.value), expr.fn.name, expr.items, expr.span)
    fn = called(body, expr.fn)
    if fn is LATER:
        return LATER  # what is given to it may have a form of its own
    axes: tuple[tree.Item, ...] = ()
    if isinstance(fn, Bracketed):
        fn, axes = fn.fn, fn.items
    licence = body.outer_axes
    if isinstance(fn, Builtin) and fn.name in REDUCTIONS and axes:
        # An outer product inside is licensed by the axis that this reduction removes.
        body.outer_axes = {i.left.id for i in axes if isinstance(i.left, tree.Name)}
    try:
        args = evaluate_arguments(body, fn, expr.items)
    finally:
        body.outer_axes = licence
    args.axes, args.span = axes, expr.span
    if isinstance(fn, Poison) or args.poisoned:
        return POISON
    return dispatch(body, fn, args)


def called(body: Body, expr: tree.Expr) -> Any:
    """What stands before the parentheses; `zeros[D = 2]` alone would be a value already."""
    if isinstance(expr, tree.Brackets) and isinstance(expr.value, tree.Name):
        fn = body.ev(expr.value)
        if isinstance(fn, Builtin):
            body.check_distinct(expr)
            return Bracketed(fn, expr.items, expr.span)
    return body.ev(expr)


def apply(
    body: Body, fn: Any, values: list[Any], keywords: dict[str, Any], span: Span, arg_spans: list[Span] | None = None
) -> Any:
    """A call with values instead of syntax (pipes, chains, higher-order builtins)."""
    axes: tuple[tree.Item, ...] = ()
    if isinstance(fn, Bracketed):
        fn, axes = fn.fn, fn.items
    args = Arguments(values, arg_spans or [span] * len(values), keywords, dict.fromkeys(keywords, span), axes, span)
    if isinstance(fn, Poison) or args.poisoned:
        return POISON
    return dispatch(body, fn, args)


def evaluate_arguments(body: Body, fn: Any, items: tuple[tree.Item, ...]) -> Arguments:
    args = Arguments()
    words = option_words(fn)
    order = free_words(fn, {n for i in items if (n := item_name(i)) is not None}) if words else []
    for item in items:
        name = item_name(item)
        if name is not None and item.arrow is None:
            assert item.eq is not None
            args.keywords[name] = word_or_value(body, item.eq, name, words.get(name, ()))
            args.keyword_spans[name] = item.span
        elif name is not None and item.arrow is not None and item.arrow_eq is None:
            assert item.eq is not None
            args.keywords[name] = Transition(body.ev(item.eq), body.ev(item.arrow))
            args.keyword_spans[name] = item.span
        elif item.left is not None and item.eq is None and item.arrow is None:
            if item.type is not None:
                args.positional.append(body.typed(item.left, [item.type])[0])
            else:
                filled = sum(not isinstance(v, Tensor | Pending | Absent) for v in args.positional)
                parameter, among = order[filled] if filled < len(order) else ("", ())
                if isinstance(item.left, tree.Name):
                    args.positional.append(word_or_value(body, item.left, parameter, among))
                else:  # a tensor, perhaps
                    args.positional.append(body.ev(item.left))
            args.spans.append(item.span)
        else:
            raise body.fail(
                "FL0202",
                "an argument is a value or `name = value`",
                item.span,
                suggestion="as in `affine_coupling(net = mlp(64))`",
            )
    return args


def word_or_value(body: Body, expr: tree.Expr, name: str, words: tuple[str, ...]) -> Any:
    """The argument of a choice: one of its words, which come before names, or a choice handed on (`trace = trace`)."""
    if not words:
        return body.ev(expr)
    if isinstance(expr, tree.Name):
        if expr.id in words:
            return Option(expr.id, words)
        found = body.find(expr.id)
        if found is not None:  # `check_static` says so if it does not fit
            return found
    choices = ", ".join(f"`{w}`" for w in words)
    raise body.fail(
        "FL0306", f"`{name}` is one of {choices}", expr.span,
        suggestion=name_help(expr.id, words) if isinstance(expr, tree.Name) else "write a word here",
    )  # fmt: skip


def free_words(fn: Any, named: set[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The static parameters that positions fill, in order, with their words; a variadic one takes the rest."""
    target = fn.target if isinstance(fn, Instance) else fn
    if not isinstance(target, Declared):
        return []
    bound = set(fn.arguments) if isinstance(fn, Instance) else set()
    out = []
    for p in (p for ps in target.declaration.parameters for p in ps):
        if is_tensor_type(p.type) or p.name in named or p.name in bound:
            continue
        if p.variadic:
            break
        out.append((p.name, one_of_words(p.type)))
    return out


def option_words(fn: Any) -> dict[str, tuple[str, ...]]:
    target = fn.target if isinstance(fn, Instance) else fn
    if isinstance(target, Builtin):
        return dict(target.options)
    if not isinstance(target, Declared):
        return {}
    found = {p.name: one_of_words(p.type) for ps in target.declaration.parameters for p in ps}
    return {n: w for n, w in found.items() if w}


def dispatch(body: Body, fn: Any, args: Arguments) -> Any:
    assert args.span is not None
    match fn:
        case Builtin():
            return fn.fn(body, args)
        case AppliedBuiltin():
            merged = Arguments(
                [*args.positional, *fn.positional],
                [*args.spans, *([fn.span] * len(fn.positional))],
                {**dict(fn.keywords), **args.keywords},
                {**dict.fromkeys(dict(fn.keywords), fn.span), **args.keyword_spans},
                args.axes or fn.items,
                args.span,
            )
            return fn.builtin.fn(body, merged)
        case Declared():
            return call_target(body, Instance(fn, {}, args.span), args)
        case BuiltinNet():
            return call_target(body, Instance(fn, {}, args.span), args)
        case Instance():
            if fn.target.name == WITNESS:
                return call_witness(body, fn, args)
            return call_target(body, fn, args)
        case PathFunction():
            return call_path(body, fn, args)
        case LogProb():
            return log_density(body, fn, args)
        case Derivative():
            from flowlang.elaborate.derivatives import call_derivative

            return call_derivative(body, fn, args)
        case Local():
            return call_local(body, fn, args)
        case _:
            raise body.fail(
                "FL0306",
                f"{describe(fn)} cannot be called",
                args.span,
                suggestion="only functions, networks and bijectors are called",
            )


def call_witness(body: Body, fn: Instance, args: Arguments) -> Any:
    """A call of what only stands for a network: arguments that do not fit it may fit another."""
    from flowlang.elaborate.body import Fail

    try:
        return call_target(body, fn, args)
    except (Fail, OpProblem):
        body.region.broken = True
        raise Poisoned from None


def log_density(body: Body, fn: LogProb, args: Arguments) -> Tensor:
    """`normal.log_prob(z)`: for each sample, summed over the value's axes."""
    assert args.span is not None
    if len(args.positional) != 1 or args.keywords:
        raise body.fail("FL0203", "`log_prob` takes one value", args.span, suggestion="as in `f.log_prob(x)`")
    law = fn.distribution
    given = {n: body.tensor(body.capture(v), law.span) for n, v in law.arguments}
    body.b.span = args.span
    return body.wrap(law.law.total_log_prob(body.b, body.tensor(args.positional[0], args.spans[0]), given))


NETWORKS = ("net", "norm", "bijector")


def instance_of(elab: Elaborator, value: Any, span: Span) -> Any:
    """A network as the instance that a name for it stands for: `linear[D -> D]`, `mlp` and a preset of it are each one."""
    fn = value.fn if isinstance(value, Bracketed) else value
    items = value.items if isinstance(value, Bracketed) else ()
    if isinstance(fn, Declared) and fn.kind in NETWORKS:
        alias = elab.resolve_alias(fn)
        if alias is not None:
            fn = instance_of(elab, alias, span)
    if isinstance(fn, Declared | BuiltinNet) and fn.kind in NETWORKS:
        return Instance(fn, {}, span, items)
    if isinstance(fn, Instance) and fn.owner is None:
        return replace(fn, axes=items or fn.axes)
    return value


# ---- arguments to parameters --------------------------------------------------------------------


def parameters_of(inst: Instance) -> list[tree.Parameter]:
    assert isinstance(inst.target, Declared)
    return [p for ps in inst.target.declaration.parameters for p in ps]


def call_target(body: Body, inst: Instance, args: Arguments) -> Any:
    """A declaration or an instance with arguments: a fuller instance, or its result on tensors."""
    assert args.span is not None
    if isinstance(inst.target, BuiltinNet):
        return inst.target.build(body, inst, args)
    alias = body.elab.resolve_alias(inst.target)
    if alias is not None:
        if isinstance(alias, Poison):
            return POISON
        if not isinstance(alias, Declared) and not args.positional and not args.keywords:
            return alias
        return dispatch(body, alias, args)
    body.elab.check_kind(body, inst.target, args.span)
    if inst.kind == "path" and not args.positional:
        return Instance(inst.target, {**inst.arguments, **args.keywords}, args.span)
    if inst.kind == "solver":
        return solver_instance(body, inst, args)
    params = parameters_of(inst)
    by_name = {p.name: p for p in params}
    statics: dict[str, Any] = dict(inst.arguments)
    tensors: dict[str, tuple[Any, Span]] = {}
    extras: list[tuple[Any, Span]] = []
    for name, value in args.keywords.items():
        p = by_name.get(name)
        if p is None:
            where = args.keyword_spans[name]
            if name in ARGUMENTS.get(inst.target.name, ()):
                raise body.fail(
                    "FL0902",
                    f"`{name}` of `{inst.target.name}` has no meaning yet",
                    where,
                    suggestion="write that program in the model itself",
                )
            raise body.fail(
                "FL0202",
                f"`{inst.target.name}` has no argument `{name}`",
                where,
                suggestion=did_you_mean(name, by_name)
                or (f"its arguments are {', '.join(f'`{n}`' for n in by_name)}" if by_name else "it takes none"),
            )
        if is_tensor_type(p.type) and is_tensor_like(value):
            tensors[name] = (value, args.keyword_spans[name])
        else:
            statics[name] = value
    free_tensors = [p for p in params if is_tensor_type(p.type) and p.name not in tensors]
    free_statics = [p for p in params if not is_tensor_type(p.type) and p.name not in statics]
    if inst.owner is not None and any(isinstance(v, Tensor | Pending) for v in args.positional):
        free_statics = []  # it is made: a number is a value, as the time in `v(x, 0)`
    for value, span in zip(args.positional, args.spans, strict=True):
        flat = list(value.items) if isinstance(value, Tuple) else [value]
        for v in flat:
            place_argument(body, inst, v, span, free_tensors, free_statics, statics, tensors, extras)
    mapped = [p for p in params if is_tensor_type(p.type) and not p.given]
    if not tensors and not extras:
        return partial(body, inst, statics, args)
    first = mapped[0].name if mapped else None
    if first is not None and first not in tensors:
        # Only context was given: it waits with the static arguments for the mapped value.
        statics.update({n: v for n, (v, _) in tensors.items()})
        return partial(body, inst, statics, args)
    for p in params:
        # Context that was bound when the instance was made.
        if is_tensor_type(p.type) and p.name in statics and p.name not in tensors:
            tensors[p.name] = (statics[p.name], args.span)
    statics = {n: v for n, v in statics.items() if not is_tensor_type(by_name[n].type)}
    if statics == inst.arguments:
        full = inst
    else:
        full = Instance(
            inst.target, statics, inst.span, inst.axes, owner=inst.owner, name=inst.name, label=inst.label, inverted=inst.inverted,
            shared=inst.shared, lipschitz=inst.lipschitz, frozen=inst.frozen, taps=inst.taps, follows=inst.follows,
        )  # fmt: skip
    axes = args.axes or inst.axes
    return call_instance(body, full, tensors, extras, axes, args.span)


# Of every solver: so many equal steps, or steps between given times, or the tolerances of adaptive ones, their cap, and
# whether all samples share the steps.
SOLVER_OPTIONS = ("steps", "times", "rtol", "atol", "max_steps", "shared")


def solver_instance(body: Body, inst: Instance, args: Arguments) -> Instance:
    """A solver with its options: `rk4(steps = 20)`, `dopri5(rtol = 1e-5, atol = 1e-5)`."""
    own = [p.name for p in parameters_of(inst) if p.type is not None]
    known = [*own, *SOLVER_OPTIONS]
    values = dict(inst.arguments)
    free = [n for n in known if n not in args.keywords]
    if len(args.positional) > len(free):
        raise body.fail(
            "FL0202",
            f"`{inst.target.name}` takes {len(known)} arguments",
            args.span or inst.span,
            suggestion="leave out the rest",
        )
    given = {**dict(zip(free, args.positional, strict=False)), **args.keywords}
    for name, value in given.items():
        where = args.keyword_spans.get(name, args.span or inst.span)
        if name not in known:
            raise body.fail(
                "FL0202", f"the solver `{inst.target.name}` has no argument `{name}`", where,
                suggestion=did_you_mean(name, known) or f"its arguments are {', '.join(f'`{n}`' for n in known)}",
            )  # fmt: skip
        if name == "times":
            values[name] = step_times(body, inst, value, where)
            continue
        if name == "shared":
            if not isinstance(value, bool):
                raise body.fail(
                    "FL0306",
                    f"`shared` is `true` or `false`, and this is {describe(value)}",
                    where,
                    suggestion="as in `dopri5(rtol = 1e-5, atol = 1e-5, shared = true)`",
                )
            values[name] = value
            continue
        whole = name in ("steps", "max_steps")
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if name in SOLVER_OPTIONS and not (number and value > 0):
            kind = "a whole number" if whole else "a number"
            raise body.fail(
                "FL0306",
                f"`{name}` is {kind} above 0, and this is {describe(value)}",
                where,
                suggestion=f"as in `{name} = {20 if whole else 1e-5}`",
            )
        values[name] = value
    return Instance(inst.target, values, args.span or inst.span)


def step_times(body: Body, inst: Instance, value: Any, span: Span) -> list[float]:
    """`times = [0, 0.1, 1]`: numbers that rise or fall from one end to the other."""
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) < 2 or value not in (sorted(set(value)), sorted(set(value), reverse=True)):
        raise body.fail(
            "FL0306", f"the times of `{inst.target.name}` are two or more numbers that rise or fall all along", span,
            suggestion="as in `times = [0, 0.1, 0.4, 1]`",
        )  # fmt: skip
    return [float(v) for v in value]


def is_tensor_like(value: Any) -> bool:
    if isinstance(value, list):
        return False
    return isinstance(value, Tensor | Pending | Absent | Tuple) or (
        isinstance(value, int | float) and not isinstance(value, bool)
    )


def place_argument(
    body: Body,
    inst: Instance,
    value: Any,
    span: Span,
    free_tensors: list[tree.Parameter],
    free_statics: list[tree.Parameter],
    statics: dict[str, Any],
    tensors: dict[str, tuple[Any, Span]],
    extras: list[tuple[Any, Span]],
) -> None:
    if isinstance(value, Tensor | Pending | Absent):
        if free_tensors:
            p = free_tensors.pop(0)
            tensors[p.name] = (value, span)
        else:
            extras.append((value, span))
        return
    if free_statics:
        p = free_statics[0]
        if p.variadic:
            statics.setdefault(p.name, [])
            statics[p.name] = [*statics[p.name], value]
        else:
            statics[p.name] = value
            free_statics.pop(0)
        return
    if free_tensors and isinstance(value, int | float):
        tensors[free_tensors.pop(0).name] = (value, span)
        return
    raise body.fail(
        "FL0202",
        f"`{inst.target.name}` takes no further argument",
        span,
        notes=(f"this is {describe(value)}",),
        suggestion="leave it out, or make another instance for other arguments",
    )


def partial(body: Body, inst: Instance, statics: dict[str, Any], args: Arguments) -> Instance:
    assert args.span is not None
    return Instance(
        inst.target,
        statics,
        args.span,
        args.axes or inst.axes,
        label=None,
        inverted=inst.inverted,
        lipschitz=inst.lipschitz,
        frozen=inst.frozen,
        taps=inst.taps,
    )


def call_local(body: Body, fn: Local, args: Arguments, finish: Callable[[], None] | None = None) -> Any:
    """A `def`: its body is evaluated here, with its owner's names in sight; `finish` is run while they are."""
    from flowlang.elaborate.statements import run_statements

    assert args.span is not None
    declaration = fn.declaration
    params = [p for ps in declaration.parameters for p in ps]
    values: dict[str, Any] = {}
    names = {p.name for p in params}
    args.only(body, declaration.name, names)
    values |= args.keywords
    free = [p for p in params if p.name not in values]
    given = list(args.positional)
    while len(given) > len(free) and isinstance(given[-1], Absent):
        given.pop()  # a network that takes no context gets none
    if len(given) > len(free):
        raise body.fail(
            "FL0202", f"`{declaration.name}` takes {len(params)} arguments, and gets {len(given)}", args.span,
            suggestion="leave out the rest",
        )  # fmt: skip
    for p, v in zip(free, given, strict=False):
        values[p.name] = v
    for p in params:
        if p.name not in values and p.default is None:
            raise body.fail(
                "FL0203", f"`{declaration.name}` needs the argument `{p.name}`", args.span,
                suggestion=f"as in `{declaration.name}({p.name} = ..)`",
            )  # fmt: skip
    body.elab.count_call(body, args.span)
    body.elab.enter(body, f"def:{id(declaration)}", declaration.name, args.span)
    before = body.count_weights()
    try:
        with nullcontext() if body.sees(fn.body) else body.inside(fn.body):
            saved = dict(body.names)
            try:
                values |= {p.name: body.ev(p.default) for p in params if p.name not in values and p.default is not None}
                body.names.update(values)
                result = run_statements(body, declaration.body or ())
                if finish is not None:
                    finish()
            finally:
                body.names = saved
    finally:
        body.elab.leave()
    if body.count_weights() > before:
        body.made_by(declaration, args.span)
    return result


# ---- axes of the caller to axes of the callee ---------------------------------------------------


@dataclass
class Formal:
    """A tensor parameter's axes as declared: names with fixed sizes or None, and whether `..` follows."""

    name: str
    axes: list[tuple[str, tree.Item]]
    rest: bool
    kind: str
    given: bool
    optional: bool


def formal_of(body: Body, p: tree.Parameter) -> Formal:
    expr = p.type
    optional = is_optional(expr)
    if isinstance(expr, tree.Optional):
        expr = expr.type
    items = expr.items if isinstance(expr, tree.Brackets) else ()
    axes: list[tuple[str, tree.Item]] = []
    rest = False
    for item in items:
        if isinstance(item.left, tree.Ellipsis):
            rest = True
        elif isinstance(item.left, tree.Name):
            axes.append((item.left.id, item))
        else:
            raise body.fail("FL0307", "a parameter's axis is a name", item.span, suggestion="as in `x: R[D]`")
    return Formal(p.name, axes, rest, "real", p.given, optional)


@dataclass
class Binding:
    """How one argument's axes became the parameter's: formal -> actual, captured and lifted axes."""

    id: int
    pairs: dict[str, str]
    rest: tuple[tuple[str, int], ...]
    lifted: tuple[tuple[str, int], ...]


def bind_axes(
    body: Body, formal: Formal, id: int, explicit: dict[str, str], span: Span, callee: str, taken: set[str]
) -> Binding:
    t = body.b.type(id)
    pairs: dict[str, str] = {}
    left = list(t.names)
    for name, _ in formal.axes:
        actual = explicit.get(name)
        if actual is not None and t.has(actual):
            pairs[name] = actual
            if actual in left:
                left.remove(actual)
    for name, _ in formal.axes:
        if name not in pairs and name in left:
            pairs[name] = name
            left.remove(name)
    free = [n for n, _ in formal.axes if n not in pairs]
    if free:
        if len(free) > len(left) or (len(free) < len(left) and not formal.rest):
            have = ", ".join(f"`{n}`" for n in t.names) or "none"
            advice = f"say which axis is meant, as in `{callee}[{t.names[0] if t.names else 'D'}](..)`"
            if "B" in free and len(free) == len(left) + 1:
                advice = f"`B` is the batch, which no type names: leave it out of the type of `{formal.name}`"
            raise body.fail(
                "FL0307",
                f"`{callee}` takes axes {', '.join(f'`{n}`' for n, _ in formal.axes)} for `{formal.name}`, "
                f"and this value has {have}",
                span,
                suggestion=advice,
            )
        for name in free:
            pairs[name] = left.pop(0)
    others = tuple((n, t.size(n)) for n in left)
    if formal.rest:
        return Binding(id, pairs, others, ())
    return Binding(id, pairs, (), others)


def explicit_axes(body: Body, items: tuple[tree.Item, ...], formals: Sequence[Formal]) -> dict[str, str]:
    """`f[T, D]`: explicit axes bind the formal ones in the order in which the declaration names them."""
    order: list[str] = []
    for f in formals:
        order.extend(n for n, _ in f.axes if n not in order)
    out: dict[str, str] = {}
    k = 0
    for item in items:
        if item.left is None:
            continue
        name = axis_rules.axis_name(body, tree.Item(item.left, span=item.span))
        if k < len(order):
            out[order[k]] = name
        k += 1
    return out


def call_instance(
    body: Body,
    inst: Instance,
    tensors: dict[str, tuple[Any, Span]],
    extras: list[tuple[Any, Span]],
    axes: tuple[tree.Item, ...],
    span: Span,
) -> Any:
    """Applies an instance to tensors. A network whose result size is open stays pending."""
    target = inst.target
    assert isinstance(target, Declared)
    params = [p for p in parameters_of(inst) if is_tensor_type(p.type)]
    if not params:
        return call_chain(body, inst, extras, span)
    formals = [formal_of(body, p) for p in params]
    values: dict[str, int] = {}
    for p in params:
        if p.name in tensors:
            value, where = tensors[p.name]
            if isinstance(value, Absent):
                if not is_optional(p.type):
                    if extras:
                        value, where = extras.pop(0)
                    else:
                        raise body.fail(
                            "FL0309",
                            f"`{target.name}` needs `{p.name}`, which is absent here",
                            where,
                            suggestion="give it, or guard the call with `if present(..)`",
                        )
                else:
                    continue
            values[p.name] = real_value(body, p.type, body.tensor(real_number(p.type, value), where))
        elif not is_optional(p.type):
            if p.default is not None:
                continue
            raise body.fail(
                "FL0203",
                f"`{target.name}` needs the argument `{p.name}`",
                span,
                suggestion=f"give it by name, as in `{p.name} = ...`" if p.given else "give it a value at the call",
            )
    first = formals[0]
    left_names = [i for i in axes if i.left is not None]
    if len(left_names) > sum(len(f.axes) for f in formals) and len(first.axes) == 1 and first.name in values:
        # `mlp[T, D](x)` flattens the named axes into the one that the network consumes.
        names = [axis_rules.axis_name(body, tree.Item(i.left, span=i.span)) for i in left_names]
        merged = axis_rules.merge(body, Tensor(values[first.name], body), names, names[-1], span)
        values[first.name] = merged.id
        axes = (tree.Item(tree.Name(names[-1], span=span), span=span),)
    explicit = explicit_axes(body, axes, formals)
    if extras and first.axes:
        values[first.name] = join_inputs(body, first, values[first.name], extras, explicit, span, target.name)
    taken: set[str] = set()
    bindings: dict[str, Binding] = {}
    for f in formals:
        if f.name in values:
            where = tensors[f.name][1] if f.name in tensors else span
            bindings[f.name] = bind_axes(body, f, values[f.name], explicit, where, target.name, taken)
    return finish_call(body, inst, formals, bindings, axes, span)


def is_whole(type: tree.Expr | None) -> bool:
    """Whether a parameter's type is one of whole numbers or truth values."""
    inner = type.type if isinstance(type, tree.Optional) else type
    head = inner.value if isinstance(inner, tree.Brackets) else inner
    head = head.fn if isinstance(head, tree.Call) else head
    return isinstance(head, tree.Name) and head.id in ("Int", "Bool")


def real_number(type: tree.Expr | None, value: Any) -> Any:
    """A whole number given for a real parameter is a real number."""
    plain = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if plain and not is_whole(type) else value


def real_value(body: Body, type: tree.Expr | None, id: int) -> int:
    """The same for a tensor: one network takes tokens that are data and tokens that were drawn."""
    if is_whole(type) or body.b.type(id).kind != "int":
        return id
    return body.b.op("mul", id, body.b.const(1.0))


def call_chain(body: Body, inst: Instance, extras: list[tuple[Any, Span]], span: Span) -> Any:
    """A bijector without a tensor parameter: a chain applied to one value, with the context in sight."""
    if not extras:
        raise body.fail(
            "FL0202", f"`{inst.target.name}` is a chain and maps a value", span, suggestion="give one, as in `f(x)`"
        )
    ids = [body.tensor(*e) for e in extras]
    inputs: dict[str, tuple[int, TensorType]] = {
        f"x#{k}" if k else "x": (id, body.b.type(id)) for k, id in enumerate(ids)
    }
    for name, value in body.context_values().items():
        if name != "x":
            inputs[name] = (value.id, value.type)
    region = region_of(body, inst, {n: t for n, (_, t) in inputs.items()}, span)
    if region is None:
        return POISON
    return emit_call(body, inst, region, inputs, {}, {}, span)


def region_of(
    body: Body, inst: Instance, types: dict[str, TensorType], span: Span, fixed: bool = False
) -> Region | None:
    """The region of a call; of `inverse(b)` the one whose result has the type that is given."""
    elab = body.elab
    if not inst.inverted or not types:
        return elab.instantiate(body, inst, types, {}, span, fixed)
    first = next(iter(types))
    wanted = types[first]
    for known in elab.regions_of(inst):
        same = len(known.inputs) == 1 and [t.axes for t in known.output_types()] == [wanted.axes]
        if same and not known.emissions and not known.draws and not known.broken:
            return elab.instantiate(body, inst, types | {first: known.input_types()[0]}, {}, span, fixed)
    guess = elab.trial(body, inst, types, span)
    if guess is not None and [t.names for t in guess.output_types()] == [wanted.names]:
        # Where the map makes an axis so many times as long, its inverse makes it so many times shorter.
        (made,) = guess.output_types()
        before = TensorType.of(*((a.name, a.size * a.size // made.size(a.name)) for a in wanted.axes), kind=wanted.kind)
        again = elab.trial(body, inst, types | {first: before}, span)
        if again is not None and [t.axes for t in again.output_types()] == [wanted.axes]:
            types = types | {first: before}
    return elab.instantiate(body, inst, types, {}, span, fixed)


def join_inputs(
    body: Body,
    first: Formal,
    value: int,
    extras: list[tuple[Any, Span]],
    explicit: dict[str, str],
    span: Span,
    callee: str,
) -> int:
    """A network of several inputs joins them on its consumed axis; missing axes broadcast."""
    formal = first.axes[0][0]
    t = body.b.type(value)
    axis = explicit.get(formal) or (formal if t.has(formal) else (t.names[0] if t.names else formal))
    present = [(v, s) for v, s in extras if not isinstance(v, Absent)]
    if not present:
        return value
    ids: list[int] = [value] if t.rank else [body.b.op("expand", value, axes=((axis, 1),))]
    frame = {a.name: a.size for a in body.b.type(ids[0]).axes if a.name != axis}
    for v, s in present:
        id = body.tensor(v, s)
        tv = body.b.type(id)
        if not tv.has(axis):
            own = [n for n in tv.names if n not in frame]
            if len(own) == 1:
                id = body.b.op("rename", id, pairs=((own[0], axis),))
            elif not own:
                id = body.b.op("expand", id, axes=(*((a.name, a.size) for a in tv.axes), (axis, 1)))
            else:
                raise body.fail(
                    "FL0307",
                    f"`{callee}` joins its inputs along `{axis}`, and this one has {axis_rules.words(tv)}",
                    s,
                    suggestion=f"give each input the axis `{axis}`, or name the axis that is meant, as in `{callee}[..](..)`",
                )
        for a in body.b.type(id).axes:
            if a.name != axis:
                frame.setdefault(a.name, a.size)
        ids.append(id)
    order = list(body.b.type(ids[0]).names)
    order += [n for n in frame if n not in order]
    out = []
    for id in ids:
        full = tuple((n, body.b.type(id).size(axis) if n == axis else frame[n]) for n in order)
        id = body.b.op("expand", id, axes=full)
        out.append(body.b.op("order", id, names=tuple(order)))
    return body.b.op("join", *out, axis=axis, span=span)


def finish_call(
    body: Body,
    inst: Instance,
    formals: list[Formal],
    bindings: dict[str, Binding],
    axes: tuple[tree.Item, ...],
    span: Span,
) -> Any:
    target = inst.target
    assert isinstance(target, Declared)
    sizes: dict[str, int] = {}
    for f in formals:
        if f.name not in bindings:
            continue
        t = body.b.type(bindings[f.name].id)
        for name, _ in f.axes:
            size = t.size(bindings[f.name].pairs[name])
            if sizes.setdefault(name, size) != size:
                raise body.fail(
                    "FL0301",
                    f"axis `{name}` of `{target.name}` would have size {sizes[name]} and size {size}",
                    span,
                    notes=(f"`{f.name}`: `{t}`",),
                    suggestion="give values whose sizes agree, or name the axes at the call, as in `f[D](x)`",
                )
    lifted: dict[str, int] = {}
    for b in bindings.values():
        for n, s in b.lifted:
            if lifted.setdefault(n, s) != s:
                raise body.fail(
                    "FL0301",
                    f"axis `{n}` has sizes {lifted[n]} and {s} in the arguments",
                    span,
                    suggestion="axes that the call lifts over have one size in all arguments",
                )
    if lifted and target.kind in ("bijector", "flow"):
        pass  # a bijector may be lifted: it acts on each index of the other axes alike
    inputs: dict[str, tuple[int, TensorType]] = {}
    back: dict[str, str] = {}
    rest_frame: set[str] = set()
    for f in formals:
        if f.name not in bindings:
            continue
        bound = bindings[f.name]
        id, type_ = prepare_input(body, f, bound, tuple(lifted.items()), set(sizes), rest_frame)
        inputs[f.name] = (id, type_)
        for formal, actual in bound.pairs.items():
            back.setdefault(formal, actual)
        if not f.given and f is formals[0]:
            rest_frame = {n for n, _ in bound.rest}
    anchor = body.anchor if body.module.source.library else span
    results = body.elab.result_shape(target, inst, sizes, anchor)
    if results is not None and results.open_axes:
        first = bindings[formals[0].name]
        arrow = next((i for i in axes if i.arrow is not None), None)
        pending = Pending(
            lambda wanted: sized(body, inst, inputs, lifted, back, results, wanted, span),
            span,
            target.name,
            None,
        )
        if arrow is not None and isinstance(arrow.arrow, tree.Name):
            known = body.axes.get(arrow.arrow.id)
            width = static_size(body, arrow.arrow_eq) if arrow.arrow_eq is not None else known
            if width is not None:
                keep = list(lifted.items())
                fixed = [(back.get(n, n), s) for n, s in results.fixed]
                spec = TypeSpec(results.domain, (*keep, *fixed, (arrow.arrow.id, width)))
                found = pending.resolve([spec])
                return found[0] if len(found) == 1 else Tuple(tuple(found))
        del first
        if inst.taps is not None and inst.taps.reads:
            raise body.fail(
                "FL0304", f"the output size of `{target.name}` is open", span,
                suggestion="say it before the arguments, as in `v.tap(..)[-> C = 4](x)`",
            )  # fmt: skip
        return pending
    region = region_of(body, inst, {n: t for n, (_, t) in inputs.items()}, span, of_weights(body, inst, inputs))
    if region is None:
        return POISON
    return emit_call(body, inst, region, inputs, lifted, back, span)


def of_weights(body: Body, inst: Instance, inputs: dict[str, tuple[int, TensorType]]) -> bool:
    """Whether a net is called on values that are one for all samples (weights): its states may follow them."""
    return inst.kind in ("net", "norm") and not any(body.graph[id].batched for id, _ in inputs.values())


def prepare_input(
    body: Body,
    f: Formal,
    bound: Binding,
    lifted: tuple[tuple[str, int], ...],
    formal_names: set[str],
    rest_frame: set[str],
) -> tuple[int, TensorType]:
    """The argument under the parameter's axis names: lifted axes in front, then formal axes, then `..`."""
    t = body.b.type(bound.id)
    own = {actual: formal for formal, actual in bound.pairs.items()}
    rename: dict[str, str] = {a: f for a, f in own.items() if a != f}
    here = {n for n, _ in bound.lifted}
    for n, _ in bound.rest:
        if n in formal_names and n not in rest_frame:
            rename[n] = n + "_"
    # Rename in two moves when names cross (D -> C while C -> D).
    id = bound.id
    clash = {new for new in rename.values() if t.has(new)}
    if clash:
        middle = {old: f"{new}~" for old, new in rename.items()}
        front = tuple(n for n, _ in lifted if n in here)
        for n in front:
            if n in clash:
                middle[n] = n + LIFTED
        id = body.b.op("rename", id, pairs=tuple(middle.items()))
        undo = {m: rename.get(old, m) for old, m in middle.items() if not m.endswith(LIFTED)}
        id = body.b.op("rename", id, pairs=tuple(undo.items()))
    elif rename:
        id = body.b.op("rename", id, pairs=tuple(rename.items()))
    final = body.b.type(id)
    formal_order = [n for n, _ in f.axes]
    rest = [rename.get(n, n) for n, _ in bound.rest]
    leading = [n for n in final.names if n not in formal_order and n not in rest]
    lifted_order = [n for n, _ in lifted]
    leading.sort(
        key=lambda n: lifted_order.index(n.removesuffix(LIFTED)) if n.removesuffix(LIFTED) in lifted_order else 0
    )
    order = (*leading, *formal_order, *rest)
    if order != final.names:
        id = body.b.op("order", id, names=order)
    full = body.b.type(id)
    return id, TensorType(full.axes[len(leading) :], full.kind)


@dataclass
class ResultShape:
    """What a network's declared results say before it is sized."""

    domain: Any
    fixed: list[tuple[str, int]]
    open_axes: list[str]
    count: int


def sized(
    body: Body,
    inst: Instance,
    inputs: dict[str, tuple[int, TensorType]],
    lifted: dict[str, int],
    back: dict[str, str],
    results: ResultShape,
    wanted: list[Any],
    span: Span,
) -> list[Any]:
    """Sizes an open network by what is wanted of it, calls it, and cuts the result apart."""
    open_name = results.open_axes[0]
    fixed = [(back.get(n, n), s) for n, s in results.fixed]
    keep = set(lifted) | {n for n, _ in fixed}
    pieces, total = pieces_of(body, wanted, keep, span)
    region = body.elab.instantiate(
        body, inst, {n: t for n, (_, t) in inputs.items()}, {open_name: total}, span, of_weights(body, inst, inputs)
    )
    if region is None:
        return [POISON] * len(wanted)
    value = emit_call(body, inst, region, inputs, lifted, back, span)
    if isinstance(value, Poison):
        return [POISON] * len(wanted)
    tapped: tuple[Any, ...] = ()
    if inst.taps is not None and isinstance(value, Tuple):
        value, *rest = value.items
        tapped = tuple(rest)
    return [*cut(body, body.tensor(value, span), open_name, pieces, wanted, span), *tapped]


def emit_call(
    body: Body,
    inst: Instance,
    region: Region,
    inputs: dict[str, tuple[int, TensorType]],
    lifted: dict[str, int],
    back: dict[str, str],
    span: Span,
) -> Any:
    """The call node; results get the caller's axis names back."""
    if region.broken:
        body.region.broken = True
        return POISON
    name = inst.target.name
    if inst.inverted and region.is_random and body.region.kind != "program":
        raise body.fail(
            "FL0902", f"`inverse({name})` has no meaning yet: `{name}` draws, or parts leave it on the way", span,
            suggestion="write the opposite step by itself; in a program of a model `inverse` of it is a sample",
        )  # fmt: skip
    if inst.inverted and body.region.kind != "program" and draws(region, training=True):
        raise body.fail(
            "FL0410", f"a network of `{name}` draws while training, and an inverse never does: its noise would have no effect here",
            span, suggestion=f"leave the draw out of the networks of `{name}`, as by a rate of 0",
        )  # fmt: skip
    if inst.inverted and [t.axes for t in region.output_types()] != [t.axes for t in type_of(inputs, region)]:
        raise body.fail(
            "FL0902", f"`inverse({name})` has no meaning yet: what `{name}` was made of cannot be told from the shape it gives",
            span, suggestion="use it forward first, or write the opposite step by itself, as `unsqueeze` for `squeeze`",
        )  # fmt: skip
    child = body.adopt(inst, region, span)
    front = tuple(lifted.items())
    weighed = body.region.kind == "program" and region.kind in ("bijector", "chain")
    scored = weighed and region.is_random  # what leaves and what is drawn counts in the log-det
    results = region.output_types() if scored and not inst.inverted else call_results(region, inst.inverted)
    outs = [TensorType(tuple(a for a in lifted_axes(front)) + t.axes, t.kind) for t in results]
    for t in outs:
        twice = next((n for n in t.names if t.names.count(n) > 1), None)
        if twice is not None:
            raise body.fail(
                "FL0307", f"axis `{twice}` would stand twice in the result of `{inst.target.name}`", span,
                suggestion=f"rename it in the argument, as in `x[{twice} -> E]`",
            )  # fmt: skip
    method = (("score", "generate") if scored else ("forward", "inverse"))[inst.inverted]
    replaced: list[int] = []
    shape: list[int | None] = []  # how many values each place gives
    if inst.taps is not None:
        taps, replaced, shape = tap_rules.resolve(body, inst, region, span)
        method = method_of(region, taps)
        outs += [place_type(region, place) for place in taps.read]
        if front:
            raise body.fail(
                "FL0902", f"`{name}` is lifted over axes here: places inside it have no meaning yet", span,
                suggestion="give the network a value with its own axes alone",
            )  # fmt: skip
    attrs = {"child": child.name, "region": region, "method": FROZEN * inst.frozen + method, "lifted": front}
    if weighed:  # a program gets a bijector's log-det beside its value
        outs.append(TensorType(tuple(lifted_axes(front))))
        attrs["log_det"] = True
    type_: Any = outs[0] if len(outs) == 1 else TupleType(tuple(outs))
    ids = (*(id for id, _ in inputs.values()), *lend(body, inst, region), *closed_over(body, region), *replaced)
    node = body.graph.add("call", ids, type_, attrs, span=span, label=None)
    if any(d for d in region.draws):
        node = body.graph[node.id]
    values: list[int] = (
        [node.id]
        if len(outs) == 1
        else [body.graph.add("get", (node.id,), t, {"index": k}, span=span).id for k, t in enumerate(outs)]
    )
    count = sum(1 if n is None else n for n in shape)
    read = [Tensor(values.pop(), body) for _ in range(count)][::-1]
    main = len(region.outputs) if not inst.inverted else len(region.inputs)
    log_det = [body.b.sum_all(values.pop())] if weighed else []
    if scored and inst.inverted:  # `generate` weighs the forward map
        log_det = [body.b.neg(log_det[0])]
    for id in values[main:]:
        body.region.emissions.append(Emission(id, None, (), span))
    named = []
    for id in values[:main]:
        t = body.b.type(id)
        pairs = {n: back[n] for n in t.names if n in back and back[n] != n and n not in lifted}
        if pairs:
            taken = set(t.names) - set(pairs)
            pairs = {o: n for o, n in pairs.items() if n not in taken}
            clash = {n for n in pairs.values() if t.has(n)}
            if clash:
                id = body.b.op("rename", id, pairs=tuple((o, f"{n}~") for o, n in pairs.items()), span=span)
                id = body.b.op("rename", id, pairs=tuple((f"{n}~", n) for n in pairs.values()), span=span)
            elif pairs:
                id = body.b.op("rename", id, pairs=tuple(pairs.items()), span=span)
        named.append(Tensor(id, body))
    named += [Tensor(id, body) for id in log_det]
    values_read = [read.pop(0) if n is None else [read.pop(0) for _ in range(n)] for n in shape]
    return named[0] if len(named) == 1 and not values_read else Tuple((*named, *values_read))


def type_of(inputs: dict[str, tuple[int, TensorType]], region: Region) -> list[TensorType]:
    """The types of the values that a call maps."""
    return [t for _, t in inputs.values()][: len(region.inputs)]


def closed_over(body: Body, region: Region) -> tuple[int, ...]:
    """What a region sees of the bodies around through the local functions that were given to it."""
    inner = body.elab.closures.get(region)
    if inner is None:
        return ()
    assert inner.parent is not None
    return tuple(body.bring(Tensor(id, inner.parent)).id for id in inner.captures)


def lifted_axes(front: tuple[tuple[str, int], ...]) -> Any:
    from flowlang.ir.types import Axis

    return [Axis(n, s) for n, s in front]


def call_results(region: Region, inverted: bool) -> list[TensorType]:
    if inverted:
        return region.input_types()
    return [*region.output_types(), *(region.graph[e.value].tensor for e in region.emissions)]


__all__ = ["ABSENT", "Arguments", "apply", "close_names", "dispatch", "make_call"]
