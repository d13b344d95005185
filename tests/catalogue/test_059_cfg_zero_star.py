"""Card 059, CFG-Zero* (Fan et al. 2025): what must hold, item by item."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowlang as fl
from tests.catalogue.programs import same_in_onnx

F64 = torch.float64
MIXTURE = "gmm_velocity(xs = [4, 0, -4, 0], ys = [0, 4, 0, -4])"
# The velocity without a label is off by a factor.
SCALED = """
net off(factor: real) (x: R[D], t: R, y: Int) {
  u: R[D] = gmm_velocity(xs = [4, 0, -4, 0], ys = [0, 4, 0, -4])(x, t, y)
  u * where(y == 2, factor, 1)
}
"""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def model(arguments: str = "", net: str = MIXTURE, dtype: torch.dtype = F64) -> Any:
    return fl.compile(f"{SCALED}\nmodel m = cfg_zero_star(v = {net}{arguments})", D=2, dtype=dtype)


def velocities(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    told, free = torch.randn(2, n, 2, dtype=F64, generator=generator(0))
    free = free * (1 + 0.5 / free.norm(dim=-1, keepdim=True))  # away from 0, where the formula's 1e-8 shows
    return told, free, 1 + 5 * torch.rand(n, dtype=F64, generator=generator(1))


def golden_section(f: Any, lo: Tensor, hi: Tensor) -> Tensor:
    ratio = (5**0.5 - 1) / 2
    for _ in range(80):
        a, b = hi - ratio * (hi - lo), lo + ratio * (hi - lo)
        left = f(a) < f(b)
        lo, hi = torch.where(left, lo, a), torch.where(left, b, hi)
    return (lo + hi) / 2


def test_item_1_the_scale_is_the_least_squares_projection() -> None:
    told, free, _ = velocities()
    found = model().scale_of(told, free)
    size = told.norm(dim=-1) / free.norm(dim=-1) + 1
    best = golden_section(lambda s: (told - s[:, None] * free).square().sum(-1), -size, size)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5)
    rest = told - found[:, None] * free
    cosine = (rest * free).sum(-1) / (rest.norm(dim=-1) * free.norm(dim=-1))
    assert cosine.abs().max() < 1e-5


def test_item_2_parallel_velocities_are_left_alone() -> None:
    _, free, w = velocities()
    told = 1.7 * free
    assert (model().guide(told, free, w) - told).abs().max() <= 1e-6
    plain = model(", star = false, zero_init = false")
    assert (plain.guide(told, free, w) - told).abs().max() > 0.1


def test_item_3_at_weight_one_nothing_is_guided() -> None:
    told, free, _ = velocities()
    torch.testing.assert_close(model().guide(told, free, torch.ones(40, dtype=F64)), told, rtol=1e-12, atol=1e-12)


def test_item_4_no_free_velocity_gives_the_weighted_one() -> None:
    told, free, w = velocities()
    assert model().scale_of(told, 0 * free).abs().max() == 0
    torch.testing.assert_close(model().guide(told, 0 * free, w), w[:, None] * told)


def test_item_5_each_sample_is_guided_by_itself() -> None:
    told, free, w = velocities()
    out, order = model().guide(told, free, w), torch.randperm(40, generator=generator(2))
    assert torch.equal(model().guide(told[order], free[order], w[order]), out[order])
    more = free.clone()
    more[3] *= 7
    again = model().guide(told, more, w)
    assert (again - out).abs().max() <= 1e-5
    assert abs(model().scale_of(told, more)[3] * 7 - model().scale_of(told, free)[3]) <= 1e-5


def test_item_6_the_first_steps_stand_still() -> None:
    x = torch.randn(6, 2, dtype=F64, generator=generator(3))
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    one = model(", steps = 1")
    assert torch.equal(one.denoise(x, y), x)
    for still in (0, 2):
        zeroed = model(f", steps = 7, zero_steps = {still}, star = false, guidance = 1")
        z = x
        for i in range(still + 1, 7):  # the time goes on while x stands still
            z = z + zeroed.velocity(z, torch.full((6,), i / 7, dtype=F64), y) / 7
        torch.testing.assert_close(zeroed.denoise(x, y), z)
    # A constant field moves by the time that is left.
    text = "net constant(x: R[D], t: R, y: Int) { 1 + 0 * (x + t + y) }\nmodel m = cfg_zero_star(v = constant(), steps = 10, zero_steps = 1)"
    moved = fl.compile(text, D=2, dtype=F64).denoise(x, y) - x
    torch.testing.assert_close(moved, torch.full_like(x, 1 - 2 / 10))


def distance(m: Any, n: int = 512 * 3) -> float:
    """Mean distance of samples of the first label to its nearest mode."""
    x = torch.randn(n, 2, dtype=F64, generator=generator(4))
    z = m.denoise(x, torch.zeros(n, dtype=torch.long))
    modes = torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=F64)
    return float((z[:, None] - modes).norm(dim=-1).min(1).values.mean())


def test_item_7_it_comes_nearer_to_the_modes_than_plain_guidance() -> None:
    plain, scaled, whole = (
        distance(model(a)) for a in (", star = false, zero_init = false", ", zero_init = false", "")
    )
    assert whole <= 0.9 * plain, (plain, scaled, whole)
    assert whole < scaled < plain


def test_item_8_a_scaled_free_velocity_does_not_matter() -> None:
    x = torch.randn(200, 2, dtype=F64, generator=generator(5))
    y = torch.zeros(200, dtype=torch.long)
    told, free, w = velocities()
    exact = model().denoise(x, y)
    for factor in (0.5, 1.5):
        off = f"off(factor = {factor})"
        assert (model().guide(told, factor * free, w) - model().guide(told, free, w)).abs().max() <= 1e-5
        # Where the free velocity passes through 0, its 1e-8 shows in the identity's last digits.
        apart = (model("", off).denoise(x, y) - exact).abs().amax(-1)
        assert apart.median() <= 1e-5
        assert apart.max() <= 1e-2
        assert distance(model(", star = false, zero_init = false", off)) >= 3 * distance(model("", off))


def test_onnx_guide_and_sampler(tmp_path: Path) -> None:
    net: Any = fl.compile("model m = cfg_zero_star(v = class_time_mlp(2, 16, 16), steps = 4)", D=2, seed=0)
    told, free, w = (v[:5].float() for v in velocities())
    same_in_onnx(net, "guide", tmp_path, told, free, w)
    same_in_onnx(net, "sample", tmp_path, torch.tensor([0, 1, 1, 0, 1]))


def test_the_library_model_trains_a_step() -> None:
    net: Any = fl.compile("cfg_zero_star", D=2, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, y = torch.randn(16, 2, generator=generator(6)), torch.arange(16) % 2
    before = [p.clone() for p in net.parameters()]
    net.loss(x, y, generator=generator(7)).backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
