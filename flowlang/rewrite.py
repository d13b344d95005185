"""Equivalent architectures: a network that computes the same function with cheaper norms, and the proof that it does.

Pre-LN to Pre-RMSNorm (Jiang et al. 2023, arXiv 2305.14858). Where every reader of the main branch forgets its mean, that
mean can be taken out of whatever writes to the branch; layer norm of a vector of mean 0 is its RMSNorm. The first part is
shown on the network's graph (`analysis/invariance.py`): the result does not change when a number is added to the branch.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from flowlang.analysis.invariance import BATCH, Change, Follow, Grade
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.ir.graph import Node, Region


def branches(region: Region, axis: str) -> list[Node]:
    """The values that enter the residual stacks of a network: carried by a `repeat` and given back with the axis."""
    graph = region.graph
    found = [n for n in graph if n.op == "repeat" and n.attrs["carried"] == 1]
    return [graph[n.inputs[0]] for n in found if graph[n.inputs[0]].tensor.has(axis)]


def forgets_shift(region: Region, axis: str = "D") -> str | None:
    """None where a number added along `axis` to the main branch, at every place apart, changes no result; else why not."""
    stacks = [(r, entry) for r in region.walk() for entry in branches(r, axis)]
    if not stacks:
        return f"it has no stack of blocks that carries a value with the axis `{axis}`"
    for r, entry in stacks:
        along = frozenset({BATCH, *(n for n in entry.tensor.names if n != axis)})
        for training in (True, False):
            follow = Follow(r, Change("shift", along, training), {entry.id: Grade(Fraction(1), along)})
            if not all(follow.of(o).fixed for o in r.outputs):
                return "a reader of the main branch does not forget its mean"
    return None


def equivalent(module: Any, *, axis: str = "D", **arguments: str) -> Any:
    """The network with other static arguments (as text, `norm = "rmsnorm_plain"`) and the same parameters in their order.

    Raises FlowError (FL0412) where the main branch's mean is read, and (FL0803) where the parameters differ in shape.
    """
    import torch

    from flowlang.api import compile, origins

    if type(module) not in origins:
        raise FlowError(Diagnostic("FL0804", "this is no network that `flowlang.compile` made here"))
    comp, name = origins[type(module)]
    region = comp.regions[name]
    reason = forgets_shift(region, axis)
    if reason is not None:
        raise FlowError(
            Diagnostic("FL0412", f"`{name}` has no equal with other norms: {reason}", region.span,
                       suggestion="norms stand before each branch and before the head, as in a Pre-LN network")
        )  # fmt: skip
    given = ", ".join(f"{k} = {v}" for k, v in arguments.items())
    inputs = [region.graph[i] for i in region.inputs]
    head = ", ".join(f"{n.label}: {n.tensor}" for n in inputs)
    values = ", ".join(str(n.label) for n in inputs)
    text = f"{comp.source.text}\nnet {name}_equivalent({head}) {{ {name}({given})({values}) }}\n"
    other = compile(text, flow=f"{name}_equivalent", **dict(comp.elab.sets))
    mine, theirs = list(module.parameters()), list(other.parameters())
    if [p.shape for p in mine] != [q.shape for q in theirs]:
        raise FlowError(Diagnostic("FL0803", "the two networks have other parameters", region.span))
    other.to(module.like.dtype)
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            q.copy_(p)
    return other


__all__ = ["equivalent", "forgets_shift"]
