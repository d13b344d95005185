"""When each entry of a scan's values can be computed: the schedule of an incremental inverse.

A scan solves u along an axis; one round of its body gives u at every index, right at those whose
inputs are known. Run as it stands, the body does the whole work in every round. But an entry of an
inner value (a hidden unit, say) depends on u up to some index only, its degree, and need be computed
once, as soon as u is known so far. The schedule says at which stage that is, for each index along
one axis of each value, and how operands are read there, so that all stages together cost about as
much as one round. It follows from the dependence relations alone, whatever network made them: a
convolution reads the last rows, a cumulative sum its last total, causal attention the keys and values of all
rows so far, whose values are computed once (a cache).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import or_

from flowlang.analysis.dependence import Dependence, Summaries, local_relation
from flowlang.derive.inline import inlined
from flowlang.derive.program import Program
from flowlang.ir.graph import Graph, Node
from flowlang.ir.ops import OPS
from flowlang.ir.relation import Matrix, Relation, full, join, meet, product, transpose
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

    @property
    def backwards(self) -> bool:
        return self.order == tuple(range(len(self.order)))[::-1]


@dataclass(frozen=True)
class Read:
    """How a value at work on its new rows reads an operand: those rows, or all rows known so far."""

    rows: Rows
    known: bool  # True: places [0, end); False: the places of the reader's new rows, [start, end)
    shift: int | None = None  # places this far before them, zeros where there are none
    window: tuple[int, int] = (0, 0)  # so many places more before and after, for a window that moves along them


@dataclass(frozen=True)
class Columns:
    """A second axis of which a value holds what is known so far: the keys that a row of attention scores has."""

    axis: str
    rows: Rows  # of the values along it
    needed: Matrix  # which of its indices each row's readers ask for


@dataclass
class Schedule:
    """Stages of a scan. `rows` has an entry for every value that depends on the scanned one."""

    body: Program  # with its networks written out
    stages: int
    entry: int
    result: int
    rows: dict[int, Rows] = field(default_factory=dict)
    reads: dict[tuple[int, int], Read] = field(default_factory=dict)  # (reader, slot), dependent operands
    stored: set[int] = field(default_factory=set)  # values that are read at later stages
    columns: dict[int, Columns] = field(default_factory=dict)


POINTWISE = {
    "slice", "pick", "join", "stack", "reverse", "shift", "permute", "rename", "order", "split", "merge", "sum", "mean",
    "prod", "var", "reduce_max", "reduce_min", "logsumexp", "argmax", "any", "all", "softmax", "log_softmax", "cumsum",
    "sort", "contract",
}  # fmt: skip
ADDS_UP = ("sum", "contract")  # ops to which entries that are 0 make no difference
Pairs = dict[tuple[str, str], Matrix]
SPLINES = ("rqs", "linear_spline", "quadratic_spline", "cubic_spline")


def schedule(body: Program, axis: str, reverse: bool) -> Schedule | None:
    """The schedule of a scan's body along an axis; None where the body has parts that it cannot divide."""
    flat = inlined(body)
    return None if flat is None else _Scheduler(flat, axis, reverse).run()


