"""From text to what is known about it: every diagnostic, every flow's region and its facts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from flowlang import limits
from flowlang.analysis.ranges import Violation, base_support
from flowlang.analysis.size import flop_count, formula, parameter_count, step_flops
from flowlang.checks.fields import check_fields
from flowlang.checks.jumps import check_jumps
from flowlang.checks.noise import check_noise
from flowlang.checks.slips import check_slips
from flowlang.derive.analyse import Analyses, class_rank, shown_class
from flowlang.derive.explain import shown
from flowlang.derive.plan import Failure, Plan, Step
from flowlang.derive.programs import is_map, is_random
from flowlang.diagnostics import Diagnostic, Label, Report
from flowlang.elaborate.body import Body, Fail, Poisoned
from flowlang.elaborate.elaborator import WITNESS_SIZES, Elaborator
from flowlang.elaborate.scope import LATER_ADVICE, LATER_KINDS, ModuleScope
from flowlang.elaborate.types import is_tensor_type
from flowlang.elaborate.values import Declared, Instance
from flowlang.ir.distributions import Distribution
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Emission, Region
from flowlang.ir.interval import Interval
from flowlang.library import Folders, standard_library
from flowlang.source import Loader, Source, Span
from flowlang.syntax import tree

CLASSES = {"1": 0, "D": 1, "D2": 2, "D3": 3}


def checked_solver(declaration: tree.Declaration, report: Report) -> dict[str, Any]:
    from flowlang.checks.solvers import check_solver

    return check_solver(declaration, report)


def checked_path(declaration: tree.Declaration, report: Report) -> dict[str, Any]:
    from flowlang.checks.paths import check_path

    return check_path(declaration, report)


CHECKED_KINDS: dict[str, Callable[[tree.Declaration, Report], dict[str, Any]]] = {
    "solver": checked_solver,
    "path": checked_path,
}


@dataclass
class Compilation:
    """One spec: its diagnostics, the regions of its declarations and what was found out about them."""

    source: Source
    report: Report
    elab: Elaborator
    module: ModuleScope
    analyses: Analyses = field(default_factory=Analyses)
    regions: dict[str, Region] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # of declarations that are not graphs

    @property
    def ok(self) -> bool:
        return self.report.ok

    def flows(self) -> list[str]:
        return [d.name for d in self.module.declared() if self.kind(d) == "flow"]

    def models(self) -> list[str]:
        return [d.name for d in self.module.declared() if self.kind(d) == "model"]

    def nets(self) -> list[str]:
        return [d.name for d in self.module.declared() if self.kind(d) in ("net", "norm")]

    def kind(self, target: Declared) -> str:
        return target.kind


def compile_source(
    source: Source, *, loader: Loader | None = None, sets: Mapping[str, Any] | None = None, sized: bool = False,
    max_parameters: int = limits.PARAMETERS, build: str | None = None,
) -> Compilation:  # fmt: skip
    """Checks a spec whole. Never raises for a bad one; see `report`.

    `sized`: a flow with an axis of open size is refused (it is to be built), instead of being judged at
    a witness size. `build` names what is to be built: a net by itself then has the sizes that are set.
    """
    report = Report()
    elab = Elaborator(report, loader or Folders(), standard_library(), sets)
    elab.quiet_free = sized
    elab.parameter_limit = max_parameters
    module = elab.add_module(source)
    comp = Compilation(source, report, elab, module)
    with room():
        check_declarations(comp, build)
    for name in sorted(set(elab.sets) - elab.used_sets):
        report.add(
            Diagnostic(
                "FL0804", f"nothing is named `{name}` that could be set", None,
                suggestion="sizes of a flow's `data` and `given` and its static parameters can be set, and those of a net that --flow names",
            )
        )  # fmt: skip
    return comp


def check_declarations(comp: Compilation, build: str | None) -> None:
    alone = next((d for d in comp.module.declared() if d.name == build and d.kind in ("net", "norm")), None)
    if alone is not None:
        judged(comp, alone, check_sized)
    for target in comp.module.declared():
        if target.kind == "flow":
            judged(comp, target, lambda c, t: at_fitting_size(c, t, check_flow))
        elif target.kind == "model":
            judged(comp, target, lambda c, t: at_fitting_size(c, t, check_model))
    for target in sorted(comp.module.declared(), key=lambda d: not sized_by_itself(d)):
        if target.kind in CHECKED_KINDS:
            if any(isinstance(s, tree.Invalid) for s in target.declaration.body or ()):
                continue  # told already, and what is left says nothing of the whole
            comp.facts[target.name] = CHECKED_KINDS[target.kind](target.declaration, comp.report)
        elif target.kind in LATER_KINDS:
            comp.report.add(
                Diagnostic(
                    "FL0902", f"`{target.name}` is a {target.kind}: {LATER_KINDS[target.kind]} have no meaning yet",
                    target.declaration.name_span, severity="warning", suggestion=LATER_ADVICE
                )
            )  # fmt: skip
        elif target.kind not in ("flow", "model") and id(target.declaration) not in comp.elab.instantiated:
            judged(comp, target, check_unused)
    for item in comp.module.module.items:
        if isinstance(item, tree.Require):
            check_require(comp, item, None, None)


def check_sized(comp: Compilation, target: Declared) -> None:
    region = comp.elab.sized_region(target)
    if region is not None:
        comp.regions[target.name] = region
        examine(comp, region, target.declaration.name_span)


@contextmanager
def room() -> Iterator[None]:
    """As many of Python's frames for every run, however deep the caller stands."""
    before, depth, frame = sys.getrecursionlimit(), 0, inspect.currentframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    sys.setrecursionlimit(max(before, depth + limits.FRAMES))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def judged(comp: Compilation, target: Declared, check: Callable[[Compilation, Declared], None]) -> None:
    """Checks a declaration. What nests too deeply in each other, while each thing alone is within its limit, is told."""
    main = comp.report
    try:
        check(comp, target)
    except RecursionError:
        comp.report = comp.elab.report = main
        found = comp.elab.overflow(target.declaration.name_span or target.declaration.span)
        main.extend([found] if found is not None else [])


