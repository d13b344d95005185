"""Cheaper forms of what a program computes, where nothing that reads it can tell the difference.

c · tanh(v / 2) becomes 2c · sigmoid(v) - c where only exponentials and sums of logarithms read it, as in bounded scales:
torch's tanh takes five times as long as its sigmoid on a processor. The difference of the two is rounding of c, absolute
and not relative to the result, and that is what e^s and a log-determinant have anyway.
"""

from __future__ import annotations

from dataclasses import replace

from flowlang.derive.program import Program, prune
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node


def cheaper(program: Program) -> Program:
    """The program with its bounded log-scales by `sigmoid`."""
    graph = program.graph
    roots = {*program.outputs, *(n for _, n in program.effects)}
    needed = graph.reachable([*roots, *program.inputs])
    found = {n: bounded for n in sorted(needed) if (bounded := log_scale(graph, graph[n], needed, roots)) is not None}
    if not found:
        return program
    b, ids = Builder(Graph()), dict[int, int]()
    for n in sorted(needed):
        node = graph[n]
        if n not in found:
            ids[n] = b.graph.again(node, [ids[i] for i in node.inputs])
            continue
        bound, value = found[n]
        wide = b.op("mul", b.const(whole(2 * bound)), b.op("sigmoid", ids[value], span=node.span), span=node.span)
        often = sum(user.id in needed for user, _ in graph.users(n)) > 1
        label = node.label or ("log_scale" if often else None)
        ids[n] = b.op("sub", wide, b.const(whole(bound)), span=node.span, label=label)
    return prune(
        replace(
            program, graph=b.graph, inputs=[ids[i] for i in program.inputs], outputs=[ids[o] for o in program.outputs],
            effects=[(name, ids[n]) for name, n in program.effects],
        )
    )  # fmt: skip


def whole(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def log_scale(graph: Graph, node: Node, needed: set[int], roots: set[int]) -> tuple[float, int] | None:
    """(c, v) of c · tanh(v / 2), read by exponentials and sums alone."""
    bounded = times(graph, node)
    if bounded is None or node.id in roots or not logarithm(graph, node.id, needed, roots):
        return None
    tanh = graph[bounded[1]]
    if tanh.op != "tanh" or tanh.id in roots or sum(user.id in needed for user, _ in graph.users(tanh.id)) != 1:
        return None
    half = times(graph, graph[tanh.inputs[0]])
    return (bounded[0], half[1]) if half is not None and half[0] == 0.5 else None


def times(graph: Graph, node: Node) -> tuple[float, int] | None:
    """(c, v) of a product of a number and a value of the same axes."""
    if node.op not in ("mul", "div") or node.tensor.kind != "real":
        return None
    for k in (0, 1) if node.op == "mul" else (1,):
        number, value = graph[node.inputs[k]], graph[node.inputs[1 - k]]
        if number.op == "const" and not number.tensor.axes and value.tensor == node.tensor:
            c = float(number.attrs["value"])
            return (c if node.op == "mul" else 1 / c, value.id) if c else None
    return None


def logarithm(graph: Graph, n: int, needed: set[int], roots: set[int]) -> bool:
    """Whether all that reads a value takes its exponential, or its sum."""
    users = [user for user, _ in graph.users(n) if user.id in needed]
    return n not in roots and all(
        user.op in ("exp", "sum") or (user.op == "neg" and logarithm(graph, user.id, needed, roots)) for user in users
    )
