"""Lowers programs to an ONNX graph: calls are inlined, and every op goes through one table of emitters.

A value is laid out `[*leads, *axes in type order]`. The leads are "batch" and, inside a call with lifted
axes, those. A value may lack leads or have 1 there (it broadcasts); its axes always have their full sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from flowlang.backends.onnx.graph import BOOL, REAL, Builder, Shape, Value, broadcast

from flowlang.derive.programs import Program
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.types import LIFTED, Axis, TensorType


class Weights(Protocol):
    """The parameters of one instance as used values (float64), and those of its children."""

    @property
    def identity(self) -> object:
        """What owns the parameters: one for all places that share it."""

    def value(self, name: str) -> Any: ...

    def child(self, name: str) -> Weights: ...

    def copies(self, name: str) -> Sequence[Weights]: ...


class Unlowered(Exception):
    """An op that ONNX cannot express here; the caller makes the diagnostic."""

    def __init__(self, node: Node, reason: str, suggestion: str):
        super().__init__(f"{node.op}: {reason}")
        self.node, self.reason, self.suggestion = node, reason, suggestion


@dataclass(frozen=True)
class Noise:
    """A random input: its name, kind (`standard_noise` of the PyTorch runtime) and parameters."""

    name: str
    kind: str
    shape: Shape
    df: float | None = None


Result = Value | list[Value]
Emitter = Callable[["Lowering", Node], Result]
EMITTERS: dict[str, Emitter] = {}


def emitter(*ops: str) -> Callable[[Emitter], Emitter]:
    def put(fn: Emitter) -> Emitter:
        for op in ops:
            assert op not in EMITTERS, op
            EMITTERS[op] = fn
        return fn

    return put


@dataclass
class Shared:
    """What all frames of one model share."""

    program: Callable[[Region, str], Program]
    noise: Callable[[str, str, Shape, float | None, Value | None], Value]
    splines: dict[tuple[Any, ...], tuple[Value, Value]] = field(default_factory=dict)  # by ids of values in `kept`
    kept: list[Any] = field(default_factory=list)
    groups: int = 0
    incremental: bool = True
    unroll: int = 0  # a loop of at most so many stages is written out
    written_out: int = 0  # the stages of the longest one that was
    training: bool = False  # the pass of a training step, and what it puts into states
    states: dict[tuple[int, str], tuple[Weights, Value]] = field(default_factory=dict)  # their newest values
    scans: bool = False  # whether a loop was written that could be incremental


class Lowering:
    """Lowers one program of one instance (or a solver's body) into the builder."""

    def __init__(self, g: Builder, shared: Shared, weights: Weights, leads: Shape):
        self.g, self.shared, self.weights, self.leads = g, shared, weights, leads
        self.graph = Graph()
        self.env: dict[int, Result] = {}
        self.field: Callable[[Value, Value], Value] | None = None  # what a solver's step calls

    def run(self, graph: Graph, outputs: Sequence[int], env: Mapping[int, Result]) -> list[Value]:
        """Values of a graph's outputs; its inputs are in `env`."""
        self.graph = graph
        self.env = dict(env)
        for n in sorted(needed(graph, outputs, self.shared.training)):
            if n not in self.env:
                self.env[n] = self.emit(graph[n])
        return [self.value(o) for o in outputs]

    def program(self, program: Program, arguments: Sequence[Value]) -> list[Value]:
        env = dict(zip(program.inputs, arguments, strict=True))
        effects = program.effects if self.shared.training else []
        found = self.run(program.graph, [*program.outputs, *(i for _, i in effects)], env)
        for (state, i), value in zip(effects, found[len(program.outputs) :], strict=True):
            self.keep(state, value, program.graph[i])
        return found[: len(program.outputs)]

    def keep(self, state: str, value: Value, node: Node) -> None:
        """A state's value after the pass; a later reader in the same pass sees it."""
        if len(self.g.stack) > 1:
            raise Unlowered(
                node, "a state that a loop renews has no output", "export what inference does, without `train`"
            )
        self.shared.states[id(self.weights.identity), state] = self.weights, value

    def emit(self, node: Node) -> Result:
        from flowlang.backends.onnx import emit, odes, solvers, splines  # noqa: F401 - they fill the table

        rule = EMITTERS.get(node.op)
        if rule is None:
            raise Unlowered(
                node, f"`{node.op}` has no ONNX form", DECLINED.get(node.op, "write it with other functions")
            )
        before, self.g.origin = self.g.origin, node
        found = rule(self, node)
        self.g.origin = before
        if isinstance(found, Value):
            self.name(found, node)
            if isinstance(node.type, TensorType):
                own = found.shape[found.rank - node.tensor.rank :]
                assert self.field is not None or own == node.tensor.shape, f"{node.op}: {found.shape} for {node.type}"
        return found

    def name(self, value: Value, node: Node) -> None:
        if value.node is not None and value.node.hint == value.node.op:
            value.node.hint = node.label or NAMES.get(node.op, node.op)

    # ---- operands -----------------------------------------------------------------------------------

    def value(self, n: int) -> Value:
        found = self.env[n]
        assert isinstance(found, Value)
        return found

    def type(self, n: int) -> TensorType:
        return self.graph[n].tensor

    def lead(self, v: Value, rank: int) -> Shape:
        """The leads that a value has."""
        return v.shape[: v.rank - rank]

    def ordered(self, v: Value, have: Sequence[str], want: Sequence[str]) -> Value:
        """Axes in another order; leads stay in front."""
        front = v.rank - len(have)
        return self.g.transpose(v, [*range(front), *(front + list(have).index(a) for a in want)])

    def aligned(self, n: int, target: TensorType) -> Value:
        """The operand with its axes where the result has them, so that it broadcasts there."""
        return self.align(self.value(n), self.type(n), target)

    def align(self, v: Value, t: TensorType, target: TensorType) -> Value:
        want = [a for a in target.names if t.has(a)]
        v = self.ordered(v, t.names, want)
        missing = [k - target.rank for k, a in enumerate(target.names) if not t.has(a)]
        if v.rank == t.rank:  # without leads, axes that are missing in front need not be written
            missing = [k for k in missing if any(t.has(a) for a in target.names[: k + target.rank])]
        return self.g.unsqueeze(v, missing)

    def full_axes(self, v: Value, axes: Sequence[Axis]) -> Value:
        """An aligned value with every axis of a type at its full size; leads as they are."""
        rank = len(axes)
        return self.g.expand(v, (*v.shape[: max(v.rank - rank, 0)], *(a.size for a in axes)))

    def number(self, v: Value) -> Value:
        """Booleans count as 0 and 1 in arithmetic."""
        return self.g.cast(v, REAL) if v.kind == BOOL else v

    def dim(self, n: int, axis: str) -> int:
        t = self.type(n)
        return t.position(axis) - t.rank

    def full(self, v: Value, rank: int, leads: Shape | None = None) -> Value:
        """The value with every lead of this frame."""
        leads = self.leads if leads is None else leads
        return self.g.expand(v, (*leads, *v.shape[v.rank - rank :]))

    def joint(self, values: Sequence[Value], rank: int) -> list[Value]:
        """Values of equal axes with equal leads."""
        lead = broadcast(*(self.lead(v, rank) for v in values))
        return [self.g.expand(v, (*lead, *v.shape[v.rank - rank :])) for v in values]

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self.g.scopes.append(name)
        try:
            yield
        finally:
            self.g.scopes.pop()

    @contextmanager
    def grouped(self, kind: str) -> Iterator[None]:
        """Nodes made here may become one function of the model (see `outline`)."""
        self.shared.groups += 1
        before, self.g.group = self.g.group, (self.shared.groups, kind)
        try:
            yield
        finally:
            self.g.group = before

    # ---- calls ----------------------------------------------------------------------------------------

    def lifted_argument(self, n: int, lifted: Sequence[tuple[str, int]]) -> Value:
        """An argument with the lifted axes in front of the callee's own, as leads."""
        v, t = self.value(n), self.type(n)
        if not lifted:
            return v
        # (Under another name where the callee has an axis of its own by that name.)
        apart = {a: a + LIFTED if t.has(a + LIFTED) else a for a, _ in lifted}
        front = [a for a in apart.values() if t.has(a)]
        own = [a for a in t.names if a not in front]
        v = self.ordered(v, t.names, [*front, *own])
        if not front and v.rank == t.rank:
            return v
        total = len(lifted) + len(own)
        return self.g.unsqueeze(v, [k - total for k, a in enumerate(apart.values()) if a not in front])

    def call(self, node: Node, weights: Weights, arguments: Sequence[Value], scope: str) -> list[Value]:
        """The results of a called region's program; lifted axes are axes again."""
        region: Region = node.attrs["region"]
        lifted = tuple(node.attrs.get("lifted", ()))
        program = self.shared.program(region, node.attrs.get("method", "forward"))
        inner = Lowering(self.g, self.shared, weights, (*self.leads, *(s for _, s in lifted)))
        with self.scope(scope):
            found = inner.program(program, arguments)
        out = []
        for v, o in zip(found, program.outputs, strict=True):
            t = program.graph[o].tensor
            if lifted:
                own = v.shape[v.rank - t.rank :]
                lead = self.lead(v, t.rank)
                front = lead[: max(len(lead) - len(lifted), 0)]
                v = self.g.expand(v, (*front, *(s for _, s in lifted), *own))
            out.append(v)
        return out


# In a deployed model a running statistic is its state, and a parameter that the first batch set is what it is.
SETTLED = ("running", "start")


def needed(graph: Graph, outputs: Sequence[int], training: bool = False) -> set[int]:
    """The nodes that results need at inference, or in training."""

    def inputs_of(node: Node) -> tuple[int, ...]:
        settled = node.op in SETTLED and not (training and node.op == "running")
        return () if settled else node.inputs_in(training)

    return graph.reachable(list(outputs), inputs_of)


NAMES = {
    "contract": "product", "random_like": "noise", "matrix_log_det": "log_det", "log_abs": "log_size", "call": "out",
}  # fmt: skip

# Ops without an emitter, with what to do instead; the registry test reads it.
DECLINED: dict[str, str] = {
    "paired": "pairs are for training; export the programs that sample or score",
    "eigen": "ONNX has no eigenvalues: compute this part outside, or write it by products of matrices",
}


def results_of(node: Node) -> int:
    return len(result_types(node.type))
