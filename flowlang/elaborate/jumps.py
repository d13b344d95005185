"""`integrate(rates, x, t = a -> b, solver)` where entries jump among whole numbers: a scan over steps that draw.

The solver is a rule `(rate, x, t, h)` that gives the probabilities of an entry's next value along the axis `V`; there `x` is
the row of where the entry is, 1 at its value and 0 elsewhere, and `rate(x, t)` the row of its rates. Of the rates that
are given, those of jumps alone are read: that of staying is what makes the row sum to 0. One uniform number for each
entry and step chooses among the probabilities; it is drawn before, so that an exported model takes it as an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowlang.elaborate.body import Body
from flowlang.elaborate.calls import Arguments, apply
from flowlang.elaborate.paths import token_axis
from flowlang.elaborate.stepping import (
    DETERMINED,
    Step,
    draws,
    given_noise,
    grid,
    refuse_state,
    refuse_words,
    run_steps,
)
from flowlang.elaborate.steps import fitted
from flowlang.elaborate.values import Builtin, Declared, Instance, Poison, Poisoned, Tensor
from flowlang.ir.distributions import noise
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Region
from flowlang.ir.interval import closed
from flowlang.ir.types import Axis, TensorType
from flowlang.source import Span
from flowlang.syntax import tree

ROW = "V"


@dataclass(frozen=True)
class JumpUse:
    """Rates that a solver of jumps met, for the check that they are rates."""

    solver: tree.Declaration
    graph: Graph  # of a step
    rates: int  # as they were given
    here: int  # whether a value along `V` is that of the entry
    h: float  # the longest step
    span: Span
    region: Region


def is_jump(declaration: tree.Declaration) -> bool:
    return any(p.name == "rate" and p.type is None for ps in declaration.parameters for p in ps)


def jumps(body: Body, args: Arguments, solver: Instance, x: Tensor, times: tuple[float, ...]) -> Any:
    """The value at the end; `times` are those between which steps are taken."""
    span = args.span
    assert span is not None
    assert isinstance(solver.target, Declared)
    if not draws(body):
        raise body.fail("FL0410", "a process of jumps draws its way, and only programs of a model draw", span,
                        suggestion="write it in a `def` of a `model`")  # fmt: skip
    if times[-1] < times[0]:
        raise body.fail("FL0305", "a process of jumps runs forwards", args.keyword_spans.get("t", span),
                        suggestion="for the way back write its rates at 1 - t, as in `path.rate(1 - t, x, noise = p)`")  # fmt: skip
    declaration = solver.target.declaration
    what = f"equations, and `{declaration.name}` solves processes of jumps"
    refuse_words(body, args, (*DETERMINED, "noise", "sense", "probes"), what)
    refuse_state(body, declaration, solver, "x, t and h")
    state, b = TensorType(x.type.axes), body.b
    start = x.id if x.type.kind == "real" else b.mul(x.id, b.const(1.0))
    over = grid(body, times, {*state.names, ROW})
    shape = TensorType((Axis(over.axis, over.count), *state.axes))
    chance = given_noise(body, args, shape, over.axis)
    rows: list[Row] = []

    def meaning(inner: Step, found: dict[str, Tensor]) -> dict[str, Any]:
        inner.graph.annotate(
            found["t"].id, domain=Domain("Interval", (times[0], times[-1]), closed(times[0], times[-1]))
        )
        row = Row(inner, args.positional[0], found["x"].id, found["t"].id, args.spans[0])
        rows.append(row)
        return {**found, "x": Tensor(row.place, inner), "rate": Builtin("rate", row.rate)}

    end = run_steps(
        body, solver, start, over, {"chance": noise(b, "uniform", shape) if chance is None else chance}, meaning,
        lambda inner, value: rows[0].choose(value, declaration.span), span,
    )  # fmt: skip
    longest = max(abs(s) for s in over.sizes)
    body.elab.jumps.append(
        JumpUse(declaration, rows[0].body.graph, rows[0].given, rows[0].here, longest, args.spans[0], body.region)
    )
    return end


class Row:
    """What a step reads and chooses along the axis of values."""

    def __init__(self, body: Step, fn: Any, x: int, t: int, span: Span):
        self.body, self.x, self.t, self.span = body, x, t, span
        self.fn = body.owned(fn, "rate", span)
        b = body.b
        self.given = self.rates(t)
        self.type = b.type(self.given)
        self.size = self.type.size(ROW)
        self.index = b.op("index", axis=ROW, size=self.size)
        self.here = b.op("eq", x, self.index)
        self.place = b.onehot(x, ROW, self.size)

    def along(self, id: int) -> int:
        return self.body.b.op("order", id, names=self.type.names)

    def rates(self, t: int) -> int:
        """The rates that are given at a time, along `V`."""
        body, b = self.body, self.body.b
        made = apply(body, body.capture(self.fn), [Tensor(self.x, body), Tensor(t, body)], {}, self.span)
        if isinstance(made, Poison):
            raise Poisoned
        id = body.tensor(made, self.span)
        state = b.type(self.x)
        axis = token_axis(body, b.type(id), state, self.span)
        if axis != ROW:
            if state.has(ROW):
                raise body.fail("FL0307", f"`{ROW}` is the axis of the values that entries jump among, and x has an axis of that name", self.span,
                                suggestion="rename it in x")  # fmt: skip
            id = b.op("rename", id, pairs=((axis, ROW),))
        return b.op("order", id, names=(*state.names, ROW))

    def rate(self, body: Body, args: Arguments) -> Any:
        """`rate(x, t)`: rates of jumps from where the entry is, and what makes them sum to 0."""
        span = args.span
        assert span is not None
        at = args.positional[0] if len(args.positional) == 2 and not args.keywords else None
        if body is not self.body or not isinstance(at, Tensor) or at.id != self.place:
            raise body.fail("FL0203", "`rate` of a solver takes the x of the step and a time", span,
                            suggestion="as in `rate(x, t)`")  # fmt: skip
        t = body.tensor(args.positional[1], args.spans[1])
        given = self.given if t == self.t else self.rates(t)
        b = body.b
        away = b.op("where", self.here, b.const(0.0), given)
        staying = b.mul(self.place, b.op("sum", away, axes=(ROW,)))
        return Tensor(b.sub(away, self.along(staying)), body)

    def choose(self, value: Any, span: Span) -> int:
        """The value along `V` in whose share of the probabilities the step's uniform number falls."""
        body, b = self.body, self.body.b
        shares = b.op(
            "max", fitted(body, value, self.type, span, "give the probabilities of the next value"), b.const(0.0)
        )
        summed = b.op("cumsum", shares, axis=ROW, exclusive=False, reverse=False)
        chance = body.region.inputs[-1]
        mark = b.mul(chance, b.op("sum", shares, axes=(ROW,)))
        passed = b.op("and", self.along(b.op("ge", mark, summed)), b.op("lt", self.index, b.const(self.size - 1.0)))
        counted = b.op("sum", b.op("where", self.along(passed), b.const(1.0), b.const(0.0)), axes=(ROW,))
        return b.op("order", counted, names=b.type(self.x).names)


__all__ = ["JumpUse", "is_jump", "jumps"]
