"""Equal groups of nodes become one ONNX function: a spline that eight couplings use is written once.

A group is what one call of a spline emitted. Groups of the same form (ops, attributes, connections, constants that
all of them share) get one function, and each becomes a call of it. Runtimes inline functions when they load a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from flowlang.backends.onnx.graph import Body, Node, Value, bodies, every_node

DOMAIN = "flowlang"


@dataclass
class Function:
    name: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


@dataclass
class Group:
    nodes: list[Node]
    inputs: list[Value]  # in the order of first use, constants among them
    outputs: list[Value]  # those that are read outside
    form: Hashable


def group_of(nodes: list[Node], uses: Counter[int]) -> Group:
    made = {id(v): (k, j) for k, n in enumerate(nodes) for j, v in enumerate(n.outputs)}
    inside = Counter(id(v) for n in nodes for v in n.inputs if v is not None)
    inputs: dict[int, Value] = {}
    form: list[Hashable] = []
    for n in nodes:
        operands: list[Hashable] = []
        for v in n.inputs:
            if v is None:
                operands.append(None)
            elif id(v) in made:
                operands.append(made[id(v)])
            else:
                inputs.setdefault(id(v), v)
                operands.append(("in", list(inputs).index(id(v)), v.kind, v.rank))
        attrs = tuple(sorted((k, tuple(a) if isinstance(a, list) else a) for k, a in n.attrs.items()))
        form.append((n.op, attrs, tuple(operands), len(n.outputs)))
    outputs = [v for n in nodes for v in n.outputs if uses[id(v)] > inside[id(v)]]
    form.append(tuple(made[id(v)] for v in outputs))
    return Group(nodes, list(inputs.values()), outputs, tuple(form))


def same_constant(values: list[Value]) -> bool:
    """Whether an input is one and the same constant in all groups."""
    first = values[0].array
    if first is None:
        return False
    return all(v.array is not None and v.array.shape == first.shape and (v.array == first).all() for v in values[1:])


def closed(body: Body, nodes: list[Node]) -> bool:
    """Whether one call can stand where the last node does: none between reads what the group made (as its own loop does)."""
    own, made = {id(n) for n in nodes}, {id(v) for n in nodes for v in n.outputs}
    at = [k for k, n in enumerate(body.nodes) if id(n) in own]

    def reads(n: Node) -> bool:
        return (
            any(id(v) in made for v in n.inputs)
            or any(id(v) in made for part in n.bodies.values() for inner in bodies(part) for v in inner.outputs)
            or any(id(v) in made for part in n.bodies.values() for inner in every_node(part) for v in inner.inputs)
        )

    return not any(reads(n) for n in body.nodes[at[0] : at[-1]] if id(n) not in own)


def outline(body: Body, uses: Counter[int]) -> list[Function]:
    """Replaces repeated groups of the main graph by calls; gives the functions."""
    members: dict[int, list[Node]] = {}
    for n in body.nodes:
        if n.group is not None and not n.bodies:
            members.setdefault(n.group[0], []).append(n)
    classes: dict[tuple[str, Hashable], list[Group]] = {}
    for nodes in members.values():
        if not closed(body, nodes):
            continue
        found = group_of(nodes, uses)
        assert nodes[0].group is not None
        classes.setdefault((nodes[0].group[1], found.form), []).append(found)
    functions: list[Function] = []
    renewed: dict[int, Value] = {}  # results of groups that are calls by now
    for (kind, _), groups in classes.items():
        if len(groups) < 2:
            continue
        taken = sum(1 for f in functions if f.name.rstrip("_0123456789") == kind)
        function = Function(kind if not taken else f"{kind}_{taken + 1}")
        fixed = [same_constant([g.inputs[k] for g in groups]) for k in range(len(groups[0].inputs))]
        model = groups[0]
        function.inputs = [renewed.get(id(v), v) for v, same in zip(model.inputs, fixed, strict=True) if not same]
        function.outputs, function.nodes = model.outputs, model.nodes
        for g in groups:
            given: list[Value | None] = [
                renewed.get(id(v), v) for v, same in zip(g.inputs, fixed, strict=True) if not same
            ]
            call = Node(function.name, given, [], {}, g.nodes[0].scope.rpartition("/")[0], kind, domain=DOMAIN)
            # The results are new values: those of the first group also stand in the function.
            call.outputs = [Value(v.shape, v.kind, level=v.level, node=call, name=v.name) for v in g.outputs]
            renewed |= replace(body, g, call)
        functions.append(function)
    return functions


def replace(body: Body, group: Group, call: Node) -> dict[int, Value]:
    """Puts the call in the group's place; gives the new values by the ids of the old ones."""
    new = {id(old): made for old, made in zip(group.outputs, call.outputs, strict=True)}
    gone = {id(n) for n in group.nodes}
    last = max(k for k, n in enumerate(body.nodes) if id(n) in gone)
    body.nodes = [*(n for n in body.nodes[: last + 1] if id(n) not in gone), call, *body.nodes[last + 1 :]]

    def renew(part: Body) -> None:
        for n in part.nodes:
            n.inputs = [new.get(id(v), v) if v is not None else None for v in n.inputs]
            for inner in n.bodies.values():
                renew(inner)
        part.outputs = [new.get(id(v), v) for v in part.outputs]

    renew(body)
    return new
