"""The trace of a Jacobian as sums of products, whose order is chosen: `divergence` without a tangent for each direction.

Where a field is a chain of linear and elementwise maps, its Jacobian is a product of weights and slopes, and its trace one
sum over all their indices. With two hidden layers that is Σ s2_i W2_ij s1_j (W1 W3)_ji: the weights' part is found once,
and what is left for a sample costs about as much as the value itself, whatever the dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from math import prod
from typing import TypeAlias

from flowlang.derive.forward_mode import BY_VALUE
from flowlang.derive.inline import inlined
from flowlang.derive.jvp import NoDerivative
from flowlang.derive.program import Program, prune
from flowlang.derive.programs import build
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import NoTangent, OpProblem
from flowlang.ir.types import SCALAR, Axis, TensorType

MOST_TERMS = 6
MOST_FACTORS = 9
BATCH = 64  # the size of a batch that the order of products is chosen for
PASS = 8  # what an entry of an elementwise product costs beside one of a matrix product


Order: TypeAlias = "int | tuple[Order, Order] | None"  # products by pairs, as nested pairs of positions


class NotMultilinear(Exception):
    """The tangent is no short sum of products."""


@dataclass(frozen=True)
class Factor:
    """A value of the program; `indices` name its axes in the sum."""

    value: int
    indices: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where an axis of a value lies along an index: at `offset` of `size` entries, 0 elsewhere."""

    index: str
    offset: int
    size: int


@dataclass(frozen=True)
class Term:
    """scale · Σ Π factors, as the tangent of a value with these axes; one that is not here does not vary along it."""

    factors: tuple[Factor, ...]
    out: Mapping[str, Place]
    scale: float = 1.0


DIRECTION = "d~"


