"""Steps whose size is chosen: for each sample by itself, or one for all samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from flowlang.backends.torch.runtime.errors import no_solution, too_many_steps
from flowlang.backends.torch.runtime.odes import (
    _COUNTS,
    Dense,
    Rates,
    RungeKutta,
    State,
    Time,
    begun,
    combined,
    counted,
    expanded,
    last_is_first,
    note_steps,
    shaped,
    stages,
)
from torch import Tensor

SAFETY = 0.9
SHRINK = 0.2
GROW = 10.0
MOST_STEPS = 100_000
WORTH_PACKING = 24  # samples at rest that are worth leaving out


def ode_adaptive(
    rates: Rates, state: State, batch: Sequence[int], start: Time, stop: Time, rtol: float, atol: float,
    method: RungeKutta, at: Tensor | tuple[float, ...] | None = None, max_steps: int = MOST_STEPS, taken: Any = None,
    shared: bool = False, together: Callable[[], Rates] | None = None, each: Callable[[], Rates] | None = None,
    apart: bool = False,
) -> State:  # fmt: skip
    """The state at `stop`, in steps that hold the local error below atol + rtol·|x| for each sample by itself.

    The error norm is the root mean square over a sample, or over all of them with steps that are `shared`; steps follow
    a PI controller (Hairer, Norsett & Wanner, II.4 and IV.2), and the last two are equal. Gradients flow through the
    steps taken, not through their sizes. A sample that is not finite at the start stays so by itself. `together` makes
    the field for a time that all samples share, `each` for a time of each sample's own; `apart` says that samples may
    be left out.
    """
    size = tuple(batch)
    numbers = not isinstance(start, Tensor) and not isinstance(stop, Tensor) and taken is None
    traced = torch.compiler.is_compiling()
    samples = int(math.prod(size))
    if numbers and not traced and (samples == 1 or (shared and samples)):
        assert not isinstance(start, Tensor)
        assert not isinstance(stop, Tensor)
        field = together() if together is not None else one_time(rates, size)
        return shared_steps(counted(field), state, size, start, stop, rtol, atol, method, at, max_steps)
    first, rank = state[0], len(size)
    rates = counted(rates if each is None else each())
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
        if shared and samples:
            h = h.amin().expand(size)
        done = torch.where(lost, span, zero)  # time passed since the start, for each sample
    fsal = last_is_first(method) and taken is None
    if fsal and not traced and not shared and found is None and way is None and without_gradient((*state, *slope)):
        results = packed_steps(
            rates, state, slope, size, begin, sign, span, done, h, smallest, rtol, atol, method, max_steps,
            apart and rank == 1,
        )  # fmt: skip
        return with_lost(results, lost) if some_lost else results
    with torch.no_grad():
        before = torch.ones_like(h)
        power = 1 / method.order
        accepts, rejects = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    for _ in range(max_steps):
        with torch.no_grad():
            active = done < span
            if not bool(active.any()):
                break
            h = next_step(h, span - done)
            t = torch.addcmul(begin, sign, done)
            step = sign * h
        signed = shaped(step, state)
        slopes = stages(rates, state, t, step, signed, method, None if taken is not None else slope)
        new = combined(state, method.b, slopes, signed)
        with torch.no_grad():
            estimate = combined(None, method.error, slopes, signed)
            ratio = scaled_norm(estimate, state, new, rtol, atol, rank)
            if shared:
                ratio = ratio.where(active, 0.0).square().mean().sqrt().expand(size)
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
    return with_lost(results, lost) if some_lost else results


def with_lost(results: State, lost: Tensor) -> State:
    return tuple(torch.where(expanded(lost, s), torch.full_like(s, float("nan")), s) for s in results)


def one_time(rates: Rates, size: tuple[int, ...]) -> Rates:
    """A field that takes a time for each sample, for one time."""
    return lambda state, t: rates(state, t.expand(size))


def without_gradient(values: Sequence[Tensor]) -> bool:
    """Whether values may be written in place: nothing differentiates them."""
    if torch._C._are_functorch_transforms_active():
        return False
    return not torch.is_grad_enabled() or not any(v.requires_grad for v in values)


def next_step(h: Tensor, left: Tensor) -> Tensor:
    """At most h; the last two steps are equal, so that none is small because little is left."""
    return torch.minimum(h, left / torch.ceil(left / h.clamp_min(1e-30) - 1e-3).clamp(1.0, 2.0))


def step_factor(ratio: float, before: float, power: float) -> float:
    if not math.isfinite(ratio):
        return SHRINK
    factor = SAFETY * max(ratio, 1e-10) ** (-0.7 * power) * max(before, 1e-10) ** (0.4 * power)
    return min(max(factor, SHRINK), GROW)


# ---- one step for all samples -------------------------------------------------------------------


@lru_cache(maxsize=32)
def tableau_tensors(
    method: RungeKutta, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The rows of stages and of the weights, the error's weights, and the stages' times."""
    with torch.inference_mode(False):
        made = [torch.tensor(r, dtype=dtype, device=device) for r in (*method.a[1:], method.b, method.error, method.c)]
    return made[:-2], made[-2], made[-1]


