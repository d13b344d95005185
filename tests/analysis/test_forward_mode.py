"""Jacobian-vector products and divergences as graphs, against autograd through the independent interpreter."""

from __future__ import annotations

import pytest
import torch

from flowlang.derive.forward_mode import NoDerivative, Tangents, divergence_program, jvp_program
from flowlang.ir.graph import Region
from flowlang.ir.ops import OPS
from tests.interpreter import evaluate
from tests.soundness.generate import make

SEEDS = range(120)
NO_RULE = {n for n, op in OPS.items() if op.jvp is None} & {"floor", "round", "sign", "abs", "sort", "prod"}


def values_of(region: Region, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    graph = region.graph
    x = 0.7 * torch.randn(graph[region.inputs[0]].tensor.shape, generator=g, dtype=torch.float64)
    c = torch.randn(graph[region.context[0]].tensor.shape, generator=g, dtype=torch.float64)
    parameters = {}
    for node in graph:
        if node.op == "param":
            p = torch.rand(node.tensor.shape, generator=g, dtype=torch.float64) * 0.8 + 0.1
            parameters[node.attrs["name"]] = p
    return x, c, parameters


def plain(region: Region) -> bool:
    """One map without calls, which the interpreter evaluates."""
    one = len(region.inputs) == len(region.context) == len(region.outputs) == 1
    return one and not any("region" in n.attrs or "body" in n.attrs for n in region.graph)


@pytest.mark.parametrize("seed", SEEDS)
def test_products_and_traces_are_those_of_autograd(seed: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        check(seed)
    finally:
        torch.set_default_dtype(torch.float32)


def check(seed: int) -> None:
    region = make(seed)
    if not plain(region):
        return
    x, c, parameters = values_of(region, seed)
    x_id, c_id, out = region.inputs[0], region.context[0], region.outputs[0]

    def f(v: torch.Tensor) -> torch.Tensor:
        return evaluate(region.graph, {x_id: v, c_id: c}, parameters, [out])[0]

    jacobian = torch.autograd.functional.jacobian(f, x)
    assert isinstance(jacobian, torch.Tensor)
    square = jacobian.reshape(x.numel(), x.numel())
    if not (torch.isfinite(square).all() and torch.isfinite(f(x)).all()):
        return
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    if any(region.graph[n].op in NO_RULE for n in region.graph.reachable([out])):
        with pytest.raises(NoDerivative):
            jvp_program(region, Tangents((0,)))
        return
    one = jvp_program(region, Tangents((0,)))
    value, moved = evaluate(one.graph, dict(zip(one.inputs, (x, direction, c), strict=True)), parameters, one.outputs)
    assert torch.allclose(value, f(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(moved.flatten(), square @ direction.flatten(), rtol=1e-9, atol=1e-10)

    exact = divergence_program(region)
    _, trace = evaluate(exact.graph, dict(zip(exact.inputs, (x, c), strict=True)), parameters, exact.outputs)
    assert torch.allclose(trace, square.trace(), rtol=1e-9, atol=1e-10)

    along = divergence_program(region, exact=False)
    fed = dict(zip(along.inputs, (x, direction, c), strict=True))
    _, estimate = evaluate(along.graph, fed, parameters, along.outputs)
    assert torch.allclose(estimate, direction.flatten() @ square @ direction.flatten(), rtol=1e-9, atol=1e-10)


def test_most_graphs_are_differentiable() -> None:
    found = total = 0
    for seed in SEEDS:
        region = make(seed)
        if not plain(region):
            continue
        total += 1
        try:
            jvp_program(region, Tangents((0,), 3))
            found += 1
        except NoDerivative:
            pass
    assert total >= 40
    assert found >= 0.8 * total
