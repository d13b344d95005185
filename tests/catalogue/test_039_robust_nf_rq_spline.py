"""Card 039, robust conditional flows (Hong et al. 2022): what must hold, item by item."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.verify import perturb

LEAST = 1e-3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def spline(dtype: torch.dtype = torch.float64) -> fl.Flow:
    """The elementwise map alone, its raw numbers from outside."""
    text = """flow f {
      data x: R[D]
      given w: R[D], h: R[D], d: R[D], shift: R[D]
      modified_rq_spline
      base normal
    }
    """
    return fl.compile(text, D=1, dtype=dtype)


def raw(n: int, size: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = generator(seed)
    made = {k: (torch.rand(n, 1, generator=g, dtype=dtype) * 2 - 1) * size for k in "whd"}
    return {**made, "shift": torch.zeros(n, 1, dtype=dtype)}


def points(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(n, 1, generator=generator(9), dtype=dtype) * 2 - 1) * 0.8


@pytest.mark.parametrize(("dtype", "size", "limit"), [(torch.float64, 6.0, 1e-9), (torch.float32, 2.0, 1e-4)])
def test_item_1_round_trip_and_identity_outside(dtype: torch.dtype, size: float, limit: float) -> None:
    given, x = raw(5000, size, dtype=dtype), points(5000, dtype)
    y, _ = spline(dtype)(x, **given)
    assert (spline(dtype).inverse(y, **given)[0] - x).abs().max() <= limit
    out = x.abs() >= 0.5
    assert out.any()
    assert (y - x)[out].abs().max() == 0


def card_spline(x: float, w: float, h: float, d: float) -> tuple[float, float]:
    """The card's formulas for one number: value and log slope."""
    if abs(x) >= 0.5:
        return x, 0.0
    share = [(1 / (1 + math.exp(-v))) * (1 - 2 * LEAST) + LEAST for v in (w, h)]
    xs, ys = [-0.5, -0.5 + share[0], 0.5], [-0.5, -0.5 + share[1], 0.5]
    slopes = [1.0, math.exp(d) * (1 - LEAST) + LEAST, 1.0]
    k = int(x >= xs[1])
    wide, high = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    θ, δ, d0, d1 = (x - xs[k]) / wide, high / wide, slopes[k], slopes[k + 1]
    den = δ + (d0 + d1 - 2 * δ) * θ * (1 - θ)
    y = ys[k] + high * (δ * θ**2 + d0 * θ * (1 - θ)) / den
    return y, math.log(δ**2 * (d1 * θ**2 + 2 * δ * θ * (1 - θ) + d0 * (1 - θ) ** 2)) - 2 * math.log(den)


def test_items_1_and_2_by_the_cards_formula() -> None:
    given, x = raw(500, 6.0), points(500)
    y, log_det = spline()(x, **given)
    for k in range(500):
        value, slope = card_spline(x[k].item(), *(given[n][k].item() for n in "whd"))
        assert abs(value - y[k].item()) <= 1e-11
        assert abs(slope - log_det[k].item()) <= 1e-8


def test_item_2_log_det_is_the_derivative_at_knots_and_tails_too() -> None:
    given, x = raw(3000, 4.0), points(3000)
    knots = -0.5 + torch.sigmoid(given["w"]) * (1 - 2 * LEAST) + LEAST
    for at in (x, knots, torch.full_like(x, 0.5), torch.full_like(x, -0.5)):
        point = at.clone().requires_grad_()
        y, log_det = spline()(point, **given)
        (slope,) = torch.autograd.grad(y.sum(), point)
        assert (torch.log(slope).squeeze(-1) - log_det).abs().max() <= 1e-6


def test_item_3_the_slope_is_positive() -> None:
    given = {k: v.repeat_interleave(501, 0) for k, v in raw(200, 6.0, seed=1).items()}
    x = torch.linspace(-0.7, 0.7, 501, dtype=torch.float64).repeat(200).unsqueeze(-1)
    y, log_det = spline()(x, **given)
    assert torch.isfinite(log_det).all()
    assert (y.reshape(200, 501).diff(dim=1) > 0).all()


