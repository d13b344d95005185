"""Maps along rays from a centre: y = k + a(r)·(x - z0), r = |x - z0| (A8; radial flows, Rezende & Mohamed 2015).

With ρ(r) = r·a(r), a > 0, ρ′ > 0 and ρ unbounded the map is a bijection, and
log|det| = (D - 1)·log a(r) + log ρ′(r). The inverse solves ρ(r) = |y - k|: in closed form where that is
a quadratic, else by bracketing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flowlang.derive.bodies import Body
from flowlang.derive.plan import Polar
from flowlang.derive.rational import (
    VARIABLE,
    NoRational,
    Polynomial,
    Rational,
    add,
    by_degree,
    derivative,
    mul,
    number,
    positive,
    read,
    variable,
    write,
)
from flowlang.ir.interval import NONNEGATIVE, REAL
from flowlang.ir.types import SCALAR

if TYPE_CHECKING:
    from flowlang.derive.problem import Problem
    from flowlang.derive.replay import Replay
    from flowlang.derive.search import Inverter

Offset = tuple[tuple[float, int], ...]  # Σ c·node
Ray = tuple[Rational, Offset]  # a(r)·(x - z0) + offset


def polar(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> Polar | None:
    graph, e = inv.graph, exits[0]
    t = graph[u].tensor
    if len(exits) > 1 or p.scans or not t.axes or graph[e].tensor != t or inv.interval(u) != REAL:
        return None
    region = inv.between(p, u, exits)
    if not inv.sound_region(p, u, region):
        return None
    for radius, power, arm in radii(inv, u, region):
        if power == 2 and any(x.op == "sqrt" for x, _ in graph.users(radius)):
            continue  # the root of it is looked at by itself
        step = along_rays(inv, u, e, region, radius, power, arm)
        if step is not None:
            return step
    return None


def radii(inv: Inverter, u: int, region: list[int]) -> list[tuple[int, int, int]]:
    """(node, 1 or 2, arm): nodes that are |arm| or |arm|², arm = x - z0 or x."""
    graph = inv.graph
    names = set(graph[u].tensor.names)
    out = []
    for n in region:
        node = graph[n]
        if not node.inputs or node.attrs.get("axes") is None or set(node.attrs["axes"]) != names:
            continue
        inner = graph[node.inputs[0]]
        if node.op == "length":
            out.append((n, 1, inner.id))
        elif node.op == "sum" and inner.op == "square":
            out.append((n, 2, inner.inputs[0]))
        elif node.op == "contract" and node.inputs[0] == node.inputs[1]:
            out.append((n, 2, node.inputs[0]))
    out += [(x.id, 1, arm) for n, k, arm in out if k == 2 for x, _ in graph.users(n) if x.op == "sqrt"]
    return [
        (n, k, arm) for n, k, arm in out if arm == u or (graph[arm].op in ("sub", "add") and u in graph[arm].inputs)
    ]


def along_rays(
    inv: Inverter, u: int, e: int, region: list[int], radius: int, power: int, arm: int
) -> Polar | None:  # fmt: skip
    inside = set(region)
    known: dict[int, Rational] = {radius: variable(power)}
    try:
        stretch, offset = ray(inv, e, u, arm, inside, known)
        rho = variable() * stretch
        slope = add(mul(derivative(rho.over), rho.under), mul(rho.over, derivative(rho.under)), -1.0)
    except NoRational:
        return None
    if not (
        positive(stretch.over, inv.interval) and positive(rho.under, inv.interval) and positive(slope, inv.interval)
    ):
        return None
    if not unbounded(inv, rho):
        return None  # some y would have no x
    return Polar(
        u, e, radius, arm, offset, tuple(sorted(stretch.over.items())), tuple(sorted(stretch.under.items())),
        tuple(sorted(slope.items())),
    )  # fmt: skip


def unbounded(inv: Inverter, rho: Rational) -> bool:
    above, below = by_degree(rho.over), by_degree(rho.under)
    return max(above) > max(below) and positive(above[max(above)], inv.interval)


def ray(inv: Inverter, n: int, u: int, arm: int, inside: set[int], known: dict[int, Rational]) -> Ray:
    """A value as a(r)·arm plus values that do not depend on x."""
    graph = inv.graph
    if n == arm:
        return number(1.0), ()
    if n == u:
        return number(1.0), centre(inv, u, arm)
    if n not in inside:
        return number(0.0), ((1.0, n),)
    node = graph[n]
    if node.op in ("add", "sub", "neg"):
        parts = [ray(inv, i, u, arm, inside, known) for i in node.inputs]
        (a, k) = parts[0]
        if node.op == "neg":
            return -a, tuple((-c, i) for c, i in k)
        (b, m) = parts[1]
        if node.op == "sub":
            b, m = -b, tuple((-c, i) for c, i in m)
        return a + b, collect((*k, *m))
    if node.op in ("mul", "div"):
        x, y = node.inputs
        if node.op == "mul" and not graph[x].tensor.axes:
            x, y = y, x
        if graph[y].tensor.axes:
            raise NoRational
        scale = read(graph, y, known, inside.__contains__)
        a, k = ray(inv, x, u, arm, inside, known)
        if k:
            raise NoRational
        return a * (scale if node.op == "mul" else scale.inverse()), ()
    raise NoRational


def centre(inv: Inverter, u: int, arm: int) -> Offset:
    """z0 in x = arm + z0."""
    if arm == u:
        return ()
    node = inv.graph[arm]
    other = node.inputs[1 - node.inputs.index(u)]
    if node.op == "sub" and node.inputs[0] != u:
        raise NoRational  # z0 - x
    return ((1.0, other),) if node.op == "sub" else ((-1.0, other),)


def collect(terms: Offset) -> Offset:
    found: dict[int, float] = {}
    for c, i in terms:
        found[i] = found.get(i, 0.0) + c
    return tuple((c, i) for i, c in sorted(found.items()) if c)


# ---- programs -----------------------------------------------------------------------------------


def solve_polar(r: Replay, step: Polar) -> None:
    b = r.b
    y = r.value(step.exit)
    for c, i in step.offset:
        v = r.value(i)
        y = b.sub(y, v if c == 1 else b.mul(b.const(c), v))
    u = r.source[step.entry]
    target = b.op("length", y, axes=u.tensor.names)
    radius = solved_radius(r, step, target)
    direction = b.op("normalize", y, axes=u.tensor.names)
    x = b.mul(direction, radius)
    for c, i in centre_of(r, step):
        v = r.value(i)
        x = b.add(x, v if c == 1 else b.mul(b.const(c), v))
    r.bind(u, x)


def centre_of(r: Replay, step: Polar) -> Offset:
    node = r.source[step.arm]
    if step.arm == step.entry:
        return ()
    other = node.inputs[1 - node.inputs.index(step.entry)]
    return ((1.0, other),) if node.op == "sub" else ((-1.0, other),)


def solved_radius(r: Replay, step: Polar, target: int) -> int:
    """The r >= 0 with r·a(r) = target."""
    b = r.b
    over, under = by_degree(mul({((VARIABLE, 1),): 1.0}, dict(step.over))), by_degree(dict(step.under))
    if max(over) <= 2 and max(under) <= 1 and min(over) >= 1:

        def part(p: Mapping[int, Polynomial], k: int) -> int:
            return write(b, p.get(k, {}), r.value)

        # A·r² + B·r - C = 0 with A, C >= 0; whichever form of the root has no cancellation.
        two = part(over, 2)
        one = b.sub(part(over, 1), b.mul(target, part(under, 1)))
        zero = b.mul(target, part(under, 0))
        if b.const_value(two) == 0:
            return b.div(zero, one)
        root = b.op("sqrt", b.add(b.op("square", one), b.mul(b.mul(b.const(4.0), two), zero)))
        size = b.add(b.op("abs", one), root)
        up = b.div(b.mul(b.const(2.0), zero), size)
        down = b.div(size, b.mul(b.const(2.0), two))
        return b.op("where", b.op("ge", one, b.const(0.0)), up, down)
    body = Body(r)
    radius = r.source[step.radius]
    body.entry(radius)
    value, slope = body_value(body, step, radius.id)
    node = b.graph.add(
        "bracket_solve", (target, *body.outer), SCALAR,
        {"body": body.program([value, slope]), "increasing": True, "lo": 0.0, "hi": float("inf"), "image": REAL,
         "domain": NONNEGATIVE, "assumed": (REAL,) * len(body.outer)},
        span=r.source[step.exit].span, batched=True,
    )  # fmt: skip
    return node.id


def body_value(body: Body, step: Polar, radius: int) -> tuple[int, int]:
    def value(a: int) -> int:
        return body.env[radius] if a == VARIABLE else body.value(a)

    b = body.b
    under = write(b, dict(step.under), value)
    rho = b.div(b.mul(body.env[radius], write(b, dict(step.over), value)), under)
    return rho, b.div(write(b, dict(step.slope), value), b.op("square", under))


def weigh_polar(r: Replay, step: Polar) -> None:
    b = r.b
    u = r.source[step.entry].tensor
    arm = r.value(step.arm)
    radius = b.op("length", arm, axes=u.names)

    def value(a: int) -> int:
        return radius if a == VARIABLE else r.value(a)

    under = b.op("log", write(b, dict(step.under), value))
    stretch = b.sub(b.op("log", write(b, dict(step.over), value)), under)
    slope = b.sub(b.op("log", write(b, dict(step.slope), value)), b.mul(b.const(2.0), under))
    r.weights.append(b.add(b.mul(b.const(float(u.count - 1)), stretch), slope))
