"""Monotone splines as few nodes: knots by one product, bins by comparison, one gather, no branches.

The maps are those of the PyTorch runtime (`rqs` and its kin); the formulas are arranged for a short graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from flowlang.backends.onnx.graph import BOOL, INT, REAL, Builder, Value, broadcast
from flowlang.backends.onnx.lower import EMITTERS, Lowering

from flowlang.ir.graph import Node
from flowlang.ir.types import TensorType

LOGIT_BOUND = 8.0
LEAST = 1e-3


def soft_bound(g: Builder, x: Value, bound: float = LOGIT_BOUND) -> Value:
    return g.mul(g.unary("Tanh", g.mul(x, 1 / bound)), bound)


def knots(g: Builder, logits: Value, bound: float) -> Value:
    """The K + 1 knots on [-bound, bound] of K bins, each with at least the share LEAST: a product and an offset."""
    k = logits.shape[-1]
    assert isinstance(k, int)
    share = g.softmax(soft_bound(g, logits), -1)
    upto = np.triu(np.ones((k, k + 1)), 1)
    upto[:, -1] = 0  # the ends are exact
    offset = bound * (2 * LEAST * np.arange(k + 1) - 1)
    offset[-1] = bound
    product = _rows(g, share, 2 * bound * (1 - LEAST * k) * upto)
    return g.add(product, g.const(offset))


def _rows(g: Builder, x: Value, matrix: object) -> Value:
    """The last axis times a constant matrix."""
    m = g.const(matrix)
    if x.rank == 1:
        return g.squeeze(g.matmul(g.unsqueeze(x, [-2]), m), [-2])
    return g.matmul(x, m)


def bin_of(g: Builder, x: Value, table: Value) -> Value:
    """The bin of x (`[..., 1]`) among knots `[..., K + 1]`, as int64 `[..., 1]`."""
    n = table.shape[-1]
    assert isinstance(n, int)
    if n == 2:
        return g.cast(g.mul(x, 0.0), INT)
    over = g.binary("GreaterOrEqual", x, g.slice(table, table.rank - 1, 1, n - 1), BOOL)
    return g.cast(g.reduce("ReduceSum", g.cast(over, REAL), [-1], keep=True), INT)


def gathered(g: Builder, tables: Sequence[Value], at: Value, places: Sequence[tuple[int, int]]) -> list[Value]:
    """Entries of tables (`[..., n]` each) at the bin plus an offset: (table, offset) pairs, each `[..., 1]`."""
    sizes = [t.shape[-1] for t in tables]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    lead = broadcast(at.shape[:-1], *(t.shape[:-1] for t in tables))
    whole = g.concat(list(tables), -1)
    whole = g.expand(whole, (*lead, whole.shape[-1]))
    index = g.binary("Add", at, g.const([int(starts[t]) + o for t, o in places], INT), INT)
    index = g.expand(index, (*lead, len(places)))
    return g.split(g.gather_elements(whole, index, -1), whole.rank - 1, [1] * len(places))


Pair = tuple[Value, Value]


def in_bound(g: Builder, x: Value, bound: float) -> tuple[Value, Value]:
    """x as `[..., 1]` and clamped to the spline's interval."""
    column = g.unsqueeze(x, [-1])
    return column, g.clip(column, -bound, bound)


def finish(g: Builder, column: Value, inside: Value, value: Value, slope: Value) -> Pair:
    """Identity tails, without a branch: beyond the bound the clamped part moves along. Log-slopes end at 0 there."""
    y = g.add(value, g.sub(column, inside))
    return g.squeeze(y, [-1]), g.squeeze(g.unary("Log", slope), [-1])


def finish_where(g: Builder, column: Value, inside: Value, value: Value, slope: Value) -> Pair:
    """Identity tails where the slope at the bound is not 1."""
    same = g.binary("Equal", column, inside, BOOL)
    y = g.add(value, g.sub(column, inside))
    return g.squeeze(y, [-1]), g.squeeze(g.where(same, g.unary("Log", slope), 0.0), [-1])


# ---- rational-quadratic (Durkan et al. 2019, eq. 4-8) ---------------------------------------------------


def rqs_tables(g: Builder, widths: Value, heights: Value, slopes: Value, bound: float) -> tuple[Value, Value, Value]:
    x_knots, y_knots = knots(g, widths, bound), knots(g, heights, bound)
    k = slopes.shape[-1]
    assert isinstance(k, int)
    inner = g.unary("Softplus", g.add(soft_bound(g, slopes), math.log(math.expm1(1 - LEAST))))
    # Ones at both ends come from a product and an offset, too.
    place = np.zeros((k, k + 2))
    place[:, 1:-1] = np.eye(k)
    offset = np.full(k + 2, LEAST)
    offset[[0, -1]] = 1
    return x_knots, y_knots, g.add(_rows(g, inner, place), g.const(offset))


