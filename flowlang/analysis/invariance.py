"""What scaling or shifting the input of a norm does to its result (Ba et al. 2016, table 1; Zhang & Sennrich 2019, table 1).

x becomes c·x with c > 0, or x + c, where c may vary along some axes (`B`: from sample to sample) and is one number
along the others. A value then becomes c^k·v, or v + s·c: its grade is k, or s; 0 means unchanged, None means that
nothing is shown. Grades follow from the ops as the text has them, so what is shown holds for every parameter.
Constants of at most `TINY` that are added beside a graded value (an eps) are left out, and the result says so.

A linear layer before the norm turns its own changes into these: scaling its weights or the data scales x as a whole,
scaling one weight vector scales a channel, a sample's scale is that of x there; adding one vector to every weight vector
shifts each sample by a number, shifting the data shifts each channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.types import TensorType

TINY = 1e-3
BATCH = "B"


@dataclass(frozen=True)
class Grade:
    """How a value follows c: its power or its multiple; the axes along which c varies there; whether an eps is left out."""

    of: Fraction | None
    along: frozenset[str] = frozenset()
    near: bool = False

    @property
    def fixed(self) -> bool:
        return self.of == 0


UNCHANGED = Grade(Fraction(0))
UNKNOWN = Grade(None)
Grades = Mapping[int, Grade]


@dataclass(frozen=True)
class Change:
    """What is done to the input: `scale` or `shift`, by a number that varies along axes; in which mode the norm runs."""

    kind: str
    along: frozenset[str]
    training: bool


def grade(region: Region, change: Change) -> Grade:
    """The grade of the region's first result."""
    inputs = {region.inputs[0]: Grade(Fraction(1), change.along)}
    return Follow(region, change, inputs).run()[0]


class Follow:
    """Grades of the nodes of one region."""

    def __init__(self, region: Region, change: Change, inputs: Grades):
        self.region, self.graph, self.change = region, region.graph, change
        self.known: dict[int, Grade] = dict(inputs)
        self.results: dict[int, tuple[Grade, ...]] = {}
        self.live = {u.state: u.live for u in region.updates if u.live is not None and change.training}

    def run(self) -> tuple[Grade, ...]:
        return tuple(self.of(o) for o in self.region.outputs)

    def of(self, root: int) -> Grade:
        stack = [root]
        while stack:
            n = stack[-1]
            missing = [i for i in self.needs(n) if i not in self.known]
            if n in self.known or not missing:
                if n not in self.known:
                    self.known[n] = self.evaluate(self.graph[n])
                stack.pop()
            else:
                stack.extend(missing)
        return self.known[root]

    def needs(self, n: int) -> Sequence[int]:
        live = self.live.get(n)
        if live is not None:
            return (live,)
        return self.graph[n].inputs_in(self.change.training)

    def evaluate(self, node: Node) -> Grade:
        live = self.live.get(node.id)
        if live is not None:
            return self.known[live]
        operands = [self.known[i] for i in self.needs(node.id)]
        if node.op == "choose":
            self.results[node.id] = tuple(operands)
            return UNCHANGED if all(g.fixed for g in operands) else UNKNOWN
        if node.op == "get":
            several = self.results.get(node.inputs[0])
            return several[node.attrs["index"]] if several is not None else operands[0]
        if node.op in ("call", "repeat"):
            return self.call(node, operands)
        if all(g.fixed for g in operands):
            return Grade(Fraction(0), near=any(g.near for g in operands))
        if not isinstance(node.type, TensorType) or any(g.of is None for g in operands):
            return UNKNOWN
        found = (scaled if self.change.kind == "scale" else shifted)(self.graph, node, operands)
        if found.fixed:
            return Grade(found.of, near=found.near)
        return found

    def call(self, node: Node, operands: list[Grade]) -> Grade:
        region: Region = node.attrs["region"]
        if node.attrs.get("method", "forward") != "forward":
            return UNKNOWN
        inputs = dict(zip([*region.inputs, *region.context], operands, strict=True))
        inner = Follow(region, self.change, inputs).run()
        # Parameters of the callee are constants, whatever its inputs are.
        if node.op == "repeat":  # a copy takes what the one before it gave: grades must be those it began with
            carried = operands[: node.attrs["carried"]]
            if any((a.of, a.along) != (b.of, b.along) for a, b in zip(carried, inner, strict=False)):
                inner = tuple(UNKNOWN for _ in inner)
        self.results[node.id] = inner
        return inner[0]


def adds(user: Node, slot: int) -> bool:
    """Whether an operand is added to the result: as a term, or as the offset of a convolution."""
    return user.op in ("add", "sub") or (user.op in ("conv", "conv_transpose") and slot == 2)


