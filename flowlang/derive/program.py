"""What a program of a region does: whether it draws, and how it is pruned."""

from __future__ import annotations

from flowlang.ir.check import Checks, check_program
from flowlang.ir.graph import Graph, Region
from flowlang.ir.program import Program


def is_random(region: Region) -> bool:
    return region.is_random


def is_map(region: Region) -> bool:
    return region.kind in ("bijector", "chain", "flow")


def draws_noise(region: Region, method: str) -> bool:
    if method == "score":
        return any(r.draws for r in region.walk())
    return any(any(e.distribution is not None for e in r.emissions) for r in region.walk())


def prune(program: Program) -> Program:
    """Drops what no result needs; ids are renumbered in order."""
    graph = program.graph
    needed = graph.reachable([*program.outputs, *program.inputs, *(n for _, n in program.effects)])
    new = Graph()
    env: dict[int, int] = {}
    for n in sorted(needed):
        node = graph[n]
        env[n] = new.again(node, [env[i] for i in node.inputs])
    program.graph = new
    program.inputs = [env[i] for i in program.inputs]
    program.outputs = [env[o] for o in program.outputs]
    program.effects = [(name, env[n]) for name, n in program.effects]
    if Checks.on:
        check_program(f"{program.name} of {program.region.name}", new, program.inputs, program.outputs)
    return program
