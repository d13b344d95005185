"""Card 032: PowerNorm (Shen et al. 2020). Tests carry the card's item numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from tests.catalogue.norms import count, data, gradient, norm, part, runs_in_onnx, trains

AB = 0.9


def power(warmup: int = 4, group: int = 0, moved: float = 0.0, channels: int = 8) -> Any:
    return norm(f"power_norm(warmup = {warmup}, group = {group})", moved=moved, C=channels)


def core(module: Any) -> Any:
    return part(module, "PowerNormCore")


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean(0)


def test_item_1_pn_v_and_its_exact_gradient() -> None:
    module = norm("power_norm_v(eps = 1e-12)", moved=0.3, C=8)
    m = part(module, "PowerNormV")
    x, dy = data(64, 8, shift=0.5), data(64, 8, seed=1)
    hat = x / mean_square(x).sqrt()
    assert torch.allclose(module(x), m.gamma * hat + m.beta)
    g = m.gamma.detach() * dy
    dx = gradient(module, x, dy)
    assert torch.allclose(dx, (g - (g * hat).mean(0) * hat) / mean_square(x).sqrt(), atol=1e-6)
    assert (dx * hat).mean(0).abs().max() < 1e-6 * dx.abs().max()


def test_item_2_warm_up_is_pn_v() -> None:
    module, other = power(), norm("power_norm_v()", C=8)
    for seed in range(4):
        x = data(64, 8, seed=seed, scale=seed + 1)
        assert torch.allclose(module(x), other(x), atol=1e-6)
    x = data(64, 8, seed=9)
    assert not torch.allclose(module(x), other(x), atol=1e-3)


def test_the_running_mean_square_is_the_code_s() -> None:
    """Cumulative mean before `warmup`, then always the exponential one; both while warming up."""
    module = power(warmup=3)
    phi = torch.ones(8, dtype=torch.float64)
    for step in range(1, 7):
        x = data(64, 8, seed=step, scale=step)
        q = mean_square(x)
        used = q if step <= 3 else phi
        assert torch.allclose(module(x), x / (used + 1e-5).sqrt())
        if step < 3:
            phi = phi * (step - 1) / step + q / step
        phi = 0.9 * phi + 0.1 * q
        assert torch.allclose(core(module).phi, phi)
    assert int(core(module).iters) == 6


def test_item_3_a_constant_stream_settles() -> None:
    module = power()
    x = data(64, 8, scale=2)
    for _ in range(200):
        y = module(x)
    assert torch.allclose(core(module).phi, mean_square(x), rtol=1e-4)
    assert torch.allclose(module.eval()(x), y, atol=1e-5)


def test_item_4_the_backward_pass_is_its_own() -> None:
    module = power(warmup=0, moved=0.3)
    x, dy = data(64, 8), data(64, 8, seed=1)
    gamma = part(module, "PowerNorm").gamma.detach()
    for seed in range(3):
        gradient(module, data(64, 8, seed=seed + 5), data(64, 8, seed=seed + 8))
    m = core(module)
    phi, nu = m.phi.clone(), m.nu.clone()
    assert nu.abs().min() > 0
    z, g = x / (phi + 1e-5).sqrt(), gamma * dy
    dx = gradient(module, x, dy)
    expected = (g - (1 - AB) * nu * z) / (mean_square(x) + 1e-5).sqrt()
    assert torch.allclose(dx, expected, atol=1e-7)
    assert (dx - g / (phi + 1e-5).sqrt()).abs().max() > 1e-3
    assert torch.allclose(m.nu, nu + ((g - (1 - AB) * nu * z) * z).mean(0))


def test_item_4_at_inference_the_map_is_differentiated() -> None:
    module = power(warmup=0)
    module(data(64, 8))
    module.eval()
    x = data(64, 8, seed=1)
    assert torch.allclose(gradient(module, x), torch.ones_like(x) / (core(module).phi + 1e-5).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("constant", [True, False])
def test_item_5_the_second_statistic_is_bounded(constant: bool) -> None:
    """|ν| stays below 1 / (1 - ab) over 5000 steps where the mean of g z is at most 1 and that of z² is 1."""
    module = power(warmup=10**6, channels=1)
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    x.requires_grad_()
    size = torch.ones(5000) if constant else torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    largest = 0.0
    for k in range(5000):
        module(x).backward(float(size[k]) * x.detach())  # the mean of g z is `size`
        largest = max(largest, float(core(module).nu.abs()))
    assert (9.99 if constant else 0.5) < largest <= 10 + 1e-3


def test_item_6_no_centring_and_scale() -> None:
    module = power(warmup=0)
    for _ in range(50):
        module(data(64, 8, shift=1))
    assert module.eval()(data(64, 8, shift=1)).mean() > 0.3
    x = data(64, 8)
    for call in ("power_norm_v(eps = 1e-12)", "group_scaling(2, eps = 1e-12)"):
        assert torch.allclose(norm(call, C=8)(3 * x), norm(call, C=8)(x), atol=1e-5)


def test_item_7_the_divisor_fluctuates_less() -> None:
    module = power(warmup=0)
    own, batch = [], []
    for step in range(100):
        x = data(64, 8, seed=step, scale=4.0 if step % 2 else 1.0)
        own.append(1 / (core(module).phi + 1e-5).sqrt())
        batch.append(1 / (mean_square(x) + 1e-5).sqrt())
        module(x)
    own, batch = own[50:], batch[50:]
    assert (torch.stack(batch).var(0) > 5 * torch.stack(own).var(0)).all()


def test_padding_is_normalised_and_not_counted() -> None:
    text = "net f(x: R[T, C], mask: R[T]) -> R[T, C] { power_norm(warmup = 10, group = 0)[C](x, mask = mask) }"
    module = fl.compile(text, flow="f", T=4, C=3, dtype=torch.float64)
    x, mask = data(5, 4, 3), (data(5, 4, seed=2) > 0).double()
    q = (x.square() * mask[..., None]).sum((0, 1)) / mask.sum()
    assert torch.allclose(module(x, mask), x / (q + 1e-5).sqrt())


def test_group_scaling_divides_by_the_group_s_root_mean_square() -> None:
    x = data(6, 8)
    expected = x / (x.reshape(6, 4, 2).square().mean(-1).repeat_interleave(2, 1) + 1e-5).sqrt()
    assert torch.allclose(norm("group_scaling(4)", C=8)(x), expected)
    module = power(group=2)
    assert torch.allclose(module(x), norm("power_norm_v()", C=8)(norm("group_scaling(2)", C=8)(x)), atol=1e-6)


@pytest.mark.parametrize(
    "call", ["power_norm(warmup = 0)", "power_norm(warmup = 0, group = 0)", "power_norm_v()", "group_scaling()"]
)
def test_onnx(call: str, tmp_path: Path) -> None:
    runs_in_onnx(call, tmp_path, C=8, T=3)


def test_sizes_and_training() -> None:
    assert count("net f(x: R[C]) { power_norm()(x) }", C=512) == 1024
    module = power()
    assert sum(b.numel() for n, b in module.named_buffers() if n != "like") == 2 * 8 + 1
    trains("power_norm(warmup = 4)", C=8)
    trains("pn_transformer_block(heads = 2)", T=4, D=8)
