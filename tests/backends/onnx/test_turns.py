"""Reversals and permutations go into the weights around them: fewer nodes, the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from flowlang.backends.onnx.build import Options, export
from flowlang.backends.onnx.graph import REAL, Builder, Value
from flowlang.backends.onnx.model import finish
from flowlang.backends.onnx.turns import ENTRYWISE
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.api import analyse
from tests.backends.onnx.support import PROGRAMS, difference, feeds_of, flow_of, reference, session
from tests.backends.onnx.test_models import nodes

STEPS = [
    "reverse", "permute", "affine_elementwise", "affine_autoregressive(hidden = [8])", "affine_coupling(net = mlp(8))",
    "rqs_coupling(bins = 3, net = mlp(8))", "elementwise(leaky_relu)", "plu_linear", "additive_coupling(net = mlp(8))",
]  # fmt: skip


def checked(text: str, programs: tuple[str, ...], batch: int = 4) -> dict[str, onnx.ModelProto]:
    comp = analyse(text, {}, sized=True)
    assert comp.ok, comp.report.errors[0].message
    name = comp.flows()[0]
    flow = flow_of(comp, name, torch.float64)
    made = {}
    for program in programs:
        made[program] = model = export(comp.regions[name], comp.analyses, flow, program, Options())
        run = session(model)
        feeds = feeds_of(comp, name, flow, run, program, batch)
        wanted = reference(flow, program, feeds, run.get_modelmeta().custom_metadata_map, batch)
        for a, b in zip(run.run(None, feeds), wanted, strict=True):
            assert difference(a, b, b) <= 1e-9, (text, program)
    return made


@pytest.mark.parametrize("turn", ["reverse", "permute"])
def test_an_autoregressive_density_has_no_permutation_left(turn: str) -> None:
    text = f"flow f {{ data x: R[D = 6]\n repeat 5 {{ affine_autoregressive(hidden = [16, 16])\n {turn} }}\n base normal }}"
    made = checked(text, ("log_prob", "forward"))
    assert not {n.op_type for n in nodes(made["log_prob"].graph)} & {"Slice", "Gather"}
    # What comes out in the spec's order is put in it once.
    assert sum(n.op_type in ("Slice", "Gather") for n in nodes(made["forward"].graph)) <= 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(STEPS), min_size=2, max_size=6), st.sampled_from(PROGRAMS))
def test_any_chain_gives_what_the_module_gives(steps: list[str], program: str) -> None:
    checked("flow f { data x: R[D = 4]\n" + "\n".join(steps) + "\n base normal }", (program,))


Pair = tuple[Value, np.ndarray]  # a value of the graph, and what it is


def step(g: Builder, kind: str, first: Pair, second: Pair, rng: np.random.Generator) -> Pair:
    (v, a), (w, b) = first, second
    n = a.shape[1]
    order, matrix, row = rng.permutation(n), rng.standard_normal((n, n)), rng.standard_normal(n)
    match kind:
        case "flip":
            return g.flip(v, -1), a[:, ::-1]
        case "take":
            return g.take(v, -1, order.tolist()), a[:, order]
        case "layer":
            return g.add(g.matmul(v, g.const(matrix)), g.const(row)), a @ matrix + row
        case "parts":
            return g.concat([g.slice(v, -1, 0, 1), g.slice(v, -1, 1, n)], -1), a
        case "add":
            return g.add(v, w), a + b
        case "row":
            return g.mul(v, g.const(row)), a * row
    return g.mul(w, g.reduce("ReduceSum", v, [-1], keep=True)), b * a.sum(1, keepdims=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_graph_keeps_its_results(data: st.DataObject) -> None:
    """Random graphs of layers, permutations, entrywise ops and sums, against the same in numpy."""
    g, rng = Builder("float64"), np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = rng.standard_normal((3, 4))
    values: list[Pair] = [(g.input("x", ("batch", 4), REAL), x)]
    for _ in range(data.draw(st.integers(2, 10))):
        kind = data.draw(st.sampled_from(["flip", "take", "layer", "parts", "add", "row", "sum"]))
        first, second = (values[data.draw(st.integers(0, len(values) - 1))] for _ in range(2))
        values.append(step(g, kind, first, second, rng))
    results = values[-3:]
    model = finish(g, "f", {f"y{k}": v for k, (v, _) in enumerate(results)}, {}, "")
    for found, (_, wanted) in zip(session(model).run(None, {"x": x}), results, strict=True):
        assert np.allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_entrywise_ops_are_ops() -> None:
    assert all(onnx.defs.has(op) for op in ENTRYWISE)
