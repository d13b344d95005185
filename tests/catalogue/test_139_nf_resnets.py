"""Card 139, residual networks without normalisation: its items under "What must hold"."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.nets import count, data, in_onnx, net, same_value_and_gradients, shaken

GAINS = {"relu": 1.7139588594436646, "silu": 1.7881293296813965, "gelu": 1.7015043497085571, "tanh": 1.5939117670059204}
EXACT = {"relu": math.sqrt(2 / (1 - 1 / math.pi)), "silu": 1.78718722, "gelu": 1.70092624, "tanh": 1.59253742}


class Reference(nn.Conv2d):
    """The equations of the card with torch's own statistics."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        var, mean = torch.var_mean(w, dim=1, correction=0, keepdim=True)
        scale = torch.rsqrt(torch.clamp(var * w.shape[1], min=1e-4)) * self.gain[:, None]
        return F.conv2d(
            x, ((w - mean) * scale).view_as(self.weight), self.bias, self.stride, self.padding, 1, self.groups
        )


@pytest.mark.parametrize(("body", "layer"), [
    ("scaled_ws_conv(4)(x)", (6, 4, 3, 1, 1)), ("scaled_ws_conv(4, 3, 2, 2)(x)", (6, 4, 3, 2, 1, 1, 2)),
])  # fmt: skip
def test_the_layer_is_its_equations_with_gradients(body: str, layer: tuple[int, ...]) -> None:
    mine = shaken(net(body, C=6, H=6, W=5))
    other = Reference(*layer).double()
    inner = mine.scaled_ws_conv
    pairs = [
        (inner.conv_weight, other.weight),
        (inner.conv_bias, other.bias),
        (inner.scaled_weight_standardization.g, other.gain),
    ]
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p)
    same_value_and_gradients(mine, other, data(2, 6, 6, 5), pairs)


def test_1_weights() -> None:
    """Item 1: sums are 0, squares sum to 1 where g = 1 and the fan's variance is above the floor."""
    mine = net("scaled_weight_standardization(x)", kind="norm", O=5, I=4, kh=3, kw=3)
    w = mine(3 * data(5, 4, 3, 3) + 1).flatten(1)
    assert w.sum(1).abs().max() < 1e-6
    torch.testing.assert_close(w.square().sum(1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-5)
    small = data(5, 4, 3, 3) * 1e-4
    c = (small - small.mean((1, 2, 3), keepdim=True)).flatten(1)
    torch.testing.assert_close(
        mine(small).flatten(1), c / math.sqrt(1e-4), rtol=1e-12, atol=0
    )  # a maximum: nothing is added


@pytest.mark.parametrize("act", GAINS)
def test_2_gains_keep_the_variance(act: str) -> None:
    """Item 2, by quadrature over N(0, 1): exact constants to 1e-7 (they are printed with nine digits), published to 2.5e-3."""
    z = np.linspace(-12, 12, 2_000_001)
    f: Tensor = getattr(F, act, getattr(torch, act, None))(torch.as_tensor(z))
    y, p = f.numpy(), np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    mean = np.trapezoid(y * p, z)
    var = np.trapezoid((y - mean) ** 2 * p, z)
    assert abs(EXACT[act] ** 2 * var - 1) < (1e-8 if act == "relu" else 1e-7)
    assert abs(GAINS[act] ** 2 * var - 1) < 2.5e-3


def outputs(module: nn.Module, kind: str, x: Tensor) -> list[Tensor]:
    """What each block of a kind gives, in order."""
    seen: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
        for n, m in module.named_modules()
        if n.split(".")[-1].startswith(kind)
    ]
    with torch.no_grad():
        module(x)
    for h in hooks:
        h.remove()
    return seen


def plot(values: list[Tensor]) -> tuple[list[float], list[float]]:
    """Mean variance and mean squared mean of the channels (the signal propagation plot of the paper)."""
    return [float(v.var((0, 2, 3)).mean()) for v in values], [float(v.mean((0, 2, 3)).square().mean()) for v in values]


