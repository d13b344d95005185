"""Inverses and log-dets by iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from flowlang.backends.torch.runtime.errors import bad_input
from torch import Tensor


def bracket_solve(
    f: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor, lo: float, hi: float, increasing: bool
) -> Tensor:
    """x in (lo, hi) with f(x) = y for each entry; f gives its value and slope and is strictly monotone.

    Safeguarded Newton inside a bracket, without gradient; one Newton step at the end carries the
    implicit gradient.
    """

    def place(t: Tensor) -> tuple[Tensor, Tensor]:
        """The real line onto (lo, hi), with its slope."""
        if lo > -math.inf and hi < math.inf:
            p = torch.sigmoid(t)
            return lo + (hi - lo) * p, (hi - lo) * p * (1 - p)
        if lo > -math.inf:
            return lo + F.softplus(t), torch.sigmoid(t)
        if hi < math.inf:
            return hi - F.softplus(-t), torch.sigmoid(-t)
        return t, torch.ones_like(t)

    with torch.no_grad():
        goal = y.detach()
        sign = 1.0 if increasing else -1.0
        wide = lo > -math.inf and hi < math.inf
        a, b = torch.full_like(goal, -1.0), torch.full_like(goal, 1.0)
        eager = not torch.compiler.is_compiling()
        for _ in range(6 if wide else 20):
            high = sign * (f(place(a)[0])[0] - goal) > 0
            low = sign * (f(place(b)[0])[0] - goal) < 0
            if eager and not bool((high | low).any()):
                break
            a, b = torch.where(high, a * 4, torch.where(low, b, a)), torch.where(low, b * 4, torch.where(high, a, b))
        t = (a + b) / 2
        rounds = 80 if y.dtype == torch.float64 else 48
        for k in range(rounds):
            x, dx = place(t)
            value, slope = f(x)
            error = sign * (value - goal)
            a, b = torch.where(error <= 0, t, a), torch.where(error >= 0, t, b)
            newton = t - sign * error / (slope * dx)
            middle = (a + b) / 2
            good = (newton > a) & (newton < b) if k % 4 != 3 else torch.zeros_like(newton, dtype=torch.bool)
            new = torch.where(good, newton, middle)
            done = (new - t).abs() <= torch.finfo(y.dtype).eps * (1 + t.abs())
            t = new
            if eager and k % 4 != 3 and bool((done | ~torch.isfinite(goal)).all()):
                break
        x = place(t)[0]
        x = torch.where(torch.isnan(goal), goal, x)
    value, slope = f(x)
    step = (value - y) / slope.detach()
    return x - torch.where(torch.isfinite(step) | torch.isnan(y), step, torch.zeros_like(step))


def scan_solve(
    step: Callable[[Tensor], Tensor], like: Tensor, dim: int, order: int | Sequence[int], placeholder: float
) -> Tensor:
    """Solves slice after slice along `dim`: in each round `step` is right at the next slices.

    `order` is the round of each slice; a number n stands for one after the other, -n for that backwards.
    """
    n = like.shape[dim]
    rounds = list(order) if isinstance(order, Sequence) else list(range(n)) if order >= 0 else list(range(n))[::-1]
    shape = [1] * like.dim()
    shape[dim] = n
    round_of = torch.tensor(rounds, device=like.device).view(shape)
    count = max(rounds, default=-1) + 1
    with torch.no_grad():
        u = torch.full_like(like, placeholder)
        for t in range(count):
            u = torch.where(round_of == t, step(u), u)
    return implicit_scan(step, u, count)


def implicit_scan(step: Callable[[Tensor], Tensor], u: Tensor, rounds: int) -> Tensor:
    """The solution u of u = step(u), as a value through which gradients flow.

    By the implicit function theorem the gradient with respect to what `step` captures is that of one
    step, with the incoming gradient g replaced by v = g + Jᵀv. J is strictly triangular: v is exact
    after `rounds` rounds, mostly much earlier. First derivatives only.
    """
    if not torch.is_grad_enabled():
        return u
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(u):
        for _ in range(rounds):  # no hooks are traced, nor transformed by `torch.func`
            u = step(u)
        return u
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        value = step(u)
    if not value.requires_grad:
        return u.detach()

    def back(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        v = grad
        for _ in range(rounds):
            (jv,) = torch.autograd.grad(value, u, v, retain_graph=True, allow_unused=True)
            new = grad if jv is None else grad + jv
            if torch.equal(new, v):
                break
            v = new
        return v

    out = value.view_as(value)
    out.register_hook(back)
    return out


def stage_rows(stage_of: Sequence[int], stages: int, start: int = 0) -> list[tuple[int, int]]:
    """The first row and the end of the rows that each stage computes, given the stage of each row."""
    ends = [start + sum(1 for s in stage_of if s < k) for k in range(stages + 1)]
    return list(pairwise(ends))


def rows_or_zeros(x: Tensor, start: int, stop: int) -> Tensor:
    """x[start:stop], with zeros for rows that are outside."""
    n = x.shape[0]
    first, last = min(max(start, 0), n), min(max(stop, 0), n)
    before, after = first - start if last > first else stop - start, stop - last if last > first else 0
    zeros = x[:0].new_zeros(before + after, *x.shape[1:])
    return torch.cat((zeros[:before], x[first:last], zeros[before:]))


def batch_last(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """`[*batch, *axes]` as `[*axes in this order, batch]`."""
    rank = len(order)
    flat = x.reshape(-1, *x.shape[x.dim() - rank :])
    return flat.permute(*(k + 1 for k in order), 0).contiguous()


def batch_first(x: Tensor, order: tuple[int, ...], shape: Sequence[int]) -> Tensor:
    """`[*axes, batch]` as `[*batch, *axes in this order]`, of the shape given."""
    return x.permute(-1, *order).reshape(shape)


def fixed_point_solve(g: Callable[[Tensor], Tensor], y: Tensor, constant: float) -> Tensor:
    """x with x + g(x) = y for a contraction g; the gradient comes from the same iteration backwards.

    Enough rounds for the dtype's precision, and 2000 at most (a constant above 0.98 in float64, 0.993 in float32).
    An entry that is still far from rest after them becomes not-a-number, of its sample alone.
    """
    eps = torch.finfo(y.dtype).eps
    rounds = min(math.ceil(math.log(eps) / math.log(max(constant, 1e-3))) + 2, 2000)
    with torch.no_grad():
        x = y.detach()
        for _ in range(rounds):
            new = y - g(x)
            moving = (new - x).abs() > eps * (1 + new.abs())  # False for not-a-number: others go on
            x = new
            if not torch.compiler.is_compiling() and not bool(moving.any()):
                break
        # One more round moves a value at rest by rounding alone.
        x = torch.where((y - g(x) - x).abs() > 1e3 * eps * (1 + x.abs()), math.nan, x)
    if not torch.is_grad_enabled():
        return x
    if torch.compiler.is_compiling():  # hooks cannot be traced: differentiate the iteration itself
        for _ in range(rounds):
            x = y - g(x)
        return x
    x = x.detach().requires_grad_()
    g_x = g(x)
    out = y - g_x
    if not out.requires_grad:
        return out.detach()

    def back(grad: Tensor | None) -> Tensor | None:
        """Solves v = grad - Jᵀv."""
        if grad is None:
            return None
        v = grad
        for _ in range(rounds):
            (jv,) = torch.autograd.grad(g_x, x, v, retain_graph=True)
            new = grad - jv
            # Not-a-number of one sample keeps no other from coming to rest.
            small = torch.nan_to_num(new - v, nan=0.0).abs().max() <= eps * (
                1 + torch.nan_to_num(v, nan=0.0).abs().max()
            )
            v = new
            if bool(small):
                break
        return v

    out.register_hook(back)
    return out


UNTRACEABLE = "the log-det of a contraction is a series of random length, which no traced graph holds"


def roulette(law: str, rate: float, exact: int, generator: torch.Generator | None) -> list[float]:
    """The weight of each term of a series: 1 for the first `exact`, then 1/P(N >= k - exact) for the N more drawn.

    N is geometric on 1, 2, .. (P(N >= j) = (1 - rate)^(j - 1)), or Poisson with mean `rate`.
    """
    weights = [1.0] * exact
    u = float(torch.rand((), dtype=torch.float64, generator=generator))
    tail, j, chance = 1.0, 1, math.exp(-rate)  # P(N >= 1), and of a Poisson law P(N = j - 1)
    if law == "poisson":
        tail = -math.expm1(-rate)
    while u < tail and j <= 60:
        weights.append(1 / tail)
        if law == "geometric":
            tail *= 1 - rate
        else:
            chance *= rate / j
            tail -= chance
        j += 1
    return weights


@torch.compiler.disable(reason=UNTRACEABLE)
def estimate_log_det(
    g: Callable[[Tensor], Tensor], x: Tensor, event: int, generator: torch.Generator | None = None,
    law: str = "geometric", rate: float = 0.5, exact: int = 10, samples: int = 1, surrogate: bool = False,
) -> Tensor:  # fmt: skip
    """Unbiased log|det(I + dg/dx)| for each sample: power series, random length, Hutchinson's trace.

    Chen et al. 2019 (Residual Flows), eq. 6: the first terms always, the rest with weights 1/P(N >= k). Its gradient is
    that of a Neumann series (eq. 8), unbiased too, for which one product with the Jacobian is differentiated, whatever
    the number of terms; first derivatives only. `surrogate`: the value as well is what eq. 8 differentiates, which
    means nothing.
    `torch.compile` runs it outside its graphs and refuses it under `fullgraph=True`, as `torch.export` does.
    """
    if torch.compiler.is_exporting():
        raise bad_input(UNTRACEABLE, "export `inverse` or `sample`, or compile without `fullgraph`")
    dims = tuple(range(-event, 0))
    wanted = torch.is_grad_enabled()
    total = x.new_zeros(x.shape[: x.dim() - event])
    with torch.enable_grad():
        inner = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()  # hooks on x are not for us
        value = g(inner)
        for _ in range(samples):
            v = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            w, series, neumann = v, torch.zeros_like(total), v
            for k, weight in enumerate(roulette(law, rate, exact, generator), 1):
                (w,) = torch.autograd.grad(value, inner, w, retain_graph=True)
                series = series - (-1) ** k / k * weight * (w * v).sum(dims)
                neumann = neumann + (-1) ** k * weight * w
            if wanted or surrogate:
                (pulled,) = torch.autograd.grad(value, inner, neumann, create_graph=wanted, retain_graph=True)
                part = (pulled * v).sum(dims)
                series = part if surrogate else series + (part - part.detach())
            total = total + series / samples
    return total if wanted else total.detach()


def exact_log_det(g: Callable[[Tensor], Tensor], x: Tensor, event: int) -> Tensor:
    """log|det(I + dg/dx)| from the whole Jacobian, one product for each coordinate: for few of them."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        inner = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()  # hooks on x are not for us
        value = g(inner)
        size = math.prod(x.shape[x.dim() - event :])
        eye = torch.eye(size, dtype=x.dtype, device=x.device)
        shape = x.shape[x.dim() - event :]
        rows = [
            torch.autograd.grad(
                value, inner, e.reshape(shape).expand_as(value), create_graph=wanted, retain_graph=True
            )[0]
            for e in eye
        ]
        jacobian = torch.stack([r.reshape(*r.shape[: r.dim() - event], size) for r in rows], -2)
        found = torch.linalg.slogdet(jacobian + eye)[1]
    return found if wanted else found.detach()
