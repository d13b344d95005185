"""Paths with networks in them: ends held whatever the networks are, and what follows, against autograd and differences."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.checks.paths import check_path
from flowlang.compiler import compile_source, info
from flowlang.diagnostics import Report
from flowlang.source import Source
from tests.analysis.test_paths import declaration

F64 = torch.float64
NFDM = "path p(m: net = time_mlp(8), l: net = time_mlp(8)) (t, x0, x1) {{\n {claim}\n x_t = {formula}\n}}"
GOOD = "t * x1 + t * (1 - t) * m(x1, t) + exp(t * log(0.01) + t * (1 - t) * l(x1, t)) * x0"
MODEL = """
{path}
model k(path: path = {use}) {{
  data x1: R[D = 3]
  def place(x1, x0: R[D = 3], t: Unit) {{ path.at(t, x0, x1) }}
  def speed(x1, x0: R[D = 3], t: Unit) {{ path.velocity(t, x0, x1) }}
  {more}
}}
"""
FROM_DATA = """
  def noise_of(x1, x: R[D = 3], t: Unit) { path.noise(t, x, data = x1) }
  def score_of(x1, x: R[D = 3], t: Unit) { path.score(t, x, data = x1) }
  def speed_of(x1, x: R[D = 3], t: Unit) { path.velocity(t, x, data = x1) }
"""


def points(seed: int = 0, n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, n, 3, dtype=F64, generator=g)
    return x0, x1, 0.02 + 0.96 * torch.rand(n, dtype=F64, generator=g)


@cache
def learned() -> Any:
    model = fl.compile(MODEL.format(path="", use="nfdm_gaussian", more=FROM_DATA), dtype=F64, seed=1)
    with torch.no_grad():  # away from a start that is nearly straight
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    return model


def test_the_networks_are_the_models_and_there_once() -> None:
    names = {n.split(".")[0] for n, _ in learned().named_parameters()}
    assert names == {"m", "l"}
    assert sum(p.numel() for p in learned().parameters()) == 2 * sum(
        p.numel() for n, p in learned().named_parameters() if n.startswith("m.")
    )


def test_the_ends_hold_for_any_weights() -> None:
    x0, x1, t = points()
    assert (learned().place(x1, x0, 0 * t) - x0).abs().max() == 0
    assert (learned().place(x1, x0, 0 * t + 1) - (x1 + 0.01 * x0)).abs().max() < 1e-14


def test_the_velocity_is_the_slope_of_the_place() -> None:
    x0, x1, t = points()
    u = t.clone().requires_grad_()
    place = learned().place(x1, x0, u)
    slopes = torch.stack([torch.autograd.grad(place[:, k].sum(), u, retain_graph=True)[0] for k in range(3)], -1)
    torch.testing.assert_close(learned().speed(x1, x0, t), slopes, rtol=1e-11, atol=1e-11)
    ends = learned().place(x1, x0, t + 1e-5) - learned().place(x1, x0, t - 1e-5)
    assert (ends / 2e-5 - slopes).abs().max() < 1e-4


def test_what_follows_from_the_data() -> None:
    x0, x1, t = points()
    x = learned().place(x1, x0, t)
    torch.testing.assert_close(learned().noise_of(x1, x, t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(learned().speed_of(x1, x, t), learned().speed(x1, x0, t), rtol=1e-9, atol=1e-9)

    def log_density(x: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Of x_t given x1, from the map alone: the standard normal at its preimage, less log|det| by autograd."""

        def one(z: Tensor) -> Tensor:
            return learned().place(x1[None], z[None], t[None])[0]

        zero = torch.zeros(3, dtype=F64)
        scale = torch.autograd.functional.jacobian(one, zero, create_graph=True)
        z = torch.linalg.solve(scale, x - one(zero))
        return -(z**2).sum() / 2 - torch.logdet(scale)

    for k in range(3):
        at = x[k].detach().requires_grad_()
        (wanted,) = torch.autograd.grad(log_density(at, x1[k], t[k]), at)
        torch.testing.assert_close(learned().score_of(x1, x, t)[k], wanted, rtol=1e-8, atol=1e-8)


