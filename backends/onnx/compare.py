"""A written model beside the module that it was made of: the same inputs and noise through onnxruntime and PyTorch."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flowlang.backends.onnx.build import TRAIN
from flowlang.backends.onnx.files import data_of
from torch.overrides import TorchFunctionMode

from flowlang.ir.graph import Region
from flowlang.ir.types import TensorType

REPLAYED = {"normal": torch.randn, "uniform": torch.rand}  # the kinds of noise that are a call of PyTorch as they are


@dataclass(frozen=True)
class Comparison:
    """The largest difference relative to the size of the result, or why there is none."""

    error: float | None
    reason: str = ""


class OtherDraws(Exception):
    """The module draws what the model does not take."""


class Replay(TorchFunctionMode):
    """Draws are taken from a list: the first of the kind and the shape."""

    def __init__(self, values: Sequence[tuple[str, torch.Tensor]]):
        super().__init__()
        self.values = list(values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in REPLAYED.values():
            return func(*args, **(kwargs or {}))
        for k, (kind, value) in enumerate(self.values):
            if REPLAYED[kind] is func and tuple(value.shape) == tuple(args[0]):
                return self.values.pop(k)[1]
        raise OtherDraws


def compare(file: Path, region: Region, program: str, module: Any, batch: int = 8, seed: int = 0) -> Comparison:
    """The model in a file against the module's program."""
    try:
        import onnxruntime as ort
    except ImportError:
        return Comparison(None, "onnxruntime is not installed")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # of onnxruntime's own classes
        if "NOT_IMPLEMENTED" in str(e):
            return Comparison(None, "onnxruntime has no kernels for it in this precision")
        raise
    meta = session.get_modelmeta().custom_metadata_map
    if "seed" in meta:
        return Comparison(None, "it draws its own noise")
    kinds = json.loads(meta.get("noise", "{}"))
    other = next((k["kind"] for k in kinds.values() if k["kind"] not in REPLAYED), None)
    if other is not None:
        return Comparison(None, f"it takes {other} noise")
    sizes = {a.name: a.size for t in types_of(region, program).values() for a in t.axes} | {"batch": batch}
    generator = torch.Generator().manual_seed(seed)
    feeds: dict[str, torch.Tensor] = {}
    double, data = meta["dtype"] == "float64", data_of(region)
    for i in session.get_inputs():
        if i.name == "batch_size" and i.name not in types_of(region, program):
            feeds[i.name] = torch.tensor([batch])
            continue
        shape = [d if isinstance(d, int) else sizes.get(d) for d in i.shape]
        if None in shape:
            return Comparison(None, "its noise has axes of any size")
        kind = kinds.get(i.name, {}).get("kind")
        value = (
            points(region, program, i.name, shape, generator)
            if kind is None
            else REPLAYED[kind](shape, generator=generator)
        )
        if i.name == data and hasattr(module, "standard"):  # where the data are
            value = value * module.scale.cpu() + module.mean.cpu()
        feeds[i.name] = value.to(torch.int64 if "int64" in i.type else torch.float64 if double else torch.float32)
    found = session.run(None, {k: v.numpy() for k, v in feeds.items()})
    if program == TRAIN:
        module = copy.deepcopy(module).train()
    own = types_of(region, program) if region.kind == "model" else feeds.keys() - {"batch_size"}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    placed = {k: v.to(device) for k, v in feeds.items()}
    try:
        with torch.no_grad(), Replay([(v["kind"], placed[k]) for k, v in kinds.items()]):
            wanted = results(
                module, region, program, {k: v for k, v in placed.items() if k not in kinds and k in own}, batch
            )
    except OtherDraws:
        return Comparison(None, "the module draws in another way")
    if program == TRAIN:
        kept = module.state_dict()
        wanted += [kept[o.name] for o in session.get_outputs() if o.name in kept]
    error = 0.0
    for a, b in zip(found, wanted, strict=True):
        b = b.double().cpu().numpy()
        a = a.astype(np.float64)
        if a.shape != b.shape:  # a loss comes out for each sample
            a = a.mean()
        gap = np.abs(a - b) / max(1.0, float(np.abs(b).max(initial=0.0)))
        error = max(error, float(np.max(np.where(a == b, 0.0, gap), initial=0.0)))
    return Comparison(error)


def types_of(region: Region, program: str) -> dict[str, TensorType]:
    own = region.programs.get(program, region)
    return {own.graph[i].label or "x": own.graph[i].tensor for i in (*own.inputs, *own.context)}


def points(
    region: Region, program: str, name: str, shape: Sequence[int | None], generator: torch.Generator
) -> torch.Tensor:
    """Values of an input's domain."""
    from flowlang.backends.torch.explicit import into

    own = region.programs.get(program, region)
    node = next((own.graph[i] for i in (*own.inputs, *own.context) if own.graph[i].label == name), None)
    domain = node.attrs.get("domain") if node is not None else None
    size = [int(n or 1) for n in shape]
    if domain is None:
        return torch.randn(size, generator=generator)
    if domain.kind == "int":
        low, high = (int(v) if math.isfinite(v) else d for v, d in ((domain.interval.lo, -8), (domain.interval.hi, 8)))
        return torch.randint(low, high + 1, size, generator=generator)
    return into(domain.interval, torch.randn(size, generator=generator))


def results(
    module: Any, region: Region, program: str, values: dict[str, torch.Tensor], batch: int
) -> list[torch.Tensor]:
    if region.kind == "model":
        found = module.run(program, tuple(values[k] for k in module.programs[program]), (batch,), None)
    elif region.kind in ("net", "norm"):
        found = module(*values.values())
    elif program.startswith("sample"):
        found = getattr(module, f"_{program}")((batch,), *values.values())
    else:
        found = getattr(module, f"_{program}")(*values.values())
    return list(found) if isinstance(found, tuple) else [found]
