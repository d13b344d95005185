"""A path's body as formulas in t, x0 and x1: the place x_t, or the weights of the two ends of which x_t is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.elaborate.arithmetic import Algebra, Evaluator, NotPlain, claims, is_truth, static_names
from flowlang.elaborate.values import Builtin, Declared, Derivative, Instance, PathFunction, Pending, Tensor
from flowlang.ir.graph import Graph, Region
from flowlang.ir.types import TensorType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body
    from flowlang.elaborate.calls import Arguments

NAMES = ("t", "x0", "x1")


@dataclass(frozen=True)
class PathForm:
    """What a path's body says, in sympy's symbols t, x0 and x1.

    Networks that the path is given are functions of which nothing is known but the `identities` it requires of them.
    """

    place: Any = None  # x_t; None for a path that draws it, or has no value
    weights: tuple[Any, Any] | None = None  # of x0 and of x1, where x_t is drawn: x_t ~ a * delta(x0) + b * delta(x1)
    rest: Any = 0  # what of the weights stands at neither end
    nets: tuple[str, ...] = ()
    identities: tuple[tuple[Any, Any], ...] = ()


@dataclass(frozen=True)
class DrawnUse:
    """A path that draws, with the numbers it is given: its weights are judged for those too."""

    path: tree.Declaration
    given: Mapping[str, Any]
    span: Span
    region: Region


class PathEvaluator(Evaluator):
    """A path's body, which may end in a draw."""

    drawn = False

    def run(self, statements: tuple[tree.Statement, ...]) -> Any:
        result: Any = None
        for s in statements:
            self.drawn = isinstance(s, tree.Bind) and s.op == "~" and len(s.values) == len(s.targets) == 1
            if isinstance(s, tree.Bind) and self.drawn:
                result = self.value(s.values[0])
            else:
                found = super().run((s,))
                result = found if found is not None else result
        return result


def net_parameters(declaration: tree.Declaration) -> list[tree.Parameter]:
    return [p for ps in declaration.parameters for p in ps if isinstance(p.type, tree.Name) and p.type.id == "net"]


def read_path(declaration: tree.Declaration, given: Mapping[str, Any] | None = None) -> PathForm:
    """Raises NotPlain where the body is more than a formula in t, x0, x1 and networks."""
    import sympy as sp

    def number(n: tree.Number) -> Any:
        return sp.Rational(n.text.replace("_", ""))

    def delta(e: Any) -> Any:
        if e not in (symbols["x0"], symbols["x1"]):
            raise TypeError
        return marks[e]

    one = sp.Integer(1)
    symbols = dict(zip(NAMES, sp.symbols("t x0 x1", real=True), strict=True))
    marks = {symbols[n]: sp.Dummy(n, real=True) for n in ("x0", "x1")}
    functions: dict[str, Any] = {
        "exp": sp.exp, "log": sp.log, "sqrt": sp.sqrt, "sin": sp.sin, "cos": sp.cos, "tan": sp.tan, "sinh": sp.sinh,
        "cosh": sp.cosh, "tanh": sp.tanh, "asinh": sp.asinh, "atan": sp.atan, "abs": sp.Abs, "min": sp.Min, "max": sp.Max,
        "square": lambda e: e**2, "log1p": lambda e: sp.log(1 + e), "expm1": lambda e: sp.exp(e) - 1,
        "sigmoid": lambda e: one / (1 + sp.exp(-e)), "softplus": lambda e: sp.log(1 + sp.exp(e)),
        "clamp": lambda e, lo, hi: sp.Min(sp.Max(e, lo), hi),
        "where": lambda c, a, b: sp.Piecewise((a, c), (b, True)),
        "delta": delta,
    }  # fmt: skip
    algebra = Algebra(number, functions, {"π": sp.pi, "pi": sp.pi})
    names = static_names(algebra, declaration, {k: sp.sympify(v) for k, v in (given or {}).items()})
    names.update({p.name: symbols[p.name] for ps in declaration.parameters for p in ps if p.name in symbols})
    nets = tuple(p.name for p in net_parameters(declaration))
    names.update({n: sp.Function(n, real=True) for n in nets})
    evaluator = PathEvaluator(algebra, names)
    found = evaluator.run(declaration.body or ())
    if is_truth(found) or isinstance(found, tuple | list) or (found in names.values() and isinstance(found, type)):
        raise NotPlain(declaration.span, "a result that is no number")
    if found is None:
        return PathForm(nets=nets)
    if any(
        isinstance(f, sp.core.function.AppliedUndef)
        for r in found.atoms(sp.core.relational.Relational)
        for f in sp.preorder_traversal(r)
    ):
        raise NotPlain(declaration.span, "a choice by a network's value")
    told = tuple((evaluator.value(e.left), evaluator.value(e.right)) for e in identity_claims(declaration, nets))
    if not evaluator.drawn:
        if found.has(*marks.values()):
            raise NotPlain(declaration.span, "`delta` outside of a draw `x_t ~ ..`")
        return PathForm(found, nets=nets, identities=told)
    whole = sp.expand(found)
    weights = tuple(sp.diff(whole, marks[symbols[n]]) for n in ("x0", "x1"))
    rest = sp.simplify(whole - sum(w * marks[symbols[n]] for w, n in zip(weights, ("x0", "x1"), strict=True)))
    if any(w.has(*marks.values(), symbols["x0"], symbols["x1"]) for w in weights) or nets:
        raise NotPlain(declaration.span, "a weight that is no function of t alone")
    return PathForm(weights=(sp.simplify(weights[0]), sp.simplify(weights[1])), rest=rest)


