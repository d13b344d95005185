"""Card 042, Constant Acceleration Flow (Park et al. 2024): what must hold, item by item."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor

import flowlang as fl
from flowlang.analysis.size import parameter_count
from flowlang.api import analyse
from flowlang.elaborate.paths import read_path
from tests.catalogue.programs import same_in_onnx
from tests.library.registry import declaration

F64 = torch.float64
# x1 = 2 x0 + 1 and v0 = 3 x0, an arbitrary one: at t = 0 from x0, at t = 1 from x1, and the acceleration from v0 alone.
ORACLE = """
net oracle_velocity(x: R[D], t: R) { (1 - t) * 3 * x + t * 1.5 * (x - 1) }
net oracle_acceleration(x: R[D], t: R, v0: R[D]) { 2 * (v0 / 3 + 1) - 2 * v0 + 0 * (x + t) }
"""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def oracle(steps: int) -> Any:
    text = ORACLE + f"model m = caf(v = oracle_velocity(), a = oracle_acceleration(), steps = {steps})"
    return fl.compile(text, D=3, dtype=F64)


def pairs(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    x0 = torch.randn(n, 3, dtype=F64, generator=generator(seed))
    return x0, 2 * x0 + 1


def test_item_1_ends_initial_velocity_and_constant_acceleration() -> None:
    model = oracle(1)
    x0, x1, v0 = torch.randn(3, 6, 3, dtype=F64, generator=generator(1))
    zero, one = torch.zeros(6, dtype=F64), torch.ones(6, dtype=F64)
    assert (model.at(zero, x0, x1, v0) - x0).abs().max() <= 1e-7
    assert (model.at(one, x0, x1, v0) - x1).abs().max() <= 1e-7

    def rate(t: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda s: model.at(s.expand(6), x0, x1, v0), t, create_graph=True)

    torch.testing.assert_close(rate(torch.tensor(0.0, dtype=F64)), v0)
    for t in (0.1, 0.7):
        second = torch.autograd.functional.jacobian(rate, torch.tensor(t, dtype=F64))
        torch.testing.assert_close(second, 2 * (x1 - x0) - 2 * v0)
    t, a, b = sp.symbols("t x0 x1", real=True)
    path = read_path(declaration("caf_path"), {"alpha": sp.Rational(3, 2)}).place
    assert path.subs(t, 0).equals(a)
    assert path.subs(t, 1).equals(b)
    assert sp.diff(path, t).subs(t, 0).equals(sp.Rational(3, 2) * (b - a))
    assert sp.simplify(sp.diff(path, t, 2) - 2 * (1 - sp.Rational(3, 2)) * (b - a)) == 0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_item_2_an_oracle_is_exact_in_any_number_of_steps(steps: int) -> None:
    x0, x1 = pairs()
    assert (oracle(steps).generate(x0) - x1).abs().max() <= 1e-6


def test_item_2_euler_on_the_same_field_is_of_first_order() -> None:
    x0, x1 = pairs()
    v0 = 3 * x0
    errors = []
    for n in (8, 16, 32):
        z = x0
        for i in range(n):
            z = z + (v0 + (2 * (x1 - x0) - 2 * v0) * i / n) / n
        errors.append((z - x1).abs().max())
    assert 1.8 <= errors[0] / errors[1] <= 2.2
    assert 1.8 <= errors[1] / errors[2] <= 2.2


def test_item_3_with_alpha_one_it_is_rectified_flow() -> None:
    caf: Any = fl.compile("model m = caf(alpha = 1)", D=3, seed=0, dtype=F64)
    matching: Any = fl.compile("""model m(v: net = time_mlp(64, 64, 64)) {
      data x1: R[D = 3], x0: R[D = 3]
      def loss(x1, x0) {
        t ~ uniform(0, 1)
        u: R[D] = v((1 - t) * x0 + t * x1, t)
        mean((u - (x1 - x0)) ^ 2)
      }
    }""", dtype=F64)  # fmt: skip
    matching.v.load_state_dict(caf.v.state_dict())
    x0, x1 = pairs()
    found = caf.velocity_loss(x0, x1, generator=generator(2))
    assert abs(found - matching.loss(x1, x0, generator=generator(2))) <= 1e-7
    straight = ORACLE.replace("(1 - t) * 3 * x + t * 1.5 * (x - 1)", "x + 1 + 0 * t").replace(
        "2 * (v0 / 3 + 1) - 2 * v0 +", "0 * v0 +"
    )
    exact: Any = fl.compile(
        straight + "model m = caf(v = oracle_velocity(), a = oracle_acceleration(), alpha = 1)", D=3, dtype=F64
    )
    assert exact.acceleration_loss(x0, x1, generator=generator(3)) <= 1e-14  # no acceleration is the target


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_item_4_inversion_by_an_oracle_gives_the_start(steps: int) -> None:
    x0, x1 = pairs()
    assert (oracle(steps).invert(x1) - x0).abs().max() <= 1e-6


def test_item_5_the_second_stage_does_not_train_the_first_network() -> None:
    model: Any = fl.compile("caf_tiny", D=3, seed=0)
    x0, x1 = (v.float() for v in pairs())
    model.acceleration_loss(x0, x1, generator=generator(4)).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.v.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.a.parameters())


def crossing(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symmetric pairs: all lines meet at the origin, half way."""
    x0 = torch.randn(n, 2, generator=g)
    return x0, -x0


