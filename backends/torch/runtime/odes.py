"""Initial value problems by Runge-Kutta methods, in given steps or in steps chosen for each sample by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from flowlang.backends.torch.runtime.errors import no_solution, no_stages, too_many_steps
from torch import Tensor

State = tuple[Tensor, ...]
Rates = Callable[[State, Any], State]
Time = float | Tensor  # one for all samples, or one for each


class RungeKutta(NamedTuple):
    """A method: stages `a` at times `c`, weights `b`, and those of the error estimate (empty without one).

    `dense` has for each stage, and for the slope at the step's end, the coefficients of θ, θ², .. between the steps.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] = ()
    order: int = 1
    dense: tuple[tuple[float, ...], ...] = ()


class StepCounts:
    """What solvers did: calls of the field, and steps accepted and rejected for each sample, in `runs`."""

    def __init__(self) -> None:
        self.evaluations = 0
        self.runs: list[tuple[Tensor, Tensor]] = []

    @property
    def accepted(self) -> int:
        return sum(int(a.sum()) for a, _ in self.runs)

    @property
    def rejected(self) -> int:
        return sum(int(r.sum()) for _, r in self.runs)


_COUNTS: list[StepCounts] = []


@contextmanager
def count_steps() -> Iterator[StepCounts]:
    """Counts what solvers do inside: `with count_steps() as counts: flow.log_prob(x)`."""
    counts = StepCounts()
    _COUNTS.append(counts)
    try:
        yield counts
    finally:
        _COUNTS.remove(counts)


def counted(rates: Rates) -> Rates:
    """The field, its calls counted where someone asks."""
    if not _COUNTS:
        return rates
    asked = list(_COUNTS)

    def call(state: State, t: Any) -> State:
        for c in asked:
            c.evaluations += 1
        return rates(state, t)

    return call


def note_steps(accepted: Tensor, rejected: Tensor) -> None:
    for c in _COUNTS:
        c.runs.append((accepted, rejected))


Way = list[tuple[Time, Tensor]]  # a time (one for all samples, or one for each) and the value there, step after step


class Ways:
    """Where solvers passed: a way for each integration, in the order in which they began."""

    def __init__(self) -> None:
        self.runs: list[Way] = []


_WAYS: list[Ways] = []


@contextmanager
def record_paths() -> Iterator[Ways]:
    """Keeps the values between steps inside: `with record_paths() as ways: model.sample((9,))`."""
    ways = Ways()
    _WAYS.append(ways)
    try:
        yield ways
    finally:
        _WAYS.remove(ways)


def begun(t: Time, x: Tensor) -> Way | None:
    """A new way from its start, where someone asks."""
    if not _WAYS:
        return None
    way: Way = [(t, x.detach())]
    for w in _WAYS:
        w.runs.append(way)
    return way


# ---- steps --------------------------------------------------------------------------------------


