"""Norms that torch has itself: the pattern in a net's graph becomes one call of its kernel.

Recognised are (x - mean)/sqrt(var + eps) and x/sqrt(mean(x²) + eps), with or without gain and offset, over the last axes
(`F.layer_norm`, `F.rms_norm`), within groups of channels and all of space, or of space alone (`F.group_norm`), and by
running statistics of the batch (`F.batch_norm`); of weights, g · V/|V| (the kernels of torch's weight norm). Others become functions of the runtime whose gradients are written by hand:
RMSNorm on processors, where torch's kernel is a chain of ops, and RMSNorm by a part of the features or with eps outside the
root; EvoNorm's sample norms, x · sigmoid(v · x) over the spread of a group; and its batch norms, x over the larger of two
spreads. Everything else is written out op by op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

from flowlang.backends.torch.emit import Expr, Writer, argument, emitter

from flowlang.derive.program import Program, is_map
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node
from flowlang.ir.types import Axis, TensorType


@dataclass(frozen=True)
class Native:
    """A pattern's root becomes `op` of these operands; `inside` are the nodes that it stands for."""

    op: str
    inputs: tuple[int, ...]
    attrs: dict[str, object]
    inside: frozenset[int]


def with_native_norms(program: Program) -> Program:
    """The program with its native norms as nodes of their own, and fewer passes in what is written out."""
    if is_map(program.region):
        return program
    return regrouped(with_patterns(with_attention(program)))


@dataclass(frozen=True)
class Attended:
    """softmax over S of scale · q·k along d, times v: what each reads along, and the nodes that it stands for."""

    q: int
    k: int
    v: int
    lead: tuple[str, ...]
    axes: tuple[str, str, str, str]  # T, S, d, e
    scale: float
    causal: bool
    inside: frozenset[int]


def attention(graph: Graph, n: int) -> Attended | None:
    """The pattern that ends in a product with the softmax of scores; None where it is none."""
    root = graph[n]
    if root.op != "contract" or len(root.attrs["axes"]) != 1 or not root.batched:
        return None
    (s,) = root.attrs["axes"]
    r = Reader(graph)
    p, v = root.inputs if softened(graph, root.inputs[0]) else root.inputs[::-1]
    while graph[p].op == "order":
        r.taken.add(p)
        p = graph[p].inputs[0]
    weights = r.take(p, "softmax")
    if weights is None or weights.attrs["axis"] != s or not set(weights.attrs) <= {"axis", "causal"}:
        return None
    at, scale = weights.inputs[0], 1.0
    while graph[at].op == "order":
        r.taken.add(at)
        at = graph[at].inputs[0]
    if graph[at].op in ("mul", "div"):
        node = graph[at]
        number = r.number(node.inputs[1])
        if number is None or number == 0:
            return None
        r.taken.add(at)
        scale = number if node.op == "mul" else 1 / number
        at = node.inputs[0]
    product = r.take(at, "contract")
    if product is None or len(product.attrs["axes"]) != 1:
        return None
    (d,) = product.attrs["axes"]
    q, k = product.inputs
    if s in graph[q].tensor.names:
        q, k = k, q
    names = [set(graph[i].tensor.names) for i in (q, k, v)]
    lead = names[1] - {s, d}
    own, result = names[0] - lead - {d}, names[2] - lead - {s}
    fits = s in names[1] and d in names[0] & names[1] and lead < names[0] and lead < names[2]
    if (
        not fits
        or len(own) != 1
        or len(result) != 1
        or own == {s}
        or own & result
        or set(root.tensor.names) != lead | own | result
    ):
        return None
    (t,), (e,) = own, result
    if (
        not all(graph[i].batched and graph[i].tensor.kind == "real" for i in (q, k, v))
        or weights.attrs.get("causal", t) != t
    ):
        return None
    order = tuple(x for x in root.tensor.names if x in lead)
    return Attended(q, k, v, order, (t, s, d, e), scale, "causal" in weights.attrs, frozenset(r.taken))


