"""Makes a region smaller as long as something holds of it: `python -m tests.soundness.minimise SEED` prints its text.

What remains of a graph that the compiler misjudges goes to `graphs/` as a test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from flowlang.ir.build import Builder
from flowlang.ir.domains import domain
from flowlang.ir.graph import Child, Graph, Node, Region
from flowlang.ir.text import print_region
from tests.soundness.judge import judge
from tests.soundness.wide import make


def rebuilt(region: Region, swap: dict[int, int], results: list[int], plain: bool = False) -> Region:
    """The region with values replaced by earlier ones, and without what nothing uses."""
    graph = Graph()
    b = Builder(graph)
    env: dict[int, int] = {}
    out = Region(region.name, region.kind, graph)
    used = needed(region.graph, [swap.get(r, r) for r in results], swap)
    for node in region.graph:
        if node.id in region.inputs or node.id in region.context:
            attrs = dict(node.attrs)
            if plain:
                attrs["domain"] = domain("R")
            env[node.id] = b.leaf("input", node.type, batched=True, label=node.label, **attrs)
        elif node.id in used:
            inputs = [env[swap.get(i, i)] for i in node.inputs]
            env[node.id] = copied(b, graph, node, inputs)
    out.inputs = [env[i] for i in region.inputs]
    out.context = [env[i] for i in region.context]
    out.outputs = [env[swap.get(r, r)] for r in results]
    kept = {n.attrs["child"] for n in graph if "child" in n.attrs}
    out.children = {k: c for k, c in region.children.items() if k in kept}
    return out


def copied(b: Builder, graph: Graph, node: Node, inputs: list[int]) -> int:
    if node.op in ("call", "repeat", "get"):
        return graph.add(node.op, tuple(inputs), node.type, node.attrs, label=node.label, batched=node.batched).id
    return b.copy(node, inputs)


def needed(graph: Graph, roots: list[int], swap: dict[int, int]) -> set[int]:
    """As `Graph.reachable`, what the replaced ones alone need left out."""
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack += [swap.get(i, i) for i in graph[n].inputs]
    return seen


def smaller(region: Region) -> Iterator[Region]:
    """Candidates, the boldest first."""
    graph = region.graph
    for k in range(len(region.outputs)):
        gone = region.outputs[:k] + region.outputs[k + 1 :]
        for j in range(len(region.inputs)):
            i = region.inputs[j]
            if gone and i not in graph.reachable(gone) and graph[i].type == graph[region.outputs[k]].type:
                yield rebuilt(replace(region, inputs=[x for x in region.inputs if x != i]), {}, gone)
    if region.context and not set(region.context) & graph.reachable(region.outputs):
        yield rebuilt(replace(region, context=[]), {}, region.outputs)
    for i in region.inputs:
        if graph[i].attrs["domain"].name != "R":
            yield rebuilt(region, {}, region.outputs, plain=True)
    for n in sorted(graph.reachable(region.outputs), reverse=True):
        above = sorted(graph.reachable([n]) - {n})
        for i in above:
            if graph[i].type == graph[n].type and graph[i].batched == graph[n].batched:
                yield rebuilt(region, {n: i}, region.outputs)
    for name, child in region.children.items():
        for inner in smaller(child.region):
            yield with_child(region, name, inner)


def with_child(region: Region, name: str, inner: Region) -> Region:
    """The region with another one under the name of a child."""
    graph = Graph()
    for n in region.graph:
        attrs = {**n.attrs, "region": inner} if n.attrs.get("child") == name else n.attrs
        graph.add(n.op, n.inputs, n.type, attrs, label=n.label, batched=n.batched)
    old = region.children[name]
    made = replace(region, graph=graph)
    made.children = {**region.children, name: Child(name, inner, old.shared, dict(old.bindings), old.count)}
    return made


def minimise(region: Region, holds: Callable[[Region], bool]) -> Region:
    """The smallest found by taking the first candidate of which it still holds, again and again."""
    while True:
        for candidate in smaller(region):
            try:
                good = holds(candidate)
            except (AssertionError, KeyError, ValueError):
                good = False
            if good:
                region = candidate
                break
        else:
            return region


def kind(region: Region, seed: int) -> str:
    """What is wrong with it, in the words before the numbers."""
    try:
        return " ".join(w for w in judge(region, seed).wrong.split() if w.isalpha())
    except RuntimeError as error:
        return type(error).__name__


if __name__ == "__main__":
    seed = int(sys.argv[1])
    found = make(seed)
    wrong = kind(found, seed)
    assert wrong, "nothing is wrong with this seed"
    print(print_region(minimise(found, lambda r: kind(r, seed) == wrong)))
