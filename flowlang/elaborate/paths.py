"""A path's body as a sympy expression in t, x0 and x1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowlang.elaborate.arithmetic import Algebra, Evaluator, NotPlain, is_truth, static_names
from flowlang.elaborate.values import PathFunction
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body
    from flowlang.elaborate.calls import Arguments


def symbolic(declaration: tree.Declaration, given: Mapping[str, Any] | None = None) -> Any:
    """x_t in sympy's symbols t, x0, x1; raises NotPlain where the body is more than a formula in them."""
    import sympy as sp

    def number(n: tree.Number) -> Any:
        return sp.Rational(n.text.replace("_", ""))

    one = sp.Integer(1)
    functions: dict[str, Any] = {
        "exp": sp.exp, "log": sp.log, "sqrt": sp.sqrt, "sin": sp.sin, "cos": sp.cos, "tan": sp.tan, "sinh": sp.sinh,
        "cosh": sp.cosh, "tanh": sp.tanh, "asinh": sp.asinh, "atan": sp.atan, "abs": sp.Abs, "min": sp.Min, "max": sp.Max,
        "square": lambda e: e**2, "log1p": lambda e: sp.log(1 + e), "expm1": lambda e: sp.exp(e) - 1,
        "sigmoid": lambda e: one / (1 + sp.exp(-e)), "softplus": lambda e: sp.log(1 + sp.exp(e)),
        "clamp": lambda e, lo, hi: sp.Min(sp.Max(e, lo), hi),
        "where": lambda c, a, b: sp.Piecewise((a, c), (b, True)),
    }  # fmt: skip
    algebra = Algebra(number, functions, {"π": sp.pi, "pi": sp.pi})
    names = static_names(algebra, declaration, {k: sp.sympify(v) for k, v in (given or {}).items()})
    symbols = dict(zip(("t", "x0", "x1"), sp.symbols("t x0 x1", real=True), strict=True))
    names.update({p.name: symbols[p.name] for ps in declaration.parameters for p in ps if p.name in symbols})
    found = Evaluator(algebra, names).run(declaration.body or ())
    if is_truth(found) or isinstance(found, tuple | list):
        raise NotPlain(declaration.span, "a result that is no number")
    return found


# ---- paths as functions of tensors --------------------------------------------------------------

PREDICTIONS = ("velocity", "data", "noise", "score")
FUNCTIONS = ("at", "alpha", "sigma", "alpha_rate", "sigma_rate", *PREDICTIONS)


def call_path(body: Body, fn: PathFunction, args: Arguments) -> Any:
    """`path.at(t, x0, x1)` and what follows from it: `velocity(t, x0, x1)`, `alpha(t)`, `sigma(t)` and their rates.

    `path.data(t, x, velocity = u)` and the like turn one prediction at x_t = x into another.
    """
    assert args.span is not None
    if fn.name in PREDICTIONS and (fn.name != "velocity" or any(k in PREDICTIONS for k in args.keywords)):
        return convert(body, fn, args)
    names = ("t", "x0", "x1") if fn.name in ("at", "velocity") else ("t",)
    values = dict(zip(names, args.positional, strict=False)) | args.keywords
    if set(values) != set(names):
        raise body.fail(
            "FL0203", f"`{fn.name}` of a path takes ({', '.join(names)})", args.span,
            suggestion=f"as in `{fn.path.declaration.name}.{fn.name}({', '.join(names)})`",
        )  # fmt: skip
    where = dict(zip(names, args.spans, strict=False))
    expression = formula_of(body, fn, args)
    import sympy as sp

    t = sp.Symbol("t", real=True)
    ends = {n: sp.Symbol(n, real=True) for n in ("x0", "x1")}
    if fn.name in ("velocity", "alpha_rate", "sigma_rate"):
        expression = sp.diff(expression, t)
    if fn.name.startswith(("alpha", "sigma")):
        expression = level(body, fn, args, expression, ends, "x1" if fn.name.startswith("alpha") else "x0")
    if expression is None:
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
    made = emit_formula(body, sp.simplify(expression), env)
    return body.wrap(body.graph.annotate(made, path=fn.name) if fn.name in ("at", "velocity") else made)


def formula_of(body: Body, fn: PathFunction, args: Arguments) -> Any:
    assert args.span is not None
    try:
        return symbolic(fn.path.declaration, {k: v for k, v in fn.arguments if isinstance(v, int | float)})
    except NotPlain as stop:
        raise body.fail(
            "FL0902", f"the path `{fn.path.declaration.name}` is no formula in t, x0 and x1 ({stop.what}), and has no meaning yet", args.span, suggestion="write it as a formula in t, x0 and x1"
        ) from None  # fmt: skip


