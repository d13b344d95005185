"""Programs made small: what no result needs goes, calls give only what is read, zero log-dets vanish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from flowlang.derive.program import Program, is_map, prune
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.ops import OPS
from flowlang.ir.types import TensorType, TupleType

ZeroLogDet = Callable[[Region, str], bool]
"""Whether the log-det of a region's program is 0 for every input."""


def without_log_det(program: Program) -> Program:
    """The same program without its last result, the log-det or weight."""
    return replace(program, outputs=program.outputs[:-1], log_det=False) if program.log_det else program


def zero_log_det(program: Program) -> bool:
    return program.log_det and constant_zero(program.graph, program.outputs[-1])


def constant_zero(graph: Graph, id: int) -> bool:
    node = graph[id]
    return node.op == "const" and not node.tensor.axes and node.attrs["value"] == 0


def tidy(program: Program, zero: ZeroLogDet) -> Program:
    """An equal program. Calls of maps whose log-det is not read, or is zero, are marked `log_det = False`."""
    return _Tidy(program, zero).run()


class _Tidy:
    def __init__(self, program: Program, zero: ZeroLogDet):
        self.program, self.zero = program, zero
        self.source = program.graph
        self.b = Builder(Graph())
        self.env: dict[int, int] = {}

    def run(self) -> Program:
        needed = self.needed()
        self.read = self.results_read(needed)
        for n in sorted(needed):
            self.visit(self.source[n])
        outputs = [self.env[o] for o in self.program.outputs]
        made = replace(
            self.program, graph=self.b.graph, inputs=[self.env[i] for i in self.program.inputs], outputs=outputs,
            effects=[(name, self.env[n]) for name, n in self.program.effects],
        )  # fmt: skip
        return prune(made)

    def needed(self) -> set[int]:
        effects = [n for _, n in self.program.effects]
        return self.source.reachable([*self.program.outputs, *self.program.inputs, *effects])

    def results_read(self, needed: set[int]) -> dict[int, set[int]]:
        """For each call with several results, the indices that are read."""
        out: dict[int, set[int]] = {}
        for n in needed:
            node = self.source[n]
            if node.op == "get":
                out.setdefault(node.inputs[0], set()).add(node.attrs["index"])
        return out

    def visit(self, node: Node) -> None:
        inputs = tuple(self.env[i] for i in node.inputs)
        if node.op in ("call", "repeat", "integrate"):
            self.env[node.id] = self.call(node, inputs)
        elif node.op == "get":
            self.env[node.id] = self.get(node, inputs[0])
        elif "body" in node.attrs or not OPS[node.op].pure:
            attrs = dict(node.attrs)
            if "body" in attrs:
                attrs["body"] = tidy(attrs["body"], self.zero)
            self.env[node.id] = self.b.graph.add(
                node.op, inputs, node.type, attrs, span=node.span, label=node.label, batched=node.batched
            ).id
        elif node.op == "sum" and self.zero_values(inputs[0]):
            self.env[node.id] = self.b.expand(self.b.const(0.0), node.tensor)
        else:
            self.env[node.id] = self.b.copy(node, inputs)

    def zero_values(self, id: int) -> bool:
        """Whether a value is an expanded 0."""
        node = self.b.graph[id]
        return node.op == "expand" and constant_zero(self.b.graph, node.inputs[0])

    def call(self, node: Node, inputs: tuple[int, ...]) -> int:
        attrs, type_ = dict(node.attrs), node.type
        if self.log_det_goes(node):
            attrs["log_det"] = False
            if node.op == "integrate":  # the divergence is not needed either, nor noise for its estimate
                inputs = inputs if attrs["method"] == "divergence" else (inputs[0], *inputs[2:])
                attrs["method"] = "forward"
            type_ = TupleType(result_types(node.type)[:-1])
        return self.b.graph.add(node.op, inputs, type_, attrs, span=node.span, label=node.label).id

    def log_det_goes(self, node: Node) -> bool:
        if not node.attrs.get("log_det") or not (node.op == "integrate" or is_map(node.attrs["region"])):
            return False
        last = len(result_types(node.type)) - 1
        if last not in self.read.get(node.id, set()):
            return True
        return node.op != "integrate" and self.zero(node.attrs["region"], node.attrs.get("method", "forward"))

    def get(self, node: Node, call: int) -> int:
        source, index = self.source[node.inputs[0]], node.attrs["index"]
        if self.log_det_goes(source) and index == len(result_types(source.type)) - 1:
            assert isinstance(node.type, TensorType)
            zero = self.b.const(0.0)
            return self.b.expand(zero, node.type) if node.type.axes else zero
        found = self.b.op_get(call, index, node.span)
        if node.label:
            self.b.graph.relabel(found, node.label)
        return found


def graphs(program: Program) -> Iterator[Graph]:
    """The program's graph and those of the bodies in it."""
    stack = [program]
    while stack:
        p = stack.pop()
        yield p.graph
        stack.extend(n.attrs["body"] for n in p.graph if "body" in n.attrs)
