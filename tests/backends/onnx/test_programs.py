"""Programs of models: losses, samplers, densities and others by name, against the module's own methods."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from flowlang.backends.onnx.build import Options, export
from flowlang.backends.torch.standard import StandardisedModel

import flowlang as fl
from flowlang.api import analyse
from flowlang.cli.main import cli
from tests.backends.onnx.support import flow_of, has_kernels, noise_like, replayed, session

FLOW_MATCHING = """
model flow_matching(v: net = mlp(16, 16, act = tanh), path: path = cond_ot) {
  data x1: R[D = 2]
  def loss {
    x0 ~ normal
    t ~ uniform(0, 1)
    mean((v(path.at(t, x0, x1), t) - path.velocity(t, x0, x1)) ^ 2)
  }
  def sample { x0 ~ normal;  integrate(v, x0, t = 0 -> 1, rk4(steps = 8)) }
  def log_prob(x1) { z, log_det = cnf(v, rk4(steps = 8))(x1);  normal.log_prob(z) + log_det }
  def from_noise(x0: R[D]) { integrate(v, x0, t = 0 -> 1, dopri5) }
}
"""
PICKS = """model picks {
  data x: R[T = 3, D = 4], y: Int(0..3)[T]
  def both(x, y) { x[D = y] }
  def one(x, k: Int(0..2)) { x[T = k] }
  def along(x, k: Int(0..2)[D]) { x[T = k] }
  def several(x, k: Int(0..2)[J = 5]) { x[T = k] }
}"""
RESULTS = """model results {
  data x: R[D = 3]
  param a: R[D] = 1
  def prior { 2 * a }
  def pair { x ~ normal;  length = sqrt(sum[D](x ^ 2));  x + a, length }
  def fit_loss(x) { sum[D]((x - a) ^ 2) }
}"""
SMALL = {
    "flow matching": FLOW_MATCHING,
    "picks": PICKS,
    "results": RESULTS,
    "nl_invs": "model m = nl_invs(dims = 6, invariants = 1, layers = 2)",
    "spectral gan": "model m = sngan(d = sn_disc_resnet32(ch = 2), g = gen_resnet32(ch = 2), noise = 4)",
    "jet": "model m = jet_model(channels = 1, size = 4, steps = jet_steps(4, 2, 2, 2, 8, 1, 2))",
    "tarflow": "model m = tarflow_model(channels = 1, size = 4, patch = 2, blocks = 2, layers = 1, width = 16, head = 8, classes = 3)",
    "classifier": Path(__file__).parents[3] / "specs" / "classify" / "digits_conv.flow",
}


def values(node: Any, shape: list[int], generator: np.random.Generator) -> np.ndarray:
    domain = node.attrs.get("domain")
    lo, hi = (domain.interval.lo, domain.interval.hi) if domain is not None else (-math.inf, math.inf)
    if domain is not None and domain.name == "Int":
        return generator.integers(int(lo), int(hi) + 1, shape)
    x = generator.standard_normal(shape)
    if math.isfinite(lo) and math.isfinite(hi):
        return lo + (hi - lo) * generator.random(shape)
    return lo + 0.1 + np.abs(x) if math.isfinite(lo) else x


def feeds(region: Any, run: Any, batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch)
    meta = run.get_modelmeta().custom_metadata_map
    kinds = json.loads(meta.get("noise", "{}"))
    own = {region.graph[i].label: region.graph[i] for i in region.inputs}
    real = np.float64 if meta["dtype"] == "float64" else np.float32
    out = {}
    for i in run.get_inputs():
        shape = [batch if d == "batch" else d for d in i.shape]
        if i.name in kinds:
            found = noise_like(kinds[i.name]["kind"], shape, generator, kinds[i.name].get("df"))
        elif i.name == "batch_size":
            found = np.array([batch])
        else:
            found = values(own[i.name], shape, generator)
        out[i.name] = np.asarray(found, dtype=np.int64 if "int64" in i.type else real)
    return out


def reference(module: Any, program: str, given: dict[str, np.ndarray], run: Any, batch: int) -> list[np.ndarray]:
    kinds = json.loads(run.get_modelmeta().custom_metadata_map.get("noise", "{}"))
    tensors = {k: torch.as_tensor(v) for k, v in given.items() if k != "batch_size"}
    with torch.no_grad(), replayed(getattr(module, "flow", module), [tensors[k] for k in kinds], []):
        found = module.run(program, tuple(tensors[k] for k in module.programs[program]), (batch,), None)
    return [t.numpy() for t in (found if isinstance(found, tuple) else (found,))]


def results(run: Any, program: str, given: dict[str, np.ndarray], batch: int) -> list[np.ndarray]:
    """Of the model; a loss, which comes out for each sample, averaged as the method averages it."""
    found = run.run(None, given)
    if program.endswith("loss") or program.startswith("loss"):
        (loss,) = found
        assert loss.shape[0] == batch
        return [loss.mean(dtype=np.float64).astype(loss.dtype)]
    return found


def check(text: str | Path, dtype: torch.dtype, batches: tuple[int, ...]) -> None:
    comp = analyse(text, {}, sized=True)
    assert comp.ok, comp.report.errors[0].message
    name = comp.models()[0]
    region = comp.regions[name]
    module = flow_of(comp, name, dtype)
    exact_module = copy.deepcopy(module).double()
    for program in region.programs:
        model = export(region, comp.analyses, module, program, Options())
        run = has_kernels(model)
        if run is None:
            assert dtype == torch.float64, "float32 kernels are there for everything"
            continue
        for batch in batches:
            given = feeds(region.programs[program], run, batch)
            double = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in given.items()}
            wanted = reference(module, program, given, run, batch)
            exact = reference(exact_module, program, double, run, batch)
            found = results(run, program, given, batch)
            for a, b, e in zip(found, wanted, exact, strict=True):
                assert a.shape == b.shape, program
                assert a.dtype == b.dtype, program
                scale = max(1.0, np.abs(e).max(initial=0.0))
                assert np.abs(a - e).max(initial=0.0) <= (1e-9 if dtype == torch.float64 else 1e-5) * scale, program


@pytest.mark.parametrize("case", SMALL)
def test_every_program_is_the_modules_method(case: str) -> None:
    check(SMALL[case], torch.float32, (1, 7))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_every_program_at_every_batch_and_precision(case: str, dtype: torch.dtype) -> None:
    check(SMALL[case], dtype, (1, 7, 50 if case == "spectral gan" else 1000))


def test_inputs_are_data_and_noise_by_name_and_results_carry_names(tmp_path: Path) -> None:
    model = fl.compile(FLOW_MATCHING, seed=0)
    programs = ["loss", "sample", "log_prob", "from_noise"]
    files = fl.export_onnx(model, tmp_path / "m.onnx", programs)
    shapes = {}
    for program, file in files.items():
        graph = onnx.load(file).graph
        shapes[program] = [
            {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in side}
            for side in (graph.input, graph.output)
        ]
    assert shapes["loss"] == [{"x1": ["batch", 2], "x0": ["batch", 2], "t": ["batch"]}, {"loss": ["batch"]}]
    assert shapes["sample"] == [{"x0": ["batch", 2]}, {"sample": ["batch", 2]}]
    assert shapes["log_prob"] == [{"x1": ["batch", 2]}, {"log_prob": ["batch"]}]
    assert shapes["from_noise"] == [{"x0": ["batch", 2]}, {"from_noise": ["batch", 2]}]
    meta = {p.key: p.value for p in onnx.load(files["loss"]).metadata_props}
    assert json.loads(meta["noise"]) == {"x0": {"kind": "normal"}, "t": {"kind": "uniform"}}
    assert json.loads(meta["axes"]) == {"x1": [["D", 2]]}


def test_a_seed_draws_inside(tmp_path: Path) -> None:
    model = fl.compile(FLOW_MATCHING, seed=0)
    files = fl.export_onnx(model, tmp_path / "m.onnx", ["sample", "loss"], seed=2)
    run = session(onnx.load(files["sample"]))
    assert [i.name for i in run.get_inputs()] == ["batch_size"]
    (x,) = run.run(None, {"batch_size": np.array([500])})
    assert x.shape == (500, 2)
    assert 0.3 < x.std() < 3
    run = session(onnx.load(files["loss"]))
    assert [i.name for i in run.get_inputs()] == ["x1"]
    assert (run.run(None, {"x1": x})[0] > 0).all()


def test_raw_data_in_and_out() -> None:
    comp = analyse(FLOW_MATCHING, {}, sized=True)
    inner = flow_of(comp, "flow_matching", torch.float64)
    mean, scale = np.array([3.0, -1.0]), np.array([2.0, 0.25])
    whole = StandardisedModel(inner, mean, scale)
    from flowlang.backends.onnx.build import Standard

    for program in ("loss", "sample", "log_prob", "from_noise"):
        options = Options(standard=Standard(mean, scale))
        run = session(export(comp.regions["flow_matching"], comp.analyses, inner, program, options))
        given = feeds(comp.regions["flow_matching"].programs[program], run, 6)
        for a, b in zip(results(run, program, given, 6), reference(whole, program, given, run, 6), strict=True):
            assert np.allclose(a, b, rtol=1e-9, atol=1e-9), program


def test_open_axes_stay_open(tmp_path: Path) -> None:
    text = """model m {
      data x: R[T, D = 3]
      v = mlp[D](8)
      def loss { e: R[T, D] ~ normal;  mean[T, D]((v(x + e) - x) ^ 2) }
      def scaled(x) { h: R[T, D] = v(x);  h / T }
    }"""
    model = fl.compile(text, seed=0, T=4)
    files = fl.export_onnx(model, tmp_path / "m.onnx", ["loss", "scaled"])
    for t in (2, 9):
        x, e = (np.random.default_rng(k).standard_normal((5, t, 3)).astype(np.float32) for k in (0, 1))
        other = fl.compile(text, seed=0, T=t)
        with torch.no_grad(), replayed(other, [torch.as_tensor(e)], []):
            wanted = float(other.loss(torch.as_tensor(x)))
            scaled = other.scaled(torch.as_tensor(x)).numpy()
        (found,) = session(onnx.load(files["loss"])).run(None, {"x": x, "e": e})
        assert abs(float(found.mean()) - wanted) <= 1e-5 * max(1.0, abs(wanted))
        assert np.allclose(session(onnx.load(files["scaled"])).run(None, {"x": x})[0], scaled, rtol=1e-5, atol=1e-6)


def test_the_command_exports_a_models_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.flow").write_text(FLOW_MATCHING)
    Path("r.flow").write_text(RESULTS)
    done = CliRunner().invoke(cli, ["export", "m.flow", "-o", "m.onnx"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in Path().glob("*.onnx")) == [
        f"m.{k}.onnx" for k in ("from_noise", "log_prob", "sample")
    ]
    done = CliRunner().invoke(cli, ["export", "r.flow", "-o", "r.onnx"], catch_exceptions=False)
    assert done.exit_code == 0, done.output  # all but losses
    assert sorted(p.name for p in Path().glob("r*.onnx")) == ["r.pair.onnx", "r.prior.onnx"]
    done = CliRunner().invoke(cli, ["export", "m.flow", "--program", "forward", "-o", "m.onnx"])
    assert done.exit_code != 0
    (d,) = done.exception.diagnostics
    assert d.code == "FL0804"
    assert "`from_noise`" in d.suggestion
