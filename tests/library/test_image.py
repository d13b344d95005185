"""Squeeze, factor-out, dequantisation and Glow."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.api import analyse
from flowlang.verify import verify


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compiled(*lines: str, seed: int = 0, push: float = 0.0) -> fl.Flow:
    body = "\n ".join(lines)
    flow = fl.compile(f"flow f {{\n {body}\n base normal\n}}\n", dtype=torch.float64, seed=seed)
    draws = generator(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p += push * torch.randn(p.shape, dtype=p.dtype, generator=draws)
    return flow.eval()


IMAGE = "data x: R[C = 3, H = 4, W = 6]"


def test_squeeze_moves_blocks_into_channels() -> None:
    flow = compiled(IMAGE, "squeeze(2)")
    x = torch.arange(72, dtype=torch.float64).reshape(1, 3, 4, 6)
    z, log_det = flow(x)
    assert z.shape == (1, 12, 2, 3)
    assert float(log_det) == 0
    # Channels in the order (c, row in the block, column in the block), as torch's pixel_unshuffle.
    assert torch.equal(z, torch.nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(flow.inverse(z)[0], x)


def test_unsqueeze_undoes_squeeze() -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=generator())
    assert torch.equal(compiled(IMAGE, "squeeze(2)", "unsqueeze(2)")(x)[0], x)
    y = torch.randn(2, 12, 2, 3, dtype=torch.float64, generator=generator())
    wide = compiled("data x: R[C = 12, H = 2, W = 3]", "unsqueeze")
    assert torch.equal(wide(y)[0], torch.nn.functional.pixel_shuffle(y, 2))


def test_the_inverse_of_a_step_that_changes_shapes_is_refused() -> None:
    errors = fl.check(f"flow f {{\n {IMAGE}\n inverse(squeeze(2))\n base normal\n}}\n").errors
    assert [e.code for e in errors] == ["FL0902"]


def test_squeeze_of_an_odd_image_is_refused() -> None:
    errors = fl.check("flow f {\n data x: R[C = 1, H = 3, W = 4]\n squeeze(2)\n base normal\n}\n").errors
    assert len(errors) == 1


def test_factor_out_scores_what_leaves() -> None:
    flow = compiled("data x: R[C = 4, H = 2, W = 2]", "factor_out(laplace)")
    x = torch.randn(5, 4, 2, 2, dtype=torch.float64, generator=generator())
    z, left, _ = flow(x)
    assert torch.equal(z, x[:, :2])
    assert torch.equal(left, x[:, 2:])
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))
    wanted = wanted + torch.distributions.Laplace(0.0, 1.0).log_prob(left).sum((1, 2, 3))
    assert torch.allclose(flow.log_prob(x), wanted)
    assert torch.allclose(flow.inverse(z, left)[0], x)


def test_learned_factor_out_conditions_on_what_stays() -> None:
    flow = compiled("data x: R[C = 4, H = 2, W = 2]", "learned_factor_out(conv_net(4))", push=0.3)
    x = torch.randn(5, 4, 2, 2, dtype=torch.float64, generator=generator())
    z, left, _ = flow(x)
    found = next(flow.learned_factor_out.children())(z)
    law = torch.distributions.Normal(found[:, :2], torch.exp(2 * torch.tanh(found[:, 2:] / 2)))
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(z) + law.log_prob(left)
    assert torch.allclose(flow.log_prob(x), wanted.sum((1, 2, 3)))
    x, log_p = flow.sample_and_log_prob((50,), generator=generator())
    assert torch.allclose(flow.log_prob(x), log_p)


# ---- whole numbers --------------------------------------------------------------------------------


def test_uniform_dequantisation_and_its_inverse() -> None:
    flow = compiled("data x: Int(0..17)[D = 5]", "uniform_dequantise(17)", "elementwise(logit)")
    x = torch.randint(0, 17, (200, 5), generator=generator())
    torch.manual_seed(0)
    z, _ = flow(x)
    assert torch.equal(flow.inverse(z)[0], x.double())
    samples = flow.sample((500,), generator=generator())
    assert torch.equal(samples, samples.round())
    assert float(samples.min()) >= 0
    assert float(samples.max()) <= 16


@pytest.mark.parametrize("step", ["uniform_dequantise(3)", "variational_dequantise(3, net = conv_net(4))"])
def test_dequantised_probabilities_sum_to_one(step: str) -> None:
    """The weight's exponential is an unbiased estimate of P(x); over all x they sum to 1, within 4 standard errors."""
    flow = compiled("data x: Int(0..3)[C = 1, H = 1, W = 2]", step, "elementwise(logit)", "actnorm", push=0.4)
    every = torch.tensor(list(itertools.product(range(3), repeat=2)), dtype=torch.float64).reshape(9, 1, 1, 2)
    torch.manual_seed(0)
    with torch.no_grad():
        total = torch.stack([flow.log_prob(every).exp().sum() for _ in range(4000)])
    assert abs(float(total.mean()) - 1) < 4 * float(total.std()) / len(total) ** 0.5


