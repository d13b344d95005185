"""Equations with noise: orders that are proved and measured, both backends, and what is refused."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.checks.solvers import check_solver
from flowlang.diagnostics import FlowError, Report
from flowlang.source import Source
from flowlang.syntax.parser import parse
from tests.catalogue.programs import same_in_onnx
from tests.library.registry import declaration

F64 = torch.float64
MODEL = """
model m(n: int = 8) {{
  data x0: R[D = 1]
  def growth(x, t) {{ 0.6 * x }}
  def pull(x, t) {{ -0.9 * x }}
  def scaled(x, t) {{ 0.5 * x }}
  def rising(x, t) {{ 0.4 + 0.9 * t }}
  def end(x0, dw: R[S = {n}, D]) {{ integrate({v}, x0, t = 0 -> 1, {solver}(steps = {n}), noise = {g}, increments = dw{more}) }}
}}
"""


@cache
def scheme(solver: str, v: str, g: str, n: int, more: str = "") -> Any:
    return fl.compile(MODEL.format(solver=solver, v=v, g=g, n=n, more=more), dtype=F64)


# ---- proved -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "facts"),
    [
        ("euler_maruyama", ("ito", 1, 0.5, 1, 1)),
        ("stochastic_heun", ("stratonovich", 1, 1, 2, 1)),
        ("milstein", ("ito", 1, 1, 1, 1)),
    ],
)
def test_the_library_s_rules_keep_their_claims(solver: str, facts: tuple[Any, ...]) -> None:
    report = Report()
    found = check_solver(declaration(solver), report)
    assert not list(report)
    assert tuple(found[k] for k in ("sense", "weak", "strong", "additive_weak", "additive_strong")) == facts


def told(text: str) -> list[tuple[str, str]]:
    report = Report()
    check_solver(parse(Source.of("s", text), Report()).module.items[0], report)
    return [(d.code, d.message) for d in report]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("require strong == 1\n x + h * v(x, t) + g(x, t, dw)", "FL0601", "strong is 0.5"),
        ("require sense == stratonovich\n x + h * v(x, t) + g(x, t, dw)", "FL0601", "sense is ito"),
        ("require weak == 2\n x + h * v(x, t) + g(x, t, dw)", "FL0601", "weak is 1"),
        ("x + h * v(x, t) + 2 * g(x, t, dw)", "FL0602", "does not converge"),
        ("x + g(x, t, dw)", "FL0602", "does not converge"),
        (
            "x + h * v(x, t + h) + g(x, t + h, dw) + (g(x + g(x, t, dw), t, dw) - g(x, t, dw)) / 3",
            "FL0602",
            "does not converge",
        ),
        ("x + h * v(x, t) + tanh(g(x, t, dw))", "FL0902", "`tanh`"),
    ],
)
def test_wrong_claims_are_told(body: str, code: str, words: str) -> None:
    found = told(f"solver s (v, g, x, t, h, dw) {{\n {body}\n }}")
    assert any(c == code and words in m for c, m in found), found


# ---- measured ---------------------------------------------------------------------------------


def paths(n: int, count: int = 4000) -> Tensor:
    """The same Brownian paths, in n increments of a part of their 64."""
    fine = torch.randn(count, 64, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) / 8
    return fine.reshape(count, n, 64 // n, 1).sum(2)


@pytest.mark.parametrize(
    ("solver", "g", "more", "order"),
    [
        ("euler_maruyama", "scaled", "", 0.5), ("milstein", "scaled", "", 1),
        ("stochastic_heun", "scaled", ", sense = stratonovich", 1), ("euler_maruyama", "0.5", "", 1), ("milstein", "0.5", "", 1),
    ],
)  # fmt: skip
def test_strong_orders(solver: str, g: str, more: str, order: float) -> None:
    """Geometric Brownian motion beside its closed form; additive noise beside 64 steps of its own."""
    x = torch.ones(4000, 1, dtype=F64)
    w = paths(1)[:, 0]
    drift = 0.6 if "sense" in more else 0.6 - 0.125
    exact = (
        torch.exp(drift + 0.5 * w) if g == "scaled" else scheme("stochastic_heun", "growth", g, 64).end(x, paths(64))
    )
    errors = [
        float((scheme(solver, "growth", g, n, more).end(x, paths(n)) - exact).square().mean().sqrt())
        for n in (4, 8, 16)
    ]
    assert abs(math.log2(errors[0] / errors[2]) / 2 - order) < 0.2


def quadrature(n: int) -> tuple[Tensor, Tensor]:
    """Gauss and Hermite's points for n increments, three for each: exact for polynomials of degree 5 in each."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = torch.tensor(list(itertools.product(nodes, repeat=n)), dtype=F64)[..., None] / n**0.5
    weight = torch.tensor([math.prod(w) for w in itertools.product(weights / weights.sum(), repeat=n)], dtype=F64)
    return grid, weight


