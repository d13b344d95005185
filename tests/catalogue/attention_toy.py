"""A velocity network of attention blocks, and the same in torch with its values V in a list that may be listened to or replaced.

Cards 081 and 121 test how features are shared with it: the reference keeps them in a dictionary of keys, as the authors do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOY = """
net toy_block(heads: int = 2) (x: R[T, E]) {
  q, k, v: R[T, E] = linear[E](x)
  V = v[E -> (h = heads, d)]
  scores: R[h, T, S = x.T] = sum[d](q[E -> (h = heads, d)] * k[E -> (h = heads, d)][T -> S]) / sqrt(x.E / heads)
  x + linear[E](tanh(sum[S](softmax[S](scores) * V[T -> S])[(h, d) -> E]))
}
net toy(width: int = 8, depth: int = 3) (x: R[H, W, P], t: R, text: R[L, K]) -> R[H, W, P] {
  h = join[T](linear[K -> E = width](text)[L -> T], linear[P -> E = width](x)[(H, W) -> T] + t)
  blocks = [toy_block() for i in 0..depth]
  for b in blocks { h := b(h) }
  linear[E -> P = x.P](h[T = text.L..])[T -> (H = x.H, W)]
}
"""
Change = Callable[[int, Tensor], Tensor]


def velocity(net: Any, x: Tensor, t: float, text: Tensor, change: Change = lambda k, v: v) -> Tensor:
    """The toy network by its weights; `change` sees the values of each block and gives those that are used."""
    weights = dict(net.named_parameters())

    def linear(prefix: str, v: Tensor) -> Tensor:
        return v @ weights[f"{prefix}_weight"].T + weights[f"{prefix}_bias"]

    names = [n.removesuffix("_weight") for n in weights if n.endswith("_weight")]
    own = [n for n in names if "." not in n]
    blocks = sorted({n.split(".")[0] for n in names if "." in n}, key=lambda n: (len(n), n))
    batch = x.shape[:-3]
    h = torch.cat([linear(own[0], text), linear(own[1], x.flatten(-3, -2)) + t], dim=-2)
    for k, block in enumerate(blocks):
        first, last = (n for n in names if n.startswith(f"{block}."))
        q, key, v = (y.unflatten(-1, (2, -1)) for y in linear(first, h).chunk(3, -1))
        v = change(k, v)
        scores = torch.einsum("...thd,...shd->...hts", q, key) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("...hts,...shd->...thd", scores.softmax(-1), v).flatten(-2)
        h = h + linear(last, mixed.tanh())
    return linear(own[2], h[..., text.shape[-2] :, :]).reshape(*batch, *x.shape[-3:])