def level(body: Body, fn: PathFunction, args: Arguments, expression: Any, ends: Mapping[str, Any], end: str) -> Any:
    """The factor of one end in an affine path."""
    import sympy as sp

    assert args.span is not None
    found = sp.simplify(sp.diff(expression, ends[end]))
    if found.has(*ends.values()):
        raise body.fail(
            "FL0306",
            f"the path `{fn.path.declaration.name}` is not affine, and has no `{fn.name}`",
            args.span,
            suggestion="these exist where x_t = a(t) x0 + b(t) x1",
        )
    return found


def convert(body: Body, fn: PathFunction, args: Arguments) -> Any:
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
    expression = formula_of(body, fn, args)
    t = sp.Symbol("t", real=True)
    ends = {n: sp.Symbol(n, real=True) for n in ("x0", "x1")}
    alpha, sigma = (level(body, fn, args, expression, ends, e) for e in ("x1", "x0"))
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
    where = dict(zip(("t", "x"), args.spans, strict=False)) | args.keyword_spans
    env = {n: body.tensor(v, where.get(n, args.span)) for n, v in values.items()}
    body.b.span = args.span
    env["t"] = body.b.op("within", env["t"], lo=0.0, hi=1.0)
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
            parts.append(emit_formula(body, factor * symbol, env))
    return body.wrap(body.b.add(*parts) if len(parts) == 2 else parts[0])


def emit_formula(body: Body, e: Any, env: Mapping[str, int]) -> int:
    """A sympy expression as graph nodes; symbols stand for values of the body."""
    import sympy as sp

    b = body.b
    match e:
        case sp.Symbol():
            return env[e.name]
        case sp.Number() | sp.NumberSymbol():
            return b.const(float(e))
        case sp.Add() | sp.Mul():
            parts = [emit_formula(body, a, env) for a in e.args]
            # Scalars first: a product with a tensor comes last.
            parts.sort(key=lambda n: (b.type(n).rank, n))
            out = parts[0]
            for p in parts[1:]:
                out = b.add(p, out) if isinstance(e, sp.Add) else b.mul(p, out)
            return out
        case sp.Pow(base=base, exp=power):
            inner = emit_formula(body, base, env)
            return proved(body, b.op("pow", inner, emit_formula(body, power, env)))
        case sp.Piecewise():
            (*first, (last, _)) = e.args  # what no condition chose is not there for 0 <= t <= 1
            out = emit_formula(body, last, env)
            for value, condition in reversed(first):
                out = b.op("where", emit_condition(body, condition, env), emit_formula(body, value, env), out)
            return out
        case sp.Heaviside():
            return b.op(
                "where", b.op("ge", emit_formula(body, e.args[0], env), b.const(0.0)), b.const(1.0), b.const(0.0)
            )
        case sp.exp():
            return b.op("exp", emit_formula(body, e.args[0], env))
        case sp.Abs() | sp.Min() | sp.Max() | sp.Function():
            name = {"Abs": "abs", "Min": "min", "Max": "max"}.get(type(e).__name__, type(e).__name__)
            parts = [emit_formula(body, a, env) for a in e.args]
            out = parts[0]
            if name in ("min", "max"):
                for p in parts[1:]:
                    out = b.op(name, out, p)
                return out
            return proved(body, b.op(name, out))
    raise AssertionError(f"no graph for {type(e).__name__}")


COMPARISONS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}


def emit_condition(body: Body, c: Any, env: Mapping[str, int]) -> int:
    """A comparison, or several, as a truth value of the graph."""
    import sympy as sp

    b = body.b
    match c:
        case sp.And() | sp.Or():
            out, *parts = (emit_condition(body, a, env) for a in c.args)
            for p in parts:
                out = b.op("and" if isinstance(c, sp.And) else "or", out, p)
            return out
        case sp.Not():
            return b.op("not", emit_condition(body, c.args[0], env))
    return b.op(COMPARISONS[c.rel_op], emit_formula(body, c.lhs, env), emit_formula(body, c.rhs, env))


def proved(body: Body, n: int) -> int:
    """Marks a node as defined wherever it is used, by a proof that is not one of intervals."""
    return body.graph.annotate(n, proved=True)