class Buffers:
    """A step's slopes side by side, so that a stage is one product with a row of the tableau.

    For values without gradients.

    Parts of the state lie one after the other; `parts` are views of them.
    """

    def __init__(self, state: State, method: RungeKutta):
        first, self.shapes = state[0], [s.shape for s in state]
        self.sizes = [s.numel() for s in state]
        self.method = method
        n, total = len(method.b), sum(self.sizes)
        self.rows, self.error, self.times = tableau_tensors(method, first.dtype, first.device)
        slopes = first.new_empty((n, total))
        each = [
            p.view(n, *s).unbind() for p, s in zip(slopes.split(self.sizes, 1), self.shapes, strict=True)
        ]  # fmt: skip
        self.slots = list(zip(*each, strict=True)) if len(each) > 1 else [(s,) for s in each[0]]
        whole = slopes.t()
        self.columns = [whole.narrow(1, 0, i + 1) for i in range(n)]
        self.moments = first.new_empty(n)
        self.moment = self.moments.unbind()
        self.old, self.new, self.change, self.size = first.new_empty((4, total)).unbind()
        self.old_parts, self.new_parts, self.change_parts = map(self.parts, (self.old, self.new, self.change))
        self.write(self.old_parts, state)

    def parts(self, flat: Tensor) -> State:
        if len(self.sizes) == 1:
            return (flat.view(self.shapes[0]),)
        return tuple(p.view(s) for p, s in zip(flat.split(self.sizes), self.shapes, strict=True))

    @staticmethod
    def write(places: State, values: Sequence[Tensor]) -> None:
        for place, value in zip(places, values, strict=True):
            place.copy_(value)

    def advance(self) -> None:
        """The new state becomes the old one."""
        self.old, self.new = self.new, self.old
        self.old_parts, self.new_parts = self.new_parts, self.old_parts

    def scaled(self, rtol: float, atol: float) -> State:
        """What `change` is of the tolerance, for each part."""
        torch.maximum(self.old.abs(), self.new.abs(), out=self.size)
        self.change.div_(self.size.mul_(rtol).add_(atol))
        return self.change_parts


class BufferedStep:
    """Steps of one size in place."""

    def __init__(self, rates: Rates, state: State, slope: State, method: RungeKutta):
        self.rates, self.method, self.b = rates, method, Buffers(state, method)
        self.b.write(self.b.slots[0], slope)
        self.fsal = last_is_first(method)

    @property
    def state(self) -> State:
        return self.b.old_parts

    def attempt(self, t: float, h: float, rtol: float, atol: float) -> Tensor:
        b = self.b
        torch.mul(b.times, h, out=b.moments).add_(t)
        for i in range(1, len(self.method.b)):
            torch.addmv(b.old, b.columns[i - 1], b.rows[i - 1], alpha=h, out=b.new)
            b.write(b.slots[i], self.rates(b.new_parts, b.moment[i]))
        if not self.fsal:
            torch.addmv(b.old, b.columns[-1], b.rows[-1], alpha=h, out=b.new)
        torch.mv(b.columns[-1], b.error, out=b.change)
        b.change.mul_(h)
        scaled = b.scaled(rtol, atol)
        return largest([torch.linalg.vector_norm(s) / math.sqrt(s.numel()) for s in scaled])

    def accept(self, found: Dense | None, t: float, h: float, after: Tensor) -> None:
        b = self.b
        last = None if self.fsal else self.rates(b.new_parts, after)
        if found is not None:
            found.fill(b.old_parts, [*b.slots, *([] if last is None else [last])], t, h, None, self.method)
        b.write(b.slots[0], b.slots[-1] if last is None else last)
        b.advance()


