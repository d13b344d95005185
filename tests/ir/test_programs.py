"""Programs, run by the interpreter, against the generated modules: calls, copies and the solvers of inversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flowlang as fl
from flowlang.api import analyse
from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import FixedPoint, Plan, Scalar, Scan
from flowlang.ir.text import print_program
from tests.interpreter import parameters_of, run

SPECS = {
    p.stem: p for p in sorted((Path(__file__).parents[1] / "acceptance" / "good").glob("*.flow"))
    if p.stem in ("monotone_scalar", "own_autoregressive", "own_coupling", "structured_linear", "two_moons")
}  # fmt: skip
TEXTS = {
    "lifted": "flow f { data x: R[T = 2, D = 3]\n affine_elementwise[D]\n base normal }",
    "repeated": "flow f { data x: R[D = 3]\n repeat 2 { affine_coupling(net = mlp(4))\n reverse }\n base normal }",
    "bracketed": "bijector b (x: R[D]) { x + 0.5 * tanh(x) }\nflow f { data x: R[D = 3]\n b\n base normal }",
    "scanned": "bijector b (x: R[D]) { x + shift[D](sin(x), 1) }\nflow f { data x: R[D = 3]\n b\n base normal }",
    "given": "flow f { data x: R[D = 2]; given c: R[C = 2]\n affine_coupling(net = mlp(4))\n base normal }",
}


def compare(spec: str | Path) -> None:
    """1e-7; of an inverse 1e-14 times the condition of the Jacobian where that is more (two_moons here: 7e8)."""
    comp = analyse(spec, sized=True)
    region = comp.regions[comp.flows()[0]]
    model = fl.compile(spec, flow=region.name, seed=0, dtype=torch.float64).eval()
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, dtype=p.dtype, generator=g)
    parameters = parameters_of(region, model)
    domain = region.graph[region.inputs[0]].attrs["domain"]
    x = torch.randn(2, *region.graph[region.inputs[0]].tensor.shape, dtype=torch.float64, generator=g)
    x = x.exp() if domain.interval.lo == 0 else x
    context = [torch.randn(2, *region.graph[c].tensor.shape, dtype=torch.float64, generator=g) for c in region.context]
    given = {region.graph[c].attrs["name"]: v for c, v in zip(region.context, context, strict=True)}
    with torch.no_grad():
        forward, back = model(x, **given), model.inverse(model(x, **given)[0], **given)
        density = model.log_prob(x, **given)
    for k in range(2):
        own = [c[k] for c in context]
        near = {n: v[k] for n, v in given.items()}
        n = x[k].numel()
        jacobian = torch.autograd.functional.jacobian(lambda u, c=near: model(u, **c)[0], x[k]).reshape(-1, n)
        back_tolerance = 1e-7 if jacobian.shape[0] != n else max(1e-7, 1e-14 * float(torch.linalg.cond(jacobian)))
        for name, inputs, wanted, tolerance in (
            ("forward", [x[k]], forward, 1e-7), ("inverse", [forward[0][k]], back, back_tolerance),
            ("log_prob", [x[k]], (density,), 1e-7),
        ):  # fmt: skip
            found = run(comp.analyses.program(region, name), [*inputs, *own], parameters, comp.analyses)
            for f, w in zip(found, wanted, strict=True):
                torch.testing.assert_close(f.expand(w[k].shape), w[k], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*SPECS, *TEXTS])
def test_interpreter_and_module_agree(name: str) -> None:
    compare(SPECS[name] if name in SPECS else TEXTS[name])


def test_the_solvers_are_among_them() -> None:
    kinds = set()
    for text in (TEXTS["bracketed"], TEXTS["scanned"]):
        comp = analyse(text, sized=True)
        plan = comp.analyses.plan(
            comp.regions["b"] if "b" in comp.regions else next(iter(comp.regions["f"].children.values())).region
        )
        assert isinstance(plan, Plan)
        kinds |= {type(s) for s in plan.steps}
    assert {Scalar, Scan} <= kinds
    assert FixedPoint not in kinds  # its log-det is random; the soundness run judges it


def test_programs_of_one_region_are_made_once() -> None:
    comp = analyse(TEXTS["repeated"], sized=True)
    region, again = comp.regions["f"], Analyses()
    assert comp.analyses.program(region, "inverse") is comp.analyses.program(region, "inverse")
    assert print_program(comp.analyses.program(region, "inverse")) == print_program(again.program(region, "inverse"))