def stages(alpha: float, blocks: int = 8, after: int = 4) -> str:
    """Two stages of a stem's 128 channels; the second begins with a transition."""

    def block(k: int, stride: int = 1) -> str:
        return f"nf_block(128, stride = {stride}, beta = {math.sqrt(1 + k * alpha**2)}, alpha = {alpha}, skip = 1)"

    one = "; ".join(f"h{i} = {block(i)}(h{i - 1})" for i in range(1, blocks))
    two = "; ".join(f"g{i} = {block(i)}(g{i - 1})" for i in range(1, after))
    return f"a = scaled_ws_conv(128)(x); h0 = {block(0)}(a); {one}; g0 = {block(blocks, 2)}(h{blocks - 1}); {two}; g{after - 1}"


@pytest.mark.parametrize("alpha", [0.2, 1])
def test_3_and_4_the_variance_follows_its_schedule(alpha: float) -> None:
    """Items 3 and 4: at initialisation the variance after block l is 1 + l alpha² within a tenth, begins anew after a
    transition, and the channels' squared means stay below 0.05."""
    mine = net(stages(alpha), torch.float32, C=3, H=32, W=32)
    found, means = plot(outputs(mine, "nf_block", data(8, 3, 32, 32, dtype=torch.float32)))
    assert len(found) == 12
    for k, v in [*enumerate(found[:8], 1), *enumerate(found[8:], 1)]:
        assert abs(v / (1 + alpha**2 * k) - 1) < 0.1
    assert max(means) < 0.05


@pytest.mark.parametrize(("alpha", "least"), [(0.2, 0.3), (1, 3)])
def test_4_plain_convolutions_shift_the_means(alpha: float, least: float) -> None:
    """Item 4: with He's start and relu · √2 the squared mean passes 0.3 after 12 blocks of alpha 0.2, 3 at alpha 1, and half
    the variance."""
    conv = "conv({x}, {n}, kernel = {k}, bias = false, start = kaiming_normal)"
    body = "h0 = conv(x, 128, bias = false, start = lecun_normal); "
    for k in range(1, 13):  # the bottleneck of `nf_block` with plain weights
        r = conv.format(x=f"relu(h{k - 1}) / {math.sqrt(1 + (k - 1) * alpha**2)}", n=32, k=1)
        r = conv.format(x=f"relu({conv.format(x=f'relu({r})', n=32, k=3)})", n=128, k=1)
        s = f"h{k - 1}" if k > 1 else conv.format(x="relu(h0)", n=128, k=1)  # a stage begins with a projection
        body += f"h{k} = {s} + {alpha} * {r}; "
    mine = net(f"{body}h12", torch.float32, C=3, H=32, W=32)
    with torch.no_grad():
        (var,), (mean,) = plot([mine(data(8, 3, 32, 32, dtype=torch.float32))])
    assert mean > least
    assert mean / var > 0.5


def test_5_a_block_starts_as_the_identity() -> None:
    """Item 5: with gain 0 a block without transition is the identity to the bit; its branch gets no gradient, the gain does."""
    mine = net("nf_block(8)(x)", C=8, H=6, W=6)
    x = data(3, 8, 6, 6)
    assert torch.equal(mine(x), x)
    (mine(x) * data(3, 8, 6, 6, seed=4)).sum().backward()
    for name, p in mine.named_parameters():
        assert p.grad is not None
        assert bool((p.grad != 0).any()) == name.endswith("skip_gain")


