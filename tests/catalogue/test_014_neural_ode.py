"""Card 014: Neural ODE (Chen et al. 2018, arXiv 1806.07366). Items 1 to 7; item 8 (latent ODE) and ODE-Net are not there yet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import flowlang as fl
from flowlang.analysis.solvers import order, row_sum_faults
from flowlang.diagnostics import Report
from flowlang.elaborate.tableaus import read_tableau
from flowlang.source import Source
from flowlang.syntax import tree
from flowlang.syntax.parser import parse

SOLVERS = Path(__file__).parents[2] / "stdlib" / "solvers" / "runge_kutta.flow"
A = [[0.25, -0.75, 0.125], [0.5, -0.25, 0.375], [0.0, 0.625, -0.5]]
LINEAR = """
net field(x: R[D], t: R) {{
  param A: R[D', D] = {matrix}
  sum[D](A * x)
}}
net m(x: R[D = 3]) {{ integrate(field(), x, t = 0 -> 1, {solver}) }}
net back(x: R[D = 3]) {{ integrate(field(), x, t = 1 -> 0, {solver}) }}
"""
FLOW = """
flow f {{
  data x: R[D = 3]
  cnf(v = field(), solver = {solver})
  base normal
}}
"""
MATRIX = torch.tensor(A, dtype=torch.float64)
NUMBERS = str([v for row in A for v in row])


def linear(solver: str, which: str = "m") -> Any:
    text = LINEAR.format(matrix=NUMBERS, solver=solver)
    return fl.compile(text + FLOW.format(solver=solver) if which == "f" else text, flow=which, dtype=torch.float64)


def points(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_1_adjoint_gradients_are_those_through_the_solver() -> None:
    """For θ, h0 and t1, which is the time at which the value is asked for."""
    text = """
    model m(v: net = mlp(16, act = tanh, last = 1.0)) {{
      data x: R[D = 3]
      def end(x, t1: R[T = 1]) {{ integrate(v, x, t = 0 -> 2, dopri5(rtol = 1e-7, atol = 1e-7), at = t1, gradient = {g}) }}
    }}
    """
    found = []
    for g in ("through", "adjoint"):
        module = fl.compile(text.format(g=g), seed=0, dtype=torch.float64)
        x, t1 = points().requires_grad_(), torch.full((4, 1), 1.3, dtype=torch.float64, requires_grad=True)
        loss = module.end(x, t1).square().sum()
        found.append(torch.autograd.grad(loss, [x, t1, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 1e-3
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_2_a_linear_field_is_a_matrix_exponential() -> None:
    y = linear("dopri5(rtol = 1e-9, atol = 1e-9)")(points())
    assert torch.allclose(y, points() @ torch.linalg.matrix_exp(MATRIX).mT, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("midpoint", 2), ("rk4", 4), ("dopri5", 5)])
def test_2_measured_orders(solver: str, expected: int) -> None:
    truth = points() @ torch.linalg.matrix_exp(MATRIX).mT
    n = 40 if expected < 4 else 8
    with torch.no_grad():
        coarse, fine = (float((linear(f"{solver}(steps = {k})")(points()) - truth).norm()) for k in (n, 2 * n))
    assert abs(math.log2(coarse / fine) - expected) < 0.2


def test_3_order_conditions_hold_in_exact_ratios() -> None:
    claimed = {"euler": (1, None), "midpoint": (2, None), "rk4": (4, None), "dopri5": (5, 4)}
    module = parse(Source.of("solvers", SOLVERS.read_text()), Report()).module
    found = {d.name: read_tableau(d) for d in module.items if isinstance(d, tree.Declaration) and d.name in claimed}
    assert found.keys() == claimed.keys()
    for name, t in found.items():
        p, embedded = claimed[name]
        assert not t.rounded
        assert row_sum_faults(t) == []
        assert order(t).value == p
        assert embedded is None or order(t, t.embedded).value == embedded


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_4_back_to_the_start_within_ten_tolerances(tolerance: float) -> None:
    solver = f"dopri5(rtol = {tolerance}, atol = {tolerance})"
    with torch.no_grad():
        there = linear(solver)(points())
        assert (linear(solver, "back")(there) - points()).abs().max() < 10 * tolerance


def test_5_a_linear_flow_has_the_trace_for_its_log_det_and_a_gaussian_density() -> None:
    flow = linear("dopri5(rtol = 1e-9, atol = 1e-9)", "f")
    x = points(7)
    _, log_det = flow(x)  # from t = 1 to t = 0
    assert torch.allclose(log_det, -MATRIX.trace().expand(7), rtol=0, atol=1e-7)
    grown = torch.linalg.matrix_exp(MATRIX)
    exact = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), grown @ grown.mT)
    assert torch.allclose(flow.log_prob(x), exact.log_prob(x), rtol=0, atol=1e-6)


def test_5_the_density_integrates_to_one() -> None:
    flow = fl.compile("cnf_flow_tiny", seed=0)
    grid = torch.linspace(-6, 6, 61)
    x = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        total = float(flow.log_prob(x).exp().sum()) * float(grid[1] - grid[0]) ** 2
    assert abs(total - 1) < 0.01


def test_6_tighter_tolerances_take_more_evaluations_and_err_in_proportion() -> None:
    truth = points() @ torch.linalg.matrix_exp(MATRIX).mT
    tolerances, errors, evaluations = (1e-4, 1e-6, 1e-8, 1e-10), [], []
    for tolerance in tolerances:
        with fl.count_steps() as counts, torch.no_grad():
            y = linear(f"dopri5(rtol = {tolerance}, atol = {tolerance})")(points())
        errors.append(float((y - truth).norm()))
        evaluations.append(counts.evaluations)
    assert evaluations == sorted(set(evaluations))
    slope = math.log(errors[0] / errors[-1]) / math.log(tolerances[0] / tolerances[-1])
    assert 0.5 < slope < 1.5


@pytest.mark.parametrize("gradient", ["through", "adjoint"])
def test_7_saved_activations_do_not_depend_on_the_steps(gradient: str) -> None:
    text = "flow f {{ data x: R[D = 3]\n cnf(v = mlp(8, act = tanh), solver = rk4(steps = {n}), gradient = {g})\n base normal }}"
    kept = []
    for n in (2, 16):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            fl.compile(text.format(n=n, g=gradient), seed=0).log_prob(torch.zeros(5, 3))
        kept.append((len(saved), sum(saved)))
    assert (kept[0] == kept[1]) == (gradient == "adjoint")


def test_the_cnf_trains_and_its_parameters_are_counted() -> None:
    flow = fl.compile("cnf_flow", seed=0)
    h, w, d = 32, 64, 2
    assert sum(p.numel() for p in flow.parameters()) == 2 * h + (h + 1) * h + (h + 1) * (3 * w * d + w)
    assert sum(p.numel() for p in flow.parameters()) == 15_904
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)) * 0.5
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = -flow.log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_the_density_exports(tmp_path: Path) -> None:
    import onnxruntime as ort

    flow = fl.compile("cnf_flow_tiny", seed=0)
    fl.export_onnx(flow, tmp_path / "f.onnx", programs=["log_prob"])
    session = ort.InferenceSession(str(tmp_path / "f.onnx"))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), flow.log_prob(x), rtol=1e-4, atol=1e-4)
