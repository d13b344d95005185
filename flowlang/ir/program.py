"""One function of a region as a graph of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowlang.ir.graph import Graph, Region
from flowlang.ir.types import TensorType


@dataclass
class Program:
    """One function of a region: a pruned graph with named inputs and results.

    `context` counts the trailing inputs that are context; `random` says that it draws noise.
    """

    name: str
    region: Region
    graph: Graph
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    context: int = 0
    random: bool = False
    log_det: bool = False  # the last output is a log-det or weight for each sample
    effects: list[tuple[str, int]] = field(default_factory=list)  # states by name, and what training puts there

    def output_types(self) -> list[TensorType]:
        return [self.graph[o].tensor for o in self.outputs]
