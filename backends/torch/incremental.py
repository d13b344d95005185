"""The loop of an incremental inverse: each stage computes the entries that have become computable.

Inside the loop a value is laid out `[rows, *other axes, batch]`, so that the rows of a stage, and all
rows known so far, are contiguous. See `flowlang.derive.schedule` for what is computed when.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowlang.backends.torch.emit import Expr, Writer, integers, moved

from flowlang.derive.schedule import Columns, Read, Rows, Schedule, stages
from flowlang.ir.graph import Graph, Node
from flowlang.ir.relation import compare
from flowlang.ir.types import Axis, TensorType

BATCH = "batch^"


def write_loop(w: Writer, outside: Writer, plan: Schedule, target: str) -> str:
    """Writes the loop into `w`; returns the name of the solved value.

    `outside` writes the values of the body that do not depend on the scanned one. `target` is a
    tensor of the solved value's shape.
    """
    return _Loop(w, outside, plan, target).write()


class _Loop:
    def __init__(self, w: Writer, outside: Writer, plan: Schedule, target: str):
        self.w, self.outside, self.plan, self.target = w, outside, plan, target
        self.source = plan.body.graph
        # A window may take rows that are not there yet, against weights that are 0.
        self.windowed = {self.source[n].inputs[slot] for (n, slot), read in plan.reads.items() if read.window != (0, 0)}
        self.inner = Writer(w.scope, Graph(), w.names)
        self.inner.reference = w.reference
        self.before: list[str] = []  # statements before the loop
        self.nodes: dict[int, int] = {}  # value -> node in the loop's graph, new rows only
        self.buffers: dict[int, str] = {}
        self.bounds: dict[tuple[int, ...], tuple[str, str, str]] = {}  # ends -> (table, from, to)
        self.laid_out: dict[tuple[object, ...], str] = {}

    def write(self) -> str:
        plan, w = self.plan, self.w
        entry = self.source[plan.entry]
        self.buffers[plan.entry] = self.buffer(plan.entry, entry.label or "u")
        needed = self.source.reachable([plan.result])
        roots: dict[int, int] = {}
        for n in sorted(needed):
            if n in plan.rows and n != plan.entry:
                roots[n] = self.nodes[n] = self.make(self.source[n])
        self.count_uses(roots)
        self.emit(roots)
        loop = self.inner.lines
        tables = [t for t, _, _ in self.bounds.values()]
        names = [f"{a}, {b}" for _, a, b in self.bounds.values()]
        head = (
            f"for {names[0]} in {tables[0]}:"
            if len(tables) == 1
            else f"for {', '.join(f'({n})' for n in names)} in zip({', '.join(tables)}):"
        )
        # Closures hold what the loop reads; its result carries no gradient (see `implicit_scan`).
        w.lines.append("with torch.no_grad():")
        for line in [*self.before, head, *(f"    {x}" for x in loop)]:
            w.lines.append(f"    {line}")
        return self.finish()

    def finish(self) -> str:
        """The solved value in the usual layout."""
        t = self.source[self.plan.entry].tensor
        rows = self.plan.rows[self.plan.entry]
        buffer = self.buffers[self.plan.entry]
        if not rows.sorted:
            back = sorted(range(len(rows.order)), key=lambda p: rows.order[p])
            order = self.w.scope.buffer("order", f"torch.tensor({integers(back)})")
            buffer = f"{buffer}.index_select(0, {order})"
        names = (rows.axis, *(a for a in t.names if a != rows.axis))
        order_ = tuple(names.index(a) for a in t.names)
        use = self.w.scope.use("batch_first")
        return f"{use}({buffer}, {order_}, {self.target}.shape)"

    # ---- the loop's graph -----------------------------------------------------------------------

    def type(self, n: int) -> TensorType:
        """The type of a value's rows in the loop."""
        t, axis = self.source[n].tensor, self.plan.rows[n].axis
        others = [a for a in t.axes if a.name != axis]
        return TensorType((Axis(axis, t.size(axis)), *others, Axis(BATCH, 1)), t.kind)

    def make(self, node: Node) -> int:
        type_ = self.type(node.id)
        axis = self.plan.rows[node.id].axis
        inputs = tuple(self.operand(node, slot) for slot in range(len(node.inputs)))
        along = node.attrs.get("axis") == axis
        if along and node.op in ("reverse", "permute", "slice", "shift"):
            return inputs[0]  # the rows were read in the order of the result
        attrs = dict(node.attrs)
        if node.op == "order":
            attrs["names"] = type_.names
        if node.op == "conv" and axis in attrs["space"]:
            at = attrs["space"].index(axis)
            attrs |= {"padding": tuple((0, 0) if k == at else p for k, p in enumerate(attrs["padding"])), "rows": True}
        if node.op == "cumsum" and along:
            return self.total(node, inputs[0])
        if node.op == "var":
            return self.variance(node, inputs[0])
        column = self.plan.columns.get(node.id)
        if node.op == "softmax" and column is not None and column.axis == attrs["axis"]:
            del attrs["causal"]
            inputs = (self.hidden(node, inputs[0], column),)
        return self.inner.graph.add(node.op, inputs, type_, attrs, span=node.span, label=node.label, batched=False).id

    def hidden(self, node: Node, value: int, column: Columns) -> int:
        """Scores with those keys hidden that a query does not see; nothing to do where all that are known are seen."""
        rows, keys = self.plan.rows[node.id], column.rows
        seen = compare(len(rows.order), ">=")
        assert seen is not None
        stage = stages(rows)
        if all(seen.has(i, j) for i, s in stage.items() for j in keys.order[: keys.ends[s + 1]]):
            return value
        size = len(rows.order)
        text = f"torch.ones({size}, {size}, dtype=torch.bool).tril()"
        if not rows.sorted:
            text += f"[{integers(rows.order)}]"
        if not keys.sorted:
            text += f"[:, {integers(keys.order)}]"
        (first, last), end = self.bound(rows), self.bound(keys)[1]
        name = self.w.scope.buffer("seen", text)
        graph = self.inner.graph
        mask = self.leaf(
            TensorType((Axis(rows.axis, size), Axis(column.axis, size)), "bool"), f"{name}[{first}:{last}, :{end}]"
        )
        least = graph.add("const", (), TensorType(()), {"value": -math.inf}, batched=False).id
        return graph.add("where", (mask, value, least), self.type(node.id), {}, batched=False).id

    def total(self, node: Node, x: int) -> int:
        """A cumulative sum: of the new rows, on top of the last row."""
        graph, type_, axis = self.inner.graph, self.type(node.id), self.plan.rows[node.id].axis
        first, _ = self.bound(self.plan.rows[node.id])
        if node.id not in self.buffers:
            self.buffers[node.id] = self.buffer(node.id, f"{node.label or 'total'}_known")
        last = self.leaf(type_, f"{self.w.scope.use('rows_or_zeros')}({self.buffers[node.id]}, {first} - 1, {first})")
        rows = graph.add("cumsum", (x,), type_, {"axis": axis}, batched=False).id
        return graph.add("add", (last, rows), type_, {}, batched=False, span=node.span, label=node.label).id

    def variance(self, node: Node, x: int) -> int:
        """The mean square of what is centred: `var` warns where a stage has no rows."""
        graph, axes, type_ = self.inner.graph, tuple(node.attrs["axes"]), self.type(node.id)
        whole = graph[x].tensor
        mean = graph.add("mean", (x,), type_, {"axes": axes}, batched=False).id
        centred = graph.add("sub", (x, mean), whole, {}, batched=False).id
        square = graph.add("square", (centred,), whole, {}, batched=False).id
        count, ddof = math.prod(whole.size(a) for a in axes), node.attrs.get("ddof", 0)
        out = graph.add("mean", (square,), type_, {"axes": axes}, batched=False, span=node.span, label=node.label).id
        if not ddof:
            return out
        factor = graph.add("const", (), TensorType(()), {"value": count / (count - ddof)}, batched=False).id
        return graph.add("mul", (out, factor), type_, {}, batched=False).id

    def operand(self, node: Node, slot: int) -> int:
        i = node.inputs[slot]
        if i not in self.plan.rows:
            return self.independent(node, slot)
        read = self.plan.reads[(node.id, slot)]
        moved_ = read.known or read.shift is not None or read.window != (0, 0)
        if i != self.plan.entry and read.rows is self.plan.rows[i] and not moved_:
            return self.nodes[i]
        return self.leaf(self.type(i), self.slice_of(i, node, read))

    def leaf(self, type_: TensorType, text: str) -> int:
        made = self.inner.graph.add("input", (), type_, {}, batched=False)
        self.inner.env[made.id] = Expr(text)
        return made.id

    def slice_of(self, i: int, node: Node, read: Read) -> str:
        """Rows of a stored value: all that are known, or those that the reader's new rows read."""
        if i not in self.buffers:
            self.buffers[i] = self.buffer(i, self.known_as(i) or "hidden")
        first, last = self.bound(read.rows)
        if read.shift is not None:
            by = f"{-read.shift:+d}".replace("+", "+ ").replace("-", "- ")
            return f"{self.w.scope.use('rows_or_zeros')}({self.buffers[i]}, {first} {by}, {last} {by})"
        if read.window != (0, 0):
            before, after = (f" {sign} {by}" if by else "" for sign, by in zip("-+", read.window, strict=True))
            return f"{self.w.scope.use('rows_or_zeros')}({self.buffers[i]}, {first}{before}, {last}{after})"
        if not read.known:
            return f"{self.buffers[i]}[{first}:{last}]"
        return f"{self.buffers[i]}[:{first if i == self.plan.entry else last}]"

    def known_as(self, i: int) -> str | None:
        """The name of a value, or of the one whose axes it renames."""
        node = self.source[i]
        while node.label is None and node.op in ("rename", "order"):
            node = self.source[node.inputs[0]]
        return None if node.label is None else f"{node.label}_known"

    def independent(self, node: Node, slot: int) -> int:
        """A value from outside the loop: its rows where it has the reader's axis, and its known columns."""
        i = node.inputs[slot]
        source = self.source[i]
        if source.op == "const" and not source.tensor.axes:
            made = self.inner.graph.add("const", (), source.type, source.attrs, batched=False)
            return made.id
        if node.op == "conv":  # a kernel or a bias, whose axes are its own
            self.emit_outside(i)
            return self.leaf(source.tensor, self.outside.variable(i))
        rows = self.plan.rows[node.id]
        cut: dict[str, Rows] = {}
        known: set[str] = set()
        for j in (node.id, *node.inputs):
            column = self.plan.columns.get(j)
            if column is not None and source.tensor.has(column.axis):
                cut[column.axis] = column.rows
                known.add(column.axis)
        if source.tensor.has(rows.axis):
            cut[rows.axis] = rows
        for other, j in enumerate(node.inputs):
            read = self.plan.reads.get((node.id, other))
            if read is not None and read.known and source.tensor.has(read.rows.axis) and j != i:
                cut[read.rows.axis] = read.rows
                known.add(read.rows.axis)
        last = [a for a in source.tensor.names if node.op == "contract" and a in node.attrs["axes"]]
        first = [rows.axis] if source.tensor.has(rows.axis) else []
        names = [*first, *(a for a in source.tensor.names if a not in last and a not in first), *last]
        name = self.lay_out(i, names, cut)
        index = []
        for a in names:
            if a not in cut:
                index.append(":")
            elif a in known:
                entry = any(
                    self.plan.reads[(node.id, s)].rows is cut[a] and j == self.plan.entry
                    for s, j in enumerate(node.inputs)
                    if (node.id, s) in self.plan.reads
                )
                index.append(f":{self.bound(cut[a])[0 if entry else 1]}")
            else:
                index.append("{}:{}".format(*self.bound(cut[a])))
        while index and index[-1] == ":":
            index.pop()
        sizes = tuple(Axis(a, source.tensor.size(a)) for a in names)
        text = f"{name}[{', '.join(index)}]" if index else name
        beside = node.op in ("join", "stack") and not source.batched  # parts stand beside each other: all have a batch
        if beside:
            text = f"{text}[..., None].expand({'-1, ' * len(names)}count)"
        type_ = TensorType((*sizes, Axis(BATCH, 1)) if source.batched or beside else sizes, source.tensor.kind)
        return self.leaf(type_, text)

    def lay_out(self, i: int, names: Sequence[str], cut: dict[str, Rows]) -> str:
        """A variable before the loop that holds a value in the loop's layout."""
        source = self.source[i]
        orders = tuple((a, r.order) for a, r in sorted(cut.items()) if not r.sorted)
        key = (i, tuple(names), orders)
        if key in self.laid_out:
            return self.laid_out[key]
        self.emit_outside(i)
        text, t = self.outside.env[i].at(6), source.tensor
        for a, order in orders:
            buffer = self.w.scope.buffer("order", f"torch.tensor({integers(order)})")
            text = f"{text}.index_select({t.position(a) - t.rank}, {buffer})"
        if source.batched:
            order_ = tuple(t.names.index(a) for a in names)
            text = f"{self.w.scope.use('batch_last')}({text}, {order_})"
        else:
            text = moved(text, t.names, names)
        if not text.removeprefix("self.").isidentifier():
            plain = self.outside.env[i].text
            wanted = f"{plain}_rows" if plain.isidentifier() else source.label or self.outside.short(source)
            name = self.w.names.fresh(wanted)
            self.before.append(f"{name} = {text}")
            text = name
        self.laid_out[key] = text
        return text

    def emit_outside(self, i: int) -> None:
        for n in sorted(self.source.reachable([i])):
            if n not in self.outside.env:
                self.outside.emit(self.source[n])

    # ---- storage --------------------------------------------------------------------------------

    def buffer(self, n: int, wanted: str) -> str:
        """Memory for all rows of a value."""
        t = self.type(n)
        name = self.w.names.fresh(wanted)
        sizes = ", ".join(str(a.size) for a in t.axes[:-1])
        rank = self.source[self.plan.entry].tensor.rank
        size = f"math.prod({self.target}.shape[:-{rank}])"
        if not self.before:
            self.before.append(f"count = {size}")
        names = ", ".join(a.name for a in t.axes[:-1])
        made = "new_zeros" if n in self.windowed else "new_empty"
        self.before.append(f"{name} = {self.target}.{made}({sizes}, count)  # [{names}, batch]")
        return name

    def bound(self, rows: Rows) -> tuple[str, str]:
        """Names of the first and the last place of a stage."""
        if rows.ends not in self.bounds:
            start = rows.ends[0]
            stage = stages(rows)
            per_place = [stage[i] for i in rows.order if i in stage]
            name = self.w.names.fresh(f"{rows.axis.rstrip('^')}_rows")
            made = f"{self.w.scope.use('stage_rows')}({integers(per_place)}, {self.plan.stages}"
            table = self.w.scope.constant(name, made + (f", {start})" if start else ")"))
            stem = name.removesuffix("_rows")
            first, last = self.w.names.fresh(f"{stem}_from"), self.w.names.fresh(f"{stem}_to")
            self.bounds[rows.ends] = (table, first, last)
        _, first, last = self.bounds[rows.ends]
        return first, last

    # ---- statements -----------------------------------------------------------------------------

    def count_uses(self, roots: dict[int, int]) -> None:
        graph, uses = self.inner.graph, self.inner.uses
        for node in graph:
            for i in node.inputs:
                uses[i] = uses.get(i, 0) + 1
        for n, made in roots.items():
            if n in self.buffers or n == self.plan.result:
                uses[made] = uses.get(made, 0) + 1

    def emit(self, roots: dict[int, int]) -> None:
        """Statements in the order of the values; a stored value is written as soon as it is there."""
        inner = self.inner
        for node in inner.graph:
            if node.id not in inner.env:
                inner.emit(node)
            for n, made in roots.items():
                if made != node.id:
                    continue
                if n in self.buffers:
                    self.store(self.buffers[n], self.plan.rows[n], made)
                if n == self.plan.result:
                    self.store(self.buffers[self.plan.entry], self.plan.rows[n], made)

    def store(self, buffer: str, rows: Rows, made: int) -> None:
        first, last = self.bound(rows)
        self.inner.lines.append(f"{buffer}[{first}:{last}] = {self.inner.env[made].text}")
