"""Step rules of solvers as regions: `solver s (v, x, t, h) { .. }` gives the next x, and what its states become.

A rule has one region for each of its first steps that differ (where states begin, and while `if i < 2` holds), and
one for all others. Their inputs are x and the states; t, h, the step's index i and the field v are context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from flowlang.elaborate.body import Body
from flowlang.elaborate.calls import Arguments, parameters_of
from flowlang.elaborate.values import POISON, Builtin, Declared, Instance, Poison, Poisoned, Tensor, Tuple, describe
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.types import SCALAR, TensorType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.elaborator import Elaborator

RULE = ("v", "x", "t", "h")
MOST_FIRST = 16  # steps that may differ from the others


@dataclass(frozen=True)
class Rule:
    """The regions of a rule, the last one for all steps that have none of their own."""

    regions: tuple[Region, ...]
    solver: Instance
    linear: bool  # x and the states are combined with the field's values and each other alone, by numbers
    indexed: bool  # what a step does depends on its index

    @property
    def first(self) -> int:
        return len(self.regions) - 1


class RuleBody(Body):
    """One step. `index` is the step's number where it has a region of its own."""

    def __init__(self, elab: Elaborator, region: Region, outer: Body, solver: Instance, index: int | None, beyond: int):
        assert isinstance(solver.target, Declared)  # checked where it is named
        module = solver.target.module
        anchor = (outer.anchor if outer.module.source.library else solver.span) if module.source.library else None
        super().__init__(elab, region, module, anchor=anchor)
        self.index, self.beyond = index, beyond
        self.memory: dict[str, Tensor] = {}  # states before the step, by name
        self.state_type: TensorType = SCALAR
        self.kept: list[tuple[str, Span]] = []  # states in their order

    def static_bool(self, expr: tree.Expr) -> bool:
        """Conditions on the index are settled: a step of its own knows it, the others are beyond all that is asked."""
        if self.index is not None or "i" not in self.names:
            return super().static_bool(expr)
        kept = self.names["i"]
        self.names["i"] = self.beyond
        try:
            return super().static_bool(expr)
        finally:
            self.names["i"] = kept

    def declare_state(self, entry: tree.Entry) -> None:
        """A state begins before the first step, and then is what the step before made of it."""
        if entry.value is None:
            raise self.fail("FL0306", f"the state `{entry.name}` of a solver needs a start", entry.span,
                            suggestion=f"as in `state {entry.name} = v(x, t)`")  # fmt: skip
        if self.index == 0:
            value = self.ev(entry.value)
            if value == 0 and isinstance(
                value, int | float
            ):  # as a multiple of x, so that it serves what goes beside x
                x = self.names["x"]
                value = self.node("mul", x.id, self.b.const(0.0), span=entry.span)
            self.names[entry.name] = Tensor(self.whole(value, entry.span), self)
        else:
            id = self.b.leaf(
                "input", self.state_type, batched=True, span=entry.span, label=entry.name, name=entry.name, role="map"
            )
            self.memory[entry.name] = self.names[entry.name] = Tensor(id, self)
        self.used.add(entry.name)
        self.kept.append((entry.name, entry.span))

    def whole(self, value: Any, span: Span) -> int:
        return fitted(self, value, self.state_type, span, "keep others as `state`")


def fitted(body: Body, value: Any, state: TensorType, span: Span, others: str = "give x alone") -> int:
    """A value with the type of what is integrated; `others` says what to do with more than one."""
    if isinstance(value, Poison):
        raise Poisoned
    if isinstance(value, Tuple):
        raise body.fail("FL0308", "a step gives one value, the next x", span, suggestion=others)
    id = body.tensor(value, span)
    have = body.b.type(id)
    if have.kind == "bool" or not set(have.axes) <= set(state.axes):
        raise body.fail("FL0301", f"what is integrated is `{state}`, and this is `{have}`", span,
                        suggestion="reduce it to the axes of x, or to one number")  # fmt: skip
    if set(have.axes) != set(state.axes):
        id = body.b.expand(id, state)
    return id if body.b.type(id).names == state.names else body.b.op("order", id, names=state.names)


def step_rule(body: Body, solver: Instance, state: TensorType) -> Rule | None:
    """The rule of a solver for a state of that type; None after a reported error."""
    assert isinstance(solver.target, Declared)
    declaration = solver.target.declaration
    statements = tuple(s for s in declaration.body or () if not isinstance(s, tree.Require))
    has_state = any(isinstance(s, tree.Declare) and s.word == "state" for s in parts(statements))
    has_param = any(isinstance(s, tree.Declare) and s.word == "param" for s in parts(statements))
    count = asked_index(statements)
    if count > MOST_FIRST:
        raise body.fail(
            "FL0901",
            f"more than {MOST_FIRST} first steps that differ: limit reached",
            solver.span,
            suggestion="tell fewer steps from the others by `if i < n`",
        )
    count = max(count, int(has_state))
    if has_param and count:
        raise body.fail(
            "FL0902",
            f"`{declaration.name}` has parameters, and first steps that differ: that has no meaning yet",
            solver.span,
            suggestion="read a parameter's entry at `i` instead",
        )
    regions = []
    for index in [*range(count), None]:
        made = one_step(body, solver, statements, TensorType(state.axes), index, count)
        if made is None:
            body.region.broken = True
            return None
        regions.append(made)
    if count and any(not c.shared for c in regions[-1].children.values()):
        raise body.fail(
            "FL0902",
            f"`{declaration.name}` has a network of its own, and first steps that differ: that has no meaning yet",
            solver.span,
            suggestion="give it the network as an argument, bound to a name",
        )
    last = regions[-1].graph
    indexed = any(n.op == "input" and n.attrs.get("role") == "index" and last.users(n.id) for n in last)
    return Rule(tuple(regions), solver, all(linear(r) for r in regions), indexed)


