"""What users give that cannot be: one error with a code and what to write, never a traceback; nothing of theirs is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import flowlang as fl
from flowlang import files
from flowlang.cli.common import write_text
from flowlang.cli.main import cli
from flowlang.diagnostics import FlowError
from flowlang.train.data import Standardiser

TEXT = "flow f { data x: R[D = 2];  affine_coupling(net = mlp(4));  base normal }"


@pytest.fixture(scope="module")
def flow() -> Any:
    return fl.compile(TEXT, seed=0)


OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "dtype as text": ("FL0804", lambda m: fl.compile(TEXT, dtype="float")),
    "dtype of whole numbers": ("FL0804", lambda m: fl.compile(TEXT, dtype=torch.int64)),
    "seed as text": ("FL0804", lambda m: fl.compile(TEXT, seed="x")),
    "a name longer than files have": ("FL0801", lambda m: fl.compile("a" * 5000)),
    "a size with a fraction": ("FL0306", lambda m: fl.compile(TEXT, D=2.5)),
    "a size that is true": ("FL0306", lambda m: fl.compile(TEXT, D=True)),
    "a size as text": ("FL0306", lambda m: fl.compile(TEXT, D="a")),
    "a column beyond squares": ("FL0802", lambda m: Standardiser.fit(np.array([[1e300], [-1e300]]))),
    "a column below squares": ("FL0802", lambda m: Standardiser.fit(np.array([[1e-300], [0.0]]))),
    "weights by number": ("FL0801", lambda m: fl.load(3)),
    "saving to a folder": ("FL0801", lambda m: fl.save(m, ".")),
    "sample of a text": ("FL0702", lambda m: m.sample("3")),
    "sample of a part": ("FL0702", lambda m: m.sample(2.5)),
    "sample of less than none": ("FL0702", lambda m: m.sample((-3,))),
    "wrong shape": ("FL0702", lambda m: m.log_prob(torch.zeros(3, 3))),
    "wrong dtype": ("FL0702", lambda m: m.log_prob(torch.zeros(3, 2).double())),
    "context that is not asked": ("FL0702", lambda m: m.log_prob(torch.zeros(3, 2), c=torch.zeros(3))),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_the_python_api_says_what_is_wrong(flow: Any, what: str) -> None:
    code, call = OPTIONS[what]
    with pytest.raises(FlowError) as e:
        call(flow)
    (found,) = e.value.diagnostics
    assert found.code == code
    assert found.suggestion


def test_a_long_name_is_checked_too() -> None:
    assert [d.code for d in fl.check("a" * 5000)] == ["FL0801"]


def test_exporting_to_no_name_is_refused(flow: Any) -> None:
    with pytest.raises(FlowError) as e:
        fl.export_onnx(flow, "")
    assert e.value.diagnostics[0].code == "FL0801"


def test_what_is_written_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "a.flow"
    spec.write_text(TEXT)
    spec.chmod(0o640)
    (tmp_path / "link.flow").symlink_to(spec)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FlowError):
        write_text(spec, TEXT + "\n# more\n")
    monkeypatch.undo()
    assert spec.read_text() == TEXT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.flow", "link.flow"]
    done = CliRunner().invoke(cli, ["fmt", str(tmp_path / "link.flow")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "link.flow").is_symlink()
    assert spec.read_text() != TEXT
    assert spec.stat().st_mode & 0o777 == 0o640
