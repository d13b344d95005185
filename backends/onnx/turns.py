"""Reversals and permutations along the last axis go where they cost nothing: into the weights of linear layers.

Between a permutation and the next, what is done entry by entry can be done in the order before it, if the layers
that make its other operands give theirs in that order too, and sums along the axis ask for none. An autoregressive
density with a reversal after each step has none left.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from flowlang.backends.onnx.graph import (
    INT,
    Array,
    Body,
    Node,
    Value,
    every_node,
    permuted,
    readers_of,
    turned,
    use_counts,
)

ENTRYWISE = {
    "Abs", "Add", "And", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Greater", "GreaterOrEqual", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid",
    "Sign", "Sin", "Softplus", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "Where",
}  # fmt: skip
REDUCTIONS = {"ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceSumSquare", "ReduceLogSumExp"}


def order_of(node: Node) -> Array | None:
    """The order in which a node gives its operand's entries along the last axis."""
    if len(node.outputs) != 1:
        return None
    v = node.outputs[0]
    n = v.shape[-1] if v.rank else None
    if node.op == "Slice" and isinstance(n, int) and turned(v) == -1:
        return np.arange(n)[::-1]
    return permuted(v)


@dataclass
class Plan:
    """Values in another order (new[j] = old[order[j]]), and what is around them."""

    orders: dict[int, Array] = field(default_factory=dict)
    turns: dict[int, Node] = field(default_factory=dict)  # permutations of them, or that give them
    rows: dict[int, Array] = field(default_factory=dict)  # of linear layers that read them
    columns: dict[int, dict[int, Array]] = field(default_factory=dict)  # of layers that give them, by the first column
    kept: dict[int, set[int]] = field(default_factory=dict)  # who reads a value as it was; 0: a result or a loop's body

    def order(self, node: Node) -> Array:
        """A permutation's own, once the values around it are in theirs."""
        source, out = node.inputs[0], node.outputs[0]
        order = order_of(node)
        assert order is not None
        if id(source) in self.orders:
            order = np.argsort(self.orders[id(source)])[order]
        return order[self.orders[id(out)]] if id(out) in self.orders else order

    @property
    def cost(self) -> int:
        """Nodes more than before."""
        return len(self.kept) - sum(is_none(self.order(n)) for n in self.turns.values())


def absorb_turns(part: Body, whole: Body) -> None:
    """Takes permutations out of a body as long as the nodes get fewer."""
    while any(improved(part, whole, node) for node in part.nodes):
        pass


def improved(part: Body, whole: Body, node: Node) -> bool:
    if node.group is not None or order_of(node) is None:
        return False
    search = Search(part, whole)
    plan = search.plan(node)
    if plan is None or plan.cost >= 0:
        return False
    search.apply(plan)
    return True


