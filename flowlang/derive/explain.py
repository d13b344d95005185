"""Which reason for a refusal is the one to show, in the spec's words (ANALYSIS.md A14)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from flowlang.analysis.dependence import Dependence
from flowlang.analysis.ranges import Violation
from flowlang.derive.plan import Failure
from flowlang.ir.graph import Emission, Node, Region
from flowlang.ir.interval import Interval
from flowlang.ir.noise import draws
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import Need
from flowlang.ir.types import TensorType
from flowlang.source import Span

if TYPE_CHECKING:
    from flowlang.derive.problem import Problem
    from flowlang.derive.search import Inverter


def shown(op: str) -> str:
    """An op's name as the spec writes it."""
    signs = {
        "add": "+",
        "sub": "-",
        "mul": "*",
        "div": "/",
        "pow": "^",
        "neg": "-",
        "contract": "sum",
        "square": "^ 2",
    } | {"norm_bounded": "induced"}
    return signs.get(op, op.removeprefix("reduce_"))


def one_rule_alone(region: Region, f: Failure) -> Failure:
    """Only one of the two hand-given rules, and the other cannot be derived."""
    given = "inverse" if "inverse" in region.rules else "log_det"
    other = "log_det" if given == "inverse" else "inverse"
    what = "log|det J|" if given == "inverse" else "its inverse"
    return replace(
        f,
        message=f"{f.message}; `def {given}` is given, and {what} cannot be derived",
        suggestion=f"give `def {other}` as well: both are then verified by numbers",
    )


def called(inv: Inverter, n: int) -> str:
    node = inv.graph[n]
    if node.label:
        return f"`{node.label}`"
    if node.op == "rename" or node.op in ("order", "expand", "slice", "get"):
        inner = called(inv, node.inputs[0])
        return f"a part of {inner}" if node.op == "slice" else inner
    if node.op in ("call", "repeat"):
        return f"the result of `{node.attrs['region'].name}`"
    return f"the result of `{shown(node.op)}`"


def result_span(inv: Inverter) -> Span | None:
    for o in inv.region.outputs:
        if inv.graph[o].span is not None:
            return inv.graph[o].span
    return inv.region.span


def lost(inv: Inverter, why: str, wanted: int) -> Failure:
    count = wanted - count_reaching(inv)
    amount = f"{count} of {wanted}" if count > 0 else f"some of {wanted}"
    return Failure(
        "FL0402",
        f"not invertible: {amount} dimensions are lost; {why}",
        result_span(inv),
        suggestion="every coordinate must reach the result once",
    )


def count_reaching(inv: Inverter) -> int:
    """How many input coordinates can be told apart from the outputs, by slices alone."""
    graph, region = inv.graph, inv.region
    seen: set[tuple[int, int]] = set()
    for x in region.inputs:
        dep = inv.dependence(x)
        t = graph[x].tensor
        if t.rank != 1:
            return sum(graph[r].tensor.count for r in {*region.outputs})
        for r in {*region.outputs, *(e.value for e in region.emissions)}:
            relation = dep.of(r)
            if relation is None:
                continue
            for part in relation.parts:
                found: int | None = None
                for (_, col), m in part:
                    if col == t.names[0]:
                        bits = 0
                        for row in m.bits():
                            bits |= row
                        found = bits if found is None else found & bits
                if found is None:
                    return t.count
                seen |= {(x, j) for j in range(t.count) if found >> j & 1}
    return len(seen)


def not_continuous(inv: Inverter, node: Node) -> Failure:
    return Failure(
        "FL0405", f"not invertible: `{shown(node.op)}` jumps, so the map is not continuous here", node.span,
        suggestion="use a continuous function of the coordinate",
    )  # fmt: skip


def no_derivative(inv: Inverter, n: int) -> Failure:
    node = inv.graph[n]
    return Failure(
        "FL0404",
        f"not invertible: nothing shows that this is monotone; `{shown(node.op)}` has no derivative rule",
        node.span,
        suggestion="write the map with functions whose slope is known, or give `def inverse`",
    )