@pytest.mark.parametrize(
    ("solver", "v", "g", "more", "order"),
    [
        ("euler_maruyama", "growth", "scaled", "", 1), ("milstein", "growth", "scaled", "", 1),
        ("stochastic_heun", "growth", "scaled", ", sense = stratonovich", 1),
        ("euler_maruyama", "pull", "0.5", "", 1), ("stochastic_heun", "pull", "0.5", "", 2), ("stochastic_heun", "pull", "rising", "", 2),
    ],
)  # fmt: skip
def test_weak_orders(solver: str, v: str, g: str, more: str, order: int) -> None:
    """The mean square of Ornstein and Uhlenbeck's process and of geometric Brownian motion, without sampling error."""
    if g == "scaled":
        exact = math.exp(2 * (0.6 + 0.125 * bool(more)) + 0.25)
    else:  # x' = -0.9 x: the variance is the integral of exp(-1.8·(1 - s))·g(s)²
        s = torch.linspace(0, 1, 200001, dtype=F64)
        level = 0.5 + 0 * s if g == "0.5" else 0.4 + 0.9 * s
        exact = math.exp(-1.8) + float(torch.trapezoid(torch.exp(-1.8 * (1 - s)) * level**2, s))
    errors = []
    for n in (2, 4, 8):
        dw, weight = quadrature(n)
        end = scheme(solver, v, g, n, more).end(torch.ones(len(dw), 1, dtype=F64), dw)
        errors.append(abs(float((weight * end[:, 0] ** 2).sum()) - exact))
    assert abs(math.log2(errors[1] / errors[2]) - order) < 0.3


def test_a_step_is_the_formula() -> None:
    """Several noises, times of one's own, backwards; beside a loop written out."""
    text = """
    model m {
      data x0: R[D = 2]
      def drift(x, t) { sin(x) + t }
      def level(x: R[D], t: R) { stack[W](x, 0.3 + 0 * x, t + 0 * x) }
      def end(x0, dw: R[S = 3, W = 3]) {
        integrate(drift, x0, t = 1 -> 0, euler_maruyama(times = [0, 0.5, 0.7, 1]), noise = level, increments = dw)
      }
    }"""
    x0, dw = torch.randn(5, 2, dtype=F64), torch.randn(5, 3, 3, dtype=F64)
    x, times = x0, [1, 0.7, 0.5, 0]
    for k in range(3):
        t, h = times[k], times[k + 1] - times[k]
        level = torch.stack([x, torch.full_like(x, 0.3), torch.full_like(x, t)], -1)
        x = x + h * (x.sin() + t) + (level * dw[:, k, None]).sum(-1)
    torch.testing.assert_close(fl.compile(text, dtype=F64).end(x0, dw), x)


NOISY = """
model m(v: net = time_mlp(8)) {
  data x0: R[D = 2]
  g = mlp(4, act = tanh)
  def field(x0, t: R) { u: R[D] = v(x0, t);  u }
  def own(x, t) { 0.3 + 0.1 * sin(x) }
  def mixed(x0, t: R) { y: R[K = 6] = g(x0);  y[K -> (D = 2, W = 3)] }
  def euler(x0) { integrate(field, x0, t = 0 -> 1, euler_maruyama(steps = 5), noise = mixed) }
  def heun(x0) { integrate(field, x0, t = 0 -> 1, stochastic_heun(times = [0, 0.2, 1]), noise = own, sense = stratonovich) }
  def milstein_end(x0) { integrate(field, x0, t = 0 -> 1, milstein(steps = 5), noise = own) }
  def loss { x ~ normal;  mean((euler(x) - x0) ^ 2) }
}
"""


