"""Steps that draw on their way: their density is a lower bound, is typed as one, and tightens with the number of draws."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import flowlang as fl
from flowlang.diagnostics import FlowError
from flowlang.verify import perturb

INDEXED = """flow f {
  data x: R[D = 1]
  %s
  base normal
}
"""
STEPS = [
    "cif_step(affine_autoregressive([8]))",
    "cif_step(affine_autoregressive([8]))\n  cif_step(affine_autoregressive([8]), index = 2)",
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compiled(step: str, size: float = 0.5) -> fl.Flow:
    flow = fl.compile(INDEXED % step, dtype=torch.float64, seed=0)
    perturb(flow, generator(1), size)
    return flow


def densities(flow: fl.Flow, draws: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of `draws` draws at the places of a grid, and the grid."""
    x = torch.linspace(-8, 8, 65, dtype=torch.float64)[:, None]
    torch.manual_seed(seed)
    with torch.no_grad():
        return flow.log_prob(x.expand(draws, -1, -1)), x.squeeze(-1)


@pytest.mark.parametrize("step", STEPS)
def test_the_mean_weight_is_a_density(step: str) -> None:
    log_w, x = densities(compiled(step), 1500)
    mass = log_w.exp().sum(1) * float(x[1] - x[0])
    assert abs(float(mass.mean()) - 1) < 4 * float(mass.std()) / len(mass) ** 0.5 + 1e-4


@pytest.mark.parametrize("step", STEPS)
def test_samples_are_of_that_density(step: str) -> None:
    flow = compiled(step)
    log_w, x = densities(flow, 1500)
    p = log_w.exp().mean(0) * float(x[1] - x[0])
    found = flow.sample((10_000,), generator=generator()).squeeze(-1)
    for power in (1, 2):
        assert abs(float((found**power).mean()) - float((p * x**power).sum())) < 0.06


@pytest.mark.parametrize("step", STEPS)
def test_one_draw_is_below_and_many_reach_it(step: str) -> None:
    flow = compiled(step)
    x = torch.tensor([[-1.0], [0.3], [1.5]], dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        truth = flow.log_prob_bound(x, 10_000)
        means = [torch.stack([flow.log_prob_bound(x, k) for _ in range(400)]).mean().item() for k in (1, 4, 16)]
        _, log_q = flow.sample_and_log_prob((4000,), generator=generator())
    assert means == sorted(means)
    assert means[0] < float(truth.mean())
    assert means[-1] < float(truth.mean()) + 0.01
    assert torch.isfinite(log_q).all()


def test_it_says_so(tmp_path: Path) -> None:
    import onnx

    text = INDEXED % STEPS[0]
    flow = fl.compile(text, seed=0)
    assert fl.info(text)[-1]["exactness"] == "lower bound"
    assert flow.exactness == "lower bound"
    assert "lower bound" in repr(flow)
    paths = fl.export_onnx(flow, tmp_path / "m.onnx", programs=["log_prob", "sample_and_log_prob", "sample"])
    said = {k: {p.key: p.value for p in onnx.load(str(p)).metadata_props}.get("exactness") for k, p in paths.items()}
    assert said == {"log_prob": "lower bound", "sample_and_log_prob": "upper bound", "sample": None}
    exact = fl.compile(INDEXED % "affine_autoregressive([8])", seed=0)
    assert exact.exactness == "exact"
    x = torch.zeros(3, 1)
    assert torch.equal(exact.log_prob_bound(x, 5), exact.log_prob(x))


def test_an_estimate_is_no_bound() -> None:
    flow = fl.compile(INDEXED % "residual_block(net = mlp(8, act = elu))", seed=0)
    assert flow.exactness == "unbiased"
    with pytest.raises(FlowError, match="no bound"):
        flow.log_prob_bound(torch.zeros(2, 1))


MODEL = """model m {
  data x: R[C = 2, H = 2, W = 2]
  f = %s
  def log_prob { z, log_det = f(x);  normal.log_prob(z) + log_det }
  def back { z: %s ~ normal;  y, log_det = inverse(f)(z);  y, normal.log_prob(z) - log_det }
  def both { z, a = f(x);  y, b = inverse(f)(z);  a + b }
}
"""


def test_programs_of_models_weigh_what_leaves_and_what_is_drawn() -> None:
    """An emission and a draw inside a model's bijector count as they do in a flow."""
    text = "bijector two(x: R[C, H, W]) {\n y: R[C, H, W] = cif_step[C](r = mlp(8), q = mlp(8))(x)\n y\n}\n"
    model = fl.compile(text + MODEL % ("two()", "R[C = 2, H = 2, W = 2]"), seed=0, dtype=torch.float64)
    flow = fl.compile(
        "flow f {\n data x: R[C = 2, H = 2, W = 2]\n two\n base normal\n}\n" + text, seed=0, dtype=torch.float64
    )
    with torch.no_grad():
        for p, q in zip(model.parameters(), flow.parameters(), strict=True):
            p.copy_(q)
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, generator=generator(2))
    torch.manual_seed(3)
    expected = flow.log_prob(x)
    torch.manual_seed(3)
    assert torch.allclose(model.log_prob(x), expected, atol=1e-12)
    y, log_q = model.back((5,), generator=generator(4))
    assert y.shape == (5, 2, 2, 2)
    found, weight = flow.sample_and_log_prob((5,), generator=generator(4))
    assert torch.allclose(y, found, atol=1e-12)
    assert torch.allclose(log_q, weight, atol=1e-12)
    assert model.exactness == {"log_prob": "lower bound", "back": "upper bound", "both": "biased"}
    assert "lower bound" in model.log_prob.__doc__
    said = next(d for d in fl.info(text + MODEL % ("two()", "R[C = 2, H = 2, W = 2]")) if d["name"] == "m")
    assert said["programs"]["log_prob"]["exactness"] == "lower bound"


def test_an_emission_alone_is_exact() -> None:
    text = """model m {
  data x: R[C = 2, H = 2]
  f = factor_out(normal)
  def log_prob { z, log_det = f(x);  normal.log_prob(z) + log_det }
}
"""
    model = fl.compile(text, seed=0, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, generator=generator(2))
    expected = (-0.5 * x.square() - 0.5 * math.log(2 * math.pi)).sum((-1, -2))
    assert torch.allclose(model.log_prob(x), expected, atol=1e-12)
    assert model.exactness == {}


def test_the_inverse_of_what_draws_is_no_step() -> None:
    report = fl.check(INDEXED % "inverse(cif_step(affine_autoregressive([8])))")
    assert [d.code for d in report.errors] == ["FL0902"]