def test_dequantised_bound_is_below_the_probability() -> None:
    flow = compiled("data x: Int(0..3)[D = 1]", "uniform_dequantise(3)", "elementwise(logit)", push=0.2)
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([flow.log_prob(x) for _ in range(4000)])
    truth = torch.diff(torch.special.ndtr(torch.logit(torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=torch.float64))))
    assert torch.allclose(draws.exp().mean(0), truth, atol=0.02)
    assert bool((draws.mean(0) < truth.log() + 0.02).all())
    assert fl.info("flow f {\n data x: Int(0..3)[D = 1]\n uniform_dequantise(3)\n elementwise(logit)\n base normal\n}")[-1][
        "exactness"
    ] == "lower bound"  # fmt: skip


FALSE = {
    "whole numbers to a density": "data x: Int(0..4)[D = 2]\n base normal",
    "real numbers to coins": "data x: R[D = 2]\n base bernoulli",
    "arithmetic": "data x: Int(0..4)[D = 2]\n doubled\n base normal",
    "narrow noise": "data x: Int(0..4)[D = 2]\n narrow\n elementwise(logit)\n base normal",
    "wide noise": "data x: Int(0..4)[D = 2]\n wide\n base normal",
    "gaps": "data x: Int(0..4)[D = 2]\n gaps\n elementwise(logit)\n base normal",
}
STEPS = """bijector doubled(x: Int(0..4)[D]) { 2 * x }
bijector narrow(x: Int(0..4)[D]) { u: R[D] ~ uniform(0, 0.5)
 (x + u) / 4 }
bijector wide(x: Int(0..4)[D]) { u: R[D] ~ uniform(0, 2)
 x + u }
bijector gaps(x: Int(0..4)[D]) { u: R[D] ~ uniform(0, 1)
 (2 * x + u) / 8 }
"""


@pytest.mark.parametrize("body", FALSE.values(), ids=FALSE)
def test_wrong_dequantisation_is_refused(body: str) -> None:
    assert fl.check(f"{STEPS}flow f {{\n {body}\n}}\n").errors


def test_logit_transform() -> None:
    flow = compiled("data x: Interval(-0.05 / 0.9, 1 + 0.05 / 0.9)[D = 3]", "logit_transform")
    x = torch.rand(20, 3, dtype=torch.float64, generator=generator())
    z, log_det = flow(x)
    p = 0.05 + 0.9 * x
    assert torch.allclose(z, torch.logit(p))
    assert torch.allclose(log_det, (math.log(0.9) - torch.log(p) - torch.log1p(-p)).sum(-1))
    assert torch.allclose(flow.inverse(z)[0], x)


# ---- Glow -----------------------------------------------------------------------------------------


def conv_net_count(inputs: int, outputs: int, hidden: int) -> int:
    return (9 * inputs + 1) * hidden + (hidden + 1) * hidden + (9 * hidden + 1) * outputs


