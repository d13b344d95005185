"""Rules of parameter groups that act around the optimizer's step: clipped gradients of units, weights kept at length 1.

A unit is what stands along the first axis of a weight of two axes or more (a row of a matrix, a filter); a vector or a
number is one unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SMALLEST_WEIGHT, SMALLEST_GRADIENT = 1e-3, 1e-6


def of_units(t: Tensor) -> Tensor:
    """The norm of each unit, shaped to multiply it."""
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True) if t.dim() > 1 else t.norm()


@torch.no_grad()
def clip_units(groups: Iterable[dict[str, Any]]) -> None:
    """Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171), in groups with `clip`.

    A unit's gradient is at most `clip` times as long as its weights, of which 1e-3 is the least that counts.
    """
    for group in groups:
        clip = group.get("clip", 0.0)
        for p in group["params"]:
            if clip and p.grad is not None:
                bound, size = clip * of_units(p).clamp_min(SMALLEST_WEIGHT), of_units(p.grad)
                p.grad.mul_(torch.where(size > bound, bound / size.clamp_min(SMALLEST_GRADIENT), 1.0))


@torch.no_grad()
def keep_units(groups: Iterable[dict[str, Any]]) -> None:
    """Vectors along the axis `unit` of a group's weights get length 1 again, as nGPT has them (Loshchilov et al. 2024).

    A vector of zeros stays.
    """
    for group in groups:
        if "unit" in group:
            for p in group["params"]:
                p.div_(
                    torch.linalg.vector_norm(p, dim=int(group["unit"]), keepdim=True).clamp_min(
                        torch.finfo(p.dtype).tiny
                    )
                )


__all__ = ["clip_units", "keep_units"]
