"""A declaration's body under construction: scopes, expressions and statements become graph nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowlang import limits
from flowlang.diagnostics import Diagnostic, Label
from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate.calls import Arguments, apply, make_call
from flowlang.elaborate.later import introduced_axes, is_place, later_family
from flowlang.elaborate.paths import FUNCTIONS, path_networks
from flowlang.elaborate.scope import LATER_ADVICE, ModuleScope, did_you_mean, name_help
from flowlang.elaborate.types import evaluate_type
from flowlang.elaborate.values import (
    ABSENT,
    LATER,
    POISON,
    WITNESS,
    Absent,
    AppliedBuiltin,
    Bracketed,
    Builtin,
    BuiltinNet,
    Declared,
    DistributionValue,
    Instance,
    Later,
    Local,
    LogProb,
    Option,
    PathFunction,
    Pending,
    Poison,
    Poisoned,
    RangeValue,
    Static,
    Tensor,
    Tuple,
    TypeSpec,
    describe,
    hint_for,
    part_hint,
)
from flowlang.ir.build import Builder
from flowlang.ir.graph import Child, Follow, Graph, Region
from flowlang.ir.noise import draws
from flowlang.ir.ops.base import OpProblem
from flowlang.ir.types import Axis, TensorType
from flowlang.source import Span
from flowlang.syntax import habits, tree

if TYPE_CHECKING:
    from flowlang.elaborate.elaborator import Elaborator

ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "div", "^": "pow"}
COMPARE = {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}


class Fail(Exception):
    """Ends the evaluation of one expression; the diagnostic is reported where it is caught."""

    def __init__(self, diagnostic: Diagnostic):
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


class Body:
    """Names, axes and the graph of one region (or of a `repeat` body, whose parent it may capture from)."""

    def __init__(
        self,
        elab: Elaborator,
        region: Region,
        module: ModuleScope,
        *,
        parent: Body | None = None,
        anchor: Span | None = None,
        enclosing: Body | None = None,
    ):
        self.elab = elab
        self.region = region
        self.graph: Graph = region.graph
        self.b = Builder(region.graph)
        self.module = module
        self.parent = parent or enclosing  # where values are captured from
        self.scope = parent  # where names are looked up that are not bound here; nothing is, around a declaration
        self.anchor = anchor  # the user's call that led into library text
        self.names: dict[str, Any] = {}
        self.axes: dict[str, int] = dict(parent.axes) if parent else {}
        self.rest: tuple[Axis, ...] = parent.rest if parent else ()
        self.open_rest = False  # a parameter's type here has a `..`
        self.result_spec: list[TypeSpec] = []
        self.captures: dict[int, int] = {}  # outer node id -> input node id here
        self.captured_instances: dict[int, tuple[Instance, Instance]] = {}
        self.reserved: set[str] = set()
        self._next_child: dict[str, int] = {}
        self.used: set[str] = set()
        self.bound_spans: dict[str, Span] = {}
        self.chain_value: Tensor | Tuple | Poison | None = None  # what the steps of a chain have made so far
        self.outer_axes: set[str] | None = None  # shared axes that an enclosing reduction removes; None: no licence
        self.outer_typed = False
        self.data_failed: set[str] = set()  # entries of a model's `data` that are in error
        self.lost: set[str] = set()  # axes whose sizes an error has hidden
        self.depth = 0
        self.states: dict[str, int] = {}  # states declared here, by name
        self.weights: dict[tuple[str, ...], Tensor] = {}  # of the networks held here, by network and part
        self.imported: dict[str, str] = {}  # networks that the caller hands in: the argument each came by

    # ---- errors ---------------------------------------------------------------------------------

    def fail(
        self,
        code: str,
        message: str,
        span: Span,
        *,
        suggestion: str | None = None,
        notes: tuple[str, ...] = (),
        labels: tuple[Label, ...] = (),
    ) -> Fail:
        return Fail(self.diagnostic(code, message, span, suggestion=suggestion, notes=notes, labels=labels))

    def diagnostic(
        self,
        code: str,
        message: str,
        span: Span,
        *,
        suggestion: str | None = None,
        notes: tuple[str, ...] = (),
        labels: tuple[Label, ...] = (),
        severity: str = "error",
    ) -> Diagnostic:
        if span.source.library and self.anchor is not None:
            notes = (*notes, f"this arose inside `{self.region.name}` of the library")
            span = self.anchor
        return Diagnostic(code, message, span, severity, labels, notes, suggestion)  # type: ignore[arg-type]

    def report(self, diagnostic: Diagnostic) -> None:
        if diagnostic.severity == "error":
            self.region.broken = True
        self.elab.report.add(diagnostic)

    def not_yet(self, name: str, message: str, span: Span) -> Exception:
        """What to raise for something that a later version brings; each name is told once."""
        self.region.broken = True
        if name in self.elab.report.told:
            return Later()
        self.elab.report.told.add(name)
        return self.fail("FL0902", message, span, suggestion=LATER_ADVICE)

    def lose(self, node: Any) -> None:
        """The axes that a statement in error would have named have unknown sizes."""
        self.lost |= introduced_axes(node) - self.axes.keys()

    def is_lost(self, axis: str) -> bool:
        return axis in self.lost or (self.scope is not None and self.scope.is_lost(axis))

    # ---- names ----------------------------------------------------------------------------------

    def lookup(self, name: str, span: Span) -> Any:
        value = self.find(name)
        if value is not None:
            return value
        if name in self.axes:
            return self.axes[name]
        if name in self.module.names:
            self.elab.used_names.add((id(self.module), name))
            return self.elab.constant_value(self.module.names[name])
        if name in self.module.broken:
            self.region.broken = True
            return POISON
        value = self.elab.constant_value(self.elab.global_name(name))
        if value is not None:
            return value
        if self.is_lost(name):
            self.region.broken = True
            raise Poisoned
        family = later_family(name)
        if family is not None:
            raise self.not_yet(name, f"`{name}` has no meaning yet: it is among the {family} of a later version", span)
        raise self.fail(
            "FL0201",
            f"unknown name `{name}`",
            span,
            suggestion=name_help(name, self.visible_names()),
        )

    def count_weights(self) -> int:
        """How many weights were made so far, where that is watched (programs of models)."""
        return 0

    def made_by(self, declaration: tree.Declaration, span: Span) -> None:
        """To be told of a local function whose call made weights."""

    def find(self, name: str) -> Any:
        """A name bound here or in an enclosing body (captured when it is a tensor or an instance)."""
        if name in self.names:
            self.used.add(name)
            return self.names[name]
        if self.scope is not None:
            outer = self.scope.find(name)
            return None if outer is None else self.capture(outer, name)
        return None

    def method_help(self, name: str) -> str | None:
        """For a function that is asked of a value, as in `x.mean()`."""
        if name not in habits.NAMES and isinstance(self.elab.constant_value(self.elab.global_name(name)), Builtin):
            return f"functions stand in front of their values, as in `{name}(x)` or `{name}[D](x)`"
        return None

    def context_values(self) -> dict[str, Tensor]:
        """The `given` inputs in sight, by name (a `repeat` body captures those outside)."""
        names: list[str] = []
        scope: Body | None = self
        while scope is not None:
            for name, value in scope.names.items():
                if isinstance(value, Tensor) and value.body.graph[value.id].attrs.get("given") and name not in names:
                    names.append(name)
            scope = scope.scope
        found = {n: self.find(n) for n in sorted(names)}
        return {n: v for n, v in found.items() if isinstance(v, Tensor)}

    def visible_names(self) -> set[str]:
        names = set(self.names) | set(self.axes) | set(self.module.names) | self.elab.global_names()
        if self.scope is not None:
            names |= self.scope.visible_names()
        return names

    def capture(self, value: Any, name: str | None = None) -> Any:
        """Brings an outer value into this body: tensors become inputs, instances become shared children."""
        if isinstance(value, Tensor) and value.body is not self:
            if self.parent is not None and value.body is not self.parent:
                value = self.parent.capture(value, name)
            if value.id not in self.captures:
                outer = value.body.graph[value.id]
                self.captures[value.id] = self.b.leaf(
                    "input", outer.type, batched=outer.batched, span=outer.span, label=name or outer.label,
                    name=name or outer.label or f"captured{len(self.captures)}", role="context",
                )  # fmt: skip
            return Tensor(self.captures[value.id], self)
        if isinstance(value, Instance) and value.owner is not None and value.owner is not self:
            if self.parent is not None and value.owner is not self.parent:
                value = self.parent.capture(value, name)
            return self.import_shared(value, value.name or name or "net")
        if isinstance(value, Tuple):
            return Tuple(tuple(self.capture(v) for v in value.items))
        if isinstance(value, list):
            return [self.capture(v) for v in value]
        if isinstance(value, Bracketed):
            return replace(value, fn=self.capture(value.fn, name))
        return value

    def bring(self, value: Tensor) -> Tensor:
        """An outer value as a whole, also where a scan would see a slice of it."""
        if value.body is self:
            return value
        if self.parent is not None and value.body is not self.parent:
            value = self.parent.bring(value)
        found = Body.capture(self, value)
        assert isinstance(found, Tensor)
        return found

    def outer_instance(self, inst: Instance) -> Instance | None:
        """The instance of the body around that a captured one stands for."""
        return next((o for i, o in self.captured_instances.values() if i.name == inst.name), None)

    @contextmanager
    def inside(self, around: Body) -> Iterator[None]:
        """Names and axes are those of another body around this one, while a `def` of its is evaluated here."""
        saved = self.names, self.axes, self.rest, self.module, self.scope
        self.names, self.axes, self.rest, self.module, self.scope = (
            {},
            dict(around.axes),
            around.rest,
            around.module,
            around,
        )
        try:
            yield
        finally:
            self.names, self.axes, self.rest, self.module, self.scope = saved

    def names_rest(self) -> bool:
        """Whether `..` stands for axes here, be there any or not."""
        return bool(self.rest) or self.open_rest or (self.scope is not None and self.scope.names_rest())

    def sees(self, other: Body) -> bool:
        """Whether names of another body are in sight here."""
        return self is other or (self.scope is not None and self.scope.sees(other))

    def draw(self, target: tree.Target, dist: DistributionValue, span: Span) -> Tensor | None:
        """The value of a draw in a program; None in a bijector, where a draw is balanced by an emission."""
        return None

    def import_shared(self, outer: Instance, name: str) -> Instance:
        if id(outer) not in self.captured_instances:
            inner = Instance(
                outer.target, outer.arguments, outer.span, outer.axes, owner=self, label=outer.label,
                name=self.fresh_child_name(name), inverted=outer.inverted, lipschitz=outer.lipschitz, frozen=outer.frozen,
            )  # fmt: skip
            if outer.taps is not None:
                inner.taps = replace(outer.taps, writes=tuple((e, self.capture(v)) for e, v in outer.taps.writes))
            inner.shared = True
            self.captured_instances[id(outer)] = (inner, outer)
        return self.captured_instances[id(outer)][0]

    def fresh_child_name(self, base: str) -> str:
        taken = {i.name for i, _ in self.captured_instances.values()}
        name, n = base, self._next_child.get(base, 1)
        while name in taken or name in self.reserved or name in self.region.children:
            n += 1
            name = f"{base}_{n}"
        self._next_child[base] = n
        self.reserved.add(name)
        return name

    def adopt(self, inst: Instance, region: Region, span: Span) -> Child:
        """The child entry of an instance, made at its first sized use and checked at later ones."""
        network = self.region.kind in ("bijector", "chain", "flow") and region.kind in ("net", "norm")
        if network and draws(region, training=False):
            raise self.fail(
                "FL0410", f"not invertible: `{inst.target.name}` draws noise, and a network of a bijector gives the same when the map is undone", span,
                suggestion="put the draw under `if training`, or draw in the bijector itself and hand the value to the network",
            )  # fmt: skip
        if inst.owner is None:
            inst.owner = self
        if inst.name is None:
            inst.name = self.fresh_child_name(inst.label or inst.target.name)
        shared = inst.shared
        known = self.region.children.get(inst.name)
        if known is not None:
            if known.region is not region:
                raise self.fail(
                    "FL0301",
                    f"`{inst.label or inst.name}` is one network, and is used here with other sizes than before",
                    span,
                    notes=(f"before: {known.region.signature}", f"here: {region.signature}"),
                    suggestion=f"make a second instance, as in `{inst.target.name}(...)`, for the other sizes",
                )
            return known
        bindings = {} if shared else self.bind_shared(inst, region, span)
        child = Child(inst.name, region, shared, bindings)
        if inst.follows is not None:
            source = self.adopt(inst.follows.source, region, span)
            child.follows = Follow(source.name, inst.follows.decay, inst.follows.every)
        self.region.children[inst.name] = child
        return child

    def bind_shared(self, inst: Instance, region: Region, span: Span) -> dict[str, str]:
        """For each shared child that `region` expects, the child of this body that it gets."""
        bindings: dict[str, str] = {}
        given = self.elab.shared_arguments(inst)
        if region in self.elab.closures:  # networks that a local function reads
            held = self.elab.closures[region].captured_instances.values()
            given |= {shared.name: outer for shared, outer in held if shared.name is not None}
        for name, child in region.children.items():
            if child.shared:
                outer = given.get(name)
                if outer is None:
                    continue
                outer = self.capture(outer)
                bindings[name] = self.adopt(outer, child.region, span).name
        return bindings

    # ---- expressions ----------------------------------------------------------------------------

    def ev(self, expr: tree.Expr) -> Any:
        """The value of an expression; POISON after a reported error."""
        self.depth += 1
        try:
            if self.depth > limits.EXPRESSION_DEPTH:
                raise self.fail(
                    "FL0901",
                    "expression nested too deeply: limit reached",
                    expr.span,
                    suggestion="name parts of it, as in `a = ...`",
                )
            return self._ev(expr)
        except Fail as e:
            self.report(e.diagnostic)
            return LATER if e.diagnostic.code == "FL0902" else POISON
        except Later:
            return LATER
        except Poisoned:
            return POISON
        except OpProblem as e:
            self.report(self.diagnostic(e.code, e.message, expr.span, suggestion=e.suggestion, notes=e.notes))
            return POISON
        finally:
            self.depth -= 1

    def _ev(self, expr: tree.Expr) -> Any:
        match expr:
            case tree.Name():
                return self.lookup(expr.id, expr.span)
            case tree.Number():
                return expr.value
            case tree.String():
                return expr.value
            case tree.Unary():
                return self.unary(expr)
            case tree.Binary(op="|>"):
                return self.pipe(expr)
            case tree.Binary():
                return self.binary(expr)
            case tree.Attribute():
                return self.attribute(expr)
            case tree.Call():
                return make_call(self, expr)
            case tree.Brackets():
                return self.brackets(expr)
            case tree.Paren():
                return self.paren(expr)
            case tree.ListExpr():
                values = [self.ev(e) for e in expr.items]
                return POISON if any(isinstance(v, Poison) for v in values) else values
            case tree.Comprehension():
                return self.comprehension(expr)
            case tree.Range():
                start = self.static_int(expr.start) if expr.start is not None else None
                stop = self.static_int(expr.stop) if expr.stop is not None else None
                return RangeValue(start, stop)
            case tree.Ellipsis():
                raise self.fail(
                    "FL0307",
                    "`..` stands for axes and has no value here",
                    expr.span,
                    suggestion="it stands in types, as in `x: R[D, ..]`",
                )
            case _:
                raise self.fail(
                    "FL0306",
                    "this is a type, where a value is needed",
                    expr.span,
                    suggestion="a type stands after `:`, as in `y: R[D] = x`",
                )

    def tensor(self, value: Any, span: Span) -> int:
        """The node id of a value used as a tensor (numbers become constants)."""
        if isinstance(value, Pending):
            if value.fallback is not None:
                return self.tensor(value.fallback(), span)
            if value.name == WITNESS:  # another network may have a size of its own
                raise Poisoned
            raise self.fail(
                "FL0304",
                f"the output size of `{value.name}` is open",
                value.span,
                suggestion="declare the result where it is bound, as in `h: R[D] = net(x)`",
            )
        if isinstance(value, Tensor):
            return value.id if value.body is self else self.capture(value).id
        if isinstance(value, bool | int | float):
            return self.b.const(value)
        if isinstance(value, Absent):
            raise self.fail(
                "FL0309", "an absent optional value is used here", span, suggestion="guard it with `if present(..)`"
            )
        if isinstance(value, Poison):
            raise Poisoned
        raise self.fail(
            "FL0306", f"a tensor is needed here, and this is {describe(value)}", span, suggestion=hint_for(value)
        )

    def wrap(self, id: int) -> Tensor:
        return Tensor(id, self)

    def node(self, op: str, *inputs: int, span: Span | None = None, **attrs: Any) -> Tensor:
        return Tensor(self.b.op(op, *inputs, span=span, **attrs), self)

    def unary(self, expr: tree.Unary) -> Any:
        value = self.ev(expr.operand)
        if isinstance(value, Poison):
            return POISON
        if expr.op == "not":
            if isinstance(value, bool):
                return not value
            return self.node("not", self.tensor(value, expr.operand.span), span=expr.span)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
        if isinstance(value, Pending):
            return self.later(value, lambda v: self.node("neg", self.tensor(v, expr.span), span=expr.span))
        return self.node("neg", self.tensor(value, expr.operand.span), span=expr.span)

    def later(self, pending: Pending, f: Any) -> Pending:
        """An elementwise function of an open network result stays open."""
        fallback = pending.fallback
        return Pending(
            lambda wanted: [f(v) for v in pending.resolve(wanted)],
            pending.span,
            pending.name,
            None if fallback is None else (lambda: f(fallback())),
        )

    def binary(self, expr: tree.Binary) -> Any:
        # Long chains `a + b + c ...` lean left: walk them with a loop, not by recursion.
        chain: list[tree.Binary] = []
        e: tree.Expr = expr
        while isinstance(e, tree.Binary) and e.op != "|>":
            chain.append(e)
            e = e.left
        value = self.ev(e)
        left_span = e.span
        for node in reversed(chain):
            try:
                word = self.word_beside(node, value)
                right = self.ev(node.right) if word is None else word
                value = self.binary_values(node, value, right, left_span)
            except Poisoned:
                value = POISON
            left_span = node.span
        return value

    def word_beside(self, expr: tree.Binary, left: Any) -> Option | None:
        """The word that a choice is compared with: `kind == rows`. Choices come first, so that names need no marks."""
        if not isinstance(left, Option) or expr.op not in ("==", "!=") or not isinstance(expr.right, tree.Name):
            return None
        word = expr.right.id
        if word in left.among:
            return Option(word, left.among)
        if isinstance(self.find(word), Option):
            return None  # another choice
        choices = ", ".join(f"`{w}`" for w in left.among)
        raise self.fail(
            "FL0306", f"this choice is one of {choices}", expr.right.span, suggestion=name_help(word, left.among)
        )

    def binary_values(self, expr: tree.Binary, left: Any, right: Any, left_span: Span) -> Any:
        if isinstance(left, Poison) or isinstance(right, Poison):
            return POISON
        op = expr.op
        if is_static(left) and is_static(right):
            return self.static_binary(expr, left, right)
        if op in ("and", "or"):
            for one, other in ((left, right), (right, left)):
                if isinstance(one, bool):
                    return other if one == (op == "and") else one
            return self.node(op, self.tensor(left, left_span), self.tensor(right, expr.right.span), span=expr.span)
        name = ARITHMETIC.get(op) or COMPARE[op]
        # An open network result takes the other operand's type in a sum, and stays open beside a number.
        if isinstance(left, Pending) or isinstance(right, Pending):
            if isinstance(left, Pending) and isinstance(right, Pending):
                both_l, both_r = left, right
                return Pending(
                    lambda wanted: [
                        self.combine(name, a, b, expr)
                        for a, b in zip(both_l.resolve(wanted), both_r.resolve(wanted), strict=True)
                    ],
                    expr.span,
                    both_l.name,
                )
            pending, other = (left, right) if isinstance(left, Pending) else (right, left)
            assert isinstance(pending, Pending)
            first = pending is left
            if isinstance(other, Tensor) and op in ("+", "-"):
                value = pending.resolve([other.type])[0]
                if isinstance(value, Poison):
                    return POISON
                return self.combine(name, value if first else other, other if first else value, expr)
            if is_static(other) or (isinstance(other, Tensor) and not other.type.axes):
                return self.later(
                    pending, lambda v: self.combine(name, v if first else other, other if first else v, expr)
                )
            value = Tensor(self.tensor(pending, pending.span), self)
            left, right = (value, other) if first else (other, value)
        return self.combine(name, left, right, expr)

    def combine(self, name: str, left: Any, right: Any, expr: tree.Binary) -> Any:
        if isinstance(left, Poison) or isinstance(right, Poison):
            return POISON
        a, b = self.tensor(left, expr.left.span), self.tensor(right, expr.right.span)
        self.check_axes(a, b, expr)
        return self.node(name, a, b, span=expr.span)

    def check_axes(self, a: int, b: int, expr: tree.Binary) -> None:
        """Sizes agree by name; operands that each lack an axis of the other need a licence."""
        ta, tb = self.b.type(a), self.b.type(b)
        for axis in ta.axes:
            if tb.has(axis.name) and tb.size(axis.name) != axis.size:
                raise self.fail(
                    "FL0301",
                    f"axis `{axis.name}` has size {axis.size} on the left and {tb.size(axis.name)} on the right",
                    expr.span,
                    notes=(f"left: `{ta}`", f"right: `{tb}`"),
                    suggestion=f"rename one of them, as in `x[{axis.name} -> E]`, if they are different axes",
                )
        only_a = [n for n in ta.names if not tb.has(n)]
        only_b = [n for n in tb.names if not ta.has(n)]
        if only_a and only_b and not self.outer_typed:
            shared = {n for n in ta.names if tb.has(n)}
            both = self.graph[a].batched and self.graph[b].batched
            if not (self.outer_axes and (shared & self.outer_axes or (both and "B" in self.outer_axes))):
                raise self.fail(
                    "FL0303",
                    f"the operands have unrelated axes: `{only_a[0]}` on the left, `{only_b[0]}` on the right",
                    expr.span,
                    notes=(f"left: `{ta}`", f"right: `{tb}`"),
                    suggestion="write the result's type where it is bound to ask for an outer product, or rename an axis",
                )

    def static_binary(self, expr: tree.Binary, a: Any, b: Any) -> Any:
        op = expr.op
        try:
            match op:
                case "and":
                    return bool(a) and bool(b)
                case "or":
                    return bool(a) or bool(b)
                case "==" | "!=":
                    same = (a.word if isinstance(a, Option) else a) == (b.word if isinstance(b, Option) else b)
                    return same if op == "==" else not same
            if not all(isinstance(v, int | float) for v in (a, b)):
                if op == "+" and isinstance(a, list) and isinstance(b, list):
                    self.elab.count_items(self, len(a) + len(b), expr.span)
                    return a + b
                raise self.fail(
                    "FL0306",
                    f"`{op}` does not apply to {describe(a)} and {describe(b)}",
                    expr.span,
                    suggestion="arithmetic takes numbers and tensors",
                )
            match op:
                case "+":
                    value = a + b
                case "-":
                    value = a - b
                case "*":
                    value = a * b
                case "/":
                    value = a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b
                case "^":
                    if isinstance(a, int) and isinstance(b, int) and (abs(b) > 64 and abs(a) > 1):
                        raise OverflowError
                    value = a**b
                case "<":
                    return a < b
                case "<=":
                    return a <= b
                case ">":
                    return a > b
                case _:
                    return a >= b
        except ZeroDivisionError:
            raise self.fail(
                "FL0305", "division by zero in a constant", expr.span, suggestion="choose another divisor"
            ) from None
        except OverflowError:
            raise self.fail(
                "FL0901", "this number exceeds the limit of 64 bits", expr.span, suggestion="write a smaller number"
            ) from None
        if isinstance(value, complex):
            raise self.fail(
                "FL0305",
                "this power is not a real number",
                expr.span,
                suggestion="a negative base needs a whole exponent",
            )
        if isinstance(value, int) and abs(value) > limits.INTEGER:
            raise self.fail(
                "FL0901", "this number exceeds the limit of 64 bits", expr.span, suggestion="write a smaller number"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise self.fail(
                "FL0901", "this number exceeds the limit of a float", expr.span, suggestion="write a smaller number"
            )
        return value

    def pipe(self, expr: tree.Binary) -> Any:
        left = self.ev(expr.left)
        fn = self.ev(expr.right)
        if isinstance(left, Poison) or isinstance(fn, Poison):
            return POISON
        if isinstance(left, Pending) and isinstance(fn, Builtin):
            return self.later(left, lambda v: apply(self, fn, [v], {}, expr.span))
        return apply(self, fn, [left], {}, expr.span, arg_spans=[expr.left.span])

    def attribute(self, expr: tree.Attribute) -> Any:
        value = self.ev(expr.value)
        if isinstance(value, Poison):
            return value
        if isinstance(value, Tensor):
            t = value.type
            if t.has(expr.name):
                return t.size(expr.name)
            if expr.name == "rank":
                return t.rank
            raise self.fail(
                "FL0302",
                f"this value has no axis `{expr.name}`; its axes are {axis_words(t)}",
                expr.span,
                suggestion=self.method_help(expr.name) or name_help(expr.name, t.names),
            )
        if isinstance(value, ModuleScope):
            if expr.name in value.names:
                return self.elab.constant_value(value.names[expr.name])
            raise self.fail(
                "FL0201", f"unknown name `{expr.name}`", expr.span, suggestion=name_help(expr.name, value.names)
            )
        if expr.name == "log_prob" and isinstance(value, Builtin | DistributionValue):
            if isinstance(value, Builtin) and value.kind == "distribution":
                value = apply(self, value, [], {}, expr.value.span)
            if isinstance(value, DistributionValue):
                return LogProb(value)
        if isinstance(value, Declared | Instance) and value.kind == "path":
            return self.path_function(value, expr)
        if isinstance(value, Instance) and expr.name in value.arguments:
            return value.arguments[expr.name]
        target = value.target if isinstance(value, Instance) else value
        if isinstance(target, Declared) and is_place(target.declaration, expr.name):
            raise self.not_yet(
                f"{target.kind}.{expr.name}",
                f"reading `{expr.name}` from a {target.kind} has no meaning yet",
                expr.span,
            )
        raise self.fail(
            "FL0306", f"{describe(value)} has no part `{expr.name}`", expr.span, suggestion=part_hint(value, expr.name)
        )

    def path_function(self, value: Declared | Instance, expr: tree.Attribute) -> PathFunction:
        target = value.target if isinstance(value, Instance) else value
        arguments = dict(value.arguments) if isinstance(value, Instance) else {}
        if isinstance(target, Declared) and target.declaration.alias is not None:
            found = self.elab.resolve_alias(target)
            if isinstance(found, Declared | Instance):
                return self.path_function(found, expr)
        if not isinstance(target, Declared) or expr.name not in FUNCTIONS:
            raise self.fail(
                "FL0306", f"a path has no `{expr.name}`", expr.span,
                suggestion=did_you_mean(expr.name, FUNCTIONS) or f"it has {', '.join(f'`{f}`' for f in FUNCTIONS)}",
            )  # fmt: skip
        arguments |= path_networks(self, value, target)
        return PathFunction(target, tuple(sorted(arguments.items())), expr.name)

    def brackets(self, expr: tree.Brackets) -> Any:
        value = self.ev(expr.value)
        if isinstance(value, Poison):
            return value
        if isinstance(value, Pending):
            value = Tensor(self.tensor(value, expr.value.span), self)
        if isinstance(value, Tensor):
            return axis_rules.index_tensor(self, self.capture(value), expr.items)
        if isinstance(value, list):
            return self.index_list(value, expr)
        self.check_distinct(expr)
        if isinstance(value, Builtin) and value.name in ("zeros", "ones", "checker"):
            return value.fn(self, Arguments(axes=expr.items, span=expr.span))
        if isinstance(value, Declared | Instance | Builtin | BuiltinNet | AppliedBuiltin):
            return Bracketed(value, expr.items, expr.span)
        raise self.fail(
            "FL0306",
            f"brackets do not apply to {describe(value)}",
            expr.span,
            suggestion="brackets belong to tensors, lists, and to functions whose axes they name",
        )

    def check_distinct(self, expr: tree.Brackets) -> None:
        """Axes that the brackets of a function name by themselves stand there once."""
        seen: set[str] = set()
        for item in expr.items:
            if isinstance(item.left, tree.Name) and item.eq is None:
                if item.left.id in seen:
                    raise self.fail(
                        "FL0307",
                        f"`{item.left.id}` stands twice in these brackets",
                        item.span,
                        suggestion="name each axis once",
                    )
                seen.add(item.left.id)

    def index_list(self, values: list[Any], expr: tree.Brackets) -> Any:
        if len(expr.items) != 1 or expr.items[0].left is None:
            raise self.fail("FL0307", "a list takes one index", expr.span, suggestion="as in `xs[0]`")
        index = self.ev(expr.items[0].left)
        if isinstance(index, Poison):
            return POISON
        if isinstance(index, RangeValue):
            return values[index.start : index.stop]
        if not isinstance(index, int) or isinstance(index, bool):
            raise self.fail(
                "FL0305",
                f"a list index is a whole number, and this is {describe(index)}",
                expr.span,
                suggestion="as in `xs[0]` or `xs[i]` with `for i in 0..n`",
            )
        if not -len(values) <= index < len(values):
            raise self.fail(
                "FL0307",
                f"index {index} is outside a list of {len(values)}",
                expr.span,
                suggestion="indices start at 0, and -1 is the last",
            )
        return values[index]

    def paren(self, expr: tree.Paren) -> Any:
        if len(expr.items) == 1:
            item = expr.items[0]
            if item.left is None or item.eq is not None or item.arrow is not None:
                raise self.fail(
                    "FL0307", "axes have no value here", expr.span, suggestion="`x.D` is the size of an axis"
                )
            if item.type is not None:
                return self.typed(item.left, [item.type])[0]
            return self.ev(item.left)
        values = tuple(self.ev(i.left) for i in expr.items if i.left is not None)
        return POISON if any(isinstance(v, Poison) for v in values) else Tuple(values)

    def comprehension(self, expr: tree.Comprehension) -> Any:
        out: list[Any] = []
        saved = {n: self.names.get(n) for n in expr.names}
        for value in self.iterate(expr.iterable):
            self.bind_loop(expr.names, value, expr.span)
            if expr.condition is None or self.static_bool(expr.condition):
                out.append(self.ev(expr.value))
                if isinstance(out[-1], Poison):
                    break  # the other rounds would say the same
        for n, v in saved.items():
            if v is None:
                self.names.pop(n, None)
            else:
                self.names[n] = v
        return POISON if any(isinstance(v, Poison) for v in out) else out

    def bind_loop(self, names: tuple[str, ...], value: Any, span: Span) -> None:
        from flowlang.elaborate.statements import own

        if len(names) == 1:
            self.names[names[0]] = own(self, names[0], value, span)
            self.used.add(names[0])
            return
        items = value.items if isinstance(value, Tuple) else value if isinstance(value, list) else ()
        if len(items) != len(names):
            raise self.fail(
                "FL0306",
                f"{len(names)} names for {describe(value)}",
                span,
                suggestion="as many names as each item of the list has parts",
            )
        for n, v in zip(names, items, strict=True):
            self.names[n] = own(self, n, v, span)
            self.used.add(n)

    def iterate(self, expr: tree.Expr) -> list[Any]:
        value = self.ev(expr)
        if isinstance(value, Poison):
            raise Poisoned
        if isinstance(value, RangeValue):
            if value.stop is None:
                raise self.fail(
                    "FL0305", "this range has no end", expr.span, suggestion="write both ends, as in `0..4`"
                )
            start = value.start or 0
            self.elab.count_items(self, max(value.stop - start, 0), expr.span)
            return list(range(start, value.stop))
        if isinstance(value, list):
            return value
        raise self.fail(
            "FL0305",
            f"a range or a list is needed here, and this is {describe(value)}",
            expr.span,
            suggestion="as in `for i in 0..4 { .. }` or `for w in [64, 32] { .. }`",
        )

    # ---- static values --------------------------------------------------------------------------

    def static_int(self, expr: tree.Expr) -> int:
        value = self.ev(expr)
        if isinstance(value, Poison):
            raise Poisoned
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(
                "FL0305",
                f"a whole number is needed here, and this is {describe(value)}",
                expr.span,
                suggestion="only static values count copies and sizes: a number, a size as `x.D`, or a parameter of type `int`",
            )
        return value

    def static_bool(self, expr: tree.Expr) -> bool:
        value = self.ev(expr)
        if isinstance(value, Poison):
            raise Poisoned
        if not isinstance(value, bool):
            raise self.fail(
                "FL0305",
                f"`if` chooses by a static value, and this is {describe(value)}",
                expr.span,
                suggestion="use `where(condition, a, b)` for a choice that depends on data",
            )
        return value

    # ---- typed values ---------------------------------------------------------------------------

    def typed(self, expr: tree.Expr, types: list[tree.Expr]) -> list[Any]:
        """The value of an expression whose result types are written."""
        specs: list[TypeSpec | Static] = []
        for t in types:
            s = evaluate_type(self, t)
            if isinstance(s, Static):
                raise self.fail(
                    "FL0306",
                    f"`{s.name}` is not a tensor type",
                    t.span,
                    suggestion="a tensor's type is a domain with axes, as in `R[D]`",
                )
            self.record_axes(s)  # `W: R[K = 8, D], b: R[K]`: later types may read the sizes of earlier ones
            specs.append(s)
        wanted = [s for s in specs if isinstance(s, TypeSpec)]
        saved = self.outer_typed
        self.outer_typed = True
        try:
            value = self.ev(expr)
        finally:
            self.outer_typed = saved
        return self.fit(value, wanted, expr.span)

    def fit(self, value: Any, wanted: list[TypeSpec], span: Span) -> list[Any]:
        """Values brought to declared types: open networks are sized, axes checked and ordered."""
        if isinstance(value, Poison):
            return [POISON] * len(wanted)
        if isinstance(value, Pending):
            return value.resolve(list(wanted))
        values = list(value.items) if isinstance(value, Tuple) else [value]
        if len(values) != len(wanted):
            raise self.fail(
                "FL0308",
                f"{len(wanted)} types for {len(values)} values",
                span,
                suggestion="a type covers every name since the last typed one; give one for each value, or fewer",
            )
        return [axis_rules.conform(self, v, w, span) for v, w in zip(values, wanted, strict=True)]

    def record_axes(self, spec: TypeSpec) -> None:
        for name, size in spec.axes:
            if size is not None:
                self.axes.setdefault(name, size)


def is_static(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list | Option | Absent)


def axis_words(t: TensorType) -> str:
    return ", ".join(f"`{n}`" for n in t.names) or "none"


__all__ = ["ABSENT", "Body", "DistributionValue", "Fail", "Local", "Poisoned", "axis_words", "is_static"]
