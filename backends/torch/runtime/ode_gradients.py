"""Gradients of initial value problems whose memory does not grow with the number of steps.

The adjoint (Chen et al. 2018, arXiv 1806.07366): a' = -aᵀ·∂v/∂x, solved backwards beside x. A reversible scheme
(McCallum & Foster 2024, arXiv 2410.11648): each step is undone exactly, so its gradient is that of the steps taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from flowlang.backends.torch.runtime.adaptive import ode_adaptive
from flowlang.backends.torch.runtime.odes import (
    RungeKutta,
    Time,
    begun,
    combined,
    counted,
    expanded,
    grid,
    note_steps,
    ode_steps,
    stages,
)
from torch import Tensor, nn

HeldRates = Callable[..., tuple[Tensor, ...]]
"""The field as a function of the state, the time and what else it reads of the surroundings."""


def reached_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module and of those that it only refers to."""
    found: dict[int, nn.Parameter] = {}
    seen: set[int] = set()
    stack = [module]
    while stack:
        m = stack.pop()
        if id(m) in seen:
            continue
        seen.add(id(m))
        found.update((id(p), p) for p in m._parameters.values() if p is not None)
        stack.extend(c for c in m._modules.values() if c is not None)
        stack.extend(c for c in vars(m).values() if isinstance(c, nn.Module))
    return [p for p in found.values() if p.requires_grad]


