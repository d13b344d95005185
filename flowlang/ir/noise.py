"""Networks that draw: whether they do at inference too, or, as dropout, in training alone.

A network of a bijector may draw in training alone, and in the forward direction: an inverse runs as if nothing was drawn,
by programs whose names begin with `QUIET`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flowlang.ir.graph import Graph, Node, Region

QUIET = "quiet_"  # before the name of a program: the same, and what it draws in training is as at inference
BACK = ("inverse", "generate", "preimage")  # programs that are quiet by themselves


def draws(region: Region, *, training: bool) -> bool:
    """Whether a network draws in this mode, itself or in what it calls."""
    return noisy(region, training, {})


def noisy(region: Region, training: bool, known: dict[int, bool]) -> bool:
    if id(region) not in known:
        known[id(region)] = False
        roots = [*region.outputs, *(u.new for u in region.updates), *(e.value for e in region.emissions)]
        known[id(region)] = any(
            n.op == "random_like" or any(noisy(r, training, known) for r in called_by(n))
            for n in (region.graph[i] for i in reached(region.graph, roots, training=training))
        )
    return known[id(region)]


def called_by(node: Node) -> Iterator[Region]:
    found = node.attrs.get("region")
    if isinstance(found, Region):
        yield found


def reached(graph: Graph, roots: Iterable[int], *, training: bool) -> set[int]:
    """The nodes that values need in a mode."""
    return graph.reachable(list(roots), lambda node: node.inputs_in(training))


def is_loud(node: Node) -> bool:
    """Whether a node runs a program that draws in training alone and has a quiet form."""
    region, method = node.attrs.get("region"), str(node.attrs.get("method", "forward"))
    if not isinstance(region, Region) or method.startswith(QUIET) or method in BACK:
        return False
    return draws(region, training=True) and not draws(region, training=False)


def noisy_choices(graph: Graph) -> set[int]:
    """The choices by the mode of which noise takes part in training."""
    loud = graph.descendants([n.id for n in graph if n.op == "random_like" or is_loud(n)])
    return {n.id for n in graph if n.op == "choose" and loud & set(n.inputs_in(training=True))}