def softened(graph: Graph, n: int) -> bool:
    while graph[n].op == "order":
        n = graph[n].inputs[0]
    return graph[n].op == "softmax"


def with_attention(program: Program) -> Program:
    """The program with attention that is written out as one op each."""
    graph = program.graph
    roots = [*program.outputs, *(n for _, n in program.effects)]
    needed = graph.reachable(roots)
    found: dict[int, Attended] = {}
    for n in sorted(needed):
        a = attention(graph, n)
        if a is not None and closed(graph, Native("", (), {}, a.inside), n, needed, roots):
            found[n] = a
    if not found:
        return program
    b, ids = Builder(Graph()), dict[int, int]()
    inside = {n for a in found.values() for n in a.inside}
    for n in sorted((needed | set(program.inputs)) - inside):
        node, a = graph[n], found.get(n)
        if a is None:
            ids[n] = b.graph.again(node, [ids[i] for i in node.inputs])
            continue
        t, s, d, e = a.axes
        wanted = ((a.q, (*a.lead, t, d)), (a.k, (*a.lead, s, d)), (a.v, (*a.lead, s, e)))
        parts = [
            b.op("order", ids[i], names=names) if graph[i].tensor.names != names else ids[i] for i, names in wanted
        ]
        laid = TensorType(tuple(Axis(x, node.tensor.size(x)) for x in (*a.lead, t, e)), "real")
        made = b.graph.add(
            "native_attention", tuple(parts), laid, {"scale": a.scale, "causal": a.causal}, span=node.span, batched=True
        ).id
        ids[n] = made if laid.names == node.tensor.names else b.op("order", made, names=node.tensor.names)
        if node.label:
            b.graph.relabel(ids[n], node.label)
    return replace(
        program, graph=b.graph, inputs=[ids[i] for i in program.inputs], outputs=[ids[o] for o in program.outputs],
        effects=[(name, ids[n]) for name, n in program.effects],
    )  # fmt: skip


def with_patterns(program: Program) -> Program:
    graph = program.graph
    roots = [*program.outputs, *(n for _, n in program.effects)]
    needed = graph.reachable(roots)
    found: dict[int, Native] = {}
    inside: set[int] = set()
    for n in sorted(needed, reverse=True):  # outermost first: with gain and offset where they are there
        if n not in inside:
            native = match(graph, n)
            if native is not None and closed(graph, native, n, needed, roots):
                found[n] = native
                inside |= native.inside
    if not found:
        return program
    made, ids = Graph(), dict[int, int]()
    keep = wanted(graph, roots, found) | set(program.inputs)
    for n in sorted(keep):
        node, native = graph[n], found.get(n)
        op, inputs, attrs = (
            (node.op, node.inputs, node.attrs) if native is None else (native.op, native.inputs, native.attrs)
        )
        ids[n] = made.add(
            op, tuple(ids[i] for i in inputs), node.type, attrs, span=node.span, label=node.label, batched=node.batched
        ).id
    return replace(
        program, graph=made, inputs=[ids[i] for i in program.inputs], outputs=[ids[o] for o in program.outputs],
        effects=[(name, ids[n]) for name, n in program.effects],
    )  # fmt: skip


def smaller(graph: Graph, node: Node, ops: tuple[str, str]) -> tuple[int, int] | None:
    """(value, other) of one of these two ops by something smaller, that lacks one of the value's axes."""
    if node.op not in ops or node.inputs[0] == node.inputs[1] or node.tensor.kind != "real":
        return None
    for k in (0, 1) if node.op == ops[0] else (0,):
        x, s = graph[node.inputs[k]], graph[node.inputs[1 - k]]
        if x.batched and x.tensor.names == node.tensor.names and set(s.tensor.names) < set(x.tensor.names):
            return x.id, s.id
    return None


