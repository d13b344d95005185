"""What a model is, beside its numbers: names, axes, metadata, opsets, size, noise, standardisation, diagnostics."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from flowlang.backends.onnx import special
from flowlang.backends.onnx.build import DEFAULT_OPSET, HIGHEST_OPSET, LOWEST_OPSET, Options, Standard, export
from flowlang.backends.onnx.files import PROGRAMS, file_of
from flowlang.backends.onnx.graph import REAL, Builder
from flowlang.backends.onnx.lower import DECLINED, EMITTERS, Unlowered
from flowlang.backends.onnx.model import finish
from flowlang.backends.torch.standard import Standardised
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import inliner

import flowlang as fl
from flowlang import files
from flowlang.api import analyse, compile_from
from flowlang.cli.export import export as export_command
from flowlang.cli.main import cli
from flowlang.ir.ops import OPS
from tests.backends.onnx.support import difference, feeds_of, flow_of, reference, session

COUPLING = """
flow pair {
  data x: R[D = 4]
  given c: R[K = 2]
  repeat 2 { rqs_coupling(bins = 5, net = mlp(16, act = relu))
  reverse }
  base normal
}
"""
NSF = "flow nsf { data x: R[D = 8]\n repeat 8 { rqs_coupling(bins = 8, net = mlp(64, 64, act = relu))\n reverse }\n base normal }"
AUTOREGRESSIVE = "flow ar { data x: R[D = 8]\n affine_autoregressive(hidden = [64, 64])\n base normal }"


def model_of(text: str, program: str, options: Options | None = None, dtype: torch.dtype = torch.float32, **sets: int):
    comp = analyse(text, sets, sized=True)
    assert comp.ok, [d.message for d in comp.report.errors]
    name = comp.flows()[0]
    flow = flow_of(comp, name, dtype)
    return comp, flow, export(comp.regions[name], comp.analyses, flow, program, options or Options())


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for n in graph.node:
        yield n
        for a in n.attribute:
            if a.HasField("g"):
                yield from nodes(a.g)


# ---- the table of ops -----------------------------------------------------------------------------


def test_every_op_has_an_emitter_or_a_reason() -> None:
    from flowlang.backends.onnx import emit, odes, solvers, splines  # noqa: F401 - they fill the table

    assert set(OPS) == set(EMITTERS) | set(DECLINED)
    assert not set(EMITTERS) & set(DECLINED)


FUNCTIONS = {
    "log1p": (torch.log1p, -0.999, 1e4), "expm1": (torch.expm1, -30.0, 30.0), "erf": (torch.erf, -8.0, 8.0),
    "erfinv": (torch.erfinv, -0.9999, 0.9999), "lgamma": (torch.lgamma, 0.01, 200.0),
    "sinh": (torch.sinh, -30.0, 30.0), "cosh": (torch.cosh, -30.0, 30.0), "tan": (torch.tan, -1.5, 1.5),
    "asinh": (torch.asinh, -1e3, 1e3), "atanh": (torch.atanh, -0.999, 0.999), "asin": (torch.asin, -0.999, 0.999),
    "acos": (torch.acos, -0.999, 0.999), "atan": (torch.atan, -1e3, 1e3), "sigmoid": (torch.sigmoid, -80.0, 80.0),
    "log_bessel_i0e": (lambda v: torch.log(torch.special.i0e(v)), 0.0, 1e3),
}  # fmt: skip
RUNS: dict[tuple[str, str], object] = {}


def run_of(name: str, dtype: str):
    """A session of one function alone."""
    if (name, dtype) not in RUNS:
        g = Builder(dtype, DEFAULT_OPSET)
        x = g.input("x", ("batch",), REAL)
        RUNS[name, dtype] = session(finish(g, name, {"y": special.UNARY[name](g, x)}, {}, ""))
    return RUNS[name, dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_functions_that_onnx_lacks(name: str, dtype: str, data: st.DataObject) -> None:
    """To a few units in the last place of the result, or of its change under one of the argument."""
    function, lo, hi = FUNCTIONS[name]
    values = data.draw(
        st.lists(st.floats(lo, hi) | st.floats(max(lo, -1e-3), max(lo, -1e-3) + 2e-3), min_size=1, max_size=20)
    )
    x = np.asarray(values, dtype=dtype)
    found = run_of(name, dtype).run(None, {"x": x})[0].astype(np.float64)
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    wanted = function(t)
    (slope,) = torch.autograd.grad(wanted.sum(), t)
    eps = np.finfo(dtype).eps
    unit = np.abs(wanted.detach().numpy()) + np.abs(slope.numpy() * t.detach().numpy())
    # Absolute terms where a result near 0 is a difference of larger ones (log-gamma, arc cosine, log I0e).
    floor = {"lgamma": 30.0, "acos": 2.0, "log_bessel_i0e": 1.0}.get(name, 1e-30)
    assert (np.abs(found - wanted.detach().numpy()) <= 40 * eps * np.maximum(unit, floor)).all()


# ---- names, axes, metadata --------------------------------------------------------------------------


def test_inputs_and_outputs_have_the_names_and_axes_of_the_spec() -> None:
    _, _, model = model_of(COUPLING, "sample_and_log_prob")
    shown = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shown == {"c": ["batch", 2], "noise": ["batch", 4]}
    shown = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    assert shown == {"x": ["batch", 4], "log_prob": ["batch"]}
    meta = {p.key: p.value for p in model.metadata_props}
    assert json.loads(meta["axes"]) == {"x": [["D", 4]], "c": [["K", 2]]}
    assert json.loads(meta["noise"]) == {"noise": {"kind": "normal"}}
    assert meta["program"] == "sample_and_log_prob"
    assert meta["flowlang_version"] == fl.__version__


def test_names_are_stable_unique_and_follow_the_spec() -> None:
    _, _, first = model_of(COUPLING, "log_prob")
    _, _, second = model_of(COUPLING, "log_prob")
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    names = [n.name for n in nodes(first.graph)]
    assert len(set(names)) == len(names)
    assert any(n.startswith("blocks.0/rqs_coupling/net/") for n in names)
    assert any(n.startswith("blocks.1/rqs_coupling/net/") for n in names)


def test_weight_only_values_are_folded() -> None:
    text = "flow f { data x: R[D = 3]\n plu_linear\n orthogonal_linear\n affine_elementwise\n base normal }"
    _, _, model = model_of(text, "inverse")
    assert {n.op_type for n in model.graph.node} <= {
        "Gemm",
        "MatMul",
        "Mul",
        "Add",
        "Sub",
        "Div",
        "Identity",
        "Expand",
        "Shape",
    }
    assert len(model.graph.node) <= 12


@pytest.mark.parametrize("opset", [LOWEST_OPSET, HIGHEST_OPSET])
@pytest.mark.parametrize("program", PROGRAMS)
def test_lowest_and_highest_opset(program: str, opset: int) -> None:
    comp, flow, model = model_of(COUPLING, program, Options(opset=opset))
    assert model.opset_import[0].version == opset
    run = session(model)
    feeds = feeds_of(comp, "pair", flow, run, program, 5)
    wanted = reference(flow, program, feeds, run.get_modelmeta().custom_metadata_map, 5)
    for a, b in zip(run.run(None, feeds), wanted, strict=True):
        assert difference(a, b, b.astype(np.float64)) <= 1e-5


# ---- size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "traced"), [("log_prob", 946), ("sample", 1706)])
def test_a_spline_coupling_costs_a_third_of_a_trace(program: str, traced: int) -> None:
    """Nodes of eight couplings, the bodies of functions counted at each call, beside those of zuko's traced model
    (benchmarks/onnx_latency.py)."""
    _, _, model = model_of(NSF, program)
    whole = inliner.inline_local_functions(model)
    assert not whole.functions
    assert sum(n.op_type != "Constant" for n in nodes(whole.graph)) <= traced / 3


def test_a_spline_is_written_once_however_many_couplings_use_it() -> None:
    for program in ("log_prob", "sample"):
        _, _, model = model_of(NSF, program)
        (function,) = model.functions
        written = len(model.graph.node) + sum(n.op_type != "Constant" for n in function.node)
        assert written <= 315 / 2
        assert len(model.graph.node) <= 8 * 9 + 8


@pytest.mark.parametrize("step", ["affine_autoregressive", "rqs_autoregressive", "cubic_spline_autoregressive"])
def test_an_autoregressive_sampler_does_not_grow_with_the_dimension(step: str) -> None:
    text = f"flow ar {{ data x: R[D = 8]\n {step}(hidden = [32, 32])\n base normal }}"
    counts = {d: sum(1 for _ in nodes(model_of(text, "sample", D=d)[2].graph)) for d in (4, 8, 16, 128)}
    assert counts[4] == counts[8] == counts[16]
    assert (
        counts[128] <= counts[4] + 2
    )  # layers whose stages differ in width do not share the table of places: one each


def test_the_incremental_loop_reads_each_hidden_unit_once() -> None:
    """Weights inside the loop are those of one stage: together about as many numbers as the network has."""
    _, flow, model = model_of(AUTOREGRESSIVE, "sample")
    weights = sum(p.numel() for p in flow.parameters())
    stored = sum(int(np.prod(i.dims)) for i in model.graph.initializer)
    assert stored <= 2 * weights


# ---- noise and standardisation ------------------------------------------------------------------------


def test_a_seed_puts_the_noise_inside() -> None:
    _, _, model = model_of(
        "flow f { data x: R[D = 2]\n affine_coupling\n base student_t(df = 5) }", "sample", Options(seed=3)
    )
    first, again = (session(model).run(None, {"batch_size": np.array([1000])})[0] for _ in range(2))
    assert first.shape == (1000, 2)
    assert np.array_equal(first, again)
    assert np.isfinite(first).all()
    assert 0.5 < np.median(np.abs(first)) < 1.2


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_deployed_model_takes_and_gives_raw_data(program: str) -> None:
    mean, scale = np.array([1.0, -2.0, 3.0, 0.5]), np.array([2.0, 0.5, 3.0, 1.0])
    options = Options(
        standard=Standard(mean, scale), given_standard={"c": Standard(np.array([1.0, 0.0]), np.array([4.0, 1.0]))}
    )
    comp, flow, plain = model_of(COUPLING, program, dtype=torch.float64)
    _, _, raw = model_of(COUPLING, program, options, dtype=torch.float64)
    meta = {p.key: p.value for p in raw.metadata_props}
    assert json.loads(meta["standardisation"])["data"] == {"mean": mean.tolist(), "scale": scale.tolist()}
    run = session(plain)
    feeds = feeds_of(comp, "pair", flow, run, program, 6)
    outside = dict(feeds, c=feeds["c"] * [4.0, 1.0] + [1.0, 0.0])
    if "x" in feeds:
        outside["x"] = feeds["x"] * scale + mean
    wanted = dict(zip([o.name for o in run.get_outputs()], run.run(None, feeds), strict=True))
    other = session(raw)
    found = dict(zip([o.name for o in other.get_outputs()], other.run(None, outside), strict=True))
    log_scale = np.log(scale).sum()
    if "x" in wanted:
        wanted["x"] = wanted["x"] * scale + mean
    if "log_prob" in wanted:
        wanted["log_prob"] = wanted["log_prob"] - log_scale
    if "log_det" in wanted:
        wanted["log_det"] = wanted["log_det"] + (log_scale if program == "inverse" else -log_scale)
    for k, v in wanted.items():
        assert np.allclose(found[k], v, rtol=1e-10, atol=1e-10), k


# ---- files and diagnostics ------------------------------------------------------------------------------


def test_one_program_goes_to_the_file_several_beside_it() -> None:
    assert file_of(Path("a/moons.onnx"), "sample", several=False) == Path("a/moons.onnx")
    assert file_of(Path("a/moons.onnx"), "sample", several=True) == Path("a/moons.sample.onnx")
    assert file_of(Path("moons"), "log_prob", several=True) == Path("moons.log_prob.onnx")


def test_the_metadata_hold_the_hash_of_the_spec(tmp_path: Path) -> None:
    flow = fl.compile(COUPLING, seed=0)
    (file,) = fl.export_onnx(flow, tmp_path / "pair.onnx", ["log_prob"]).values()
    meta = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert meta["spec_sha256"] == hashlib.sha256(COUPLING.encode()).hexdigest()


@pytest.mark.parametrize(
    ("programs", "options", "code"),
    [
        (["density"], {}, "FL0804"),
        ([], {}, "FL0804"),
        (["sample"], {"opset": 12}, "FL0804"),
        (["sample"], {"opset": 99}, "FL0804"),
    ],
)
def test_bad_options_are_diagnostics(tmp_path: Path, programs: list[str], options: dict[str, int], code: str) -> None:
    flow = fl.compile(COUPLING, seed=0)
    with pytest.raises(fl.FlowError) as e:
        fl.export_onnx(flow, tmp_path / "f.onnx", programs, **options)
    assert [d.code for d in e.value.diagnostics] == [code]
    assert e.value.diagnostics[0].suggestion
    assert not list(tmp_path.iterdir())


def test_an_unwritable_path_and_a_foreign_module_are_diagnostics(tmp_path: Path) -> None:
    flow = fl.compile(COUPLING, seed=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(fl.FlowError) as e:
        fl.export_onnx(flow, tmp_path / "file" / "f.onnx")
    assert [d.code for d in e.value.diagnostics] == ["FL0801"]
    with pytest.raises(fl.FlowError) as e:
        fl.export_onnx(torch.nn.Linear(2, 2), tmp_path / "f.onnx")
    assert [d.code for d in e.value.diagnostics] == ["FL0804"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_diagnostic(value: float, tmp_path: Path) -> None:
    flow = fl.compile(COUPLING, seed=0)
    name, weight = next(flow.named_parameters())
    with torch.no_grad():
        weight.view(-1)[0] = value
    with pytest.raises(fl.FlowError) as e:
        fl.export_onnx(flow, tmp_path / "f.onnx")
    (d,) = e.value.diagnostics
    assert d.code == "FL0803"
    assert f"`{name}`" in d.message
    assert not list(tmp_path.iterdir())


def test_without_onnx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    flow = fl.compile(COUPLING, seed=0)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(fl.FlowError) as e:
        fl.export_onnx(flow, tmp_path / "f.onnx")
    assert [d.code for d in e.value.diagnostics] == ["FL0805"]


def test_what_onnx_lacks_is_told_with_its_place() -> None:
    text = "flow f { data x: Torus[D = 2]\n periodic_shift\n base von_mises(concentration = 2) }"
    with pytest.raises(Unlowered) as e:
        model_of(text, "sample", Options(seed=1))
    assert e.value.suggestion
    assert e.value.node.op == "random_like"


def test_the_command_writes_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pair.flow").write_text(COUPLING)
    done = CliRunner().invoke(cli, ["export", "pair.flow", "-o", "out/pair.onnx"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in Path("out").iterdir()) == ["pair.log_prob.onnx", "pair.sample.onnx"]
    done = CliRunner().invoke(export_command, ["pair.flow", "--program", "forward", "--double", "-o", "f.onnx"])
    assert done.exit_code == 0, done.output
    (x, _) = onnx.load("f.onnx").graph.input
    assert x.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE


def test_the_command_tells_the_interface_and_compares_with_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pair.flow").write_text(COUPLING)
    done = CliRunner().invoke(cli, ["export", "pair.flow", "-o", "p.onnx"], catch_exceptions=False)
    assert "x [batch, D = 4], c [batch, K = 2] -> log_prob [batch]" in done.output
    assert "c [batch, K = 2], noise [batch, 4] -> x [batch, D = 4]" in done.output
    errors = [float(e) for e in re.findall(r"within (\S+) of PyTorch", done.output)]
    assert len(errors) == 2
    assert max(errors) <= 1e-5
    done = CliRunner().invoke(
        cli, ["export", "pair.flow", "--no-check", "--seed", "1", "-o", "p.onnx"], catch_exceptions=False
    )
    assert "PyTorch" not in done.output


def test_the_command_tells_what_is_written_out_and_certifies_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.flow").write_text("flow f { data x: R[D = 4]\n affine_autoregressive(hidden = [8])\n base normal }")
    command = ["export", "a.flow", "--program", "sample", "--no-check", "-o", "a.onnx"]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert re.search(r"a.onnx: sample, \d+ nodes, \d+ kB\n", done.output)
    assert "up to 4 stages are written out" in done.output
    done = CliRunner().invoke(cli, [*command, "--unroll", "0"], catch_exceptions=False)
    assert re.search(r"a.onnx: sample, \d+ nodes, one a loop, \d+ kB\n", done.output)
    assert "written out" not in done.output
    certified: list[object] = []
    proof = fl.certificate
    monkeypatch.setattr("flowlang.api.certificate", lambda flow: certified.append(flow) or proof(flow))
    Path("b.flow").write_text(
        "flow f { data x: R[D = 2]\n iresblock(iresnet_fc(8, 0.9, preact = false))\n base normal }"
    )
    done = CliRunner().invoke(cli, ["export", "b.flow", "--program", "forward", "-o", "b.onnx"], catch_exceptions=False)
    assert "certificate: " in done.output, done.output
    assert len(certified) == 1


def test_a_written_model_is_compared_on_its_own_noise_and_in_the_datas_units(tmp_path: Path) -> None:
    flow = Standardised(
        fl.compile(COUPLING, seed=0).eval(), [100.0, 0, 0, 0], [3.0, 1, 1, 1], {"c": ([1.0, 2.0], [2.0, 2.0])}
    )
    written = fl.export_onnx(flow, tmp_path / "p.onnx", PROGRAMS)
    found = fl.compare_onnx(flow, written)
    assert set(found) == set(PROGRAMS)
    assert all(c.error is not None and c.error <= 1e-5 for c in found.values())
    with torch.no_grad():
        next(flow.parameters()).add_(1.0)
    assert all(c.error is not None and c.error > 1e-3 for c in fl.compare_onnx(flow, written).values())
    seeded = fl.export_onnx(flow, tmp_path / "s.onnx", ["sample"], seed=1)
    assert fl.compare_onnx(flow, seeded)["sample"].reason == "it draws its own noise"


SEVERAL = """
bijector mixed(x: R[D], y: R[E]) { t: R[x.D] = mlp(8)(y);  x + t, y }
flow several { data x: R[D = 3], y: R[E = 2]
  mixed
  base normal, normal }
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_flows_of_several_data_are_compared_too(program: str, tmp_path: Path) -> None:
    flow = fl.compile(SEVERAL, seed=0)
    found = fl.compare_onnx(flow, fl.export_onnx(flow, tmp_path / "s.onnx", [program]))[program]
    assert found.error is not None, found.reason
    assert found.error <= 1e-5


