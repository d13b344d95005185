"""Card 019, Stochastic Normalizing Flows (Wu, Köhler & Noé 2020): what must hold, item by item."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import flowlang as fl
from tests.backends.onnx.support import replayed
from tests.catalogue.programs import same_in_onnx

F64 = torch.float64
ENERGIES = """
net harmonic(x: R[D]) -> R { sum[D](x ^ 2) / 2 }
net shifted(x: R[D]) -> R { sum[D]((x - 1) ^ 2) / (2 * 0.49) }
net shallow(x: R[D]) -> R { e: R = double_well(-0.5, -2)(x);  e }
net springs(x: R[D]) -> R { sum[D](x ^ 4) / 4 + sum[D](x) }
"""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


@cache
def sampler(chain: str, target: str, dtype: torch.dtype = F64) -> Any:
    return fl.compile(
        ENERGIES + f"bijector c(x: R[D]) {{ {chain} }}\nmodel s = snf_sampler(c, {target})",
        flow="s",
        D=2,
        seed=0,
        dtype=dtype,
    )


@cache
def kernel(step: str, size: int = 2, dtype: torch.dtype = F64) -> Any:
    """The step as a program: where it leads, and its weight."""
    text = ENERGIES + f"model k {{ data x: R[D = {size}]\n f = {step}\n def go(x) {{ y, gain = f(x);  y, gain }} }}"
    return fl.compile(text, flow="k", seed=0, dtype=dtype)


def log_mean_exp(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def shallow(x: Tensor) -> Tensor:
    return -0.5 * x[:, 0] - 2 * x[:, 0] ** 2 + x[:, 0] ** 4 + x[:, 1] ** 2 / 2


def slope(u: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(u(x).sum(), x)[0]


def test_item_1_without_kernels_it_is_a_flow_s_importance_weight() -> None:
    chain = "snf_steps(shallow, blocks = 2, kernels = 0, hidden = [8])"
    model: Any = fl.compile(ENERGIES + f"model s = snf_sampler({chain}, shallow)", flow="s", D=2, seed=0, dtype=F64)
    flow: Any = fl.compile(
        ENERGIES + "flow f = snf(shallow, blocks = 2, kernels = 0, hidden = [8])", flow="f", seed=0, dtype=F64
    )
    with torch.no_grad():
        for p, q in zip(model.parameters(), flow.parameters(), strict=True):
            p.add_(0.3 * torch.randn(p.shape, dtype=F64, generator=generator(p.numel())))
            q.copy_(p)
        x, log_w = model.sample_with_weights((500,), generator=generator(0))
        torch.testing.assert_close(log_w, -shallow(x) - flow.log_prob(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", ["overdamped_langevin(harmonic, 0.3)", "metropolis(harmonic, 0.8)"])
def test_item_2_mean_weights_of_a_gaussian(steps: str) -> None:
    """E_path[w] = Z_X / Z_Z, which is 1 for a kernel that starts in its own stationary density; Z_X alone here."""
    _, log_w = sampler(f"y = {steps}(x)\n {steps}(y)", "harmonic").sample_with_weights(
        (200_000,), generator=generator(1)
    )
    assert abs(float(log_mean_exp(log_w).exp()) / (2 * math.pi) - 1) < 0.02


def test_item_3_langevin_weights_are_ratios_of_gaussians() -> None:
    x, ε = normal(200, 2), 0.05
    y, gain = kernel("overdamped_langevin(shallow, 0.05)").go(x, generator=generator(2))
    there = Normal(x - ε * slope(shallow, x), math.sqrt(2 * ε)).log_prob(y).sum(-1)
    back = Normal(y - ε * slope(shallow, y), math.sqrt(2 * ε)).log_prob(x).sum(-1)
    torch.testing.assert_close(gain, back - there, rtol=0, atol=1e-6)


def test_item_4_metropolis_weights_are_rises_of_energy() -> None:
    x = normal(2000, 2)
    y, gain = kernel("metropolis(shallow, 0.6)").go(x, generator=generator(3))
    moved = (y != x).any(-1)
    assert 0.2 < float(moved.double().mean()) < 0.95
    assert (
        gain[moved] - (shallow(y) - shallow(x))[moved]
    ).abs().max() < 1e-12  # the noise's own densities cancel to rounding
    assert (gain[~moved] == 0).all()


def test_item_4_metropolis_keeps_its_density() -> None:
    """Detailed balance: from the stationary density moves of either sense of the rise are as frequent."""
    x = normal(100_000, 2)
    y, _ = kernel("metropolis(harmonic, 1.5)").go(x, generator=generator(4))
    torch.testing.assert_close(y.var(0), torch.ones(2, dtype=F64), rtol=0.02, atol=0)
    torch.testing.assert_close((y**4).mean(0), torch.full((2,), 3.0, dtype=F64), rtol=0.05, atol=0)


def test_item_5_underdamped_weights_are_ratios_of_joint_densities() -> None:
    dt, γ, m, kT = 0.1, 0.7, 1.5, 1.2
    x = normal(100, 4)
    y, gain = kernel(f"langevin(springs, {dt}, friction = {γ}, mass = {m}, temperature = {kT})", 4).go(
        x, generator=generator(5)
    )

    def force(q: Tensor) -> Tensor:
        return -(q**3 + 1)

    def log_density(q: Tensor, v: Tensor, q1: Tensor, v1: Tensor) -> Tensor:
        half, kick, c = dt / (2 * m), math.sqrt(4 * γ * m * kT / dt), 1 + γ * dt / 2
        place = Normal(q + dt * (v + half * (force(q) - γ * m * v)), dt * half * kick).log_prob(q1)
        speed = Normal(((q1 - q) / dt + half * force(q1)) / c, half * kick / c).log_prob(v1)
        return (place + speed).sum(-1)

    q, v, q1, v1 = x[:, :2], x[:, 2:], y[:, :2], y[:, 2:]
    torch.testing.assert_close(gain, log_density(q1, -v1, q, -v) - log_density(q, v, q1, v1), rtol=0, atol=1e-5)


def trained(kernels: int, steps: int = 200) -> Any:
    text = f"model s = snf_sampler(snf_steps(kernels = {kernels}, hidden = [32, 32]), double_well)"
    model: Any = fl.compile(text, D=2, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    g = generator(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss_kl((128,), generator=g).mean().backward()
        optimizer.step()
    return model


@pytest.mark.slow
def test_item_6_kernels_keep_both_wells() -> None:
    grid = torch.linspace(-4, 4, 20001, dtype=F64)
    density = torch.exp(0.5 * grid + 6 * grid**2 - grid**4)
    truth = float(density[grid > 0].sum() / density.sum())
    errors = []
    for kernels in (0, 5):
        model = trained(kernels)
        with torch.no_grad():
            x, log_w = model.sample_with_weights((200_000,), generator=generator(7))
        weight = torch.softmax(log_w.double(), 0)
        errors.append(abs(float(weight[x[:, 0] > 0].sum()) - truth))
    assert errors[0] > 0.1
    assert errors[1] < 0.03


@pytest.mark.parametrize(
    "chain",
    [
        "y = affine_coupling(x, net = mlp(8))\n metropolis(shifted, 0.5)(y)",
        "y = overdamped_langevin(shifted, 0.05)(x)\n affine_coupling(y, net = mlp(8))",
    ],
)
def test_item_7_normalisers_of_untrained_samplers(chain: str) -> None:
    model = sampler(chain, "shifted")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=F64, generator=generator(p.numel())))
        _, log_w = model.sample_with_weights((400_000,), generator=generator(8))
    assert abs(float(log_mean_exp(log_w)) - math.log(2 * math.pi * 0.49)) < 0.01


def test_item_8_kernels_alone_are_annealed_importance_sampling() -> None:
    """Given the noises the states are equal bit by bit; the weight, a telescope of the same terms in another order, to rounding."""
    T = 4
    chain = (
        "\n".join(
            f" x{T - k} = metropolis(annealed(shallow, {1 - k / T}), 0.5)({'x' if k == 0 else f'x{T - k + 1}'})"
            for k in range(T)
        )
        + "\n x1"
    )
    model = sampler(chain, "shallow")
    g = generator(9)
    z = torch.randn(300, 2, dtype=F64, generator=g)
    noises = [(torch.randn(300, 2, dtype=F64, generator=g), torch.rand(300, dtype=F64, generator=g)) for _ in range(T)]
    with replayed(model, [z, *(n for pair in noises for n in pair)], []):
        found, log_w = model._run_sample_with_weights((300,))

    def u(x: Tensor, λ: float) -> Tensor:
        return (1 - λ) * x.square().sum(-1) / 2 + λ * shallow(x)

    x, total, before = z, math.log(2 * math.pi) + torch.zeros(300, dtype=F64), 0.0
    for k, (e, r) in enumerate(noises):
        λ = (k + 1) / T
        total = total + u(x, before) - u(x, λ)
        there = x + 0.5 * e
        x = torch.where((r * torch.exp(u(there, λ) - u(x, λ)) < 1)[:, None], there, x)
        before = λ
    assert torch.equal(found, x)
    torch.testing.assert_close(log_w, total, rtol=0, atol=1e-12)


def test_the_tiny_flow_trains_and_bounds_its_density() -> None:
    flow = fl.compile("snf_tiny", seed=0)
    assert flow.exactness == "lower bound"
    x = torch.randn(64, 2, generator=generator(10)) * 0.7
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_published_sampler() -> None:
    flow: Any = fl.compile("snf", seed=0)
    each = 1 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2  # one net gives shift and scale, where the authors have two
    assert sum(p.numel() for p in flow.parameters()) == 6 * each
    assert torch.isfinite(flow.sample_and_log_prob((5,), generator=generator(11))[1]).all()
    model: Any = fl.compile("snf_sampler", D=2, seed=0)
    model.loss(torch.randn(4, 2)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("chain", "target"),
    [
        ("y = metropolis(shallow, 0.4)(x)\n affine_coupling(y, net = mlp(8))", "shallow"),
        ("y = overdamped_langevin(shallow, 0.05)(x)\n affine_coupling(y, net = mlp(8))", "shallow"),
    ],
)
def test_onnx_samples_with_weights(chain: str, target: str, tmp_path: Path) -> None:
    same_in_onnx(sampler(chain, target, torch.float32), "sample_with_weights", tmp_path, tolerance=1e-4)


def test_onnx_underdamped_step(tmp_path: Path) -> None:
    x = torch.randn(5, 4, generator=generator(12))
    same_in_onnx(kernel("langevin(springs, 0.1)", 4, torch.float32), "go", tmp_path, x, tolerance=1e-4)


def test_velocities_beside_positions() -> None:
    """A flow of positions whose kernels move velocities too: its weights have the normaliser of the energy."""
    text = (
        ENERGIES
        + "flow f {\n data x: R[D = 2]\n with_velocities\n langevin(still, 0.2)\n langevin(still, 0.2)\n base normal\n}\nnet still(q: R[D]) -> R { sum[D](q ^ 2) / 2 }"
    )
    flow: Any = fl.compile(text, flow="f", dtype=F64)
    with torch.no_grad():
        x, log_q = flow.sample_and_log_prob((100_000,), generator=generator(13))
    assert x.shape == (100_000, 2)
    assert abs(float(log_mean_exp(-x.square().sum(-1) / 2 - log_q)) - math.log(2 * math.pi)) < 0.01
