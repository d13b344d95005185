"""The loop of an incremental inverse: each round computes the entries that have become computable, once.

The schedule (`flowlang.derive.schedule`) says which rows of each value a stage computes. Here every stage has
as many rows as the largest one, so that one loop body with fixed shapes serves all stages; what pads a stage is
computed like the rest and read by nobody. Stored values have stages times rows where the rows' axis is. Weights are arranged by
stage before the loop, and columns of places that are not filled yet are 0 there by the schedule's own proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flowlang.backends.onnx.graph import BOOL, INT, Shape, Value
from flowlang.backends.onnx.lower import Lowering, Result, needed

from flowlang.derive.schedule import Columns, Read, Rows, Schedule
from flowlang.ir.graph import Node
from flowlang.ir.relation import compare
from flowlang.ir.types import TensorType


class NotStatic(Exception):
    """An operand that cannot be arranged before the loop; the plain loop serves."""


class Places:
    """The padded places of a value's rows: `[stages, rows]`."""

    def __init__(self, rows: Rows):
        sizes = [b - a for a, b in zip(rows.ends, rows.ends[1:], strict=False)]
        self.stages, self.rows = len(sizes), max(1, *sizes)
        any_index = rows.order[0] if rows.order else 0
        self.index = np.full((self.stages, self.rows), any_index)  # the row's index, some other one where it pads
        self.real = np.zeros((self.stages, self.rows), bool)
        for s, (first, size) in enumerate(zip(rows.ends, sizes, strict=False)):
            found = rows.order[first : first + size]
            self.index[s, :] = found[0] if found else any_index
            self.index[s, :size] = found
            self.real[s, :size] = True

    def place_of(self) -> dict[int, int]:
        """index -> flat place."""
        return {int(i): p for p, (i, r) in enumerate(zip(self.index.flat, self.real.flat, strict=True)) if r}


