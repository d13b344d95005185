"""Paths in pieces: they meet, their velocity may jump, and what follows from them is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flowlang as fl

MODEL = """
{path}
model m {{
  data x0: R[D = 2], x1: R[D = 2]
  def place(x0, x1, t: Unit) {{ p.at(t, x0, x1) }}
  def speed(x0, x1, t: Unit) {{ p.velocity(t, x0, x1) }}
}}
"""
DATA = "def data_of(x: R[D = 2], u: R[D = 2], t: Unit) { p.data(t, x, velocity = u) }\n}"
TWO_SPEEDS = "path p (t, x0, x1) {\n s = where(t < 1/2, t / 2, 3 * t / 2 - 1/2)\n x_t = (1 - s) * x0 + s * x1\n}"
THREE = "path p (t, x0, x1) {\n s = where(t <= 1/4, 2 * t, where(t <= 3/4, 1/2, 2 * t - 1))\n x_t = (1 - s) * x0 + s * x1\n}"
KINK = "path p (t, x0, x1) {\n s = t + max(0, t - 1/2) * (1 - t)\n x_t = (1 - s) * x0 + s * x1\n}"
AWAY = "path p (t, x0, x1) {\n x_t = (1 - t) * x0 + t * x1 + (1/2 - abs(t - 1/2)) * (x0 + x1)\n}"


def speeds(path: str, t: torch.Tensor) -> torch.Tensor:
    if path == TWO_SPEEDS:
        return torch.where(t < 0.5, t / 2, 1.5 * t - 0.5)
    if path == THREE:
        return torch.where(t <= 0.25, 2 * t, torch.where(t <= 0.75, torch.full_like(t, 0.5), 2 * t - 1))
    return t + torch.clamp(t - 0.5, min=0) * (1 - t)


@pytest.mark.parametrize("path", [TWO_SPEEDS, THREE, KINK])
def test_places_and_velocities_are_those_of_the_pieces(path: str) -> None:
    model: Any = fl.compile(MODEL.format(path=path), dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.3, 0.45, 0.55, 0.8, 1.0], dtype=torch.float64)
    a, b = torch.randn(2, 7, 2, dtype=torch.float64)
    s = speeds(path, t)[:, None]
    torch.testing.assert_close(model.place(a, b, t), (1 - s) * a + s * b)
    u = t.clone().requires_grad_()
    (rate,) = torch.autograd.grad(speeds(path, u).sum(), u)
    velocity = model.speed(a, b, t)
    torch.testing.assert_close(velocity, rate[:, None] * (b - a))
    text = MODEL.format(path=path).strip().removesuffix("}") + DATA
    if path == THREE:  # while it rests, its velocity tells nothing
        assert [e.code for e in fl.check(text).errors] == ["FL0306"]
        return
    whole: Any = fl.compile(text, dtype=torch.float64)
    torch.testing.assert_close(whole.data_of(model.place(a, b, t), velocity, t), b)


def test_a_path_with_a_corner_in_the_middle_checks() -> None:
    report = fl.check(AWAY)
    assert report.ok


@pytest.mark.parametrize(
    ("formula", "code", "words"),
    [
        ("where(t < 1/2, (1 - t) * x0 + t * x1, (1 - t) * x0 + t * x1 + (1 - t) * x0)", "FL0604", "jumps at t = 0.5"),
        ("where(t < 1/3, x0, x1)", "FL0604", "jumps at t = 0.333333"),
        ("where(t < 1/2, (1 - t) * x0 + t * x1, x0 / 2 + x1 / 2)", "FL0603", "t = 1"),
    ],
)
def test_pieces_that_do_not_meet_are_refused(formula: str, code: str, words: str) -> None:
    report = fl.check(f"path p (t, x0, x1) {{ x_t = {formula} }}")
    (error,) = report.errors
    assert error.code == code
    assert words in error.message
