"""Runs exported models in onnxruntime beside the PyTorch module, on the same inputs and the same noise."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from flowlang.backends.onnx.build import PROGRAMS, Options, export

from flowlang.api import Compilation, analyse, compile_from
from tests.backends.onnx.rounding import float32_error

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options)


def has_kernels(model: onnx.ModelProto) -> ort.InferenceSession | None:
    """The session, or None where onnxruntime has no kernel for a type (float64 convolutions)."""
    try:
        return session(model)
    except Exception as e:
        if "NOT_IMPLEMENTED" not in str(e):
            raise
        return None


def flow_of(comp: Compilation, name: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A flow away from its start, so that no parameter is 0 by chance."""
    flow = compile_from(comp, name, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(dtype))
    return flow.eval()


def data_of(comp: Compilation, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Points of the data's domain; the first rows hold zeros, tiny and large numbers and the ends of splines."""
    region = comp.regions[name]
    node = region.graph[region.inputs[0]]
    x = 2 * generator.standard_normal(shape)
    for row, value in zip(
        range(shape[0]), (0.0, 1e-6, -1e-6, 30.0, -30.0, 3.0, -3.0, 4.0, -4.0, math.pi / 2), strict=False
    ):
        x[row] = value
    domain = node.attrs.get("domain")
    if domain is None or not (math.isfinite(domain.interval.lo) or math.isfinite(domain.interval.hi)):
        return x
    lo, hi = domain.interval.lo, domain.interval.hi
    if math.isfinite(lo) and math.isfinite(hi):
        return lo + (hi - lo) / (1 + np.exp(-np.clip(x, -6, 6)))
    return lo + np.logaddexp(0, x) + 1e-3 if math.isfinite(lo) else hi - np.logaddexp(0, x) - 1e-3


def context_of(
    comp: Compilation, name: str, label: str, shape: list[int], generator: np.random.Generator
) -> np.ndarray:
    """Normal numbers; whole numbers of its range for a label."""
    region = comp.regions[name]
    domain = next((region.graph[c].attrs.get("domain") for c in region.context if region.graph[c].label == label), None)
    if domain is not None and domain.name == "Int" and math.isfinite(domain.interval.lo):
        return generator.integers(int(domain.interval.lo), int(domain.interval.hi) + 1, shape).astype(np.float64)
    return generator.standard_normal(shape)


def noise_like(kind: str, shape: list[int], generator: np.random.Generator, df: float | None) -> np.ndarray:
    match kind:
        case "normal":
            return generator.standard_normal(shape)
        case "geometric":
            return generator.geometric(0.5, shape) - 1
        case "student_t":
            return generator.standard_t(df or 5.0, shape)
        case "von_mises":
            return generator.vonmises(0.0, df or 1.0, shape)
    return getattr(generator, kind)(size=shape)


@contextmanager
def replayed(flow: Any, feeds: list[torch.Tensor], extras: list[int]) -> Iterator[None]:
    """Noise of the module's programs is taken from a list, in order; log-dets are estimated from the dense Jacobian."""
    module = sys.modules[type(flow).__module__]
    queue, lengths = iter(feeds), iter(extras)
    kept = {k: getattr(module, k) for k in ("standard_noise", "estimate_log_det") if hasattr(module, k)}

    def noise(kind: str, shape: Any, like: Any, generator: Any, form: Any = None) -> torch.Tensor:
        value = next(queue)
        assert tuple(value.shape) == tuple(shape)
        if kind != "onehot":
            return value
        best = (form + value).argmax(-1, keepdim=True)
        return torch.zeros_like(value).scatter(-1, best, 1.0)

    def estimate(g: Any, x: torch.Tensor, event: int, *_: Any, exact: int = 10, **__: Any) -> torch.Tensor:
        v, extra = next(queue), next(lengths)
        out = []
        n = math.prod(x.shape[x.dim() - event :])
        for row, probe in zip(x, v, strict=True):
            jacobian = torch.autograd.functional.jacobian(lambda u: g(u.unsqueeze(0))[0], row).reshape(n, n)
            w, total = probe.reshape(-1), x.new_zeros(())
            for k in range(1, exact + 2 + extra):
                w = jacobian @ w
                total = total + (-1) ** (k + 1) / k * 2.0 ** max(k - exact - 1, 0) * (w @ probe.reshape(-1))
            out.append(total)
        return torch.stack(out)

    for k in kept:
        setattr(module, k, {"standard_noise": noise, "estimate_log_det": estimate}[k])
    try:
        yield
    finally:
        for k, v in kept.items():
            setattr(module, k, v)


def feeds_of(
    comp: Compilation, name: str, flow: Any, run: ort.InferenceSession, program: str, batch: int
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch)
    meta = run.get_modelmeta().custom_metadata_map
    kinds = json.loads(meta.get("noise", "{}"))
    real = np.float64 if meta["dtype"] == "float64" else np.float32
    feeds: dict[str, np.ndarray] = {}
    for k, i in enumerate(run.get_inputs()):
        shape = [batch if d == "batch" else d for d in i.shape]
        if i.name in kinds:
            found = noise_like(kinds[i.name]["kind"], shape, generator, kinds[i.name].get("df"))
        elif k == 0 and program in ("log_prob", "forward"):
            found = data_of(comp, name, tuple(shape), generator)
        else:
            found = context_of(comp, name, i.name, shape, generator)
        feeds[i.name] = np.asarray(found, dtype=np.int64 if "int64" in i.type else real)
    return feeds


def reference(
    flow: Any, program: str, feeds: dict[str, np.ndarray], meta: dict[str, str], batch: int
) -> list[np.ndarray]:
    kinds = json.loads(meta.get("noise", "{}"))
    tensors = {k: torch.as_tensor(v) for k, v in feeds.items()}
    noise = [tensors[k] for k, v in kinds.items() if v["kind"] != "geometric"]
    extras = [int(feeds[k]) for k, v in kinds.items() if v["kind"] == "geometric"]
    given = [tensors[k] for k in flow.given_shapes]
    own = [v for k, v in tensors.items() if k not in kinds and k not in flow.given_shapes]
    with torch.no_grad(), replayed(flow, noise, extras):
        run = getattr(flow, f"_{program}")
        found = run((batch,), *given) if program.startswith("sample") else run(*own, *given)
    return [t.numpy() for t in (found if isinstance(found, tuple) else (found,))]


def difference(found: np.ndarray, wanted: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference of two results, relative to the size of the sample."""
    return float(np.max(differences(found, wanted, exact), initial=0.0))


def differences(found: np.ndarray, wanted: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The differences of two results, `[samples, numbers]`, relative to the size of the sample. `exact` is the module's in
    float64: where it or the module is not finite, the sample says nothing."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if found.size == 0:
        return np.zeros((0, 0))
    rows = len(exact)
    a, b, e = (v.astype(np.float64).reshape(rows, -1) for v in (found, wanted, exact))
    with np.errstate(invalid="ignore"):
        scale = scale_of(e)
        told = np.isfinite(b) & np.isfinite(e)
        gap, mine, theirs = (np.where(told, np.abs(u - v) / scale, 0.0) for u, v in ((a, b), (b, e), (a, e)))
    assert told.mean() > 0.5, "most of the inputs are beyond the precision"
    assert np.isfinite(a[told]).all(), "finite on one side only"
    if rows >= 100 and found.dtype == np.float32:  # the room for rounding must not hide a loss of precision
        mine, theirs = (np.quantile(v.max(axis=1), 0.99) for v in (mine, theirs))
        assert theirs <= max(2 * mine, 1e-5), "less precise against float64 than the module is"
    return gap


def scale_of(exact: np.ndarray) -> np.ndarray:
    """The size of each sample, at least 1."""
    return np.maximum(1.0, np.max(np.where(np.isfinite(exact), np.abs(exact), 0.0), axis=1, keepdims=True))


# Times what float32 arithmetic moves the exact result by: the model and the module may lie on either side of it.
ROOM = 5.0


def parity(
    comp: Compilation,
    name: str,
    program: str,
    dtype: torch.dtype,
    batches: tuple[int, ...],
    tolerance: float,
    options: Options | None = None,
) -> float | None:
    """The largest difference of a program between onnxruntime and the module, in units of what is allowed; None without
    kernels. Allowed is the tolerance, or in float32 the room that its arithmetic needs at that very number, if that is more.
    """
    flow = flow_of(comp, name, dtype)
    exact_flow = copy.deepcopy(flow).double()
    model = export(comp.regions[name], comp.analyses, flow, program, options or Options())
    run = has_kernels(model)
    if run is None:
        return None
    worst = 0.0
    meta = run.get_modelmeta().custom_metadata_map
    for batch in batches:
        feeds = feeds_of(comp, name, flow, run, program, batch)
        found = run.run(None, feeds)
        wanted = reference(flow, program, feeds, meta, batch)
        double = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in feeds.items()}
        exact = reference(exact_flow, program, double, meta, batch) if dtype == torch.float32 else wanted
        assert len(found) == len(wanted)
        gaps = [differences(a, b, e) for a, b, e in zip(found, wanted, exact, strict=True)]
        allowed = [np.full(g.shape, tolerance) for g in gaps]
        if dtype == torch.float32 and any((g > tolerance).any() for g in gaps):
            moved = float32_error(partial(reference, exact_flow, program, double, meta, batch), exact)
            for room, m, e in zip(allowed, moved, exact, strict=True):
                if e.size:
                    np.maximum(room, ROOM * m.reshape(len(e), -1) / scale_of(e.reshape(len(e), -1)), out=room)
        worst = max([worst, *(float(np.max(g / r, initial=0.0)) for g, r in zip(gaps, allowed, strict=True))])
        if batch >= 100:
            beyond = max(float((g > tolerance).any(axis=1).mean()) for g in gaps)
            assert beyond <= 0.15, f"{beyond:.0%} of the samples need more than the tolerance"
    return worst


__all__ = [
    "PROGRAMS",
    "analyse",
    "difference",
    "export",
    "feeds_of",
    "flow_of",
    "has_kernels",
    "parity",
    "reference",
    "session",
]
