"""Monotone splines as few nodes: one table for each spline, one gather at the bin, no branch.

The maps are those of `ir.ops.splines`; the formulas are arranged for a short graph. Values are laid out
`[*leads, M, K]`: x's axes as one, then bins. Raw parameters that are columns of one linear layer are put in the
order in which the spline reads them, padding included, by reordering the layer's weights: softmax gives 0 at a
logit of -1e30.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from flowlang.backends.onnx.graph import BOOL, INT, REAL, Builder, Value, broadcast
from flowlang.backends.onnx.lower import EMITTERS, Lowering

from flowlang.ir.graph import Node
from flowlang.ir.ops.splines import bin_axis, numbers_of
from flowlang.ir.types import Axis, TensorType

HIDDEN = -1e30  # a logit whose share is 0
Entry = int | float  # of a row: the parameter of that index, or (a float) a constant


@dataclass(frozen=True)
class Row:
    """One row of raw values: entries of a parameter `[*leads, M, n]`, and constants, along the axis of bins."""

    raw: Value
    entries: tuple[Entry, ...]
    shift: float = 0.0  # added to every parameter (constants are as they are)


def size(v: Value, axis: int) -> int:
    n = v.shape[axis]
    assert isinstance(n, int)
    return n


def assemble(g: Builder, *groups: Sequence[Row]) -> list[Value]:
    """The rows of each group as one value `[*leads, M, rows, entries]`."""
    return from_layer(g, groups) or [stacked(g, rows) for rows in groups]


def stacked(g: Builder, rows: Sequence[Row]) -> Value:
    made = []
    for row in rows:
        m = size(row.raw, -2)
        parts: list[Value] = []
        k = 0
        while k < len(row.entries):
            e = row.entries[k]
            stop = k + 1
            if isinstance(e, float):
                while stop < len(row.entries) and row.entries[stop] == e and isinstance(row.entries[stop], float):
                    stop += 1
                parts.append(g.const(np.full((m, stop - k), e)))
            else:
                while stop < len(row.entries) and row.entries[stop] == e + stop - k:
                    stop += 1
                parts.append(g.add(g.slice(row.raw, -1, e, e + stop - k), row.shift))
            k = stop
        made.append(g.unsqueeze(g.concat(parts, -1), [-2]))
    return g.concat(made, -2)


def from_layer(g: Builder, groups: Sequence[Sequence[Row]]) -> list[Value] | None:
    """The same when all parameters are columns of one linear layer: its weights are put in the table's order."""
    base: Value | None = None
    starts: list[int] = []
    for row in (row for rows in groups for row in rows):
        found = layer_columns(row.raw)
        if found is None or (base is not None and found[0] is not base):
            return None
        base, start = found
        starts.append(start)
    assert base is not None
    m = size(groups[0][0].raw, -2)
    columns: list[int] = []
    constants: list[float] = []
    first = iter(starts)
    for rows in groups:
        own = [next(first) for _ in rows]
        for j in range(m):
            for row, start in zip(rows, own, strict=True):
                columns += [-1 if isinstance(e, float) else start + e * m + j for e in row.entries]
                constants += [e if isinstance(e, float) else row.shift for e in row.entries]
    x, weight, bias = linear_parts(base)
    index = np.asarray(columns)
    known = index >= 0
    matrix = np.where(known, weight[:, index], 0.0)
    offset = np.where(known, bias[index], 0.0) + np.asarray(constants)
    group, g.group = g.group, None  # the layer is the network's, not the spline's
    made = g.add(g.matmul(x, g.const(matrix)), g.const(offset))
    g.group = group
    shapes = [(m, len(rows), len(rows[0].entries)) for rows in groups]
    parts = g.split(made, made.rank - 1, [math.prod(n) for n in shapes]) if len(groups) > 1 else [made]
    return [g.reshape(part, (*base.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)]


def layer_columns(v: Value) -> tuple[Value, int] | None:
    """The linear layer whose adjacent columns a parameter (bins turned to the end) is, and the first column."""
    node = v.node
    if v.array is not None or node is None or node.op != "Transpose":
        return None
    before = node.inputs[0]
    if before is None or before.node is None or before.node.op != "Reshape":
        return None
    flat = before.node.inputs[0]
    if flat is None or flat.shape != (*v.shape[:-2], size(v, -2) * size(v, -1)):
        return None
    start = 0
    if flat.node is not None and flat.node.op == "Slice" and len(flat.node.inputs) == 4:
        source, starts, _, axes = flat.node.inputs
        if source is None or starts is None or axes is None or axes.array is None or starts.array is None:
            return None
        if axes.array.tolist() != [-1]:
            return None
        flat, start = source, int(starts.array[0])
    return (flat, start) if is_linear(flat) else None


def is_linear(v: Value) -> bool:
    node = v.node
    if node is None or node.op != "Add":
        return False
    product, bias = node.inputs
    if product is None or bias is None or product.node is None or product.node.op != "MatMul":
        return False
    matrix = product.node.inputs[1]
    return (
        bias.array is not None
        and bias.rank == 1
        and matrix is not None
        and matrix.array is not None
        and matrix.rank == 2
    )


def linear_parts(v: Value) -> tuple[Value, np.ndarray, np.ndarray]:
    assert v.node is not None
    product, bias = v.node.inputs
    assert product is not None
    assert product.node is not None
    assert bias is not None
    x, matrix = product.node.inputs
    assert x is not None
    assert matrix is not None
    return x, np.asarray(matrix.array), np.broadcast_to(np.asarray(bias.array), (v.shape[-1],))


# ---- knots ------------------------------------------------------------------------------------------------


def knot_matrix(bins: int, entries: int, bound: float, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Shares (padded) to the bins + 1 knots on [-bound, bound], as a product and an offset; the ends are exact."""
    m = np.zeros((entries, bins + 1))
    m[:bins] = 2 * bound * (1 - least * bins) * np.triu(np.ones((bins, bins + 1)), 1)
    m[:, -1] = 0
    offset = bound * (2 * least * np.arange(bins + 1) - 1)
    offset[-1] = bound
    return m, offset


def bin_of(g: Builder, x: Value, knots: Value) -> Value:
    """The bin of x `[.., M, 1]` from the inner knots `[.., M, K - 1]`, as int64 `[.., M, 1]`."""
    if size(knots, -1) == 0:
        return g.cast(g.mul(x, 0.0), INT)
    over = g.cast(g.binary("GreaterOrEqual", x, knots, BOOL), INT)
    return g.reduce("ReduceSum", over, [-1], keep=True)


def at(g: Builder, table: Value, k: Value, offsets: np.ndarray) -> Value:
    """Entries of a table `[.., (rows,) M, n]` at the bins plus offsets (shaped to broadcast)."""
    index = g.binary("Add", k, g.const(offsets, INT), INT)
    lead = broadcast(table.shape[:-1], index.shape[:-1])
    table = g.expand(table, (*lead, table.shape[-1]))
    index = g.expand(index, (*lead, index.shape[-1]))
    return g.gather_elements(table, index, -1)


def total(g: Builder, v: Value) -> Value:
    """The sum along the axis of bins, which stays."""
    return g.reduce("ReduceSum", v, [-1], keep=True)


@dataclass(frozen=True)
class Box:
    """x as a column of the layout, and its part in the box."""

    column: Value
    inside: Value
    bound: float

    @staticmethod
    def of(g: Builder, x: Value, bound: float) -> Box:
        """x is `[.., M]`, and becomes `[.., M, 1]`."""
        column = g.unsqueeze(x, [-1])
        return Box(column, g.clip(column, -bound, bound), bound)

    def result(self, g: Builder, value: Value, slope: Value) -> Pair:
        """Where the slope at the ends is not 1: the identity by a condition."""
        same = g.binary("Less", g.unary("Abs", self.column), self.bound, BOOL)
        log_slope = g.where(same, g.unary("Log", slope), 0.0)
        return g.squeeze(g.where(same, value, self.column), [-1]), g.squeeze(log_slope, [-1])


Pair = tuple[Value, Value]
Numbers = dict[str, float]


# ---- rational-quadratic (Durkan et al. 2019, eq. 4-8; on a circle: Rezende et al. 2020) ---------------------


@dataclass(frozen=True)
class RqsTable:
    """What a bin needs is linear in the shares and raw slopes, so that one product gives it for every bin.

    The first number of the row of slopes is 1: products have an offset by it.
    """

    bins: int
    numbers: Numbers
    circular: bool

    @property
    def width(self) -> int:
        """Entries of each row: shares, and slopes with the number before them."""
        return self.bins + 1 if self.circular else self.bins

    @property
    def shift(self) -> float:
        return math.log(math.expm1(1 - self.numbers["min_slope"]))

    def rows(self, widths: Value, heights: Value, slopes: Value) -> list[Row]:
        shares: tuple[Entry, ...] = (*range(self.bins), *([HIDDEN] if self.circular else []))
        inner = range(self.bins if self.circular else self.bins - 1)
        return [Row(widths, shares), Row(heights, shares), Row(slopes, (1.0, *inner), self.shift)]

    @property
    def size(self) -> int:
        """Of what the product sums: the three rows, and x (or y)."""
        return 3 * self.width + 1

    def number(self, value: float) -> np.ndarray:
        """A constant: `[size]`, the factors of what the product sums."""
        found = np.zeros(self.size)
        found[2 * self.width] = value
        return found

    def steps(self, row: int, least: float) -> np.ndarray:
        """The bins' widths or heights, `[size, bins]`."""
        bound, k = self.numbers["bound"], self.bins
        found = np.repeat(self.number(2 * bound * least)[:, None], k, 1)
        found[row * self.width : row * self.width + k] = 2 * bound * (1 - least * k) * np.eye(k)
        return found

    def knots(self, row: int, least: float) -> np.ndarray:
        """The knots of x or y, `[size, bins + 1]`; the ends are exact."""
        steps, bound = self.steps(row, least), self.numbers["bound"]
        found = np.cumsum(np.concatenate([self.number(-bound)[:, None], steps], 1), 1)
        found[:, -1] = self.number(bound)
        return found

    def raw_slopes(self) -> np.ndarray:
        """At the knots, `[size, bins + 1]`."""
        k, at = self.bins, 2 * self.width
        found = np.zeros((self.size, k + 1))
        found[at + 1 : at + self.width, range(k)[0 if self.circular else 1 :]] = np.eye(self.width - 1)
        if self.circular:
            found[:, k] = found[:, 0]
        else:
            found[:, 0] = found[:, k] = self.number(self.shift)
        return found

    def parts(self) -> dict[str, np.ndarray]:
        """What a bin may need, by names, each `[size, bins]`. Places are seen from x (or y)."""
        x, y, d = self.knots(0, self.numbers["min_width"]), self.knots(1, self.numbers["min_height"]), self.raw_slopes()
        x[-1] = y[-1] = -1
        found = {
            "x0": x[:, :-1], "x1": x[:, 1:], "w": self.steps(0, self.numbers["min_width"]),
            "y0": y[:, :-1], "y1": y[:, 1:], "h": self.steps(1, self.numbers["min_height"]),
            "d0": d[:, :-1], "d1": d[:, 1:],
        }  # fmt: skip
        for name, value in (("least", self.numbers["min_slope"]), ("one", 1.0)):
            found[name] = np.repeat(self.number(value)[:, None], self.bins, 1)
        return {**found, "-y0": -found["y0"]}

    def distances(self, row: int) -> np.ndarray:
        """How far x (or y) is beyond the lower end of each bin, `[size, bins]`; the lowest is beyond every x."""
        lower = self.knots(row, self.numbers["min_height" if row else "min_width"])[:, :-1]
        lower[:, 0] = self.number(-3 * self.numbers["bound"])
        lower[-1] = -1
        return -lower

    def held(self, g: Builder, x: Value) -> Value:
        """x within the box: what the map adds to it is added to x itself, so that beyond the box it is the identity."""
        bound = self.numbers["bound"]
        return g.unsqueeze(x if self.circular else g.clip(x, -bound, bound), [-1])


def rqs_bin(g: Builder, table: RqsTable, raw: Sequence[Value], x: Value, row: int, names: Sequence[str]) -> Value:
    """The named parts of the bin of x (of y: row 1), `[.., M, names]`."""
    *shares, slopes = table.rows(*raw)
    logits, rest = assemble(g, shares, [slopes])
    soft = g.softmax(logits, -1)
    entries = [g.reshape(v, (*v.shape[:-2], size(v, -2) * size(v, -1))) for v in (soft, rest)]
    fixed = soft.array is not None and rest.array is not None  # the same for every sample: the products are constants
    whole = g.concat(entries if fixed else [*entries, x], -1)
    parts = table.parts()
    matrix = np.stack([parts[n] for n in names], -1).reshape(table.size, table.bins * len(names))
    distances = table.distances(row)
    if fixed:
        matrix, distances = matrix[:-1], distances[:-1]
    found, above = g.matmul(whole, g.const(matrix)), g.matmul(whole, g.const(distances))
    if fixed:
        above = g.add(above, x)
    # The bin's lower end is the nearest of those that x is beyond.
    nearness = g.unary("Reciprocal", above)
    k = g.op("ArgMax", nearness, shape=(*nearness.shape[:-1], 1), kind=INT, axis=nearness.rank - 1, keepdims=1)
    bins = picked(g, g.reshape(found, (*found.shape[:-1], table.bins, len(names))), k)
    return g.add(bins, g.mul(x, g.const(np.array([parts[n][-1, 0] for n in names])))) if fixed else bins


def picked(g: Builder, table: Value, k: Value) -> Value:
    """The rows `[.., M, n]` of a table `[.., M, bins, n]` at the bins `[.., M, 1]`."""
    m, bins, n = (size(table, a) for a in (-3, -2, -1))
    if table.rank == 3:  # the same for every sample
        index = g.binary("Add", g.squeeze(k, [-1]), g.const(bins * np.arange(m), INT), INT)
        return g.op("Gather", g.reshape(table, (m * bins, n)), index, shape=(*index.shape, n), axis=0)
    lead = broadcast(table.shape[:-2], k.shape[:-1])
    table, k = g.expand(table, (*lead, bins, n)), g.expand(k, (*lead, 1))
    return g.op("GatherND", table, k, shape=(*lead, n), batch_dims=len(lead))


def rqs(g: Builder, x: Value, n: Numbers, *raw: Value, circular: bool = False) -> Pair:
    """With t the place in the bin, r = 1 - t, s = h / w, p = s·t + d0·r and q = s·r + d1·t, all at least 0:
    y = (y1·t·p + y0·r·q) / (t·p + r·q), slope (s / (t·p + r·q))²·(t·q + r·p).

    The products stand along the axis of bins: (s·t, s·r, t, r, ..) times (q, p, p, q, 0, ..)."""
    table = RqsTable(size(raw[0], -1), n, circular)
    names = ["x0", "x1", "w", "h", "y1", "y0", "d0", "d1", "one", "one", "least", "least"]
    found = rqs_bin(g, table, raw, table.held(g, x), 0, names)
    x_ends, w, h, y_ends, d, rest = g.split(found, found.rank - 1, [2, 1, 1, 2, 2, 4])
    # -t and r: held to a sum of 1, which the ends' rounding would be off by.
    places = g.unary("LpNormalization", x_ends, axis=-1, p=1)
    eight = g.matmul(places, g.const([[-1, 0, 0, -1, -1, 0, 0, -1], [0, 1, 1, 0, 0, 1, 1, 0]]))
    s = g.div(h, w)
    # s·t, s·r, d0·r, d1·t, t, r, least·r, least·t; their sums p and q stand where the first two and t, r are.
    terms = g.mul(eight, g.concat([s, s, g.unary("Softplus", d), rest], -1))
    p = np.array([1, 0, 1, 0, 0, 0, 1, 0])
    q = np.array([0, 1, 0, 1, 0, 0, 0, 1])
    zero = 0 * p
    crossed = g.mul(terms, g.matmul(terms, g.const(np.stack([q, p, zero, zero, p, q, zero, zero], -1))))
    whole = g.matmul(crossed, g.const(np.array([0, 0, 0, 0, 1, 1, 0, 0])[:, None]))
    slopes, _, parts, _ = g.split(g.div(crossed, whole), crossed.rank - 1, [2, 2, 2, 2])
    change = g.reduce("ReduceSum", g.mul(parts, y_ends), [-1])
    return g.add(x, change), g.reduce("ReduceLogSum", g.mul(slopes, g.div(s, whole)), [-1])


def rqs_inverse(g: Builder, y: Value, n: Numbers, *raw: Value, circular: bool = False) -> Pair:
    """The quadratic of eq. 6-8 in the form without cancellation, then the forward slope there."""
    table = RqsTable(size(raw[0], -1), n, circular)
    names = ["x0", "w", "-y0", "h", "d0", "d1"]
    held = table.held(g, y)
    found = rqs_bin(g, table, raw, held, 1, names)
    x0, w, rise, h, d = g.split(found, found.rank - 1, [1, 1, 1, 1, 2])
    d0, d1 = g.split(g.add(g.unary("Softplus", d), n["min_slope"]), d.rank - 1, [1, 1])
    s = g.div(h, w)
    share = g.div(rise, h)
    # b is half the paper's; of the two forms of the root the one whose terms have one sign.
    bend = g.mul(share, g.sub(g.mul(g.add(d0, d1), 0.5), s))
    b, c = g.sub(g.mul(d0, 0.5), bend), g.mul(s, share)
    a = g.sub(s, g.mul(b, 2.0))
    square = g.clip(g.add(g.mul(b, b), g.mul(a, c)), g.tiny, None)
    both = g.add(g.unary("Abs", b), g.unary("Sqrt", square))
    t = g.where(g.binary("Less", b, 0.0, BOOL), g.div(both, a), g.div(c, both))
    rest = g.sub(1.0, t)
    p = g.add(g.mul(s, t), g.mul(d0, rest))
    q = g.add(g.mul(s, rest), g.mul(d1, t))
    ratio = g.div(s, g.add(g.mul(t, p), g.mul(rest, q)))
    slope = g.mul(g.mul(ratio, ratio), g.add(g.mul(t, q), g.mul(rest, p)))
    change, log_slope = g.squeeze(g.add(x0, g.mul(t, w)), [-1]), g.squeeze(g.unary("Log", slope), [-1])
    if not circular:  # at the end of the box the root may have lost what is known there: that it is the identity
        inside = g.cast(g.binary("Equal", g.squeeze(held, [-1]), y, BOOL), REAL)
        change, log_slope = g.mul(change, inside), g.mul(log_slope, inside)
    return g.add(y, change), log_slope


def rqs_circular(g: Builder, x: Value, n: Numbers, *raw: Value) -> Pair:
    return rqs(g, x, n, *raw, circular=True)


def rqs_circular_inverse(g: Builder, y: Value, n: Numbers, *raw: Value) -> Pair:
    return rqs_inverse(g, y, n, *raw, circular=True)


# ---- linear, quadratic, cubic -----------------------------------------------------------------------------


def knots(g: Builder, logits: Value, bound: float, least: float) -> Value:
    """The K + 1 knots on [-bound, bound], `[.., M, K + 1]`."""
    k = size(logits, -1)
    matrix, offset = knot_matrix(k, k, bound, least)
    return g.add(g.matmul(g.softmax(logits, -1), g.const(matrix)), g.const(offset))


def inner(g: Builder, table: Value) -> Value:
    return g.slice(table, -1, 1, size(table, -1) - 1)


def ends(g: Builder, table: Value, k: Value) -> tuple[Value, Value]:
    """Entries k and k + 1."""
    both = at(g, table, k, np.array([[0, 1]]))
    lo, hi = g.split(both, both.rank - 1, [1, 1])
    return lo, hi


def linear(g: Builder, x: Value, n: Numbers, heights: Value) -> Pair:
    """Bins of equal width (Müller et al. 2019, section 4.1)."""
    bins, bound = size(heights, -1), n["bound"]
    width = 2 * bound / bins
    box = Box.of(g, x, bound)
    k = bin_of(g, box.inside, g.const(width * np.arange(1, bins) - bound))
    y0, y1 = ends(g, knots(g, heights, bound, n["min_height"]), k)
    slope = g.mul(g.sub(y1, y0), 1 / width)
    start = g.sub(g.mul(g.cast(k, REAL), width), bound)
    return box.result(g, g.add(y0, g.mul(slope, g.sub(box.inside, start))), slope)


def linear_inverse(g: Builder, y: Value, n: Numbers, heights: Value) -> Pair:
    bins, bound = size(heights, -1), n["bound"]
    width = 2 * bound / bins
    box = Box.of(g, y, bound)
    table = knots(g, heights, bound, n["min_height"])
    k = bin_of(g, box.inside, inner(g, table))
    y0, y1 = ends(g, table, k)
    slope = g.mul(g.sub(y1, y0), 1 / width)
    start = g.sub(g.mul(g.cast(k, REAL), width), bound)
    return box.result(g, g.add(start, g.div(g.sub(box.inside, y0), slope)), slope)


def quadratic_tables(g: Builder, n: Numbers, widths: Value, heights: Value) -> tuple[Value, Value, Value]:
    """Knots of x, slopes at the knots (of mean 1 over the box), knots of y (Müller et al. 2019, section 4.2)."""
    bound, k = n["bound"], size(widths, -1)
    x_knots = knots(g, widths, bound, n["min_width"])
    step = g.matmul(x_knots, g.const((np.eye(k, k + 1, 1) - np.eye(k, k + 1)).T))
    pair = g.const((np.eye(k, k + 1, 1) + np.eye(k, k + 1)).T)
    raw = g.add(g.unary("Softplus", heights), 1e-3)
    area = total(g, g.mul(g.matmul(raw, pair), step))
    v = g.add(g.mul(g.div(raw, area), (1 - n["min_slope"]) * 4 * bound), n["min_slope"])
    rises = g.mul(g.mul(g.matmul(v, pair), step), 0.5)
    y_knots = g.sub(g.matmul(rises, g.const(np.triu(np.ones((k, k + 1)), 1))), bound)
    return x_knots, v, y_knots


def quadratic(g: Builder, x: Value, n: Numbers, widths: Value, heights: Value) -> Pair:
    box = Box.of(g, x, n["bound"])
    x_knots, v, y_knots = quadratic_tables(g, n, widths, heights)
    k = bin_of(g, box.inside, inner(g, x_knots))
    (x0, x1), (v0, v1) = ends(g, x_knots, k), ends(g, v, k)
    y0, _ = ends(g, y_knots, k)
    w = g.sub(x1, x0)
    t = g.div(g.sub(box.inside, x0), w)
    tilt = g.mul(g.sub(v1, v0), t)
    value = g.add(y0, g.mul(g.mul(w, t), g.add(v0, g.mul(tilt, 0.5))))
    return box.result(g, value, g.add(v0, tilt))


def quadratic_inverse(g: Builder, y: Value, n: Numbers, widths: Value, heights: Value) -> Pair:
    box = Box.of(g, y, n["bound"])
    x_knots, v, y_knots = quadratic_tables(g, n, widths, heights)
    k = bin_of(g, box.inside, inner(g, y_knots))
    (x0, x1), (v0, v1) = ends(g, x_knots, k), ends(g, v, k)
    y0, _ = ends(g, y_knots, k)
    w, dv = g.sub(x1, x0), g.sub(v1, v0)
    rise = g.div(g.sub(box.inside, y0), w)
    root = g.unary("Sqrt", g.clip(g.add(g.mul(v0, v0), g.mul(g.mul(dv, rise), 2.0)), g.tiny, None))
    t = g.div(g.mul(rise, 2.0), g.add(v0, root))
    return box.result(g, g.add(x0, g.mul(t, w)), g.add(v0, g.mul(dv, t)))


def cubic_tables(g: Builder, n: Numbers, widths: Value, heights: Value, raw_ends: Value) -> tuple[Value, Value, Value]:
    """Knots of x and y, and slopes at the knots by Steffen's rule (1990)."""
    bound, k = n["bound"], size(widths, -1)
    x_knots = knots(g, widths, bound, n["min_width"])
    y_knots = knots(g, heights, bound, n["min_height"])
    step = g.const((np.eye(k, k + 1, 1) - np.eye(k, k + 1)).T)
    w, h = g.matmul(x_knots, step), g.matmul(y_knots, step)
    s = g.div(h, w)
    least = n["min_slope"]
    third = math.log((1 / 3 - least) / (2 / 3 - least))
    edge = g.mul(g.add(g.mul(g.unary("Sigmoid", g.add(raw_ends, third)), 1 - 2 * least), least), 3.0)
    first = g.mul(g.slice(edge, -1, 0, 1), g.slice(s, -1, 0, 1))
    last = g.mul(g.slice(edge, -1, 1, 2), g.slice(s, -1, k - 1, k))
    if k == 1:
        return x_knots, y_knots, g.concat([first, last], -1)
    s0, s1 = g.slice(s, -1, 0, k - 1), g.slice(s, -1, 1, k)
    w0, w1 = g.slice(w, -1, 0, k - 1), g.slice(w, -1, 1, k)
    mean = g.div(g.add(g.mul(s0, w1), g.mul(s1, w0)), g.add(w0, w1))
    between = g.binary("Min", g.mul(g.binary("Min", s0, s1), 2.0), mean)
    return x_knots, y_knots, g.concat([first, between, last], -1)


def cubic_unit(g: Builder, t: Value, d0: Value, d1: Value) -> Pair:
    """The cubic from (0, 0) to (1, 1) with end slopes d0, d1: value and slope."""
    a = g.sub(g.add(d0, d1), 2.0)
    b = g.sub(3.0, g.add(g.add(d0, d0), d1))
    value = g.mul(t, g.add(d0, g.mul(t, g.add(b, g.mul(t, a)))))
    return value, g.add(d0, g.mul(t, g.add(g.add(b, b), g.mul(g.mul(a, 3.0), t))))


def cubic_terms(g: Builder, known: Value, n: Numbers, raw: Sequence[Value], inverse: bool) -> list[Value]:
    x_knots, y_knots, slopes = cubic_tables(g, n, raw[0], raw[1], raw[2])
    k = bin_of(g, known, inner(g, y_knots if inverse else x_knots))
    (x0, x1), (y0, y1), (d0, d1) = ends(g, x_knots, k), ends(g, y_knots, k), ends(g, slopes, k)
    w, h = g.sub(x1, x0), g.sub(y1, y0)
    ratio = g.div(w, h)
    return [w, x0, h, y0, g.mul(d0, ratio), g.mul(d1, ratio)]


def cubic(g: Builder, x: Value, n: Numbers, *raw: Value) -> Pair:
    """Monotone piecewise-cubic map (Durkan et al. 2019, Cubic-Spline Flows)."""
    box = Box.of(g, x, n["bound"])
    w, x0, h, y0, d0, d1 = cubic_terms(g, box.inside, n, raw, False)
    value, slope = cubic_unit(g, g.div(g.sub(box.inside, x0), w), d0, d1)
    return box.result(g, g.add(y0, g.mul(h, value)), g.mul(slope, g.div(h, w)))


def cubic_inverse(g: Builder, y: Value, n: Numbers, *raw: Value) -> Pair:
    """Newton's steps kept in a bracket that at least halves, in a `Loop`; one more step after it."""
    box = Box.of(g, y, n["bound"])
    w, x0, h, y0, d0, d1 = cubic_terms(g, box.inside, n, raw, True)
    goal = g.div(g.sub(box.inside, y0), h)
    goal = g.expand(goal, broadcast(goal.shape, d0.shape))
    zero = g.mul(goal, 0.0)

    def narrow(i: Value, state: list[Value]) -> tuple[None, list[Value]]:
        lo, hi, t = state
        value, slope = cubic_unit(g, t, d0, d1)
        below = g.binary("Less", value, goal, BOOL)
        lo, hi = g.where(below, t, lo), g.where(below, hi, t)
        step = g.sub(t, g.div(g.sub(value, goal), slope))
        within = g.binary("And", g.binary("Greater", step, lo, BOOL), g.binary("Less", step, hi, BOOL), BOOL)
        return None, [lo, hi, g.where(within, step, g.mul(g.add(lo, hi), 0.5))]

    start = [zero, g.add(zero, 1.0), g.clip(goal, 0.0, 1.0)]
    t = g.loop(20 if g.dtype == "float64" else 12, start, narrow, "newton")[2]
    value, slope = cubic_unit(g, t, d0, d1)
    t = g.sub(t, g.div(g.sub(value, goal), slope))
    slope = cubic_unit(g, t, d0, d1)[1]
    return box.result(g, g.add(x0, g.mul(t, w)), g.mul(slope, g.div(h, w)))


SPLINES: dict[str, Callable[..., Pair]] = {
    "rqs": rqs, "rqs_inverse": rqs_inverse, "rqs_circular": rqs_circular, "rqs_circular_inverse": rqs_circular_inverse,
    "linear_spline": linear, "linear_spline_inverse": linear_inverse, "quadratic_spline": quadratic,
    "quadratic_spline_inverse": quadratic_inverse, "cubic_spline": cubic, "cubic_spline_inverse": cubic_inverse,
}  # fmt: skip


def _flat(w: Lowering, v: Value, axes: int) -> Value:
    """The last `axes` axes as one (none: an axis of size 1)."""
    if axes == 0:
        return w.g.unsqueeze(v, [-1])
    own = v.shape[v.rank - axes :]
    return w.g.reshape(v, (*v.shape[: v.rank - axes], math.prod(d for d in own if isinstance(d, int))))


def _pair(w: Lowering, n: Node, op: str) -> Pair:
    """Value and log-slope; each spline is written once, and the slope of an inverse is found again by its result."""
    x, *params = n.inputs
    base = op.removesuffix("_inverse")
    numbers = numbers_of(n)
    key = (op, *numbers.values(), id(w.value(x)), *(id(w.value(p)) for p in params))
    known = w.shared.splines
    if key not in known:
        rank = n.tensor.rank
        raw = []
        for p in params:
            bins = bin_axis(w.type(x), w.type(p), n.attrs)
            assert isinstance(bins, Axis)
            v = w.full_axes(w.align(w.value(p), w.type(p), TensorType((bins, *n.tensor.axes))), (bins, *n.tensor.axes))
            v = _flat(w, v, rank)
            raw.append(w.g.transpose(v, [*range(v.rank - 2), v.rank - 1, v.rank - 2]))
        column = _flat(w, w.full_axes(w.aligned(x, n.tensor), n.tensor.axes), rank)
        with w.scope(n.label or op), w.grouped(op):
            found = SPLINES[op](w.g, column, numbers, *raw)
        shape = n.tensor.shape
        made = [w.g.reshape(v, (*v.shape[:-1], *shape)) if rank else w.g.squeeze(v, [-1]) for v in found]
        known[key] = (made[0], made[1])
        w.shared.kept += [w.value(i) for i in n.inputs]
        if op.endswith("_inverse"):
            known[(base, *numbers.values(), id(made[0]), *key[-len(params) :])] = known[key]
    return known[key]


def _value(w: Lowering, n: Node) -> Value:
    return _pair(w, n, n.op)[0]


def _log_slope(w: Lowering, n: Node) -> Value:
    return _pair(w, n, n.op.removesuffix("_log_slope"))[1]


for _kind in SPLINES:
    EMITTERS[_kind] = _value
    if not _kind.endswith("_inverse"):
        EMITTERS[f"{_kind}_log_slope"] = _log_slope