class PlainStep:
    """The same with values that gradients flow through."""

    def __init__(self, rates: Rates, state: State, slope: State, method: RungeKutta):
        self.rates, self.state, self.slope, self.method = rates, state, slope, method

    def attempt(self, t: float, h: float, rtol: float, atol: float) -> Tensor:
        like = self.state[0]

        def each(state: State, t: Any) -> State:
            return self.rates(state, like.new_full((), t))

        self.slopes = stages(each, self.state, t, h, h, self.method, self.slope)
        self.new = combined(self.state, self.method.b, self.slopes, h)
        with torch.no_grad():
            estimate = combined(None, self.method.error, self.slopes, h)
            return scaled_norm(estimate, self.state, self.new, rtol, atol, 0)

    def accept(self, found: Dense | None, t: float, h: float, after: Tensor) -> None:
        fsal = last_is_first(self.method)
        last = self.slopes[-1] if fsal else self.rates(self.new, after)
        if found is not None:
            found.fill(self.state, self.slopes if fsal else [*self.slopes, last], t, h, None, self.method)
        self.state, self.slope = self.new, last


def shared_steps(
    rates: Rates, state: State, size: tuple[int, ...], start: float, stop: float, rtol: float, atol: float,
    method: RungeKutta, at: Tensor | tuple[float, ...] | None, max_steps: int,
) -> State:  # fmt: skip
    """Steps of one size for all samples: time and step are numbers.

    Calls of control outnumber those of a small field.
    """
    first, rank = state[0], len(size)
    sign, span = (1.0 if stop > start else -1.0), abs(stop - start)
    smallest = 16 * torch.finfo(first.dtype).eps * span
    lost: Tensor | None = None
    slope = rates(state, first.new_full((), start))
    if not sound((*state, *slope)):
        with torch.no_grad():
            lost = ~finite((*state, *slope), rank)
        state = tuple(torch.where(expanded(lost, s), torch.zeros_like(s), s) for s in state)
        if bool(lost.all()):
            return with_lost(state if at is None else Dense(at, size, state).values, lost)
        slope = rates(state, first.new_full((), start))
    found = None if at is None else Dense(at, size, state)
    with torch.no_grad():
        h = shared_first_step(rates, state, slope, start, sign, span, rtol, atol, method.order)
    way = begun(start, state[0])
    buffered = way is None and without_gradient((*state, *slope))  # what is written over is no way to look back on
    steps = BufferedStep(rates, state, slope, method) if buffered else PlainStep(rates, state, slope, method)
    done, before, power, accepts, rejects = 0.0, 1.0, 1 / method.order, 0, 0
    for _ in range(max_steps):
        left = span - done
        if left <= 0:
            break
        h = left if left <= 1.001 * h else min(h, left / 2)
        t = start + sign * done
        ratio = float(steps.attempt(t, sign * h, rtol, atol))
        factor = step_factor(ratio, before, power)
        if not ratio <= 1:
            if h <= smallest:
                raise no_solution(t)
            rejects, h = rejects + 1, h * min(factor, 1.0)
            continue
        accepts, before = accepts + 1, ratio
        reached = done + h
        done = span if span - reached <= smallest else reached
        steps.accept(found, t, sign * h, first.new_full((), start + sign * done))
        h *= factor
        if way is not None:
            way.append((start + sign * done, steps.state[0].detach()))
    else:
        raise too_many_steps(max_steps, start + sign * done)
    if _COUNTS:
        note_steps(torch.full(size, accepts), torch.full(size, rejects))
    results = steps.state if found is None else found.values
    return results if lost is None else with_lost(results, lost)


def largest(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).amax()


def sound(values: Sequence[Tensor]) -> bool:
    """Whether all is finite, by one sum: not-a-number and infinity stay in it."""
    with torch.no_grad():
        return all(math.isfinite(float(v.sum())) or bool(torch.isfinite(v).all()) for v in values)


def shared_first_step(
    rates: Rates, state: State, slope: State, start: float, sign: float, span: float, rtol: float, atol: float,
    order: int,
) -> float:  # fmt: skip
    """A step to begin with, from the first and second derivative (Hairer, Norsett & Wanner, II.4)."""
    scales = [s.abs().mul_(rtol).add_(atol) for s in state]

    def norm(values: Sequence[Tensor]) -> float:
        each = [torch.linalg.vector_norm(v / s) / math.sqrt(s.numel()) for v, s in zip(values, scales, strict=True)]
        return float(largest(each))

    size, speed = norm(state), norm(slope)
    h = min(1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed, span)
    moved = rates(
        tuple(torch.add(s, k, alpha=sign * h) for s, k in zip(state, slope, strict=True)),
        state[0].new_full((), start + sign * h),
    )
    bend = norm([a - b for a, b in zip(moved, slope, strict=True)]) / max(h, 1e-30)
    most = max(speed, bend)
    other = max(1e-6, 1e-3 * h) if most <= 1e-15 else (0.01 / most) ** (1 / (order + 1))
    found = min(100 * h, other)
    return min(found if math.isfinite(found) else h, span)


