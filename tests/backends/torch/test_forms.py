"""Cheaper forms in generated source: what is written, and that it gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flowlang as fl

COUPLING = "flow f { data x: R[D = 6]\n repeat 2 { affine_coupling(bound = 2, net = mlp(8, act = relu))\n reverse }\n base normal }"


def shaken(text: str) -> Any:
    flow = fl.compile(text, dtype=torch.float64, seed=0)
    with torch.no_grad():
        for k, p in enumerate(flow.parameters()):
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=p.dtype)
    return flow


@pytest.mark.parametrize("bound", [2, 0.5])
def test_bounded_scales_agree_with_their_tanh(bound: float) -> None:
    """Beside what the entry says, by torch alone, with gradients."""
    flow = shaken(COUPLING.replace("repeat 2", "repeat 1").replace("reverse", "").replace("= 2,", f"= {bound},"))
    x = 3 * torch.randn(20, 6, dtype=torch.float64)
    w1, b1, w2, b2 = flow.parameters()
    h = torch.relu(x[:, :3] @ w1.T + b1) @ w2.T + b2
    scale = bound * torch.tanh(h[:, 3:] / bound)
    z, log_det = flow(x)
    torch.testing.assert_close(z, torch.cat([x[:, :3], x[:, 3:] * scale.exp() + h[:, :3]], 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, scale.sum(1), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((z.square().sum(1) + log_det).sum(), list(flow.parameters()))
    wanted = (x[:, 3:] * scale.exp() + h[:, :3]).square().sum() + scale.sum()
    for a, b in zip(ours, torch.autograd.grad(wanted, [w1, b1, w2, b2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    back, _ = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)


def test_what_else_is_read_keeps_its_tanh() -> None:
    """A tanh that leaves as a value is not replaced: its digits near 0 are relative."""

    def text(last: str) -> str:
        return fl.generate(f"net n(x: R[D = 2]) {{ s = 2 * tanh(x / 2);  {last} }}", flow="n", standalone=False)[0]

    assert "sigmoid" in text("exp(s) + sum(s)")
    assert "sigmoid" not in text("exp(s) * s")
    assert "sigmoid" not in text("s")


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)])
def test_parts_of_a_value_are_one_split(sizes: tuple[int, int]) -> None:
    k = sizes[0]
    spec = f"net n(x: R[D = 4]) {{ a = x[D = 0..{k}];  b = x[D = {k}..4];  sum(a ^ 2) * b[D -> E] }}"
    assert ("chunk(" if sizes == (2, 2) else "split_with_sizes(") in fl.generate(spec, flow="n", standalone=False)[0]
    net = fl.compile(spec, flow="n", dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x), x[:, :k].square().sum(1, keepdim=True) * x[:, k:], rtol=1e-14, atol=0)


def test_parts_that_leave_may_be_written_to() -> None:
    """torch forbids writing to one of several views that a call gave."""
    net = fl.compile("net n(x: R[D = 4]) { x[D = 0..2], x[D = 2..4] }", flow="n")
    a, b = net(torch.ones(3, 4, requires_grad=True) * 2)
    a[0] = 0
    assert float((a.sum() + b.sum()).detach()) == 20