def regrouped(program: Program) -> Program:
    """x / s · g and x - m + b for factors and terms smaller than x become x · (g / s) and x + (b - m).

    One pass over x, and over its gradient, in place of two.
    """
    graph = program.graph
    roots = [*program.outputs, *(n for _, n in program.effects)]
    needed = graph.reachable(roots)

    def alone(n: int) -> bool:
        return n not in roots and sum(user.id in needed for user, _ in graph.users(n)) == 1

    chains: dict[int, tuple[int, tuple[str, str], list[tuple[str, int]]]] = {}
    inside: set[int] = set()
    for n in sorted(needed, reverse=True):
        if n in inside:
            continue
        ops = ("add", "sub") if graph[n].op in ("add", "sub") else ("mul", "div")
        found = smaller(graph, graph[n], ops)
        parts: list[tuple[str, int]] = []
        x, own, names = n, [], set[str]()
        while found is not None and (x == n or alone(x)):
            wider = names | set(graph[found[1]].tensor.names)
            if not wider < set(graph[n].tensor.names):
                break
            parts.append((graph[x].op, found[1]))
            own.append(x)
            x, names = found[0], wider
            found = smaller(graph, graph[x], ops)
        if len(parts) > 1 and any(graph[s].tensor.axes for _, s in parts):
            chains[n] = x, ops, parts[::-1]
            inside |= set(own)
    if not chains:
        return program
    b, ids = Builder(Graph()), dict[int, int]()
    for n in sorted(needed | set(program.inputs)):
        node = graph[n]
        if n in inside and n not in chains:
            continue
        if n not in chains:
            ids[n] = b.graph.again(node, [ids[i] for i in node.inputs])
            continue
        x, (more, less), parts = chains[n]
        above, below = ([ids[s] for op, s in parts if op == kind] for kind in (more, less))
        join = b.mul if more == "mul" else b.add
        small = reduce(join, above) if above else b.const(1.0 if more == "mul" else 0.0)
        if below:
            small = b.op(less, small, reduce(join, below))
        made = b.op(more, ids[x], small, span=node.span)
        ids[n] = b.graph.add(
            more, b.graph[made].inputs, node.type, {}, span=node.span, label=node.label, batched=node.batched
        ).id
    return replace(
        program, graph=b.graph, inputs=[ids[i] for i in program.inputs], outputs=[ids[o] for o in program.outputs],
        effects=[(name, ids[n]) for name, n in program.effects],
    )  # fmt: skip


def wanted(graph: Graph, roots: list[int], found: dict[int, Native]) -> set[int]:
    return graph.reachable(roots, lambda n: found[n.id].inputs if n.id in found else n.inputs)


def closed(graph: Graph, native: Native, root: int, needed: set[int], roots: list[int]) -> bool:
    """Whether what a pattern computes on its way is read by nothing else (running values are written once)."""
    own = native.inside | {root}
    return all(
        n not in roots and all(user.id in own or user.id not in needed for user, _ in graph.users(n))
        for n in native.inside
    )


# ---- patterns -----------------------------------------------------------------------------------