def expanded(value: Tensor, like: Tensor) -> Tensor:
    """A value for each sample, shaped to multiply a part of the state."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))


def shaped(h: Time, state: State) -> Any:
    """A step for each part of the state; a number stays one."""
    return tuple(expanded(h, s) for s in state) if isinstance(h, Tensor) else h


def combined(base: Sequence[Tensor] | None, weights: Sequence[float], slopes: Sequence[State], h: Any) -> State:
    """base + h·Σ w·k for each part of the state; h is a number, or one for each part, shaped to it. No base: 0."""
    out = []
    for part in range(len(slopes[0])):
        each = h[part] if isinstance(h, tuple) else None
        scale = 1.0 if each is not None else h
        total = None if base is None or each is not None else base[part]
        for w, k in zip(weights, slopes, strict=False):
            if w:
                total = k[part] * (scale * w) if total is None else torch.add(total, k[part], alpha=scale * w)
        if each is None:
            out.append(torch.zeros_like(slopes[0][part]) if total is None else total)
        elif total is None:
            out.append(torch.zeros_like(slopes[0][part]) if base is None else base[part])
        else:
            out.append(each * total if base is None else torch.addcmul(base[part], each, total))
    return tuple(out)


def stages(
    rates: Rates, state: State, t: Time, h: Time, signed: Any, method: RungeKutta, first: State | None
) -> list[State]:
    """The slopes k of a step; the first one may be known."""
    slopes: list[State] = [] if first is None else [first]
    for row, c in list(zip(method.a, method.c, strict=True))[len(slopes) :]:
        here = state if not any(row) else combined(state, row, slopes, signed)
        when = torch.add(t, h, alpha=c) if isinstance(h, Tensor) and isinstance(t, Tensor) else t + c * h
        slopes.append(rates(here, when))
    return slopes


NEWTON = 12  # rounds in which the stages of an implicit method are found, twice


def implicit_stages(
    rates: Rates, plain: Rates, state: State, rank: int, t: float, h: float, method: RungeKutta
) -> list[State]:
    """The slopes k_i = v(x + h·Σ a_ij·k_j, t + c_i·h) of an implicit method, by Newton's method.

    The Jacobian is that at the step's start, and those at the stages where that one does not suffice. Gradients are
    those of the equations' solution (implicit functions), not of the rounds.
    """
    x = state[0]
    flat = x.reshape((*x.shape[:rank], -1))
    size, n, count = flat.shape[:-1], flat.shape[-1], len(method.b)
    a = flat.new_tensor([[*row, *(0.0,) * (count - len(row))] for row in method.a])
    moments = [t + c * h for c in method.c]
    eye = torch.eye(count * n, dtype=flat.dtype, device=flat.device)

    def field(values: Tensor, when: float) -> Tensor:
        return plain((values.reshape(x.shape),), when)[0].reshape(flat.shape)

    def residual(k: Tensor, start: Tensor) -> Tensor:
        """v at the stages less k, for k as [.., stages, n]."""
        points = start.unsqueeze(-2) + h * torch.einsum("ij,...jn->...in", a, k)
        return torch.stack([field(points[..., i, :], moments[i]) for i in range(count)], -2) - k

    def system(k: Tensor | None) -> Tensor:
        """I - h·a_ij·J_i, J at the start of the step or at each stage."""
        if k is None:
            jacobians = [jacobian(lambda y: field(y, t), flat.detach())] * count
        else:
            points = flat.detach().unsqueeze(-2) + h * torch.einsum("ij,...jn->...in", a, k)
            jacobians = [
                jacobian(lambda y, m=m: field(y, m), points[..., i, :])  # type: ignore[misc]
                for i, m in enumerate(moments)
            ]
        blocks = torch.einsum("ij,...inm->...injm", a, torch.stack(jacobians, -3))
        return eye - h * blocks.reshape((*size, count * n, count * n))

    small = 8 * torch.finfo(flat.dtype).eps
    with torch.no_grad():
        start = flat.detach()
        begins = torch.isfinite(start).all(-1)  # the others are NaN by themselves
        k = field(start, t).unsqueeze(-2).expand((*size, count, n))
        near = False
        for again in (False, True):
            factors = torch.linalg.lu_factor(system(k if again else None))
            for _ in range(NEWTON):
                found = residual(k, start)
                change = torch.linalg.lu_solve(*factors, found.reshape((*size, -1, 1))).reshape(k.shape)
                k = k + change
                scale = 1 + start.abs().amax(-1) + abs(h) * k.abs().amax((-1, -2))
                left = torch.where(begins, abs(h) * change.abs().amax((-1, -2)) / scale, torch.zeros_like(scale))
                near = bool((left <= small).all())
                if near:
                    break
            if near:
                break
        if not near and not bool((left <= 1e4 * small).all()):
            raise no_stages(t)
    if torch.is_grad_enabled():
        matrix = system(k)
        k = k + torch.linalg.solve(matrix, residual(k, flat).reshape((*size, -1, 1))).reshape(k.shape)
    if len(state) == 1:
        return [(k[..., i, :].reshape(x.shape),) for i in range(count)]
    points = flat.unsqueeze(-2) + h * torch.einsum("ij,...jn->...in", a, k)
    out = []
    for i in range(count):
        _, *others = rates((points[..., i, :].reshape(x.shape), *state[1:]), moments[i])
        out.append((k[..., i, :].reshape(x.shape), *others))
    return out


def jacobian(f: Any, x: Tensor) -> Tensor:
    """∂f/∂x along the last axis, for each sample."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x)
        rows = []
        for d in range(x.shape[-1]):
            row = (
                torch.autograd.grad(y[..., d].sum(), x, retain_graph=True, allow_unused=True)[0]
                if y.requires_grad
                else None
            )
            rows.append(torch.zeros_like(x) if row is None else row)
    return torch.stack(rows, -2)


