"""Values that lie on a manifold: which nodes are known to be unit vectors along their last axis."""

from __future__ import annotations

from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Node, Region

MOVES = ("order", "rename", "slice", "pick", "join", "stack", "reverse", "permute", "split", "merge", "expand")


def is_sphere(node: Node) -> bool:
    domain = node.attrs.get("domain")
    return isinstance(domain, Domain) and domain.structure == "sphere"


def on_sphere(graph: Graph, id: int, *, assumed: bool = False, region: Region | None = None) -> bool:
    """Whether a value lies on the unit sphere of its last axis.

    `assumed`: what a program is given, whose type says nothing, counts as such; its callers are asked instead.
    With `region`, the one that the graph is of, its inputs are known from what its steps take.
    """
    node = graph[id]
    match node.op:
        case "normalize":
            return node.attrs["axes"] == node.tensor.names[-1:]
        case "input":
            if is_sphere(node) or (assumed and "domain" not in node.attrs):
                return True
            return region is not None and id in region.inputs and takes_sphere(region, region.inputs.index(id))
        case "param":
            return is_sphere(node)
        case "call" | "repeat":
            return gives_sphere(node, 0)
        case "get" if graph[node.inputs[0]].op in ("call", "repeat"):
            return gives_sphere(graph[node.inputs[0]], node.attrs["index"])
    return keeps_last(graph, node) and all(on_sphere(graph, i, assumed=assumed, region=region) for i in node.inputs)


def keeps_last(graph: Graph, node: Node) -> bool:
    """Whether an op moves whole vectors of the last axis of its operands."""
    if node.op not in MOVES or not node.tensor.axes:
        return False
    last = node.tensor.names[-1]
    if node.op == "rename":
        last = next((old for old, new in node.attrs["pairs"] if new == last), last)
    made = (
        {n for n, _ in node.attrs["into"]} if node.op == "split" else {node.attrs.get("axis"), node.attrs.get("into")}
    )
    return last not in made and all(graph[i].tensor.names[-1:] == (last,) for i in node.inputs)


def gives_sphere(call: Node, index: int) -> bool:
    region: Region = call.attrs["region"]
    if call.attrs.get("method") == "inverse":
        return index < len(region.inputs) and takes_sphere(region, index)
    return index < len(region.outputs) and on_sphere(region.graph, region.outputs[index], region=region)


def takes_sphere(region: Region, slot: int) -> bool:
    """Whether a region's mapped input is a point of a sphere: declared, or by the first step of a chain."""
    leaf = region.inputs[slot] if slot < len(region.inputs) else None
    if leaf is None:
        return False
    if is_sphere(region.graph[leaf]):
        return True
    return "domain" not in region.graph[leaf].attrs and goes_to_sphere(region.graph, leaf)


def goes_to_sphere(graph: Graph, id: int) -> bool:
    """Whether a step takes a value, or one that its vectors were moved to, as points of a sphere."""
    for u, k in graph.users(id):
        if wants_sphere(u, k) if u.op in ("call", "repeat") else keeps_last(graph, u) and goes_to_sphere(graph, u.id):
            return True
    return False


def wants_sphere(call: Node, slot: int) -> bool:
    """Whether a call maps a point of a sphere at that place."""
    region: Region = call.attrs["region"]
    if call.attrs.get("method") == "inverse":
        return slot < len(region.outputs) and on_sphere(region.graph, region.outputs[slot], region=region)
    return takes_sphere(region, slot)


def dimensions(region: Region, ids: list[int]) -> int:
    """How many coordinates values have: a point of a sphere has one less than its numbers."""
    graph = region.graph
    spheres = [
        graph[i].tensor.count // graph[i].tensor.axes[-1].size for i in ids if on_sphere(graph, i, region=region)
    ]
    return sum(graph[i].tensor.count for i in ids) - sum(spheres)


def all_spheres(region: Region) -> bool:
    """Whether a region maps points of spheres and nothing else."""
    return bool(region.inputs) and all(takes_sphere(region, k) for k in range(len(region.inputs)))
