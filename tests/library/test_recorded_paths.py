"""What `record_paths` keeps of every kind of solver, and the command that draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import flowlang as fl
from flowlang.cli.main import cli
from flowlang.cli.training import draw_samples
from flowlang.draw.paths import followed
from flowlang.train.data import Table
from flowlang.train.loop import Options, train

F64 = torch.float64
# The field's solution is known: x(t) = x·exp(t²/2), from t = 0 on.
GROWTH = """
net grow(x: R[D], t: R) {{ t * x }}
model m {{
  data x: R[D = 2]
  def go(x) {{ integrate(grow(), x, t = 0 -> 1, {solver}{more}) }}
}}
"""
FIXED = [
    "rk4(steps = 16)",
    "rk4(times = [0, 0.1, 0.4, 0.7, 1])",
    "ab4(steps = 16)",
    "rf_solver2(steps = 50)",
    "gauss4(steps = 8)",
]


def points(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("solver", "more"), [
    *((s, "") for s in FIXED), ("dopri5(rtol = 1e-8, atol = 1e-8)", ""), ("rk4(steps = 16)", ", gradient = adjoint"),
    ("rk4(steps = 16)", ", gradient = reversible"), ("dopri5(rtol = 1e-8, atol = 1e-8)", ", gradient = adjoint"),
])  # fmt: skip
@pytest.mark.parametrize("n", [1, 5])
def test_the_values_between_steps_lie_on_the_solution(solver: str, more: str, n: int) -> None:
    model: Any = fl.compile(GROWTH.format(solver=solver, more=more), dtype=F64)
    x = points(n)
    plain = model.go(x)
    with fl.record_paths() as ways, fl.count_steps() as counts:
        end = model.go(x)
    # (Steps that are recorded are not taken in place, and sum in another order.)
    torch.testing.assert_close(end, plain, rtol=1e-13, atol=1e-13)
    (way,) = ways.runs
    assert torch.equal(way[0][1], x)
    assert torch.equal(way[-1][1], end)
    for t, value in way:
        exact = x * torch.exp(torch.as_tensor(t, dtype=F64).reshape(-1, 1) ** 2 / 2)
        torch.testing.assert_close(value, exact, rtol=1e-3, atol=1e-3)
    most = max(int(a.max()) for a, _ in counts.runs)
    assert most <= len(way) - 1 <= most + counts.rejected
    with fl.record_paths() as none:
        pass
    assert none.runs == []


def test_ways_that_go_on_are_one_and_others_are_left_out() -> None:
    text = """model m {
      data x: R[D = 2]
      def v(x, t) { t * x }
      def go(x) {
        other = integrate(v, 2 * x, t = 0 -> 1, rk4(steps = 3))
        half = integrate(v, x, t = 0 -> 0.5, rk4(steps = 4))
        integrate(v, half, t = 0.5 -> 1, rk4(steps = 5)) + 0 * other
      }
    }"""
    model: Any = fl.compile(text, dtype=F64)
    x = points()
    times, values = followed(model, lambda: model.go(x))
    assert times.shape == (5, 10)
    assert values.shape == (5, 10, 2)
    assert np.allclose(values, x.numpy()[:, None] * np.exp(times[..., None] ** 2 / 2), atol=1e-4)


MATCHING = """
model matching(v: net = time_mlp(16)) {
  data x1: R[D = 2]
  def loss {
    x0 ~ normal
    t ~ uniform(0, 1)
    mean((v((1 - t) * x0 + t * x1, t) - (x1 - x0)) ^ 2)
  }
  def sample { x0 ~ normal;  integrate(v, x0, t = 0 -> 1, rk4(steps = 8)) }
  def sample_still { x0 ~ normal;  x0 }
}
"""
IMAGES = """
model images(v: net = unet(8, [1], 1, [2], 8, 3, 4)) {
  data x1: R[C = 1, H = 4, W = 4], y: Int(0..3)
  def loss {
    x0 ~ normal
    t ~ uniform(0, 1)
    mean((v(cond_ot.at(t, x0, x1), t, y) - (x1 - x0)) ^ 2)
  }
  def sample(y) {
    x0 ~ normal
    def field(x, t) { v(x, t, y) }
    integrate(field, x0, t = 0 -> 1, euler(steps = 3))
  }
}
"""


def told(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == code or (code and done.exception is not None), (done.output, done.exception)
    return done.output + (str(done.exception) if code else "")


def test_the_command_draws_them_in_the_units_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = Table(np.random.default_rng(0).standard_normal((200, 2)) * [2.0, 0.5] + [30.0, -10.0])
    options = Options(epochs=1, batch=64, progress=False, accelerator="cpu")
    train(fl.compile(MATCHING, seed=0), data, tmp_path / "run", options)
    assert "12 ways of 8 steps" in told("sample", "-w", "run", "-n", "12", "--paths", "-o", "w.npy")
    values = np.load("w.npy")
    assert values.shape == (12, 9, 2)
    assert np.allclose(values[:, -1], draw_samples(fl.load(tmp_path / "run").eval(), 12, 0, {}), atol=1e-5)
    assert abs(values[:, 0].mean(0) - [30, -10]).max() < 3
    told("sample", "-w", "run", "-n", "3", "--paths", "-o", "w.csv")
    lines = Path("w.csv").read_text().splitlines()
    assert lines[0] == "sample,t,x0,x1"
    assert len(lines) == 1 + 3 * 9
    told("sample", "-w", "run", "-n", "12", "--paths", "-o", "w.png")
    assert Path("w.png").read_bytes()[:4] == b"\x89PNG"
    assert "no ways to show" in told("sample", "-w", "run", "--paths", "--program", "sample_still", code=1)


def test_labels_in_turn_and_ways_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    y = g.integers(0, 3, 60)
    np.savez("d.npz", x=g.standard_normal((60, 1, 4, 4)) + y[:, None, None, None], y=y)
    told(
        "train",
        str(write("images.flow", IMAGES)),
        "--data",
        "d.npz",
        "--given",
        "y=y",
        "-o",
        "run",
        "--epochs",
        "1",
        "--batch",
        "30",
    )
    assert Path("run/paths.png").is_file()
    told("sample", "-w", "run", "--given", "y=0,1,2", "-n", "7", "-o", "turns.npy")
    own = np.load("turns.npy")
    model: Any = fl.load("run").eval()
    assert np.allclose(own, draw_samples(model, 7, 0, {"y": np.array([0, 1, 2, 0, 1, 2, 0])}), atol=1e-6)
    told("sample", "-w", "run", "--given", "y=0,1,2", "-n", "9", "-o", "turns.png")
    told("sample", "-w", "run", "--given", "y=0,1,2", "-n", "9", "--paths", "-o", "ways.png")
    assert Path("ways.png").is_file()


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.write_text(text, "utf-8")
    return path
