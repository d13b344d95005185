"""A program whose parameters get no gradient, its callees' neither, and which keeps nothing in states."""

from __future__ import annotations

from dataclasses import replace

from flowlang.derive.program import Program, prune
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph
from flowlang.ir.tangents import FROZEN


def frozen(program: Program) -> Program:
    b = Builder(Graph())
    env: dict[int, int] = {}
    needed = program.graph.reachable([*program.outputs, *program.inputs])
    for n in sorted(needed):
        node = program.graph[n]
        inputs = [env[i] for i in node.inputs]
        b.span = node.span
        attrs = dict(node.attrs)
        if "body" in attrs:
            attrs["body"] = frozen(attrs["body"])
        if "region" in attrs and not str(attrs.get("method", "forward")).startswith(FROZEN):
            attrs["method"] = FROZEN + str(attrs.get("method", "forward"))
        if attrs != node.attrs:
            env[n] = b.graph.add(
                node.op, tuple(inputs), node.type, attrs, span=node.span, label=node.label, batched=node.batched
            ).id
        else:
            env[n] = b.copy(node, inputs)
        if node.op == "param":
            env[n] = b.op("stop", env[n])
    return prune(
        replace(program, name=FROZEN + program.name, graph=b.graph, inputs=[env[i] for i in program.inputs],
                outputs=[env[o] for o in program.outputs], effects=[])
    )  # fmt: skip