def test_nothing_is_written_unless_everything_can_be(tmp_path: Path) -> None:
    text = "flow f { data x: Torus[D = 2]\n periodic_shift\n base von_mises(concentration = 2) }"
    with pytest.raises(fl.FlowError) as e:
        fl.export_onnx(fl.compile(text, seed=0), tmp_path / "f.onnx", ["log_prob", "sample"], seed=1)
    assert [d.code for d in e.value.diagnostics] == ["FL0701"]
    assert e.value.diagnostics[0].span is not None
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = fl.compile(COUPLING, seed=0)
    (file,) = fl.export_onnx(flow, tmp_path / "p.onnx", ["log_prob"]).values()
    before = file.read_bytes()

    def stopped(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        fl.export_onnx(flow, tmp_path / "p.onnx", ["sample"])
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["p.onnx"]
    assert file.read_bytes() == before


def test_compile_from_keeps_what_export_needs() -> None:
    comp = analyse(COUPLING, sized=True)
    assert fl.export_onnx is not None
    assert type(compile_from(comp)) is type(compile_from(comp))


def test_a_lifted_axis_may_have_the_name_of_one_inside(tmp_path: Path) -> None:
    """`h[K]` works along K for each D, and calls its own axis D."""
    text = "net h(x: R[D]) -> R[E = 4] { linear[D -> E](sum[D](x) * x) }\nnet g(x: R[D = 3, K = 2]) { y: R[D, E] = h[K](x);  y }"
    net = fl.compile(text, flow="g", seed=0)
    x = torch.randn(5, 3, 2)
    weight, bias = sorted(net.parameters(), key=lambda p: -p.dim())
    torch.testing.assert_close(net(x), (x.sum(-1, keepdim=True) * x) @ weight.T + bias)
    found = fl.compare_onnx(net, fl.export_onnx(net, tmp_path / "g.onnx"))
    assert all(c.error <= 1e-6 for c in found.values())
