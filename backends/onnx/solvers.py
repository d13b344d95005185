"""Inverses by iteration, as `Loop`: slice by slice, by bracketing, by fixed point; and the estimate of a log-det.

Each follows the solver of the same name in the PyTorch runtime: same rounds, same stopping rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from flowlang.backends.onnx.graph import BOOL, INT, REAL, Builder, Value
from flowlang.backends.onnx.incremental import Incremental, NotStatic
from flowlang.backends.onnx.lower import Lowering, Unlowered, emitter
from flowlang.backends.onnx.tangents import Tangents

from flowlang.derive.programs import Program
from flowlang.derive.schedule import schedule
from flowlang.ir.graph import Node
from flowlang.ir.ops.control import Series


def body_of(w: Lowering, n: Node, outer: list[int]) -> Callable[[Value], list[Value]]:
    """The solver's body as a function of its entry; what it captures are values of the model."""
    body: Program = n.attrs["body"]
    captured = dict(zip(body.inputs[1:], (w.env[o] for o in outer), strict=True))

    def run(x: Value) -> list[Value]:
        inner = Lowering(w.g, w.shared, w.weights, w.leads)
        return inner.run(body.graph, body.outputs, {body.inputs[0]: x, **captured})

    return run


@emitter("scan_solve")
def _scan(w: Lowering, n: Node) -> Value:
    """One `Loop`: incremental where the body has a schedule, else each round takes its slices from the whole body."""
    target, *outer = n.inputs
    body: Program = n.attrs["body"]
    outer = [target, *outer] if len(body.inputs) == len(n.inputs) + 1 else outer
    g, t = w.g, n.tensor
    size, position = t.size(n.attrs["axis"]), t.position(n.attrs["axis"])
    hint = f"scan_{n.attrs['axis']}"
    w.shared.scans = True
    plan = schedule(body, n.attrs["axis"], bool(n.attrs["reverse"])) if w.shared.incremental else None
    if plan is not None:
        captured = {i: w.env[o] for i, o in zip(plan.body.inputs[1:], outer, strict=True)}
        mark = g.mark()
        try:
            return Incremental(w, plan, captured).run(hint)
        except NotStatic:
            g.undo(mark)
    step = body_of(w, n, outer)
    levels = np.array(n.attrs["levels"])
    index = g.const(levels.reshape([size if k == position else 1 for k in range(t.rank)]), INT)

    def round_(i: Value, values: list[Value]) -> tuple[None, list[Value]]:
        here = g.binary("Equal", index, i, BOOL)
        return None, [g.where(here, step(values[0])[0], values[0])]

    start = g.filled(float(n.attrs["placeholder"]), (*w.leads, *t.shape))
    return g.loop(int(levels.max(initial=-1)) + 1, [start], round_, hint)[0]


def place(g: Builder, t: Value, lo: float, hi: float) -> tuple[Value, Value | None]:
    """The real line onto (lo, hi), with its slope (None: 1)."""
    if lo > -math.inf and hi < math.inf:
        p = g.unary("Sigmoid", t)
        return g.add(g.mul(p, hi - lo), lo), g.mul(g.mul(p, g.sub(1.0, p)), hi - lo)
    if lo > -math.inf:
        return g.add(g.unary("Softplus", t), lo), g.unary("Sigmoid", t)
    if hi < math.inf:
        return g.sub(hi, g.unary("Softplus", g.neg(t))), g.unary("Sigmoid", g.neg(t))
    return t, None


def finite(g: Builder, x: Value) -> Value:
    """Neither infinite nor NaN."""
    return g.binary("Equal", g.mul(x, 0.0), 0.0, BOOL)


def any_of(g: Builder, c: Value) -> Value:
    """Whether a condition holds anywhere, as one boolean."""
    found = g.reduce("ReduceMax", g.cast(c, REAL), [-k - 1 for k in range(c.rank)])
    return g.binary("Greater", found, 0.5, BOOL)


@emitter("bracket_solve")
def _bracket(w: Lowering, n: Node) -> Value:
    """Two `Loop`s: the bracket grows until it holds the root; then Newton steps that stay inside it."""
    target, *outer = n.inputs
    f = body_of(w, n, outer)
    g = w.g
    lo, hi = float(n.attrs["lo"]), float(n.attrs["hi"])
    goal = w.full(w.value(target), n.tensor.rank)
    sign = 1.0 if n.attrs["increasing"] else -1.0
    wide = lo > -math.inf and hi < math.inf

    def error(t: Value) -> tuple[Value, Value, Value | None]:
        x, dx = place(g, t, lo, hi)
        value, slope = f(x)
        return g.mul(g.sub(value, goal), sign), slope, dx

    def grow(i: Value, ends: list[Value]) -> tuple[Value, list[Value]]:
        a, b = ends
        high = g.binary("Greater", error(a)[0], 0.0, BOOL)
        low = g.binary("Less", error(b)[0], 0.0, BOOL)
        new_a = g.where(high, g.mul(a, 4.0), g.where(low, b, a))
        new_b = g.where(low, g.mul(b, 4.0), g.where(high, a, b))
        return any_of(g, g.binary("Or", high, low, BOOL)), [new_a, new_b]

    minus_one = g.filled(-1.0, goal.shape)
    a, b = g.loop(6 if wide else 20, [minus_one, g.neg(minus_one)], grow, "grow_bracket")
    still = g.unary("Not", finite(g, goal), BOOL)

    def narrow(i: Value, state: list[Value]) -> tuple[Value, list[Value]]:
        a, b, t = state
        e, slope, dx = error(t)
        a = g.where(g.binary("LessOrEqual", e, 0.0, BOOL), t, a)
        b = g.where(g.binary("GreaterOrEqual", e, 0.0, BOOL), t, b)
        newton = g.sub(t, g.div(g.mul(e, sign), slope if dx is None else g.mul(slope, dx)))
        within = g.binary("And", g.binary("Greater", newton, a, BOOL), g.binary("Less", newton, b, BOOL), BOOL)
        fourth = g.binary("Equal", g.op("Mod", i, g.const(4, INT), shape=(), kind=INT), g.const(3, INT), BOOL)
        within = g.binary("And", within, g.unary("Not", fourth, BOOL), BOOL)
        new = g.where(within, newton, g.mul(g.add(a, b), 0.5))
        near = g.mul(g.add(g.unary("Abs", t), 1.0), g.eps)
        done = g.binary("Or", g.binary("LessOrEqual", g.unary("Abs", g.sub(new, t)), near, BOOL), still, BOOL)
        go = g.binary("Or", any_of(g, g.unary("Not", done, BOOL)), fourth, BOOL)
        return go, [a, b, new]

    rounds = 80 if g.dtype == "float64" else 48
    t = g.loop(rounds, [a, b, g.mul(g.add(a, b), 0.5)], narrow, "solve")[2]
    x = place(g, t, lo, hi)[0]
    x = g.where(g.binary("Equal", goal, goal, BOOL), x, goal)
    value, slope = f(x)
    step = g.div(g.sub(value, goal), slope)
    return g.sub(x, g.where(finite(g, step), step, 0.0))


