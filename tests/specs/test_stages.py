"""Specs that go on from another run: `specs/stages/reflow.flow` after `specs/rectified.flow`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

import flowlang as fl
from flowlang.cli.main import cli
from flowlang.train import datasets

SPECS = Path(__file__).parents[2] / "specs"


def test_reflow_goes_on_from_the_rectified_flow(tmp_path: Path) -> None:
    stages = SPECS / "stages" / "reflow.flow"
    assert not list(fl.check(stages))
    text = stages.read_text("utf-8")
    assert "flowlang train specs/stages/reflow.flow" in text
    found = datasets.load("spirals").columns
    datasets.write(datasets.Dataset({k: v[:600] for k, v in found.items()}), tmp_path / "spirals.csv")
    common = ["--data", str(tmp_path / "spirals.csv"), "--epochs", "1", "--batch", "128", "--accelerator", "cpu"]
    for spec, more in ((SPECS / "rectified.flow", ["-o", "a"]), (stages, ["-o", "b", "--start", str(tmp_path / "a")])):
        more[1] = str(tmp_path / more[1])
        done = CliRunner().invoke(cli, ["train", str(spec), *common, *more])
        assert done.exit_code == 0, (done.output, done.exception)
    first: Any = fl.load(tmp_path / "a")
    second: Any = fl.load(tmp_path / "b")
    assert all(
        torch.equal(p, q) for p, q in zip(first.flow.v.parameters(), second.flow.teacher.parameters(), strict=True)
    )
    assert second.sample((5,)).shape == (5, 2)