def identity_claims(declaration: tree.Declaration, nets: tuple[str, ...]) -> list[tree.Binary]:
    """What a path requires of its networks: `require exp(x0, log(x0, x1)) == x1`."""
    return [e for e in claims(declaration) if isinstance(e, tree.Binary) and is_identity(e, nets)]


def is_identity(e: tree.Binary, nets: tuple[str, ...]) -> bool:
    return (
        e.op == "==" and isinstance(e.left, tree.Call)
        and isinstance(e.left.fn, tree.Name) and e.left.fn.id in nets
    )  # fmt: skip


# ---- paths as functions of tensors --------------------------------------------------------------

PREDICTIONS = ("velocity", "data", "noise", "score")
FUNCTIONS = ("at", "alpha", "sigma", "alpha_rate", "sigma_rate", *PREDICTIONS, "rate")


def call_path(body: Body, fn: PathFunction, args: Arguments) -> Any:
    """`path.at(t, x0, x1)` and what follows from it: `velocity(t, x0, x1)`, `alpha(t)`, `sigma(t)` and their rates.

    `path.data(t, x, velocity = u)` and the like turn one prediction at x_t = x into another; `path.rate(t, x, data = p)`
    is the rate of jumps of a path that is drawn.
    """
    assert args.span is not None
    form = form_of(body, fn, args)
    if form.weights is not None:
        body.elab.drawn_paths.append(DrawnUse(fn.path.declaration, numbers_of(fn), args.span, body.region))
    if (fn.name == "rate") > (form.weights is not None) or (fn.name in PREDICTIONS and form.weights is not None):
        drawn = form.weights is not None
        raise body.fail(
            "FL0306",
            f"the path `{fn.path.declaration.name}` {'draws x_t among its ends' if drawn else 'moves from end to end'}, and has no `{fn.name}`",
            args.span,
            suggestion="it has a `rate(t, x, data = p)` of jumps" if drawn else "it has a `velocity(t, x0, x1)`",
        )
    if fn.name == "rate":
        return jump_rate(body, fn, form, args)
    if fn.name in PREDICTIONS and (fn.name != "velocity" or any(k in PREDICTIONS for k in args.keywords)):
        return convert(body, fn, form, args)
    names = NAMES if fn.name in ("at", "velocity") else ("t",)
    values = dict(zip(names, args.positional, strict=False)) | args.keywords
    if set(values) != set(names):
        raise body.fail(
            "FL0203", f"`{fn.name}` of a path takes ({', '.join(names)})", args.span,
            suggestion=f"as in `{fn.path.declaration.name}.{fn.name}({', '.join(names)})`",
        )  # fmt: skip
    where = dict(zip(names, args.spans, strict=False))
    if fn.name.startswith(("alpha", "sigma")):
        expression = level(body, fn, form, args, "x1" if fn.name.startswith("alpha") else "x0")
    else:
        expression = form.place
    if expression is None and form.weights is None:
        raise body.fail(
            "FL0308",
            f"the path `{fn.path.declaration.name}` has no value",
            args.span,
            suggestion="end its body with `x_t = ...`",
        )
    env = {n: body.tensor(v, where.get(n, args.span)) for n, v in values.items()}
    body.b.span = args.span
    # The formula is shown to be smooth for 0 < t < 1 where the path is declared; here t is shown to lie there.
    env["t"] = body.b.op("within", env["t"], lo=0.0, hi=1.0)
    if form.weights is not None and fn.name == "at":
        made = drawn_place(body, form, env, args.span)
    elif fn.name in ("velocity", "alpha_rate", "sigma_rate"):
        made = rate_of(body, fn, form, expression, env, args.span)
    else:
        made = Formula(body, env, fn, args.span).emit(tidy(form, expression))
    if fn.name == "at" and between(form):
        body.graph.annotate(made, between=True)  # its bounds are those of the ends
    if fn.name == "at" and form.place is not None and rate_is_end(form.place):
        body.graph.annotate(made, rate_is_end=True)
    return body.wrap(body.graph.annotate(made, path=fn.name) if fn.name in ("at", "velocity") else made)


