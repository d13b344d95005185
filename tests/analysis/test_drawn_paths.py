"""Paths that draw x_t among their ends: weights, rates of jumps, and that these rates carry the marginals (by the forward equation)."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch

import flowlang as fl
from flowlang.checks.paths import check_path
from flowlang.diagnostics import Report
from flowlang.library import standard_library
from flowlang.syntax import tree
from flowlang.syntax.parser import parse
from tests.analysis.test_paths import declaration

F64 = torch.float64
MODEL = """
model k(path: path = {use}) {{
  data x1: Int(0..3)[N = 2]
  def place(x1, x0: Int(0..3)[N = 2], t: Unit) {{ path.at(t, x0, x1) }}
  def levels(t: Unit) {{ path.alpha(t), path.sigma(t), path.alpha_rate(t), path.sigma_rate(t) }}
  def rates(x1, p: R[N = 2, V = 3], t: Interval(0.01, 0.99)) {{ path.rate(t, x1, data = p), path.rate(t, x1, noise = p) }}
}}
"""
USES = {
    "discrete_mixture": lambda t: (t, 1.0),
    "discrete_mixture(power = 3)": lambda t: (t**3, 3 * t**2),
    "cosine_mixture": lambda t: (math.sin(math.pi * t / 2) ** 2, math.pi / 2 * math.sin(math.pi * t)),
    "cubic_mixture(a = 1.5, b = 0.25)": lambda t: (
        -2 * t**3 + 3 * t**2 + 1.5 * (t**3 - 2 * t**2 + t) + 0.25 * (t**3 - t**2),
        -6 * t**2 + 6 * t + 1.5 * (3 * t**2 - 4 * t + 1) + 0.25 * (3 * t**2 - 2 * t),
    ),
}


@cache
def compiled(use: str) -> Any:
    return fl.compile(MODEL.format(use=use), dtype=F64)


def library_paths() -> dict[str, tree.Declaration]:
    source = standard_library().source("std.paths.discrete")
    assert source is not None
    items = parse(source, Report()).module.items
    return {d.name: d for d in items if isinstance(d, tree.Declaration) and d.kind == "path"}


@pytest.mark.parametrize("name", library_paths())
def test_library_paths_pass(name: str) -> None:
    report = Report()
    facts = check_path(library_paths()[name], report)
    assert not list(report)
    assert facts["endpoint"] == 0
    t = sp.Symbol("t", real=True)
    kappa = sp.sympify(facts["alpha"].replace("^", "**").replace("π", "pi"), locals={"t": t})
    pace = sp.sympify(facts["pace"].replace("^", "**").replace("π", "pi"), locals={"t": t})
    assert sp.simplify(pace - sp.diff(kappa, t) / (1 - kappa)) == 0


@pytest.mark.parametrize("use", USES)
def test_levels_and_draws(use: str) -> None:
    for time in (0.2, 0.7):
        kappa, rate = USES[use](time)
        found = [float(v) for v in compiled(use).levels(torch.tensor([time], dtype=F64))]
        assert found == pytest.approx([kappa, 1 - kappa, rate, -rate], rel=1e-12)
        n = 20000
        x0, x1 = torch.zeros(n, 2, dtype=torch.int64), torch.full((n, 2), 2)
        x = compiled(use).place(x1, x0, torch.full((n,), time, dtype=F64), generator=torch.Generator().manual_seed(1))
        assert set(x.unique().tolist()) == {0, 2}
        share = float((x == 2).double().mean())
        assert abs(share - kappa) <= 4 * (kappa * (1 - kappa) / (2 * n)) ** 0.5
        both = float((x == 2).all(-1).double().mean())  # entries are drawn each by itself
        assert abs(both - kappa**2) <= 4 * (kappa**2 * (1 - kappa**2) / n) ** 0.5


def states() -> list[tuple[int, ...]]:
    return list(itertools.product(range(3), repeat=2))


TARGET = {(0, 1): 0.3, (2, 0): 0.5, (2, 2): 0.2}


def marginal(kappa: float, entry: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p_t of a uniform source, and the posteriors of x1 and of x0 for each state and entry, by Bayes' rule."""
    p, of_data, of_noise = np.zeros(9), np.zeros((9, 2, 3)), np.zeros((9, 2, 3))
    for k, x in enumerate(states()):
        for x1, w in TARGET.items():
            for x0 in states():
                weight = w / 9 * math.prod((1 - kappa) * (x[i] == x0[i]) + kappa * (x[i] == x1[i]) for i in range(2))
                p[k] += weight
                for i in range(2):
                    of_data[k, i, x1[i]] += weight
                    of_noise[k, i, x0[i]] += weight
    return p, of_data / p[:, None, None], of_noise / p[:, None, None]


