"""`flowlang rewrite`: a spec and its weights as an equivalent architecture, and the comparison that it is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.rewrite.prenorm import pre_crmsnorm, pre_rmsnorm
from flowlang.rewrite.text import without_norms
from flowlang.rewrite.thresholds import fold_thresholds

TOLERANCE = 1e-8  # of the largest entry, in float64


@dataclass(frozen=True)
class Rewritten:
    """The new spec's text, its network's name, the network with the mapped weights, and what it was compared by."""

    text: str
    name: str
    module: Any
    checks: dict[str, float]


def fold_batch_norm(module: Any) -> Any:
    """The network without the norms that fold, as a spec whose `linear` and `conv` hold the new weights."""
    import torch

    from flowlang.api import compile, folded_from, folding, origin_of

    comp, name = origin_of(module)
    found = folding(comp, name, norms_only=True)
    values = folded_from(comp, name, found, module)
    text = without_norms(comp, name, found.verdicts)
    other = compile(text, flow=name, dtype=module.like.dtype, **dict(comp.elab.sets)).eval()
    mine, theirs = list(values.state_dict().values()), list(other.state_dict().values())
    if [p.shape for p in mine] != [q.shape for q in theirs]:
        raise FlowError(Diagnostic("FL0803", f"the text without norms makes other weights of `{name}`", comp.regions[name].span,
                                   suggestion="`fl.compile(.., fold=True)` folds the graph, whatever the text"))  # fmt: skip
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            q.copy_(p)
    return other


TARGETS: dict[str, tuple[Callable[[Any], Any], str, bool]] = {
    "pre_rmsnorm": (
        lambda m: pre_rmsnorm(m, new=named(m, "pre_rmsnorm")),
        "Pre-LN to Pre-RMSNorm (Jiang et al. 2023)",
        True,
    ),
    "pre_crmsnorm": (
        lambda m: pre_crmsnorm(m, new=named(m, "pre_crmsnorm")),
        "Pre-LN to Pre-CRMSNorm (Jiang et al. 2023)",
        True,
    ),
    "fold_batch_norm": (fold_batch_norm, "norms by running statistics into the linear maps beside them", False),
    "thresholds": (fold_thresholds, "membrane potential batch norm into thresholds (Guo et al. 2023)", False),
}


def named(module: Any, suffix: str) -> str:
    from flowlang.api import origin_of

    return f"{origin_of(module)[1]}_{suffix}"


def rewrite(module: Any, to: str, *, seed: int = 0) -> Rewritten:
    """An equivalent network by one of `TARGETS`, compared with `module` in float64 on random values.

    Raises FlowError where it does not exist, and (FL0703) where the two differ.
    """
    import copy

    from flowlang.api import origin_of

    make, _, gradients = TARGETS[to]
    wide = copy.deepcopy(module).double()
    if not gradients:
        wide.eval()
    other = make(wide)
    checks = compare(wide, other.double(), seed, gradients)
    worst = max(checks.values())
    if not worst <= TOLERANCE:
        comp, name = origin_of(module)
        raise FlowError(Diagnostic("FL0703", f"`{name}` and its rewritten form differ by {worst:.1e}", comp.regions[name].span,
                                   suggestion="this is a fault of FlowLang's own: please report the spec"))  # fmt: skip
    comp, name = origin_of(other)
    other.to(module.like.dtype)
    return Rewritten(comp.source.text, name, other, checks)


def compare(first: Any, second: Any, seed: int, gradients: bool) -> dict[str, float]:
    """Largest differences of results and of gradients in the inputs, relative to the largest entry."""
    import torch

    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(8, *shape, generator=g, dtype=torch.float64) for shape in first.inputs.values()]
    found = []
    for module in (first, second):
        mine = [v.clone().requires_grad_(gradients) for v in values]
        out = module(*mine)
        outs = list(out) if isinstance(out, tuple) else [out]
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=o.dtype) for o in outs]
        grads = (
            torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights, strict=True)), mine)
            if gradients
            else ()
        )
        found.append(([o.detach() for o in outs], grads))
    (a, da), (b, db) = found
    checks = {"results": max(map(relative, a, b))}
    if gradients:
        checks["gradients in the input"] = max(map(relative, da, db))
    return checks


def relative(a: Any, b: Any) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-300))


__all__ = ["TARGETS", "Rewritten", "compare", "rewrite"]
