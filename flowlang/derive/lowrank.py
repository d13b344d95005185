"""Low-rank updates x + w(s), s = V·x: solved through s alone (A8; planar flows, Rezende & Mohamed 2015).

The map is a bijection when s + V·w(s) is strictly monotone in s. By the matrix determinant lemma its
slope is det J. Products V·w are simplified first: a unit vector has V·V = 1, equal terms cancel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowlang.analysis.ranges import Ranges
from flowlang.derive.bodies import Body
from flowlang.derive.jvp import NoDerivative, tangent
from flowlang.derive.plan import LowRank
from flowlang.ir.build import Builder
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph
from flowlang.ir.interval import REAL, Interval, point, split
from flowlang.ir.types import TensorType

if TYPE_CHECKING:
    from flowlang.derive.problem import Problem
    from flowlang.derive.replay import Replay
    from flowlang.derive.search import Inverter

Linear = dict[int, float]  # node -> coefficient; key -1 is the constant


def dot(b: Builder, v: int, w: int, axes: tuple[str, ...]) -> int:
    """Σ v·w over axes, with scalars taken out, sums distributed and unit vectors recognised."""
    node = b.graph[w]
    names = set(axes)

    def free(n: int) -> bool:
        return not names & set(b.type(n).names)

    match node.op:
        case "mul":
            p, q = node.inputs
            if free(p):
                return b.mul(p, dot(b, v, q, axes))
            if free(q):
                return b.mul(q, dot(b, v, p, axes))
        case "div":
            p, q = node.inputs
            if free(q):
                return b.div(dot(b, v, p, axes), q)
        case "add" | "sub":
            p, q = node.inputs
            if not free(p) and not free(q):
                return tidy(b, b.op(node.op, dot(b, v, p, axes), dot(b, v, q, axes)))
        case "neg":
            return b.neg(dot(b, v, node.inputs[0], axes))
        case "expand":
            if not free(node.inputs[0]):
                return dot(b, v, node.inputs[0], axes)
    if v == w:
        domain = b.graph[v].attrs.get("domain")
        unit = b.graph[v].op == "normalize" and set(b.graph[v].attrs["axes"]) == names
        if unit or (isinstance(domain, Domain) and domain.structure == "sphere" and b.type(v).rank == 1):
            return b.const(1.0)
        return b.op("sum", b.op("square", v), axes=axes)
    first, second = min(v, w), max(v, w)
    return b.op("contract", first, second, axes=axes)


def linear(b: Builder, n: int) -> Linear:
    """A scalar as a combination of atoms with constant coefficients."""
    node = b.graph[n]
    match node.op:
        case "const":
            value = b.const_value(n)
            if value is not None:
                return {-1: float(value)}
        case "add" | "sub":
            out = dict(linear(b, node.inputs[0]))
            sign = 1.0 if node.op == "add" else -1.0
            for k, c in linear(b, node.inputs[1]).items():
                out[k] = out.get(k, 0.0) + sign * c
            return {k: c for k, c in out.items() if c or k == -1}
        case "neg":
            return {k: -c for k, c in linear(b, node.inputs[0]).items()}
        case "contract":
            p, q = node.inputs
            if p > q:
                return {b.op("contract", q, p, axes=tuple(node.attrs["axes"])): 1.0}
    return {n: 1.0}


def tidy(b: Builder, n: int) -> int:
    """The same sum with equal terms merged."""
    terms = linear(b, n)
    out: int | None = None
    constant = terms.pop(-1, 0.0)
    for k in sorted(terms):
        c = terms[k]
        if c == 0:
            continue
        part = k if c == 1 else b.neg(k) if c == -1 else b.mul(b.const(c), k)
        out = part if out is None else b.add(out, part)
    if out is None:
        return b.const(constant)
    return b.add(out, b.const(constant)) if constant else out


def factors(b: Builder, n: int, power: int, out: dict[int, int]) -> float:
    """A scalar as a product of atoms to whole powers; returns the constant factor."""
    node = b.graph[n]
    match node.op:
        case "const":
            value = b.const_value(n)
            if value:
                return float(value) ** power
        case "mul":
            return factors(b, node.inputs[0], power, out) * factors(b, node.inputs[1], power, out)
        case "div":
            return factors(b, node.inputs[0], power, out) * factors(b, node.inputs[1], -power, out)
        case "neg":
            return -factors(b, node.inputs[0], power, out)
        case "reciprocal":
            return factors(b, node.inputs[0], -power, out)
    out[n] = out.get(n, 0) + power
    return 1.0


def cancel(b: Builder, n: int) -> int:
    """The same product with equal factors above and below the line cancelled."""
    found: dict[int, int] = {}
    constant = factors(b, n, 1, found)
    above = [k for k, p in sorted(found.items()) for _ in range(p)]
    below = [k for k, p in sorted(found.items()) for _ in range(-p)]
    value = b.const(constant)
    for k in above:
        value = b.mul(value, k)
    for k in below:
        value = b.div(value, k)
    return value


def projected(b: Builder, inv_graph: Graph, env: dict[int, int], step: LowRank) -> tuple[int, int]:
    """s + V·w(s) and its slope in s, from values of V, s and everything between."""
    v = env[step.weight]
    w = env[step.update]
    value = b.add(env[step.bottleneck], dot(b, v, w, step.project_axes))
    change = tangent(b, inv_graph, env, set(step.path), step.bottleneck, step.update)
    if change is None:
        return value, b.const(1.0)
    slope = b.add(b.const(1.0), cancel(b, dot(b, v, change, step.project_axes)))
    return value, slope


def low_rank(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> LowRank | None:
    """exit = u + w(s), s = V·u a scalar for each sample, and s + V·w(s) strictly monotone in s (A8)."""
    graph, e = inv.graph, exits[0]
    node = graph[e]
    if len(exits) > 1 or p.scans or node.op != "add" or u not in node.inputs or inv.interval(u) != REAL:
        return None
    w = node.inputs[1 - node.inputs.index(u)]
    if w == u or node.tensor != graph[u].tensor or graph[w].tensor.axes != node.tensor.axes:
        return None
    if not inv.sound_region(p, u, inv.between(p, u, exits)):
        return None
    for s, v in bottlenecks(graph, p.unknown, u):
        path = between(graph, s, w)
        if w not in path or reaches_without(graph, u, w, s):
            continue
        step = LowRank(u, e, w, s, tuple(graph[s].attrs["axes"]), v, tuple(sorted(path)), True, REAL)
        found = prove(inv, step)
        if found is not None:
            return found
    return None


def bottlenecks(graph: Graph, unknown: set[int], u: int) -> list[tuple[int, int]]:
    out = []
    for user, slot in graph.users(u):
        if user.op == "contract" and isinstance(user.type, TensorType) and not user.tensor.axes:
            v = user.inputs[1 - slot]
            if v not in unknown and graph[v].tensor.axes == graph[u].tensor.axes:
                out.append((user.id, v))
    return out


def between(graph: Graph, start: int, end: int) -> set[int]:
    up = graph.reachable([end])
    seen, stack = {start}, [start]
    while stack:
        n = stack.pop()
        for user, _ in graph.users(n):
            if user.id in up and user.id not in seen:
                seen.add(user.id)
                stack.append(user.id)
    return seen


def reaches_without(graph: Graph, start: int, end: int, barrier: int) -> bool:
    seen, stack = {start}, [start]
    while stack:
        n = stack.pop()
        for user, _ in graph.users(n):
            if user.id == end:
                return True
            if user.id != barrier and user.id not in seen and user.id < end:
                seen.add(user.id)
                stack.append(user.id)
    return False


def prove(inv: Inverter, step: LowRank) -> LowRank | None:
    scratch = Graph()
    b = Builder(scratch)
    env: dict[int, int] = {}
    inputs: dict[int, Interval] = {}
    for n in sorted(inv.graph.reachable([step.update])):
        node = inv.graph[n]
        if not isinstance(node.type, TensorType) or node.op in ("call", "repeat", "get"):
            if n in step.path:
                return None
            if isinstance(node.type, TensorType):
                env[n] = b.leaf("input", node.type, batched=True, name=f"v{n}")
                inputs[env[n]] = inv.interval(n)
            continue
        if n == step.bottleneck:
            env[n] = b.leaf("input", node.type, batched=True, name="s")
            inputs[env[n]] = REAL
        elif all(i in env for i in node.inputs):
            env[n] = b.copy(node, [env[i] for i in node.inputs])
    try:
        value, slope = projected(b, inv.graph, env, step)
    except NoDerivative:
        return None
    ranges = Ranges(scratch, inputs, inv.ranges.call_bounds)
    s = env[step.bottleneck]
    sign = kept_sign(ranges, slope, s)
    if not sign or not onto(ranges, value, s, sign):
        return None
    return LowRank(
        step.entry, step.exit, step.update, step.bottleneck, step.project_axes, step.weight, step.path, sign > 0, REAL
    )


def kept_sign(ranges: Ranges, slope: int, s: int) -> int:
    """A8: s + V·w(s) is itself proved strictly monotone; the determinant alone proves nothing."""
    sign = ranges.interval(slope).sign
    if sign:
        return sign
    signs = {ranges.with_override(slope, s, piece).sign for piece in split(REAL, 32)}
    return signs.pop() if len(signs) == 1 else 0


def onto(ranges: Ranges, value: int, s: int, sign: int) -> bool:
    """A9c for it: the limits at both ends are infinite."""
    ends = [ranges.with_override(value, s, point(v)) for v in (float("-inf"), float("inf"))]
    low, high = ends if sign > 0 else reversed(ends)
    return low.hi == float("-inf") and high.lo == float("inf")


def solve_low_rank(r: Replay, step: LowRank) -> None:
    source = r.source
    body = Body(r)
    s = source[step.bottleneck]
    body.entry(s)
    body.value(step.weight)
    for n in step.path:
        if n != step.bottleneck:
            body.evaluate(source[n])
    value, slope = projected(body.b, source, body.env, step)
    y = r.value(step.exit)
    target = dot(r.b, r.value(step.weight), y, step.project_axes)
    node = r.b.graph.add(
        "bracket_solve", (target, *body.outer), s.tensor,
        {"body": body.program([value, slope]), "increasing": step.increasing, "lo": float("-inf"), "hi": float("inf"),
         "image": REAL, "domain": REAL, "assumed": (REAL,) * len(body.outer)},
        span=source[step.exit].span, batched=True,
    )  # fmt: skip
    r.bind(s, node.id)
    r.bind(source[step.entry], r.b.sub(y, r.value(step.update)))


def weigh_low_rank(r: Replay, step: LowRank) -> None:
    r.evaluate_path(step.path, step.bottleneck)
    r.value(step.weight)
    _, slope = projected(r.b, r.source, r.env, step)
    r.weights.append(r.b.log_abs(slope))
