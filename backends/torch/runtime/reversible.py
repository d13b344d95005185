"""Chains of bijections that keep no activations: on the way back each step's input is found again by its inverse.

Source: Gomez et al. 2017 (The Reversible Residual Network), arXiv 1707.04585; here the inverses are derived ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from flowlang.backends.torch.runtime.ode_gradients import reached_parameters
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def results_of(block: nn.Module, name: str, values: Sequence[Tensor], held: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a method of a block gives; a call of the module itself runs its hooks too."""
    found = (block if name == "forward" else getattr(block, name))(*values, *held)
    return found if isinstance(found, tuple) else (found,)


def run_steps(
    blocks: Sequence[nn.Module], name: str, values: Sequence[Tensor], held: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The values after all blocks, and the sum of their log-dets if the method gives them."""
    carried = len(values)
    total: list[Tensor] = []
    for block in blocks:
        found = results_of(block, name, values, held)
        values, parts = found[:carried], found[carried:]
        total = [a + b for a, b in zip(total, parts, strict=True)] if total else list(parts)
    return (*values, *total)


class Recalled(torch.autograd.Function):  # ignores below: torch's functions of autograd are untyped
    """What a network gave when a step was undone, as what it gives now: its graph is there already."""

    @staticmethod
    def forward(ctx: Any, leaves: Sequence[Tensor], outputs: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.leaves, ctx.outputs, ctx.weights = leaves, outputs, inputs[len(leaves) :]
        return tuple(o.detach() for o in outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        pairs = [(o, g) for o, g in zip(ctx.outputs, slopes, strict=True) if o.requires_grad]
        wanted = [v for v in (*ctx.leaves, *ctx.weights) if v.requires_grad]
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return (None, None, *(next(found) if v.requires_grad else None for v in (*ctx.leaves, *ctx.weights)))


class Tape:
    """The networks that condition a step: called once while it is undone, and recalled while it runs again.

    What a network reads is the same both times, up to rounding: the map does not change what it knows.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, list[Tensor], Any]] = []
        self.again = False

    def call(self, net: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        if not self.again:
            with torch.enable_grad():
                leaves = [i.detach().requires_grad_() for i in inputs]
                found = net(*leaves)
            self.calls.append((net, leaves, found))
            return tuple(f.detach() for f in found) if isinstance(found, tuple) else found.detach()
        for k, (held, leaves, found) in enumerate(self.calls):
            if held is net and all(self.close(a, b) for a, b in zip(inputs, leaves, strict=True)):
                del self.calls[k]
                outputs = found if isinstance(found, tuple) else (found,)
                given = (*inputs, *reached_parameters(net))
                recalled: tuple[Tensor, ...] = Recalled.apply(leaves, outputs, *given)  # type: ignore[no-untyped-call]
                return recalled if isinstance(found, tuple) else recalled[0]
        return net(*inputs)

    def close(self, a: Tensor, b: Tensor) -> bool:
        near = torch.finfo(a.dtype).eps ** 0.5
        return a.shape == b.shape and torch.allclose(a, b, rtol=near, atol=near)


TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)


def recall(net: nn.Module, *inputs: Tensor) -> Any:
    """`net(*inputs)`; on the way back through a reversible chain it is evaluated once, not twice."""
    tape = None if torch.compiler.is_compiling() else TAPE.get()
    return net(*inputs) if tape is None else tape.call(net, inputs)


class Steps:
    """Blocks in the order in which they run, the methods that run one and undo it, and weights.

    The weights are those that each block reaches.
    """

    def __init__(self, blocks: Sequence[nn.Module], there: str, back: str, carried: int, held: int):
        self.blocks, self.there, self.back = list(blocks), there, back
        self.carried, self.held = carried, held
        self.weights: list[nn.Parameter] = []
        self.of: list[list[int]] = []
        places: dict[int, int] = {}
        for block in self.blocks:
            reached = reached_parameters(block)
            self.weights += [w for w in reached if id(w) not in places]
            self.of.append([places.setdefault(id(w), len(places)) for w in reached])


class ReversibleChain(torch.autograd.Function):  # ignores below: torch's functions of autograd are untyped
    """The values at the end of a chain, and its log-det; only the values are kept for the way back."""

    @staticmethod
    def forward(ctx: Any, steps: Steps, *inputs: Any) -> tuple[Tensor, ...]:
        ends = steps.carried, steps.carried + steps.held
        values, held, weights = inputs[: ends[0]], inputs[ends[0] : ends[1]], inputs[ends[1] :]
        results = run_steps(steps.blocks, steps.there, values, held)
        ctx.steps, ctx.shapes = steps, [v.shape for v in values]
        ctx.save_for_backward(*results[: steps.carried], *held, *weights)
        return results

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        steps: Steps = ctx.steps
        ends = steps.carried, steps.carried + steps.held
        values, held, weights = (ctx.saved_tensors[a:b] for a, b in ((0, ends[0]), ends, (ends[1], None)))
        needs = ctx.needs_input_grad[1 + ends[0] : 1 + ends[1]]
        along, of_log_det = list(slopes[: steps.carried]), slopes[steps.carried :]
        total: dict[int, Tensor] = {}
        for block, of in zip(reversed(steps.blocks), reversed(steps.of), strict=True):
            tape = Tape()
            token = TAPE.set(tape)
            try:
                with torch.no_grad():
                    start = results_of(block, steps.back, values, held)
                tape.again = True
                with torch.enable_grad():
                    x = [v.detach().requires_grad_() for v in start]
                    context = [c.detach().requires_grad_(need) for c, need in zip(held, needs, strict=True)]
                    results = results_of(block, steps.there, x, context)
            finally:
                TAPE.reset(token)
            pairs = [(r, g) for r, g in zip(results, (*along, *of_log_det), strict=True) if r.requires_grad]
            own = [(ends[0] + k, c) for k, c in enumerate(context) if needs[k]]
            own += [(ends[1] + k, weights[k]) for k in of]
            found = torch.autograd.grad(
                [r for r, _ in pairs], [*x, *(w for _, w in own)], [g.expand_as(r) for r, g in pairs], allow_unused=True
            )
            along = [torch.zeros_like(v) if g is None else g for v, g in zip(x, found, strict=False)]
            for (k, _), g in zip(own, found[len(x) :], strict=True):
                if g is not None:
                    total[k] = total[k] + g if k in total else g
            values = start
        into = [g.sum_to_size(shape) for g, shape in zip(along, ctx.shapes, strict=True)]
        return (None, *into, *(total.get(k) for k in range(ends[0], len(ctx.saved_tensors))))


def reversible(
    blocks: Sequence[nn.Module], there: str, back: str, values: tuple[Tensor, ...], held: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """Runs `there` of each block on the values, beside what is held for all; `back` undoes it. A last
    result is the log-det, if `there` gives one.

    Memory for gradients does not grow with the number of blocks. In programs that are transformed (torch.compile,
    torch.func) the blocks run as they are written.
    """
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or not torch.is_grad_enabled():
        return run_steps(blocks, there, values, held)
    steps = Steps(blocks, there, back, len(values), len(held))
    run: Any = ReversibleChain.apply
    found: tuple[Tensor, ...] = run(steps, *values, *held, *steps.weights)
    return found
