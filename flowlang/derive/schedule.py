"""When each entry of a scan's values can be computed: the schedule of an incremental inverse.

A scan solves u along an axis; one round of its body gives u at every index, right at those whose
inputs are known. Run as it stands, the body does the whole work in every round. But an entry of an
inner value (a hidden unit, say) depends on u up to some index only, its degree, and need be computed
once, as soon as u is known so far. The schedule says at which stage that is, for each index along
one axis of each value, and how operands are read there, so that all stages together cost about as
much as one round. It follows from the dependence relations alone, whatever network made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowlang.analysis.dependence import Dependence, Summaries, local_relation
from flowlang.derive.program import Program
from flowlang.ir.graph import Graph, Node
from flowlang.ir.ops import OPS
from flowlang.ir.relation import Matrix, Relation
from flowlang.ir.types import TensorType


@dataclass(frozen=True)
class Rows:
    """The indices along one axis of a value in the order of the stages at which they are computed.

    `order[p]` is the index in place p; before stage s the first `ends[s]` places are filled, after it
    `ends[s + 1]`. Indices that nothing needs come last and are never computed.
    """

    axis: str
    order: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def sorted(self) -> bool:
        return self.order == tuple(range(len(self.order)))


@dataclass(frozen=True)
class Read:
    """How a value at work on its new rows reads an operand: those rows, or all rows known so far."""

    rows: Rows
    known: bool  # True: places [0, end); False: the places of the reader's new rows, [start, end)
    shift: int | None = None  # places this far before them, zeros where there are none


@dataclass
class Schedule:
    """Stages of a scan. `rows` has an entry for every value that depends on the scanned one."""

    stages: int
    entry: int
    result: int
    rows: dict[int, Rows] = field(default_factory=dict)
    reads: dict[tuple[int, int], Read] = field(default_factory=dict)  # (reader, slot), dependent operands
    stored: set[int] = field(default_factory=set)  # values that are read at later stages


POINTWISE = {
    "slice", "pick", "join", "stack", "reverse", "shift", "permute", "rename", "order", "split", "merge", "sum", "mean",
    "prod", "var", "reduce_max", "reduce_min", "logsumexp", "argmax", "any", "all", "softmax", "log_softmax", "cumsum",
    "sort", "contract",
}  # fmt: skip
SPLINES = ("rqs", "linear_spline", "quadratic_spline", "cubic_spline")


def schedule(body: Program, axis: str, reverse: bool) -> Schedule | None:
    """The schedule of a scan's body along an axis; None where the body has parts that it cannot divide."""
    return _Scheduler(body, axis, reverse).run()


