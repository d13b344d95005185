"""Forward-mode derivatives as graph: the tangent of a value along one entry, by the ops' `jvp` rules."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import NoTangent


class NoDerivative(Exception):
    """An op on the way has no derivative that is a graph."""

    def __init__(self, node: int):
        super().__init__(str(node))
        self.node = node


def tangent(b: Builder, graph: Graph, env: Mapping[int, int], path: set[int], entry: int, target: int) -> int | None:
    """d target / d entry for a pointwise path, as a value in the program of `b`; None for zero.

    `env` maps nodes of `graph` to values of the program; `path` holds the nodes between entry and target.
    """
    shape = b.type(env[entry])
    one = b.op("expand", b.const(1.0), axes=tuple((a.name, a.size) for a in shape.axes)) if shape.axes else b.const(1.0)
    tangents: MutableMapping[int, int | None] = {entry: one}
    for i in sorted(path):
        if i == entry:
            continue
        node = graph[i]
        if node.tensor.kind != "real":
            continue  # a condition chooses between branches: it adds no slope of its own
        total: int | None = None
        for slot, j in enumerate(node.inputs):
            t = tangents.get(j)
            if t is None:
                continue
            rule = OPS[node.op].jvp
            if rule is None:
                raise NoDerivative(i)
            try:
                part = rule(b, node, [env[k] for k in node.inputs], env[i], slot, t)
            except NoTangent:
                raise NoDerivative(i) from None
            if part is not None:
                total = part if total is None else b.add(total, part)
        tangents[i] = total
    return tangents.get(target)