def numbers_of(fn: PathFunction) -> dict[str, Any]:
    return {k: v for k, v in fn.arguments if isinstance(v, int | float)}


BETWEEN_GRID = 96


def lies_between(alpha: Any, sigma: Any) -> bool:
    """Whether α x1 + σ x0 lies between x0 and x1 for all 0 <= t <= 1, and so in every convex domain that holds them."""
    import sympy as sp

    if alpha.atoms(sp.core.function.AppliedUndef) or sp.simplify(alpha + sigma - 1) != 0:
        return False
    share = sp.lambdify(sp.Symbol("t", real=True), alpha, "mpmath")
    try:
        return all(-1e-9 <= float(share(k / BETWEEN_GRID)) <= 1 + 1e-9 for k in range(BETWEEN_GRID + 1))
    except (ZeroDivisionError, ValueError, OverflowError, TypeError):
        return False  # not a number there


def between(form: PathForm) -> bool:
    import sympy as sp

    if form.nets or form.place is None:
        return False
    ends = ends_of()
    sigma, alpha = (sp.simplify(sp.diff(form.place, e)) for e in ends.values())
    if alpha.has(*ends.values()) or sigma.has(*ends.values()) or form.place.subs(dict.fromkeys(ends.values(), 0)) != 0:
        return False
    return lies_between(alpha, sigma)


def rate_is_end(place: Any) -> bool:
    """Whether the velocity of a path is one of its ends, as where it begins near 0: x_t = 1e-5 x0 + t x1."""
    import sympy as sp

    rate = sp.expand(sp.diff(place, sp.Symbol("t", real=True)))
    return rate in ends_of().values()


def form_of(body: Body, fn: PathFunction, args: Arguments) -> PathForm:
    assert args.span is not None
    try:
        return read_path(fn.path.declaration, numbers_of(fn))
    except NotPlain as stop:
        raise body.fail(
            "FL0902", f"the path `{fn.path.declaration.name}` is no formula in t, x0 and x1 ({stop.what}), and has no meaning yet", args.span, suggestion="write it as a formula in t, x0 and x1"
        ) from None  # fmt: skip


def tidy(form: PathForm, expression: Any) -> Any:
    import sympy as sp

    return expression if form.nets else sp.simplify(expression)


def ends_of() -> dict[str, Any]:
    import sympy as sp

    return {n: sp.Symbol(n, real=True) for n in ("x0", "x1")}


