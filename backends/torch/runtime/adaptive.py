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
NOW = 0.85  # what the last error weighs, and the one before it: β = 0.04 at order 5
BEFORE = 0.2
BEFORE_LEAST = 1e-4  # an error so small tells nothing of where errors go
AIM = 0.1  # of the tolerance: the error that a first step is made for
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
    a PI controller (Hairer, Norsett & Wanner, II.4 and IV.2), and what is left is divided into equal ones.
    Gradients flow through the steps taken, not through their sizes. A sample that is not finite at the start stays so
    by itself. `together` makes the field for a time that all samples share, `each` for a time of each sample's own;
    `apart` says that samples may be left out, or evaluated in blocks.
    """
    size = tuple(batch)
    numbers = not isinstance(start, Tensor) and not isinstance(stop, Tensor) and taken is None
    traced = torch.compiler.is_compiling()
    samples = int(math.prod(size))
    if numbers and not traced and (samples == 1 or (shared and samples)):
        assert not isinstance(start, Tensor)
        assert not isinstance(stop, Tensor)
        field = together() if together is not None else one_time(rates, size)
        rows = rows_at_once(state) if apart and at is None and len(size) == 1 else 0
        return shared_steps(field, state, size, start, stop, rtol, atol, method, at, max_steps, rows)
    first, rank = state[0], len(size)
    field, rates = rates, counted(rates)
    if each is not None:
        field = each()
        rates = counted(field)
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
        h = first_step(rates, state, slope, begin, sign, span, rtol, atol, method, rank)
        h = torch.where(lost, span, h)
        if shared and samples:
            h = h.amin().expand(size)
        done = torch.where(lost, span, zero)  # time passed since the start, for each sample
    fsal = last_is_first(method) and taken is None
    if fsal and not traced and not shared and found is None and way is None and without_gradient((*state, *slope)):
        control = (begin, sign, span, done, h, smallest)
        how = (rtol, atol, method, max_steps, apart and rank == 1)
        rows = rows_at_once(state) if apart and rank == 1 else 0
        if 0 < rows < len(first):
            results = packed_blocks(field, state, slope, control, how, rows)
        else:
            results, *counts = packed_steps(rates, state, slope, size, *control, *how)
            note_steps(*counts)
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
            factor = SAFETY * ratio.clamp_min(1e-10) ** (-NOW * power) * before ** (BEFORE * power)
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
            before = torch.where(accepted, ratio.clamp_min(BEFORE_LEAST), before)
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
    """At most h: what is left in as few equal steps, so that none is small because little is left."""
    return left / torch.ceil(left / h.clamp_min(1e-30) - 1e-3).clamp_min(1.0)


def step_factor(ratio: float, before: float, power: float) -> float:
    if not math.isfinite(ratio):
        return SHRINK
    factor = SAFETY * max(ratio, 1e-10) ** (-NOW * power) * max(before, BEFORE_LEAST) ** (BEFORE * power)
    return min(max(factor, SHRINK), GROW)


def leading_error(method: Any) -> float:
    """c in the estimate c·hᵖ·Lᵖ⁻¹·|y'| that a method makes of its error for y' = Ly, with p its `order`."""
    values = [1.0] * len(method.b)
    for _ in range(method.order - 1):
        values = [sum(a * v for a, v in zip(row, values, strict=False)) for row in method.a]
    return max(abs(sum(e * v for e, v in zip(method.error, values, strict=True))), 1e-5)


# ---- one step for all samples -------------------------------------------------------------------


@lru_cache(maxsize=32)
def tableau_tensors(
    method: RungeKutta, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor, float]:
    """The rows of stages and of the weights, the error's weights, the stages' times, and the error's constant."""
    with torch.inference_mode(False):
        made = [torch.tensor(r, dtype=dtype, device=device) for r in (*method.a[1:], method.b, method.error, method.c)]
    return made[:-2], made[-2], made[-1], leading_error(method)