MAY_TURN = ("sin", "cos", "silu", "gelu", "square", "abs", "relu", "clamp", "min", "max", "tanh", "where", "pow", "mul")


def not_monotone(inv: Inverter, u: int, e: int, path: list[int], slope: Interval | None) -> Failure:
    blame = [shown(inv.graph[n].op) for n in path if inv.graph[n].op in MAY_TURN]
    through = ", ".join(f"`{b}`" for b in dict.fromkeys(blame))
    where = f"its slope may be anything in {slope}" if slope is not None else "its slope may change sign"
    notes = (f"the slope was bounded through {through}",) if through else ()
    return Failure(
        "FL0404", f"not invertible: this is not shown to be strictly monotone in {called(inv, u)}: {where}", inv.graph[e].span,
        notes=notes, suggestion="bound the coefficients, as in `param a: Interval(0, 0.9)`, so that the slope keeps its sign",
    )  # fmt: skip


def norms_apart(inv: Inverter, u: int, e: int) -> Failure:
    return Failure(
        "FL0407",
        f"not invertible: what is added to {called(inv, u)} has weights that are bounded in norms that do not follow each other",
        inv.graph[e].span,
        suggestion="bound each weight from the norm in which the one before it ends, and the first from that of the last",
    )


def not_contractive(inv: Inverter, u: int, e: int, found: float) -> Failure:
    return Failure(
        "FL0407",
        f"not invertible: the Lipschitz constant of what is added to {called(inv, u)} is {found:g}, which is not below 1",
        inv.graph[e].span,
        suggestion="bound it, as in `lipschitz(net, 0.97)`",
    )


def not_real(inv: Inverter, v: int) -> Failure:
    return Failure(
        "FL0403",
        f"not invertible: {called(inv, v)} holds whole numbers, and a change of variables needs real ones",
        inv.graph[v].span or result_span(inv),
        suggestion="dequantise it first: add uniform noise drawn inside the bijector",
    )


def couples_samples(inv: Inverter, v: int) -> Failure:
    return Failure(
        "FL0411",
        "not invertible: this statistic couples the samples of a batch, so no sample can be inverted by itself",
        inv.graph[v].span or result_span(inv),
        suggestion="follow it with a running value, as in `running(mean[B](x), 0.1)`",
    )


def unbalanced(inv: Inverter, node: Node) -> Failure:
    return Failure(
        "FL0410",
        f"not invertible: `{node.attrs['region'].name}` draws or emits, and here its value only conditions something else",
        node.span or result_span(inv),
        suggestion="apply it to a coordinate that leaves, or condition on a value without draws",
    )


def draws_twice(region: Region) -> Failure | None:
    """A network that draws in training where the map evaluates it more than once: in a field, beside rules by hand."""
    for node in region.graph:
        callee = node.attrs.get("region")
        alone = node.op != "integrate" and not region.has_map_rules
        if not isinstance(callee, Region) or alone or callee.kind not in ("net", "norm"):
            continue
        if draws(callee, training=True):
            why = "a field is evaluated many times" if node.op == "integrate" else "the rules by hand evaluate it again"
            return Failure(
                "FL0410",
                f"`{callee.name}` draws noise while training, and {why}: each time with other noise",
                node.span or region.span,
                suggestion="draw in a network that conditions a coupling or an autoregressive map",
            )
    return None


def wrong_support(region: Region, e: Emission, image: Interval, support: Interval) -> Failure:
    assert e.distribution is not None
    return Failure(
        "FL0408",
        f"the support of `{e.distribution.name}` is {support}, and what is emitted fills {image}",
        e.span or region.span,
        suggestion="emit it under a distribution with that support, or map it onto the support first",
    )


