"""From modules to regions: instantiation, the prelude, limits, and what is asked of every declaration."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from flowlang import limits
from flowlang.diagnostics import Diagnostic, FlowError, Label, Report
from flowlang.elaborate.body import Body, Fail, Poisoned
from flowlang.elaborate.builtins import BUILTINS
from flowlang.elaborate.calls import ResultShape, instance_of, parameters_of
from flowlang.elaborate.jumps import JumpUse
from flowlang.elaborate.models import build_model
from flowlang.elaborate.paths import DrawnUse
from flowlang.elaborate.rules import chain_without_rules, explicit_rules
from flowlang.elaborate.scans import finish_states
from flowlang.elaborate.scope import KINDS, LATER_ADVICE, LATER_KINDS, ModuleScope, did_you_mean, name_help
from flowlang.elaborate.statements import NOTHING, chain_inputs, parts, run_statements
from flowlang.elaborate.stochastic import NoiseUse
from flowlang.elaborate.taps import record
from flowlang.elaborate.types import evaluate_type, is_optional, is_tensor_type, one_of_words
from flowlang.elaborate.values import (
    ABSENT,
    POISON,
    WITNESS,
    AppliedBuiltin,
    Bracketed,
    Builtin,
    BuiltinNet,
    Declared,
    DistributionValue,
    Instance,
    Local,
    Option,
    Pending,
    Poison,
    StartValue,
    Static,
    Tensor,
    Tuple,
    TypeSpec,
    describe,
)
from flowlang.elaborate.weights import Need
from flowlang.ir.check import after
from flowlang.ir.graph import Graph, Region
from flowlang.ir.ops.base import OpProblem
from flowlang.ir.types import Axis, TensorType
from flowlang.source import Loader, Source, Span
from flowlang.syntax import tree
from flowlang.syntax.parser import parse, parse_library

WITNESS_SIZES = (3, 2, 5)


@dataclass(frozen=True)
class Trial:
    """What came of making a region of which it was not known whether it is wanted."""

    region: Region | None
    report: Report
    regions: dict[Hashable, Region]  # it, and those below that were made with it
    spent: tuple[int, int, int]  # rounds, items and calls
    exhausted: bool  # it met a limit


class Elaborator:
    """One run over one program. Diagnostics go to `report`; nothing is raised for a bad spec."""

    def __init__(self, report: Report, loader: Loader, library: Library, sets: Mapping[str, Any] | None = None):
        self.report = report
        self.loader = loader
        self.library = library
        self.sets = dict(sets or {})
        self.used_sets: set[str] = set()
        self.open_axes: dict[str, int] = {}  # sizes of a model's inputs that the spec leaves open, as they were set
        self.witness = 3
        self.regions: dict[Hashable, Region] = {}
        self.requirements: dict[int, list[tuple[tree.Require, Body]]] = {}
        self.used_names: set[tuple[int, str]] = set()
        self.aliases: dict[int, Any] = {}
        self.modules: dict[str, ModuleScope] = {}
        self.instantiated: set[int] = set()
        self.witnessed: set[int] = set()
        self._stack: list[tuple[str, str]] = []
        self._below: list[int] = []  # for each of these, how deep declarations nest in it so far
        self._heights: dict[Region, int] = {}  # the same of regions that are made, themselves counted
        self.tried: dict[Hashable, Trial] = {}
        self._factor = 1
        self._rounds = 0
        self._items = 0
        self._calls = 0
        self._exhausted = False
        self._depths: dict[Region, int] = {}
        self.noises: list[NoiseUse] = []  # stochastic solvers and the noises they met
        self.drawn_paths: list[DrawnUse] = []
        self.jumps: list[JumpUse] = []  # solvers of jumps and the rates they met
        self.closures: dict[Region, Body] = {}  # regions that were given local functions, as they were made
        self.places: dict[Region, dict[str, Any]] = {}  # what the names of a net's body stand for when it has ended
        self.needs: dict[Region, list[Need]] = {}  # weights that a region takes from its caller, last in its context
        self.path_networks: dict[
            tuple[int, int], tuple[Any, dict[str, Any]]
        ] = {}  # of a path, in the body that holds it
        self.quiet_free = False
        self.parameter_limit = limits.PARAMETERS
        self.beyond_limits = False  # whether the last trial met a limit
        self.chain_forms: dict[object, int] = {}  # which of the forms of `chain_input` a chain takes

    # ---- modules and names ----------------------------------------------------------------------

    def add_module(self, source: Source, chain: tuple[str, ...] = ()) -> ModuleScope:
        if source.name in self.modules:
            return self.modules[source.name]
        result = parse_library(source) if source.library else parse(source, self.report)
        scope = ModuleScope(source, result.module, broken=result.broken)
        self.modules[source.name] = scope
        for item in result.module.items:
            if isinstance(item, tree.Import):
                self.run_import(scope, item, (*chain, source.name))
            elif isinstance(item, tree.Declaration):
                self.declare(scope, item)
        return scope

    def declare(self, scope: ModuleScope, item: tree.Declaration) -> None:
        span = item.name_span or item.span
        known = scope.names.get(item.name)
        if known is not None:  # declared or imported
            self.report.add(
                Diagnostic("FL0204", f"`{item.name}` is declared twice", span, suggestion="rename one of them")
            )
            return
        if item.kind not in KINDS and item.kind not in LATER_KINDS:
            self.report.add(
                Diagnostic(
                    "FL0211",
                    f"unknown kind of declaration `{item.kind}`",
                    Span(item.span.source, item.span.start, item.span.start + len(item.kind)),
                    suggestion=name_help(item.kind, (*KINDS, *LATER_KINDS)),
                )
            )
            return
        seen: dict[str, Span] = {}
        for p in (p for ps in item.parameters for p in ps):
            if p.name in seen:
                where = Span(p.span.source, p.span.start, p.span.start + len(p.name) + p.variadic)
                self.report.add(
                    Diagnostic("FL0204", f"`{p.name}` is declared twice", where, suggestion="rename one of them",
                               labels=(Label(seen[p.name], "first here"),))
                )  # fmt: skip
                scope.broken |= {item.name}
                return
            seen[p.name] = p.span
        if not scope.source.library and item.name in self.library.names():
            self.report.add(
                Diagnostic(
                    "FL0213",
                    f"`{item.name}` shadows the library's entry of that name",
                    span,
                    severity="note",
                    suggestion="rename it if the library's entry is meant",
                )
            )
        scope.names[item.name] = Declared(item, scope)

    def run_import(self, scope: ModuleScope, item: tree.Import, chain: tuple[str, ...]) -> None:
        if len(chain) > limits.IMPORT_DEPTH:
            self.report.add(
                Diagnostic(
                    "FL0901",
                    f"imports nested deeper than the limit of {limits.IMPORT_DEPTH}",
                    item.span,
                    suggestion="import from fewer files",
                )
            )
            return
        path = ".".join(item.path)
        try:
            source = self.loader.load(item.path, scope.source)
        except FlowError as e:  # a file that cannot be read
            self.report.extend(replace(d, span=item.span) for d in e.diagnostics)
            scope.broken |= {*item.names} or {item.path[-1]}
            return
        if source is None:
            self.report.add(
                Diagnostic(
                    "FL0207", f"nothing to import at `{path}`", item.span, suggestion=self.loader.advice(item.path, scope.source)
                    or "paths resolve in the spec's folder, in folders given by `--library`, then in the library (`std. ..`)",
                )
            )  # fmt: skip
            scope.broken |= {*item.names} or {item.path[-1]}
            return
        if source.name in chain:
            ring = [*chain[chain.index(source.name) :], source.name]
            self.report.add(
                Diagnostic("FL0208", f"`{path}` imports itself in a cycle", item.span,
                           suggestion="move what both files need into a third one",
                           notes=("the cycle: " + " -> ".join(f"`{name}`" for name in ring),))
            )  # fmt: skip
            return
        other = self.add_module(source, chain)
        if not item.names:
            self.bind_import(scope, item, item.path[-1], other)
            return
        for name in item.names:
            if name in other.names:
                self.bind_import(scope, item, name, other.names[name])
                continue
            scope.broken |= {name}
            if name not in other.broken:
                known = ", ".join(f"`{n}`" for n in sorted(other.names)[:6]) or "nothing"
                self.report.add(
                    Diagnostic(
                        "FL0207", f"`{path}` has no `{name}`", imported_name(item, name),
                        suggestion=did_you_mean(name, other.names) or f"it declares {known}",
                    )
                )  # fmt: skip

    def bind_import(self, scope: ModuleScope, item: tree.Import, name: str, value: Any) -> None:
        """An imported name; two of one name would leave the reader to guess."""
        known = scope.names.setdefault(name, value)
        if known is not value:
            self.report.add(
                Diagnostic("FL0204", f"`{name}` is declared twice", imported_name(item, name),
                           suggestion=f"import the file, as in `import {'.'.join(item.path)}`, and write `{item.path[-1]}.{name}`")
            )  # fmt: skip

    def global_name(self, name: str) -> Any:
        if name in BUILTINS:
            return BUILTINS[name]
        source = self.library.find(name)
        if source is None:
            return None
        return self.add_module(source).names.get(name)

    def global_names(self) -> set[str]:
        return set(BUILTINS) | set(self.library.names())

    # ---- aliases, kinds, constants --------------------------------------------------------------

    def resolve_alias(self, target: Declared) -> Any:
        """For `KIND name = expression`: its value; None for a declaration with a body."""
        declaration = target.declaration
        if declaration.alias is None:
            return None
        key = id(declaration)
        if key not in self.aliases:
            region = Region(declaration.name, declaration.kind, Graph(), span=declaration.span)
            body = Body(self, region, target.module)
            try:
                self.enter(body, f"alias:{key}", declaration.name, declaration.name_span or declaration.span)
            except Fail as e:
                self.report.add(e.diagnostic)
                return POISON
            except Poisoned:
                return POISON
            try:
                self.aliases[key] = body.ev(declaration.alias)
            finally:
                self.leave()
        value = self.aliases[key]
        if isinstance(value, Instance):  # every use is an instance of its own
            return Instance(
                value.target,
                value.arguments,
                value.span,
                value.axes,
                inverted=value.inverted,
                lipschitz=value.lipschitz,
                frozen=value.frozen,
            )
        return value

    def constant_value(self, value: Any) -> Any:
        """A name of a `const` stands for the constant's value."""
        if isinstance(value, Declared) and value.kind == "const":
            found = self.resolve_alias(value)
            return value if found is None else found
        return value

    def check_kind(self, body: Body, target: Declared, span: Span) -> None:
        if target.kind in LATER_KINDS:
            raise body.fail(
                "FL0902",
                f"`{target.name}` is a {target.kind}: {LATER_KINDS[target.kind]} have no meaning yet",
                span,
                suggestion=LATER_ADVICE,
            )

    # ---- limits ---------------------------------------------------------------------------------

    def enter(self, body: Body, key: str, name: str, span: Span) -> None:
        if any(k == key for k, _ in self._stack):
            names = [n for _, n in self._stack[[k for k, _ in self._stack].index(key) :]] + [name]
            raise body.fail(
                "FL0205",
                f"`{name}` uses itself",
                span,
                notes=("the cycle: " + " -> ".join(f"`{n}`" for n in names),),
                suggestion="a declaration cannot recur; use `repeat` or `for`",
            )
        self.nest(body, 1, span)
        self._stack.append((key, name))
        self._below.append(0)

    def leave(self) -> int:
        """How deep declarations nest in the one that ends, itself counted."""
        self._stack.pop()
        height = 1 + self._below.pop()
        self.count_depth(height)
        return height

    def count_depth(self, height: int) -> None:
        if self._below:
            self._below[-1] = max(self._below[-1], height)

    def nest(self, body: Body, height: int, span: Span) -> None:
        """Refuses what nests deeper than the limit, whichever of its declarations was made first."""
        if len(self._stack) + height > limits.INSTANTIATION_DEPTH:
            raise self.exhaust(
                body, f"declarations nested deeper than the limit of {limits.INSTANTIATION_DEPTH}", span,
                "a declaration that calls itself never ends; check the chain of calls",
            )  # fmt: skip

    def multiply(self, body: Body, count: int, span: Span) -> None:
        if self._factor * max(count, 1) > limits.REPEAT_COUNT:
            raise body.fail(
                "FL0901",
                f"{self._factor * count:,} copies exceed the limit of {limits.REPEAT_COUNT:,}",
                span,
                suggestion="fewer copies, or one copy inside the other",
            )
        self._factor *= max(count, 1)

    def unmultiply(self, count: int) -> None:
        self._factor //= max(count, 1)

    def count_round(self, body: Body, span: Span) -> None:
        self._rounds += 1
        if self._rounds > limits.ROUNDS:
            raise self.exhaust(body, f"more than {limits.ROUNDS:,} rounds written out: limit reached", span)
        if len(body.graph) > limits.GRAPH_NODES:
            raise self.exhaust(body, f"the graph exceeds the limit of {limits.GRAPH_NODES:,} nodes", span)

    def count_call(self, body: Body, span: Span) -> None:
        self._calls += 1
        if self._calls > limits.CALLS:
            raise self.exhaust(body, f"more than {limits.CALLS:,} calls of local functions: limit reached", span)

    def count_items(self, body: Body, count: int, span: Span) -> None:
        """Items of a list about to be made; lists of lists are counted too."""
        self._items += count
        if count > limits.LIST_ITEMS or self._items > limits.LIST_TOTAL:
            raise self.exhaust(body, f"a list of more than {limits.LIST_ITEMS:,} items: limit reached", span)

    def exhaust(
        self,
        body: Body,
        message: str,
        span: Span,
        advice: str = "make the spec smaller, or use `repeat` for equal copies",
    ) -> Exception:
        """The error of a limit on the whole run. It is told once: what follows fails for the same reason."""
        if self._exhausted:
            return Poisoned()
        self._exhausted = True
        return body.fail("FL0901", message, span, suggestion=advice)

    def overflow(self, span: Span) -> Diagnostic | None:
        """The error of nesting that no limit on one thing alone has met; the run goes on with the next declaration."""
        self._stack.clear()
        self._below.clear()
        self._factor = 1
        if self._exhausted:
            return None
        self._exhausted = True
        return Diagnostic("FL0901", "declarations and expressions nested too deeply in each other: limit reached", span,
                          suggestion="name parts of long expressions, and use fewer levels of declarations")  # fmt: skip

    def depth(self, region: Region) -> int:
        """How deep regions are nested in a region, itself counted."""
        if region not in self._depths:
            inner = (self.depth(c.region) for c in region.children.values())
            self._depths[region] = 1 + max(inner, default=0)
        return self._depths[region]

    def note_shared(self, body: Body, inst: Instance, count: int) -> None:
        if count > 1 and not body.region.library:
            self.report.add(
                Diagnostic(
                    "FL0214",
                    f"the network `{inst.label or inst.target.name}` is shared by {count} copies",
                    inst.span,
                    severity="note",
                    suggestion="write it as an argument inside the `repeat` to give each copy its own",
                )
            )

    def size_override(self, body: Body, name: str, size: int | None, entry: tree.Entry) -> int:
        """A size of a flow's input: set from outside, its default, or a witness."""
        if name in self.sets:
            self.used_sets.add(name)
            value = self.sets[name]
            if not isinstance(value, int) or isinstance(value, bool):
                raise body.fail(
                    "FL0306", f"the size `{name}` is a whole number, and it was set to `{str(value).lower()}`", entry.span,
                    suggestion=f"as in `--set {name}=8`",
                )  # fmt: skip
            if value < 0 or value > limits.AXIS_SIZE:
                raise body.fail(
                    "FL0901",
                    f"an axis of size {value} is outside the limits",
                    entry.span,
                    suggestion="choose a smaller size",
                )
            if size is None:
                self.open_axes[name] = int(value)
            return int(value)
        if size is not None:
            return size
        if self.quiet_free:
            raise body.fail(
                "FL0310",
                f"the size of axis `{name}` is open",
                entry.span,
                suggestion=f"give a default, as in `{name} = 2`, or set it: `--set {name}=2`, `compile(.., {name}=2)`",
            )
        self.witnessed.add(id(body.region))
        return self.witness

    # ---- instantiation --------------------------------------------------------------------------

    def static_key(self, value: Any) -> Hashable:
        match value:
            case Instance():
                named = value.owner is not None
                return (
                    "instance", id(value.target.declaration) if isinstance(value.target, Declared) else value.target.name,
                    tuple((k, self.static_key(v)) for k, v in sorted(value.arguments.items())),
                    named, value.inverted, value.lipschitz, tuple(i.span.text for i in value.axes),
                )  # fmt: skip
            case Declared():
                return ("declared", id(value.declaration))
            case Builtin() | BuiltinNet():
                return ("builtin", value.name)
            case AppliedBuiltin():
                return (
                    "applied", value.builtin.name, tuple(self.static_key(v) for v in value.positional),
                    tuple((k, self.static_key(v)) for k, v in value.keywords), tuple(i.span.text for i in value.items),
                )  # fmt: skip
            case Bracketed():
                return ("bracketed", self.static_key(value.fn), tuple(i.span.text for i in value.items))
            case DistributionValue():
                return (
                    "distribution",
                    value.name,
                    value.law.event_axes,
                    tuple((k, self.static_key(v)) for k, v in value.arguments),
                )
            case list():
                return ("list", tuple(self.static_key(v) for v in value))
            case bool() | int() | float() | str():
                return (type(value).__name__, value)
            case Option():
                return ("option", value.word)
            case Tensor():
                return ("tensor", value.id, id(value.body))
            case Local():
                return ("local", id(value.declaration), id(value.body))
            case _:
                return repr(value)

    def shared_arguments(self, inst: Instance) -> dict[str, Instance]:
        """The named (shared) instances among an instance's arguments, under the callee's child names."""
        found: dict[str, Instance] = {}

        def visit(name: str, value: Any) -> None:
            if isinstance(value, Instance):
                if value.owner is not None:
                    found[name] = value
                else:
                    for k, v in value.arguments.items():
                        visit(f"{name}_{k}", v)
            elif isinstance(value, list):
                for i, v in enumerate(value):
                    visit(f"{name}_{i}", v)

        for k, v in inst.arguments.items():
            visit(k, v)
        return found

    def import_argument(self, body: Body, name: str, value: Any) -> Any:
        """An argument as the callee holds it: fresh networks become its own, named ones stay shared."""
        if isinstance(value, Instance):
            inner = Instance(
                value.target, value.arguments, value.span, value.axes, owner=body, name=body.fresh_child_name(name),
                label=value.label or name, inverted=value.inverted, lipschitz=value.lipschitz, frozen=value.frozen,
            )  # fmt: skip
            if value.owner is not None:
                inner.shared = True
                assert inner.name is not None
                body.imported[inner.name] = name
            else:
                inner.arguments = {
                    k: self.import_argument(body, f"{name}_{k}", v) if holds_instance(v) else v
                    for k, v in value.arguments.items()
                }
            return inner
        if isinstance(value, list) and any(holds_instance(v) for v in value):
            return [self.import_argument(body, f"{name}_{k}", v) for k, v in enumerate(value)]
        return value

    def signature(self, inst: Instance) -> str:
        parts = []
        for k, v in inst.arguments.items():
            if isinstance(v, bool):
                parts.append(f"{k} = {str(v).lower()}")
            elif isinstance(v, int | float | str) or (
                isinstance(v, list) and all(isinstance(x, int | float) for x in v)
            ):
                parts.append(f"{k} = {v}")
            elif isinstance(v, Instance):
                parts.append(f"{k} = {self.signature(v)}")
            elif isinstance(v, Builtin):
                parts.append(f"{k} = {v.name}")
        return f"{inst.target.name}({', '.join(parts)})" if parts else inst.target.name

    def instantiate(
        self,
        caller: Body,
        inst: Instance,
        inputs: Mapping[str, TensorType],
        open_sizes: Mapping[str, int],
        span: Span,
        fixed: bool = False,
    ) -> Region | None:
        """The region of an instance for these input types; equal ones share it. None after an error.

        `fixed`: its inputs are one for all samples.
        """
        target = inst.target
        assert isinstance(target, Declared)
        if any(tapped(v) for v in inst.arguments.values()):
            raise caller.fail(
                "FL0902", f"a network with places named, as an argument of `{target.name}`, has no meaning yet", span,
                suggestion="call it here, or in a local function that is given instead",
            )  # fmt: skip
        key = self.instance_key(inst, inputs, open_sizes, fixed)
        if key not in self.regions and key in self.tried:
            self.keep(self.tried[key])
        if key in self.regions:
            region = self.regions[key]
            self.nest(caller, self._heights[region], span)
            self.count_depth(self._heights[region])
            caller.region.broken = caller.region.broken or region.broken
            return region
        if len(self.regions) >= limits.REGIONS:
            raise self.exhaust(caller, f"more than {limits.REGIONS:,} distinct instances: limit reached", span)
        self.enter(caller, f"decl:{id(target.declaration)}", target.name, span)
        self.instantiated.add(id(target.declaration))
        self.used_names.add((id(target.module), target.name))
        library = target.module.source.library
        anchor = (caller.anchor if caller.module.source.library else span) if library else None
        declaration = target.declaration
        region = Region(
            declaration.name, declaration.kind, Graph(), span=declaration.span, doc=declaration.doc, library=library
        )
        region.signature = self.signature(inst)
        body = Body(self, region, target.module, anchor=anchor, enclosing=enclosing(inst))
        try:
            self.build(body, inst, inputs, open_sizes, span, caller, fixed)
        except Fail as e:
            body.report(e.diagnostic)
        except Poisoned:
            region.broken = True
        finally:
            height = self.leave()
        region.context.extend(body.captures.values())
        if inst.lipschitz is not None and not region.broken:
            needs = self.needs.get(region)
            region = self.bound(caller, region, inst.lipschitz, span)
            if needs:
                self.needs[region] = needs
        if body.parent is not None:
            self.closures[region] = body
        self.regions[key] = after(region)
        self._heights[region] = height
        if not region.broken and self.depth(region) > limits.REGION_DEPTH:
            region.broken = True
            raise self.exhaust(caller, f"declarations nested deeper than the limit of {limits.REGION_DEPTH}", span)
        if region.broken:
            caller.region.broken = True
        return region

    def instance_key(
        self, inst: Instance, inputs: Mapping[str, TensorType], open_sizes: Mapping[str, int], fixed: bool
    ) -> tuple[Hashable, ...]:
        """What tells the region of an instance from any other; not `inverted`: both directions are methods of one region."""
        return (
            *self.target_key(inst),
            tuple(inputs.items()),
            tuple(sorted(open_sizes.items())),
            inst.lipschitz,
            fixed,
        )

    def target_key(self, inst: Instance) -> tuple[Hashable, ...]:
        """What tells a declaration with its static arguments from any other."""
        arguments = tuple((k, self.static_key(v)) for k, v in sorted(inst.arguments.items()))
        return id(inst.target.declaration if isinstance(inst.target, Declared) else inst.target), arguments

    def regions_of(self, inst: Instance) -> list[Region]:
        """The regions that an instance has been used as so far, at whatever sizes."""
        key = self.target_key(inst)
        return [r for k, r in self.regions.items() if isinstance(k, tuple) and k[:2] == key]

    def trial(self, caller: Body, inst: Instance, inputs: Mapping[str, TensorType], span: Span) -> Region | None:
        """The region at these types if there is one. What is wrong with it is told where it is wanted; it is not made again."""
        key = self.instance_key(inst, inputs, {}, False)
        known = self.regions.get(key)
        tried = self.tried.get(key)
        if known is None and tried is None:
            tried = self.attempt(caller, inst, inputs, span)
            if tried.region is not None:
                self.tried[key] = tried
        self.beyond_limits = tried is not None and tried.exhausted
        found = known if known is not None or tried is None else tried.region
        return None if found is None or found.broken else found

    def attempt(self, caller: Body, inst: Instance, inputs: Mapping[str, TensorType], span: Span) -> Trial:
        scratch = Body(self, Region(caller.region.name, caller.region.kind, Graph()), caller.module)
        told, before, spent = self.report, len(self.regions), (self._rounds, self._items, self._calls, self._exhausted)
        self.report = Report(told=set(told.told))
        found: Region | None = None
        try:
            found = self.instantiate(scratch, inst, inputs, {}, span)
        except Fail as e:
            scratch.report(e.diagnostic)
        except Poisoned:
            pass
        made = {k: self.regions[k] for k in list(islice(reversed(self.regions), len(self.regions) - before))[::-1]}
        for k in made:
            del self.regions[k]
        exhausted = self._exhausted or any(d.code == "FL0901" for d in self.report.errors)
        used = (self._rounds - spent[0], self._items - spent[1], self._calls - spent[2])
        tried = Trial(found, self.report, made, used, exhausted)
        self.report, (self._rounds, self._items, self._calls, self._exhausted) = told, spent
        return tried

    def keep(self, tried: Trial) -> None:
        """What a trial made is wanted: it counts, and what is wrong with it is told."""
        self.regions |= {k: r for k, r in tried.regions.items() if k not in self.regions}
        self.report.extend(d for d in tried.report if d.code != "FL0901" or not self._exhausted)
        self.report.told |= tried.report.told
        rounds, items, calls = tried.spent
        self._rounds, self._items, self._calls = self._rounds + rounds, self._items + items, self._calls + calls
        self._exhausted = self._exhausted or tried.exhausted

    def bound(self, caller: Body, region: Region, limit: float, span: Span) -> Region:
        """The region with its weights scaled so that its certified Lipschitz constant is at most `limit`."""
        from flowlang.elaborate.bounded import Unbounded, bounded

        try:
            return bounded(region, limit)
        except Unbounded as e:
            raise caller.fail(
                "FL0407",
                f"no Lipschitz constant is known for `{region.name}`: {e}",
                span,
                suggestion="use an `mlp` with an activation of bounded slope, as in `mlp(64, 64, act = elu)`",
            ) from None

    def build(
        self,
        body: Body,
        inst: Instance,
        inputs: Mapping[str, TensorType],
        open_sizes: Mapping[str, int],
        span: Span,
        caller: Body,
        fixed: bool,
    ) -> None:
        declaration = inst.target.declaration  # type: ignore[union-attr]
        params = parameters_of(inst)
        self.bind_statics(body, inst, params, span, caller)
        tensor_params = [p for p in params if is_tensor_type(p.type)]
        if declaration.kind == "model":
            build_model(self, body, declaration)
            return
        if not tensor_params:
            self.build_chain(body, declaration, inputs, span)
            return
        for p in tensor_params:
            self.bind_tensor(body, p, inputs.get(p.name), span, caller, batched=not fixed)
        for n, s in open_sizes.items():
            body.axes.setdefault(n, s)
        specs = [evaluate_type(body, r.type) for r in declaration.results]
        body.result_spec = [s for s in specs if isinstance(s, TypeSpec)]
        value = run_statements(body, declaration.body or ())
        body.b.span = declaration.span
        self.finish(body, declaration, value, span)
        if not body.region.broken and body.region.outputs:
            finish_states(body)
            self.places[body.region] = record(body)
            explicit_rules(body)
        self.warn_unused(body)

    def bind_statics(self, body: Body, inst: Instance, params: list[tree.Parameter], span: Span, caller: Body) -> None:
        for p in params:
            if is_tensor_type(p.type):
                continue
            given = p.name in inst.arguments
            if given:
                value = self.import_argument(body, p.name, inst.arguments[p.name])
            elif p.default is not None:
                value = default_value(body, p)
                if isinstance(value, Instance) and value.owner is None:
                    value.owner, value.name, value.label = body, body.fresh_child_name(p.name), p.name
            elif is_optional(p.type):
                value = ABSENT
            elif p.variadic:
                value = []
            else:
                raise caller.fail(
                    "FL0203",
                    f"`{inst.target.name}` needs the argument `{p.name}`",
                    span,
                    suggestion=f"as in `{inst.target.name}({p.name} = ..)`",
                )
            if p.variadic and not isinstance(value, list):
                value = [value]
            self.check_static(body if not given else caller, p, value, inst, span)
            if getattr(value.fn if isinstance(value, Bracketed) else value, "kind", None) in ("net", "norm"):
                # A parameter of type `net` is one instance, however often it is used.
                value = instance_of(self, value, span)
                if isinstance(value, Instance) and value.owner is None:
                    value.owner, value.name, value.label = body, body.fresh_child_name(p.name), p.name
            body.names[p.name] = value
            body.used.add(p.name)

    def check_static(self, body: Body, p: tree.Parameter, value: Any, inst: Instance, span: Span) -> None:
        if p.type is None or isinstance(value, Poison) or value is ABSENT:
            return
        spec = evaluate_type(body, p.type)
        if not isinstance(spec, Static):
            return
        values = value if p.variadic or spec.name == "list" else [value]
        kind = spec.element if spec.name == "list" and spec.element else spec
        if spec.name == "list" and not isinstance(value, list):
            raise body.fail(
                "FL0306", f"`{p.name}` of `{inst.target.name}` is a list, and this is {describe(value)}", span,
                suggestion=f"as in `{p.name} = [64, 64]`",
            )  # fmt: skip
        for v in values:
            if not fits_static(kind, v):
                raise body.fail(
                    "FL0306",
                    f"`{p.name}` of `{inst.target.name}` is {static_words(kind)}, and this is {describe(v)}",
                    span,
                    suggestion=static_hint(kind, p.name),
                )

    def bind_tensor(
        self, body: Body, p: tree.Parameter, type_: TensorType | None, span: Span, caller: Body, *, batched: bool
    ) -> None:
        if type_ is None:
            body.names[p.name] = ABSENT if p.default is None else default_tensor(body, p)
            body.used.add(p.name)
            return
        expr = p.type.type if isinstance(p.type, tree.Optional) else p.type
        items = expr.items if isinstance(expr, tree.Brackets) else ()
        formal = [i for i in items if isinstance(i.left, tree.Name)]
        named = {i.left.id for i in formal if isinstance(i.left, tree.Name)}
        for item in formal:
            assert isinstance(item.left, tree.Name)
            name = item.left.id
            size = type_.size(name)
            if item.eq is not None:
                written = body.static_int(item.eq)
                if written != size:
                    raise caller.fail(
                        "FL0301",
                        f"axis `{name}` of `{p.name}` has size {written} in `{body.region.name}`, and {size} here",
                        span,
                        suggestion="sizes agree where values meet; change one of them",
                    )
            else:
                known = body.find(name)
                if isinstance(known, int) and known != size:
                    raise caller.fail(
                        "FL0301",
                        f"axis `{name}` of `{p.name}` has size {known} in `{body.region.name}`, and {size} here",
                        span,
                        suggestion="sizes agree where values meet; change one of them",
                    )
            body.axes[name] = size
        rest = tuple(a for a in type_.axes if a.name not in named)
        body.open_rest = body.open_rest or any(isinstance(i.left, tree.Ellipsis) for i in items)
        if rest and not p.given:
            body.rest = rest
        spec = evaluate_type(body, p.type) if p.type is not None else None
        domain = spec.domain if isinstance(spec, TypeSpec) else None
        role = "context" if p.given else "map"
        id_ = body.b.leaf(
            "input", TensorType(type_.axes, type_.kind), batched=batched, span=p.span, label=p.name, name=p.name,
            role=role, domain=domain, given=p.given,
        )  # fmt: skip
        (body.region.context if p.given else body.region.inputs).append(id_)
        body.names[p.name] = Tensor(id_, body)
        body.used.add(p.name)

    def build_chain(
        self, body: Body, declaration: tree.Declaration, inputs: Mapping[str, TensorType], span: Span
    ) -> None:
        """A bijector without a tensor parameter: a chain, as in a flow."""
        if declaration.kind == "flow":
            run_statements(body, declaration.body or ())
            self.end_chain(body)
            return
        mapped = [t for name, t in inputs.items() if name.split("#")[0] == "x"]
        if not mapped and declaration.kind in ("net", "norm"):
            raise body.fail(
                "FL0902", f"a {declaration.kind} of static values alone, as `{declaration.name}`, has no meaning yet",
                declaration.name_span or span, suggestion=f"give it a tensor, as in `{declaration.kind} {declaration.name}(x: R[D]) {{ .. }}`",
            )  # fmt: skip
        if not mapped:
            raise body.fail(
                "FL0203", f"`{declaration.name}` is a chain and needs a value to map", span, suggestion="as in `f(x)`"
            )
        chain_inputs(body, [(t, True) for t in mapped], span)
        for name, given in inputs.items():
            if name.split("#")[0] != "x":
                c = body.b.leaf(
                    "input", given, batched=True, span=span, label=name, name=name, role="context", given=True
                )
                body.region.context.append(c)
                body.names[name] = Tensor(c, body)
                body.used.add(name)
        for a in (a for t in mapped for a in t.axes):
            body.axes.setdefault(a.name, a.size)
        run_statements(body, declaration.body or ())
        chain_without_rules(body)
        self.end_chain(body)

    def end_chain(self, body: Body) -> None:
        if isinstance(body.chain_value, Tensor | Tuple):
            ids = [v.id for v in parts(body.chain_value)]
            body.region.outputs = (
                ids[:1] if body.region.kind == "flow" else ids
            )  # the others leave under bases of their own
        elif body.chain_value is not None:
            body.region.broken = True

    def finish(self, body: Body, declaration: tree.Declaration, value: Any, span: Span) -> None:
        if isinstance(value, Poison):
            body.region.broken = True
            return
        if value is NOTHING:
            body.report(
                body.diagnostic(
                    "FL0308",
                    f"`{declaration.name}` has no result",
                    declaration.name_span or declaration.span,
                    suggestion="end its body with an expression",
                )
            )
            return
        where = body_result_span(declaration)
        try:
            if body.result_spec:
                specs = body.result_spec
                if isinstance(value, Pending):
                    values = value.resolve(list(specs))
                else:
                    values = body.fit(value, specs, where)
            else:
                values = list(value.items) if isinstance(value, Tuple) else [value]
            body.region.outputs = [body.tensor(v, where) for v in values]
            if declaration.kind == "norm" and not body.result_spec:
                body.region.outputs = [self.as_given(body, o) for o in body.region.outputs]
            if body.region.kind == "bijector" and len(body.region.outputs) != len(body.region.inputs):
                raise body.fail(
                    "FL0308",
                    f"a bijector gives as many values as it maps: {len(body.region.inputs)}, "
                    f"and this gives {len(body.region.outputs)}",
                    where,
                    suggestion="give one result for each mapped value; what only informs the map stands after `given`",
                )
        except Fail as e:
            body.report(e.diagnostic)
        except OpProblem as e:
            body.report(body.diagnostic(e.code, e.message, where, suggestion=e.suggestion, notes=e.notes))
        except Poisoned:
            body.region.broken = True

    def as_given(self, body: Body, id: int) -> int:
        """A norm's result, its axes in the order of the value that it normalises: `mask * x` is in the mask's."""
        names = [body.b.type(i).names for i in body.region.inputs[:1]]
        own = body.b.type(id).names
        return (
            body.b.op("order", id, names=names[0])
            if names and own != names[0] and sorted(own) == sorted(names[0])
            else id
        )

    def warn_unused(self, body: Body) -> None:
        if body.region.broken or body.region.library:
            return
        for name, where in body.bound_spans.items():
            if name not in body.used and not name.startswith("_"):
                value = body.names.get(name)
                if isinstance(value, Tensor) and value.id in body.region.outputs:
                    continue
                self.report.add(
                    Diagnostic(
                        "FL0210", f"`{name}` is never read", where, severity="warning",
                        suggestion="remove it, or use it",
                    )
                )  # fmt: skip

    def result_shape(
        self, target: Declared, inst: Instance, sizes: Mapping[str, int], anchor: Span | None = None
    ) -> ResultShape | None:
        """A network's declared single result, with the axes whose sizes only its use (at `anchor`) can tell."""
        declaration = target.declaration
        if len(declaration.results) != 1:
            return None
        scratch = Body(self, Region(target.name, target.kind, Graph()), target.module, anchor=anchor)
        scratch.axes.update(sizes)
        for p in parameters_of(inst):
            if not is_tensor_type(p.type):
                value = inst.arguments.get(p.name)
                if value is None and p.default is not None:
                    quiet = self.report
                    self.report = Report()
                    try:
                        value = default_value(scratch, p)
                    finally:
                        self.report = quiet
                if value is not None:
                    scratch.names[p.name] = value
        spec = evaluate_type(scratch, declaration.results[0].type)
        if not isinstance(spec, TypeSpec):
            return None
        open_axes = [n for n, s in spec.axes if s is None]
        fixed = [(n, s) for n, s in spec.axes if s is not None]
        return ResultShape(spec.domain, fixed, open_axes, 1)

    # ---- whole declarations ---------------------------------------------------------------------

    def root(self, target: Declared, arguments: Mapping[str, Any]) -> Region | None:
        """The region of a flow, from its defaults and what was set from outside."""
        scope = Body(self, Region(target.name, target.kind, Graph(), span=target.declaration.span), target.module)
        inst: Any = Instance(target, dict(arguments), target.declaration.name_span or target.declaration.span)
        alias = self.resolve_alias(target)
        if isinstance(alias, Poison):
            return None
        if isinstance(alias, Instance):
            merged = {**alias.arguments, **arguments}
            inst = Instance(alias.target, merged, inst.span)
            name = target.name
            region = self.guarded(scope, inst, {}, inst.span)
            if region is not None:
                region.name = name
            return region
        if isinstance(alias, Declared):
            return self.root(alias, arguments)
        return self.guarded(scope, inst, {}, inst.span)

    def instance_region(self, target: Declared, inputs: Mapping[str, TensorType], span: Span) -> Region | None:
        """A declaration of the module with its default arguments, at given input types."""
        scope = Body(self, Region(target.name, target.kind, Graph(), span=target.declaration.span), target.module)
        return self.guarded(scope, Instance(target, {}, span), inputs, span)

    def guarded(self, scope: Body, inst: Instance, inputs: Mapping[str, TensorType], span: Span) -> Region | None:
        try:
            return self.instantiate(scope, inst, inputs, {}, span)
        except Fail as e:
            self.report.add(e.diagnostic)
        except Poisoned:
            pass
        return None

    def witness_arguments(self, target: Declared, size: int) -> dict[str, Any] | None:
        """Witness values for static parameters without a default; None where there is none for a type."""
        scope = Body(self, Region(target.name, target.kind, Graph(), span=target.declaration.span), target.module)
        span = target.declaration.name_span or target.declaration.span
        arguments: dict[str, Any] = {}
        for ps in target.declaration.parameters:
            for p in ps:
                if not is_tensor_type(p.type) and p.default is None and not is_optional(p.type) and not p.variadic:
                    value = self.witness_static(scope, p, span)
                    if value is None:
                        return None
                    arguments[p.name] = value
        return arguments

    def witness_region(self, target: Declared, size: int) -> Region | None:
        """A declaration that nothing uses, at a witness size for each free axis."""
        found = self.witness_arguments(target, size)
        return None if found is None else self.region_at(target, found, lambda name: size, {"D": size})

    def sized_region(self, target: Declared) -> Region | None:
        """A net or norm by itself, its open sizes and static parameters as set from outside."""
        names = [p.name for ps in target.declaration.parameters for p in ps if not is_tensor_type(p.type)]
        arguments = {n: self.sets[n] for n in names if n in self.sets}
        self.used_sets |= set(self.sets)
        rest = {n: v for n, v in self.sets.items() if n not in names and isinstance(v, int)}
        return self.region_at(target, arguments, lambda name: rest.pop(name, None), rest)

    def region_at(
        self, target: Declared, arguments: dict[str, Any], size_of: Callable[[str], int | None], rest: Mapping[str, int]
    ) -> Region | None:
        """The region of a declaration by itself: `size_of` tells open sizes, `rest` the axes of a bare `..`."""
        declaration = target.declaration
        scope = Body(self, Region(target.name, target.kind, Graph(), span=declaration.span), target.module)
        span = declaration.name_span or declaration.span
        inst = Instance(target, arguments, span)
        inputs: dict[str, TensorType] = {}
        try:
            scratch = Body(self, scope.region, target.module)
            for p in parameters_of(inst):
                if not is_tensor_type(p.type):
                    value = arguments.get(p.name)
                    if value is None and p.default is not None:
                        value = default_value(scratch, p)
                    if value is not None:
                        scratch.names[p.name] = value
            for p in parameters_of(inst):
                if not is_tensor_type(p.type) or is_optional(p.type) or p.default is not None:
                    continue
                assert p.type is not None
                spec = evaluate_type(scratch, p.type)
                if not isinstance(spec, TypeSpec):
                    return None
                axes = []
                for n, s in spec.axes:
                    known = s if s is not None else scratch.axes.get(n, size_of(n))
                    if known is None:
                        raise scope.fail("FL0310", f"the size of axis `{n}` of `{p.name}` is open", p.span,
                                         suggestion=f"set it, as in `compile(.., {n}=8)` or by `--set {n}=8`")  # fmt: skip
                    axes.append(Axis(n, scratch.axes.setdefault(n, known)))
                if spec.rest and (not axes or rest.keys() != {"D"}):
                    axes[spec.rest_at : spec.rest_at] = [Axis(n, v) for n, v in rest.items() if n not in scratch.axes]
                for a in axes:
                    scratch.axes.setdefault(a.name, a.size)
                inputs[p.name] = TensorType(tuple(axes), spec.domain.kind)
            open_sizes: dict[str, int] = {}
            if declaration.results:
                shape = self.result_shape(target, inst, scratch.axes)
                if shape is not None and shape.open_axes:
                    open_sizes = {n: v for n in shape.open_axes if (v := size_of(n)) is not None}
                    if len(open_sizes) < len(shape.open_axes):
                        raise scope.fail("FL0310", f"the size of axis `{shape.open_axes[0]}` of the result is open", span,
                                         suggestion=f"set it, as in `compile(.., {shape.open_axes[0]}=8)` or by `--set {shape.open_axes[0]}=8`")  # fmt: skip
            if not inputs and declaration.kind == "bijector":
                inputs = {"x": self.chain_input(scope, inst, max(size_of("D") or 2, 2), span)}
            return self.instantiate(scope, inst, inputs, open_sizes, span)
        except Fail as e:
            self.report.add(e.diagnostic)
        except Poisoned:
            pass
        return None

    def chain_input(self, scope: Body, inst: Instance, size: int, span: Span) -> TensorType:
        """What a chain that nothing uses may map: a vector, an image or a sequence, whichever its steps take."""
        forms = (
            TensorType.of(("D", size)), TensorType.of(("C", size), ("H", 4), ("W", 4)), TensorType.of(("T", 4), ("D", size)),
        )  # fmt: skip
        key = self.target_key(inst)
        if key not in self.chain_forms and not self._exhausted:  # the form does not hang on the size
            self.chain_forms[key] = 0
            for k, form in enumerate(forms):
                if self.trial(scope, inst, {"x": form}, span) is not None:
                    self.chain_forms[key] = k
                    break
                if self.beyond_limits:  # no form helps
                    break
        return forms[self.chain_forms.get(key, 0)]

    def witness_static(self, scope: Body, p: tree.Parameter, span: Span) -> Any:
        try:
            spec = evaluate_type(scope, p.type) if p.type is not None else None
        except Fail as e:
            self.report.add(e.diagnostic)
            return None
        except Poisoned:
            return None
        if not isinstance(spec, Static):
            return None
        match spec.name:
            case "int":
                return 2
            case "real":
                return 0.5
            case "bool":
                return True
            case "net":
                target = self.global_name("mlp")
                if not isinstance(target, Declared):
                    return None
                guess = Declared(replace(target.declaration, name=WITNESS), target.module)
                return Instance(guess, {"hidden": [8]}, span)
            case "bijector":
                target = self.global_name("affine_elementwise")
                return Instance(target, {}, span) if isinstance(target, Declared) else None
            case "distribution":
                return BUILTINS.get("normal")
            case "list" if spec.element is not None and spec.element.name == "int":
                return [8]
        return None


