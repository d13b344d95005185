"""Affine steps after a linear map with constant weights, as a norm by running statistics is at inference, go into it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from flowlang.backends.onnx.graph import REAL, Array, Body, Node, Value, readers_of

LINEAR = {"Conv": 1, "ConvTranspose": 1, "MatMul": -1}  # op -> the axis of the units in its result
STEPS = ("Add", "Sub", "Mul", "Div")


@dataclass
class Affine:
    """y = scale · x + shift for each unit, and the nodes that do it."""

    scale: Array
    shift: Array
    nodes: list[Node]


def fold_affine(part: Body, uses: Counter[int]) -> None:
    """Folds chains of sums and products with numbers for each unit into the convolution or matrix before them."""
    readers = readers_of(part)
    gone: set[int] = set()
    for node in part.nodes:
        axis = LINEAR.get(node.op)
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if axis is None or weight is None or weight.array is None or weight.kind != REAL:
            continue
        if node.op == "MatMul" and (weight.rank != 2 or node.outputs[0].rank < 2):
            continue
        found = chain(node, axis, readers, uses)
        if found is not None and any(n.op in ("Mul", "Div") for n in found.nodes if node.op == "MatMul") | (
            node.op != "MatMul"
        ):
            gone |= fold(node, weight, found)
    part.nodes = [n for n in part.nodes if id(n) not in gone]


def chain(node: Node, axis: int, readers: dict[int, list[Node]], uses: Counter[int]) -> Affine | None:
    """The affine steps that follow a linear node, each the only reader of the one before."""
    value = node.outputs[0]
    units = value.shape[axis]
    if not isinstance(units, int):
        return None
    scale, shift = np.ones(units), np.zeros(units)
    nodes: list[Node] = []
    while uses[id(value)] == 1 and len(readers.get(id(value), ())) == 1:
        step = readers[id(value)][0]
        if step.op not in STEPS or step.outputs[0].shape != value.shape:
            break
        left, right = step.inputs
        first = left is value
        other = right if first else left
        number = per_unit(other, value.rank, axis % value.rank, units) if other is not None else None
        if number is None or (step.op == "Div" and not first):
            break
        if step.op == "Mul":
            scale, shift = scale * number, shift * number
        elif step.op == "Div":
            scale, shift = scale / number, shift / number
        elif step.op == "Add":
            shift = shift + number
        elif first:
            shift = shift - number
        else:
            scale, shift = -scale, number - shift
        nodes.append(step)
        value = step.outputs[0]
    return Affine(scale, shift, nodes) if nodes else None


def per_unit(v: Value, rank: int, axis: int, units: int) -> Array | None:
    """A constant as one number for each unit; None where it varies along another axis."""
    if v.array is None or v.kind != REAL or v.rank > rank:
        return None
    shape = (1,) * (rank - v.rank) + v.array.shape
    if any(n != 1 for k, n in enumerate(shape) if k != axis):
        return None
    return np.broadcast_to(v.array.reshape(-1), (units,)) if v.array.size in (1, units) else None


def fold(node: Node, weight: Value, found: Affine) -> set[int]:
    """Puts the steps into the weights; gives the nodes that are gone."""
    assert weight.array is not None
    last = found.nodes[-1]
    result = last.outputs[0]
    if node.op == "MatMul":
        node.inputs[1] = replace(weight, array=weight.array * found.scale, name="")
        last.op, last.inputs = "Add", [node.outputs[0], Value(found.shift.shape, REAL, found.shift)]
        last.hint = "Add"
        return {id(n) for n in found.nodes[:-1]}
    groups = int(node.attrs.get("group", 1))
    scaled = scaled_kernel(weight.array, found.scale, groups, transposed=node.op == "ConvTranspose")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.array is None:
        return set()
    before = bias.array if bias is not None and bias.array is not None else np.zeros(len(found.scale))
    total = before * found.scale + found.shift
    node.inputs = [node.inputs[0], replace(weight, array=scaled, name=""), Value(total.shape, REAL, total)]
    node.outputs, result.node = [result], node
    return {id(n) for n in found.nodes}


def scaled_kernel(kernel: Array, scale: Array, groups: int, *, transposed: bool) -> Array:
    """Every unit's part of a kernel times its number: [out, in / groups, ..], or [in, out / groups, ..]."""
    window = (1,) * (kernel.ndim - 2)
    if not transposed:
        return kernel * scale.reshape(-1, 1, *window)
    parts = kernel.reshape(groups, kernel.shape[0] // groups, *kernel.shape[1:])
    made: Array = (parts * scale.reshape(groups, 1, -1, *window)).reshape(kernel.shape)
    return made