class Reader:
    """Reads a pattern from its root, noting the nodes that it takes."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.taken: set[int] = set()

    def take(self, n: int, *ops: str) -> Node | None:
        node = self.graph[n]
        if node.op not in ops:
            return None
        self.taken.add(n)
        return node

    def param(self, node: Node, names: tuple[str, ...]) -> tuple[int, int] | None:
        """(the other operand, the parameter over these axes) of a sum or product."""
        for k in (1, 0):
            other = self.graph[node.inputs[k]]
            if not other.batched and other.op == "param" and other.tensor.names == names:
                return node.inputs[1 - k], other.id
        return None

    def number(self, n: int) -> float | None:
        node = self.graph[n]
        value = node.attrs.get("value") if node.op == "const" and not node.tensor.axes else None
        return float(value) if isinstance(value, int | float) else None

    def under_root(self, n: int) -> tuple[int, float] | None:
        """(v, eps) of sqrt(v + eps)."""
        root = self.take(n, "sqrt")
        total = self.take(root.inputs[0], "add") if root is not None else None
        if total is None:
            return None
        eps = self.number(total.inputs[1])
        return (total.inputs[0], eps) if eps is not None else None


def match(graph: Graph, n: int) -> Native | None:
    node = graph[n]
    if node.op in ("mean", "batch_mean"):
        return mean_of_squares(graph, node)
    if node.op == "batch_var":
        return unbiased(graph, node)
    if node.op == "mul" and not node.batched:
        return weight_normed(graph, node)
    if node.op not in ("add", "mul", "div") or not node.batched:
        return None
    for axes in affine_axes(graph, node):
        found = read(graph, node, axes)
        if found is not None:
            return found
    return None


def weight_normed(graph: Graph, node: Node) -> Native | None:
    """g · V/sqrt(sum(V²)) of a weight, the sum over all axes but the first, along which g is a parameter."""
    r = Reader(graph)
    names = node.tensor.names
    pair = r.param(node, names[:1])
    ratio = r.take(pair[0], "div") if pair is not None and len(names) > 1 else None
    root = r.take(ratio.inputs[1], "sqrt") if ratio is not None else None
    total = r.take(root.inputs[0], "sum") if root is not None else None
    square = r.take(total.inputs[0], "square") if total is not None else None
    if pair is None or ratio is None or total is None or square is None:
        return None
    v = graph[ratio.inputs[0]]
    if square.inputs != (v.id,) or v.tensor.names != names or sorted(total.attrs["axes"]) != sorted(names[1:]):
        return None
    return Native("native_weight_norm", (v.id, pair[1]), {}, frozenset(r.taken))


def mean_of_squares(graph: Graph, node: Node) -> Native | None:
    """The mean of x² over the last axes, which is a product of vectors."""
    square = graph[node.inputs[0]]
    axes = sorted(node.attrs["axes"])
    names = square.tensor.names
    if square.op != "square" or sorted(names[len(names) - len(axes) :]) != axes or (not axes and node.op == "mean"):
        return None
    return Native(f"native_{node.op}_square", square.inputs, {"axes": node.attrs["axes"]}, frozenset({square.id}))


def unbiased(graph: Graph, node: Node) -> Native | None:
    """A variance that divides by n - 1, where that which divides by n is there too."""
    for twin, _ in graph.users(node.inputs[0]):
        same = twin.op == "batch_var" and twin.inputs == node.inputs and twin.attrs["axes"] == node.attrs["axes"]
        if same and twin.id < node.id and node.attrs.get("ddof") == 1 and not twin.attrs.get("ddof"):
            return Native("native_unbiased", (twin.id, node.inputs[0]), {}, frozenset())
    return None


def affine_axes(graph: Graph, node: Node) -> list[tuple[str, ...]]:
    """Over which axes a gain or an offset may stand: those of the parameter at the root; none for a bare ratio."""
    if node.op == "div":
        return [()]
    return [graph[i].tensor.names for i in node.inputs if graph[i].op == "param"]


def read(graph: Graph, root: Node, axes: tuple[str, ...]) -> Native | None:
    r = Reader(graph)
    node, offset, gain = root, None, None
    if node.op == "add":
        pair = r.param(node, axes)
        if pair is None:
            return None
        offset, inner = pair[1], r.take(pair[0], "mul", "div")
        if inner is None:
            return None
        node = inner
    if node.op == "mul":
        pair = r.param(node, axes)
        if pair is None:
            return None
        gain, inner = pair[1], r.take(pair[0], "div")
        if inner is None:
            return None
        node = inner
    if node.op != "div" or (offset is not None and gain is None):
        return None
    rule: Callable[[Reader, Node, tuple[str, ...], int | None, int | None], Native | None]
    for rule in (centred, scaled, by_batch, gated, over):
        mine = Reader(graph)
        mine.taken = set(r.taken)
        found = rule(mine, node, axes, gain, offset)
        if found is not None:
            return found
    return None


def made(
    r: Reader, op: str, x: int, gain: int | None, offset: int | None, more: tuple[int, ...] = (), **attrs: object
) -> Native:
    given = tuple(p for p in (gain, offset) if p is not None)
    return Native(
        op, (x, *more, *given), {**attrs, "gain": gain is not None, "offset": offset is not None}, frozenset(r.taken)
    )


def statistic(r: Reader, n: int, op: str, x: int) -> tuple[tuple[str, ...], str, int] | None:
    """The axes of a mean or variance of x, and (channel axis, groups) where it is taken within groups of one."""
    node = r.graph[n]
    if node.op == op:
        r.taken.add(n)
        if node.inputs != (x,) or node.attrs.get("ddof", 0):
            return None
        return tuple(sorted(node.attrs["axes"])), "", 0
    merge = r.take(n, "merge")
    spread = r.take(merge.inputs[0], "expand") if merge is not None else None
    inner = r.take(spread.inputs[0], op) if spread is not None else None
    split = r.take(inner.inputs[0], "split") if inner is not None else None
    if merge is None or inner is None or split is None or split.inputs != (x,) or inner.attrs.get("ddof", 0):
        return None
    (outer, groups), (within, _) = split.attrs["into"]
    channel = split.attrs["axis"]
    if (
        merge.attrs["into"] != channel
        or tuple(merge.attrs["axes"]) != (outer, within)
        or within not in inner.attrs["axes"]
    ):
        return None
    return tuple(sorted(a for a in inner.attrs["axes"] if a != within)), channel, groups


def centred(r: Reader, ratio: Node, axes: tuple[str, ...], gain: int | None, offset: int | None) -> Native | None:
    """(x - mean)/sqrt(var + eps): layer, group and instance norm."""
    less, under = r.take(ratio.inputs[0], "sub"), r.under_root(ratio.inputs[1])
    if less is None or under is None:
        return None
    x = less.inputs[0]
    mean, var = statistic(r, less.inputs[1], "mean", x), statistic(r, under[0], "var", x)
    if mean is None or mean != var or r.graph[x].tensor.kind != "real":
        return None
    over, channel, groups = mean
    names = r.graph[x].tensor.names
    both = (gain is None) == (offset is None)
    last = names[len(names) - len(over) :]
    if not channel and tuple(sorted(last)) == over and axes in ((), last) and both and ratio.tensor.names == names:
        return made(r, "native_layer_norm", x, gain, offset, eps=under[1], dims=len(over))
    space = names[1:]
    if not channel and groups == 0 and len(names) > 1:
        channel, groups = names[0], r.graph[x].tensor.size(names[0])
    if channel == names[0] and tuple(sorted(space)) == over and axes in ((), (channel,)) and both:
        return made(r, "native_group_norm", x, gain, offset, eps=under[1], groups=groups, rank=len(names))
    return None


def scaled(r: Reader, ratio: Node, axes: tuple[str, ...], gain: int | None, offset: int | None) -> Native | None:
    """x/(sqrt(mean(p²) + inside) + outside), either of them or none, p = x or a part of it: RMSNorm over the last axes."""
    x, under, outside, inside = ratio.inputs[0], ratio.inputs[1], 0.0, 0.0
    if r.graph[under].op == "add":
        total = r.take(under, "add")
        number = r.number(total.inputs[1]) if total is not None else None
        if total is None or number is None:
            return None
        under, outside = total.inputs[0], number
    root = r.take(under, "sqrt")
    if root is None:
        return None
    square_mean = root.inputs[0]
    if r.graph[square_mean].op == "add":
        total = r.take(square_mean, "add")
        number = r.number(total.inputs[1]) if total is not None else None
        if total is None or number is None:
            return None
        square_mean, inside = total.inputs[0], number
    mean = r.take(square_mean, "mean")
    square = r.take(mean.inputs[0], "square") if mean is not None else None
    if mean is None or square is None or offset is not None or r.graph[x].tensor.kind != "real":
        return None
    names, part = r.graph[x].tensor.names, r.graph[square.inputs[0]]
    last = names[len(names) - len(mean.attrs["axes"]) :]
    if sorted(last) != sorted(mean.attrs["axes"]) or axes not in ((), last) or ratio.tensor.names != names:
        return None
    span: dict[str, object] = {}
    if part.id != x:
        if part.op != "slice" or part.inputs != (x,) or last != (part.attrs["axis"],):
            return None
        r.taken.add(part.id)
        span = {"start": part.attrs["start"], "stop": part.attrs["stop"]}
    return made(r, "native_rms_norm", x, gain, None, inside=inside, outside=outside, dims=len(last), **span)


def over(r: Reader, ratio: Node, axes: tuple[str, ...], gain: int | None, offset: int | None) -> Native | None:
    """x/max(floor, slope · x + spread), floor by channel, the others by sample and channel: EvoNorm's batch norms."""
    x, larger = ratio.inputs[0], r.take(ratio.inputs[1], "max")
    names = r.graph[x].tensor.names
    if (
        larger is None
        or gain is None
        or offset is None
        or len(names) < 2
        or axes != names[:1]
        or ratio.tensor.names != names
    ):
        return None
    floor, line = (r.graph[i] for i in larger.inputs)
    if floor.tensor.names == names:
        floor, line = line, floor
    found = affine_in(r, line.id, x, names[:1])
    if found is None or floor.tensor.names != names[:1] or floor.batched or r.graph[x].tensor.kind != "real":
        return None
    slope, number, spread = found
    more = (floor.id, *(() if slope is None else (slope,)), spread)
    return made(r, "native_over_larger", x, gain, offset, more, slope=number, rank=len(names))


