"""Card 129, non-linear invariants (Doorenbos et al. 2024): what must hold, item by item."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.verify import perturb

D = 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def net(dtype: torch.dtype = torch.float64) -> fl.Flow:
    model = fl.compile(f"flow f {{\n data x: R[D = {D}]\n vp_net(3)\n base normal\n}}\n", seed=0, dtype=dtype)
    perturb(model, generator(1), 0.5 if dtype == torch.float64 else 0.2)
    return model


def invariants(dims: int, k: int, layers: int, width: int = 1, seed: int = 0) -> Any:
    """The model; `width` multiplies the width of its conditioners' hidden layers."""
    text = (
        f"model m = nl_invs(dims = {dims}, invariants = {k}, layers = {layers}, mults = [{width}, {width}, {width}])\n"
    )
    return fl.compile(text, seed=seed)


def two_steps(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """The paper's two updates of one batch: invariants, then reconstruction from the encoding made before the first."""
    z = model.encode(x)
    loss = model.loss_inv(x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.loss_rec(x, z.detach()).backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_item_1_round_trip(dtype: torch.dtype, limit: float) -> None:
    x = torch.randn(50, D, dtype=torch.float64, generator=generator(2)).to(dtype)
    assert (net(dtype).inverse(net(dtype)(x)[0])[0] - x).abs().max() <= limit


def test_item_1_the_inverse_is_the_analytic_one() -> None:
    """One rotation and one coupling, undone by hand."""
    model = fl.compile(
        f"flow f {{\n data x: R[D = {D}]\n rotation\n vp_coupling\n base normal\n}}\n", seed=0, dtype=torch.float64
    )
    z = torch.randn(20, D, dtype=torch.float64, generator=generator(3))
    rotation, coupling = model.rotation, model.vp_coupling
    x2 = z[:, 3:]
    net_ = next(m for n, m in coupling.named_modules() if type(m).__name__.startswith("InvariantMlp"))
    y = torch.cat((z[:, :3] - net_(x2), x2), 1)
    q = rotation.Q()
    assert torch.allclose(model.inverse(z)[0], (y - rotation.b) @ q, atol=1e-12)


def test_item_2_volume_is_kept_at_any_parameters() -> None:
    x = torch.randn(20, D, dtype=torch.float64, generator=generator(4))
    for one in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: net()(v)[0], one)
        assert abs(torch.linalg.slogdet(jacobian)[1]) < 1e-9
    assert net()(x)[1].abs().max() == 0  # and the compiler knows it
    said = next(
        d for d in fl.info(f"flow f {{\n data x: R[D = {D}]\n vp_net(3)\n base normal\n}}\n") if d["name"] == "f"
    )
    assert said["exactness"] == "exact"


def test_item_3_rotations_are_orthogonal_of_determinant_1() -> None:
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for m in (m for m in net(dtype).modules() if type(m).__name__ == "SkewExponential"):
            q = m()
            assert (q.mT @ q - torch.eye(D, dtype=dtype)).norm() < limit
            assert abs(torch.linalg.det(q) - 1) < limit


def test_item_4_volume_preservation_blocks_collapse() -> None:
    model = invariants(4, 4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    g = generator(5)
    for _ in range(300):
        loss = model.loss_inv(torch.randn(256, 4, generator=g))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert float(model.loss_inv(torch.randn(20_000, 4, generator=g))) >= 0.95


def test_item_5_affine_special_case() -> None:
    """Data in a linear subspace: one rotation, the invariants are affine."""
    model = invariants(5, 2, 0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator(6)))[0][:, :3]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    g = generator(7)
    for _ in range(600):
        two_steps(model, optimizer, torch.randn(128, 3, generator=g) @ basis.T)
        schedule.step()
    with torch.no_grad():
        x = torch.randn(2000, 3, generator=g) @ basis.T
        assert float(model.loss_inv(x)) < 1e-4
        e = model.encode(x)[:, 3:].square().mean(0).clamp_min(1e-12).expand(2000, -1)
        off = x + torch.randn(2000, 5, generator=g)
        assert model.score(off, e).median() > 100 * model.score(x, e).median()


def auc(inlier: Tensor, outlier: Tensor) -> float:
    both = torch.cat((inlier, outlier))
    rank = both.argsort().argsort().double() + 1
    n, m = len(inlier), len(outlier)
    return float((rank[n:].sum() - m * (m + 1) / 2) / (n * m))


@pytest.mark.slow
def test_item_6_nonlinear_invariants_tell_what_affine_ones_cannot() -> None:
    def parabola(n: int, g: torch.Generator, lift: float = 0.0) -> Tensor:
        u = torch.rand(n, generator=g) * 3 - 1.5
        return torch.stack((u, u * u + lift + 0.01 * torch.randn(n, generator=g)), 1)

    found = []
    for seed in range(3):
        model, g = invariants(2, 1, 4, width=16, seed=seed), generator(8 + seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(600):
            two_steps(model, optimizer, parabola(128, g))
        with torch.no_grad():
            train, inside, outside = parabola(2000, g), parabola(1000, g), parabola(1000, g, 0.5)
            e = model.encode(train)[:, 1:].square().mean(0).expand(1000, -1)
            found.append(auc(model.score(inside, e), model.score(outside, e)))
        if max(found) > 0.95:
            break
    assert max(found) > 0.95
    mean = train.mean(0)
    least = torch.linalg.eigh(torch.cov(train.T))[1][:, 0]
    assert auc(((inside - mean) @ least).square(), ((outside - mean) @ least).square()) < 0.6


def test_item_7_reconstruction_sends_no_gradient_into_the_encoding() -> None:
    model = invariants(D, 2, 2)
    x = torch.randn(16, D, generator=generator(9))
    z = model.encode(x)
    (into,) = torch.autograd.grad(model.loss_rec(x, z), z, allow_unused=True)
    assert into is None or into.abs().max() == 0
    parameters = list(model.parameters())
    through = torch.autograd.grad(model.loss_rec(x, z), parameters)
    detached = torch.autograd.grad(model.loss_rec(x, z.detach()), parameters)
    assert all(torch.equal(a, b) for a, b in zip(through, detached, strict=True))


def test_parameters_of_the_cards_example() -> None:
    assert fl.check("flow v {\n data x: R[D = 64]\n vp_net\n base normal\n}\nrequire parameters(v) == 37_696\n").ok
    tiny = fl.compile("model m = nl_invs_tiny\n", seed=0)
    h, d1, n = 3, 3, 2
    assert sum(p.numel() for p in tiny.parameters()) == (n + 1) * (36 + 6) + n * (3 * (h * h + h) + h * d1 + d1)


def test_nearest_neighbours() -> None:
    score = fl.compile(
        "net s(x: R[D = 3], train: R[N = 10, D]) -> R { knn_score(2)(x, train) }\n", flow="s", dtype=torch.float64
    )
    x, train = (torch.randn(n, 3, dtype=torch.float64, generator=generator(10)) for n in (7, 10))
    near = torch.cdist(x, train).square().topk(2, largest=False)[0].sum(1)
    assert torch.allclose(score(x, train.expand(7, -1, -1)), near, atol=1e-9)


def test_onnx(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = fl.compile(f"flow f {{\n data x: R[D = {D}]\n vp_net(2)\n base normal\n}}\n", seed=0).eval()
    paths = fl.export_onnx(model, tmp_path / "m.onnx", programs=["forward", "inverse", "log_prob"])
    x = torch.randn(8, D, generator=generator(11))
    z = model(x)[0].detach()
    for program, given, expected in (("forward", x, z), ("inverse", z, x), ("log_prob", x, model.log_prob(x))):
        session = ort.InferenceSession(str(paths[program]))
        found = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
        assert np.allclose(found, expected.detach().numpy(), atol=1e-4)