def level(body: Body, fn: PathFunction, form: PathForm, args: Arguments, end: str) -> Any:
    """The factor of one end in an affine path, its weight in one that is drawn."""
    import sympy as sp

    assert args.span is not None
    ends = ends_of()
    if form.weights is not None:
        return form.weights[end == "x1"]
    if form.place is None:
        return None
    found = sp.diff(form.place, ends[end])
    found = found if found.has(sp.Derivative, sp.Subs) else sp.simplify(found)
    if found.has(*ends.values()):
        raise body.fail(
            "FL0306",
            f"the path `{fn.path.declaration.name}` is not affine, and has no `{fn.name}`",
            args.span,
            suggestion="these exist where x_t = a(t) x0 + b(t) x1",
        )
    return found


def rate_of(body: Body, fn: PathFunction, form: PathForm, expression: Any, env: Mapping[str, int], span: Span) -> int:
    """The derivative of a formula in t: by sympy, or in forward mode where networks stand in it."""
    import sympy as sp

    if not form.nets:
        found = sp.diff(expression, sp.Symbol("t", real=True))
        return Formula(body, env, fn, span).emit(tidy(form, found))
    from flowlang.elaborate.calls import Arguments
    from flowlang.elaborate.derivatives import call_derivative

    others = [n for n in env if n != "t"]

    def place(inner: Body, given: Arguments) -> Any:
        values = dict(zip(("t", *others), (inner.tensor(v, span) for v in given.positional), strict=True))
        return inner.wrap(Formula(inner, values, fn, span).emit(expression))

    parts = [Tensor(env[n], body) for n in ("t", *others)]
    made = call_derivative(
        body,
        Derivative("derivative", Builtin(fn.name, place), span),
        Arguments(parts, [span] * len(parts), {}, {}, (), span),
    )
    return body.tensor(made, span)


def convert(body: Body, fn: PathFunction, form: PathForm, args: Arguments) -> Any:
    """One prediction from another at x_t = x: data x1, noise x0, velocity, score -x0 / σ (for standard normal x0)."""
    import sympy as sp

    assert args.span is not None
    known = [k for k in PREDICTIONS if k in args.keywords]
    values = dict(zip(("t", "x"), args.positional, strict=False)) | args.keywords
    if len(known) != 1 or known[0] == fn.name or set(values) != {"t", "x", known[0]}:
        other = next(k for k in PREDICTIONS if k != fn.name)
        raise body.fail(
            "FL0203", f"`{fn.name}` of a path takes t, x and one other prediction by its name", args.span,
            suggestion=f"as in `{fn.path.declaration.name}.{fn.name}(t, x, {other} = u)`, or of {', '.join(f'`{k}`' for k in PREDICTIONS if k != fn.name)}",
        )  # fmt: skip
    where = dict(zip(("t", "x"), args.spans, strict=False)) | args.keyword_spans
    env = {n: body.tensor(v, where.get(n, args.span)) for n, v in values.items()}
    body.b.span = args.span
    env["t"] = body.b.op("within", env["t"], lo=0.0, hi=1.0)
    gaussian = None if form.place is None else scale_and_mean(form.place)
    if known[0] == "data" and gaussian is not None and (form.nets or sp.diff(gaussian[1], ends_of()["x1"], 2) != 0):
        return from_data(body, fn, form, gaussian, env, args.span)
    if form.nets:
        raise body.fail(
            "FL0902", f"`{fn.name}` from the {known[0]} has no meaning yet on a path with networks", args.span,
            suggestion=f"tell it by the data, as in `{fn.path.declaration.name}.{fn.name}(t, x, data = y)`",
        )  # fmt: skip
    t = sp.Symbol("t", real=True)
    alpha, sigma = (level(body, fn, form, args, e) for e in ("x1", "x0"))
    x, given = sp.Symbol("x", real=True), sp.Symbol("given", real=True)
    alpha_rate, sigma_rate = sp.diff(alpha, t), sp.diff(sigma, t)
    det = sigma * alpha_rate - alpha * sigma_rate
    match known[0]:
        case "velocity":
            data, noise = (sigma * given - sigma_rate * x) / det, (alpha_rate * x - alpha * given) / det
        case "data":
            data, noise = given, (x - alpha * given) / sigma
        case "noise":
            data, noise = (x - sigma * given) / alpha, given
        case _:
            data, noise = (x + sigma**2 * given) / alpha, -sigma * given
    found = {"data": data, "noise": noise, "score": -noise / sigma, "velocity": alpha_rate * data + sigma_rate * noise}[
        fn.name
    ]
    env["given"] = env.pop(known[0])
    parts = []
    for symbol in (x, given):
        factor = sp.simplify(sp.diff(found, symbol))
        if factor.has(sp.zoo, sp.nan, sp.oo):
            raise body.fail(
                "FL0306", f"the {known[0]} does not tell the {fn.name} all along the path `{fn.path.declaration.name}`", args.span,
                suggestion="predict another of " + ", ".join(f"`{k}`" for k in PREDICTIONS),
            )  # fmt: skip
        if factor != 0:
            parts.append(Formula(body, env, fn, args.span).emit(factor * symbol))
    return body.wrap(body.b.add(*parts) if len(parts) == 2 else parts[0])


