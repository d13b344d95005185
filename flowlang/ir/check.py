"""The verifier of graphs and regions: what every pass must leave true. Tests turn it on for the whole suite.

`Checks.on` is set by tests (tests/conftest.py). Passes call `after`, which does nothing while it is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flowlang.ir.graph import Child, Graph, Node, Region, result_batched, result_types
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import OpProblem
from flowlang.ir.tangents import plain_method
from flowlang.ir.taps import Taps, place_type, taps_of
from flowlang.ir.types import LIFTED, Axis, TensorType, TupleType, Type

PLAIN = (str, int, float, bool, type(None))
KINDS = ("real", "int", "bool")
# Whether these vary from sample to sample is not a matter of their operands.
OWN_BATCH = {
    "random_like",
    "running",
    "start",
    "batch_mean",
    "batch_var",
    "batch_sum",
    "batch_max",
    "batch_min",
    "scan",
}


class BadGraph(Exception):
    """A graph that breaks an invariant: a fault of the compiler, never of a spec."""

    def __init__(self, where: str, problems: Sequence[str]):
        super().__init__(f"{where}: " + "; ".join(problems))
        self.problems = tuple(problems)


class Checks:
    """Whether passes verify what they make."""

    on = False


def after(region: Region) -> Region:
    """The region, verified where checks are on. A broken one has a diagnostic already."""
    if Checks.on and not region.broken:
        check_region(region)
    return region


def check_region(region: Region) -> None:
    """Raises BadGraph unless the region is well formed; its children are taken as verified."""
    raise_if(region.name, [*node_problems(region.graph), *region_problems(region)])


def check_program(name: str, graph: Graph, inputs: Sequence[int], outputs: Sequence[int]) -> None:
    """Raises BadGraph unless a program's graph is well formed, solver bodies included."""
    found = list(node_problems(graph))
    found += [f"input {i} is no input" for i in inputs if not has(graph, i) or graph[i].op != "input"]
    found += [f"output {o} does not exist" for o in outputs if not has(graph, o)]
    outputs = [o for o in outputs if has(graph, o)]
    loose = {n.id for n in graph if n.op == "input"} - set(inputs)
    found += [f"input {i} is read and belongs to nobody" for i in sorted(loose & graph.reachable(list(outputs)))]
    for n in graph:
        if "body" in n.attrs:
            body = n.attrs["body"]
            check_program(f"{name}, body of node {n.id}", body.graph, body.inputs, body.outputs)
    raise_if(name, found)


def raise_if(where: str, problems: list[str]) -> None:
    if problems:
        raise BadGraph(where, problems)


def has(graph: Graph, id: int) -> bool:
    return 0 <= id < len(graph)


# ---- nodes --------------------------------------------------------------------------------------


def node_problems(graph: Graph) -> Iterator[str]:
    for k, node in enumerate(graph):
        own = [*order_problems(graph, node, k), *type_problems(node.type), *attr_problems(node.attrs)]
        yield from (f"node {node.id} `{node.op}`: {problem}" for problem in own)
        if own or not all(has(graph, i) for i in node.inputs) or node.op not in OPS:
            continue
        for problem in (*inferred(graph, node), *batch_problems(graph, node), *call_problems(graph, node)):
            yield f"node {node.id} `{node.op}`: {problem}"


def order_problems(graph: Graph, node: Node, place: int) -> Iterator[str]:
    if node.op not in OPS:
        yield "no such op"
    if node.id != place:
        yield f"stands at {place}"
    for slot, i in enumerate(node.inputs):
        if not 0 <= i < node.id:
            yield f"operand {i} does not precede it"
        elif (node.id, slot) not in [(u.id, s) for u, s in graph.users(i)]:
            yield f"operand {i} does not know its user"


def type_problems(type: Type) -> Iterator[str]:
    for t in result_types(type):
        if len(set(t.names)) != t.rank:
            yield f"two axes of `{t}` have one name"
        if t.kind not in KINDS or any(not isinstance(a.size, int) or a.size < 0 for a in t.axes):
            yield f"{t.axes} of kind {t.kind} is no type"