def test_item_4_displacement_of_the_inverse_is_bounded() -> None:
    for size in (2.0, 6.0, 15.0):
        given, y = raw(5000, size, seed=2), 3 * points(5000)
        x, log_det = spline().inverse(y, **given)
        assert (x - y).abs().max() <= 1
        assert log_det[y.squeeze(-1).abs() > 0.5].abs().max() == 0
    affine = toy(False)
    point = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    with torch.no_grad():  # a conditioner that says -40: scale 1e-4
        for n, p in affine.named_parameters():
            p.fill_(-40.0 if n.endswith("bias") else 0.0)
    found = affine.inverse(point, c=point)[1]
    assert abs(found.item() / 4 - math.log(1e4)) <= 1e-3  # each of four steps has an inverse slope of 1e4


@cache
def toy(use_spline: bool, steps: int = 4) -> fl.Flow:
    text = f"flow mine = robust_nf_toy(steps = {steps}, spline = {str(use_spline).lower()})\n"
    return fl.compile(text, seed=0, dtype=torch.float64)


def image(x: Tensor) -> Tensor:
    return x[..., None, None]


def test_item_5_explosion_test() -> None:
    """Conditions up to 1000 times too large: the affine baseline explodes, the spline adds at most |shift| + 1 a layer."""
    z = torch.randn(64, 2, dtype=torch.float64, generator=generator(4))
    c = torch.randn(64, 2, dtype=torch.float64, generator=generator(5))
    largest = {}
    for use_spline in (True, False):
        model = fl.compile(
            f"flow mine = robust_nf_toy(steps = 8, spline = {str(use_spline).lower()})\n", seed=0, dtype=torch.float64
        )
        g = generator(6)
        with torch.no_grad():  # conditioners that react to the condition, as trained ones do
            for p in model.parameters():
                if p.ndim == 4:
                    p.add_(0.4 * torch.randn(p.shape, dtype=p.dtype, generator=g))
        shifts: list[float] = []
        last = [m for n, m in model.named_modules() if type(m).__name__.startswith("RobustConditioner")]
        hooks = [
            m.register_forward_hook(lambda _m, _i, out, to=shifts: to.append(out.detach().abs().max().item()))
            for m in last
        ]
        for factor in (1, 10, 100, 1000):
            shifts.clear()
            x = model.inverse(image(z), c=image(factor * c))[0]
            largest[use_spline, factor] = x.detach().abs().max().item() if torch.isfinite(x).all() else math.inf
            if use_spline:  # the conditioners' largest outputs bound their shifts
                assert largest[use_spline, factor] <= float(z.abs().max()) + sum(shifts) + len(shifts)
        for hook in hooks:
            hook.remove()
    assert largest[False, 100] > 1e4
    assert largest[False, 1000] > 1e4


def test_item_6_starts_as_the_identity() -> None:
    model = toy(True, 2)
    x = torch.randn(20, 2, dtype=torch.float64, generator=generator(7))
    z, log_det = model(image(x), c=image(x))
    assert (z.flatten(1) - x).abs().max() <= 1e-12
    assert log_det.abs().max() <= 1e-12


def test_item_7_mahalanobis_score() -> None:
    text = """net score(e: R[D = 5], μ: R[D], factor: R[D', D]) -> R { mahalanobis_ood_score(e, μ, factor) }
    """
    score = fl.compile(text, flow="score", dtype=torch.float64)
    mixing = torch.eye(5, dtype=torch.float64) + 0.2 * torch.randn(5, 5, dtype=torch.float64, generator=generator(8))
    e = torch.randn(20_000, 5, dtype=torch.float64, generator=generator(9)) @ mixing + 1
    μ, cov = e.mean(0), torch.cov(e.T) + 1e-3 * torch.eye(5, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(cov)).T
    found = score(e, μ.expand(len(e), -1), factor.expand(len(e), -1, -1))
    assert torch.allclose(found, ((e - μ) @ torch.linalg.inv(cov) * (e - μ)).sum(-1), atol=1e-9)
    assert abs(found.mean() - 5) <= 0.1  # χ² with 5 degrees of freedom: mean 5, variance 10
    assert abs(found.var() - 10) <= 0.6
    far = score(10 * e[:500], μ.expand(500, -1), factor.expand(500, -1, -1))
    assert (far > found.quantile(0.99)).double().mean() > 0.95


