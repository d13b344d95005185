"""What surrounds a narrow linear layer goes into its product, where each node costs more than what it computes.

Two passes. A layer whose result is split in two becomes two layers where that lets a part join what reads it: runtimes
fuse an activation with the product before it, and a sum with the product is the product's own third operand. That
operand then is no longer the bias, so a hidden layer gets one unit more that always gives the same number, and the
bias is its row of the weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from flowlang.backends.onnx.graph import FOLD, REAL, Array, Body, Node, Value, readers_of

FUSED = {"Relu", "Tanh", "Sigmoid", "LeakyRelu"}  # what runtimes compute together with a product
HIDDEN = {*FUSED, "Elu", "Softplus"}  # what a unit that always gives the same number may go through
READ = 1.0  # what that unit reads: none of them gives 0 there
LANE = 16  # columns that a product computes at a time: one more is free up to a multiple


def fuse_products(part: Body, uses: Counter[int], dtype: str) -> None:
    """Both passes over one body; `uses` counts the readers of each value in the whole model."""
    if any(node.op == "Gemm" for node in part.nodes):
        split_layers(part, uses)
        add_into_layers(part, uses, dtype)


def layer_of(v: Value, here: set[int]) -> Node | None:
    """The layer with constant weights, of this body, that gives a value."""
    node = v.node
    if node is None or node.op != "Gemm" or id(node) not in here or node.attrs or node.group is not None:
        return None
    return node if all(w is not None and w.array is not None for w in node.inputs[1:]) else None


def matrix(node: Node) -> tuple[Array, Array]:
    """A layer's weights, and its bias as one number for each column."""
    _, weight, bias = node.inputs
    assert weight is not None
    assert bias is not None
    w = np.asarray(weight.array)
    return w, np.broadcast_to(np.asarray(bias.array).reshape(-1), w.shape[1:])


def split_layers(part: Body, uses: Counter[int]) -> None:
    """A narrow layer whose two halves are read apart becomes two layers, where one of them then takes in its reader."""
    readers, here = readers_of(part), {id(n) for n in part.nodes}
    made: list[Node] = []
    gone: set[int] = set()
    for node in part.nodes:
        made.append(node)
        source = node.inputs[0] if node.op == "Split" else None
        layer = layer_of(source, here) if source is not None else None
        if layer is None or source is None or uses[id(source)] != 1 or len(node.outputs) != 2:
            continue
        if node.attrs["axis"] not in (-1, source.rank - 1) or not any(joins(v, readers, uses) for v in node.outputs):
            continue
        weights, bias = matrix(layer)
        if weights.shape[1] > LANE // 4 or node.group is not None:
            continue
        gone |= {id(layer), id(node)}
        uses[id(layer.inputs[0])] += 1
        start = 0
        for v in node.outputs:
            size = v.shape[-1]
            assert isinstance(size, int)
            w, b = weights[:, start : start + size], bias[start : start + size]
            v.node = Node("Gemm", [layer.inputs[0], Value(w.shape, REAL, w), Value(b.shape, REAL, b)], [v], {}, layer.scope,
                          layer.hint, origin=layer.origin)  # fmt: skip
            made.append(v.node)
            start += size
    part.nodes = [n for n in made if id(n) not in gone]


def joins(v: Value, readers: dict[int, list[Node]], uses: Counter[int]) -> bool:
    """Whether the only reader of a layer's result can be part of the layer."""
    own = readers.get(id(v), [])
    return uses[id(v)] == 1 == len(own) and own[0].op in FUSED


@dataclass
class Constant:
    """A hidden layer's unit that gives the same number for every sample."""

    at: dict[int, int]  # its column, by the ids of values that have it
    number: float


@dataclass
class Step:
    """What a node does to a product's result: s · (h W) + b + share · added."""

    product: Node
    scale: float
    bias: Array
    added: Value
    share: float


def add_into_layers(part: Body, uses: Counter[int], dtype: str) -> None:
    """x + h W + b is one product with x as its third operand, where a unit of h that is constant brings b."""
    Sums(part, uses, dtype).run()


