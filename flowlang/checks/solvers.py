"""Solvers: a tableau is consistent and has the order that is claimed; so has a step rule."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from flowlang.analysis.series import FUNCTIONS, STEPS, Change, Series, StepRule, Vector, rule_order
from flowlang.analysis.solvers import condition, order, row_sum_faults
from flowlang.analysis.stochastic import stochastic_orders
from flowlang.checks.claims import Claims, claims, condition_of, fact_name
from flowlang.checks.jumps import jump_facts
from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.elaborate.arithmetic import Algebra, Evaluator, NotPlain, static_names
from flowlang.elaborate.jumps import is_jump
from flowlang.elaborate.steps import asked_index
from flowlang.elaborate.stochastic import is_stochastic
from flowlang.elaborate.tableaus import read_tableau, tableau_of
from flowlang.syntax import tree

SERIES = Algebra(lambda n: Fraction(n.text.replace("_", "")), FUNCTIONS)
RULE_PARAMETERS = ("v", "x", "t", "h")


def check_solver(
    declaration: tree.Declaration, report: Report, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reports what is wrong with a solver; returns its facts (order, stages, embedded order, ...)."""
    try:
        facts = (
            tableau_facts(declaration, report, given) if tableau_of(declaration) else rule_facts(declaration, report)
        )
    except FlowError as e:
        report.extend(e.diagnostics)
        return {}
    Claims(declaration, facts, report, "FL0601").check()
    return facts


def tableau_facts(declaration: tree.Declaration, report: Report, given: Mapping[str, Any] | None) -> dict[str, Any]:
    found = tableau_of(declaration)
    assert found is not None
    tableau = read_tableau(declaration, given)
    stages = [r for r in found.rows if r.head is not None]
    for i, total in row_sum_faults(tableau):
        report.add(
            Diagnostic(
                "FL0602", f"stage {i + 1} is at time {tableau.c[i]}, and the sum of its row is {total}", stages[i].span,
                notes=("a field that depends on time would be evaluated at the wrong time, and order be lost",),
                suggestion=f"write {total} before the bar, or correct the row",
            )
        )  # fmt: skip
    reached = order(tableau)
    weights = next(r for r in found.rows if r.head is None)
    if reached.value == 0:
        report.add(
            Diagnostic(
                "FL0602", f"the weights sum to {sum(tableau.b, Fraction(0))}, and a consistent method's sum to 1", weights.span, suggestion="correct the last row"
            )
        )  # fmt: skip
    facts: dict[str, Any] = {"stages": tableau.stages, "order": reached.value, "explicit": tableau.explicit}
    if reached.failing is not None:
        facts["order_fails"] = condition(reached.failing)
    if tableau.embedded is not None:
        facts["embedded"] = order(tableau, tableau.embedded).value
    return facts


# ---- step rules ---------------------------------------------------------------------------------


class RuleEvaluator(Evaluator):
    """A step's body; `state` names live from step to step."""

    def __init__(self, algebra: Algebra, names: Mapping[str, Any], state: dict[str, Any]):
        super().__init__(algebra, {**names, **state})
        self.state = state

    def run(self, statements: tuple[tree.Statement, ...]) -> Any:
        result: Any = None
        for s in statements:
            if isinstance(s, tree.Declare) and s.word == "state":
                for entry in s.entries:
                    if entry.name not in self.state:
                        if entry.value is None:
                            raise NotPlain(entry.span, "state without a start")
                        self.state[entry.name] = self.names[entry.name] = self.ev(entry.value)
                continue
            found = super().run((s,))
            result = found if found is not None else result
        return result


def step_rule(declaration: tree.Declaration, known: Mapping[str, Any] | None = None) -> StepRule:
    """The body as a function of series, with state of its own; `known` are names that a claim says more of."""
    names = {**static_names(SERIES, declaration, {}), **(known or {})}
    state: dict[str, Any] = {}

    def step(v: Any, x: Vector, t: Series, h: Series, i: int) -> Vector:
        evaluator = RuleEvaluator(SERIES, {**names, "v": v, "x": x, "t": t, "h": h, "i": Fraction(i)}, state)
        out = evaluator.run(declaration.body or ())
        for name in state:
            state[name] = evaluator.names[name]
        if not isinstance(out, Vector):
            raise NotPlain(declaration.span, "this result")
        return out

    return step


