"""Runs of the trainer: the same seed, interrupts, resume, several processes, what is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowlang.backends.torch.store import read_tensors

import flowlang as fl
from flowlang.train.data import Table
from flowlang.train.loop import Options, train, train_energy
from flowlang.train.problem import importance

SPEC = """flow small {
  data x: R[D = 2]
  repeat 2 { affine_coupling(net = mlp(8));  reverse }
  base normal
}
"""


def table(n: int = 300, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]]) + [3.0, -1.0]
    return Table(x)


def options(**changes: Any) -> Options:
    return Options(**{"epochs": 3, "batch": 64, "lr": 1e-2, "progress": False, "accelerator": "cpu", **changes})


def same(a: Path, b: Path) -> bool:
    one, other = read_tensors(a)[0], read_tensors(b)[0]
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_rules_say_rates_and_decay_by_name(tmp_path: Path) -> None:
    flow = fl.compile(SPEC, seed=0)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    train(flow, table(), tmp_path, options(rules="*: lr=0; blocks.1.*weight: lr=1e-2, weight_decay=0.1"))
    moved = {k for k, v in flow.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith("blocks.1.") and k.endswith("weight")}


@pytest.mark.parametrize(
    "rules",
    [
        "*: speed=1",
        "*: lr",
        ": lr=1",
        "*: lr=-1",
        "*: lr=nan",
        "nothing.*: lr=1",
        "*weight: unit=0.5",
        "*weight: unit=2",
        "*bias: unit=1",
    ],
)
def test_a_rule_that_says_nothing_is_refused(rules: str, tmp_path: Path) -> None:
    with pytest.raises(fl.FlowError) as caught:
        train(fl.compile(SPEC), table(), tmp_path, options(rules=rules))
    assert caught.value.diagnostics[0].suggestion


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(fl.compile(SPEC, seed=seed), table(), tmp_path / name, options(seed=seed, ema=0.9))
    assert same(tmp_path / "a/model.safetensors", tmp_path / "b/model.safetensors")
    assert (tmp_path / "a/history.csv").read_bytes() == (tmp_path / "b/history.csv").read_bytes()
    assert not same(tmp_path / "a/model.safetensors", tmp_path / "c/model.safetensors")


class Stop:
    """Asks for an interrupt, as Ctrl-C does, when a chosen batch is reached."""

    def __init__(self, problem: Any, at: int):
        self.count, self.at, self.inner = 0, at, problem.batch

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.inner(*arguments)


@pytest.mark.parametrize(("ema", "rules"), [(0.0, ""), (0.9, ""), (0.0, "*bias: lr=1e-3; *.0.*: weight_decay=0.1")])
@pytest.mark.parametrize("at", [1, 4, 5, 11])
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(
    tmp_path: Path, at: int, ema: float, rules: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowlang.train.problem import Likelihood

    o = options(ema=ema, warmup=3, rules=rules)
    train(fl.compile(SPEC, seed=0), table(), tmp_path / "whole", o)

    make = Likelihood.__init__

    def stopping(self: Any, *a: Any, **k: Any) -> None:
        make(self, *a, **k)
        self.batch = Stop(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(Likelihood, "__init__", stopping)
        first = train(fl.compile(SPEC, seed=0), table(), tmp_path / "cut", o)
    assert first.stopped == "interrupted"
    assert len(first.history) < 4
    second = train(
        fl.compile(SPEC, seed=5), table(), tmp_path / "cut", options(ema=ema, warmup=3, rules=rules, resume=True)
    )
    assert second.stopped == "epochs"
    for name in ("model.safetensors", "last.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "cut" / name), name
    assert (tmp_path / "whole/history.csv").read_bytes() == (tmp_path / "cut/history.csv").read_bytes()


def test_resume_refuses_other_data_and_other_options(tmp_path: Path) -> None:
    train(fl.compile(SPEC, seed=0), table(), tmp_path, options(epochs=1))
    with pytest.raises(fl.FlowError, match="begun with other data"):
        train(fl.compile(SPEC, seed=0), table(seed=1), tmp_path, options(resume=True))
    with pytest.raises(fl.FlowError, match=r"begun with --lr 0\.01"):
        train(fl.compile(SPEC, seed=0), table(), tmp_path, options(lr=0.5, resume=True))
    with pytest.raises(fl.FlowError, match="nothing to resume"):
        train(fl.compile(SPEC, seed=0), table(), tmp_path / "other", options(resume=True))


def test_densities_are_in_the_units_of_the_data(tmp_path: Path) -> None:
    """exp(log p) of the raw data integrates to one: the Jacobian of the standardisation is in it."""
    train(fl.compile(SPEC, seed=0), table(), tmp_path, options(epochs=5))
    flow = fl.load(tmp_path, dtype=torch.float64).eval()
    axis = torch.linspace(-9, 9, 400, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(3 + axis, -1 + axis, indexing="ij"), -1)
    with torch.no_grad():
        mass = torch.exp(flow.log_prob(grid)).sum() * (axis[1] - axis[0]) ** 2
        z, log_det = flow(grid[::40, ::40])
        x, back = flow.inverse(z)
    assert abs(float(mass) - 1) < 1e-3
    assert torch.allclose(x, grid[::40, ::40], atol=1e-9)
    assert torch.allclose(back, -log_det, atol=1e-9)
    drawn = flow.sample((4000,), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mean(0), torch.tensor([3.0, -1.0], dtype=torch.float64), atol=0.2)


def test_dequantisation_draws_fresh_noise_in_every_epoch_and_one_noise_for_all_processes() -> None:
    from flowlang.train.data import Recipe
    from flowlang.train.problem import Likelihood

    rounded = np.random.default_rng(0).integers(0, 9, (200, 2)).astype(float)
    noisy = rounded + np.array([0.25, 0.0])
    t = Table(noisy, recipe=Recipe(("a", "b"), steps={"a": 1.0}), rounded=rounded)
    p = Likelihood(fl.compile(SPEC, seed=0), t, batch=64, validation=0.1, seed=0, standardise=True)

    def seen(epoch: int, rank: int, world: int) -> Any:
        (x, _), _, _ = p.batch(epoch, 1, rank, world)
        return p.standard.undo(x.double().numpy())

    whole, later = seen(0, 0, 1), seen(1, 0, 1)
    assert np.allclose(np.stack([seen(0, 0, 2), seen(0, 1, 2)], 1).reshape(whole.shape), whole)
    noise = whole[:, 0] - np.round(whole[:, 0])
    assert np.abs(whole[:, 1] - np.round(whole[:, 1])).max() < 1e-5
    assert noise.std() == pytest.approx(12**-0.5, rel=0.2)
    assert not np.isin(noise.round(5), (later[:, 0] - np.round(later[:, 0])).round(5)).any()


def test_validation_stops_early_and_the_best_weights_stay(tmp_path: Path) -> None:
    flow = fl.compile(SPEC, seed=0)
    found = train(flow, table(60), tmp_path, options(epochs=300, lr=0.1, schedule="constant", patience=4))
    assert found.stopped == "patience"
    assert found.history[-1]["epoch"] - found.best_epoch == 4
    assert min(h["validation"] for h in found.history) == found.best_validation
    kept = read_tensors(tmp_path / "model.safetensors")[0]
    assert all(torch.equal(kept[k], v) for k, v in flow.state_dict().items())


def test_a_loss_that_is_not_finite_keeps_the_last_good_weights(tmp_path: Path) -> None:
    """Data beyond what float32 holds make the loss infinite; the message names the batch and rows."""
    t = table(200)
    train(fl.compile(SPEC, seed=0), t, tmp_path, options(epochs=2, standardise=False))
    good = read_tensors(tmp_path / "model.safetensors")[0]
    broken = Table(np.where(np.arange(200)[:, None] % 2 == 0, t.x, 1e38))
    flow = fl.compile(SPEC, seed=0)
    flow.load_state_dict(good)
    with pytest.raises(fl.FlowError) as e:
        train(flow, broken, tmp_path / "broken", options(epochs=50, batch=32, standardise=False))
    d = e.value.diagnostics[0]
    assert d.code == "FL0806"
    assert "batch 6 of epoch 1" in d.message
    assert "its rows are" in d.notes[0]
    kept = read_tensors(tmp_path / "broken/model.safetensors")[0]
    assert all(torch.equal(kept[k], good[k]) for k in good)


def test_constant_columns_and_few_rows_are_refused(tmp_path: Path) -> None:
    flat = Table(np.stack([np.ones(50), np.arange(50.0)], 1))
    with pytest.raises(fl.FlowError, match="constant"):
        train(fl.compile(SPEC), flat, tmp_path, options())
    with pytest.raises(fl.FlowError, match="too few"):
        train(fl.compile(SPEC), table(2), tmp_path, options())
    with pytest.raises(fl.FlowError, match=r"shape \(3,\)"):
        train(fl.compile(SPEC), Table(np.zeros((9, 3))), tmp_path, options())


def test_an_energy_is_fitted_and_its_constant_found(tmp_path: Path) -> None:
    """A correlated Gaussian times 7: log Z and the covariance are known in closed form."""
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]])

    def energy(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.einsum("...i,ij,...j", x, precision, x) - float(np.log(7))

    flow = fl.compile("flow f { data x: R[D = 2]\n plu_linear\n actnorm[D]\n base normal }", seed=0)
    found = train_energy(flow, energy, tmp_path, options(epochs=12, steps=50, batch=256, lr=3e-2))
    exact = float(np.log(7) + np.log(2 * np.pi) - 0.5 * torch.logdet(precision))
    assert found.best_validation == pytest.approx(-exact, abs=0.02)
    z = importance(flow, energy)
    assert z["log_z"] == pytest.approx(exact, abs=0.01)
    assert z["elbo"] <= z["log_z"]
    assert z["effective"] > 0.95
    drawn = flow.sample((20_000,), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch.cov(drawn.T), torch.linalg.inv(precision), atol=0.05)


def test_save_and_load_restore_a_flow_with_its_imports(tmp_path: Path) -> None:
    (tmp_path / "mine.flow").write_text("bijector doubled(x: R[D]) { 2 * x }\n")
    (tmp_path / "main.flow").write_text(
        "import mine (doubled)\nflow f {\n  data x: R[D]\n  doubled\n  actnorm[D]\n  base normal\n}\n"
    )
    flow = fl.compile(tmp_path / "main.flow", seed=0, D=3)
    fl.save(flow, tmp_path / "f.safetensors", note="mine")
    (tmp_path / "mine.flow").unlink()
    (tmp_path / "main.flow").unlink()
    again = fl.load(tmp_path / "f.safetensors")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert read_tensors(tmp_path / "f.safetensors")[1]["note"] == "mine"


def test_weights_of_another_spec_are_told_apart_by_name_and_shape(tmp_path: Path) -> None:
    fl.save(fl.compile(SPEC, seed=0), tmp_path / "f.safetensors")
    with pytest.raises(fl.FlowError) as e:
        fl.load(tmp_path / "f.safetensors", SPEC.replace("mlp(8)", "mlp(9)"))
    d = e.value.diagnostics[0]
    assert d.code == "FL0803"
    assert any("(8, 1) in the file and (9, 1) in the spec" in n for n in d.notes)
    with pytest.raises(fl.FlowError) as e:
        fl.load(tmp_path / "f.safetensors", SPEC.replace("reverse", "actnorm[D]"))
    assert any(n.startswith("the file lacks") and "scale" in n for n in e.value.diagnostics[0].notes)


@pytest.mark.parametrize("blob", [b"", b"\x00" * 7, b"\xff" * 64, b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": 1, "b": 2}'])
def test_damaged_weights_are_refused(tmp_path: Path, blob: bytes) -> None:
    (tmp_path / "f.safetensors").write_bytes(blob)
    with pytest.raises(fl.FlowError) as e:
        fl.load(tmp_path / "f.safetensors")
    assert e.value.diagnostics[0].code == "FL0803"


def test_truncated_and_altered_weights_never_load_otherwise_than_saved(tmp_path: Path) -> None:
    flow = fl.compile(SPEC, seed=0)
    fl.save(flow, tmp_path / "f.safetensors")
    blob = (tmp_path / "f.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(blob[:8], "little")
    for k in range(60):
        changed = bytearray(blob)
        if k % 2:
            changed = changed[: int(rng.integers(0, len(blob)))]
        else:
            changed[int(rng.integers(0, header))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "g.safetensors").write_bytes(bytes(changed))
        try:
            again = fl.load(tmp_path / "g.safetensors")
        except fl.FlowError:
            continue
        assert again.state_dict().keys() == flow.state_dict().keys()


# ---- processes ----------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flowlang.cli.main", *(str(a) for a in arguments)]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    spec, data = tmp_path / "small.flow", tmp_path / "data.npy"
    spec.write_text(SPEC)
    np.save(data, table(400).x)
    return spec, data


@pytest.mark.slow
def test_ctrl_c_in_the_shell_and_resume(tmp_path: Path, files: tuple[Path, Path]) -> None:
    spec, data = files
    base = command(
        "train", spec, "--data", data, "--epochs", 60, "--batch", 32, "--accelerator", "cpu", "--patience", 60
    )
    subprocess.run([*base, "-o", str(tmp_path / "whole")], check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(
        [*base, "-o", str(tmp_path / "cut")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not (tmp_path / "cut/last.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "go on with `--resume" in said
    subprocess.run(
        [*command("train", spec, "--data", data, "--resume"), "-o", str(tmp_path / "cut")],
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert same(tmp_path / "whole/last.safetensors", tmp_path / "cut/last.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["fabric", "torchrun"])
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, files: tuple[Path, Path], launcher: str) -> None:
    """400 rows, 360 of them in training: batches of 50 and a last one of 10, each shared by two processes."""
    spec, data = files
    more = [
        "train",
        str(spec),
        "--data",
        str(data),
        "--epochs",
        "2",
        "--batch",
        "50",
        "--lr",
        "1e-2",
        "--accelerator",
        "cpu",
    ]
    subprocess.run([*command(*more), "-o", str(tmp_path / "one")], check=True, capture_output=True, timeout=300)
    start = command(*more, "--devices", 2)
    if launcher == "torchrun":
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "29511",
            *command(*more)[1:],
        ]
    done = subprocess.run([*start, "-o", str(tmp_path / "two")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best validation") == 1  # one process speaks
    one, two = (read_tensors(tmp_path / n / "last.safetensors")[0] for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(k.startswith("optimizer.") for k in one)
    for k, v in one.items():
        assert torch.allclose(v, two[k], rtol=1e-3, atol=2e-6), k
