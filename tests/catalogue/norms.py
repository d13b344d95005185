"""What the tests of the norms' cards share: modules in float64, data, gradients, ONNX, differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import flowlang as fl

WIDE = torch.float64


def data(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype = WIDE) -> Tensor:
    return shift + scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm(call: str, dtype: torch.dtype = WIDE, moved: float = 0.0, **sizes: int) -> Any:
    """A module that applies `call` to x of the named sizes; `moved` takes parameters away from their start."""
    text = f"net f(x: R[{', '.join(sizes)}]) {{ {call}(x) }}"
    module = fl.compile(text, flow="f", dtype=dtype, **sizes)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p += moved * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return module


def part(module: nn.Module, name: str) -> Any:
    """The first module inside whose class has that name."""
    return next(m for m in module.modules() if type(m).__name__ == name)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor | None = None) -> Tensor:
    x = x.detach().clone().requires_grad_()
    y = f(x)
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y) if weight is None else weight)
    return found


def same(mine: Any, other: Any, x: Tensor, rtol: float = 1e-10) -> None:
    """Equal values and gradients."""
    a, b = mine(x), other(x)  # as often as each other: both may follow statistics
    weight = data(*a.shape, seed=17)
    assert torch.allclose(a, b, rtol=rtol, atol=rtol)
    a, b = gradient(mine, x, weight), gradient(other, x, weight)
    assert torch.allclose(a, b, rtol=100 * rtol, atol=100 * rtol)


def runs_in_onnx(call: str, path: Path, tolerance: float = 1e-5, **sizes: int) -> set[str]:
    """Exports the module as it infers, compares it with onnxruntime, and gives the model's ops."""
    import onnx

    module = norm(call, torch.float32, 0.2, **sizes)
    x = data(5, *sizes.values(), dtype=torch.float32)
    module(x)  # running statistics away from their start
    module.eval()
    files = fl.export_onnx(module, str(path / "m.onnx"))
    file = str(
        next(iter(files.values()))
        if isinstance(files, dict)
        else files[0]
        if isinstance(files, list | tuple)
        else files
    )
    (found,) = onnxruntime.InferenceSession(file).run(None, {"x": x.numpy()})
    assert np.allclose(found, module(x).detach().numpy(), rtol=tolerance, atol=tolerance)
    return {n.op_type for n in onnx.load(file).graph.node}


def trains(call: str, steps: int = 30, **sizes: int) -> None:
    """A few steps of gradient descent lower a loss."""
    torch.manual_seed(0)
    module = norm(call, torch.float32, **sizes)
    x = data(16, *sizes.values(), dtype=torch.float32)
    target = data(*module(x).shape, seed=5, dtype=torch.float32)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def count(text: str, **sizes: int) -> int:
    """Parameters, on the meta device."""
    with torch.device("meta"):
        module = fl.compile(text, flow="f", **sizes)
    return sum(p.numel() for p in module.parameters())