def last_is_first(method: RungeKutta) -> bool:
    """The last stage is the result, so it serves as the next step's first."""
    return len(method.b) > 1 and method.c[-1] == 1 and method.a[-1] == method.b[:-1]


def grid(start: float, stop: float, steps: int | tuple[float, ...]) -> list[float]:
    """The times of so many equal steps, or those given, in the direction of travel."""
    if isinstance(steps, int):
        h = (stop - start) / steps
        return [start + i * h for i in range(steps)] + [stop]
    return sorted(steps, reverse=stop < start)


def ode_steps(
    rates: Rates, state: State, batch: Sequence[int], start: Time, stop: Time, steps: int | tuple[float, ...],
    method: RungeKutta, at: Tensor | tuple[float, ...] | None = None, taken: Any = None,
) -> State:  # fmt: skip
    """The state at `stop`, after that many equal steps, or steps between the times given; or its values `at` times.

    `rates(state, t)` gives its derivative, t for each sample; `taken(weights)` is told each step's h·b.
    """
    size, first = tuple(batch), state[0]
    whole = first.new_full if not isinstance(start, Tensor) and not isinstance(stop, Tensor) else None
    inner = counted(rates)

    def each(state: State, t: Time) -> State:
        return inner(state, t if isinstance(t, Tensor) else first.new_full(size, t))

    if whole is not None:
        assert isinstance(start, float | int)
        assert isinstance(stop, float | int)
        times: list[Any] = list(grid(start, stop, steps))
    else:
        assert isinstance(steps, int)
        h = (stop - start) / steps
        times = [start + i * h for i in range(steps + 1)]
    reuse = taken is None and (last_is_first(method) or at is not None)
    found = None if at is None else Dense(at, size, state)
    slope: State | None = None
    way = begun(times[0], first)
    for t, after in pairwise(times):
        h = after - t
        signed = shaped(h, state)
        slopes = stages(each, state, t, h, signed, method, slope)
        new = combined(state, method.b, slopes, signed)
        if taken is not None:
            taken([h * b for b in method.b])
        if reuse:
            slope = slopes[-1] if last_is_first(method) else each(new, after)
        if found is not None:
            known = slopes if last_is_first(method) else [*slopes, slope]
            found.fill(state, known, t, h, None, method)  # type: ignore[arg-type]
        state = new
        if way is not None:
            way.append((after, new[0].detach()))
    if _COUNTS:
        note_steps(torch.full(size, len(times) - 1), torch.zeros(size, dtype=torch.long))
    return state if found is None else found.values


def ode_rule(
    rates: Rates, state: State, batch: Sequence[int], start: float, stop: float, steps: int | tuple[float, ...],
    rules: Sequence[Any],
) -> State:  # fmt: skip
    """The state at `stop` by a step rule: `rule(x, *memory, t, h, i, v)` gives the next x and memory.

    The last rule serves all steps that have none of their own. Several parts of a state go as one tensor, since a
    rule that carries more than x only sums multiples.
    """
    inner = counted(rates)
    first, size = state[0], tuple(batch)
    shapes = [s.shape[len(size) :] for s in state]

    def pack(parts: State) -> Tensor:
        return torch.cat([p.reshape((*size, -1)) for p in parts], -1) if len(parts) > 1 else parts[0]

    def unpack(x: Tensor) -> State:
        if len(shapes) == 1:
            return (x,)
        parts = torch.split(x, [s.numel() for s in shapes], -1)
        return tuple(p.reshape((*size, *s)) for p, s in zip(parts, shapes, strict=True))

    def v(x: Tensor, t: Any) -> Tensor:
        when = t.expand(size) if isinstance(t, Tensor) else first.new_full(size, t)
        return pack(inner(unpack(x), when))

    times = first.new_tensor(grid(start, stop, steps))
    x, memory = pack(state), ()
    way = begun(times[0], first)
    for k in range(len(times) - 1):
        rule = rules[min(k, len(rules) - 1)]
        t = times[k]
        found = rule(x, *memory, t, times[k + 1] - t, torch.tensor(k, device=first.device), v)
        x, *memory = found if isinstance(found, tuple) else (found,)
        if way is not None:
            way.append((times[k + 1], unpack(x)[0].detach()))
    if _COUNTS:
        note_steps(torch.full(size, len(times) - 1), torch.zeros(size, dtype=torch.long))
    return unpack(x)