class _Trace:
    def __init__(self, source: Program, made: Program, directions: int):
        self.graph = source.graph
        self.b = Builder(made.graph)
        self.values: dict[int, int] = {}
        self.terms: dict[int, list[Term]] = {}
        self.sizes = {DIRECTION: directions}
        self.plain = 0  # what all directions at once would cost

    # ---- tangents -------------------------------------------------------------------------------

    def visit(self, node: Node) -> None:
        b = self.b
        b.span = node.span
        args = [self.values[i] for i in node.inputs]
        out = self.values[node.id] = b.copy(node, args)
        moving = [k for k, i in enumerate(node.inputs) if i in self.terms]
        if not moving or node.op == "stop" or node.tensor.kind != "real":
            return
        found = [t for k in moving for t in self.through(node, args, out, k)]
        if len(found) > MOST_TERMS:
            raise NotMultilinear
        if found:
            self.terms[node.id] = found

    def through(self, node: Node, args: Sequence[int], out: int, slot: int) -> list[Term]:
        terms, op = self.terms[node.inputs[slot]], OPS[node.op]
        match node.op:
            case "order" | "expand":
                return terms
            case "rename":
                pairs = dict(node.attrs["pairs"])
                return [replace(t, out={pairs.get(n, n): p for n, p in t.out.items()}) for t in terms]
            case "join":
                axis, sizes = node.attrs["axis"], [self.b.type(a).size(node.attrs["axis"]) for a in args]
                return [self.joined(t, axis, sizes, slot) for t in terms]
            case "sum" | "mean":
                return [self.summed(t, node, self.graph[node.inputs[slot]].tensor) for t in terms]
            case "contract":
                return [self.contracted(t, args[1 - slot], node) for t in terms]
        if not op.elementwise or op.jvp is None:
            raise NotMultilinear
        if node.op in BY_VALUE:
            slope: int | None = BY_VALUE[node.op](self.b, out)
        else:
            slope = op.jvp(self.b, node, args, out, slot, self.b.const(1.0))
        if slope is None:
            return []
        while self.b.graph[slope].op == "expand":  # entries that a tangent does not have are all the same
            slope = self.b.graph[slope].inputs[0]
        number = self.b.const_value(slope)
        if number is not None:
            return [replace(t, scale=t.scale * float(number)) for t in terms]
        return [self.times(t, slope) for t in terms]

    def fresh(self, axis: Axis) -> str:
        name, k = axis.name, 1
        while name in self.sizes:
            name, k = f"{axis.name}~{k}", k + 1
        self.sizes[name] = axis.size
        return name

    def times(self, t: Term, value: int) -> Term:
        """The tangent times a value, entry by entry."""
        indices, places = [], dict(t.out)
        for a in self.b.type(value).axes:
            if a.name not in places:
                places[a.name] = Place(self.fresh(a), 0, a.size)
            p = places[a.name]
            size = self.sizes[p.index]
            if size != p.size:
                value = self.b.op("slice", value, axis=a.name, start=p.offset, stop=p.offset + size)
            indices.append(p.index)
        return Term((*t.factors, Factor(value, tuple(indices))), places, t.scale)

    def contracted(self, t: Term, other: int, node: Node) -> Term:
        return self.without(self.times(t, other), node.attrs["axes"], self.b.type(other))

    def summed(self, t: Term, node: Node, type: TensorType) -> Term:
        made = self.without(t, node.attrs["axes"], type)
        entries = prod(type.size(n) for n in node.attrs["axes"]) if node.op == "mean" else 1
        return replace(made, scale=made.scale / entries)

    def without(self, t: Term, axes: Sequence[str], type: TensorType) -> Term:
        """Summed over axes; along one that no factor has, all entries are the same."""
        places, scale = dict(t.out), t.scale
        used = {DIRECTION, *(i for f in t.factors for i in f.indices)}
        for name in axes:
            place = places.pop(name, None)
            if place is None:
                scale *= type.size(name)
            elif place.index not in used:
                scale *= self.sizes[place.index]
        return Term(t.factors, places, scale)

    def joined(self, t: Term, axis: str, sizes: Sequence[int], slot: int) -> Term:
        at, total = sum(sizes[:slot]), sum(sizes)
        p = t.out.get(axis) or Place(self.fresh(Axis(axis, sizes[slot])), 0, sizes[slot])
        return replace(t, out={**t.out, axis: Place(p.index, p.offset + at, total)})

    # ---- the sum --------------------------------------------------------------------------------

    def trace(self, terms: Sequence[Term], axis: str) -> int:
        closed = [self.closed(t, axis) for t in terms]
        orders = [self.order_of(t) for t in closed]
        if sum(cost for cost, _ in orders) >= self.plain:
            raise NotMultilinear
        found = [self.product(t, order) for t, (_, order) in zip(closed, orders, strict=True)]
        return reduce(self.b.add, found) if found else self.b.const(0.0)

    def closed(self, t: Term, axis: str) -> Term:
        """The direction is the entry: one index stands for both."""
        place = t.out.get(axis)
        if place is None or place.index == DIRECTION:
            if place is not None and (place.offset or place.size != self.sizes[DIRECTION]):
                raise NotMultilinear
        elif place.offset or self.sizes[place.index] != self.sizes[DIRECTION]:
            raise NotMultilinear
        else:
            t = replace(t, factors=tuple(self.renamed(f, place.index) for f in t.factors))
        if any(len(set(f.indices)) != len(f.indices) for f in t.factors) or len(t.factors) > MOST_FACTORS:
            raise NotMultilinear
        moves = any(DIRECTION in f.indices for f in t.factors)
        return replace(t, scale=t.scale * (1 if moves else self.sizes[DIRECTION]))

    @staticmethod
    def renamed(f: Factor, index: str) -> Factor:
        return replace(f, indices=tuple(DIRECTION if i == index else i for i in f.indices))

    def order_of(self, t: Term) -> tuple[float, Order]:
        """The cheapest order of products by pairs, as nested pairs of positions, with its cost for a sample."""
        factors = t.factors
        if not factors:
            return 0.0, None
        n = len(factors)
        own = [frozenset(f.indices) for f in factors]
        batched = [self.b.graph[f.value].batched for f in factors]

        def left(part: int) -> frozenset[str]:
            """The indices of a part's product that others still need."""
            inside = frozenset().union(*(own[k] for k in range(n) if part >> k & 1))
            outside = frozenset().union(*(own[k] for k in range(n) if not part >> k & 1))
            return inside & outside

        best: dict[int, tuple[float, Order]] = {1 << k: (0.0, k) for k in range(n)}
        many = [any(batched[k] for k in range(n) if part >> k & 1) for part in range(1 << n)]
        for count in range(2, n + 1):
            for members in combinations(range(n), count):
                part = sum(1 << k for k in members)
                low = 1 << members[0]
                rest = sub = part ^ low
                while True:
                    a, c = low | (rest ^ sub), sub
                    if c:
                        over = self.indices(a, own, left) | self.indices(c, own, left)
                        kept = left(part)
                        work = prod(self.sizes[i] for i in over) * (PASS if over <= kept else 1)
                        cost = best[a][0] + best[c][0] + work * (1.0 if many[part] else 1 / BATCH)
                        if part not in best or cost < best[part][0]:
                            best[part] = (cost, (best[a][1], best[c][1]))
                    if not sub:
                        break
                    sub = (sub - 1) & rest
        return best[(1 << n) - 1]

    @staticmethod
    def indices(part: int, own: Sequence[frozenset[str]], left: Callable[[int], frozenset[str]]) -> frozenset[str]:
        return left(part) if part & (part - 1) else own[part.bit_length() - 1]

    def product(self, t: Term, order: Order) -> int:
        b = self.b

        def made(order: Order) -> tuple[int, frozenset[int]]:
            if isinstance(order, int):
                f = t.factors[order]
                pairs = tuple((o, n) for o, n in zip(b.type(f.value).names, f.indices, strict=True) if o != n)
                value = b.op("rename", f.value, pairs=pairs) if pairs else f.value
                return value, frozenset({order})
            assert order is not None
            (u, here), (v, there) = made(order[0]), made(order[1])
            parts = here | there
            needed = {i for k, f in enumerate(t.factors) if k not in parts for i in f.indices}
            names = {*b.type(u).names, *b.type(v).names}
            done = [n for n in names if n not in needed]
            alone = [n for n in done if (n in b.type(u).names) != (n in b.type(v).names)]
            for n in alone:
                if n in b.type(u).names:
                    u = b.op("sum", u, axes=(n,))
                else:
                    v = b.op("sum", v, axes=(n,))
            both = tuple(n for n in b.type(u).names if n in done and n not in alone)
            if b.graph[v].batched and not b.graph[u].batched:
                u, v = v, u
            if len(both) == 1 and b.graph[u].batched and not b.graph[v].batched:  # as a product with a matrix wants it
                u, v = (b.op("order", w, names=(*(n for n in b.type(w).names if n not in both), *both)) for w in (u, v))
            return (b.op("contract", u, v, axes=both) if both else b.mul(u, v)), parts

        if order is None:
            return b.const(t.scale)
        value, _ = made(order)
        if b.type(value).axes:
            value = b.op("sum", value, axes=b.type(value).names)
        return value if t.scale == 1.0 else b.mul(value, b.const(t.scale))


