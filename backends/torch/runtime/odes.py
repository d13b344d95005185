"""Initial value problems by Runge-Kutta methods, in given steps or in steps chosen for each sample by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from flowlang.backends.torch.runtime.errors import no_stages
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


def as_rates(function: Callable[..., Any], *noise: Tensor) -> Rates:
    """A field that was made ready, as a function of the state."""

    def rates(state: State, t: Any) -> State:
        found = function(state[0], *noise, t)
        return found if isinstance(found, tuple) else (found,)

    return rates


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
    method: RungeKutta, at: Tensor | tuple[float, ...] | None = None, taken: Any = None, together: Rates | None = None,
) -> State:  # fmt: skip
    """The state at `stop`, after that many equal steps, or steps between the times given; or its values `at` times.

    `rates(state, t)` gives its derivative, t for each sample; `together` takes one t for all. `taken(weights)` is told
    each step's h·b.
    """
    size, first = tuple(batch), state[0]
    whole = first.new_full if not isinstance(start, Tensor) and not isinstance(stop, Tensor) else None
    inner, shape = counted(rates if together is None else together), size if together is None else ()

    def each(state: State, t: Time) -> State:
        return inner(state, t if isinstance(t, Tensor) else first.new_full(shape, t))

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
    rules: Sequence[Any], together: Rates | None = None,
) -> State:  # fmt: skip
    """The state at `stop` by a step rule: `rule(x, *memory, t, h, i, v)` gives the next x and memory.

    The last rule serves all steps that have none of their own. Several parts of a state go as one tensor, since a
    rule that carries more than x only sums multiples.
    """
    inner = counted(rates if together is None else together)
    first, size = state[0], tuple(batch)
    shape = size if together is None else ()
    shapes = [s.shape[len(size) :] for s in state]

    def pack(parts: State) -> Tensor:
        return torch.cat([p.reshape((*size, -1)) for p in parts], -1) if len(parts) > 1 else parts[0]

    def unpack(x: Tensor) -> State:
        if len(shapes) == 1:
            return (x,)
        parts = torch.split(x, [s.numel() for s in shapes], -1)
        return tuple(p.reshape((*size, *s)) for p, s in zip(parts, shapes, strict=True))

    def v(x: Tensor, t: Any) -> Tensor:
        when = t.expand(shape) if isinstance(t, Tensor) else first.new_full(shape, t)
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
