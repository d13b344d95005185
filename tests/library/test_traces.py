"""Estimates of a field's divergence beside the exact trace: unbiased, and of what variance."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import flowlang as fl

F64 = torch.float64
FIELDS = """
net smooth(x: R[D], t: R) -> R[D] { y: R[D] = mlp(12, 12, act = tanh, last = 1)(x);  y * (1 + t) }
net narrow(x: R[D], t: R) -> R[D] { h = tanh(linear[D -> K = 2](x));  linear[K -> D](h) }
net scaled(x: R[D], t: R) -> R[D] { param s: R[D] = 1
  s * sin(x) }
"""
DRAWS = 4000


@cache
def flow(trace: str, field: str = "smooth()", dtype: torch.dtype = F64) -> Any:
    text = (
        FIELDS
        + f"flow f {{\n data x: R[D = 6]\n cnf(v = {field}, solver = rk4(steps = 3), trace = {trace})\n base normal\n}}"
    )
    return fl.compile(text, flow="f", seed=0, dtype=dtype)


def points() -> torch.Tensor:
    return torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(0))


def estimates(trace: str, field: str = "smooth()") -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return flow(trace, field).log_prob(points().expand(DRAWS, 3, 6))


@pytest.mark.parametrize("trace", ["hutchinson", "hutchpp", "hutchpp, probes = 2", "hutchpp, probes = 4"])
def test_the_mean_is_the_exact_value(trace: str) -> None:
    found = estimates(trace)
    with torch.no_grad():
        exact = flow("exact").log_prob(points())
    assert ((found.mean(0) - exact).abs() <= 4 * found.std(0) / DRAWS**0.5).all()
    assert flow(trace).exactness == "unbiased"


def test_the_variance_falls_faster_than_by_more_draws() -> None:
    """Hutch++ with k probes takes 3k products; as many draws of Hutchinson's have a 3k-th of its variance."""
    one = estimates("hutchinson").var(0)
    found = [(k, estimates(f"hutchpp, probes = {k}").var(0)) for k in (2, 3, 4)]
    for k, variance in found:
        assert (variance < one / (3 * k)).all()
    assert (found[2][1] < found[1][1]).all()
    assert (found[1][1] < found[0][1]).all()


def test_it_is_exact_where_the_sketch_spans_the_jacobian() -> None:
    with torch.no_grad():
        narrow, whole = flow("exact", "narrow()").log_prob(points()), flow("exact").log_prob(points())
    for probes, field, exact in (
        (2, "narrow()", narrow),
        (5, "narrow()", narrow),
        (6, "smooth()", whole),
        (9, "smooth()", whole),
    ):
        found = estimates(f"hutchpp, probes = {probes}", field)
        assert (found - exact).abs().max() < 1e-9


def test_its_gradient_is_unbiased() -> None:
    """By the one parameter vector of a field, whose exact gradient is that of the exact trace."""

    def gradient(trace: str, n: int) -> torch.Tensor:
        torch.manual_seed(0)
        made = flow(trace, "scaled()")
        (s,) = made.parameters()
        out = []
        for row in points():
            (g,) = torch.autograd.grad(made.log_prob(row.expand(n, 6)).sum(), s)
            out.append(g / n)
        return torch.stack(out)

    exact = gradient("exact", 1)
    assert (gradient("hutchpp, probes = 2", DRAWS) - exact).abs().max() < 0.03


def test_the_estimate_exports_with_its_noise_as_an_input(tmp_path: Path) -> None:
    import onnxruntime

    from tests.backends.onnx.support import replayed

    made = flow("hutchpp, probes = 2", dtype=torch.float32)
    fl.export_onnx(made, tmp_path / "f.onnx", programs=["log_prob"])
    run = onnxruntime.InferenceSession(str(tmp_path / "f.onnx"))
    x = points().float()
    shape = [3 if d == "batch" else d for d in run.get_inputs()[1].shape]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (found,) = run.run(None, {run.get_inputs()[0].name: x.numpy(), run.get_inputs()[1].name: noise.numpy()})
    with torch.no_grad(), replayed(made, [noise], []):
        wanted = made._log_prob(x)
    assert torch.allclose(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


def test_sampling_reads_no_probes() -> None:
    torch.manual_seed(0)
    a = flow("hutchpp, probes = 2").sample((4,), generator=torch.Generator().manual_seed(2))
    b = flow("exact").sample((4,), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(a, b)


@pytest.mark.parametrize(
    ("asked", "code"),
    [("trace = hutchpp, probes = 0", "FL0305"), ("trace = hutchpp, probes = 40", "FL0305"), ("probes = 2", "FL0202")],
)
def test_what_does_not_fit_is_told(asked: str, code: str) -> None:
    text = f"bijector b(x: R[D]) {{ integrate(mlp(4, act = tanh), x, t = 0 -> 1, rk4(steps = 2), {asked}) }}\nflow f {{ data x: R[D = 2];  b;  base normal }}"
    assert [e.code for e in fl.check(text).errors] == [code]
