"""Judges one random region: accepted or not, and whether an accepted one is what it claims."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from flowlang.backends.torch.codegen import Generator, module_text
from flowlang.backends.torch.load import load_module

from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import CallInverse, Failure, Gather, Solve, Unjoin
from flowlang.ir.graph import Region
from flowlang.ir.interval import REAL
from tests.interpreter import evaluate


@dataclass
class Verdict:
    """What became of a region: refused (with a code), accepted and right, or wrong (with the reason)."""

    accepted: bool
    trivial: bool = False
    wrong: str = ""
    code: str = ""
    ways: tuple[str, ...] = ()


TRIVIAL_OPS = {"reverse", "permute", "rename", "order", "neg", "split", "merge"}


def judge(region: Region, seed: int) -> Verdict:
    analyses = Analyses()
    if analyses.violations(region):
        return Verdict(False, code="FL0409")
    plan = analyses.plan(region)
    if isinstance(plan, Failure):
        return Verdict(False, code=plan.code)
    ways = tuple(sorted({type(s).__name__ for s in plan.steps}))
    trivial = all(
        isinstance(s, Unjoin | Gather | CallInverse) or (isinstance(s, Solve) and region.graph[s.node].op in TRIVIAL_OPS)
        for s in plan.steps
    )
    wrong = compare(region, analyses, seed)
    return Verdict(True, trivial, wrong, ways=ways)


def compare(region: Region, analyses: Analyses, seed: int) -> str:
    """Empty when forward, log-det and round trip agree with the independent interpreter."""
    generated = Generator(region, analyses, "random").generate()
    text = module_text(generated, standalone=False, title="random", origin="random")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            module = getattr(load_module(text), generated.root)()
            with torch.no_grad():
                for p in module.parameters():
                    p += 0.4 * torch.randn_like(p)
            return check(region, analyses, module)
        finally:
            torch.set_default_dtype(torch.float32)


def check(region: Region, analyses: Analyses, module: torch.nn.Module) -> str:
    graph = region.graph
    shape = graph[region.inputs[0]].tensor.shape
    parameters = {}
    for node in graph:
        if node.op == "param":
            held = getattr(module, node.attrs["name"])
            parameters[node.attrs["name"]] = (held() if isinstance(held, torch.nn.Module) else held).detach()
    estimated = analyses.region_class(region) == "estimator"
    image = analyses.ranges(region).interval(region.outputs[0])
    n = math.prod(shape)
    for trial in range(3):
        x = torch.randn(shape) * (1.0 + trial)
        c = torch.randn(2)

        def f(v: torch.Tensor, c: torch.Tensor = c) -> torch.Tensor:
            return evaluate(graph, {region.inputs[0]: v, region.context[0]: c}, parameters, [region.outputs[0]])[0]

        y = f(x)
        jacobian = torch.autograd.functional.jacobian(f, x)
        assert isinstance(jacobian, torch.Tensor)
        jacobian = jacobian.reshape(n, n)
        singular = torch.linalg.svdvals(jacobian)
        condition = float(singular[0] / singular[-1].clamp_min(1e-300))
        if not math.isfinite(condition) or condition > 1e10:
            continue  # saturated in float64
        with torch.no_grad() if not estimated else torch.enable_grad():
            made, log_det = module(x.unsqueeze(0), c.unsqueeze(0))
            back, back_det = module.inverse(y.unsqueeze(0), c.unsqueeze(0))
        if not torch.allclose(made[0], y, rtol=1e-9, atol=1e-9):
            return f"forward differs by {float((made[0] - y).abs().max()):.2e}"
        error = float((back[0] - x).abs().max())
        if not error <= 1e-8 * (1 + float(x.abs().max())) * max(condition, 1):
            return f"round trip off by {error:.2e} at condition {condition:.1e}"
        if not estimated:
            reference = float(torch.linalg.slogdet(jacobian)[1])
            if not abs(reference - float(log_det[0])) <= 1e-7 * (1 + abs(reference)):
                return f"log-det {float(log_det[0]):.6g}, and the Jacobian says {reference:.6g}"
            if not abs(reference + float(back_det[0])) <= 1e-6 * (1 + abs(reference)) * max(1, math.log10(condition)):
                return f"inverse log-det {float(back_det[0]):.6g}, and the Jacobian says {-reference:.6g}"
        if image == REAL:
            goal = 2 * torch.randn(shape)
            with torch.no_grad():
                point = module.inverse(goal.unsqueeze(0), c.unsqueeze(0))[0][0]
            if not torch.isfinite(point).all():
                return "a value of the claimed image has no finite preimage"
            reached = f(point)
            if not torch.allclose(reached, goal, rtol=1e-5, atol=1e-5):
                return f"a value of the claimed image is missed by {float((reached - goal).abs().max()):.2e}"
    return ""