class _Scheduler:
    def __init__(self, body: Program, axis: str, reverse: bool):
        self.graph: Graph = body.graph
        self.entry, self.result = body.inputs[0], body.outputs[0]
        self.axis, self.reverse = axis, reverse
        self.size = self.graph[self.entry].tensor.size(axis)
        self.dependence = Dependence(self.graph, self.entry, Summaries())
        self.degrees: dict[int, tuple[str, tuple[int, ...]]] = {}

    def run(self) -> Schedule | None:
        graph = self.graph
        if not supported(graph, self.entry, self.result, self.dependence):
            return None
        for n in sorted(graph.reachable([self.result])):
            if n == self.entry or self.dependence.of(n) is None:
                continue
            found = self.degrees_of(n, self.dependence.of(n))
            if found is None:
                return None
            self.degrees[n] = found
        if self.result not in self.degrees or self.degrees[self.result][0] != self.axis:
            return None
        result = self.degrees[self.result][1]
        if any(d > self.place(i) for i, d in enumerate(result)):
            return None
        steps = self.steps(result)
        made = Schedule(len(steps), self.entry, self.result)
        for n, (axis, degrees) in self.degrees.items():
            made.rows[n] = rows_of(axis, degrees, steps)
        made.rows[self.entry] = made.rows[self.result]
        if any(self.cuts_rows(made, graph[n]) for n in self.degrees):
            return None
        for n in self.degrees:
            if not self.read_operands(made, graph[n]):
                return None
        return made

    def steps(self, result: Sequence[int]) -> list[int]:
        """How many leading entries are known before each stage: a stage takes all that read no others, so that a
        minimum lag of k makes k entries a stage."""
        in_order = [result[self.place(k)] for k in range(self.size)]
        steps, known = [], 0
        while known < self.size:
            steps.append(known)
            known = next((k for k in range(known, self.size) if in_order[k] > known), self.size)
        return steps

    def cuts_rows(self, made: Schedule, node: Node) -> bool:
        """Whether a split cuts the axis whose rows come stage by stage: its sizes hold for the whole axis alone."""
        inner = made.rows.get(node.inputs[0]) if node.op == "split" else None
        return inner is not None and inner.axis == node.attrs["axis"]

    def place(self, index: int) -> int:
        """How many indices come before this one in the scan."""
        return self.size - 1 - index if self.reverse else index

    def degrees_of(self, n: int, relation: Relation | None) -> tuple[str, tuple[int, ...]] | None:
        """The axis along which the value's degrees tell most, and the degree of each index."""
        assert relation is not None
        found: list[tuple[int, int, str, tuple[int, ...]]] = []
        for row in self.graph[n].tensor.axes:
            degrees = [0] * row.size
            for part in relation.parts:
                matrix = relation.matrix(part, row.name, self.axis)
                narrow = relation.matrix(part, None, self.axis)
                keep = narrow.bits()[0] if narrow is not None else (1 << self.size) - 1
                for i in range(row.size):
                    degrees[i] = max(degrees[i], self.reach(keep if matrix is None else matrix.bits()[i] & keep))
            found.append(
                (sum(degrees) * self.size // max(row.size, 1), row.name != self.axis, row.name, tuple(degrees))
            )
        if not found:
            return None
        _, _, axis, degrees_ = min(found)
        return axis, degrees_

    def reach(self, bits: int) -> int:
        """The number of leading indices that a set of indices takes."""
        if not bits:
            return 0
        return self.size - ((bits & -bits).bit_length() - 1) if self.reverse else bits.bit_length()

    # ---- reads ----------------------------------------------------------------------------------

    def read_operands(self, made: Schedule, node: Node) -> bool:
        for slot, i in enumerate(node.inputs):
            if i not in made.rows:
                continue
            read = self.read(made, node, slot)
            if read is None:
                return False
            made.reads[(node.id, slot)] = read
            if i != self.entry and (read.known or read.shift is not None or read.rows is not made.rows[i]):
                made.stored.add(i)
        return True

    def read(self, made: Schedule, node: Node, slot: int) -> Read | None:
        i = node.inputs[slot]
        own, other = made.rows[node.id], made.rows[i]
        matrix = self.local(node, slot, own.axis, other.axis)
        if matrix is None:
            return None
        if node.op == "contract" and other.axis in node.attrs["axes"]:
            return Read(other, True) if known_in_time(own, other, matrix, i == self.entry) else None
        if node.op == "shift" and node.attrs["axis"] == own.axis == other.axis:
            timely = known_in_time(own, other, matrix, i == self.entry)
            return Read(own, False, node.attrs["k"]) if timely and own.sorted and other.sorted else None
        image = single(matrix)
        if image is None:
            return None
        # The reader's rows in its own order, as places in the operand's order.
        places = {index: p for p, index in enumerate(other.order)}
        wanted = [places[image[index]] for index in own.order[: own.ends[-1]]]
        if not in_time(own, other, wanted, i == self.entry):
            return None
        if own.ends == other.ends and wanted == list(range(own.ends[-1])) and i != self.entry:
            return Read(other, False)
        if wanted == list(range(wanted[0], wanted[0] + len(wanted))) if wanted else True:
            start = wanted[0] if wanted else 0
            order = other.order[start : start + len(wanted)]
            return Read(Rows(other.axis, order, tuple(e + start for e in own.ends)), False)
        return None

    def local(self, node: Node, slot: int, row: str, column: str) -> Matrix | None:
        """Which indices along the operand's axis an index of the result reads."""
        supports = [self.dependence.supports.of(j) for j in node.inputs]
        relation = local_relation(self.graph, node, slot, supports)
        if relation is None or len(relation.parts) != 1:
            return None
        return relation.matrix(relation.parts[0], row, column)


def supported(graph: Graph, entry: int, result: int, dependence: Dependence) -> bool:
    """Whether every value that reads the scanned one is of an op that works on some rows as on all."""
    below = {entry}
    for n in sorted(graph.reachable([result])):
        node = graph[n]
        if not below.intersection(node.inputs):
            continue
        below.add(n)
        spline = node.op.removesuffix("_inverse").removesuffix("_log_slope") in SPLINES
        op = OPS.get(node.op)
        if not spline and node.op not in POINTWISE and not (op is not None and op.elementwise):
            return False
        if not isinstance(node.type, TensorType) or dependence.of(n) is None:
            return False  # what reads the scanned value without depending on it has no degree
    return True


def rows_of(axis: str, degrees: Sequence[int], steps: Sequence[int]) -> Rows:
    """Places by stage: index i is computed at the first stage whose step is at least its degree."""
    stage = [next((s for s, d in enumerate(steps) if d >= degree), len(steps)) for degree in degrees]
    order = sorted(range(len(degrees)), key=lambda i: (stage[i], i))
    ends = [sum(1 for x in stage if x < s) for s in range(len(steps) + 1)]
    return Rows(axis, tuple(order), tuple(ends))


def single(matrix: Matrix) -> list[int] | None:
    """The one column of each row, where each has exactly one."""
    bits = matrix.bits()
    return [b.bit_length() - 1 for b in bits] if all(b and b & (b - 1) == 0 for b in bits) else None


def stages(rows: Rows) -> dict[int, int]:
    """The stage at which each index is computed."""
    out: dict[int, int] = {}
    for s in range(len(rows.ends) - 1):
        for p in range(rows.ends[s], rows.ends[s + 1]):
            out[rows.order[p]] = s
    return out


def known_in_time(own: Rows, other: Rows, matrix: Matrix, entry: bool) -> bool:
    """Whether every index that a row reads is computed by then (before, for the scanned value)."""
    mine, theirs = stages(own), stages(other)
    late = len(other.ends)
    masks = [0] * late
    for index in range(len(other.order)):
        for s in range(theirs.get(index, late) + (1 if entry else 0), late):
            masks[s] |= 1 << index
    bits = matrix.bits()
    return all(bits[index] & ~masks[s] == 0 for index, s in mine.items())


def in_time(own: Rows, other: Rows, wanted: Sequence[int], entry: bool) -> bool:
    for s in range(len(own.ends) - 1):
        limit = other.ends[s] if entry else other.ends[s + 1]
        if any(p >= limit for p in wanted[own.ends[s] : own.ends[s + 1]]):
            return False
    return True