def fit(model: Any, program: str, parameters: Any, g: torch.Generator, steps: int = 800) -> None:
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        x0, x1 = crossing(256, g)
        getattr(model, program)(x0, x1, generator=g).backward()
        optimizer.step()
        schedule.step()


def test_item_6_crossing_pairs_are_kept_better_than_by_a_rectified_flow() -> None:
    g = generator(5)
    model: Any = fl.compile("caf", D=2, seed=0)
    fit(model, "velocity_loss", model.v.parameters(), g)
    fit(model, "acceleration_loss", model.a.parameters(), g)
    plain: Any = fl.compile("model m = caf(alpha = 1)", D=2, seed=1)
    fit(plain, "velocity_loss", plain.v.parameters(), g)
    x0, x1 = crossing(2000, g)
    with torch.no_grad():
        ours = (model.generate(x0) - x1).norm(dim=-1).mean()
        theirs = (x0 + plain.velocity(x0, torch.zeros(2000)) - x1).norm(dim=-1).mean()
    assert ours <= 0.5 * theirs, (float(ours), float(theirs))


@pytest.mark.parametrize("steps", [1, 4])
def test_item_7_a_sample_takes_one_evaluation_more_than_its_steps(steps: int) -> None:
    model: Any = fl.compile(f"model m = caf(steps = {steps})", D=2, seed=0)
    calls = []
    for net in (model.v, model.a):
        net.register_forward_hook(lambda module, *_: calls.append(module))
    model.sample((3,), generator=generator(6))
    assert len(calls) == steps + 1


def test_huber_is_the_formula() -> None:
    model: Any = fl.compile("model m = caf(huber = true)", D=3, seed=0, dtype=F64)
    x0, x1 = pairs()
    g = generator(7)
    t = torch.rand(6, dtype=F64, generator=g)
    v0 = 1.5 * (x1 - x0)
    d = model.v(model.at(t, x0, x1, v0), t) - v0
    c = 0.00054 * 3
    wanted = (((d**2).sum(-1) + c**2).sqrt() - c).mean() / 3
    torch.testing.assert_close(model.velocity_loss(x0, x1, generator=generator(7)), wanted)


def test_onnx_both_networks_the_sampler_and_the_inversion(tmp_path: Path) -> None:
    model: Any = fl.compile("model m = caf(v = time_mlp(16), a = time_mlp(16), steps = 3)", D=3, seed=0)
    x0, x1 = (v.float() for v in pairs(5))
    t = torch.rand(5, generator=generator(8))
    same_in_onnx(model, "velocity", tmp_path, x0, t)
    same_in_onnx(model, "acceleration", tmp_path, x0, t, x1)
    same_in_onnx(model, "sample", tmp_path)
    same_in_onnx(model, "generate", tmp_path, x0)
    same_in_onnx(model, "invert", tmp_path, x1)


def test_the_published_networks_have_their_size() -> None:
    """ADM's U-net for 64 pixels (295,904,454 numbers, one label more in ours), with 6 channels in and 3 out, and no labels."""
    text = "net f(x: R[C = 3, H = 64, W = 64], t: R, v0: R[C = 3, H = 64, W = 64]) { caf_unet_published()(x, t, v0) }"
    region = analyse(text, {}, sized=True, build="f").regions["f"]
    labels, last, first = 1000 * 768, 192 * 9 * 3 + 3, 192 * 9 * 3
    assert parameter_count(region) == 295_904_454 - labels - last + first


def test_images_train_a_step_and_keep_their_ends(tmp_path: Path) -> None:
    text = "model m = caf_images(v = caf_unet(unet(8, [1, 2], 1, [2], 8, 10, 4)), a = caf_unet(unet(8, [1, 2], 1, [2], 8, 10, 4)), steps = 2)"
    model: Any = fl.compile(text, C=2, H=4, W=4, seed=0)
    x0, x1 = torch.randn(2, 4, 2, 4, 4, generator=generator(9))
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):  # the last layers begin at 0
        optimizer.zero_grad()
        model.loss(x1, x0, generator=generator(10)).backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    half = len(moved) // 2
    assert len(moved) == 2 * half
    assert sum(moved[:half]) > 2
    assert sum(moved[half:]) > 2
    assert torch.equal(model.at(torch.zeros(4), x0, x1, x1), x0)
    g = generator(11)
    t = torch.rand(4, generator=g)
    d = model.velocity(model.at(t, x0, x1, 1.5 * (x1 - x0)), t) - 1.5 * (x1 - x0)
    c = 0.00054 * 32
    wanted = (((d**2).sum((1, 2, 3)) + c**2).sqrt() - c).mean() / 32
    torch.testing.assert_close(model.velocity_loss(x0, x1, generator=generator(11)), wanted)
    v0 = model.v(x0, torch.zeros(4), torch.zeros_like(x0))
    z = x0
    for i in range(2):
        z = z + v0 / 2 + (i / 2 + 1 / 4) / 2 * model.a(z, torch.full((4,), i / 2), v0)
    torch.testing.assert_close(model.generate(x0), z)
    same_in_onnx(model, "generate", tmp_path, x0, tolerance=1e-4, dynamic=())