def scale_and_mean(place: Any) -> tuple[Any, Any] | None:
    """(σ, μ) of x_t = σ(t, x1)·x0 + μ(t, x1), entry by entry; None for another form. Networks may read t and x1 in both."""
    import sympy as sp

    x0 = ends_of()["x0"]
    if any(f.has(x0) for f in place.atoms(sp.core.function.AppliedUndef)):
        return None  # a network mixes entries: nothing is known of its inverse
    sigma = sp.diff(place, x0)
    if sp.simplify(sp.diff(sigma, x0)) != 0 or sp.simplify(sigma) == 0:
        return None
    return sigma, place.subs(x0, 0)


def from_data(
    body: Body, fn: PathFunction, form: PathForm, gaussian: tuple[Any, Any], env: dict[str, int], span: Span
) -> Any:
    """The noise, the velocity at fixed noise, or the score of x_t given x1, at x_t = x, where x1 is known."""
    import sympy as sp

    values = {"t": env["t"], "x1": env["data"], "x": env["x"]}
    sigma, mean = gaussian
    formula = Formula(body, values, fn, span)
    noise = formula.emit((sp.Symbol("x", real=True) - mean) / sigma)
    if fn.name == "noise":
        return body.wrap(noise)
    if fn.name == "score":
        return body.wrap(body.b.neg(body.b.div(noise, formula.emit(sigma))))
    where = {"t": env["t"], "x0": noise, "x1": env["data"]}
    return body.wrap(rate_of(body, fn, form, form.place, where, span))


# ---- paths that draw ----------------------------------------------------------------------------


def drawn_place(body: Body, form: PathForm, env: Mapping[str, int], span: Span) -> int:
    """Each entry is x1's with its weight, else x0's."""
    from flowlang.elaborate.stepping import draws
    from flowlang.ir.distributions import noise

    if not draws(body):
        raise body.fail("FL0410", "this path draws x_t, and only programs of a model draw", span,
                        suggestion="write it in a `def` of a `model`")  # fmt: skip
    assert form.weights is not None
    b = body.b
    weight = Formula(body, {"t": env["t"]}, None, span).emit(form.weights[1])
    axes = b.type(env["x1"]).axes
    if set(axes) != set(b.type(env["x0"]).axes):
        raise body.fail("FL0301", f"x0 is `{b.type(env['x0'])}` and x1 is `{b.type(env['x1'])}`: the ends of a path have the same axes", span,
                        suggestion="draw x0 with the axes of x1")  # fmt: skip
    chosen = b.op("lt", noise(b, "uniform", TensorType(axes)), weight)
    return b.op("where", chosen, env["x1"], env["x0"])