def without_effect(region: Region) -> list[Node]:
    """Parameters that may be shifted by any number along their axes without a change of a result while training.

    Asked only of regions that call a norm: elsewhere an offset that vanishes is what the author wrote.
    """
    graph = region.graph
    if not any(n.op == "call" and n.attrs["region"].kind == "norm" for n in graph):
        return []
    needed = graph.reachable(list(region.outputs))
    found = []
    for node in (graph[n] for n in sorted(needed)):
        if node.op != "param" or not node.tensor.axes or not any(adds(u, slot) for u, slot in graph.users(node.id)):
            continue
        along = frozenset(node.tensor.names)
        follow = Follow(region, Change("shift", along, True), {node.id: Grade(Fraction(1), along)})
        if all(follow.of(o).fixed for o in region.outputs):
            found.append(node)
    return found


# ---- rules --------------------------------------------------------------------------------------

SAME = ("neg", "identity", "abs", "relu", "leaky_relu", "expand", "stop", "within")
POOLED = ("sum", "mean", "reduce_max", "reduce_min", "batch_mean", "batch_sum", "batch_max", "batch_min")
COMPARED = ("gt", "ge", "lt", "le", "eq", "ne")


def removed(graph: Graph, node: Node) -> set[str]:
    """The axes that a reduction takes away, the batch as one of them."""
    axes = {*node.attrs.get("axes", ()), *([node.attrs["axis"]] if "axis" in node.attrs else ())}
    return {*axes, BATCH} if node.op.startswith("batch_") else axes


def joined(operands: Sequence[Grade], of: Fraction) -> Grade:
    along: frozenset[str] = frozenset().union(*(g.along for g in operands if not g.fixed))
    return Grade(of, along, any(g.near for g in operands))


def structure(graph: Graph, node: Node, g: Grade) -> Grade | None:
    """Ops that rearrange one value: what becomes of the axes along which c varies."""
    match node.op:
        case "rename":
            names = dict(node.attrs["pairs"])
            return Grade(g.of, frozenset(names.get(a, a) for a in g.along), g.near)
        case "order" | "expand":
            return g
        case "split":
            inside = {n for n, _ in node.attrs["into"]} if node.attrs["axis"] in g.along else set()
            return Grade(g.of, (g.along - {node.attrs["axis"]}) | inside, g.near)
        case "merge":
            merged = {node.attrs["into"]} if g.along & set(node.attrs["axes"]) else set()
            return Grade(g.of, (g.along - set(node.attrs["axes"])) | merged, g.near)
        case "slice" | "pick" | "reverse" | "permute":
            return g if node.attrs["axis"] not in g.along else UNKNOWN
    return None


def constant(graph: Graph, id: int) -> float | None:
    node = graph[id]
    while node.op in ("expand", "order"):
        node = graph[node.inputs[0]]
    value = node.attrs.get("value") if node.op == "const" else None
    return float(value) if isinstance(value, int | float) else None


def scaled(graph: Graph, node: Node, gs: Sequence[Grade]) -> Grade:
    """Grades under x to c·x: homogeneity, degree by degree."""
    first = gs[0]
    assert first.of is not None
    moved = structure(graph, node, first) if len(gs) == 1 else None
    if moved is not None:
        return moved
    degrees = [g.of for g in gs if g.of is not None]
    match node.op:
        case op if op in SAME:
            return first
        case "square":
            return joined(gs, 2 * first.of)
        case "sqrt":
            return joined(gs, first.of / 2)
        case "reciprocal":
            return joined(gs, -first.of)
        case "pow" if "exponent" in node.attrs:
            return joined(gs, first.of * Fraction(node.attrs["exponent"]).limit_denominator(12))
        case "mul":
            return joined(gs, degrees[0] + degrees[1])
        case "div":
            return joined(gs, degrees[0] - degrees[1])
        case "sign":
            return joined(gs, Fraction(0))
        case "add" | "sub" | "min" | "max":
            return like_terms(graph, node, gs)
        case "where" if first.fixed:
            return like_terms(graph, node, gs, (1, 2))
        case op if op in COMPARED:
            found = like_terms(graph, node, gs)
            return UNKNOWN if found.of is None or found.near else joined(gs, Fraction(0))
        case op if op in (*POOLED, "length", "var", "batch_var"):
            if first.along & removed(graph, node):
                return UNKNOWN
            return joined(gs, first.of * (2 if op.endswith("var") else 1))
        case "normalize":
            return UNKNOWN if first.along & removed(graph, node) else joined(gs, Fraction(0))
        case "contract":
            if any(g.along & removed(graph, node) for g in gs):
                return UNKNOWN
            return joined(gs, degrees[0] + degrees[1])
    return UNKNOWN


def like_terms(graph: Graph, node: Node, gs: Sequence[Grade], slots: Sequence[int] = (0, 1)) -> Grade:
    """A sum or an extremum: equal degrees; a zero has every degree, a tiny constant is left out."""
    near = False
    found: list[Grade] = []
    for k in slots:
        value = constant(graph, node.inputs[k]) if gs[k].fixed else None
        if value == 0:
            continue
        if value is not None and 0 < abs(value) <= TINY and node.op == "add":
            near = True
            continue
        found.append(gs[k])
    if not found or any(g.of != found[0].of or g.along != found[0].along for g in found):
        return UNKNOWN
    out = joined(found, found[0].of or Fraction(0))
    return Grade(out.of, out.along, out.near or near)


