"""Analysis and code do not grow with the count of `repeat`; equal input gives equal output under any hash seed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from flowlang.backends.torch.codegen import Generator, module_text

from flowlang.compiler import Compilation, compile_source
from flowlang.source import Source

SPEC = """
bijector own(x: R[D]) {{
  h = shift[D](cumsum[D](tanh(x)), 1)
  x * exp(tanh(h)) + h
}}
flow f {{
  data x: R[D = 4]
  repeat {n} {{
    affine_coupling(net = mlp(8))
    own
    reverse
  }}
  repeat {n} {{ repeat {n} {{ rqs_autoregressive(bins = 4, hidden = [8]) }} }}
  base normal
}}
"""


def compiled(n: int) -> Compilation:
    comp = compile_source(Source("growth.flow", SPEC.format(n=n)))
    assert comp.ok, [d.message for d in comp.report.errors]
    return comp


def work(comp: Compilation) -> tuple[int, int, int, int]:
    """Regions, their nodes, the steps of their inverses, and the nodes of all derived programs."""
    regions = list(comp.regions["f"].walk())
    steps = sum(len(comp.analyses.steps_of(r)) for r in regions)
    programs = [comp.analyses.program(r, m) for r in regions if r.kind != "net" for m in ("forward", "inverse")]
    return len(regions), sum(len(r.graph) for r in regions), steps, sum(len(p.graph) for p in programs)


def text(comp: Compilation) -> str:
    generated = Generator(comp.regions["f"], comp.analyses, "growth").generate()
    return module_text(generated, standalone=False, title="growth", origin="growth")


def test_analysis_does_not_grow_with_repeat() -> None:
    assert work(compiled(2)) == work(compiled(50)) == work(compiled(900))


def test_code_does_not_grow_with_repeat() -> None:
    few, many = text(compiled(2)).splitlines(), text(compiled(90)).splitlines()
    assert len(few) == len(many)
    assert all(
        a == b or a.replace("2", "90").split() == b.replace("2", "90").split() for a, b in zip(few, many, strict=True)
    )


@pytest.mark.slow
def test_equal_under_every_hash_seed() -> None:
    program = (
        "from tests.analysis.test_growth import compiled, text\n"
        "comp = compiled(3)\n"
        "for r in comp.regions['f'].walk():\n"
        "    print(r.name, comp.analyses.steps_of(r))\n"
        "print(text(comp))\n"
        "from tests.soundness.generate import make\n"
        "from flowlang.derive.analyse import Analyses\n"
        "for seed in range(60):\n"
        "    found = Analyses().plan(make(seed))\n"
        "    print(getattr(found, 'steps', found))\n"
    )
    out = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True, check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    ]  # fmt: skip
    assert out[0]
    assert out[0] == out[1] == out[2]
