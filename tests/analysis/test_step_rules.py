"""Orders of step rules, proved by series, against measured convergence in floating point."""

from __future__ import annotations

import math

import pytest

from flowlang.checks.solvers import RuleEvaluator, check_solver
from flowlang.diagnostics import Report
from flowlang.elaborate.arithmetic import Algebra
from flowlang.source import Source
from flowlang.syntax import tree
from flowlang.syntax.parser import parse

RULES = {
    "euler": ("x + h * v(x, t)", 1),
    "heun": ("k = v(x, t)\n x + h / 2 * (k + v(x + h * k, t + h))", 2),
    "heun_at_the_wrong_time": ("k = v(x, t)\n x + h / 2 * (k + v(x + h * k, t))", 1),
    "midpoint": ("x + h * v(x + h / 2 * v(x, t), t + h / 2)", 2),
    "kutta3": ("a = v(x, t)\n b = v(x + h / 2 * a, t + h / 2)\n c = v(x - h * a + 2 * h * b, t + h)\n x + h / 6 * (a + 4 * b + c)", 3),
    "rk4": (
        "a = v(x, t)\n b = v(x + h / 2 * a, t + h / 2)\n c = v(x + h / 2 * b, t + h / 2)\n d = v(x + h * c, t + h)\n"
        "x + h / 6 * (a + 2 * b + 2 * c + d)",
        4,
    ),
    "adams_bashforth": ("state u = v(x, t)\n k = v(x, t)\n y = x + h * (3 / 2 * k - 1 / 2 * u)\n u := k\n y", 2),
    "reused_midpoint": ("state u = v(x, t)\n u := v(x + h / 2 * u, t + h / 2)\n x + h * u", 2),
    "with_a_function": ("k = v(x, t)\n x + (exp(h) - 1) * k", 1),
}  # fmt: skip


def declaration(name: str, body: str, claim: str = "") -> tree.Declaration:
    found = parse(Source.of("rule", f"solver {name} (v, x, t, h) {{\n {claim}\n {body}\n}}\n"), Report()).module.items[
        0
    ]
    assert isinstance(found, tree.Declaration)
    return found


@pytest.mark.parametrize("name", RULES)
def test_order_by_series_is_the_measured_one(name: str) -> None:
    body, expected = RULES[name]
    found = declaration(name, body)
    report = Report()
    assert check_solver(found, report)["order"] == expected
    assert report.ok
    slope = math.log2(measured(found, 64) / measured(found, 128))
    assert abs(slope - expected) < 0.25


FLOATS = Algebra(lambda n: float(n.value), {"exp": math.exp})


def measured(found: tree.Declaration, steps: int) -> float:
    """The error at t = 1 for x' = x·cos 3t + sin x, against a hundred times finer rk4."""

    def v(x: float, t: float) -> float:
        return x * math.cos(3 * t) + math.sin(x)

    def classical(n: int) -> float:
        x, h = 0.7, 1 / n
        for i in range(n):
            t = i * h
            a = v(x, t)
            b = v(x + h / 2 * a, t + h / 2)
            c = v(x + h / 2 * b, t + h / 2)
            x += h / 6 * (a + 2 * b + 2 * c + v(x + h * c, t + h))
        return x

    state: dict[str, float] = {}
    x, h = 0.7, 1 / steps
    for i in range(steps):
        run = RuleEvaluator(FLOATS, {"v": v, "x": x, "t": i * h, "h": h}, state)
        x = run.run(found.body or ())
        state.update({k: run.names[k] for k in state})
    return abs(x - classical(4000))


def test_a_claim_that_is_too_high_is_refused_at_its_place() -> None:
    report = Report()
    check_solver(declaration("late", RULES["heun_at_the_wrong_time"][0], "require order == 2"), report)
    (error,) = report.errors
    assert error.code == "FL0601"
    assert error.span is not None
    assert error.span.text == "order == 2"


def test_what_cannot_be_followed_is_said_and_not_refused() -> None:
    report = Report()
    assert check_solver(declaration("unknown", "x + h * v(x, t) + mystery(h)"), report) == {}
    assert report.ok
    assert [d.code for d in report] == ["FL0902"]


def test_a_rule_without_its_parameters() -> None:
    found = parse(Source.of("rule", "solver s (v, x, t) { x + v(x, t) }\n"), Report()).module.items[0]
    assert isinstance(found, tree.Declaration)
    report = Report()
    check_solver(found, report)
    assert [d.code for d in report] == ["FL0602"]


def test_deep_recursion_of_local_functions_ends() -> None:
    report = Report()
    check_solver(declaration("loop", "def f(y) { f(y) }\n x + f(h)"), report)
    assert [d.code for d in report] == ["FL0902"]
