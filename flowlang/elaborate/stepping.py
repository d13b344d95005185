"""Steps of a rule that draws, as a scan: x is carried, and the step's time, size and noise are slices.

The noise of all steps is drawn before. So PyTorch and ONNX need nothing of their own, and the noise is an input of an
exported model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flowlang.elaborate.body import Body, Fail, Poisoned
from flowlang.elaborate.calls import Arguments, instance_of, parameters_of
from flowlang.elaborate.values import Declared, Instance, Tensor
from flowlang.ir.graph import Graph, Region
from flowlang.ir.types import TensorType, TupleType
from flowlang.source import Span
from flowlang.syntax import tree


class Step(Body):
    """One step of a rule."""

    def __init__(self, outer: Body, region: Region, solver: Instance):
        assert isinstance(solver.target, Declared)
        module = solver.target.module
        anchor = (outer.anchor if outer.module.source.library else solver.span) if module.source.library else None
        super().__init__(outer.elab, region, module, anchor=anchor, enclosing=outer)

    def owned(self, fn: Any, label: str, span: Span) -> Any:
        """A function that the rule calls; a fresh network is one network, of the step."""
        fn = instance_of(self.elab, fn, span)
        if isinstance(fn, Instance) and fn.owner is None:
            fn.owner, fn.name, fn.label = self, self.fresh_child_name(fn.target.name), fn.label or label
        return fn


@dataclass(frozen=True)
class Grid:
    """The steps between given times: their axis, how many, when they begin and how long they are."""

    axis: str
    count: int
    t: int
    h: int | float  # where all are equal
    sizes: tuple[float, ...]
    steps: int | None  # the sizes as a value, where they differ


def grid(body: Body, times: tuple[float, ...], taken: Collection[str]) -> Grid:
    axis = next(n for n in ("Step", *(f"Step{k}" for k in range(9))) if n not in taken)
    count = len(times) - 1
    sizes = [b - a for a, b in pairwise(times)]
    equal = max(sizes) - min(sizes) <= 1e-9 * max(map(abs, sizes))
    h: float | int = (times[-1] - times[0]) / count
    b = body.b
    if equal:
        index = b.op("index", axis=axis, size=count)
        t = b.add(b.mul(index, b.const(h)), b.const(times[0]))
        return Grid(axis, count, t, h, (h,), None)
    t = b.op("stack", *(b.const(v) for v in times[:-1]), axis=axis)
    return Grid(axis, count, t, h, tuple(sizes), b.op("stack", *(b.const(v) for v in sizes), axis=axis))


def draws(body: Body | None) -> bool:
    """Whether a body belongs to a program of a model."""
    while body is not None:
        if body.region.kind == "program":
            return True
        body = body.parent
    return False


def refuse_state(body: Body, declaration: tree.Declaration, solver: Instance, alone: str) -> None:
    from flowlang.elaborate.steps import parts

    if any(isinstance(s, tree.Declare) and s.word == "state" for s in parts(declaration.body or ())):
        raise body.fail(
            "FL0902",
            f"`{declaration.name}` draws and has `state`, which has no meaning yet",
            solver.span,
            suggestion=f"write one step by {alone} alone",
        )


DETERMINED = ("at", "log_det", "trace", "gradient")  # what serves trajectories that their start determines


def refuse_words(body: Body, args: Arguments, words: Iterable[str], what: str, advice: str = "leave `{}` out") -> None:
    """Refuses arguments of `integrate` that belong to something else."""
    for word in words:
        if word in args.keywords:
            raise body.fail(
                "FL0202", f"`{word}` is for {what}", args.keyword_spans[word], suggestion=advice.format(word)
            )


def given_noise(body: Body, args: Arguments, type_: TensorType, axis: str) -> int | None:
    """The noise of each step, where `increments` gives it."""
    given = args.keywords.get("increments")
    if given is None:
        return None
    b, span = body.b, args.keyword_spans["increments"]
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
    return b.op("order", id, names=type_.names)


def run_steps(
    body: Body, solver: Instance, x: int, over: Grid, noise: Mapping[str, int],
    meaning: Callable[[Step, dict[str, Tensor]], Mapping[str, Any]], finish: Callable[[Step, Any], int], span: Span,
) -> Tensor:  # fmt: skip
    """x after all steps. `meaning` gives what the names of the rule stand for in a step, `finish` the next x of its value."""
    from flowlang.elaborate.statements import adopt_body, run_statements

    assert isinstance(solver.target, Declared)
    declaration = solver.target.declaration
    b, state = body.b, TensorType(body.b.type(x).axes)
    region = Region(f"{solver.target.name}_step", "step", Graph(), span=span, library=body.region.library)
    region.signature = f"one step of {body.elab.signature(solver)}"
    inner = Step(body, region, solver)
    inner.axes = {a.name: a.size for a in state.axes}
    found: dict[str, Tensor] = {}
    slices = {"t": over.t, **({} if over.steps is None else {"h": over.steps}), **noise}
    for name, outer in {"x": x, **slices}.items():
        type_ = b.type(outer) if name == "x" else b.type(outer).without((over.axis,))
        batched = name == "x" or body.graph[outer].batched
        leaf = inner.b.leaf(
            "input", TensorType(type_.axes), batched=batched, span=span, label=name, name=name, role="map"
        )
        region.inputs.append(leaf)
        found[name] = Tensor(leaf, inner)
    if over.steps is None:
        found["h"] = Tensor(inner.b.const(over.h), inner)
    names = meaning(inner, found)
    statics = [p for p in parameters_of(solver) if p.type is not None]
    known = {k: v for k, v in solver.arguments.items() if k in {p.name for p in statics}}
    own = Instance(solver.target, known, solver.span)
    try:
        body.elab.bind_statics(inner, own, statics, solver.span, body)
        inner.names |= names
        inner.used |= set(inner.names)
        value = run_statements(inner, tuple(s for s in declaration.body or () if not isinstance(s, tree.Require)))
        if region.broken:
            raise Poisoned
        region.outputs = [finish(inner, value)]
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
    attrs = {
        "child": name, "region": region, "method": "forward", "axis": over.axis, "reverse": False, "carried": 1,
        "sliced": len(slices), "count": over.count,
    }  # fmt: skip
    node = body.graph.add(
        "scan", (x, *slices.values(), *inner.captures), TupleType((state,)), attrs, span=span, batched=True
    )
    return Tensor(b.op_get(node.id, 0, span), body)
