"""Folders of the user's own library: `--library`, `FLOWLANG_PATH`, `library_folders`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import flowlang as fl
from flowlang.cli.main import cli

PART = "bijector twice (x: R[D]) { 2 * x }\n"
SPEC = "import parts.scales (twice)\nflow a {\n  data x: R[D = 2]\n  twice\n  base normal\n}\n"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec that imports from a folder beside its own."""
    for name, text in {"shared/parts/scales.flow": PART, "own/a.flow": SPEC}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path / "own" / "a.flow"


def check(*arguments: object) -> tuple[int, str]:
    try:
        found = CliRunner().invoke(cli, ["check", *map(str, arguments)], catch_exceptions=False)
    except fl.FlowError as e:
        return 1, str(e)
    return found.exit_code, found.output


def test_the_option_adds_a_folder_for_one_command(spec: Path) -> None:
    shared = spec.parents[1] / "shared"
    assert check(spec, "--library", shared)[0] == 0
    code, output = check(spec)
    assert code == 1
    assert "FL0207" in output
    assert "`--library`" in output


def test_the_environment_adds_folders(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("FLOWLANG_PATH", os.pathsep.join([str(spec.parent), str(spec.parents[1] / "shared")]))
    assert check(spec)[0] == 0


def test_from_python_and_saved_weights_need_the_folder_no_longer(spec: Path, tmp_path: Path) -> None:
    assert not fl.check(spec).ok
    with fl.library_folders(spec.parents[1] / "shared"):
        flow = fl.compile(spec)
    assert not fl.check(spec).ok
    fl.save(flow, tmp_path / "w")
    x = torch.tensor([[0.5, -1.0]])
    expected = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(1)
    assert torch.allclose(fl.load(tmp_path / "w").log_prob(x), expected)


def test_the_spec_s_own_folder_comes_first(spec: Path) -> None:
    (spec.parent / "parts").mkdir()
    (spec.parent / "parts" / "scales.flow").write_text("bijector twice (x: R[D]) { x + 1 }\n", "utf-8")
    with fl.library_folders(spec.parents[1] / "shared"):
        flow = fl.compile(spec)
    assert torch.allclose(
        flow.log_prob(-torch.ones(1, 2)), torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(2)).sum()
    )


def test_nothing_outside_the_folder_can_be_named(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.flow").write_text(PART, "utf-8")
    (spec.parents[1] / "shared" / "parts" / "link.flow").symlink_to(tmp_path / "secret.flow")
    spec.write_text(SPEC.replace("parts.scales", "parts.link"), "utf-8")
    with fl.library_folders(spec.parents[1] / "shared"):
        assert [d.code for d in fl.check(spec).errors] == ["FL0207"]


def test_what_is_no_folder_is_refused(spec: Path) -> None:
    code, output = check(spec, "--library", spec)
    assert code == 1
    assert "FL0801" in output
    with pytest.raises(fl.FlowError, match="no folder"), fl.library_folders("nowhere"):
        pass