def sized_by_itself(target: Declared) -> bool:
    """Whether all tensors that it takes have sizes: it is judged first, and with it what it uses."""
    types = [p.type for ps in target.declaration.parameters for p in ps if is_tensor_type(p.type)]
    items = [i for t in types for i in (t.items if isinstance(t, tree.Brackets) else ())]
    return bool(items) and all(i.eq is not None for i in items)


# ---- declarations -------------------------------------------------------------------------------


def flow_arguments(comp: Compilation, target: Declared) -> dict[str, Any] | None:
    """Static arguments of a flow or model: those set from outside, and witnesses for those without a default."""
    params = [p for ps in target.declaration.parameters for p in ps]
    arguments = {p.name: comp.elab.sets[p.name] for p in params if p.name in comp.elab.sets}
    comp.elab.used_sets |= set(arguments)
    missing = [
        p for p in params if p.default is None and p.name not in arguments and not isinstance(p.type, tree.Optional)
    ]
    if missing:
        witness = comp.elab.witness_arguments(target, comp.elab.witness)
        if witness is None:
            return None
        arguments = {**witness, **arguments}
    return arguments


def at_fitting_size(comp: Compilation, target: Declared, check: Callable[[Compilation, Declared], None]) -> None:
    """Checks a flow or a model; one with axes of open size at the first witness size that divides as it asks."""
    main, elab = comp.report, comp.elab
    unfit: Report | None = None
    for size in (WITNESS_SIZES[0], *DIVISIBLE_SIZES):
        elab.witness = size
        guessed = len(elab.witnessed)
        comp.report = elab.report = Report(told=set(main.told))
        check(comp, target)
        found, comp.report, elab.report = comp.report, main, main
        if len(elab.witnessed) == guessed or not any(d.code in UNFIT for d in found.errors):
            break
        unfit = unfit or found
        broken = comp.regions.get(target.name)
        elab.regions = {k: r for k, r in elab.regions.items() if r is not broken}
    else:
        assert unfit is not None
        found = unfit
    elab.witness = WITNESS_SIZES[0]
    main.extend(at_home(found, target))
    main.told |= found.told


