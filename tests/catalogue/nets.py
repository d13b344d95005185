"""Networks of the library compiled for tests, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import flowlang as fl

torch.set_num_threads(1)


def net(body: str, dtype: torch.dtype = torch.float64, seed: int = 0, kind: str = "net", **sizes: int) -> Any:
    """The module of `net n(x: R[sizes]) { body }`."""
    axes = ", ".join(f"{k} = {v}" for k, v in sizes.items())
    return fl.compile(f"{kind} n(x: R[{axes}]) {{ {body} }}", flow="n", dtype=dtype, seed=seed)


def data(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module, scale: float = 0.3, seed: int = 3) -> Any:
    """The module with its parameters moved away from their starts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, dtype=p.dtype, generator=g)
    return module


def same_value_and_gradients(
    mine: nn.Module, other: Callable[[Tensor], Tensor], x: Tensor, pairs: list[tuple[Tensor, Tensor]]
) -> None:
    """Equal results, gradients in x, and gradients of the paired parameters."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    first, second = mine(a), other(b)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    weight = data(*first.shape, seed=11)
    found = torch.autograd.grad((first * weight).sum(), [a, *(p for p, _ in pairs)])
    expected = torch.autograd.grad((second * weight).sum(), [b, *(q for _, q in pairs)])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.reshape(e.shape), e, rtol=1e-8, atol=1e-9)


def in_onnx(module: Any, x: Tensor, folder: Path) -> tuple[np.ndarray[Any, Any], list[str]]:
    """What onnxruntime says of the exported network (float32) and the ops of its graph."""
    import onnx

    path = folder / "net.onnx"
    fl.export_onnx(module, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return found, [n.op_type for n in onnx.load(str(path)).graph.node]


def count(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters())
