"""Card 003, TarFlow (Zhai et al. 2024): what must hold, item by item."""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.verify import perturb
from tests.backends.torch.test_cached_attention import flops
from tests.backends.torch.test_scan import plain_scan

MODEL = "model m = tarflow_model(channels = 1, size = 8, blocks = 2, layers = 1, width = 16, head = 8, classes = 3, noise = 0.1{})\n"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def tiny() -> fl.Flow:
    model = fl.compile("tarflow_tiny", seed=0, dtype=torch.float64)
    perturb(model, generator(1), 0.3)
    return model


def block(reversed_: bool = False, moved: bool = True) -> fl.Flow:
    text = f"""flow f {{
      data x: R[T = 6, D = 3]
      tarflow_block(tarflow_net(16, 2, 8), {str(reversed_).lower()})
      base normal
    }}
    """
    model = fl.compile(text, seed=0, dtype=torch.float64)
    if moved:
        perturb(model, generator(2), 0.5)
    return model


@cache
def guided(anneal: bool = False) -> Any:
    model = fl.compile(MODEL.format(", anneal = true" if anneal else ""), seed=0, dtype=torch.float64)
    perturb(model, generator(3), 0.3)
    return model


def images(n: int, seed: int = 4) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=generator(seed), dtype=torch.float64) * 2 - 1


def test_item_1_inverse_and_log_det() -> None:
    x = images(2)
    z, log_det = tiny()(x)
    with torch.no_grad():
        assert (tiny().inverse(z)[0] - x).abs().max() <= 1e-9
    for k in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: tiny()(v)[0].flatten(), x[k]).reshape(64, 64)
        assert abs(torch.linalg.slogdet(jacobian)[1] - log_det[k]) <= 1e-8
    single = fl.compile("tarflow_tiny", seed=0)
    perturb(single, generator(1), 0.3)
    with torch.no_grad():
        y = x.float()
        assert (single.inverse(single(y)[0])[0] - y).abs().max() <= 1e-4


def folded(tokens: Tensor) -> Tensor:
    """Tokens of 2 x 2 pixels, row by row, as images of one channel."""
    return tokens.unflatten(-2, (4, 4)).unflatten(-1, (2, 2)).transpose(-3, -2).reshape(*tokens.shape[:-2], 1, 8, 8)


def test_item_1_encode_then_sample_is_the_identity() -> None:
    model, x, y = guided(), images(3), torch.tensor([0, 2, -1])
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        z, log_det = model.encode(x, y)
        assert (model.sample(folded(z), y, zero, one) - x).abs().max() <= 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda v: model.encode(v, y[0])[0].flatten(), x[0]).reshape(64, 64)
    assert abs(torch.linalg.slogdet(jacobian)[1] - log_det[0]) <= 1e-8
    single: Any = fl.compile(MODEL.format(""), seed=0)
    perturb(single, generator(3), 0.3)
    with torch.no_grad():
        found = single.sample(folded(single.encode(x.float(), y)[0]), y, zero.float(), one.float())
    assert (found - x.float()).abs().max() <= 1e-4


@pytest.mark.parametrize("reversed_", [False, True])
def test_item_2_a_token_reads_only_those_before_it(reversed_: bool) -> None:
    model = block(reversed_)
    x = torch.randn(6, 3, dtype=torch.float64, generator=generator(5))
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v)[0], x)
    for i in range(6):
        for j in range(6):
            later = j < i if reversed_ else j > i
            if later:
                assert jacobian[i, :, j].abs().max() == 0
            elif i == j:
                assert torch.equal(jacobian[i, :, j] != 0, torch.eye(3, dtype=torch.bool))
    assert jacobian.permute(0, 2, 1, 3).reshape(36, 9).ne(0).sum() > 15 * 9  # and it does read them


def test_item_3_starts_as_an_elementwise_affine_map() -> None:
    model = block(moved=False)
    x = torch.randn(7, 6, 3, dtype=torch.float64, generator=generator(6))
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v)[0].flatten(), x[0]).reshape(18, 18)
    assert torch.equal(jacobian, torch.diag(torch.diagonal(jacobian)))
    assert model(x)[1].abs().max() > 1e-3
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "bias_a" in n or "bias_b" in n:
                p.zero_()
    z, log_det = model(x)
    assert torch.equal(z, x)
    assert log_det.abs().max() == 0