def rule_facts(declaration: tree.Declaration, report: Report) -> dict[str, Any]:
    if is_jump(declaration):
        return jump_rule_facts(declaration, report)
    names = {p.name for ps in declaration.parameters for p in ps}
    missing = [n for n in RULE_PARAMETERS if n not in names]
    last = declaration.parameters[-1] if declaration.parameters else ()
    if missing and any(p.type is not None for p in last):
        report.add(
            Diagnostic(
                "FL0902", f"`{declaration.name}` steps values of other types than `R`, which has no meaning yet",
                declaration.name_span or declaration.span, severity="warning", suggestion="write its step for values of `R`"
            )
        )  # fmt: skip
        return {}
    if missing:
        raise FlowError(
            Diagnostic(
                "FL0602",
                f"a step rule takes (v, x, t, h), and `{declaration.name}` lacks {', '.join(f'`{n}`' for n in missing)}",
                declaration.name_span or declaration.span,
                suggestion=f"as in `solver {declaration.name} (v, x, t, h) {{ x + h * v(x, t) }}`, or give a `tableau`",
            )
        )
    if is_stochastic(declaration):
        return stochastic_facts(declaration, report)
    steps = max(STEPS, asked_index(declaration.body or ()) + 3)
    facts = {}
    try:
        for claim, name, change in smooth_claims(declaration):
            make = partial(step_rule, declaration, {name: change.at})
            facts[claim] = rule_order(make, steps=steps, change=change)
        for claim, name in identity_claims(declaration):
            facts[claim] = rule_order(partial(step_rule, declaration, {name: lambda value: value}), steps=steps)
        return facts or {"order": rule_order(lambda: step_rule(declaration), steps=steps)}
    except NotPlain as stop:
        return not_shown(declaration, stop, report)


def jump_rule_facts(declaration: tree.Declaration, report: Report) -> dict[str, Any]:
    """A rule of jumps, whose body gives probabilities."""
    names = {p.name for ps in declaration.parameters for p in ps}
    missing = [n for n in ("x", "t", "h") if n not in names]
    if missing:
        raise FlowError(
            Diagnostic(
                "FL0602",
                f"a rule of jumps takes (rate, x, t, h), and `{declaration.name}` lacks {', '.join(f'`{n}`' for n in missing)}",
                declaration.name_span or declaration.span,
                suggestion=f"as in `solver {declaration.name} (rate, x, t, h) {{ x + h * rate(x, t) }}`",
            )
        )
    return jump_facts(declaration, report)


def smooth_claims(declaration: tree.Declaration) -> list[tuple[str, str, Change]]:
    """`require order(grid = smooth(2)) == 2`: the order where the net `grid` tells, at 2 places in each step, a smooth time, a
    smooth scale and their slopes."""
    found = []
    for e in claims(declaration):
        told = condition_of(e.left) if isinstance(e, tree.Binary) else None
        if isinstance(e, tree.Binary) and told is not None:
            fact, name, what, places = told
            if (fact, what) == ("order", "smooth") and places.isdigit() and int(places) > 0:
                found.append((fact_name(e.left), name, Change(int(places))))
    return found


def identity_claims(declaration: tree.Declaration) -> list[tuple[str, str]]:
    """`require order(fold = identity) == 4`: the order where the net `fold` gives what it is given."""
    told = [(e.left, condition_of(e.left)) for e in claims(declaration) if isinstance(e, tree.Binary)]
    return [
        (fact_name(left), c[1]) for left, c in told if c is not None and (c[0], *c[2:]) == ("order", "identity", "")
    ]


def not_shown(declaration: tree.Declaration, stop: NotPlain, report: Report) -> dict[str, Any]:
    report.add(
        Diagnostic(
            "FL0902", f"the order of `{declaration.name}` is not shown: {stop.what} is outside the arithmetic that is followed",
            stop.span, severity="note", suggestion="write the step with v, x, t, h and arithmetic alone"
        )
    )  # fmt: skip
    return {}


# ---- rules with noise ---------------------------------------------------------------------------


def stochastic_facts(declaration: tree.Declaration, report: Report) -> dict[str, Any]:
    """Weak and strong orders, and the sense in which the rule converges."""

    def rule(v: Any, g: Any, slope: Any, x: Any, t: Any, h: Any, dw: Any) -> Any:
        def jvp(f: Any, value: Any, along: Any, time: Any) -> Any:
            if f is not g:
                raise TypeError
            return slope(value, along, time)

        algebra = Algebra(SERIES.number, {"jvp": jvp, "abs": lambda value: value if value is h else abs(value)})
        names = static_names(algebra, declaration, {})
        return Evaluator(algebra, {**names, "v": v, "g": g, "x": x, "t": t, "h": h, "dw": dw}).run(
            declaration.body or ()
        )

    try:
        found = stochastic_orders(rule)
    except NotPlain as stop:
        return not_shown(declaration, stop, report)
    except TypeError:
        return not_shown(declaration, NotPlain(declaration.span, "its result"), report)
    if found["weak"] == 0:
        report.add(
            Diagnostic(
                "FL0602", f"`{declaration.name}` does not converge, in Ito's sense or Stratonovich's: the mean or the variance of a step is not that of the equation",
                declaration.name_span or declaration.span, suggestion="a step is `x + h * v(x, t) + g(x, t, dw)` to begin with",
            )
        )  # fmt: skip
    return {k: float(f) if isinstance(f, Fraction) else f for k, f in found.items()}