class OdeProblem:
    """What a solve needs besides tensors that have gradients."""

    def __init__(
        self, rates: HeldRates, batch: Sequence[int], start: float, stop: float, how: Any, method: RungeKutta,
        sizes: tuple[int, int], timed: bool,
    ):  # fmt: skip
        self.rates, self.batch, self.start, self.stop, self.how, self.method = (
            rates,
            tuple(batch),
            start,
            stop,
            how,
            method,
        )
        self.parts, self.held = sizes
        self.timed = timed

    def split(
        self, tensors: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None, list[Tensor]]:
        """The state, what is held, the times asked for and the parameters."""
        state, rest = tuple(tensors[: self.parts]), list(tensors[self.parts :])
        held, rest = tuple(rest[: self.held]), rest[self.held :]
        return state, held, (rest.pop(0) if self.timed else None), rest

    def solve(
        self, rates: Any, state: tuple[Tensor, ...], start: Time, stop: Time, at: Tensor | None, taken: Any = None,
        share: float = 1.0,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """By the method and its steps or tolerances; `share` of the steps where it is for a part of the way."""
        if isinstance(self.how, dict):
            return ode_adaptive(
                rates, state, self.batch, start, stop, method=self.method, at=at, taken=taken, **self.how
            )
        steps = self.how
        if isinstance(start, Tensor) or isinstance(stop, Tensor):
            steps = max(1, round(share * (steps if isinstance(steps, int) else len(steps) - 1)))
        return ode_steps(rates, state, self.batch, start, stop, steps, self.method, at, taken)


class AdjointSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: OdeProblem, *tensors: Tensor) -> tuple[Tensor, ...]:
        state, held, at, _ = problem.split(tensors)
        out = problem.solve(lambda s, t: problem.rates(s, t, *held), state, problem.start, problem.stop, at)
        ctx.problem, ctx.outputs = problem, len(out)
        ctx.save_for_backward(*out, *tensors[problem.parts :])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        problem: OdeProblem = ctx.problem
        saved = ctx.saved_tensors
        out, rest = saved[: ctx.outputs], list(saved[ctx.outputs :])
        held, rest = rest[: problem.held], rest[problem.held :]
        at = rest.pop(0) if problem.timed else None
        parameters = rest
        leaves = [h.detach().requires_grad_() if h.is_floating_point() else h for h in held]
        wanted = [v for v in leaves if v.requires_grad] + [p for p in parameters if p.requires_grad]
        totals = [torch.zeros_like(v) for v in wanted]
        record: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        n = problem.parts

        def rates(state: tuple[Tensor, ...], t: Tensor) -> tuple[Tensor, ...]:
            x, a = [s.detach().requires_grad_() for s in state[:n]], state[n:]
            with torch.enable_grad():
                f = problem.rates(tuple(x), t, *leaves)
            used = [(v, w) for v, w in zip(f, a, strict=True) if v.requires_grad]
            pulled: Sequence[Tensor | None] = [None] * n
            if used:
                keep = bool(wanted)
                pulled = torch.autograd.grad(
                    [v for v, _ in used], x, [w for _, w in used], retain_graph=keep, allow_unused=True
                )
            if wanted:
                record.append((f, a))
            return (
                *(v.detach() for v in f),
                *(torch.zeros_like(s) if g is None else -g for g, s in zip(pulled, x, strict=True)),
            )

        def taken(weights: list[Any]) -> None:
            """Adds a step's part of -∫ aᵀ·∂v/∂θ dt: its stages are the last ones recorded."""
            pairs = []
            for (f, a), w in zip(record[-len(weights) :], weights, strict=True):
                if isinstance(w, Tensor) or w:
                    each = [
                        (v, -(expanded(w, v) if isinstance(w, Tensor) else w) * c) for v, c in zip(f, a, strict=True)
                    ]
                    pairs += [(v, c) for v, c in each if v.requires_grad]
            record.clear()
            if pairs and wanted:
                found = torch.autograd.grad([v for v, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
                for total, g in zip(totals, found, strict=True):
                    if g is not None:
                        total += g

        whole = abs(problem.stop - problem.start)
        at_grad: Tensor | None = None
        if at is None:
            state = problem.solve(
                rates, (*out, *(g.contiguous() for g in grads)), problem.stop, problem.start, None, taken
            )
            start_grads = state[n:]
        else:
            times = at.expand((*problem.batch, at.shape[-1])).to(out[0])
            rank = len(problem.batch)
            order = torch.argsort(times, -1, descending=problem.stop > problem.start)
            cotangent = [torch.zeros_like(o.select(rank, 0)) for o in out]
            slopes = torch.zeros_like(times)
            for j in range(times.shape[-1]):
                here = order[..., j : j + 1]
                t = times.gather(-1, here).squeeze(-1)
                x = tuple(o.gather(rank, expanded(here, o).expand_as(o.narrow(rank, 0, 1))).squeeze(rank) for o in out)
                g = [v.gather(rank, expanded(here, v).expand_as(v.narrow(rank, 0, 1))).squeeze(rank) for v in grads]
                if at.requires_grad or ctx.needs_input_grad[1 + problem.parts + problem.held]:
                    f = problem.rates(x, t, *held)
                    slope = sum(
                        (a * b).flatten(rank).sum(-1) if a.dim() > rank else a * b for a, b in zip(f, g, strict=True)
                    )
                    slopes.scatter_(-1, here, slope.unsqueeze(-1))  # type: ignore[union-attr]
                cotangent = [a + b for a, b in zip(cotangent, g, strict=True)]
                last = j + 1 == times.shape[-1]
                to = (
                    torch.full_like(t, problem.start)
                    if last
                    else times.gather(-1, order[..., j + 1 : j + 2]).squeeze(-1)
                )
                share = float((to - t).abs().max()) / whole
                if share:
                    state = problem.solve(rates, (*x, *cotangent), t, to, None, taken, share)
                    cotangent = list(state[n:])
            start_grads = tuple(cotangent)
            if ctx.needs_input_grad[1 + problem.parts + problem.held]:
                at_grad = slopes.sum_to_size(at.shape).to(at)
        by_id = {id(v): total for v, total in zip(wanted, totals, strict=True)}
        others = [by_id.get(id(v)) for v in leaves]
        timed = [at_grad] if problem.timed else []
        return (None, *start_grads, *others, *timed, *(by_id.get(id(p)) for p in parameters))


def ode_adjoint(
    rates: HeldRates, state: tuple[Tensor, ...], batch: Sequence[int], start: float, stop: float, how: Any,
    method: RungeKutta, held: tuple[Tensor, ...], field: nn.Module, at: Tensor | tuple[float, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same values as without it; `how` is steps, times or tolerances. Gradients come from the adjoint equation."""
    at = state[0].new_tensor(at) if isinstance(at, tuple) else at
    problem = OdeProblem(rates, batch, start, stop, how, method, (len(state), len(held)), at is not None)
    timed = () if at is None else (at,)
    given = (*state, *held, *timed, *reached_parameters(field))
    return AdjointSolve.apply(problem, *given)  # type: ignore[no-any-return, no-untyped-call]


# ---- reversible steps ---------------------------------------------------------------------------

COUPLING = 0.99  # λ of McCallum & Foster


def reversible_step(
    rates: Any, x: tuple[Tensor, ...], z: tuple[Tensor, ...], t: Any, after: Any, method: RungeKutta
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """x⁺ = λx + (1 - λ)z + Ψ_h(z, t), z⁺ = z - Ψ_-h(x⁺, t⁺), with Ψ_h(x) the increment of the method."""
    up = increment(rates, z, t, after - t, method)
    x = tuple(torch.lerp(b, a, COUPLING) + d for a, b, d in zip(x, z, up, strict=True))
    down = increment(rates, x, after, t - after, method)
    return x, tuple(b - d for b, d in zip(z, down, strict=True))


def undone_step(
    rates: Any, x: tuple[Tensor, ...], z: tuple[Tensor, ...], t: Any, after: Any, method: RungeKutta
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The values before a step from those after it."""
    down = increment(rates, x, after, t - after, method)
    z = tuple(b + d for b, d in zip(z, down, strict=True))
    up = increment(rates, z, t, after - t, method)
    return tuple((a - d - (1 - COUPLING) * b) / COUPLING for a, b, d in zip(x, z, up, strict=True)), z


def increment(rates: Any, x: tuple[Tensor, ...], t: Any, h: Any, method: RungeKutta) -> tuple[Tensor, ...]:
    return combined(None, method.b, stages(rates, x, t, h, h, method, None), h)


class ReversibleSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: OdeProblem, *tensors: Tensor) -> tuple[Tensor, ...]:
        state, held, _, _ = problem.split(tensors)
        field = ReversibleSolve.field(problem, state, held)
        x = z = state
        way = begun(problem.start, x[0])
        for t, after in ReversibleSolve.steps(problem):
            x, z = reversible_step(field, x, z, t, after, problem.method)
            if way is not None:
                way.append((after, x[0].detach()))
        ctx.problem = problem
        ctx.save_for_backward(*x, *z, *tensors[problem.parts :])
        n = len(grid(problem.start, problem.stop, problem.how)) - 1
        note_steps(torch.full(problem.batch, n), torch.zeros(problem.batch, dtype=torch.long))
        return tuple(v.clone() for v in x)

    @staticmethod
    def steps(problem: OdeProblem) -> Iterator[tuple[float, float]]:
        times = grid(problem.start, problem.stop, problem.how)
        return pairwise(times)

    @staticmethod
    def field(problem: OdeProblem, state: tuple[Tensor, ...], held: Sequence[Tensor]) -> Any:
        return counted(lambda s, t: problem.rates(s, state[0].new_full(problem.batch, t), *held))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        problem: OdeProblem = ctx.problem
        n = problem.parts
        saved = ctx.saved_tensors
        x, z = tuple(saved[:n]), tuple(saved[n : 2 * n])
        held, parameters = saved[2 * n : 2 * n + problem.held], list(saved[2 * n + problem.held :])
        leaves = [h.detach().requires_grad_() if h.is_floating_point() else h for h in held]
        wanted = [v for v in leaves if v.requires_grad] + [p for p in parameters if p.requires_grad]
        totals = [torch.zeros_like(v) for v in wanted]
        field = ReversibleSolve.field(problem, x, leaves)
        gx, gz = tuple(grads), tuple(torch.zeros_like(g) for g in grads)
        for t, after in reversed(list(ReversibleSolve.steps(problem))):
            with torch.no_grad():
                x, z = undone_step(field, x, z, t, after, problem.method)
            with torch.enable_grad():
                x0, z0 = (tuple(v.detach().requires_grad_() for v in s) for s in (x, z))
                x1, z1 = reversible_step(field, x0, z0, t, after, problem.method)
                found = torch.autograd.grad((*x1, *z1), (*x0, *z0, *wanted), (*gx, *gz), allow_unused=True)
            gx = tuple(torch.zeros_like(v) if g is None else g for g, v in zip(found[:n], x, strict=True))
            gz = tuple(torch.zeros_like(v) if g is None else g for g, v in zip(found[n : 2 * n], z, strict=True))
            for total, g in zip(totals, found[2 * n :], strict=True):
                if g is not None:
                    total += g
        by_id = {id(v): total for v, total in zip(wanted, totals, strict=True)}
        start = tuple(a + b for a, b in zip(gx, gz, strict=True))
        return (None, *start, *(by_id.get(id(v)) for v in leaves), *(by_id.get(id(p)) for p in parameters))


def ode_reversible(
    rates: HeldRates, state: tuple[Tensor, ...], batch: Sequence[int], start: float, stop: float, how: Any,
    method: RungeKutta, held: tuple[Tensor, ...], field: nn.Module,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The state at `stop` by the method's reversible form, in equal steps or at given times."""
    problem = OdeProblem(rates, batch, start, stop, how, method, (len(state), len(held)), False)
    given = (*state, *held, *reached_parameters(field))
    return ReversibleSolve.apply(problem, *given)  # type: ignore[no-any-return, no-untyped-call]
