"""Norms with few passes over memory: torch's kernels, and gradients written by hand where it has none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from flowlang.backends.torch.runtime.errors import bad_input
from flowlang.backends.torch.runtime.functions import by_hand
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


# ---- by the root mean square ---------------------------------------------------------------------


def rms_norm_plain(
    x: Tensor, dims: int, gain: Tensor | None, inside: float, outside: float, start: int, stop: int | None
) -> Tensor:
    """x over its root mean square along the last `dims` dims, times gain.

    If a part of the last dim is given, over the root mean square of that.
    """
    if stop is None and not outside:
        return F.rms_norm(x, x.shape[x.dim() - dims :], gain, inside)
    part = x if stop is None else x[..., start:stop]
    square = part.square().mean(tuple(range(-dims, 0)), keepdim=True)
    y = x / ((square + inside if inside else square).sqrt() + outside)
    return y if gain is None else y * gain


def rms_norm_run(
    x: Tensor, dims: int, gain: Tensor | None, inside: float, outside: float, start: int, stop: int | None
) -> tuple[Tensor, Sequence[Tensor]]:
    flat = x.reshape(-1, x.shape[x.dim() - dims :].numel())
    part = flat if stop is None else flat[:, start:stop]
    root = (torch.linalg.vecdot(part, part) / part.shape[-1] + inside).sqrt_()
    inverse = (root + outside).reciprocal_()
    y = flat * inverse[:, None]
    if gain is not None:
        y.mul_(gain.reshape(-1))
    return y.view(x.shape), (root, inverse)


def rms_norm_back(
    dy: Tensor,
    kept: Sequence[Tensor],
    x: Tensor,
    dims: int,
    gain: Tensor | None,
    inside: float,
    outside: float,
    start: int,
    stop: int | None,
) -> tuple[Tensor | None, ...]:
    root, inverse = kept
    flat, dy = (t.reshape(len(root), -1) for t in (x, dy))
    scaled = dy * flat
    dgain = None if gain is None else (inverse @ scaled).view(gain.shape)
    along = scaled.sum(-1) if gain is None else scaled @ gain.reshape(-1)
    dx = torch.mul(dy, 1 if gain is None else gain.reshape(-1), out=scaled).mul_(inverse[:, None])
    part = slice(start, stop)
    size = flat[:, part].shape[-1]
    # d(1 / (root + outside)) / d part = -part / (size · root · (root + outside)²)
    dx[:, part].addcmul_(flat[:, part], (along * inverse**2 / (root * -size))[:, None])
    return dx.view(x.shape), None, dgain, None, None, None, None


def rms_norm(
    x: Tensor,
    dims: int,
    gain: Tensor | None,
    inside: float,
    outside: float = 0.0,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """x over (root mean square + `outside`), times gain.

    On processors torch's own kernel is a chain of ops, and slower.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return rms_norm_plain(x, dims, gain, inside, outside, start, stop)
    return by_hand(rms_norm_plain, rms_norm_run, rms_norm_back, x, dims, gain, inside, outside, start, stop)


# ---- over the larger of two spreads ---------------------------------------------------------------


def over_larger_plain(
    x: Tensor, rank: int, floor: Tensor, slope: Tensor | float, spread: Tensor, gain: Tensor, offset: Tensor
) -> Tensor:
    """x / max(floor, slope · x + spread) · gain + offset; all but x are by the first of the last `rank` dims."""
    more = (..., *(None,) * (rank - 1))
    by = slope[more] if isinstance(slope, Tensor) else slope
    return x / torch.maximum(by * x + spread[more], floor[more]) * gain[more] + offset[more]


def over_larger_run(
    x: Tensor, rank: int, floor: Tensor, slope: Tensor | float, spread: Tensor, gain: Tensor, offset: Tensor
) -> tuple[Tensor, Sequence[Tensor]]:
    flat = x.reshape(-1, gain.numel(), x.shape[x.dim() - rank + 1 :].numel())
    by = slope.reshape(-1, gain.numel(), 1) if isinstance(slope, Tensor) else slope
    under = (flat * by).add_(spread.reshape(-1, gain.numel(), 1)).clamp_min_(floor[:, None])
    ratio = flat / under
    return (ratio * gain[:, None]).add_(offset[:, None]).view(x.shape), (under, ratio)


