"""Forward-mode derivatives of whole nets, as programs: Jacobian-vector products and divergences.

Tangents may carry one more axis, of directions, so that one pass gives many products: along the unit
vectors it gives the Jacobian, and its trace is the exact divergence. Calls become calls of the callee's own
`jvp` program, so that code does not grow with the depth of the net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flowlang.derive.jvp import NoDerivative
from flowlang.derive.program import Program, prune
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.ops import OPS
from flowlang.ir.tangents import DIRECTION, FROZEN, PLUS, Tangents, basis, plain_method
from flowlang.ir.types import SCALAR, Axis, TensorType, TupleType


class DirectionalBuilder(Builder):
    """Ops on a tangent keep its axis of directions, which their attributes and partners do not name."""

    def __init__(self, graph: Graph, directions: int | None):
        super().__init__(graph)
        self.directions = directions

    def directional(self, id: int) -> bool:
        return self.directions is not None and self.type(id).has(DIRECTION)

    def op(self, name: str, *inputs: int, **attrs: Any) -> int:
        if name in ("mul", "add") and self.directional(inputs[1]) and not self.directional(inputs[0]):
            inputs = (inputs[1], inputs[0])  # directions stay in front, where a product with a matrix wants them
        if name in ("order", "expand", "join", "stack") and any(self.directional(i) for i in inputs):
            match name:
                case "order" if DIRECTION not in attrs["names"]:
                    attrs["names"] = (DIRECTION, *attrs["names"])
                case "expand" if all(n != DIRECTION for n, _ in attrs["axes"]):
                    attrs["axes"] = ((DIRECTION, self.directions), *attrs["axes"])
                case "join" | "stack":
                    inputs = self.alike(inputs)
        return super().op(name, *inputs, **attrs)

    def alike(self, parts: Sequence[int]) -> tuple[int, ...]:
        """Parts of a join with the axis of directions on each, axes in the order of the first."""
        wide = []
        for p in parts:
            axes = tuple((a.name, a.size) for a in self.type(p).axes if a.name != DIRECTION)
            wide.append(super().op("expand", p, axes=((DIRECTION, self.directions), *axes)))
        names = self.type(wide[0]).names
        return tuple(super(DirectionalBuilder, self).op("order", p, names=names) for p in wide)

    def expand(self, id: int, type: TensorType) -> int:
        if self.directional(id) and not type.has(DIRECTION):
            assert self.directions is not None
            type = TensorType((Axis(DIRECTION, self.directions), *type.axes))
        return super().expand(id, type)


# Slopes by the function's value, which is there: fewer passes than the ops' own slopes, whose digits in the tails (for logarithms)
# a tangent does not need.
BY_VALUE: dict[str, Callable[[Builder, int], int]] = {
    "tanh": lambda b, y: b.sub(b.const(1.0), b.op("square", y)),
    "sigmoid": lambda b, y: b.sub(y, b.op("square", y)),
}


class ForwardMode:
    """Builds one program: values and tangents side by side."""

    def __init__(self, region: Region, name: str, directions: int | None):
        self.region, self.source = region, region.graph
        self.directions = directions
        self.program = Program(name, region, Graph())
        self.b = DirectionalBuilder(self.program.graph, directions)
        self.values: dict[int, int] = {}
        self.tangents: dict[int, int] = {}
        self.parts: dict[tuple[int, int], int] = {}  # (call, result) -> tangent of that result

    # ---- inputs ---------------------------------------------------------------------------------

    def feed(self, n: int, role: str) -> int:
        node = self.source[n]
        label = node.label or str(node.attrs.get("name") or "x")
        new = self.b.leaf("input", node.type, batched=node.batched, span=node.span, label=label, name=label, role=role)
        self.values[n] = new
        self.program.inputs.append(new)
        return new

    def feed_tangent(self, n: int, type: TensorType) -> int:
        label = f"d_{self.source[n].label or 'x'}"
        new = self.b.leaf("input", type, batched=True, label=label, name=label, role="map")
        self.tangents[n] = new
        self.program.inputs.append(new)
        return new

    # ---- nodes ----------------------------------------------------------------------------------

    def run(self, outputs: Sequence[int]) -> None:
        for n in sorted(self.source.reachable(list(outputs))):
            if n not in self.values:
                self.evaluate(self.source[n])

    def evaluate(self, node: Node) -> None:
        self.b.span = node.span
        if node.op in ("call", "repeat"):
            self.call(node)
            return
        if node.op == "get":
            call, index = node.inputs[0], node.attrs["index"]
            self.values[node.id] = self.b.op_get(self.values[call], index, node.span)
            if (call, index) in self.parts:
                self.tangents[node.id] = self.parts[call, index]
            return
        if node.op in ("scan", "choose"):
            raise NoDerivative(node.id)
        args = [self.values[i] for i in node.inputs]
        out = self.values[node.id] = self.b.copy(node, args)
        if node.tensor.kind != "real":
            return  # a truth value or a whole number has no derivative, and what it chooses is locally constant
        total: int | None = None
        for slot, i in enumerate(node.inputs):
            if i not in self.tangents:
                continue
            rule = OPS[node.op].jvp
            if rule is None:
                raise NoDerivative(node.id)
            if node.op in BY_VALUE:
                part: int | None = self.b.mul(self.tangents[i], BY_VALUE[node.op](self.b, out))
            else:
                part = rule(self.b, node, args, out, slot, self.tangents[i])
            if part is not None:
                total = part if total is None else self.b.add(total, part)
        if total is not None:
            self.tangents[node.id] = total

    def tangent(self, n: int, type: TensorType) -> int:
        """The tangent of a value, zeros where it does not vary, axes in the given order."""
        if n in self.tangents:
            id = self.b.expand(self.tangents[n], type)
        else:
            id = self.b.const(0.0)
        if self.b.type(id).names != type.names:
            same = set(self.b.type(id).names) == set(type.names)
            axes = tuple((a.name, a.size) for a in type.axes)
            id = self.b.op("order", id, names=type.names) if same else self.b.op("expand", id, axes=axes)
        return id

    # ---- calls ----------------------------------------------------------------------------------

    def call(self, node: Node) -> None:
        callee: Region = node.attrs["region"]
        args = [self.values[i] for i in node.inputs]
        types = list(result_types(node.type))
        varying = [k for k, i in enumerate(node.inputs) if i in self.tangents]
        frozen = str(node.attrs.get("method", "forward")).startswith(FROZEN)
        plain = callee.kind in ("net", "norm") and plain_method(node.attrs) == "forward"
        if varying and not plain:
            raise NoDerivative(node.id)
        if not varying:
            new = self.b.graph.add(node.op, tuple(args), node.type, dict(node.attrs), span=node.span, label=node.label)
            self.values[node.id] = new.id
            return
        mapped = len(callee.inputs)
        if node.op == "repeat":  # what is carried varies from the second round on
            varying = sorted({*range(mapped), *varying})
        how = Tangents(tuple(varying), self.directions)
        inputs = args[:mapped] + [self.argument_tangent(node, k, how) for k in varying if k < mapped]
        inputs += args[mapped:] + [self.argument_tangent(node, k, how) for k in varying if k >= mapped]
        lifted = [Axis(n, s) for n, s in node.attrs.get("lifted", ())]
        moved = [self.result_tangent(t, lifted, how) for t in types]
        attrs = {**dict(node.attrs), "method": FROZEN * frozen + how.method, "tangents": how}
        if node.op == "repeat":
            attrs["carried"] = 2 * mapped
        new = self.b.graph.add(node.op, tuple(inputs), TupleType((*types, *moved)), attrs, span=node.span, batched=True)
        found = [self.b.op_get(new.id, k, node.span) for k in range(2 * len(types))]
        for k in range(len(types)):
            self.parts[node.id, k] = found[len(types) + k]
        if isinstance(node.type, TensorType):
            self.values[node.id], self.tangents[node.id] = found
            if node.label:
                self.b.graph.relabel(found[0], node.label)
        else:
            self.values[node.id] = new.id

    def argument_tangent(self, node: Node, k: int, how: Tangents) -> int:
        """The tangent of an argument: lifted axes, then directions, then the callee's axes."""
        t = self.source[node.inputs[k]].tensor
        lifted = [Axis(n, s) for n, s in node.attrs.get("lifted", ()) if t.has(n)]
        return self.tangent(node.inputs[k], self.result_tangent(t, lifted, how))

    @staticmethod
    def result_tangent(t: TensorType, lifted: Sequence[Axis], how: Tangents) -> TensorType:
        own = how.type(TensorType(tuple(a for a in t.axes if a not in lifted)))
        return TensorType((*lifted, *own.axes))