def affine_in(r: Reader, n: int, x: int, names: tuple[str, ...]) -> tuple[int | None, float, int] | None:
    """(slope, number, spread) of slope · x + spread, where both are by `names`; the number stands for a slope that is none."""

    def small(i: int) -> bool:
        return r.graph[i].tensor.names == names

    node = r.take(n, "add", "sub", "mul")
    if node is None:
        return None
    a, b = node.inputs
    if node.op == "sub":  # spread - x
        return (None, -1.0, a) if b == x and small(a) else None
    if node.op == "mul":  # (x + 1) · spread
        a, b = (a, b) if small(b) else (b, a)
        inner = r.take(a, "add") if small(b) else None
        return (b, 0.0, b) if inner is not None and inner.inputs[0] == x and r.number(inner.inputs[1]) == 1 else None
    a, b = (a, b) if small(b) else (b, a)
    product = r.take(a, "mul") if small(b) else None
    if product is None or x not in product.inputs:
        return None
    slope = product.inputs[0] if product.inputs[1] == x else product.inputs[1]
    return (slope, 0.0, b) if small(slope) else None


def gated(r: Reader, ratio: Node, axes: tuple[str, ...], gain: int | None, offset: int | None) -> Native | None:
    """x · sigmoid(v · x)/sqrt(spread + eps), spread the variance or the mean square of groups: EvoNorm's sample norms."""
    product, under = r.take(ratio.inputs[0], "mul"), r.under_root(ratio.inputs[1])
    gate = next((k for k in (0, 1) if product is not None and r.graph[product.inputs[k]].op == "sigmoid"), None)
    if product is None or under is None or gate is None or gain is None or offset is None:
        return None
    x = product.inputs[1 - gate]
    sigmoid = r.take(product.inputs[gate], "sigmoid")
    assert sigmoid is not None
    names = r.graph[x].tensor.names
    v: tuple[int, ...] = ()
    if sigmoid.inputs[0] != x:
        inner = r.take(sigmoid.inputs[0], "mul")
        pair = r.param(inner, names[:1]) if inner is not None else None
        if pair is None or pair[0] != x:
            return None
        v = (pair[1],)
    if len(names) < 2 or axes != names[:1] or ratio.tensor.names != names or r.graph[x].tensor.kind != "real":
        return None
    squares = next((u.id for u, _ in r.graph.users(x) if u.op == "square"), None)
    for op, of in (("var", x), ("mean", squares)):
        found = statistic(r, under[0], op, of) if of is not None else None
        if found is not None:
            over, channel, groups = found
            if not channel and over == tuple(sorted(names[1:])):
                channel, groups = names[0], r.graph[x].tensor.size(names[0])
            if channel != names[0] or over != tuple(sorted(names[1:])):
                return None
            if of != x:
                r.taken.add(of)
            return made(
                r,
                "native_gated_norm",
                x,
                gain,
                offset,
                v,
                eps=under[1],
                groups=groups,
                rank=len(names),
                centred=op == "var",
                gated=bool(v),
            )
    return None


