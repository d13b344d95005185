"""Step rules with state, multistep and implicit methods: convergence, log-dets, gradients, ONNX."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowlang as fl
from flowlang.checks.solvers import check_solver
from flowlang.diagnostics import FlowError, Report
from flowlang.source import Source
from flowlang.syntax.parser import parse

FLOW = """
net field(x: R[D], t: R) {{ param A: R[D', D] = [0, -1, 1, 0]
  sum[D](A * x) * (1 + t) + sin(x) * 0.3 }}
flow f {{
  data x: R[D = 2]
  cnf(v = field(), solver = {solver})
  base normal
}}
net m(x: R[D = 2]) {{ integrate(field(), x, t = 0 -> 1, {solver}) }}
{own}
"""
NET = FLOW[: FLOW.index("flow f")] + FLOW[FLOW.index("net m") :]
X = torch.tensor([[1.0, 0.5], [0.2, -1.0]], dtype=torch.float64)


def made(solver: str, which: str = "f", own: str = "", dtype: torch.dtype = torch.float64) -> Any:
    return fl.compile((FLOW if which == "f" else NET).format(solver=solver, own=own), flow=which, dtype=dtype)


def results(solver: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flow = made(solver)
    z, log_det = flow(X)
    (gradient,) = torch.autograd.grad(flow.log_prob(X).sum(), list(flow.parameters()))
    return z.detach(), log_det.detach(), gradient


@pytest.fixture(scope="module")
def truth() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return results("dopri5(rtol = 1e-11, atol = 1e-11)")


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        ("ab2", 2), ("ab3", 3), ("ab4", 4), ("abm4", 4), ("reused_midpoint", 2), ("backward_euler", 1), ("trapezoidal", 2),
        ("gauss4", 4), ("radau3", 3), ("radau5", 5), ("sdirk2", 2), ("implicit_midpoint", 2),
    ],
)  # fmt: skip
def test_values_log_dets_and_gradients_converge_at_the_claimed_order(
    solver: str, order: int, truth: tuple[torch.Tensor, ...]
) -> None:
    coarse, fine = results(f"{solver}(steps = 16)"), results(f"{solver}(steps = 32)")
    for a, b, t in zip(coarse, fine, truth, strict=True):
        assert math.log2(float((a - t).norm() / (b - t).norm())) > order - 1.5  # single numbers cross zero
    assert abs(math.log2(float((coarse[0] - truth[0]).norm() / (fine[0] - truth[0]).norm())) - order) < 0.3


@pytest.mark.parametrize(
    ("solver", "first", "each"),
    [("ab2", 2, 1), ("ab3", 3, 1), ("ab4", 4, 1), ("abm4", 4, 2), ("reused_midpoint", 2, 1)],
)
def test_what_a_step_costs(solver: str, first: int, each: int) -> None:
    """Evaluations: one or two a step, more where the method begins."""
    begins = {"ab2": 1, "ab3": 2, "ab4": 3, "abm4": 3, "reused_midpoint": 1}[solver]
    with fl.count_steps() as counts:
        made(f"{solver}(steps = 10)", "m")(X)
    assert counts.evaluations == first * begins + each * (10 - begins)


def test_the_library_s_rules_keep_their_claims() -> None:
    path = Path(__file__).parents[2] / "stdlib" / "solvers" / "multistep.flow"
    for declaration in parse(Source.of("multistep", path.read_text()), Report()).module.items:
        report = Report()
        facts = check_solver(declaration, report)
        assert report.ok
        assert not list(report)
        assert facts["order"] == {"ab2": 2, "ab3": 3, "ab4": 4, "abm4": 4, "reused_midpoint": 2}[declaration.name]


def test_a_wrong_start_of_a_multistep_method_is_found() -> None:
    text = """solver ab3 (v, x, t, h, i) {
      require order == 3
      state a = 0, b = 0
      k = v(x, t)
      one, two = a, b
      a := k
      b := one
      if i < 2 { x + h * k } else { x + h / 12 * (23 * k - 16 * one + 5 * two) }
    }"""
    report = Report()
    check_solver(parse(Source.of("s", text), Report()).module.items[0], report)
    (error,) = report.errors
    assert error.code == "FL0601"


@pytest.mark.parametrize("solver", ["backward_euler", "radau5", "trapezoidal", "sdirk2"])
def test_implicit_methods_take_large_steps_on_stiff_fields(solver: str) -> None:
    """x' = -1000·(x - cos t) - sin t from its smooth solution cos t, in 10 steps; Euler's method is off by 1000^10."""
    text = "net stiff(x: R[D], t: R) {{ -1000 * (x - cos(t)) - sin(t) }}\nnet m(x: R[D = 1]) {{ integrate(stiff(), x, t = 0 -> 1, {s}(steps = 10)) }}"
    x = torch.ones(1, 1, dtype=torch.float64)
    y = fl.compile(text.format(s=solver), flow="m", dtype=torch.float64)(x)
    assert abs(float(y) - math.cos(1)) < 1e-3
    assert abs(float(fl.compile(text.format(s="euler"), flow="m", dtype=torch.float64)(x))) > 1e3


def test_implicit_equations_without_a_solution_are_told() -> None:
    text = "net wild(x: R[D], t: R) { 1 + x ^ 2 }\nnet m(x: R[D = 1]) { integrate(wild(), x, t = 0 -> 4, backward_euler(steps = 1)) }"
    with pytest.raises(FlowError, match="stages of the implicit step"):
        fl.compile(text, flow="m", dtype=torch.float64)(torch.ones(1, 1, dtype=torch.float64))


LEARNED = """
solver scaled(steps: int = 6) (v, x, t, h, i) {
  param c: R[K = steps] = 1
  x + h * c[K = i] * v(x, t)
}
solver squashed (v, x, t, h) { x + h * tanh(v(x, t)) }
"""


def test_a_rule_may_have_parameters_and_read_its_index() -> None:
    learned, plain = made("scaled", "m", LEARNED), made("euler(steps = 6)", "m")
    assert torch.allclose(learned(X), plain(X), rtol=0, atol=1e-14)
    learned(X).sum().backward()
    c = dict(learned.named_parameters())["scaled.c"]
    assert c.grad is not None
    assert (c.grad != 0).all()


@pytest.mark.parametrize(
    ("solver", "words"), [("scaled", "depend on their index"), ("squashed(steps = 3)", "no sums of values")]
)
def test_rules_that_cannot_carry_a_log_det_are_refused_in_flows(solver: str, words: str) -> None:
    text = FLOW.format(solver=solver, own=LEARNED)
    (error,) = (e for e in fl.check(text).errors if e.code == "FL0403")
    assert words in error.message


@pytest.mark.parametrize(
    "solver", ["ab3(steps = 7)", "reused_midpoint(times = [0, 0.1, 0.4, 1])", "scaled", "ab2(steps = 1)"]
)
def test_onnx_takes_the_same_steps(solver: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    module = made(solver, "m", LEARNED, torch.float32) if solver == "scaled" else made(solver, "m", dtype=torch.float32)
    fl.export_onnx(module, tmp_path / "m.onnx", programs=["forward"])
    session = ort.InferenceSession(str(tmp_path / "m.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: X.float().numpy()})
    np.testing.assert_allclose(found, module(X.float()).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_density_of_a_multistep_flow_exports(tmp_path: Path) -> None:
    import onnxruntime as ort

    flow = made("ab4(steps = 8)", dtype=torch.float32)
    fl.export_onnx(flow, tmp_path / "f.onnx", programs=["log_prob"])
    session = ort.InferenceSession(str(tmp_path / "f.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: X.float().numpy()})
    np.testing.assert_allclose(found, flow.log_prob(X.float()).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_implicit_methods_are_declined_by_onnx(tmp_path: Path) -> None:
    with pytest.raises(FlowError, match="solved for by Newton's method"):
        fl.export_onnx(made("radau3(steps = 3)", "m"), tmp_path / "m.onnx", programs=["forward"])


@pytest.mark.parametrize(
    ("solver", "own", "code", "words"),
    [
        ("ab2(steps = 3), gradient = adjoint", "", "FL0902", "step rule"),
        ("gauss4(steps = 3), at = [0.5]", "", "FL0902", "implicit"),
        ("gauss4", "", "FL0203", "number of steps"),
        ("own(steps = 3)", "solver own (v, x, t, h) { x + h * v(x) }", "FL0203", "a value and a time"),
        ("own(steps = 3)", "solver own (v, x, t, h) { x + h * w(x, t) }", "FL0201", "unknown name `w`"),
        ("own(steps = 3)", "solver own (v, x, t, h, i) { if i < 40 { x } else { x + h * v(x, t) } }", "FL0901", "first steps"),
        ("own(steps = 3)", "solver own (v, x, t, h) { x, x }", "FL0308", "one value"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(solver: str, own: str, code: str, words: str) -> None:
    text = (
        FLOW.format(solver="rk4(steps = 2)", own=own)
        + f"\nmodel p {{ data x: R[D = 2]\n def go(x) {{ integrate(field(), x, t = 0 -> 1, {solver}) }} }}"
    )
    found = [e for e in fl.check(text).errors if e.code == code]
    assert any(words in e.message for e in found), fl.check(text).errors


def test_a_field_that_does_not_depend_on_time() -> None:
    """A local function of x alone: dx/dt = -x, whose log-det over a time of 1 is -D."""
    model = fl.compile(
        """model m {
          data x: R[D = 3]
          def turn(x) { -x }
          def end(x) { integrate(turn, x, t = 0 -> 1, rk4(steps = 40), log_det = true) }
        }""",
        dtype=torch.float64,
    )
    x = torch.randn(4, 3, dtype=torch.float64)
    end, log_det = model.end(x)
    assert torch.allclose(end, x * math.exp(-1), atol=1e-8)
    assert torch.allclose(log_det, torch.full((4,), -3.0, dtype=torch.float64), atol=1e-12)