def test_item_4_the_inverse_equals_a_recomputation_token_by_token() -> None:
    model = block()
    z = torch.randn(5, 6, 3, dtype=torch.float64, generator=generator(7))
    x = z.clone()
    with torch.no_grad():
        for i in range(6):
            trial, log_slopes = x.clone(), []
            for j in range(3):  # z_i = (x_i - b)·exp(-a): two points give a and b
                trial[:, i] = 0
                at_0 = model(trial)[0][:, i, j]
                trial[:, i, j] = 1
                at_1 = model(trial)[0][:, i, j]
                log_slopes.append((at_0, at_1 - at_0))
            for j, (offset, slope) in enumerate(log_slopes):
                x[:, i, j] = (z[:, i, j] - offset) / slope
        assert (model.inverse(z)[0] - x).abs().max() <= 1e-9


def test_item_4_keys_and_values_are_kept() -> None:
    """The derived inverse costs about one pass, however many tokens; without the cache it takes one for each token."""
    cached, plain = tiny(), plain_scan("tarflow_tiny")
    plain.load_state_dict(cached.state_dict())
    z, x = torch.randn(2, 16, 4, dtype=torch.float64, generator=generator(7)), images(2)
    with torch.no_grad():
        assert (cached.inverse(z)[0] - plain.inverse(z)[0]).abs().max() <= 1e-9
        single, twin = fl.compile("tarflow_tiny", seed=0), plain_scan("tarflow_tiny").float()
        perturb(single, generator(1), 0.3)
        twin.load_state_dict(single.state_dict())
        assert (single.inverse(z.float())[0] - twin.inverse(z.float())[0]).abs().max() <= 1e-5
    cached.check_inverse = plain.check_inverse = False  # the look at what was found is two passes more
    assert flops(lambda: cached.inverse(z)) <= 2.2 * flops(lambda: cached(x))  # one pass is the log-det's
    assert flops(lambda: plain.inverse(z)) >= 16 * flops(lambda: cached(x))


def test_item_4_guidance_keeps_the_keys_of_both_branches() -> None:
    """A guided sample costs about two passes, one for each branch; in ONNX each block is one loop whose state has them."""
    import onnx

    model, y, one = guided(), torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.float64)
    x = images(3)
    assert flops(lambda: model.sample(x, y, 2 * one, 0.5 * one)) <= 2.2 * flops(lambda: model.encode(x, y))
    with tempfile.TemporaryDirectory() as folder:
        paths = fl.export_onnx(
            fl.compile(MODEL.format(""), seed=0).eval(), Path(folder) / "m.onnx", programs=["sample"]
        )
        graph = onnx.load(str(paths["sample"])).graph
    loops = [n for n in graph.node if n.op_type == "Loop"]
    assert len(loops) == 2
    assert all(len(n.output) == 1 + 2 * 2 + 2 * 2 for n in loops)  # x; keys, values, a and b of either branch


def test_item_5_denoising_is_tweedie_s_mean() -> None:
    """A model made to be N(0, (1 + σ²)·I) exactly: one block, no bias in b, a constant a = log sqrt(1 + σ²) but for the first token,
    which has none and keeps variance 1."""
    text = MODEL.format("").replace("blocks = 2", "blocks = 1")
    model: Any = fl.compile(text, seed=0, dtype=torch.float64)
    sigma = 0.1
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "bias_b" in n or "bias_a" in n:
                p.zero_()
            if "bias_a" in n:
                a = 0.5 * math.log(1 + sigma**2)
                p.fill_(2 * math.atanh(a / 2))
    x, y = images(5), torch.tensor([0, 1, 2, -1, 0])
    with torch.no_grad():
        found = model.denoise(x, y)
    wanted = x / (1 + sigma**2)
    first = torch.zeros(8, 8, dtype=torch.bool)
    first[:2, :2] = True  # the first token's patch: N(0, 1), whose mean is x - σ²·x
    assert (found - wanted)[..., ~first].abs().max() <= 1e-9
    assert (found - (1 - sigma**2) * x)[..., first].abs().max() <= 1e-9


def test_item_5_the_score_is_autograd_s() -> None:
    model, x, y = guided(), images(2), torch.tensor([1, -1])
    x.requires_grad_()
    quiet: Any = fl.compile(MODEL.format("").replace("noise = 0.1", "noise = 0"), seed=0, dtype=torch.float64)
    quiet.load_state_dict(model.state_dict())
    (score,) = torch.autograd.grad(-64 * 2 * quiet.loss(x, y), x)  # the loss is a mean over two images
    with torch.no_grad():
        assert (model.denoise(x, y) - x - 0.01 * score).abs().max() <= 1e-9


