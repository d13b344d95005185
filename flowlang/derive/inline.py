"""Calls of networks written out: one flat graph, whose parameters say which child they belong to.

A schedule (`derive/schedule.py`) asks of every value when each of its entries can be computed, and so must see all
of them. Copies of a `repeat` are written out one after the other; axes that a call is lifted over become axes of
every value inside that varies along them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flowlang.derive.program import Program, prune
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.noise import QUIET, is_loud, noisy_choices, reached
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import OpProblem
from flowlang.ir.types import Axis, TensorType

MOST_NODES = 6000  # beyond it the loop would be longer to write than it is worth
Path = tuple[tuple[str, int | None], ...]  # names of children, with the number of a copy


class NotInline(Exception):
    """A part that is no plain network."""


def inlined(program: Program) -> Program | None:
    """The program with the calls that depend on its first input written out; None where one cannot be."""
    try:
        return _Inline(program).run()
    except (NotInline, OpProblem):
        return None


class _Inline:
    def __init__(self, program: Program):
        self.program = program
        self.graph = Graph()
        self.b = Builder(self.graph)
        self.fresh = 0

    def run(self) -> Program:
        source, p = self.program.graph, self.program
        below = source.descendants(p.inputs[:1])
        env: dict[int, list[int]] = {}
        for n in sorted(source.reachable([*p.outputs, *p.inputs])):
            node = source[n]
            if node.op in ("call", "repeat") and n not in below:
                inputs = tuple(env[i][0] for i in node.inputs)
                made = self.graph.add(node.op, inputs, node.type, dict(node.attrs), span=node.span, label=node.label)
                several = len(result_types(node.type)) > 1
                env[n] = (
                    [self.b.op_get(made.id, k) for k in range(len(result_types(node.type)))] if several else [made.id]
                )
            else:
                env[n] = self.node(node, source, env, ())
        made_ = Program(p.name, p.region, self.graph, [env[i][0] for i in p.inputs], [env[o][0] for o in p.outputs])
        return prune(made_)

    def node(self, node: Node, source: Graph, env: Mapping[int, list[int]], path: Path) -> list[int]:
        """The results of a node: one, but for calls."""
        if len(self.graph) > MOST_NODES:
            raise NotInline
        match node.op:
            case "get":
                return [env[node.inputs[0]][node.attrs["index"]]]
            case "call":
                return self.call(node, [env[i][0] for i in node.inputs], (*path, (node.attrs["child"], None)))
            case "repeat":
                carried = int(node.attrs["carried"])
                values = [env[i][0] for i in node.inputs]
                for k in range(int(node.attrs["count"])):
                    values[:carried] = self.call(node, values, (*path, (node.attrs["child"], k)))
                return values[:carried]
            case "param" | "state":
                attrs = {**dict(node.attrs), **({"path": path} if path else {})}
                return [self.b.leaf(node.op, node.type, batched=False, span=node.span, label=node.label, **attrs)]
        op = OPS[node.op]
        if (op.made and node.inputs) or "body" in node.attrs or not op.pure or op.pools:
            raise NotInline
        return [self.copy(node, source, [env[i][0] for i in node.inputs])]

    def copy(self, node: Node, source: Graph, inputs: list[int]) -> int:
        """The same op on operands that may have more axes than it was written for."""
        b, attrs = self.b, dict(node.attrs)
        extra: list[Axis] = []
        for new, old in zip(inputs, node.inputs, strict=True):
            had = source[old].tensor
            extra += [a for a in b.type(new).axes if not had.has(a.name) and a not in extra]
        if extra and node.op == "order":
            attrs["names"] = (*(a.name for a in extra), *attrs["names"])
        if extra and node.op == "expand":
            attrs["axes"] = (*((a.name, a.size) for a in extra), *attrs["axes"])
        if node.op == "merge":
            group = tuple(attrs["axes"])
            names = b.type(inputs[0]).names
            at = names.index(group[0])
            if names[at : at + len(group)] != group:
                rest = [n for n in names if n not in group]
                inputs = [b.op("order", inputs[0], names=(*rest, *group))]
        if not inputs:
            return b.copy(node, inputs)
        new = b.op(node.op, *inputs, span=node.span, label=node.label, **attrs)
        if node.label:
            b.graph.relabel(new, node.label)
        return new

    def call(self, node: Node, arguments: Sequence[int], path: Path) -> list[int]:
        region: Region = node.attrs["region"]
        method = node.attrs.get("method", "forward")
        choices = {n.id for n in region.graph if n.op == "choose"}
        if method == QUIET + "forward":  # what is drawn in training stays out
            choices -= noisy_choices(region.graph)
        elif method != "forward":
            raise NotInline
        changes = region.updates or region.draws or region.emissions or region.starts
        if choices or changes or region.kind not in ("net", "norm"):
            raise NotInline
        lifted = dict(node.attrs.get("lifted", ()))
        inner = {a.name for n in region.graph if isinstance(n.type, TensorType) for a in n.tensor.axes}
        outer: dict[str, str] = {}
        for i in arguments:  # axes from outside keep clear of those inside
            for name in self.b.type(i).names:
                if name in inner and name in self.beyond(region, arguments):
                    outer.setdefault(name, self.name(name))
        arguments = [self.renamed(i, outer) for i in arguments]
        slots = [*region.inputs, *region.context]
        env: dict[int, list[int]] = {s: [a] for s, a in zip(slots, arguments, strict=True)}
        for n in sorted(reached(region.graph, region.outputs, training=False)):
            made = region.graph[n]
            if made.op == "choose":
                env[n] = [env[i][0] for i in made.inputs_in(training=False)]
            elif n not in env:
                if is_loud(made):
                    made = replace(
                        made, attrs={**made.attrs, "method": QUIET + str(made.attrs.get("method", "forward"))}
                    )
                env[n] = self.node(made, region.graph, env, path)
        back = {new: old for old, new in outer.items()}
        out = []
        for o in region.outputs:
            found = self.renamed(env[o][0], back)
            own = region.graph[o].tensor
            have = self.b.type(found)
            front = [a for a in have.axes if not own.has(a.name) and a.name not in lifted]
            wanted = TensorType((*front, *(Axis(k, s) for k, s in lifted.items()), *own.axes), own.kind)
            if len(have.axes) != len(wanted.axes):
                found = self.b.expand(found, wanted)
            out.append(self.b.op("order", found, names=wanted.names))
        return out

    def beyond(self, region: Region, arguments: Sequence[int]) -> set[str]:
        """The axes of arguments that the region's inputs do not have."""
        out: set[str] = set()
        for s, i in zip([*region.inputs, *region.context], arguments, strict=True):
            out |= set(self.b.type(i).names) - set(region.graph[s].tensor.names)
        return out

    def name(self, axis: str) -> str:
        self.fresh += 1
        return f"{axis}~{self.fresh}"

    def renamed(self, value: int, pairs: Mapping[str, str]) -> int:
        have = self.b.type(value).names
        found: tuple[tuple[str, str], ...] = tuple((o, n) for o, n in pairs.items() if o in have)
        return self.b.op("rename", value, pairs=found) if found else value