def test_the_continuity_equation_holds() -> None:
    """∂q/∂t + div(f q) = 0 for q(x | x1) of the path and the velocity from the data (card 029, item 2)."""
    _, x1, t = points(3, 2)
    x = learned().place(x1, points(4, 2)[0], t).detach()

    def velocity(x: Tensor, k: int, s: Tensor) -> Tensor:
        return learned().speed_of(x1[k][None], x[None], s[None])[0]

    def log_q(x: Tensor, k: int, s: Tensor) -> Tensor:
        zero = torch.zeros(1, 3, dtype=F64)
        mean = learned().place(x1[k][None], zero, s[None])[0]
        scale = learned().place(x1[k][None], zero + 1, s[None])[0] - mean
        return (-(((x - mean) / scale) ** 2) / 2 - scale.log()).sum() - 1.5 * math.log(2 * math.pi)

    for k in range(2):
        at, s = x[k].clone().requires_grad_(), t[k].clone().requires_grad_()
        by_x, by_t = torch.autograd.grad(log_q(at, k, s), (at, s))
        jacobian = torch.autograd.functional.jacobian(lambda z, k=k: velocity(z, k, t[k]), x[k])
        residual = by_t + jacobian.trace() + (velocity(x[k], k, t[k]) * by_x).sum()
        assert abs(float(residual.detach())) < 1e-4 * max(1.0, abs(float(by_t)))


def test_networks_without_effect_leave_the_linear_path() -> None:
    """Item 5 of card 029: m = l = 0 is x_t = t x1 + 0.01^t x0, whose velocity has a closed form."""
    model: Any = fl.compile(MODEL.format(path="", use="nfdm_gaussian", more=FROM_DATA), dtype=F64, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x0, x1, t = points()
    sigma = 0.01 ** t[:, None]
    torch.testing.assert_close(model.place(x1, x0, t), t[:, None] * x1 + sigma * x0)
    torch.testing.assert_close(model.speed(x1, x0, t), x1 + math.log(0.01) * sigma * x0)
    x = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(5))
    wanted = x1 + math.log(0.01) * (x - t[:, None] * x1)
    torch.testing.assert_close(model.speed_of(x1, x, t), wanted)


def test_a_loss_teaches_the_networks_of_the_path() -> None:
    text = """
    model k(v: net = time_mlp(16), path: path = nfdm_gaussian(m = time_mlp(8), l = time_mlp(8))) {
      data x1: R[D = 2]
      def loss {
        x0 ~ normal
        t ~ uniform(0, 1)
        mean((v(path.at(t, x0, x1), t) - path.velocity(t, x0, x1)) ^ 2)
      }
    }"""
    model: Any = fl.compile(text, seed=0)
    model.loss(torch.randn(64, 2), generator=torch.Generator().manual_seed(0)).mean().backward()
    slopes = {n: p.grad for n, p in model.named_parameters()}
    assert {n.split(".")[0] for n in slopes} == {"v", "m", "l"}
    assert all(g is not None and g.abs().sum() > 0 for g in slopes.values())


def test_the_same_in_onnx(tmp_path: Any) -> None:
    from tests.catalogue.programs import same_in_onnx

    path = "path q(m: net = time_mlp(4)) (t, x0, x1) { x_t = (1 - t) * x0 + t * x1 + t * (1 - t) * m(x1, t) }"
    more = "def speed_of(x1, x: R[D = 3], t: Interval(0, 0.9)) { path.velocity(t, x, data = x1) }"
    model = fl.compile(MODEL.format(path=path, use="q", more=more), seed=0)
    x0, x1, t = (v.float() for v in points())
    same_in_onnx(model, "speed", tmp_path, x1, x0, t)
    same_in_onnx(model, "speed_of", tmp_path, x1, x0, 0.9 * t)


@pytest.mark.parametrize(
    ("formula", "code", "words"),
    [
        ("(1 - t) * x0 + t * x1 + t * m(x1, t)", "FL0603", "m(x1, 1)"),
        ("(1 - t) * x0 + t * x1 + (1 - t) * m(x0, t)", "FL0603", "m(x0, 0)"),
        ("(1 - t) * x0 + m(x1, t)", "FL0603", "m(x1, 0)"),
        ("(1 - t) * x0 + t * x1 + t * (1 - t) / (t - 1/2) * m(x1, t)", "FL0604", "t = 0.5"),
        ("(1 - t) * x0 + t * x1 + t * (1 - t) * sqrt(m(x1, t))", "FL0604", "not a finite real"),
        (GOOD, "FL0603", "x0/100"),
    ],
)
def test_ends_that_hang_on_a_network_are_refused_with_what_is_left(formula: str, code: str, words: str) -> None:
    report = Report()
    check_path(declaration(NFDM.format(claim="", formula=formula)), report)
    error = report.errors[0]
    assert error.code == code
    assert words in " ".join([error.message, *error.notes])


