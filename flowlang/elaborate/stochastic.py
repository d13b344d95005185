"""`integrate(v, x, t = a -> b, solver, noise = g)`: the end of dx = v(x, t) dt + g(x, t) dW, as a scan over the steps.

The solver is a rule `(v, g, x, t, h, dw)`. Its body is one step: x is carried, t and dw (drawn before, variance h) are
slices. So PyTorch and ONNX need nothing of their own, and the noise is an input of an exported model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import sqrt
from typing import Any

from flowlang.elaborate.body import Body, Fail, Poisoned
from flowlang.elaborate.calls import Arguments, apply, instance_of, parameters_of
from flowlang.elaborate.steps import fitted, parts
from flowlang.elaborate.values import POISON, Builtin, Declared, Instance, Pending, Poison, Tensor, Tuple, describe
from flowlang.ir.graph import Graph, Region
from flowlang.ir.types import Axis, TensorType, TupleType
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


class Step(Body):
    """One step of a rule."""

    def __init__(self, outer: Body, region: Region, solver: Instance):
        assert isinstance(solver.target, Declared)
        module = solver.target.module
        anchor = (outer.anchor if outer.module.source.library else solver.span) if module.source.library else None
        super().__init__(outer.elab, region, module, anchor=anchor, enclosing=outer)


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
    for other in ("at", "log_det", "trace", "gradient"):
        if other in args.keywords:
            raise body.fail(
                "FL0202",
                f"`{other}` is for equations without noise",
                args.keyword_spans[other],
                suggestion=f"leave `{other}` or `noise` out",
            )
    state = TensorType(x.type.axes)
    assert isinstance(solver.target, Declared)
    declaration = solver.target.declaration
    if any(isinstance(s, tree.Declare) and s.word == "state" for s in parts(declaration.body or ())):
        raise body.fail(
            "FL0902",
            f"`{declaration.name}` has noise and `state`, which has no meaning yet",
            solver.span,
            suggestion="write one step by x, t, h and dw alone",
        )
    noise, where = args.keywords["noise"], args.keyword_spans["noise"]
    probe, extra = measured(body, noise, state, ends, where)
    if probe is None:
        return POISON
    taken = {a.name for a in (*state.axes, *extra)}
    axis = next(n for n in ("Step", *(f"Step{k}" for k in range(9))) if n not in taken)
    count = len(times) - 1
    shape = (Axis(axis, count), *(extra or state.axes))
    sizes = [b - a for a, b in pairwise(times)]
    equal = max(sizes) - min(sizes) <= 1e-9 * max(map(abs, sizes))
    h: float | int = (times[-1] - times[0]) / count
    b = body.b
    if equal:
        index = b.op("index", axis=axis, size=count)
        t = b.add(b.mul(index, b.const(h)), b.const(times[0]))
        steps = None
    else:
        t = b.op("stack", *(b.const(v) for v in times[:-1]), axis=axis)
        steps = b.op("stack", *(b.const(v) for v in sizes), axis=axis)
    dw = increments(body, args, TensorType(shape), axis, sizes if steps is not None else [h])
    region = Region(f"{solver.target.name}_step", "step", Graph(), span=span, library=body.region.library)
    region.signature = f"one step of {body.elab.signature(solver)}"
    inner = Step(body, region, solver)
    inner.axes = {a.name: a.size for a in state.axes}
    found: dict[str, Tensor] = {}
    slices = {"t": t, **({} if steps is None else {"h": steps}), "dw": dw}
    for name, outer in {"x": x.id, **slices}.items():
        type_ = b.type(outer) if name == "x" else b.type(outer).without((axis,))
        batched = name == "x" or body.graph[outer].batched
        leaf = inner.b.leaf(
            "input", TensorType(type_.axes), batched=batched, span=span, label=name, name=name, role="map"
        )
        region.inputs.append(leaf)
        found[name] = Tensor(leaf, inner)
    if steps is None:
        found["h"] = Tensor(inner.b.const(h), inner)
    run = Equation(body, inner, args, state, extra, (min(ends), max(ends)))
    from flowlang.elaborate.statements import adopt_body, run_statements

    statics = [p for p in parameters_of(solver) if p.type is not None]
    known = {k: v for k, v in solver.arguments.items() if k in {p.name for p in statics}}
    own = Instance(solver.target, known, solver.span)
    try:
        body.elab.bind_statics(inner, own, statics, solver.span, body)
        inner.names |= {**found, "v": Builtin("v", run.drift), "g": Builtin("g", run.noise)}
        inner.used |= set(inner.names)
        value = run_statements(inner, tuple(s for s in declaration.body or () if not isinstance(s, tree.Require)))
        if region.broken:
            raise Poisoned
        region.outputs = [fitted(inner, value, state, declaration.span)]
    except Fail as e:
        body.elab.report.add(e.diagnostic)
        raise Poisoned from None
    except Poisoned:
        body.region.broken = True
        raise
    name = body.fresh_child_name(region.name)
    adopt_body(body, inner, name, 1, span)
    child = body.region.children[name]
    child.bindings.update(body.bind_shared(own, region, span))
    sense = args.keywords.get("sense")
    asked = sense.word if sense is not None else "ito"
    body.elab.noises.append(NoiseUse(declaration, asked, probe, run.steep, solver.span, body.region))
    attrs = {
        "child": name, "region": region, "method": "forward", "axis": axis, "reverse": False, "carried": 1,
        "sliced": len(slices), "count": count,
    }  # fmt: skip
    node = body.graph.add(
        "scan", (x.id, *slices.values(), *inner.captures), TupleType((state,)), attrs, span=span, batched=True
    )
    return Tensor(b.op_get(node.id, 0, span), body)


def draws(body: Body | None) -> bool:
    """Whether a body belongs to a program of a model."""
    while body is not None:
        if body.region.kind == "program":
            return True
        body = body.parent
    return False


def increments(body: Body, args: Arguments, type_: TensorType, axis: str, sizes: list[float]) -> int:
    """dW of each step: those given, or drawn."""
    given = args.keywords.get("increments")
    b = body.b
    if given is not None:
        span = args.keyword_spans["increments"]
        id = body.tensor(given, span)
        have = b.type(id)
        steps = [a for a in have.axes if a not in type_.axes[1:]]
        if len(steps) != 1 or len(have.axes) != len(type_.axes) or steps[0].size != type_.axes[0].size:
            raise body.fail(
                "FL0301", f"the increments are `{have}`, and these are {type_.axes[0].size} steps of `{TensorType(type_.axes[1:])}`", span,
                suggestion="give the axes of the noise and one axis for the steps",
            )  # fmt: skip
        if steps[0].name != axis:
            id = b.op("rename", id, pairs=((steps[0].name, axis),))
        return id if b.type(id).names == type_.names else b.op("order", id, names=type_.names)
    shape = {"kind": "normal", "axes": tuple((a.name, a.size) for a in type_.axes)}
    z = body.graph.add("random_like", (), type_, shape, batched=True).id
    scales = [sqrt(abs(s)) for s in sizes]
    scale = b.const(scales[0]) if len(scales) == 1 else b.op("stack", *map(b.const, scales), axis=axis)
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
        inner: Body,
        args: Arguments,
        state: TensorType,
        extra: tuple[Axis, ...],
        ends: tuple[float, float],
    ):
        self.inner, self.state, self.extra, self.ends = inner, state, extra, ends
        assert inner.region.span is not None
        self.where = inner.region.span
        self.fns = {"v": self.owned(args.positional[0], "v"), "g": self.owned(args.keywords["noise"], "g")}
        self.steep = False

    def owned(self, fn: Any, label: str) -> Any:
        """A fresh network is one network, of the step."""
        fn = instance_of(self.inner.elab, fn, self.where)
        if isinstance(fn, Instance) and fn.owner is None:
            fn.owner, fn.name, fn.label = self.inner, self.inner.fresh_child_name(fn.target.name), fn.label or label
        return fn

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