def at_home(found: Iterable[Diagnostic], target: Declared) -> Iterator[Diagnostic]:
    """Diagnostics of a declaration; what points into the library's text, and nowhere in the user's, points at its name."""
    home = target.declaration.name_span or target.declaration.span
    for d in found:
        if d.span is None or not d.span.source.library or home.source.library:
            yield d
        else:
            yield replace(
                d, span=home, labels=(), notes=(*d.notes, f"this arose inside `{d.span.source.name}` of the library")
            )


def check_flow(comp: Compilation, target: Declared) -> None:
    arguments = flow_arguments(comp, target)
    region = comp.elab.root(target, arguments) if arguments is not None else None
    if region is None:
        return
    comp.regions[target.name] = region
    if not region.broken:
        if not region.inputs:
            comp.report.add(
                Diagnostic("FL0212", f"the flow `{target.name}` has no `data`", target.declaration.name_span,
                           suggestion="begin with `data x: R[D = 2]`")
            )  # fmt: skip
            return
        if region.base is None:
            comp.report.add(
                Diagnostic("FL0212", f"the flow `{target.name}` has no `base`", target.declaration.name_span,
                           suggestion="end it with a base distribution, as in `base normal`")
            )  # fmt: skip
            return
    check_size(comp, region)
    home = target.declaration.name_span
    examine(comp, region, home)
    if not region.broken and comp.report.ok:
        check_support(comp, region, home)
    if not region.broken:
        check_requirements(comp, region)
        check_fields(region, comp.report)


def check_model(comp: Compilation, target: Declared) -> None:
    """A model's programs are examined one by one; its networks with the first that uses them."""
    arguments = flow_arguments(comp, target)
    region = comp.elab.root(target, arguments) if arguments is not None else None
    if region is None:
        return
    comp.regions[target.name] = region
    for program in region.programs.values():
        examine(comp, program, target.declaration.name_span)
        region.broken = region.broken or program.broken
    if not region.broken:
        check_slips(region, comp.report)
        check_noise(comp.elab.noises, comp.report)
        check_jumps(comp.elab.jumps, comp.report)
        if comp.elab.drawn_paths:
            from flowlang.checks.paths import check_drawn

            check_drawn(comp.elab.drawn_paths, comp.report)


def check_size(comp: Compilation, region: Region) -> None:
    """The whole flow stays within the limit, not each parameter alone."""
    have, most = parameter_count(region), comp.elab.parameter_limit
    if have > most and not region.broken:
        region.broken = True
        comp.report.add(
            Diagnostic("FL0901", f"`{region.name}` would have {have:,} parameters, above the limit of {most:,}", region.span,
                       suggestion="`flowlang info --max-parameters N` counts larger ones without making them")
        )  # fmt: skip


def check_unused(comp: Compilation, target: Declared) -> None:
    """A declaration that nothing uses is judged at witness sizes."""
    if target.declaration.alias is not None:
        comp.elab.resolve_alias(target)
        return
    main, fitting = comp.report, 0
    unfit: Report | None = None
    for size in (*WITNESS_SIZES, *DIVISIBLE_SIZES):
        if fitting == len(WITNESS_SIZES):
            break
        comp.report = comp.elab.report = Report(told=set(main.told))
        whole = judge_at(comp, target, size)
        found, comp.report, comp.elab.report = comp.report, main, main
        if any(d.code in UNFIT for d in found.errors) and not sized_by_itself(target):
            unfit = unfit or found  # an axis of this size does not divide as wanted: others may
            continue
        main.extend(at_home(found, target))
        main.told |= found.told
        fitting += 1
        if not (found.ok and whole):  # what is in error without a word uses what was told of
            break
    if not fitting and unfit is not None:
        main.extend(at_home(unfit, target))
        main.told |= unfit.told
    comp.elab.witness = WITNESS_SIZES[0]