def attr_problems(attrs: Any) -> Iterator[str]:
    for name, value in attrs.items():
        if not isinstance(name, str) or not frozen(value):
            yield f"attribute `{name}` may change: {type(value).__name__}"


def frozen(value: Any) -> bool:
    """Attributes are numbers, words, tuples of them, or values of the compiler's own immutable kinds."""
    if isinstance(value, tuple):
        return all(frozen(v) for v in value)
    return isinstance(value, PLAIN) or not isinstance(value, list | dict | set | bytearray)


def inferred(graph: Graph, node: Node) -> Iterator[str]:
    op = OPS[node.op]
    if op.made or "infer" in op.why_not:
        if node.op == "get":
            yield from get_problems(graph, node)
        return
    operands = [graph[i].type for i in node.inputs]
    if not all(isinstance(t, TensorType) for t in operands):
        yield "an operand has several values"
        return
    try:
        found = op.infer([t for t in operands if isinstance(t, TensorType)], node.attrs)
    except (OpProblem, KeyError) as e:
        yield f"its operands do not fit: {e}"
        return
    if found != node.type:
        yield f"has type `{node.type}`, and its operands make `{found}`"


def get_problems(graph: Graph, node: Node) -> Iterator[str]:
    source, index = graph[node.inputs[0]].type, node.attrs["index"]
    if not isinstance(source, TupleType) or not 0 <= index < len(source.items):
        yield f"reads result {index} of `{source}`"
    elif source.items[index] != node.type:
        yield f"has type `{node.type}`, and result {index} has `{source.items[index]}`"


def batch_problems(graph: Graph, node: Node) -> Iterator[str]:
    if not node.inputs or node.op in OWN_BATCH:
        if node.op in ("param", "state", "const", "index") and node.batched:
            yield "does not vary from sample to sample"
    elif node.op == "get":
        if node.batched != result_batched(graph, graph[node.inputs[0]], node.attrs["index"]):
            yield "varies with the samples otherwise than the result it reads"
    elif node.batched != any(graph[i].batched for i in node.inputs):
        yield "varies with the samples otherwise than its operands"


# ---- calls --------------------------------------------------------------------------------------


def call_problems(graph: Graph, node: Node) -> Iterator[str]:
    if node.op not in ("call", "repeat") or "tangents" in node.attrs:
        return
    region = node.attrs.get("region")
    if not isinstance(region, Region) or not isinstance(node.attrs.get("child"), str):
        yield "calls nobody"
        return
    method = plain_method(node.attrs)
    taps = taps_of(region, method) or Taps()
    method = "forward" if taps != Taps() else method
    formal = [region.graph[i].tensor for i in arguments(region, method)] + [place_type(region, p) for p in taps.write]
    if len(formal) != len(node.inputs):
        yield f"`{region.name}` takes {len(formal)} values and gets {len(node.inputs)}"
        return
    lifted = tuple(node.attrs.get("lifted", ()))
    front = TensorType.of(*lifted)
    for k, (i, t) in enumerate(zip(node.inputs, formal, strict=True)):
        have = graph[i].tensor
        # A lifted axis whose name the callee has for one of its own stands under another name at the call.
        apart = {Axis(f"{a.name}{LIFTED}", a.size) for a in front.axes}
        own = tuple(a for a in have.axes if a not in apart and (a not in front.axes or t.has(a.name)))
        if own != t.axes:
            yield f"argument {k} is `{have}`, and `{region.name}` takes `{t}` under `{front}`"
    given = [*called_results(region, method), *(place_type(region, p) for p in taps.read)]
    results = tuple(TensorType((*front.axes, *t.axes), t.kind) for t in given)
    have_results = result_types(node.type)
    if node.op == "repeat" and [t.axes for t in formal[: node.attrs["carried"]]] != [t.axes for t in results]:
        yield "a copy does not give back the types it takes"
    main = have_results[: len(results)]
    if [t.axes for t in main] != [t.axes for t in results]:
        yield f"gives `{node.type}`, and `{region.name}` gives {', '.join(f'`{t}`' for t in results)}"
    for extra in have_results[len(results) :]:
        if not node.attrs.get("log_det") or extra != front:
            yield f"gives `{extra}` besides its results"


