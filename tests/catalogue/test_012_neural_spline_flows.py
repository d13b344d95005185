"""Card 012, Neural Spline Flows (Durkan et al. 2019): what must hold, item by item.

References: the card's formulas written out here, autograd, and parameter counts from the architecture.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from flowlang.backends.torch.runtime import rqs, rqs_inverse
from torch import Tensor

import flowlang as fl
from flowlang.verify import perturb

B, K = 3.0, 8
LEAST = 1e-3
STEPS = {
    "rq_spline": "rq_spline(bins = 8, bound = 3)",
    "rq_coupling": "rq_coupling(bins = 8, bound = 3, net = residual_mlp(16))",
    "rq_autoregressive": "rq_autoregressive(bins = 8, bound = 3, hidden = [16], blocks = 1)",
}


@cache
def flow(step: str, size: int = 4, context: bool = False) -> fl.Flow:
    given = "given c: R[E = 2]" if context else ""
    made = fl.compile(
        f"flow f {{\n data x: R[D = {size}]\n {given}\n {step}\n base normal\n}}\n", seed=0, dtype=torch.float64
    )
    perturb(made, torch.Generator().manual_seed(0), 1.0)
    return made


def inputs(size: int = 4, n: int = 400) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return (torch.rand(n, size, generator=g, dtype=torch.float64) * 2 - 1) * 2 * B


def card_knots(raw: Tensor) -> Tensor:
    """The card's knots: cumulative sums of min + (1 - K min) softmax, scaled to [-B, B], ends pinned."""
    k = raw.shape[0]
    share = LEAST + (1 - k * LEAST) * torch.softmax(raw, 0)
    edges = torch.cat((torch.zeros_like(share[:1]), torch.cumsum(share, 0)))
    edges[-1] = 1.0
    return 2 * B * edges - B


def raw_spline(scale: float = 1.0, k: int = K, size: int = 4, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(n, size, generator=g, dtype=torch.float64) for n in (k, k, k - 1))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_item_1_round_trip_and_log_det(step: str) -> None:
    model, x = flow(step), inputs().requires_grad_()
    z, log_det = model(x)
    rows = [torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)[0] for k in range(4)]
    assert torch.allclose(log_det, torch.linalg.slogdet(torch.stack(rows, 1))[1], atol=1e-9, rtol=1e-9)
    back, log_det_back = model.inverse(z)
    assert (back - x).abs().max() <= 1e-10
    assert (log_det + log_det_back).abs().max() <= 1e-8
    single = fl.compile(f"flow f {{\n data x: R[D = 4]\n {step}\n base normal\n}}\n", seed=0, dtype=torch.float32)
    y = x.detach().float()
    assert (single.inverse(single(y)[0])[0] - y).abs().max() <= 1e-5 * (1 + 2 * B)


def test_item_2_monotone_and_continuously_differentiable() -> None:
    raw = raw_spline()
    knots = torch.stack([card_knots(raw[0][:, j]) for j in range(4)], 1)
    for at in knots:
        y, slope = rqs(torch.stack((at - 1e-9, at + 1e-9)), *raw, bound=B)
        assert (slope[0] - slope[1]).abs().max() <= 1e-6
        assert (y[0] - y[1]).abs().max() <= 1e-6
    grid = torch.linspace(-2 * B, 2 * B, 20001, dtype=torch.float64).unsqueeze(-1).expand(-1, 4)
    y, slope = rqs(grid, *raw, bound=B)
    assert torch.isfinite(slope).all()
    assert (y[1:] > y[:-1]).all()
    ends = torch.tensor([-B + 1e-12, B - 1e-12], dtype=torch.float64).unsqueeze(-1).expand(-1, 4)
    assert rqs(ends, *raw, bound=B)[1].abs().max() <= 1e-6  # slope 1 at ±B


def test_item_3_raw_zero_is_the_identity() -> None:
    x = inputs()
    y, slope = rqs(x, *raw_spline(0.0), bound=B)
    assert (y - x).abs().max() <= 1e-14
    assert slope.abs().max() <= 1e-14
    start = fl.compile("flow f {\n data x: R[D = 4]\n rq_spline\n base normal\n}\n", seed=0, dtype=torch.float64)
    assert (start(x)[0] - x).abs().max() <= 1e-6  # raw parameters begin at 0