def jump_rate(body: Body, fn: PathFunction, form: PathForm, args: Arguments) -> Any:
    """The rates of jumps from x, of the process that runs along the path where `data` are the probabilities of x1 (or back,
    of those of x0, `noise`): b'/b_0·(p - δ_x), whose rows sum to 0 (Gat et al. 2024, arXiv 2407.15595, eqs. 17 and 19)."""
    import sympy as sp

    assert args.span is not None
    assert form.weights is not None
    values = dict(zip(("t", "x"), args.positional, strict=False)) | args.keywords
    known = [k for k in ("data", "noise") if k in values]
    if len(known) != 1 or set(values) != {"t", "x", known[0]}:
        raise body.fail(
            "FL0203", "`rate` of a path takes t, x and the probabilities of the data (or of the noise, for the way back)", args.span,
            suggestion=f"as in `{fn.path.declaration.name}.rate(t, x, data = softmax[V](logits))`",
        )  # fmt: skip
    where = dict(zip(("t", "x"), args.spans, strict=False)) | args.keyword_spans
    env = {n: body.tensor(v, where.get(n, args.span)) for n, v in values.items()}
    b = body.b
    b.span = args.span
    t, x, p = b.op("within", env["t"], lo=0.0, hi=1.0), env["x"], env[known[0]]
    axis = token_axis(body, b.type(p), b.type(x), where[known[0]])
    pace = sp.diff(form.weights[1], sp.Symbol("t", real=True)) / form.weights[known[0] == "noise"]
    here = b.op("order", b.onehot(x, axis, b.type(p).size(axis)), names=b.type(p).names)
    # The pace is shown not to fall below 0 where the path is declared; `max` tells the intervals.
    speed = b.op("max", Formula(body, {"t": t}, fn, args.span).emit(sp.simplify(pace)), b.const(0.0))
    return body.wrap(b.mul(speed, b.sub(p, here)))


def token_axis(body: Body, row: TensorType, x: TensorType, span: Span) -> str:
    """The axis of the values that an entry may take: what a row of probabilities or rates has, and x has not."""
    extra = [a.name for a in row.axes if a not in x.axes]
    if len(extra) != 1 or len(row.axes) != len(x.axes) + 1:
        raise body.fail(
            "FL0301", f"`{row}` has no row of values for each entry of `{x}`", span,
            suggestion="it has the axes of x and one more, along which the values are counted, as in `R[N, V = 16]`",
        )  # fmt: skip
    return extra[0]


# ---- formulas as graphs -------------------------------------------------------------------------


