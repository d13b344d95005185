"""The command line: what each command prints, its exit code, and that no input ends in a traceback."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flowlang as fl
from flowlang.cli.main import LAZY, ORDER, Commands, cli, main

SPEC = "flow small {\n  data x: R[D = 2]\n  repeat 2 {\n    affine_coupling(net = mlp(8))\n    reverse\n  }\n  base normal\n}\n"
OPEN = "flow free {\n  data x: R[D]\n  given c: R[K]\n  affine_coupling(net = mlp(8))\n  base normal\n}\n"
BAD = "flow bad {\n  data x: R[D = 2]\n  elementwise(relu)\n  base normal\n}\n"
QUICK = ["--epochs", 2, "--batch", 32, "--accelerator", "cpu"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command as the shell does, in a folder of its own: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flowlang", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        said = capsys.readouterr()
        assert "fault of its own" not in said.err, said.err
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.flow").write_text(SPEC)
    return tmp_path / "small.flow"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).standard_normal((120, 2)) * [1, 3] + [5, 0]
    lines = "\n".join(f"{a:.6f},{b:.6f},{'red' if a > 5 else 'blue'}" for a, b in rows)
    (tmp_path / "data.csv").write_text(f"a,b,kind\n{lines}\n")
    return tmp_path / "data.csv"


# ---- what commands say ----------------------------------------------------------------------------


def test_the_first_lines_of_the_help_are_those_of_the_commands(run: Run) -> None:
    assert isinstance(cli, Commands)
    for name, (_, line) in LAZY.items():
        command = cli.get_command(None, name)
        assert command is not None
        assert (command.help or "").split("\n", 1)[0] == line
    code, out, _ = run("--help")
    assert code == 0
    assert re.findall(r"^  (\w+)  ", out.split("Commands:")[1], re.M) == list(ORDER)
    assert run("--version")[1] == f"flowlang {fl.__version__}\n"


def test_check_tells_good_from_bad_by_its_exit_code(run: Run, small: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.flow").write_text(BAD)
    assert run("check", small)[:2] == (0, f"{small}: no errors\n")
    code, _, err = run("check", "bad.flow")
    assert code == 1
    assert "elementwise(relu)" in err
    code, out, _ = run("check", "bad.flow", "--json")
    assert code == 1
    assert json.loads(out)["diagnostics"][0]["line"] == 3


def test_info_shows_each_step(run: Run, small: Path) -> None:
    code, out, _ = run("info", small)
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("affine_coupling"))
    assert re.search(r"x2\s+R\[D = 2\]\s+analytic\s+O\(D\)\s+34\s+\d", row)
    (found,) = json.loads(run("info", small, "--json")[1])["declarations"]
    assert found["parameters"] == sum(p.numel() for p in fl.compile(small).parameters()) == 2 * 34
    assert run("info", small, "--set", "D=4")[1].count("R[D = 4]") > 2


def test_usage_errors_are_told_as_such(run: Run, small: Path) -> None:
    assert run("chek", small)[0] == 2
    assert "Did you mean `check`" in run("chek", small)[2]
    assert run("check")[0] == 2
    assert run("check", small, "--set", "D")[0] == 2
    assert run("train", small)[0] == 2
    assert run("train", small, "--data", "x.npy", "--energy", "e")[0] == 2
    assert run("train", small, "--data", "x.npy", "--epochs", "many")[0] == 2


def test_train_sample_score_and_the_run_that_they_leave(run: Run, small: Path, data: Path, tmp_path: Path) -> None:
    code, out, _ = run("train", small, "--data", data, "--columns", "a,b", *QUICK)
    assert code == 0
    assert out.startswith("run: best validation")
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["curves.png", "history.csv", "last.safetensors", "model.safetensors", "samples.png"]
    code, out, _ = run("score", "--data", data, "--json", "-o", "scores.csv")
    assert code == 0
    flow = fl.load(tmp_path / "run").eval()
    x = torch.tensor(np.loadtxt(data, delimiter=",", skiprows=1, usecols=(0, 1))).float()
    with torch.no_grad():
        own = flow.log_prob(x)
    assert json.loads(out)["mean"] == pytest.approx(float(own.mean()), abs=1e-5)
    assert np.allclose(np.loadtxt("scores.csv", skiprows=1), own.numpy(), atol=1e-5)
    assert run("sample", "-n", 7, "-o", "s.csv")[0] == 0
    assert (tmp_path / "s.csv").read_text().startswith("a,b\n")
    assert run("sample", "-n", 7, "-o", "s.npy", "--seed", 1)[0] == 0
    assert np.load("s.npy").shape == (7, 2)
    assert run("sample", small, "-n", 7, "-o", "t.npy", "--seed", 1)[0] == 0
    assert np.array_equal(np.load("s.npy"), np.load("t.npy"))


def test_context_categories_and_the_size_of_the_data(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "free.flow").write_text(OPEN)
    train = ["train", "free.flow", "--set", "K=2", "--data", data, "--given", "c=kind", "--onehot", "kind"]
    code, out, err = run(*train, *QUICK)
    assert code == 0, err
    assert "`kind` one-hot: blue, red" in out
    assert run("score", "--data", data)[0] == 0
    assert run("sample", "--given", "c=1,0", "-n", 3)[0] == 0
    assert run("sample", "--given", "c=1", "-n", 3)[0] == 1
    code, _, err = run("sample", "-n", 3)
    assert code == 1
    assert "`sample` takes `c`" in err
    assert "`--given c=..`" in err


def test_dequantised_columns_are_printed_on_their_grid(run: Run, small: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = run("train", small, "--data", data, "--columns", "b,kind", "--dequantise", "b=0.5,kind", *QUICK)
    assert code == 0, err
    assert "`kind` dequantised: uniform noise of width 1 of its categories blue, red" in out
    run("sample", "-n", 40, "-o", "s.csv")
    rows = [line.split(",") for line in (tmp_path / "s.csv").read_text().splitlines()[1:]]
    assert {kind for _, kind in rows} <= {"blue", "red"}
    assert all(float(b) * 2 == round(float(b) * 2) for b, _ in rows)


def test_resume_takes_the_options_of_the_run(run: Run, small: Path, data: Path) -> None:
    args = ["train", small, "--data", data, "--columns", "a,b", "--accelerator", "cpu"]
    assert run(*args, "--epochs", 2, "--batch", 16, "--seed", 3)[0] == 0
    assert "epoch" in run(*args, "--resume", "--epochs", 3)[1]
    code, _, err = run(*args, "--resume", "--batch", 32)
    assert (code, "begun with --batch 16" in err) == (1, True)


def test_new_writes_a_spec_that_checks_and_overwrites_nothing(run: Run) -> None:
    assert run("new", "my first.flow", "--dims", 5)[0] == 0
    assert run("check", "my first.flow")[0] == 0
    assert run("fmt", "--check", "my first.flow")[0] == 0
    assert run("new", "my first.flow")[0] == 1


def test_draw_gives_svg_and_mermaid_without_marks_of_the_spec(run: Run, tmp_path: Path) -> None:
    import xml.etree.ElementTree as ET

    (tmp_path / "s.flow").write_text(SPEC.replace("mlp(8)", "mlp(8, act = relu)"))
    assert run("draw", "s.flow", "-o", "s.svg")[0] == 0
    tree = ET.parse(tmp_path / "s.svg")
    texts = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "repeat 2" in texts
    assert "affine_coupling(net = mlp(8, act = relu))" in texts
    code, out, _ = run("draw", "s.flow")
    assert code == 0
    assert 'subgraph b1["repeat 2"]' in out
    labels = re.findall(r'"(.*?)"', out)
    assert all(not set("[]{}`|") & set(x.replace("<br/>", "")) for x in labels)


def test_build_writes_a_file_and_verify_prints_each_check(run: Run, small: Path, tmp_path: Path) -> None:
    code, out, _ = run("build", small, "-o", "made/small.py")
    assert code == 0
    assert "needs torch alone" in out
    assert "import flowlang" not in (tmp_path / "made/small.py").read_text()
    assert "from flowlang" not in (tmp_path / "made/small.py").read_text()
    code, out, _ = run("verify", small)
    assert code == 0
    assert out.count("  ok ") == 6


# ---- what may be wrong ----------------------------------------------------------------------------


def test_specs_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "binary.flow").write_bytes(bytes(range(256)))
    (tmp_path / "empty.flow").write_text("")
    (tmp_path / "huge.flow").write_text("#" + "x" * 9_000_000)
    for name in ("none.flow", "binary.flow", "huge.flow", ".", "nul\0l", ""):
        for command in ("check", "info", "fmt", "draw", "build", "verify"):
            code, _, err = run(command, name)
            assert code == 1, (command, name)
            assert re.search(r"FL0801|FL0901", err), (command, name, err)
    assert run("build", "empty.flow")[0] == 1
    assert run("draw", "empty.flow")[0] == 1


def test_outputs_that_cannot_be_written(run: Run, small: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    train = ["train", small, "--data", data, "--columns", "a,b", *QUICK]
    assert run(*train, "-o", "run")[0] == 0
    for arguments in (
        ["build", small, "-o", "file/x.py"],
        ["draw", small, "-o", "file/x.svg"],
        ["new", "file/x.flow"],
        ["sample", "-o", "file/x.csv"],
        ["sample", "-o", "file/x.npy"],
        ["sample", "-o", "file/x.png"],
        ["score", "--data", data, "-o", "file/x.csv"],
        [*train, "-o", "file/run"],
    ):
        code, _, err = run(*arguments)
        assert code == 1, arguments
        assert "FL0801" in err, arguments


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(run: Run, small: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert run("build", small, "-o", locked / "x.py")[0] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(run: Run, small: Path) -> None:
    code, _, err = run("build", small, "-o", "/dev/full")
    assert (code, "FL0801" in err) == (1, True)


def test_a_checkpoint_on_a_full_disk_leaves_the_last_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowlang import files

    files.replace_file(tmp_path / "f", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(fl.FlowError, match="No space left"):
        files.replace_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_ctrl_c_ends_with_130(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flowlang.cli.main as module

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load", pressed)
    assert run("check", small)[0] == 130


def test_a_fault_of_our_own_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    import flowlang.cli.main as module

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(module, "load", broken)
    monkeypatch.setattr(sys, "argv", ["flowlang", "check", str(small)])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 3
    assert "ZeroDivisionError: nobody thought of this" in capsys.readouterr().err


WORDS = st.one_of(
    st.sampled_from([
        "check", "info", "fmt", "--check", "explain", "draw", "build", "std", "verify", "sample", "score", "--json", "--set",
        "D=3", "D=-1", "D=1e9", "D=99999999999999999999", "D=nan", "D=true", "=", "--flow", "--seed", "-1", "small.flow", "none",
        "free.flow", "-o", "out.svg", "-n", "0", "--data", "data.csv", "-w", "-h", "--", "FL0401", "FL9999", "affine_coupling", ".",
    ]),
    st.text(max_size=6).filter(lambda t: t != "-"),  # `-` would wait for standard input
)  # fmt: skip


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(WORDS, max_size=6))
def test_any_arguments_give_an_exit_code_and_no_traceback(run: Run, small: Path, data: Path, words: list[str]) -> None:
    (small.parent / "free.flow").write_text(OPEN)
    assert run(*words)[0] in (0, 1, 2)
    small.write_text(SPEC)


def test_a_net_s_open_sizes_are_set(run: Run, tmp_path: Path) -> None:
    """By --set, where --flow names the net: for its source, its ONNX model and its signal. Without them it is refused."""
    (tmp_path / "n.flow").write_text(
        "norm mine(x: R[C, H]) { param g: R[C] = 1; x / sqrt(mean[H](x ^ 2) + 1e-5) * g }\n"
    )
    sizes = ["--set", "C=4", "--set", "H=3"]
    code, out, _ = run("build", "n.flow", "--flow", "mine", *sizes)
    assert code == 0
    assert "R[C = 4, H = 3]" in out
    assert run("export", "n.flow", "--flow", "mine", *sizes, "-o", "n.onnx")[0] == 0
    assert run("draw", "n.flow", "--signal", "--flow", "mine", *sizes)[0] == 0
    code, _, err = run("build", "n.flow", "--flow", "mine")
    assert code == 1
    assert "the size of axis `C` of `x` is open" in err
    assert "--set C=8" in err


def test_what_a_net_has_not_is_told(run: Run, data: Path, tmp_path: Path) -> None:
    """The only net of a spec is what `build` and `export` take; it has no inverse, loss, samples or densities."""
    (tmp_path / "net.flow").write_text("net small(x: R[D = 2]) -> R[E = 3] { linear(tanh(x)) }\n")
    assert run("build", "net.flow", "-o", "net.py")[0] == 0
    fl.save(fl.compile(tmp_path / "net.flow", seed=0), tmp_path / "net.safetensors")
    for words in (
        ["verify", "net.flow"],
        ["train", "net.flow", "--data", data, "--columns", "a,b"],
        ["sample", "-w", "net.safetensors"],
        ["score", "-w", "net.safetensors", "--data", data, "--columns", "a,b"],
    ):
        code, _, err = run(*words)
        assert code == 1
        assert "FL0804" in err
        assert "a net" in err or "a network" in err, words


def test_verify_is_of_flows(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.flow").write_text(
        "model m(v: net = mlp(8)) {\n  data x: R[D = 2]\n  def loss(x) { u: R[D] = v(x); mean(u ^ 2) }\n}\n"
    )
    code, out, err = run("verify", "model.flow")
    assert code == 1, out
    assert "`m` is a model" in err


def test_info_shows_the_programs_of_a_model(run: Run, tmp_path: Path) -> None:
    """By hand: 3 subtractions, 3 squares and 3 additions for the loss, 5 steps of 2 stages of a field of 3 products."""
    (tmp_path / "m.flow").write_text(
        "model m { data x: R[D = 3]\n def loss(x) { z ~ normal\n sum((x - z) ^ 2) }\n"
        " def move(z: R[D]) { 2 * z }\n def sample { z ~ normal\n integrate(move, z, t = 0 -> 1, midpoint(steps = 5)) } }\n"
    )
    code, out, err = run("info", "m.flow")
    assert code == 0, err
    assert "model m: data x: R[D = 3]" in out
    rows = {words[0]: words[1:] for words in (line.split() for line in out.splitlines()) if words}
    assert rows["loss"] == ["x:", "R[D", "=", "3]", "R", "9"]
    assert rows["sample"] == ["R[D", "=", "3]", "30"]