def test_item_4_knots_are_met_and_ends_are_fixed() -> None:
    raw = raw_spline()
    xs, ys = (torch.stack([card_knots(r[:, j]) for j in range(4)], 1) for r in raw[:2])
    assert (rqs(xs, *raw, bound=B)[0] - ys).abs().max() <= 1e-12
    assert (rqs_inverse(ys, *raw, bound=B)[0] - xs).abs().max() <= 1e-12
    ends = torch.tensor([-B, B], dtype=torch.float64).unsqueeze(-1).expand(-1, 4)
    assert torch.equal(rqs(ends, *raw, bound=B)[0], ends)


def test_items_1_to_4_by_the_cards_formula() -> None:
    """The rational quadratic of the card, entry by entry, with its padded slopes."""
    raw, x = raw_spline(2.0), inputs(4, 60)
    y, log_slope = rqs(x, *raw, bound=B)
    for n in range(len(x)):
        for j in range(4):
            v = x[n, j]
            if v.abs() >= B:
                assert y[n, j] == v
                assert log_slope[n, j] == 0
                continue
            xs, ys = card_knots(raw[0][:, j]), card_knots(raw[1][:, j])
            unit = math.log(math.exp(1 - LEAST) - 1)
            d = LEAST + F.softplus(F.pad(raw[2][:, j], (1, 1)) + unit)
            k = int((v >= xs[1:-1]).sum())
            w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
            xi, s = (v - xs[k]) / w, h / w
            den = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
            value = ys[k] + h * (s * xi**2 + d[k] * xi * (1 - xi)) / den
            slope = s**2 * (d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2) / den**2
            assert (value - y[n, j]).abs() <= 1e-12
            assert (torch.log(slope) - log_slope[n, j]).abs() <= 1e-10


@pytest.mark.parametrize("bins", [1, 2, 8])
def test_item_5_any_number_of_bins_is_monotone(bins: int) -> None:
    g = torch.Generator().manual_seed(3)
    raw = [3 * torch.randn(n, 10_000, generator=g, dtype=torch.float64) for n in (bins, bins, bins - 1)]
    grid = torch.linspace(-B, B, 41, dtype=torch.float64).unsqueeze(-1).expand(-1, 10_000)
    y, _ = rqs(grid, *raw, bound=B)
    assert (y[1:] > y[:-1]).all()
    if bins == 1:  # s = 1 and slopes 1 at both ends: affine
        assert (y - grid).abs().max() <= 1e-14


def test_item_6_beats_an_affine_autoregressive_flow_on_a_mixture() -> None:
    g = torch.Generator().manual_seed(4)
    sign = (torch.rand(2000, 1, generator=g) < 0.5).float() * 2 - 1
    x = 1.2 * sign + 0.25 * torch.randn(2000, 1, generator=g)
    found = {}
    for name, step in (("spline", "rq_autoregressive(bins = 8)"), ("affine", "affine_autoregressive")):
        model = fl.compile(f"flow f {{\n data x: R[D = 1]\n {step}\n base normal\n}}\n", seed=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss = -model.log_prob(x[:1000]).mean()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found[name] = float(-model.log_prob(x[1000:]).mean())
    assert found["spline"] <= found["affine"] - 0.1


def test_item_7_later_coordinates_do_not_reach_earlier_ones() -> None:
    model, x = flow(STEPS["rq_autoregressive"]), inputs().requires_grad_()
    z = model(x)[0]
    for i in range(4):
        (row,) = torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)
        assert (row[:, i + 1 :] == 0).all()
        assert (row[:, i] > 0).all()


