"""Divergences as one sum of products whose order is chosen, fields made ready, and steps that samples share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowlang as fl
from flowlang.derive.traces import short_divergence
from flowlang.ir.tangents import DIRECTION

MLP = "net f(x: R[D], t: R) -> R[D] {{ y: R[D] = mlp({hidden}, act = {act})(x, t)\n y }}"
FIELDS = {
    "one layer": (MLP.format(hidden="24", act="tanh"), True),
    "two layers": (MLP.format(hidden="24, 16", act="tanh"), True),
    "two layers, silu": (MLP.format(hidden="24, 16", act="silu"), True),
    "three layers": (MLP.format(hidden="24, 16, 24", act="softplus"), None),
    "four layers": (MLP.format(hidden="24, 16, 24, 16", act="tanh"), None),
    "a step besides": (
        "net f(x: R[D], t: R) -> R[D] {\n y: R[D] = mlp(24, act = tanh)(x, t)\n t * y - 2 * x + sin(x)\n}",
        True,
    ),
    "a gate": (
        "net f(x: R[D], t: R) -> R[D] {\n y: R[D] = mlp(24, act = tanh)(x, t)\n g: R[D] = linear[D -> D](x)\n y * sigmoid(g)\n}",
        None,
    ),
    "a mean": (
        "net f(x: R[D], t: R) -> R[D] {\n y: R[D] = mlp(24, act = tanh)(x, t)\n y - mean[D](x) * t + mean[D](y)\n}",
        None,
    ),
    "a residual net": (
        "net f(x: R[D], t: R) -> R[D] {\n h: R[H = 24] = linear(x)\n h := h + tanh(linear[H -> H](h))\n"
        " y: R[D] = linear[H -> D](h)\n y\n}",
        None,
    ),
}  # fmt: skip
SPEC = """
{field}
flow likelihood {{
  data x: R[D = {size}]
  cnf(v = f(), solver = {solver})
  base normal
}}
"""


def made(field: str, size: int, solver: str = "rk4(steps = 3)") -> Any:
    flow: Any = fl.compile(
        SPEC.format(field=field, size=size, solver=solver), flow="likelihood", seed=0, dtype=torch.float64
    )
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return flow


def traces(field: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    found = []
    for v, s in zip(x, t, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda y, s=s: field(y[None], s[None])[0], v)
        assert isinstance(jacobian, torch.Tensor)
        found.append(jacobian.trace())
    return torch.stack(found)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("name", FIELDS)
def test_the_trace_is_that_of_autograd(name: str, size: int) -> None:
    text, short = FIELDS[name]
    flow = made(text, size)
    field = flow.cnf.field
    x, t = torch.randn(5, size, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    value, trace = field.divergence(x, t)
    torch.testing.assert_close(value, field(x, t))
    torch.testing.assert_close(trace, traces(field, x, t), rtol=1e-10, atol=1e-11)
    if short is not None:
        comp = fl.api.analyse(SPEC.format(field=text, size=size, solver="rk4(steps = 3)"), {}, sized=True)
        region = next(r for r in comp.regions["likelihood"].walk() if r.name == "field")
        program = short_divergence(region)
        assert program is not None
        assert not any(n.tensor.has(DIRECTION) for n in program.graph if hasattr(n.type, "axes"))


def test_its_gradient_is_that_of_autograd() -> None:
    flow = made(FIELDS["two layers"][0], 3)
    field = flow.cnf.field
    x, t = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    weights = list(field.v.parameters())
    found = torch.autograd.grad(field.divergence(x, t)[1].square().sum(), weights, allow_unused=True)

    def reference() -> torch.Tensor:
        y = x.clone().requires_grad_()
        v = field(y, t)
        rows = [torch.autograd.grad(v[:, d].sum(), y, create_graph=True)[0][:, d] for d in range(3)]
        return torch.stack(rows).sum(0).square().sum()

    wanted = torch.autograd.grad(reference(), weights, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_made_ready_is_the_field(name: str) -> None:
    flow = made(FIELDS[name][0], 3, "dopri5(rtol = 1e-6, atol = 1e-6)")
    field = flow.cnf.field
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.full((5,), 0.3, dtype=torch.float64)
    for program, plain in (("forward", field(x, t)), ("divergence", field.divergence(x, t))):
        for each in (True, False):
            ready = getattr(field, f"prepared_{program}" + "_together" * (not each), None)
            if ready is not None:
                torch.testing.assert_close(ready()(x, t if each else t[0]), plain, rtol=1e-11, atol=1e-12)
    if "layer" in name:
        assert hasattr(field, "prepared_forward")


def test_the_likelihood_goes_to_onnx_without_a_tangent_for_each_direction(tmp_path: Path) -> None:
    import onnxruntime as ort

    flow = made(FIELDS["two layers"][0], 4).float()
    files = fl.export_onnx(flow, tmp_path / "f.onnx", programs=["log_prob"])
    path = files["log_prob"] if isinstance(files, dict) else tmp_path / "f.onnx"
    x = torch.randn(6, 4)
    (found,) = ort.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), flow.log_prob(x).detach(), rtol=1e-5, atol=1e-5)


# ---- steps --------------------------------------------------------------------------------------

STEP = "net f(x: R[D], t: R) -> R[D] {{ 3 * sin(4 * t) * x - x ^ 3 }}\nnet end(x: R[D = 2]) {{ integrate(f(), x, t = 0 -> 2, {how}) }}"
TIGHT = "dopri5(rtol = 1e-11, atol = 1e-11)"


def end(how: str) -> Any:
    return fl.compile(STEP.format(how=how), flow="end", dtype=torch.float64)


def test_shared_steps_are_as_exact_and_fewer() -> None:
    x = torch.cat([0.02 * torch.randn(60, 2, dtype=torch.float64), 4 * torch.randn(4, 2, dtype=torch.float64)])
    truth = end(TIGHT)(x)
    found = {}
    for more in ("", ", shared = true"):
        net = end(f"dopri5(rtol = 1e-6, atol = 1e-6{more})")
        with fl.count_steps() as counts:
            y = net(x)
        found[more] = counts.evaluations
        assert float((y - truth).square().mean().sqrt()) < 1e-5
    assert found[", shared = true"] <= found[""]


@pytest.mark.parametrize("rows", [1, 7])
def test_shared_steps_with_and_without_gradients_are_the_same(rows: int) -> None:
    net = end("tsit5(rtol = 1e-6, atol = 1e-6, shared = true)")
    x = torch.randn(rows, 2, dtype=torch.float64)
    with torch.no_grad():
        plain = net(x)
    y = x.clone().requires_grad_()
    kept = net(y)
    torch.testing.assert_close(kept.detach(), plain, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(kept.sum(), y)
    h = 1e-6
    wanted = (end(TIGHT)(x + h) - end(TIGHT)(x - h)) / (2 * h)
    torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-3)


def test_a_sample_that_is_not_finite_spoils_no_other() -> None:
    net = end("dopri5(rtol = 1e-7, atol = 1e-7, shared = true)")
    x = torch.randn(5, 2, dtype=torch.float64)
    x[2, 1] = float("nan")
    y = net(x)
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(y[keep], end(TIGHT)(x[keep]), rtol=1e-5, atol=1e-5)
    assert net(x[2:3]).isnan().all()
    assert net(x[:0]).shape == (0, 2)


def test_samples_that_have_arrived_are_left_out_and_change_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.zeros(90, 2, dtype=torch.float64), 3 * torch.randn(20, 2, generator=g, dtype=torch.float64)])
    x = x[torch.randperm(110, generator=g)]
    net = end("dopri5(rtol = 1e-8, atol = 1e-8)")
    rows: list[int] = []
    field = net.field.forward if not hasattr(net.field, "prepared_forward") else None
    if field is not None:  # counts the samples of each evaluation
        net.field.forward = lambda y, t: rows.append(len(y)) or field(y, t)
    with torch.no_grad():
        y = net(x)
    assert not rows or min(rows) == 20
    alone = torch.stack([net(v[None])[0] for v in x[:6]])
    torch.testing.assert_close(y[:6], alone, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(y, end(TIGHT)(x), rtol=1e-6, atol=1e-6)


def test_shared_steps_go_to_onnx(tmp_path: Path) -> None:
    import onnxruntime as ort

    net = fl.compile(STEP.format(how="dopri5(rtol = 1e-4, atol = 1e-4, shared = true)"), flow="end")
    files = fl.export_onnx(net, tmp_path / "f.onnx", programs=["forward"])
    path = files["forward"] if isinstance(files, dict) else tmp_path / "f.onnx"
    x = torch.randn(9, 2)
    (found,) = ort.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("rk4(steps = 4, shared = true)", "FL0202"),
        ("dopri5(rtol = 1e-3, shared = 2)", "FL0306"),
        ("rk4(shared = true)", "FL0202"),
    ],
)
def test_what_does_not_fit_is_told(how: str, code: str) -> None:
    report = fl.check(STEP.format(how=how))
    assert [e.code for e in report.errors] == [code]
