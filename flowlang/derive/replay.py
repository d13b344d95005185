"""Builds a program by giving values to the nodes of a region's graph: forward, or along a plan's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowlang.derive.blocks import solve_block, weigh_block
from flowlang.derive.bodies import WHOLE, Body, ScanBody, flatten, placeholder, unflatten
from flowlang.derive.bottleneck import solve_bottleneck, weigh_bottleneck
from flowlang.derive.jvp import tangent
from flowlang.derive.linear import solve_linear, weigh_linear
from flowlang.derive.lowrank import solve_low_rank, weigh_low_rank
from flowlang.derive.plan import (
    Block,
    Bottleneck,
    CallInverse,
    Digits,
    FixedPoint,
    Gather,
    Integrate,
    Linear,
    LowRank,
    Plan,
    Polar,
    Scalar,
    Scan,
    Solve,
    Step,
    Unjoin,
    call_results,
    mapped_slots,
)
from flowlang.derive.polar import solve_polar, weigh_polar
from flowlang.derive.program import Program, draws_noise, is_random, prune
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.interval import REAL
from flowlang.ir.ops import OPS
from flowlang.ir.ops.control import Series
from flowlang.ir.tangents import probes_of, trace_method
from flowlang.ir.types import SCALAR, Axis, TensorType, TupleType


class Replay:
    """Builds a program by giving values to the nodes of a region's graph."""

    def __init__(self, region: Region, plan: Plan | None, name: str, graph: Graph | None = None):
        self.region = region
        self.source = region.graph
        self.plan = plan
        self.weighed = frozenset(plan.inverted_calls()) if plan is not None else frozenset()
        self.program = Program(name, region, Graph() if graph is None else graph)
        self.b = Builder(self.program.graph)
        self.env: dict[int, int] = {}
        self.weights: list[int] = []  # log-dets and weights, scalars for each sample
        self.lazy: dict[int, Any] = {}  # emissions that are sampled when first needed
        self.score = name in ("score", "generate")
        self.initialising = name == "initialise"
        self.training: bool | None = None  # the mode, where the program is for one alone
        forward = name in ("forward", "score", "initialise")
        self.live = {u.state: u for u in region.updates if u.live is not None} if forward else {}
        self.starts = {s.param: s for s in region.starts} if self.initialising else {}

    # ---- inputs and outputs ---------------------------------------------------------------------

    def feed(self, node: int, *, context: bool = False) -> int:
        n = self.source[node]
        label = n.label or n.attrs.get("name")
        new = self.b.leaf(
            "input",
            n.type,
            batched=n.batched,
            span=n.span,
            label=label,
            name=label,
            role="context" if context else "map",
        )
        self.env[node] = new
        self.program.inputs.append(new)
        if context:
            self.program.context += 1
        return new

    def feed_context(self) -> None:
        for c in self.region.context:
            self.feed(c, context=True)

    # ---- values ---------------------------------------------------------------------------------

    def value(self, n: int) -> int:
        if n in self.env:
            return self.env[n]
        todo: list[int] = [n]
        order: list[int] = []
        seen: set[int] = set()
        while todo:
            i = todo.pop()
            if i in self.env or i in seen:
                continue
            seen.add(i)
            if i in self.lazy:
                order.append(i)
                todo.extend(id for _, id in self.lazy[i])
                continue
            order.append(i)
            todo.extend(self.operands(i))
        simple = not self.lazy and not self.live and not self.starts
        for i in sorted(order) if simple else self._lazy_order(order):
            if i in self.env:
                continue
            if i in self.lazy:
                self.sample_emission(i)
            else:
                self.evaluate(self.source[i])
        return self.env[n]

    def operands(self, n: int) -> Sequence[int]:
        """What a value is made of here: a state in training and a parameter that starts are made, not read."""
        if n in self.live:
            live = self.live[n].live
            return () if live is None else (live,)
        if n in self.starts:
            return (self.starts[n].value,)
        node = self.source[n]
        return node.inputs if self.training is None else node.inputs_in(self.training)

    def leaf(self, n: int) -> None:
        """A state in training, or a parameter at its start."""
        node = self.source[n]
        if n in self.live:
            update = self.live[n]
            read = self.b.leaf(node.op, node.type, batched=False, span=node.span, label=node.label, **dict(node.attrs))
            live = read if update.live is None else self.value(update.live)
            self.env[n] = read  # the new value may read the old one
            inputs: tuple[int, ...] = (live, self.value(update.new))
            op = "running"
        else:
            inputs, op = (self.value(self.starts[n].value),), "start"
        made = self.b.graph.add(
            op, inputs, node.type, dict(node.attrs), span=node.span, label=node.label, batched=False
        )
        self.env[n] = made.id

    def _lazy_order(self, order: list[int]) -> list[int]:
        """Evaluation order when some values are sampled: their arguments come first."""
        out: list[int] = []
        state: dict[int, int] = {}
        for root in sorted(order):
            stack = [(root, False)]
            while stack:
                i, done = stack.pop()
                if done:
                    out.append(i)
                    continue
                if i in state or i in self.env:
                    continue
                state[i] = 1
                stack.append((i, True))
                inputs = [id for _, id in self.lazy[i]] if i in self.lazy else self.operands(i)
                stack.extend((j, False) for j in inputs)
        return out

    def evaluate(self, node: Node) -> None:
        if node.id in self.live or node.id in self.starts:
            self.leaf(node.id)
            return
        if node.op == "choose" and self.training is not None:
            self.env[node.id] = -1  # its results are those of the mode
            return
        if node.op == "get" and self.training is not None and self.source[node.inputs[0]].op == "choose":
            self.env[node.id] = self.env[self.operands(node.inputs[0])[node.attrs["index"]]]
            return
        if node.op == "get":
            self.env[node.id] = self.b.op_get(self.env[node.inputs[0]], node.attrs["index"], node.span)
            if node.label:
                self.b.graph.relabel(self.env[node.id], node.label)
            return
        if node.op in ("call", "repeat"):
            self.call(node)
            return
        if node.op == "integrate" and node.id in self.weighed:
            x, log_det = self.trajectory(node, self.value(node.inputs[0]))
            self.weights.append(log_det)
            self.env[node.id] = x
            if node.label:
                self.b.graph.relabel(x, node.label)
            return
        self.env[node.id] = self.b.copy(node, [self.value(i) for i in node.inputs])

    def sample_emission(self, n: int) -> None:
        emission = next(e for e in self.region.emissions if e.value == n)
        arguments = {k: self.value(id) for k, id in emission.arguments}
        assert emission.distribution is not None
        self.env[n] = emission.distribution.draw(self.b, self.source[n].tensor, arguments)
        self.program.random = True

    # ---- calls ----------------------------------------------------------------------------------

    def call(self, node: Node) -> None:
        """A call forward: values of its results; of a call that the plan inverts, its log-det among the weights.

        Any other call, of a bijector on a known value too, is part of a conditioner.
        """
        region: Region = node.attrs["region"]
        inputs = [self.value(i) for i in node.inputs]
        method = node.attrs.get("method", "forward")
        if node.id not in self.weighed:
            attrs = dict(node.attrs)
            if self.initialising and region.has_starts and region.kind in ("net", "norm") and method == "forward":
                attrs["method"] = "initialise"
            new = self.b.graph.add(node.op, tuple(inputs), node.type, attrs, span=node.span, label=node.label)
            self.env[node.id] = new.id
            return
        inner = self.map_method(region, method)
        if inner == "initialise":
            attrs = {**dict(node.attrs), "method": inner}
            new = self.b.graph.add(node.op, tuple(inputs), node.type, attrs, span=node.span, label=node.label)
            self.env[node.id] = new.id
            return
        types = list(result_types(node.type))
        if inner == "score":  # what leaves inside is scored there
            types = types[: len(region.outputs)]
        self.map_call(node, inner, inputs, types)

    def map_method(self, region: Region, method: str) -> str:
        """The method to run for a call in this direction."""
        if self.initialising and region.has_starts and method == "forward":
            return "initialise"
        if self.score and is_random(region):
            return {"forward": "score", "inverse": "generate"}[method]
        return method

    def map_call(self, node: Node, method: str, inputs: list[int], types: list[TensorType]) -> None:
        """Adds a call of a map: its results, and its log-det among the weights."""
        call, log_det = self.add_call(node, method, inputs, types)
        self.weights.append(log_det)
        values = [self.b.op_get(call, k, node.span) for k in range(len(types))]
        self.env[node.id] = values[0] if isinstance(node.type, TensorType) else call
        if node.label:
            for v in values:
                self.b.graph.relabel(v, node.label)

    def add_call(self, node: Node, method: str, inputs: list[int], types: list[TensorType]) -> tuple[int, int]:
        """The call with its log-det as one more result; and that log-det, summed over lifted axes."""
        region: Region = node.attrs["region"]
        lifted = TensorType(tuple(Axis(n, s) for n, s in node.attrs.get("lifted", ())))
        attrs = {**dict(node.attrs), "method": method, "log_det": True}
        call = self.b.graph.add(node.op, tuple(inputs), TupleType((*types, lifted)), attrs, span=node.span).id
        if method in ("score", "generate"):
            self.program.random = self.program.random or draws_noise(region, method)
        return call, self.b.sum_all(self.b.op_get(call, len(types), node.span))

    # ---- inverse steps --------------------------------------------------------------------------

    def run_steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.run_step(step)

    def run_step(self, step: Step) -> None:
        b, source = self.b, self.source
        match step:
            case Solve(n, slot):
                node = source[n]
                operand = source[node.inputs[slot]]
                rule = OPS[node.op].invert
                assert rule is not None
                args: list[int | None] = [None if k == slot else self.value(i) for k, i in enumerate(node.inputs)]
                b.span = node.span
                found = rule(b, node, slot, args, self.value(n))
                self.bind(operand, found)
            case Unjoin(n):
                node = source[n]
                whole = self.value(n)
                at = 0
                for k, i in enumerate(node.inputs):
                    part = source[i]
                    if node.op == "stack":
                        found = b.op("pick", whole, axis=node.attrs["axis"], index=k, span=node.span)
                    else:
                        size = part.tensor.size(node.attrs["axis"])
                        found = b.op("slice", whole, axis=node.attrs["axis"], start=at, stop=at + size, span=node.span)
                        at += size
                    self.bind(part, found)
            case Gather(v, parts):
                axis = source[parts[0]].attrs["axis"]
                pieces = []
                for m in parts:
                    piece = self.value(m)
                    if source[m].op == "pick":
                        t = b.type(piece)
                        piece = b.op("expand", piece, axes=((axis, 1), *((a.name, a.size) for a in t.axes)))
                    pieces.append(b.op("order", piece, names=source[v].tensor.names))
                self.bind(source[v], b.op("join", *pieces, axis=axis, span=source[v].span))
            case Digits(n, whole, fraction):
                self.bind(source[source[n].inputs[whole]], b.op("whole_part", self.value(n), span=source[n].span))
                self.bind(source[source[n].inputs[fraction]], b.op("fraction_part", self.value(n), span=source[n].span))
            case CallInverse(n):
                self.call_inverse(source[n])
            case Integrate(n):
                node = source[n]
                x, log_det = self.trajectory(node, self.value(n), backwards=True)
                self.weights.append(b.neg(log_det))
                self.bind(source[node.inputs[0]], x)
            case Scalar():
                self.solve_scalar(step)
            case Scan():
                self.solve_scan(step)
            case FixedPoint():
                self.solve_fixed_point(step)
            case LowRank():
                solve_low_rank(self, step)
            case Bottleneck():
                solve_bottleneck(self, step)
            case Block():
                solve_block(self, step)
            case Polar():
                solve_polar(self, step)
            case Linear():
                solve_linear(self, step)

    def bind(self, node: Node, value: int) -> None:
        """Records a solved value, its axes in the order that the forward graph has."""
        if self.b.type(value).names != node.tensor.names:
            value = self.b.op("order", value, names=node.tensor.names)
        if node.label:
            self.b.graph.relabel(value, node.label)
        self.env[node.id] = value

    def call_inverse(self, node: Node) -> None:
        region: Region = node.attrs["region"]
        mapped = mapped_slots(node, region)
        results = call_results(self.source, node)
        assert results is not None
        forward = node.attrs.get("method", "forward")
        method = "inverse" if forward == "forward" else "forward"
        if self.score and is_random(region):
            method = {"inverse": "generate", "forward": "score"}[method]
            results = results[: len(region.outputs) if forward == "forward" else len(region.inputs)]
        values = [self.value(r) for r in results]
        context = [self.value(i) for k, i in enumerate(node.inputs) if k not in mapped]
        types = [self.source[node.inputs[k]].tensor for k in mapped]
        call, log_det = self.add_call(node, method, [*values, *context], types)
        # Weights are those of the forward map; `generate` and `score` give them that way already.
        self.weights.append(self.b.neg(log_det) if method in ("inverse", "forward") else log_det)
        for k, slot in enumerate(mapped):
            self.bind(self.source[node.inputs[slot]], self.b.op_get(call, k, node.span))

    def trajectory(self, node: Node, start: int, *, backwards: bool = False) -> tuple[int, int]:
        """The other end of a trajectory, and the integral of the field's divergence along it (Chen et al. 2018)."""
        attrs = {**dict(node.attrs), "method": trace_method(node.attrs, node.tensor.count), "log_det": True}
        if backwards:
            attrs["start"], attrs["stop"] = attrs["stop"], attrs["start"]
        inputs = [start, *(self.value(i) for i in node.inputs[1:])]
        noise = probes_of(attrs["method"], node.tensor)
        if noise is not None:
            shape = {"kind": "normal", "axes": tuple((a.name, a.size) for a in noise.axes)}
            inputs.insert(1, self.b.graph.add("random_like", (), noise, shape, batched=True).id)
            self.program.random = True
        whole = self.b.graph.add("integrate", tuple(inputs), TupleType((node.tensor, SCALAR)), attrs, span=node.span)
        return self.b.op_get(whole.id, 0, node.span), self.b.op_get(whole.id, 1, node.span)

    # ---- solvers --------------------------------------------------------------------------------

    def solve_scalar(self, step: Scalar) -> None:
        source = self.source
        body = Body(self)
        u = source[step.entry]
        body.entry(u)
        for n in step.path:
            if n != step.entry:
                body.evaluate(source[n])
        slope = tangent(body.b, source, body.env, set(step.path), step.entry, step.exit)
        assert slope is not None
        slope = body.b.op("order", body.b.expand(slope, u.tensor), names=u.tensor.names)
        results = [body.ordered(step.exit, u.tensor), slope]
        target = self.ordered(self.value(step.exit), u.tensor)
        bounds = {body.outer_of(n): iv for n, iv in step.assumed}
        node = self.b.graph.add(
            "bracket_solve", (target, *body.outer), u.tensor,
            {
                "body": body.program(results), "increasing": step.increasing, "lo": step.domain.lo, "hi": step.domain.hi,
                "image": step.image, "domain": step.domain, "assumed": tuple(bounds.get(o, REAL) for o in body.outer),
            },
            span=source[step.exit].span,
        )  # fmt: skip
        self.bind(u, node.id)

    def ordered(self, value: int, like: TensorType) -> int:
        return value if self.b.type(value).names == like.names else self.b.op("order", value, names=like.names)

    def solve_scan(self, step: Scan) -> None:
        """One loop along the order's axes; several are merged into one for it."""
        u = self.source[step.entry]
        body = ScanBody(self, step)
        flat, axis = body.flat, body.axis
        inner = Slice(body)
        inner.run_steps(step.steps)
        found = flatten(body.b, inner.value(step.entry), step.order)
        node = self.b.graph.add(
            "scan_solve", (self.shaped(step, flat), *body.outer), flat,
            {"body": body.program([found]), "axis": axis, "reverse": body.reverse, "placeholder": placeholder(step.domain), "domain": step.domain,
             "levels": step.levels},
            span=self.source[step.exits[0]].span,
        )  # fmt: skip
        self.bind(u, unflatten(self.b, node.id, u.tensor, step.order))

    def shaped(self, step: Scan, flat: TensorType) -> int:
        """A value with the type (and the batch) that the scan has: only its shape is used."""
        parts = [self.flattened(self.value(e)) for e in step.exits]
        whole = parts[0] if len(parts) == 1 else self.b.op("join", *parts, axis=WHOLE)
        return self.b.op("split", whole, axis=WHOLE, into=tuple((a.name, a.size) for a in flat.axes))

    def flattened(self, value: int) -> int:
        names = self.b.type(value).names
        return self.b.op("merge", value, axes=names, into=WHOLE)

    def fixed_point_body(self, step: FixedPoint) -> tuple[Body, Program]:
        """g as a function of the entry, with exit = entry + g(entry)."""
        body = Body(self)
        u = self.source[step.entry]
        body.entry(u)
        inside, b = set(step.path), body.b
        total: int | None = None
        for n, negative in step.residual:
            for i in sorted(inside & self.source.reachable([n])):
                body.evaluate(self.source[i])
            g = b.neg(body.value(n)) if negative else body.value(n)
            total = g if total is None else b.add(total, g)
        assert total is not None
        total = b.expand(total, u.tensor)
        return body, body.program([b.op("order", total, names=u.tensor.names)])

    def solve_fixed_point(self, step: FixedPoint) -> None:
        u = self.source[step.entry]
        body, program = self.fixed_point_body(step)
        node = self.b.graph.add(
            "fixed_point_solve", (self.ordered(self.value(step.exit), u.tensor), *body.outer), u.tensor,
            {"body": program, "constant": step.constant}, span=self.source[step.exit].span,
        )  # fmt: skip
        self.bind(u, node.id)

    # ---- log-dets -------------------------------------------------------------------------------

    def weigh(self, steps: Sequence[Step]) -> None:
        """Adds the local log-det of every step, from forward values (A10)."""
        for step in steps:
            self.weigh_step(step)

    def weigh_step(self, step: Step) -> None:
        b, source = self.b, self.source
        match step:
            case Solve(n, slot):
                node = source[n]
                rule = OPS[node.op].log_det
                assert rule is not None
                b.span = node.span
                local = rule(b, node, slot, [self.value(i) for i in node.inputs], self.value(n))
                if local.value is not None:
                    operand = source[node.inputs[slot]].tensor
                    self.weights.append(b.total(local.value, [a for a in operand.axes if a.name not in local.consumed]))
            case Scalar():
                self.evaluate_path(step.path, step.entry)
                slope = tangent(b, source, self.env, set(step.path), step.entry, step.exit)
                assert slope is not None
                # Not 0 wherever the search found so, which may take more than the bounds of its graph.
                size = b.graph.annotate(b.log_abs(slope), proved=True)
                self.weights.append(b.total(size, source[step.entry].tensor.axes))
            case Scan():
                self.weigh(step.steps)
            case FixedPoint():
                self.weigh_fixed_point(step)
            case LowRank():
                weigh_low_rank(self, step)
            case Bottleneck():
                weigh_bottleneck(self, step)
            case Block():
                weigh_block(self, step)
            case Polar():
                weigh_polar(self, step)
            case Linear():
                weigh_linear(self, step)

    def weigh_fixed_point(self, step: FixedPoint) -> None:
        body, program = self.fixed_point_body(step)
        node = self.b.graph.add(
            "estimate_log_det", (self.value(step.entry), *body.outer), SCALAR, {"body": program, "series": Series()}, span=self.source[step.exit].span,
        )  # fmt: skip
        self.program.random = True
        self.weights.append(node.id)

    def evaluate_path(self, path: Sequence[int], entry: int) -> None:
        """Forward values of a path and of all that it reads: a solved exit does not bring its operands."""
        for n in path:
            for i in self.source[n].inputs if n != entry else ():
                self.value(i)
            self.value(n)

    def total_weight(self) -> int:
        out: int | None = None
        for w in self.weights:
            out = w if out is None else self.b.add(out, w)
        return out if out is not None else self.b.const(0.0)

    def score_random(self) -> None:
        """log p of emissions and -log q of draws, at this region (score and generate)."""
        for e in self.region.emissions:
            if e.distribution is not None:
                arguments = {k: self.value(i) for k, i in e.arguments}
                self.weights.append(e.distribution.total_log_prob(self.b, self.value(e.value), arguments))
        for d in self.region.draws:
            q = d.distribution.total_log_prob(self.b, self.value(d.value), {k: self.value(i) for k, i in d.arguments})
            self.weights.append(self.b.neg(q))

    def finish(self, outputs: list[int], *, log_det: bool) -> Program:
        self.program.outputs = outputs
        if log_det:
            self.program.outputs.append(self.total_weight())
            self.program.log_det = True
        return prune(self.program)


class Slice(Replay):
    """Replays the inner steps of a scan inside its body."""

    def __init__(self, body: ScanBody):
        super().__init__(body.replay.region, body.replay.plan, "body", body.graph)
        self.b = body.b
        self.body = body
        self.source = body.replay.source
        for e in body.step.exits:
            self.env[e] = body.capture(e)

    def value(self, n: int) -> int:
        if n in self.env:
            return self.env[n]
        if n in self.body.dropped or n not in self.body.region:
            self.env[n] = self.body.known(n)
            return self.env[n]
        for i in self.source[n].inputs:
            self.value(i)
        self.evaluate(self.source[n])
        return self.env[n]