def short_divergence(region: Region) -> Program | None:
    """A field's value and divergence as one sum of products each; None where all directions at once are as good."""
    if (
        region.kind not in ("net", "norm")
        or len(region.outputs) != 1
        or region.graph[region.inputs[0]].tensor.rank != 1
    ):
        return None
    if any("backward" in r.rules or r.updates for r in region.walk()):
        return None
    flat = inlined(build(region, None, "forward"))
    if flat is None:
        return None
    made = Program("divergence", region, Graph(), context=len(region.context))
    x, out = flat.inputs[0], flat.outputs[0]
    type = flat.graph[x].tensor
    if flat.graph[out].tensor.names != type.names:
        return None
    mode = _Trace(flat, made, type.count)
    moving = flat.graph.descendants([x])
    for i in flat.inputs:
        mode.values[i] = made.graph.again(flat.graph[i], ())
    mode.terms[x] = [Term((), {type.names[0]: Place(DIRECTION, 0, type.count)})]
    try:
        for n in sorted(flat.graph.reachable([out])):
            node = flat.graph[n]
            if n not in mode.values:
                mode.visit(node)
                if n in moving and node.op == "contract":
                    summed = prod(flat.graph[node.inputs[0]].tensor.size(a) for a in node.attrs["axes"])
                    mode.plain += type.count * node.tensor.count * summed
                elif n in moving:
                    mode.plain += type.count * PASS * node.tensor.count
        trace = mode.trace(mode.terms.get(out, []), type.names[0])
    except (NotMultilinear, NoDerivative, NoTangent, OpProblem):
        return None
    made.inputs = [mode.values[i] for i in flat.inputs]
    made.outputs = [mode.values[out], trace]
    assert mode.b.type(trace) == SCALAR
    return prune(made)
