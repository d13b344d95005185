"""`model name { data .. def loss { .. } def sample { .. } }`: networks, and programs that share them.

A program is a `def` of the model whose parameters have types, or the names of the model's data. It
becomes a region of its own whose children are the model's. Any other `def` is a local function of the
programs, evaluated where it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import Label
from flowlang.elaborate.body import Body, Fail, Poisoned
from flowlang.elaborate.later import walk
from flowlang.elaborate.statements import NOTHING, check_new, run_one, run_statements
from flowlang.elaborate.types import evaluate_type
from flowlang.elaborate.values import (
    POISON,
    DistributionValue,
    Instance,
    Local,
    Poison,
    Static,
    Tensor,
    Tuple,
    TypeSpec,
)
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Region
from flowlang.ir.noise import draws
from flowlang.ir.tangents import plain_method
from flowlang.ir.types import TensorType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.elaborator import Elaborator


# What every compiled module has already; a program of that name would replace it.
MODULE_NAMES = frozenset(
    [
        "add_module",
        "apply",
        "begin",
        "bfloat16",
        "buffers",
        "call_super_init",
        "certificates",
        "certify",
        "children",
        "compile",
        "context",
        "cpu",
        "cuda",
        "data_name",
        "data_shape",
        "double",
        "dump_patches",
        "eval",
        "exactness",
        "extra_repr",
        "float",
        "follow",
        "followers",
        "forward",
        "get_buffer",
        "get_extra_state",
        "get_parameter",
        "get_submodule",
        "given_shapes",
        "half",
        "ipu",
        "jit",
        "like",
        "load_state_dict",
        "modules",
        "mtia",
        "named_buffers",
        "named_children",
        "named_modules",
        "named_parameters",
        "origin",
        "parameter_groups",
        "parameters",
        "programs",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_module",
        "register_parameter",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "requires_grad_",
        "run",
        "set_extra_state",
        "set_submodule",
        "settle",
        "share_memory",
        "state_dict",
        "to",
        "to_empty",
        "train",
        "training",
        "type",
        "types",
        "verdicts",
        "xpu",
        "zero_grad",
    ]
)


class DataInput:
    """An entry of `data` or `given`: its name, type and domain."""

    def __init__(self, name: str, type: TensorType, domain: Domain, span: Span):
        self.name, self.type, self.domain, self.span = name, type, domain, span


class ProgramBody(Body):
    """A program under construction: a graph of its own, with the children and parameters of its model."""

    def __init__(self, model: Body, region: Region, inputs: list[DataInput]):
        super().__init__(model.elab, region, model.module, parent=model, anchor=model.anchor)
        self.model = model
        self.data_type = inputs[0].type if inputs else None
        self.data_failed = model.data_failed
        region.children = model.region.children
        self.reserved = model.reserved
        self._copies: dict[int, int] = {}
        self.made: list[tuple[tree.Declaration, Span]] = []  # local functions whose call here made weights

    def count_weights(self) -> int:
        own = sum(has_weights(c.region) for c in self.region.children.values() if not c.shared)
        models = set(self._copies.values())
        return own + sum(n.op == "param" and n.id not in models for n in self.graph)

    def made_by(self, declaration: tree.Declaration, span: Span) -> None:
        self.made.append((declaration, span))

    def capture(self, value: Any, name: str | None = None) -> Any:
        """The model's networks are used as they are; its parameters, and what it computes of them, are copied here."""
        if isinstance(value, Instance):
            return value
        if isinstance(value, Local) and value.body is self.model:
            return Local(value.declaration, self)  # the model's functions read the program's data
        if isinstance(value, Tensor) and value.body is self.model:
            return Tensor(self.copied(value.id), self)
        return super().capture(value, name)

    def bring(self, value: Tensor) -> Tensor:
        found = self.capture(value)
        assert isinstance(found, Tensor)
        return found

    def copied(self, n: int) -> int:
        if n not in self._copies:
            node = self.model.graph[n]
            self._copies[n] = self.b.copy(node, [self.copied(i) for i in node.inputs])
        return self._copies[n]

    def draw(self, target: tree.Target, dist: DistributionValue, span: Span) -> Tensor:
        """A draw: the type written, or that of the arguments, or for a bare distribution that of the data."""
        from flowlang.elaborate.statements import distribution_arguments, draw_type

        arguments = distribution_arguments(self, dist)
        spec = evaluate_type(self, target.type) if target.type is not None else None
        if spec is None and not arguments:
            if self.data_type is None and self.data_failed:
                raise Poisoned
            if self.data_type is None:
                raise self.fail("FL0310", f"`{target.name}` has no type, and the model has no `data` to take one from", span,
                                suggestion=f"write it, as in `{target.name}: R[D = 2] ~ {dist.name}`")  # fmt: skip
            type_ = self.data_type
        else:
            type_ = draw_type(self, spec, arguments, span, dist.law.event_axes)
        self.b.span = span
        return Tensor(dist.law.draw(self.b, type_, dict(arguments)), self)


