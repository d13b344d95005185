"""Initial value problems as `Loop`: Runge-Kutta in equal steps, or in steps chosen for each sample by itself.

The methods are those of the PyTorch runtime's `odes`, step for step. A trajectory that needs steps below the
precision has no result: it is NaN here, where the module raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowlang.backends.onnx.graph import BOOL, REAL, Builder, Value
from flowlang.backends.onnx.lower import Lowering, Result, emitter
from flowlang.backends.onnx.solvers import any_of, finite

from flowlang.analysis.solvers import order
from flowlang.ir.graph import Node
from flowlang.ir.tableau import Tableau
from flowlang.ir.tangents import plain_method
from flowlang.ir.types import TensorType

State = list[Value]
Rates = Callable[[State, Value], State]
SAFETY, SHRINK, GROW, MOST_STEPS = 0.9, 0.2, 10.0, 100_000


@dataclass(frozen=True)
class Method:
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...]
    order: int
    last_is_first: bool

    @staticmethod
    def of(t: Tableau) -> Method:
        error: tuple[float, ...] = ()
        found = 1
        if t.embedded is not None:
            error = tuple(float(x - y) for x, y in zip(t.b, t.embedded, strict=True))
            found = order(t, t.embedded).value + 1
        a = tuple(tuple(map(float, row[:i])) for i, row in enumerate(t.a))
        return Method(a, tuple(map(float, t.b)), tuple(map(float, t.c)), error, found, t.first_same_as_last)


@emitter("integrate")
def _integrate(w: Lowering, n: Node) -> Result:
    g = w.g
    x = n.inputs[0]
    traced = bool(n.attrs.get("log_det"))
    along = plain_method(n.attrs) == "divergence_along"
    before = [w.value(i) for i in n.inputs[1 : 1 + along]]
    after = [w.value(i) for i in n.inputs[1 + along :]]
    child = n.attrs["child"]
    weights = w.weights.child(child)
    shapes = [(*w.leads, *w.type(x).shape), *([w.leads] if traced else [])]

    def rates(state: State, t: Value) -> State:
        found = w.call(n, weights, [state[0], *before, t, *after], child)
        return [g.expand(v, s) for v, s in zip(found, shapes, strict=False)]

    state = [g.expand(w.value(x), shapes[0])]
    if traced:
        state.append(g.filled(0.0, w.leads))
    method = Method.of(n.attrs["tableau"])
    start, stop = float(n.attrs["start"]), float(n.attrs["stop"])
    if "steps" in n.attrs:
        found = equal_steps(g, rates, state, start, stop, int(n.attrs["steps"]), method)
    else:
        adaptive = Adaptive(g, rates, start, stop, float(n.attrs["rtol"]), float(n.attrs["atol"]), method, len(w.leads))
        found = adaptive.solve(state, w)
    return found[0] if isinstance(n.type, TensorType) else found


def combined(g: Builder, base: State, weights: Sequence[float], slopes: Sequence[State], h: Value | float) -> State:
    """base + h·Σ w·k for each part of the state; h is one number, or one for each sample."""
    out = []
    for part, value in enumerate(base):
        total: Value | None = None
        for weight, k in zip(weights, slopes, strict=False):
            if weight:
                term = g.mul(k[part], weight)
                total = term if total is None else g.add(total, term)
        step = expanded(g, h, value) if isinstance(h, Value) and h.rank else h
        out.append(value if total is None else g.add(value, g.mul(total, step)))
    return out


def expanded(g: Builder, value: Value, like: Value) -> Value:
    return g.unsqueeze(value, [-1 - k for k in range(like.rank - value.rank)])


def equal_steps(g: Builder, rates: Rates, state: State, start: float, stop: float, steps: int, method: Method) -> State:
    h = (stop - start) / steps

    def step(i: Value, now: State) -> tuple[None, State]:
        t = g.add(g.mul(g.cast(i, REAL), h), start)
        slopes: list[State] = []
        for row, c in zip(method.a, method.c, strict=True):
            slopes.append(rates(combined(g, now, row, slopes, h), g.add(t, c * h)))
        return None, combined(g, now, method.b, slopes, h)

    return g.loop(steps, state, step, "integrate")


class Adaptive:
    """Local error below atol + rtol·|x| for each sample; a PI controller (Hairer, Norsett & Wanner, II.4 and IV.2)."""

    def __init__(
        self,
        g: Builder,
        rates: Rates,
        start: float,
        stop: float,
        rtol: float,
        atol: float,
        method: Method,
        lead_rank: int,
    ):
        self.lead_rank = lead_rank
        self.g, self.rates, self.method, self.rtol, self.atol = g, rates, method, rtol, atol
        self.start, self.span, self.sign = start, abs(stop - start), 1.0 if stop > start else -1.0

    def solve(self, state: State, w: Lowering) -> State:
        g, m = self.g, self.method
        parts = len(state)
        leads = w.leads
        slope = self.rates(state, g.filled(self.start, leads))
        h = self.first_step(state, slope)
        smallest = 16 * g.eps * self.span

        def step(i: Value, carried: State) -> tuple[Value, State]:
            now, slope = carried[:parts], carried[parts : 2 * parts]
            done, h, before = carried[2 * parts :]
            active = g.binary("Less", done, self.span, BOOL)
            h = g.binary("Min", h, g.sub(self.span, done))
            signed = g.mul(h, self.sign)
            slopes = [slope]
            for row, c in zip(m.a[1:], m.c[1:], strict=True):
                slopes.append(self.rates(combined(g, now, row, slopes, signed), self.time(g.add(done, g.mul(h, c)))))
            new = combined(g, now, m.b, slopes, signed)
            ratio = self.norm(self.weighted(slopes, signed), now, new)
            accepted = g.binary("And", active, g.binary("LessOrEqual", ratio, 1.0, BOOL), BOOL)
            bad = g.binary("And", active, g.unary("Not", finite(g, ratio), BOOL), BOOL)
            factor = g.mul(
                g.mul(g.binary("Pow", g.clip(ratio, 1e-10, None), -0.7 / m.order), SAFETY),
                g.binary("Pow", g.clip(before, 1e-10, None), 0.4 / m.order),
            )
            factor = g.where(bad, SHRINK, g.clip(factor, SHRINK, GROW))
            refused = g.binary("And", active, g.unary("Not", accepted, BOOL), BOOL)
            lost = g.binary("And", refused, g.binary("LessOrEqual", h, smallest, BOOL), BOOL)
            reached = g.add(done, h)
            reached = g.where(g.binary("LessOrEqual", g.sub(self.span, reached), smallest, BOOL), self.span, reached)
            done = g.where(lost, self.span, g.where(accepted, reached, done))
            before = g.where(accepted, ratio, before)
            grows = g.binary("Or", accepted, bad, BOOL)
            h = g.where(grows, g.mul(h, factor), g.mul(h, g.clip(factor, None, 1.0)))
            now = [self.chosen(accepted, a, b) for a, b in zip(new, now, strict=True)]
            now = [self.chosen(lost, g.mul(v, math.nan), v) for v in now]
            last = slopes[-1] if m.last_is_first else self.rates(now, self.time(done))
            slope = [self.chosen(accepted, a, b) for a, b in zip(last, slope, strict=True)]
            return any_of(g, g.binary("Less", done, self.span, BOOL)), [*now, *slope, done, h, before]

        zero = g.filled(0.0, leads)
        carried = [*state, *slope, zero, h, g.add(zero, 1.0)]
        return g.loop(MOST_STEPS, [g.expand(v, (*leads, *v.shape[len(leads) :])) for v in carried], step, "integrate")[
            :parts
        ]

    def weighted(self, slopes: Sequence[State], h: Value) -> State:
        """The error estimate h·Σ e·k of each part."""
        g = self.g
        out = []
        for part in range(len(slopes[0])):
            total: Value | None = None
            for e, k in zip(self.method.error, slopes, strict=True):
                if e:
                    term = g.mul(k[part], e)
                    total = term if total is None else g.add(total, term)
            assert total is not None
            out.append(g.mul(total, expanded(g, h, total)))
        return out

    def time(self, passed: Value) -> Value:
        return self.g.add(self.g.mul(passed, self.sign), self.start)

    def chosen(self, c: Value, a: Value, b: Value) -> Value:
        return self.g.where(expanded(self.g, c, a), a, b)

    def norm(self, values: State, old: State, new: State) -> Value:
        """For each sample, the largest root mean square over the parts of value/(atol + rtol·|x|)."""
        g = self.g
        found: Value | None = None
        for v, a, b in zip(values, old, new, strict=True):
            size = g.binary("Max", g.unary("Abs", a), g.unary("Abs", b))
            q = g.div(v, g.add(g.mul(size, self.rtol), self.atol))
            square = g.mul(q, q)
            part = g.reduce("ReduceMean", square, [-1 - k for k in range(square.rank - self.lead_rank)])
            found = part if found is None else g.binary("Max", found, part)
        assert found is not None
        return g.unary("Sqrt", found)

    def first_step(self, state: State, slope: State) -> Value:
        """A step to begin with, from the first and second derivative (Hairer, Norsett & Wanner, II.4)."""
        g = self.g
        size, speed = self.norm(state, state, state), self.norm(slope, state, state)
        little = g.binary("Or", g.binary("Less", size, 1e-5, BOOL), g.binary("Less", speed, 1e-5, BOOL), BOOL)
        h = g.where(little, 1e-6, g.mul(g.div(size, g.clip(speed, 1e-30, None)), 0.01))
        h = g.clip(h, None, self.span)
        moved_to = combined(g, state, [1.0], [slope], g.mul(h, self.sign))
        moved = self.rates(moved_to, self.time(h))
        bend = g.div(self.norm([g.sub(a, b) for a, b in zip(moved, slope, strict=True)], state, state), h)
        most = g.binary("Max", speed, bend)
        other = g.where(
            g.binary("LessOrEqual", most, 1e-15, BOOL), g.clip(g.mul(h, 1e-3), 1e-6, None),
            g.binary("Pow", g.div(0.01, g.clip(most, 1e-30, None)), 1 / (self.method.order + 1)),
        )  # fmt: skip
        found = g.binary("Min", g.mul(h, 100.0), other)
        return g.clip(g.where(finite(g, found), found, h), None, self.span)
