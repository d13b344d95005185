"""Equal forms of a region, tried when the one as written does not yield to the search.

`split_causal` (ANALYSIS.md A5): a cumulative sum or a triangular product along an axis is its strict part plus
its diagonal, and a convolution whose kernel looks one way is its taps elsewhere plus the one at the place itself,
so that a scan can assume the one and solve through the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from flowlang.analysis.constants import Constants
from flowlang.ir.build import Builder
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.interval import POSITIVE
from flowlang.ir.ops import OPS
from flowlang.ir.types import TensorType

Rewrite = Callable[["Builder", Graph, Node, dict[int, int]], "int | None"]
"""(builder, the region's graph, a node of it, values so far) -> its value in the new form, or None to copy it."""


def forms(region: Region) -> Iterator[Region]:
    """Forms worth a second search, the likeliest first."""
    for rewrite in (split_causal, regrouped):
        found = rewritten(region, rewrite)
        if found is not None:
            yield found


def rewritten(region: Region, rewrite: Rewrite) -> Region | None:
    """The region with some values made otherwise; None where nothing was."""
    graph = region.graph
    b = Builder(Graph())
    env: dict[int, int] = {}
    changed = False
    for node in graph:
        b.span = node.span
        inputs = [env[i] for i in node.inputs]
        new = rewrite(b, graph, node, env)
        if new is not None:
            changed = True
            if node.label:
                b.graph.relabel(new, node.label)
        elif not isinstance(node.type, TensorType) or "region" in node.attrs or node.op == "get":
            new = b.graph.again(node, inputs)
        else:
            new = b.copy(node, inputs)
        env[node.id] = new
    return moved(region, b.graph, env) if changed else None


def moved(region: Region, graph: Graph, env: dict[int, int]) -> Region:
    """The region on another graph."""

    def all_of(ids: list[int]) -> list[int]:
        return [env[i] for i in ids]

    def arguments(pairs: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        return tuple((name, env[i]) for name, i in pairs)

    return replace(
        region,
        graph=graph,
        inputs=all_of(region.inputs),
        context=all_of(region.context),
        outputs=all_of(region.outputs),
        emissions=[replace(e, value=env[e.value], arguments=arguments(e.arguments)) for e in region.emissions],
        draws=[replace(d, value=env[d.value], arguments=arguments(d.arguments)) for d in region.draws],
        steps=[replace(s, before=env[s.before], after=env[s.after]) for s in region.steps],
        base=None if region.base is None else replace(region.base, arguments=arguments(region.base.arguments)),
    )


# ---- scaled columns -----------------------------------------------------------------------------


def regrouped(b: Builder, graph: Graph, node: Node, env: dict[int, int]) -> int | None:
    """Σ (Q·d)·h = Σ Q·(d·h) for a parameter Q with orthonormal columns: the low-rank update that it is (A8)."""
    if node.op != "contract":
        return None
    for k in (0, 1):
        scaled, h = graph[node.inputs[k]], node.inputs[1 - k]
        if scaled.op != "mul" or scaled.batched:
            continue
        for j in (0, 1):
            domain = graph[scaled.inputs[j]].attrs.get("domain")
            d = scaled.inputs[1 - j]
            known = isinstance(domain, Domain) and domain.structure in ("stiefel", "orthogonal")
            if known and set(graph[d].tensor.names) <= set(graph[h].tensor.names):
                return b.op("contract", env[scaled.inputs[j]], b.mul(env[h], env[d]), axes=node.attrs["axes"])
    return None


# ---- strict part and diagonal -------------------------------------------------------------------


def split_causal(b: Builder, graph: Graph, node: Node, env: dict[int, int]) -> int | None:
    if not node.batched:
        return None
    if node.op == "cumsum" and not node.attrs.get("exclusive"):
        x = env[node.inputs[0]]
        return b.add(b.op("cumsum", x, **{**node.attrs, "exclusive": True}), x)
    if node.op == "conv":
        return split_conv(b, graph, node, env)
    if node.op == "contract" and len(node.attrs["axes"]) == 1:
        for slot in (0, 1):
            found = triangular(graph, graph[node.inputs[slot]])
            if found is not None:
                return split_product(b, graph, node, env, slot, found)
    return None


def triangular(graph: Graph, weight: Node) -> tuple[str, str, bool] | None:
    """(row axis, column axis, whether the diagonal is 1) of a lower-triangular parameter, through renaming."""
    renames: list[dict[str, str]] = []
    while weight.op in ("rename", "order"):
        if weight.op == "rename":
            renames.append(dict(weight.attrs["pairs"]))
        weight = graph[weight.inputs[0]]
    domain = weight.attrs.get("domain")
    if weight.op != "param" or not isinstance(domain, Domain) or domain.structure not in ("lower", "unit_lower"):
        return None
    row, col = weight.tensor.names[-2:]
    for pairs in reversed(renames):
        row, col = pairs.get(row, row), pairs.get(col, col)
    return row, col, domain.structure == "unit_lower"


def split_product(
    b: Builder, graph: Graph, node: Node, env: dict[int, int], slot: int, found: tuple[str, str, bool]
) -> int | None:
    """Σ L x with L = its part below the diagonal + its diagonal; rows may be the axis that is summed over."""
    row, col, unit = found
    (axis,) = node.attrs["axes"]
    other = col if axis == row else row
    w, x = env[node.inputs[slot]], env[node.inputs[1 - slot]]
    if axis not in (row, col) or b.type(x).has(other):
        return None
    degrees = tuple(range(b.type(w).size(row)))
    below = b.op("masked", w, row=row, col=col, row_degrees=degrees, col_degrees=degrees, strict=True)
    strict = b.op("contract", *((below, x) if slot == 0 else (x, below)), axes=(axis,))
    own = b.op("rename", x, pairs=((axis, other),))
    if not unit:
        diagonal = b.op("diagonal", w, row=row, col=col, bounds=POSITIVE)
        if other == col:
            diagonal = b.op("rename", diagonal, pairs=((row, col),))
        own = b.mul(diagonal, own)
    total = b.add(strict, own)
    return total if b.type(total).names == node.tensor.names else b.op("order", total, names=node.tensor.names)


# ---- a convolution as the tap at the place itself and all others --------------------------------


def split_conv(b: Builder, graph: Graph, node: Node, env: dict[int, int]) -> int | None:
    """K * x = (K without its tap at the place itself) * x + that tap's matrix · x.

    The rest is strictly causal where a constant mask or the padding makes it so; the matrix is solved for at each
    place (CInC and FInC flows, Inverse-Flow, emerging convolutions).
    """
    attrs = node.attrs
    kernel = graph[node.inputs[1]].tensor
    out, channel = kernel.names[:2]
    windows = list(zip(kernel.axes[2:], attrs["padding"], attrs["dilation"], strict=True))
    moved_by = (
        any(s != 1 for s in attrs["stride"]) or attrs["groups"] != 1 or kernel.axes[0].size != kernel.axes[1].size
    )
    if moved_by or any(before % d or before // d >= a.size for a, (before, _), d in windows):
        return None
    at = {a.name: before // d for a, (before, _), d in windows}
    tap = Taps(b, graph, env).at(node.inputs[1], tuple(sorted(at.items())))
    if tap is None or b.const_value(tap) == 0 or node.tensor != graph[node.inputs[0]].tensor:
        return None
    x, *bias = env[node.inputs[0]], *(env[i] for i in node.inputs[2:])
    elsewhere: int | None = None
    for a in kernel.axes[2:]:
        other = b.op("ne", b.op("index", axis=a.name, size=a.size), b.const(at[a.name]))
        elsewhere = other if elsewhere is None else b.op("or", elsewhere, other)
    assert elsewhere is not None
    rest = b.op("order", b.op("where", elsewhere, env[node.inputs[1]], b.const(0.0)), names=kernel.names)
    tap = b.expand(tap, TensorType(kernel.axes[:2])) if b.type(tap).rank < 2 else tap
    if channel != attrs["channel"]:
        tap = b.op("rename", tap, pairs=((channel, attrs["channel"]),))
    own = b.op("contract", tap, x, axes=(attrs["channel"],))
    own = b.op("order", b.op("rename", own, pairs=((out, attrs["channel"]),)), names=node.tensor.names)
    return b.add(b.op("conv", x, rest, *bias, **attrs), own)


class Taps:
    """Values of the region at fixed indices of some axes, simplified where constant masks choose."""

    def __init__(self, b: Builder, graph: Graph, env: dict[int, int]):
        self.b, self.graph, self.env = b, graph, env
        self.constants = Constants(graph)

    def at(self, n: int, where: tuple[tuple[str, int], ...]) -> int | None:
        b, node = self.b, self.graph[n]
        where = tuple((a, i) for a, i in where if node.tensor.has(a))
        if not where:
            return self.env[n]
        table = self.constants.of(n)
        if table is not None and len(table.axes) == len(where):
            value = table.at(dict(where))
            return b.const(bool(value) if node.tensor.kind == "bool" else value)
        if node.op in ("order", "expand"):
            return self.at(node.inputs[0], where)
        if node.op in ("split", "join", "stack") and (found := self.part_at(node, dict(where))) is not None:
            return self.at(*found)
        if OPS[node.op].elementwise:
            parts = [self.at(i, where) for i in node.inputs]
            if node.op == "where" and parts[0] is not None and (chosen := b.const_value(parts[0])) is not None:
                return parts[1] if chosen else parts[2]
            if node.op == "mul" and any(p is not None and b.const_value(p) == 0 for p in parts):
                return b.const(0.0)
            if any(p is None for p in parts):
                return None
            return b.copy(node, [p for p in parts if p is not None])
        value = self.env[n]
        for axis, index in where:
            value = b.op("pick", value, axis=axis, index=index)
        return value

    def part_at(self, node: Node, where: dict[str, int]) -> tuple[int, tuple[tuple[str, int], ...]] | None:
        """Where the entries at these indices come from: a kernel may be put together of its taps."""
        axis = node.attrs["axis"]
        if node.op == "split":
            index = 0
            for name, size in node.attrs["into"]:
                if name not in where:
                    return None
                index = index * size + where.pop(name)
            return node.inputs[0], tuple(sorted({**where, axis: index}.items()))
        if axis not in where:
            return None
        index = where.pop(axis)
        if node.op == "stack":
            return node.inputs[index], tuple(sorted(where.items()))
        for part in node.inputs:
            size = self.graph[part].tensor.size(axis)
            if index < size:
                return part, tuple(sorted({**where, axis: index}.items()))
            index -= size
        return None