class Formula:
    """sympy expressions as graph nodes; symbols stand for values of the body, functions for the path's networks."""

    def __init__(self, body: Body, env: Mapping[str, int], fn: PathFunction | None, span: Span):
        self.body, self.env, self.fn, self.span = body, env, fn, span
        self.made: dict[Any, int] = {}  # calls of networks: each is made once

    def emit(self, e: Any) -> int:
        import sympy as sp

        b = self.body.b
        match e:
            case sp.Symbol():
                return self.env[e.name]
            case sp.Number() | sp.NumberSymbol():
                return b.const(float(e))
            case sp.Add() | sp.Mul():
                parts = [self.emit(a) for a in e.args]
                # Scalars first: a product with a tensor comes last.
                parts.sort(key=lambda n: (b.type(n).rank, n))
                out = parts[0]
                for p in parts[1:]:
                    out = b.add(p, out) if isinstance(e, sp.Add) else b.mul(p, out)
                return out
            case sp.Pow(base=base, exp=power):
                inner = self.emit(base)
                return self.proved(b.op("pow", inner, self.emit(power)))
            case sp.Piecewise():
                (*first, (last, _)) = e.args  # what no condition chose is not there for 0 <= t <= 1
                out = self.emit(last)
                for value, condition in reversed(first):
                    out = b.op("where", self.condition(condition), self.emit(value), out)
                return out
            case sp.Heaviside():
                return b.op("where", b.op("ge", self.emit(e.args[0]), b.const(0.0)), b.const(1.0), b.const(0.0))
            case sp.exp():
                return b.op("exp", self.emit(e.args[0]))
            case sp.core.function.AppliedUndef():
                if e not in self.made:
                    self.made[e] = self.call(e)
                return self.made[e]
            case sp.Abs() | sp.Min() | sp.Max() | sp.Function():
                name = {"Abs": "abs", "Min": "min", "Max": "max"}.get(type(e).__name__, type(e).__name__)
                parts = [self.emit(a) for a in e.args]
                out = parts[0]
                if name in ("min", "max"):
                    for p in parts[1:]:
                        out = b.op(name, out, p)
                    return out
                return self.proved(b.op(name, out))
        raise AssertionError(f"no graph for {type(e).__name__}")

    def call(self, e: Any) -> int:
        """A network of the path; a result of open size has the type of the data."""
        from flowlang.elaborate.calls import apply
        from flowlang.elaborate.fields import spec_of

        assert self.fn is not None
        body = self.body
        net = dict(self.fn.arguments)[e.func.__name__]
        values: list[Any] = [Tensor(self.emit(a), body) for a in e.args]
        found = apply(body, body.capture(net), values, {}, self.span)
        if isinstance(found, Pending):
            state = body.b.type(self.env["x1" if "x1" in self.env else "t"])
            (found,) = found.resolve([spec_of(TensorType(state.axes))])
        return body.tensor(found, self.span)

    def condition(self, c: Any) -> int:
        """A comparison, or several, as a truth value of the graph."""
        import sympy as sp

        b = self.body.b
        match c:
            case sp.And() | sp.Or():
                out, *parts = (self.condition(a) for a in c.args)
                for p in parts:
                    out = b.op("and" if isinstance(c, sp.And) else "or", out, p)
                return out
            case sp.Not():
                return b.op("not", self.condition(c.args[0]))
        return b.op(COMPARISONS[c.rel_op], self.emit(c.lhs), self.emit(c.rhs))

    def proved(self, n: int) -> int:
        """Marks a node as defined wherever it is used, by a proof that is not one of intervals."""
        return self.body.graph.annotate(n, proved=True)


COMPARISONS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}


# ---- networks of a path -------------------------------------------------------------------------


def path_networks(body: Body, path: Declared | Instance, target: Declared) -> dict[str, Any]:
    """The networks a path is given, each one network of the body that holds the path, however often it is read."""
    wanted = net_parameters(target.declaration)
    if not wanted:
        return {}
    from flowlang.elaborate.body import Body as MakeBody
    from flowlang.elaborate.calls import instance_of
    from flowlang.elaborate.values import Poison, Poisoned

    given = path.arguments if isinstance(path, Instance) else {}
    around = [body]
    while around[-1].parent is not None:
        around.append(around[-1].parent)
    holder = around[-1]
    known = body.elab.path_networks.setdefault((id(path), id(holder)), (path, {}))[1]
    span = path.span if isinstance(path, Instance) else target.declaration.span
    if not known:
        region = Region(
            target.name, "path", Graph(), span=target.declaration.span, library=target.module.source.library
        )
        scratch = MakeBody(body.elab, region, target.module)
        statics = [p for ps in target.declaration.parameters for p in ps if p.type is not None]
        others = {k: v for k, v in given.items() if k not in {p.name for p in wanted}}
        body.elab.bind_statics(
            scratch,
            Instance(target, others | {p.name: given[p.name] for p in wanted if p.name in given}, span),
            statics,
            span,
            body,
        )
        for p in wanted:
            value = given.get(p.name, scratch.names[p.name])
            if isinstance(value, Poison):
                raise Poisoned
            value = instance_of(body.elab, value, span)
            if isinstance(value, Instance) and (value.owner is None or value.owner is scratch):
                value.owner, value.name, value.label = holder, holder.fresh_child_name(p.name), value.label or p.name
                value.shared = False
            known[p.name] = value
    for value in known.values():
        if isinstance(value, Instance) and value.owner not in around:
            raise body.fail(
                "FL0902", f"the path `{target.name}` has networks, and is read outside of the model that holds them: that has no meaning yet", span,
                suggestion="read it in the programs of that model",
            )  # fmt: skip
    return known