DIVISIBLE_SIZES = (4, 8, 32, 64)  # for declarations that cut axes into groups
UNFIT = ("FL0301", "FL0312")  # another size may fit, where a declaration leaves it open


def judge_at(comp: Compilation, target: Declared, size: int) -> bool:
    """Judges a declaration with free axes of a size; whether nothing in it is in error."""
    comp.elab.witness = size
    region = comp.elab.witness_region(target, size)
    if region is None:
        return False
    known = comp.regions.get(target.name)
    if known is None or known.broken:
        comp.regions[target.name] = region
    examine(comp, region, target.declaration.name_span)
    if not region.broken:
        check_requirements(comp, region)
    return not region.broken


# ---- totality and invertibility -----------------------------------------------------------------


def examine(comp: Compilation, root: Region, home: Span | None) -> None:
    """Totality of every region, then invertibility of every map, each told once (A14).

    `home`: where the user's own text declares the root, which may be an alias of a library entry.
    """
    comp.analyses.settle(root)
    regions = list(root.walk())  # children first
    anchors = library_anchors(root, home)
    bad: set[int] = set()  # in error, or holding a region in error
    for region in regions:
        if region.broken:
            bad.add(id(region))
            continue
        for v in comp.analyses.violations(region) if region.kind != "step" else ():  # judged where it is scanned
            bad.add(id(region))
            tell_violation(comp, region, v, anchors)
            break
    for region in regions:
        if id(region) in bad or any(id(c.region) in bad for c in region.children.values()):
            bad.add(id(region))
            continue
        if tell_rough(comp, region, anchors):
            bad.add(id(region))
            continue
        if not is_map(region):
            tell_without_effect(comp, region)
            continue
        found = comp.analyses.plan(region)
        if isinstance(found, Failure):
            bad.add(id(region))
            tell_failure(comp, region, found, anchors)
        tell_rules(comp, region)
    root.broken = root.broken or id(root) in bad


def tell_rough(comp: Compilation, region: Region, anchors: Mapping[int, Span]) -> bool:
    """Whether a derivative is asked for that is no graph, which is told."""
    for node in region.graph:
        if "tangents" not in node.attrs and not (node.op == "integrate" and node.attrs.get("log_det")):
            continue
        op = comp.analyses.rough(node.attrs["region"], node.attrs["method"])
        if op is not None:
            span, notes = place(node.span, region, anchors)
            comp.report.add(
                Diagnostic("FL0606", f"`{shown(op)}` in the function that is differentiated here has no derivative that is a graph", span,
                           notes=notes, suggestion="leave it out of the function, or hide it by `stop(..)`")
            )  # fmt: skip
            return True
    return False


def tell_without_effect(comp: Compilation, region: Region) -> None:
    """Offsets that a norm takes away again."""
    from flowlang.analysis.invariance import without_effect

    for node in () if region.library else without_effect(region):
        comp.report.add(
            Diagnostic(
                "FL0503", f"`{node.label}` has no effect while training: the norm after it takes any offset away", node.span,
                severity="warning", suggestion="leave it out, as by `bias = false`",
            )
        )  # fmt: skip


def tell_rules(comp: Compilation, region: Region) -> None:
    """Hand-given rules are noted: nothing here computes numbers, so they are not verified yet."""
    if region.library:
        return
    for name, rule in region.rules.items():
        comp.report.add(
            Diagnostic(
                "FL0413", f"`def {name}` of `{region.name}` is unverified: `check` computes no numbers", rule.span,
                severity="note", suggestion="`flowlang verify`, `flowlang build` and `compile` compare it with the map",
            )
        )  # fmt: skip


def library_anchors(root: Region, home: Span | None) -> dict[int, Span]:
    """For each library region, the place in the user's text that led to it."""
    out: dict[int, Span] = {}

    def visit(region: Region, span: Span | None) -> None:
        for node in region.graph:
            inner = node.attrs.get("region")
            if not isinstance(inner, Region):
                continue
            where = node.span if node.span is not None and not node.span.source.library else span
            if inner.library and where is not None and id(inner) not in out:
                out[id(inner)] = where
                visit(inner, where)
            elif not inner.library and id(inner) not in seen:
                seen.add(id(inner))
                visit(inner, where)

    seen: set[int] = {id(root)}
    if root.library and home is not None:
        out[id(root)] = home
    visit(root, home if root.library else root.span)
    return out


