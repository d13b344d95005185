"""A path's body as a sympy expression in t, x0 and x1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowlang.elaborate.arithmetic import Algebra, Evaluator, static_names
from flowlang.syntax import tree


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
    }  # fmt: skip
    algebra = Algebra(number, functions, {"π": sp.pi, "pi": sp.pi})
    names = static_names(algebra, declaration, {k: sp.sympify(v) for k, v in (given or {}).items()})
    symbols = dict(zip(("t", "x0", "x1"), sp.symbols("t x0 x1", real=True), strict=True))
    names.update({p.name: symbols[p.name] for ps in declaration.parameters for p in ps if p.name in symbols})
    return Evaluator(algebra, names).run(declaration.body or ())
