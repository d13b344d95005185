"""Programs of a region: forward, inverse, score and generate, as graphs of their own.

A bijector's `forward` and `inverse` also give their log|det J|. `score` and `generate` take care of
draws and emissions: `score` adds log p of what leaves and subtracts log q of what is drawn, so that
log p(x) = log p_base(z) + weight; `generate` samples what had left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flowlang.derive.jvp import tangent
from flowlang.derive.plan import (
    CallInverse,
    FixedPoint,
    Gather,
    LowRank,
    Plan,
    Scalar,
    Scan,
    Solve,
    Step,
    Unjoin,
)
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.ops import OPS
from flowlang.ir.types import SCALAR, Axis, TensorType, TupleType


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

    def output_types(self) -> list[TensorType]:
        return [self.graph[o].tensor for o in self.outputs]


def is_random(region: Region) -> bool:
    """Whether the region, or one below it, draws or scores an emission."""
    return any(r.draws or any(e.distribution is not None for e in r.emissions) for r in region.walk())


def is_map(region: Region) -> bool:
    return region.kind in ("bijector", "chain", "flow")


class Replay:
    """Builds a program by giving values to the nodes of a region's graph."""

    def __init__(self, region: Region, plan: Plan | None, name: str):
        self.region = region
        self.source = region.graph
        self.plan = plan
        self.program = Program(name, region, Graph())
        self.b = Builder(self.program.graph)
        self.env: dict[int, int] = {}
        self.weights: list[int] = []  # log-dets and weights, scalars for each sample
        self.lazy: dict[int, Any] = {}  # emissions that are sampled when first needed
        self.callee: dict[int, str] = {}  # method for calls that are evaluated here
        self.score = name in ("score", "generate")

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
            todo.extend(self.source[i].inputs)
        for i in sorted(order, key=lambda i: (i in self.lazy, i)) if not self.lazy else self._lazy_order(order):
            if i in self.env:
                continue
            if i in self.lazy:
                self.sample_emission(i)
            else:
                self.evaluate(self.source[i])
        return self.env[n]

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
                inputs = [id for _, id in self.lazy[i]] if i in self.lazy else self.source[i].inputs
                stack.extend((j, False) for j in inputs)
        return out

    def evaluate(self, node: Node) -> None:
        if node.op == "get":
            call = self.source[node.inputs[0]]
            self.env[node.id] = self.b.op_get(self.env[node.inputs[0]], node.attrs["index"], node.span)
            if node.label:
                self.b.graph.relabel(self.env[node.id], node.label)
            del call
            return
        if node.op in ("call", "repeat"):
            self.call(node)
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
        """A call forward: values of its results, and its log-det among the weights (for maps)."""
        region: Region = node.attrs["region"]
        inputs = [self.value(i) for i in node.inputs]
        method = node.attrs.get("method", "forward")
        if not is_map(region):
            new = self.b.graph.add(
                node.op, tuple(inputs), node.type, dict(node.attrs), span=node.span, label=node.label
            )
            self.env[node.id] = new.id
            return
        inner = self.map_method(region, method)
        types = list(result_types(node.type))
        if inner == "score":  # what leaves inside is scored there
            types = types[: len(region.outputs)]
        self.map_call(node, inner, inputs, types, [node.id])

    def map_method(self, region: Region, method: str) -> str:
        """The method to run for a call in this direction."""
        if self.score and is_random(region):
            return {"forward": "score", "inverse": "generate"}[method]
        return method

    def map_call(
        self, node: Node, method: str, inputs: list[int], types: list[TensorType], tuple_of: list[int]
    ) -> list[int]:
        """Adds a call of a map: its results and its log-det; registers results for `get` nodes."""
        lifted = tuple(node.attrs.get("lifted", ()))
        ld_type = TensorType(tuple(Axis(n, s) for n, s in lifted))
        attrs = {**dict(node.attrs), "method": method, "log_det": True}
        new = self.b.graph.add(node.op, tuple(inputs), TupleType((*types, ld_type)), attrs, span=node.span, label=None)
        region: Region = node.attrs["region"]
        if method in ("score", "generate") and is_random(region):
            self.program.random = self.program.random or draws_noise(region, method)
        log_det = self.b.op_get(new.id, len(types), node.span)
        self.weights.append(self.b.sum_all(log_det))
        values = [self.b.op_get(new.id, k, node.span) for k in range(len(types))]
        if isinstance(node.type, TensorType):
            self.env[node.id] = values[0]
        else:
            self.env[node.id] = new.id
        for v in values:
            if node.label:
                self.b.graph.relabel(v, node.label)
        del tuple_of
        return values

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
            case CallInverse(n):
                self.call_inverse(source[n])
            case Scalar():
                self.solve_scalar(step)
            case Scan():
                self.solve_scan(step)
            case FixedPoint():
                self.solve_fixed_point(step)
            case LowRank():
                from flowlang.derive.lowrank import solve_low_rank

                solve_low_rank(self, step)

    def bind(self, node: Node, value: int) -> None:
        """Records a solved value, its axes in the order that the forward graph has."""
        if self.b.type(value).names != node.tensor.names:
            value = self.b.op("order", value, names=node.tensor.names)
        if node.label:
            self.b.graph.relabel(value, node.label)
        self.env[node.id] = value

    def call_inverse(self, node: Node) -> None:
        region: Region = node.attrs["region"]
        from flowlang.derive.invert import mapped_slots

        mapped = mapped_slots(node, region)
        if isinstance(node.type, TensorType):
            results = [node.id]
        else:
            gets = {u.attrs["index"]: u.id for u, _ in self.source.users(node.id) if u.op == "get"}
            results = [gets[k] for k in range(len(gets))]
        forward = node.attrs.get("method", "forward")
        method = "inverse" if forward == "forward" else "forward"
        random = self.score and is_random(region)
        main = len(region.outputs) if forward == "forward" else len(region.inputs)
        if random:
            method = {"inverse": "generate", "forward": "score"}[method]
        used = results[:main] if random else results
        values = [self.value(r) for r in used]
        context = [self.value(i) for k, i in enumerate(node.inputs) if k not in mapped]
        types = [self.source[node.inputs[k]].tensor for k in mapped]
        found = self.map_call_types(node, method, [*values, *context], types)
        for k, v in zip(mapped, found, strict=True):
            self.bind(self.source[node.inputs[k]], v)

    def map_call_types(self, node: Node, method: str, inputs: list[int], types: list[TensorType]) -> list[int]:
        lifted = tuple(node.attrs.get("lifted", ()))
        ld_type = TensorType(tuple(Axis(n, s) for n, s in lifted))
        attrs = {**dict(node.attrs), "method": method, "log_det": True}
        new = self.b.graph.add(node.op, tuple(inputs), TupleType((*types, ld_type)), attrs, span=node.span)
        region: Region = node.attrs["region"]
        if method in ("score", "generate"):
            self.program.random = self.program.random or draws_noise(region, method)
        log_det = self.b.sum_all(self.b.op_get(new.id, len(types), node.span))
        # Weights are those of the forward map; `generate` and `score` give them that way already.
        self.weights.append(self.b.neg(log_det) if method in ("inverse", "forward") else log_det)
        return [self.b.op_get(new.id, k, node.span) for k in range(len(types))]

    # ---- solvers --------------------------------------------------------------------------------

    def sub_body(self) -> Body:
        return Body(self)

    def solve_scalar(self, step: Scalar) -> None:
        source = self.source
        body = self.sub_body()
        u = source[step.entry]
        x = body.entry(u)
        for n in step.path:
            if n != step.entry:
                body.evaluate(source[n])
        slope = tangent(body.b, source, body.env, set(step.path), step.entry, step.exit)
        assert slope is not None
        slope = body.b.expand(slope, u.tensor)
        exit_value = body.ordered(step.exit, u.tensor)
        slope = body.b.op("order", slope, names=u.tensor.names)
        target = self.value(step.exit)
        if self.b.type(target).names != u.tensor.names:
            target = self.b.op("order", target, names=u.tensor.names)
        node = self.b.graph.add(
            "bracket_solve", (target, *body.outer), u.tensor,
            {
                "body": body.program([exit_value, slope]), "increasing": step.increasing, "lo": step.domain.lo,
                "hi": step.domain.hi, "image": step.image, "domain": step.domain,
            },
            span=source[step.exit].span,
        )  # fmt: skip
        del x
        self.bind(u, node.id)

    def solve_scan(self, step: Scan) -> None:
        source = self.source
        u = source[step.entry]
        body = ScanBody(self, step)
        found = body.run()
        target = self.value(step.exit)
        node = self.b.graph.add(
            "scan_solve", (target, *body.outer), u.tensor,
            {"body": body.program([found]), "axis": step.axis, "reverse": step.reverse, "placeholder": placeholder(u)},
            span=source[step.exit].span,
        )  # fmt: skip
        self.bind(u, node.id)

    def solve_fixed_point(self, step: FixedPoint) -> None:
        source = self.source
        u = source[step.entry]
        body = self.sub_body()
        body.entry(u)
        for n in step.path:
            if n not in (step.entry, step.exit):
                body.evaluate(source[n])
        residual = body.ordered(step.residual, u.tensor)
        target = self.value(step.exit)
        node = self.b.graph.add(
            "fixed_point_solve", (target, *body.outer), u.tensor,
            {"body": body.program([residual]), "constant": step.constant}, span=source[step.exit].span,
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
                for n in step.path:
                    for i in source[n].inputs if n != step.entry else ():
                        self.value(i)  # the solved value stands for the exit, so its operands may be new here
                    self.value(n)
                slope = tangent(b, source, self.env, set(step.path), step.entry, step.exit)
                assert slope is not None
                self.weights.append(b.total(b.log_abs(slope), source[step.entry].tensor.axes))
            case Scan():
                self.weigh(step.steps)
            case FixedPoint():
                self.weigh_fixed_point(step)
            case LowRank():
                from flowlang.derive.lowrank import weigh_low_rank

                weigh_low_rank(self, step)

    def weigh_fixed_point(self, step: FixedPoint) -> None:
        source = self.source
        u = source[step.entry]
        body = self.sub_body()
        body.entry(u)
        for n in step.path:
            if n not in (step.entry, step.exit):
                body.evaluate(source[n])
        residual = body.ordered(step.residual, u.tensor)
        node = self.b.graph.add(
            "estimate_log_det", (self.value(step.entry), *body.outer), SCALAR,
            {"body": body.program([residual]), "constant": step.constant}, span=source[step.exit].span,
        )  # fmt: skip
        self.program.random = True
        self.weights.append(node.id)

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


class Body:
    """The graph that a solver runs: one entry, what it captures from outside, its results."""

    def __init__(self, replay: Replay):
        self.replay = replay
        self.graph = Graph()
        self.b = Builder(self.graph)
        self.env: dict[int, int] = {}
        self.inputs: list[int] = []
        self.outer: list[int] = []
        self._captured: dict[int, int] = {}

    def entry(self, node: Node) -> int:
        new = self.b.leaf(
            "input", node.tensor, batched=True, label=node.label or "u", name=node.label or "u", role="map"
        )
        self.env[node.id] = new
        self.inputs.append(new)
        return new

    def capture(self, n: int) -> int:
        """A value of the enclosing program as an input here."""
        source = self.replay.source[n]
        if source.op == "const" and not source.tensor.axes:
            return self.b.copy(source, ())
        outer = self.replay.value(n)
        if outer not in self._captured:
            node = self.replay.b.graph[outer]
            label = node.label
            self._captured[outer] = self.b.leaf(
                "input", node.type, batched=node.batched, label=label, name=label or f"v{outer}", role="context"
            )
            self.inputs.append(self._captured[outer])
            self.outer.append(outer)
        return self._captured[outer]

    def value(self, n: int) -> int:
        if n not in self.env:
            self.env[n] = self.capture(n)
        return self.env[n]

    def evaluate(self, node: Node) -> None:
        if node.id in self.env:
            return
        if node.op == "get":
            self.env[node.id] = self.b.op_get(self.value(node.inputs[0]), node.attrs["index"], node.span)
            return
        inputs = [self.value(i) for i in node.inputs]
        if node.op in ("call", "repeat"):
            new = self.b.graph.add(
                node.op, tuple(inputs), node.type, dict(node.attrs), span=node.span, label=node.label
            )
            self.env[node.id] = new.id
            return
        self.env[node.id] = self.b.copy(node, inputs)

    def ordered(self, n: int, like: TensorType) -> int:
        value = self.value(n)
        return value if self.b.type(value).names == like.names else self.b.op("order", value, names=like.names)

    def program(self, outputs: list[int]) -> Program:
        p = Program("body", self.replay.region, self.graph, list(self.inputs), outputs)
        return prune(p, keep_inputs=True)


class ScanBody(Body):
    """One round of a scan: dropped values from what is solved so far, then the slice's own steps."""

    def __init__(self, replay: Replay, step: Scan):
        super().__init__(replay)
        self.step = step
        self.dropped = set(step.dropped)
        self.unknown = set(step.unknown)
        self.solved: dict[int, int] = {}
        u = replay.source[step.entry]
        self.current = self.entry(u)

    def run(self) -> int:
        self.solved[self.step.exit] = self.capture(self.step.exit)
        inner = _Slice(self)
        inner.run_steps(self.step.steps)
        return inner.env[self.step.entry]

    def slice_value(self, n: int) -> int:
        """A value known at the slice: dropped ones from the current estimate, others captured."""
        if n in self.dropped:
            return self.current_value(n)
        return self.value(n)

    def current_value(self, n: int) -> int:
        """The forward value of a node at the current estimate of the entry."""
        source = self.replay.source
        needed: list[int] = []
        stack = [n]
        seen: set[int] = set()
        below = self.below()
        while stack:
            i = stack.pop()
            if i in seen or i in self.env:
                continue
            seen.add(i)
            if i in below:
                needed.append(i)
                stack.extend(source[i].inputs)
        for i in sorted(needed):
            self.evaluate(source[i])
        return self.value(n)

    def below(self) -> set[int]:
        if not hasattr(self, "_below"):
            from flowlang.derive.invert import descendants

            self._below = descendants(self.replay.source, [self.step.entry])
        return self._below


class _Slice(Replay):
    """Replays the inner steps of a scan inside its body."""

    def __init__(self, body: ScanBody):
        outer = body.replay
        self.region, self.source, self.plan = outer.region, outer.source, outer.plan
        self.program = Program("body", outer.region, body.graph)
        self.b = body.b
        self.env = dict(body.solved)
        self.weights = []
        self.lazy = {}
        self.callee = {}
        self.score = False
        self.body = body
        self.fresh = {body.step.entry, *body.step.unknown}

    def value(self, n: int) -> int:
        if n in self.env:
            return self.env[n]
        if n in self.body.dropped or n not in self.body.below():
            self.env[n] = self.body.slice_value(n)
            return self.env[n]
        node = self.source[n]
        for i in node.inputs:
            self.value(i)
        self.evaluate(node)
        return self.env[n]


def placeholder(u: Node) -> float:
    """A value inside the entry's domain for slices that are not solved yet (A13)."""
    from flowlang.ir.domains import Domain

    domain = u.attrs.get("domain")
    if not isinstance(domain, Domain) or domain.interval.contains(0.0):
        return 0.0
    iv = domain.interval
    if iv.finite:
        return (iv.lo + iv.hi) / 2
    return iv.lo + 1.0 if iv.lo != float("-inf") else iv.hi - 1.0


def draws_noise(region: Region, method: str) -> bool:
    if method == "score":
        return any(r.draws for r in region.walk())
    return any(any(e.distribution is not None for e in r.emissions) for r in region.walk())


def prune(program: Program, keep_inputs: bool = False) -> Program:
    """Drops what no result needs; ids are renumbered in order."""
    graph = program.graph
    needed = graph.reachable([*program.outputs, *program.inputs])
    new = Graph()
    env: dict[int, int] = {}
    for n in sorted(needed):
        node = graph[n]
        added = new.add(
            node.op,
            tuple(env[i] for i in node.inputs),
            node.type,
            node.attrs,
            span=node.span,
            label=node.label,
            batched=node.batched,
        )
        env[n] = added.id
    program.graph = new
    program.inputs = [env[i] for i in program.inputs]
    program.outputs = [env[o] for o in program.outputs]
    return program


# ---- the programs of a region -------------------------------------------------------------------


def build(region: Region, plan: Plan | None, name: str) -> Program:
    """The program `name` of a region: forward (nets and maps), inverse, score, generate; for flows also
    log_prob, sample, sample_and_log_prob."""
    if not is_map(region):
        r = Replay(region, None, "forward")
        for i in region.inputs:
            r.feed(i)
        r.feed_context()
        return r.finish([r.value(o) for o in region.outputs], log_det=False)
    assert plan is not None
    if name in ("forward", "score", "log_prob"):
        return forward_program(region, plan, name)
    return inverse_program(region, plan, name)


def forward_program(region: Region, plan: Plan, name: str) -> Program:
    score = name in ("score", "log_prob")
    r = Replay(region, plan, "score" if score else name)
    r.program.name = name
    for i in region.inputs:
        r.feed(i)
    r.feed_context()
    for d in region.draws:
        arguments = {k: r.value(i) for k, i in d.arguments}
        r.env[d.value] = d.distribution.draw(r.b, r.source[d.value].tensor, arguments)
        if r.source[d.value].label:
            r.b.graph.relabel(r.env[d.value], r.source[d.value].label or "")
        r.program.random = True
    outputs = [r.value(o) for o in region.outputs]
    emissions = [] if score else [r.value(e.value) for e in region.emissions]
    for e in region.emissions:
        if score and e.distribution is not None:
            r.value(e.value)
    r.weigh(plan.steps)
    if score:
        r.score_random()
    if name == "log_prob":
        assert region.base is not None
        arguments = {k: r.value(i) for k, i in region.base.arguments}
        r.weights.append(region.base.distribution.total_log_prob(r.b, outputs[0], arguments))
        return r.finish([], log_det=True)
    return r.finish([*outputs, *emissions], log_det=True)


def inverse_program(region: Region, plan: Plan, name: str) -> Program:
    sampling = name in ("sample", "sample_and_log_prob")
    generate = name == "generate" or sampling
    r = Replay(region, plan, "generate" if generate else name)
    r.program.name = name
    if not sampling:
        for o in region.outputs:
            r.feed(o)
        if not generate:
            for e in region.emissions:
                r.feed(e.value)
    r.feed_context()
    if sampling:
        assert region.base is not None
        arguments = {k: r.value(i) for k, i in region.base.arguments}
        for o in region.outputs:
            r.env[o] = region.base.distribution.draw(r.b, r.source[o].tensor, arguments)
        r.program.random = True
    if generate:
        for e in region.emissions:
            if e.distribution is not None:
                r.lazy[e.value] = list(e.arguments)
    r.run_steps(plan.steps)
    outputs = [r.value(i) for i in region.inputs]
    if name == "sample":
        return r.finish(outputs, log_det=False)
    r.weigh(plan.steps)
    if generate:
        r.score_random()
        if name == "sample_and_log_prob":
            assert region.base is not None
            arguments = {k: r.value(i) for k, i in region.base.arguments}
            r.weights.append(region.base.distribution.total_log_prob(r.b, r.env[region.outputs[0]], arguments))
        return r.finish(outputs, log_det=True)
    r.weights = [r.b.neg(w) for w in r.weights]
    return r.finish(outputs, log_det=True)
