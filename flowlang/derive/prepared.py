"""A field as one flat graph, made ready for many evaluations: what x and t do not change is told apart.

A product of weights with x and others joined becomes a sum of products where a part is the same for all samples, as the
time is in steps that they share: that part is then a bias.
"""

from __future__ import annotations

from dataclasses import replace

from flowlang.derive.inline import inlined
from flowlang.derive.program import Program, prune
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node
from flowlang.ir.ops import OPS

MOST_NODES = 60  # beyond it the calls of its parts cost little beside their work


def prepared(program: Program, time: int, *, together: bool) -> Program | None:
    """The program without calls, for a time that all samples share (`together`) or one for each; None for larger ones.

    `time` is the number of the input that is the time.
    """
    if any("backward" in r.rules or r.updates for r in program.region.walk()):
        return None
    calls = any(n.op in ("call", "repeat") for n in program.graph)
    flat = inlined(program) if calls else program
    if (
        flat is None
        or len(flat.graph) > MOST_NODES
        or any("region" in n.attrs or "body" in n.attrs for n in flat.graph)
    ):
        return None
    if not any(n.op == "param" for n in flat.graph) or any(OPS[n.op].pools for n in flat.graph):
        return None
    return prune(_Prepare(flat, time if together else None).run())


def fixed_values(program: Program, moving: list[int]) -> list[int]:
    """The values that these inputs do not change and that what they change reads, numbers left out."""
    graph = program.graph
    below = graph.descendants(moving)
    found = set()
    for n in graph:
        if n.id in below or n.id in program.outputs:
            found |= {i for i in (*n.inputs, n.id) if i not in below}
    return sorted(i for i in found if graph[i].op not in ("const", "input"))


class _Prepare:
    def __init__(self, flat: Program, time: int | None):
        self.flat, self.time = flat, time
        self.b = Builder(Graph())
        self.env: dict[int, int] = {}
        self.sums: dict[int, tuple[int, int]] = {}  # a sum: what varies with the sample, and what does not

    def run(self) -> Program:
        flat, b = self.flat, self.b
        for k, i in enumerate(flat.inputs):
            node = flat.graph[i]
            own = node.batched and k != self.time
            self.env[i] = b.leaf(node.op, node.type, batched=own, span=node.span, label=node.label, **dict(node.attrs))
        for n in sorted(flat.graph.reachable(flat.outputs)):
            if n not in self.env:
                node = flat.graph[n]
                b.span = node.span
                args = [self.env[i] for i in node.inputs]
                self.env[n] = self.product(node, args) or self.total(node, args) or b.copy(node, args)
        env = self.env
        return replace(
            flat, graph=b.graph, inputs=[env[i] for i in flat.inputs], outputs=[env[o] for o in flat.outputs]
        )

    def product(self, node: Node, args: list[int]) -> int | None:
        """Σ W·join(a, b) as Σ W_a·a + Σ W_b·b where one part is the same for all samples."""
        b = self.b
        if node.op != "contract" or len(node.attrs["axes"]) != 1:
            return None
        (axis,) = node.attrs["axes"]
        for slot in (0, 1):
            joined, weight = b.graph[args[slot]], args[1 - slot]
            pairs: tuple[tuple[str, str], ...] = ()
            if joined.op == "rename":
                pairs, joined = tuple(joined.attrs["pairs"]), b.graph[joined.inputs[0]]
            old = next((o for o, n in pairs if n == axis), axis)
            if joined.op != "join" or joined.attrs["axis"] != old or b.graph[weight].batched:
                continue
            parts = joined.inputs
            if len({b.graph[p].batched for p in parts}) != 2:
                continue
            at = 0
            total: dict[bool, list[int]] = {True: [], False: []}
            for p in parts:
                size = b.type(p).size(old)
                total[b.graph[p].batched].append(self.part(p, pairs, weight, axis, at, size, slot))
                at += size
            varying, same = (self.summed(total[k]) for k in (True, False))
            if b.type(varying).names != node.tensor.names:
                return None
            return self.remember(varying, same)
        return None

    def part(
        self, p: int, pairs: tuple[tuple[str, str], ...], weight: int, axis: str, at: int, size: int, slot: int
    ) -> int:
        b = self.b
        value = b.graph[p]
        if size == 1 and value.op == "expand" and not b.type(value.inputs[0]).axes and not value.batched:
            return b.mul(b.op("pick", weight, axis=axis, index=at), value.inputs[0])
        p = b.op("rename", p, pairs=pairs) if pairs else p
        own = b.op("slice", weight, axis=axis, start=at, stop=at + size)
        return b.op("contract", *((p, own) if slot == 0 else (own, p)), axes=(axis,))

    def summed(self, values: list[int]) -> int:
        total = values[0]
        for v in values[1:]:
            total = self.b.add(total, v)
        return total

    def remember(self, varying: int, same: int) -> int:
        found = self.b.add(varying, same)
        self.sums[found] = varying, same
        return found

    def total(self, node: Node, args: list[int]) -> int | None:
        """A bias is added to what is the same for all samples first."""
        if node.op != "add":
            return None
        for k in (0, 1):
            if args[k] in self.sums and not self.b.graph[args[1 - k]].batched:
                varying, same = self.sums[args[k]]
                return self.remember(varying, self.b.add(args[1 - k], same))
        return None