def forward(p: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """dp/dt of a chain whose entries jump one at a time."""
    out, order = np.zeros(9), {s: k for k, s in enumerate(states())}
    for k, x in enumerate(states()):
        for i in range(2):
            for y in range(3):
                if y != x[i]:
                    to = order[tuple(y if j == i else x[j] for j in range(2))]
                    out[to] += p[k] * rates[k, i, y]
                    out[k] -= p[k] * rates[k, i, y]
    return out


@pytest.mark.parametrize("use", USES)
def test_the_rates_carry_the_marginals_there_and_back(use: str) -> None:
    """The change of p_t by differences is that of Kolmogorov's forward equation with the path's rates; those from the noise's
    posterior run it back. Off the diagonal none is below 0, and rows sum to 0."""
    for time in (0.15, 0.6, 0.9):
        kappa, _ = USES[use](time)
        p, of_data, of_noise = marginal(kappa)
        slope = (marginal(USES[use](time + 1e-5)[0])[0] - marginal(USES[use](time - 1e-5)[0])[0]) / 2e-5
        x, t = torch.tensor(states()), torch.full((9,), time, dtype=F64)
        there = compiled(use).rates(x, torch.tensor(of_data), t)[0].numpy()
        back = compiled(use).rates(x, torch.tensor(of_noise), t)[1].numpy()
        assert abs(forward(p, there) - slope).max() < 1e-7
        assert abs(forward(p, back) + slope).max() < 1e-7
        here = np.array(states())[..., None] == np.arange(3)
        for rates in (there, back):
            assert abs(rates.sum(-1)).max() < 1e-12
            assert rates[~here].min() >= 0


@pytest.mark.parametrize(
    ("formula", "code", "words"),
    [
        ("(1 - t) * delta(x0) + t ^ 2 * delta(x1)", "FL0609", "t * (1 - t)"),
        ("(1 - t / 2) * delta(x0) + t / 2 * delta(x1)", "FL0603", "t = 1"),
        ("t * delta(x0) + (1 - t) * delta(x1)", "FL0603", "t = 0"),
        ("(1 - t) * delta(x0) + t * delta(x1) + t * x1", "FL0609", "t * x1"),
        ("(1 - t) * delta(x0) + t * delta(x1) + t", "FL0609", "stands at neither"),
        ("(1 - t - sin(2 * π * t)) * delta(x0) + (t + sin(2 * π * t)) * delta(x1)", "FL0609", "to be a probability"),
        ("(1 - t + 0.3 * sin(2 * π * t)) * delta(x0) + (t - 0.3 * sin(2 * π * t)) * delta(x1)", "FL0609", ""),
    ],
)
def test_weights_that_are_none_are_refused(formula: str, code: str, words: str) -> None:
    report = Report()
    check_path(declaration(f"path p (t, x0, x1) {{ x_t ~ {formula} }}"), report)
    first = next(iter(report))
    assert first.code == code
    assert words in " ".join([first.message, *first.notes])


@pytest.mark.parametrize(
    ("use", "code", "words"),
    [
        ("discrete_mixture", "FL0306", "has no `velocity`"),
        ("cond_ot", "FL0306", "has no `rate`"),
    ],
)
def test_each_kind_of_path_has_its_own_functions(use: str, code: str, words: str) -> None:
    what = "rate(t, x1, data = p)" if use == "cond_ot" else "velocity(t, x1, x1)"
    text = f"model m(path: path = {use}) {{ data x1: Int(0..3)[N = 2]\n def f(x1, p: R[N = 2, V = 3], t: Unit) {{ path.{what} }} }}"
    assert any(e.code == code and words in e.message for e in fl.check(text).errors)


def test_draws_stand_in_programs_alone() -> None:
    text = (
        "net f(path: path = discrete_mixture) (x0: Int(0..3)[N = 2], x1: Int(0..3)[N], t: Unit) { path.at(t, x0, x1) }"
    )
    assert "FL0410" in [e.code for e in fl.check(text).errors]


def test_probabilities_need_an_axis_of_tokens() -> None:
    text = "model m(path: path = discrete_mixture) { data x1: Int(0..3)[N = 2]\n def f(x1, p: R[N = 2], t: Interval(0, 0.9)) { path.rate(t, x1, data = p) } }"
    assert "FL0301" in [e.code for e in fl.check(text).errors]


@pytest.mark.parametrize(
    ("use", "code"),
    [
        ("cubic_mixture(a = -5)", "FL0609"),
        ("discrete_mixture(power = 0)", "FL0603"),
        ("cubic_mixture(a = 1, b = 1)", None),
    ],
)
def test_the_numbers_a_path_is_given_are_judged_too(use: str, code: str | None) -> None:
    text = f"model m(path: path = {use}) {{ data x1: Int(0..3)[N = 2]\n def f(x1, t: Interval(0.1, 0.9)) {{ path.alpha(t) }} }}"
    errors = fl.check(text).errors
    assert [e.code for e in errors][:1] == ([code] if code else [])
    assert all(e.message.startswith("with ") for e in errors)
