"""Norms with few passes over memory: torch's kernels, and gradients written by hand where it has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from flowlang.backends.torch.runtime.errors import bad_input
from torch import Tensor


def grouped_norm(x: Tensor, rank: int, groups: int, gain: Tensor | None, offset: Tensor | None, eps: float) -> Tensor:
    """Normalisation within groups of the first of the last `rank` dims and over all others of them."""
    if x.dim() == rank + 1:
        return F.group_norm(x, groups, gain, offset, eps)
    return F.group_norm(x.reshape(-1, *x.shape[x.dim() - rank :]), groups, gain, offset, eps).reshape(x.shape)


def batched_norm(
    x: Tensor,
    rank: int,
    mean: Tensor,
    var: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation by the first of the last `rank` dims; the running values are updated while training."""
    flat = x if x.dim() == rank + 1 else x.reshape(-1, *x.shape[x.dim() - rank :])
    values = x.numel() // max(mean.numel(), 1)
    if training and values <= 1:
        raise bad_input(f"a batch gives {values} values for a variance", "train on more than 1")
    found = F.batch_norm(flat, mean, var, gain, offset, training, momentum, eps)
    return found if x.dim() == rank + 1 else found.reshape(x.shape)


def gated_norm_plain(
    x: Tensor, rank: int, groups: int, v: Tensor | None, gain: Tensor, offset: Tensor, centred: bool, eps: float
) -> Tensor:
    """x · sigmoid(v · x) over the deviation, or the root mean square, of its group; times gain plus offset."""
    flat = x.reshape(-1, gain.numel(), x.shape[x.dim() - rank + 1 :].numel())
    parts = flat.reshape(flat.shape[0], groups, -1)
    spread = parts.var(-1, correction=0) if centred else parts.square().mean(-1)
    scale = (spread + eps).rsqrt()[:, :, None] * gain.reshape(groups, -1)
    gate = torch.sigmoid(flat if v is None else flat * v[:, None])
    return (flat * gate * scale.reshape(len(flat), -1, 1) + offset[:, None]).reshape(x.shape)


class GatedNorm(torch.autograd.Function):
    """`gated_norm_plain`, its gradient in as few passes as eager torch allows: in place, sums as products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rank: int,
        groups: int,
        v: Tensor | None,
        gain: Tensor,
        offset: Tensor,
        centred: bool,
        eps: float,
    ) -> Tensor:
        flat = x.reshape(-1, gain.numel(), x.shape[x.dim() - rank + 1 :].numel())
        n, c, m = flat.shape
        if centred:  # its moments are many times as fast as `var_mean`
            _, mean, inverse = torch.native_group_norm(flat, None, None, n, c, m, groups, eps)
        else:
            parts = flat.reshape(n, groups, -1)
            mean, inverse = None, (torch.linalg.vecdot(parts, parts) / parts.shape[-1] + eps).rsqrt_()
        gate = torch.sigmoid(flat) if v is None else (flat * v[:, None]).sigmoid_()
        scale = (inverse[:, :, None] * gain.view(groups, -1)).view(len(flat), -1, 1)
        y = (flat * gate).mul_(scale).add_(offset[:, None])
        ctx.save_for_backward(x, v, gain, offset, gate, inverse, mean)
        ctx.options = rank, groups, centred, eps
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, v, gain, offset, gate, inverse, mean = ctx.saved_tensors
        rank, groups, centred, eps = ctx.options
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: leave it to autograd
            given = [t for t in (x, v, gain, offset) if t is not None and t.requires_grad]
            y = gated_norm_plain(x, rank, groups, v, gain, offset, centred, eps)
            found = dict(zip(map(id, given), torch.autograd.grad(y, given, dy, create_graph=True), strict=True))
            dx, dv, dgain, doffset = (None if t is None else found.get(id(t)) for t in (x, v, gain, offset))
            return dx, None, None, dv, dgain, doffset, None, None
        flat = x.reshape(-1, gain.numel(), x.shape[x.dim() - rank + 1 :].numel())
        n, c, m = flat.shape
        dy = dy.reshape(n, c, m)
        slope = torch.ops.aten.sigmoid_backward(dy, gate).mul_(flat)  # of v · x
        dx = dy * gate
        through = torch.linalg.vecdot(dx, flat)
        turned = through if v is None else torch.linalg.vecdot(slope, flat)
        each = inverse[:, :, None].expand(n, groups, c // groups).reshape(n, c)
        scale = each * gain
        # d(1 / root) / dx = -(x - mean) / (size · root³)
        pull = (through * gain).view(n, groups, -1).sum(-1) * inverse**3 / -(m * (c // groups))
        dx = dx.add_(slope if v is None else slope.mul_(v[:, None])).mul_(scale[:, :, None])
        parts = dx.view(n, groups, -1)
        parts.addcmul_(flat.reshape(n, groups, -1), pull[:, :, None])
        if mean is not None:
            parts.sub_((pull * mean)[:, :, None])
        dv = None if v is None else (turned * scale).sum(0)
        return dx.view(x.shape), None, None, dv, (through * each).sum(0), dy.sum((0, 2)), None, None


def gated_norm(
    x: Tensor, rank: int, groups: int, v: Tensor | None, gain: Tensor, offset: Tensor, centred: bool, eps: float
) -> Tensor:
    """Normalisation by the deviation (`centred`) or the root mean square of groups, of x · sigmoid(v · x)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return gated_norm_plain(x, rank, groups, v, gain, offset, centred, eps)
    found: Tensor = GatedNorm.apply(x, rank, groups, v, gain, offset, centred, eps)  # type: ignore[no-untyped-call]
    return found
