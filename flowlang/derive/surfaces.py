"""Plans on manifolds: what is derived holds for open sets of numbers, so points of a sphere take part in it only whole.

A chart's change of measure is never taken for that of a surface: points of a sphere are mapped by bijectors that are declared on
spheres, moved from place to place, and leave under a distribution on the sphere. All else about them is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from flowlang.derive.plan import (
    Block,
    CallInverse,
    Failure,
    Gather,
    Integrate,
    Linear,
    Plan,
    Scan,
    Solve,
    Step,
    Unjoin,
    call_results,
    mapped_slots,
)
from flowlang.ir.graph import Region
from flowlang.ir.manifolds import dimensions, keeps_last, on_sphere, wants_sphere
from flowlang.source import Span


def off_the_sphere(region: Region, plan: Plan) -> Failure | None:
    """Why a region's plan does not hold for the points of spheres that it maps; None where it does."""
    if len(region.rules) == 2:
        return unequal(region)
    return wrong_law(region) or wrong_step(plan.region, plan.steps)


def unequal(region: Region) -> Failure | None:
    """Rules by hand are verified between tangent spaces, which must have as many directions on both sides."""
    have, want = dimensions(region, region.outputs), dimensions(region, region.inputs)
    if have == want:
        return None
    return Failure(
        "FL0402", f"not invertible: `{region.name}` maps {want} dimensions to {have}; a point of a sphere has one less than its numbers",
        region.span, suggestion="end a map of a sphere in `normalize[Q](..)` along the last axis, which shows that it stays there",
    )  # fmt: skip


def wrong_law(region: Region) -> Failure | None:
    """What leaves on a sphere does so under a distribution there, and nothing else does."""
    laws = [(e.value, e.distribution.name, e.span) for e in region.emissions if e.distribution is not None]
    if region.kind == "flow" and region.base is not None:
        laws.insert(0, (region.outputs[0], region.base.distribution.name, region.base.span))
    for value, name, span in laws:
        if on_sphere(region.graph, value, region=region) != (name == "uniform_sphere"):
            return Failure(
                "FL0408", "the data, the last step and the base do not lie on the same manifold", span or region.span,
                suggestion="what comes from `Sphere` data stays on the sphere and ends in `uniform_sphere`",
            )  # fmt: skip
    return None


def wrong_step(region: Region, steps: Iterable[Step]) -> Failure | None:
    graph = region.graph
    for step in steps:
        touched = ends(region, step)
        on = [on_sphere(graph, n, region=region) for n in touched]
        if isinstance(step, Scan) and not any(on):
            found = wrong_step(region, step.steps)
            if found is not None:
                return found
        if not any(on) or whole(region, step, all(on)):
            continue
        span = next((s for n in touched if (s := graph[n].span) is not None), region.span)
        return no_rule(region, span)
    return None


def whole(region: Region, step: Step, all_on: bool) -> bool:
    """Whether a step takes points of spheres as points of spheres."""
    graph = region.graph
    match step:
        case Unjoin() | Gather():
            return all_on
        case Solve(n, _):
            return all_on and keeps_last(graph, graph[n])
        case CallInverse(n):
            node = graph[n]
            inner: Region = node.attrs["region"]
            mapped = mapped_slots(node, inner)
            return all(on_sphere(graph, node.inputs[k], region=region) == wants_sphere(node, k) for k in mapped)
    return False


def ends(region: Region, step: Step) -> list[int]:
    """The values that a step exchanges."""
    graph = region.graph
    match step:
        case Solve(n, slot):
            return [n, graph[n].inputs[slot]]
        case Unjoin(n):
            return [n, *graph[n].inputs]
        case Gather(value, parts):
            return [value, *parts]
        case CallInverse(n):
            node = graph[n]
            operands = [node.inputs[k] for k in mapped_slots(node, node.attrs["region"])]
            return [*(call_results(graph, node) or []), *operands]
        case Integrate(n):
            return [n, graph[n].inputs[0]]
        case Block():
            return [*step.exits, *step.entries]
        case Scan() | Linear():
            return [*step.exits, step.entry]
    return [n for n in (getattr(step, "exit", None), getattr(step, "entry", None)) if n is not None]


def no_rule(region: Region, span: Span | None) -> Failure:
    return Failure(
        "FL0403", f"not invertible: `{region.name}` maps points of a sphere, for which no inverse is derived", span,
        suggestion="map them by a bijector of spheres, or give `def inverse` and `def log_det`, which is with respect to the sphere's surface",
    )  # fmt: skip


__all__ = ["no_rule", "off_the_sphere"]