def build_model(elab: Elaborator, body: Body, declaration: tree.Declaration) -> None:
    """Runs the model's statements, then makes a region of each program."""
    inputs: list[DataInput] = []
    defs: list[tree.Declaration] = []
    for statement in declaration.body or ():
        if isinstance(statement, tree.Declare) and statement.word in ("data", "given"):
            declared = declare_data(body, statement)
            inputs += declared
            body.region.data |= {i.name: (statement.word, i.type) for i in declared}
        elif isinstance(statement, tree.Declaration) and statement.kind == "def":
            defs.append(statement)
            body.names[statement.name] = Local(statement, body)
            body.used.add(statement.name)
        else:
            run_one(body, statement, last=False)
    places: list[tuple[tree.Declaration, Span]] = []
    for d in defs:
        if is_program(d, {i.name for i in inputs} | body.data_failed):
            if d.name in MODULE_NAMES or d.name.startswith("_"):
                where, own = d.name_span or d.span, d.name.strip("_") or "step"
                reason = (
                    "is a method of every compiled module, and cannot name"
                    if d.name in MODULE_NAMES
                    else "begins with `_`, which only parts of a module do: it cannot name"
                )
                body.report(
                    body.diagnostic(
                        "FL0204",
                        f"`{d.name}` {reason} a program",
                        where,
                        suggestion=f"choose another name, as `{own}_step`",
                    )
                )
                continue
            region, made = build_program(body, d, inputs)
            places += made
            body.region.programs[d.name] = region
            body.region.broken = body.region.broken or region.broken
    tell_fresh_weights(body, places)
    read = {p.graph[i].label for p in body.region.programs.values() for i in p.inputs}
    first = next(iter(body.region.data), None)  # what a static choice leaves unread is not asked for
    body.region.data = {n: d for n, d in body.region.data.items() if n == first or n in read}
    if not body.region.programs and not body.region.broken:
        body.report(
            body.diagnostic(
                "FL0212", f"the model `{declaration.name}` has no program", declaration.name_span or declaration.span,
                suggestion="a program is a `def`, as in `def loss { .. }`; its parameters have types or the names of data",
            )
        )  # fmt: skip


def declare_data(body: Body, statement: tree.Declare) -> list[DataInput]:
    out: list[DataInput] = []
    for entry in statement.entries:
        try:
            check_new(body, entry.name, entry.span)
            spec = evaluate_type(body, entry.type) if entry.type is not None else None
            if spec is None or isinstance(spec, Static) or spec.rest:
                raise body.fail(
                    "FL0306",
                    f"`{entry.name}` needs a type, as in `data {entry.name}: R[D = 2]`",
                    entry.span,
                    suggestion="a domain with axes, as `R[D]`, `Positive[D]` or `Invertible[D', D]`",
                )
            axes = []
            for n, s in spec.axes:
                size = body.elab.size_override(body, n, s, entry)
                axes.append((n, size))
                body.axes.setdefault(n, size)
            out.append(DataInput(entry.name, TensorType.of(*axes, kind=spec.domain.kind), spec.domain, entry.span))
            continue
        except Fail as e:
            body.report(e.diagnostic)
        except Poisoned:
            body.region.broken = True
        body.data_failed.add(entry.name)
        body.names[entry.name] = POISON
        for item in (n for n in walk(entry.type) if isinstance(n, tree.Item)):
            if isinstance(item.left, tree.Name) and isinstance(item.eq, tree.Number) and isinstance(item.eq.value, int):
                body.axes.setdefault(item.left.id, item.eq.value)
        body.lose(entry)
    return out


def is_program(d: tree.Declaration, data: set[str]) -> bool:
    return all(p.type is not None or p.name in data for ps in d.parameters for p in ps)


def has_weights(region: Region) -> bool:
    """Whether a region has parameters that are not handed to it."""
    inside = (c.region for c in region.children.values() if not c.shared)
    return any(n.op == "param" for n in region.graph) or any(has_weights(r) for r in inside)


def tell_fresh_weights(body: Body, places: list[tuple[tree.Declaration, Span]]) -> None:
    """Warns of functions of a model that make weights in several places: each has its own, which is seldom meant."""
    calls: dict[int, tuple[tree.Declaration, list[Span]]] = {}
    for declaration, span in places:
        calls.setdefault(id(declaration), (declaration, []))[1].append(span)
    for declaration, found in calls.values():
        spans = list(dict.fromkeys(found))  # copies of one place are meant to differ
        if len(spans) > 1 and not body.region.library:
            body.report(
                body.diagnostic(
                    "FL0214", f"`{declaration.name}` makes weights, and each of the {len(spans)} places that call it has its own",
                    declaration.name_span or declaration.span, severity="warning",
                    labels=tuple(Label(span, "weights of its own") for span in spans[:3]),
                    suggestion="make the network in the model, as in `net = mlp(64)`, and call it in the function",
                )
            )  # fmt: skip


