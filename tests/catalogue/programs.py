"""Programs of models in onnxruntime beside PyTorch, on the same inputs and the same noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

import flowlang as fl
from tests.backends.onnx.support import noise_like, replayed


def exported(model: Any, program: str, folder: Path, **options: Any) -> onnx.ModelProto:
    """The ONNX model of one program, checked."""
    (path,) = fl.export_onnx(model, folder / f"{program}.onnx", [program], **options).values()
    made = onnx.load(str(path))
    onnx.checker.check_model(made, full_check=True)
    return made


def same_in_onnx(
    model: Any, program: str, folder: Path, *values: Tensor, batch: int = 5, tolerance: float = 2e-5, **options: Any
) -> onnx.ModelProto:
    """Exports a program of a float32 model and compares its results; `values` are its inputs."""
    made = exported(model, program, folder, **options)
    run = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    kinds = json.loads({p.key: p.value for p in made.metadata_props}.get("noise", "{}"))
    generator = np.random.default_rng(batch)
    given = iter(values)
    feeds: dict[str, Any] = {}
    for i in run.get_inputs():
        shape = [batch if d == "batch" else d for d in i.shape]
        if i.name in kinds:
            feeds[i.name] = noise_like(kinds[i.name]["kind"], shape, generator, kinds[i.name].get("df")).astype(
                np.float32
            )
        elif i.name == "batch_size":
            feeds[i.name] = np.array([batch], np.int64)
        else:
            feeds[i.name] = next(given).float().numpy()
    found = run.run(None, feeds)
    noise = [torch.as_tensor(feeds[k]) for k in kinds]
    method = getattr(model, f"_run_{program}")
    with torch.no_grad(), replayed(model, noise, []):
        wanted = method(*model._fitted(program, values)) if values else method((batch,))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=tolerance, atol=tolerance)
    return made