class Buffers:
    """A step's slopes side by side, so that a stage is one product with a row of the tableau.

    For values without gradients.

    Parts of the state lie one after the other; `parts` are views of them.
    """

    def __init__(self, state: State, method: RungeKutta):
        first, sizes, n = state[0], [s.numel() for s in state], len(method.b)
        self.method = method
        self.rows, self.error, self.times, _ = tableau_tensors(method, first.dtype, first.device)
        total = sum(sizes)
        block = first.new_empty((n + 4, total))  # slopes, the old state and the new one, their difference, its scale
        flat = block.unbind()
        if len(state) == 1:
            shaped = [(v,) for v in block.view(n + 4, *first.shape).unbind()]
        else:
            parts = zip(block.split(sizes, 1), state, strict=True)
            shaped = list(zip(*(part.view(n + 4, *s.shape).unbind() for part, s in parts), strict=True))
        self.slots = shaped[:n]
        self.old, self.new, self.change, self.size = flat[n:]
        self.old_parts, self.new_parts, self.change_parts, _ = shaped[n:]
        self.both = block.narrow(0, n, 2)
        whole = block.narrow(0, 0, n).t()
        self.columns = [whole.narrow(1, 0, i + 1) for i in range(n)]
        self.write(self.old_parts, state)

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
        torch.amax(self.both.abs(), 0, out=self.size)
        least = tolerance(atol, self.size.dtype, self.size.device)
        self.change.div_(torch.add(least, self.size, alpha=rtol, out=self.size))
        return self.change_parts


