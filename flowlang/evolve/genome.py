"""Layers as small graphs, and their text: random ones, mutated ones (Liu et al. 2020, section 3.1).

A genome is a list of nodes after four given ones: x, 0, and two vectors of parameters over the channels that start at 0
and 1. Each node applies a primitive to earlier nodes; the last one, times γ plus β, is the layer. `text` writes what the
last node needs as a norm of the language, whose checks then judge it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

GIVEN = ("x", "0", "v0", "v1")
UNARY = ("neg", "sigmoid", "tanh", "exp", "log", "abs", "square", "sqrt")
BINARY = ("add", "mul", "div", "max")
MOMENTS = ("mean", "std", "rms")
SPANS = {"batch": "B, H, W", "instance": "H, W", "layer": "C, H, W", "group": "H, W, C / groups"}
PRIMITIVES = (*UNARY, *BINARY, *(f"{m}_{s}" for m in MOMENTS for s in SPANS))
INFIX = {"add": "+", "mul": "*", "div": "/"}


@dataclass(frozen=True)
class Gene:
    """One node: a primitive and the numbers of its operands; a unary one has its operand twice."""

    op: str
    left: int
    right: int


Genome = tuple[Gene, ...]


def random_gene(rng: random.Random, place: int) -> Gene:
    return Gene(rng.choice(PRIMITIVES), rng.randrange(place), rng.randrange(place))


def random_genome(rng: random.Random, nodes: int) -> Genome:
    """Primitives and operands drawn evenly, for each node from all before it."""
    return tuple(random_gene(rng, len(GIVEN) + k) for k in range(nodes))


def mutated(rng: random.Random, genome: Genome) -> Genome:
    """One node, drawn evenly, gets a new primitive and new operands."""
    k = rng.randrange(len(genome))
    return (*genome[:k], random_gene(rng, len(GIVEN) + k), *genome[k + 1 :])


def used(genome: Genome) -> list[int]:
    """The numbers of the nodes that the last one needs, given ones too, in order."""
    seen: set[int] = set()
    stack = [len(GIVEN) + len(genome) - 1]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            if n >= len(GIVEN):
                gene = genome[n - len(GIVEN)]
                stack += [gene.left, *([gene.right] if gene.op in BINARY else [])]
    return sorted(seen)


def text(genome: Genome, name: str, groups: int = 4, eps: float = 1e-5) -> str:
    """The layer as a norm of the language; statistics over the batch have running means for inference."""
    needed = used(genome)
    params = ["γ: R[C] = 1", "β: R[C] = 0"]
    params += [f"{n}: R[C] = {start}" for n, start, k in (("v0", 0, 2), ("v1", 1, 3)) if k in needed]
    places = {n: GIVEN[n] if n < len(GIVEN) else f"n{n}" for n in needed}
    lines = [f"  param {',  '.join(params)}"]
    for n in needed[:-1] if needed[-1] >= len(GIVEN) else needed:
        if n >= len(GIVEN):
            lines.append(f"  {places[n]} = {expression(genome[n - len(GIVEN)], places, groups, eps)}")
    last = needed[-1]
    value = expression(genome[last - len(GIVEN)], places, groups, eps) if last >= len(GIVEN) else places[last]
    lines.append(f"  y: R[C, H, W] = {value}")
    lines.append("  y * γ + β")
    return "\n".join([f"norm {name} (x: R[C, H, W]) {{", *lines, "}"]) + "\n"


def expression(gene: Gene, places: dict[int, str], groups: int, eps: float) -> str:
    a = places[gene.left]
    if gene.op in INFIX:
        return f"{a} {INFIX[gene.op]} {places[gene.right]}"
    match gene.op:
        case "neg":
            return f"0 - {a}"
        case "square":
            return f"{a} ^ 2"
        case "max":
            return f"max({a}, {places[gene.right]})"
        case op if op in UNARY:
            return f"{op}({a})"
    moment, span = gene.op.split("_")
    axes = SPANS[span].replace("groups", str(groups))
    inner = {"mean": f"mean[{axes}]({a})", "std": f"var[{axes}]({a})", "rms": f"mean[{axes}]({a} ^ 2)"}[moment]
    if span == "batch":
        inner = f"running({inner}, 0.1{', unbiased = true' if moment == 'std' else ''})"
    return inner if moment == "mean" else f"sqrt({inner} + {eps:g})"


def reads_x(genome: Genome) -> bool:
    return 0 in used(genome)
