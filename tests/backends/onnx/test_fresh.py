"""Serving needs onnxruntime and numpy alone: an environment with nothing else scores and samples."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

import flowlang as fl

SERVE = """
import json, sys
import numpy as np, onnxruntime as ort
assert "torch" not in sys.modules and "flowlang" not in sys.modules
density, sampler = ort.InferenceSession("moons.log_prob.onnx"), ort.InferenceSession("moons.sample.onnx")
x = np.load("x.npy")
(log_prob,) = density.run(None, {"x": x})
noise = np.load("noise.npy")
(samples,) = sampler.run(None, {"noise": noise})
np.savez("served.npz", log_prob=log_prob, samples=samples)
print(json.loads(density.get_modelmeta().custom_metadata_map["axes"]))
"""


@pytest.mark.slow
def test_a_fresh_environment_scores_and_samples(tmp_path: Path) -> None:
    text = "flow moons { data x: R[D = 2]\n repeat 2 { rqs_coupling(bins = 8)\n reverse }\n rqs_autoregressive\n base normal }"
    flow = fl.compile(text, seed=0)
    fl.export_onnx(flow, tmp_path / "moons.onnx", ["log_prob", "sample"])
    generator = np.random.default_rng(0)
    x, noise = (generator.standard_normal((50, 2)).astype(np.float32) for _ in range(2))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "noise.npy", noise)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "onnxruntime"], check=True, timeout=600)
    missing = [
        python,
        "-c",
        "import importlib.util as u; assert not (u.find_spec('torch') or u.find_spec('flowlang') or u.find_spec('onnx'))",
    ]
    subprocess.run(missing, check=True, cwd=tmp_path)
    done = subprocess.run([python, "-c", SERVE], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "{'x': [['D', 2]]}"
    served = np.load(tmp_path / "served.npz")
    with torch.no_grad():
        assert np.allclose(served["log_prob"], flow.log_prob(torch.as_tensor(x)).numpy(), atol=1e-4)
        back, _ = flow(torch.as_tensor(served["samples"]))
    assert np.allclose(back.numpy(), noise, atol=1e-3)
    assert sys.executable != str(python)
