"""Card 005, kernelised (Ferumal) flows (English et al. 2023): what must hold, item by item."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.verify import perturb

KERNELS = ("se", "matern12", "matern32", "matern52")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def reference(kernel: str, x: Tensor, a: Tensor, lengthscale: float) -> Tensor:
    """The card's kernels."""
    r = torch.cdist(x, a) / lengthscale
    if kernel == "se":
        return torch.exp(-(r**2) / 2)
    if kernel == "matern12":
        return torch.exp(-r)
    if kernel == "matern32":
        return (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r)
    return (1 + math.sqrt(5) * r + 5 * r**2 / 3) * torch.exp(-math.sqrt(5) * r)


def kernel_map(kernel: str, points: Tensor, weight: Tensor, lengthscale: float = 1.0) -> Any:
    """The library's map with these points [N, D] and weights [N, out]."""
    n, d, out = *points.shape, weight.shape[1]
    text = (
        f"net f(x: R[D = {d}]) -> R[E = {out}] {{\n y: R[E = {out}] = kernel_map({n}, kernel = {kernel})(x)\n y\n}}\n"
    )
    made = fl.compile(text, flow="f", seed=0, dtype=torch.float64)
    inner = next(m for m in made.modules() if type(m).__name__.startswith("KernelMap"))
    with torch.no_grad():
        inner.a.copy_(points)
        inner.lengthscale.assign(torch.tensor(lengthscale, dtype=torch.float64))
        next(p for k, p in inner.named_parameters() if "weight" in k).copy_(weight.T)
    return made


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["ff_realnvp", "ff_glow"])
def test_item_1_inverse_and_log_det(family: str, kernel: str) -> None:
    model = fl.compile(
        f"flow f = {family}(dims = 3, layers = 2, points = 7, kernel = {kernel})\n", seed=0, dtype=torch.float64
    )
    perturb(model, generator(1), 0.5)
    x = normal(20, 3, seed=2)
    z, log_det = model(x)
    assert (model.inverse(z)[0] - x).abs().max() <= 1e-9
    for one, said in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v)[0], one)
        assert abs(torch.linalg.slogdet(jacobian)[1] - said) <= 1e-9


def test_item_2_without_weights_the_coupling_is_the_identity() -> None:
    text = "flow f {\n data x: R[D = 5]\n kernel_coupling(kernel_map(10, last = 0))\n base normal\n}\n"
    x = normal(20, 5, seed=3)
    z, log_det = fl.compile(text, seed=0, dtype=torch.float64)(x)
    assert torch.equal(z, x)
    assert log_det.abs().max() == 0


def test_item_2_one_point_of_a_long_lengthscale_is_an_affine_map() -> None:
    text = "flow f {\n data x: R[D = 2]\n kernel_coupling(kernel_map(1))\n base normal\n}\n"
    model = fl.compile(text, seed=0, dtype=torch.float64)
    inner = next(m for m in model.modules() if type(m).__name__.startswith("KernelMap"))
    with torch.no_grad():
        inner.a.zero_()
        inner.lengthscale.assign(torch.tensor(300.0, dtype=torch.float64))
        next(p for k, p in inner.named_parameters() if "weight" in k).copy_(torch.tensor([[0.7], [-0.4]]))
    x = normal(50, 2, seed=4).clamp(-1, 1)
    z, log_det = model(x)
    s = 5 * math.tanh(0.7 / 5)  # the coupling's soft bound
    expected = torch.stack((x[:, 0], x[:, 1] * math.exp(s) - 0.4), 1)
    assert (z - expected).abs().max() <= 2e-5  # exp(-1/(2·300²)) is 1 - 6e-6
    assert (log_det - s).abs().max() <= 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_item_3_kernel_matrices_are_positive_semidefinite(kernel: str) -> None:
    points = normal(30, 3, seed=5)
    gram = kernel_map(kernel, points, torch.eye(30, dtype=torch.float64), 1.3)(points).detach()
    assert (gram - gram.T).abs().max() <= 1e-12
    assert torch.linalg.eigvalsh(gram).min() >= -1e-6
    assert (torch.diagonal(gram) - 1).abs().max() <= 2e-6  # k(0) = 1, but for the root's 1e-12
    assert (gram - reference(kernel, points, points, 1.3)).abs().max() <= 2e-6


