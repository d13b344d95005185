"""Continuous flows against matrix exponentials, autograd and measured convergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flowlang.backends.torch.runtime import rows_at_once

import flowlang as fl
from flowlang.api import analyse
from flowlang.diagnostics import FlowError
from flowlang.verify import verify

LINEAR = """
net field(x: R[D], t: R) {{
  param A: R[D', D] = {matrix}
  sum[D](A * x)
}}
flow f {{
  data x: R[D = 3]
  cnf(v = field(), solver = {solver})
  base normal
}}
"""
A = [[0.25, -0.75, 0.125], [0.5, -0.25, 0.375], [0.0, 0.625, -0.5]]  # exact in float32 too


def linear(solver: str) -> torch.nn.Module:
    values = ", ".join(str(v) for row in A for v in row)
    return fl.compile(LINEAR.format(matrix=f"[{values}]", solver=solver), dtype=torch.float64)


@pytest.mark.parametrize(
    "solver", ["rk4(steps = 40)", "dopri5(rtol = 1e-9, atol = 1e-9)", "tsit5(rtol = 1e-9, atol = 1e-9)"]
)
def test_a_linear_field_is_a_matrix_exponential(solver: str) -> None:
    flow = linear(solver)
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = torch.tensor(A, dtype=torch.float64)
    z, log_det = flow(x)  # from t = 1 back to t = 0
    assert torch.allclose(z, x @ torch.linalg.matrix_exp(-a).mT, rtol=0, atol=1e-7)
    assert torch.allclose(log_det, -a.trace().expand(7), rtol=0, atol=1e-8)
    back, inverse_log_det = flow.inverse(z)
    assert torch.allclose(back, x, rtol=0, atol=1e-7)
    assert torch.allclose(inverse_log_det, a.trace().expand(7), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk3", 3), ("rk4", 4), ("dopri5", 5)]
)
def test_equal_steps_converge_at_the_solver_s_order(solver: str, order: int) -> None:
    x = torch.ones(1, 3, dtype=torch.float64)
    truth = x @ torch.linalg.matrix_exp(-torch.tensor(A, dtype=torch.float64)).mT
    with torch.no_grad():
        coarse, fine = (float((linear(f"{solver}(steps = {n})")(x)[0] - truth).norm()) for n in (4, 8))
    assert abs(math.log2(coarse / fine) - order) < 0.35


def test_tighter_tolerances_give_smaller_errors() -> None:
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = x @ torch.linalg.matrix_exp(-torch.tensor(A, dtype=torch.float64)).mT
    with torch.no_grad():
        errors = [
            float((linear(f"dopri5(rtol = {t}, atol = {t})")(x)[0] - truth).abs().max()) for t in (1e-4, 1e-6, 1e-8)
        ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-7


def test_each_sample_has_steps_of_its_own() -> None:
    flow = linear("dopri5(rtol = 1e-5, atol = 1e-5)")
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [[1e-3], [1], [1], [30], [1], [1]]
    )
    together = flow(x)[0]
    alone = torch.cat([flow(x[k : k + 1])[0] for k in range(6)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-14)


NETS = """
flow f {
  data x: R[D = 3]
  given c: R[C = 2]
  cnf(v = mlp(16, act = tanh), solver = rk4(steps = 12))
  affine_elementwise
  cnf(v = residual_mlp(8, 2, act = softplus), solver = dopri5(rtol = 1e-7, atol = 1e-7))
  base normal
}
"""
IMAGES = """
net field(x: R[C, H, W], t: R) {
  h = tanh(conv(x, 6, kernel = 3) * (1 + t))
  y: R[C, H, W] = conv(h, kernel = 3)
  y
}
flow f {
  data x: R[C = 2, H = 2, W = 3]
  cnf(v = field(), solver = rk4(steps = 10))
  base normal
}
"""
ESTIMATED = """
flow f {
  data x: R[D = 4]
  cnf(v = mlp(16, act = tanh), solver = midpoint(steps = 30), trace = hutchinson)
  base normal
}
"""


@pytest.mark.parametrize("text", [NETS, IMAGES, ESTIMATED])
def test_nets_of_all_kinds_verify(text: str) -> None:
    assert [c for c in verify(analyse(text, sized=True), "f") if not c.ok] == []


def test_what_is_reported() -> None:
    exact, estimated = (next(d for d in fl.info(t) if d["kind"] == "flow") for t in (IMAGES, ESTIMATED))
    assert (exact["log_det"], exact["inverse"], exact["exactness"]) == ("ode", "integration", "exact")
    assert estimated["exactness"] == "unbiased"


def test_gradients_flow_through_the_solver() -> None:
    flow = fl.compile(NETS, seed=0, dtype=torch.float64)
    g = torch.Generator().manual_seed(3)
    x, c = torch.randn(4, 3, dtype=torch.float64, generator=g), torch.randn(4, 2, dtype=torch.float64, generator=g)
    parameters = list(flow.parameters())
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=g) for p in parameters]
    grads = torch.autograd.grad(flow.log_prob(x, c=c).sum(), parameters)
    slope = sum(float((a * b).sum()) for a, b in zip(grads, direction, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * 1e-5 * d * (1 if sign == 1 else 2)
            values.append(float(flow.log_prob(x, c=c).sum()))
    assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-4 * (1 + abs(slope))


FIELD = """
{net}
flow f {{
  data x: R[D = 2]
  cnf(v = {v}, solver = {solver})
  base normal
}}
"""


@pytest.mark.parametrize(
    ("v", "solver", "code", "words"),
    [
        ("mlp(8)", "rk4", "FL0203", "number of steps"),
        ("mlp(8)", "rk4(steps = 0)", "FL0306", "above 0"),
        ("mlp(8)", "rk4(stops = 3)", "FL0202", "no argument `stops`"),
        ("mlp(8)", "dopri5(steps = 3, rtol = 1e-3)", "FL0202", "not both"),
        ("mlp(8)", "mlp(8)", "FL0211", "needs a solver"),
        ("bad()", "rk4(steps = 3)", "FL0403", "`floor`"),
    ],
)
def test_what_cannot_be_integrated_is_told(v: str, solver: str, code: str, words: str) -> None:
    net = "net bad(x: R[D], t: R) { floor(x) }" if v == "bad()" else ""
    (error,) = fl.check(FIELD.format(net=net, v=v, solver=solver)).errors
    assert error.code == code
    assert words in error.message


@pytest.mark.parametrize(
    ("body", "tame"),
    [
        ("tanh(x) * (1 + t)", True),
        ("sin(x) + x * t", True),
        ("softplus(x) - silu(x)", True),
        ("sigmoid(x) * tanh(x)", True),
        ("x / (2 + sin(t))", True),
        ("x * sigmoid(x)", False),
        ("x ^ 2", False),
        ("x * x", False),
        ("exp(x)", False),
        ("x / (1 + x ^ 2)", False),
    ],
)
def test_fields_that_may_escape_are_warned_of(body: str, tame: bool) -> None:
    report = fl.check(FIELD.format(net=f"net own(x: R[D], t: R) {{ {body} }}", v="own()", solver="rk4(steps = 5)"))
    assert report.ok
    assert [d.code for d in report if d.severity == "warning"] == ([] if tame else ["FL0605"])


def test_a_solution_that_ends_is_told_and_not_returned() -> None:
    flow = fl.compile(
        FIELD.format(net="net own(x: R[D], t: R) { x ^ 2 }", v="own()", solver="dopri5"), dtype=torch.float64
    )
    x = torch.tensor([[-3.0, 0.1]], dtype=torch.float64)  # x' = x² backwards from -3 reaches infinity at t = 2/3
    with pytest.raises(FlowError, match="could not be followed"):
        flow.log_prob(x)
    assert torch.isfinite(flow.log_prob(torch.tensor([[0.3, 0.1]], dtype=torch.float64))).all()


BENT = """
net field(x: R[D], t: R) -> R[D] {{ y: R[D] = mlp(8, act = tanh)(3 * x, {unit} * t);  {unit} * y }}
net end(x: R[D = 2]) {{ integrate(field(), x, t = 0 -> {stop}, dopri5(rtol = 1e-6, atol = 1e-6{more})) }}
"""


def bent(unit: float = 1.0, more: str = "") -> Any:
    made = fl.compile(BENT.format(unit=unit, stop=1 / unit, more=more), flow="end", dtype=torch.float64, seed=3)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    return made


@pytest.mark.parametrize("more", ["", ", shared = true"])
def test_blocks_of_a_large_batch_change_nothing(more: str) -> None:
    net = bent(more=more)
    x = torch.randn(1100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert 0 < rows_at_once((x,)) < len(x)
    with torch.no_grad(), fl.count_steps() as counts:
        blocks = net(x)
    with fl.count_steps() as whole:
        assert torch.allclose(blocks, net(x), rtol=0, atol=1e-12)  # with gradients all samples go at once
    assert (counts.evaluations, counts.accepted, counts.rejected) == (whole.evaluations, whole.accepted, whole.rejected)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_steps_do_not_depend_on_the_unit_of_time(unit: float) -> None:
    x = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for more in ("", ", shared = true"):
            with fl.count_steps() as plain:
                found = bent(more=more)(x)
            with fl.count_steps() as scaled:
                assert torch.allclose(bent(unit, more)(x), found, rtol=0, atol=1e-9)
            assert [r[0].tolist() for r in plain.runs] == [r[0].tolist() for r in scaled.runs]


def test_what_is_left_is_divided_into_equal_steps() -> None:
    x = torch.randn(1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), fl.record_paths() as ways:
        bent()(x)
    times = torch.tensor([t for t, _ in ways.runs[0]], dtype=torch.float64)
    steps = times.diff()
    assert len(steps) > 3
    assert abs(float(times[-1]) - 1) < 1e-12
    assert abs(float(steps[-1] - steps[-2])) < 1e-12  # none is small because little was left