def arguments(region: Region, method: str) -> list[int]:
    """What a call of that method takes."""
    if method in ("inverse", "generate"):
        left = [] if method == "generate" else [e.value for e in region.emissions]
        return [*region.outputs, *left, *region.context]
    return [*region.inputs, *region.context]


def called_results(region: Region, method: str) -> list[TensorType]:
    graph = region.graph
    if method in ("inverse", "generate"):
        return region.input_types()
    if method == "score":
        return region.output_types()
    return [*region.output_types(), *(graph[e.value].tensor for e in region.emissions)]


# ---- regions ------------------------------------------------------------------------------------


def region_problems(region: Region) -> Iterator[str]:
    graph = region.graph
    for role, ids in (("input", region.inputs), ("context", region.context)):
        for i in ids:
            if not has(graph, i) or graph[i].op != "input":
                yield f"{role} {i} is no input"
    named = [
        ("output", region.outputs),
        ("emission", [i for e in region.emissions for i in (e.value, *(a for _, a in e.arguments))]),
        ("draw", [i for d in region.draws for i in (d.value, *(a for _, a in d.arguments))]),
        ("step", [i for s in region.steps for i in (s.before, s.after)]),
        ("rule", [i for r in region.rules.values() for i in (*r.inputs, *r.outputs)]),
        ("base", [i for _, i in region.base.arguments] if region.base is not None else []),
        ("update", [i for u in region.updates for i in (u.state, u.new, *([] if u.live is None else [u.live]))]),
        ("start", [i for s in region.starts for i in (s.param, s.value)]),
    ]
    for what, ids in named:
        yield from (f"{what} {i} does not exist" for i in ids if not has(graph, i))
    yield from (
        f"draw {d.value} is no input" for d in region.draws if has(graph, d.value) and graph[d.value].op != "input"
    )
    for u in region.updates:
        if has(graph, u.state) and graph[u.state].op != "state":
            yield f"update of {u.state}, which is no state"
    for s in region.starts:
        if has(graph, s.param) and graph[s.param].op != "param":
            yield f"start of {s.param}, which is no parameter"
    names = [n.attrs["name"] for n in graph if n.op in ("param", "state") and not n.attrs.get("again")]
    if len(set(names)) != len(names):
        yield "two parameters have one name"
    yield from child_problems(region)


def child_problems(region: Region) -> Iterator[str]:
    called: set[str] = set()
    for node in (n for g in (region.graph, *(p.graph for p in region.programs.values())) for n in g):
        name = node.attrs.get("child")
        if name is None:
            continue
        called |= {name, *node.attrs.get("rule", ())}
        child = region.children.get(name)
        if child is None:
            yield f"node {node.id} calls `{name}`, which is no child"
        elif child.region is not node.attrs["region"]:
            yield f"node {node.id} calls `{name}` with another region than the child's"
        elif node.op == "repeat" and child.count != node.attrs["count"]:
            yield f"`{name}` has {child.count} copies, and {node.attrs['count']} are run"
    for name, child in region.children.items():
        if child.name != name:
            yield f"child `{name}` is named `{child.name}`"
        yield from binding_problems(region, child)
        called |= set(child.bindings.values()) | ({child.follows.source} if child.follows is not None else set())
    yield from (f"child `{n}` is never used" for n in region.children if n not in called)
    if any(region is r for c in region.children.values() for r in c.region.walk()):
        yield "the region contains itself"


def binding_problems(region: Region, child: Child) -> Iterator[str]:
    wanted = {n: c for n, c in child.region.children.items() if c.shared}
    for inner, outer in child.bindings.items():
        own = region.children.get(outer)
        if inner not in wanted:
            yield f"`{child.name}` is handed `{inner}`, which it does not share"
        elif own is None:
            yield f"`{child.name}` is handed `{outer}`, which is no child"
        elif own.region is not wanted[inner].region:
            yield f"`{child.name}` is handed `{outer}` for `{inner}`, which is another region"
    if not child.shared:
        yield from (f"`{child.name}` lacks its shared `{n}`" for n in wanted if n not in child.bindings)
