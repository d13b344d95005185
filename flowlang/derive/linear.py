"""Maps that are linear in the unknown value, with coefficients that are numbers in the text (docs/analyses.md).

x + mean(x), circulants, convolutions with a constant kernel, constant mixings through several ops: the matrix is read off
the graph, and its inverse is a matrix of numbers. Values that are known may be added: they are what the map makes of 0.
The matrix counts as regular if a left inverse of it is found in floating point that is one with much room to spare.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite, log, prod
from typing import TYPE_CHECKING

from flowlang.analysis.constants import Constants, Table
from flowlang.derive.plan import Failure, Linear
from flowlang.ir.graph import Graph, Node
from flowlang.ir.interval import REAL
from flowlang.ir.types import Axis, TensorType

if TYPE_CHECKING:
    from flowlang.derive.problem import Problem
    from flowlang.derive.replay import Replay
    from flowlang.derive.search import Inverter

MOST = 32  # coordinates that are mixed: the inverse is written out in the generated code
MOST_WORK = 500_000  # coefficients read on the way: a long text is not worth more
CONDITION = 1e6
WHOLE, ROW = "all entries", "all' entries"  # names that no author can write
ADDS = ("add", "sub", "join", "stack")  # what is known beside the path has no say in the matrix

Form = dict[int, float]  # entry of the unknown value -> coefficient
Where = dict[str, int]
Rows = list[list[float]]


def linear(inv: Inverter, p: Problem, u: int, exits: tuple[int, ...]) -> Linear | None:
    graph = inv.graph
    t = graph[u].tensor
    if p.scans or not t.axes or inv.interval(u) != REAL:
        return None
    path = inv.between(p, u, exits)
    if u not in path or not inv.sound_region(p, u, path):
        return None
    lifted = untouched(graph, u, path)
    own = TensorType(tuple(a for a in t.axes if a.name not in lifted))
    if not 1 <= own.count <= MOST or any(graph[n].op not in RULES and n != u for n in path):
        return None
    try:
        forms = Forms(graph, u, path, lifted)
        rows = [[f.get(j, 0.0) for j in range(own.count)] for e in exits for f in forms.of[e]]
    except NotLinear:
        return None
    found = inverse(rows)
    if found is None or not regular(rows, found[0]):
        p.notes.append(singular(inv, exits))
        return None
    return Linear(
        u, exits, tuple(path), tuple(lifted), tuple(map(tuple, found[0])), found[1] * prod(a.size for a in t.axes if a.name in lifted)
    )  # fmt: skip


class NotLinear(Exception):
    """A coefficient that is no number, or too much to read."""


def untouched(graph: Graph, u: int, path: Sequence[int]) -> list[str]:
    """Axes along which every op does the same by itself: the matrix stands once for all of their indices."""
    inside = set(path)

    def apart(axis: Axis) -> bool:
        for n in path:
            node = graph[n]
            if not isinstance(node.type, TensorType) or axis not in node.tensor.axes:
                return False
            if n != u and node.op not in ("order", "expand") and axis.name in words(dict(node.attrs)):
                return False
            beside = [graph[i] for i in node.inputs if i not in inside] if n != u and node.op not in ADDS else []
            if any(not isinstance(b.type, TensorType) or b.tensor.has(axis.name) for b in beside):
                return False
        return True

    return [a.name for a in graph[u].tensor.axes if apart(a)]


def words(value: object) -> Iterator[str]:
    """Every name in an op's attributes."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from words(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from words(v)


# ---- reading the matrix off ---------------------------------------------------------------------


