"""Standard noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from flowlang.backends.torch.runtime.functions import rotate
from torch import Tensor


def standard_noise(
    kind: str, shape: Sequence[int], like: Tensor, generator: torch.Generator | None, form: Any = None
) -> Tensor:
    """Standard noise of a kind, in the dtype and on the device of `like`; `form` is its shape parameter.

    `onehot` takes log weights along the last axis, `student_t` degrees of freedom, `von_mises` a concentration.
    """
    size = tuple(shape)
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    if generator is not None:  # stated only where there is one: symbolic sizes (torch.export) know no generator
        options["generator"] = generator
    if kind == "normal":
        return torch.randn(size, **options)
    if kind == "von_mises":
        return von_mises_noise(size, torch.as_tensor(form, dtype=like.dtype, device=like.device), generator)
    u = torch.rand(size, **options)
    eps = torch.finfo(like.dtype).tiny
    if kind == "uniform":
        return u
    if kind == "exponential":
        return -torch.log1p(-u)
    if kind == "logistic":
        u = u.clamp(eps, 1 - torch.finfo(like.dtype).eps)
        return torch.log(u) - torch.log1p(-u)
    if kind == "laplace":
        w = 2 * u - 1
        return -torch.sign(w) * torch.log1p(-w.abs().clamp_max(1 - torch.finfo(like.dtype).eps))
    if kind == "student_t":
        # Bailey 1994: polar method in closed form.
        angle = 2 * math.pi * torch.rand(size, **options)
        nu = torch.as_tensor(form, dtype=like.dtype, device=like.device)
        r2 = nu * torch.expm1(-2 / nu * torch.log(u.clamp_min(eps)))
        return torch.sqrt(r2.clamp_min(0)) * torch.cos(angle)
    if kind == "onehot":
        # The Gumbel-max trick: the largest of log weight + Gumbel noise is a draw by weight.
        gumbel = -torch.log((-torch.log(u.clamp_min(eps))).clamp_min(eps))
        choice = (form.detach() + gumbel).argmax(-1, keepdim=True)
        return torch.zeros(size, dtype=like.dtype, device=like.device).scatter(-1, choice, 1.0)
    raise ValueError(kind)


def von_mises_noise(size: tuple[int, ...], concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    """Angles around 0 by the rejection method of Best & Fisher 1979, in float64; no gradient to the concentration.

    A round accepts with probability of at least 0.65, so that 40 rounds leave none in 10^18.
    """
    drawn: dict[str, Any] = {} if generator is None else {"generator": generator}
    k = concentration.detach().to(torch.float64).expand(size)
    root = torch.sqrt(1 + 4 * k * k) + 1
    rho = (root - torch.sqrt(2 * root)) / (2 * k)
    # Near 0 the quotient loses its digits; r ~ 1/k there.
    r = torch.where(k < 1e-4, 1 / k + k, (1 + rho * rho) / (2 * rho).clamp_min(1e-300))
    angle, done = torch.zeros_like(k), torch.zeros_like(k, dtype=torch.bool)
    for _ in range(40):
        u = torch.rand(3, *size, dtype=torch.float64, device=k.device, **drawn)
        z = torch.cos(math.pi * u[0])
        f = ((1 + r * z) / (r + z)).clamp(-1, 1)
        c = k * (r - f)
        good = (c * (2 - c) > u[1]) | (torch.log(c) - torch.log(u[1]) + 1 - c >= 0)
        angle = torch.where(done, angle, torch.sign(u[2] - 0.5) * torch.acos(f))
        done = done | good
        if not torch.compiler.is_compiling() and bool(done.all()):
            break
    return rotate(angle.to(concentration.dtype), 0.0)
