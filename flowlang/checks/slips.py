"""Slips in losses that regress a network on what follows from a path: the network is given the wrong thing, or the wrong target.

Read from the graph: `path.at` and `path.velocity` mark what they make. A difference of a network's result and a
velocity is a regression; what the network reads is followed back from there.

Most are warnings, since another program may mean them: a field without time, velocities that are data, a network of one step. Two are
errors. A network that is integrated is a function of the place; where its regression gives it an end of the path itself, at the
same times, or compares what it says of x_t with an end of the path that x_t lies on, no integral of it is what was learned.
"""

from __future__ import annotations

from collections.abc import Iterator

from flowlang.diagnostics import Diagnostic, Report
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.types import TensorType

MOVED = ("rename", "order", "expand", "split", "merge", "identity", "slice", "pick", "stop")


def check_slips(model: Region, report: Report) -> None:
    velocities: dict[str, int] = {}
    for p in model.programs.values():
        for name, steps in integrated(p):
            velocities[name] = min(steps, velocities.get(name, steps))
    for program in model.programs.values():
        for difference, call, other in regressions(program.graph):
            found = slip(program.graph, call, other, velocities)
            if found is not None:
                message, suggestion, certain = found
                report.add(
                    Diagnostic(
                        "FL0607",
                        message,
                        difference.span,
                        severity="error" if certain else "warning",
                        suggestion=suggestion,
                    )
                )
                break  # one slip in a program is told at a time


def integrated(program: Region) -> Iterator[tuple[str, int]]:
    """The networks whose result is a velocity that the program integrates, with the number of steps (2 where it is chosen)."""
    for node in program.graph:
        if node.op != "integrate":
            continue
        field: Region = node.attrs["region"]
        end = source(field.graph, field.outputs[0])
        if end.op == "call":
            outer = program.children[node.attrs["child"]].bindings.get(end.attrs["child"])
            if outer is not None:
                yield outer, int(node.attrs.get("steps", 2))


def source(graph: Graph, n: int) -> Node:
    """Where a value comes from, through what only moves it about."""
    node = graph[n]
    while (node.op in MOVED or node.op == "get") and "path" not in node.attrs:
        node = graph[node.inputs[0]]
    return node


def regressions(graph: Graph) -> Iterator[tuple[Node, Node, Node]]:
    """Differences of a network's result and something else: the difference, the network's call, the other."""
    for node in graph:
        if node.op != "sub":
            continue
        a, b = (source(graph, i) for i in node.inputs)
        for call, other in ((a, b), (b, a)):
            if call.op == "call" and call.attrs["region"].kind == "net" and other.op != "call":
                yield node, call, other


def slip(graph: Graph, call: Node, other: Node, velocities: dict[str, int]) -> tuple[str, str, bool] | None:
    """What is wrong, what to write, and whether no program can mean it."""
    name = call.attrs["child"]
    places = [n.id for n in graph if n.attrs.get("path") == "at"]
    if other.attrs.get("path") == "velocity":
        read = graph.reachable(list(call.inputs))
        if not any(p in read for p in places):
            what = next(
                (f"`{graph[i].label}`" for i in call.inputs if graph[i].label and graph[i].tensor.axes), "its input"
            )
            return (
                f"`{name}` is compared with the velocity of a path at x_t, and reads {what}, not x_t",
                "give it the place on the path, as in `v(path.at(t, x0, x1), t)`",
                velocities.get(name, 0) > 1 and given_an_end(graph, call, other),
            )
        time = {i for p in places for i in times(graph, graph[p])}
        if time and not beside(graph, call, set(places), time):
            return (
                f"`{name}` is compared with the velocity of a path at a time, and does not read the time",
                "give it the time as well, as in `v(path.at(t, x0, x1), t)`",
                False,
            )
    elif name in velocities and is_end(graph, other):
        return (
            f"`{name}` is integrated as a velocity, and is compared here with `{other.label}`, an end of the path",
            "compare it with `path.velocity(t, x0, x1)`, or turn its prediction into one by `path.velocity(t, x, data = ..)`",
            any(on_the_way(graph, call, other, graph[p]) for p in places),
        )
    return None


def on_the_way(graph: Graph, call: Node, end: Node, place: Node) -> bool:
    """Whether the network reads a place between that end and another, on a path whose velocity is not that end itself."""
    there = place.id in graph.reachable(list(call.inputs)) and end.id in ends(graph, place)
    return there and not place.attrs.get("rate_is_end")


def ends(graph: Graph, place: Node) -> set[int]:
    """The values of the data's kind of which a place on a path, or a velocity, is made; none where one of them is a constant."""
    read = {i for i in graph.reachable([place.id]) if is_end(graph, graph[i])}
    return read if len(read) == 2 else set()


def given_an_end(graph: Graph, call: Node, velocity: Node) -> bool:
    """Whether all that the network reads is an end of the path itself, as it is, and a time that is drawn or given."""
    read = graph.reachable(list(call.inputs))
    large = [graph[i] for i in read if isinstance(graph[i].type, TensorType) and graph[i].tensor.axes]
    found = {n.id for n in large if is_end(graph, n)}
    plain = all(is_end(graph, n) or n.op in MOVED or n.op in ("join", "get") for n in large)
    return plain and len(found) == 1 and found <= ends(graph, velocity) and any(is_time(graph[i]) for i in read)


def times(graph: Graph, place: Node) -> list[int]:
    """The numbers of which a place on a path is made, but constants."""
    return [i for i in graph.reachable([place.id]) if is_time(graph[i])]


def is_time(node: Node) -> bool:
    return node.op in ("input", "random_like") and isinstance(node.type, TensorType) and not node.tensor.axes


def beside(graph: Graph, call: Node, places: set[int], time: set[int]) -> bool:
    """Whether the call reads a time otherwise than through a place on the path."""
    seen: set[int] = set()
    todo = list(call.inputs)
    while todo:
        i = todo.pop()
        if i in time:
            return True
        if i not in seen and i not in places:
            seen.add(i)
            todo.extend(graph[i].inputs)
    return False


def is_end(graph: Graph, node: Node) -> bool:
    """Whether a value is data or noise itself."""
    return node.label is not None and bool(node.tensor.axes) and node.op in ("input", "random_like")
