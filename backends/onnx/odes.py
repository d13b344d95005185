"""Initial value problems as `Loop`: Runge-Kutta in equal steps, or in steps chosen for each sample by itself.

The methods are those of the PyTorch runtime's `odes`, step for step. A trajectory that needs steps below the
precision has no result: it is NaN here, where the module raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flowlang.backends.onnx.graph import BOOL, INT, REAL, Builder, Dim, Value
from flowlang.backends.onnx.lower import Lowering, Result, Unlowered, emitter
from flowlang.backends.onnx.solvers import any_of, finite
from flowlang.backends.torch.runtime.adaptive import (
    AIM,
    BEFORE,
    BEFORE_LEAST,
    GROW,
    MOST_STEPS,
    NOW,
    SAFETY,
    SHRINK,
    leading_error,
)
from flowlang.backends.torch.runtime.ode_gradients import COUPLING

from flowlang.analysis.solvers import interpolant, order
from flowlang.derive.programs import Program
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.tableau import Tableau
from flowlang.ir.tangents import plain_method, probes_of
from flowlang.ir.types import Axis, TensorType

State = list[Value]
Rates = Callable[[State, Value], State]


@dataclass(frozen=True)
class Method:
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...]
    order: int
    last_is_first: bool
    dense: tuple[tuple[float, ...], ...] = ()

    @staticmethod
    def of(t: Tableau, *, dense: bool = False) -> Method:
        error: tuple[float, ...] = ()
        found = 1
        if t.embedded is not None:
            error = tuple(float(x - y) for x, y in zip(t.b, t.embedded, strict=True))
            found = order(t, t.embedded).value + 1
        a = tuple(tuple(map(float, row[:i])) for i, row in enumerate(t.a))
        inside = tuple(tuple(map(float, row)) for row in interpolant(t).weights) if dense else ()
        return Method(a, tuple(map(float, t.b)), tuple(map(float, t.c)), error, found, t.first_same_as_last, inside)


@emitter("integrate")
def _integrate(w: Lowering, n: Node) -> Result:
    g = w.g
    x = n.inputs[0]
    traced = bool(n.attrs.get("log_det"))
    along = probes_of(plain_method(n.attrs), w.type(x)) is not None
    before = [w.value(i) for i in n.inputs[1 : 1 + along]]
    timed = bool(n.attrs.get("timed"))
    after = [w.value(i) for i in n.inputs[1 + along : len(n.inputs) - timed]]
    child = n.attrs["child"]
    weights = w.weights.child(child)
    shapes = [(*w.leads, *w.type(x).shape), *([w.leads] if traced else [])]

    def rates(state: State, t: Value) -> State:
        found = w.call(n, weights, [state[0], *before, t, *after], child)
        return [g.expand(v, s) for v, s in zip(found, shapes, strict=False)]

    state = [g.expand(w.value(x), shapes[0])]
    if traced:
        state.append(g.filled(0.0, w.leads))
    if "rule" in n.attrs:
        found = rule_steps(w, n, rates, state)
        return found[0] if isinstance(n.type, TensorType) else found
    if not n.attrs["tableau"].explicit:
        raise Unlowered(
            n,
            f"the steps of `{n.attrs['solver']}` are solved for by Newton's method",
            "use an explicit solver, such as `rk4`",
        )
    at = w.value(n.inputs[-1]) if timed else g.const(np.array(n.attrs["at"])) if "at" in n.attrs else None
    method = Method.of(n.attrs["tableau"], dense=at is not None)
    start, stop = float(n.attrs["start"]), float(n.attrs["stop"])
    dense = None if at is None else Dense(g, at, w.leads, method)
    if "steps" in n.attrs:
        steps = n.attrs.get("times", int(n.attrs["steps"]))
        if n.attrs.get("gradient") == "reversible":
            found = reversible_steps(g, rates, state, start, stop, steps, method)
        else:
            found = given_steps(g, rates, state, start, stop, steps, method, dense)
    else:
        most = int(n.attrs.get("max_steps", MOST_STEPS))
        adaptive = Adaptive(
            g,
            rates,
            start,
            stop,
            float(n.attrs["rtol"]),
            float(n.attrs["atol"]),
            method,
            len(w.leads),
            most,
            bool(n.attrs.get("shared")),
        )
        found = adaptive.solve(state, w, dense)
    return found[0] if isinstance(n.type, TensorType) else found


class Dense:
    """Values at the times asked for, filled in step by step."""

    def __init__(self, g: Builder, at: Value, leads: Sequence[Dim], method: Method):
        self.g, self.leads, self.method = g, leads, method
        self.at = g.expand(at, (*leads, at.shape[-1]))

    def begin(self, state: State) -> State:
        """What is carried: the values, none known yet, and which are open."""
        n = len(self.leads)
        shapes = [(*self.leads, self.at.shape[-1], *s.shape[n:]) for s in state]
        return [*(self.g.filled(math.nan, s) for s in shapes), self.g.filled(1.0, self.at.shape)]

    def fill(
        self, carried: State, state: State, slopes: Sequence[State], t: Value, h: Value, accepted: Value | None
    ) -> State:
        g = self.g
        n = len(self.leads)
        known, still = carried[:-1], carried[-1]
        start, step = (g.unsqueeze(v, [-1]) if v.rank else v for v in (t, h))
        θ = g.div(g.sub(self.at, start), step)
        inside = g.binary("And", g.binary("Greater", θ, -1e-6, BOOL), g.binary("Less", θ, 1 + 1e-6, BOOL), BOOL)
        inside = g.binary("And", inside, g.binary("Greater", still, 0.5, BOOL), BOOL)
        if accepted is not None:
            inside = g.binary("And", inside, g.unsqueeze(accepted, [-1]), BOOL)
        θ = g.where(inside, θ, 0.0)
        weights = []
        for row in self.method.dense:
            total: Value | float = row[-1]
            for c in reversed(row[:-1]):
                total = g.add(g.mul(total, θ), c)
            weights.append(g.mul(g.mul(total, θ), step))
        out = []
        for part, old in enumerate(known):
            value = g.unsqueeze(state[part], [n])
            for weight, k, row in zip(weights, slopes, self.method.dense, strict=True):
                if any(row):
                    slope = g.unsqueeze(k[part], [n])
                    value = g.add(value, g.mul(expanded(g, weight, slope), slope))
            out.append(g.where(expanded(g, inside, old), value, old))
        return [*out, g.where(inside, 0.0, still)]


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


def step_times(g: Builder, start: float, stop: float, steps: int | tuple[float, ...]) -> tuple[Value, Value, int]:
    """The time and the size of each step, and how many there are."""
    if isinstance(steps, int):
        times = np.linspace(start, stop, steps + 1)
    else:
        times = np.array(sorted(steps, reverse=stop < start))
    return g.const(times[:-1]), g.const(np.diff(times)), len(times) - 1


def slopes_of(
    g: Builder, rates: Rates, now: State, t: Value, h: Value, method: Method, first: State | None = None
) -> list[State]:
    slopes: list[State] = [] if first is None else [first]
    for row, c in list(zip(method.a, method.c, strict=True))[len(slopes) :]:
        slopes.append(rates(combined(g, now, row, slopes, h), g.add(t, g.mul(h, c))))
    return slopes


def entry(g: Builder, table: Value, i: Value) -> Value:
    return g.op("Gather", table, i, shape=(), axis=0)


def given_steps(
    g: Builder, rates: Rates, state: State, start: float, stop: float, steps: int | tuple[float, ...], method: Method,
    dense: Dense | None,
) -> State:  # fmt: skip
    times, sizes, count = step_times(g, start, stop, steps)
    parts = len(state)

    def step(i: Value, carried: State) -> tuple[None, State]:
        now, slope = carried[:parts], carried[parts : 2 * parts] if reuse else None
        t, h = entry(g, times, i), entry(g, sizes, i)
        slopes = slopes_of(g, rates, now, t, h, method, slope)
        new = combined(g, now, method.b, slopes, h)
        if not reuse:
            return None, new
        last = slopes[-1] if method.last_is_first else rates(new, g.add(t, h))
        if dense is None:
            return None, [*new, *last]
        known = slopes if method.last_is_first else [*slopes, last]
        return None, [*new, *last, *dense.fill(carried[2 * parts :], now, known, t, h, None)]

    reuse = method.last_is_first or dense is not None
    carried = list(state)
    if reuse:
        carried += rates(state, g.const(np.array(start)))
    if dense is None:
        return g.loop(count, carried, step, "integrate")[:parts]
    return g.loop(count, [*carried, *dense.begin(state)], step, "integrate")[2 * parts : 3 * parts]


def rule_steps(w: Lowering, n: Node, rates: Rates, state: State) -> State:
    """A step rule: first steps of their own, then one `Loop` for all others."""
    g = w.g
    start, stop = float(n.attrs["start"]), float(n.attrs["stop"])
    times, sizes, count = step_times(g, start, stop, n.attrs.get("times", int(n.attrs["steps"])))
    regions: Sequence[Region] = n.attrs["rule_regions"]
    shapes = [s.shape[len(w.leads) :] for s in state]
    widths = [math.prod(int(d) for d in s) for s in shapes]

    def pack(parts: State) -> Value:
        if len(parts) == 1:
            return parts[0]
        return g.concat([g.reshape(p, (*w.leads, k)) for p, k in zip(parts, widths, strict=True)], len(w.leads))

    def unpack(x: Value) -> State:
        if len(shapes) == 1:
            return [x]
        parts = g.split(x, len(w.leads), widths)
        return [g.reshape(p, (*w.leads, *s)) for p, s in zip(parts, shapes, strict=True)]

    whole = pack(state).shape

    def v(x: Value, t: Value) -> Value:
        return pack(rates(unpack(g.expand(x, whole)), t))

    def step(k: int, carried: State, i: Value) -> State:
        region = regions[k]
        inner = Lowering(g, w.shared, w.weights.child(n.attrs["rule"][k]), w.leads)
        inner.field = v
        program = w.shared.program(region, "forward")
        if len(widths) > 1:
            program = flattened(program, region.graph[region.inputs[0]].tensor, sum(widths))
        with w.scope(n.attrs["rule"][k]):
            found = inner.program(
                program, [*carried, entry(g, times, i), entry(g, sizes, i), g.cast(i, REAL), g.const(np.array(0.0))]
            )
        return [g.expand(f, whole) for f in found]

    carried = [pack(state)]
    last = len(regions) - 1
    for k in range(min(last, count)):
        carried = step(k, carried, g.const(np.array(k), INT))
    if count > last:

        def again(i: Value, now: State) -> tuple[None, State]:
            return None, step(last, now, g.binary("Add", i, g.const(np.array(last), INT), INT))

        carried = g.loop(count - last, carried, again, "integrate")
    return unpack(carried[0])


def flattened(program: Program, state: TensorType, width: int) -> Program:
    """A step that only sums multiples of its values, for values along one axis."""
    made = Graph()
    for node in program.graph:
        same = isinstance(node.type, TensorType) and node.type.axes == state.axes and node.batched
        type_ = TensorType((Axis("parts", width),)) if same else node.type
        made.add(node.op, node.inputs, type_, node.attrs, span=node.span, label=node.label, batched=node.batched)
    return replace(program, graph=made)


@emitter("evaluate")
def _evaluate(w: Lowering, n: Node) -> Value:
    assert w.field is not None
    return w.field(w.value(n.inputs[1]), w.value(n.inputs[2]))


def reversible_steps(
    g: Builder, rates: Rates, state: State, start: float, stop: float, steps: int | tuple[float, ...], method: Method
) -> State:
    """x⁺ = λx + (1 - λ)z + Ψ_h(z, t), z⁺ = z - Ψ_-h(x⁺, t⁺)."""
    times, sizes, count = step_times(g, start, stop, steps)
    parts = len(state)

    def step(i: Value, carried: State) -> tuple[None, State]:
        x, z = carried[:parts], carried[parts:]
        t, h = entry(g, times, i), entry(g, sizes, i)
        mixed = [g.add(g.mul(a, COUPLING), g.mul(b, 1 - COUPLING)) for a, b in zip(x, z, strict=True)]
        new = combined(g, mixed, method.b, slopes_of(g, rates, z, t, h, method), h)
        back = g.neg(h)
        down = slopes_of(g, rates, new, g.add(t, h), back, method)
        return None, [*new, *combined(g, z, method.b, down, h)]

    return g.loop(count, [*state, *state], step, "integrate")[:parts]


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
        most: int,
        shared: bool = False,
    ):
        self.lead_rank, self.most, self.shared = lead_rank, most, shared
        self.leads: Sequence[Dim] = ()
        self.known: Value | None = None  # which samples are finite at the start
        self.g, self.rates, self.method, self.rtol, self.atol = g, rates, method, rtol, atol
        self.start, self.span, self.sign = start, abs(stop - start), 1.0 if stop > start else -1.0

    def solve(self, state: State, w: Lowering, dense: Dense | None) -> State:
        g, m = self.g, self.method
        parts = len(state)
        leads = self.leads = w.leads
        slope = self.rates(state, g.filled(self.start, leads))
        if self.shared:
            self.known = finite(g, self.norm(state, state, state))
        h = self.first_step(state, slope)
        smallest = 16 * g.eps * self.span

        def step(i: Value, carried: State) -> tuple[Value, State]:
            now, slope = carried[:parts], carried[parts : 2 * parts]
            done, h, before = carried[2 * parts : 2 * parts + 3]
            active = g.binary("Less", done, self.span, BOOL)
            h = self.next_step(h, g.sub(self.span, done))
            signed = g.mul(h, self.sign)
            slopes = [slope]
            for row, c in zip(m.a[1:], m.c[1:], strict=True):
                slopes.append(self.rates(combined(g, now, row, slopes, signed), self.time(g.add(done, g.mul(h, c)))))
            new = combined(g, now, m.b, slopes, signed)
            ratio = self.norm(self.weighted(slopes, signed), now, new)
            accepted = g.binary("And", active, g.binary("LessOrEqual", ratio, 1.0, BOOL), BOOL)
            bad = g.binary("And", active, g.unary("Not", finite(g, ratio), BOOL), BOOL)
            factor = g.mul(
                g.mul(g.binary("Pow", g.clip(ratio, 1e-10, None), -NOW / m.order), SAFETY),
                g.binary("Pow", g.clip(before, BEFORE_LEAST, None), BEFORE / m.order),
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
            old, t = now, self.time(carried[2 * parts])
            now = [self.chosen(accepted, a, b) for a, b in zip(new, now, strict=True)]
            now = [self.chosen(lost, g.mul(v, math.nan), v) for v in now]
            last = slopes[-1] if m.last_is_first else self.rates(now, self.time(done))
            slope = [self.chosen(accepted, a, b) for a, b in zip(last, slope, strict=True)]
            filled: State = []
            if dense is not None:
                known = slopes if m.last_is_first else [*slopes, last]
                size = g.where(active, signed, self.sign)
                filled = dense.fill(carried[2 * parts + 3 :], old, known, t, size, accepted)
            return any_of(g, g.binary("Less", done, self.span, BOOL)), [*now, *slope, done, h, before, *filled]

        # A sample that is not finite at the start has no step: it is NaN, by itself.
        known = finite(g, h) if self.known is None else self.known
        zero = g.where(known, g.filled(0.0, leads), self.span)
        state = [self.chosen(known, v, g.filled(math.nan, v.shape)) for v in state]
        carried = [*state, *slope, zero, g.where(known, h, 1.0), g.filled(1.0, leads)]
        carried = [g.expand(v, (*leads, *v.shape[len(leads) :])) for v in carried]
        if dense is not None:
            carried += dense.begin(state)
        out = g.loop(self.most, carried, step, "integrate")
        reached = g.unary("Not", g.binary("Less", out[2 * parts], self.span, BOOL), BOOL)
        found = out[:parts] if dense is None else out[2 * parts + 3 : -1]
        return [self.chosen(reached, v, g.filled(math.nan, v.shape)) for v in found]

    def next_step(self, h: Value, left: Value) -> Value:
        """At most h: what is left in as few equal steps."""
        g = self.g
        count = g.unary("Ceil", g.sub(g.div(left, g.clip(h, 1e-30, None)), 1e-3))
        return g.div(left, g.clip(count, 1.0, None))

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
            if self.known is not None:  # one norm over all samples
                square = g.where(expanded(g, self.known, square), square, 0.0)
                part = g.reduce("ReduceMean", square, [-1 - k for k in range(square.rank)])
                found = part if found is None else g.binary("Max", found, part)
                continue
            part = g.reduce("ReduceMean", square, [-1 - k for k in range(square.rank - self.lead_rank)])
            found = part if found is None else g.binary("Max", found, part)
        assert found is not None
        found = g.unary("Sqrt", found)
        return found if self.known is None else g.expand(found, tuple(self.leads))

    def first_step(self, state: State, slope: State) -> Value:
        """A step to begin with, from the first and second derivative, as the runtime's `first_step`."""
        g, m = self.g, self.method
        size, speed = self.norm(state, state, state), self.norm(slope, state, state)
        little = g.binary("Or", g.binary("Less", size, 1e-5, BOOL), g.binary("Less", speed, 1e-5, BOOL), BOOL)
        probe = g.where(little, 1e-6, g.mul(g.div(size, g.clip(speed, 1e-30, None)), 0.01))
        probe = g.clip(probe, None, self.span)
        moved_to = combined(g, state, [1.0], [slope], g.mul(probe, self.sign))
        moved = self.rates(moved_to, self.time(probe))
        change = self.norm([g.sub(a, b) for a, b in zip(moved, slope, strict=True)], state, state)
        bend = g.div(change, g.clip(probe, 1e-30, None))
        longest = math.log(max(self.span, 1e-30))
        quick, bent = (g.unary("Log", g.clip(v, 1e-30, None)) for v in (speed, bend))
        rate = g.mul(g.clip(g.sub(bent, quick), -longest, None), float(m.order - 1))
        bold = g.div(g.sub(g.sub(math.log(AIM / leading_error(m)), quick), rate), float(m.order))
        most = g.binary("Max", g.add(quick, longest), g.add(bent, 2 * longest))
        careful = g.add(g.div(g.sub(math.log(0.01), most), float(m.order + 1)), longest)
        found = g.unary("Exp", g.binary("Max", bold, careful))
        found = g.where(little, found, g.binary("Min", found, g.mul(probe, 200.0)))
        sound = g.binary("And", finite(g, found), finite(g, bend), BOOL)
        return g.clip(g.where(sound, found, probe), None, self.span)
