"""Card 101, GMFlow (Chen et al. 2025): what must hold, item by item. Points of the plane are images of two channels and one pixel."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.analysis.size import parameter_count
from flowlang.api import analyse
from tests.catalogue.programs import same_in_onnx

F64 = torch.float64
PARTS = """
model m {
  data x: R[C, H, W]
  def transition(x, low: R, high: R, means: R[K = 3, C, H, W], s: R) { gm_transition(x, low, high, means, s) }
  def log_prob(x, means: R[K = 3, C, H, W], w: R[K = 3, H, W], variance: R) { gm_log_prob(x, means, w, variance) }
  def convert(y: R[C, H, W], later: R, x, t: R, means: R[K = 3, C, H, W], w: R[K = 3, H, W], s: R) { gm_convert(y, later, x, t, means, w, s) }
  def reweigh(m: R[C, H, W], bias: R[C, H, W], V: R, u: R, means: R[K = 3, C, H, W], w: R[K = 3, H, W], s: R) { gm_reweigh(m, bias, V, u, means, w, s) }
  def push(told: R[C, H, W], free: R[C, H, W], V: R, w: R) { gm_bias(told, free, V, w) }
  def mean_of(means: R[K = 3, C, H, W], w: R[K = 3, H, W]) { gm_mean(means, w) }
}
"""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def parts(channels: int = 2, size: int = 1, count: int = 3) -> Any:
    return fl.compile(PARTS.replace("K = 3", f"K = {count}"), C=channels, H=size, W=size, dtype=F64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def full(n: int, value: float) -> Tensor:
    return torch.full((n,), value, dtype=F64)


def coefficients(low: float, high: float) -> tuple[float, float, float]:
    """Of q(x_low | x_high, x0) by the product of two Gaussians: of x_high, of x0, and the variance."""
    a = (1 - high) / (1 - low)
    rest = high**2 - (a * low) ** 2  # the variance of x_high given x_low
    return a * low**2 / high**2, rest * (1 - low) / high**2, low**2 * rest / high**2


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (0.3, 0.6), (0.0, 0.7)])
def test_item_1_one_component_is_flow_matching(low: float, high: float) -> None:
    n, model = 20, parts(2, 1, 1)
    x0, x = rand(n, 2, 1, 1), rand(n, 2, 1, 1, seed=1)
    c1, c2, c3 = coefficients(low, high)
    near = c1 * x + c2 * x0 + math.sqrt(c3) * rand(n, 2, 1, 1, seed=2)
    A = rand(n, 2, 1, 1, seed=3).requires_grad_()
    s = full(n, -0.3)
    means, variance = model.transition(x, full(n, low), full(n, high), (x - high * A)[:, None], s + math.log(high))
    loss = -model.log_prob(near, means, torch.zeros(n, 1, 1, 1, dtype=F64), variance).sum()
    (slope,) = torch.autograd.grad(loss, A)
    target = (
        x - (near - c1 * x) / c2
    ) / high  # its mean given x0 and x is (x - x0)/high, what flow matching regresses on
    torch.testing.assert_close(
        slope * (variance / (c2 * high) ** 2)[:, None, None, None], A - target, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close((x - (c1 * x + c2 * x0 - c1 * x) / c2) / high, (x - x0) / high)
    torch.testing.assert_close(variance, (c2 * high * s.exp()) ** 2 + c3)


def test_item_2_all_the_way_down_it_is_the_likelihood_of_data() -> None:
    n, model = 10, parts()
    means, s = rand(n, 3, 2, 1, 1), 0.3 * rand(n, seed=2)
    found, variance = model.transition(rand(n, 2, 1, 1, seed=3), full(n, 0), full(n, 0.8), means, s)
    torch.testing.assert_close(found, means)
    torch.testing.assert_close(variance, (2 * s).exp())
    whole: Any = fl.compile("model m = gmflow(v = gm_mlp2d(3, 8), ratio = 1)", C=2, H=1, W=1, seed=0, dtype=F64)
    x0 = rand(n, 2, 1, 1, seed=4)
    g = generator(5)
    for _ in range(2):
        noise = torch.randn(n, 2, 1, 1, dtype=F64, generator=g)
    t = torch.rand(n, dtype=F64, generator=g).clamp_min(1e-4)
    x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
    torch.testing.assert_close(whole.loss(x0, generator=generator(5)), -whole.log_prob_x0(x0, x, t).mean())


def test_item_3_two_transitions_are_one() -> None:
    n, model = 6, parts(1, 1, 1)
    x, m, s = rand(n, 1, 1, 1), rand(n, 1, 1, 1, 1, seed=1), full(n, -0.4)
    high, middle, low = full(n, 0.9), full(n, 0.6), full(n, 0.2)
    w = torch.zeros(n, 1, 1, 1, dtype=F64)
    direct, variance = model.transition(x, low, high, m, s)
    first, var1 = model.transition(x, middle, high, m, s)

    def second(y: Tensor) -> tuple[Tensor, Tensor]:
        means, _, std = model.convert(y, middle, x, high, m, w, s)
        return model.transition(y, low, middle, means, std)

    mean, var2 = second(first[:, 0])
    slope = second(first[:, 0] + 1)[0] - mean  # linear in y
    torch.testing.assert_close(mean, direct, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.flatten() ** 2 * var1 + var2, variance, rtol=1e-5, atol=1e-5)


def test_item_3_with_several_components_by_draws() -> None:
    n, model = 200_000, parts(1, 1, 3)
    m = torch.tensor([-1.0, 0.2, 1.4], dtype=F64).reshape(1, 3, 1, 1, 1).expand(n, -1, -1, -1, -1)
    w = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log().reshape(1, 3, 1, 1).expand(n, -1, -1, -1)
    x, s, g = full(n, 0.3).reshape(n, 1, 1, 1), full(n, -1.2), generator(8)

    def drawn(means: Tensor, weights: Tensor, variance: Tensor) -> Tensor:
        chosen = torch.multinomial(weights[:, :, 0, 0].exp(), 1, generator=g)[:, 0]
        return means[torch.arange(n), chosen] + (variance**0.5).reshape(n, 1, 1, 1) * torch.randn(
            n, 1, 1, 1, dtype=F64, generator=g
        )

    means, variance = model.transition(x, full(n, 0.2), full(n, 0.9), m, s)
    direct = drawn(means, w, variance)
    first, var1 = model.transition(x, full(n, 0.6), full(n, 0.9), m, s)
    y = drawn(first, w, var1)
    again, weights, std = model.convert(y, full(n, 0.6), x, full(n, 0.9), m, w, s)
    means, variance = model.transition(y, full(n, 0.2), full(n, 0.6), again, std)
    found = drawn(means, weights, variance)
    error = float(direct.std()) * (2 / n) ** 0.5
    assert abs(float(found.mean() - direct.mean())) <= 4 * error
    assert abs(float(found.var() / direct.var()) - 1) <= 0.02


EXACT = """
net exact(x: R[C, H, W], t: R) {
  place: R[K = 2] = stack[K](1.0, -0.5)
  a: R[K, C, H, W] = place + 0 * x
  α = 1 - t
  spread = α ^ 2 * 0.04 + t ^ 2
  m = a + 0.04 * α / max(spread, 1e-12) * (x - α * a)
  away: R[K, H, W] = sum[C]((x - α * a) ^ 2) / (2 * max(spread, 1e-12))
  prior: R[K] = stack[K](log(0.3), log(0.7))
  s = log(0.2) - 0.5 * log(max(spread, 1e-12))
  (x - m) / max(t, 1e-6), log_softmax[K](prior - away), s
}
"""


def exact_field(x: Tensor, t: float) -> Tensor:
    a, p = torch.tensor([1.0, -0.5], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    spread = (1 - t) ** 2 * 0.04 + t**2
    away = x[:, None] - (1 - t) * a
    weights = (p.log() - away**2 / (2 * spread)).softmax(-1)
    return (x - (weights * (a + 0.04 * (1 - t) / spread * away)).sum(-1)) / t


@pytest.mark.parametrize("substeps", [16, 64])
def test_item_4_one_call_of_an_exact_mixture_is_the_exact_field(substeps: int) -> None:
    model: Any = fl.compile(
        EXACT + f"model m = gmflow(v = exact(), steps = 1, substeps = {substeps})", C=1, H=1, W=1, dtype=F64
    )
    z = rand(40, seed=9)
    with torch.no_grad():
        noise = z.clone()
        for j in range(substeps):
            z = z - exact_field(z, 1 - j / substeps) / substeps
        found = model.follow_from(noise.reshape(40, 1, 1, 1))
    assert (found.flatten() - z).abs().max() <= 1e-6


def test_item_5_at_the_same_time_and_place_nothing_changes() -> None:
    n, model = 10, parts()
    x, means, w, s = (
        rand(n, 2, 1, 1),
        rand(n, 3, 2, 1, 1, seed=1),
        rand(n, 3, 1, 1, seed=2).log_softmax(1),
        0.2 * rand(n, seed=3),
    )
    t = full(n, 0.7)
    found, weights, std = model.convert(x, t, x, t, means, w, s)
    torch.testing.assert_close(found, means)
    torch.testing.assert_close(weights, w)
    torch.testing.assert_close(std, s)
    near = model.convert(x, t - 1e-6, x, t, means, w, s)
    torch.testing.assert_close(model.mean_of(near[0], near[1]), model.mean_of(means, w), rtol=1e-4, atol=1e-4)


def test_item_6_guidance() -> None:
    n, model = 10, parts(2, 2)
    means, w, s = rand(n, 3, 2, 2, 2), rand(n, 3, 2, 2, seed=1).log_softmax(1), 0.2 * rand(n, seed=2)
    m, free, V = rand(n, 2, 2, 2, seed=3), rand(n, 2, 2, 2, seed=4), full(n, 0.6)
    zero = model.reweigh(m, 0 * m, V, full(n, 1.0), means, w, s)
    for found, wanted in zip(zero, (means, w, s), strict=True):
        torch.testing.assert_close(found, wanted)
    bias = model.push(m, free, V, full(n, 0.3))
    torch.testing.assert_close((bias**2).mean((1, 2, 3)), 0.09 * V)
    assert (bias * m).mean((1, 2, 3)).abs().max() <= 1e-9
    # the product with the quotient of Gaussians, point by point
    out = model.reweigh(m, bias, V, full(n, 1 - 0.09), means, w, s)
    y = rand(n, 2, 2, 2, seed=5)

    def density(mu: Tensor, weights: Tensor, log_std: Tensor) -> Tensor:
        v = (2 * log_std)[:, None, None, None].exp()
        return torch.logsumexp(weights - ((y[:, None] - mu) ** 2).sum(2) / (2 * v) - v.log(), 1)

    def gauss(mu: Tensor, v: float) -> Tensor:
        return -((y - mu) ** 2).sum(1) / (2 * v)

    quotient = gauss(m + bias, 0.6 * (1 - 0.09)) - gauss(m, 0.6)
    there = density(*out) - density(means, w, s) - quotient
    y = rand(n, 2, 2, 2, seed=6)
    quotient = gauss(m + bias, 0.6 * (1 - 0.09)) - gauss(m, 0.6)
    torch.testing.assert_close(density(*out) - density(means, w, s) - quotient, there)  # the same constant everywhere


def test_item_7_the_density_of_data_integrates_to_one() -> None:
    model: Any = fl.compile("model m = gmflow(v = gm_mlp2d(8, 16))", C=2, H=1, W=1, seed=0, dtype=F64)
    axis = torch.linspace(-12, 12, 301, dtype=F64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2, 1, 1)
    x, t = rand(1, 2, 1, 1, seed=7).expand(len(grid), -1, -1, -1), full(len(grid), 0.6)
    with torch.no_grad():
        mass = model.log_prob_x0(grid, x, t).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(float(mass) - 1) <= 0.01


def checkerboard(n: int, g: torch.Generator) -> Tensor:
    x = 4 * torch.rand(n, generator=g) - 2
    y = torch.rand(n, generator=g) - 2 * torch.randint(2, (n,), generator=g) + x.floor() % 2
    return torch.stack([x, y], -1).reshape(n, 2, 1, 1)


def energy_distance(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten(1), b.flatten(1)
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def fitted(components: int, steps: int = 600) -> Any:
    model: Any = fl.compile(
        f"model m = gmflow(v = gm_mlp2d({components}, 64, 64, 64), steps = 4, substeps = {16 if components > 1 else 1})",
        C=2,
        H=1,
        W=1,
        seed=0,
    )
    g, optimizer = generator(12), torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(checkerboard(512, g), generator=g).backward()
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.slow
def test_item_8_few_steps_on_a_checkerboard() -> None:
    many, one = fitted(8), fitted(1)
    data = checkerboard(3000, generator(13))
    with torch.no_grad():
        mixture = energy_distance(many.sample_ode((3000,), generator=generator(14)), data)
        euler = energy_distance(one.sample_ode((3000,), generator=generator(14)), data)
    assert mixture < 0.6 * euler, (mixture, euler)


def test_a_step_of_training_and_the_other_samplers() -> None:
    model: Any = fl.compile("gmflow_tiny", C=2, H=1, W=1, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = model.loss(checkerboard(256, generator(15)), generator=generator(16))
    before.backward()
    optimizer.step()
    assert torch.isfinite(before)
    for name in ("sample_ode", "sample_gm2", "sample_sde"):
        assert torch.isfinite(getattr(model, name)((50,), generator=generator(17))).all()


def test_onnx(tmp_path: Path) -> None:
    model: Any = fl.compile("model m = gmflow(v = gm_mlp2d(3, 16), steps = 2, substeps = 3)", C=2, H=1, W=1, seed=0)
    same_in_onnx(model, "sample_ode", tmp_path, dynamic=())
    same_in_onnx(
        model,
        "log_prob_x0",
        tmp_path,
        *(torch.randn(5, 2, 1, 1, generator=generator(18)) for _ in range(2)),
        torch.rand(5) * 0.9 + 0.1,
        dynamic=(),
    )
    guided: Any = fl.compile(
        "model p = probabilistic_guidance(v = gm_dit(2, 32, 1, 2, 2, 3), classes = 3, steps = 2, substeps = 2)",
        C=2,
        H=4,
        W=4,
        seed=0,
    )
    labels = torch.tensor([0, 1, 2, 0, 1])
    guided.loss(torch.randn(5, 2, 4, 4), labels).backward()
    same_in_onnx(
        guided,
        "guided",
        tmp_path,
        torch.randn(5, 2, 4, 4),
        torch.rand(5) * 0.8 + 0.1,
        labels,
        tolerance=1e-3,
        dynamic=(),
    )


# ---- the learned spectrum -------------------------------------------------------------------------

TRANSPORT = """
model m {
  data x: R[C = 2, H = 3, W = 4]
  f = gm_transport
  def there(x, means: R[K = 3, C = 2, H = 3, W = 4], w: R[K = 3, H = 3, W = 4], s: R) { z, d = f(x, means, w, s);  z, d }
  def back(x, means: R[K = 3, C = 2, H = 3, W = 4], w: R[K = 3, H = 3, W = 4], s: R) { z, d = inverse(f)(x, means, w, s);  z, d }
  def transform(x) { y: R[C, H, W] = hartley(x);  y }
}
"""


@cache
def transport() -> Any:
    return fl.compile(TRANSPORT, dtype=F64)


def a_mixture(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rand(n, 3, 2, 3, 4, seed=20),
        rand(n, 3, 3, 4, seed=21).log_softmax(1),
        0.3 * rand(n, seed=22),
    )


def fourier(x: Tensor) -> Tensor:
    f = torch.fft.fft2(x, norm="ortho")
    return f.real + f.imag


def by_hand(x: Tensor, means: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """The transport, channel by channel, in the normal distribution function."""
    std, weights, out = s.exp()[:, None, None, None], w, []
    for c in range(x.shape[1]):
        away = (x[:, None, c] - means[:, :, c]) / std
        out.append(torch.special.ndtri((weights.softmax(1) * torch.special.ndtr(away)).sum(1)))
        weights = weights - 0.5 * away**2
    return torch.stack(out, 1)


def test_the_transport_is_derived_and_its_density_is_the_mixtures() -> None:
    """Only the forward map is written: the inverse and the log-det are the compiler's, and give the mixture's density."""
    n, m = 20, transport()
    means, w, s = a_mixture(n)
    x = rand(n, 2, 3, 4, seed=23)
    z, log_det = m.there(x, means, w, s)
    torch.testing.assert_close(z, by_hand(x, means, w, s), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m.back(z, means, w, s)[0], x, rtol=1e-9, atol=1e-9)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=w.permute(0, 2, 3, 1)),
        torch.distributions.Independent(
            torch.distributions.Normal(means.permute(0, 3, 4, 1, 2), s.exp()[:, None, None, None, None]), 1
        ),
    )
    wanted = mixture.log_prob(x.permute(0, 2, 3, 1)).sum((1, 2))
    found = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3)) + log_det
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_transform_is_fourier_s_and_its_own_inverse() -> None:
    x = rand(5, 2, 3, 4, seed=24)
    found = transport().transform(x)
    torch.testing.assert_close(found, fourier(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transport().transform(found), x, rtol=1e-9, atol=1e-9)


def pairs_of(net: Any) -> list[tuple[Tensor, Tensor]]:
    every = list(net.parameters())
    return list(zip(every[::2], every[1::2], strict=True))


SPECTRAL = "model m = gmflow(v = gm_mlp2d(3, 16), steps = 3, spectral = true)"


def test_the_spectral_loss_is_the_formula_and_trains_the_spectrum_alone() -> None:
    n = 6
    model: Any = fl.compile(SPECTRAL, C=2, H=4, W=4, seed=0, dtype=F64)
    with torch.no_grad():
        for p in model.spectrum.parameters():
            p.add_(0.3 * rand(*p.shape, seed=25))
    x1, x, t = rand(n, 2, 4, 4, seed=26), rand(n, 2, 4, 4, seed=27), full(n, 0.6)
    found = model.spectral_loss(x1, x, t)
    with torch.no_grad():
        A, w, s = model.v(x, t)
        means, log_std = x[:, None] - 0.6 * A, s + math.log(0.6)
        f = fourier(by_hand(x1, means, w, log_std).clamp(-5, 5))
        mean = (w.exp()[:, :, None] * means).sum(1)
        V = (2 * log_std).exp() + (w.exp()[:, :, None] * (means - mean[:, None]) ** 2).sum(1).mean((1, 2, 3))
    h = torch.stack([V, mean.var((2, 3)).mean(1)], -1)
    *inner, last = pairs_of(model.spectrum)
    for weight, bias in inner:
        h = torch.nn.functional.silu(h @ weight.mT + bias)
    o = (h @ last[0].mT + last[1]).reshape(n, 2, 16)
    lv = (o.log_softmax(-1) + math.log(16)).reshape(n, 2, 4, 4)
    torch.testing.assert_close(lv.exp().mean((2, 3)), torch.ones(n, 2, dtype=F64))
    wanted = (f**2 * ((-lv).exp() - 1) + lv).mean()  # 0.5 · C, C = 2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.v.parameters())
    assert all(p.grad.any() for p in model.spectrum.parameters())


def test_the_loss_is_the_sum_of_both() -> None:
    whole: Any = fl.compile(SPECTRAL, C=2, H=4, W=4, seed=0, dtype=F64)
    plain: Any = fl.compile(SPECTRAL.replace("true", "false"), C=2, H=4, W=4, seed=0, dtype=F64)
    x1 = rand(6, 2, 4, 4, seed=28)
    g = generator(29)
    a, b = (torch.randn(6, 2, 4, 4, dtype=F64, generator=g) for _ in range(2))
    t = torch.rand(6, dtype=F64, generator=g).clamp_min(1e-4)
    low = 0.1 * t
    step = (1 - t) / (1 - low)
    near = (1 - low)[:, None, None, None] * x1 + low[:, None, None, None] * a
    far = step[:, None, None, None] * near + (t**2 - (step * low) ** 2).sqrt()[:, None, None, None] * b
    first = plain.loss(x1, generator=generator(29))
    torch.testing.assert_close(first, plain.transition_loss(x1, generator=generator(29)))
    torch.testing.assert_close(whole.loss(x1, generator=generator(29)), first + whole.spectral_loss(x1, far, t))


def correlated(n: int, g: torch.Generator) -> Tensor:
    """Stationary images whose neighbours go together: white noise, each frequency by its own factor."""
    k = torch.fft.fftfreq(8)
    factor = torch.exp(-6 * (k[:, None] ** 2 + k**2).sqrt())
    return torch.fft.ifft2(
        torch.fft.fft2(torch.randn(n, 1, 8, 8, generator=g)) * factor / factor.square().mean().sqrt()
    ).real


@pytest.mark.slow
def test_draws_with_the_learned_spectrum_go_together_as_the_data_do() -> None:
    """One component at each place, which knows nothing of its neighbours: from noise in one step, only the spectrum joins them."""
    model: Any = fl.compile(
        "net still(x: R[C, H, W], t: R) { stack[K](x), stack[K](0 * x[C = 0]), 0 * t }"
        + "\nmodel m = gmflow(v = still(), steps = 1, spectral = true)", C=1, H=8, W=8, seed=0,
    )  # fmt: skip
    g, optimizer = generator(30), torch.optim.Adam(model.spectrum.parameters(), lr=3e-2)
    for _ in range(300):
        x1 = correlated(64, g)
        optimizer.zero_grad()
        model.spectral_loss(x1, torch.randn(64, 1, 8, 8, generator=g), torch.ones(64)).backward()
        optimizer.step()
    with torch.no_grad():
        drawn = model.sample_sde((4000,), generator=g)

    def beside(x: Tensor, dim: int) -> float:
        return float((x * x.roll(1, dim)).mean() / x.square().mean())

    data = correlated(4000, g)
    for dim in (2, 3):
        assert beside(data, dim) > 0.5
        assert abs(beside(drawn, dim) - beside(data, dim)) <= 0.05
    assert abs(float(drawn.std()) - 1) <= 0.05


def test_onnx_of_the_spectral_sampler(tmp_path: Path) -> None:
    model: Any = fl.compile("model m = gmflow(v = gm_mlp2d(2, 8), steps = 2, spectral = true)", C=2, H=2, W=2, seed=0)
    with torch.no_grad():
        for p in model.spectrum.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator(31)))
    same_in_onnx(model, "sample_sde", tmp_path, dynamic=(), tolerance=1e-3)


def test_the_published_network_has_its_size() -> None:
    """DiT-XL/2 of 675,129,632 numbers with 8 channels out, in the place of which are 40 and the deviation's two layers; less the
    fixed positions that the DiT's authors count."""
    text = "net f(x: R[C = 4, H = 32, W = 32], t: R, y: Int) { gm_dit()(x, t, y) }"
    region = analyse(text, {}, sized=True, build="f").regions["f"]
    last = (1152 + 1) * 4 * 40 - (1152 + 1) * 4 * 8
    deviation = (1152 + 1) * 1024 + 1024 + 1
    assert parameter_count(region) == 675_129_632 - 256 * 1152 + last + deviation