def glow_count(channels: int, levels: int, depth: int, hidden: int) -> int:
    """By hand: actnorm 2c, PLU matrix c², coupling from the first half to shift and scale of the second; priors."""
    total, c = 0, channels
    for level in range(levels):
        c *= 4
        keep = (c + 1) // 2
        total += depth * (2 * c + plu_count(c) + conv_net_count(keep, 2 * (c - keep), hidden))
        if level < levels - 1:
            total += conv_net_count(keep, 2 * (c - keep), hidden)
            c = keep
    return total


def plu_count(n: int) -> int:
    return n * (n - 1) + n


def shown_count(spec: str, **sets: int) -> int:
    said = {d["name"]: d for d in fl.info(f"flow f = {spec}\n", **sets)}
    count = said["f"]["parameters"]
    assert isinstance(count, int)
    return count


def test_glow_digits_counts_its_parameters() -> None:
    assert shown_count("glow_digits(levels = 2, depth = 4, hidden = 32)") == glow_count(1, 2, 4, 32)
    assert shown_count("glow(levels = 3, depth = 32, hidden = 512)") == glow_count(3, 3, 32, 512)


def small_glow(levels: int = 2) -> fl.Flow:
    flow = fl.compile("glow", channels=1, size=8, levels=levels, depth=2, hidden=8, dtype=torch.float64, seed=0)
    draws = generator()
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=draws)
    return flow.eval()


def test_glow_round_trip_and_parts() -> None:
    flow = small_glow()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=generator())
    z, left, log_det = flow(x)
    assert left.shape == (3, 2, 4, 4)
    assert z.shape == (3, 8, 2, 2)
    back, inverse_log_det = flow.inverse(z, left)
    assert float((back - x).abs().detach().max()) < 1e-9
    assert torch.allclose(log_det, -inverse_log_det)
    samples, log_p = flow.sample_and_log_prob((4,), generator=generator())
    assert torch.allclose(flow.log_prob(samples), log_p, atol=1e-8)


def test_glow_log_det_is_slogdet_of_the_jacobian() -> None:
    flow = small_glow()
    x = torch.randn(1, 8, 8, dtype=torch.float64, generator=generator())

    def f(v: Tensor) -> Tensor:
        return torch.cat([part.reshape(-1) for part in flow(v.unsqueeze(0))[:-1]])

    jacobian = torch.autograd.functional.jacobian(f, x)
    assert isinstance(jacobian, Tensor)
    dense = torch.linalg.slogdet(jacobian.reshape(64, 64))[1]
    assert torch.allclose(flow(x)[-1], dense, atol=1e-8)


def test_glow_digits_verifies_and_learns_a_step() -> None:
    comp = analyse("flow f = glow_digits(levels = 2, depth = 1, hidden = 8)\n", sized=True)
    assert comp.ok
    assert all(c.ok for c in verify(comp, "f"))
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data[:256], dtype=torch.float32).reshape(-1, 1, 8, 8)
    flow = fl.compile("glow_digits", depth=2, hidden=16, seed=0)
    assert flow.initialise(x)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    torch.manual_seed(0)
    before = float(flow.log_prob(x).mean().detach())
    for _ in range(20):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.manual_seed(0)
    after = float(flow.log_prob(x).mean().detach())
    assert after > before + 5
    samples = flow.sample((8,), generator=generator())
    assert torch.equal(samples, samples.round())


@pytest.mark.parametrize(
    "steps",
    [
        "data x: R[D = 2]\n actnorm\n plu_linear\n planar\n radial\n invertible_batch_norm",
        "data x: R[D = 1]\n actnorm\n planar\n radial\n triangular_linear",
        "data x: R[D = 2]\n factor_out(normal)\n radial",
        "data x: R[D = 2]\n orthogonal_linear\n sinh_arcsinh\n affine_coupling(mlp(8))",
    ],
)
def test_small_flows_integrate_to_one(steps: str) -> None:
    flow = compiled(steps, push=0.3)
    side = torch.linspace(-16, 16, 401, dtype=torch.float64)
    size = flow.data_shape[0]
    grid = torch.cartesian_prod(*[side] * size).reshape(-1, size)
    with torch.no_grad():
        total = float(flow.log_prob(grid).exp().sum()) * float(side[1] - side[0]) ** size
    assert abs(total - 1) < 1e-2