class Search:
    MOST_KEPT = 3

    def __init__(self, part: Body, whole: Body):
        self.part, self.whole, self.uses = part, whole, use_counts(whole)
        self.here, self.readers = {id(n) for n in part.nodes}, readers_of(part)
        self.work: list[Value] = []

    def plan(self, first: Node) -> Plan | None:
        """What would change without this permutation; None where that has no end."""
        order = order_of(first)
        assert order is not None
        plan = Plan()
        self.ask(plan, first.outputs[0], np.argsort(order))
        while self.work:
            v = self.work.pop()
            readers = self.readers.get(id(v), [])
            if not self.given(plan, v) or not all(self.read(plan, v, n) for n in readers):
                return None
            if self.uses[id(v)] > sum(sum(w is v for w in n.inputs) for n in readers):
                plan.kept.setdefault(id(v), set()).add(0)
            if len(plan.kept) > self.MOST_KEPT:
                return None
        return plan

    def ask(self, plan: Plan, v: Value, order: Array) -> bool:
        """Wants a value in an order; False where it is wanted in another."""
        if id(v) in plan.orders:
            return bool((plan.orders[id(v)] == order).all())
        if not v.rank or v.shape[-1] != len(order):
            return False
        plan.orders[id(v)] = order
        self.work.append(v)
        return True

    def given(self, plan: Plan, v: Value) -> bool:
        """Whether what makes a value can give it in its order."""
        node, order = v.node, plan.orders[id(v)]
        if node is None or id(node) not in self.here or node.group is not None:
            return False
        if order_of(node) is not None:
            plan.turns[id(node)] = node
            return True
        if node.op in ENTRYWISE:
            return self.entrywise(plan, node, order)
        start = 0
        if node.op == "Split" and node.attrs["axis"] in (-1, v.rank - 1):
            source = node.inputs[0]
            assert source is not None
            start = sum(n for o in node.outputs[: node.outputs.index(v)] if isinstance(n := o.shape[-1], int))
            if source.node is None or self.uses[id(source)] != 1:
                return False
            node = source.node
        if id(node) not in self.here or not is_layer(node):
            return False
        plan.columns.setdefault(id(node), {})[start] = order
        return True

    def read(self, plan: Plan, v: Value, node: Node) -> bool:
        """Whether a reader of a value can do with its order, or else gets it as it was."""
        order = plan.orders[id(v)]
        if node.group is None:
            if order_of(node) is not None:
                plan.turns[id(node)] = node
                return True
            if node.op in ENTRYWISE:
                return self.entrywise(plan, node, order)
            if is_layer(node) and node.inputs[0] is v:
                plan.rows[id(node)] = order
                return True
            if node.op in REDUCTIONS and along_last(node, v.rank):
                return True
        plan.kept.setdefault(id(v), set()).add(id(node))
        return True

    def entrywise(self, plan: Plan, node: Node, order: Array) -> bool:
        """All operands that have the axis, and the result."""
        values = (v for v in [*node.inputs, *node.outputs] if v is not None and v.array is None)
        return all(self.ask(plan, v, order) for v in values if v.rank and v.shape[-1] != 1)

    def apply(self, plan: Plan) -> None:
        now: dict[int, Value] = {}  # what stands for a value whose permutation is gone
        kept: dict[int, Value] = {}  # values as they were
        made: list[Node] = []
        for node in self.part.nodes:
            if id(node) in plan.turns:
                order = plan.order(node)
                source, out = node.inputs[0], node.outputs[0]
                assert source is not None
                source = kept[id(source)] if id(node) in plan.kept.get(id(source), ()) else now.get(id(source), source)
                if is_none(order):
                    now[id(out)] = source
                else:
                    made.append(pick(node, source, order, out))
            else:
                change(node, plan)
                node.inputs = [
                    v if v is None else kept[id(v)] if id(node) in plan.kept.get(id(v), ()) else now.get(id(v), v)
                    for v in node.inputs
                ]
                made.append(node)
            for v in node.outputs:
                if id(v) in plan.kept:
                    old = Value(v.shape, v.kind, level=v.level, name=v.name)
                    v.name = ""
                    made.append(pick(node, now.get(id(v), v), np.argsort(plan.orders[id(v)]), old))
                    kept[id(v)] = old
        self.part.nodes = made
        outside = {**now, **kept}
        self.part.outputs = [outside.get(id(v), v) for v in self.part.outputs]
        for node in self.part.nodes:
            for body in node.bodies.values():
                for inner in every_node(body):
                    inner.inputs = [outside.get(id(v), v) if v is not None else None for v in inner.inputs]
                body.outputs = [outside.get(id(v), v) for v in body.outputs]


def pick(like: Node, source: Value, order: Array, out: Value) -> Node:
    index = Value((len(order),), INT, order)
    out.node = Node("Gather", [source, index], [out], {"axis": out.rank - 1}, like.scope, "turned", origin=like.origin)
    return out.node


def change(node: Node, plan: Plan) -> None:
    """A node's constants in the order of its values."""
    if id(node) in plan.rows or id(node) in plan.columns:
        weight = node.inputs[1]
        assert weight is not None
        columns = np.arange(weight.shape[1])  # type: ignore[arg-type]  # a weight has no open dims
        for start, order in plan.columns.get(id(node), {}).items():
            columns[start : start + len(order)] = start + order
        matrix = np.asarray(weight.array)[plan.rows.get(id(node), slice(None))][:, columns]
        node.inputs[1] = replace(weight, array=matrix, name="")
        if node.op == "Gemm":
            node.inputs[2] = arranged(node.inputs[2], columns)
    elif node.op in ENTRYWISE and id(node.outputs[0]) in plan.orders:
        node.inputs = [arranged(v, plan.orders[id(node.outputs[0])]) for v in node.inputs]


def arranged(v: Value | None, order: Array) -> Value | None:
    if v is None or v.array is None or not v.rank or v.shape[-1] == 1:
        return v
    return replace(v, array=v.array[..., order], name="")


def is_none(order: Array) -> bool:
    return bool((order == np.arange(len(order))).all())


def is_layer(node: Node) -> bool:
    if node.op not in ("Gemm", "MatMul") or node.group is not None:
        return False
    weight = node.inputs[1]
    constant = weight is not None and weight.array is not None and weight.rank == 2
    return constant and all(v is not None and v.array is not None for v in node.inputs[2:])


def along_last(node: Node, rank: int) -> bool:
    axes = node.inputs[1] if len(node.inputs) == 2 else None
    return axes is not None and axes.array is not None and bool({-1, rank - 1} & set(axes.array.tolist()))
