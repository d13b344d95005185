"""Card 011, Flow Matching (Lipman et al. 2023): what must hold, item by item."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor

import flowlang as fl
from flowlang.elaborate.paths import read_path
from tests.catalogue.programs import same_in_onnx
from tests.library.registry import declaration

F64 = torch.float64
GAUSSIAN = """
net exact(mean: real = 0.7, scale: real = 0.4) (x: R[D], t: R) {
  s = sqrt((1 - t) ^ 2 + t ^ 2 * scale ^ 2)
  mean + (t * scale ^ 2 - (1 - t)) / (s ^ 2) * (x - t * mean)
}
"""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def path_model(path: str) -> Any:
    return fl.compile(
        f"""model m(path: path = {path}) {{
          data x1: R[D = 1]
          def at(x1, x0: R[D], t: Unit) {{ path.at(t, x0, x1) }}
          def velocity(x1, x0: R[D], t: Unit) {{ path.velocity(t, x0, x1) }}
        }}""",
        dtype=F64,
    )


def card_paths() -> dict[str, tuple[Any, Any]]:
    """μ_t and σ_t as the card prints them, in sympy."""
    t, x1 = sp.symbols("t x1", real=True)
    s = 1 - t
    total = s * sp.Rational(1, 10) + s**2 * (20 - sp.Rational(1, 10)) / 2
    alpha = sp.exp(-total / 2)
    low, high = sp.Rational(1, 100), 50
    return {
        "ot": (t * x1, 1 - (1 - sp.Rational("1e-5")) * t),
        "vp": (alpha * x1, sp.sqrt(1 - alpha**2)),
        "ve": (x1, low * (high / low) ** s),
    }


@pytest.mark.parametrize("name", ["ot", "vp", "ve"])
def test_item_1_rate_of_the_conditional_flow_is_its_field(name: str) -> None:
    t, x0, x1 = sp.symbols("t x0 x1", real=True)
    arguments = {p.name: p.default.value for ps in declaration(name).parameters for p in ps if p.default is not None}
    found = read_path(declaration(name), {k: sp.Rational(str(v)) for k, v in arguments.items()}).place
    mean, scale = card_paths()[name]
    psi = scale * x0 + mean
    assert sp.simplify(found - psi) == 0
    field = sp.diff(scale, t) / scale * (psi - mean) + sp.diff(mean, t)
    assert sp.simplify(sp.diff(found, t) - field) == 0
    model = path_model(name)
    a, b, s = (torch.randn(20, 1, dtype=F64, generator=generator(k)) for k in range(3))
    s = 0.02 + 0.96 * torch.sigmoid(s[:, 0])
    exact = sp.lambdify((t, x0, x1), field, "mpmath")
    wanted = torch.tensor(
        [float(exact(*v)) for v in zip(s.tolist(), a[:, 0].tolist(), b[:, 0].tolist(), strict=True)], dtype=F64
    )
    torch.testing.assert_close(model.velocity(b, a, s)[:, 0], wanted, rtol=1e-8, atol=1e-8)


def test_item_2_the_path_begins_at_noise_and_ends_at_data() -> None:
    x0, x1 = torch.randn(2, 50, 1, dtype=F64, generator=generator(0))
    zero, one = torch.zeros(50, dtype=F64), torch.ones(50, dtype=F64)
    ot = path_model("ot(sigma_min = 1e-3)")
    assert torch.equal(ot.at(x1, x0, zero), x0)
    torch.testing.assert_close(ot.at(x1, x0, one), x1 + 1e-3 * x0, rtol=0, atol=1e-14)
    vp = path_model("vp")
    assert (vp.at(x1, x0, zero) - x0).abs().max() <= 1e-2 * x1.abs().max()
    assert abs(math.exp(-0.5 * (0.1 + 19.9 / 2))) <= 1e-2  # what is left of the data's mean at t = 0
    torch.testing.assert_close(vp.at(x1, x0, one), x1, rtol=0, atol=1e-12)


POINTS = torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.2]], dtype=F64)


def posterior(x: Tensor, t: Tensor) -> Tensor:
    """Weights of the three points given x_t = x on the straight path, [batch, 3]."""
    s = (1 - (1 - 1e-5) * t)[:, None, None]
    away = (x[:, None] - t[:, None, None] * POINTS) / s
    return torch.softmax(-0.5 * away.square().sum(-1), -1)


def conditional(x: Tensor, t: Tensor) -> Tensor:
    """u_t(x | x1) for each of the three points, [batch, 3, 2]."""
    return (POINTS - (1 - 1e-5) * x[:, None]) / (1 - (1 - 1e-5) * t)[:, None, None]


def test_item_3_both_losses_have_one_gradient() -> None:
    model: Any = fl.compile("model m = flow_matching(v = time_mlp(16))", D=2, seed=0, dtype=F64)
    g = generator(1)
    n = 20_000
    which = torch.randint(3, (n,), generator=g)
    t = 0.9 * torch.rand(n, dtype=F64, generator=g)
    x0 = torch.randn(n, 2, dtype=F64, generator=g)
    x = (1 - (1 - 1e-5) * t)[:, None] * x0 + t[:, None] * POINTS[which]
    weights, each = posterior(x, t), conditional(x, t)
    marginal = (weights[..., None] * each).sum(1)
    out = model.v(x, t)
    parameters = list(model.v.parameters())
    conditional_loss = (weights * (out[:, None] - each).square().mean(-1)).sum(-1).mean()
    marginal_loss = (out - marginal).square().mean()
    a = torch.autograd.grad(conditional_loss, parameters, retain_graph=True)
    b = torch.autograd.grad(marginal_loss, parameters, retain_graph=True)
    for u, v in zip(a, b, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-10)
    # 64 draws of x1 for each x_t stand for the posterior's mean.
    often = torch.multinomial(weights, 64, replacement=True, generator=g)
    counts = torch.zeros_like(weights).scatter_add(1, often, torch.ones_like(often, dtype=F64)) / 64
    c = torch.autograd.grad((counts * (out[:, None] - each).square().mean(-1)).sum(-1).mean(), parameters)
    assert (
        torch.cat([(u - v).flatten() for u, v in zip(c, b, strict=True)]).norm()
        <= 0.01 * torch.cat([v.flatten() for v in b]).norm()
    )


def test_item_3_the_compiled_loss_is_the_conditional_one() -> None:
    model: Any = fl.compile("model m = flow_matching(v = time_mlp(16))", D=2, seed=0, dtype=F64)
    x1 = torch.randn(7, 2, dtype=F64, generator=generator(2))
    found = model.loss(x1, generator=generator(3))
    g = generator(3)
    x0 = torch.randn(7, 2, dtype=F64, generator=g)
    t = torch.rand(7, dtype=F64, generator=g)
    x = (1 - (1 - 1e-5) * t)[:, None] * x0 + t[:, None] * x1
    wanted = (model.v(x, t) - (x1 - (1 - 1e-5) * x0)).square().mean()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


SINGLE = """
net towards(mean: real = 0.5) (x: R[D], t: Interval(-1e-6, 1.000001)) { FIELD }
model one = flow_matching(v = towards(), solver = euler(steps = 1), path = PATH)
"""


@pytest.mark.parametrize(
    ("path", "field", "exact"),
    [
        ("ot(sigma_min = 0.01)", "(mean - 0.99 * x) / (1 - 0.99 * t)", True),
        (
            "vp",
            "-0.5 * (0.1 + 19.9 * (1 - t)) * exp(-0.5 * T) / (1 - exp(-T) + 1e-6) * (exp(-0.5 * T) * x - mean)",
            False,
        ),
    ],
)
def test_item_4_one_data_point_is_reached_in_one_step_on_straight_paths_alone(
    path: str, field: str, exact: bool
) -> None:
    body = f"T = 0.1 * (1 - t) + 9.95 * (1 - t) ^ 2\n {field}" if "T" in field else field
    model: Any = fl.compile(SINGLE.replace("FIELD", body).replace("PATH", path), D=3, dtype=F64)
    x0 = torch.randn(6, 3, dtype=F64, generator=generator(4))
    end = model.sample((6,), generator=generator(4))
    if exact:
        torch.testing.assert_close(end, 0.5 + 0.01 * x0, rtol=0, atol=1e-12)
    else:
        assert (end - 0.5).abs().max() > 0.05


@cache
def gaussian(solver: str) -> Any:
    return fl.compile(
        GAUSSIAN + f"model g = flow_matching(v = exact(), path = cond_ot, solver = {solver})", D=1, dtype=F64
    )


def test_item_5_the_best_field_of_gaussian_data_is_affine_and_gives_the_data_back() -> None:
    """A linear net fitted by least squares to the path's velocity finds the slope and offset of the closed form; its samples have its moments."""
    path = path_model("cond_ot")
    g = generator(5)
    n = 400_000
    x1 = 0.7 + 0.4 * torch.randn(n, 1, dtype=F64, generator=g)
    x0 = torch.randn(n, 1, dtype=F64, generator=g)
    for time in (0.1, 0.4, 0.8):
        t = torch.full((n,), time, dtype=F64)
        x, u = path.at(x1, x0, t), path.velocity(x1, x0, t)
        slope, offset = torch.linalg.lstsq(torch.cat((x, torch.ones_like(x)), -1), u).solution[:, 0]
        at = torch.tensor([[0.0], [1.0]], dtype=F64)
        low, high = gaussian("rk4(steps = 40)").v(at, t[:2])[:, 0]
        assert abs(slope - (high - low)) <= 0.02 * abs(high - low)
        assert abs(offset - low) <= 0.02 * max(abs(low), 1)
    samples = gaussian("rk4(steps = 40)").sample((100_000,), generator=g)
    assert abs(samples.mean() - 0.7) <= 0.01
    assert abs(samples.std() - 0.4) <= 0.01