def ode_implicit(
    rates: Rates, plain: Rates, state: State, batch: Sequence[int], start: float, stop: float,
    steps: int | tuple[float, ...], method: RungeKutta,
) -> State:  # fmt: skip
    """The state at `stop` by an implicit method; `plain` is the field of the first part alone."""
    size, first = tuple(batch), state[0]

    def timed(f: Rates) -> Rates:
        inner = counted(f)
        return lambda s, t: inner(s, first.new_full(size, t))

    times = grid(start, stop, steps)
    way = begun(times[0], first)
    for t, after in pairwise(times):
        slopes = implicit_stages(timed(rates), timed(plain), state, len(size), t, after - t, method)
        state = combined(state, method.b, slopes, after - t)
        if way is not None:
            way.append((after, state[0].detach()))
    if _COUNTS:
        note_steps(torch.full(size, len(times) - 1), torch.zeros(size, dtype=torch.long))
    return state


class Dense:
    """Values at the times asked for, filled in step by step from what the steps know."""

    def __init__(self, at: Tensor | tuple[float, ...], batch: tuple[int, ...], state: State):
        self.rank = len(batch)
        at = at if isinstance(at, Tensor) else state[0].new_tensor(at)
        self.at = at.expand((*batch, at.shape[-1])).to(state[0])
        self.values: State = tuple(
            torch.full((*batch, at.shape[-1], *s.shape[self.rank :]), float("nan"), dtype=s.dtype, device=s.device)
            for s in state
        )  # fmt: skip
        self.open = torch.ones_like(self.at, dtype=torch.bool)

    def fill(
        self, state: State, slopes: list[State], t: Time, h: Time, accepted: Tensor | None, method: RungeKutta
    ) -> None:
        start, step = (v.unsqueeze(-1) if isinstance(v, Tensor) else v for v in (t, h))
        θ = (self.at - start) / step
        with torch.no_grad():
            inside = self.open & (θ > -1e-6) & (θ < 1 + 1e-6)
            if accepted is not None:
                inside = inside & accepted.unsqueeze(-1)
            if not bool(inside.any()):
                return
            self.open = self.open & ~inside
        θ = torch.where(inside, θ, torch.zeros_like(θ))
        weights = []
        for row in method.dense:
            total = torch.full_like(θ, row[-1])
            for c in reversed(row[:-1]):
                total = total * θ + c
            weights.append(total * θ * step)
        out = []
        for part, old in enumerate(self.values):
            value = state[part].unsqueeze(self.rank)
            for w, k, row in zip(weights, slopes, method.dense, strict=True):
                if any(row):
                    slope = k[part].unsqueeze(self.rank)
                    value = value + expanded(w, slope) * slope
            out.append(torch.where(expanded(inside, old), value, old))
        self.values = tuple(out)


SAFETY = 0.9
SHRINK = 0.2
GROW = 10.0
MOST_STEPS = 100_000


