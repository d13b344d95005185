"""What a layer is worth: trained for a moment inside small networks, and shaken by gradient ascent (Liu et al. 2020, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlang.api import analyse, compile_from
from flowlang.diagnostics import FlowError

CLASSES, SHAPE = 8, (3, 8, 8)


@dataclass(frozen=True)
class Trial:
    """How layers are tried: steps of training and of ascent, what they must reach, and on which networks."""

    anchors: tuple[str, ...] = ("anchor_plain", "anchor_residual", "anchor_inverted")
    steps: int = 30
    batch: int = 32
    lr: float = 0.02
    quality: float = 0.2  # accuracy below which a layer is rejected; 1/8 is chance
    ascent: int = 10
    limit: float = 1e8  # norm of the gradient that ascent must not reach


@dataclass(frozen=True)
class Verdict:
    """Accuracies on the anchors, or why the layer was rejected: `invalid`, `quality`, `stability` or `twin`."""

    scores: tuple[float, ...] = ()
    rejected: str = ""

    @property
    def fitness(self) -> float:
        return sum(self.scores) / len(self.scores) if self.scores else 0.0


def valid(layer: str) -> bool:
    """Whether the compiler accepts the layer: types, axes, and that every partial op is defined, by intervals."""
    return analyse(f"{layer}net probe(x: R[C = 8, H = 4, W = 4]) {{ candidate()(x) }}\n").ok


def network(layer: str, anchor: str, seed: int, shape: Sequence[int] = SHAPE, extra: str = "") -> Any:
    """An anchor with the layer in it."""
    c, h, w = shape
    spec = f"{extra}\n{layer}net classifier(x: R[C = {c}, H = {h}, W = {w}]) -> R[K = {CLASSES}] {{ {anchor}(candidate)(x) }}\n"
    comp = analyse(spec)
    if not comp.ok:
        raise FlowError(comp.report.errors)
    return compile_from(comp, "classifier", seed=seed)


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of eight classes: a smooth pattern each, at a random contrast, sign and place, under noise.

    The sign keeps a network that is linear from telling them apart.
    """
    fixed = torch.Generator().manual_seed(7)
    patterns = F.interpolate(torch.randn(CLASSES, SHAPE[0], 4, 4, generator=fixed), SHAPE[1:], mode="bilinear")
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=g)
    contrast = (0.5 + torch.rand(count, generator=g)) * (2 * torch.randint(2, (count,), generator=g) - 1)
    image = patterns[label] * contrast[:, None, None, None]
    turns = torch.randint(3, (count,), generator=g)
    image = torch.stack([torch.roll(x, int(t), -1) for x, t in zip(image, turns, strict=True)])
    return image + 0.7 * torch.randn(image.shape, generator=g), label


def judge(layer: str, trial: Trial, seed: int, extra: str = "") -> Verdict:
    """The verdict on a layer; equal seeds give equal verdicts."""
    if not valid(layer):
        return Verdict(rejected="invalid")
    scores: list[float] = []
    for k, anchor in enumerate(trial.anchors):
        try:
            module = network(layer, anchor, seed + k, extra=extra)
        except FlowError:
            return Verdict(rejected="invalid")
        score = accuracy(module, trial, seed + k)
        if score < trial.quality:
            return Verdict(rejected="quality")
        scores.append(score)
    module = network(layer, trial.anchors[0], seed, extra=extra)
    if not stable(module, trial, seed):
        return Verdict(rejected="stability")
    return Verdict(tuple(scores))


def accuracy(module: nn.Module, trial: Trial, seed: int) -> float:
    """Accuracy on held-out images after a few steps of training; 0 where a loss is not finite."""
    optimiser = torch.optim.Adam(module.parameters(), lr=trial.lr)
    module.train()
    for step in range(trial.steps):
        x, label = blobs(trial.batch, 10_000 + 100 * seed + step)
        optimiser.zero_grad()
        out = module(x)
        if out.shape[0] != len(x) or out.dim() != 2:  # it does not see x
            return 0.0
        loss = F.cross_entropy(out, label)
        if not torch.isfinite(loss):
            return 0.0
        loss.backward()
        optimiser.step()
    module.eval()
    x, label = blobs(512, 5)
    with torch.no_grad():
        found = module(x)
    return float((found.argmax(-1) == label).double().mean()) if bool(torch.isfinite(found).all()) else 0.0


def stable(module: nn.Module, trial: Trial, seed: int) -> bool:
    """Whether the gradient stays below `limit` while the weights are moved to make it as large as possible."""
    module.train()
    weights = [p for p in module.parameters() if p.requires_grad]
    x, label = blobs(trial.batch, seed)
    for _ in range(trial.ascent):
        grads = torch.autograd.grad(F.cross_entropy(module(x), label), weights, create_graph=True, allow_unused=True)
        size = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
        norm = float(size.detach().sqrt())
        if not norm < trial.limit:  # NaN too
            return False
        if not size.requires_grad:
            return True
        up = torch.autograd.grad(size, weights, allow_unused=True)
        length = torch.stack([u.square().sum() for u in up if u is not None]).sum().sqrt()
        if not bool(torch.isfinite(length)):
            return False
        with torch.no_grad():
            for p, u in zip(weights, up, strict=True):
                if u is not None:
                    p.add_(10 * trial.lr * u / (length + 1e-12))
    return True
