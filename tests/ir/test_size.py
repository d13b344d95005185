"""Counts without allocation: against compiled modules, against torch's own FLOP counter, as formulas, within limits."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flowlang as fl
from flowlang.analysis.size import flop_count, formula, parameter_count
from flowlang.api import analyse
from flowlang.compiler import size_formula

SPECS = sorted((Path(__file__).parents[1] / "acceptance" / "good").glob("*.flow"))
STEPS = [
    "affine_coupling", "additive_coupling", "affine_autoregressive", "rqs_coupling(bins = 4)", "rqs_autoregressive", "actnorm",
    "inverse(affine_autoregressive)", "affine_elementwise", "repeat 5 { affine_coupling(net = mlp(16))\n reverse }",
]  # fmt: skip
MATRICES = [
    "Invertible", "Invertible(dense)", "Orthogonal", "Orthogonal(cayley)", "Orthogonal(exp)", "LowerTriangular", "UnitLowerTriangular", "Spd",
]  # fmt: skip


def flow(steps: str, data: str = "x: R[D = 6]", before: str = "") -> str:
    return f"{before}\nflow f {{\n data {data}\n {steps}\n base normal\n}}\n"


def matrix(domain: str) -> str:
    body = f"bijector m (x: R[D]) {{ param W: {domain}[D', D]\n sum[D](W * x) }}"
    return flow("m", before=body)


def held(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("text", [*map(flow, STEPS), *map(matrix, MATRICES)], ids=[*STEPS, *MATRICES])
def test_stored_parameters_are_those_of_the_module(text: str) -> None:
    comp = analyse(text, sized=True)
    assert comp.ok, [d.message for d in comp.report.errors]
    assert parameter_count(comp.regions["f"], "stored") == held(fl.compile(text))


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_stored_parameters_of_specs(spec: Path) -> None:
    comp = analyse(spec, sized=True)
    for name in comp.flows():
        assert parameter_count(comp.regions[name], "stored") == held(fl.compile(spec, flow=name))


@pytest.mark.parametrize(
    ("domain", "wanted"),
    [("Invertible", 36), ("Orthogonal", 15), ("LowerTriangular", 21), ("UnitLowerTriangular", 15), ("Spd", 21)],
)
def test_free_parameters_are_degrees_of_freedom(domain: str, wanted: int) -> None:
    assert parameter_count(analyse(matrix(domain)).regions["f"], "free") == wanted


def test_masked_weights_count_what_they_show() -> None:
    """The visible entries of a masked network are where its gradient can be other than 0."""
    text = flow("affine_autoregressive(hidden = [32])")
    model = fl.compile(text, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel()))
    seen = [torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()]
    for k in range(40):
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        model.zero_grad()
        model.log_prob(x).sum().backward()
        seen = [s | (p.grad != 0) for s, p in zip(seen, model.parameters(), strict=True)]
    free = parameter_count(analyse(text).regions["f"], "free")
    moved = sum(int(s.sum()) for s in seen)
    assert moved <= free < parameter_count(analyse(text).regions["f"])
    assert moved >= 0.9 * free  # the rest: units that no output reads


def test_shared_networks_count_once() -> None:
    shared = "n = mlp(32)\n affine_coupling(net = n)\n reverse\n affine_coupling(net = n)"
    own = "affine_coupling(net = mlp(32))\n reverse\n affine_coupling(net = mlp(32))"
    one, two = (parameter_count(analyse(flow(s)).regions["f"]) for s in (shared, own))
    assert two == 2 * one == 2 * held(fl.compile(flow(shared)))


def test_flops_of_networks_against_torch() -> None:
    """torch counts matrix products alone; ours has the rest besides, which is small for a wide network."""
    text = flow("affine_coupling(net = mlp(256, 256))", "x: R[D = 64]")
    model = fl.compile(text, seed=0)
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(1, 64))
    ours = flop_count(analyse(text).regions["f"])
    assert counter.get_total_flops() <= ours <= 1.05 * counter.get_total_flops()


def test_flops_grow_with_copies_and_steps() -> None:
    one, five = (flop_count(analyse(flow(f"repeat {n} {{ affine_coupling\n reverse }}")).regions["f"]) for n in (2, 10))
    assert five == 5 * one


HUGE = "repeat 40 { affine_coupling(net = mlp(49152, 49152))\n reverse }"


def test_a_hundred_billion_parameters_are_counted_and_not_made() -> None:
    text = flow(HUGE, "x: R[D = 1024]")
    region = analyse(text, max_parameters=10**12).regions["f"]
    first = 512 * 49152 + 49152
    assert parameter_count(region) == 40 * (first + 49152 * 49152 + 49152 + 49152 * 1024 + 1024) > 99 * 10**9
    assert flop_count(region) > 40 * 2 * 49152**2


def test_the_limit_is_on_the_whole_flow() -> None:
    text = flow(HUGE.replace("40", "50"), "x: R[D = 1024]")
    (error,) = fl.check(text).errors
    assert error.code == "FL0901"
    assert analyse(text, max_parameters=10**12).ok


@pytest.mark.parametrize(
    ("steps", "data", "wanted"),
    [
        ("affine_elementwise", "x: R[D = 4]", "2*D"),
        ("affine_coupling(net = mlp(8))", "x: R[D = 4]", "13*D + 8 for even D"),
        ("affine_coupling(net = mlp(8))", "x: R[D = 5]", "13*D + 3 for odd D"),
        ("repeat 3 { affine_elementwise }", "x: R[T = 2, D = 4]", None),
    ],
)
def test_formulas(steps: str, data: str, wanted: str | None) -> None:
    comp = analyse(flow(steps, data))
    found = size_formula(comp, "f")
    if wanted is not None:
        assert found == wanted
    else:
        assert found is not None
    assert comp.regions["f"].graph[0].tensor.count > 0


def test_formulas_of_quadratic_and_of_no_polynomial() -> None:
    assert formula(lambda s: s["D"] ** 2 * s["T"] + 7, {"D": 4, "T": 3}) == "D^2*T + 7"
    assert formula(lambda s: -(s["D"] * (s["D"] - 1) // 2), {"D": 4}) == "-1/2*D^2 + 1/2*D"
    assert formula(lambda s: 2 ** s["D"], {"D": 4}) is None
    assert formula(lambda s: prod(s.values()) - prod(s.values()), {"D": 4}) == "0"