def rqs_at(g: Builder, known: Value, inverse: bool, tables: Sequence[Value]) -> list[Value]:
    k = bin_of(g, known, tables[1] if inverse else tables[0])
    return gathered(g, tables, k, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])


def rqs(g: Builder, x: Value, bound: float, widths: Value, heights: Value, slopes: Value) -> Pair:
    """With a, b the distances to the bin's ends, p = h·a + w·d0·b and q = h·b + w·d1·a:
    y = y0 + h·a·p / (a·p + b·q), and the slope is (h / (a·p + b·q))²·w·(a·q + b·p). No term is negative."""
    column, inside = in_bound(g, x, bound)
    x0, x1, y0, y1, d0, d1 = rqs_at(g, inside, False, rqs_tables(g, widths, heights, slopes, bound))
    a, b = g.sub(inside, x0), g.sub(x1, inside)
    w, h = g.sub(x1, x0), g.sub(y1, y0)
    p = g.add(g.mul(h, a), g.mul(g.mul(w, d0), b))
    q = g.add(g.mul(h, b), g.mul(g.mul(w, d1), a))
    ap = g.mul(a, p)
    den = g.add(ap, g.mul(b, q))
    ratio = g.div(h, den)
    value = g.add(y0, g.mul(ratio, ap))
    slope = g.mul(g.mul(g.mul(ratio, ratio), w), g.add(g.mul(a, q), g.mul(b, p)))
    return finish(g, column, inside, value, slope)


def rqs_inverse(g: Builder, y: Value, bound: float, widths: Value, heights: Value, slopes: Value) -> Pair:
    """The quadratic of eq. 6-8 in the form without cancellation, then the forward slope there."""
    column, inside = in_bound(g, y, bound)
    x0, x1, y0, y1, d0, d1 = rqs_at(g, inside, True, rqs_tables(g, widths, heights, slopes, bound))
    w, h = g.sub(x1, x0), g.sub(y1, y0)
    s = g.div(h, w)
    rise = g.sub(inside, y0)
    bend = g.mul(rise, g.sub(g.add(d0, d1), g.add(s, s)))
    qa, qb = g.add(g.mul(h, g.sub(s, d0)), bend), g.sub(g.mul(h, d0), bend)
    qc = g.mul(s, rise)
    root = g.unary("Sqrt", g.clip(g.add(g.mul(qb, qb), g.mul(g.mul(qa, qc), 4.0)), g.tiny, None))
    theta = g.clip(g.div(g.add(qc, qc), g.add(qb, root)), 0.0, 1.0)
    rest = g.sub(1.0, theta)
    p = g.add(g.mul(s, theta), g.mul(d0, rest))
    q = g.add(g.mul(s, rest), g.mul(d1, theta))
    den = g.add(g.mul(theta, p), g.mul(rest, q))
    ratio = g.div(s, den)
    slope = g.mul(g.mul(ratio, ratio), g.add(g.mul(theta, q), g.mul(rest, p)))
    return finish(g, column, inside, g.add(x0, g.mul(theta, w)), slope)


# ---- linear, quadratic, cubic -----------------------------------------------------------------------------


def linear(g: Builder, x: Value, bound: float, heights: Value) -> Pair:
    """Bins of equal width (Müller et al. 2019, section 4.1)."""
    k = heights.shape[-1]
    assert isinstance(k, int)
    width = 2 * bound / k
    column, inside = in_bound(g, x, bound)
    y_knots = knots(g, heights, bound)
    at = g.clip(g.unary("Floor", g.mul(g.add(inside, bound), 1 / width)), 0.0, k - 1.0)
    y0, y1 = gathered(g, [y_knots], g.cast(at, INT), [(0, 0), (0, 1)])
    slope = g.mul(g.sub(y1, y0), 1 / width)
    start = g.sub(g.mul(at, width), bound)
    value = g.add(y0, g.mul(slope, g.sub(inside, start)))
    return finish_where(g, column, inside, value, slope)


def linear_inverse(g: Builder, y: Value, bound: float, heights: Value) -> Pair:
    k = heights.shape[-1]
    assert isinstance(k, int)
    width = 2 * bound / k
    column, inside = in_bound(g, y, bound)
    y_knots = knots(g, heights, bound)
    at = bin_of(g, inside, y_knots)
    y0, y1 = gathered(g, [y_knots], at, [(0, 0), (0, 1)])
    slope = g.mul(g.sub(y1, y0), 1 / width)
    start = g.sub(g.mul(g.cast(at, REAL), width), bound)
    return finish_where(g, column, inside, g.add(start, g.div(g.sub(inside, y0), slope)), slope)