def ode_adaptive(
    rates: Rates, state: State, batch: Sequence[int], start: Time, stop: Time, rtol: float, atol: float,
    method: RungeKutta, at: Tensor | tuple[float, ...] | None = None, max_steps: int = MOST_STEPS, taken: Any = None,
) -> State:  # fmt: skip
    """The state at `stop`, in steps that hold the local error below atol + rtol·|x| for each sample by itself.

    The error norm is the root mean square over a sample; steps follow a PI controller (Hairer, Norsett & Wanner,
    II.4 and IV.2). Gradients flow through the steps taken, not through their sizes. A sample that is not finite at
    the start stays so by itself.
    """
    first = state[0]
    size = tuple(batch)
    alone = at is None and taken is None and math.prod(size) == 1 and not torch.compiler.is_compiling()
    if alone and not isinstance(start, Tensor) and not isinstance(stop, Tensor):
        return one_adaptive(rates, state, size, start, stop, rtol, atol, method, max_steps)
    rank = len(size)
    rates = counted(rates)
    zero = first.new_zeros(size)
    begin = zero + start
    with torch.no_grad():
        ahead = stop - begin
        sign, span = torch.sign(ahead), ahead.abs()
        smallest = 16 * torch.finfo(first.dtype).eps * span
        lost = ~finite(state, rank)
        some_lost = bool(lost.any())
    if some_lost:  # they take no steps, and do not spoil the gradients of others
        state = tuple(torch.where(expanded(lost, s), torch.zeros_like(s), s) for s in state)
    found = None if at is None else Dense(at, size, state)
    way = begun(begin, state[0])
    slope = rates(state, begin)
    with torch.no_grad():
        bad = ~finite(slope, rank) & ~lost
        if bool(bad.any()):
            lost, some_lost = lost | bad, True
        h = first_step(rates, state, slope, begin, sign, span, rtol, atol, method.order, rank)
        h = torch.where(lost, span, h)
        done = torch.where(lost, span, zero)  # time passed since the start, for each sample
        before = torch.ones_like(h)
        power = 1 / method.order
        accepts, rejects = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    fsal = last_is_first(method) and taken is None
    for _ in range(max_steps):
        with torch.no_grad():
            active = done < span
            if not bool(active.any()):
                break
            h = torch.minimum(h, span - done)
            t = torch.addcmul(begin, sign, done)
            step = sign * h
        signed = shaped(step, state)
        slopes = stages(rates, state, t, step, signed, method, None if taken is not None else slope)
        new = combined(state, method.b, slopes, signed)
        with torch.no_grad():
            ratio = scaled_norm(combined(None, method.error, slopes, signed), state, new, rtol, atol, rank)
            accepted = active & (ratio <= 1)
            bad = active & ~torch.isfinite(ratio)
            factor = SAFETY * ratio.clamp_min(1e-10) ** (-0.7 * power) * before.clamp_min(1e-10) ** (0.4 * power)
            factor = factor.clamp(SHRINK, GROW).nan_to_num(SHRINK)
            refused = active & ~accepted
            some_refused = bool(refused.any())
            if some_refused:
                if bool((refused & (h <= smallest)).any()):
                    raise no_solution(float((begin + sign * done)[refused & (h <= smallest)][0]))
                factor = torch.where(refused, factor.clamp_max(1.0), factor)
            if _COUNTS:
                accepts, rejects = accepts + accepted.cpu(), rejects + refused.cpu()
            reached = done + h
            reached = torch.where(span - reached <= smallest, span, reached)
            done = torch.where(accepted, reached, done)
            before = torch.where(accepted, ratio, before)
            h = h * factor
            after = torch.addcmul(begin, sign, done)
        if bool(bad.any()) and torch.is_grad_enabled():  # a step that is thrown away must not spoil gradients
            step = torch.where(bad, torch.zeros_like(step), step)
            signed = shaped(step, state)
            slopes = stages(rates, state, t, step, signed, method, None if taken is not None else slope)
            new = combined(state, method.b, slopes, signed)
        if taken is not None:
            moved = torch.where(accepted, step, torch.zeros_like(step))
            taken([moved * b for b in method.b])
        every = bool(accepted.all())
        old = state
        state = new if every else chosen(accepted, new, state)
        if way is not None:
            way.append((after, state[0].detach()))
        if taken is None:
            last = slopes[-1] if fsal else rates(state, after)
            if found is not None:
                found.fill(
                    old, slopes if fsal else [*slopes, last], t, torch.where(active, step, sign), accepted, method
                )
            slope = last if every else chosen(accepted, last, slope)
    else:
        with torch.no_grad():
            raise too_many_steps(max_steps, float((begin + sign * done)[done < span][0]))
    if _COUNTS:
        note_steps(accepts, rejects)
    results = state if found is None else found.values
    if not some_lost:
        return results
    return tuple(torch.where(expanded(lost, s), torch.full_like(s, float("nan")), s) for s in results)