def shifted(graph: Graph, node: Node, gs: Sequence[Grade]) -> Grade:
    """Grades under x to x + c: the multiple of c that is added."""
    first = gs[0]
    assert first.of is not None
    moved = structure(graph, node, first) if len(gs) == 1 else None
    if moved is not None:
        return moved
    match node.op:
        case "neg":
            return joined(gs, -first.of)
        case "identity" | "stop" | "within":
            return first
        case "conv" | "conv_transpose" if len(gs) == 3 and gs[0].fixed and gs[1].fixed:
            return Grade(gs[2].of, frozenset({node.attrs["channel"]}), gs[2].near)
        case "add" | "sub":
            s, t = (g.of or Fraction(0) for g in gs)
            live = [g for g in gs if not g.fixed]
            if len(live) == 2 and live[0].along != live[1].along:
                return UNKNOWN
            return joined(gs, s + t if node.op == "add" else s - t)
        case "min" | "max":
            same = gs[0].of == gs[1].of and gs[0].along == gs[1].along
            return joined(gs, first.of) if same else UNKNOWN
        case "mul":
            for g, other in ((gs[0], node.inputs[1]), (gs[1], node.inputs[0])):
                value = constant(graph, other)
                if value is not None and g.of is not None:
                    return joined(gs, g.of * Fraction(value).limit_denominator(10**6))
            return UNKNOWN
        case "mean" | "batch_mean" | "reduce_max" | "reduce_min" | "batch_max" | "batch_min" | "logsumexp":
            return UNKNOWN if first.along & removed(graph, node) else first
        case "var" | "batch_var" | "softmax" | "log_softmax":
            return UNKNOWN if first.along & removed(graph, node) else joined(gs, Fraction(0))
        case op if op in COMPARED:
            same = gs[0].of == gs[1].of and gs[0].along == gs[1].along
            return joined(gs, Fraction(0)) if same else UNKNOWN
    return UNKNOWN


# ---- the report ---------------------------------------------------------------------------------


def channel_axes(region: Region) -> frozenset[str]:
    """The axes that tell channels apart: those along which a parameter is given; else the input's first."""
    own = region.graph[region.inputs[0]].tensor
    for r in region.walk():
        for n in r.graph:
            if n.op == "param" and n.tensor.axes and set(n.tensor.names) <= set(own.names):
                return frozenset(n.tensor.names)
    return frozenset(own.names[:1])


def report(region: Region) -> dict[str, Any]:
    """What `flowlang info` says of a norm."""
    channels = channel_axes(region)
    changes = {
        "scale": {"all": frozenset(), "sample": frozenset({BATCH}), "channel": channels},
        "shift": {"all": frozenset(), "sample": frozenset({BATCH}), "channel": channels},
    }
    out: dict[str, Any] = {}
    for mode in ("training", "inference"):
        out[mode] = {
            kind: {who: word(grade(region, Change(kind, along, mode == "training"))) for who, along in whom.items()}
            for kind, whom in changes.items()
        }
    out["batch"] = {mode: depends_on_batch(region, mode == "training") for mode in ("training", "inference")}
    out["modes_differ"] = any(r.updates or any(n.op == "choose" for n in r.graph) for r in region.walk())
    out["centred"] = sorted(centred(region))
    return out


def word(g: Grade) -> str:
    return "not shown" if not g.fixed else "up to eps" if g.near else "yes"


def reached(region: Region, training: bool) -> list[tuple[Region, Node]]:
    """The nodes that results need in a mode, those of called regions too."""
    change = Change("scale", frozenset(), training)
    follow = Follow(region, change, {})
    seen: set[int] = set()
    stack = list(region.outputs)
    out: list[tuple[Region, Node]] = []
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        node = region.graph[n]
        out.append((region, node))
        stack.extend(follow.needs(n))
        inner = node.attrs.get("region")
        if isinstance(inner, Region):
            out += reached(inner, training)
    return out


def depends_on_batch(region: Region, training: bool) -> bool:
    """Whether a sample's result may depend on the other samples."""
    return any(n.op.startswith("batch_") or n.attrs.get("axis") == BATCH for _, n in reached(region, training))


def centred(region: Region) -> set[str]:
    """The axes over which a mean of a value is subtracted from it while training."""
    found: set[str] = set()
    for r, n in reached(region, True):
        if n.op != "sub":
            continue
        live = {u.state: u.live for u in r.updates if u.live is not None}
        left, right = (source(r.graph, i, live) for i in n.inputs)
        if right.op in ("mean", "batch_mean") and source(r.graph, right.inputs[0], live).id == left.id:
            found |= removed(r.graph, right)
    return found


def source(graph: Graph, id: int, live: Mapping[int, int]) -> Node:
    """The value behind states in training and rearrangements."""
    node = graph[id]
    while node.op in ("order", "expand", "identity", "split", "merge") or node.id in live:
        node = graph[live[node.id]] if node.id in live else graph[node.inputs[0]]
    return node