def place(span: Span | None, region: Region, anchors: Mapping[int, Span]) -> tuple[Span | None, tuple[str, ...]]:
    """The user's own text for a finding; library text is named in a note."""
    if span is None:
        return anchors.get(id(region), region.span), ()
    if span.source.library:
        where = anchors.get(id(region))
        if where is not None:
            return where, (f"this arose inside `{region.name}` of the library",)
    return span, ()


def tell_violation(comp: Compilation, region: Region, v: Violation, anchors: Mapping[int, Span]) -> None:
    node = v.node
    span, notes = place(node.span, region, anchors)
    operand = v.graph[node.inputs[v.need.slot]] if v.need.slot < len(node.inputs) else None
    name = f"`{operand.label}`" if operand is not None and operand.label else "its argument"
    if node.op in ("call", "repeat"):
        inner: Region = node.attrs["region"]
        message = f"`{inner.name}` needs {v.need.words}, and {name} may be anything in {v.found}"
        code = "FL0408"
    else:
        message = f"`{shown(node.op)}` needs {v.need.words}, and {name} may be anything in {v.found}"
        code = "FL0409"
    comp.report.add(
        Diagnostic(code, message, span, notes=notes,
                   suggestion="declare a narrower domain, as in `x: Positive[D]`, or map it there first, as by `softplus` or `exp`")
    )  # fmt: skip


def tell_failure(comp: Compilation, region: Region, f: Failure, anchors: Mapping[int, Span]) -> None:
    span, notes = place(f.span, region, anchors)
    labels = tuple(Label(s, t) for s, t in f.labels if not s.source.library)
    comp.report.add(
        Diagnostic(f.code, f.message, span, labels=labels, notes=(*f.notes, *notes), suggestion=f.suggestion)
    )


# ---- supports -----------------------------------------------------------------------------------


def check_support(comp: Compilation, region: Region, home: Span | None) -> None:
    """Data's domain forward onto the base's support, and the support backward into data's domain (A9)."""
    assert region.base is not None
    analyses = comp.analyses
    support = base_support(region)
    image = analyses.ranges(region).interval(region.outputs[0])
    where = home if region.library else region.base.span
    name = region.base.distribution.name
    if (image.lo, image.hi) != (support.lo, support.hi):  # end points carry no mass
        comp.report.add(
            Diagnostic(
                "FL0408",
                f"the support of `{name}` is {support}, and the chain maps the data onto {image}",
                where,
                notes=(f"the data's domain is {analyses.ranges(region).interval(region.inputs[0])}",),
                suggestion=advice(image, support),
            )
        )
        return
    support = support.meet(image) or support
    program = analyses.program(region, "inverse")
    context = [analyses.ranges(region).interval(c) for c in region.context]
    emitted = [analyses.ranges(region).interval(e.value) for e in region.emissions]
    found = analyses.program_bounds(program, [support, *emitted, *context])
    for v in found.violations:
        comp.report.add(
            Diagnostic(
                "FL0408",
                f"the chain does not reach all of the support {support} of `{name}`: going back, `{shown(v.node.op)}` needs "
                f"{v.need.words or v.need.interval}, and gets {v.found}",
                where,
                labels=(Label(v.node.span, "this step narrows the range"),)
                if v.node.span and not v.node.span.source.library
                else (),
                suggestion="choose a base with the support that the chain reaches, or add a step that maps onto it",
            )
        )
        return
    for i, back in zip(region.inputs, found.outputs, strict=False):
        domain = region.graph[i].attrs.get("domain")
        if isinstance(domain, Domain) and not back.within(domain.interval):
            comp.report.add(
                Diagnostic(
                    "FL0408",
                    f"going back from the base, values lie in {back}, outside the data's domain `{domain}`",
                    where,
                    suggestion="begin with a step that maps the data's domain onto all reals, as `inverse(elementwise(softplus))`",
                )
            )
            return


