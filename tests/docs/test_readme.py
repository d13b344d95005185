"""The blocks of the README, run in order as a new user would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import flowlang as fl
from flowlang.cli.main import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
SERVING = (ROOT / "docs" / "onnx.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "bijectors.md").read_text("utf-8")


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^ *```{kind}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", [*blocks(README, "flow"), *blocks(GUIDE, "flow")])
def test_specs_check(text: str) -> None:
    assert not [d for d in fl.check(text) if d.severity in ("error", "warning")]


def test_commands_of_the_tour_run(tmp_path: Path) -> None:
    tour = README[README.index("## A tour") :]
    lines = [line for block in blocks(tour, "sh") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 9
    bin_ = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-800:]}{done.stderr[-1500:]}"
    for name in ("run/model.safetensors", "run/curves.png", "run/samples.png", "scores.csv", "moons.py"):
        assert (tmp_path / name).is_file()
    assert list(tmp_path.glob("moons*.onnx"))


def test_python_blocks_run() -> None:
    scope: dict[str, object] = {}
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), scope)


def test_the_guide_to_serving_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export, and a server of onnxruntime and numpy alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "moons.flow").write_text((ROOT / "specs" / "moons.flow").read_text("utf-8"), "utf-8")
    fl.save(fl.compile("specs/moons.flow", seed=0), "moons.safetensors")
    export, serve = blocks(SERVING, "python")
    scope: dict[str, object] = {}
    exec(compile(export, "onnx.md", "exec"), scope)
    assert all(c.error is not None and c.error <= 1e-5 for c in scope["compared"].values())
    assert "flowlang" not in serve
    scope = {}
    exec(compile(serve, "onnx.md", "exec"), scope)
    assert scope["log_prob"].shape == (2,)
    assert scope["samples"].shape == (1000, 2)
    commands = [line for block in blocks(SERVING, "sh") for line in block.splitlines() if " export " in line]
    assert commands
    for line in commands:
        words = line.split()
        words[words.index("run")] = "moons.safetensors"
        done = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output


def test_links_lead_somewhere() -> None:
    for text, folder in ((README, ROOT), (GUIDE, ROOT / "docs")):
        prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)\)", prose):
            assert (folder / link).exists(), link
