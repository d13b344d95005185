"""Random maps, and the small maps of the analyses: the models' inverses are the modules'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from flowlang.backends.onnx.build import Model, Options, export
from flowlang.backends.onnx.graph import Value
from flowlang.backends.torch.codegen import Generator, module_text
from flowlang.backends.torch.load import load_module

import flowlang as fl
from flowlang.api import analyse
from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import Failure
from flowlang.derive.programs import Program, is_map, is_random
from flowlang.derive.schedule import schedule
from tests.analysis.maps import BIJECTIVE
from tests.backends.onnx.support import flow_of, has_kernels, parity
from tests.soundness.generate import make


class Bare(Model):
    """A program of a region that is no flow."""

    def inputs(self, program: Program) -> list[Value]:
        made = [self.g.input(f"in{k}", ("batch", *program.graph[i].tensor.shape)) for k, i in enumerate(program.inputs)]
        self.see(made[0])
        return made

    def output_names(self, program: Program) -> list[str]:
        return [self.fresh(f"out{k}") for k in range(len(program.outputs))]

    def outputs(self, program: Program, names: list[str], found: list[Value]) -> dict[str, Value]:
        self.output_ranks = {k: program.graph[o].tensor.rank for k, o in zip(names, program.outputs, strict=True)}
        return dict(zip(names, found, strict=True))


INTO: dict[str, Any] = {"Positive": torch.exp, "Unit": torch.sigmoid}


@pytest.fixture
def _double() -> Any:  # a map without parameters has the default precision
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_double")
def test_random_maps() -> None:
    compared = 0
    for seed in range(20_000, 20_120):
        region, analyses = make(seed), Analyses()
        maps = [r for r in region.walk() if is_map(r)]
        if analyses.violations(region) or any(isinstance(analyses.plan(r), Failure) for r in maps) or is_random(region):
            continue
        generated = Generator(region, analyses, "random").generate()
        text = module_text(generated, standalone=False, title="random", origin="random")
        torch.manual_seed(seed)
        module = getattr(load_module(text), generated.root)().double().eval()
        generator = torch.Generator().manual_seed(seed)
        x, context = (
            [torch.randn(3, *region.graph[i].tensor.shape, generator=generator) for i in side]
            for side in (region.inputs, region.context)
        )
        x = [
            INTO.get(region.graph[i].attrs["domain"].name, lambda v: v)(v)
            for i, v in zip(region.inputs, x, strict=True)
        ]
        with torch.no_grad():
            forward = module.forward(*x, *context)
            for program, given in (("forward", [*x, *context]), ("inverse", [*forward[:-1], *context])):
                run = has_kernels(Bare(region, analyses, module, program, Options()).build())
                if run is None or len(run.get_inputs()) > len(given):  # no kernel; an estimate of a log-det
                    continue
                feeds = {f"in{k}": v.numpy() for k, v in enumerate(given)}
                found = run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})
                for a, b in zip(found, getattr(module, program)(*given), strict=True):
                    assert np.allclose(a, b.numpy(), rtol=1e-7, atol=1e-7, equal_nan=True), (seed, program)
                compared += 1
    assert compared >= 30


def scanned(text: str) -> bool:
    """Whether an inverse is an incremental loop that reads shifted rows."""
    comp = analyse(text, {}, sized=True)
    graphs = [comp.analyses.program(r, "inverse").graph for r in comp.regions["f"].walk() if r.name == "m"]
    plans = [
        schedule(n.attrs["body"], n.attrs["axis"], bool(n.attrs["reverse"]))
        for g in graphs
        for n in g
        if n.op == "scan_solve"
    ]
    return any(r.shift is not None for p in plans if p is not None for r in p.reads.values())


SHIFTED = [m for m in BIJECTIVE if "shift" in m.body and m.data.startswith("R[")]
MEAN = "flow f { data x: R[S = 2, T = 4]\n b\n base normal }\nbijector b (x: R[S, T]) { x + mean[S](shift[T](x, 1)) }"


@pytest.mark.parametrize("m", SHIFTED, ids=str)
def test_scans_that_read_earlier_rows(m: Any) -> None:
    comp = analyse(m.text, {}, sized=True)
    found = parity(comp, "f", "inverse", torch.float64, (3,), 1e-7)
    assert found is None or found <= 1


def test_a_mean_of_earlier_rows() -> None:
    for unroll in (0, 64):
        options = Options(unroll=unroll)
        assert (parity(analyse(MEAN, {}, sized=True), "f", "inverse", torch.float64, (3,), 1e-9, options) or 0.0) <= 1


WRITTEN_OUT = [
    "affine_autoregressive(hidden = [16, 16])",
    "rqs_autoregressive(bins = 4, hidden = [8])\n reverse\n affine_autoregressive(hidden = [8])",
    "cubic_spline_autoregressive(bins = 4, hidden = [8])",  # its inverse iterates
]  # fmt: skip


@pytest.mark.parametrize("steps", WRITTEN_OUT)
def test_a_loop_written_out_gives_the_same(steps: str) -> None:
    comp = analyse(f"flow f {{ data x: R[D = 5]\n {steps}\n base normal }}", {}, sized=True)
    flow = flow_of(comp, "f", torch.float32)
    for program in ("sample", "inverse", "sample_and_log_prob"):
        found = parity(comp, "f", program, torch.float32, (1, 7), 1e-5, Options(unroll=8))
        assert found is not None
        assert found <= 1
    loops = [
        sum(n.op_type == "Loop" and "newton" not in n.name for n in export(comp.regions["f"], comp.analyses, flow, "sample", Options(unroll=u)).graph.node)
        for u in (4, 8)
    ]  # fmt: skip
    assert loops == [steps.count("autoregressive"), 0]


def test_shifted_reads_are_among_them() -> None:
    assert sum(scanned(m.text) for m in SHIFTED) >= 3


def test_few_stages_are_written_out_unasked(tmp_path: Path) -> None:
    """Up to eight; beyond, and where `unroll` is 0, one loop, whose size does not depend on D."""

    def shape(size: int, **options: int) -> tuple[int, int]:
        flow = fl.compile("flow f { data x: R[D = 4]\n affine_autoregressive(hidden = [8])\n base normal }", D=size)
        model = onnx.load(fl.export_onnx(flow, tmp_path / "f.onnx", ["sample"], **options)["sample"])
        return sum(n.op_type == "Loop" for n in model.graph.node), len(model.graph.node)

    assert shape(8)[0] == 0
    assert shape(40)[1] <= shape(9)[1] + 3  # (a table of places, where stages differ in width)
    assert shape(40)[0] == 1
    assert shape(9)[0] == shape(8, unroll=0)[0] == 1
