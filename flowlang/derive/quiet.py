"""A program in which nothing is drawn that is drawn in training alone: what an inverse runs."""

from __future__ import annotations

from dataclasses import replace

from flowlang.derive.program import Program, prune
from flowlang.ir.graph import Graph, Node
from flowlang.ir.noise import QUIET, is_loud, noisy_choices


def quiet(program: Program, name: str) -> Program:
    """The program with the values that a noisy `if training` has at inference, and its callees quiet."""
    source = program.graph
    choices = noisy_choices(source)
    graph = Graph()
    env: dict[int, int] = {}
    chosen: dict[int, tuple[int, ...]] = {}  # for each choice that noise takes part in, its values at inference

    def inputs_of(node: Node) -> tuple[int, ...]:
        return node.inputs_in(training=False) if node.id in choices else node.inputs

    roots = [*program.outputs, *program.inputs, *(i for _, i in program.effects)]
    for n in sorted(source.reachable(roots, inputs_of)):
        node = source[n]
        if n in choices:
            chosen[n] = tuple(env[i] for i in inputs_of(node))
            continue
        if node.op == "get" and node.inputs[0] in chosen:
            env[n] = chosen[node.inputs[0]][node.attrs["index"]]
            continue
        attrs = dict(node.attrs)
        if "body" in attrs:
            attrs["body"] = quiet(attrs["body"], attrs["body"].name)
        if is_loud(node):
            attrs["method"] = QUIET + str(attrs.get("method", "forward"))
        inputs = tuple(env[i] for i in node.inputs)
        env[n] = graph.add(node.op, inputs, node.type, attrs, span=node.span, label=node.label, batched=node.batched).id
    return prune(
        replace(program, name=name, graph=graph, inputs=[env[i] for i in program.inputs],
                outputs=[env[o] for o in program.outputs], effects=[(k, env[i]) for k, i in program.effects])
    )  # fmt: skip