class Sums:
    def __init__(self, part: Body, uses: Counter[int], dtype: str):
        self.part, self.uses, self.dtype = part, uses, dtype
        self.here, self.readers = {id(n) for n in part.nodes}, readers_of(part)
        self.units: dict[int, Constant | None] = {}  # by the hidden layer's result

    def run(self) -> None:
        gone: set[int] = set()
        for node in self.part.nodes:
            step = self.summed(node) or self.moved(node)
            if step is None:
                continue
            hidden = step.product.inputs[0]
            assert hidden is not None
            unit = self.unit(hidden) if step.bias.any() else None
            if step.bias.any() and unit is None:
                continue
            weights = step.product.inputs[1]  # with the unit's row
            assert weights is not None
            made = np.asarray(weights.array) * step.scale
            if unit is not None:
                made[unit.at[id(hidden)]] += step.bias / unit.number
            gone.add(id(step.product))
            node.op, node.attrs = "Gemm", {} if step.share == 1.0 else {"beta": step.share}
            node.inputs = [hidden, renewed(weights, made), step.added]
            if node.hint in ("Add", "add", "Sub", "sub"):
                node.hint = "linear"
            self.readers[id(hidden)] = [node if n is step.product else n for n in self.readers[id(hidden)]]
        self.part.nodes = [n for n in self.part.nodes if id(n) not in gone]

    def product(self, v: Value | None) -> Node | None:
        """The matrix product of this body, by constant weights, that gives a value which has no other reader."""
        node = v.node if v is not None else None
        if v is None or node is None or node.op != "Gemm" or id(node) not in self.here or self.uses[id(v)] != 1:
            return None
        return node if is_product(node) else None

    def summed(self, node: Node) -> Step | None:
        """The sum or difference of a layer's result and another value."""
        if node.op not in ("Add", "Sub") or node.group is not None:
            return None
        a, b = node.inputs
        assert a is not None
        assert b is not None
        if a.array is not None or b.array is not None or a.shape != b.shape or a.rank != 2 or a is b:
            return None
        minus = -1.0 if node.op == "Sub" else 1.0
        for v, other, sign, share in ((b, a, minus, 1.0), (a, b, 1.0, minus)):
            layer = self.product(v)
            if layer is not None and layer_of(v, self.here) is layer:
                return Step(layer, sign, sign * matrix(layer)[1], other, share)
        return None

    def moved(self, node: Node) -> Step | None:
        """A product that has another value added already, times a number or with a constant added."""
        if node.op not in ("Add", "Sub", "Mul", "Div") or node.group is not None:
            return None
        product = self.product(node.inputs[0])
        constant = node.inputs[1]
        if product is None and node.op in ("Add", "Mul"):
            product, constant = self.product(node.inputs[1]), node.inputs[0]
        added = product.inputs[2] if product is not None else None
        if product is None or added is None or added.array is not None or constant is None or constant.array is None:
            return None
        width, share = node.outputs[0].shape[-1], float(product.attrs.get("beta", 1.0))
        number = constant.array
        if node.outputs[0].shape != added.shape or number.size not in (1, width) or number.ndim > 1:
            return None
        assert isinstance(width, int)
        none = np.zeros(width)
        if node.op in ("Add", "Sub"):
            return Step(product, 1.0, none + (number if node.op == "Add" else -number), added, share)
        if number.size != 1:
            return None
        scale = float(number.reshape(())) if node.op == "Mul" else 1.0 / float(number.reshape(()))
        share *= scale
        # An attribute of a node is a number of float32.
        held = np.isfinite(np.float32(share)) and (self.dtype == "float32" or float(np.float32(share)) == share)
        return Step(product, scale, none, added, share) if held else None

    def unit(self, hidden: Value) -> Constant | None:
        source = first_part(hidden)
        if id(source) not in self.units:
            self.units[id(source)] = self.constant_unit(source)
        return self.units[id(source)]

    def constant_unit(self, v: Value) -> Constant | None:
        """Adds the unit to a hidden layer, where that costs nothing and all who read it are products."""
        act = v.node
        before = act.inputs[0] if act is not None and act.op in HIDDEN and id(act) in self.here else None
        layer = self.product(before)
        if (
            act is None
            or act.group is not None
            or layer is None
            or before is None
            or layer_of(before, self.here) is None
        ):
            return None
        weights, bias = matrix(layer)
        if weights.shape[1] % LANE == 0:
            return None
        at, order = {id(v): weights.shape[1]}, [v]
        places: list[tuple[Node, int]] = []  # products and the row that they get
        for value in order:
            own = self.readers.get(id(value), [])
            if self.uses[id(value)] != sum(sum(x is value for x in n.inputs) for n in own):
                return None
            for node in own:
                if is_product(node) and node.inputs[0] is value and node.inputs[2] is not value:
                    places.append((node, at[id(value)]))
                    continue
                joined = node.outputs[0]
                along = node.op == "Concat" and node.group is None and node.attrs["axis"] in (-1, joined.rank - 1)
                if not along or sum(x is value for x in node.inputs) != 1 or id(joined) in at:
                    return None
                widths = [x.shape[-1] for x in node.inputs[: node.inputs.index(value)] if x is not None]
                at[id(joined)] = at[id(value)] + sum(n for n in widths if isinstance(n, int))
                order.append(joined)
        w, b = np.pad(weights, ((0, 0), (0, 1))), np.append(bias, READ)
        layer.inputs = [layer.inputs[0], renewed(layer.inputs[1], w), renewed(layer.inputs[2], b)]
        for node, row in places:
            old = node.inputs[1]
            assert old is not None
            node.inputs[1] = renewed(old, np.insert(np.asarray(old.array), row, 0.0, axis=0))
        for value in [before, *order]:
            width = value.shape[-1]
            assert isinstance(width, int)
            value.shape = (*value.shape[:-1], width + 1)
        attrs = {k: a for k, a in act.attrs.items() if k == "alpha"}
        return Constant(at, float(FOLD[act.op](np.float64(READ), **attrs)))


def is_product(node: Node) -> bool:
    weight = node.inputs[1] if node.op == "Gemm" and node.group is None else None
    return weight is not None and weight.array is not None and set(node.attrs) <= {"beta"}


def first_part(v: Value) -> Value:
    """The first of the values that a value joins."""
    while v.node is not None and v.array is None and v.node.op == "Concat" and v.node.attrs["axis"] in (-1, v.rank - 1):
        first = v.node.inputs[0]
        assert first is not None
        v = first
    return v


def renewed(old: Value | None, array: Array) -> Value:
    return replace(old, shape=array.shape, array=array) if old is not None else Value(array.shape, REAL, array)


__all__ = ["fuse_products"]