@pytest.mark.slow
def test_scales_stay_in_range_when_all_weights_move() -> None:
    """Issue 2's numerical contract: log-densities of -1e16 under N(0, 0.05²) on all weights, unbounded; the published form is kept."""
    sizes = "channels = 1, size = 8, patch = 2, blocks = 4, layers = 2, width = 512, head = 64"
    worst = {}
    for bound in (2, 0):
        model: Any = fl.compile(f"flow f = tarflow({sizes}, bound = {bound})\n", seed=0)
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                p += 0.05 * torch.randn(p.shape, generator=generator(100 + k))
            worst[bound] = float(model.log_prob(images(16).float()).min())
    assert worst[2] > -1e10
    assert not worst[0] > worst[2]  # not a number, here


def test_item_6_guidance_0_is_plain_sampling() -> None:
    model, z = guided(), torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator(8))
    y = torch.tensor([0, 1, 2, -1])
    zero, one, two = (torch.full((4,), w, dtype=torch.float64) for w in (0.0, 1.0, 2.0))
    with torch.no_grad():
        plain = model.sample(z, y, zero, one)
        for anneal in (False, True):
            assert torch.equal(guided(anneal).sample(z, y, zero, one), plain)
            assert (guided(anneal).sample(z, y, two, one) - plain)[:3].abs().max() > 1e-3
        assert (model.sample(z, y, two, one) - plain)[3].abs().max() <= 1e-9  # no label: both branches are one


def test_item_6_equal_labels_make_guidance_a_no_op() -> None:
    model = fl.compile(MODEL.format(""), seed=0, dtype=torch.float64)
    perturb(model, generator(3), 0.3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("label"):
                p.copy_(p[..., :1, :].expand_as(p) if p.shape[-2] == 3 else p)
        z = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=generator(9))
        made = [
            model.sample(
                z, torch.tensor([0, 1, 2]), torch.full((3,), w, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
            )
            for w in (0.0, 1.5)
        ]
    assert (made[0] - made[1]).abs().max() <= 1e-9


def test_item_6_a_temperature_tells_the_branches_apart_without_labels() -> None:
    """Guidance against the attention at another temperature, token by token: a network whose queries are divided by it."""
    text = MODEL.format("").replace("classes = 3", "classes = 0").replace("blocks = 2", "blocks = 1")
    model, twin = (moved(text) for _ in range(2))
    temperature, w = 0.5, 1.5
    with torch.no_grad():
        for n, p in twin.named_parameters():
            if "attention.linear_weight" in n or "attention.linear_bias" in n:  # the first linear map: the queries
                p /= temperature
        nets = [next(m for m in t.modules() if type(m).__name__ == "TarflowNet") for t in (model, twin)]
        z = torch.randn(1, 16, 4, dtype=torch.float64, generator=generator(8))
        x, one, none = z.clone(), torch.ones(1, dtype=torch.float64), torch.tensor([-1])
        for i in range(15):
            (a, b), (a0, b0) = (net(x, none, one) for net in nets)
            a, a0 = 2 * torch.tanh(a / 2), 2 * torch.tanh(a0 / 2)
            a, b = (v + w * (v - v0) for v, v0 in ((a, a0), (b, b0)))
            x[:, i + 1] = z[:, i + 1] * a[:, i + 1].exp() + b[:, i + 1]
        assert (model.sample(folded(z), none, w * one, temperature * one) - folded(x)).abs().max() <= 1e-9
        plain = model.sample(folded(z), none, 0 * one, one)
        assert (model.sample(folded(z), none, w * one, one) - plain).abs().max() <= 1e-9  # at 1 there is but one branch
        assert (folded(x) - plain).abs().max() > 1e-3


def moved(text: str) -> Any:
    model = fl.compile(text, seed=0, dtype=torch.float64)
    perturb(model, generator(3), 0.3)
    return model


def test_blocks_that_only_shift_keep_volume_and_follow_the_variance() -> None:
    model: Any = fl.compile("tarflow_shifts_tiny", seed=0, dtype=torch.float64)
    perturb(model, generator(3), 0.3)
    quiet = moved(
        "model m = tarflow_model(channels = 1, size = 8, blocks = 2, layers = 2, width = 32, head = 16, classes = 0, noise = 0, nvp = false)\n"
    )
    x, y, one = images(6), torch.full((6,), -1), torch.ones(6, dtype=torch.float64)
    (state,) = (n for n, _ in quiet.named_buffers() if n.endswith("variance"))
    variance = quiet.get_buffer(state)
    with torch.no_grad():
        z, log_det = quiet.encode(x, y)
        assert log_det.abs().max() == 0
        quiet.eval()
        assert (quiet.sample(folded(z), y, 0 * one, one) - x).abs().max() <= 1e-9
        assert torch.equal(variance, torch.ones_like(variance))
        quiet.train()
        assert abs(quiet.loss(x, y) - 0.5 * z.square().mean()) <= 1e-12
        assert (variance - (0.9 + 0.1 * z.square().mean(0))).abs().max() <= 1e-12
        quiet.eval()
        assert (quiet.sample(folded(z / variance.sqrt()), y, 0 * one, one) - x).abs().max() <= 1e-9
    assert torch.isfinite(model.bpd(128 * (x + 1), y)).all()


def test_bits_per_dimension_count_the_width_of_a_level() -> None:
    """A model that is the identity, on the middle grey: each number is within 1/128 of 0, where the normal density is 1/√(2π)."""
    model: Any = fl.compile(MODEL.format(""), seed=0, dtype=torch.float64)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "bias_a" in n or "bias_b" in n:
                p.zero_()
        bits = model.bpd(torch.full((2, 1, 8, 8), 128.0, dtype=torch.float64), torch.tensor([0, -1]))
    assert (bits - (0.5 * math.log2(2 * math.pi) + 7)).abs().max() <= 1e-4


@pytest.mark.slow
def test_item_6_sampling_inverts_the_loss_map() -> None:
    """Images made by `sample` have the latent they were made of: their loss without noise is that of the latent."""
    model = fl.compile(MODEL.format("").replace("noise = 0.1", "noise = 0"), seed=0, dtype=torch.float64)
    perturb(model, generator(3), 0.3)
    z, y = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=generator(10)), torch.tensor([1])
    with torch.no_grad():
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        x = model.sample(z, y, zero, one)
    jacobian = torch.autograd.functional.jacobian(lambda v: model.sample(v, y, zero, one), z)
    log_p = (-0.5 * z.square()).sum() - torch.linalg.slogdet(jacobian.reshape(64, 64))[1]
    assert abs(model.loss(x, y) + log_p / 64) <= 1e-8