def advice(image: Interval, support: Interval) -> str:
    if str(image) == "Positive" and str(support) == "R":
        return "map positive numbers onto all reals first, as by `elementwise(log)`, or use a base on `Positive`, as `exponential`"
    return "choose a base with that support, or add a step that maps onto it"


# ---- requirements -------------------------------------------------------------------------------


def check_requirements(comp: Compilation, root: Region) -> None:
    for region in root.walk():
        for statement, body in comp.elab.requirements.get(id(region), ()):
            check_require(comp, statement, region, body)


def check_require(comp: Compilation, statement: tree.Require, region: Region | None, body: Body | None) -> None:
    condition = statement.condition
    if isinstance(condition, tree.Binary) and condition.op in ("<=", "<", "==", ">=", ">"):
        left = condition.left
        if isinstance(left, tree.Name) and left.id == "log_det" and region is not None:
            require_log_det(comp, statement, condition, region)
            return
        if (
            isinstance(left, tree.Call)
            and isinstance(left.fn, tree.Name)
            and left.fn.id == "parameters"
            and len(left.items) == 1
        ):
            require_parameters(comp, statement, condition, left)
            return
    if body is None:
        body = Body(
            comp.elab,
            Region("require", "require", type(next(iter(comp.regions.values())).graph)() if comp.regions else _graph()),
            comp.module,
        )
    try:
        value = body.ev(condition)
    except (Fail, Poisoned):
        return
    if value is False:
        tell_requirement(comp, body, condition)
    elif value is not True and comp.report.ok:
        comp.report.add(
            Diagnostic("FL0902", "this requirement has no meaning yet", condition.span,
                       suggestion="requirements on `log_det`, `parameters(..)` and static values are checked")
        )  # fmt: skip


def tell_requirement(comp: Compilation, body: Body, condition: tree.Expr) -> None:
    """A failed `require`, at the user's own text: in a library entry, at the call that led there."""
    notes = []
    if isinstance(condition, tree.Binary):
        for side in (condition.left, condition.right):
            value = body.ev(side)
            if not isinstance(side, tree.Number) and isinstance(value, bool | int | float):
                notes.append(f"`{side.span.text}` is {str(value).lower()} here")
    if condition.span.source.library:
        notes.append(f"`{body.region.name}` of the library demands `require {condition.span.text}`")
    comp.report.add(
        body.diagnostic(
            "FL0502", "this requirement does not hold", condition.span, notes=tuple(notes),
            suggestion="change the values it speaks of, or what is required",
        )
    )  # fmt: skip


def _graph() -> Any:
    from flowlang.ir.graph import Graph

    return Graph()


def require_log_det(comp: Compilation, statement: tree.Require, condition: tree.Binary, region: Region) -> None:
    right = condition.right
    wanted: int | None = None
    if (
        isinstance(right, tree.Call)
        and isinstance(right.fn, tree.Name)
        and right.fn.id == "O"
        and len(right.items) == 1
    ):
        inner = right.items[0].left
        if isinstance(inner, tree.Number) and inner.value == 1:
            wanted = 0
        elif isinstance(inner, tree.Name):
            wanted = 1
        elif (
            isinstance(inner, tree.Binary)
            and inner.op == "^"
            and isinstance(inner.right, tree.Number)
            and inner.right.value in (2, 3)
        ):
            wanted = int(inner.right.value)
    if wanted is None or condition.op != "<=":
        comp.report.add(
            Diagnostic(
                "FL0306", "a cost class is needed here", condition.span, suggestion="as in `require log_det <= O(D)`"
            )
        )
        return
    if isinstance(comp.analyses.plan(region), Failure):
        return
    data = sum(t.count for t in region.input_types())
    order = {"O(1)": 0, "O(D)": 1, "O(D²)": 2, "O(D³)": 3, "estimator": 4, "ode": 5}
    costliest: tuple[tuple[int, int], Step | None, str] = ((0, 0), None, "0")
    for step in comp.analyses.steps_of(region):
        found = comp.analyses.log_det_class(region, step)
        if class_rank(found) > costliest[0]:
            costliest = (class_rank(found), step, found)
    have = shown_class(costliest[2], data)
    if order[have] <= wanted:
        return
    at = getattr(costliest[1], "node", None)
    span = (comp.analyses.view(region).graph[at].span if at is not None else None) or statement.span
    named = ["O(1)", "O(D)", "O(D²)", "O(D³)"][wanted]
    comp.report.add(
        Diagnostic(
            "FL0501",
            f"the log-det of this step costs {have}, and `require` allows {named}",
            span,
            labels=(Label(statement.span, "required here"),),
            notes=(f"D = {data}: a dense matrix needs a factorisation for its determinant",) if have == "O(D³)" else (),
            suggestion="use a structured matrix: `Invertible` without `dense` keeps a PLU factorisation, `LowerTriangular` a diagonal",
        )
    )


