"""`integrate` beyond its end: values at times, given steps, counts, and gradients with bounded memory."""

from __future__ import annotations

import math
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowlang as fl
from flowlang.analysis.solvers import Weights, density, interpolant, order, rooted_trees, with_end
from flowlang.diagnostics import FlowError, Report
from flowlang.elaborate.tableaus import read_tableau, tableau_of
from flowlang.ir.tableau import Tableau
from flowlang.source import Source
from flowlang.syntax.parser import parse

STANDARD = Path(__file__).parents[2] / "stdlib" / "solvers" / "runge_kutta.flow"


def tableaus() -> dict[str, Tableau]:
    module = parse(Source.of("solvers", STANDARD.read_text()), Report()).module
    return {d.name: read_tableau(d) for d in module.items if tableau_of(d) is not None}


EXPLICIT = {n: t for n, t in tableaus().items() if t.explicit}
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ralston": 2, "rk3": 3, "ssprk3": 3, "rk4": 3, "rk4_38": 3, "bosh3": 3, "dopri5": 4, "tsit5": 4}  # fmt: skip


@pytest.mark.parametrize("name", EXPLICIT)
def test_interpolants_meet_the_order_conditions_at_every_time(name: str) -> None:
    """Σ b_i(θ)·Φ_i = θ^|tree|/γ, in exact arithmetic; and the step's own values and slopes at both ends."""
    t = EXPLICIT[name]
    found = interpolant(t)
    assert found.order == ORDERS[name] >= order(t).value - 1
    wide = t if t.first_same_as_last else with_end(t)
    phi = Weights(wide)
    small = Fraction(1, 10**8) if t.rounded else 0
    for θ in (Fraction(1, 3), Fraction(4, 5)):
        b = [sum(c * θ ** (k + 1) for k, c in enumerate(row)) for row in found.weights]
        for p in range(1, found.order + 1):
            for tree in rooted_trees(p):
                left = sum(x * y for x, y in zip(b, phi.stage(tree), strict=True))
                assert abs(left - θ**p / density(tree)) <= small
    for i, row in enumerate(found.weights):
        assert abs(sum(row) - wide.b[i]) <= small
        assert abs(row[0] - (i == 0)) <= small
        assert abs(sum(c * (k + 1) for k, c in enumerate(row)) - (i == len(found.weights) - 1)) <= small


ROTATION = """
net turn(x: R[D], t: R) {{ param A: R[D', D] = [0, -1, 1, 0]
  sum[D](A * x) * (1 + t) }}
model m {{
  data x: R[D = 2]
  def go(x) {{ integrate(turn(), x, t = 0 -> 2, {solver}{more}) }}
}}
"""


def rotation(solver: str, more: str = "") -> Any:
    return fl.compile(ROTATION.format(solver=solver, more=more), dtype=torch.float64)


