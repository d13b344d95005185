"""`torch.compile(fullgraph=True)` and `torch.export` take every program, and give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.backends.torch.specs import build, context, data

# One of each kind: splines and scans with context, plain scans of splines, bracketing, images, heavy tails.
NAMES = ["bracketing", "context", "image", "linear", "spline_autoregressive"]
# A contraction's log-det is a series of random length, which no tracer takes; its samples need none.
CASES = [*((n, p) for n in NAMES for p in ("log_prob", "forward", "inverse", "sample")), ("contraction", "sample")]
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler, about its own parts


def call(flow: Any, program: str, x: Tensor, c: dict[str, Tensor]) -> Any:
    if program == "inverse":
        return flow.inverse(*flow(x, **c)[:-1], **c)
    if program == "sample":
        return flow.sample((3,), **c)
    return getattr(flow, program)(x, **c)


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """Traced whole, without a code generator: what fails there fails with any."""
    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "program"), CASES)
def test_compile(name: str, program: str) -> None:
    flow = build(name)
    x, c = data(flow, 3), context(flow, 3)
    run = compiled(lambda x, c: call(flow, program, x, c))
    torch.manual_seed(0)
    with torch.no_grad():
        expected = call(flow, program, x, c)
        torch.manual_seed(0)
        found = run(x, c)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_under_compile(name: str) -> None:
    flow = build(name)
    x, c = data(flow, 3), context(flow, 3)

    def grads(run: Callable[..., Tensor]) -> list[Tensor]:
        flow.zero_grad()
        run(x, c).sum().backward()
        return [p.grad.clone() for p in flow.parameters()]

    expected = grads(lambda x, c: flow.log_prob(x, **c))
    found = grads(compiled(lambda x, c: flow.log_prob(x, **c)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bracketing", "context"])
def test_gradients_of_inverses_under_compile(name: str) -> None:
    flow = build(name)
    z, c = data(flow, 3), context(flow, 3)

    def grads(run: Callable[..., Any]) -> list[Tensor]:
        flow.zero_grad()
        x, log_det = run(z, c)
        (x.square().sum() + log_det.sum()).backward()
        return [p.grad.clone() for p in flow.parameters()]

    expected = grads(lambda z, c: flow.inverse(z, **c))
    found = grads(compiled(lambda z, c: flow.inverse(z, **c)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


class Exported(nn.Module):
    """One program of a flow as a module, for `torch.export`."""

    def __init__(self, flow: Any, program: str):
        super().__init__()
        self.flow, self.program = flow, program

    def forward(self, x: Tensor, c: dict[str, Tensor]) -> Any:
        if self.program == "sample":
            return self.flow.sample((x.shape[0],), **c)
        if self.program == "inverse":
            return self.flow.inverse(x, **c)
        return getattr(self.flow, self.program)(x, **c)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "program"), [c for c in CASES if c[0] != "image"])
def test_export_with_a_dynamic_batch(name: str, program: str) -> None:
    flow = build(name)
    module = Exported(flow, program)
    x, c = data(flow, 3), context(flow, 3)
    batch = torch.export.Dim("batch", min=2)
    dynamic = {"x": {0: batch}, "c": {k: {0: batch} for k in c}}
    with torch.no_grad():
        program_ = torch.export.export(module, (x, c), dynamic_shapes=dynamic)
        y, d = data(flow, 7, seed=5), context(flow, 7, seed=6)
        torch.manual_seed(0)
        expected = module(y, d)
        torch.manual_seed(0)
        found = program_.module()(y, d)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