class Library:
    """The standard library: names to sources, found without parsing."""

    def __init__(self, sources: Mapping[str, Source], index: Mapping[str, str]):
        self._sources, self._index = sources, index

    def names(self) -> set[str]:
        return set(self._index)

    def paths(self) -> list[str]:
        return sorted(self._sources)

    def source(self, path: str) -> Source | None:
        """The file at a dotted path (`std.flows.coupling`)."""
        return self._sources.get(path)

    def find(self, name: str) -> Source | None:
        return self._sources[self._index[name]] if name in self._index else None


def imported_name(item: tree.Import, name: str) -> Span:
    """Where a name stands in an import."""
    at = re.compile(rf"(?<![\w.']){re.escape(name)}(?![\w'])").search(item.span.text, item.span.text.find("(") + 1)
    if at is None:
        return item.span
    return Span(item.span.source, item.span.start + at.start(), item.span.start + at.end())


def enclosing(inst: Instance) -> Body | None:
    """The innermost body whose local functions are among an instance's arguments; all others are around it."""

    def bodies(value: Any) -> Iterator[Body]:
        match value:
            case Local():
                yield value.body
            case Instance():
                for v in value.arguments.values():
                    yield from bodies(v)
            case list():
                for v in value:
                    yield from bodies(v)

    def depth(body: Body) -> int:
        return 0 if body.parent is None else 1 + depth(body.parent)

    return max(bodies(inst), key=depth, default=None)


