"""Log-dets that are too large for a dense Jacobian, and verifying what has none that is square or finite."""

from __future__ import annotations

import math

import pytest
import torch
from flowlang.backends.torch.explicit import estimated_log_det

import flowlang as fl
from flowlang.api import FlowError, analyse
from flowlang.verify import verify
from tests.ir.test_explicit_rules import flow, mixed

D = 1200


def test_a_wrong_log_det_of_many_coordinates_is_told() -> None:
    text = flow("mixed", f"x: R[D = {D}]")
    fl.compile(mixed(d=D) + text)
    # What is forgotten most: the sum over one axis, and so a factor.
    scaled = """
bijector scaled (x: R[D]) {
  param a: Positive[D] = 0.5
  def inverse(y) { y / a }
  def log_det(x) { %s }
  a * x
}
"""
    fl.compile(scaled % "sum(log(a))" + flow("scaled", f"x: R[D = {D}]"))
    with pytest.raises(FlowError, match="log_det"):
        fl.compile(scaled % "mean(log(a))" + flow("scaled", f"x: R[D = {D}]"))


def test_verify_compares_large_log_dets_with_an_estimate() -> None:
    comp = analyse(
        "flow f {\n  data x: R[C = 2, H = 25, W = 25]\n  conv1x1\n  elementwise(asinh)\n  base normal\n}\n", sized=True
    )
    found = {c.name: c for c in verify(comp, "f")}
    assert found["log-det against an estimate"].ok
    assert all(c.ok for c in found.values())


def test_the_estimate_is_close_or_says_that_it_is_not() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.eye(150, dtype=torch.float64) + 0.04 * torch.randn(150, 150, dtype=torch.float64, generator=random)
    x = torch.randn(150, dtype=torch.float64, generator=random)
    mean, error = estimated_log_det(lambda v: torch.sinh(v @ weight.T), x, random)
    exact = float(torch.linalg.slogdet(weight)[1] + torch.cosh(weight @ x).log().sum())
    assert abs(mean - exact) <= 4 * error
    assert error < 0.1 * exact
    spread = torch.exp(2 * torch.randn(150, dtype=torch.float64, generator=random))
    mean, error = estimated_log_det(lambda v: v * spread, x, random)
    assert abs(mean - float(spread.log().sum())) <= 4 * error
    mean, error = estimated_log_det(lambda v: 3 * v, x, random)
    assert math.isclose(mean, 150 * math.log(3), rel_tol=1e-9)


RATIO = """
bijector halved (x: R[D]) {
  def log_det(x) -> ratio { 0 * sum(x) }
  x / 2
}
flow f {
  data x: Int(0..8)[D = 3]
  uniform_dequantise(8)
  elementwise(logit)
  halved
  base normal
}
"""


def test_verify_of_draws_beside_a_ratio_knows_of_the_draws() -> None:
    """The exactness is that of the ratio, which hid the draws."""
    found = {c.name: c for c in verify(analyse(RATIO, sized=True), "f")}
    assert "log-det against slogdet" not in found
    assert found["round trip"].ok


def test_verify_tells_of_a_jacobian_that_is_not_finite() -> None:
    """x · |x| ^ a has an infinite slope of its second factor at 0, where a probe lies; LAPACK stopped at it."""
    text = """
bijector odd (x: R[D]) {
  def inverse(y) { sign(y) * y ^ 2 }
  def log_det(x) { sum(log(0.5 / sqrt(abs(x)))) }
  sign(x) * sqrt(abs(x))
}
flow f {
  data x: R[D = 3]
  odd
  base normal
}
"""
    found = {c.name: c for c in verify(analyse(text, sized=True), "f")}
    assert found["Jacobian is finite"].error >= 1
    assert not found["Jacobian is finite"].ok


def test_verify_of_a_ratio_is_up_to_a_constant() -> None:
    text = RATIO.replace("x: Int(0..8)[D = 3]\n  uniform_dequantise(8)\n  elementwise(logit)", "x: R[D = 3]")
    assert all(c.ok for c in verify(analyse(text, sized=True), "f"))
