"""Axes whose size a spec leaves open stay open in the model: run at sizes that no witness had, against the module there."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from flowlang.backends.onnx.build import Options, Unlowered, export, export_open
from flowlang.backends.onnx.dynamic import fit_size, multiple_of, points_of, small_points
from flowlang.backends.onnx.files import PROGRAMS
from flowlang.backends.torch.standard import Standardised
from hypothesis import given, settings
from hypothesis import strategies as st

import flowlang as fl
from flowlang.api import Resized, analyse
from tests.backends.onnx.support import difference, feeds_of, flow_of, reference, session

GLOW = """flow f {
  data x: R[C = 1, H, W]
  squeeze(2)
  repeat 2 { glow_step(8) }
  learned_factor_out(conv_net(8))
  squeeze(2)
  glow_step(8)
  base normal
}"""
CASES = {  # text, compiled sizes, other sizes
    "squeeze and couplings": (
        "flow f { data x: R[C = 3, H, W]\n squeeze(2)\n repeat 2 { glow_step(8) }\n base normal }",
        {"H": 8, "W": 8}, [{"H": 12, "W": 6}, {"H": 2, "W": 4}, {"H": 20, "W": 32}],
    ),
    "glow of two scales": (GLOW, {"H": 8, "W": 8}, [{"H": 8, "W": 8}, {"H": 12, "W": 8}, {"H": 4, "W": 24}]),
    "coupling along D": (
        "flow f { data x: R[T, D = 4]\n repeat 2 { affine_coupling[D](net = mlp[D](16))\n reverse[D] }\n"
        " reverse[T]\n rqs_coupling[D](bins = 4, net = mlp[D](16))\n base normal }",
        {"T": 7}, [{"T": 2}, {"T": 10}, {"T": 12}],
    ),
    "scan over T": (
        "flow f { data x: R[T, D = 3]\n lag\n base normal }\n"
        "bijector lag (x: R[T, D]) { w: R[T, D] = mlp[D](shift[T](x, 2))\n x * exp(tanh(w)) + shift[T](x, 1) }",
        {"T": 7}, [{"T": 3}, {"T": 10}, {"T": 14}],
    ),
    "causal attention": (
        "flow f { data x: R[T, D = 4]\n attend\n reverse[T]\n attend\n base normal }\n"
        "bijector attend (x: R[T, D]) { h = attention[T](shift[T](x, 1), 2, causal = true)\n"
        " m: R[T, D], s: R[T, D] = mlp[D](h)\n (x - m) * exp(-tanh(s)) }",
        {"T": 7}, [{"T": 3}, {"T": 10}, {"T": 14}],
    ),
    "cumulative sum": (
        "flow f { data x: R[T]\n b\n base normal }\nbijector b (x: R[T]) { x + tanh(cumsum[T](x)) }",
        {"T": 7}, [{"T": 2}, {"T": 10}, {"T": 14}],
    ),
    "moments along T": (
        "flow f { data x: R[T, D = 4]\n b\n base normal }\nbijector b (x: R[T, D]) { p, q = halves[D](x)\n"
        " m = mean[T](p)\n s = std[T](p)\n join[D](p, q * exp(tanh(m)) + s + index[T](q) / 10) }",
        {"T": 7}, [{"T": 3}, {"T": 10}, {"T": 14}],
    ),
    "scale by the root of a size": (
        "flow f { data x: R[T]\n b\n base normal }\nbijector b (x: R[T]) { x / sqrt(T) }",
        {"T": 7}, [{"T": 2}, {"T": 9}, {"T": 100}],
    ),
    "two axes, scales of both": (
        "flow f { data x: R[S, T, D = 4]\n affine_coupling[D](net = mlp[D](8))\n reverse[S]\n b\n base normal }\n"
        "bijector b (x: R[S, T, D]) { p, q = halves[D](x)\n m = mean[S, T](p) / sqrt(T)\n join[D](p, q * exp(tanh(m / S))) }",
        {"S": 5, "T": 7}, [{"S": 8, "T": 16}, {"S": 7, "T": 9}, {"S": 10, "T": 10}],
    ),
    "a mean of earlier rows": (
        "flow f { data x: R[S, T]\n b\n base normal }\nbijector b (x: R[S, T]) { x + mean[S](shift[T](x, 1)) }",
        {"S": 4, "T": 5}, [{"S": 5, "T": 4}, {"S": 2, "T": 12}],
    ),
}  # fmt: skip


def opened(text: str, sizes: dict[str, int]):
    comp = analyse(text, sizes, sized=True)
    assert comp.ok, comp.report.errors[0].message
    flow = flow_of(comp, "f", torch.float32)
    at = Resized(comp, "f", flow)
    return at, {a: m for a in comp.elab.open_axes if (m := multiple_of(at, a)) is not None}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", CASES)
def test_a_model_at_any_size_is_the_module_there(case: str, program: str) -> None:
    text, sizes, others = CASES[case]
    at, multiples = opened(text, sizes)
    assert set(multiples) == set(sizes)
    model = export_open(at, multiples, program, Options())
    run = session(model)
    meta = run.get_modelmeta().custom_metadata_map
    free = json.loads(meta["free_axes"])
    for other in others:
        assert other not in points_of(multiples)
        assert all(other[a] % free[a]["multiple_of"] == 0 and other[a] >= free[a]["at_least"] for a in other)
        comp = analyse(text, other, sized=True)
        module = at(other)[2].eval()
        fixed = session(export(*at(other), program))  # its inputs have the shapes of these sizes
        feeds = feeds_of(comp, "f", module, fixed, program, 5)
        found = run.run(None, feeds)
        wanted = reference(module, program, feeds, meta, 5)
        double = {k: v.astype(np.float64) for k, v in feeds.items()}
        exact = reference(copy.deepcopy(module).double(), program, double, meta, 5)
        for a, b, e in zip(found, wanted, exact, strict=True):
            assert difference(a, b, e) <= 1e-5, (other, program)


def test_dims_carry_the_names_of_the_spec(tmp_path: Path) -> None:
    flow = fl.compile(GLOW, seed=0, H=8, W=8)
    files = fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob", "sample"])
    shapes = {}
    for program, file in files.items():
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        for v in [*model.graph.input, *model.graph.output]:
            shapes[program, v.name] = [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        meta = {p.key: p.value for p in model.metadata_props}
        assert json.loads(meta["axes"]) == {"x": [["C", 1], ["H", None], ["W", None]]}
        assert {a: f["multiple_of"] for a, f in json.loads(meta["free_axes"]).items()} == {"H": 4, "W": 4}
    assert shapes["log_prob", "x"] == ["batch", 1, "H", "W"]
    assert shapes["log_prob", "log_prob"] == ["batch"]
    assert shapes["sample", "x"] == ["batch", 1, "H", "W"]
    assert ["batch", 8, "H/4", "W/4"] in shapes.values()


def test_axes_that_weights_depend_on_are_fixed_and_said_when_asked_for(tmp_path: Path) -> None:
    text = "flow f { data x: R[T, D]\n affine_coupling[D](net = mlp[D](8))\n base normal }"
    flow = fl.compile(text, seed=0, T=3, D=4)
    (file,) = fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob"]).values()
    (x,) = onnx.load(file).graph.input
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["batch", "T", 4]
    (file,) = fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob"], dynamic=()).values()
    (x,) = onnx.load(file).graph.input
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["batch", 3, 4]
    for wanted in ("D", "K"):
        with pytest.raises(fl.FlowError) as e:
            fl.export_onnx(flow, tmp_path / "g.onnx", ["log_prob"], dynamic=[wanted])
        assert [d.code for d in e.value.diagnostics] == ["FL0804"]
        assert f"`{wanted}`" in e.value.diagnostics[0].message
        assert not (tmp_path / "g.onnx").exists()


def test_weights_of_the_size_of_a_point_fix_their_axis(tmp_path: Path) -> None:
    """5 and 6 are sizes at which programs are lowered."""
    for size in (5, 6):
        flow = fl.compile(
            "flow f { data x: R[T, D]\n affine_coupling[D](net = mlp[D](8))\n base normal }", seed=0, T=3, D=size
        )
        (file,) = fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob"]).values()
        (x,) = onnx.load(file).graph.input
        assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["batch", "T", size]


def test_an_axis_with_a_default_may_be_asked_for(tmp_path: Path) -> None:
    flow = fl.compile("flow f { data x: R[C = 2, H = 4, W = 4]\n glow_step(4)\n base normal }", seed=0)
    (file,) = fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob"], dynamic=["H"]).values()
    (x,) = onnx.load(file).graph.input
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["batch", 2, "H", 4]


REFUSED = {
    "halves along the axis": "b (x: R[T]) { p, q = halves[T](x)\n join[T](p, q + sum[T](p)) }",
    "a permutation": "b (x: R[T]) { permute[T](x) }",
    "a remainder": "b (x: R[T]) { x * (2 + mod(T, 2)) }",
    "checkers": "b (x: R[T]) { x * exp(checker[T](x)) }",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_depends_on_the_size_in_no_simple_way_is_refused_with_its_place(case: str, tmp_path: Path) -> None:
    text = f"flow f {{ data x: R[T]\n b\n base normal }}\nbijector {REFUSED[case]}"
    flow = fl.compile(text, seed=0, T=6)
    with pytest.raises(fl.FlowError) as e:
        fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob"])
    (d,) = e.value.diagnostics
    assert d.code == "FL0701"
    assert "`T` of any size" in d.message
    assert d.span is not None
    assert "--dynamic none" in d.suggestion
    assert not list(tmp_path.iterdir())
    assert fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob"], dynamic=())


def test_a_sampler_with_noise_inside_takes_the_sizes(tmp_path: Path) -> None:
    flow = fl.compile(GLOW, seed=0, H=8, W=8)
    (file,) = fl.export_onnx(flow, tmp_path / "f.onnx", ["sample"], seed=1).values()
    run = session(onnx.load(file))
    assert {i.name for i in run.get_inputs()} == {"batch_size", "H", "W"}
    (x,) = run.run(None, {"batch_size": np.array([3]), "H": np.array([12]), "W": np.array([4])})
    assert x.shape == (3, 1, 12, 4)
    assert np.isfinite(x).all()


@pytest.mark.parametrize("alike", [True, False], ids=["one number for each channel", "one for each place"])
def test_standardisation_of_free_axes(alike: bool, tmp_path: Path) -> None:
    """Constants that are the same everywhere along an axis leave it open; others fix it."""
    inner = fl.compile(
        "flow f { data x: R[C = 2, T]\n affine_coupling[C](net = mlp[C](8))\n base normal }", seed=0, T=3
    )
    scale = np.full((2, 3), [[2.0], [3.0]]) if alike else np.arange(1.0, 7.0).reshape(2, 3)
    flow = Standardised(inner, np.ones((2, 3)), scale)
    (file,) = fl.export_onnx(flow, tmp_path / "f.onnx", ["log_prob"]).values()
    run = session(onnx.load(file))
    assert run.get_inputs()[0].shape == ["batch", 2, "T" if alike else 3]
    x = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = flow.log_prob(torch.as_tensor(x)).numpy()
    assert np.allclose(run.run(None, {"x": x})[0], wanted, rtol=1e-5, atol=1e-5)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    factor=st.integers(1, 9), down=st.sampled_from([1, 2, 4]), offset=st.integers(-9, 9),
    axes=st.sampled_from([("H",), ("W",), ("H", "W")]),
)  # fmt: skip
def test_sizes_are_found_from_the_points(factor: int, down: int, offset: int, axes: tuple[str, ...]) -> None:
    multiples = {"H": down, "W": down}
    points = [*points_of(multiples), *small_points(multiples)[:1]]

    def size(p: dict[str, int]) -> int:
        return factor * int(np.prod([p[a] for a in axes])) // down + offset

    found = fit_size([size(p) for p in points], points)
    assert found is not None
    for p in ({"H": 8 * down, "W": 9 * down}, {"H": 100 * down, "W": 64 * down}):
        assert found.at(p) == size(p)


def test_no_expression_is_found_for_what_is_none() -> None:
    points = points_of({"T": 1})
    assert fit_size([-(-p["T"] // 2) for p in points], [*points]) is None or any(
        fit_size([-(-p["T"] // 2) for p in [*points, s]], [*points, s]) is None for s in small_points({"T": 1})
    )


def test_unlowered_is_what_the_builder_raises() -> None:
    at, multiples = opened(
        f"flow f {{ data x: R[T]\n b\n base normal }}\nbijector {REFUSED['a permutation']}", {"T": 6}
    )
    with pytest.raises(Unlowered):
        export_open(at, multiples, "log_prob", Options())
