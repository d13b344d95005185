"""The verifier: silent on what the compiler makes, and loud about each invariant that is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flowlang.api import analyse
from flowlang.derive.analyse import Analyses
from flowlang.ir.build import Builder
from flowlang.ir.check import BadGraph, Checks, check_program, check_region
from flowlang.ir.graph import Child, Emission, Graph, Node, Region, Rule
from flowlang.ir.types import Axis, TensorType, TupleType
from tests.soundness.generate import make

SPEC = """
bijector block (x: R[D]) { x * 2 + 1 }
flow f {
  data x: R[D = 4]
  repeat 3 { affine_coupling(net = mlp(8))
    reverse }
  block
  base normal
}
"""


def root() -> Region:
    return analyse(SPEC).regions["f"]


def test_the_suite_runs_with_checks_on() -> None:
    assert Checks.on


def test_what_the_compiler_makes_is_well_formed() -> None:
    comp = analyse(SPEC)
    for region in comp.regions["f"].walk():
        check_region(region)
    for name in ("forward", "inverse", "log_prob", "sample", "sample_and_log_prob"):
        p = comp.analyses.program(comp.regions["f"], name)
        check_program(name, p.graph, p.inputs, p.outputs)


def test_random_graphs_and_their_programs_are_well_formed() -> None:
    planned = 0
    for seed in range(60):
        region = make(seed)
        for r in region.walk():
            check_region(r)
        analyses = Analyses()
        if not analyses.violations(region) and hasattr(analyses.plan(region), "steps"):
            planned += 1
            for name in ("forward", "inverse"):
                analyses.program(region, name)  # verified as it is made
    assert planned > 5


def put(graph: Graph, id: int, **changes: Any) -> None:
    graph._nodes[id] = replace(graph[id], **changes)


def node_of(region: Region, op: str) -> Node:
    return next(n for n in region.graph if n.op == op)


def inner(region: Region, name: str) -> Region:
    return next(r for r in region.walk() if r.name == name)


def wrong_type(r: Region) -> None:
    n = node_of(inner(r, "block"), "mul")
    put(inner(r, "block").graph, n.id, type=TensorType.of(("D", 5)))


def wrong_kind(r: Region) -> None:
    put(inner(r, "block").graph, node_of(inner(r, "block"), "mul").id, type=TensorType.of(("D", 4), kind="complex"))


def same_names(r: Region) -> None:
    g = inner(r, "block").graph
    put(g, node_of(inner(r, "block"), "input").id, type=TensorType((Axis("D", 4), Axis("D", 4))))


def later_operand(r: Region) -> None:
    g = inner(r, "block").graph
    put(g, node_of(inner(r, "block"), "mul").id, inputs=(len(g) - 1, 0))


def no_such_op(r: Region) -> None:
    put(inner(r, "block").graph, node_of(inner(r, "block"), "mul").id, op="magic")


def batch_lost(r: Region) -> None:
    put(inner(r, "block").graph, node_of(inner(r, "block"), "mul").id, batched=False)


def list_attr(r: Region) -> None:
    put(inner(r, "block").graph, node_of(inner(r, "block"), "mul").id, attrs={"axes": ["D"]})


def missing_output(r: Region) -> None:
    inner(r, "block").outputs = [999]


def input_is_no_input(r: Region) -> None:
    b = inner(r, "block")
    b.inputs = [node_of(b, "mul").id]


def bad_emission(r: Region) -> None:
    inner(r, "block").emissions.append(Emission(999, None, ()))


def bad_rule(r: Region) -> None:
    inner(r, "block").rules["inverse"] = Rule((999,), (0,))


def unknown_child(r: Region) -> None:
    call = node_of(r, "call")
    put(r.graph, call.id, attrs={**call.attrs, "child": "nobody"})


def dangling_child(r: Region) -> None:
    r.children["more"] = Child("more", inner(r, "block"))


def misnamed_child(r: Region) -> None:
    name = node_of(r, "call").attrs["child"]
    r.children[name] = Child("other", r.children[name].region)


def other_region(r: Region) -> None:
    call = node_of(r, "call")
    put(r.graph, call.id, attrs={**call.attrs, "region": inner(r, "mlp")})


def wrong_count(r: Region) -> None:
    call = node_of(r, "repeat")
    put(r.graph, call.id, attrs={**call.attrs, "count": 7})


def wrong_arity(r: Region) -> None:
    put(r.graph, node_of(r, "call").id, inputs=())


def wrong_result(r: Region) -> None:
    put(r.graph, node_of(r, "call").id, type=TensorType.of(("E", 4)))


def bad_binding(r: Region) -> None:
    name = node_of(r, "call").attrs["child"]
    r.children[name].bindings["net"] = "nobody"


def recursion(r: Region) -> None:
    name = node_of(r, "call").attrs["child"]
    r.children[name].region.children["again"] = Child("again", r)


FAULTS: list[Callable[[Region], None]] = [
    wrong_type, wrong_kind, same_names, later_operand, no_such_op, batch_lost, list_attr, missing_output, input_is_no_input,
    bad_emission, bad_rule, unknown_child, dangling_child, misnamed_child, other_region, wrong_count, wrong_arity,
    wrong_result, bad_binding, recursion,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_each_fault_is_found(fault: Callable[[Region], None]) -> None:
    region = root()
    regions = list(region.walk())
    fault(region)
    with pytest.raises(BadGraph):
        any(check_region(r) for r in regions)


def test_programs_own_their_inputs() -> None:
    graph = Graph()
    b = Builder(graph)
    x = b.leaf("input", TensorType.of(("D", 2)), batched=True, name="x", role="map")
    y = b.op("exp", x)
    check_program("good", graph, [x], [y])
    with pytest.raises(BadGraph, match="belongs to nobody"):
        check_program("bad", graph, [], [y])
    with pytest.raises(BadGraph, match="does not exist"):
        check_program("bad", graph, [x], [7])


def test_get_reads_what_there_is() -> None:
    graph = Graph()
    t = TensorType.of(("D", 2))
    made = graph.add("call", (), TupleType((t, t)), {"child": "c", "region": root(), "method": "forward"})
    graph.add("get", (made.id,), t, {"index": 5})
    with pytest.raises(BadGraph, match="reads result 5"):
        check_program("bad", graph, [], [1])
