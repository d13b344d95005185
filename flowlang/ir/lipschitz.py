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
    if weight.op == "norm_bounded" and len(weight.inputs) == 1 and set(axes) == set(weight.attrs["axes"]):
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
    return SLACK * float(domain.args[0]) if plain_conv(conv) and tuple(domain.args[1:]) == sizes else None


def plain_conv(conv: Node) -> bool:
    """Whether each result reads all channels at places side by side."""
    return conv.attrs["groups"] == 1 and set(conv.attrs["dilation"]) == {1}


def induced_kernel(weight: Node, conv: Node, operand: TensorType) -> bool:
    """Whether a kernel is bounded from lp to lq for the convolution: of its sizes, with a result of no more places."""
    if weight.op != "norm_bounded" or len(weight.inputs) != 3 or "space" not in weight.attrs or not plain_conv(conv):
        return False
    space = conv.attrs["space"]
    sizes = tuple(operand.size(s) for s in space)
    return tuple(weight.attrs["space"]) == sizes and all(
        conv.tensor.size(s) <= n for s, n in zip(space, sizes, strict=True)
    )


# ---- norms of other orders -----------------------------------------------------------------------

Key = tuple[object, ...]  # which lp norm: a number, or the value that holds it; ENTRY before anything has told
ENTRY: Key = ("entry",)
TWO: Key = ("number", 2.0)
KEEPS = ("rename", "order", "reverse", "permute", "split", "merge")  # ops that move entries about: any norm stays


