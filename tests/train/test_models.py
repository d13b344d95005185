"""Training of models: their own loss, values in the units of the data, labels beside them, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowlang.backends.torch.store import read_tensors

import flowlang as fl
from flowlang.cli.training import draw_samples
from flowlang.train.data import Table
from flowlang.train.loop import Options, train

MATCHING = """
model matching(v: net = mlp(16)) {
  data x1: R[D = 2]
  def loss {
    x0 ~ normal
    t ~ uniform(0, 1)
    mean((v((1 - t) * x0 + t * x1, t) - (x1 - x0)) ^ 2)
  }
  def sample { x0 ~ normal;  integrate(v, x0, t = 0 -> 1, rk4(steps = 8)) }
  def log_prob(x1) { z, log_det = cnf(v, rk4(steps = 8))(x1);  normal.log_prob(z) + log_det }
}
"""

CLASSIFIER = """
model classifier(f: net = mlp(16)) {
  data x: R[D = 2], y: R[K = 2]
  given c: R
  def logits(x, c) { z: R[K] = f(x);  z + 0 * c }
  def loss(x, y, c) { -sum[K](y * log_softmax[K](logits(x, c))) }
  def accuracy(x, y, c) { z = logits(x, c);  where(sum[K](y * z) >= max[K](z), 1.0, 0.0) }
}
"""


def options(**changes: Any) -> Options:
    return Options(**{"epochs": 3, "batch": 64, "lr": 1e-2, "progress": False, "accelerator": "cpu", **changes})


def table(n: int = 300) -> Table:
    rng = np.random.default_rng(0)
    return Table(rng.standard_normal((n, 2)) @ np.array([[2.0, 1.6], [0.0, 1.2]]) + [30.0, -10.0])


def labelled(n: int = 600) -> Table:
    rng = np.random.default_rng(0)
    k = rng.integers(0, 2, n)
    x = rng.standard_normal((n, 2)) * 3 + np.array([[0.0, 50.0], [20.0, 50.0]])[k]
    return Table(x, {"y": np.eye(2)[k], "c": rng.standard_normal((n, 1)) * 7 + 100})


def test_a_models_density_and_samples_are_in_the_units_of_the_data(tmp_path: Path) -> None:
    """exp(log_prob) of raw values integrates to one, so the change of units is in it; samples lie where the data do."""
    train(fl.compile(MATCHING, seed=0), table(), tmp_path, options(epochs=10))
    model: Any = fl.load(tmp_path, dtype=torch.float64).eval()
    axis = torch.linspace(-16, 16, 240, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(30 + axis, -10 + axis, indexing="ij"), -1)
    with torch.no_grad():
        mass = torch.exp(model.log_prob(grid)).sum() * (axis[1] - axis[0]) ** 2
        drawn = model.sample((4000,), generator=torch.Generator().manual_seed(0))
    assert abs(float(mass) - 1) < 1e-3
    assert torch.allclose(drawn.mean(0), torch.as_tensor(table().x.mean(0)), atol=0.5)
    again = draw_samples(model, 4000, 0, {})
    assert np.array_equal(again, drawn.numpy())


def test_a_saved_model_is_the_model_that_was_trained(tmp_path: Path) -> None:
    train(fl.compile(MATCHING, seed=0), table(), tmp_path / "a", options())
    model: Any = fl.load(tmp_path / "a")
    fl.save(model, tmp_path / "b.safetensors")
    again: Any = fl.load(tmp_path / "b.safetensors")
    x = torch.as_tensor(table().x[:5], dtype=torch.float32)
    assert torch.equal(model.log_prob(x), again.log_prob(x))


def test_a_run_of_a_model_resumes_exactly(tmp_path: Path) -> None:
    train(fl.compile(MATCHING, seed=0), table(), tmp_path / "whole", options(epochs=4, schedule="constant", ema=0.9))
    train(fl.compile(MATCHING, seed=0), table(), tmp_path / "cut", options(epochs=2, schedule="constant", ema=0.9))
    train(
        fl.compile(MATCHING, seed=7),
        table(),
        tmp_path / "cut",
        options(epochs=4, schedule="constant", ema=0.9, resume=True),
    )
    one, other = (read_tensors(tmp_path / k / "model.safetensors")[0] for k in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_labels_stay_and_context_is_standardised(tmp_path: Path) -> None:
    result = train(fl.compile(CLASSIFIER, seed=0), labelled(), tmp_path, options(epochs=10))
    assert result.best_validation < 0.1 < result.history[0]["validation"]
    model: Any = fl.load(tmp_path, dtype=torch.float64).eval()
    kept = model.statistics()["given_standardiser"]
    assert np.allclose(kept["y"]["mean"], 0)
    assert np.allclose(kept["y"]["scale"], 1)
    assert 99 < kept["c"]["mean"] < 101
    data = labelled()
    values = [torch.as_tensor(v) for v in (data.x, data.given["y"], data.given["c"][:, 0])]
    assert float(model.accuracy(*values).mean()) > 0.98


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model m(f: net = mlp(4)) { data x: R[D = 2]\n def energy(x) { y: R[E = 1] = f(x)\n sum[E](y) } }", "no program `loss`"),
        ("model m(f: net = mlp(4)) { data x: R[D = 2]\n def loss(x, s: R) { y: R[E = 1] = f(x)\n s * sum[E](y) } }", "`loss` takes `s`"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_trained_are_told(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(fl.FlowError, match=words):
        train(fl.compile(text, seed=0), table(), tmp_path, options())


def test_data_of_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(fl.FlowError, match="shape"):
        train(fl.compile(CLASSIFIER, seed=0), Table(np.zeros((40, 3)), labelled(40).given), tmp_path, options())
    with pytest.raises(fl.FlowError, match="`c` has no columns"):
        train(fl.compile(CLASSIFIER, seed=0), Table(labelled().x, {"y": labelled().given["y"]}), tmp_path, options())


def test_the_commands_train_sample_and_score_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowlang.cli.main import main

    monkeypatch.chdir(tmp_path)
    Path("m.flow").write_text(MATCHING.replace("D = 2", "D"), "utf-8")
    np.save("x.npy", table().x)

    def said(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flowlang", *words])
        try:
            main()
            left = 0
        except SystemExit as e:
            left = int(e.code or 0)
        found = capsys.readouterr()
        assert left == code, found
        return found.out + found.err

    assert "best validation loss" in said(
        "train", "m.flow", "--data", "x.npy", "-o", "out", "--epochs", "2", "--no-standardise"
    )
    assert "5 samples of shape (2,)" in said("sample", "-w", "out", "-n", "5", "-o", "s.npy")
    assert np.load("s.npy").shape == (5, 2)
    assert "mean log p" in said("score", "-w", "out", "--data", "x.npy")
    assert "mean loss" in said("score", "-w", "out", "--data", "x.npy", "--program", "loss")
    assert "no program `nothing`" in said("score", "-w", "out", "--data", "x.npy", "--program", "nothing", code=1)


def test_programs_of_a_trained_model_are_exported_in_the_units_of_the_data(tmp_path: Path) -> None:
    import onnxruntime

    train(fl.compile(MATCHING, seed=0), table(), tmp_path, options(epochs=1))
    model: Any = fl.load(tmp_path)
    files = fl.export_onnx(model, tmp_path / "m.onnx")
    assert set(files) == {"sample", "log_prob"}
    run = {k: onnxruntime.InferenceSession(str(v)) for k, v in files.items()}
    x = table().x[:7].astype(np.float32)
    (log_p,) = run["log_prob"].run(None, {"x1": x})
    with torch.no_grad():
        assert np.allclose(log_p, model.log_prob(torch.as_tensor(x)).numpy(), atol=1e-4)
    (drawn,) = run["sample"].run(None, {"x0": np.zeros((3, 2), np.float32)})
    assert np.all(np.abs(drawn - [[30.0, -10.0]]) < 5)
    with pytest.raises(fl.FlowError, match="`forward` is no program of a model"):
        fl.export_onnx(model, tmp_path / "m.onnx", ["forward"])