def test_6_and_7_samples_and_scales_of_weights() -> None:
    """Items 6 and 7: no sample sees another while training; a filter's shift and scale change nothing."""
    mine = net("nf_resnet(depths = [2, 2], widths = [16, 32], stem = 16, classes = 5, skip = 1)(x)", C=3, H=32, W=32)
    x = data(4, 3, 32, 32)
    before = mine(x)
    torch.testing.assert_close(mine(x[1:2])[0], before[1], rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        for name, p in mine.named_parameters():
            if name.endswith("conv_weight"):
                p.mul_(1.7).add_(0.3)
    torch.testing.assert_close(mine(x), before, rtol=1e-5, atol=1e-8)


def test_8_batch_norm_s_variance_grows() -> None:
    """Item 8: in a residual network with batch norm it grows by more than 0.5 a block, and drops at a transition."""
    lines = ["h = bn_block(128)(conv(x, 128, bias = false))", *["h := bn_block(128)(h)"] * 7]
    lines += ["h := bn_block(256, stride = 2)(h)", *["h := bn_block(256)(h)"] * 3, "h"]
    mine = net("; ".join(lines), torch.float32, C=3, H=16, W=16)
    found, _ = plot(outputs(mine, "bn_block", data(8, 3, 16, 16, dtype=torch.float32)))
    slope = np.polyfit(range(8), found[:8], 1)[0]
    assert slope > 0.5
    assert found[8] < 0.6 * found[7]


def test_8_the_library_s_networks_show_it_too() -> None:
    """Item 8 on `bn_resnet`, and item 3's growth on `nf_resnet` beside it: the two plots of the paper's figure 1."""
    x = data(8, 3, 64, 64, dtype=torch.float32)
    options = "depths = [6, 3], widths = [64, 128], stem = 64, classes = 5"
    found, _ = plot(outputs(net(f"bn_resnet({options})(x)", torch.float32, C=3, H=64, W=64), "bn_block", x))
    assert np.polyfit(range(6), found[:6], 1)[0] > 0.5
    assert found[6] < 0.6 * found[5]
    found, _ = plot(outputs(net(f"nf_resnet({options}, skip = 1)(x)", torch.float32, C=3, H=64, W=64), "nf_block", x))
    for a, b in [*pairwise(found[:6]), *pairwise(found[6:])]:  # from what the maximum pool leaves, by alpha² a block
        assert abs(b - a - 0.04) < 0.02


def test_skipinit_s_block_starts_as_the_identity() -> None:
    x = data(2, 8, 6, 6)
    assert torch.equal(net("skipinit_block(8)(x)", C=8, H=6, W=6)(x), x)
    assert not torch.allclose(net("skipinit_block(8, skip = 1)(x)", C=8, H=6, W=6)(x), x)


def resnet_size(depths: list[int], widths: list[int], stem: int, classes: int) -> int:
    """By hand: kernels, a gain and an offset for each unit, a skip gain for each block, the last layer."""

    def conv(k: int, a: int, b: int) -> int:
        return k * k * a * b + 2 * b

    total, before = conv(7, 3, stem), stem
    for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for i in range(depth):
            inner = width // 4
            total += conv(1, before, inner) + conv(3, inner, inner) + conv(1, inner, width) + 1
            total += conv(1, before, width) if before != width or (s > 0 and i == 0) else 0
            before = width
    return total + before * classes + classes


WIDTHS = [256, 512, 1024, 2048]


@pytest.mark.parametrize(("name", "depths", "numbers"), [
    ("nf_resnet50", [3, 4, 6, 3], 25_557_048), ("nf_resnet101", [3, 4, 23, 3], 44_549_193),
    ("nf_resnet152", [3, 8, 36, 3], 60_192_808 + 50),  # torchvision's ResNet-152 and a gain for each block
    pytest.param("nf_resnet200", [3, 24, 36, 3], None, marks=pytest.mark.slow),
    pytest.param("nf_resnet288", [24] * 4, None, marks=pytest.mark.slow),
])  # fmt: skip
def test_published_sizes(name: str, depths: list[int], numbers: int | None) -> None:
    """The presets; NF-ResNet-50 and 101 as published."""
    expected = resnet_size(depths, WIDTHS, 64, 1000)
    assert numbers in (None, expected)
    with torch.device("meta"):
        assert count(net(f"{name}(x)", torch.float32, C=3, H=64, W=64)) == expected


def test_stochastic_depth() -> None:
    """A sample's branch is left out with the given probability while training, not scaled; never at inference. Rates grow from 0 by
    the block's index over their number."""
    mine = net("nf_block(8, skip = 1, drop = 0.4)(x)", C=8, H=3, W=3)
    x = data(400, 8, 3, 3)
    whole = mine.eval()(x)
    torch.manual_seed(0)
    found = mine.train()(x)
    gone = (found == x).flatten(1).all(1)
    assert torch.equal(found[~gone], whole[~gone])
    assert 0.33 < float(gone.double().mean()) < 0.47
    text = "nf_resnet(depths = [2, 2], widths = [8, 8], stem = 8, classes = 5, skip = 1, drop = 0.8)(x)"
    mine = net(text, C=3, H=16, W=16)
    x = data(300, 3, 16, 16)
    first, second = (outputs(mine, "nf_block", x) for _ in range(2))
    torch.testing.assert_close(first[0], second[0])  # rate 0
    for k in (1, 3):  # blocks without a transition: 0.8 k / 4
        same = (first[k] == first[k - 1]).flatten(1).all(1).double().mean()
        assert abs(float(same) - 0.2 * k) < 0.08


def test_dropout() -> None:
    mine = net("dropout(0.3)(x)", T=3, D=50)
    x = data(40, 3, 50)
    assert torch.equal(mine.eval()(x), x)
    torch.manual_seed(0)
    y = mine.train()(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    assert abs(float(kept.double().mean()) - 0.7) < 0.02


def test_nf_regnet_sizes() -> None:
    """timm's numbers with SkipInit (they round widths to multiples of 8): B0, B1, B5. The authors' own widths give fewer."""
    for name, numbers in (
        ("nf_regnet", 8_764_304),
        ("nf_regnet_b1", 10_224_004),
        ("nf_regnet_b5", 49_741_766),
        ("nf_regnet(multiple = 1)", 8_609_856),
    ):
        with torch.device("meta"):
            assert count(net(f"{name}(x)", torch.float32, C=3, H=64, W=64)) == numbers


def test_nf_regnet_keeps_its_signal_and_trains() -> None:
    """Items 4 and 6 for NF-RegNet: channels' squared means stay small, and no sample sees another. (Its shortcuts take means of
    places, so that white noise, as which item 3 is measured, loses variance at each transition.)"""
    mine = net("nf_regnet([1, 1, 4], [48, 104, 208], classes = 5, skip = 1)(x)", torch.float32, C=3, H=64, W=64)
    x = data(16, 3, 64, 64, dtype=torch.float32)
    found, means = plot(outputs(mine, "nf_regnet_block", x))
    assert all(a < b for a, b in pairwise(found[2:]))
    assert max(means) < 0.05
    small = net("nf_regnet([1, 1], [16, 32], classes = 5)(x)", torch.float32, C=3, H=32, W=32)
    x, y = data(16, 3, 32, 32, dtype=torch.float32), torch.arange(16) % 5
    torch.testing.assert_close(small(x[:2]), small(x)[:2], rtol=1e-5, atol=1e-6)
    opt = torch.optim.SGD(small.parameters(), 0.05)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(small(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_it_exports_with_standardised_kernels(tmp_path: Path) -> None:
    body = "nf_resnet(depths = [2, 2], widths = [16, 32], stem = 16, classes = 5, se = true, skip = 1)(x)"
    mine = net(body, torch.float32, C=3, H=32, W=32).eval()
    x = data(2, 3, 32, 32, dtype=torch.float32)
    found, ops = in_onnx(mine, x, tmp_path)
    torch.testing.assert_close(torch.as_tensor(found), mine(x).detach(), rtol=1e-4, atol=1e-5)
    assert not {"Sqrt", "Max"} & set(ops)


def test_a_step_of_training_lowers_the_loss() -> None:
    mine = net(
        "nf_resnet(depths = [1, 1], widths = [16, 32], stem = 16, classes = 5)(x)", torch.float32, C=3, H=32, W=32
    )
    x, y = data(16, 3, 32, 32, dtype=torch.float32), torch.arange(16) % 5
    opt = torch.optim.SGD(mine.parameters(), 0.05)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(mine(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
