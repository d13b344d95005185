"""Mean and variance of a network's values at initialisation, in closed form (Poole et al. 2016; Glorot & Bengio 2010).

The input has independent standard normal entries. Entries of a value are taken to be alike, independent and normal before each
activation, weights independent with mean 0: exact for wide layers, an approximation for narrow ones. A statistic over entries or
samples is a number. Values that share a source (x and a function of x) are not added or multiplied: there nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.types import TensorType


@dataclass(frozen=True)
class Moments:
    """Mean and variance of an entry, and the values that its randomness comes from."""

    mean: float
    var: float
    sources: frozenset[Any] = frozenset()

    @property
    def square(self) -> float:
        return self.var + self.mean**2


Known = Moments | None


@dataclass(frozen=True)
class Point:
    """A value along the network: the child that made it, and its variance where it is known."""

    name: str
    var: float | None


def propagate(region: Region) -> list[Point]:
    """The variances of what the parts of a network give, in the order in which they run, and of its result."""
    region = innermost(region)
    points: list[Point] = []
    inputs: list[Known] = [Moments(0.0, 1.0, frozenset({i})) for i in (*region.inputs, *region.context)]
    results = run(region, inputs, lambda name, m: points.append(Point(name, m.var if m is not None else None)))
    last = results[0]
    return [*points, Point("result", last.var if last is not None else None)]


def innermost(region: Region) -> Region:
    """A network that only hands its input to one other is that other."""
    while len(region.outputs) == 1:
        node = region.graph[region.outputs[0]]
        if node.op != "call" or node.attrs.get("lifted") or any(region.graph[i].op != "input" for i in node.inputs):
            break
        region = node.attrs["region"]
    return region


def run(region: Region, inputs: Sequence[Known], tell: Callable[[str, Known], None] | None = None) -> list[Known]:
    graph = region.graph
    known: dict[int, Known] = dict(zip([*region.inputs, *region.context], inputs, strict=True))
    several: dict[int, list[Known]] = {}
    live = {u.state: u.live for u in region.updates if u.live is not None}
    for n in sorted(graph.reachable([*region.outputs, *live.values()])):
        node = graph[n]
        if n in known or n in live:
            continue
        operands = [known.get(live.get(i, i)) for i in node.inputs]
        if node.op == "call":
            several[n] = fresh(run(node.attrs["region"], operands), n)
            if tell is not None:
                tell(node.attrs["child"], several[n][0])
        elif node.op == "repeat":
            several[n] = repeated(node, operands, tell)
        elif node.op == "choose":
            several[n] = operands[: len(operands) // 2]
        elif node.op == "get":
            found = several.get(node.inputs[0])
            known[n] = found[node.attrs["index"]] if found is not None else None
            continue
        if n in several:
            known[n] = several[n][0]
        elif isinstance(node.type, TensorType):
            known[n] = moments(graph, node, operands)
    return [known.get(live.get(o, o)) for o in region.outputs]


def fresh(results: list[Known], mark: Any) -> list[Known]:
    """Sources inside a region have other names outside: nodes of different regions share numbers."""
    return [
        None
        if m is None
        else Moments(m.mean, m.var, frozenset((mark, s) if isinstance(s, tuple) else s for s in m.sources))
        for m in results
    ]


def repeated(node: Node, operands: list[Known], tell: Callable[[str, Known], None] | None) -> list[Known]:
    carried = int(node.attrs["carried"])
    now, rest = operands[:carried], operands[carried:]
    for k in range(int(node.attrs["count"])):
        now = fresh(run(node.attrs["region"], [*now, *rest]), (node.id, k))
        if tell is not None:
            tell(f"{node.attrs['child']}.{k}", now[0])
    return now


# ---- rules --------------------------------------------------------------------------------------

MOVES = (
    "rename",
    "order",
    "split",
    "merge",
    "expand",
    "slice",
    "pick",
    "reverse",
    "permute",
    "identity",
    "stop",
    "within",
)
STATISTICS = ("mean", "batch_mean")
VARIANCES = ("var", "batch_var")


def weight(node: Node) -> tuple[float, float] | None:
    """Mean and variance of an entry of a parameter at its start."""
    init = node.attrs.get("init")
    structured = getattr(node.attrs.get("domain"), "structure", None) is not None
    if structured or node.attrs.get("domain") is None:
        return None
    if isinstance(init, int | float):
        return float(init), 0.0
    match init:
        case ("uniform", lo, hi):
            return (lo + hi) / 2, (hi - lo) ** 2 / 12
        case ("normal", mean, scale):
            return mean, scale**2
    return None


def moments(graph: Graph, node: Node, operands: list[Known]) -> Known:
    match node.op:
        case "param" | "state":
            found = weight(node)
            return Moments(*found, frozenset({("weight", node.id)} if found[1] else ())) if found is not None else None
        case "const":
            value = node.attrs["value"]
            return Moments(float(value), 0.0) if isinstance(value, int | float) else None
    xs = [m for m in operands if m is not None]
    if not xs or len(xs) != len(operands):
        return None
    x = xs[0]
    types = [graph[i].tensor for i in node.inputs]
    match node.op:
        case op if op in MOVES:
            return x
        case op if op in STATISTICS:
            n = math.prod(types[0].size(a) for a in node.attrs["axes"])
            return Moments(
                x.mean,
                0.0 if op.startswith("batch") else x.var / n,
                x.sources if n < 16 and op == "mean" else frozenset(),
            )
        case op if op in VARIANCES:
            return Moments(x.var, 0.0)
        case "sub" if (count := own_mean(graph, node)) is not None:
            return Moments(0.0, x.var * (1 - 1 / count), x.sources)
        case "add" | "sub":
            return summed(xs, 1 if node.op == "add" else -1)
        case "mul":
            return product(xs)
        case "div" if xs[1].var <= 0.05 * xs[1].mean ** 2 != 0 and not x.sources & xs[1].sources:  # all but a number
            return Moments(x.mean / xs[1].mean, x.var / xs[1].mean ** 2, x.sources)
        case "contract" | "conv":
            return weighted(graph, node, xs, types)
        case "min" | "max" if xs[1].var == 0:
            pick = max if node.op == "max" else min
            return through(lambda t: pick(t, xs[1].mean), x)
        case op if op in FUNCTIONS and len(xs) == 1:
            return through(FUNCTIONS[op](node), x)
    return None


def own_mean(graph: Graph, node: Node) -> int | None:
    """For x - mean(x), the number of entries that the mean is over."""
    left, right = (behind(graph, i) for i in node.inputs)
    if right.op != "mean" or behind(graph, right.inputs[0]).id != left.id:
        return None
    return math.prod(graph[right.inputs[0]].tensor.size(a) for a in right.attrs["axes"])


def behind(graph: Graph, id: int) -> Node:
    node = graph[id]
    while node.op in MOVES:
        node = graph[node.inputs[0]]
    return node


def summed(xs: list[Moments], sign: int) -> Known:
    a, b = xs
    if a.sources & b.sources:
        return None
    return Moments(a.mean + sign * b.mean, a.var + b.var, a.sources | b.sources)


def product(xs: list[Moments]) -> Known:
    a, b = xs
    if a.sources & b.sources:
        return None
    mean = a.mean * b.mean
    return Moments(mean, a.square * b.square - mean**2, a.sources | b.sources)


def weighted(graph: Graph, node: Node, xs: list[Moments], types: list[TensorType]) -> Known:
    """A sum of products with weights of mean 0: the variance is that of one product times their number."""
    slot = next((k for k, i in enumerate(node.inputs[:2]) if is_weight(graph, i)), None)
    if slot is None:
        return None
    w, x = xs[slot], xs[1 - slot]
    if w.mean != 0:
        return None
    axes = node.attrs["axes"] if node.op == "contract" else types[1].names[1:]
    count = math.prod(types[slot].size(a) for a in axes)
    return Moments(0.0, count * w.square * x.square, frozenset({("sum", node.id)}))


def is_weight(graph: Graph, id: int) -> bool:
    node = behind(graph, id)
    return (behind(graph, node.inputs[0]) if node.op == "masked" else node).op == "param"


def through(f: Callable[[float], float], x: Moments) -> Known:
    """The moments of f at a normal value, by Gauss-Hermite quadrature."""
    nodes, weights = hermite()
    try:
        if 0 < x.var <= 0.05 * x.mean**2:  # almost a number: the slope there, so that no node leaves f's domain
            sd = math.sqrt(x.var)
            return Moments(f(x.mean), ((f(x.mean + sd) - f(x.mean - sd)) / 2) ** 2, x.sources)
        values = [f(x.mean + math.sqrt(max(x.var, 0.0)) * t) for t in nodes]
    except (ArithmeticError, ValueError):
        return None
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    square = sum(w * v * v for w, v in zip(weights, values, strict=True))
    return Moments(mean, max(square - mean**2, 0.0) if x.var else 0.0, x.sources)


@cache
def hermite() -> tuple[tuple[float, ...], tuple[float, ...]]:
    from numpy.polynomial.hermite_e import hermegauss

    t, w = hermegauss(120)
    return tuple(t.tolist()), tuple((w / w.sum()).tolist())


def sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t)) if t > 0 else math.exp(t) / (1 + math.exp(t))


def elu(alpha: float) -> Callable[[float], float]:
    return lambda t: t if t > 0 else alpha * math.expm1(t)


FUNCTIONS: Mapping[str, Callable[[Node], Callable[[float], float]]] = {
    "neg": lambda n: lambda t: -t, "relu": lambda n: lambda t: max(t, 0.0), "tanh": lambda n: math.tanh, "exp": lambda n: math.exp,
    "sigmoid": lambda n: sigmoid, "silu": lambda n: lambda t: t * sigmoid(t), "abs": lambda n: abs, "sqrt": lambda n: math.sqrt,
    "square": lambda n: lambda t: t * t, "gelu": lambda n: lambda t: t * (1 + math.erf(t / math.sqrt(2))) / 2,
    "softplus": lambda n: lambda t: max(t, 0.0) + math.log1p(math.exp(-abs(t))), "sin": lambda n: math.sin, "cos": lambda n: math.cos,
    "elu": lambda n: elu(float(n.attrs["alpha"])),
    "leaky_relu": lambda n: lambda t: t if t > 0 else float(n.attrs["slope"]) * t,
    "selu": lambda n: lambda t: 1.0507009873554805 * elu(1.6732632423543772)(t),
    "clamp": lambda n: lambda t: min(max(t, float(n.attrs["lo"])), float(n.attrs["hi"])),
}  # fmt: skip