def by_batch(r: Reader, ratio: Node, axes: tuple[str, ...], gain: int | None, offset: int | None) -> Native | None:
    """(x - m)/sqrt(v + eps) with running statistics m and v of the batch and all of space."""
    less, under = r.take(ratio.inputs[0], "sub"), r.under_root(ratio.inputs[1])
    mean = r.take(less.inputs[1], "running") if less is not None else None
    var = r.take(under[0], "running") if under is not None else None
    if less is None or under is None or mean is None or var is None or (gain is None) != (offset is None):
        return None
    x = less.inputs[0]
    names = r.graph[x].tensor.names
    if not names or axes not in ((), names[:1]):
        return None
    first, second = follows(r, mean, "batch_mean", x, 0), follows(r, var, "batch_var", x, 1)
    if first is None or second is None or first[1] != second[1]:
        return None
    states = (first[0], second[0])
    return made(r, "native_batch_norm", x, gain, offset, states, eps=under[1], momentum=first[1], rank=len(names))


def follows(r: Reader, node: Node, op: str, x: int, ddof: int) -> tuple[int, float] | None:
    """(state, momentum) where a running value is state · (1 - momentum) + momentum · statistic, unbiased for a variance."""
    live, new = node.inputs
    space = sorted(r.graph[x].tensor.names[1:])
    batch = r.take(live, op)
    total = r.take(new, "add")
    if (
        batch is None
        or total is None
        or batch.inputs != (x,)
        or batch.attrs.get("ddof", 0)
        or sorted(batch.attrs["axes"]) != space
    ):
        return None
    kept, added = (r.take(i, "mul") for i in total.inputs)
    if kept is None or added is None:
        return None
    state, statistic_ = r.graph[kept.inputs[0]], r.take(added.inputs[0], op)
    rest, momentum = r.number(kept.inputs[1]), r.number(added.inputs[1])
    if (
        state.op != "state"
        or statistic_ is None
        or rest is None
        or momentum is None
        or abs(rest + momentum - 1) > 1e-12
    ):
        return None
    if (
        statistic_.inputs != (x,)
        or statistic_.attrs.get("ddof", 0) != ddof
        or sorted(statistic_.attrs["axes"]) != space
    ):
        return None
    return state.id, momentum


