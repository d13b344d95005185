"""Spiking networks with their normalisation folded into thresholds (Guo et al. 2023, arXiv 2308.08359, eq. 14; card 038).

At inference batch normalisation of a membrane potential u is g·(u - μ)/σ + b, monotone in u. So g·(u - μ)/σ + b > θ is
u > (θ - b)·σ/g + μ where g > 0, the opposite where g < 0, and b > θ for every u where g = 0.
"""

from __future__ import annotations

from typing import Any

from flowlang.api import compile, origin_of
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.rewrite.text import with_arguments

NORMALISED, FOLDED = "LifMpbn", "LifFolded"


def fold_thresholds(module: Any, lif: str = "lif_folded()", level: float = 0.5, **arguments: str) -> Any:
    """The network with `lif = lif_folded()` and thresholds that give the same spikes at inference.

    `module` is a compiled net whose declaration takes its neurons as `lif: net` (as `mpbn_resnet` does) and fires where the
    normalised potential exceeds `level`: V / 2. Other static arguments are given as text. The result is in evaluation mode.
    Raises FlowError where the network has no such neurons, or the two differ elsewhere.
    """
    import torch

    comp, name = origin_of(module)
    region = comp.regions[name]
    if not any(kind(m) == NORMALISED for m in module.modules()):
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"`{name}` has no `lif_mpbn` to fold",
                region.span,
                suggestion="only membrane-potential batch norms fold into thresholds",
            )
        )
    text = with_arguments(comp, name, {"lif": lif, **arguments}, f"{name}_folded")
    other = compile(text, flow=f"{name}_folded", dtype=module.like.dtype, **dict(comp.elab.sets))
    inside = other if same_owners(module, other) else next(iter(other.children()))
    with torch.no_grad():
        if not same_owners(module, inside):
            raise FlowError(
                Diagnostic(
                    "FL0803",
                    "the two networks differ in more than their neurons",
                    region.span,
                    suggestion="give the network that this one was compiled from",
                )
            )
        for mine, theirs in zip(owners(module), owners(inside), strict=True):
            if kind(theirs) == FOLDED:
                fold(mine, theirs, level)
            else:
                theirs.load_state_dict(own_state(mine), strict=False)
    return other.eval()


def kind(module: Any) -> str:
    """The declaration's class name; classes of other sizes are numbered."""
    stem, _, number = type(module).__name__.rpartition("_")
    return stem if number.isdigit() else type(module).__name__


def owners(module: Any) -> list[Any]:
    """The modules that hold parameters or states, neurons as one, in order."""
    found: list[Any] = []
    if kind(module) in (NORMALISED, FOLDED):
        return [module]
    if own_state(module):
        found.append(module)
    for child in module.children():
        found += owners(child)
    return found


def own_state(module: Any) -> dict[str, Any]:
    return {k: v for k, v in module.state_dict().items() if "." not in k}


def same_owners(a: Any, b: Any) -> bool:
    """Whether two networks hold the same states in the same order, but for the neurons."""
    first, second = owners(a), owners(b)
    return len(first) == len(second) and all(
        (kind(m) == NORMALISED and kind(n) == FOLDED)
        or {k: v.shape for k, v in own_state(m).items()} == {k: v.shape for k, v in own_state(n).items()}
        for m, n in zip(first, second, strict=True)
    )


def fold(normalised: Any, folded: Any, level: float) -> None:
    """Puts the thresholds of a trained `lif_mpbn` into a `lif_folded`."""
    import torch

    bn = normalised.bn
    eps = 1e-5
    scale = bn.gamma / (bn.running_var + eps).sqrt()
    threshold = torch.where(scale == 0, torch.zeros_like(scale), (level - bn.beta) / scale + bn.running_mean)
    folded.threshold.copy_(threshold)
    folded.direction.copy_(scale.sign())
    folded.always.copy_(torch.where(scale == 0, bn.beta - level, torch.zeros_like(scale)))


__all__ = ["fold_thresholds"]