class Orders:
    """Constants of a map between lp norms whose orders its weights tell (`norm_bounded` with orders p and q).

    The entry's norm is that which the first weight takes; what is measured in another norm than the next part takes has no
    constant. A map from a norm to itself whose constant is below 1 is a contraction, whatever the norm (Banach).
    """

    def __init__(self, ranges: Callable[[Region], Callable[[int], Interval]]):
        self.ranges = ranges
        self.start: Key | None = None
        self.apart = False  # whether two parts were found to measure in different norms

    def constant(self, region: Region, graph: Graph, entry: int, target: int) -> float | None:
        """A bound from the entry's norm to the same norm of the target."""
        found = self.through(graph, entry, target, ENTRY, self.ranges(region), (), {})
        return found[0] if found is not None and self.same(found[1], ENTRY) else None

    def same(self, have: Key, wanted: Key) -> bool:
        """Whether two norms are one; the entry's is told here where it is still open."""
        if have == wanted:
            return True
        if ENTRY in (have, wanted):
            other = wanted if have == ENTRY else have
            if self.start is None:
                self.start = other
            if self.start == other:
                return True
        self.apart = True
        return False

    def through(
        self, graph: Graph, entry: int, target: int, norm: Key, interval: Callable[[int], Interval], scope: tuple[str, ...],
        given: dict[int, Key],
    ) -> tuple[float, Key] | None:  # fmt: skip
        known: dict[int, tuple[float, Key] | None] = {entry: (1.0, norm)}
        moving = graph.descendants([entry])
        if target not in moving:
            return 0.0, norm

        def key(i: int) -> Key:
            if i in given:
                return given[i]
            node = graph[i]
            return ("number", float(node.attrs["value"])) if node.op == "const" else ("value", *scope, i)

        varies: Constants = dict.fromkeys(moving, 1.0)
        for i in sorted(moving & graph.reachable([target]) - {entry}):
            node = graph[i]
            slots = [k for k, j in enumerate(node.inputs) if j in moving]
            swish = self.swish(graph, node, varies) if node.op == "mul" and len(slots) == 2 else None
            if swish is not None:
                x = known[swish]
                known[i] = None if x is None else (x[0] * SWISH, x[1])
                continue
            parts = [known[node.inputs[k]] for k in slots]
            if any(p is None for p in parts):
                known[i] = None
                continue
            known[i] = self.local(graph, node, slots, [p for p in parts if p is not None], interval, scope, key)
        return known[target]

    @staticmethod
    def bounded_matrix(weight: Node, axes: tuple[str, ...]) -> bool:
        """Whether a weight is bounded from lp to lq as the matrix of a product that sums over `axes`."""
        kind = weight.op == "norm_bounded" and len(weight.inputs) == 3 and "space" not in weight.attrs
        return kind and set(axes) == set(weight.attrs["axes"])

    @staticmethod
    def swish(graph: Graph, node: Node, varies: Constants) -> int | None:
        """The x of x·sigmoid(k·x)."""
        pairs = (node.inputs, node.inputs[::-1])
        return next((x for x, gate in pairs if swish_gate(graph, x, gate, varies)), None)

    def local(
        self, graph: Graph, node: Node, slots: Sequence[int], parts: Sequence[tuple[float, Key]],
        interval: Callable[[int], Interval], scope: tuple[str, ...], key: Callable[[int], Key],
    ) -> tuple[float, Key] | None:  # fmt: skip
        first, slot = parts[0], slots[0]
        operand = graph[node.inputs[slot]]
        if not isinstance(node.type, TensorType) or not isinstance(operand.type, TensorType):
            return None
        if node.op in KEEPS:
            return first
        if node.op == "call":
            region: Region = node.attrs["region"]
            if len(slots) > 1 or node.attrs.get("lifted") or region.updates or len(region.outputs) != 1:
                return None
            leaves = [*region.inputs, *region.context]
            given = {leaves[k]: key(j) for k, j in enumerate(node.inputs) if k != slot}
            inner = (*scope, str(node.attrs["child"]))
            found = self.through(
                region.graph, leaves[slot], region.outputs[0], first[1], self.ranges(region), inner, given
            )
            return None if found is None else (first[0] * found[0], found[1])
        if node.op == "contract" and len(slots) == 1:
            weight, axes = graph[node.inputs[1 - slot]], tuple(node.attrs["axes"])
            if set(operand.tensor.names) != set(axes):
                return None  # other axes would be measured in both norms
            if self.bounded_matrix(weight, axes):
                p, q = (key(j) for j in weight.inputs[1:])
                return (first[0] * float(weight.attrs["bound"]), q) if self.same(first[1], p) else None
            spectral = weight_norm(weight, axes)
            return (first[0] * spectral, TWO) if spectral is not None and self.same(first[1], TWO) else None
        if node.op == "conv" and slots == [0]:
            weight = graph[node.inputs[1]]
            if set(operand.tensor.names) != {node.attrs["channel"], *node.attrs["space"]}:
                return None
            if induced_kernel(weight, node, operand.tensor):
                p, q = (key(j) for j in weight.inputs[1:])
                return (first[0] * float(weight.attrs["bound"]), q) if self.same(first[1], p) else None
            spectral = kernel_norm(weight, operand.tensor, node)
            return (first[0] * spectral, TWO) if spectral is not None and self.same(first[1], TWO) else None
        wide = [graph[node.inputs[k]].tensor for k in slots]
        if any(set(t.axes) != set(node.tensor.axes) for t in wide) or not OPS[node.op].elementwise:
            return None  # what is broadcast is longer, by how much depends on the norm
        if node.op in ("add", "sub"):
            return (sum(p[0] for p in parts), first[1]) if all(self.same(p[1], first[1]) for p in parts) else None
        if len(slots) > 1:
            return None
        rule = OPS[node.op].lipschitz
        types = [graph[j].tensor for j in node.inputs]
        factor = None if rule is None else rule(node, types, slot, [interval(j) for j in node.inputs])
        return None if factor is None else (first[0] * factor, first[1])


def lifted_broadcast(node: Node, argument: TensorType) -> float:
    """An argument that lacks an axis over which a call is lifted is read once for each of its indices."""
    return sqrt(prod(size for name, size in node.attrs.get("lifted", ()) if not argument.has(name)))