# ---- what is written ----------------------------------------------------------------------------


TITLES = {  # torch's own kernels
    "native_layer_norm": "layer norm",
    "native_group_norm": "group norm",
    "native_batch_norm": "batch norm",
    "native_attention": "scaled_dot_product_attention",
    "native_weight_norm": "weight norm",
}
BY_HAND = (  # functions of the runtime that take the place of several ops
    "native_rms_norm", "native_over_larger", "native_gated_norm", "native_unbiased", "native_mean_square",
    "native_batch_mean_square",
)  # fmt: skip


def title(w: Writer, n: Node) -> None:
    w.lines.append(f"# torch's own {TITLES[n.op]}: the spec's formula is its pattern")


def operands(w: Writer, n: Node, count: int) -> tuple[list[str], str, str]:
    """The values, then the gain and the offset or `None`."""
    title(w, n)
    texts = [argument(w, i) for i in n.inputs]
    values, rest = texts[:count], texts[count:]
    gain = rest.pop(0) if n.attrs["gain"] else "None"
    return values, gain, rest.pop(0) if n.attrs["offset"] else "None"


@emitter("native_layer_norm")
def _layer_norm(w: Writer, n: Node) -> Expr:
    (x,), gain, offset = operands(w, n, 1)
    shape = n.tensor.shape[n.tensor.rank - n.attrs["dims"] :]
    return Expr(f"F.layer_norm({x}, {shape!r}, {gain}, {offset}, {n.attrs['eps']!r})")