def jvp_program(region: Region, how: Tangents) -> Program:
    """Values and tangents of a net's results.

    Inputs: the mapped ones, their tangents, the context, its tangents; results: values, then tangents.
    Raises NoDerivative where an op has no derivative that is a graph.
    """
    mode = ForwardMode(region, how.method, how.directions)
    arguments = [*region.inputs, *region.context]
    for part, offset, role in ((region.inputs, 0, "map"), (region.context, len(region.inputs), "context")):
        for n in part:
            mode.feed(n, role)
        for k in how.slots:
            if offset <= k < offset + len(part):
                mode.feed_tangent(arguments[k], how.type(region.graph[arguments[k]].tensor))
    mode.run(region.outputs)
    outputs = [mode.values[o] for o in region.outputs]
    outputs += [mode.tangent(o, how.type(region.graph[o].tensor)) for o in region.outputs]
    mode.program.outputs = outputs
    return prune(mode.program)


def divergence_program(region: Region, *, exact: bool = True) -> Program:
    """A field's value and its divergence in the first input, for each sample.

    `exact`: the trace over all unit vectors, in one pass of D directions. Otherwise Hutchinson's estimate
    e·(J e), with e one more input after the first (Grathwohl et al. 2019, eq. 7).
    """
    x, out = region.inputs[0], region.outputs[0]
    t = region.graph[x].tensor
    mode = ForwardMode(region, "divergence" if exact else "divergence_along", t.count if exact else None)
    for n in region.inputs:
        mode.feed(n, "map")
    b = mode.b
    if exact:
        mode.tangents[x] = b.op("order", basis(b, t), names=(DIRECTION, *t.names)) if t.axes else b.const(1.0)
        if not t.axes:
            mode.directions = b.directions = None
    else:
        mode.feed_tangent(x, t)
    for n in region.context:
        mode.feed(n, "context")
    start = mode.tangents[x]
    mode.run([out])
    if out in mode.tangents:
        product = b.mul(start, mode.tangent(out, b.type(start)))
        trace = b.op("sum", product, axes=b.type(product).names) if b.type(product).names else product
    else:
        trace = b.const(0.0)
    mode.program.outputs = [mode.values[out], trace]
    assert b.type(trace) == SCALAR
    return prune(mode.program)