def over_larger_back(
    dy: Tensor,
    kept: Sequence[Tensor],
    x: Tensor,
    rank: int,
    floor: Tensor,
    slope: Tensor | float,
    spread: Tensor,
    gain: Tensor,
    offset: Tensor,
) -> tuple[Tensor | None, ...]:
    under, ratio = kept
    dy, flat = dy.reshape(under.shape), x.reshape(under.shape)
    dgain, doffset = torch.linalg.vecdot(dy, ratio).sum(0), dy.sum((0, 2))
    dx = (dy * gain[:, None]).div_(under)
    pull = (dx * ratio).neg_()  # of the denominator
    # where it is not the floor; a comparison and a choice take many times as long
    chosen = torch.ops.aten.threshold_backward(pull, under - floor[:, None], 0)
    dfloor = (pull.sum(-1) - chosen.sum(-1)).sum(0)
    by = slope.reshape(-1, gain.numel(), 1) if isinstance(slope, Tensor) else slope
    dslope = torch.linalg.vecdot(chosen, flat) if isinstance(slope, Tensor) else None
    dspread = chosen.sum(-1)
    dx.add_(chosen.mul_(by))
    found = [
        d if d is None else (d.sum(0) if t.dim() == 1 else d.view(t.shape))
        for d, t in ((dslope, slope), (dspread, spread))
    ]  # type: ignore[union-attr]  # d is None only where the slope is a number
    return dx.view(x.shape), None, dfloor, found[0], found[1], dgain, doffset


def over_larger(
    x: Tensor, rank: int, floor: Tensor, slope: Tensor | float, spread: Tensor, gain: Tensor, offset: Tensor
) -> Tensor:
    """x / max(floor, slope · x + spread) · gain + offset: EvoNorm's batch norms."""
    return by_hand(over_larger_plain, over_larger_run, over_larger_back, x, rank, floor, slope, spread, gain, offset)


# ---- gated ---------------------------------------------------------------------------------------


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


def gated_norm_run(
    x: Tensor, rank: int, groups: int, v: Tensor | None, gain: Tensor, offset: Tensor, centred: bool, eps: float
) -> tuple[Tensor, Sequence[Tensor | None]]:
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
    return y.view(x.shape), (gate, inverse, mean)


def gated_norm_back(
    dy: Tensor,
    kept: Sequence[Tensor],
    x: Tensor,
    rank: int,
    groups: int,
    v: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    centred: bool,
    eps: float,
) -> tuple[Tensor | None, ...]:
    gate, inverse, mean = kept
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
    return by_hand(gated_norm_plain, gated_norm_run, gated_norm_back, x, rank, groups, v, gain, offset, centred, eps)


def normed_weight_plain(v: Tensor, g: Tensor) -> Tensor:
    each = (-1, *(1,) * (v.dim() - 1))
    return v * (g / v.square().sum(tuple(range(1, v.dim()))).sqrt()).reshape(each)


def normed_weight(v: Tensor, g: Tensor) -> Tensor:
    """g · v/|v|, the norm over all dims but the first: the kernels of torch's own weight norm.

    Its gradient of the gradient takes |v| for a constant (torch 2.13): there the formula's gradients stand in. A
    function of autograd in Python around the kernels would do as well, and made the layer slower than torch's.
    """
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or not (v.is_cpu or v.is_cuda) or v.dtype not in (torch.float32, torch.float64):
        return normed_weight_plain(v, g)
    gain = g.reshape(-1, *(1,) * (v.dim() - 1))
    w: Tensor = torch._weight_norm_interface(v.contiguous(), gain, 0)[0]
    node = w.grad_fn
    if node is not None:

        def twice(given: tuple[Tensor | None, ...], dw: tuple[Tensor, ...]) -> tuple[Tensor | None, ...] | None:
            if not torch.is_grad_enabled():
                return None
            wanted = [t for t in (v, g) if t.requires_grad]
            found = iter(torch.autograd.grad(normed_weight_plain(v, g), wanted, dw[0], create_graph=True))
            return tuple(
                next(found).reshape(d.shape) if d is not None and t.requires_grad else None
                for d, t in zip(given, (v, g), strict=True)
            )

        node.register_hook(twice)
    return w
