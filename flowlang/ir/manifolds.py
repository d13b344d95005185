"""Values that lie on a manifold: which nodes are known to be unit vectors along their last axis."""

from __future__ import annotations

from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Node, Region


def is_sphere(node: Node) -> bool:
    domain = node.attrs.get("domain")
    return isinstance(domain, Domain) and domain.structure == "sphere"


def on_sphere(graph: Graph, id: int, *, assumed: bool = False) -> bool:
    """Whether a value lies on the unit sphere of its last axis.

    `assumed`: what a chain is given, whose type says nothing, counts as such; its callers are asked instead.
    """
    node = graph[id]
    match node.op:
        case "normalize":
            return node.attrs["axes"] == node.tensor.names[-1:]
        case "input":
            return is_sphere(node) or (assumed and "domain" not in node.attrs)
        case "param":
            return is_sphere(node)
        case "order":
            return node.tensor.names[-1] == graph[node.inputs[0]].tensor.names[-1] and on_sphere(
                graph, node.inputs[0], assumed=assumed
            )
        case "call" | "repeat":
            return gives_sphere(node, 0)
        case "get" if graph[node.inputs[0]].op in ("call", "repeat"):
            return gives_sphere(graph[node.inputs[0]], node.attrs["index"])
    return False


def gives_sphere(call: Node, index: int) -> bool:
    region: Region = call.attrs["region"]
    if call.attrs.get("method") == "inverse":
        return index < len(region.inputs) and takes_sphere(region, index)
    return index < len(region.outputs) and on_sphere(region.graph, region.outputs[index], assumed=takes_sphere(region, 0))


def takes_sphere(region: Region, slot: int) -> bool:
    """Whether a region's mapped input is a point of a sphere: declared, or by the first step of a chain."""
    leaf = region.inputs[slot] if slot < len(region.inputs) else None
    if leaf is None:
        return False
    if is_sphere(region.graph[leaf]):
        return True
    if region.kind != "chain":
        return False
    return any(
        u.op in ("call", "repeat") and u.attrs.get("method") != "inverse" and takes_sphere(u.attrs["region"], k)
        for u, k in region.graph.users(leaf)
    )


def spheres(region: Region) -> bool:
    """Whether a region maps points of a sphere."""
    return any(takes_sphere(region, k) for k in range(len(region.inputs)))