class Forms:
    """For each node of a path its entries as linear forms in the entries of u; what is known is left out."""

    def __init__(self, graph: Graph, u: int, path: Sequence[int], lifted: Sequence[str]):
        self.graph, self.lifted = graph, set(lifted)
        self.constants = Constants(graph)
        self.left = MOST_WORK
        self.of: dict[int, list[Form]] = {u: [{j: 1.0} for j in range(self.count(u))]}
        for n in path:
            if n == u:
                continue
            rule = RULES[graph[n].op]
            self.of[n] = [rule(self, graph[n], dict(zip(self.names(n), w, strict=True))) for w in self.places(n)]

    def axes(self, n: int) -> list[Axis]:
        return [a for a in self.graph[n].tensor.axes if a.name not in self.lifted]

    def names(self, n: int) -> list[str]:
        return [a.name for a in self.axes(n)]

    def count(self, n: int) -> int:
        return prod(a.size for a in self.axes(n))

    def places(self, n: int) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(a.size) for a in self.axes(n)))

    def at(self, n: int, where: Where) -> Form:
        """An entry of an operand: no unknown one stands in what is known."""
        if n not in self.of:
            return {}
        place = 0
        for a in self.axes(n):
            place = place * a.size + where[a.name]
        found = self.of[n][place]
        self.left -= 1 + len(found)
        if self.left < 0:
            raise NotLinear
        return found

    def number(self, n: int, where: Where) -> float:
        """A coefficient: a number in the text, the same for every sample and parameter."""
        table: Table | None = self.constants.of(n)
        if table is None:
            raise NotLinear
        return table.at(where)

    def one_of(self, a: int, b: int) -> tuple[int, int]:
        """Of two factors the one that is linear in the unknown value, and then the other, which may not depend on it."""
        if a in self.of and b in self.of:
            raise NotLinear
        return (a, b) if a in self.of else (b, a)


def total(parts: Iterator[tuple[float, Form]]) -> Form:
    out: Form = {}
    for c, form in parts:
        for j, v in form.items():
            out[j] = out.get(j, 0.0) + c * v
    return out


def moves(to: Callable[[Forms, Node, Where], Where | None]) -> Callable[[Forms, Node, Where], Form]:
    """The rule of an op that moves entries: where each comes from, None for a zero."""

    def rule(f: Forms, node: Node, where: Where) -> Form:
        at = to(f, node, where)
        return {} if at is None else f.at(node.inputs[0], at)

    return rule


def ranges(axes: Sequence[tuple[str, int]]) -> Iterator[Where]:
    for place in itertools.product(*(range(n) for _, n in axes)):
        yield dict(zip((a for a, _ in axes), place, strict=True))


def summed(f: Forms, node: Node, where: Where) -> Form:
    t = f.graph[node.inputs[0]].tensor
    axes = [(a, t.size(a)) for a in node.attrs["axes"]]
    scale = 1.0 if node.op == "sum" else 1.0 / prod(n for _, n in axes)
    return total((scale, f.at(node.inputs[0], {**where, **w})) for w in ranges(axes))


def added(f: Forms, node: Node, where: Where) -> Form:
    a, b = (f.at(i, where) for i in node.inputs)
    return total(iter(((1.0, a), (1.0 if node.op == "add" else -1.0, b))))


def scaled(f: Forms, node: Node, where: Where) -> Form:
    value, factor = f.one_of(*node.inputs)
    if node.op == "div" and factor != node.inputs[1]:
        raise NotLinear
    c = f.number(factor, where)
    if node.op == "div":
        if not c:
            raise NotLinear
        c = 1.0 / c
    return total(iter(((c, f.at(value, where)),)))


def chosen(f: Forms, node: Node, where: Where) -> Form:
    condition, a, b = node.inputs
    return f.at(a if f.number(condition, where) else b, where)


def running(f: Forms, node: Node, where: Where) -> Form:
    axis, back, x = node.attrs["axis"], bool(node.attrs.get("reverse")), node.inputs[0]
    here, n = where[axis], f.graph[x].tensor.size(axis)
    kept = range(here, n) if back else range(here + 1)
    return total((1.0, f.at(x, {**where, axis: i})) for i in kept if i != here or not node.attrs.get("exclusive"))


def contracted(f: Forms, node: Node, where: Where) -> Form:
    value, factor = f.one_of(*node.inputs)
    t = f.graph[value].tensor
    axes = [(n, t.size(n)) for n in node.attrs["axes"]]
    return total((f.number(factor, {**where, **w}), f.at(value, {**where, **w})) for w in ranges(axes))


