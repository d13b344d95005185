"""`scan`, `if training` and the updates of states.

A scan's body is a region of its own, run once for each slice along an axis. Values with that axis are seen a slice
at a time; outer names that the body updates are carried; names bound inside come out stacked along the axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowlang.elaborate.body import Body
from flowlang.elaborate.statements import NOTHING, adopt_body, bound_names, new_input, run_statements, updated_names
from flowlang.elaborate.values import Poison, Poisoned, Tensor, Tuple, describe
from flowlang.ir.graph import Graph, Region, Update
from flowlang.ir.types import Axis, TensorType, TupleType, same_axes
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.elaborator import Elaborator

BATCH = "B"


class ScanBody(Body):
    """The body of a scan: what it captures and what has the axis is seen a slice at a time."""

    def __init__(self, elab: Elaborator, region: Region, parent: Body, axis: str):
        super().__init__(elab, region, parent.module, parent=parent, anchor=parent.anchor)
        self.axis = axis
        self.axes.pop(axis, None)
        self.slices: dict[int, int] = {}  # outer value -> input here
        self.sizes: dict[int, str] = {}  # sizes met along the axis, with the first value that has each

    def capture(self, value: Any, name: str | None = None) -> Any:
        if not isinstance(value, Tensor) or value.body is self:
            return super().capture(value, name)
        assert self.parent is not None
        if value.body is not self.parent:
            value = self.parent.capture(value, name)
        outer = self.parent.graph[value.id]
        if not (outer.batched if self.axis == BATCH else outer.tensor.has(self.axis)):
            return super().capture(value, name)
        if value.id not in self.slices:
            if self.axis != BATCH:
                self.sizes.setdefault(outer.tensor.size(self.axis), name or outer.label or "a value")
            made = new_input(
                self, name or outer.label or "slice", outer.tensor.without((self.axis,)),
                outer.batched and self.axis != BATCH, outer.span or self.region.span,  # type: ignore[arg-type]
            )  # fmt: skip
            self.slices[value.id] = made.id
        return Tensor(self.slices[value.id], self)


def run_scan(body: Body, statement: tree.Scan) -> Any:
    """Elaborates a scan; its names are bound in the body around it."""
    axis = statement.axis
    if axis != BATCH and axis not in body.axes:
        raise body.fail(
            "FL0307", f"`{axis}` is no axis here", statement.span, suggestion="scan an axis that an input has, or `B`"
        )
    if body.chain_value is not None or body.region.kind in ("bijector", "chain", "flow"):
        raise body.fail(
            "FL0902", f"`scan` inside a {body.region.kind} has no meaning yet", statement.span,
            suggestion="write it in a net of its own; a map along an axis is proved to be one without `scan`",
        )  # fmt: skip
    region = Region(f"{body.region.name}_step", "step", Graph(), span=statement.span, library=body.region.library)
    region.signature = f"one step of `scan {axis}` in {body.region.signature or body.region.name}"
    inner = ScanBody(body.elab, region, body, axis)
    names = [n for n in updated_names(statement.body) if body.find(n) is not None]
    before = {n: start(body, inner, n, statement.span) for n in names}
    for n, outer in before.items():
        domain = body.graph[outer.id].attrs.get("domain")  # a state stays in its domain
        value = new_input(inner, n, outer.type, axis != BATCH, statement.span, domain)
        inner.names[n] = value
        region.inputs.append(value.id)
    run_statements(inner, statement.body)
    if region.broken:
        body.region.broken = True
        return NOTHING
    if len(inner.sizes) > 1:
        found = " and ".join(f"size {size} in `{value}`" for size, value in inner.sizes.items())
        raise body.fail(
            "FL0301",
            f"axis `{axis}` has {found}",
            statement.span,
            suggestion="scan values with one length along that axis, as a declared size gives",
        )
    region.inputs.extend(inner.slices.values())
    carried = [carry(inner, n, before[n].type, statement.span) for n in names]
    local = [n for n in dict.fromkeys(bound_names_of(statement.body)) if n not in names]
    stacked = {n: v for n in local if isinstance(v := inner.names.get(n), Tensor) and v.body is inner}
    region.outputs = [*carried, *(v.id for v in stacked.values())]
    finish_states(inner)
    size = next(iter(inner.sizes), body.axes.get(axis, 1))
    bind_results(body, inner, before, stacked, size, statement)
    return NOTHING


def start(body: Body, inner: ScanBody, name: str, span: Span) -> Tensor:
    """The value that a carried name has before the first step."""
    value = body.find(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = Tensor(body.b.const(float(value)), body)
    if isinstance(value, Poison):
        raise Poisoned
    if not isinstance(value, Tensor):
        raise body.fail(
            "FL0306",
            f"`{name}` is carried through `scan`, and it is {describe(value)}",
            span,
            suggestion="carry a tensor, as in `h = zeros[H = 8]` before the loop",
        )
    value = body.capture(value)
    batched = inner.axis == BATCH and body.graph[value.id].batched
    if value.type.has(inner.axis) or batched:
        raise body.fail(
            "FL0307", f"`{name}` is updated inside `scan {inner.axis}`, and has that axis itself", span,
            suggestion="bind the new value to another name: it comes out stacked",
        )  # fmt: skip
    assert isinstance(value, Tensor)
    return value


def carry(inner: ScanBody, name: str, wanted: TensorType, span: Span) -> int:
    """What a step hands on under a name, with the type that it was given."""
    value = inner.names[name]
    if isinstance(value, Poison):
        raise Poisoned
    have = inner.b.type(value.id) if isinstance(value, Tensor) else None
    if have is None or have.kind != wanted.kind or not set(have.axes) <= set(wanted.axes):
        now = f"`{have}`" if have is not None else describe(value)
        raise inner.fail(
            "FL0301", f"`{name}` is `{wanted}` before the step, and {now} after it", span,
            suggestion=f"begin with the type that a step gives, as in `{name}: {have} = 0`" if have is not None else "carry one type through the loop",
        )  # fmt: skip
    return conform(inner, value.id, wanted)


def conform(body: Body, id: int, wanted: TensorType) -> int:
    """The value with all axes of a type, in its order."""
    if not same_axes(body.b.type(id), wanted):
        id = body.b.expand(id, wanted)
    return id if body.b.type(id).names == wanted.names else body.b.op("order", id, names=wanted.names)


def bind_results(
    body: Body, inner: ScanBody, before: dict[str, Tensor], stacked: dict[str, Tensor], size: int, statement: tree.Scan
) -> None:
    region, axis = inner.region, inner.axis
    name = body.fresh_child_name("step")
    adopt_body(body, inner, name, 1, statement.span)
    front = () if axis == BATCH else (Axis(axis, size),)
    types = [v.type for v in before.values()]
    types += [TensorType((*front, *v.type.axes), v.type.kind) for v in stacked.values()]
    attrs = {
        "child": name, "region": region, "method": "forward", "axis": axis, "reverse": statement.reverse,
        "carried": len(before), "sliced": len(inner.slices), "count": 1 if axis == BATCH else size,
    }  # fmt: skip
    inputs = (*(v.id for v in before.values()), *inner.slices, *inner.captures)
    node = body.graph.add("scan", inputs, TupleType(tuple(types)), attrs, span=statement.span, batched=True)
    for k, n in enumerate([*before, *stacked]):
        id = body.b.op_get(node.id, k, statement.span)
        body.graph.relabel(id, n)
        body.names[n] = Tensor(id, body)
        body.used.add(n)


def bound_names_of(statements: tuple[tree.Statement, ...]) -> list[str]:
    return [n for s in statements if isinstance(s, tree.Bind | tree.If | tree.Scan) for n in bound_names(s)]


# ---- training and inference ---------------------------------------------------------------------


def training_first(condition: tree.Expr) -> bool | None:
    """True for `training`, False for `not training`, None for any other condition."""
    while isinstance(condition, tree.Paren) and len(condition.items) == 1:
        inner = condition.items[0]
        if not isinstance(inner, tree.Expr):
            return None
        condition = inner
    if isinstance(condition, tree.Name) and condition.id == "training":
        return True
    if isinstance(condition, tree.Unary) and condition.op == "not":
        inner_first = training_first(condition.operand)
        return None if inner_first is None else not inner_first
    return None


def run_by_mode(body: Body, statement: tree.If, first: bool) -> Any:
    """`if training {..} else {..}`: both branches are elaborated; names they bind differently are chosen by the mode."""
    if body.chain_value is not None or body.region.kind in ("bijector", "chain", "flow"):
        raise body.fail(
            "FL0902", f"`if training` inside a {body.region.kind} has no meaning yet", statement.span,
            suggestion="follow a statistic of the batch by `running(mean[B](x), 0.1)`",
        )  # fmt: skip
    before = dict(body.names)
    spans = dict(body.bound_spans)
    results, names = [], []
    for branch in (statement.then, statement.orelse) if first else (statement.orelse, statement.then):
        body.names, body.bound_spans = dict(before), dict(spans)
        results.append(run_statements(body, branch))
        names.append(body.names)
    body.names = {**names[1], **names[0]}
    pairs: list[tuple[str, Any, Any]] = []
    for n in body.names:
        a, b = names[0].get(n), names[1].get(n)
        if a is not b and a is not None and b is not None and not (isinstance(a, Tensor) and a == b and a.body is body):
            pairs.append((n, a, b))
    both = all(r is not NOTHING and not isinstance(r, Tuple | Poison) for r in results) and alike(
        body, results[0], results[1], statement.span
    )
    if both:
        pairs.append(("", results[0], results[1]))
    chosen = choose(body, pairs, statement.span)
    result = chosen.pop("", NOTHING) if both else NOTHING
    body.names.update(chosen)
    return result


def alike(body: Body, a: Any, b: Any, span: Span) -> bool:
    """Whether two values can stand for each other, as the value of an `if training`, which need not be read."""
    s, t = (body.b.type(body.tensor(v, span)) for v in (a, b))
    return s.kind == t.kind and (set(t.axes) <= set(s.axes) or set(s.axes) <= set(t.axes))


def choose(body: Body, pairs: list[tuple[str, Any, Any]], span: Span) -> dict[str, Any]:
    left: list[int] = []
    right: list[int] = []
    names: list[str] = []
    for name, a, b in pairs:
        if isinstance(a, Poison) or isinstance(b, Poison):
            continue
        x, y = body.tensor(a, span), body.tensor(b, span)
        s, t = body.b.type(x), body.b.type(y)
        wide = s if set(t.axes) <= set(s.axes) else t
        if s.kind != t.kind or not set(s.axes) | set(t.axes) <= set(wide.axes):
            what = f"`{name}`" if name else "the result"
            raise body.fail(
                "FL0301",
                f"{what} is `{s}` in training and `{t}` at inference",
                span,
                suggestion="give the value one type in both",
            )
        left.append(conform(body, x, wide))
        right.append(conform(body, y, wide))
        names.append(name)
    if not names:
        return {}
    types = TupleType(tuple(body.b.type(i) for i in left))
    node = body.graph.add("choose", (*left, *right), types, {}, span=span)
    out: dict[str, Any] = {}
    for k, n in enumerate(names):
        id = body.b.op_get(node.id, k, span)
        if n:
            body.graph.relabel(id, n)
        out[n] = Tensor(id, body)
    return out


# ---- states -------------------------------------------------------------------------------------


def finish_states(body: Body) -> None:
    """Records what `:=` made of the states that this body declared."""
    body.region.updates.extend(state_updates(body, {n: Tensor(id, body) for n, id in body.states.items()}))


def state_updates(body: Body, before: dict[str, Tensor]) -> list[Update]:
    """Updates of the states whose names mean another value than `before`."""
    out: list[Update] = []
    for name, old in before.items():
        value, leaf = body.names.get(name), body.states[name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = Tensor(body.b.const(type(value)(value)), body)
        if not isinstance(value, Tensor) or value.id == old.id:
            continue
        span, state = body.graph[value.id].span or body.region.span, body.graph[leaf]
        assert span is not None
        if body.graph[value.id].batched:
            raise body.fail(
                "FL0306", f"the state `{name}` is one for all samples, and its new value is one for each", span,
                suggestion="reduce over the batch, as in `mean[B](x)`",
            )  # fmt: skip
        have = body.b.type(value.id)
        if have.kind != state.tensor.kind or not set(have.axes) <= set(state.tensor.axes):
            raise body.fail(
                "FL0301",
                f"the state `{name}` is `{state.type}`, and its new value `{have}`",
                span,
                suggestion="a state keeps its type",
            )
        out.append(Update(leaf, conform(body, value.id, state.tensor)))
    return out