def moons(n: int, seed: int) -> Tensor:
    g = np.random.default_rng(seed)
    t, side = np.pi * g.random(n), g.integers(0, 2, n)
    x = np.where(side, 1 - np.cos(t), np.cos(t)) - 0.5
    y = np.where(side, 0.5 - np.sin(t), np.sin(t)) - 0.25
    return torch.tensor(np.stack((x, y), 1) + 0.1 * g.standard_normal((n, 2)), dtype=torch.float32)


@pytest.mark.slow
def test_item_8_no_loss_of_likelihood_in_distribution() -> None:
    """Two moons of scale 1/4 (the spline works in [-1/2, 1/2]), a noisy copy as the condition."""
    found = {}
    for use_spline in (True, False):
        text = f"flow mine = robust_nf_toy(steps = 4, spline = {str(use_spline).lower()})\n"
        model = fl.compile(text, seed=0)
        data, fresh = moons(4000, 0), moons(4000, 1)
        noise = 0.3 * torch.randn(4000, 2, generator=generator(10))
        model.initialise(image(data), c=image(data + noise))
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        rows = generator(11)
        for _ in range(250):
            k = torch.randint(4000, (256,), generator=rows)
            loss = -model.log_prob(image(data[k]), c=image((data + noise)[k])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found[use_spline] = float(-model.log_prob(image(fresh), c=image(fresh + noise)).mean())
    assert found[True] <= found[False] + 0.1


def test_trains_a_step_and_counts_its_parameters() -> None:
    model = fl.compile("robust_nf_toy", seed=0)
    x = image(moons(64, 2))
    model.initialise(x, c=x)
    loss = -model.log_prob(x, c=x).mean()
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())

    def net(inputs: int, out: int) -> int:  # 3x3, four 1x1, 3x3 with bias and gain; an actnorm after all but the last
        return 9 * inputs * 16 + 4 * 16 * 16 + 5 * 32 + 9 * 16 * out + 2 * out

    said = next(d for d in fl.info("robust_nf_toy") if d["kind"] == "flow")["parameters"]
    assert said == 4 * (net(2, 8) + net(3, 4))


def test_onnx_of_density_and_inverse(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = fl.compile("robust_nf_toy", seed=0).eval()
    perturb(model, generator(12), 0.3)
    paths = fl.export_onnx(model, tmp_path / "m.onnx", programs=["log_prob", "inverse"])
    x, c = image(moons(32, 3)), image(moons(32, 4))
    session = ort.InferenceSession(str(paths["log_prob"]))
    (found,) = session.run(None, {"x": x.numpy(), "c": c.numpy()})
    assert np.allclose(found, model.log_prob(x, c=c).detach().numpy(), atol=1e-3)
    z = model(x, c=c)[0].detach()
    session = ort.InferenceSession(str(paths["inverse"]))
    back = session.run(None, dict(zip([i.name for i in session.get_inputs()], (z.numpy(), c.numpy()), strict=True)))[0]
    assert np.allclose(back, x.numpy(), atol=1e-3)


def test_the_probe_of_exploding_inverses() -> None:
    """`exploding_inverse_probe`: the largest number after 8 inverses of one coupling under conditions 100 times too large."""
    found = {}
    for step in ("cond_affine_coupling", "modified_rq_spline_coupling"):
        text = f"net n(z: R[C = 4, H = 1, W = 1], c: R[E = 3, H = 1, W = 1]) {{ exploding_inverse_probe({step}())(z, c) }}\n"
        f: Any = fl.compile(text, flow="n", seed=0, dtype=torch.float64).requires_grad_(False)
        g = torch.Generator().manual_seed(0)
        for p in f.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=g)
        z, c = (torch.randn(16, n, 1, 1, dtype=torch.float64, generator=g) for n in (4, 3))
        found[step] = f(z, c)
    assert float(found["cond_affine_coupling"].max()) > 1e4
    assert float(found["modified_rq_spline_coupling"].max()) < 1e-3 * float(found["cond_affine_coupling"].max())