def convolved(f: Forms, node: Node, where: Where) -> Form:
    attrs, (x, w) = node.attrs, node.inputs[:2]
    if w in f.of or attrs["groups"] != 1:
        raise NotLinear
    kernel = f.graph[w].tensor
    out, inner, *windows = kernel.axes
    channel, t = attrs["channel"], f.graph[x].tensor

    def parts() -> Iterator[tuple[float, Form]]:
        for tap in ranges([(a.name, a.size) for a in (inner, *windows)]):
            at = {**where, channel: tap[inner.name]}
            for a, s, step, d, (before, _) in zip(
                windows, attrs["space"], attrs["stride"], attrs["dilation"], attrs["padding"], strict=True
            ):
                at[s] = where[s] * step + tap[a.name] * d - before
            if all(0 <= at[s] < t.size(s) for s in attrs["space"]):
                yield f.number(w, {**tap, out.name: where[channel]}), f.at(x, at)

    return total(parts())


def joined(f: Forms, node: Node, where: Where) -> Form:
    axis = node.attrs["axis"]
    if node.op == "stack":
        return f.at(node.inputs[where[axis]], where)
    k = where[axis]
    for i in node.inputs:
        size = f.graph[i].tensor.size(axis)
        if k < size:
            return f.at(i, {**where, axis: k})
        k -= size
    raise NotLinear


def shifted(f: Forms, node: Node, where: Where) -> Where | None:
    at = where[node.attrs["axis"]] - node.attrs["k"]
    return {**where, node.attrs["axis"]: at} if 0 <= at < node.tensor.size(node.attrs["axis"]) else None


def split(f: Forms, node: Node, where: Where) -> Where:
    at = 0
    for name, size in node.attrs["into"]:
        at = at * size + where[name]
    return {**where, node.attrs["axis"]: at}


def merged(f: Forms, node: Node, where: Where) -> Where:
    t, at, out = f.graph[node.inputs[0]].tensor, where[node.attrs["into"]], dict(where)
    for name in reversed(node.attrs["axes"]):
        at, out[name] = divmod(at, t.size(name))
    return out


def renamed(f: Forms, node: Node, where: Where) -> Where:
    back = {new: old for old, new in node.attrs["pairs"]}
    return {back.get(n, n): i for n, i in where.items()}


RULES: dict[str, Callable[[Forms, Node, Where], Form]] = {
    "add": added, "sub": added, "mul": scaled, "div": scaled, "where": chosen, "sum": summed, "mean": summed,
    "cumsum": running, "contract": contracted, "conv": convolved, "join": joined, "stack": joined,
    "neg": lambda f, node, where: total(iter(((-1.0, f.at(node.inputs[0], where)),))),
    "identity": moves(lambda f, node, where: where), "order": moves(lambda f, node, where: where),
    "expand": moves(lambda f, node, where: where), "rename": moves(renamed), "shift": moves(shifted),
    "reverse": moves(lambda f, node, where: {**where, (a := node.attrs["axis"]): node.tensor.size(a) - 1 - where[a]}),
    "permute": moves(lambda f, node, where: {**where, (a := node.attrs["axis"]): node.attrs["order"][where[a]]}),
    "slice": moves(lambda f, node, where: {**where, (a := node.attrs["axis"]): node.attrs["start"] + where[a]}),
    "pick": moves(lambda f, node, where: {**where, node.attrs["axis"]: node.attrs["index"]}),
    "split": moves(split), "merge": moves(merged),
}  # fmt: skip


# ---- the matrix ---------------------------------------------------------------------------------


def inverse(rows: Rows) -> tuple[Rows, float] | None:
    """The inverse and log|det| by elimination with pivots; None where a pivot is 0."""
    n = len(rows)
    left = [[*row, *(1.0 if i == j else 0.0 for j in range(n))] for i, row in enumerate(rows)]
    log_det = 0.0
    for k in range(n):
        best = max(range(k, n), key=lambda i: abs(left[i][k]))
        pivot = left[best][k]
        if not pivot or not isfinite(pivot):
            return None
        log_det += log(abs(pivot))
        left[k], left[best] = left[best], left[k]
        left[k] = [v / pivot for v in left[k]]
        for i in range(n):
            c = left[i][k]
            if i != k and c:
                left[i] = [v - c * w for v, w in zip(left[i], left[k], strict=True)]
    return [row[n:] for row in left], log_det


