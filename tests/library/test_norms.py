"""Norms against torch's own layers and the papers' formulas: values, gradients, running states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowlang as fl
from flowlang.diagnostics import FlowError

SHAPE = {"C": 8, "H": 3, "W": 5}


def norm(call: str, **sizes: int) -> Any:
    named = sizes or SHAPE
    axes = ", ".join(named)

    module = fl.compile(f"norm n(x: R[{axes}]) {{ {call}(x) }}", flow="n", dtype=torch.float64, **named)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=g)
    return module


def inner(module: Any) -> Any:
    """The norm inside the wrapper that the spec declares."""
    return next(iter(module.children()))


def data(*shape: int, seed: int = 1) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5


def copied(to: nn.Module, source: Any) -> nn.Module:
    to = to.double()
    with torch.no_grad():
        to.weight.copy_(source.gamma)
        if getattr(to, "bias", None) is not None:
            to.bias.copy_(source.beta)
    return to


def same_value_and_gradient(mine: Any, other: Any, x: Tensor) -> None:
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = data(*x.shape, seed=9)
    first, second = mine(a), other(b)
    assert torch.allclose(first, second, rtol=1e-10, atol=1e-10)
    (first * weight).sum().backward()
    (second * weight).sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-9)


def test_layer_norm_is_torch_s() -> None:
    mine = norm("layer_norm()", D=8)
    same_value_and_gradient(mine, copied(nn.LayerNorm(8), inner(mine)), data(6, 8))


def test_rms_norm_is_torch_s() -> None:
    mine = norm("rms_norm()", D=8)
    same_value_and_gradient(mine, copied(nn.RMSNorm(8, eps=1e-5), inner(mine)), data(6, 8))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_group_norm_is_torch_s(groups: int) -> None:
    mine = norm(f"group_norm({groups})")
    same_value_and_gradient(mine, copied(nn.GroupNorm(groups, 8), inner(mine)), data(4, 8, 3, 5))


def test_instance_norm_is_torch_s() -> None:
    same_value_and_gradient(norm("instance_norm()"), nn.InstanceNorm2d(8), data(4, 8, 3, 5))


@pytest.mark.parametrize(("sizes", "layer"), [(SHAPE, nn.BatchNorm2d), ({"C": 8}, nn.BatchNorm1d)])
def test_batch_norm_is_torch_s_over_training_and_inference(sizes: dict[str, int], layer: Any) -> None:
    mine = norm("batch_norm()", **(sizes if sizes is not SHAPE else {}))
    other = copied(layer(8), inner(mine))
    shape = tuple(sizes.values())
    for step in range(5):
        same_value_and_gradient(mine, other, data(7, *shape, seed=step))
        assert torch.allclose(inner(mine).running_mean, other.running_mean, rtol=1e-12)
        assert torch.allclose(inner(mine).running_var, other.running_var, rtol=1e-12)
    mine.eval(), other.eval()
    same_value_and_gradient(mine, other, data(7, *shape, seed=20))


def evonorm(kind: str, m: Any, x: Tensor, batch: Tensor) -> Tensor:
    """The formulas of the paper's table, written with torch."""
    c = (slice(None), None, None)
    eps, second = 1e-5, x.square().mean((-2, -1), keepdim=True)
    within = x.var((-2, -1), correction=0, keepdim=True)
    if kind[0] == "s":
        g = x.reshape(len(x), 2, 4, 3, 5)
        stat = g.square().mean((2, 3, 4)) if kind == "s2" else g.var((2, 3, 4), correction=0)
        stat = stat.repeat_interleave(4, 1)[..., None, None]
        gate = torch.sigmoid(m.v[c] * x) if kind == "s0" else torch.sigmoid(x)
        return x * gate / torch.sqrt(stat + eps) * m.gamma[c] + m.beta[c]
    other = {"b0": lambda: m.v[c] * x + torch.sqrt(within + eps), "b1": lambda: (x + 1) * torch.sqrt(second + eps),
             "b2": lambda: torch.sqrt(second + eps) - x}[kind]()  # fmt: skip
    return x / torch.maximum(torch.sqrt(batch[c] + eps), other) * m.gamma[c] + m.beta[c]


@pytest.mark.parametrize("kind", ["b0", "b1", "b2", "s0", "s1", "s2"])
def test_evonorms_are_the_paper_s(kind: str) -> None:
    module = norm(f"evonorm_{kind}({'groups = 2' if kind[0] == 's' else ''})")
    x = data(6, 8, 3, 5)
    biased = x.var((0, 2, 3), correction=0)
    same_value_and_gradient(module, lambda v: evonorm(kind, inner(module), v, v.var((0, 2, 3), correction=0)), x)
    module.eval()
    with torch.no_grad():
        if kind[0] == "b":  # item 5 of card 048: the running variance takes the unbiased one
            n = 6 * 15
            assert torch.allclose(inner(module).running_var, 0.9 + 0.1 * biased * n / (n - 1), rtol=1e-12)
            inner(module).running_var.copy_(biased)
        assert torch.allclose(module(x), evonorm(kind, inner(module), x, biased), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "dependent"),
    [("batch_norm()", True), ("evonorm_b0()", True), ("evonorm_s0(2)", False), ("group_norm(2)", False)],
)
def test_which_norms_couple_the_samples_of_a_batch(call: str, dependent: bool) -> None:
    module = norm(call)
    x, y = data(4, 8, 3, 5), data(4, 8, 3, 5)
    y[1:] = data(3, 8, 3, 5, seed=7)
    with torch.no_grad():
        assert torch.equal(module(x)[0], module(y)[0]) != dependent
        module.eval()
        assert torch.equal(module(x)[0], module(y)[0])


def test_groups_that_do_not_divide_are_told() -> None:
    with pytest.raises(FlowError, match="does not divide into 3 groups"):
        norm("group_norm(3)")


def test_open_sizes_are_asked_for() -> None:
    with pytest.raises(FlowError, match="is open"):
        fl.compile("norm n(x: R[C, H]) { instance_norm()(x) }", flow="n", C=4)