def test_item_7_a_reversed_block_is_the_block_between_reversals() -> None:
    plain, flipped = block(False), block(True)
    flipped.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6, 3, dtype=torch.float64, generator=generator(11))
    z, log_det = plain(x.flip(1))
    other, log_det_other = flipped(x)
    assert torch.allclose(other, z.flip(1), atol=1e-12)
    assert torch.allclose(log_det, log_det_other, atol=1e-12)


def test_item_8_published_parameters() -> None:
    text = """flow a = tarflow_imagenet64
    require parameters(a) == 460_142_784
    flow b = tarflow_imagenet64_labelled
    require parameters(b) == 466_286_784
    """
    assert fl.check(text).ok
    with torch.device("meta"):
        model = fl.compile("flow a = tarflow(blocks = 1)\n")
    assert sum(p.numel() for p in model.parameters()) == 57_517_848


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1


@pytest.mark.slow
def test_item_9_beats_a_diagonal_gaussian() -> None:
    data, rows = digits(), generator(12)
    noisy = data + 0.1 * torch.randn(data.shape, generator=generator(13))
    variance = noisy[:1500].var(0)
    gaussian = float(
        (
            0.5 * (noisy[1500:] - noisy[:1500].mean(0)).square() / variance + 0.5 * torch.log(2 * math.pi * variance)
        ).mean()
    )
    model = fl.compile("tarflow_tiny", seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    for _ in range(250):
        optimizer.zero_grad()
        x = data[torch.randint(1500, (128,), generator=rows)]
        (-model.log_prob(x + 0.1 * torch.randn(x.shape, generator=rows)).mean() / 64).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(-model.log_prob(noisy[1500:]).mean() / 64) <= gaussian - 0.1


def test_bits_and_labels_train() -> None:
    model = fl.compile(MODEL.format(""), seed=0)
    x, y = 8 * (digits()[:32] + 1) * 15.9, torch.arange(32) % 4 - 1
    model.bpd(x, y, generator=generator(14)).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_onnx_of_density_and_sampling(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = fl.compile("tarflow_tiny", seed=0).eval()
    perturb(model, generator(15), 0.3)
    paths = fl.export_onnx(model, tmp_path / "m.onnx", programs=["log_prob", "forward", "inverse"])
    x = images(3).float()
    z = model(x)[0].detach()
    for program, given, expected in (("log_prob", x, model.log_prob(x)), ("forward", x, z), ("inverse", z, x)):
        session = ort.InferenceSession(str(paths[program]))
        found = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
        assert np.allclose(found, expected.detach().numpy(), atol=1e-3)
