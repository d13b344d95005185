"""What only a fresh process shows: what `check` imports, and that the hash seed changes no byte."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOOD = ROOT / "tests/acceptance/good"
HEAVY = ("networkx", "torch", "onnx", "onnxruntime", "sympy", "numpy", "matplotlib", "safetensors", "lightning_fabric")


def run(code: str, *args: str, seed: str = "0") -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


CHECK = """
import sys
import flowlang
from click.testing import CliRunner
from flowlang.cli.main import cli
for spec in sys.argv[1:]:
    done = CliRunner().invoke(cli, ["check", "--json", spec])
    assert done.exception is None, done.output
print("\\n".join(sorted(sys.modules)))
"""


def test_check_imports_nothing_heavy() -> None:
    specs = [GOOD / f"{name}.flow" for name in ("two_moons", "glow_small", "own_autoregressive", "monotone_scalar")]
    loaded = set(run(CHECK, *map(str, specs)).split())
    assert "flowlang.compiler" in loaded
    assert not loaded.intersection(HEAVY)


SAY = """
import json, sys
from pathlib import Path
import flowlang as fl
from flowlang.api import analyse
from flowlang.compiler import info
from flowlang.diagnostics import FlowError
from flowlang.diagnostics.render import render_report, to_json
from flowlang.source import Source
from flowlang.syntax.printer import format_source
from tests.frontend.mutate import mutants
for spec in sys.argv[1:]:
    text = Path(spec).read_text("utf-8")
    comp = analyse(text)
    print(json.dumps([to_json(d) for d in comp.report], ensure_ascii=False))
    print(render_report(comp.report))
    try:
        print(format_source(Source.of("spec", text)))
    except FlowError as e:
        print(e)
    if comp.ok:
        print(json.dumps(info(comp), ensure_ascii=False))
        for region in comp.regions.values():
            for r in region.walk():
                for node in r.graph:
                    print(node.id, node.op, node.inputs, node.type, node.label)
    if comp.ok and comp.flows():
        print(fl.generate(Path(spec)))
for text in mutants(60, 5):
    print(json.dumps([to_json(d) for d in analyse("\\n{" + text).report], ensure_ascii=False))
"""


def test_the_hash_seed_changes_nothing() -> None:
    specs = [*sorted(GOOD.glob("*.flow")), *sorted((ROOT / "tests/acceptance/bad").glob("*.flow"))]
    said = {seed: run(SAY, *map(str, specs), seed=seed) for seed in ("0", "1", "2")}
    assert len(said["0"]) > 20_000
    assert len({hashlib.sha256(text.encode()).hexdigest() for text in said.values()}) == 1


@pytest.mark.parametrize(("text", "code"), [("flow f { data x: R[D = 2];  base normal }", 0), ("flow f {", 1)])
def test_exit_codes(tmp_path: Path, text: str, code: int) -> None:
    spec = tmp_path / "a.flow"
    spec.write_text(text, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "flowlang.cli.main", "check", "--json", str(spec)], capture_output=True, check=False
    )
    assert done.returncode == code
