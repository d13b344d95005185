"""What the tests of language models share: a task, training, modules by class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flowlang as fl

VOCAB, LENGTH = 64, 16


def lm(call: str, dtype: torch.dtype = torch.float64, seed: int = 0, length: int = LENGTH) -> Any:
    return fl.compile(f"net f(t: Int(0..{VOCAB})[T = {length}]) {{ {call}(t) }}", flow="f", dtype=dtype, seed=seed)


def tokens(n: int = 4, seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def increments(n: int, seed: int) -> Tensor:
    """Sequences that grow by one, modulo the vocabulary, from a random start; one token more than is read."""
    start = torch.randint(VOCAB, (n, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(LENGTH + 1)) % VOCAB


def trained(
    module: Any, seed: int, steps: int = 40, at_end: Callable[[Any], Any] = lambda m: None
) -> tuple[float, Any]:
    """The loss on new sequences after some steps of Adam at 1e-3 on batches of 32, and what `at_end` says with its gradients."""
    opt = torch.optim.Adam(module.parameters(), 1e-3)
    for k in range(steps):
        t = increments(32, 1000 * seed + k)
        loss = F.cross_entropy(module(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
    t = increments(256, 999_999)
    opt.zero_grad()
    loss = F.cross_entropy(module(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), at_end(module)


def parts(module: nn.Module, name: str) -> list[Any]:
    """The modules of a class, by the stem of its name."""
    return [m for m in module.modules() if type(m).__name__.rstrip("0123456789").rstrip("_") == name]


def outputs(module: nn.Module, name: str, t: Tensor) -> list[Tensor]:
    """What the modules of a class give, in order."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o.detach())) for m in parts(module, name)]
    with torch.no_grad():
        module(t)
    for h in hooks:
        h.remove()
    return seen


def count(call: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in lm(call, torch.float32).parameters())