@pytest.mark.parametrize("program", ["euler", "heun", "milstein_end"])
def test_onnx_takes_the_same_steps_with_noise_as_an_input(program: str, tmp_path: Path) -> None:
    same_in_onnx(
        fl.compile(NOISY, seed=0), program, tmp_path, torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    )


def test_drawn_increments_have_the_variance_of_the_steps() -> None:
    text = "model m { data x0: R[D = 1]\n def end(x0) { integrate(still, x0, t = 0 -> 2, euler_maruyama(times = [0, 0.5, 2]), noise = 0.7) }\n def still(x, t) { 0 * x } }"
    end = fl.compile(text, dtype=F64).end(torch.zeros(20000, 1, dtype=F64), generator=torch.Generator().manual_seed(0))
    assert abs(float(end.var()) - 2 * 0.49) < 0.03


def test_gradients_reach_drift_and_noise() -> None:
    model: Any = fl.compile(NOISY, seed=0)
    model.loss(torch.zeros(6, 2)).mean().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())


# ---- refused ----------------------------------------------------------------------------------

WRONG = """
model m {
  data x0: R[D = 2]
  def drift(x, t) { -x }
  def own(x, t) { 0.5 * x }
  def others(x: R[D], t: R) { 0.5 * x[D = 0] + 0 * x }
  def matrix(x: R[D], t: R) { stack[W](x, 2 * x) }
  def end(x0) { integrate(drift, x0, t = 0 -> 1, %s) }
}
"""


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ("milstein(steps = 4), noise = others", "FL0608", "depends on others"),
        ("milstein(steps = 4), noise = matrix", "FL0608", "mixes noises along `W`"),
        ("stochastic_heun(steps = 4), noise = own", "FL0608", "Stratonovich's sense"),
        ("milstein(steps = 4), noise = own, sense = stratonovich", "FL0608", "Ito's sense"),
        ("euler_maruyama(steps = 4)", "FL0203", "there is none"),
        ("rk4(steps = 4), noise = 1", "FL0211", "without noise"),
        ("rk4(steps = 4), sense = ito", "FL0202", "`sense`"),
        ("euler_maruyama, noise = 1", "FL0203", "number of steps"),
        ("euler_maruyama(rtol = 1e-3), noise = 1", "FL0203", "number of steps"),
        ("euler_maruyama(steps = 4), noise = own, at = [0.5]", "FL0202", "`at`"),
        ('euler_maruyama(steps = 4), noise = "a"', "FL0306", "text"),
        ("euler_maruyama(steps = 4), noise = own, increments = x0", "FL0301", "4 steps"),
    ],
)
def test_what_does_not_fit_is_told(asked: str, code: str, words: str) -> None:
    errors = fl.check(WRONG % asked).errors
    assert [(e.code, words in e.message) for e in errors] == [(code, True)], errors
    assert errors[0].suggestion


@pytest.mark.parametrize(
    "asked",
    [
        "milstein(steps = 4), noise = own",
        "stochastic_heun(steps = 4), noise = 0.3",
        "euler_maruyama(steps = 4), noise = matrix",
    ],
)
def test_what_fits_is_not(asked: str) -> None:
    assert not fl.check(WRONG % asked).errors


def test_a_bijection_has_no_noise() -> None:
    text = "bijector b(x: R[D]) { integrate(mlp(4, act = tanh), x, t = 0 -> 1, euler_maruyama(steps = 4), noise = 1) }\nflow f { data x: R[D = 2];  b;  base normal }"
    with pytest.raises(FlowError, match="only programs of a model draw"):
        fl.compile(text)


def test_a_rule_with_state_is_told() -> None:
    text = "solver s (v, g, x, t, h, dw) { state a = 0\n a := v(x, t)\n x + h * a + g(x, t, dw) }\n"
    assert any(e.code == "FL0902" for e in fl.check(text + WRONG % "s(steps = 2), noise = 1").errors)
