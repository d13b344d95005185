"""Scans of random graphs: what the incremental loop gives is what the plain scan gives."""

from __future__ import annotations

import torch
from flowlang.backends.torch import emit
from flowlang.backends.torch.codegen import Generator, module_text
from flowlang.backends.torch.load import load_module

from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import Failure
from flowlang.derive.schedule import schedule
from tests.soundness.generate import make

SEEDS = range(20_000, 20_220)


def test_incremental_scans_of_random_graphs(monkeypatch) -> None:
    compared = 0
    for seed in SEEDS:
        region, analyses = make(seed), Analyses()
        if analyses.violations(region) or isinstance(analyses.plan(region), Failure):
            continue
        scans = [n for n in analyses.program(region, "inverse").graph if n.op == "scan_solve"]
        if not any(schedule(n.attrs["body"], n.attrs["axis"], n.attrs["reverse"]) for n in scans):
            continue
        made = []
        for plain in (False, True):
            with monkeypatch.context() as patch:
                if plain:
                    patch.setattr(emit, "schedule", lambda *_: None)
                generated = Generator(region, analyses, "random").generate()
            text = module_text(generated, standalone=False, title="random", origin="random")
            torch.manual_seed(seed)
            made.append(getattr(load_module(text), generated.root)().double())
        graph = region.graph
        generator = torch.Generator().manual_seed(seed)
        values = [
            torch.randn(3, *graph[i].tensor.shape, generator=generator, dtype=torch.float64)
            for i in (*region.outputs, *(e.value for e in region.emissions), *region.context)
        ]
        with torch.no_grad():
            found, expected = (m.inverse(*values) for m in made)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        compared += 1
    assert compared >= 5