def not_onto(region: Region, v: Violation) -> Failure:
    return Failure(
        "FL0414",
        "not invertible: the values of this map need not fill its range: going back, "
        f"`{shown(v.node.op)}` needs {v.need.words or v.need.interval}, and what reaches it lies in {v.found}",
        v.node.span or region.span,
        suggestion="shift or scale after the last map that narrows the range, or use one that is onto",
    )


def leaves_domain(region: Region, n: int, found: Interval, domain: Interval) -> Failure:
    declared = region.graph[n].attrs.get("domain") or domain
    return Failure(
        "FL0414",
        f"not invertible: going back, values may lie in {found}, outside the declared `{declared}`",
        region.graph[region.outputs[0]].span or region.span,
        suggestion="bound the parameters, or declare the wider domain",
    )


def wrong_count(inv: Inverter, have: int, wanted: int) -> Failure:
    return Failure(
        "FL0402",
        f"not invertible: {wanted} dimensions go in and {have} come out",
        result_span(inv),
        suggestion="a bijector keeps the number of coordinates; `emit` lets some leave under their own distribution",
    )


def explain(inv: Inverter, p: Problem, wanted: int) -> Failure:
    """A14: which of the reasons is the one to show: the first that applies."""
    if p.lost is not None:
        return lost(inv, f"{called(inv, p.lost)} is used where a new coordinate is needed", wanted)
    for reason in (failed_call, may_vanish, noted, not_strict, failed_condition, twice, other_condition, no_inverse):
        found = reason(inv, p)
        if found is not None:
            return found
    node = inv.graph[stuck_members(p)[0]]
    return Failure(
        "FL0401",
        "not invertible: no way was found to tell the inputs from the result",
        node.span or result_span(inv),
        suggestion="give `def inverse`, or write the map as a chain of couplings",
    )


def stuck_members(p: Problem) -> list[int]:
    return [m for m in sorted(p.members, reverse=True) if m not in p.targets]


def failed_call(inv: Inverter, p: Problem) -> Failure | None:
    """A bijector that is called, and that has no inverse itself."""
    for _, call in inv.analyses.failed_calls:
        if call.id in inv.graph.reachable(list(p.members)):
            inner: Region = call.attrs["region"]
            found = inv.analyses.plan(inner)
            if isinstance(found, Failure):
                span = call.span if inner.library else found.span
                return Failure(found.code, found.message, span, found.labels, found.notes, found.suggestion)
    return None


def may_vanish(inv: Inverter, p: Problem) -> Failure | None:
    """One unknown operand, and the other one does not meet its condition."""
    for cond, slot, need in p.conditions:
        if isinstance(need, Need) and need.slot != slot:
            other = cond.inputs[need.slot]
            return Failure(
                "FL0403",
                f"not invertible: {called(inv, other)} {need.words} (it lies in {inv.interval(other)}), "
                f"and the inverse of `{shown(cond.op)}` needs it nonzero",
                cond.span,
                suggestion=f"give it a domain without 0, as in `param {inv.graph[other].label or 'scale'}: Positive[..]`, or use `exp(..)`",
            )
    return None


def noted(inv: Inverter, p: Problem) -> Failure | None:
    """What the fallbacks found wanting: continuity, monotonicity, a determinant, a Lipschitz constant."""
    for code in ("FL0405", "FL0404", "FL0403", "FL0407"):
        for f in p.notes:
            if f.code == code:
                return f
    return None


def not_strict(inv: Inverter, p: Problem) -> Failure | None:
    return causal_but_not_strict(inv, p, stuck_members(p)[0])


def failed_condition(inv: Inverter, p: Problem) -> Failure | None:
    """One unknown operand that does not meet its own condition."""
    for cond, _, need in p.conditions:
        if isinstance(need, Need):
            return Failure(
                "FL0403",
                f"not invertible: {called(inv, cond.inputs[need.slot])} {need.words}",
                cond.span,
                suggestion="restrict its domain, or use a function that is monotone on all of it",
            )
    return None