# ---- a step for each sample, in place -----------------------------------------------------------


def packed_steps(
    rates: Rates, state: State, slope: State, size: tuple[int, ...], begin: Tensor, sign: Tensor, span: Tensor,
    done: Tensor, h: Tensor, smallest: Tensor, rtol: float, atol: float, method: RungeKutta, max_steps: int,
    apart: bool,
) -> State:  # fmt: skip
    """Steps of each sample's own size, in place; samples that have arrived are left out where that saves enough."""
    b = Buffers(state, method)
    b.write(b.slots[0], slope)
    rank, power, last = len(size), 1 / method.order, len(method.b) - 1
    logs = torch.zeros_like(h)  # 0.4/p of the logarithm of the error before
    here: Tensor | None = None  # the samples that are still there, by their numbers; None: all
    results: State = ()
    accepts, rejects = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    for _ in range(max_steps):
        left = span - done
        active = left > 0
        count = int(active.sum())
        if not count:
            break
        if apart and len(active) - count >= WORTH_PACKING and 4 * count <= 3 * len(active):
            keep = active.nonzero().squeeze(-1)
            if here is None:
                results = tuple(p.clone() for p in b.old_parts)
            else:
                for r, p in zip(results, b.old_parts, strict=True):
                    r.index_copy_(0, here, p)
            here = keep if here is None else here[keep]
            begin, sign, span, done, h, smallest, logs, left = (
                v[keep] for v in (begin, sign, span, done, h, smallest, logs, left)
            )
            packed = Buffers(tuple(p[keep] for p in b.old_parts), method)
            packed.write(packed.slots[0], [p[keep] for p in b.slots[0]])
            b, active = packed, torch.ones_like(keep, dtype=torch.bool)
        h = next_step(h, left)
        t = torch.addcmul(begin, sign, done)
        step = sign * h
        wide = [expanded(step, p) for p in b.old_parts]
        for i in range(1, last + 1):
            torch.mv(b.columns[i - 1], b.rows[i - 1], out=b.change)
            for new, old, scale, change in zip(b.new_parts, b.old_parts, wide, b.change_parts, strict=True):
                torch.addcmul(old, scale, change, out=new)
            b.write(b.slots[i], rates(b.new_parts, torch.add(t, step, alpha=method.c[i])))
        torch.mv(b.columns[-1], b.error, out=b.change)
        for change, scale in zip(b.change_parts, wide, strict=True):
            change.mul_(scale)
        norms = [p.square().flatten(rank).mean(-1) if p.dim() > rank else p.square() for p in b.scaled(rtol, atol)]
        square = norms[0] if len(norms) == 1 else torch.maximum(norms[0], norms[1])  # of the error's ratio
        accepted = (square <= 1).logical_and_(active)
        log = square.clamp_min(1e-20).log_()
        factor = torch.exp(torch.add(logs, log, alpha=-0.35 * power)).mul_(SAFETY)
        factor = factor.nan_to_num_(SHRINK, SHRINK, SHRINK).clamp_(SHRINK, GROW)
        taken = int(accepted.sum())
        if taken < len(accepted) or rank != 1:
            refused = active & ~accepted
            if bool(refused.any()):
                stuck = refused & (h <= smallest)
                if bool(stuck.any()):
                    raise no_solution(float((begin + sign * done)[stuck][0]))
                factor = torch.where(refused, factor.clamp_max(1.0), factor)
        if _COUNTS:
            index = slice(None) if here is None else here.cpu()
            accepts[index] += accepted.cpu()
            rejects[index] += (active & ~accepted).cpu()
        reached = done + h
        reached = torch.where(span - reached <= smallest, span, reached)
        if taken == accepted.numel():
            done, logs = reached, log.mul_(0.2 * power)
            b.write(b.slots[0], b.slots[last])
            b.advance()
        else:
            done = torch.where(accepted, reached, done)
            logs = torch.where(accepted, log.mul_(0.2 * power), logs)
            for old, new, known, slot in zip(b.old_parts, b.new_parts, b.slots[0], b.slots[last], strict=True):
                yes = expanded(accepted, old)
                torch.where(yes, new, old, out=old)
                torch.where(yes, slot, known, out=known)
        h = h * factor
    else:
        raise too_many_steps(max_steps, float((begin + sign * done)[done < span][0]))
    if _COUNTS:
        note_steps(accepts, rejects)
    if here is None:
        return b.old_parts
    for r, p in zip(results, b.old_parts, strict=True):
        r.index_copy_(0, here, p)
    return results


# ---- norms --------------------------------------------------------------------------------------


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