def require_parameters(comp: Compilation, statement: tree.Require, condition: tree.Binary, left: tree.Call) -> None:
    name = left.items[0].left
    region = comp.regions.get(name.id) if isinstance(name, tree.Name) else None
    if region is not None and region.broken:
        return
    if region is None or not isinstance(condition.right, tree.Number):
        comp.report.add(
            Diagnostic(
                "FL0306",
                "`parameters` takes a flow of this file, compared with a number",
                left.span,
                suggestion="as in `require parameters(my_flow) == 1_000`",
            )
        )
        return
    have = parameter_count(region)
    want = condition.right.value
    holds = {"==": have == want, "<=": have <= want, "<": have < want, ">=": have >= want, ">": have > want}[
        condition.op
    ]
    if not holds:
        comp.report.add(
            Diagnostic(
                "FL0502",
                f"`{region.name}` has {have:,} parameters, and {condition.op} {want:,} is required",
                condition.span,
                suggestion=f"write `{condition.op} {have}` if the count is right, or change the sizes of its networks",
            )
        )


# ---- sizes --------------------------------------------------------------------------------------


def size_formula(comp: Compilation, name: str, count: Callable[[Region], int] = parameter_count) -> str | None:
    """A count of a flow as a polynomial in the sizes of its data, as in `8*D^2 + 130*D`; None where it is none.

    The spec is elaborated at several sizes for it; nothing is allocated.
    """
    region = comp.regions[name]
    sizes = {a.name: a.size for t in region.input_types() for a in t.axes}

    def at(given: Mapping[str, int]) -> int:
        made = Elaborator(Report(), comp.elab.loader, comp.elab.library, {**comp.elab.sets, **given})
        target = made.add_module(comp.source).names[name]
        found = made.root(target, {})
        if found is None or found.broken:
            raise LookupError(name)
        return count(found)

    try:
        return formula(at, sizes)
    except LookupError:  # the flow does not exist at some of these sizes
        return None


def step_count(region: Region) -> int:
    total = 0
    for step in region.steps:
        inner = step_count(step.inner) if step.inner is not None else 1
        total += inner * step.count
    return total


# ---- info ---------------------------------------------------------------------------------------


def info(comp: Compilation) -> list[dict[str, Any]]:
    """What is known of each declaration, for `info --json`."""
    out = []
    for target in comp.module.declared():
        region = comp.regions.get(target.name) or used_region(comp, target)
        entry: dict[str, Any] = {"name": target.name, "kind": target.kind, **comp.facts.get(target.name, {})}
        if region is not None and not region.broken:
            entry.update(describe_region(comp, region))
        out.append(entry)
    return out


def used_region(comp: Compilation, target: Declared) -> Region | None:
    for root in comp.regions.values():
        for region in root.walk():
            if region.span == target.declaration.span:
                return region
    return None