def tapped(value: Any) -> bool:
    """Whether an argument is a network of which inner values are read or replaced."""
    return (isinstance(value, Instance) and value.taps is not None) or (
        isinstance(value, list) and any(map(tapped, value))
    )


def holds_instance(value: Any) -> bool:
    return isinstance(value, Instance) or (isinstance(value, list) and any(holds_instance(v) for v in value))


def default_tensor(body: Body, p: tree.Parameter) -> Any:
    """What a tensor parameter is where it is not given: its default, over the axes of its type."""
    assert p.default is not None
    value = body.ev(p.default)
    spec = evaluate_type(body, p.type.type if isinstance(p.type, tree.Optional) else p.type) if p.type else None
    if value is ABSENT or isinstance(value, Poison) or not isinstance(spec, TypeSpec):
        return value
    axes = []
    for n, size in spec.axes:
        known = size if size is not None else body.axes.get(n)
        if known is None:
            raise body.fail("FL0310", f"the size of axis `{n}` of `{p.name}` is open where its default stands for it", p.span,
                            suggestion=f"take `{p.name}` after a parameter that has `{n}`, or write its size")  # fmt: skip
        axes.append(Axis(n, known))
    id_ = body.tensor(value, p.default.span)
    return Tensor(body.b.expand(id_, TensorType(tuple(axes), body.b.type(id_).kind)), body)