@emitter("native_rms_norm")
def _rms_norm(w: Writer, n: Node) -> Expr:
    x, *rest = (argument(w, i) for i in n.inputs)
    a = n.attrs
    more = [repr(a["outside"])] if a["outside"] or "start" in a else []
    if "start" in a:
        more += [repr(a["start"]), repr(a["stop"])]
    own = "torch's own RMS norm where it is one kernel, else " if not more else ""
    w.lines.append(f"# {own}with a gradient written by hand in the runtime")
    gain = rest[0] if rest else "None"
    return Expr(f"{w.scope.use('rms_norm')}({', '.join([x, repr(a['dims']), gain, repr(a['inside']), *more])})")


@emitter("native_over_larger")
def _over_larger(w: Writer, n: Node) -> Expr:
    w.lines.append("# the gradient of this norm is written by hand in the runtime")
    x, floor, *rest = (argument(w, i) for i in n.inputs)
    slope = rest.pop(0) if len(rest) == 4 else repr(n.attrs["slope"])
    return Expr(f"{w.scope.use('over_larger')}({', '.join([x, repr(n.attrs['rank']), floor, slope, *rest])})")


@emitter("native_group_norm")
def _group_norm(w: Writer, n: Node) -> Expr:
    (x,), gain, offset = operands(w, n, 1)
    return Expr(
        f"{w.scope.use('grouped_norm')}({x}, {n.attrs['rank']}, {n.attrs['groups']}, {gain}, {offset}, {n.attrs['eps']!r})"
    )


@emitter("native_unbiased")
def _unbiased(w: Writer, n: Node) -> Expr:
    return Expr(f"{w.scope.use('unbiased')}({', '.join(argument(w, i) for i in n.inputs)})")


@emitter("native_mean_square")
def _mean_square(w: Writer, n: Node) -> Expr:
    return Expr(f"{w.scope.use('mean_square')}({argument(w, n.inputs[0])}, {len(n.attrs['axes'])})")


@emitter("native_batch_mean_square")
def _batch_mean_square(w: Writer, n: Node) -> Expr:
    x = n.inputs[0]
    dims = tuple(w.dim(x, a) for a in n.attrs["axes"])
    return Expr(f"{w.scope.use('batch_mean_square')}({argument(w, x)}, {w.type(x).rank}, {dims!r})")


@emitter("native_attention")
def _attention(w: Writer, n: Node) -> Expr:
    title(w, n)
    causal = ", True" if n.attrs["causal"] else ""
    return Expr(f"{w.scope.use('attend')}({', '.join(argument(w, i) for i in n.inputs)}, {n.attrs['scale']!r}{causal})")


@emitter("native_weight_norm")
def _weight_norm(w: Writer, n: Node) -> Expr:
    title(w, n)
    return Expr(f"{w.scope.use('normed_weight')}({', '.join(argument(w, i) for i in n.inputs)})")


@emitter("native_gated_norm")
def _gated_norm(w: Writer, n: Node) -> Expr:
    w.lines.append("# the gradient of this norm is written by hand in the runtime")
    x, *rest = (argument(w, i) for i in n.inputs)
    v = rest.pop(0) if n.attrs["gated"] else "None"
    numbers = f"{n.attrs['centred']}, {n.attrs['eps']!r}"
    return Expr(
        f"{w.scope.use('gated_norm')}({x}, {n.attrs['rank']}, {n.attrs['groups']}, {v}, {', '.join(rest)}, {numbers})"
    )


@emitter("native_batch_norm")
def _batch_norm(w: Writer, n: Node) -> Expr:
    (x, mean, var), gain, offset = operands(w, n, 3)
    numbers = f"{n.attrs['momentum']!r}, {n.attrs['eps']!r}"
    return Expr(
        f"{w.scope.use('batched_norm')}({x}, {n.attrs['rank']}, {mean}, {var}, {gain}, {offset}, self.training, {numbers})"
    )


__all__ = ["with_native_norms"]