class _Scheduler:
    def __init__(self, body: Program, axis: str, reverse: bool):
        self.body = body
        self.graph: Graph = body.graph
        self.entry, self.result = body.inputs[0], body.outputs[0]
        self.axis, self.reverse = axis, reverse
        self.size = self.graph[self.entry].tensor.size(axis)
        self.dependence = Dependence(self.graph, self.entry, Summaries())
        self.degrees: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.demand: dict[int, Pairs] = {}

    def run(self) -> Schedule | None:
        graph = self.graph
        if not supported(graph, self.entry, self.result, self.dependence):
            return None
        self.demand = self.demands()
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
        made = Schedule(self.body, len(steps), self.entry, self.result)
        for n, (axis, degrees) in self.degrees.items():
            made.rows[n] = rows_of(axis, degrees, steps)
        made.rows[self.entry] = made.rows[self.result]
        if any(self.cuts_rows(made, graph[n]) for n in self.degrees):
            return None
        if not all(self.find_columns(made, graph[n]) for n in self.degrees):
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
        for (row_, column), asked in self.demand.get(n, {}).items():
            of_pair = self.degrees_of_pair(relation, row_, column, asked)
            total = sum(of_pair) * self.size // max(len(of_pair), 1)
            found.append((total, row_ != self.axis, row_, of_pair))
        if not found:
            return None
        _, _, axis, degrees_ = min(found)
        return axis, degrees_

    def degrees_of_pair(self, relation: Relation, row: str, column: str, asked: Matrix) -> tuple[int, ...]:
        """The degree of each row where only some of its columns are asked for."""
        degrees = [0] * asked.n
        everything = full(asked.n, self.size)
        for part in relation.parts:
            of_row, of_column = relation.matrix(part, row, self.axis), relation.matrix(part, column, self.axis)
            narrow = relation.matrix(part, None, self.axis)
            keep = narrow.bits()[0] if narrow is not None else (1 << self.size) - 1
            own = (of_row or everything).bits()
            through = (product(asked, of_column) if of_column is not None else everything).bits()
            for i in range(asked.n):
                degrees[i] = max(degrees[i], self.reach(own[i] & through[i] & keep))
        return tuple(degrees)

    def reach(self, bits: int) -> int:
        """The number of leading indices that a set of indices takes."""
        if not bits:
            return 0
        return self.size - ((bits & -bits).bit_length() - 1) if self.reverse else bits.bit_length()

    # ---- what is asked for ----------------------------------------------------------------------

    def demands(self) -> dict[int, Pairs]:
        """For each value the pairs of indices along two of its axes that its readers ask for; no entry: all.

        Scores of causal attention are asked for up to the query's index only: the softmax hides the others.
        """
        found: dict[int, Pairs] = {self.result: {}}
        for n in sorted(self.graph.reachable([self.result]), reverse=True):
            node = self.graph[n]
            for slot, i in enumerate(node.inputs):
                if self.dependence.of(i) is None or self.dependence.of(n) is None:
                    continue
                asked = self.asked(node, slot, found.get(n, {}))
                if i in found:
                    known = found[i]
                    asked = {k: join(v, known[k]) for k, v in asked.items() if k in known}
                found[i] = asked
        return found

    def asked(self, node: Node, slot: int, of_node: Pairs) -> Pairs:
        """What a reader asks of an operand, given what is asked of itself."""
        i = node.inputs[slot]
        supports = [self.dependence.supports.of(j) for j in node.inputs]
        relation = local_relation(self.graph, node, slot, supports)
        out: Pairs = {}
        if relation is not None and len(relation.parts) == 1:
            (part,) = relation.parts
            same = {c: r for (r, c), m in part if r is not None and c is not None and m.rows is None}
            for row in self.graph[i].tensor.names:
                for column in self.graph[i].tensor.names:
                    if row == column or row not in same:
                        continue
                    limits = [relation.matrix(part, same[row], column)]
                    if column in same:
                        limits.append(of_node.get((same[row], same[column])))
                    for m in limits:
                        if m is not None:
                            out[(row, column)] = meet(out[(row, column)], m) if (row, column) in out else m
        support = supports[slot] if node.op in ADDS_UP else None  # zeros add nothing
        for (row_, column_), m in support.parts if support is not None else ():
            if row_ is not None and column_ is not None:
                for pair, limit in (((row_, column_), m), ((column_, row_), transpose(m))):
                    out[pair] = meet(out[pair], limit) if pair in out else limit
        return out

    # ---- columns --------------------------------------------------------------------------------

    def find_columns(self, made: Schedule, node: Node) -> bool:
        """Notes the axis of which a value holds what is known so far; False where that is not to be had."""
        row = made.rows[node.id].axis
        found: dict[str, Rows] = {}
        for slot, i in enumerate(node.inputs):
            if i in made.columns:
                column = made.columns[i]
                if not works_on_columns(node, column.axis):
                    return False
                if node.tensor.has(column.axis):
                    found[column.axis] = column.rows
            elif (
                i in made.rows and (axis := made.rows[i].axis) != row and node.tensor.has(axis) and node.tensor.has(row)
            ):
                matrix = self.local(node, slot, axis, axis)
                if matrix is None or matrix.rows is not None or i == self.entry or not works_on_columns(node, axis):
                    continue  # no column: the ordinary reading tells
                if found.setdefault(axis, made.rows[i]) != made.rows[i]:
                    return False
        if not found:
            return True
        if len(found) > 1:
            return False
        ((axis, rows),) = found.items()
        n, m = node.tensor.size(row), node.tensor.size(axis)
        needed = self.demand.get(node.id, {}).get((row, axis)) or full(n, m)
        made.columns[node.id] = Columns(axis, rows, needed)
        return known_in_time(made.rows[node.id], rows, needed, False)

    # ---- reads ----------------------------------------------------------------------------------

    def read_operands(self, made: Schedule, node: Node) -> bool:
        for slot, i in enumerate(node.inputs):
            if i not in made.rows:
                continue
            read = self.read(made, node, slot)
            if read is None:
                return False
            made.reads[(node.id, slot)] = read
            moved = read.shift is not None or read.window != (0, 0)
            if i != self.entry and (read.known or moved or read.rows is not made.rows[i]):
                if i in made.columns:
                    return False
                made.stored.add(i)
        return True

    def read(self, made: Schedule, node: Node, slot: int) -> Read | None:
        i = node.inputs[slot]
        own, other = made.rows[node.id], made.rows[i]
        column = made.columns.get(node.id)
        if column is not None and other.axis == column.axis:
            return Read(other, True) if other == column.rows else None
        matrix = self.local(node, slot, own.axis, other.axis)
        if matrix is None:
            return None
        if node.op == "contract" and other.axis in node.attrs["axes"]:
            partner = made.columns.get(node.inputs[1 - slot])
            if partner is not None and partner.axis == other.axis and partner.rows != other:
                return None
            return Read(other, True) if known_in_time(own, other, matrix, i == self.entry) else None
        if node.op == "shift" and node.attrs["axis"] == own.axis == other.axis:
            timely = known_in_time(own, other, matrix, i == self.entry)
            if own.sorted and other.sorted:
                return Read(own, False, node.attrs["k"]) if timely else None
            return Read(own, False, -node.attrs["k"]) if timely and own.backwards and other.backwards else None
        if node.op == "cumsum" and node.attrs["axis"] in (own.axis, other.axis):
            return self.read_total(made, node, own, other)
        if node.op == "conv" and own.axis == other.axis and own.axis in node.attrs["space"]:
            return self.read_window(node, own, other, matrix, i == self.entry)
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

    def read_total(self, made: Schedule, node: Node, own: Rows, other: Rows) -> Read | None:
        """A cumulative sum adds its new rows to its last one, where the rows come in the order in which it sums."""
        step = -1 if node.attrs.get("reverse") else 1
        done = own.order[: own.ends[-1]]
        in_turn = all(j - i == step for i, j in pairwise(done))
        first = len(own.order) - 1 if step < 0 else 0
        if (
            own != other
            or node.attrs.get("exclusive")
            or node.inputs[0] == self.entry
            or not in_turn
            or done[:1] != (first,)
        ):
            return None
        made.stored.add(node.id)
        return Read(other, False)

    def read_window(self, node: Node, own: Rows, other: Rows, matrix: Matrix, entry: bool) -> Read | None:
        """The rows around the new ones that a convolution's window takes; those to come meet weights that are 0."""
        k = node.attrs["space"].index(own.axis)
        size = self.graph[node.inputs[1]].tensor.axes[2 + k].size
        before, after = node.attrs["padding"][k]
        reach = (size - 1) * node.attrs["dilation"][k]
        plain = node.attrs["stride"][k] == 1 and before + after == reach and own.sorted and other.sorted
        timely = plain and own.ends == other.ends and known_in_time(own, other, matrix, entry)
        return Read(own, False, window=(before, after)) if timely else None

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
        conv = node.op == "conv" and not below.intersection(node.inputs[1:])
        if not spline and node.op not in POINTWISE and not conv and not (op is not None and op.elementwise):
            return False
        if not isinstance(node.type, TensorType) or dependence.of(n) is None:
            return False  # what reads the scanned value without depending on it has no degree
    return True