def test_item_8_parameters_for_each_dimension() -> None:
    for bins in (2, 8):
        counts = {d["name"]: d["parameters"] for d in fl.info(
            f"flow a {{\n data x: R[D = 5]\n rq_spline(bins = {bins})\n base normal\n}}\n"
            f"flow b {{\n data x: Torus[D = 5]\n rq_spline_circular(bins = {bins})\n base uniform(-π, π)\n}}\n"
        ) if d["kind"] == "flow"}  # fmt: skip
        assert counts == {"a": 5 * (3 * bins - 1), "b": 5 * (3 * bins + 1)}  # a circle's slopes are tied, and it turns


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_item_9_gradients_out_of_range(step: str) -> None:
    model = flow(step)
    x = torch.tensor([[1e3, -1e3, 3.0, -3.0], [1e30, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    z, log_det = model(x)
    gradients = torch.autograd.grad(z.sum() + log_det.sum(), [x, *model.parameters()], allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_context_reaches_every_entry(step: str) -> None:
    model, x = flow(step, context=True), inputs()
    a, b = (model(x, c=torch.full((len(x), 2), v, dtype=torch.float64))[0] for v in (0.0, 1.0))
    assert not torch.equal(a, b)


# ---- names and presets --------------------------------------------------------------------------


def test_the_cards_names_and_the_languages_are_one_definition() -> None:
    for card, own in (("rq_spline", "rqs_elementwise"), ("rq_coupling", "rqs_coupling"),
                      ("rq_autoregressive", "rqs_autoregressive")):  # fmt: skip
        a, b = (fl.compile(f"flow f {{\n data x: R[D = 4]\n {n}\n base normal\n}}\n", seed=0) for n in (card, own))
        x = inputs().float()
        assert torch.equal(a.log_prob(x), b.log_prob(x))


def linear(dims: int) -> int:
    return dims * dims + dims  # L, U with its diagonal, and an offset


def coupling(dims: int, layers: int, hidden: int, blocks: int = 2, bins: int = 8) -> int:
    kept, moved = dims - dims // 2, dims // 2
    net = (kept + 1) * hidden + 2 * blocks * (hidden + 1) * hidden + (hidden + 1) * moved * (3 * bins - 1)
    return layers * (linear(dims) + net + kept * (3 * bins - 1)) + linear(dims)


def autoregressive(dims: int, layers: int, hidden: int, blocks: int = 2, bins: int = 8) -> int:
    net = (dims + 1) * hidden + 2 * blocks * (hidden + 1) * hidden + (hidden + 1) * dims * (3 * bins - 1)
    return layers * (linear(dims) + net) + linear(dims)


PRESETS = {
    "rq_nsf_c_tiny": coupling(2, 2, 32), "rq_nsf_ar_tiny": autoregressive(2, 2, 32),
    "rq_nsf_c_power": coupling(6, 10, 256), "rq_nsf_c_gas": coupling(8, 10, 256),
    "rq_nsf_c_hepmass": coupling(21, 10, 128), "rq_nsf_c_miniboone": coupling(43, 10, 32),
    "rq_nsf_c_bsds300": coupling(63, 10, 128), "rq_nsf_ar_power": autoregressive(6, 10, 256),
    "rq_nsf_ar_gas": autoregressive(8, 10, 256), "rq_nsf_ar_hepmass": autoregressive(21, 10, 128),
    "rq_nsf_ar_miniboone": autoregressive(43, 10, 64), "rq_nsf_ar_bsds300": autoregressive(63, 10, 256),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_the_presets(name: str) -> None:
    said = next(d for d in fl.info(f"flow mine = {name}\n") if d["name"] == "mine")
    assert said["parameters"] == PRESETS[name]


@pytest.mark.parametrize("name", ["rq_nsf_c_tiny", "rq_nsf_ar_tiny"])
def test_a_tiny_preset_trains_a_step(name: str) -> None:
    model = fl.compile(f"flow mine = {name}\n", seed=0)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(5)) * 2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (model.inverse(model(x)[0])[0] - x).abs().max() <= 1e-4


def test_the_image_preset_at_a_small_size_trains_a_step() -> None:
    model = fl.compile("flow mine = rq_nsf_c_image(size = 8, steps = 1, hidden = 8, blocks = 1)\n", seed=0)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    loss = -model.log_prob(x).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert (model.inverse(model(x)[0])[0] - x).abs().max() <= 1e-4
