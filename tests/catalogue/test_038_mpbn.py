"""Card 038: membrane potential batch normalisation (Guo et al. 2023). Tests carry the card's item numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import flowlang as fl
from flowlang.diagnostics import FlowError
from flowlang.rewrite import fold_thresholds
from tests.catalogue.norms import count, data, gradient, norm, part, runs_in_onnx, trains

SIZES = {"T": 3, "C": 4, "H": 8, "W": 8}
K = 3.0


def spikes(module: Any, x: Tensor) -> Tensor:
    y = module(x).detach()
    assert ((y == 0) | (y == 1)).all()
    return y


def folded(trained: Any, threshold: float = 0.5, **sizes: int) -> Any:
    """`lif_folded` with the thresholds of a trained `lif_mpbn`."""
    bn, out = part(trained, "BatchNorm"), norm("lif_folded()", **sizes)
    g, b = bn.gamma.detach(), bn.beta.detach()
    m = part(out, "LifFolded")
    at = (threshold - b) * (bn.running_var + 1e-5).sqrt() / g + bn.running_mean
    m.threshold.copy_(torch.where(g == 0, torch.zeros_like(g), at))
    m.direction.copy_(g.sign())
    m.always.copy_((g == 0) * (b - threshold))
    return out


def test_item_1_the_fold_is_exact() -> None:
    sizes = {"T": 4, "C": 8, "H": 10, "W": 10}
    module = norm("lif_mpbn()", **sizes)
    bn = part(module, "BatchNorm")
    with torch.no_grad():
        bn.gamma.copy_(data(8, seed=1))
        bn.gamma[0], bn.gamma[1], bn.gamma[2] = -1.3, 0.0, 0.0
        bn.beta.copy_(0.5 * data(8, seed=2))
        bn.beta[1], bn.beta[2] = 0.7, 0.2
        bn.running_mean.copy_(0.3 * data(8, seed=3))
        bn.running_var.copy_(data(8, seed=4).exp())
    module.eval()
    x = data(25, 4, 8, 10, 10)
    a, b = spikes(module, x), spikes(folded(module, **sizes).eval(), x)
    # A potential within rounding of its threshold may fall either way: no sample here is that near.
    assert torch.equal(a, b)
    assert a[:, :, 1].min() == 1 > a[:, :, 2].max() == 0
    assert 0.05 < float(a.mean()) < 0.95


def test_item_2_with_an_identity_normalisation_it_is_the_plain_neuron() -> None:
    module, plain = norm("lif_mpbn()", **SIZES), norm("lif()", **SIZES)
    part(module, "BatchNorm").running_var.fill_(1 - 1e-5)
    x = data(6, 3, 4, 8, 8)
    assert torch.equal(spikes(module.eval(), x), spikes(plain, x))


def test_item_3_a_spike_resets_the_potential() -> None:
    x = data(5, 3, 4, 8, 8)
    out = spikes(norm("lif()", **SIZES), x)
    u = torch.zeros(5, 4, 8, 8, dtype=torch.float64)
    for t in range(3):
        u = 0.25 * u + x[:, t]
        assert torch.equal(out[:, t], (u > 0.5).double())
        u = u * (1 - out[:, t])
        assert (u[out[:, t] == 1] == 0).all()


def test_item_4_the_surrogate_gradient() -> None:
    module = norm("spike()", D=1)
    z = torch.tensor([[0.5], [1.2], [-0.2]], dtype=torch.float64)
    g = gradient(module, z)
    assert torch.allclose(g.flatten(), torch.tensor([K / (2 * math.tanh(K / 2)), 0, 0], dtype=torch.float64))
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    assert abs(float(torch.trapezoid(gradient(module, grid).flatten(), grid.flatten())) - 1) < 1e-4


def test_item_5_one_normalisation_follows_every_time() -> None:
    module = norm("lif_mpbn()", **SIZES)
    bn, own = part(module, "BatchNorm"), nn.BatchNorm2d(4).double()
    x = data(6, 3, 4, 8, 8)
    out = spikes(module, x)
    u = torch.zeros(6, 4, 8, 8, dtype=torch.float64)
    for t in range(3):
        u = 0.25 * u + x[:, t]
        own(u)
        u = u * (1 - out[:, t])
    assert int(bn.num_batches_tracked) == 3
    assert torch.allclose(bn.running_mean, own.running_mean)
    assert torch.allclose(bn.running_var, own.running_var)
    assert sum(type(m).__name__ == "BatchNorm" for m in module.modules()) == 1


@pytest.mark.parametrize(("scale", "shift", "saturated"), [(10, 50, True), (10, 5, False)])
def test_item_6_bad_scales_of_the_input_do_not_saturate_it(scale: float, shift: float, saturated: bool) -> None:
    """Both readings of "mean 5 and scale 10": N(5, 1) scaled by 10, where the plain neuron fires always; and N(5, 10²), of which a
    third lies below the threshold whatever the neuron, so that "all spikes" cannot hold: it fires at 0.66 of the places. The
    normalised potential has mean 0 and variance 1 at every time of both."""
    x = data(32, 3, 4, 8, 8, scale=scale, shift=shift)
    bn_out: list[Tensor] = []
    module = norm("lif_mpbn()", **SIZES)
    part(module, "BatchNorm").register_forward_hook(lambda m, i, o: bn_out.append(o.detach()))
    with_norm, plain = float(spikes(module, x).mean()), float(spikes(norm("lif()", **SIZES), x).mean())
    assert len(bn_out) == 3
    for m in bn_out:
        assert m.mean((0, 2, 3)).abs().max() < 1e-4
        assert (m.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    assert 0.1 < with_norm < 0.6
    assert plain == 1 if saturated else 0.6 < plain < 0.75


@pytest.mark.slow
def test_item_7_a_badly_scaled_input_is_learnt() -> None:
    x, label = data(64, 16, dtype=torch.float32), torch.arange(64) % 2
    x[label == 1, :4] += 1.0
    losses = {}
    for name in ("lif_mpbn()", "lif()"):
        torch.manual_seed(0)
        text = f"""net f(x: R[D]) -> R[K = 2] {{
          h: R[T = 2, C = 32] = linear[D -> C](x) + zeros[T = 2]
          o = {name}(h)
          linear[C -> K](mean[T](o))
        }}"""
        module = fl.compile(text, flow="f", D=16)
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(60):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(module(10 * x), label)
            loss.backward()
            optimiser.step()
        losses[name] = float(loss.detach())
    assert losses["lif_mpbn()"] < 0.8 * losses["lif()"]


SMALL = "net snn(x: R[C = 3, H = 8, W = 8], lif: net = lif_mpbn()) -> R[K = 10] { mpbn_resnet(4, [2, 1], 2, lif)(x) }\n"


def test_item_1_a_whole_network_is_folded_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = fl.compile(SMALL, flow="snn", dtype=torch.float64)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(3):
        optimiser.zero_grad()
        module(data(8, 3, 8, 8, seed=step)).square().sum().backward()
        optimiser.step()
    with torch.no_grad():
        for m in module.modules():
            if type(m).__name__.startswith("LifMpbn") and hasattr(m, "bn") and hasattr(m, "step"):
                m.bn.gamma[0].mul_(-1)
                m.bn.gamma[1].zero_()
    module.eval()
    found = fold_thresholds(module)
    assert not any(type(m).__name__ in ("BatchNorm", "BatchNorm_2") for m in found.modules())
    x = data(16, 3, 8, 8, seed=9)
    assert torch.allclose(found(x), module(x), atol=1e-12)
    found.float()
    file = tmp_path / "folded.onnx"
    fl.export_onnx(found, str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})
    assert torch.allclose(torch.as_tensor(out), found(x.float()), atol=1e-4)
    plain = fl.compile("net f(x: R[D = 2]) { 2 * x }", flow="f")
    with pytest.raises(FlowError, match="no `lif_mpbn`"):
        fold_thresholds(plain)


def convolutions(width: int, stages: list[int], channels: int = 3, classes: int = 10) -> int:
    """Parameters by hand: kernels, two numbers a channel for each normalisation, and the last layer."""
    total = 9 * channels * width + 4 * width
    before = width
    for s, blocks in enumerate(stages):
        c = width * 2**s
        for _ in range(blocks):
            total += 9 * before * c + 9 * c * c + 8 * c
            total += before * c + 2 * c if before != c else 0
            before = c
    return total + before * classes + classes


@pytest.mark.parametrize(("name", "stages"), [("mpbn_resnet19", [3, 3, 2]), ("mpbn_resnet20", [3, 3, 3])])
def test_presets(name: str, stages: list[int]) -> None:
    text = f"net f(x: R[C, H, W]) -> R[K = 10] {{ {name}()(x) }}"
    assert count(text, C=3, H=32, W=32) == convolutions(128, stages)


def test_the_modified_resnet20() -> None:
    """Three convolutions of 64 channels first, stages of 64 to 512, branches that start at 0."""
    text = "net f(x: R[C, H, W]) -> R[K = 10] { mpbn_resnet20_modified()(x) }"
    stem = 9 * 3 * 64 + 2 * 9 * 64 * 64 + 3 * 4 * 64
    assert count(text, C=3, H=32, W=32) == stem + convolutions(64, [2, 2, 2, 2]) - (9 * 3 * 64 + 4 * 64)
    small = "net f(x: R[C = 3, H = 16, W = 16]) -> R[K = 4] { mpbn_resnet20_modified(4, [1, 1])(x) }"
    module = fl.compile(small, flow="f", seed=0)
    gains = [m.gamma for m in module.modules() if type(m).__name__.startswith("BatchNormTime")]
    assert sum(bool((g == 0).all()) for g in gains) == 2
    x, label = data(32, 3, 16, 16, dtype=torch.float32), torch.arange(32) % 4
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(module(x), label)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert min(losses[4:]) < losses[0]


def test_element_wise_statistics() -> None:
    """The element-wise form: statistics and affine for each (C, H, W)."""
    module = norm("lif_mpbn(bn = batch_norm_all())", T=2, C=3, H=2, W=2)
    bn = part(module, "BatchNormAll")
    assert bn.gamma.shape == (3, 2, 2)
    x = data(9, 2, 3, 2, 2)
    spikes(module, x)
    assert bn.running_mean.shape == (3, 2, 2)


def test_onnx_and_training(tmp_path: Path) -> None:
    runs_in_onnx("lif_mpbn()", tmp_path, **SIZES)
    runs_in_onnx("lif_folded()", tmp_path, **SIZES)
    assert not list(norm("lif_folded()", **SIZES).parameters())
    trains("snn_block(8)", T=2, C=3, H=6, W=6)
