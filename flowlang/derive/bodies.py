"""The graphs that solvers run: what a bracketing step, one round of a scan or a residual computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowlang.analysis.dependence import Supports
from flowlang.derive.plan import Order, Scan
from flowlang.derive.program import Program, prune
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node
from flowlang.ir.interval import Interval
from flowlang.ir.relation import Support
from flowlang.ir.types import Axis, TensorType

if TYPE_CHECKING:
    from flowlang.derive.replay import Replay

WHOLE = "all"  # the one axis of a value that is flattened for its shape alone
RASTER = "raster"  # the axis that a scan over several axes runs along


class Body:
    """A graph with one entry, what it captures from outside, and its results."""

    def __init__(self, replay: Replay):
        self.replay = replay
        self.graph = Graph()
        self.b = Builder(self.graph)
        self.env: dict[int, int] = {}
        self.inputs: list[int] = []
        self.outer: list[int] = []
        self._captured: dict[int, int] = {}

    def input(self, node: Node, type_: TensorType) -> int:
        name = node.label or "u"
        new = self.b.leaf("input", type_, batched=True, label=name, name=name, role="map")
        self.inputs.append(new)
        return new

    def entry(self, node: Node) -> None:
        self.env[node.id] = self.input(node, node.tensor)

    def capture(self, n: int) -> int:
        """A value of the enclosing program as an input here."""
        source = self.replay.source[n]
        if source.op == "const" and not source.tensor.axes:
            return self.b.copy(source, ())
        outer = self.replay.value(n)
        if outer not in self._captured:
            node = self.replay.b.graph[outer]
            label = node.label
            support = self.support(n)
            known: dict[str, Any] = {} if support is None else {"support": support}
            self._captured[outer] = self.b.leaf(
                "input",
                node.type,
                batched=node.batched,
                label=label,
                name=label or f"v{outer}",
                role="context",
                **known,
            )
            self.inputs.append(self._captured[outer])
            self.outer.append(outer)
        return self._captured[outer]

    def support(self, n: int) -> Support | None:
        """Where a captured value may be other than 0; scans keep it for their schedule."""
        return None

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

    def outer_of(self, n: int) -> int | None:
        """The value outside that a node of the source was captured from."""
        inside = self.env.get(n)
        return next((o for o, i in self._captured.items() if i == inside), None)

    def ordered(self, n: int, like: TensorType) -> int:
        value = self.value(n)
        return value if self.b.type(value).names == like.names else self.b.op("order", value, names=like.names)

    def program(self, outputs: list[int]) -> Program:
        p = Program("body", self.replay.region, self.graph, list(self.inputs), outputs)
        return prune(p)


class ScanBody(Body):
    """One round of a scan: dropped values from what is solved so far, then the slice's own steps.

    Several scanned axes are one merged axis outside; the body splits it again.
    """

    def __init__(self, replay: Replay, step: Scan):
        super().__init__(replay)
        self.step = step
        self.dropped = set(step.dropped)
        self.region = set(step.region)
        u = replay.source[step.entry]
        self.flat, self.axis, self.reverse = flat_type(u.tensor, step.order)
        self.supports = Supports(replay.source)
        self.env[u.id] = unflatten(self.b, self.input(u, self.flat), u.tensor, step.order)

    def support(self, n: int) -> Support | None:
        return self.supports.of(n)

    def known(self, n: int) -> int:
        """A value known at the slice: a dropped one at the current estimate, any other from outside."""
        if n in self.dropped:
            self.forward(n)
        return self.value(n)

    def forward(self, n: int) -> None:
        """The forward value of a node at the current estimate of the entry."""
        source = self.replay.source
        needed: set[int] = set()
        stack = [n]
        while stack:
            i = stack.pop()
            if i in self.region and i not in needed and i not in self.env:
                needed.add(i)
                stack.extend(source[i].inputs)
        for i in sorted(needed):
            self.evaluate(source[i])


def flat_type(t: TensorType, order: Order) -> tuple[TensorType, str, bool]:
    """The type, axis and direction of a scan's loop: several axes become one, the slowest first."""
    if len(order) == 1:
        return t, order[0][0], order[0][1]
    names = [a for a, _ in order]
    size = 1
    for n in names:
        size *= t.size(n)
    return TensorType((Axis(RASTER, size), *(a for a in t.axes if a.name not in names))), RASTER, False


def flatten(b: Builder, value: int, order: Order) -> int:
    if len(order) == 1:
        return value
    names = [a for a, _ in order]
    for a, reverse in order:
        if reverse:
            value = b.op("reverse", value, axis=a)
    value = b.op("order", value, names=(*names, *(n for n in b.type(value).names if n not in names)))
    return b.op("merge", value, axes=tuple(names), into=RASTER)


def unflatten(b: Builder, value: int, t: TensorType, order: Order) -> int:
    if len(order) == 1:
        return value
    value = b.op("split", value, axis=RASTER, into=tuple((a, t.size(a)) for a, _ in order))
    for a, reverse in order:
        if reverse:
            value = b.op("reverse", value, axis=a)
    return b.op("order", value, names=t.names)


def placeholder(domain: Interval) -> float:
    """A value inside the entry's domain for slices that are not solved yet (A13)."""
    if domain.contains(0.0) and domain.lo < 0.0 < domain.hi:
        return 0.0
    if domain.finite:
        return (domain.lo + domain.hi) / 2
    return domain.lo + 1.0 if domain.lo != float("-inf") else domain.hi - 1.0