def describe_region(comp: Compilation, region: Region) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "parameters": parameter_count(region), "stored_parameters": parameter_count(region, "stored"),
        "free_parameters": parameter_count(region, "free"), "flops": flop_count(region),
        "inputs": [str(region.graph[i].type) for i in region.inputs],
        "context": [str(region.graph[i].type) for i in region.context],
        "outputs": [str(region.graph[o].type) for o in (*region.outputs, *based(region))],
    }  # fmt: skip
    if region.kind == "norm" and region.inputs:
        from flowlang.analysis.invariance import report
        from flowlang.derive.folding import why_not

        reason = why_not(region)
        entry["norm"] = {**report(region), "folds": "yes" if reason is None else f"no: {reason}"}
    constant = comp.analyses.contraction(region)
    if constant is not None:
        entry["contraction"] = constant
    if region.programs:
        entry["data"] = {n: {"as": word, "type": str(t)} for n, (word, t) in region.data.items()}
        entry["programs"] = {
            n: {
                "inputs": {str(p.graph[i].attrs["name"]): str(p.graph[i].type) for i in (*p.inputs, *p.context)},
                "outputs": [str(p.graph[o].type) for o in p.outputs],
                "flops": flop_count(p),
                "exactness": comp.analyses.exactness(p),
            }
            for n, p in region.programs.items()
        }
    if not is_map(region):
        return entry
    plan = comp.analyses.plan(region)
    entry["invertible"] = isinstance(plan, Plan)
    if isinstance(plan, Failure):
        return entry
    data = sum(t.count for t in region.input_types())
    found = comp.analyses.region_class(region)
    log_det = shown_class(found, data)
    way = comp.analyses.way(region)
    entry["log_det"] = log_det
    entry["inverse"] = way
    entry["exactness"] = comp.analyses.exactness(region)
    entry["random"] = is_random(region)
    entry["rounds"] = {method: comp.analyses.rounds(region, method) for method in ("forward", "inverse")}
    if region.steps:
        entry["steps"] = step_count(region)
        entry["chain"] = list(chain_rows(comp, region, data))
    if region.base is not None:
        entry["base"] = ", ".join(law.name for law in bases(region))
    return entry


def beside(region: Region) -> list[Emission]:
    """What a flow with several data emits last: the values that have a base of their own."""
    others = len(region.inputs) - 1 if region.kind == "flow" else 0
    return region.emissions[-others:] if others else []


def based(region: Region) -> list[int]:
    return [e.value for e in beside(region)]


def bases(region: Region) -> list[Distribution]:
    assert region.base is not None
    return [region.base.distribution, *(e.distribution for e in beside(region) if e.distribution is not None)]


def chain_rows(comp: Compilation, region: Region, data: int) -> list[dict[str, Any]]:
    """The steps as written: shape, way of inversion, log-det class, parameters, FLOPs."""
    plan_steps = {}
    for s in comp.analyses.steps_of(region):
        n = getattr(s, "node", None)
        if n is not None:
            plan_steps[n] = s
    rows: list[dict[str, Any]] = []
    before = set(region.inputs)
    for step in region.steps:
        after = region.graph[step.after]
        if step.inner is not None:
            for row in chain_rows(comp, step.inner, data):
                rows.append({**row, "count": row["count"] * step.count})
            before.add(step.after)
            continue
        # A call's result may be picked and named before the next step; a step of its own may be nothing but that.
        node = after
        while node.op in ("get", "rename", "order") and node.inputs and node.inputs[0] not in before:
            node = region.graph[node.inputs[0]]
        before.add(step.after)
        inner = node.attrs.get("region")
        found = plan_steps.get(node.id)
        rows.append(
            {
                "step": " ".join(step.label.split()),
                "shape": str(after.type),
                "inverse": comp.analyses.step_way(region, found) if found is not None else "analytic",
                "log_det": shown_class(comp.analyses.log_det_class(region, found), data)
                if found is not None
                else "O(1)",
                "parameters": parameter_count(inner) if isinstance(inner, Region) else 0,
                "flops": step_flops(region, step.before, step.after),
                "count": step.count,
            }
        )
    return rows


__all__ = ["Compilation", "Instance", "compile_source", "info"]
