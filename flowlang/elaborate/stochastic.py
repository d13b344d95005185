"""`integrate(v, x, t = a -> b, solver, noise = g)`: the end of dx = v(x, t) dt + g(x, t) dW, as a scan over the steps.

The solver is a rule `(v, g, x, t, h, dw)`, dw being drawn with the variance h. Its steps run as `stepping` says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from flowlang.elaborate.body import Body, Poisoned
from flowlang.elaborate.calls import Arguments, apply
from flowlang.elaborate.stepping import (
    DETERMINED,
    Grid,
    Step,
    draws,
    given_noise,
    grid,
    refuse_state,
    refuse_words,
    run_steps,
)
from flowlang.elaborate.steps import fitted
from flowlang.elaborate.values import POISON, Builtin, Declared, Instance, Pending, Poison, Tensor, Tuple, describe
from flowlang.ir.distributions import noise
from flowlang.ir.graph import Region
from flowlang.ir.types import Axis, TensorType
from flowlang.source import Span
from flowlang.syntax import tree

SENSES = ("ito", "stratonovich")


@dataclass(frozen=True)
class NoiseUse:
    """A solver met a noise: what has to fit, for the checks that know the orders of rules and what values depend on."""

    solver: tree.Declaration
    sense: str
    noise: Region  # as a function of x and t
    steep: bool  # the rule reads the slope of the noise
    span: Span
    region: Region


def is_stochastic(declaration: tree.Declaration) -> bool:
    names = {p.name for ps in declaration.parameters for p in ps}
    return {"g", "dw"} <= names


def stochastic(
    body: Body, args: Arguments, solver: Instance, x: Tensor, ends: tuple[float, float], times: tuple[float, ...]
) -> Any:
    """The value at the end; `times` are those between which steps are taken."""
    span = args.span
    assert span is not None
    if not draws(body):
        raise body.fail(
            "FL0410", "an equation with noise draws its path, and only programs of a model draw", span,
            suggestion="write it in a `def` of a `model`; without `noise` it is a bijection",
        )  # fmt: skip
    refuse_words(body, args, DETERMINED, "equations without noise", "leave `{}` or `noise` out")
    state = TensorType(x.type.axes)
    assert isinstance(solver.target, Declared)
    declaration = solver.target.declaration
    refuse_state(body, declaration, solver, "x, t, h and dw")
    probe, extra = measured(body, args.keywords["noise"], state, ends, args.keyword_spans["noise"])
    if probe is None:
        return POISON
    over = grid(body, times, {a.name for a in (*state.axes, *extra)})
    shape = TensorType((Axis(over.axis, over.count), *(extra or state.axes)))
    equations: list[Equation] = []

    def meaning(inner: Step, found: dict[str, Tensor]) -> dict[str, Any]:
        run = Equation(body, inner, args, state, extra, (min(ends), max(ends)))
        equations.append(run)
        return {**found, "v": Builtin("v", run.drift), "g": Builtin("g", run.noise)}

    end = run_steps(
        body, solver, x.id, over, {"dw": increments(body, args, shape, over)}, meaning,
        lambda inner, value: fitted(inner, value, state, declaration.span), span,
    )  # fmt: skip
    sense = args.keywords.get("sense")
    asked = sense.word if sense is not None else "ito"
    body.elab.noises.append(NoiseUse(declaration, asked, probe, equations[0].steep, solver.span, body.region))
    return end


def increments(body: Body, args: Arguments, type_: TensorType, over: Grid) -> int:
    """dW of each step: those given, or drawn."""
    given = given_noise(body, args, type_, over.axis)
    if given is not None:
        return given
    b = body.b
    z = noise(b, "normal", type_)
    scales = [sqrt(abs(s)) for s in over.sizes]
    scale = b.const(scales[0]) if len(scales) == 1 else b.op("stack", *map(b.const, scales), axis=over.axis)
    return b.mul(z, scale)


def measured(
    body: Body, noise: Any, state: TensorType, ends: tuple[float, float], span: Span
) -> tuple[Region | None, tuple[Axis, ...]]:
    """The noise as a region of its own, for the checks, and the axes that its value has and x lacks."""
    from flowlang.elaborate.fields import field_body

    fn = noise
    if isinstance(noise, int | float | Tensor) and not isinstance(noise, bool):
        fn = Builtin("noise", lambda b, args: b.capture(noise) if isinstance(noise, Tensor) else noise)
    elif isinstance(noise, Instance) and noise.owner is None:
        fn = replace(noise)
    elif isinstance(noise, Tuple | Poison | bool | str | list):
        if isinstance(noise, Poison):
            raise Poisoned
        raise body.fail(
            "FL0306",
            f"`noise` is a number or a function of x and t, and this is {describe(noise)}",
            span,
            suggestion="as in `noise = 0.5`",
        )
    inner = field_body(body, fn, state, (min(ends), max(ends)), span, free=True)
    if inner is None:
        return None, ()
    found = inner.b.type(inner.region.outputs[0])
    return inner.region, tuple(a for a in found.axes if a not in state.axes)


class Equation:
    """`v` and `g` of a rule, as calls of the functions that were given."""

    def __init__(
        self,
        body: Body,
        inner: Step,
        args: Arguments,
        state: TensorType,
        extra: tuple[Axis, ...],
        ends: tuple[float, float],
    ):
        self.inner, self.state, self.extra, self.ends = inner, state, extra, ends
        assert inner.region.span is not None
        self.where = inner.region.span
        given = {"v": args.positional[0], "g": args.keywords["noise"]}
        self.fns = {name: inner.owned(fn, name, self.where) for name, fn in given.items()}
        self.steep = False

    def value(self, b: Body, name: str, args: Arguments) -> Any:
        """The function's value; times are held within those of the equation, which rounding may leave."""
        span = args.span
        assert span is not None
        x = Tensor(fitted(b, args.positional[0], self.state, args.spans[0]), b)
        t = b.tensor(args.positional[1], args.spans[1])
        if b.b.type(t).axes:
            raise b.fail(
                "FL0306",
                f"a time is one number, and this is `{b.b.type(t)}`",
                args.spans[1],
                suggestion="as in `v(x, t + h)`",
            )
        held = b.b.op("max", b.b.op("min", t, b.b.const(self.ends[1])), b.b.const(self.ends[0]))
        fn = self.fns[name]
        if isinstance(fn, int | float):
            return fn
        if isinstance(fn, Tensor):
            return b.capture(fn)
        made = apply(b, b.capture(fn), [x, Tensor(held, b)], {}, span)
        if isinstance(made, Pending):
            from flowlang.elaborate.fields import spec_of

            (made,) = made.resolve([spec_of(self.state)])
        return made

    def drift(self, b: Body, args: Arguments) -> Any:
        self.expect(b, args, "v", 2)
        assert args.span is not None
        return Tensor(fitted(b, self.value(b, "v", args), self.state, args.span), b)

    def noise(self, b: Body, args: Arguments) -> Any:
        """`g(x, t)`: the noise of each entry; `g(x, t, dw)`: the noise on an increment."""
        self.expect(b, args, "g", 2, 3)
        span = args.span
        assert span is not None
        level = self.value(b, "g", args)
        if isinstance(level, Poison):
            raise Poisoned
        if len(args.positional) == 2:
            self.steep = self.steep or b is not self.inner
            if self.extra:
                raise b.fail(
                    "FL0608", f"this solver needs noise of each entry of x by itself, and this one mixes noises along {', '.join(f'`{a.name}`' for a in self.extra)}",
                    span, suggestion="use `euler_maruyama` or `stochastic_heun`",
                )  # fmt: skip
            return Tensor(fitted(b, level, self.state, span), b)
        by = b.tensor(args.positional[2], args.spans[2])
        g = b.tensor(level, span)
        if not self.extra:
            return Tensor(
                fitted(b, Tensor(b.b.mul(fitted(b, Tensor(g, b), self.state, span), by), b), self.state, span), b
            )
        wide = TensorType((*self.state.axes, *self.extra))
        g = b.b.expand(g, wide) if set(b.b.type(g).axes) != set(wide.axes) else g
        made = b.b.op("contract", g, by, axes=tuple(a.name for a in self.extra), span=span)
        return Tensor(fitted(b, Tensor(made, b), self.state, span), b)

    def expect(self, b: Body, args: Arguments, name: str, *counts: int) -> None:
        if len(args.positional) not in counts or args.keywords:
            assert args.span is not None
            raise b.fail("FL0203", f"`{name}` of a solver takes a value and a time{', and perhaps an increment' if 3 in counts else ''}",
                         args.span, suggestion=f"as in `{name}(x, t)`")  # fmt: skip


__all__ = ["SENSES", "NoiseUse", "is_stochastic", "stochastic"]