def works_on_columns(node: Node, axis: str) -> bool:
    """Whether an op may run on those indices of an axis that are known so far: none that counts or moves them."""
    op = OPS.get(node.op)
    match node.op:
        case "sum" | "contract" | "order":
            return True
        case "softmax":
            return node.attrs["axis"] != axis or "causal" in node.attrs
        case "rename":
            return all(axis not in pair for pair in node.attrs["pairs"])
        case "mean" | "reduce_max" | "reduce_min" | "logsumexp" | "var" | "prod":
            return axis not in node.attrs["axes"]
    return op is not None and op.elementwise


def rows_of(axis: str, degrees: Sequence[int], steps: Sequence[int]) -> Rows:
    """Places by stage: index i is computed at the first stage whose step is at least its degree."""
    stage = [bisect_left(steps, degree) for degree in degrees]
    order = sorted(range(len(degrees)), key=lambda i: (stage[i], i))
    in_turn = sorted(stage)
    return Rows(axis, tuple(order), tuple(bisect_left(in_turn, s) for s in range(len(steps) + 1)))


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
    masks = [0] * (len(other.ends) + 1)
    for index, s in theirs.items():
        masks[s + (1 if entry else 0)] |= 1 << index
    masks = list(accumulate(masks, or_))
    bits = matrix.bits()
    return all(bits[index] & ~masks[s] == 0 for index, s in mine.items())


def in_time(own: Rows, other: Rows, wanted: Sequence[int], entry: bool) -> bool:
    for s in range(len(own.ends) - 1):
        limit = other.ends[s] if entry else other.ends[s + 1]
        if any(p >= limit for p in wanted[own.ends[s] : own.ends[s + 1]]):
            return False
    return True