def test_item_3_the_squared_exponential_is_the_limit_of_smoother_kernels() -> None:
    points = normal(30, 3, seed=6)
    eye = torch.eye(30, dtype=torch.float64)
    grams = [kernel_map(k, points, eye)(points).detach() for k in ("matern12", "matern32", "matern52", "se")]
    far = [float((g - grams[-1]).abs().max()) for g in grams[:-1]]
    assert far == sorted(far, reverse=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_item_4_representer(kernel: str) -> None:
    """Points at the data and weights by ridge regression give kernel ridge regression."""
    x, y = normal(40, 2, seed=7), normal(40, 3, seed=8)
    gram = reference(kernel, x, x, 0.8)
    weight = torch.linalg.solve(gram + 0.1 * torch.eye(40, dtype=torch.float64), y)
    found = kernel_map(kernel, x, weight, 0.8)(x)
    assert (found - gram @ weight).abs().max() <= 1e-5


def test_item_5_only_differences_to_the_points_matter() -> None:
    points, weight, x = normal(12, 3, seed=9), normal(12, 4, seed=10), normal(30, 3, seed=11)
    move = normal(1, 3, seed=12)
    for kernel in KERNELS:
        here = kernel_map(kernel, points, weight)(x)
        there = kernel_map(kernel, points + move, weight)(x + move)
        assert (here - there).abs().max() <= 1e-9


@pytest.mark.parametrize(("dims", "points"), [(2, 20), (6, 150), (7, 11)])
def test_item_6_parameters_of_a_layer(dims: int, points: int) -> None:
    d = (dims + 1) // 2
    count = points * d + 2 * points * (dims - d) + 1
    text = f"flow f = ff_realnvp(dims = {dims}, layers = 3, points = {points})\nrequire parameters(f) == {3 * count}\n"
    assert fl.check(text).ok
    model = fl.compile(text, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 3 * count


def test_parameters_of_the_presets() -> None:
    text = """flow a = ff_realnvp_power
    require parameters(a) == 16_212
    flow b = ff_glow_power
    require parameters(b) == 16_860
    """
    assert fl.check(text).ok


def moons(n: int, seed: int) -> Tensor:
    g = np.random.default_rng(seed)
    t, side = np.pi * g.random(n), g.integers(0, 2, n)
    x = np.where(side, 1 - np.cos(t), np.cos(t)) - 0.5
    y = np.where(side, 0.5 - np.sin(t), np.sin(t)) - 0.25
    return torch.tensor(np.stack((x, y), 1) * 1.5 + 0.15 * g.standard_normal((n, 2)), dtype=torch.float32)


MLP = """flow f {
  data x: R[D = 2]
  repeat 4 {
    affine_coupling(net = mlp(32, 32))
    reverse
  }
  base normal
}
"""
FEW = {"kernels": "flow f = ff_realnvp_tiny\n", "mlp": MLP}


@pytest.mark.slow
def test_item_7_few_data() -> None:
    """100 points of two moons, 200 steps each at rate 3e-3: the mean of the held-out NLL is lower than that of an affine coupling flow of
    five times the parameters, and the median too.

    Rate and steps were chosen on seeds 100 to 102. On the fresh seeds 0 to 5 (the card asks for three) kernels gave 2.65, 2.68, 2.40, 2.44,
    2.73, 2.52 and the other 3.21, 47.9, 3.33, 2.45, 2.41, 4.20: its 100 points are soon learnt by heart.
    """
    size = {n: sum(p.numel() for p in fl.compile(s).parameters()) for n, s in FEW.items()}
    assert size["mlp"] >= 5 * size["kernels"]
    fresh = moons(4000, 99)
    found: dict[str, list[float]] = {n: [] for n in FEW}
    for seed in range(6):
        data = moons(100, seed)
        for name, spec in FEW.items():
            model = fl.compile(spec, seed=seed)
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(200):
                optimizer.zero_grad()
                (-model.log_prob(data).mean()).backward()
                optimizer.step()
            with torch.no_grad():
                found[name].append(float(-model.log_prob(fresh).mean()))
    for middle in (np.mean, np.median):
        assert middle(found["kernels"]) <= middle(found["mlp"]) - 0.05, found


@pytest.mark.slow
def test_item_7_few_data_each_at_its_best_step() -> None:
    """500 steps at rate 1e-2, each model at the step that 100 other points choose: against the other flow at its best. Nine seeds."""
    specs = FEW
    fresh = moons(4000, 99)
    found = dict.fromkeys(specs, 0.0)
    for seed in range(9):
        data, choosing = moons(100, seed), moons(100, 1000 + seed)
        for name, spec in specs.items():
            model = fl.compile(spec, seed=seed)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            best, held_out = float("inf"), 0.0
            for k in range(500):
                optimizer.zero_grad()
                (-model.log_prob(data).mean()).backward()
                optimizer.step()
                if k % 10 == 9:
                    with torch.no_grad():
                        chosen = float(-model.log_prob(choosing).mean())
                        if chosen < best:
                            best, held_out = chosen, float(-model.log_prob(fresh).mean())
            found[name] += held_out / 9
    assert found["kernels"] <= found["mlp"] - 0.05


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_finite_at_the_points(kernel: str) -> None:
    points = normal(5, 2, seed=13)
    made = kernel_map(kernel, points, normal(5, 2, seed=14))
    x = points.clone().requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


def test_onnx_of_all_programs(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = fl.compile("flow f = ff_glow(dims = 3, layers = 2, points = 9, kernel = matern32)\n", seed=0).eval()
    perturb(model, generator(15), 0.3)
    paths = fl.export_onnx(model, tmp_path / "m.onnx", programs=["log_prob", "forward", "inverse", "sample"])
    x = normal(16, 3, seed=16).float()
    z = model(x)[0].detach()
    for program, given, expected in (("log_prob", x, model.log_prob(x)), ("forward", x, z), ("inverse", z, x)):
        session = ort.InferenceSession(str(paths[program]))
        out = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
        assert np.allclose(out, expected.detach().numpy(), atol=2e-4)
