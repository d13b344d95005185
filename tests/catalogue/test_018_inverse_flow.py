"""Card 018, Inverse-Flow (Nagar & Varma 2025): what must hold, item by item."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from tests.catalogue.corner import (
    by_hand,
    generator,
    images,
    jacobian,
    kernel_of,
    learns_from_pixels,
    rounds,
    same_in_onnx,
    step,
)


def words(k: int = 3, right: bool = False, bottom: bool = False) -> str:
    return f"inv_conv({k}, {str(right).lower()}, {str(bottom).lower()})"


def unrolled(x: Tensor, kernel: Tensor) -> Tensor:
    """Forward substitution, place after place and channel after channel, every step seen by autograd."""
    _, c, h, w = x.shape
    k = kernel.shape[-1]
    z: list[list[list[Tensor]]] = [[[torch.zeros(())] * c for _ in range(w)] for _ in range(h)]
    for i in range(h):
        for j in range(w):
            for o in range(c):
                total = x[:, o, i, j]
                for a in range(k):
                    for b in range(k):
                        p, q = i - k + 1 + a, j - k + 1 + b
                        if p < 0 or q < 0:
                            continue
                        for m in range(c if (p, q) != (i, j) else o):
                            total = total - kernel[o, m, a, b] * z[p][q][m]
                z[i][j][o] = total
    return torch.stack([torch.stack([torch.stack(r, -1) for r in row], -1) for row in z], 0).permute(2 - 1, 2, 0, 3)


def test_item_1_the_inverse_is_one_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = step(words(), 2, 8, 8)
    x = images(3, 2, 8, 8)
    z, log_det = flow(x)
    assert (flow.inverse(z)[0] - x).abs().max() < 1e-5
    assert log_det.abs().max() == 0
    assert torch.allclose(by_hand(z, kernel_of(flow.inv_conv.corner_conv)), x, atol=1e-9)
    with torch.no_grad():
        assert rounds(monkeypatch, flow, lambda: flow.inv_conv.inverse_value(z)) == 1
    small = step(words(), 2, 4, 4)
    dense = jacobian(lambda v: small(v)[0], images(2, 4, 4))
    assert abs(torch.linalg.slogdet(dense)[1]) < 1e-6


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_item_2_equals_the_dense_solve(channels: int) -> None:
    flow = step(words(), channels, 6, 6)
    x = images(4, channels, 6, 6)
    kernel = kernel_of(flow.inv_conv.corner_conv).detach()
    toeplitz = torch.autograd.functional.jacobian(lambda v: by_hand(v[None], kernel)[0], x[0]).reshape(
        36 * channels, -1
    )
    solved = torch.linalg.solve(toeplitz, x.flatten(1).mT).mT.reshape(x.shape)
    assert (flow(x)[0] - solved).abs().max() < 1e-6


def test_item_3_gradients() -> None:
    """Of x and of the kernel, against autodiff through the unrolled substitution and against finite differences."""
    flow = step(words(), 2, 4, 4)
    conv = flow.inv_conv.corner_conv
    x, weight = images(2, 2, 4, 4).requires_grad_(), images(2, 2, 4, 4, seed=5)
    z = flow(x)[0]
    found = torch.autograd.grad((z * weight).sum(), [x, conv.K, conv.L.lower])
    v = x.detach().clone().requires_grad_()
    reference = unrolled(v, kernel_of(conv))
    assert torch.allclose(reference, z, atol=1e-12)
    expected = torch.autograd.grad((reference * weight).sum(), [v, conv.K, conv.L.lower])
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() < 1e-5
    for p, g in ((conv.K, found[1]), (conv.L.lower, found[2])):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in p.shape)):
            key, eps = tuple(place.tolist()), 1e-6
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p[key] += sign * eps
                    ends.append(float((flow(x)[0] * weight).sum()))
                    p[key] -= sign * eps
            assert abs((ends[0] - ends[1]) / (2 * eps) - float(g[key])) < 1e-5
    assert torch.equal(found[2].triu(), torch.zeros(2, 2, dtype=torch.float64))  # the fixed entries of the last tap


def test_item_3_the_cards_formula() -> None:
    """dl/dx = L^-T g, and dl/dW is minus the correlation of dl/dx with z."""
    flow = step(words(), 2, 5, 5)
    conv = flow.inv_conv.corner_conv
    x, weight = images(3, 2, 5, 5).requires_grad_(), images(3, 2, 5, 5, seed=6)
    z = flow(x)[0]
    dx, dk = torch.autograd.grad((z * weight).sum(), [x, conv.K])
    padded = torch.nn.functional.pad(z.detach(), (2, 0, 2, 0))
    for t in range(8):
        m, n = divmod(t, 3)
        expected = -torch.einsum("boij,bcij->oc", dx, padded[:, :, m : m + 5, n : n + 5])
        assert torch.allclose(dk[t], expected, atol=1e-10)


@pytest.mark.parametrize("n", [4, 8, 16])
def test_item_4_stages(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """H + W - 1 rounds forward; backward the same recursion, which ends as soon as a round changes nothing."""
    flow = step(words(), 2, n, n, size=0.2)
    x = images(2, 2, n, n)
    with torch.no_grad():
        assert rounds(monkeypatch, flow, lambda: flow.inv_conv.corner_conv.inverse_value(x)) == 2 * n - 1
    z = flow.inv_conv.corner_conv.inverse_value(x.requires_grad_())
    real, count = torch.autograd.grad, [0]

    def counting(*args: Any, **more: Any) -> Any:
        count[0] += 1
        return real(*args, **more)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    z.square().sum().backward()
    assert n <= count[0] <= 2 * n - 1


def test_item_4_the_compiler_reports_the_depth() -> None:
    found = []
    for n in (8, 16, 32):
        text = f"flow f {{\n data x: R[C = 2, H = {n}, W = {n}]\n {words()}\n base normal\n}}\n"
        said = next(d for d in fl.info(text) if d["name"] == "f")
        assert said["rounds"] == {"forward": 2 * n - 1, "inverse": 0}
        found.append(said["rounds"]["forward"])
    assert found[1] / found[0] == pytest.approx(2, abs=0.1)
    assert found[2] / found[1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("right", "bottom"), [(False, False), (True, False), (False, True), (True, True)])
def test_item_5_and_7_inverse_of_the_corner_convolution_in_every_order(right: bool, bottom: bool) -> None:
    inv = step(words(3, right, bottom), 2, 5, 4)
    kernel = kernel_of(inv.inv_conv.corner_conv)
    x = images(3, 2, 5, 4)
    assert torch.allclose(by_hand(inv(x)[0], kernel, right, bottom), x, atol=1e-9)
    assert torch.allclose(inv(by_hand(x, kernel, right, bottom))[0], x, atol=1e-9)
    plain = step(words(), 2, 5, 4)
    plain.load_state_dict(inv.state_dict())  # the kernel is stored unflipped
    flips = [d for d, f in ((-1, right), (-2, bottom)) if f]
    assert torch.allclose(inv(x)[0], plain(x.flip(flips))[0].flip(flips), atol=1e-12)


def test_item_5_against_cards_008_kernel() -> None:
    conv, inv = step("corner_conv", 2, 5, 5), step(words(), 2, 5, 5)
    inv.load_state_dict(dict(zip(inv.state_dict(), conv.state_dict().values(), strict=True)))
    x = images(3, 2, 5, 5)
    assert torch.allclose(inv(conv(x)[0])[0], x, atol=1e-9)
    assert torch.allclose(conv(inv(x)[0])[0], x, atol=1e-9)


def test_item_6_identity_and_kernel_1() -> None:
    flow = step(words(), 2, 5, 5)
    with torch.no_grad():
        for p in flow.parameters():
            p.zero_()
    x = images(3, 2, 5, 5)
    assert torch.equal(flow(x)[0], x)
    one = step(words(1), 3, 4, 4)
    x = images(2, 3, 4, 4)
    expected = torch.linalg.solve_triangular(
        one.inv_conv.corner_conv.L(), x.flatten(2), upper=False, unitriangular=True
    )
    assert torch.allclose(one(x)[0], expected.reshape(x.shape), atol=1e-9)


def test_item_8_stability() -> None:
    flow = step(words(), 1, 12, 12, size=0.0)
    taps = images(8, 1, 1, seed=7)
    for mass in (0.3, 0.9):
        with torch.no_grad():
            flow.inv_conv.corner_conv.K.copy_(taps * mass / taps.abs().sum())
        x = images(16, 1, 12, 12)
        ratio = flow(x)[0].abs().amax((1, 2, 3)) / x.abs().amax((1, 2, 3))
        assert ratio.max() <= 1 / (1 - mass)


def test_start_is_the_identity_with_xaviers_noise() -> None:
    flow = fl.compile("flow f {\n data x: R[C = 16, H = 4, W = 4]\n inv_conv\n base normal\n}\n", seed=0)
    kernel = kernel_of(flow.inv_conv.corner_conv).detach()
    noise = kernel[..., :-1, :]
    assert abs(float(noise.std()) / (0.01 * math.sqrt(2 / (2 * 16 * 9))) - 1) < 0.1
    assert torch.equal(kernel[..., -1, -1].diagonal(), torch.ones(16))


def test_trains() -> None:
    flow: Any = fl.compile("flow f = inverse_flow_tiny\n", seed=0)
    assert flow.exactness == "lower bound"
    x = torch.randint(0, 256, (8, 3, 8, 8), generator=generator(2)).float()
    learns_from_pixels(flow, x, 5)


def test_the_small_flow_round_trips() -> None:
    flow = fl.compile("flow f = inverse_flow_small(size = 8, depth = 2)\n", seed=0, dtype=torch.float64)
    x = torch.randint(0, 256, (4, 1, 8, 8), generator=generator(4)).double()
    z = flow(x)[0]
    assert torch.equal(flow.inverse(z)[0], x)


def count(levels: int, depth: int, channels: int, k: int, width: int) -> int:
    """Declared parameters, layer by layer."""

    def coupling(c: int) -> int:
        a, b = c - c // 2, c // 2
        return a * width * 9 + width * 2 * a + 2 * a * 2 * b * 9 + 4 * b

    total, c = 0, channels
    for level in range(levels):
        c *= 4
        total += depth * (c * c * k * k + 2 * c + c * c + coupling(c))
        if level < levels - 1:
            total += coupling(c)
            c //= 2
    return total


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [("inverse_flow_tiny", (2, 2, 3, 3, 16)), ("inverse_flow_cifar10", (3, 28, 3, 3, 512)), ("inverse_flow_mnist", (2, 16, 1, 3, 512))],
)  # fmt: skip
def test_parameters_of_the_presets(preset: str, sizes: tuple[int, int, int, int, int]) -> None:
    """No count is stated in the card; these follow from the sizes of the authors' scripts."""
    assert fl.check(f"flow p = {preset}\nrequire parameters(p) == {count(*sizes)}\n").ok


def test_onnx(tmp_path: Path) -> None:

    flow = step("inverse_flow_steps(2, 1, 3, 8)", 3, 4, 4, size=0.2, dtype=torch.float32).eval()
    x = images(5, 3, 4, 4, dtype=torch.float32)
    same_in_onnx(flow, x, tmp_path)


def test_the_layer_alone() -> None:
    """`inv_conv_layer`, a net: the same solve as the bijector's, and its own gradient by finite differences."""
    layer: Any = fl.compile(
        "net n(x: R[C = 2, H = 4, W = 4]) { inv_conv_layer(x) }\n", flow="n", seed=0, dtype=torch.float64
    )
    flow: Any = fl.compile(
        "flow f {\n data x: R[C = 2, H = 4, W = 4]\n inv_conv\n base normal\n}\n", seed=0, dtype=torch.float64
    )
    with torch.no_grad():
        for a, b in zip(layer.parameters(), flow.parameters(), strict=True):
            a.copy_(b + 0.1)
            b.copy_(a)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(layer(x), flow(x)[0], rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(layer, x)
