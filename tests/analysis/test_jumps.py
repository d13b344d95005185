"""Processes of jumps: the rules' probabilities, the conditions on rates, and what is drawn against the law of the step."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowlang as fl
from flowlang.checks.jumps import jump_facts
from flowlang.checks.solvers import check_solver
from flowlang.diagnostics import Report
from tests.analysis.test_paths import declaration

F64 = torch.float64
Q = np.array([[-0.7, 0.5, 0.2], [0.1, -0.4, 0.3], [0.6, 0.0, -0.6]])
CHAIN = """
model c(steps: int = 1) {{
  data x0: Int(0..3)[N = 2]
  def rates(x, t) {{
    table: R[N, K = 3, V = 3] = stack[K](stack[V](0, 0.5, 0.2), stack[V](0.1, 0, 0.3), stack[V](0.6, 0, 0)) + 0 * x
    hot: R[N, K = 3] = where(x == index[K](zeros[K = 3]), 1.0, 0.0)
    max(sum[K](hot * table), 0)
  }}
  def end(x0, u: R[S = {steps}, N = 2]) {{ integrate(rates, x0, t = 0 -> {time}, {rule}(steps = {steps}), increments = u) }}
  def drawn(x0) {{ integrate(rates, x0, t = 0 -> {time}, {rule}(steps = {steps})) }}
}}
"""


@cache
def chain(rule: str, steps: int = 1, time: float = 1.0) -> Any:
    return fl.compile(CHAIN.format(rule=rule, steps=steps, time=time), dtype=F64)


def law(rule: str, h: float) -> np.ndarray:
    """The matrix of a step, written apart."""
    if rule == "jump_euler":
        return np.eye(3) + h * Q
    away = -np.diag(Q)
    out = (1 - np.exp(-h * away))[:, None] * Q / away[:, None]
    out[np.arange(3), np.arange(3)] = np.exp(-h * away)
    return out


@pytest.mark.parametrize("rule", ["jumps", "jump_euler"])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_step_has_the_probabilities_of_its_rule(rule: str, start: int) -> None:
    """With evenly spread numbers in the place of draws, frequencies are the probabilities."""
    n = 2000
    u = ((torch.arange(n, dtype=F64) + 0.5) / n)[:, None, None].expand(n, 1, 2)
    end = chain(rule, time=0.8).end(torch.full((n, 2), start), u)
    found = np.stack([(end == k).double().mean(0).numpy() for k in range(3)], -1)
    assert abs(found - law(rule, 0.8)[start]).max() <= 1.5 / n


@pytest.mark.parametrize("rule", ["jumps", "jump_euler"])
def test_many_steps_find_the_matrix_exponential(rule: str) -> None:
    n = 20000
    end = chain(rule, 60, 2.0).drawn(torch.zeros(n, 2, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.matrix_exp(2 * torch.tensor(Q))[0].numpy()
    for k in range(3):
        share = float((end == k).double().mean())
        assert abs(share - wanted[k]) <= 4 * (wanted[k] * (1 - wanted[k]) / (2 * n)) ** 0.5 + 0.01
    error = [abs(np.linalg.matrix_power(law(rule, 2 / k), k)[0] - wanted).max() for k in (20, 40)]
    assert 1.8 < error[0] / error[1] < 2.2  # the order that the rules claim


@pytest.mark.parametrize(
    ("body", "order", "valid"),
    [
        ("x + h * rate(x, t)", 1, "small_steps"),
        ("u = rate(x, t)\n x + (1 - exp(-h)) * u", 1, "small_steps"),
        ("u = rate(x, t)\n a = -(sum[V](x * u))\n x + h / (1 + h * a) * u", 1, "always"),
        ("u = rate(x, t)\n a = -(sum[V](x * u))\n x + min(h, 1 / max(a, 1e-12)) * u", 1, "always"),
    ],
)
def test_what_is_known_of_a_rule(body: str, order: int, valid: str) -> None:
    report = Report()
    facts = check_solver(declaration(f"solver s (rate, x, t, h) {{ {body} }}"), report)
    assert not list(report)
    assert (facts["order"], facts["valid"]) == (order, valid)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("solver s (rate, x, t, h) { x + h / 2 * rate(x, t) }", "FL0602", "does not follow the rates"),
        ("solver s (rate, x, t, h) { (1 + h) * x + h * rate(x, t) }", "FL0609", "sum to `h + 1`"),
        ("solver s (rate, x, t, h) { u = rate(x, t)\n x + h * u - 100 * h ^ 2 * u }", "FL0609", "even where"),
        (
            "solver s (rate, x, t, h) { u = rate(x, t)\n a = -(sum[V](x * u))\n x + (1 - exp(-(h * a))) / a * u }",
            "FL0602",
            "rates of 0",
        ),
        ("solver s (rate, x, t, h) { require valid == always\n x + h * rate(x, t) }", "FL0601", "small_steps"),
        ("solver s (rate, x, h) { x + h * rate(x, 0) }", "FL0602", "lacks `t`"),
        ("solver s (rate, x, t, h) { sort(x) }", "FL0902", "not followed"),
    ],
)
def test_rules_that_give_no_probabilities_are_refused(text: str, code: str, words: str) -> None:
    report = Report()
    check_solver(declaration(text), report)
    first = next(iter(report))
    assert first.code == code
    assert words in first.message


def test_the_judgement_of_three_values_is_that_of_numbers() -> None:
    """The exponential rule by numbers, on seven values."""
    assert (
        jump_facts(declaration("solver s (rate, x, t, h) { x + h * rate(x, t) }"), Report())["valid"] == "small_steps"
    )
    rates = np.random.default_rng(0).exponential(size=7)
    rates[0] = 0
    away = rates.sum()
    for h in (0.01, 1.0, 50.0):
        p = (1 - np.exp(-h * away)) / away * rates
        p[0] = np.exp(-h * away)
        assert p.min() >= 0
        assert p.sum() == pytest.approx(1)


RATES = """
model m(w: net = token_mlp(4, tokens = 3)) {{
  data x1: Int(0..3)[N = 2]
  def rates(x, t) {{
    y: R[N, V = 3] = w(x, t)
    {body}
  }}
  def end(x1) {{ integrate(rates, x1, t = 0 -> 0.9, {rule}(steps = 9)) }}
}}
"""


@pytest.mark.parametrize(
    ("body", "rule", "severity", "words"),
    [
        ("exp(y)", "jumps", None, ""),
        ("discrete_mixture.rate(t, x, data = softmax[V](y))", "jumps", None, ""),
        ("softmax[V](y)", "jumps", "error", "probabilities, whose rows sum to 1"),
        ("-1 - exp(y)", "jumps", "error", "below 0"),
        ("y", "jumps", "warning", "not shown to be 0 or above"),
        ("discrete_mixture.rate(t, x, data = y)", "jumps", "warning", "not shown to be 0 or above"),
        ("exp(y)", "jump_euler", "warning", "not shown here"),
        ("5 * sigmoid(y)", "jump_euler", None, ""),  # 5 · 2 other values · a step of 0.1
        ("6 * sigmoid(y)", "jump_euler", "warning", "it may be 1.2 here"),
    ],
)
def test_rates_are_judged_where_a_solver_meets_them(body: str, rule: str, severity: str | None, words: str) -> None:
    report = fl.check(RATES.format(body=body, rule=rule))
    found = [d for d in report if d.code == "FL0609"]
    assert [d.severity for d in found] == ([severity] if severity else [])
    assert all(words in d.message for d in found)
    assert severity == "error" or report.ok


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("integrate(rates, x1, t = 1 -> 0, jumps(steps = 9))", "FL0305"),
        ("integrate(rates, x1, t = 0 -> 1, jumps(steps = 9), at = [0.5])", "FL0202"),
        ("integrate(rates, x1, t = 0 -> 1, jumps(steps = 9), noise = 1)", "FL0202"),
        ("integrate(rates, x1, t = 0 -> 1, jumps)", "FL0203"),
        ("integrate(one, x1, t = 0 -> 1, jumps(steps = 9))", "FL0301"),
        ("integrate(rates, x1, t = 0 -> 1, two_places(steps = 9))", "FL0203"),
    ],
)
def test_uses_that_have_no_meaning_are_refused(call: str, code: str) -> None:
    text = f"""
    solver two_places (rate, x, t, h) {{ x + h * rate(2 * x, t) }}
    model m(w: net = token_mlp(4, tokens = 3)) {{
      data x1: Int(0..3)[N = 2]
      def rates(x, t) {{ y: R[N, V = 3] = w(x, t);  exp(y) }}
      def one(x, t) {{ x + t }}
      def end(x1) {{ {call} }}
    }}"""
    assert code in [e.code for e in fl.check(text).errors]


def test_tokens_that_are_told_never_change() -> None:
    """From a source that is all mask, a token that is none has no rate (card 113, item 6)."""
    text = """
    model m(w: net = token_mlp(8, tokens = 4)) {
      data x1: Int(0..4)[N = 5]
      def rates(x, t) {
        y: R[N, V = 4] = w(x, t)
        mask: R[N, V = 4] = where(index[V](y) == 3, 1.0, 0.0)
        own: R[N, V = 4] = where(x == index[V](y), 1.0, 0.0)
        told: R[N, V = 4] = where(x == 3, softmax[V](y - 1e9 * mask), own)
        discrete_mixture.rate(t, x, data = told)
      }
      def begun(x1) { integrate(rates, x1, t = 0 -> 0.5, jumps(steps = 10)) }
      def rest(x1, u: R[S = 10, N = 5]) { integrate(rates, x1, t = 0.5 -> 0.99, jumps(steps = 10), increments = u) }
    }"""
    model: Any = fl.compile(text, dtype=F64, seed=0)
    start = torch.full((4000, 5), 3)
    half = model.begun(start, generator=torch.Generator().manual_seed(3))
    masked = float((half == 3).double().mean())
    assert abs(masked - 0.5) < 4 * (0.25 / 20000) ** 0.5 + 0.03  # 1 - κ, and what ten steps of order 1 leave
    for u in (torch.rand(4000, 10, 5, dtype=F64), torch.full((4000, 10, 5), 1 - 2.0**-53, dtype=F64)):
        end = model.rest(half.long(), u)
        assert (end[half != 3] == half[half != 3]).all()


def test_the_same_in_onnx(tmp_path: Path) -> None:
    from tests.catalogue.programs import same_in_onnx

    model = fl.compile(CHAIN.format(rule="jumps", steps=4, time=2.0), seed=0)
    u = torch.rand(16, 4, 2, generator=torch.Generator().manual_seed(0))
    same_in_onnx(model, "end", tmp_path, torch.arange(16)[:, None].expand(16, 2) % 3, u)
    same_in_onnx(model, "drawn", tmp_path, torch.zeros(5, 2, dtype=torch.int64))
