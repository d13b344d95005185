"""Convex domains: paths that stay, steps that are mirrored back, against the triangle wave and billiards written apart (card 004)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.checks.paths import check_path
from flowlang.checks.solvers import check_solver
from flowlang.diagnostics import Report
from tests.analysis.test_paths import declaration
from tests.catalogue.programs import same_in_onnx

F64 = torch.float64
FOLDS = """
model f {
  data x: R[D = 2]
  def box(x) { box_fold()(x) }
  def wide(x) { box_fold(lo = -1, hi = 3)(x) }
  def half_space(x) { half_space_fold(normal = [3, -4], offset = 0.5)(x) }
  def ball(x) { ball_fold(radius = 2)(x) }
}
"""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def folds() -> Any:
    return fl.compile(FOLDS, dtype=F64)


def mirrored(x: Tensor, lo: float, hi: float) -> Tensor:
    """One mirror at a time."""
    for _ in range(60):
        x = torch.where(x > hi, 2 * hi - x, torch.where(x < lo, 2 * lo - x, x))
    return x


def test_mirrors_at_the_faces_of_a_box_are_a_triangle_wave() -> None:
    x = 8 * torch.randn(2000, 2, dtype=F64, generator=generator(0))
    for name, lo, hi in (("box", -1.0, 1.0), ("wide", -1.0, 3.0)):
        y = getattr(folds(), name)(x)
        torch.testing.assert_close(y, mirrored(x, lo, hi), rtol=1e-12, atol=1e-12)
        assert y.min() >= lo
        assert y.max() <= hi
        inside = ((x >= lo) & (x <= hi)).all(-1)
        assert inside.any()
        assert (y[inside] == x[inside]).all()  # to the bit
        assert (getattr(folds(), name)(y) == y).all()
        torch.testing.assert_close(getattr(folds(), name)(x + 2 * (hi - lo)), y, rtol=1e-9, atol=1e-9)
        other = x + 0.1 * torch.randn(2000, 2, dtype=F64, generator=generator(1))
        gap = (getattr(folds(), name)(other) - y).norm(dim=-1)
        assert (gap <= (other - x).norm(dim=-1) + 1e-9).all()  # it brings nothing apart


def test_the_mirror_of_a_half_space() -> None:
    x = 3 * torch.randn(500, 2, dtype=F64, generator=generator(2))
    y = folds().half_space(x)
    height = (x * torch.tensor([3.0, -4.0], dtype=F64)).sum(-1) / 5 - 0.1  # signed distance to the edge
    assert ((y * torch.tensor([3.0, -4.0], dtype=F64)).sum(-1) >= 0.5 - 1e-12).all()
    unit = torch.tensor([0.6, -0.8], dtype=F64)
    torch.testing.assert_close(y, x + (height.abs() - height)[:, None] * unit)
    assert (y[height >= 0] == x[height >= 0]).all()


def test_the_mirror_of_a_ball() -> None:
    x = 3 * torch.randn(500, 2, dtype=F64, generator=generator(3))
    y, r = folds().ball(x), x.norm(dim=-1)
    assert y.norm(dim=-1).max() <= 2 + 1e-12
    assert (y[r <= 2] == x[r <= 2]).all()
    near = (r > 2) & (r < 4)
    unit = x[near] / r[near, None]
    torch.testing.assert_close(
        y[near], x[near] - 2 * (r[near] - 2)[:, None] * unit
    )  # the mirror image in the tangent plane
    far = r > 4
    torch.testing.assert_close(y[far], mirrored(r[far], -2, 2)[:, None] * x[far] / r[far, None])


FIELDS = """
solver inside_rk4 (v, x, t, h) {{
  a = v(x, t)
  b = v(x + h / 2 * a, t + h / 2)
  c = v(x + h / 2 * b, t + h / 2)
  d = v(x + h * c, t + h)
  x + h / 6 * (a + 2 * b + 2 * c + d)
}}
model m(v: net = time_mlp(16)) {{
  data x0: R[D = 2]
  def push(x, t) {{ stack[D](3.7, -0.9) + 0 * x }}
  def swirl(x, t) {{ stack[D](-x[D = 1], x[D = 0]) * (1 + t) / 4 }}
  def net_field(x, t) {{ u: R[D = 2] = v(x, t);  40 * u }}
  def pushed(x0) {{ integrate(push, x0, t = 0 -> 2, reflected_euler(steps = {n})) }}
  def pushed4(x0) {{ integrate(push, x0, t = 0 -> 2, reflected_rk4(steps = {n})) }}
  def free(x0) {{ integrate(push, x0, t = 0 -> 2, euler(steps = {n})) }}
  def swirled(x0) {{ integrate(swirl, x0, t = 0 -> 1, reflected_rk4(steps = {n})) }}
  def swirled_free(x0) {{ integrate(swirl, x0, t = 0 -> 1, inside_rk4(steps = {n})) }}
  def wild(x0) {{ integrate(net_field, x0, t = 0 -> 1, reflected_rk4(steps = {n})) }}
  def wild_ball(x0) {{ integrate(net_field, x0, t = 0 -> 1, reflected_euler(fold = ball_fold(radius = 1), steps = {n})) }}
}}
"""


@cache
def fields(n: int) -> Any:
    return fl.compile(FIELDS.format(n=n), dtype=F64, seed=0)


@pytest.mark.parametrize("n", [1, 3, 16])
def test_a_constant_field_is_a_triangle_wave_by_any_number_of_steps(n: int) -> None:
    x = 2 * torch.rand(200, 2, dtype=F64, generator=generator(4)) - 1
    wanted = mirrored(x + 2 * torch.tensor([3.7, -0.9], dtype=F64), -1, 1)
    turned = mirrored(x + 2 / n * torch.tensor([3.7, -0.9], dtype=F64), -1, 1)
    for _ in range(n - 1):  # a field does not turn round where a way is mirrored: each step is mirrored by itself
        turned = mirrored(turned + 2 / n * torch.tensor([3.7, -0.9], dtype=F64), -1, 1)
    torch.testing.assert_close(fields(n).pushed(x), turned, rtol=0, atol=1e-9)
    torch.testing.assert_close(fields(n).pushed4(x), turned, rtol=0, atol=1e-9)
    if n == 1:
        torch.testing.assert_close(turned, wanted)
    assert (fields(n).free(x).abs() > 1).any()


def test_inside_it_is_the_method_to_the_bit() -> None:
    x = torch.rand(100, 2, dtype=F64, generator=generator(5)) - 0.5
    assert (fields(16).swirled(x) == fields(16).swirled_free(x)).all()


def test_no_way_leaves_the_domain_whatever_the_field() -> None:
    x = 2 * torch.rand(400, 2, dtype=F64, generator=generator(6)) - 1
    model = fields(3)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, dtype=F64, generator=generator(7))
        with fl.record_paths() as ways:
            model.wild(x)
        places = [x for way in ways.runs for _, x in way]
        assert len(places) == 4
        assert all(x.abs().max() <= 1 for x in places)
        assert model.wild_ball(x / 2).norm(dim=-1).max() <= 1 + 1e-12


@pytest.mark.parametrize(
    ("rule", "order"), [("fold(x + h * v(x, t))", 1), ("fold(x + h * v(fold(x + h / 2 * v(x, t)), t + h / 2))", 2)]
)
def test_orders_are_shown_where_the_mirror_is_not_met(rule: str, order: int) -> None:
    report = Report()
    text = f"solver s(fold: net = box_fold) (v, x, t, h) {{ require order(fold = identity) == {order}\n {rule} }}"
    assert check_solver(declaration(text), report)["order(fold = identity)"] == order
    assert not list(report)
    check_solver(declaration(text.replace(f"== {order}", f"== {order + 1}")), report)
    assert [d.code for d in report.errors] == ["FL0601"]


# ---- paths --------------------------------------------------------------------------------------

BOUNDED = """
net inside(x: Interval(-1.001, 1.001)[D], t: R) {{ linear[D -> D](atanh(0.9 * x)) + t }}
model m(v: net = inside(), path: path = {path}) {{
  data x1: Interval(-1, 1)[D = 2]
  def loss {{
    x0: R[D] ~ uniform(-1, 1)
    t ~ uniform(0, 1)
    mean((v(path.at(t, x0, x1), t) - path.velocity(t, x0, x1)) ^ 2)
  }}
}}
"""


@pytest.mark.parametrize(
    ("path", "stays"),
    [
        ("cond_ot", True),
        ("polynomial(n = 3)", True),
        ("cosine", False),
        ("linear_vp", False),
        ("reflected_curve(m = time_mlp(8))", True),
    ],
)
def test_a_path_that_stays_in_convex_domains_fits_a_network_of_the_box(path: str, stays: bool) -> None:
    report = fl.check(BOUNDED.format(path=path))
    assert [d.code for d in report.errors] == ([] if stays else ["FL0408"])


def test_that_a_path_stays_may_be_required() -> None:
    report = Report()
    check_path(
        declaration("path p (t, x0, x1) { require stays == convex\n x_t = (1 - t ^ 2) * x0 + t ^ 2 * x1 }"), report
    )
    assert not list(report)
    for formula in ("cos(π * t / 2) * x0 + sin(π * t / 2) * x1", "(1 - t) * x0 + t * x1 + sin(2 * π * t) * (x1 - x0)"):
        wrong = Report()
        check_path(declaration(f"path p (t, x0, x1) {{ require stays == convex\n x_t = {formula} }}"), wrong)
        assert [d.code for d in wrong.errors] == ["FL0603"]


def test_a_mirrored_curve_holds_its_ends_and_stays() -> None:
    text = """
    model k(path: path = reflected_curve(m = time_mlp(16))) {
      data x1: R[D = 2]
      def place(x1, x0: R[D = 2], t: Unit) { path.at(t, x0, x1) }
      def speed(x1, x0: R[D = 2], t: Unit) { path.velocity(t, x0, x1) }
    }"""
    model: Any = fl.compile(text, dtype=F64, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, dtype=F64, generator=generator(8))
    x0, x1 = 2 * torch.rand(2, 300, 2, dtype=F64, generator=generator(9)) - 1
    t = torch.rand(300, dtype=F64, generator=generator(10))
    assert (model.place(x1, x0, 0 * t) == x0).all()
    torch.testing.assert_close(model.place(x1, x0, 0 * t + 1), x1, rtol=0, atol=1e-15)
    assert model.place(x1, x0, t).abs().max() <= 1
    step = (model.place(x1, x0, t + 1e-6) - model.place(x1, x0, t - 1e-6)) / 2e-6
    gap = (model.speed(x1, x0, t) - step).abs().amax(-1)
    assert float((gap < 1e-4 * (1 + step.abs().amax(-1))).double().mean()) > 0.97  # but where a mirror is met between


# ---- the model ----------------------------------------------------------------------------------


def test_the_model_trains_and_its_samples_stay_where_those_of_the_plain_one_do_not(tmp_path: Path) -> None:
    """Items 3 and 6 of card 004: the loss is that of flow matching, and a field that is wrong by a constant leaves the box, but not when
    steps are mirrored."""
    text = "model r = reflected_flow_matching(v = time_mlp(32), solver = {solver}(steps = 10))"
    mirrored_model: Any = fl.compile(text.format(solver="reflected_rk4"), D=2, seed=0)
    plain: Any = fl.compile(text.format(solver="rk4"), D=2, seed=0)
    g = generator(11)
    optimizer = torch.optim.Adam(mirrored_model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        cell = torch.randint(0, 2, (256, 2), generator=g)
        cell[:, 1] = cell[:, 0]  # two of the four squares
        x = (cell + torch.rand(256, 2, generator=g)).clamp(0.001, 1.999) - 1
        optimizer.zero_grad()
        loss = mirrored_model.loss(x, generator=g).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
    plain.load_state_dict(mirrored_model.state_dict())
    x = torch.rand(8, 2) * 1.9 - 0.95
    torch.testing.assert_close(
        plain.loss(x, generator=generator(12)), mirrored_model.loss(x, generator=generator(12)), rtol=0, atol=0
    )
    with torch.no_grad():
        last = [p for n, p in plain.named_parameters() if p.shape == (2,)][-1]
        last += 0.5
        mirrored_model.load_state_dict(plain.state_dict())
        out = (plain.sample((2000,), generator=generator(13)).abs() > 1).any(-1)
        assert float(out.double().mean()) > 0.05
        assert not (mirrored_model.sample((2000,), generator=generator(13)).abs() > 1).any()
    same_in_onnx(mirrored_model, "sample", tmp_path)
