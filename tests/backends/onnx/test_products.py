"""Narrow layers take in what surrounds them: the halves of a split, an activation, a sum with another value."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
import torch
from flowlang.backends.onnx.build import Options
from flowlang.backends.onnx.graph import Builder
from flowlang.backends.onnx.model import finish

from flowlang.api import analyse
from tests.backends.onnx.support import export, flow_of, parity, session

ACTIVATIONS = ["relu", "tanh", "sigmoid", "softplus", "elu", "leaky_relu", "silu", "gelu"]


def sampler(step: str, size: int = 5, unroll: int = 8) -> onnx.ModelProto:
    comp = analyse(f"flow f {{ data x: R[D = {size}]\n {step}\n base normal }}", {}, sized=True)
    return export(comp.regions["f"], comp.analyses, flow_of(comp, "f", torch.float32), "sample", Options(unroll=unroll))


def ops(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(n.op_type for n in model.graph.node)


@pytest.mark.parametrize(
    ("act", "hidden"), [*((a, "[12, 12]") for a in ACTIVATIONS), ("relu", "[64]"), ("relu", "[16]")]
)
def test_every_activation_and_width_gives_the_same(act: str, hidden: str) -> None:
    """Where the hidden layer can have a unit more, where that would cost a lane, and where no unit is constant."""
    step = f"affine_autoregressive(hidden = {hidden}, act = {act})"
    comp = analyse(f"flow f {{ data x: R[D = 5]\n {step}\n reverse\n {step}\n base normal }}", {}, sized=True)
    for program in ("sample", "inverse"):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
            found = parity(comp, "f", program, dtype, (1, 7), tolerance, Options(unroll=8))
            assert found is not None
            assert found <= 1


def test_a_stage_has_no_split_and_no_sum() -> None:
    """Shift and raw scale are a product each; the shift's takes in what it is added to."""
    found = ops(sampler("affine_autoregressive(hidden = [12, 12], act = relu)"))
    assert found["Split"] <= 1  # the noise's
    assert found["Add"] + found["Sub"] <= 2  # the first coordinate's, whose numbers are constants
    assert found["Gemm"] == 4 * 4


def test_the_unit_that_brings_the_bias_costs_no_lane() -> None:
    """A hidden layer of 16 columns a stage stays at 16, and the sum a node."""
    found = ops(sampler("affine_autoregressive(hidden = [64], act = relu)"))
    assert found["Add"] >= 4


def built(sub: bool, first: bool, scale: float, width: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """h = relu(x A + a); (v - (h B + b)) * scale + c, and the like."""
    g, r = Builder("float64"), np.random.default_rng(0)
    x, v = g.input("x", ("batch", 3)), g.input("v", ("batch", 2))
    a, c, b, d = (r.standard_normal(s) for s in ((3, width), (width,), (width, 2), (2,)))
    h = g.unary("Relu", g.add(g.matmul(x, g.const(a)), g.const(c)))
    joined = g.concat([h, g.unary("Exp", x)], -1)
    b = np.vstack([b, r.standard_normal((3, 2))])
    q = g.add(g.matmul(joined, g.const(b)), g.const(d))
    y = (g.sub if sub else g.add)(*((q, v) if first else (v, q)))
    out = g.sub(g.div(g.mul(y, scale), 4.0), g.const(d))
    feeds = {"x": r.standard_normal((6, 3)), "v": r.standard_normal((6, 2))}
    hidden = np.hstack([np.maximum(feeds["x"] @ a + c, 0), np.exp(feeds["x"])]) @ b + d
    left, right = (hidden, feeds["v"]) if first else (feeds["v"], hidden)
    wanted = (left - right if sub else left + right) * scale / 4.0 - d
    return finish(g, "g", {"out": out}, {}, ""), {**feeds, "wanted": wanted}


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("sub", [True, False])
def test_signs_and_scales_of_a_sum(sub: bool, first: bool, scale: float, width: int) -> None:
    model, given = built(sub, first, scale, width)
    wanted = given.pop("wanted")
    (found,) = session(model).run(None, given)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    left = [n.op_type for n in model.graph.node if n.op_type in ("Add", "Sub", "Mul", "Div")]
    assert (left == []) == (width == 5), left


def test_a_share_that_float32_does_not_hold_stays_a_node_in_float64() -> None:
    """Attributes of ONNX nodes are float32: a third as one would lose half of the digits."""
    comp = analyse(
        "flow f { data x: R[D = 4]\n affine_autoregressive(hidden = [12], act = relu)\n scale(3.0)\n base normal }",
        {},
        sized=True,
    )
    found = parity(comp, "f", "sample", torch.float64, (1, 7), 1e-13, Options(unroll=8))
    assert found is not None
    assert found <= 1
