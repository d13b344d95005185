"""Functions of functions in programs: gradients, products with Jacobians, frozen networks, predictions of paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from tests.catalogue.programs import same_in_onnx

TEXT = """
model m(f: net = mlp(16, act = tanh), v: net = mlp(16, act = tanh)) {
  data x: R[A = 2, D = 3]
  def energy(x, t: R) { y: R[one = 1] = f[A, D](x, t);  y[one = 0] * sum(x ^ 2) }
  def slopes(x, t: R) { grad(energy)(x, t) }
  def rate(x, t: R) {
    def g(t) { energy(x, t) }
    derivative(g)(t)
  }
  def field(x, t: R) { y: R[A, D] = v[D](x, t);  y }
  def push(x, t: R, u: R[A, D]) {
    def g(x) { field(x, t) }
    jvp(g, x, u)
  }
  def pull(x, t: R, u: R[A, D]) {
    def g(x) { field(x, t) }
    vjp(g, x, u)
  }
  def spread(x, t: R) { divergence(field)(x, t) }
  def still(x, t: R) { y: R[A, D] = frozen(v)[D](x, t);  y }
  def score(x) { grad(normal.log_prob)(x) }
}
"""


def values(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (*torch.randn(2, 5, 2, 3, dtype=dtype, generator=g), torch.rand(5, dtype=dtype, generator=g))


def test_derivatives_are_those_of_autograd() -> None:
    model: Any = fl.compile(TEXT, seed=0, dtype=torch.float64)
    x, u, t = values()
    moving, passing = x.clone().requires_grad_(), t.clone().requires_grad_()
    in_x, in_t = torch.autograd.grad(model.energy(moving, passing).sum(), (moving, passing))
    torch.testing.assert_close(model.slopes(x, t), in_x)
    torch.testing.assert_close(model.rate(x, t), in_t)
    torch.testing.assert_close(model.score(x), -x)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda a, s=s: model.field(a, s), y).reshape(6, 6)
            for y, s in zip(x, t, strict=True)
        ]
    )
    torch.testing.assert_close(model.push(x, t, u), torch.einsum("bij,bj->bi", jacobian, u.flatten(1)).reshape(x.shape))
    torch.testing.assert_close(model.pull(x, t, u), torch.einsum("bij,bi->bj", jacobian, u.flatten(1)).reshape(x.shape))
    torch.testing.assert_close(model.spread(x, t), jacobian.diagonal(dim1=1, dim2=2).sum(-1))


def test_derivatives_reach_the_parameters() -> None:
    model: Any = fl.compile(TEXT, seed=0, dtype=torch.float64)
    x, _, t = values()
    found = torch.autograd.grad(model.slopes(x, t).square().sum(), list(model.f.parameters()))
    moving = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.energy(moving, t).sum(), moving, create_graph=True)
    for a, b in zip(found, torch.autograd.grad(slope.square().sum(), list(model.f.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_network_has_its_values_and_gives_its_parameters_no_gradient() -> None:
    model: Any = fl.compile(TEXT, seed=0, dtype=torch.float64)
    x, _, t = values()
    moving = x.clone().requires_grad_()
    y = model.still(moving, t)
    assert torch.equal(y, model.field(x, t))
    y.sum().backward()
    assert moving.grad is not None
    assert moving.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("program", ["slopes", "rate", "push", "pull", "spread", "still"])
def test_derivatives_go_to_onnx(program: str, tmp_path: Path) -> None:
    model: Any = fl.compile(TEXT, seed=0)
    x, u, t = values(torch.float32)
    same_in_onnx(model, program, tmp_path, x, t, *([u] if program in ("push", "pull") else []))


def test_a_field_that_is_a_gradient_is_integrated() -> None:
    text = """model m(f: net = mlp(8, act = tanh)) {
      data x: R[D = 2]
      def energy(x, t) { y: R[one = 1] = f(x, t);  y[one = 0] }
      def field(x, t: R) { grad(energy)(x, t) }
      def flow(x) { integrate(field, x, t = 0 -> 1, euler(steps = 2)) }
    }"""
    model: Any = fl.compile(text, seed=0, dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half, zero = torch.full((4,), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    middle = x + 0.5 * model.field(x, zero)
    torch.testing.assert_close(model.flow(x), middle + 0.5 * model.field(middle, half))


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("grad(x)", "FL0211", "takes a function"),
        ("def f(x) { x ^ 2 }\n grad(f)(x)", "FL0306", "one number"),
        ("def f(x) { sum[D](x) }\n derivative(f)(x)", "FL0306", "in a number"),
        ("def f(x) { x ^ 2 }\n jvp(f, x)", "FL0203", "direction"),
        ("def f(x) { x ^ 2 }\n jvp(f, x, sum[D](x))", "FL0301", "direction"),
        ("frozen(x)", "FL0211", "takes a network"),
        ("def f(x) { sum[D](sort[D](x)) }\n grad(f)(x)", "FL0606", "`sort`"),
        ("path.data(x, x)", "FL0203", "one other prediction"),
        ("path.data(0.5, x, data = x)", "FL0203", "one other prediction"),
    ],
)
def test_what_has_no_derivative_is_told(body: str, code: str, words: str) -> None:
    (error,) = fl.check(f"model m(path: path = cond_ot) {{\n data x: R[D = 3]\n def p(x) {{ {body} }}\n}}").errors
    assert error.code == code
    assert words in error.message


PREDICTIONS = ("velocity", "data", "noise", "score")


@pytest.mark.parametrize("path", ["cond_ot", "cosine", "vp", "linear_vp", "polynomial(n = 3)"])
def test_predictions_turn_into_each_other(path: str) -> None:
    """Given x0 and x1, every prediction is known; each of the twelve conversions gives it from each other one."""
    lines = [
        f"def {a}_from_{b}(x, u: R[D], t: Interval(0.05, 0.95)) {{ path.{a}(t, x, {b} = u) }}"
        for a in PREDICTIONS for b in PREDICTIONS if a != b
    ]  # fmt: skip
    text = f"""model m(path: path = {path}) {{
      data x: R[D = 2]
      def at(x0: R[D], x1: R[D], t: Unit) {{ path.at(t, x0, x1), path.velocity(t, x0, x1), path.sigma(t) + 0 * x0 }}
      {chr(10).join(lines)}
    }}"""
    model: Any = fl.compile(text, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 6, 2, dtype=torch.float64, generator=g)
    t = 0.05 + 0.9 * torch.rand(6, dtype=torch.float64, generator=g)
    x, velocity, sigma = model.at(x0, x1, t)
    known = {"velocity": velocity, "data": x1, "noise": x0, "score": -x0 / sigma}
    for a in PREDICTIONS:
        for b in PREDICTIONS:
            if a != b:
                torch.testing.assert_close(
                    getattr(model, f"{a}_from_{b}")(x, known[b], t), known[a], rtol=1e-8, atol=1e-8
                )