def other_condition(inv: Inverter, p: Problem) -> Failure | None:
    for cond, _, need in p.conditions:
        if isinstance(need, str):
            return Failure(
                "FL0403",
                f"not invertible: {need}",
                cond.span,
                suggestion="declare a domain that shows it, as in `param W: Invertible[D', D]`, or `Positive` for a scale",
            )
    return None


def no_inverse(inv: Inverter, p: Problem) -> Failure | None:
    """One unknown operand of an op that forgets it."""
    node = inv.graph[stuck_members(p)[0]]
    unknown = [i for i in node.inputs if i in p.unknown]
    if len(unknown) == 1 and OPS[node.op].why_not.get("invert"):
        return Failure(
            "FL0403", f"not invertible: {OPS[node.op].why_not['invert']}, so {called(inv, unknown[0])} cannot be told from it",
            node.span or result_span(inv), suggestion="let only what is kept pass through it, as the half `a` of a coupling does, or give `def inverse`"
        )  # fmt: skip
    return None


def causal_but_not_strict(inv: Inverter, p: Problem, m: int) -> Failure | None:
    """The exit is causal along an axis of an input, but something else is not strictly so."""
    for t in sorted(p.targets):
        if t not in p.unknown:
            continue
        dep = inv.dependence(t)
        relation = dep.of(m)
        if relation is None:
            continue
        for axis in inv.graph[t].tensor.names:
            if not inv.graph[m].tensor.has(axis):
                continue
            for cmp in (">=", "<="):
                if relation.within(axis, axis, cmp) and not relation.within(axis, axis, "=="):
                    blame = not_strict_node(inv, t, m, axis, dep)
                    label = (
                        ((blame.span, "this reads the same place as well as earlier ones"),)
                        if blame is not None and blame.span
                        else ()
                    )
                    return Failure(
                        "FL0406",
                        f"not invertible: what scales or shifts {called(inv, t)} is causal along `{axis}`, but not strictly: "
                        f"at each place it reads that place itself",
                        inv.graph[m].span,
                        labels=label,
                        suggestion=f"shift its input by one, as in `shift[{axis}]({inv.graph[t].label or 'x'}, 1)`",
                    )
    return None


def not_strict_node(inv: Inverter, t: int, m: int, axis: str, dep: Dependence) -> Node | None:
    for n in sorted(inv.graph.reachable([m])):
        node = inv.graph[n]
        if n == t or not isinstance(node.type, TensorType):
            continue
        relation = dep.of(n)
        if relation is not None and node.tensor.has(axis) and not relation.within(axis, axis, "=="):
            return node
    return None


def twice(inv: Inverter, p: Problem) -> Failure | None:
    """The smallest stuck node that an unknown value reaches along two ways."""
    for m in stuck_members(p):
        for n in sorted(inv.graph.reachable([m]), reverse=True):
            node = inv.graph[n]
            slots = [i for i in node.inputs if i in p.unknown]
            if len(slots) < 2 and not (len(slots) == 1 and len(node.inputs) > len(set(node.inputs))):
                continue
            common: set[int] | None = None
            for i in slots:
                up = inv.graph.reachable([i]) & p.unknown
                common = up if common is None else common & up
            if not common:
                continue
            u = max(common)
            labels: list[tuple[Span, str]] = []
            for i in slots[:2]:
                span = inv.graph[i].span
                if span is not None and not span.source.library:
                    labels.append((span, f"one way: through {called(inv, i)}"))
            name = called(inv, u)
            return Failure(
                "FL0401",
                f"not invertible: {name} arrives twice here, so it cannot be told from the result",
                node.span or inv.graph[m].span,
                tuple(labels),
                (
                    f"the result depends on {name} by itself and through "
                    + " and ".join(called(inv, i) for i in slots if i != u),
                ),
                f"let the other factor or term read only what is kept, not {name} itself",
            )
    return None