def divergence_plus(region: Region, probes: int) -> Program:
    """A field's value and Hutch++'s estimate of its divergence (Meyer et al. 2021, arXiv 2010.09649, algorithm 1).

    Of twice `probes` directions the first ones sketch the Jacobian: Q is an orthonormal base of J·S, and the trace on its
    span is exact. The others, less their parts in it, average what is left. Q has no gradient: given any Q the estimate
    is unbiased, and so is its gradient.
    """
    x, out = region.inputs[0], region.outputs[0]
    t = region.graph[x].tensor
    mode = ForwardMode(region, f"{PLUS}{probes}", probes)
    for n in region.inputs:
        mode.feed(n, "map")
    mode.feed_tangent(x, TensorType((Axis(DIRECTION, 2 * probes), *t.axes)))
    for n in region.context:
        mode.feed(n, "context")
    fed, noise = dict(mode.values), mode.tangents[x]
    graph = mode.program.graph
    b = Builder(graph)
    mode.tangents[x] = b.op("slice", noise, axis=DIRECTION, start=0, stop=probes)
    mode.run([out])
    if out not in mode.tangents:
        mode.program.outputs = [mode.values[out], b.const(0.0)]
        return prune(mode.program)
    sketch = b.op("stop", mode.tangent(out, TensorType((Axis(DIRECTION, probes), *t.axes))))
    sketch = b.op(
        "order", b.expand(sketch, TensorType((Axis(DIRECTION, probes), *t.axes))), names=(DIRECTION, *t.names)
    )

    def dot(u: int, v: int) -> int:
        return b.op("contract", u, v, axes=t.names) if t.axes else b.mul(u, v)

    def cleared(u: int, base: list[int]) -> int:
        for q in base:
            u = b.sub(u, b.mul(q, dot(q, u)))
        return u

    base: list[int] = []
    for k in range(probes):
        u = b.op("pick", sketch, axis=DIRECTION, index=k)
        for _ in range(3):  # again and again, so that what is left of a dependent one is orthogonal too
            u = cleared(u, base)
            size = b.op("sqrt", b.add(dot(u, u), b.const(1e-30)))
            u = b.op("div", u, size)
        base.append(u)
    rest = [cleared(cleared(b.op("pick", noise, axis=DIRECTION, index=probes + k), base), base) for k in range(probes)]
    again = ForwardMode(region, mode.program.name, 2 * probes)
    again.program, again.b = mode.program, DirectionalBuilder(graph, 2 * probes)
    again.values = fed
    along = b.op("stack", *base, *rest, axis=DIRECTION)
    along = b.op("order", along, names=(DIRECTION, *t.names))
    again.tangents[x] = b.op("stop", along)
    again.run([out])
    product = again.b.mul(again.tangents[x], again.tangent(out, b.type(along)))
    each = b.op("sum", product, axes=tuple(n for n in b.type(product).names if n != DIRECTION)) if t.axes else product
    exact = b.op("sum", b.op("slice", each, axis=DIRECTION, start=0, stop=probes), axes=(DIRECTION,))
    left = b.op("mean", b.op("slice", each, axis=DIRECTION, start=probes, stop=2 * probes), axes=(DIRECTION,))
    mode.program.outputs = [again.values[out], b.add(exact, left)]
    return prune(mode.program)


__all__ = ["DIRECTION", "NoDerivative", "Tangents", "divergence_plus", "divergence_program", "jvp_program"]
