"""Every library bijector and every spec, each program: onnxruntime against the PyTorch module."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowlang.backends.onnx.build import HIGHEST_OPSET, Options, export

import flowlang as fl
from flowlang import limits
from flowlang.api import Compilation, analyse
from flowlang.catalogue import entries, entry_text
from tests.backends.onnx.rounding import float32_error
from tests.backends.onnx.support import PROGRAMS, ROOM, data_of, flow_of, parity, session

ROOT = Path(__file__).parents[3]
SPECS = sorted([*(ROOT / "tests" / "acceptance" / "good").glob("*.flow"), *(ROOT / "specs").glob("**/*.flow")])

SIZES = {"D": 4, "C": 4, "H": 4, "W": 4, "T": 3}
# Entries that need more than their data, or other data: the flow's inputs, the steps, the base.
CASES = {
    "factor_out": ("", "factor_out[C](normal)", "normal"),
    "conditional_planar": ("given c: R[K = 3]\n", "conditional_planar", "normal"),
    "conditional_radial": ("given c: R[K = 3]\n", "conditional_radial", "normal"),
}
FORCE = "net force(z: R[D]) { -z }"
CASES |= {
    "uniform_dequantise": ("data x: Int(0..17)[D = 4]\n", "uniform_dequantise(17)\n elementwise(logit)", "normal"),
    "variational_dequantise": (
        "data x: Int(0..3)[C = 1, H = 2, W = 2]\n", "variational_dequantise(3, net = conv_net(4))\n elementwise(logit)", "normal",
    ),
    "logit_transform": ("data x: Interval(-0.05 / 0.9, 1 + 0.05 / 0.9)[D = 3]\n", "logit_transform", "normal"),
    "glow_step": ("data x: R[C = 4, H = 2, W = 2]\n", "glow_step(8)", "normal"),
    "hamiltonian_step": ("", "hamiltonian_step(force = force())", "normal"),
    "langevin_step": ("", "langevin_step(force = force())", "normal"),
    "overdamped_langevin": ("", "overdamped_langevin(annealed(double_well, 0))", "normal"),
    "metropolis": ("", "metropolis(annealed(double_well, 0))", "normal"),
    "langevin": ("data x: R[D = 4]\n", "langevin(annealed(double_well, 0))", "normal"),
    "snf_steps": ("", "snf_steps(blocks = 1, kernels = 0, hidden = [8])", "normal"),
    "jet_affine": ("data x: R[T = 3, D = 4]\ngiven a: R[T = 3, D = 4]\n", "jet_affine(jet_vit(8, 1, 2))", "normal"),
    "jet_tokens": ("data x: R[T = 4, D = 4]\n", "jet_tokens", "normal"),
    "jet_spatial_coupling": ("data x: R[T = 4, D = 4]\n", "jet_spatial_coupling(jet_vit(8, 1, 2))", "normal"),
    "jet_steps": ("data x: R[C = 1, H = 4, W = 4]\n", "jet_steps(4, 2, 6, 2, 8, 1, 2)", "normal"),
    "tail_lu": ("", "tail_lu(2)", "normal"),
    "tail_permutation": ("", "tail_permutation(2)", "normal"),
    "light_tails": ("", "light_tails(2)", "student_t(df = 4)"),
    "mtaf_steps": ("", "mtaf_steps(2, 2, [16])", "normal"),
    # At its own width the test's random shift of the weights makes log-densities of -1e16.
    "tarflow_block": ("data x: R[T = 3, D = 4]\n", "tarflow_block(tarflow_net(16, 2, 8))", "normal"),
    "tarflow_guided_block": (
        "data x: R[T = 3, D = 4]\ngiven guidance: R, y: Int(-1..2)\n", "tarflow_guided_block(tarflow_net(16, 2, 8, 2), classes = 2)", "normal",
    ),
    "nanoflow_step_wave": (
        "data x: R[H = 4, W = 3]\ngiven mel: R[M = 2, H = 4, W = 3], e: R[E = 3]\n", "nanoflow_step_wave(nanoflow_estimator(6, 2), 6, 2)", "normal",
    ),
    "nanoflow_step_glow": ("data x: R[C = 4, H = 2, W = 3]\n", "nanoflow_step_glow(nanoflow_image_estimator(6), 6, 2)", "normal"),
    "nanoflow_wave_steps": ("data x: R[T = 16]\ngiven c: R[M = 2, F = 1]\n", "nanoflow_wave_steps(4, 2, 2, 6, 5)", "normal"),
    "quad_coupling": ("data x: R[C = 4, H = 2, W = 2]\n", "quad_coupling(zero_conv_net(8), zero_conv_net(8), zero_conv_net(8))", "normal"),
    "cinc_step": ("data x: R[C = 4, H = 2, W = 3]\n", "cinc_step(2, 8)", "normal"),
    "inverse_flow_step": ("data x: R[C = 4, H = 2, W = 3]\n", "inverse_flow_step(3, 8)", "normal"),
    "inverse_flow_steps": ("data x: R[C = 1, H = 4, W = 4]\n", "inverse_flow_steps(2, 1, 2, 8)", "normal"),
    "finc_unit": ("data x: R[C = 4, H = 3, W = 2]\n", "finc_unit", "normal"),
    "interleaved_coupling": ("data x: R[C = 4, H = 2, W = 2]\n", "interleaved_coupling(zero_conv_net(8))", "normal"),
    "coupled_factor_out": ("data x: R[C = 4, H = 2, W = 2]\n", "coupled_factor_out(normal, zero_conv_net(8))", "normal"),
    "finc_step": ("data x: R[C = 4, H = 2, W = 3]\n", "finc_step(3, 8)", "normal"),
    "finc_steps": ("data x: R[C = 1, H = 4, W = 4]\n", "finc_steps(2, 1, 2, 8)", "normal"),
    "modified_rq_spline": (
        "given w: R[D = 4], h: R[D = 4], d: R[D = 4], shift: R[D = 4]\n", "modified_rq_spline", "normal",
    ),
    **{
        name: ("data x: R[C = 4, H = 2, W = 2]\ngiven c: R[E = 3, H = 2, W = 2]\n", f"{name}(robust_conditioner(8))", "normal")
        for name in ("modified_rq_spline_coupling", "modified_rq_spline_injector", "cond_affine_coupling")
    },
}  # fmt: skip
SMALL = "filters = 4, blocks = 1, heads = 2, components = 2"
CASES |= {
    "mixlogistic_attn_coupling": ("data x: R[S = 2, C = 2, H = 2, W = 2]\n", f"mixlogistic_attn_coupling({SMALL})", "normal"),
    "flowpp_step": ("data x: R[S = 2, C = 2, H = 2, W = 2]\n", f"flowpp_step({SMALL})", "normal"),
    "flowpp_steps": ("data x: R[C = 2, H = 4, W = 4]\n", f"flowpp_steps({SMALL})", "normal"),
    "flowpp_dequant": (
        "data x: Int(0..4)[C = 2, H = 2, W = 4]\n", f"flowpp_dequant(4, {SMALL}, context = 3)\n elementwise(logit)", "normal",
    ),
}  # fmt: skip
# Maps that others are made of: their parameters are values of the flow, and the entries that use them are tested.
# (those of spheres and circles, whose points are drawn otherwise, in test_001).
PARTS = {
    "planar_map", "radial_map", "mixlogistic_cdf", "flowpp_noise", "moebius_sphere", "symmetrized_moebius", "torus_moebius",
    "metropolis_move", "convex_gradient_sphere", "rigid_coupling", "rigid_couplings", "gm_transport",
}  # fmt: skip
BIJECTORS = [e["name"] for e in entries() if e["kind"] == "bijector" and e["name"] not in PARTS]


def step_flow(name: str) -> str:
    """A flow with the entry as its one step, its data as the entry declares it."""
    text = entry_text(name)
    data = re.search(r"\(x: (\w+(?:\([^)]*\))?)\[([^\]]*)\]", text)
    domain, axes = (data[1], data[2]) if data else ("R", "D")
    names = [a.split("=")[0].strip() for a in axes.split(",") if a.strip() != ".."] or ["D"]
    shape = ", ".join(f"{a} = {SIZES.get(a, 3)}" for a in names)
    base = {"Torus": "von_mises(concentration = 2)"}.get(domain, "normal")
    inputs, step, base = CASES.get(name, ("", name, base))
    if "data " not in inputs:
        inputs = f"data x: {domain}[{shape}]\n {inputs}"
    return f"flow one {{ {inputs}\n {step}\n base {base} }}\n{FORCE if 'force' in step else ''}"


def compiled(text: str | Path) -> Compilation:
    comp = analyse(text, sized=True)
    assert comp.ok, comp.report.errors[0].message
    return comp


def tolerance(comp: Compilation, name: str, program: str, dtype: torch.dtype) -> float:
    """1e-5 relative to scale in float32, 1e-4 where the inverse iterates; in float64 1e-9 and 1e-7."""
    region = comp.regions[name]
    iterative = comp.analyses.way(region) != "analytic"
    loose = iterative and program not in ("log_prob", "forward")
    if dtype == torch.float64:
        return 1e-7 if loose else 1e-9
    return 1e-4 if loose else 1e-5


def check(comp: Compilation, program: str, dtype: torch.dtype, batches: tuple[int, ...]) -> None:
    for name in comp.flows():
        found = parity(comp, name, program, dtype, batches, tolerance(comp, name, program, dtype))
        if found is None:
            assert dtype == torch.float64, "float32 kernels are there for everything"
            continue
        assert found <= 1, (name, program)


@pytest.mark.parametrize("name", BIJECTORS)
def test_library_bijector(name: str) -> None:
    comp = compiled(step_flow(name))
    for program in PROGRAMS:
        check(comp, program, torch.float32, (7,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BIJECTORS)
def test_library_bijector_at_every_batch_and_precision(name: str, dtype: torch.dtype) -> None:
    comp = compiled(step_flow(name))
    for program in PROGRAMS:
        check(comp, program, dtype, (1, 7, 1000))


# What has a loop of few stages, which is written out unless it is asked otherwise (the tests above keep all loops).
FEW_STAGES = [
    "affine_autoregressive", "cubic_spline_autoregressive", "linear_spline_autoregressive", "quadratic_spline_autoregressive",
    "rq_autoregressive", "rqs_autoregressive", "nanoflow_step_wave", "nanoflow_wave_steps", "rq_nsf_ar_steps", "mtaf_steps",
    "diamonds", "flights", "weather", "own_autoregressive",
]  # fmt: skip


def written_out(name: str, dtypes: tuple[torch.dtype, ...], batches: tuple[int, ...]) -> None:
    spec = {p.stem: p for p in SPECS}.get(name)
    comp = compiled(spec or step_flow(name))
    (flow,) = comp.flows()
    options = Options(unroll=limits.WRITTEN_STAGES)
    model = export(comp.regions[flow], comp.analyses, flow_of(comp, flow, torch.float32), "sample", options)
    assert int({p.key: p.value for p in model.metadata_props}["written_out"]) <= limits.WRITTEN_STAGES
    for program in ("sample", "inverse", "sample_and_log_prob"):
        for dtype in dtypes:
            allowed = tolerance(comp, flow, program, dtype)
            assert (parity(comp, flow, program, dtype, batches, allowed, options) or 0.0) <= 1


@pytest.mark.parametrize("name", FEW_STAGES)
def test_loops_written_out(name: str) -> None:
    written_out(name, (torch.float32,), (7,))


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_STAGES)
def test_loops_written_out_at_every_batch_and_precision(name: str) -> None:
    written_out(name, (torch.float32, torch.float64), (1, 7, 1000))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", BIJECTORS)
def test_the_highest_opset_has_kernels(name: str, program: str) -> None:
    """The lowest is what all other tests use."""
    comp = compiled(step_flow(name))
    (flow,) = comp.flows()
    session(
        export(
            comp.regions[flow], comp.analyses, flow_of(comp, flow, torch.float32), program, Options(opset=HIGHEST_OPSET)
        )
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_spec(spec: Path) -> None:
    comp = compiled(spec)
    for program in ("log_prob", "sample"):
        check(comp, program, torch.float32, (3,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_spec_at_every_batch_and_precision(spec: Path, dtype: torch.dtype) -> None:
    comp = compiled(spec)
    for program in PROGRAMS:
        check(comp, program, dtype, (1, 7, 1000))


def test_the_room_for_rounding_is_narrow() -> None:
    """What float32 is given beyond the tolerance hides no wrong number: weights off by a hundredth of a percent are told."""
    comp = compiled(
        "flow f { data x: R[D = 4]\n repeat 2 { rqs_coupling(bins = 8, net = mlp(16))\n reverse }\n base normal }"
    )
    flow = flow_of(comp, "f", torch.float32)
    exact = copy.deepcopy(flow).double()
    x = torch.as_tensor(data_of(comp, "f", (300, 4), np.random.default_rng(0)))

    def run(module: Any) -> list[np.ndarray]:
        with torch.no_grad():
            return [v.numpy() for v in module._forward(x.to(next(module.parameters()).dtype))]

    wanted = run(exact)
    room = float32_error(lambda: run(exact), wanted)
    for r, e, found in zip(room, wanted, run(flow), strict=True):
        assert np.quantile(r, 0.95) <= 5e-6
        assert (np.abs(found - e) <= np.maximum(ROOM * r, 1e-5 * np.maximum(1, np.abs(e)))).all()
    with torch.no_grad():
        [p for p in flow.parameters() if p.dim() == 2][-1].mul_(1 + 1e-4)
    beyond = [
        (np.abs(f - e) > np.maximum(ROOM * r, 1e-5 * np.maximum(1, np.abs(e)))).mean()
        for f, e, r in zip(run(flow), wanted, room, strict=True)
    ]
    assert max(beyond) > 0.1


def test_the_face_exports_what_it_compiled(tmp_path: Path) -> None:
    flow = fl.compile(ROOT / "specs" / "moons.flow", seed=0)
    files = fl.export_onnx(flow, tmp_path / "flow.onnx", ["log_prob", "sample"])
    assert {k: p.name for k, p in files.items()} == {"log_prob": "flow.log_prob.onnx", "sample": "flow.sample.onnx"}
    assert all(p.stat().st_size > 0 for p in files.values())
