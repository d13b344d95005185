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


def paired(x: Tensor, y: Tensor, rank: int) -> Tensor:
    """x's samples, each at the place of the y that makes the batch's sum of |x - y|² least. `rank` is a sample's.

    The choice has no gradient; x keeps its own.
    """
    batch = torch.broadcast_shapes(x.shape[: x.dim() - rank], y.shape[: y.dim() - rank])
    sample = x.shape[x.dim() - rank :]
    x, y = (v.expand(batch + sample) for v in (x, y))
    flat = x.reshape(-1, *sample)
    a, b = (v.detach().reshape(len(flat), -1).double() for v in (x, y))
    cost = (b.square().sum(-1)[:, None] + a.square().sum(-1) - 2 * b @ a.mT).cpu()
    if not bool(torch.isfinite(cost).all()):
        return x
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        order = assignment(cost)
    else:
        order = torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
    return flat[order.to(flat.device)].reshape(x.shape)


def assignment(cost: Tensor) -> Tensor:
    """The column of each row in the assignment of least cost.

    By shortest augmenting paths (Jonker & Volgenant 1987).
    """
    n = len(cost)
    up, down = cost.new_zeros(n), cost.new_zeros(n)  # of rows and columns: cost - up - down is never negative
    owner = torch.full((n,), -1, dtype=torch.long)  # the row of each column
    for row in range(n):
        best = torch.full_like(down, math.inf)
        before = torch.full((n,), -1, dtype=torch.long)  # the column before each on the shortest path
        done = torch.zeros(n, dtype=torch.bool)
        here, column, length = row, -1, 0.0
        rows, lengths = [row], [0.0]
        while True:
            reach = length + cost[here] - up[here] - down
            nearer = ~done & (reach < best)
            best = torch.where(nearer, reach, best)
            before = torch.where(nearer, torch.full_like(before, column), before)
            column = int(torch.where(done, torch.full_like(best, math.inf), best).argmin())
            length = float(best[column])
            done[column] = True
            here = int(owner[column])
            if here < 0:
                break
            rows.append(here)
            lengths.append(length)
        for k, at in zip(rows, lengths, strict=True):
            up[k] += length - at
        down = torch.where(done, down - (length - best), down)
        while column >= 0:
            last = int(before[column])
            owner[column] = row if last < 0 else owner[last]
            column = last
    out = torch.empty_like(owner)
    out[owner] = torch.arange(n)
    return out


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
