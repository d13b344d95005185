"""Card 051, the Flow Matching guide (Lipman et al. 2024): what must hold, item by item. Riemannian paths are card 035's."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from tests.catalogue.programs import same_in_onnx

F64 = torch.float64
PATHS = ("cond_ot", "polynomial(n = 3)", "vp", "linear_vp", "cosine")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ as the card lists them."""
    match path.split("(")[0]:
        case "cond_ot":
            return t, 1 - t
        case "polynomial":
            return t**3, 1 - t**3
        case "vp":
            total = 0.5 * (1 - t) ** 2 * (20 - 0.1) + (1 - t) * 0.1
            return torch.exp(-total / 2), torch.sqrt(1 - torch.exp(-total))
        case "linear_vp":
            return t, torch.sqrt(1 - t**2)
    return torch.sin(math.pi * t / 2), torch.cos(math.pi * t / 2)


GAUSSIAN = """
net exact(path: path = cond_ot, mean: real = 0.7, scale: real = 0.4) (x: R[D], t: Interval(-1e-9, 1.000000001)) {
  r = clamp(t, 0, 1)
  α, σ = path.alpha(r), path.sigma(r)
  spread = max(α ^ 2 * scale ^ 2 + σ ^ 2, 1e-9)
  data = mean + α * scale ^ 2 / spread * (x - α * mean)
  noise = σ / spread * (x - α * mean)
  path.alpha_rate(r) * data + path.sigma_rate(r) * noise
}
"""


@cache
def gaussian(path: str, solver: str = "midpoint(steps = 200)", change: bool = False) -> Any:
    inner = f"schedule_change(exact(), {path})" if change else f"exact({path})"
    text = (
        GAUSSIAN
        + f"""
    model g(v: net = {inner}, path: path = {path}) {{
      data x1: R[D = 1]
      def levels(t: Interval(0.001, 0.999)) {{ path.alpha(t), path.sigma(t), path.alpha_rate(t), path.sigma_rate(t) }}
      def velocity(x1, t: Unit) {{ v(x1, t) }}
      def data_of(x1, u: R[D], t: Interval(0.001, 0.999)) {{ path.data(t, x1, velocity = u) }}
      def score_of(x1, u: R[D], t: Interval(0.001, 0.999)) {{ path.score(t, x1, data = u) }}
      def noise_of(x1, u: R[D], t: Interval(0.001, 0.999)) {{ path.noise(t, x1, score = u) }}
      def velocity_of(x1, u: R[D], t: Interval(0.001, 0.999)) {{ path.velocity(t, x1, noise = u) }}
      def flow(x1) {{ integrate(v, x1, t = 0 -> 1, {solver}) }}
      def most(x1) {{ integrate(v, x1, t = 0 -> 0.95, {solver}) }}
      def log_prob(x1) {{ z, log_det = integrate(v, x1, t = 1 -> 0, {solver}, log_det = true);  normal.log_prob(z) + log_det }}
      def estimate(x1) {{
        z, log_det = integrate(v, x1, t = 1 -> 0, {solver}, trace = hutchinson, log_det = true)
        normal.log_prob(z) + log_det
      }}
    }}"""
    )
    return fl.compile(text, dtype=F64)


