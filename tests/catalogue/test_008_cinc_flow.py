"""Card 008, CInC Flow (Nagar et al. 2021): what must hold, item by item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flowlang as fl
from tests.catalogue.corner import by_hand, generator, images, jacobian, kernel_of, rounds, same_in_onnx, step


def raster(y: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """x with conv(x) + bias = y, place after place in raster order."""
    n, c, h, w = y.shape
    k = kernel.shape[-1]
    x = torch.zeros(n, c, h + k - 1, w + k - 1, dtype=y.dtype)
    inverse = torch.linalg.inv(kernel[:, :, -1, -1])
    for i in range(h):
        for j in range(w):
            window = x[:, :, i : i + k, j : j + k]
            seen = torch.einsum("bcmn,ocmn->bo", window, kernel)  # the place itself is still 0
            x[:, :, i + k - 1, j + k - 1] = (y[:, :, i, j] - bias - seen) @ inverse.mT
    return x[:, :, k - 1 :, k - 1 :]


def test_item_1_round_trip_and_both_algorithms() -> None:
    tiny: Any = fl.compile("flow f = cinc_tiny\n", seed=0)
    x = images(3, 1, 16, 16, dtype=torch.float32) / 4
    assert (tiny.inverse(tiny(x)[0])[0] - x).abs().max() < 1e-5
    flow = step("cinc_conv", 3, 6, 5)
    y = images(4, 3, 6, 5)
    conv = flow.cinc_conv.corner_conv
    with torch.no_grad():
        assert (flow.inverse(y)[0] - raster(y, kernel_of(conv), conv.b)).abs().max() < 1e-6


@pytest.mark.parametrize("tap", ["triangular", "dense"])
@pytest.mark.parametrize("channels", [2, 3])
def test_item_2_log_det(channels: int, tap: str) -> None:
    flow = step(f"cinc_conv(tap = {tap})", channels, 4, 4, size=1.0)
    conv = flow.cinc_conv.corner_conv
    x = images(channels, 4, 4)
    dense = torch.linalg.slogdet(jacobian(lambda v: flow(v)[0], x))[1]
    corner = conv.L()
    expected = torch.linalg.slogdet(corner)[1] if tap == "dense" else corner.diagonal().abs().log().sum()
    assert abs(flow(x)[1] - dense) < 1e-5
    assert abs(16 * expected - dense) < 1e-5
    assert abs(expected) > 1e-3


def test_item_3_singular_exactly_if_the_tap_is() -> None:
    kernel = images(3, 3, 3, 3) * 0.3
    kernel[:, :, -1, -1] = torch.eye(3, dtype=torch.float64) + kernel[:, :, -1, -1].tril(-1)
    full = jacobian(lambda v: by_hand(v[None], kernel)[0], images(3, 4, 4))
    assert torch.linalg.matrix_rank(full) == 48
    broken = kernel.clone()
    broken[1, 1, -1, -1] = 0.0
    singular = jacobian(lambda v: by_hand(v[None], broken)[0], images(3, 4, 4))
    assert torch.linalg.matrix_rank(singular) < 48
    same = jacobian(lambda v: F.conv2d(v[None], kernel, padding=1)[0], images(3, 4, 4))  # the usual padding
    assert abs(torch.linalg.slogdet(same)[1] - torch.linalg.slogdet(full)[1]) > 1e-2


def test_item_4_sparsity() -> None:
    flow = step("cinc_conv", 2, 4, 5)
    found = torch.autograd.functional.jacobian(lambda v: flow(v)[0], images(2, 4, 5))
    i, j = torch.arange(4), torch.arange(5)
    allowed = (i[:, None] >= i)[:, None, :, None] & (j[:, None] >= j)[None, :, None, :]
    reads = found.permute(1, 2, 4, 5, 0, 3).abs().amax((-2, -1)) > 0
    assert not (reads & ~allowed).any()
    near = allowed & ((i[:, None] - i) < 3)[:, None, :, None] & ((j[:, None] - j) < 3)[None, :, None, :]
    assert torch.equal(reads, near)


def test_item_5_kernel_1_is_a_1x1_convolution() -> None:
    flow = step("cinc_conv(1, tap = dense)", 3, 4, 5, size=1.0)
    conv, x = flow.cinc_conv.corner_conv, images(2, 3, 4, 5)
    expected = torch.einsum("oc,bchw->bohw", conv.L(), x) + conv.b[:, None, None]
    assert torch.allclose(flow(x)[0], expected, atol=1e-12)
    assert torch.allclose(flow(x)[1], (20 * torch.linalg.slogdet(conv.L())[1]).expand(2), atol=1e-9)


def test_item_6_two_corners_see_both_sides() -> None:
    flow = step("cinc_conv\n cinc_conv(3, true, true)", 2, 5, 5, size=1.0)
    x = images(2, 5, 5).requires_grad_()
    (seen,) = torch.autograd.grad(flow(x)[0][:, 2, 2].sum(), x)
    assert (seen != 0).any(0).all()
    first, second = flow.cinc_conv.corner_conv, flow.cinc_conv_2.corner_conv
    expected = 25 * sum(c.L().diagonal().log().sum() for c in (first, second))
    assert abs(flow(x)[1] - expected) < 1e-9


def test_item_7_quad_coupling() -> None:
    flow = step("quad_coupling(zero_conv_net(8), zero_conv_net(8), zero_conv_net(8))", 8, 3, 3, size=1.0)
    quad, x = flow.quad_coupling, images(3, 8, 3, 3)
    y, log_det = flow(x)
    assert (flow.inverse(y)[0] - x).abs().max() < 1e-9
    z = x.chunk(4, 1)
    parts, total = [z[0]], torch.zeros(3, dtype=torch.float64)
    for k, net in enumerate((quad.f1, quad.f2, quad.f3), 1):
        h = net(torch.cat(z[:k], 1))
        scale = torch.sigmoid(h[:, 1::2] + 2)
        parts.append((z[k] + h[:, 0::2]) * scale)
        total = total + scale.log().sum((1, 2, 3))
    assert torch.allclose(y, torch.cat(parts, 1), atol=1e-12)
    assert torch.allclose(log_det, total, atol=1e-9)
    found = torch.autograd.functional.jacobian(lambda v: flow(v)[0], x[0]).reshape(4, 18, 4, 18)
    blocks = found.abs().amax((1, 3)) > 0
    assert torch.equal(blocks, torch.ones(4, 4, dtype=torch.bool).tril())
    with (
        torch.no_grad()
    ):  # f1 and f2 give shift 0 and a large scale: the last group alone moves, as in a coupling of two groups
        for net in (quad.f1, quad.f2):
            for p in net.parameters():
                p.zero_()
            last = next(p for n, p in net.named_parameters() if "zero_conv" in n and n.endswith("bias"))
            last[1::2] = 60.0
    y = flow(x)[0]
    assert torch.equal(y[:, :6], x[:, :6])
    h = quad.f3(x[:, :6])
    assert torch.allclose(y[:, 6:], (x[:, 6:] + h[:, 0::2]) * torch.sigmoid(h[:, 1::2] + 2), atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (5, 3)])
def test_item_8_stages(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = step("cinc_conv", 2, height, width)
    y = images(2, 2, height, width)
    with torch.no_grad():
        assert rounds(monkeypatch, flow, lambda: flow.cinc_conv.corner_conv.inverse_value(y)) == height + width - 1
    text = f"flow f {{\n data x: R[C = 2, H = {height}, W = {width}]\n cinc_conv\n base normal\n}}\n"
    said = next(d for d in fl.info(text) if d["name"] == "f")
    assert said["rounds"] == {"forward": 0, "inverse": height + width - 1}


def test_start() -> None:
    flow = fl.compile("flow f {\n data x: R[C = 12, H = 4, W = 4]\n cinc_conv\n base normal\n}\n", seed=0)
    conv = flow.cinc_conv.corner_conv
    assert abs(float(conv.K.detach().std()) / 0.02 - 1) < 0.1
    assert torch.allclose(conv.L().diagonal(), torch.ones(12))
    assert conv.b.abs().max() == 0


def test_the_densities_of_learned_priors() -> None:
    """The whole flow by change of variables, priors between scales and at the top included."""
    flow = step_flow()
    x = images(2, 1, 4, 4)

    def parts(v: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in flow(v)[:-1]])

    for one, found in zip(x, flow.log_prob(x), strict=True):
        dense = torch.autograd.functional.jacobian(parts, one).reshape(16, 16)
        z, left, _ = flow(one)
        # The first half, which the prior of what left is made of, is the input of the second scale.
        a = unsqueezed(flow, z)
        h = flow.zero_conv_factor_out.zero_conv(a)
        prior = torch.distributions.Normal(h[0::2], h[1::2].exp()).log_prob(left).sum()
        top = (
            torch.distributions.Normal(flow.mean[:, None, None], flow.log_scale.exp()[:, None, None]).log_prob(z).sum()
        )
        assert abs(found - (prior + top + torch.linalg.slogdet(dense)[1])) < 1e-8


def step_flow() -> Any:
    from flowlang.verify import perturb

    flow = fl.compile(
        "flow f = cinc_glow(channels = 1, size = 4, levels = 2, depth = 1, hidden = 4)\n", seed=0, dtype=torch.float64
    )
    perturb(flow, generator(3), 0.3)
    return flow


def unsqueezed(flow: Any, z: Tensor) -> Tensor:
    """What went into the second scale: its steps undone."""
    steps = [m for n, m in flow.named_children() if n.startswith("cinc_step")]
    x = steps[1].inverse(z)[0]
    return x.reshape(2, 2, 2, 1, 1).permute(0, 3, 1, 4, 2).reshape(2, 2, 2)


def test_trains() -> None:
    flow = fl.compile("flow f = cinc_tiny\n", seed=0)
    x = torch.rand(16, 1, 16, 16, generator=generator(2)) - 0.5
    flow.initialise(x)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.isfinite(flow.sample((2,), generator=generator(3))).all()


def count(levels: int, depth: int, channels: int, width: int) -> int:
    """Declared parameters, layer by layer."""

    def net(a: int, out: int) -> int:
        return a * width * 9 + width + width * width + width + width * out * 9 + 2 * out

    total, c = 0, channels
    for level in range(levels):
        c *= 4
        q = c // 4
        total += depth * (2 * c + c * c * 9 + c + c * c + net(q, 2 * q) + net(2 * q, 2 * q) + net(3 * q, 2 * q))
        if level < levels - 1:
            total += c // 2 * c * 9 + 2 * c
            c //= 2
    return total + 2 * c


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [("cinc_tiny", (1, 2, 1, 16)), ("cinc_cifar10", (3, 32, 3, 512)), ("cinc_imagenet32", (3, 48, 3, 512))],
)
def test_parameters_of_the_presets(preset: str, sizes: tuple[int, int, int, int]) -> None:
    """Published counts are marked unsure in the card; these follow from the sizes of the authors' commands."""
    assert fl.check(f"flow p = {preset}\nrequire parameters(p) == {count(*sizes)}\n").ok


def test_onnx(tmp_path: Path) -> None:

    flow = step_flow().float().eval()
    x = images(3, 1, 4, 4, dtype=torch.float32)
    same_in_onnx(flow, x, tmp_path)
