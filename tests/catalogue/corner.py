"""Flows of corner convolutions for tests: by hand with torch, as a dense matrix, rounds of an inverse, training, ONNX."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flowlang as fl
from flowlang.verify import perturb


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def step(text: str, c: int, h: int, w: int, size: float = 0.5, dtype: torch.dtype = torch.float64) -> Any:
    """A flow of one step (or several), moved away from its start by `size`."""
    flow = fl.compile(
        f"flow f {{\n data x: R[C = {c}, H = {h}, W = {w}]\n {text}\n base normal\n}}\n", seed=0, dtype=dtype
    )
    if size:
        perturb(flow, generator(9), size)
    return flow


def kernel_of(conv: Any) -> Tensor:
    """[out, in, k, k] of a `corner_conv`: the taps in raster order, the corner last."""
    corner = conv.L()
    if not hasattr(conv, "K"):
        return corner[..., None, None]
    taps = torch.cat((conv.K, corner[None]))
    k = round(len(taps) ** 0.5)
    return taps.permute(1, 2, 0).reshape(*corner.shape, k, k)


def by_hand(x: Tensor, kernel: Tensor, right: bool = False, bottom: bool = False) -> Tensor:
    """The kernel, flipped, over an image that is padded on the sides that it reads from."""
    k = kernel.shape[-1]
    flips = [d for d, f in ((3, right), (2, bottom)) if f]
    pads = [0 if right else k - 1, k - 1 if right else 0, 0 if bottom else k - 1, k - 1 if bottom else 0]
    return F.conv2d(F.pad(x, pads), kernel.flip(flips) if flips else kernel)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[outputs, inputs] in raster order, the channels of a place together."""
    shape = x.shape
    found = torch.autograd.functional.jacobian(f, x)
    n = x.numel()
    return found.permute(1, 2, 0, 4, 5, 3).reshape(n, n) if len(shape) == 3 else found.reshape(n, n)


def rounds(monkeypatch: pytest.MonkeyPatch, flow: Any, run: Callable[[], Any]) -> int:
    """How many convolutions of the generated module a run makes: each round of a scan makes one."""
    module = sys.modules[type(flow).__module__]
    real, count = vars(module)["convolve"], [0]

    def counting(*args: Any) -> Tensor:
        count[0] += 1
        return real(*args)

    monkeypatch.setattr(module, "convolve", counting)
    run()
    monkeypatch.undo()
    return count[0]


def learns_from_pixels(flow: Any, pixels: Tensor, steps: int) -> None:
    """Steps of Adam after a first batch: finite gradients, a loss that falls, samples that are pixels."""
    torch.manual_seed(0)
    flow.initialise(pixels)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = -flow.log_prob(pixels).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in flow.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    samples = flow.sample((2,), generator=generator(3))
    assert samples.shape == (2, *pixels.shape[1:])
    assert torch.equal(samples, samples.round())


def same_in_onnx(flow: Any, x: Tensor, folder: Path, atol: float = 1e-5) -> None:
    """log_prob, forward and inverse of a flow that factors out one part, in onnxruntime and in the module."""
    z, left, _ = (t.detach() for t in flow(x))
    paths = fl.export_onnx(flow, folder / "m.onnx", programs=["log_prob", "forward", "inverse", "sample"])
    for program, given, expected in (
        ("log_prob", (x,), flow.log_prob(x)), ("forward", (x,), z), ("inverse", (z, left), x),
    ):  # fmt: skip
        session = onnxruntime.InferenceSession(str(paths[program]))
        feeds = {i.name: v.numpy() for i, v in zip(session.get_inputs(), given, strict=True)}
        np.testing.assert_allclose(session.run(None, feeds)[0], expected.detach().numpy(), rtol=1e-5, atol=atol)