def regular(rows: Rows, found: Rows) -> bool:
    """|I - X·A| is far below 1 for the X that was found, so A is regular; and so is what its numbers were rounded from."""
    n = len(rows)
    columns = list(zip(*rows, strict=True))
    off = [
        [sum(x * a for x, a in zip(row, column, strict=True)) - (i == j) for j, column in enumerate(columns)]
        for i, row in enumerate(found)
    ]
    return norm(off) * max(n, 1) <= 1e-3 and norm(rows) * norm(found) <= CONDITION


def norm(rows: Rows) -> float:
    return max(sum(map(abs, row)) for row in rows)


def singular(inv: Inverter, exits: tuple[int, ...]) -> Failure:
    return Failure(
        "FL0403", "not invertible: this is linear, and its matrix is singular or nearly so", inv.graph[exits[-1]].span,
        suggestion="change a coefficient, so that no direction is lost",
    )  # fmt: skip


# ---- replay -------------------------------------------------------------------------------------


def solve_linear(r: Replay, step: Linear) -> None:
    """x = X·(y - f(0)), and once more with what is left: X is held in the model's precision."""
    b, u = r.b, r.source[step.entry]
    n = len(step.inverse)
    matrix = b.leaf("const", TensorType.of((ROW, n), (WHOLE, n)), batched=False, value=step.inverse)
    found = b.op("order", b.expand(b.const(0.0), u.tensor), names=u.tensor.names)
    for k in range(2):
        left = [r.value(e) for e in step.exits]
        if k or not alone(r.source, step):
            made = mapped(r, step, found)
            left = [b.sub(v, made[e]) for v, e in zip(left, step.exits, strict=True)]
        parts = [flat(r, step, v) for v in left]
        whole = parts[0] if len(parts) == 1 else b.op("join", *parts, axis=WHOLE)
        change = shaped(r, step, b.op("contract", matrix, whole, axes=(WHOLE,)))
        found = b.add(found, change) if k else change
    r.bind(u, found)


def alone(graph: Graph, step: Linear) -> bool:
    """Whether nothing is added, so that 0 goes to 0."""
    inside = set(step.path)
    adding = (graph[n] for n in step.path if n != step.entry and graph[n].op in (*ADDS, "where"))
    return all(i in inside for node in adding for i in node.inputs[node.op == "where" :])


def mapped(r: Replay, step: Linear, entry: int) -> dict[int, int]:
    """What the path makes of another value of its entry."""
    env = {step.entry: entry}
    inside = set(step.path)
    for n in step.path:
        if n != step.entry:
            node = r.source[n]
            env[n] = r.b.copy(node, [env[i] if i in inside else r.value(i) for i in node.inputs])
    return env


def flat(r: Replay, step: Linear, value: int) -> int:
    """Its own axes as one, after those that the matrix does not touch."""
    b, lifted = r.b, step.lifted
    own = tuple(n for n in b.type(value).names if n not in lifted)
    value = b.op("order", value, names=(*lifted, *own))
    if not own:
        return b.op("expand", value, axes=(*((a, b.type(value).size(a)) for a in lifted), (WHOLE, 1)))
    if len(own) == 1:
        return b.op("rename", value, pairs=((own[0], WHOLE),))
    return b.op("merge", value, axes=own, into=WHOLE)


def shaped(r: Replay, step: Linear, value: int) -> int:
    b, t = r.b, r.source[step.entry].tensor
    own = tuple((a.name, a.size) for a in t.axes if a.name not in step.lifted)
    if len(own) == 1:
        value = b.op("rename", value, pairs=((ROW, own[0][0]),))
    else:
        value = b.op("split", value, axis=ROW, into=own)
    return b.op("order", value, names=t.names)


def weigh_linear(r: Replay, step: Linear) -> None:
    r.weights.append(r.b.const(step.log_det))


__all__ = ["linear", "regular", "solve_linear", "weigh_linear"]