def one_adaptive(
    rates: Rates, state: State, size: tuple[int, ...], start: float, stop: float, rtol: float, atol: float,
    method: RungeKutta, max_steps: int,
) -> State:  # fmt: skip
    """The same for a single sample, whose time and step are numbers: most calls of a small step are those of control."""
    first, rank = state[0], len(size)
    inner = counted(rates)

    def each(state: State, t: Any) -> State:
        return inner(state, t if isinstance(t, Tensor) else first.new_full(size, t))

    sign, span = (1.0 if stop > start else -1.0), abs(stop - start)
    smallest = 16 * torch.finfo(first.dtype).eps * span
    slope = each(state, start)
    with torch.no_grad():
        if not bool(finite((*state, *slope), rank).all()):
            return tuple(torch.full_like(s, float("nan")) for s in state)
        like = first.new_ones(size)
        h = float(
            first_step(inner, state, slope, start * like, sign * like, span * like, rtol, atol, method.order, rank)
        )
    done, before, power, accepts, rejects = 0.0, 1.0, 1 / method.order, 0, 0
    way = begun(start, first)
    for _ in range(max_steps):
        if done >= span:
            break
        h = min(h, span - done)
        t = start + sign * done
        slopes = stages(each, state, t, sign * h, sign * h, method, slope)
        new = combined(state, method.b, slopes, sign * h)
        with torch.no_grad():
            ratio = float(scaled_norm(combined(None, method.error, slopes, sign * h), state, new, rtol, atol, rank))
        known = math.isfinite(ratio)
        factor = SHRINK
        if known:
            factor = SAFETY * max(ratio, 1e-10) ** (-0.7 * power) * max(before, 1e-10) ** (0.4 * power)
            factor = min(max(factor, SHRINK), GROW)
        if not known or ratio > 1:
            if h <= smallest:
                raise no_solution(t)
            rejects, h = rejects + 1, h * min(factor, 1.0)
            continue
        accepts, before = accepts + 1, ratio
        done = span if span - (done + h) <= smallest else done + h
        h *= factor
        state = new
        if way is not None:
            way.append((start + sign * done, new[0].detach()))
        slope = slopes[-1] if last_is_first(method) else each(new, start + sign * done)
    else:
        raise too_many_steps(max_steps, start + sign * done)
    if _COUNTS:
        note_steps(torch.full(size, accepts), torch.full(size, rejects))
    return state


def chosen(condition: Tensor, new: State, old: State) -> State:
    return tuple(torch.where(expanded(condition, n), n, o) for n, o in zip(new, old, strict=True))


def finite(state: State, rank: int) -> Tensor:
    """Whether all of a sample is finite."""
    found: Tensor | None = None
    for s in state:
        here = torch.isfinite(s)
        here = here.flatten(rank).all(-1) if here.dim() > rank else here
        found = here if found is None else found & here
    assert found is not None
    return found


def scaled_norm(
    values: Sequence[Tensor], old: Sequence[Tensor], new: Sequence[Tensor], rtol: float, atol: float, rank: int
) -> Tensor:
    """For each sample, the largest root mean square over the parts of value/(atol + rtol·|x|)."""
    found: Tensor | None = None
    for v, a, b in zip(values, old, new, strict=True):
        size = a.abs() if a is b else torch.maximum(a.abs(), b.abs())
        square = (v / (size * rtol + atol)).square()
        part = square.flatten(rank).mean(-1) if square.dim() > rank else square
        found = part if found is None else torch.maximum(found, part)
    assert found is not None
    return torch.sqrt(found)


def first_step(
    rates: Rates, state: State, slope: State, start: Tensor, sign: Tensor, span: Tensor, rtol: float, atol: float,
    order: int, rank: int,
) -> Tensor:  # fmt: skip
    """A step to begin with, from the first and second derivative (Hairer, Norsett & Wanner, II.4)."""
    size = scaled_norm(state, state, state, rtol, atol, rank)
    speed = scaled_norm(slope, state, state, rtol, atol, rank)
    h = torch.where((size < 1e-5) | (speed < 1e-5), torch.full_like(size, 1e-6), 0.01 * size / speed.clamp_min(1e-30))
    h = torch.minimum(h, span)
    step = sign * h
    signed = tuple(expanded(step, s) for s in state)
    moved = rates(tuple(torch.addcmul(s, d, k) for s, d, k in zip(state, signed, slope, strict=True)), start + step)
    bend = scaled_norm(
        tuple(a - b for a, b in zip(moved, slope, strict=True)), state, state, rtol, atol, rank
    ) / h.clamp_min(1e-30)
    most = torch.maximum(speed, bend)
    other = torch.where(most <= 1e-15, (1e-3 * h).clamp_min(1e-6), (0.01 / most.clamp_min(1e-30)) ** (1 / (order + 1)))
    found = torch.minimum(100 * h, other)
    return torch.minimum(torch.where(torch.isfinite(found), found, h), span)
