"""Processes of jumps: rates of jumps are not below 0, and a step's probabilities are probabilities.

That the rates of a row sum to 0 holds by construction: that of staying is made of the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, nan
from typing import Any

from flowlang.analysis.ranges import Ranges
from flowlang.diagnostics import Diagnostic, Report
from flowlang.elaborate.arithmetic import Algebra, Evaluator, NotPlain, static_names
from flowlang.elaborate.jumps import ROW, JumpUse
from flowlang.ir.graph import Graph, Node
from flowlang.ir.interval import REAL, Interval
from flowlang.ir.types import TupleType
from flowlang.syntax import tree

MOVED = ("rename", "order", "expand", "identity")


def check_jumps(uses: Iterable[JumpUse], report: Report) -> None:
    judged: dict[int, dict[str, Any]] = {}  # solvers, each once
    for use in uses:
        if use.region.broken:
            continue
        made = origin(use.graph, use.rates)
        if made.op == "softmax":
            report.add(
                Diagnostic("FL0609", "these are probabilities, whose rows sum to 1, and rates of jumps are needed, whose rows sum to 0", use.span,
                           suggestion="turn them into rates, as in `path.rate(t, x, data = p)`")
            )  # fmt: skip
            continue
        found = off_diagonal(use)
        if found.hi < 0:
            report.add(
                Diagnostic("FL0609", f"the rates of jumps are below 0: they lie in {found}", use.span,
                           suggestion="a rate is a chance for each unit of time, 0 or above")
            )  # fmt: skip
        elif found.lo < 0:
            report.add(
                Diagnostic(
                    "FL0609", f"the rates of jumps are not shown to be 0 or above: they lie in {found}", use.span, severity="warning",
                    notes=("shares below 0 count as 0 where a step chooses",),
                    suggestion="make them of `path.rate` and probabilities, or take `max(.., 0)`",
                )
            )  # fmt: skip
        if id(use.solver) not in judged:
            judged[id(use.solver)] = jump_facts(use.solver, Report())
        facts = judged[id(use.solver)]
        size = use.graph[use.rates].tensor.size(ROW)
        most = found.hi * (size - 1) * use.h
        if facts.get("valid") == "small_steps" and not most <= 1:
            report.add(
                Diagnostic(
                    "FL0609", f"the probabilities of a step of `{use.solver.name}` lie between 0 and 1 where h times the rate of leaving is at most 1, "
                    + (f"and it may be {most:.3g} here" if most < inf else "and that is not shown here"), use.span, severity="warning",
                    notes=("beyond that an entry never stays, and its law is another",),
                    suggestion="take a rule that is right for every step, as `jumps`, or more steps",
                )
            )  # fmt: skip


def origin(graph: Graph, n: int) -> Node:
    while graph[n].op in MOVED:
        n = graph[n].inputs[0]
    return graph[n]


def off_diagonal(use: JumpUse) -> Interval:
    """Bounds of the rates to other values: a choice by whether a value is the entry's has its second branch there."""
    graph = use.graph
    here = origin(graph, use.here)

    def unknown(node: Node, operands: Any) -> tuple[Interval, ...]:
        return (REAL,) * (len(node.type.items) if isinstance(node.type, TupleType) else 1)

    elsewhere: dict[int, Interval] = {}
    for node in graph:
        if node.op == "where" and same(graph, origin(graph, node.inputs[0]), here):
            elsewhere[node.id] = Ranges(graph, elsewhere, unknown).interval(node.inputs[2])
    return Ranges(graph, elsewhere, unknown).interval(use.rates)


def same(graph: Graph, a: Node, b: Node) -> bool:
    """Whether two comparisons ask whether a value is the entry's, on axes that may be named apart."""
    if a.op != "eq" or b.op != "eq":
        return False
    ends = [
        {(o.op, o.attrs.get("size"), o.id if o.op != "index" else None) for i in n.inputs for o in (origin(graph, i),)}
        for n in (a, b)
    ]
    return ends[0] == ends[1]


# ---- step rules ---------------------------------------------------------------------------------

RATES = (0.0, 0.3, 1.0, 7.0)
STEPS = (1e-3, 0.05, 0.3, 1.0, 20.0)
SLACK = 1e-9
SOON = 1e-8  # a step so short that what it changes is the slope


class Along:
    """A row of formulas: what a rule computes for each value an entry may take."""

    def __init__(self, *parts: Any):
        self.parts = parts

    def map(self, f: Any, *others: Any) -> Along:
        rows = [o.parts if isinstance(o, Along) else (o,) * len(self.parts) for o in others]
        return Along(*(f(p, *(r[k] for r in rows)) for k, p in enumerate(self.parts)))

    def __neg__(self) -> Along:
        return self.map(lambda a: -a)

    def __add__(self, o: Any) -> Along:
        return self.map(lambda a, b: a + b, o)

    __radd__ = __add__

    def __sub__(self, o: Any) -> Along:
        return self.map(lambda a, b: a - b, o)

    def __rsub__(self, o: Any) -> Along:
        return self.map(lambda a, b: b - a, o)

    def __mul__(self, o: Any) -> Along:
        return self.map(lambda a, b: a * b, o)

    __rmul__ = __mul__

    def __truediv__(self, o: Any) -> Along:
        return self.map(lambda a, b: a / b, o)

    def __rtruediv__(self, o: Any) -> Along:
        return self.map(lambda a, b: b / a, o)

    def __pow__(self, o: Any) -> Along:
        return self.map(lambda a, b: a**b, o)