@lru_cache(maxsize=32)
def tolerance(atol: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(atol, dtype=dtype, device=device)


class BufferedStep:
    """Steps of one size in place, for one block of samples after the other."""

    def __init__(self, rates: Rates, state: State, slope: State, method: RungeKutta, rows: int):
        self.method, self.fsal = method, last_is_first(method)
        count = len(state[0]) if rows else 1
        pieces = list(zip(*(p.split(rows) for p in state), strict=True)) if 0 < rows < count else [state]
        self.blocks = [Buffers(piece, method) for piece in pieces]
        first = self.blocks[0]
        if len(pieces) == 1:
            first.write(first.slots[0], slope)
        else:
            for b, *piece in zip(self.blocks, *(p.split(rows) for p in slope), strict=True):
                b.write(b.slots[0], piece)
        self.rates = [counted(rates), *(rates,) * (len(pieces) - 1)]  # a batch counts once
        self.moments = torch.empty_like(first.times)
        self.moment = self.moments.unbind()
        self.numbers, self.few = [s.numel() for s in state], few(state)

    @property
    def state(self) -> State:
        if len(self.blocks) == 1:
            return self.blocks[0].old_parts
        return tuple(torch.cat(parts) for parts in zip(*(b.old_parts for b in self.blocks), strict=True))

    def attempt(self, t: float, h: float, rtol: float, atol: float) -> float:
        torch.mul(self.blocks[0].times, h, out=self.moments).add_(t)
        norms = []
        for b, rates in zip(self.blocks, self.rates, strict=True):
            for i in range(1, len(self.method.b)):
                torch.addmv(b.old, b.columns[i - 1], b.rows[i - 1], alpha=h, out=b.new)
                b.write(b.slots[i], rates(b.new_parts, self.moment[i]))
            if not self.fsal:
                torch.addmv(b.old, b.columns[-1], b.rows[-1], alpha=h, out=b.new)
            torch.mv(b.columns[-1], b.error, out=b.change)
            if self.few:
                lists = [listed(p) for p in (b.change_parts, b.old_parts, b.new_parts)]
                return abs(h) * weighed(*lists, rtol, atol)
            norms += [torch.linalg.vector_norm(p) for p in b.scaled(rtol, atol)]
        if len(norms) == 1:
            return abs(h) * float(norms[0]) / math.sqrt(self.numbers[0])
        found, parts = torch.stack(norms).tolist(), len(self.numbers)
        return abs(h) * largest([math.hypot(*found[k::parts]) / math.sqrt(n) for k, n in enumerate(self.numbers)])

    def accept(self, found: Dense | None, t: float, h: float, after: Tensor) -> None:
        for b, rates in zip(self.blocks, self.rates, strict=True):
            last = None if self.fsal else rates(b.new_parts, after)
            if found is not None:  # there is one block then
                found.fill(b.old_parts, [*b.slots, *([] if last is None else [last])], t, h, None, self.method)
            b.write(b.slots[0], b.slots[-1] if last is None else last)
            b.advance()


class PlainStep:
    """The same with values that gradients flow through."""

    def __init__(self, rates: Rates, state: State, slope: State, method: RungeKutta):
        self.rates, self.state, self.slope, self.method = counted(rates), state, slope, method

    def attempt(self, t: float, h: float, rtol: float, atol: float) -> float:
        like = self.state[0]

        def each(state: State, t: Any) -> State:
            return self.rates(state, like.new_full((), t))

        self.slopes = stages(each, self.state, t, h, h, self.method, self.slope)
        self.new = combined(self.state, self.method.b, self.slopes, h)
        with torch.no_grad():
            estimate = combined(None, self.method.error, self.slopes, h)
            return float(scaled_norm(estimate, self.state, self.new, rtol, atol, 0))

    def accept(self, found: Dense | None, t: float, h: float, after: Tensor) -> None:
        fsal = last_is_first(self.method)
        last = self.slopes[-1] if fsal else self.rates(self.new, after)
        if found is not None:
            found.fill(self.state, self.slopes if fsal else [*self.slopes, last], t, h, None, self.method)
        self.state, self.slope = self.new, last


def shared_steps(
    rates: Rates, state: State, size: tuple[int, ...], start: float, stop: float, rtol: float, atol: float,
    method: RungeKutta, at: Tensor | tuple[float, ...] | None, max_steps: int, rows: int,
) -> State:  # fmt: skip
    """Steps of one size for all samples: time and step are numbers.

    Calls of control outnumber those of a small field. `rows` are the samples that are evaluated at once; 0: all.
    """
    field, rates = rates, counted(rates)
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
        h = shared_first_step(rates, state, slope, start, sign, span, rtol, atol, method)
    way = begun(start, state[0])
    buffered = way is None and without_gradient((*state, *slope))  # what is written over is no way to look back on
    steps = BufferedStep(field, state, slope, method, rows) if buffered else PlainStep(field, state, slope, method)
    done, before, power, accepts, rejects = 0.0, 1.0, 1 / method.order, 0, 0
    for _ in range(max_steps):
        left = span - done
        if left <= 0:
            break
        h = left / max(math.ceil(left / max(h, 1e-30) - 1e-3), 1)
        t = start + sign * done
        ratio = steps.attempt(t, sign * h, rtol, atol)
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


def root_mean_square(parts: Sequence[Tensor]) -> float:
    """The largest of the parts' root mean squares, in one look at the device."""
    if len(parts) == 1:
        return float(torch.linalg.vector_norm(parts[0])) / math.sqrt(parts[0].numel())
    found = torch.stack([torch.linalg.vector_norm(p) for p in parts]).tolist()
    return largest([v / math.sqrt(p.numel()) for v, p in zip(found, parts, strict=True)])


FEW = 16  # numbers that Python reckons with faster than it calls torch


def few(values: Sequence[Tensor]) -> bool:
    return values[0].device.type == "cpu" and sum(v.numel() for v in values) <= FEW


def listed(parts: Sequence[Tensor]) -> list[list[float]]:
    return [p.reshape(-1).tolist() for p in parts]


def weighed(
    values: list[list[float]], old: list[list[float]], new: list[list[float]], rtol: float, atol: float
) -> float:
    """`scaled_norm` over all of a few numbers."""
    found = []
    for part in zip(values, old, new, strict=True):
        total = 0.0
        for v, a, b in zip(*part, strict=True):
            ratio = v / (rtol * max(abs(a), abs(b)) + atol or 1e-300)
            total += ratio * ratio
        found.append(math.sqrt(total / len(part[0])))
    return largest(found)


def largest(values: Sequence[float]) -> float:
    """Not-a-number if one is."""
    total = sum(values)
    return max(values) if total == total else total


def sound(values: Sequence[Tensor]) -> bool:
    """Whether all is finite; of many numbers by one sum, in which not-a-number and infinity stay."""
    with torch.no_grad():
        if few(values):
            return all(math.isfinite(v) for part in listed(values) for v in part)
        return all(math.isfinite(float(v.sum())) or bool(torch.isfinite(v).all()) for v in values)


def shared_first_step(
    rates: Rates, state: State, slope: State, start: float, sign: float, span: float, rtol: float, atol: float,
    method: RungeKutta,
) -> float:  # fmt: skip
    """`first_step` for all samples."""
    small = few(state)
    known = listed(state) if small else []
    scales = [] if small else [s.abs().mul_(rtol).add_(atol) for s in state]

    def norm(values: Sequence[Tensor]) -> float:
        if small:
            return weighed(listed(values), known, known, rtol, atol)
        return root_mean_square([v / s for v, s in zip(values, scales, strict=True)])

    size, speed = norm(state), norm(slope)
    little = size < 1e-5 or speed < 1e-5
    probe = min(1e-6 if little else 0.01 * size / speed, span)
    moved = rates(
        tuple(torch.add(s, k, alpha=sign * probe) for s, k in zip(state, slope, strict=True)),
        state[0].new_full((), start + sign * probe),
    )
    bend = norm([a - b for a, b in zip(moved, slope, strict=True)]) / max(probe, 1e-30)
    if not math.isfinite(bend):
        return probe
    p, longest = method.order, math.log(max(span, 1e-30))
    quick, bent = math.log(max(speed, 1e-30)), math.log(max(bend, 1e-30))
    c = tableau_tensors(method, state[0].dtype, state[0].device)[3]
    bold = (math.log(AIM / c) - quick - (p - 1) * max(bent - quick, -longest)) / p
    careful = longest + (math.log(0.01) - max(quick + longest, bent + 2 * longest)) / (p + 1)
    h = math.exp(min(max(bold, careful), longest))
    return min(h if little else min(h, 200 * probe), span)


# ---- a step for each sample, in place -----------------------------------------------------------


def packed_steps(
    rates: Rates, state: State, slope: State, size: tuple[int, ...], begin: Tensor, sign: Tensor, span: Tensor,
    done: Tensor, h: Tensor, smallest: Tensor, rtol: float, atol: float, method: RungeKutta, max_steps: int,
    apart: bool,
) -> tuple[State, Tensor, Tensor]:  # fmt: skip
    """Steps of each sample's own size, in place; samples that have arrived are left out where that saves enough.

    The state at the end, and how many steps were accepted and rejected.
    """
    b = Buffers(state, method)
    b.write(b.slots[0], slope)
    rank, power, last = len(size), 1 / method.order, len(method.b) - 1
    logs = torch.zeros_like(h)  # of the error before, its logarithm times BEFORE/p
    least = BEFORE * power * math.log(BEFORE_LEAST)
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
        factor = torch.exp(torch.add(logs, log, alpha=-0.5 * NOW * power)).mul_(SAFETY)
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
            done, logs = reached, log.mul_(0.5 * BEFORE * power).clamp_min_(least)
            b.write(b.slots[0], b.slots[last])
            b.advance()
        else:
            done = torch.where(accepted, reached, done)
            logs = torch.where(accepted, log.mul_(0.5 * BEFORE * power).clamp_min_(least), logs)
            for old, new, known, slot in zip(b.old_parts, b.new_parts, b.slots[0], b.slots[last], strict=True):
                yes = expanded(accepted, old)
                torch.where(yes, new, old, out=old)
                torch.where(yes, slot, known, out=known)
        h = h * factor
    else:
        raise too_many_steps(max_steps, float((begin + sign * done)[done < span][0]))
    if here is None:
        return b.old_parts, accepts, rejects
    for r, p in zip(results, b.old_parts, strict=True):
        r.index_copy_(0, here, p)
    return results, accepts, rejects


ROWS = 512  # samples that are evaluated at once: what a network makes of them stays in the processor's cache
SMALL = 256  # numbers of a sample, for blocks to be of use


def rows_at_once(state: State) -> int:
    """The size of equal blocks of samples in which a field is evaluated fastest; 0: all at once."""
    first, count = state[0], len(state[0])
    if first.device.type != "cpu" or not count or sum(s.numel() for s in state) > SMALL * count:
        return 0
    blocks = round(count / (ROWS * torch.get_num_threads()))
    return -(-count // blocks) if blocks > 1 else 0


def packed_blocks(
    rates: Rates, state: State, slope: State, control: Sequence[Tensor], how: Sequence[Any], rows: int
) -> State:
    """`packed_steps` for one block of samples after the other. A field is called as often as in the longest of them."""
    out, most = [], 0
    for piece in zip(*(v.split(rows) for v in (*state, *slope, *control)), strict=True):
        n, calls = len(state), 0

        def noted(state: State, t: Any) -> State:
            nonlocal calls
            calls += 1
            return rates(state, t)

        size = tuple(piece[0].shape[:1])
        out.append(packed_steps(noted, piece[:n], piece[n : 2 * n], size, *piece[2 * n :], *how))
        most = max(most, calls)
    for c in _COUNTS:
        c.evaluations += most
    note_steps(*(torch.cat([piece[k] for piece in out]) for k in (1, 2)))
    return tuple(torch.cat(parts) for parts in zip(*(piece[0] for piece in out), strict=True))


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
    method: RungeKutta, rank: int,
) -> Tensor:  # fmt: skip
    """A step to begin with, from the first and second derivative: |y'| and |y''| in tolerances.

    The bold one is for an error of `AIM` if further derivatives grow as y' = Ly, L = |y''|/|y'|, or with the span. The
    careful one is that of Hairer, Norsett & Wanner, II.4, in units of the span; the larger of them counts. A state that
    is not below its tolerance changes by twice its own size at most.
    """
    size = scaled_norm(state, state, state, rtol, atol, rank)
    speed = scaled_norm(slope, state, state, rtol, atol, rank)
    little = (size < 1e-5) | (speed < 1e-5)
    probe = torch.where(little, torch.full_like(size, 1e-6), 0.01 * size / speed.clamp_min(1e-30))
    probe = torch.minimum(probe, span)
    step = sign * probe
    signed = tuple(expanded(step, s) for s in state)
    moved = rates(tuple(torch.addcmul(s, d, k) for s, d, k in zip(state, signed, slope, strict=True)), start + step)
    bend = scaled_norm(
        tuple(a - b for a, b in zip(moved, slope, strict=True)), state, state, rtol, atol, rank
    ) / probe.clamp_min(1e-30)
    p, longest = method.order, torch.log(span.clamp_min(1e-30))
    quick, bent = torch.log(speed.clamp_min(1e-30)), torch.log(bend.clamp_min(1e-30))
    bold = (math.log(AIM / leading_error(method)) - quick - (p - 1) * torch.maximum(bent - quick, -longest)) / p
    careful = longest + (math.log(0.01) - torch.maximum(quick + longest, bent + 2 * longest)) / (p + 1)
    found = torch.exp(torch.maximum(bold, careful))
    found = torch.where(little, found, torch.minimum(found, 200 * probe))
    return torch.minimum(torch.where(torch.isfinite(found) & torch.isfinite(bend), found, probe), span)
