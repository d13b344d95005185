"""Inverses with a cache in ONNX: one `Loop` of a stage for each row, whose keys, values and last rows are its state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import flowlang as fl
from tests.backends.torch.specs import build, context, data
from tests.backends.torch.test_cached_attention import ATTENTION, BLOCKS, CONVOLUTIONS, MORE


def written(
    block: str, norm: str, heads: int, one_key: str, bias: str, *, label: bool, reversed_: bool, first: bool
) -> str:
    text = ATTENTION.format(
        given=" given y: R[K]" if label else "", label="h := h + tanh(linear[K -> E](y))" if label else "",
        argument=", y" if label else "", width=4, layers=2,
        block=BLOCKS[block].format(norm=norm, arguments=f"{heads}, {one_key}, {bias}, 2", heads=heads), norm=norm,
        shifted="a, b" if first else "shift[T](a, 1), shift[T](b, 1)",
        into="reverse[T](x)" if reversed_ else "x", out="reverse[T](z)" if reversed_ else "z",
    )  # fmt: skip
    if first:
        text = text.replace("conditioner(u", "conditioner(shift[T](u, 1)")
    return f"{text}flow f {{ data x: R[T = 5, D = 2]; {'given y: R[K = 2]; ' if label else ''}step; base normal }}\n"


SPECS = {
    "before": written("before", "layer_norm[E]", 2, "false", "true", label=True, reversed_=False, first=False),
    "after": written("after", "rms_norm[E]", 4, "true", "false", label=False, reversed_=True, first=True),
    "library": written("library", "layer_norm[E]", 2, "false", "false", label=True, reversed_=True, first=False),
    **MORE,
    **CONVOLUTIONS,
}


def exported(spec: str, folder: Path) -> tuple[onnx.ModelProto, float]:
    """The model of the inverse, and how far its result is from the module's, relative to its size."""
    flow = build(spec, size=0.4, dtype=torch.float32)
    model = fl.compile(spec, seed=0)
    model.load_state_dict(flow.state_dict())
    (path,) = fl.export_onnx(model.eval(), folder / "m.onnx", programs=["inverse"], unroll=0).values()
    z, c = data(flow, 3).float(), {k: v.float() for k, v in context(flow, 3).items()}
    session = ort.InferenceSession(str(path))
    names = [i.name for i in session.get_inputs()]
    feeds = {names[0]: z.numpy(), **{k: v.numpy() for k, v in c.items() if k in names}}
    found = session.run(None, feeds)[0]
    with torch.no_grad():
        wanted = model.inverse(z, **c)[0].numpy()
    return onnx.load(str(path)), float((np.abs(found - wanted) / np.maximum(1, np.abs(wanted).max())).max())


def loops(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == "Loop"]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_models_equal_the_module(name: str, tmp_path: Path) -> None:
    model, off = exported(SPECS[name], tmp_path)
    assert off <= 2e-5
    assert loops(model)
    if name != "a mask hides what comes":  # which reads x itself
        assert all(len(n.output) >= 2 for n in loops(model)), "a loop without a cache"


def test_no_stage_attends_to_all_pairs(tmp_path: Path) -> None:
    """Inside the loop no value has both a query for each token and a key for each token."""
    size = 7
    spec = f"flow f {{ data x: R[T = {size}, D = 2]; tarflow_block(tarflow_net(16, 2, 8)); base normal }}"
    model, off = exported(spec, tmp_path)
    assert off <= 2e-5
    (loop,) = loops(model)
    body = next(a.g for a in loop.attribute if a.name == "body")
    model.graph.ClearField("value_info")
    made = onnx.shape_inference.infer_shapes(model)
    inside = next(a.g for n in loops(made) for a in n.attribute if a.name == "body")
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in inside.value_info]
    assert len(shapes) > len(body.node) / 2
    assert all(s.count(size) < 2 for s in shapes)
    assert len(loop.output) == 1 + 2 * 2 + 2  # x; keys and values of two layers; a and b, which are read a token later
