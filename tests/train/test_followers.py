"""Averages and copies of a model's networks (`ema`, `copy`): what they become in training, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import flowlang as fl
from flowlang.analysis.size import parameter_count
from flowlang.api import analyse
from flowlang.cli.main import cli
from flowlang.train.data import Table
from flowlang.train.loop import Options, train
from tests.catalogue.programs import same_in_onnx

NETS = """
net two(inner: net = mlp(8)) (x: R[D], t: R) -> R[D] {
  y: R[D] = inner(x, t)
  batch_norm[D](y) + x
}
"""
SPEC = (
    NETS
    + """
model m(v: net = two()) {
  data x: R[D = 2]
  slow = ema(v, 0.9)
  start = copy(v)
  target = copy(v, every = 3)
  def loss(x) {
    t ~ uniform(0, 1)
    mean((v(x, t) - 0.1 * slow(x, t)) ^ 2) + mean((v(x, t) - start(x, t) - target(x, t) - x) ^ 2)
  }
  def average(x, t: R) { slow(x, t) }
  def trained(x, t: R) { v(x, t) }
}
"""
)


def state(module: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def steps(model: Any, count: int) -> list[dict[str, Tensor]]:
    """The state of `v` before and after each step."""
    g = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = [state(model.v)]
    for _ in range(count):
        optimizer.zero_grad()
        model.loss(torch.randn(16, 2, generator=g), generator=g).backward()
        optimizer.step()
        model.follow()
        seen.append(state(model.v))
    return seen


def test_averages_and_copies_are_what_they_say() -> None:
    model: Any = fl.compile(SPEC, seed=0)
    assert all(
        torch.equal(v, w)
        for name in ("slow", "start", "target")
        for v, w in zip(getattr(model, name).state_dict().values(), model.v.state_dict().values(), strict=True)
    )
    seen = steps(model, 5)
    for name, p in model.slow.named_parameters():
        wanted = seen[0][name]
        for s in seen[1:]:
            wanted = 0.9 * wanted + 0.1 * s[name]
        torch.testing.assert_close(p, wanted)
        assert not p.requires_grad
    for name, b in model.slow.named_buffers():
        assert torch.equal(b, seen[-1][name])
    for k, v in model.start.named_parameters():
        assert torch.equal(v, seen[0][k])
    for k, v in model.target.named_parameters():
        assert torch.equal(v, seen[3][k])
    assert any(not torch.equal(seen[0][k], seen[-1][k]) for k, _ in model.v.named_parameters())


def test_networks_that_were_given_are_followed_too() -> None:
    model: Any = fl.compile(SPEC + "model n = m(v = two(inner = mlp(4)))", flow="n", seed=0)
    seen = {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}
    steps(model, 2)
    kept = {k: v for k, v in model.named_parameters() if not v.requires_grad}
    assert len(kept) == 3 * len(seen)
    x, t = torch.randn(4, 2), torch.rand(4)
    model.eval()
    assert (model.average(x, t) - model.trained(x, t)).abs().max() > 1e-5


def test_they_do_not_count_and_are_not_in_groups_that_train() -> None:
    region = analyse(SPEC, {}, sized=True).regions["m"]
    model: Any = fl.compile(SPEC, seed=0)
    assert parameter_count(region) == sum(p.numel() for p in model.v.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameter_count(region)


def table() -> Table:
    return Table(np.random.default_rng(0).standard_normal((200, 2)) * 2 + 1)


def options(**changes: Any) -> Options:
    return Options(
        **{
            "epochs": 4,
            "batch": 64,
            "lr": 1e-2,
            "progress": False,
            "accelerator": "cpu",
            "schedule": "constant",
            **changes,
        }
    )


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    whole: Any = fl.compile(SPEC, seed=0)
    train(whole, table(), tmp_path / "whole", options())
    train(fl.compile(SPEC, seed=0), table(), tmp_path / "cut", options(epochs=2))
    rest: Any = fl.compile(SPEC, seed=3)
    train(rest, table(), tmp_path / "cut", options(resume=True))
    for (k, a), (_, b) in zip(whole.state_dict().items(), rest.state_dict().items(), strict=True):
        assert torch.equal(a, b), k
    saved: Any = fl.load(tmp_path / "whole")
    assert all(
        torch.equal(a, b) for a, b in zip(saved.flow.state_dict().values(), whole.state_dict().values(), strict=True)
    )


REFLOW = """
model m(v: net = mlp(16)) {
  data x: R[D = 2]
  teacher = copy(v)
  def loss {
    z ~ normal
    t ~ uniform(0, 1)
    end: R[D] = teacher(z)
    mean((v(z) - stop(end) - x * 0) ^ 2)
  }
  def taught(x) { y: R[D] = teacher(x);  y }
}
"""
FIRST = "model m(v: net = mlp(16)) {\n data x: R[D = 2]\n def loss { e ~ normal;  mean((v(x + e) - x) ^ 2) } }\n"


def test_a_run_may_begin_with_another_s_weights(tmp_path: Path) -> None:
    """A copy is the network as training begins, and not as it was made."""
    (tmp_path / "first.flow").write_text(FIRST)
    (tmp_path / "second.flow").write_text(REFLOW)
    np.savetxt(tmp_path / "x.csv", table().x, delimiter=",", header="a,b", comments="")
    common = ["--data", str(tmp_path / "x.csv"), "--epochs", "2", "--accelerator", "cpu"]
    run = CliRunner().invoke(cli, ["train", str(tmp_path / "first.flow"), *common, "-o", str(tmp_path / "a")])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(
        cli,
        ["train", str(tmp_path / "second.flow"), *common, "-o", str(tmp_path / "b"), "--start", str(tmp_path / "a")],
    )
    assert run.exit_code == 0, run.output
    assert "begun anew" not in run.output
    first, second = fl.load(tmp_path / "a").flow, fl.load(tmp_path / "b").flow
    assert all(torch.equal(p, q) for p, q in zip(first.v.parameters(), second.teacher.parameters(), strict=True))
    run = CliRunner().invoke(
        cli,
        [
            "train",
            str(tmp_path / "second.flow"),
            *common,
            "-o",
            str(tmp_path / "c"),
            "--start",
            str(tmp_path / "x.csv"),
        ],
    )
    assert run.exit_code != 0
    assert "FL0803" in str(run.exception) or "readable" in str(run.exception)


def test_onnx_and_a_file_of_its_own(tmp_path: Path) -> None:
    model: Any = fl.compile(SPEC, seed=0)
    steps(model, 3)
    model.eval()
    x, t = torch.randn(5, 2), torch.rand(5)
    same_in_onnx(model, "average", tmp_path, x, t)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("slow = ema(v, 1)", "FL0306"), ("slow = ema(v, 0.9, 2)", "FL0203"), ("slow = ema(v, rate = 0.9)", "FL0202"),
        ("slow = copy(v, every = 0.5)", "FL0306"), ("slow = ema(3)", "FL0211"), ("slow = ema(mlp(4))", "FL0211"),
        ("slow = copy(exp)", "FL0211"),
    ],
)  # fmt: skip
def test_refusals(text: str, code: str) -> None:
    found = fl.check(
        f"model m(v: net = mlp(4)) {{\n data x: R[D = 2]\n {text}\n def f(x) {{ u: R[D] = slow(x)\n u + v(x) }} }}"
    )
    assert [d.code for d in found if d.severity == "error"] == [code], list(found)


def test_it_belongs_in_a_model() -> None:
    found = fl.check("net f(v: net = mlp(4)) (x: R[D]) { w = ema(v)\n u: R[D] = w(x)\n u }")
    assert "FL0106" in [d.code for d in found]
