"""Every bijector of the library as flows to test: new entries are taken up without a change here.

What an entry needs beyond its name (a domain, channels, a base, a required argument) follows from its
declaration: the type of its mapped value and its parameters without a default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

import flowlang as fl
from flowlang.catalogue import entries
from flowlang.diagnostics import Report
from flowlang.library import standard_library
from flowlang.syntax import tree
from flowlang.syntax.parser import parse

SMALL = {"net": "mlp(16)", "hidden": "12", "layers": "2", "rank": "1"}
REQUIRED = {"distribution": "normal", "net": "mlp(16)"}
# Maps whose values are what an encoder or another step supplies, or that are meant for a larger model:
# each has tests of its own.
ELSEWHERE = {
    "planar_map": "test_067", "radial_map": "test_067", "hamiltonian_step": "test_067", "langevin_step": "test_067",
    "planar_vae": "test_067", "cnf": "tests of continuous flows", "factor_out": "tests of multi-scale flows",
    "learned_factor_out": "tests of multi-scale flows", "uniform_dequantise": "tests of dequantisation",
    "variational_dequantise": "tests of dequantisation", "cif_step": "tests of bounds",
    "tail_lu": "test_028", "tail_permutation": "test_028", "light_tails": "test_028", "mtaf_steps": "test_028",
    "jet_affine": "test_009", "jet_tokens": "test_009", "jet_spatial_coupling": "test_009",
    "jet_channel_coupling": "test_009", "jet_coupling": "test_009", "jet_patches": "test_009", "jet_steps": "test_009",
    "tarflow_block": "test_003", "tarflow_guided_block": "test_003", "tarflow_patches": "test_003",
    "nanoflow_step_wave": "test_002", "nanoflow_step_glow": "test_002", "nanoflow_wave_steps": "test_002",
    "cinc_conv": "test_008", "quad_coupling": "test_008", "cinc_step": "test_008", "zero_conv_factor_out": "test_008",
    "inv_conv": "test_018", "inverse_flow_step": "test_018", "inverse_flow_steps": "test_018",
    "masked_affine_coupling": "test_058", "flow_batch_norm": "test_058", "realnvp_blocks": "test_058",
    "corner_conv": "test_034", "finc_conv": "test_034", "finc_unit": "test_034", "interleaved_coupling": "test_034",
    "coupled_factor_out": "test_034", "finc_step": "test_034", "finc_steps": "test_034",
    "modified_rq_spline": "test_039", "modified_rq_spline_coupling": "test_039",
    "modified_rq_spline_injector": "test_039", "cond_affine_coupling": "test_039",
    "mixlogistic_cdf": "test_089", "mixlogistic_attn_coupling": "test_089", "pointwise": "test_089",
    "flowpp_step": "test_089", "flowpp_steps": "test_089", "flowpp_noise": "test_089", "flowpp_dequant": "test_089",
    "overdamped_langevin": "test_019", "langevin": "test_019", "with_velocities": "test_019", "metropolis_move": "test_019",
    "metropolis": "test_019", "snf_steps": "test_019",
    "moebius_sphere": "test_001", "symmetrized_moebius": "test_001", "torus_moebius": "test_001",
    "gm_transport": "test_101", "convex_gradient_sphere": "test_001", "rigid_coupling": "test_001", "rigid_couplings": "test_001",
}  # fmt: skip
BASES = {"Unit": "uniform(0, 1)", "Torus": "uniform(-π, π)", "Positive": "exponential"}


@dataclass(frozen=True)
class Case:
    name: str
    text: str
    context: bool

    @property
    def id(self) -> str:
        return f"{self.name}{'-given' if self.context else ''}{'-image' if 'C = ' in self.text else ''}"


def declaration(name: str) -> tree.Declaration:
    source = standard_library().find(name)
    assert source is not None
    found = [i for i in parse(source, Report()).module.items if isinstance(i, tree.Declaration) and i.name == name]
    return found[0]


def followed(name: str) -> tree.Declaration:
    d = declaration(name)
    while d.alias is not None:
        target = d.alias.fn if isinstance(d.alias, tree.Call) else d.alias
        assert isinstance(target, tree.Name)
        d = declaration(target.id)
    return d


def signature(d: tree.Declaration) -> tuple[str | None, bool, bool, list[tree.Parameter]]:
    """The type of the mapped value as text, whether context may and must be given, and the static parameters."""
    mapped, may, must, statics = None, False, False, []
    for p in (p for ps in d.parameters for p in ps):
        text = p.type.span.text if p.type is not None else ""
        if not re.match(r"[A-Z]\w*(\(.*\))?\s*(\[|\?|$)", text):
            statics.append(p)
        elif p.given:
            may, must = True, must or not text.endswith("?")
        elif mapped is None:
            mapped = text
    return mapped, may, must, statics


def arguments(statics: list[tree.Parameter], image: bool) -> str:
    said = []
    for p in statics:
        kind = p.type.span.text if p.type is not None else ""
        if p.name in SMALL and (p.name != "net" or p.default is not None):
            value = SMALL[p.name]
            default = p.default.span.text if p.default is not None else ""
            if p.name == "net":
                value = "conv_net(8)" if image else "mlp(16, act = elu)" if "elu" in default else value
            said.append(f"{p.name} = {f'[{value}]' if kind == '[int]' else value}")
        elif p.default is None:
            said.append(f"{p.name} = {REQUIRED[kind]}")
    return f"({', '.join(said)})" if said else ""


@cache
def cases() -> tuple[Case, ...]:
    out: list[Case] = []
    for e in entries():
        if e["kind"] != "bijector" or e["name"] in ELSEWHERE:
            continue
        mapped, may, must, statics = signature(followed(e["name"]))
        domain = domain_of(mapped, statics)
        axes = re.sub(r".*?\[|\].*", "", mapped) if mapped and "[" in mapped else "D"
        image = axes.startswith("C") or "H" in axes.split(", ") or (mapped is None and not takes_vectors(e["name"]))
        for context in (False, True):
            sizes = ["D = 3"] if context else ["D = 2", "D = 5"] if splits(e["name"]) else ["D = 1", "D = 4"]
            if image:
                sizes = ["C = 4, H = 2, W = 2"]
            if (context and not may and mapped is not None) or (must and not context):
                continue
            for size in sizes:
                given = "\n  given c: R[E = 3]" if context else ""
                base = BASES.get(domain, "normal")
                step = e["name"] + arguments(statics, image)
                text = f"flow f {{\n  data x: {domain}[{size}]{given}\n  {step}\n  base {base if keeps(e['name'], domain) else 'normal'}\n}}\n"
                out.append(Case(f"{e['name']}({size})", text, context))
        if image is False and mapped and mapped.endswith("[D, ..]") and not must:
            step = f"{e['name']}[C]" + arguments(statics, True)
            if "step" not in [p.name for p in statics]:
                text = f"flow f {{\n  data x: {domain}[C = 3, H = 2, W = 2]\n  {step}\n  base normal\n}}\n"
                out.append(Case(f"{e['name']}(C = 3)", text, False))
    return tuple(out)


def domain_of(mapped: str | None, statics: list[tree.Parameter]) -> str:
    """The domain as text, its arguments' names replaced by their defaults."""
    text = mapped[: mapped.index("[")] if mapped and "[" in mapped else "R"
    for p in statics:
        if p.default is not None:
            text = re.sub(rf"\b{p.name}\b", p.default.span.text, text)
    return text


def takes_vectors(name: str) -> bool:
    return fl.check(f"flow f {{\n  data x: R[D = 2]\n  {name}\n  base normal\n}}\n").ok


def splits(name: str) -> bool:
    return "coupling" in name or "_c_steps" in name or name == "vp_net"


def keeps(name: str, domain: str) -> bool:
    """Whether the entry maps its domain onto itself, by what the compiler says."""
    return domain in BASES and fl.check(probe(name, domain)).ok


def probe(name: str, domain: str) -> str:
    return f"flow f {{\n  data x: {domain}[D = 2]\n  {name}\n  base {BASES[domain]}\n}}\n"


@cache
def compiled(case: Case) -> fl.Flow:
    """In float64, its parameters moved away from the start."""
    from flowlang.verify import perturb

    flow = fl.compile(case.text, seed=0, dtype=torch.float64).eval()
    perturb(flow, torch.Generator().manual_seed(1), 0.5)
    return flow