@emitter("fixed_point_solve")
def _fixed_point(w: Lowering, n: Node) -> Value:
    """x = y - g(x) until it moves no more, in at most as many rounds as the certified constant needs."""
    target, *outer = n.inputs
    residual = body_of(w, n, outer)
    g = w.g
    y = w.full(w.value(target), n.tensor.rank)
    constant = max(float(n.attrs["constant"]), 1e-3)
    rounds = min(math.ceil(math.log(g.eps) / math.log(constant)) + 2, 2000)
    everywhere = [-k - 1 for k in range(y.rank)]

    def again(i: Value, state: list[Value]) -> tuple[Value, list[Value]]:
        new = g.sub(y, residual(state[0])[0])
        moved = g.reduce("ReduceMax", g.unary("Abs", g.sub(new, state[0])), everywhere)
        size = g.reduce("ReduceMax", g.unary("Abs", new), everywhere)
        return g.binary("Greater", moved, g.mul(g.add(size, 1.0), g.eps), BOOL), [new]

    return g.loop(rounds, [y], again, "fixed_point")[0]


def unit(w: Lowering, point: Value, shape: tuple[int, ...], k: int) -> Value:
    """The k-th unit vector, of the point's shape."""
    one = np.zeros(math.prod(shape))
    one[k] = 1.0
    return w.g.add(w.g.mul(point, 0.0), w.g.const(one.reshape(shape)))


@emitter("estimate_log_det")
def _estimate(w: Lowering, n: Node) -> Value:
    """Unbiased log|det(I + dg/dx)| (Chen et al. 2019, eq. 6): the first terms of the power series always, then at least one
    more with weights 1/P(N >= k); `probe` (normal) and `extra` (geometric, p = 1/2) are random inputs. The law of the
    number of terms is geometric whatever the module's is: each is unbiased. `exact`: the whole Jacobian."""
    x, *outer = n.inputs
    g, t = w.g, w.type(x)
    point = w.full(w.value(x), t.rank)
    body: Program = n.attrs["body"]
    tangents = Tangents(w, dict(zip(body.inputs[1:], (w.env[o] for o in outer), strict=True)))
    push = tangents.linearise(body, point)
    series: Series = n.attrs["series"]
    event = [-k - 1 for k in range(t.rank)]
    if series.law == "exact":
        columns = [push(unit(w, point, t.shape, k)) for k in range(t.count)]
        flat = [g.reshape(c, (*w.leads, t.count)) for c in columns]
        jacobian = g.add(g.concat([g.unsqueeze(c, [-1]) for c in flat], -1), g.const(np.eye(t.count)))
        return g.unary("Log", g.unary("Abs", g.op("Det", jacobian, shape=w.leads)))
    if series.surrogate:
        raise Unlowered(n, "the surrogate of a gradient is no density", "export the program that gives the estimate")
    path = "/".join(w.g.scopes)
    probe = w.shared.noise(f"{path}/probe" if path else "probe", "normal", point.shape, None, None)
    extra = w.shared.noise(f"{path}/extra" if path else "extra", "geometric", (), None, None)
    exact, ratio = series.later + 1, 0.5

    def term(i: Value, state: list[Value]) -> tuple[None, list[Value]]:
        v, total = state
        v = push(v)
        k = g.add(g.cast(i, REAL), 1.0)
        odd = g.op("Mod", i, g.const(2, INT), shape=(), kind=INT)
        sign = g.sub(1.0, g.mul(g.cast(odd, REAL), 2.0))
        beyond = g.clip(g.sub(k, float(exact)), 0.0, None)
        weight = g.div(g.mul(sign, g.binary("Pow", 1 / (1 - ratio), beyond)), k)
        part = g.reduce("ReduceSum", g.mul(v, probe), event)
        return None, [v, g.add(total, g.mul(part, weight))]

    count = g.binary("Add", g.cast(extra, INT), g.const(exact, INT), INT)
    zero = g.filled(0.0, w.leads)
    return g.loop(count, [probe, zero], term, "power_series")[1]
