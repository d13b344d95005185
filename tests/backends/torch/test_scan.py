"""Autoregressive inverses: the incremental loop against the plain scan, and gradients through both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flowlang.backends.torch import emit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import flowlang as fl
from flowlang.api import analyse
from flowlang.derive.schedule import Schedule, schedule
from tests.backends.torch.specs import build, context, data, generated

BODIES = {
    "affine": "shift: R[D], raw: R[D] = {net}\n  x * exp(2 * tanh(raw / 2)) + shift",
    "spline": "w: R[D, K = 4], h: R[D, K = 4], s: R[D, K1 = 3] = {net}\n  rqs[K](x, w, h, s, bound = 3)",
    "power": "shift: R[D], raw: R[D] = {net}\n  (sinh(x) - shift) * (softplus(raw) + 0.1)",
    "residual": "h: R[D] = {net}\n  m: R[D] = autoregressive_mlp[D](x + 0.3 * x, hidden = [5])\n  x * exp(tanh(h + sin(m))) + m",
    "two networks": "a: R[D] = {net}\n  b: R[D] = autoregressive_mlp[D](x, hidden = [3, 2])\n  x * exp(tanh(a)) + a * b",
    "reversed": "shift: R[D], raw: R[D] = autoregressive_mlp[D](reverse[D](x){given}, hidden = {hidden})\n"
    "  x * exp(tanh(reverse[D](raw))) + reverse[D](shift)",
    "shifted": "p: R[D] = autoregressive_mlp[D](shift[D](x, 1), hidden = {hidden})\n  x * exp(tanh(p)) + p",
}


@st.composite
def specs(draw: st.DrawFn) -> str:
    size = draw(st.integers(1, 7))
    hidden = draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    given_ = draw(st.booleans())
    act = draw(st.sampled_from(["silu", "relu", "tanh"]))
    net = f"autoregressive_mlp[D](x{', c' if given_ else ''}, hidden = {hidden}, act = {act})"
    body = BODIES[draw(st.sampled_from(sorted(BODIES)))]
    body = body.format(net=net, hidden=hidden, given=", c" if given_ else "")
    flip = "reverse;" if draw(st.booleans()) else ""
    context_ = " given c: R[K]" if given_ else ""
    return (
        f"bijector step(x: R[D]{context_}) {{\n  {body}\n}}\n"
        f"flow f {{ data x: R[D = {size}]; {'given c: R[K = 2]; ' if given_ else ''}step; {flip} step; base normal }}\n"
    )


def plain_scan(spec: str, seed: int = 0) -> Any:
    """The flow with every scan run as it stands."""
    known = emit.schedule
    emit.schedule = lambda *_: None
    generated.cache_clear()
    try:
        return build(spec, seed, size=0.4)
    finally:
        emit.schedule = known
        generated.cache_clear()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(specs())
def test_the_incremental_inverse_is_the_plain_one(spec: str) -> None:
    flow, plain = build(spec, size=0.4), plain_scan(spec)
    z, c = data(flow, 3), context(flow, 3)
    with torch.no_grad():
        found, expected = flow.inverse(z, **c), plain.inverse(z, **c)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flow(found[0], **c)[0], z, rtol=1e-7, atol=1e-7)


def plans(spec: str) -> list[Schedule | None]:
    comp = analyse(spec, sized=True)
    assert comp.ok, comp.report.errors
    region = comp.regions[comp.flows()[0]]
    return [
        schedule(n.attrs["body"], n.attrs["axis"], n.attrs["reverse"])
        for r in region.walk()
        if r.kind == "bijector"
        for n in comp.analyses.program(r, "inverse").graph
        if n.op == "scan_solve"
    ]


@pytest.mark.parametrize("body", sorted(BODIES))
def test_every_unit_is_computed_once(body: str) -> None:
    """The rows of the stages are disjoint, and cover what the result needs."""
    text = BODIES[body].format(net="autoregressive_mlp[D](x, hidden = [12, 9])", hidden="[12, 9]", given="")
    spec = f"bijector step(x: R[D]) {{\n  {text}\n}}\nflow f {{ data x: R[D = 5]; step; base normal }}\n"
    (plan,) = plans(spec)
    assert plan is not None
    for rows in plan.rows.values():
        assert sorted(rows.order) == list(range(len(rows.order)))
        assert list(rows.ends) == sorted(rows.ends)
        assert len(rows.ends) == plan.stages + 1
    assert plan.rows[plan.result].ends[-1] == 5
    assert plan.stages <= 5


def test_few_hidden_units_make_few_stages() -> None:
    """With 2 hidden units no more than 3 stages are needed, however long the axis."""
    spec = """
