"""The pass of a training step as a model: results by the statistics of the batch, and renewed states as more outputs."""

from __future__ import annotations

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import CliRunner

import flowlang as fl
from flowlang.cli.main import cli
from tests.catalogue.nets import data, net

IMAGE = {"C": 4, "H": 3, "W": 2}
BODIES = [
    "batch_norm_2d()(x)", "batch_norm_population()(x)", "evonorm_b0()(x)", "batch_channel_norm_est(2)(x)", "power_norm(warmup = 2)[C](x)",
    "h = relu(batch_norm[C](conv(x, 4, bias = false))); repeat 2 { h := h + batch_norm[C](conv(h, 4)) }; mean_only_batch_norm[C](h)",
    "relu(conv(x, 4, weight = spectral(rounds = 2)))", "f = batch_norm(); f[C](2 * f[C](x))",
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_two_steps_are_those_of_the_module(body: str, tmp_path: Path) -> None:
    """Each step's model is made of the states that the one before left; the module itself is not changed by export."""
    mine = net(body, torch.float32, **IMAGE)
    for module in mine.modules():
        if hasattr(module, "speed"):
            module.speed.fill_(0.3)
    for step in range(2):
        x = data(5, *IMAGE.values(), seed=step, dtype=torch.float32) + 1
        before = copy.deepcopy(mine.state_dict())
        (file,) = fl.export_onnx(mine, tmp_path / "t.onnx", ["train"]).values()
        assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())
        session = onnxruntime.InferenceSession(str(file))
        names = [o.name for o in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"x": x.numpy()}), strict=True))
        y = mine.train()(x)
        torch.testing.assert_close(torch.as_tensor(found.pop(names[0])), y.detach(), rtol=1e-4, atol=1e-5)
        after = mine.state_dict()
        changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
        assert changed <= set(found) <= set(after)
        for k, v in found.items():
            torch.testing.assert_close(torch.as_tensor(v), after[k].float(), rtol=1e-4, atol=1e-5)


def test_dropout_takes_its_noise(tmp_path: Path) -> None:
    mine = net("dropout(0.4)(x)", torch.float32, **IMAGE)
    (file,) = fl.export_onnx(mine, tmp_path / "t.onnx", ["train"]).values()
    session = onnxruntime.InferenceSession(str(file))
    x, u = data(5, *IMAGE.values(), dtype=torch.float32), torch.rand(5, *IMAGE.values())
    other = next(i.name for i in session.get_inputs() if i.name != "x")
    (found,) = session.run(None, {"x": x.numpy(), other: u.numpy()})
    torch.testing.assert_close(torch.as_tensor(found), torch.where(u >= 0.4, x / 0.6, 0.0))


@pytest.mark.parametrize(("body", "words"), [
    ("s: R[T = 2, C, H, W] = x + zeros[T = 2]; lif_mpbn[T, C]()(s)", "a loop renews"), ("online_norm[C](x)", "scan over the batch"),
])  # fmt: skip
def test_what_has_no_such_pass_is_refused(body: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(fl.FlowError, match=words):
        fl.export_onnx(net(body, torch.float32, **IMAGE), tmp_path / "t.onnx", ["train"])


def test_a_folded_network_has_none(tmp_path: Path) -> None:
    module = fl.compile("net n(x: R[C = 3, H = 4, W = 4]) { batch_norm[C](conv(x, 4)) }", flow="n", fold=True)
    with pytest.raises(fl.FlowError, match="no training pass"):
        fl.export_onnx(module, tmp_path / "t.onnx", ["train"])


def test_the_command_writes_and_compares_it(tmp_path: Path) -> None:
    spec = tmp_path / "n.flow"
    spec.write_text("net n(x: R[C = 3, H = 4, W = 4]) { batch_norm[C](conv(x, 4)) }\n")
    ran = CliRunner().invoke(
        cli, ["export", str(spec), "--flow", "n", "--program", "train", "-o", str(tmp_path / "t.onnx")]
    )
    assert ran.exit_code == 0, ran.output
    assert "batch_norm.running_mean [4]" in ran.output
    assert "in onnxruntime within" in ran.output