def build_program(
    model: Body, d: tree.Declaration, inputs: list[DataInput]
) -> tuple[Region, list[tuple[tree.Declaration, Span]]]:
    """The region of a program, and the calls of functions in it that made weights."""
    region = Region(d.name, "program", Graph(), span=d.span, doc=d.doc, library=model.region.library)
    region.signature = f"{model.region.name}.{d.name}"
    body = ProgramBody(model, region, inputs)
    before = body.count_weights()
    try:
        feed(body, d, inputs)
        value = run_statements(body, d.body or ())
        if value is NOTHING:
            raise body.fail("FL0308", f"the program `{d.name}` has no result", d.name_span or d.span,
                            suggestion="end its body with an expression")  # fmt: skip
        if not isinstance(value, Poison):
            values = list(value.items) if isinstance(value, Tuple) else [value]
            region.outputs = [body.tensor(v, d.span) for v in values]
    except Fail as e:
        body.report(e.diagnostic)
    except Poisoned:
        region.broken = True
    both_ways(body)
    keep_parameters(model, body)
    needed = region.graph.reachable(list(region.outputs))
    named = {p.name for ps in d.parameters for p in ps}
    region.inputs = [i for i in region.inputs if i in needed or region.graph[i].label in named]
    own = [(d, d.name_span or d.span)] if body.count_weights() > before else []  # a program may be called by others
    return region, [*own, *body.made]


def both_ways(program: ProgramBody) -> None:
    """Refuses a program that runs a bijector and its inverse if its networks draw: the one with noise, the other without."""
    first: dict[str, str] = {}
    for node in program.graph:
        callee = node.attrs.get("region")
        if not isinstance(callee, Region) or callee.kind not in ("bijector", "chain"):
            continue
        way = "back" if plain_method(node.attrs) in ("inverse", "generate") else "forward"
        if first.setdefault(str(node.attrs["child"]), way) != way and draws(callee, training=True):
            where = node.span or program.region.span
            assert where is not None
            program.report(program.diagnostic(
                "FL0410", f"this program runs `{callee.name}` and its inverse, and its networks draw while training: the one draws, the other does not",
                where, suggestion="write two programs, or leave the draw out of its networks",
            ))  # fmt: skip


def keep_parameters(model: Body, program: ProgramBody) -> None:
    """Parameters and states that a program declares, or a `linear` in it, belong to the model, whose module holds them."""
    held = {n.attrs["name"] for n in model.graph if n.op in ("param", "state")}
    for node in list(program.graph):
        if node.op not in ("param", "state") or node.id in program._copies.values():
            continue
        if node.attrs["name"] in held:
            where = node.span or program.region.span
            assert where is not None
            program.report(
                program.diagnostic("FL0204", f"`{node.attrs['name']}` is declared in another program of the model too", where,
                                   suggestion="declare it once, in the model, or choose another name"))  # fmt: skip
            continue
        model.b.copy(node, ())


def feed(body: ProgramBody, d: tree.Declaration, inputs: list[DataInput]) -> None:
    """Inputs of a program: its parameters, and the data it reads."""
    data = {i.name: i for i in inputs}
    for p in (p for ps in d.parameters for p in ps):
        if p.type is None and p.name in body.data_failed:
            body.names[p.name] = POISON
            continue
        if p.type is None:
            found = data[p.name]
            add_input(body, p.name, found.type, found.domain, p.span)
            continue
        if not feed_typed(body, p):
            body.names[p.name] = POISON
    for i in inputs:
        if i.name not in body.names:
            add_input(body, i.name, i.type, i.domain, i.span)


def feed_typed(body: ProgramBody, p: tree.Parameter) -> bool:
    """A parameter with a type of its own; False after an error."""
    assert p.type is not None
    try:
        spec = evaluate_type(body, p.type)
        if isinstance(spec, TypeSpec) and not spec.rest and any(s is None and body.is_lost(n) for n, s in spec.axes):
            raise Poisoned
        if not isinstance(spec, TypeSpec):
            raise body.fail(
                "FL0902",
                f"a static parameter of a program, as `{p.name}`, has no meaning yet",
                p.span,
                suggestion="make it a parameter of the model",
            )
        if spec.rest or not spec.sized:
            raise body.fail(
                "FL0902", f"`{p.name}` has an axis of open size, which has no meaning in a program yet", p.span,
                suggestion="write its sizes, as in `R[D = 2]`",
            )  # fmt: skip
    except Fail as e:
        body.report(e.diagnostic)
    except Poisoned:
        body.region.broken = True
    else:
        add_input(body, p.name, spec.tensor(), spec.domain, p.span)
        return True
    body.lose(p.type)
    return False


def add_input(body: Body, name: str, type_: TensorType, domain: Domain, span: Span) -> None:
    id = body.b.leaf("input", type_, batched=True, span=span, label=name, name=name, role="map", domain=domain)
    body.region.inputs.append(id)
    body.names[name] = Tensor(id, body)
    body.used.add(name)
