"""Low-rank updates x + Q·h(Qᵀx) with orthonormal columns Q (A8; Sylvester flows, van den Berg et al. 2018).

QᵀQ = I turns the question into one of rank size: the map is a bijection iff s ↦ s + h(s) is, and by the
matrix determinant lemma both have one log-det. That smaller map is a region of its own, proved by the
same rules; products with triangular matrices are split there into diagonal and strict part (A5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowlang.derive.forms import split_causal
from flowlang.derive.plan import Bottleneck, Failure
from flowlang.ir.build import Builder
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.interval import REAL
from flowlang.ir.types import TensorType

if TYPE_CHECKING:
    from flowlang.derive.problem import Problem
    from flowlang.derive.replay import Replay
    from flowlang.derive.search import Inverter


def bottleneck(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> Bottleneck | None:
    graph, e = inv.graph, exits[0]
    node = graph[e]
    if len(exits) > 1 or p.scans or node.op != "add" or u not in node.inputs or node.inputs[0] == node.inputs[1]:
        return None
    update = graph[node.inputs[1 - node.inputs.index(u)]]
    if node.tensor != graph[u].tensor or node.tensor.rank != 1 or inv.interval(u) != REAL:
        return None
    region = inv.between(p, u, exits)
    if not inv.sound_region(p, u, region):
        return None
    found = spread(graph, update)
    if found is None:
        return None
    q, inner = found
    s = next((n for n in region if projects(graph, graph[n], q, u)), None)
    if s is None or u in path(graph, s, inner, stop=None) or reaches_beside(graph, u, inner, s):
        return None
    small, outer, exit_ = reduced(inv, s, inner)
    plan = inv.analyses.plan(small)
    if isinstance(plan, Failure):
        p.notes.append(Failure(plan.code, plan.message, node.span, plan.labels, plan.notes, plan.suggestion))
        return None
    return Bottleneck(u, e, update.id, s, q, inner, plan, tuple(outer), exit_)


def orthonormal(node: Node) -> bool:
    domain = node.attrs.get("domain")
    return node.op == "param" and isinstance(domain, Domain) and domain.structure in ("stiefel", "orthogonal")


def spread(graph: Graph, update: Node) -> tuple[int, int] | None:
    """(Q, h) of an update Q·h, summed over Q's columns."""
    while update.op in ("order", "identity"):
        update = graph[update.inputs[0]]
    if update.op != "contract":
        return None
    for k in (0, 1):
        q, h = graph[update.inputs[k]], graph[update.inputs[1 - k]]
        if orthonormal(q) and q.tensor.rank == 2 and update.attrs["axes"] == q.tensor.names[-1:]:
            return (q.id, h.id) if h.tensor.names == q.tensor.names[-1:] else None
    return None


def projects(graph: Graph, node: Node, q: int, u: int) -> bool:
    """Qᵀu, summed over Q's rows."""
    return node.op == "contract" and set(node.inputs) == {q, u} and node.attrs["axes"] == graph[q].tensor.names[:1]


def path(graph: Graph, start: int, end: int, stop: int | None) -> set[int]:
    """Nodes between two, both included."""
    up = graph.reachable([end])
    return {n for n in graph.descendants([start]) & up if n != stop} | {end}


def reaches_beside(graph: Graph, u: int, end: int, s: int) -> bool:
    """Whether u reaches `end` by a way around s."""
    seen, stack = {end}, [end]
    while stack:
        n = stack.pop()
        if n == u:
            return True
        if n == s:
            continue
        for i in graph[n].inputs:
            if i not in seen:
                seen.add(i)
                stack.append(i)
    return False


def reduced(inv: Inverter, s: int, inner: int) -> tuple[Region, list[tuple[int, int]], int]:
    """s ↦ s + h(s) as a region, with (its leaf, the value outside) pairs and its result."""
    source = inv.graph
    region = Region(f"{inv.region.name}_core", "bijector", Graph(), span=source[s].span, library=inv.region.library)
    b = Builder(region.graph)
    entry = b.leaf("input", source[s].tensor, batched=True, label="s", name="s", role="map", domain=Domain("R"))
    env = {s: entry}
    outer: list[tuple[int, int]] = []
    inside = path(source, s, inner, stop=None)
    for n in sorted(source.reachable([inner])):
        node = source[n]
        if n == s or not isinstance(node.type, TensorType):
            continue
        if n in inside:
            split = split_causal(b, source, node, env)
            env[n] = b.copy(node, [env[i] for i in node.inputs]) if split is None else split
        elif any(user.id in inside and user.id != s for user, _ in source.users(n)):
            env[n] = leaf(b, inv, node)
            if node.op != "const":
                outer.append((env[n], n))
    out = b.add(entry, env[inner])
    region.inputs = [entry]
    region.context = [i for i, _ in outer if region.graph[i].op == "input"]
    region.outputs = [b.op("order", out, names=source[s].tensor.names)]
    return region, outer, region.outputs[0]


def leaf(b: Builder, inv: Inverter, node: Node) -> int:
    """A value from outside: parameters keep their domain, the rest its bounds."""
    if node.op == "const":
        return b.copy(node, ())
    if node.op == "param":
        return b.leaf("param", node.tensor, batched=False, label=node.label, **dict(node.attrs))
    return b.leaf(
        "input", node.tensor, batched=node.batched, label=node.label, name=node.label or f"v{node.id}", role="context",
        domain=Domain("R", (), inv.interval(node.id)),
    )  # fmt: skip


# ---- programs -----------------------------------------------------------------------------------


def inner_replay(r: Replay, step: Bottleneck) -> Replay:
    """The steps of the small map, in the program of the large one."""
    from flowlang.derive.replay import Replay as Make

    inner = Make(step.plan.region, step.plan, "inverse", r.b.graph)
    inner.b = r.b
    for there, here in step.outer:
        inner.env[there] = r.value(here)
    return inner


def solve_bottleneck(r: Replay, step: Bottleneck) -> None:
    b = r.b
    y = r.value(step.exit)
    q = r.value(step.weight)
    inner = inner_replay(r, step)
    inner.env[step.result] = b.op("contract", q, y, axes=r.source[step.weight].tensor.names[:1])
    inner.run_steps(step.plan.steps)
    s = inner.value(step.plan.region.inputs[0])
    r.bind(r.source[step.bottleneck], s)
    r.bind(r.source[step.entry], b.sub(y, r.value(step.update)))


def weigh_bottleneck(r: Replay, step: Bottleneck) -> None:
    inner = inner_replay(r, step)
    inner.env[step.plan.region.inputs[0]] = r.value(step.bottleneck)
    inner.value(step.result)
    inner.weigh(step.plan.steps)
    r.weights.extend(inner.weights)