def default_value(body: Body, p: tree.Parameter) -> Any:
    """A parameter's default, evaluated here; a word of an enumeration stands for itself."""
    assert p.default is not None
    if isinstance(p.default, tree.Name) and p.default.id in one_of_words(p.type):
        return Option(p.default.id, one_of_words(p.type))
    return body.ev(p.default)


def fits_static(kind: Static, value: Any) -> bool:
    match kind.name:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "real":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "bool":
            return isinstance(value, bool)
        case "net" | "fn" | "norm":
            return isinstance(
                value, Instance | Declared | Builtin | BuiltinNet | AppliedBuiltin | Bracketed | StartValue | Local
            ) and (getattr(value, "kind", "net") not in ("bijector", "flow", "distribution"))
        case "bijector":
            return isinstance(value, Instance | Declared | Builtin | AppliedBuiltin | Bracketed)
        case "distribution":
            return isinstance(value, DistributionValue) or (isinstance(value, Builtin) and value.kind == "distribution")
        case "one_of":
            return isinstance(value, Option) and value.word in kind.options
        case "text":
            return isinstance(value, str)
        case _:
            return True


def static_words(kind: Static) -> str:
    names = {"int": "a whole number", "real": "a number", "bool": "`true` or `false`", "net": "a network",
             "fn": "a function", "bijector": "a bijector", "distribution": "a distribution", "text": "a text"}  # fmt: skip
    return names.get(kind.name, f"of type `{kind.name}`")


STATIC_EXAMPLES = {
    "int": "4", "real": "0.5", "bool": "true", "net": "mlp(64)", "fn": "exp", "bijector": "affine_coupling",
    "distribution": "normal", "text": '"word"', "solver": "rk4(steps = 20)", "path": "cond_ot", "flow": "a flow of this file",
    "norm": "layer_norm",
}  # fmt: skip


def static_hint(kind: Static, name: str) -> str:
    """An example of an argument of this type."""
    if kind.name == "one_of":
        return "choose " + " or ".join(f"`{o}`" for o in kind.options)
    return f"as in `{name} = {STATIC_EXAMPLES.get(kind.name, '..')}`"


def body_result_span(declaration: tree.Declaration) -> Span:
    if declaration.body:
        last = declaration.body[-1]
        return last.span
    return declaration.span