def test_item_6_density_of_an_affine_field_is_the_gaussian() -> None:
    x = torch.linspace(-1, 2.5, 40, dtype=F64)[:, None]
    wanted = torch.distributions.Normal(0.7, 0.4).log_prob(x[:, 0])
    for solver in ("dopri5(rtol = 1e-7, atol = 1e-7)", "rk4(steps = 60)"):
        assert (gaussian(solver).log_prob(x) - wanted).abs().max() <= 1e-4


def test_item_7_half_the_step_is_a_sixteenth_of_the_error() -> None:
    def end(steps: int) -> Tensor:
        text = (
            GAUSSIAN + f"model g = flow_matching(v = exact(scale = 2), path = cond_ot, solver = rk4(steps = {steps}))"
        )
        return fl.compile(text, D=1, dtype=F64).sample((64,), generator=generator(7))

    exact = end(800)
    errors = [(end(n) - exact).abs().max() for n in (25, 50, 100)]
    assert 13 <= errors[0] / errors[1] <= 19
    assert 13 <= errors[1] / errors[2] <= 19


def test_item_8_paths_of_ot_are_straight_and_those_of_vp_are_not() -> None:
    x0, x1 = torch.randn(2, 30, 1, dtype=F64, generator=generator(8))
    t = (0.1 + 0.8 * torch.rand(30, dtype=F64, generator=generator(9))).requires_grad_()
    for name, straight in (("ot", True), ("vp", False)):
        u = path_model(name).velocity(x1, x0, t)
        if not u.requires_grad:
            assert straight
            continue
        (second,) = torch.autograd.grad(u.sum(), t)
        assert bool(second.abs().max() == 0) is straight


