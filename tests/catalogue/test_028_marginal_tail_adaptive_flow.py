"""Card 028, marginal tail-adaptive flows (Laszkiewicz et al. 2022): what must hold, item by item."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.train import tails
from flowlang.verify import perturb

LIGHT, DIMS = 2, 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def tiny(spline: bool = False, amount: float = 0.5, bound: float = 2.0) -> fl.Flow:
    model = fl.compile("mtaf_tiny" if not spline else f"flow mine = mtaf(dims = 4, light = 2, layers = 2, hidden = [16], spline = true, bound = {bound})\n",
                       seed=0, dtype=torch.float64).eval()  # fmt: skip
    perturb(model, generator(1), amount)
    return model


def whole(model: fl.Flow, x: Tensor) -> Tensor:
    """Both parts of the latent, light first."""
    heavy, light, _ = model(x)
    return torch.cat((light, heavy), -1)


def jacobian(model: fl.Flow, x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(lambda v: whole(model, v), one) for one in x])


@pytest.mark.parametrize("spline", [False, True])
def test_item_1_light_outputs_never_read_heavy_inputs(spline: bool) -> None:
    x = 2 * torch.randn(20, DIMS, dtype=torch.float64, generator=generator(2))
    found = jacobian(tiny(spline), x)
    assert found[:, :LIGHT, LIGHT:].abs().max() <= 1e-8
    assert found[:, LIGHT:, :LIGHT].abs().max() > 1e-3  # and light ones do reach heavy ones


@pytest.mark.parametrize("spline", [False, True])
def test_item_1_and_3_log_prob_is_the_change_of_variables(spline: bool) -> None:
    model, x = tiny(spline), 2 * torch.randn(20, DIMS, dtype=torch.float64, generator=generator(3))
    heavy, light, log_det = model(x)
    assert torch.allclose(log_det, torch.linalg.slogdet(jacobian(model, x))[1], atol=1e-9)
    back = model.inverse(heavy, light)[0]
    assert torch.allclose(back, x, atol=1e-8)


@pytest.mark.parametrize("df", [2.0, 30.0, 1e6])
def test_item_2_the_base_is_normal_and_student_t(df: float) -> None:
    text = f"""flow mine {{
      data x: R[D = 5]
      light_tails(2)
      param ν: R[D = 3] = 0
      base student_t(df = {df} + exp(ν) - 1)
    }}
    """
    model = fl.compile(text, seed=0, dtype=torch.float64)
    x = 3 * torch.randn(50, 5, dtype=torch.float64, generator=generator(4))
    ν = torch.tensor(df, dtype=torch.float64)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    normal = torch.distributions.Normal(zero, one)
    expected = normal.log_prob(x[:, :2]).sum(-1) + torch.distributions.StudentT(ν).log_prob(x[:, 2:]).sum(-1)
    assert torch.allclose(model.log_prob(x), expected, atol=1e-5)
    if df == 1e6:
        y = x / 3  # at ordinary values: far out the two differ by x⁴/(4ν)
        assert (model.log_prob(y) - normal.log_prob(y).sum(-1)).abs().max() <= 1e-3


def test_item_3_tail_lu_is_block_triangular() -> None:
    model = fl.compile("flow mine {\n data x: R[D = 5]\n tail_lu(2)\n base normal\n}\n", seed=0, dtype=torch.float64)
    perturb(model, generator(5), 0.7)
    zero = torch.zeros(5, dtype=torch.float64)
    w = torch.autograd.functional.jacobian(lambda v: model(v)[0], zero)
    assert w[:2, 2:].abs().max() == 0
    x = torch.randn(30, 5, dtype=torch.float64, generator=generator(6))
    y, log_det = model(x)
    assert torch.allclose(y, x @ w.T, atol=1e-12)
    assert torch.allclose(log_det, torch.linalg.slogdet(w)[1].expand(30), atol=1e-12)
    assert torch.allclose(model.inverse(y)[0], x, atol=1e-10)
    w1, w2, w3 = w[:2, :2], w[2:, :2], w[2:, 2:]
    back = torch.autograd.functional.jacobian(lambda v: model.inverse(v)[0], zero)
    assert torch.allclose(back[2:, :2], -torch.linalg.inv(w3) @ w2 @ torch.linalg.inv(w1), atol=1e-9)


@pytest.mark.parametrize("spline", [False, True])
def test_item_4_at_the_start_the_flow_is_the_identity(spline: bool) -> None:
    """But for W2 = 1e-4 and the fixed permutations within the groups."""
    text = f"flow mine = mtaf(dims = 4, light = 2, layers = 2, hidden = [16], spline = {str(spline).lower()})\n"
    model = fl.compile(text, seed=0, dtype=torch.float64)
    x = torch.randn(50, DIMS, dtype=torch.float64, generator=generator(7))
    heavy, light, log_det = model(x)
    assert log_det.abs().max() <= 1e-6
    assert torch.allclose(light.sort(-1)[0], x[:, :2].sort(-1)[0], atol=1e-6)
    assert (heavy.sort(-1)[0] - x[:, 2:].sort(-1)[0]).abs().max() <= 1e-3


def test_item_5_each_marginal_has_the_tail_of_its_base() -> None:
    model = tiny(amount=0.3)
    with torch.no_grad():
        x = model.sample((200_000,), generator=generator(8)).numpy()
    for j in range(LIGHT):
        assert tails.tail_index(x[:, j], 0.001) > 10
    for j in range(LIGHT, DIMS):
        assert abs(tails.hill(x[:, j], 0.001) / 2 - 1) <= 0.3  # the bases have 2 degrees of freedom


def heavy_data(n: int, seed: int) -> Tensor:
    """Two normal and two t2 marginals that depend on each other (a Gaussian copula), light first."""
    g = np.random.default_rng(seed)
    mixing = np.array([[1, 0, 0, 0], [0.5, 1, 0, 0], [0.5, 0.3, 1, 0], [0, 0.5, 0.5, 1]])
    z = g.standard_normal((n, 4)) @ (mixing / np.linalg.norm(mixing, axis=1, keepdims=True)).T
    u = (0.5 * (1 + torch.erf(torch.from_numpy(z) / 2**0.5))).clamp(1e-12, 1 - 1e-12)
    t2 = (2 * u - 1) * torch.sqrt(2 / (4 * u * (1 - u)))  # the quantile function of t with 2 degrees of freedom
    return torch.cat((torch.from_numpy(z)[:, :2], t2[:, 2:]), 1)


@pytest.mark.slow
def test_item_6_heavy_marginals_fit_better_than_with_a_gaussian_base() -> None:
    train, fresh = heavy_data(8000, 0).float(), heavy_data(100_000, 1).numpy()
    gaussian = """flow mine {
      data x: R[D = 4]
      mtaf_steps(2, 2, [16])
      base normal
    }
    """
    error = {}
    for name, model in (
        ("mtaf", fl.compile("mtaf_tiny", seed=0)), ("gaussian", fl.compile(gaussian, seed=0))
    ):  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        rows = generator(9)
        for _ in range(400):
            optimizer.zero_grad()
            loss = -model.log_prob(train[torch.randint(len(train), (512,), generator=rows)]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
            optimizer.step()
        with torch.no_grad():
            x = model.sample((100_000,), generator=generator(10)).numpy()
        error[name] = np.mean([
            abs(tails.tail_value_at_risk(x[:, j]) - tails.tail_value_at_risk(fresh[:, j])) for j in (2, 3)
        ])  # fmt: skip
    assert error["gaussian"] >= 1.5 * error["mtaf"]


def test_item_7_degrees_of_freedom_learn_and_stay_positive() -> None:
    model = fl.compile("mtaf_tiny", seed=0)
    x = torch.randn(256, DIMS, generator=generator(11))
    x[:, 2:] *= torch.exp(2 * torch.randn(256, 2, generator=generator(12)))
    ν = next(p for n, p in model.named_parameters() if "nu" in n)
    optimizer = torch.optim.Adam([ν], lr=0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean()
        loss.backward()
        assert ν.grad is not None
        assert torch.isfinite(ν.grad).all()
        assert ν.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < losses[0]
    owner = next(m for m in model.modules() if any(p is ν for p in m.parameters(recurse=False)))
    assert (owner() > 0).all()


# ---- the procedure, baselines and presets ---------------------------------------------------------


def test_the_plan_sorts_light_marginals_first_and_sampling_undoes_it() -> None:
    x = heavy_data(20_000, 3)[:, [2, 0, 3, 1]].numpy()
    found = tails.plan(x)
    assert found.light == 2
    assert sorted(found.order[:2]) == [1, 3]
    assert all(1.3 < v < 3 for v in found.df)
    model = fl.compile("mtaf", layers=1, hidden=[8], seed=0, dtype=torch.float64, **found.arguments())
    y = torch.from_numpy(x[:10])
    heavy, light, _ = model(y)
    assert torch.allclose(light.sort(-1)[0], y[:, [1, 3]].sort(-1)[0], atol=1e-6)
    assert torch.allclose(model.inverse(heavy, light)[0], y, atol=1e-9)


@pytest.mark.parametrize(("name", "df"), [("taf", 50.0), ("gtaf", 10.0)])
def test_the_baselines_train(name: str, df: float) -> None:
    model = fl.compile(name, dims=3, layers=2, hidden=[8], seed=0)
    x = torch.randn(64, 3, generator=generator(13))
    loss = -model.log_prob(x).mean()
    loss.backward()
    ν = next(m() for n, m in model.named_modules() if n.endswith("nu"))
    assert torch.allclose(ν, torch.full_like(ν, df), rtol=1e-4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_parameters_of_the_presets() -> None:
    """Counted from the layers: LU factors, W2, a masked network, a degree of freedom for each heavy marginal."""

    def expected(dims: int, light: int, layers: int, hidden: list[int]) -> int:
        widths = [dims, *hidden, 2 * dims]
        net = sum((a + 1) * b for a, b in pairwise(widths))
        heavy = dims - light
        return layers * (net + 2 * light**2 + 2 * heavy**2 + light * heavy) + heavy

    for name, sizes in (("mtaf_tiny", (4, 2, 2, [16])), ("mtaf_copula8", (8, 4, 5, [64, 64])),
                        ("mtaf_copula50", (50, 46, 5, [64, 64]))):  # fmt: skip
        assert next(d for d in fl.info(name) if d["kind"] == "flow")["parameters"] == expected(*sizes)


def test_onnx_with_frozen_degrees_of_freedom(tmp_path: object) -> None:
    """The card: lgamma is no op of ONNX, and of a stored ν it is a constant."""
    from pathlib import Path

    import onnxruntime as ort

    model = fl.compile("mtaf_tiny", seed=0).eval()
    paths = fl.export_onnx(model, Path(str(tmp_path)) / "m.onnx", programs=["log_prob", "sample"])
    x = 2 * torch.randn(16, DIMS, generator=generator(14))
    session = ort.InferenceSession(str(paths["log_prob"]))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(found, model.log_prob(x).detach().numpy(), atol=1e-4)