def rotated(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a = t + t**2 / 2
    c, s = a.cos()[:, None], a.sin()[:, None]
    x, y = x[:, None].unbind(-1)
    return torch.stack([c.T * x - s.T * y, s.T * x + c.T * y], -1)


@pytest.mark.parametrize(("solver", "expected"), [("midpoint", 2), ("rk4", 4), ("dopri5", 5), ("heun", 2)])
def test_values_at_times_converge_at_the_method_s_order(solver: str, expected: int) -> None:
    """An interpolant of order q in a step has a global error of order min(p, q + 1)."""
    times = [0.0, *(0.0317 * k for k in range(1, 60)), 2.0]
    x = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    truth = rotated(x, torch.tensor(times, dtype=torch.float64))
    errors = []
    with torch.no_grad():
        for n in (20, 40):
            y = rotation(f"{solver}(steps = {n})", f", at = {times}").go(x)
            assert y.shape == (2, 61, 2)
            assert torch.equal(y[:, 0], x)
            errors.append(float((y - truth).norm()))
    assert abs(math.log2(errors[0] / errors[1]) - expected) < 0.4


def test_values_at_times_take_no_more_evaluations() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for more in ("", ", at = [2, 0.1, 0.2, 0.3, 1.5]"):
        with fl.count_steps() as counts, torch.no_grad():
            y = rotation("dopri5(rtol = 1e-8, atol = 1e-8)", more).go(x)
        found.append((counts.evaluations, counts.accepted, counts.rejected))
    assert found[0] == found[1]
    times = torch.tensor([2.0, 0.1, 0.2, 0.3, 1.5], dtype=torch.float64)
    assert torch.allclose(y, rotated(x, times), rtol=0, atol=1e-6)


def test_steps_go_between_given_times_in_either_direction() -> None:
    text = """
    net field(x: R[D], t: R) {{ sin(x) * t }}
    flow f {{
      data x: R[D = 2]
      integrate(field(), t = 1 -> 0, rk4({how}))
      base normal
    }}
    """
    text = text.replace("integrate(field(),", "step(field(),").replace(
        "flow f", "bijector step(v: net) (x: R[D]) {{ integrate(v, x, t = 1 -> 0, rk4({how})) }}\nflow f"
    )
    text = text.replace("step(field(), t = 1 -> 0, rk4({how}))", "step(field())")
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equal = fl.compile(text.format(how="steps = 4"), dtype=torch.float64)
    given = fl.compile(text.format(how="times = [0, 0.25, 0.5, 0.75, 1]"), dtype=torch.float64)
    uneven = fl.compile(text.format(how="times = [1, 0.9, 0.7, 0.4, 0]"), dtype=torch.float64)
    assert torch.allclose(equal(x)[0], given(x)[0], rtol=0, atol=1e-14)
    z = uneven(x)[0]
    assert 1e-9 < float((equal(x)[0] - z).abs().max()) < 1e-3
    assert torch.allclose(uneven.inverse(z)[0], x, rtol=0, atol=1e-4)


def test_rejected_steps_are_counted_for_each_sample() -> None:
    text = "net wild(x: R[D], t: R) { x * sin(40 * t ^ 3) * 4 }\nmodel m { data x: R[D = 1]\n def go(x) { integrate(wild(), x, t = 0 -> 2, dopri5(rtol = 1e-6, atol = 1e-6)) } }"
    module = fl.compile(text, dtype=torch.float64)
    x = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    with fl.count_steps() as counts, torch.no_grad():
        module.go(x)
    ((accepted, rejected),) = counts.runs
    assert rejected.tolist()[1] == 0 < rejected.tolist()[0] == rejected.tolist()[2]
    assert accepted.tolist()[0] == accepted.tolist()[2] > accepted.tolist()[1]
    assert counts.rejected == int(rejected.sum())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_affects_itself_alone(bad: float) -> None:
    flow = fl.compile(
        "flow f { data x: R[D = 2]\n cnf(v = mlp(8, act = tanh))\n base normal }", seed=0, dtype=torch.float64
    )
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean, broken = flow.log_prob(x), x.clone()
    broken[2, 1] = bad
    found = flow.log_prob(broken)
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(found[keep], clean[keep])
    assert torch.isnan(found[2])
    parameters = list(flow.parameters())
    for a, b in zip(
        torch.autograd.grad(flow.log_prob(x)[keep].sum(), parameters),
        torch.autograd.grad(found[keep].sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_caps_are_told() -> None:
    with pytest.raises(FlowError, match=r"took 3 steps and came to t = 0\.\d+ only"):
        rotation("dopri5(max_steps = 3)").go(torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("dopri5, at = [0.5, 3]", "FL0305", "not between"),
        ("rk4(times = [0, 1, 3])", "FL0305", "go from 0 to 3"),
        ("rk4(times = [0, 1.5, 1, 2])", "FL0306", "rise or fall"),
        ("rk4(times = [0, 2], steps = 3)", "FL0202", "not both"),
        ("dopri5, gradient = reversible", "FL0203", "cannot be undone"),
        ("rk4(steps = 3), gradient = reversible, at = [1]", "FL0202", "end of a trajectory"),
        ("dopri5, at = x", "FL0307", "along `D`"),
        ("dopri5(max_steps = 0)", "FL0306", "above 0"),
    ],
)
def test_what_does_not_fit_is_told(how: str, code: str, words: str) -> None:
    (error,) = fl.check(ROTATION.format(solver=how, more="")).errors
    assert error.code == code
    assert words in error.message


# ---- gradients ----------------------------------------------------------------------------------

GRADIENTS = """
model m(v: net = mlp(16, act = tanh)) {{
  data x: R[D = 3]
  given c: R[D]
  def go(x, c, s: R[T = 4]) {{
    def field(y, t) {{ v(y, t) * (1 + t) + sin(c * y) }}
    integrate(field, x, t = 0 -> 2, {solver}, at = s, gradient = {gradient})
  }}
  def end(x, c) {{
    def field(y, t) {{ v(y, t) * (1 + t) + sin(c * y) }}
    integrate(field, x, t = 0 -> 2, {solver}, gradient = {gradient})
  }}
}}
"""


def gradients(program: str, solver: str, gradient: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    text = GRADIENTS.format(solver=solver, gradient=gradient)
    if gradient == "reversible":
        text = text.replace("at = s, gradient = reversible", "at = s")
    module = fl.compile(text, seed=0, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    x, c = (torch.randn(2, 3, dtype=torch.float64, generator=g).requires_grad_() for _ in range(2))
    times = torch.tensor([[0.3, 1.1, 2.0, 0.0], [1.9, 0.2, 0.7, 0.9]], dtype=torch.float64, requires_grad=True)
    inputs = [x, c, times] if program == "go" else [x, c]
    y = getattr(module, program)(*inputs)
    w = torch.randn(y.shape, dtype=y.dtype, generator=g)
    return y.detach(), list(torch.autograd.grad((y * w).sum(), [*inputs, *module.parameters()]))


@pytest.mark.parametrize(
    ("program", "solver", "gradient", "tolerance"),
    [
        ("end", "dopri5(rtol = 1e-9, atol = 1e-9)", "adjoint", 1e-6),
        ("go", "dopri5(rtol = 1e-9, atol = 1e-9)", "adjoint", 1e-6),
        ("end", "rk4(steps = 100)", "adjoint", 1e-6),
        ("go", "rk4(steps = 100)", "adjoint", 1e-5),
        ("end", "rk4(steps = 60)", "reversible", 1e-5),
    ],
)
def test_gradients_agree_with_those_through_the_solver(
    program: str, solver: str, gradient: str, tolerance: float
) -> None:
    y, wanted = gradients(program, solver, "through")
    z, found = gradients(program, solver, gradient)
    # Without gradients a step's slopes lie side by side, and their sum has another order: rounding alone may differ.
    assert torch.allclose(y, z, rtol=0, atol=1e-13 if gradient == "adjoint" else 1e-6)
    for a, b in zip(wanted, found, strict=True):
        assert a.abs().max() > 0
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("gradient", "solvers"), [
    ("adjoint", [f"dopri5(rtol = {t}, atol = {t})" for t in (1e-3, 1e-5, 1e-7)]),
    ("reversible", [f"rk4(steps = {n})" for n in (5, 10, 20)]),
])  # fmt: skip
def test_the_difference_shrinks_with_the_tolerance(gradient: str, solvers: list[str]) -> None:
    errors = []
    for solver in solvers:
        _, a = gradients("end", solver, "through")
        _, b = gradients("end", solver, gradient)
        errors.append(max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True)))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_reversible_gradients_are_those_of_the_steps_taken() -> None:
    """Against autograd through the same steps, written out."""
    from flowlang.backends.torch.runtime.ode_gradients import reversible_step
    from flowlang.backends.torch.runtime.odes import RungeKutta

    y, found = gradients("end", "rk4(steps = 7)", "reversible")
    module = fl.compile(GRADIENTS.format(solver="rk4(steps = 7)", gradient="through"), seed=0, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    x, c = (torch.randn(2, 3, dtype=torch.float64, generator=g).requires_grad_() for _ in range(2))
    weights = list(module.parameters())

    def field(state: tuple[torch.Tensor, ...], t: float) -> tuple[torch.Tensor, ...]:
        (p,) = state
        h = torch.cat([p, p.new_full((2, 1), t)], -1)
        inner = torch.tanh(h @ weights[0].mT + weights[1])
        return ((inner @ weights[2].mT + weights[3]) * (1 + t) + torch.sin(c * p),)

    rk4 = RungeKutta(((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0))
    a = b = (x,)
    for i in range(7):
        a, b = reversible_step(field, a, b, 2 * i / 7, 2 * (i + 1) / 7, rk4)
    w = torch.randn(2, 3, dtype=torch.float64, generator=g)
    assert torch.allclose(a[0], y, rtol=0, atol=1e-12)
    for p, q in zip(torch.autograd.grad((a[0] * w).sum(), [x, c, *weights]), found, strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", ["through", "adjoint", "reversible"])
def test_memory_does_not_grow_with_the_steps_unless_through_the_solver(gradient: str) -> None:
    """The numbers alive between forward and backward, and the most that backward holds at once beside them."""
    text = "flow f {{ data x: R[D = 3]\n cnf(v = mlp(8, act = tanh), solver = rk4(steps = {n}), gradient = {g})\n base normal }}"
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    kept, most = [], []
    for n in (2, 8, 32):
        flow = fl.compile(text.format(n=n, g=gradient), seed=0)
        alive = Alive()
        with torch.autograd.graph.saved_tensors_hooks(alive.pack, alive.unpack):
            loss = flow.log_prob(x).sum()
            kept.append(alive.now)
            loss.backward()
        most.append(alive.most)
    assert (kept[0] == kept[1] == kept[2]) == (gradient != "through")
    assert (most[0] == most[1] == most[2]) == (gradient != "through")


class Alive:
    """Counts the numbers that saved tensors hold."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, t: torch.Tensor) -> Kept:
        return Kept(self, t)

    def unpack(self, kept: Kept) -> torch.Tensor:
        return kept.tensor


class Kept:
    def __init__(self, alive: Alive, tensor: torch.Tensor):
        self.alive, self.tensor, self.size = alive, tensor.detach(), tensor.numel()
        alive.now += self.size
        alive.most = max(alive.most, alive.now)

    def __del__(self) -> None:
        self.alive.now -= self.size


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive, and the most at once; backward passes count too."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, key, size)
        return out

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(("gradient", "solvers"), [
    ("through", ["rk4(steps = 4)", "rk4(steps = 64)"]),
    ("adjoint", ["rk4(steps = 4)", "rk4(steps = 64)"]),
    ("reversible", ["rk4(steps = 4)", "rk4(steps = 64)"]),
    ("through", ["dopri5(rtol = 1e-3, atol = 1e-3)", "dopri5(rtol = 1e-8, atol = 1e-8)"]),
    ("adjoint", ["dopri5(rtol = 1e-3, atol = 1e-3)", "dopri5(rtol = 1e-8, atol = 1e-8)"]),
])  # fmt: skip
def test_the_most_memory_of_a_training_step_does_not_depend_on_the_steps(gradient: str, solvers: list[str]) -> None:
    """Of all that is allocated in the forward and the backward pass, with given and with chosen steps."""
    text = "flow f {{ data x: R[D = 3]\n cnf(v = mlp(32, act = tanh), solver = {s}, gradient = {g})\n base normal }}"
    x = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    most, evaluations = [], []
    for solver in solvers:
        flow = fl.compile(text.format(s=solver, g=gradient), seed=0, dtype=torch.float64)
        with torch.no_grad():  # a field that bends
            for p in flow.parameters():
                p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
        flow.log_prob(x).sum().backward()  # gradients are there before
        with fl.count_steps() as counts, Allocated() as memory:
            flow.log_prob(x).sum().backward()
        most.append(memory.most)
        evaluations.append(counts.evaluations)
    assert evaluations[1] > 3 * evaluations[0]
    if gradient == "through":
        assert most[1] > 2.5 * most[0]
    else:
        assert most[1] == most[0]


@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
def test_the_likelihood_of_a_flow_has_the_same_gradient(gradient: str) -> None:
    text = "flow f {{ data x: R[D = 3]\n cnf(v = mlp(8, act = tanh), solver = rk4(steps = 40), gradient = {g}, trace = {t})\n base normal }}"
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for trace in ("exact", "hutchinson"):
        found = []
        for g in ("through", gradient):
            flow = fl.compile(text.format(g=g, t=trace), seed=0, dtype=torch.float64)
            torch.manual_seed(3)
            found.append(torch.autograd.grad(flow.log_prob(x).mean(), list(flow.parameters())))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "how",
    [
        "dopri5(rtol = 1e-5, atol = 1e-5)", "dopri5(rtol = 1e-5, atol = 1e-5), at = [0.1, 1.9, 0, 2]", "rk4(steps = 5), at = [0.1, 1.9, 0, 2]",
        "rk4(times = [0, 0.5, 1.25, 2])", "rk4(steps = 6), gradient = reversible", "heun, at = [0.3]",
    ],
)  # fmt: skip
def test_onnx_takes_the_same_steps(how: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    text = f"net m(v: net = mlp(8, act = tanh)) (x: R[D = 2]) {{ integrate(v, x, t = 0 -> 2, {how}) }}"
    module = fl.compile(text, flow="m", seed=0)
    fl.export_onnx(module, tmp_path / "m.onnx", programs=["forward"])
    session = ort.InferenceSession(str(tmp_path / "m.onnx"))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    x[1, 1] = math.nan
    with torch.no_grad():
        wanted = module(x).numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-5)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2, 3]]).all()


@pytest.mark.parametrize("gradient", ["through", "adjoint", "reversible"])
def test_a_file_that_needs_torch_alone_holds_its_solver(gradient: str) -> None:
    text = f"flow f {{ data x: R[D = 2]\n cnf(v = mlp(8, act = tanh), solver = rk4(steps = 4), gradient = {gradient})\n base normal }}"
    source, name = fl.generate(text, standalone=True)
    names: dict[str, Any] = {"__name__": "alone"}
    exec(compile(source, "alone.py", "exec"), names)
    loss = names[name]().log_prob(torch.zeros(3, 2)).sum()
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    "solver",
    [
        "euler(steps = 4)",
        "rk4(steps = 2)",
        "dopri5(rtol = 1e-5, atol = 1e-5)",
        "reused_midpoint(steps = 3)",
        "implicit_midpoint(steps = 2)",
    ],
)
def test_a_field_may_read_a_value_that_is_named_t(solver: str) -> None:
    """The time of the field is its own; what stands outside under the name `t`, or `state`, is another value."""
    net: Any = fl.compile(
        f"""net f(x: R[D = 1], t: R, state: R) {{
      def field(y, s) {{ t + state * (1 + 0 * y) + 0 * s }}
      integrate(field, x, t = 0 -> 1, {solver})
    }}""",
        flow="f",
        dtype=torch.float64,
    )
    x, t, state = (
        torch.zeros(3, 1, dtype=torch.float64),
        torch.tensor([0.7, -1, 2], dtype=torch.float64),
        torch.tensor([1.0, 0, 5], dtype=torch.float64),
    )
    torch.testing.assert_close(net(x, t, state)[:, 0], t + state)