def test_an_end_that_is_claimed_is_not_taken_from_a_network() -> None:
    report = Report()
    text = NFDM.format(claim="require endpoint <= 1e-2", formula="t * x1 + (1 - t) * x0 + t * m(x1, t)")
    check_path(declaration(text), report)
    assert [d.code for d in report.errors] == ["FL0603"]
    ok = Report()
    check_path(declaration(NFDM.format(claim="require endpoint <= 1e-2", formula=GOOD)), ok)
    assert not list(ok)


@pytest.mark.parametrize(
    ("use", "code"),
    [
        ("path.data(t, x1, noise = x1)", "FL0902"),
        ("path.alpha(t)", "FL0306"),
        ("path.score(t, x1, velocity = x1)", "FL0902"),
    ],
)
def test_what_a_network_hides_is_refused(use: str, code: str) -> None:
    text = f"model k(path: path = nfdm_gaussian) {{ data x1: R[D = 2]\n def f(x1, t: Interval(0.1, 0.9)) {{ {use} }} }}"
    assert code in [e.code for e in fl.check(text).errors]


# ---- geodesics ----------------------------------------------------------------------------------

GEODESIC = "path g(exp: net = sphere_exp, log: net = sphere_log) (t, x0, x1) {{\n {claim}\n x_t = {formula}\n}}"
BOTH = "require exp(x0, 0) == x0 and exp(x0, log(x0, x1)) == x1"


def test_the_ends_of_a_geodesic_follow_from_what_its_maps_are() -> None:
    report = Report()
    check_path(declaration(GEODESIC.format(claim=BOTH, formula="exp(x0, t * log(x0, x1))")), report)
    assert not list(report)
    facts = info(compile_source(Source.of("s", GEODESIC.format(claim=BOTH, formula="exp(x0, t * log(x0, x1))"))))
    assert facts[0]["assumes"] == ["exp(x0, 0) = x0", "exp(x0, log(x0, x1)) = x1"]


@pytest.mark.parametrize(
    ("claim", "formula", "words"),
    [
        ("", "exp(x0, t * log(x0, x1))", "exp(x0, 0)"),
        ("require exp(x0, 0) == x0", "exp(x0, t * log(x0, x1))", "exp(x0, log(x0, x1))"),
        (BOTH, "exp(x0, t ^ 2 / 2 * log(x0, x1))", "log(x0, x1)/2"),
        (BOTH, "exp(x1, t * log(x1, x0))", "exp(x1, 0)"),
    ],
)
def test_a_geodesic_that_misses_an_end_is_refused(claim: str, formula: str, words: str) -> None:
    report = Report()
    check_path(declaration(GEODESIC.format(claim=claim, formula=formula)), report)
    error = report.errors[0]
    assert error.code == "FL0603"
    assert words in error.message


@pytest.mark.parametrize("manifold", ["sphere", "torus", "flat"])
def test_geodesics_of_the_library_run_from_end_to_end_at_one_speed(manifold: str) -> None:
    use = f"geodesic(exp = {manifold}_exp, log = {manifold}_log)"
    model: Any = fl.compile(MODEL.format(path="", use=use, more=""), dtype=F64)
    x0, x1, t = points()
    if manifold == "sphere":
        x0, x1 = (torch.nn.functional.normalize(v, dim=-1) for v in (x0, x1))
    elif manifold == "torus":
        x0, x1 = x0 % (2 * math.pi), x1 % (2 * math.pi)
    for end, wanted in ((0, x0), (1, x1)):  # what `geodesic` requires of the maps holds for these
        gap = model.place(x1, x0, 0 * t + end) - wanted
        gap = torch.atan2(gap.sin(), gap.cos()) if manifold == "torus" else gap
        assert gap.abs().max() < 1e-12
    speed = model.speed(x1, x0, t)
    if manifold == "sphere":
        angle = torch.acos((x0 * x1).sum(-1))
        side = torch.nn.functional.normalize(x1 - x0 * angle.cos()[:, None], dim=-1)
        angle, turn = angle[:, None], (t * angle)[:, None]
        torch.testing.assert_close(model.place(x1, x0, t), turn.cos() * x0 + turn.sin() * side)
        torch.testing.assert_close(speed, angle * (turn.cos() * side - turn.sin() * x0))
    else:
        gap = x1 - x0
        torch.testing.assert_close(speed, torch.atan2(gap.sin(), gap.cos()) if manifold == "torus" else gap)