flow f { data x: R[D = 24]; affine_autoregressive(hidden = [2, 2]); base normal }"""
    (plan,) = plans(spec)
    assert plan is not None
    assert plan.stages == 3


def test_what_cannot_be_divided_runs_as_a_plain_scan() -> None:
    spec = """
bijector token(x: R[T, D]) {
  h = sort[E](shift[T](x, 1)[D -> E])
  m: R[T, D] = cumsum[T](h[E -> D], exclusive = true)
  (x - m) * exp(-tanh(m))
}
flow f { data x: R[T = 4, D = 2]; token; base normal }"""
    assert plans(spec) == [None]
    flow = build(spec)
    x = data(flow, 3)
    torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x, rtol=0, atol=1e-9)


GRADIENTS = {
    "incremental": "flow f { data x: R[D = 3]; affine_autoregressive(hidden = [4, 4]); reverse; rqs_autoregressive(bins = 3, hidden = [4]); base normal }",
    "context": "flow f { data x: R[D = 3]; given c: R[K = 2]; affine_autoregressive(hidden = [4]); base normal }",
    "plain scan": """
bijector token(x: R[T, D]) {
  h = cumsum[T](shift[T](x, 1))
  (x - h) * exp(-tanh(h))
}
flow f { data x: R[T = 3, D = 1]; token; base normal }""",
    "cached attention": """
bijector token(x: R[T, D]) {
  h = transformer[T](shift[T](x, 1), 4, 2, layers = 1, causal = true)
  mean: R[T, D], log_scale: R[T, D] = linear(h)
  (x - mean) * exp(-tanh(log_scale))
}
flow f { data x: R[T = 3, D = 1]; token; base normal }""",
    "bracketing": """
bijector wiggle(x: R[D]) { param a: Interval(0, 0.9)[D] = 0.5;  x + a * tanh(x) }
flow f { data x: R[D = 2]; wiggle; base normal }""",
    "planar": "flow f { data x: R[D = 2]; planar; base normal }",
    "inverse": "flow f { data x: R[D = 3]; inverse_autoregressive(hidden = [4]); base normal }",
}


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_gradients_through_iterative_inverses(name: str) -> None:
    """With respect to the base's value, the context and every parameter, against finite differences."""
    flow = build(GRADIENTS[name])
    z = data(flow, 2).requires_grad_()
    c = {k: v.requires_grad_() for k, v in context(flow, 2).items()}
    parameters = [p for p in flow.parameters() if p.requires_grad]

    def run(z: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(zip((k for k, _ in flow.named_parameters()), rest[len(c) :], strict=True))
        given_ = dict(zip(c, rest[: len(c)], strict=True))
        return torch.func.functional_call(Inverse(flow), {f"flow.{k}": v for k, v in values.items()}, (z, given_))

    assert torch.autograd.gradcheck(run, (z, *c.values(), *parameters), eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=False)


class Inverse(torch.nn.Module):
    def __init__(self, flow: Any):
        super().__init__()
        self.flow = flow

    def forward(self, z: Tensor, given_: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.flow.inverse(z, **given_)


def test_gradients_of_a_fixed_point() -> None:
    """The value alone: the log-det of a contraction is an estimate."""
    flow = fl.compile(
        "flow f { data x: R[D = 2]; residual_block(net = mlp(4, act = elu), lip = 0.5); base normal }",
        seed=0, dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = data(flow, 2).requires_grad_()

    def run(z: Tensor, *values: Tensor) -> Tensor:
        names = (k for k, _ in flow.named_parameters())
        module = Inverse(flow)
        return torch.func.functional_call(
            module, {f"flow.{k}": v for k, v in zip(names, values, strict=True)}, (z, {})
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(run, (z, *flow.parameters()), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_rsample_moves_with_the_parameters() -> None:
    """A reparametrised sample's derivative, by the same noise before and after a small step."""
    flow = build("autoregressive")

    def sample() -> Tensor:
        return flow.rsample((4,), generator=torch.Generator().manual_seed(3))

    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    parameters = list(flow.parameters())
    grads = torch.autograd.grad((sample() * weights).sum(), parameters)
    steps = [torch.randn(p.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) for p in parameters]
    expected = sum((g * s).sum() for g, s in zip(grads, steps, strict=True))
    values = []
    with torch.no_grad():
        for sign in (1e-6, -2e-6):
            for p, s in zip(parameters, steps, strict=True):
                p += sign * s
            values.append((sample() * weights).sum())
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, expected, rtol=1e-5, atol=1e-6)
