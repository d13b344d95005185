"""Every spec in specs/ checks, verifies, and trains a little on the data that its header names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowlang as fl
from flowlang.api import analyse, compile_function
from flowlang.cli.training import parse_given, parse_steps
from flowlang.train import datasets
from flowlang.train.data import read_table
from flowlang.train.loop import Options, train, train_energy
from flowlang.verify import verify

FOLDER = Path(__file__).parents[2] / "specs"
SPECS = sorted(FOLDER.glob("*.flow"))


def header(spec: Path) -> str:
    """The comment at the top, on one line."""
    lines = []
    for line in spec.read_text("utf-8").splitlines():
        if not line.startswith("##"):
            break
        lines.append(line.removeprefix("##").strip())
    return " ".join(lines)


def option(text: str, name: str) -> str | None:
    found = re.search(rf"flowlang train .*?--{name} (\S+)", text)
    return found[1] if found else None


def test_there_are_at_least_eight_and_each_says_how_to_run_it() -> None:
    assert len(SPECS) >= 8
    for spec in SPECS:
        text = header(spec)
        assert f"flowlang train specs/{spec.name}" in text, spec.name
        assert "--energy" in text or re.search(r"flowlang\.train\.datasets \w+ -o \S+", text), spec.name


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_spec_is_clean_and_canonical(spec: Path) -> None:
    from flowlang.source import Source
    from flowlang.syntax.printer import format_source

    found = fl.check(spec)
    assert [d.message for d in found] == []
    text = spec.read_text("utf-8")
    assert format_source(Source.of(spec.name, text)) == text


def loaded(name: str) -> datasets.Dataset:
    """A data set, where the package that it comes with is installed (all of them are in the extra `demo`)."""
    try:
        return datasets.load(name)
    except fl.FlowError as e:
        if e.diagnostics[0].code == "FL0805":
            pytest.skip(e.diagnostics[0].message)
        raise


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_spec_verifies(spec: Path) -> None:
    comp = analyse(spec, sized=True)
    for name in comp.flows():
        assert [c for c in verify(comp, name) if not c.ok] == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_spec_learns_from_the_data_that_its_header_names(spec: Path, tmp_path: Path) -> None:
    """With the header's own columns and options, on 1,500 rows: the held-out loss falls, samples are finite."""
    text = header(spec)
    options = Options(
        epochs=2, batch=100, lr=3e-3, steps=15, progress=False, accelerator="cpu", standardise="--no-standardise" not in text
    )  # fmt: skip
    comp = analyse(spec, sized=True)
    name = option(text, "flow") or [*comp.flows(), *comp.models()][0]
    flow = fl.compile(spec, seed=0, flow=name)
    given: dict[str, Any] = {}
    energy = option(text, "energy")
    if energy is not None:
        result = train_energy(flow, compile_function(comp, energy, name), tmp_path, options)
    else:
        source = re.search(r"flowlang\.train\.datasets (\w+)", text)
        assert source is not None
        data = loaded(source[1])
        few = np.random.default_rng(0).permutation(data.rows)[:1500]
        small = datasets.Dataset({k: v[few] for k, v in data.columns.items()})
        wide = next(iter(small.columns.values())).ndim > 1
        file = tmp_path / f"data.{'csv' if not wide else 'npz' if len(small.columns) > 1 else 'npy'}"
        datasets.write(small, file)
        columns, chosen = option(text, "columns"), option(text, "given")
        table = read_table(
            file, columns=columns.split(",") if columns else None, given=parse_given([chosen], "") if chosen else None,
            dequantise=parse_steps(option(text, "dequantise")),
        )  # fmt: skip
        result = train(flow, table, tmp_path / "run", options)
        given = {k: torch.as_tensor(v[:50]).float() for k, v in table.given.items()}
    assert result.history[-1]["validation"] < result.history[0]["validation"]
    trained = flow if energy is not None else fl.load(tmp_path / "run")
    noise = torch.Generator().manual_seed(0)
    if name in comp.models():  # its program takes what it declares, and the batch from that
        drawn = trained.eval().sample(*(given.values() or ((50,),)), generator=noise)
    else:
        drawn = trained.eval().sample((50,), generator=noise, **given)
    assert bool(torch.isfinite(drawn).all())
    if "data x: Positive" in spec.read_text("utf-8"):
        assert bool((drawn > 0).all())