class RowEvaluator(Evaluator):
    """A rule's body; `sum[V](..)` is over the row."""

    def _ev(self, e: tree.Expr) -> Any:
        match e:
            case tree.Call(
                fn=tree.Brackets(value=tree.Name(id="sum" | "max" as name), items=(tree.Item(left=tree.Name(id="V")),)),
                items=(one,),
            ) if one.left is not None:
                import sympy as sp

                row = self.ev(one.left)
                if not isinstance(row, Along):
                    raise NotPlain(e.span, "a sum of what is no row")
                return sum(row.parts) if name == "sum" else sp.Max(*row.parts)
        return super()._ev(e)


def probabilities(declaration: tree.Declaration, here: Along, rates: Along, h: Any, t: Any) -> Along:
    """What a rule `(rate, x, t, h)` gives for the rates of a row; raises NotPlain where its body is not followed."""
    import sympy as sp

    def each(f: Any) -> Any:
        def call(*values: Any) -> Any:
            first = next((k for k, v in enumerate(values) if isinstance(v, Along)), None)
            if first is None:
                return f(*values)
            row = values[first]
            others = [v for k, v in enumerate(values) if k != first]
            return row.map(lambda p, *o: f(*o[:first], p, *o[first:]), *others)

        return call

    functions = {
        "exp": each(sp.exp), "expm1": each(lambda e: sp.exp(e) - 1), "log": each(sp.log), "sqrt": each(sp.sqrt),
        "min": each(sp.Min), "max": each(sp.Max),
    }  # fmt: skip
    algebra = Algebra(lambda n: sp.Rational(n.text.replace("_", "")), functions)

    def rate(x: Any, time: Any) -> Any:
        if x is not here:
            raise TypeError
        return rates

    names = {**static_names(algebra, declaration, {}), "rate": rate, "x": here, "t": t, "h": h}
    found = RowEvaluator(algebra, names).run(declaration.body or ())
    if not isinstance(found, Along):
        raise NotPlain(declaration.span, "this result")
    return found


def jump_facts(declaration: tree.Declaration, report: Report) -> dict[str, Any]:
    """A rule `(rate, x, t, h)`: whether its probabilities sum to 1, lie in [0, 1], and change as the rates say. Judged on three
    values, the entry at the first, for rates and steps of many sizes."""
    import sympy as sp

    a, b, h, t = sp.symbols("a b h t", nonnegative=True)
    try:
        found = probabilities(
            declaration, Along(sp.Integer(1), sp.Integer(0), sp.Integer(0)), Along(-a - b, a, b), h, t
        )
    except NotPlain as stop:
        report.add(
            Diagnostic("FL0902", f"the probabilities of `{declaration.name}` are not followed: {stop.what} is outside the arithmetic that is followed",
                       stop.span, severity="note", suggestion="write the step with rate, x, t, h and arithmetic alone")
        )  # fmt: skip
        return {}
    where = declaration.name_span or declaration.span
    whole = sp.simplify(sum(found.parts))
    if whole != 1:
        report.add(
            Diagnostic("FL0609", f"the probabilities of a step sum to `{text(whole)}`, and must sum to 1", where,
                       suggestion="add to `x` a multiple of `rate(x, t)`, whose rows sum to 0")
        )  # fmt: skip
        return {}
    functions = [sp.lambdify((a, b, h, t), p, "mpmath") for p in found.parts]

    def row(one: float, two: float, step: float) -> list[float]:
        try:
            values = [complex(f(one, two, step, 0.5)) for f in functions]
        except (ZeroDivisionError, ValueError, OverflowError, TypeError):
            return [nan] * 3
        return [v.real if v.imag == 0 else nan for v in values]

    facts: dict[str, Any] = {"order": 1, "valid": "always"}
    for one in RATES:
        for two in RATES:
            start, soon = row(one, two, 0), row(one, two, SOON)
            change = [(q - p) / SOON for p, q in zip(start, soon, strict=True)]
            if not near(start, (1, 0, 0)) or not near(change, (-one - two, one, two)):
                facts["order"] = 0
            for step in STEPS:
                if not all(-SLACK <= p <= 1 + SLACK for p in row(one, two, step)):
                    facts["valid"] = "never" if (one + two) * step <= 1 else worse(facts["valid"])
    if facts["order"] == 0:
        report.add(
            Diagnostic("FL0602", f"`{declaration.name}` does not follow the rates: for short steps, and for rates of 0, its probabilities are to be x + h * rate(x, t)", where,
                       suggestion="as in `x + h * rate(x, t)` to begin with; divide by `max(.., 1e-12)` where that may be 0")
        )  # fmt: skip
    elif facts["valid"] == "never":
        report.add(
            Diagnostic("FL0609", f"the probabilities of a step of `{declaration.name}` leave [0, 1] even where h times the rate of leaving is below 1", where,
                       suggestion="as in `x + h * rate(x, t)`, which is right up to 1")
        )  # fmt: skip
    return facts


def worse(valid: str) -> str:
    return "never" if valid == "never" else "small_steps"


def near(found: Iterable[float], wanted: Iterable[float]) -> bool:
    return all(abs(f - w) <= 1e-4 * (1 + abs(w)) for f, w in zip(found, wanted, strict=True))


def text(e: Any) -> str:
    from flowlang.analysis.paths import text as shown

    return shown(e)


__all__ = ["Along", "check_jumps", "jump_facts", "probabilities"]