@pytest.mark.parametrize("path", PATHS)
def test_item_1_levels_and_their_rates(path: str) -> None:
    t = torch.linspace(0.02, 0.98, 25, dtype=F64).requires_grad_()
    wanted = levels(path, t)
    rates = [torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v in wanted]
    found = gaussian(path).levels(t.detach())
    for a, b in zip(found, (*wanted, *rates), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_item_2_gaussian_data_come_back_and_predictions_turn_round(path: str) -> None:
    m = gaussian(path)
    t = 0.05 + 0.9 * torch.rand(50, dtype=F64, generator=generator(0))
    x = torch.randn(50, 1, dtype=F64, generator=generator(1))
    alpha, sigma = (v[:, None] for v in levels(path, t))
    u = m.velocity(x, t)
    data = m.data_of(x, u, t)
    torch.testing.assert_close(
        data, 0.7 + alpha * 0.16 / (alpha**2 * 0.16 + sigma**2) * (x - 0.7 * alpha), rtol=1e-5, atol=1e-5
    )
    score = m.score_of(x, data, t)
    torch.testing.assert_close(score, -(x - 0.7 * alpha) / (alpha**2 * 0.16 + sigma**2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.velocity_of(x, m.noise_of(x, score, t), t), u, rtol=1e-5, atol=1e-5)
    if path != "vp":  # at t = 0 its noise still holds exp(-5) of the data; from the standard normal all the same
        assert abs(float(levels(path, torch.zeros(1))[0])) < 1e-6
    quantiles = (torch.arange(2000, dtype=F64) + 0.5) / 2000  # in the place of draws
    samples = m.flow(torch.special.ndtri(quantiles)[:, None])
    assert abs(samples.mean() - 0.7) <= 0.02 * 0.7
    assert abs(samples.std() - 0.4) <= 0.02 * 0.4


@pytest.mark.parametrize("path", ["cosine", "vp"])
def test_item_3_another_schedule_follows_the_same_flow(path: str) -> None:
    x = torch.randn(20, 1, dtype=F64, generator=generator(3))[:6]
    start = sum(levels(path, torch.zeros(1, dtype=F64)))
    at = levels(path, torch.tensor([0.95], dtype=F64))
    scale, time = sum(at), float(at[0] / sum(at))
    text = (
        GAUSSIAN
        + f"model g(v: net = exact()) {{ data x1: R[D = 1]\n def flow(x1) {{ integrate(v, x1, t = {float(levels(path, torch.zeros(1, dtype=F64))[0] / start)} -> {time}, rk4(steps = 400)) }} }}"
    )
    original = fl.compile(text, dtype=F64).flow(x)
    changed = gaussian(path, "midpoint(steps = 1000)", True).most(x * start)
    assert (changed - scale * original).abs().max() < 1e-3
    same = gaussian("cond_ot", change=True)
    t = torch.rand(6, dtype=F64, generator=generator(4))
    torch.testing.assert_close(same.velocity(x, t), gaussian("cond_ot").velocity(x, t), rtol=1e-12, atol=1e-12)


def test_item_4_densities_exact_and_estimated() -> None:
    x = torch.linspace(-0.6, 2, 30, dtype=F64)[:, None]
    wanted = torch.distributions.Normal(0.7, 0.4).log_prob(x[:, 0])
    m = gaussian("cond_ot", "rk4(steps = 40)")
    assert (m.log_prob(x) - wanted).abs().max() <= 1e-3
    estimates = m.estimate(x.expand(2000, 30, 1), generator=generator(5))
    error = estimates.std(0) / 2000**0.5
    assert ((estimates.mean(0) - wanted).abs() <= 4 * error + 1e-3).all()


ATOMS = ((0, 1), (2, 0))
WEIGHTS = (0.3, 0.7)
POSTERIOR = """
net exact(a: [int] = [0, 1], b: [int] = [2, 0], p: real = 0.3) (x: R[N], t: R) -> R[N, V = 3] {
  k = index[V](zeros[V = 3])
  one: R[N] = stack[N](a)
  two: R[N] = stack[N](b)
  first = p * prod[N]((1 - t) / 3 + t * where(x == one, 1.0, 0.0))
  second = (1 - p) * prod[N]((1 - t) / 3 + t * where(x == two, 1.0, 0.0))
  at_one: R[N, V = 3] = where(one == k, 1.0, 0.0)
  at_two: R[N, V = 3] = where(two == k, 1.0, 0.0)
  log(max((first * at_one + second * at_two) / max(first + second, 1e-30), 0) + 1e-12)
}
"""


@cache
def discrete(stir: float = 0, steps: int = 100) -> Any:
    return fl.compile(
        POSTERIOR + f"model d = dfm(posterior = exact(), tokens = 3, steps = {steps}, stir = {stir})", N=2, dtype=F64
    )


@pytest.mark.slow
@pytest.mark.parametrize("stir", [0, 1])
def test_item_5_the_jump_process_has_the_frequencies_of_the_target(stir: float) -> None:
    n = 3000
    samples = discrete(stir).sample((n,), generator=generator(6))
    found = {atom: float((samples == torch.tensor(atom)).all(-1).double().mean()) for atom in ATOMS}
    for atom, p in zip(ATOMS, WEIGHTS, strict=True):
        assert abs(found[atom] - p) <= 3 * (p * (1 - p) / n) ** 0.5


def states(time: float) -> list[tuple[Tensor, Tensor, float]]:
    """Every (x1, x_t) with its probability on the mixture path."""
    out = []
    for atom, p in zip(ATOMS, WEIGHTS, strict=True):
        for x in itertools.product(range(3), repeat=2):
            weight = p * math.prod((1 - time) / 3 + time * (a == b) for a, b in zip(x, atom, strict=True))
            out.append((torch.tensor(atom), torch.tensor(x), weight))
    return out


def test_item_6_the_generalised_kl_loss_is_least_at_the_exact_posterior() -> None:
    m, time = discrete(), 0.4
    every = states(time)
    x1, x = (torch.stack([s[k] for s in every]) for k in (0, 1))
    weight = torch.tensor([s[2] for s in every], dtype=F64)
    assert abs(weight.sum() - 1) < 1e-12
    t = torch.full((len(every),), time, dtype=F64)
    order = {tuple(v): k for k, v in enumerate(itertools.product(range(3), repeat=2))}
    which = torch.tensor([order[tuple(v)] for v in x.tolist()])
    best = m.logits(x, t)
    table = torch.stack([best[(which == k).nonzero()[0, 0]] for k in range(9)]).requires_grad_()
    loss = (weight * m.gkl(x1, x, t, table[which])).sum()
    (slope,) = torch.autograd.grad(loss, table)
    assert slope.norm() < 1e-5
    for k in range(5):
        moved = table.detach() + 0.3 * torch.randn(table.shape, dtype=F64, generator=generator(k))
        assert (weight * m.gkl(x1, x, t, moved[which])).sum() >= loss - 1e-12


def test_item_6_the_loss_is_the_formula() -> None:
    m = discrete()
    x1, x = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 2], [1, 1]])
    t = torch.tensor([0.3, 0.6], dtype=F64)
    logits = torch.randn(2, 2, 3, dtype=F64, generator=generator(7))
    lp = logits.log_softmax(-1)
    same = (x1 == x).double()
    at = lp.exp().gather(-1, x[..., None])[..., 0]
    wanted = -(1 / (1 - t))[:, None] * (at - same + (1 - same) * lp.gather(-1, x1[..., None])[..., 0])
    torch.testing.assert_close(m.gkl(x1, x, t, logits), wanted.mean(-1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("solver", "order", "within"), [("midpoint", 2, 0.2), ("rk4", 4, 0.3)])
def test_item_7_orders_on_a_smooth_field(solver: str, order: int, within: float) -> None:
    x = torch.randn(8, 1, dtype=F64, generator=generator(8))
    exact = gaussian("cosine", "rk4(steps = 400)").most(x)
    counts = (40, 80) if order == 2 else (25, 50)
    errors = [(gaussian("cosine", f"{solver}(steps = {n})").most(x) - exact).abs().max() for n in counts]
    assert abs(math.log2(errors[0] / errors[1]) - order) <= within


def test_item_8_regression_on_conditional_velocities_finds_the_marginal_one() -> None:
    atoms = torch.tensor([-1.0, 0.2, 1.5], dtype=F64)
    text = "model m(path: path = cond_ot) { data x1: R[D = 1]\n def at(x1, x0: R[D], t: Unit) { path.at(t, x0, x1), path.velocity(t, x0, x1) } }"
    m: Any = fl.compile(text, dtype=F64)
    time = 0.4
    # Quadrature over x0: each x on the grid is reached from each atom by one x0.
    x = torch.linspace(-3, 3, 61, dtype=F64)
    x0 = (x[:, None] - time * atoms) / (1 - time)
    place, velocity = m.at(atoms.expand(61, 3)[..., None], x0[..., None], torch.full((61, 3), time, dtype=F64))
    torch.testing.assert_close(place[..., 0], x[:, None].expand(61, 3))
    weight = torch.softmax(-0.5 * x0**2, -1)
    regressed = (weight * velocity[..., 0]).sum(-1)
    data = (weight * atoms).sum(-1)
    marginal = (data - x) / (1 - time)
    assert (regressed - marginal).abs().max() <= 1e-3


def test_onnx_schedule_and_discrete_sampler(tmp_path: Path) -> None:
    text = "model m(v: net = schedule_change(time_mlp(8), cosine)) { data x1: R[D = 2]\n def u(x1, t: Unit) { y: R[D] = v(x1, t);  y } }"
    x = torch.randn(5, 2, generator=generator(9))
    same_in_onnx(fl.compile(text, seed=0), "u", tmp_path, x, torch.rand(5, generator=generator(10)))
    tokens: Any = fl.compile("model d = dfm(posterior = token_mlp(8, tokens = 4), tokens = 4, steps = 4)", N=2, seed=0)
    same_in_onnx(tokens, "sample", tmp_path)


def test_the_discrete_model_trains() -> None:
    m: Any = fl.compile("model d = dfm(posterior = token_mlp(32, tokens = 4), tokens = 4, steps = 8)", N=2, seed=0)
    optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
    g = generator(11)
    losses = []
    for _ in range(150):
        x = torch.randint(4, (128, 1), generator=g).expand(-1, 2)
        optimizer.zero_grad()
        loss = m.loss_ce(x, generator=g)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
