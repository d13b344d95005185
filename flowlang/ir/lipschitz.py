"""Certified Lipschitz constants in the l2 norm over all axes but the batch (A7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod, sqrt

from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.interval import Interval
from flowlang.ir.ops import OPS
from flowlang.ir.types import TensorType

Constants = dict[int, float | None]

# A weight in `Lipschitz(c)` is scaled by an estimate of its norm; what certifies is that its norm stays within this factor.
SLACK = 1.02
SWISH = 1.09984  # t·sigmoid(t) has its steepest slope, 1.0998394, at t = 2.3994


def constant(
    graph: Graph,
    entry: int,
    target: int,
    interval: Callable[[int], Interval],
    of_region: Callable[[Region, int, int], float | None],
) -> float | None:
    """A bound on ‖Δtarget‖ / ‖Δentry‖; None where none is known, 0 where there is no dependence."""
    known: Constants = {entry: 1.0}
    for i in sorted(graph.reachable([target])):
        if i < entry or i == entry:
            known.setdefault(i, 0.0)
            continue
        known[i] = local(graph, graph[i], known, interval, of_region)
    return known.get(target, 0.0)


def local(
    graph: Graph,
    node: Node,
    known: Constants,
    interval: Callable[[int], Interval],
    of_region: Callable[[Region, int, int], float | None],
) -> float | None:
    if node.op == "mul":
        for x, gate in (node.inputs, node.inputs[::-1]):
            if swish_gate(graph, x, gate, known):
                inner = known.get(x, 0.0)
                return None if inner is None else inner * SWISH
    parts: list[float] = []
    types: Sequence[TensorType] = [graph[j].tensor for j in node.inputs if isinstance(graph[j].type, TensorType)]
    for slot, j in enumerate(node.inputs):
        inner = known.get(j, 0.0)
        if inner == 0.0:
            continue
        if inner is None:
            return None
        factor = slot_constant(graph, node, slot, types, interval, of_region)
        if factor is None:
            return None
        parts.append(inner * factor)
    return joined(parts) if node.op in ("join", "stack") else sum(parts)


def swish_gate(graph: Graph, x: int, gate: int, known: Constants) -> bool:
    """Whether x·gate is x·sigmoid(k·x), k of any size for each entry: its slope is that of t·sigmoid(t) at t = k·x."""
    if graph[gate].op != "sigmoid" or graph[gate].tensor.axes != graph[x].tensor.axes:
        return False
    product = graph[graph[gate].inputs[0]]
    return product.id == x or (
        product.op == "mul" and x in product.inputs and any(known.get(i, 0.0) == 0.0 for i in product.inputs)
    )


def joined(parts: Sequence[float]) -> float:
    """A7: side by side, constants add as squares."""
    return sqrt(sum(p * p for p in parts))


def slot_constant(
    graph: Graph,
    node: Node,
    slot: int,
    types: Sequence[TensorType],
    interval: Callable[[int], Interval],
    of_region: Callable[[Region, int, int], float | None],
) -> float | None:
    if node.op == "get":
        return 1.0 if graph[node.inputs[0]].op == "call" else None
    if node.op == "call" and isinstance(node.type, TensorType):
        found = of_region(node.attrs["region"], slot, 0)
        return None if found is None else found * lifted_broadcast(node, graph[node.inputs[slot]].tensor)
    if node.op in ("call", "repeat"):
        return None
    if node.op == "contract":
        bound = weight_norm(graph[node.inputs[1 - slot]], tuple(node.attrs["axes"]))
        if bound is not None:
            return bound
    if node.op == "conv" and slot == 0:
        return kernel_norm(graph[node.inputs[1]], graph[node.inputs[0]].tensor, node)
    rule = OPS[node.op].lipschitz
    if rule is None:
        return None
    return rule(node, types, slot, [interval(j) for j in node.inputs])


def weight_norm(weight: Node, axes: tuple[str, ...]) -> float | None:
    """The norm of a weight as the matrix of a product that sums over `axes`, where its kind tells it."""
    if weight.op == "norm_bounded" and set(axes) == set(weight.attrs["axes"]):
        return float(weight.attrs["bound"])
    domain = weight.attrs.get("domain")
    structure = getattr(domain, "structure", None)
    if weight.op == "param" and structure == "lipschitz" and isinstance(domain, Domain):
        matrix = len(domain.args) == 1 and tuple(axes) == weight.tensor.names[1:]
        return SLACK * float(domain.args[0]) if matrix else None
    if weight.op == "param" and structure in ("orthogonal", "stiefel") and weight.tensor.rank == 2 and len(axes) == 1:
        return 1.0
    return None


def kernel_norm(weight: Node, operand: TensorType, conv: Node) -> float | None:
    """The norm of a convolution by a kernel in `Lipschitz(c, sizes)`, the sizes being those of what it moves over.

    Its certificate is the norm on a torus into which the value fits with zeros around, so strides and padding do not matter.
    """
    domain = weight.attrs.get("domain")
    if weight.op != "param" or not isinstance(domain, Domain) or domain.structure != "lipschitz":
        return None
    sizes = tuple(operand.size(s) for s in conv.attrs["space"])
    plain = conv.attrs["groups"] == 1 and set(conv.attrs["dilation"]) == {1}
    return SLACK * float(domain.args[0]) if plain and tuple(domain.args[1:]) == sizes else None


def lifted_broadcast(node: Node, argument: TensorType) -> float:
    """An argument that lacks an axis over which a call is lifted is read once for each of its indices."""
    return sqrt(prod(size for name, size in node.attrs.get("lifted", ()) if not argument.has(name)))
