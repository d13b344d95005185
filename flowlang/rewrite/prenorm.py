"""Transformers with cheaper norms that compute the same function, and the proof that they do.

Pre-LN to Pre-RMSNorm and Pre-CRMSNorm (Jiang et al. 2023, arXiv 2305.14858). Where every reader of the main branch forgets its
mean, that mean can be taken out of whatever writes to the branch; layer norm of a vector of mean 0 is its RMSNorm, and its
last entry is minus the sum of the others. The first part is shown on the network's graph (`analysis/invariance.py`): the
result does not change when a number is added to the branch.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from flowlang.analysis.invariance import BATCH, Change, Follow, Grade
from flowlang.compiler import Compilation
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.ir.graph import Node, Region
from flowlang.rewrite.text import with_arguments

CENTRED = {"out": "linear_zero_mean_out", "centred": "true"}
WITHOUT_CENTRING = ("rmsnorm_plain", "rms_norm(bias = true)")  # of layer norms without and with gain and offset


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


def proved(module: Any, axis: str) -> tuple[Compilation, str]:
    from flowlang.api import origin_of

    comp, name = origin_of(module)
    reason = forgets_shift(comp.regions[name], axis)
    if reason is not None:
        raise FlowError(
            Diagnostic("FL0412", f"`{name}` has no equal with other norms: {reason}", comp.regions[name].span,
                       suggestion="norms stand before each branch and before the head, as in a Pre-LN network")
        )  # fmt: skip
    return comp, name


def compiled(comp: Compilation, name: str, arguments: dict[str, str], new: str, like: Any) -> Any:
    from flowlang.api import compile

    text = with_arguments(comp, name, arguments, new)
    return compile(text, flow=new, dtype=like.like.dtype, **dict(comp.elab.sets))


def equivalent(module: Any, *, axis: str = "D", new: str | None = None, **arguments: str) -> Any:
    """The network with other static arguments (as text, `norm = "rmsnorm_plain"`) and the same parameters in their order.

    Raises FlowError (FL0412) where the main branch's mean is read, and (FL0803) where the parameters differ in shape.
    """
    import torch

    comp, name = proved(module, axis)
    other = compiled(comp, name, arguments, new or f"{name}_equivalent", module)
    mine, theirs = list(module.parameters()), list(other.parameters())
    if [p.shape for p in mine] != [q.shape for q in theirs]:
        raise FlowError(
            Diagnostic(
                "FL0803",
                "the two networks have other parameters",
                comp.regions[name].span,
                suggestion="give the network that this one was rewritten from",
            )
        )
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            q.copy_(p)
    return other


def pre_rmsnorm(module: Any, *, axis: str = "D", new: str | None = None) -> Any:
    """Pre-RMSNorm of a Pre-LN network whose declaration takes `norm`, `out` and `centred`, as `pre_ln_transformer` does."""
    for norm in WITHOUT_CENTRING:
        try:
            return equivalent(module, axis=axis, new=new, norm=norm, **CENTRED)
        except FlowError as e:
            if e.diagnostics[0].code != "FL0803" or norm == WITHOUT_CENTRING[-1]:
                raise
    raise AssertionError


def pre_crmsnorm(module: Any, *, axis: str = "D", new: str | None = None) -> Any:
    """Pre-CRMSNorm: the main branch keeps all entries but the last. The declaration also takes `width`, the branch's size."""
    from flowlang.api import origin_of

    comp, name = proved(module, axis)
    width = next(e.tensor.size(axis) for r in comp.regions[name].walk() for e in branches(r, axis))
    arguments = {"norm": "crmsnorm", "out": "linear_out", "centred": "false", "width": str(width - 1)}
    other = compiled(comp, name, arguments, new or f"{name}_crmsnorm", module)
    inner, inside = origin_of(other)
    mine = owned(comp.regions[name], module)
    theirs = owned(inner.regions[inside], other)
    if len(mine) != len(theirs):
        raise FlowError(
            Diagnostic(
                "FL0803",
                "the two networks have other parameters",
                comp.regions[name].span,
                suggestion="give the network that this one was rewritten from",
            )
        )
    import torch

    with torch.no_grad():
        for (region, node, p), (_, _, q) in zip(mine, theirs, strict=True):
            q.copy_(compressed(region, node, p, tuple(q.shape)))
    return other


def owned(region: Region, module: Any) -> list[tuple[Region, Node, Any]]:
    """The parameters of a network in order: where they stand in its graph, and their values."""
    from flowlang.backends.torch.codegen import ClassScope, Generator
    from flowlang.derive.analyse import Analyses

    generator = Generator(region, Analyses(), "")
    out: list[tuple[Region, Node, Any]] = []

    def visit(r: Region, m: Any) -> None:
        scope = ClassScope(generator, r)
        out.extend((r, n, getattr(m, scope.attributes[n.attrs["name"]])) for n in r.graph if n.op == "param")
        for name, child in r.children.items():
            if not child.shared:
                found = getattr(m, scope.children[name])
                for each in found if child.count > 1 else [found]:
                    visit(child.region, each)

    visit(region, module)
    return out


def compressed(region: Region, node: Node, p: Any, shape: tuple[int, ...]) -> Any:
    """A parameter for a main branch without its last entry: writers lose their mean and the last entry, readers take the last
    column from the others."""
    cut = [k for k, (a, b) in enumerate(zip(p.shape, shape, strict=True)) if a != b]
    if not cut:
        return p
    (k,) = cut
    size = p.shape[k]
    if read(region, node.id, node.tensor.axes[k].name):
        return p.narrow(k, 0, size - 1) - p.narrow(k, size - 1, 1)
    return (p - p.mean(k, keepdim=True)).narrow(k, 0, size - 1)


def read(region: Region, id: int, axis: str) -> bool:
    """Whether a weight's axis is the one that a product sums over."""
    for user, _ in region.graph.users(id):
        if user.op == "contract":
            return axis in user.attrs["axes"]
        if not user.batched and read(region, user.id, axis):
            return True
    return False


__all__ = ["equivalent", "forgets_shift", "pre_crmsnorm", "pre_rmsnorm"]
