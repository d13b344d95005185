"""Attention by torch's own kernel, differentiable as often as one likes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale · q kᵀ) v; with `causal` the t-th query sees the first t keys."""
    scores = scale * (q @ k.transpose(-1, -2))
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.softmax(scores, -1) @ v


class Attention(torch.autograd.Function):
    """torch's kernel, whose gradient has no gradient of its own: that one comes from `attend_plain`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = scale, causal
        with torch.enable_grad():
            ctx.inner = [t.detach().requires_grad_() for t in (q, k, v)]
            ctx.found = F.scaled_dot_product_attention(*ctx.inner, is_causal=causal, scale=scale)
        return ctx.found.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            given = ctx.saved_tensors
            found = torch.autograd.grad(
                attend_plain(*given, *ctx.options), given, dy, create_graph=True, allow_unused=True
            )
        else:
            found = torch.autograd.grad(ctx.found, ctx.inner, dy, retain_graph=True)
        return *found, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Tensor:
    """softmax(scale · q kᵀ) v for q [.., T, d], k [.., S, d], v [.., S, e]."""
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    if torch._C._are_functorch_transforms_active():
        return attend_plain(q, k, v, scale, causal)
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    found: Tensor = Attention.apply(q, k, v, scale, causal)  # type: ignore[no-untyped-call]
    return found
