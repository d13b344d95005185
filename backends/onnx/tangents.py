"""Jacobian-vector products of a program that is being lowered, by the ops' `jvp` rules.

A rule builds graph: for each node on the way a small graph is made whose inputs stand for the node's operands,
its result and the operand's tangent, and that graph is lowered in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flowlang.backends.onnx.graph import Value
from flowlang.backends.onnx.lower import Lowering, Result, Unlowered

from flowlang.derive.programs import Program
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.ops import OPS

Tangent = Value | None


@dataclass
class Frame:
    """One lowered program with its values, and the frames of its calls."""

    lowering: Lowering
    program: Program
    calls: dict[int, tuple[Frame, str]]


class Tangents:
    """Lowers a body's values once; `linearise` gives the map of tangents at that point."""

    def __init__(self, w: Lowering, captured: Mapping[int, Result]):
        self.w, self.captured = w, captured

    def linearise(self, body: Program, point: Value) -> Callable[[Value], Value]:
        frame = Frame(Lowering(self.w.g, self.w.shared, self.w.weights, self.w.leads), body, {})
        primal(frame, {body.inputs[0]: point, **self.captured})

        def push(v: Value) -> Value:
            found = tangents(frame, {body.inputs[0]: v})[0]
            return frame.lowering.g.mul(v, 0.0) if found is None else found

        return push


def primal(frame: Frame, env: Mapping[int, Result]) -> list[Value]:
    """The values of a frame; calls of nets become frames of their own, so that their insides are at hand."""
    w, program = frame.lowering, frame.program
    w.graph, w.env = program.graph, dict(env)
    for i in sorted(program.graph.reachable(program.outputs)):
        if i in w.env:
            continue
        node = program.graph[i]
        if node.op != "call" or node.attrs.get("lifted"):
            w.env[i] = w.emit(node)
            continue
        region: Region = node.attrs["region"]
        inner = w.shared.program(region, node.attrs.get("method", "forward"))
        child = node.attrs["child"]
        callee = Frame(Lowering(w.g, w.shared, w.weights.child(child), w.leads), inner, {})
        with w.scope(child):
            found = primal(callee, dict(zip(inner.inputs, (w.value(k) for k in node.inputs), strict=True)))
        frame.calls[i] = callee, child
        w.env[i] = found[0] if len(found) == 1 else found
    return [w.value(o) for o in program.outputs]


def tangents(frame: Frame, entries: Mapping[int, Value]) -> list[Tangent]:
    """Tangents of a frame's outputs for tangents of some inputs."""
    w, graph = frame.lowering, frame.program.graph
    w.graph = graph
    known: dict[int, Tangent | list[Tangent]] = dict(entries)
    for i in sorted(graph.reachable(frame.program.outputs)):
        node = graph[i]
        if i in known or not any(known.get(k) is not None for k in node.inputs):
            continue
        if node.op == "get":
            many = known[node.inputs[0]]
            known[i] = many[node.attrs["index"]] if isinstance(many, list) else many
        elif i in frame.calls:
            callee, child = frame.calls[i]
            given = {p: t for p, k in zip(callee.program.inputs, node.inputs, strict=True)
                     if isinstance(t := known.get(k), Value)}  # fmt: skip
            with w.scope(child):
                results = tangents(callee, given)
            known[i] = results[0] if len(results) == 1 else results
        elif node.op in ("call", "repeat"):
            raise Unlowered(node, "its derivative needs copies or lifted axes to be opened", "use `mlp` in the block")
        else:
            known[i] = through(w, node, known)
    out: list[Tangent] = []
    for o in frame.program.outputs:
        t = known.get(o)
        assert not isinstance(t, list)
        out.append(t)
    return out


def through(w: Lowering, node: Node, known: Mapping[int, Tangent | list[Tangent]]) -> Tangent:
    """The tangent of one node: the sum of its operands' contributions."""
    total: Tangent = None
    rule = OPS[node.op].jvp
    for slot, k in enumerate(node.inputs):
        t = known.get(k)
        if not isinstance(t, Value):
            continue
        if rule is None:
            raise Unlowered(node, f"`{node.op}` has no derivative that is a graph", "use a smooth activation, as `elu`")
        small = Graph()
        b = Builder(small)
        args = [_stand_in(b, w.graph[i]) for i in node.inputs]
        out, tangent = _stand_in(b, node), _stand_in(b, w.graph[k])
        part = rule(b, node, args, out, slot, tangent)
        if part is None:
            continue
        env: dict[int, Result] = {a: w.env[i] for a, i in zip(args, node.inputs, strict=True)}
        env |= {out: w.env[node.id], tangent: t}
        value = Lowering(w.g, w.shared, w.weights, w.leads).run(small, [part], env)[0]
        names = small[part].tensor.names
        value = w.ordered(value, names, [a for a in node.tensor.names if a in names])
        total = value if total is None else w.g.add(total, value)
    return total


def _stand_in(b: Builder, node: Node) -> int:
    if node.op == "const" and not node.tensor.axes:
        return b.const(node.attrs["value"])
    return b.leaf("input", node.type, batched=node.batched, name="v", role="context")
