"""Initial value problems by Runge-Kutta methods, in equal steps or in steps chosen for each sample by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from flowlang.backends.torch.runtime.errors import no_solution
from torch import Tensor

Rates = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]


class RungeKutta(NamedTuple):
    """An explicit method: stages `a` at times `c`, weights `b`, and those of the error estimate (empty without one)."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] = ()
    order: int = 1


def combined(
    base: Sequence[Tensor], weights: Sequence[float], slopes: Sequence[Sequence[Tensor]], h: Any
) -> tuple[Tensor, ...]:
    """base + h·Σ w·k for each part of the state; h is a number, or one for each part, shaped to it."""
    out = []
    for part, value in enumerate(base):
        total: Tensor | None = None
        for w, k in zip(weights, slopes, strict=False):
            if w:
                term = k[part] if w == 1 else w * k[part]
                total = term if total is None else total + term
        step = h[part] if isinstance(h, tuple) else h
        out.append(value if total is None else value + step * total)
    return tuple(out)


def ode_steps(
    rates: Rates,
    state: tuple[Tensor, ...],
    batch: Sequence[int],
    start: float,
    stop: float,
    steps: int,
    method: RungeKutta,
) -> tuple[Tensor, ...]:
    """The state at `stop`, after that many equal steps. `rates(state, t)` gives its derivative, t for each sample."""
    h = (stop - start) / steps
    for i in range(steps):
        t = start + i * h
        slopes: list[tuple[Tensor, ...]] = []
        for row, c in zip(method.a, method.c, strict=True):
            slopes.append(rates(combined(state, row, slopes, h), state[0].new_full(tuple(batch), t + c * h)))
        state = combined(state, method.b, slopes, h)
    return state


SAFETY, SHRINK, GROW, MOST_STEPS = 0.9, 0.2, 10.0, 100_000


def ode_adaptive(
    rates: Rates, state: tuple[Tensor, ...], batch: Sequence[int], start: float, stop: float, rtol: float, atol: float,
    method: RungeKutta,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The state at `stop`, in steps that hold the local error below atol + rtol·|x| for each sample by itself.

    The error norm is the root mean square over a sample; steps follow a PI controller (Hairer, Norsett & Wanner,
    II.4 and IV.2). Gradients flow through the steps taken, not through their sizes.
    """
    first = state[0]
    size = tuple(batch)
    span = abs(stop - start)
    sign = 1.0 if stop > start else -1.0
    done = first.new_zeros(size)  # time passed since the start, for each sample
    slope = rates(state, first.new_full(size, start))
    with torch.no_grad():
        h = first_step(rates, state, slope, start, sign, span, rtol, atol, method.order, len(size))
        before = torch.ones_like(h)
    smallest = 16 * torch.finfo(first.dtype).eps * span
    for _ in range(MOST_STEPS):
        active = done < span
        if not bool(active.any()):
            return state
        with torch.no_grad():
            h = torch.minimum(h, span - done)
        signed = tuple(expanded(sign * h, s) for s in state)
        slopes = [slope]
        for row, c in zip(method.a[1:], method.c[1:], strict=True):
            slopes.append(rates(combined(state, row, slopes, signed), start + sign * (done + c * h)))
        new = combined(state, method.b, slopes, signed)
        with torch.no_grad():
            errors = combined(tuple(torch.zeros_like(s) for s in state), method.error, slopes, signed)
            ratio = scaled_norm(errors, state, new, rtol, atol, len(size))
            accepted = active & (ratio <= 1)
            bad = active & ~torch.isfinite(ratio)
            power = 1 / method.order
            factor = SAFETY * ratio.clamp_min(1e-10) ** (-0.7 * power) * before.clamp_min(1e-10) ** (0.4 * power)
            factor = torch.where(bad, torch.full_like(factor, SHRINK), factor.clamp(SHRINK, GROW))
            if bool((active & ~accepted & (h <= smallest)).any()):
                raise no_solution(start + sign * float(done[active & ~accepted].min()))
            reached = done + h
            reached = torch.where(span - reached <= smallest, torch.full_like(reached, span), reached)
            done = torch.where(accepted, reached, done)
            before = torch.where(accepted, ratio, before)
            h = torch.where(accepted | bad, h * factor, h * factor.clamp_max(1.0))
        state = tuple(torch.where(expanded(accepted, s), n, s) for n, s in zip(new, state, strict=True))
        last = slopes[-1] if method.c[-1] == 1 and method.a[-1] == method.b else rates(state, start + sign * done)
        slope = tuple(torch.where(expanded(accepted, s), n, s) for n, s in zip(last, slope, strict=True))
    raise no_solution(start + sign * float(done.min()))


def expanded(value: Tensor, like: Tensor) -> Tensor:
    """A value for each sample, shaped to multiply a part of the state."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))


def scaled_norm(
    values: Sequence[Tensor], old: Sequence[Tensor], new: Sequence[Tensor], rtol: float, atol: float, rank: int
) -> Tensor:
    """For each sample, the largest root mean square over the parts of value/(atol + rtol·|x|)."""
    found: Tensor | None = None
    for v, a, b in zip(values, old, new, strict=True):
        square = (v / (atol + rtol * torch.maximum(a.abs(), b.abs()))).square()
        part = square.flatten(rank).mean(-1) if square.dim() > rank else square
        found = part if found is None else torch.maximum(found, part)
    assert found is not None
    return torch.sqrt(found)


def first_step(
    rates: Rates, state: tuple[Tensor, ...], slope: tuple[Tensor, ...], start: float, sign: float, span: float,
    rtol: float, atol: float, order: int, rank: int,
) -> Tensor:  # fmt: skip
    """A step to begin with, from the first and second derivative (Hairer, Norsett & Wanner, II.4)."""
    size = scaled_norm(state, state, state, rtol, atol, rank)
    speed = scaled_norm(slope, state, state, rtol, atol, rank)
    h = torch.where((size < 1e-5) | (speed < 1e-5), torch.full_like(size, 1e-6), 0.01 * size / speed.clamp_min(1e-30))
    h = h.clamp_max(span)
    signed = tuple(expanded(sign * h, s) for s in state)
    moved = rates(tuple(s + d * k for s, d, k in zip(state, signed, slope, strict=True)), start + sign * h)
    bend = scaled_norm(tuple(a - b for a, b in zip(moved, slope, strict=True)), state, state, rtol, atol, rank) / h
    most = torch.maximum(speed, bend)
    other = torch.where(most <= 1e-15, (1e-3 * h).clamp_min(1e-6), (0.01 / most.clamp_min(1e-30)) ** (1 / (order + 1)))
    found = torch.minimum(100 * h, other)
    return torch.where(torch.isfinite(found), found, h).clamp_max(span)