def test_onnx_velocity_sampler_and_density(tmp_path: Path) -> None:
    model: Any = fl.compile("model m = flow_matching(solver = midpoint(steps = 4))", D=2, seed=0)
    x = torch.randn(5, 2, generator=generator(10))
    same_in_onnx(model, "velocity", tmp_path, x, torch.rand(5, generator=generator(11)))
    same_in_onnx(model, "log_prob", tmp_path, x)
    made = same_in_onnx(model, "sample", tmp_path)
    assert "Loop" in {n.op_type for n in made.graph.node}
    adaptive: Any = fl.compile("flow_matching", D=2, seed=0)
    made = same_in_onnx(adaptive, "sample", tmp_path, tolerance=1e-4)
    assert "Loop" in {n.op_type for n in made.graph.node}


def test_the_library_model_trains_a_step_and_vp_and_ve_compile() -> None:
    for arguments in (
        "",
        "path = vp, last = 0.99999, solver = rk4(steps = 4)",
        "path = ve, noise = 50, solver = rk4(steps = 4)",
    ):
        model: Any = fl.compile(f"model m = flow_matching({arguments})", D=2, seed=0)
        x = torch.randn(16, 2, generator=generator(12))
        before = [p.clone() for p in model.parameters()]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        model.loss(x, generator=generator(13)).backward()
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert torch.isfinite(model.sample((3,), generator=generator(14))).all()
        assert torch.isfinite(model.log_prob(x)).all()