def quadratic_tables(g: Builder, widths: Value, heights: Value, bound: float) -> tuple[Value, Value, Value]:
    """x-knots, densities at the knots, y-knots (Müller et al. 2019, section 4.2)."""
    x_knots = knots(g, widths, bound)
    n = x_knots.shape[-1]
    assert isinstance(n, int)
    w = g.sub(g.slice(x_knots, x_knots.rank - 1, 1, n), g.slice(x_knots, x_knots.rank - 1, 0, n - 1))
    v = g.add(g.unary("Exp", soft_bound(g, heights)), LEAST)
    pairs = g.add(g.slice(v, v.rank - 1, 1, n), g.slice(v, v.rank - 1, 0, n - 1))
    area = g.mul(g.reduce("ReduceSum", g.mul(pairs, w), [-1], keep=True), 0.5)
    scale = g.div(2 * bound, area)
    steps = g.mul(g.mul(g.mul(pairs, scale), w), 0.5)
    upto = np.triu(np.ones((n - 1, n)), 1)
    upto[:, -1] = 0
    offset = np.full(n, -bound)
    offset[-1] = bound
    return x_knots, g.mul(v, scale), g.add(_rows(g, steps, upto), g.const(offset))


def quadratic(g: Builder, x: Value, bound: float, widths: Value, heights: Value) -> Pair:
    column, inside = in_bound(g, x, bound)
    x_knots, v, y_knots = quadratic_tables(g, widths, heights, bound)
    at = bin_of(g, inside, x_knots)
    x0, x1, v0, v1, y0 = gathered(g, [x_knots, v, y_knots], at, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)])
    w = g.sub(x1, x0)
    alpha = g.clip(g.div(g.sub(inside, x0), w), 0.0, 1.0)
    tilt = g.mul(g.sub(v1, v0), alpha)
    value = g.add(y0, g.mul(g.mul(w, alpha), g.add(v0, g.mul(tilt, 0.5))))
    return finish_where(g, column, inside, value, g.add(v0, tilt))


def quadratic_inverse(g: Builder, y: Value, bound: float, widths: Value, heights: Value) -> Pair:
    column, inside = in_bound(g, y, bound)
    x_knots, v, y_knots = quadratic_tables(g, widths, heights, bound)
    at = bin_of(g, inside, y_knots)
    x0, x1, v0, v1, y0 = gathered(g, [x_knots, v, y_knots], at, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)])
    w = g.sub(x1, x0)
    rise = g.clip(g.div(g.sub(inside, y0), w), 0.0, None)
    dv = g.sub(v1, v0)
    root = g.unary("Sqrt", g.clip(g.add(g.mul(v0, v0), g.mul(g.mul(dv, rise), 2.0)), g.tiny, None))
    alpha = g.clip(g.div(g.mul(rise, 2.0), g.add(v0, root)), 0.0, 1.0)
    return finish_where(g, column, inside, g.add(x0, g.mul(alpha, w)), g.add(v0, g.mul(dv, alpha)))


def cubic_tables(g: Builder, widths: Value, heights: Value, ends: Value, bound: float) -> tuple[Value, Value, Value]:
    """Knots and Steffen's monotone slopes (Durkan et al. 2019, Cubic-Spline Flows)."""
    xk, yk = knots(g, widths, bound), knots(g, heights, bound)
    n = xk.shape[-1]
    assert isinstance(n, int)

    def part(v: Value, start: int, stop: int) -> Value:
        return g.slice(v, v.rank - 1, start, stop)

    w, h = g.sub(part(xk, 1, n), part(xk, 0, n - 1)), g.sub(part(yk, 1, n), part(yk, 0, n - 1))
    s = g.div(h, w)
    edge = g.mul(g.unary("Sigmoid", g.sub(soft_bound(g, ends), math.log(2))), 3.0)
    first = g.mul(part(edge, 0, 1), part(s, 0, 1))
    last = g.mul(part(edge, 1, 2), part(s, n - 2, n - 1))
    if n == 2:
        return xk, yk, g.concat([first, last], -1)
    s0, s1, w0, w1 = part(s, 0, n - 2), part(s, 1, n - 1), part(w, 0, n - 2), part(w, 1, n - 1)
    mean = g.div(g.add(g.mul(s0, w1), g.mul(s1, w0)), g.add(w0, w1))
    inner = g.binary("Min", g.mul(g.binary("Min", s0, s1), 2.0), mean)
    return xk, yk, g.concat([first, inner, last], -1)


def cubic_unit(g: Builder, t: Value, d0: Value, d1: Value) -> Pair:
    """The cubic from (0, 0) to (1, 1) with end slopes d0, d1: value and slope."""
    a = g.sub(g.add(d0, d1), 2.0)
    b = g.sub(3.0, g.add(g.add(d0, d0), d1))
    value = g.mul(t, g.add(d0, g.mul(t, g.add(b, g.mul(t, a)))))
    return value, g.add(d0, g.mul(t, g.add(g.add(b, b), g.mul(g.mul(a, 3.0), t))))