class Incremental:
    """Writes the loop for one `scan_solve`."""

    def __init__(self, w: Lowering, plan: Schedule, captured: Mapping[int, Result]):
        self.w, self.g, self.plan, self.source = w, w.g, plan, plan.body.graph
        self.outside = Lowering(w.g, w.shared, w.weights, w.leads)
        self.outside.graph, self.outside.env = self.source, dict(captured)
        self.inside = Lowering(w.g, w.shared, w.weights, w.leads)
        self.nodes: dict[int, int] = {}
        self.places = {n: Places(r) for n, r in plan.rows.items()}
        self.stored = [plan.entry, *sorted(plan.stored - {plan.entry})]
        self.buffers: dict[int, Value] = {}
        self.stage: Value | None = None
        self.parts: dict[int, list[tuple[int, Value]]] = {}  # without a loop: stages so far with their rows
        self.round = 0

    def run(self, hint: str) -> Value:
        """The solved value, axes as in the body's entry."""
        g = self.g

        def round_(i: Value, values: list[Value]) -> tuple[None, list[Value]]:
            self.stage = i
            self.buffers = dict(zip(self.stored, values, strict=True))
            for n in sorted(self.source.reachable([self.plan.result])):
                if n in self.plan.rows and n != self.plan.entry:
                    self.nodes[n] = self.make(self.source[n])
                    if n in self.buffers:  # later values of this stage read it
                        self.buffers[n] = self.store(n, self.inside.value(self.nodes[n]))
            solved = self.store(self.plan.entry, self.inside.value(self.nodes[self.plan.result]))
            return None, [solved, *(self.buffers[n] for n in self.stored[1:])]

        start = [g.filled(0.0, self.shape(n)) for n in self.stored]
        # Attention's scores keep a column for every place, filled or not, which only a loop's fixed shapes ask for.
        if self.plan.stages <= self.w.shared.unroll and not self.plan.columns:
            return self.written_out(round_, hint)
        solved = g.loop(self.plan.stages, start, round_, hint)[0]
        return self.finish(solved)

    def written_out(self, round_: Callable[[Value, list[Value]], tuple[None, list[Value]]], hint: str) -> Value:
        """Without a loop: stored are the rows so far, and at the first stage, which reads nothing, zeros without a batch."""
        self.w.shared.written_out = max(self.w.shared.written_out, self.plan.stages)
        self.parts = {n: [] for n in self.stored}
        values = [self.g.const(np.zeros(self.shape(n)[len(self.w.leads) :])) for n in self.stored]
        for k in range(self.plan.stages):
            self.round = k
            with self.w.scope(f"{hint}.{k}"):
                values = round_(self.g.const(k, INT), values)[1]
        return self.finish(self.g.expand(values[0], self.shape(self.plan.entry)))

    def filled(self, n: int) -> np.ndarray:
        """The places of a stored value that hold something: all in a loop."""
        p = self.places[n]
        every = np.arange(p.stages * p.rows).reshape(p.stages, p.rows)
        stages = [k for k, _ in self.parts.get(n, ())]
        return every[stages].reshape(-1) if stages else every.reshape(-1)

    def held(self, n: int, table: np.ndarray) -> np.ndarray:
        """A table of places with those that the stored value has by now; what is not there yet is read by nobody."""
        if not self.parts:
            return table
        now = {int(p): k for k, p in enumerate(self.filled(n))}
        return np.vectorize(lambda p: now.get(int(p), 0) if p >= 0 else p)(table)

    def finish(self, buffer: Value) -> Value:
        entry, t = self.plan.entry, self.source[self.plan.entry].tensor
        place = self.places[entry].place_of()
        axis = t.position(self.plan.rows[entry].axis) - t.rank
        order = [place[i] for i in range(t.axes[axis].size)]
        return (
            buffer
            if order == list(range(len(place))) == list(range(buffer.shape[axis]))
            else self.g.take(buffer, axis, order)
        )  # type: ignore[arg-type]

    # ---- storage ------------------------------------------------------------------------------------------

    def position(self, n: int) -> int:
        """The row axis of a value, from the end."""
        t = self.source[n].tensor
        return t.position(self.plan.rows[n].axis) - t.rank

    def type(self, n: int) -> TensorType:
        """A stage's rows of a value; all places of its columns."""
        t, column = self.source[n].tensor, self.plan.columns.get(n)
        if column is not None:
            p = Places(column.rows)
            t = t.resized(column.axis, p.stages * p.rows)
        return t.resized(self.plan.rows[n].axis, self.places[n].rows)

    def shape(self, n: int) -> Shape:
        """The stored value: all stages' rows where the row axis is."""
        t, p = self.source[n].tensor, self.places[n]
        return (*self.w.leads, *t.resized(self.plan.rows[n].axis, p.stages * p.rows).shape)

    def store(self, n: int, new: Value) -> Value:
        """The buffer with this stage's rows written: its places hold 0 so far.

        (`Pad` copies; a product with a row of the identity, or `Where`, broadcasts, and takes many times longer.)
        """
        assert self.stage is not None
        g, p, axis = self.g, self.places[n], self.position(n) + new.rank
        if n in self.parts:
            if p.real[self.round].any() or n == self.plan.entry:
                self.parts[n].append((self.round, new))
            if not self.parts[n]:
                return self.buffers[n]
            # Onto what was joined before: two long pieces are copied faster than many short ones.
            return g.concat([self.buffers[n], new] if len(self.parts[n]) > 1 else [new], axis - new.rank)
        pads = np.zeros((p.stages, 2 * new.rank), dtype=np.int64)
        pads[:, axis] = np.arange(p.stages) * p.rows
        pads[:, new.rank + axis] = pads[::-1, axis]
        here = g.op("Gather", g.const(pads, INT), self.stage, shape=pads.shape[1:], kind=INT, axis=0)
        shape = tuple(p.stages * p.rows if k == axis else d for k, d in enumerate(new.shape))
        return g.add(self.buffers[n], g.op("Pad", new, here, shape=shape))

    # ---- the loop's graph -----------------------------------------------------------------------------------

    def make(self, node: Node) -> int:
        axis = self.plan.rows[node.id].axis
        inputs = tuple(self.operand(node, slot) for slot in range(len(node.inputs)))
        if node.attrs.get("axis") == axis and node.op in ("reverse", "permute", "slice", "shift"):
            return inputs[0]  # the rows were read in the order of the result
        attrs = dict(node.attrs)
        if node.op == "cumsum" and attrs["axis"] == axis:
            return self.total(node, inputs[0])
        if node.op == "conv" and axis in attrs["space"]:
            at = attrs["space"].index(axis)
            attrs["padding"] = tuple((0, 0) if k == at else p for k, p in enumerate(attrs["padding"]))
        column = self.plan.columns.get(node.id)
        if node.op == "softmax" and column is not None and column.axis == attrs["axis"]:
            del attrs["causal"]
            inputs = (self.hidden(node, inputs[0], column),)
        made = self.inside.graph.add(
            node.op, inputs, self.type(node.id), attrs, span=node.span, label=node.label, batched=True
        )
        self.inside.env[made.id] = self.inside.emit(made)
        return made.id

    def total(self, node: Node, x: int) -> int:
        """A cumulative sum: of the new rows, on top of the last row."""
        rows, axis = self.plan.rows[node.id], self.position(node.id)
        place = self.places[node.id].place_of()
        table = np.array([[place[rows.order[first - 1]] if first else -1] for first in rows.ends[:-1]])
        last = self.at_stage(self.buffers[node.id], self.held(node.id, table), axis)
        return self.leaf(self.g.add(last, self.g.cumsum(self.inside.value(x), axis)), self.type(node.id))

    def hidden(self, node: Node, value: int, column: Columns) -> int:
        """Scores with those keys hidden that a query does not see, and all places that hold none yet."""
        t, axis = self.type(node.id), self.plan.rows[node.id].axis
        queries, keys = self.places[node.id], Places(column.rows)
        seen = compare(self.source[node.id].tensor.size(axis), ">=")
        assert seen is not None
        table = np.array([[[seen.has(int(i), int(j)) for j in keys.index.flat] for i in row] for row in queries.index])
        table &= keys.real.reshape(-1)
        table[..., 0] |= ~table.any(-1)  # a row that pads its stage sees something, so that it stays a number
        shape = [t.size(a) if a in (axis, column.axis) else 1 for a in t.names]
        masks = table if t.position(axis) < t.position(column.axis) else np.swapaxes(table, 1, 2)
        added = np.where(masks, 0.0, -np.inf).reshape(len(table), *shape)
        stage = self.stage
        assert stage is not None
        mask = self.g.op("Gather", self.g.const(added), stage, shape=tuple(shape), axis=0)
        return self.leaf(self.g.add(self.inside.value(value), mask), t)

    def operand(self, node: Node, slot: int) -> int:
        i = node.inputs[slot]
        if i not in self.plan.rows:
            return self.independent(node, slot)
        read = self.plan.reads[(node.id, slot)]
        moved = read.known or read.shift is not None or read.window != (0, 0)
        if i != self.plan.entry and read.rows is self.plan.rows[i] and not moved:
            return self.nodes[i]
        t, axis = self.source[i].tensor, self.plan.rows[i].axis
        stored = self.buffers[i]
        if read.known:
            return self.leaf(stored, t.resized(axis, len(self.filled(i))))
        if read.window != (0, 0):
            return self.window_read(node, i, read, stored)
        return self.rows_read(node, i, read, stored)

    def window_read(self, node: Node, i: int, read: Read, stored: Value) -> int:
        """The rows of a stored value from so many before a stage's first to so many after its last, with zeros outside."""
        t, axis = self.source[i].tensor, self.plan.rows[i].axis
        own, (before, after) = self.places[node.id], read.window
        place, size = self.places[i].place_of(), t.size(axis)
        first = own.index[:, :1] - before
        wanted = first + np.arange(before + own.rows + after)
        table = np.vectorize(lambda index: place.get(int(index), -1) if 0 <= index < size else -1)(wanted)
        return self.leaf(
            self.at_stage(stored, self.held(i, table), t.position(axis) - t.rank), t.resized(axis, table.shape[1])
        )

    def rows_read(self, node: Node, i: int, read: Read, stored: Value) -> int:
        """The rows of a stored value that the reader's new rows read."""
        t, axis = self.source[i].tensor, self.plan.rows[i].axis
        own = Places(Rows(read.rows.axis, read.rows.order, tuple(e - read.rows.ends[0] for e in read.rows.ends)))
        if own.rows != self.places[node.id].rows:
            raise NotStatic
        place = self.places[i].place_of()
        wanted = own.index - (node.attrs["k"] if read.shift is not None else 0)
        # Beyond the ends a shift reads zeros; there the table holds negative numbers.
        table = np.vectorize(lambda index: place.get(int(index), 0) if 0 <= index < t.size(axis) else -abs(index))(
            wanted
        )
        picked = self.at_stage(stored, self.held(i, table), t.position(axis) - t.rank)
        return self.leaf(picked, t.resized(axis, own.rows))

    def leaf(self, v: Value, t: TensorType) -> int:
        made = self.inside.graph.add("input", (), t, {}, batched=True)
        self.inside.env[made.id] = v
        return made.id

    def at_stage(self, v: Value, table: np.ndarray, axis: int) -> Value:
        """Entries of an axis at the stage's row of an index table."""
        g = self.g
        assert self.stage is not None
        rows = table.shape[1]
        if v.array is not None:
            stacked = np.stack([np.take(v.array, row, axis) for row in table])
            return g.op("Gather", g.const(stacked), self.stage, shape=stacked.shape[1:], kind=v.kind, axis=0)
        if self.parts:
            here = table[self.round]
            if (here == here[0] + np.arange(rows)).all() and here[0] >= 0:
                return g.slice(v, axis, int(here[0]), int(here[0]) + rows)
        index = g.op("Gather", g.const(table, INT), self.stage, shape=(rows,), kind=INT, axis=0)
        some = bool((table < 0).any())
        shape = list(v.shape)
        shape[axis] = rows
        known = g.binary("Max", index, g.const(0, INT), INT) if some else index
        picked = g.op("Gather", v, known, shape=tuple(shape), kind=v.kind, axis=axis % v.rank)
        if not some:
            return picked
        there = g.binary("GreaterOrEqual", index, g.const(0, INT), BOOL)
        return g.where(g.unsqueeze(there, list(range(axis + 1, 0))), picked, 0.0)

    def independent(self, node: Node, slot: int) -> int:
        """A value from outside the loop: the stage's rows of it, and columns in the order of stored places."""
        i = node.inputs[slot]
        t = self.source[i].tensor
        if (self.source[i].op == "const" and not t.axes) or node.op == "conv":  # a kernel's axes are its own
            return self.leaf(self.value(i), t)
        v = self.value(i)
        for j in (node.id, *node.inputs):
            column = self.plan.columns.get(j)
            if column is not None and t.has(column.axis) and t.size(column.axis) == len(column.rows.order):
                p = Places(column.rows)
                v = self.g.take(v, t.position(column.axis) - t.rank, [int(x) for x in p.index.flat])
                t = t.resized(column.axis, p.stages * p.rows)
                break
        for other, j in enumerate(node.inputs):
            read = self.plan.reads.get((node.id, other))
            if read is None or not read.known or j == i or not t.has(read.rows.axis):
                continue
            axis = read.rows.axis
            if v.array is None:
                raise NotStatic
            p, places = self.places[j], self.filled(j)
            columns = np.take(v.array, p.index.reshape(-1)[places], t.position(axis))
            real = p.real.reshape(-1)[places].reshape([-1 if a.name == axis else 1 for a in t.axes])
            v = self.g.const(np.where(real, columns, 0.0))
            t = t.resized(axis, len(places))
        axis = self.plan.rows[node.id].axis
        if t.has(axis):
            p = self.places[node.id]
            v = self.at_stage(v, p.index, t.position(axis) - t.rank)
            t = t.resized(axis, p.rows)
        return self.leaf(v, t)

    def value(self, i: int) -> Value:
        for n in sorted(needed(self.source, [i])):
            if n not in self.outside.env:
                self.outside.env[n] = self.outside.emit(self.source[n])
        return self.outside.value(i)


__all__: Sequence[str] = ["Incremental", "NotStatic"]