def one_step(
    body: Body, solver: Instance, statements: tuple[tree.Statement, ...], state: TensorType, index: int | None, beyond: int
) -> Region | None:  # fmt: skip
    assert isinstance(solver.target, Declared)
    declaration = solver.target.declaration
    name = declaration.name if index is None else f"{declaration.name}_{index}"
    library = solver.target.module.source.library
    region = Region(name, "net", Graph(), span=declaration.span, doc=declaration.doc, library=library)
    which = "a step" if index is None else f"step {index}"
    region.signature = f"{which} of {body.elab.signature(solver)}"
    inner = RuleBody(body.elab, region, body, solver, index, beyond)
    inner.state_type = state
    inner.axes.update({a.name: a.size for a in state.axes})
    from flowlang.elaborate.body import Fail
    from flowlang.elaborate.statements import run_statements

    try:
        statics = [p for p in parameters_of(solver) if p.type is not None]
        inner_solver = Instance(
            solver.target, {k: v for k, v in solver.arguments.items() if k in {p.name for p in statics}}, solver.span
        )
        body.elab.bind_statics(inner, inner_solver, statics, solver.span, body)
        span = declaration.span
        x = inner.b.leaf("input", state, batched=True, span=span, label="x", name="x", role="map")
        inner.names["x"] = Tensor(x, inner)
        context = []
        for label in ("t", "h"):
            id = inner.b.leaf("input", SCALAR, batched=False, span=span, label=label, name=label, role="context")
            inner.names[label] = Tensor(id, inner)
            context.append(id)
        i = inner.b.leaf("input", TensorType((), "int"), batched=False, span=span, label="i", name="i", role="index")
        inner.names["i"] = Tensor(i, inner) if index is None else index
        v = inner.b.leaf("input", SCALAR, batched=False, span=span, label="v", name="v", role="field")
        inner.names["v"] = Builtin("v", lambda b, args: evaluation(b, inner, v, args))
        inner.used |= set(inner.names)
        value = run_statements(inner, statements)
        if region.broken:
            return None
        result = inner.whole(value, span)
        outputs = [result, *(inner.whole(inner.names[n], s) for n, s in inner.kept)]
    except Fail as e:
        body.elab.report.add(e.diagnostic)
        return None
    except Poisoned:
        return None
    region.inputs = [x, *(t.id for t in inner.memory.values())]
    region.context = [*context, i, v]
    region.outputs = outputs
    return region


def evaluation(body: Body, inner: RuleBody, v: int, args: Arguments) -> Any:
    """`v(x, t)` in a rule: the field that is integrated."""
    assert args.span is not None
    if len(args.positional) != 2 or args.keywords:
        raise body.fail(
            "FL0203", "the field of a solver takes a value and a time", args.span, suggestion="as in `v(x, t)`"
        )
    if body is not inner:
        raise body.fail(
            "FL0902",
            "the field of a solver inside a loop has no meaning yet",
            args.span,
            suggestion="write its calls out",
        )
    value, time = args.positional
    if isinstance(value, Poison) or isinstance(time, Poison):
        return POISON
    x = inner.whole(value, args.spans[0])
    t = body.tensor(time, args.spans[1])
    if body.b.type(t).axes or not isinstance(time, Tensor | int | float):
        raise body.fail(
            "FL0306",
            f"a time is one number, and this is {describe(time)}",
            args.spans[1],
            suggestion="as in `v(x, t + h / 2)`",
        )
    node = body.graph.add("evaluate", (v, x, t), inner.state_type, {}, span=args.span, batched=True)
    return Tensor(node.id, body)


# ---- what a rule asks ---------------------------------------------------------------------------


def parts(node: Any) -> Iterator[Any]:
    """The nodes of a syntax tree."""
    if isinstance(node, tuple | list):
        for n in node:
            yield from parts(n)
    elif is_dataclass(node) and not isinstance(node, Span):
        yield node
        for f in fields(node):
            yield from parts(getattr(node, f.name))


def asked_index(statements: tuple[tree.Statement, ...]) -> int:
    """How many first steps `if i < 2` and the like tell from the others."""
    found = 0
    for s in parts(statements):
        for e in parts(s.condition) if isinstance(s, tree.If) else ():
            compared = isinstance(e, tree.Binary) and e.op in ("<", "<=", "==", "!=", ">", ">=")
            if not compared or not isinstance(e.left, tree.Name) or e.left.id != "i":
                continue
            if isinstance(e.right, tree.Number) and isinstance(e.right.value, int):
                found = max(found, e.right.value + (e.op in ("<=", "==", "!=", ">")))
    return found


def linear(region: Region) -> bool:
    """Whether a step only sums what it integrates, its states and the field's values, each times a number.

    Such a step serves any state, so it carries the integral of the divergence beside x.
    """
    graph = region.graph
    carried: set[int] = set(region.inputs)
    for n in graph:
        if n.op == "evaluate":
            if n.inputs[1] not in carried or n.inputs[2] in carried:
                return False
            carried.add(n.id)
        elif any(i in carried for i in n.inputs):
            if not combines(graph, n, carried):
                return False
            carried.add(n.id)
    return all(o in carried for o in region.outputs)


def combines(graph: Graph, n: Node, carried: set[int]) -> bool:
    inside = [i in carried for i in n.inputs]
    match n.op:
        case "add" | "sub":
            return all(inside)
        case "neg":
            return True
        case "mul":
            return sum(inside) == 1 and all(
                w or not graph[i].tensor.axes for i, w in zip(n.inputs, inside, strict=True)
            )
        case "div":
            return inside == [True, False] and not graph[n.inputs[1]].tensor.axes
    return False
