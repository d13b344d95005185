"""Entries that timm has as layers or networks: equal values, gradients and numbers of parameters.

Skipped where timm cannot be imported. It is no extra of the project: it needs torchvision, whose wheel on PyPI is built for CUDA
and does not run beside torch's for processors (2026-11).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.catalogue.nets import count, data, net, shaken

try:
    import timm
except Exception as e:  # a torchvision of another build ends in a RuntimeError
    pytest.skip(f"timm cannot be imported: {e}", allow_module_level=True)

IMAGE = {"C": 8, "H": 5, "W": 4}
NORMS = {
    "evonorm_b0(eps = 1e-3)": ("EvoNorm2dB0", {}), "evonorm_b1()": ("EvoNorm2dB1", {"eps": 1e-5}), "evonorm_b2()": ("EvoNorm2dB2", {"eps": 1e-5}),
    "evonorm_s0(4)": ("EvoNorm2dS0", {"groups": 4}), "evonorm_s1(4)": ("EvoNorm2dS1", {"groups": 4}),
    "evonorm_s2(4)": ("EvoNorm2dS2", {"groups": 4}), "group_norm[C](4)": ("GroupNorm", {"num_groups": 4}),
    "batch_norm_2d()": ("BatchNorm2d", {}),
}  # fmt: skip
NAMES = {"gamma": "weight", "beta": "bias", "v": "v"}


def layer(name: str, channels: int, **options: Any) -> Any:
    return (nn.BatchNorm2d if name == "BatchNorm2d" else getattr(timm.layers, name))(channels, **options).double()


def agree(mine: Any, other: Any, x: Tensor, pairs: list[tuple[Tensor, Tensor]], tolerance: float = 1e-9) -> None:
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = mine(a), other(b)
    torch.testing.assert_close(y, z.reshape(y.shape), rtol=tolerance, atol=tolerance)
    weight = data(*y.shape, seed=3)
    found = torch.autograd.grad((y * weight).sum(), [a, *(p for p, _ in pairs)])
    wanted = torch.autograd.grad((z.reshape(y.shape) * weight).sum(), [b, *(q for _, q in pairs)])
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.reshape(w.shape), w, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("call", NORMS)
def test_norms(call: str) -> None:
    name, options = NORMS[call]
    mine, other = shaken(net(f"{call}(x)", **IMAGE)), layer(name, 8, **options)
    own = {n.split(".")[-1]: p for n, p in mine.named_parameters()}
    pairs = [(p, getattr(other, NAMES[n])) for n, p in own.items()]
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p)
    for training in (True, True, False):
        mine.train(training), other.train(training)
        # EvoNorms there take their statistics in float32.
        agree(mine, other, data(6, *IMAGE.values(), seed=5) + 0.5, pairs, 1e-5 if "evonorm" in call else 1e-9)


def test_rms_norm_and_layer_norm() -> None:
    for call, name in (("rms_norm[D](eps = 1e-6)", "RmsNorm"), ("layer_norm[D](eps = 1e-6)", "LayerNorm")):
        mine, other = shaken(net(f"{call}(x)", T=3, D=8)), layer(name, 8)
        pairs = list(zip(mine.parameters(), other.parameters(), strict=True))
        with torch.no_grad():
            for p, q in pairs:
                q.copy_(p)
        agree(mine, other, data(4, 3, 8), pairs)


@pytest.mark.parametrize("kind", ["StdConv2d", "ScaledStdConv2d"])
def test_standardised_convolutions(kind: str) -> None:
    """timm adds its eps to the variance; at 1e-12 it does not matter. Its scaled form has the gain 1 / sqrt(fan) outside."""
    call = "ws_conv(6, bias = true)" if kind == "StdConv2d" else "scaled_ws_conv(6)"
    mine = shaken(net(f"{call}(x)", C=4, H=6, W=6))
    options = {"gamma": 1.0} if kind == "ScaledStdConv2d" else {}
    other = getattr(timm.layers, kind)(4, 6, 3, padding=1, bias=True, eps=1e-12, **options).double()
    own = dict(mine.named_parameters())
    weight = next(p for n, p in own.items() if n.endswith("conv_weight"))
    bias = next(p for n, p in own.items() if n.endswith("conv_bias"))
    pairs = [(weight, other.weight), (bias, other.bias)]
    gain = next((p for n, p in own.items() if n.endswith(".g")), None)
    if gain is not None:
        pairs.append((gain, other.gain))
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p.reshape(q.shape))
    if kind == "StdConv2d":  # its deviation divides by n, ours by n - 1 as the paper's code
        x = data(3, 4, 6, 6)
        n = weight[0].numel()
        torch.testing.assert_close(
            (mine(x) - bias[:, None, None]) * (n / (n - 1)) ** 0.5, other(x) - bias[:, None, None], rtol=1e-4, atol=1e-4
        )
    else:
        agree(mine, other, data(3, 4, 6, 6), pairs)


def test_nf_regnet() -> None:
    """NF-RegNet-B0 with timm's options for the authors' form: gain on the activation, SkipInit."""
    other = (
        timm.create_model("nf_regnet_b0", skipinit=True, gamma_in_act=True, std_conv_eps=1e-13, num_classes=7)
        .double()
        .eval()
    )
    mine = shaken(net("nf_regnet(classes = 7, skip = 0.5)(x)", C=3, H=64, W=64), 0.05)
    convs = [m for m in mine.modules() if hasattr(m, "conv_weight")]
    theirs = [m for m in other.modules() if isinstance(m, timm.layers.ScaledStdConv2d)]
    assert len(convs) == len(theirs)
    with torch.no_grad():
        for m, o in zip(convs, theirs, strict=True):
            o.weight.copy_(m.conv_weight)
            o.bias.copy_(m.conv_bias)
            o.gain.copy_(m.scaled_weight_standardization.g.reshape(o.gain.shape))
        for m, o in zip(
            [m for m in mine.modules() if type(m).__name__.startswith("SqueezeExciteWide")],
            [m for m in other.modules() if type(m).__name__.startswith("SE")], strict=True,
        ):  # fmt: skip
            for p, q in zip(m.parameters(), o.parameters(), strict=True):
                q.copy_(p.reshape(q.shape))
        for m, o in zip(
            [m for m in mine.modules() if hasattr(m, "skip_gain")],
            [m for m in other.modules() if hasattr(m, "skipinit_gain")],
            strict=True,
        ):
            o.skipinit_gain.copy_(m.skip_gain)
        other.head.fc.weight.copy_(mine.nf_regnet.linear_weight)
        other.head.fc.bias.copy_(mine.nf_regnet.linear_bias)
    x = data(2, 3, 64, 64)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("b", range(6))
def test_nf_regnet_counts(b: int) -> None:
    with torch.device("meta"):
        mine = net(f"nf_regnet{f'_b{b}' if b else ''}(x)", torch.float32, C=3, H=64, W=64)
        other = timm.create_model(f"nf_regnet_b{b}", skipinit=True)
    assert count(mine) == count(other)
