"""Card 089, Flow++: its items under "What must hold"."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowlang as fl
from tests.catalogue.nets import net

TINY = "model m = flowpp_tiny\n"
STEPS = "flowpp_steps(8, 1, 2, 4, first = 1, second = 1, third = 1)"
IMAGE = f"""flow f {{
  data x: Interval(-0.05 / 0.9, 1 + 0.05 / 0.9)[C = 1, H = 4, W = 4]
  logit_transform(0.05)
  {STEPS}
  base normal
}}
"""
SCALAR = """bijector own(K: int = 4) (x: R[D]) {
  param a: R[D] ~ normal, b: R[D] ~ normal, w: R[K = K, D] ~ normal, m: R[K = K, D] ~ normal(0, 3), s: R[K = K, D] ~ normal
  mixlogistic_cdf(x, a, b, w, m, s)
}
flow f {
  data x: R[D = 3]
  own(K = COUNT)
  base normal
}
"""
# A density of v in (0, 4) whose integral over each whole number is 1/4; the noise in (0, 1) is a flow of this card.
OSCILLATING = """bijector noise(ε: R[D] given c: R[D]) {
  a: R[D], b: R[D], w: R[K = 4, D], m: R[K = 4, D], s: R[K = 4, D] = mlp(16)(c)
  sigmoid(mixlogistic_cdf(ε, a, b, w, m, s))
}
model m {
  data x: R[D = 1]
  q = noise()
  def bound(x, ε: R[D]) {
    u, spread = q(ε, x / 4 - 0.5)
    sum[D](log(1 + 0.9 * cos(4 * pi * (x + u)))) - log(4) - normal.log_prob(ε) + spread
  }
  def draw_u(x, ε: R[D]) { u, spread = q(ε, x / 4 - 0.5);  u, normal.log_prob(ε) - spread }
}
"""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def moved(module: nn.Module, size: float = 0.1, seed: int = 3) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn(p.shape, dtype=p.dtype, generator=generator(seed))
    return module.eval()


def test_1_the_published_size() -> None:
    """Item 1: dequantisation and flow together, as the official launcher says."""
    with torch.device("meta"):
        model = fl.compile("model m = flowpp_cifar10\n")
    assert sum(p.numel() for p in model.parameters()) == 31_443_440


def test_2_the_scalar_map_inverts() -> None:
    """Item 2: the map on [-10, 10], K = 4, to 1e-6 in float64."""
    flow: Any = fl.compile(SCALAR.replace("COUNT", "4"), seed=0, dtype=torch.float64).eval()
    x = torch.linspace(-10, 10, 400, dtype=torch.float64).unsqueeze(-1).expand(-1, 3)
    with torch.no_grad():
        assert float((flow.inverse(flow(x)[0])[0] - x).abs().max()) < 1e-6


def test_2_and_3_the_steps_invert_and_their_log_det_is_slogdet() -> None:
    """Items 2 and 3: 4 x 4 x 1, float64, the preprocessing included: round trip to 1e-5, log|det J| to 1e-6."""
    flow = moved(fl.compile(IMAGE, seed=0, dtype=torch.float64))
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=generator(1))
    with torch.no_grad():
        z, log_det = flow(x)
        assert float((flow.inverse(z)[0] - x).abs().max()) < 1e-5
    for k in range(2):
        j = torch.autograd.functional.jacobian(lambda v: flow(v.unsqueeze(0))[0], x[k]).reshape(16, 16)
        assert abs(float(torch.linalg.slogdet(j)[1] - log_det[k])) < 1e-6


def test_3_the_model_s_bound_is_made_of_both_flows() -> None:
    """Item 3, the constants of the preprocessing: the bound is log p(x + u) - log q(u | x), p by a flow with the same steps."""
    spec = TINY.replace(
        "flowpp_tiny",
        "flowpp(channels = 1, size = 4, filters = 8, blocks = 1, noise_blocks = 1, heads = 2, components = 4)",
    )
    model = moved(fl.compile(spec, seed=0, dtype=torch.float64), 0.03)
    flow: Any = fl.compile(IMAGE.replace(STEPS, "flowpp_steps(8, 1, 2, 4)"), seed=1, dtype=torch.float64).eval()
    flow.flowpp_steps.load_state_dict(model.image_steps.state_dict())
    x = torch.randint(0, 256, (3, 1, 4, 4), generator=generator()).double()
    ε = noise(3, 1, 4, 4)
    with torch.no_grad():
        u, spread = model.dequant(ε, model.seen(x / 256 - 0.5))
        log_q = torch.distributions.Normal(0, 1).log_prob(ε).sum((1, 2, 3)) - spread
        wanted = flow.log_prob((x + u) / 256) - 16 * math.log(256) - log_q
        torch.testing.assert_close(model.log_prob_bound(x, ε), wanted, rtol=0, atol=1e-8)


def test_4_one_component_is_affine() -> None:
    """Item 4: K = 1, mean 0, scale 1."""
    flow: Any = fl.compile(SCALAR.replace("COUNT", "1"), seed=0, dtype=torch.float64).eval()
    with torch.no_grad():
        flow.own.m.zero_(), flow.own.s.zero_()
        x = 8 * noise(50, 3)
        a = torch.tanh(flow.own.a)
        z, log_det = flow(x)
        torch.testing.assert_close(z, a.exp() * x + flow.own.b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_det, a.sum().expand(50), rtol=1e-8, atol=1e-8)


def test_5_a_learned_noise_gives_the_better_bound() -> None:
    """Item 5: on an oscillating density both bounds are below the exact log P(x) = log(1/4), and after 300 steps the
    learned one is better by more than 0.02 nats."""
    model: Any = fl.compile(OSCILLATING, seed=0, dtype=torch.float64)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    exact = math.log(float((1 + 0.9 * torch.cos(4 * math.pi * u)).mean()) / 4)
    uniform = float(torch.log((1 + 0.9 * torch.cos(4 * math.pi * u)) / 4).mean())
    assert abs(exact - math.log(0.25)) < 1e-9
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    g = generator(1)
    for _ in range(300):
        x = torch.randint(0, 4, (128, 1), generator=g).double()
        loss = -model.bound(x, torch.randn(128, 1, dtype=torch.float64, generator=g)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.arange(4, dtype=torch.float64).repeat(5000).unsqueeze(-1)
    with torch.no_grad():
        found = model.bound(x, noise(20_000, 1, seed=7))
    learned, error = float(found.mean()), float(found.std()) / math.sqrt(20_000)
    assert learned + 4 * error < exact + 0.01
    assert uniform < exact
    assert learned - uniform > 0.02


def test_6_the_noise_has_a_density_on_the_unit_interval() -> None:
    """Item 6: q(u | x) has mass 1 on (0, 1) by quadrature in one dimension, and no draw touches an end."""
    model = moved(fl.compile(OSCILLATING, seed=0, dtype=torch.float64), 0.5)
    ε = torch.linspace(-8, 8, 40_001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        u, log_q = model.draw_u(torch.full_like(ε, 2.0), ε)
    assert bool(((u > 0) & (u < 1)).all())
    assert bool((u.diff(dim=0) > 0).all())
    mass = float(torch.trapezoid(log_q.exp(), u.squeeze(-1)))
    assert abs(mass - 1) < 1e-3
    whole = moved(fl.compile(TINY, seed=0, dtype=torch.float64))
    x = torch.randint(0, 256, (8, 1, 8, 8), generator=generator()).double()
    with torch.no_grad():
        drawn, _ = whole.dequant(3 * noise(8, 1, 8, 8), whole.seen(x / 256 - 0.5))
    assert bool(((drawn > 0) & (drawn < 1)).all())


def test_7_the_first_batch_sets_norms_and_convolutions() -> None:
    """Item 7: after the first batch the norm's result has mean 0 and deviation 1 at every place (1e-4), and convolutions
    give mean 0 and deviation `gain`, their own random start kept but for its scale."""
    flow: Any = fl.compile(
        "flow f {\n data x: R[C = 2, H = 3, W = 3]\n data_norm\n base normal\n}\n", seed=0, dtype=torch.float64
    )
    x = 3 * noise(64, 2, 3, 3) + noise(2, 3, 3, seed=9)
    flow.initialise(x)
    with torch.no_grad():
        z = flow(x)[0]
    assert float(z.mean(0).abs().max()) < 1e-4
    assert float((z.std(0, correction=0) - 1).abs().max()) < 1e-4
    mine: Any = net("flowpp_conv(5, gain = 0.1)(x)", C=2, H=3, W=3)
    before = mine.flowpp_conv.W.detach().clone()
    mine.initialise(x)
    after = mine.flowpp_conv.W.detach()
    y = mine(x).detach()
    torch.testing.assert_close(
        y.std((0, 2, 3), correction=0), torch.full((5,), 0.1, dtype=torch.float64), rtol=1e-4, atol=0
    )
    assert float(y.mean((0, 2, 3)).abs().max()) < 1e-6
    ratio = (after / before).flatten(1)
    assert float((ratio - ratio[:, :1]).abs().max()) < 1e-9
    assert sum(p.numel() for p in mine.parameters()) == 5 * 2 * 9 + 5
    saved = {k: v.clone() for k, v in mine.state_dict().items()}
    mine.initialise(2 * x)  # once
    assert all(torch.equal(v, saved[k]) for k, v in mine.state_dict().items())


def test_8_far_in_the_tails_in_float32() -> None:
    """Item 8: (x - mean) / scale up to ±60 leaves value, log-det and gradients finite."""
    flow: Any = fl.compile(SCALAR.replace("COUNT", "4"), seed=0)
    with torch.no_grad():
        flow.own.s.fill_(0.0)
    x = torch.linspace(-60, 60, 241).unsqueeze(-1).expand(-1, 3).clone().requires_grad_()
    z, log_det = flow(x)
    assert bool(torch.isfinite(z).all())
    assert bool(torch.isfinite(log_det).all())
    log_det.sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_the_flow_of_pixels_is_a_lower_bound_and_samples_pixels() -> None:
    """`log_prob` of the discrete flow is typed as a bound; its samples are whole numbers in range; one step of training."""
    spec = "flow f = flowpp_discrete(channels = 1, size = 4, levels = 4, filters = 8, blocks = 1, noise_blocks = 1, heads = 2, components = 2)\n"
    assert {d["name"]: d for d in fl.info(spec)}["f"]["exactness"] == "lower bound"
    flow: Any = fl.compile(spec, seed=0)
    x = torch.randint(0, 4, (16, 1, 4, 4), generator=generator()).float()
    flow.initialise(x)
    torch.manual_seed(0)
    first = flow.log_prob(x).mean()
    (-first).backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in flow.parameters())
    drawn = flow.sample((4,))
    assert bool(((drawn >= 0) & (drawn <= 3) & (drawn == drawn.round())).all())


def test_dropout_of_the_conditioners() -> None:
    """Rate 0.2 in the published preset, while training: values before the second convolution and after attention are 0 or 1/0.8 of
    themselves; the bound is random there alone, samples never."""
    text = TINY.replace("flowpp_tiny", "flowpp(channels = 1, size = 4, filters = 8, blocks = 1, noise_blocks = 1, heads = 2, components = 4)")  # fmt: skip
    model = moved(fl.compile(text, seed=0, dtype=torch.float64), 0.03).requires_grad_(False)
    drops = [m for m in model.modules() if type(m).__name__.startswith("Dropout")]
    assert drops
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [m.register_forward_hook(lambda _m, i, o: seen.append((i[0], o))) for m in drops]
    x = torch.randint(0, 256, (3, 1, 4, 4), generator=generator()).double()
    ε = noise(3, 1, 4, 4)
    model.train()
    a, b = model.log_prob_bound(x, ε), model.log_prob_bound(x, ε)
    assert not torch.equal(a, b)
    # 9 + 4 steps, each with one gated convolution and one attention, and 3 of the context: twice
    assert len(seen) == 2 * (2 * 13 + 3)
    kept = torch.cat([(o != 0).flatten() for _, o in seen])
    assert abs(float(kept.double().mean()) - 0.8) < 0.02
    assert all(bool(((o == 0) | ((o - i / 0.8).abs() < 1e-12)).all()) for i, o in seen)
    torch.manual_seed(1)
    drawn = model.sample(2)
    model.eval()
    for h in hooks:
        h.remove()
    torch.manual_seed(1)
    assert torch.equal(model.sample(2), drawn)
    assert torch.equal(model.log_prob_bound(x, ε), model.log_prob_bound(x, ε))


def test_the_model_trains_and_samples() -> None:
    model: Any = fl.compile(TINY, seed=0)
    x = torch.randint(0, 256, (8, 1, 8, 8), generator=generator()).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(12):
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert bool(torch.isfinite(model.sample(2)).all())


@pytest.mark.slow
def test_exported(tmp_path: Path) -> None:
    """ONNX: the bound with its noise as an input, and samples by bracketing."""
    import onnxruntime as ort

    spec = TINY.replace(
        "flowpp_tiny",
        "flowpp(channels = 1, size = 4, filters = 8, blocks = 1, noise_blocks = 1, heads = 2, components = 4)",
    )
    model = moved(fl.compile(spec, seed=0), 0.03)
    x = torch.randint(0, 256, (3, 1, 4, 4), generator=generator()).float()
    ε = noise(3, 1, 4, 4).float()
    files = fl.export_onnx(model, tmp_path / "m.onnx", programs=["log_prob_bound", "sample"])
    compared = fl.compare_onnx(model, files)  # the same noise through both; the inverse of the mixtures is a loop
    assert compared["sample"].error is not None
    assert compared["sample"].error < 1e-2
    session = ort.InferenceSession(str(files["log_prob_bound"]))
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy(), ε.numpy()), strict=True)))[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, model.log_prob_bound(x, ε).numpy(), rtol=1e-5, atol=1e-4)
