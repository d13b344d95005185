"""The text form: parses back to equal graphs, is the same under every hash seed, and refuses what is no graph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.api import analyse
from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import Plan
from flowlang.ir.check import check_region
from flowlang.ir.distributions import Distribution
from flowlang.ir.graph import Region
from flowlang.ir.text import TextProblem, parse_program, parse_region, print_program, print_region, same_nodes
from tests.soundness.generate import make

SPECS = sorted((Path(__file__).parents[1] / "acceptance" / "good").glob("*.flow"))


def laws(region: Region) -> dict[str, Distribution]:
    """The distributions of a graph: mixtures and joint ones are not among the named ones."""
    found = {}
    for r in region.walk():
        for d in (*r.draws, *r.emissions, *([r.base] if r.base is not None else [])):
            if d.distribution is not None:
                found[d.distribution.name] = d.distribution
    return found


def agrees(region: Region) -> None:
    text = print_region(region)
    back = parse_region(text, laws(region))
    assert print_region(back) == text
    for a, b in zip(region.walk(), back.walk(), strict=True):
        assert same_nodes(a.graph, b.graph)
        assert (a.name, a.kind, a.inputs, a.context, a.outputs) == (b.name, b.kind, b.inputs, b.context, b.outputs)
        assert list(a.children) == list(b.children)
        check_region(b)


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_specs_parse_back(spec: Path) -> None:
    comp = analyse(spec, sized=True)
    for region in comp.regions.values():
        agrees(region)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_random_graphs_parse_back(seed: int) -> None:
    agrees(make(seed))


@pytest.mark.parametrize("spec", [p for p in SPECS if "solver" not in p.stem], ids=lambda p: p.stem)
def test_programs_parse_back(spec: Path) -> None:
    comp = analyse(spec, sized=True)
    for name in comp.flows():
        region = comp.regions[name]
        for program in ("forward", "inverse", "log_prob", "sample_and_log_prob"):
            made = comp.analyses.program(region, program)
            text = print_program(made)
            back = parse_program(text, laws(region))
            assert print_program(back) == text
            assert same_nodes(made.graph, back.graph)
            assert (made.inputs, made.outputs, made.context, made.log_det) == (
                back.inputs,
                back.outputs,
                back.context,
                back.log_det,
            )


def test_programs_of_random_graphs_parse_back() -> None:
    planned = 0
    for seed in range(80):
        region, analyses = make(seed), Analyses()
        if analyses.violations(region) or not isinstance(analyses.plan(region), Plan):
            continue
        planned += 1
        text = print_program(analyses.program(region, "inverse"))
        assert print_program(parse_program(text, laws(region))) == text
    assert planned > 10


def test_a_parsed_region_compiles_to_the_same_programs() -> None:
    region = analyse(SPECS[0], sized=True)
    for r in region.regions.values():
        back = parse_region(print_region(r), laws(r))
        one, other = Analyses(), Analyses()
        if isinstance(one.plan(r), Plan) and r.kind in ("bijector", "flow"):
            assert print_program(one.program(r, "inverse")) == print_program(other.program(back, "inverse"))


def test_the_text_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import sys; from flowlang.api import analyse; from flowlang.ir.text import print_region; "
        "c = analyse(sys.argv[1], sized=True); print(''.join(print_region(c.regions[f]) for f in c.flows()))"
    )
    spec = next(p for p in SPECS if p.stem == "glow_small")
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(spec)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != b""


@pytest.mark.parametrize(
    "text",
    [
        "", "nothing", "  %0 R = input", "region 0 net 'a'\n  %1 R = input", "region 0 net 'a'\n  %0 Q = input",
        "region 0 net 'a'\n  what 3", "region 0 net 'a'\n  child 'b' Child(name='b', region=region(4))",
        "region 0 net 'a'\n  %0 R = input {domain=open('x')}", "region 0 net 'a'\n  %0 R = input {domain=().__class__}",
        "region 0 net 'a'\n  %0 R = input {name=1 + 1}",
    ],
)  # fmt: skip
def test_what_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises((TextProblem, AssertionError)):
        parse_region(text)
