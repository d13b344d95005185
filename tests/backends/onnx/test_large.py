"""Models with more weights than a protobuf message holds: the weights stand in a file beside the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from flowlang.backends.onnx import model

import flowlang as fl
from flowlang.diagnostics import FlowError

TEXT = "flow f { data x: R[D = 4]\n repeat 2 { rqs_coupling(net = mlp(32))\n reverse }\n base normal }"


def test_large_weights_stand_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = fl.compile(TEXT, seed=0)
    plain = fl.export_onnx(flow, tmp_path / "plain.onnx", ["log_prob"])["log_prob"]
    whole = model.weights_size(onnx.load(plain).graph.initializer)
    monkeypatch.setattr(model, "LARGEST", whole - 1)
    files = fl.export_onnx(flow, tmp_path / "large.onnx", ["log_prob", "sample"])
    assert sorted(p.name for p in tmp_path.glob("large*")) == [
        f"large.{p}.onnx{d}" for p in ("log_prob", "sample") for d in ("", ".data")
    ]
    x = torch.randn(5, 4)
    for program, file in files.items():
        assert file.stat().st_size < plain.stat().st_size - whole / 2
        onnx.checker.check_model(str(file), full_check=True)
        assert fl.compare_onnx(flow, files)[program].error <= 1e-5
    found = ort.InferenceSession(str(files["log_prob"])).run(None, {"x": x.numpy()})[0]
    assert (found == ort.InferenceSession(str(plain)).run(None, {"x": x.numpy()})[0]).all()


def test_one_weight_of_more_than_a_file_holds_is_a_diagnostic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = fl.compile(TEXT, seed=0)
    monkeypatch.setattr(model, "LARGEST", 4000)
    with pytest.raises(FlowError) as e:
        fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob"])
    (d,) = e.value.diagnostics
    assert d.code == "FL0701"
    assert "2 GB" in d.message
    assert not list(tmp_path.iterdir())


MEASURED = """
import resource, sys
import flowlang as fl

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

text = "flow f { data x: R[D = 4]\\n affine_coupling(net = mlp(5000, 5000, act = relu))\\n base normal }"
flow = fl.compile(text, seed=0)
fl.export_onnx(fl.compile(text.replace("5000", "8"), seed=0), sys.argv[1], ["log_prob"])  # what is loaded once
weights, before = sum(p.numel() * 4 for p in flow.parameters()), peak()
fl.export_onnx(flow, sys.argv[1], ["log_prob"])
print((peak() - before) / weights)
"""


@pytest.mark.slow
def test_export_needs_a_few_times_the_memory_of_the_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "f.onnx")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        float(done.stdout) <= 7
    )  # a copy in float64 (2), the file's weights (1), the message as bytes (1), one in passing