def cubic_terms(
    g: Builder, known: Value, inverse: bool, widths: Value, heights: Value, ends: Value, bound: float
) -> list[Value]:
    tables = cubic_tables(g, widths, heights, ends, bound)
    at = bin_of(g, known, tables[1] if inverse else tables[0])
    x0, x1, y0, y1, d0, d1 = gathered(g, tables, at, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
    w, h = g.sub(x1, x0), g.sub(y1, y0)
    ratio = g.div(w, h)
    return [w, x0, h, y0, g.mul(d0, ratio), g.mul(d1, ratio)]


def cubic_slope(g: Builder, slope: Value, w: Value, h: Value) -> Value:
    return g.mul(g.clip(slope, g.eps, None), g.div(h, w))


def cubic(g: Builder, x: Value, bound: float, widths: Value, heights: Value, ends: Value) -> Pair:
    column, inside = in_bound(g, x, bound)
    w, x0, h, y0, d0, d1 = cubic_terms(g, inside, False, widths, heights, ends, bound)
    value, slope = cubic_unit(g, g.clip(g.div(g.sub(inside, x0), w), 0.0, 1.0), d0, d1)
    return finish_where(g, column, inside, g.add(y0, g.mul(h, value)), cubic_slope(g, slope, w, h))


def cubic_inverse(g: Builder, y: Value, bound: float, widths: Value, heights: Value, ends: Value) -> Pair:
    """Bisection in a `Loop`, then one Newton step."""
    column, inside = in_bound(g, y, bound)
    w, x0, h, y0, d0, d1 = cubic_terms(g, inside, True, widths, heights, ends, bound)
    goal = g.clip(g.div(g.sub(inside, y0), h), 0.0, 1.0)
    shape = broadcast(goal.shape, d0.shape)
    goal = g.expand(goal, shape)
    zero = g.mul(goal, 0.0)

    def halve(i: Value, ends: list[Value]) -> tuple[None, list[Value]]:
        lo, hi = ends
        middle = g.mul(g.add(lo, hi), 0.5)
        below = g.binary("Less", cubic_unit(g, middle, d0, d1)[0], goal, BOOL)
        return None, [g.where(below, middle, lo), g.where(below, hi, middle)]

    lo, hi = g.loop(54 if g.dtype == "float64" else 26, [zero, g.add(zero, 1.0)], halve, "bisect")
    t = g.mul(g.add(lo, hi), 0.5)
    value, slope = cubic_unit(g, t, d0, d1)
    t = g.clip(g.sub(t, g.div(g.sub(value, goal), g.clip(slope, g.eps, None))), 0.0, 1.0)
    slope = cubic_unit(g, t, d0, d1)[1]
    return finish_where(g, column, inside, g.add(x0, g.mul(t, w)), cubic_slope(g, slope, w, h))


SPLINES: dict[str, Callable[..., Pair]] = {
    "rqs": rqs, "rqs_inverse": rqs_inverse, "linear_spline": linear, "linear_spline_inverse": linear_inverse,
    "quadratic_spline": quadratic, "quadratic_spline_inverse": quadratic_inverse, "cubic_spline": cubic,
    "cubic_spline_inverse": cubic_inverse,
}  # fmt: skip


def _pair(w: Lowering, n: Node, op: str) -> Pair:
    """Value and log-slope; each spline is written once, and the slope of an inverse is found again by its result."""
    x, *params = n.inputs
    base = op.removesuffix("_inverse")
    bound = float(n.attrs.get("bound", 3.0))
    key = (op, bound, id(w.value(x)), *(id(w.value(p)) for p in params))
    known = w.shared.splines
    if key not in known:
        arguments = []
        for p in params:
            t = w.type(p)
            arguments.append(w.align(w.value(p), t, TensorType((*n.tensor.axes, t.axes[-1]))))
        with w.scope(n.label or op):
            known[key] = SPLINES[op](w.g, w.aligned(x, n.tensor), bound, *arguments)
        if op.endswith("_inverse"):
            known[(base, bound, id(known[key][0]), *key[3:])] = known[key]
    return known[key]


def _value(w: Lowering, n: Node) -> Value:
    return _pair(w, n, n.op)[0]


def _log_slope(w: Lowering, n: Node) -> Value:
    return _pair(w, n, n.op.removesuffix("_log_slope"))[1]


for _kind in SPLINES:
    EMITTERS[_kind] = _value
    if not _kind.endswith("_inverse"):
        EMITTERS[f"{_kind}_log_slope"] = _log_slope
