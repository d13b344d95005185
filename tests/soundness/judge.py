"""Judges one random region: accepted or not, and whether an accepted one is what it claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from flowlang.backends.torch.codegen import Generator, module_text
from flowlang.backends.torch.explicit import wrong_rules
from flowlang.backends.torch.load import load_module
from torch import Tensor

from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import Failure, Gather, Plan, Solve, Unjoin
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Region
from flowlang.ir.interval import Interval
from flowlang.ir.manifolds import is_sphere, on_sphere
from tests.interpreter import Parameters, evaluate, follow


@dataclass
class Verdict:
    """What became of a region: refused (with a code), accepted and right, or wrong (with the reason)."""

    accepted: bool
    trivial: bool = False
    wrong: str = ""
    code: str = ""
    ways: tuple[str, ...] = ()


ESTIMATES, MORE = 60, 3000  # runs of an estimator, and those that confirm a deviation: its noise is skewed
INTO_REAL = {"log": "Positive", "logit": "Unit"}
TRIVIAL_OPS = {"reverse", "permute", "rename", "order", "neg", "split", "merge"}


def judge(region: Region, seed: int) -> Verdict:
    analyses = Analyses()
    if any(analyses.violations(r) for r in region.walk()):
        return Verdict(False, code="FL0409")
    plans = [analyses.plan(r) for r in region.walk()]
    refused = next((p for p in plans if isinstance(p, Failure)), None)
    if refused is not None:
        return Verdict(False, code=refused.code)
    plan = plans[-1]
    assert isinstance(plan, Plan)
    ways = tuple(sorted({type(s).__name__ for s in plan.steps}))
    trivial = all(
        isinstance(s, Unjoin | Gather) or (isinstance(s, Solve) and plan.region.graph[s.node].op in TRIVIAL_OPS)
        for s in plan.steps
    )
    try:
        wrong = compare(region, analyses, seed)
    except RulesRefused:
        return Verdict(False, code="FL0412")
    return Verdict(True, trivial, wrong, ways=ways)


class RulesRefused(Exception):
    """The numerical verification found a hand-given rule to be wrong."""


@contextmanager
def doubles(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def compare(region: Region, analyses: Analyses, seed: int) -> str:
    """Empty when forward, log-det and round trip agree with the independent interpreter."""
    generated = Generator(region, analyses, region.name).generate()
    text = module_text(generated, standalone=False, title=region.name, origin="random")
    with doubles(seed):
        module = getattr(load_module(text), generated.root)()
        with torch.no_grad():
            for p in module.parameters():
                p += 0.4 * torch.randn_like(p)
        if any(r.has_map_rules for r in region.walk()) and wrong_rules(region, module, analyses):
            raise RulesRefused
        return Judge(region, analyses, module).check()


def parameters_of(region: Region, module: Any) -> Parameters:
    """The values that a module holds for the parameters of its region and of those below."""
    found: dict[str, Any] = {}
    for node in region.graph:
        if node.op == "param":
            held = getattr(module, node.attrs["name"])
            found[node.attrs["name"]] = (held() if isinstance(held, torch.nn.Module) else held).detach()
    for name, child in region.children.items():
        below = getattr(module, name)
        copies = list(below) if isinstance(below, torch.nn.ModuleList) else [below]
        found[name] = [parameters_of(child.region, m) for m in copies]
    return found


def inside(domain: Interval, z: Tensor) -> Tensor:
    """Points of a domain from points of the line."""
    if domain.finite:
        return domain.lo + (domain.hi - domain.lo) * torch.sigmoid(z)
    if domain.lo > -math.inf:
        return domain.lo + torch.nn.functional.softplus(z)
    return domain.hi - torch.nn.functional.softplus(z) if domain.hi < math.inf else z


class Judge:
    """Compares a compiled region with the interpreter at a few points."""

    def __init__(self, region: Region, analyses: Analyses, module: Any):
        self.region, self.graph, self.module = region, region.graph, module
        self.parameters = parameters_of(region, module)
        self.estimated = analyses.region_class(region) == "estimator"
        self.shapes = [self.graph[i].tensor.shape for i in region.inputs]
        self.domains = [self.graph[i].attrs["domain"] for i in region.inputs]
        self.images = [analyses.ranges(region).interval(o) for o in region.outputs]
        self.out_shapes = [self.graph[o].tensor.shape for o in region.outputs]
        self.context = [torch.randn(self.graph[c].tensor.shape) for c in region.context]
        self.spheres = [is_sphere(self.graph[i]) for i in region.inputs]
        self.out_spheres = [on_sphere(self.graph, o, region=region) for o in region.outputs]
        self.whole = [self.graph[i].tensor.kind == "int" for i in region.inputs]
        # Where noise is drawn, the coordinates are the real inputs and the noise; whole numbers are held fixed.
        self.draws = [d.value for d in region.draws]
        self.numbers: dict[int, Tensor] = {}

    @property
    def moving(self) -> list[int]:
        return [i for i, n in zip(self.region.inputs, self.whole, strict=True) if not n] + self.draws

    def forward(self, flat: Tensor) -> Tensor:
        """The map as the interpreter has it, on flat vectors of the coordinates."""
        shapes = [self.graph[i].tensor.shape for i in self.moving]
        values = dict(zip(self.moving, self.cut(flat, shapes), strict=True)) | self.numbers
        values |= dict(zip(self.region.context, self.context, strict=True))
        found = evaluate(self.graph, values, self.parameters, self.region.outputs)
        return torch.cat([v.reshape(-1) for v in found])

    def cut(self, flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        sizes = [math.prod(s) for s in shapes]
        return [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]

    def run(self, method: str, flat: Tensor, shapes: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """A program of the module: flat results and log-det."""
        f = self.module if method == "forward" else self.module.inverse
        with torch.enable_grad() if self.estimated else torch.no_grad():
            out = f(*(v.unsqueeze(0) for v in self.cut(flat, shapes)), *(c.unsqueeze(0) for c in self.context))
            assert len(out) == 1 + len(self.shapes if method == "inverse" else self.out_shapes)
        return torch.cat([v.reshape(-1) for v in out[:-1]]).detach(), out[-1].detach()[0]

    def points(self, scale: float) -> Tensor:
        parts = []
        for d, s, sphere, whole in zip(self.domains, self.shapes, self.spheres, self.whole, strict=True):
            assert isinstance(d, Domain)
            z = scale * torch.randn(s)
            if sphere:
                z = torch.nn.functional.normalize(z, dim=-1)
            elif whole:
                lo, hi = max(d.interval.lo, -5.0), min(d.interval.hi, 5.0)
                z = lo + torch.randint(int(hi - lo) + 1, s).double()
            else:
                z = inside(d.interval, z)
            parts.append(z.reshape(-1))
        return torch.cat(parts)

    def alone(self) -> str:
        """A sample's result does not hang on what else is in the batch."""
        if self.estimated or self.draws:
            return ""
        both = [self.cut(self.points(s), self.shapes) for s in (1.0, 2.0)]
        context = [torch.randn(2, *c.shape) for c in self.context]
        with torch.no_grad():
            together = self.module(*(torch.stack(pair) for pair in zip(*both, strict=True)), *context)
            first = self.module(*(v.unsqueeze(0) for v in both[0]), *(c[:1] for c in context))
        same = all(
            torch.allclose(a[:1], b, rtol=1e-9, atol=1e-9, equal_nan=True) for a, b in zip(together, first, strict=True)
        )
        return "" if same else "a sample's result hangs on the others in the batch"

    def check(self) -> str:
        if wrong := self.alone():
            return wrong
        for trial in range(3):
            self.context = [torch.randn_like(c) for c in self.context]
            x = self.points(1.0 + trial)
            wrong = self.at_noise(x, 1.0 + trial) if self.draws or any(self.whole) else self.at(x)
            if wrong:
                return wrong
        return self.reaches_image()

    def at_noise(self, x: Tensor, scale: float) -> str:
        """With noise of our own: the inverse finds the inputs again, whole numbers exactly, and its log-det is that of the
        coordinates. With the module's noise: its inverse leads back, and the log-dets are opposite."""
        parts = self.cut(x, self.shapes)
        self.fix_numbers(parts)
        noise = [
            inside(self.graph[d].attrs["domain"].interval, scale * torch.randn(self.graph[d].tensor.shape))
            for d in self.draws
        ]
        real = [v for v, n in zip(parts, self.whole, strict=True) if not n]
        if not (flat := [*real, *noise]):
            return ""
        point = torch.cat([v.reshape(-1) for v in flat])
        y = self.forward(point)
        jacobian = torch.autograd.functional.jacobian(self.forward, point)
        assert isinstance(jacobian, Tensor)
        if jacobian.shape[0] != jacobian.shape[1]:
            return f"{jacobian.shape[1]} coordinates go to {jacobian.shape[0]}"
        reference = float(torch.linalg.slogdet(jacobian)[1])
        condition = float(torch.linalg.cond(jacobian)) if jacobian.isfinite().all() else math.inf
        if not (condition <= 1e10 and y.isfinite().all()):
            return ""
        back, back_det = self.run("inverse", y, self.out_shapes)
        wrong = self.led_back(back, x, condition)
        if wrong:
            return wrong
        if not self.estimated and not abs(reference + float(back_det)) <= 1e-6 * (1 + abs(reference)) * max(
            1, math.log10(condition)
        ):
            return f"inverse log-det {float(back_det):.6g}, and the Jacobian says {-reference:.6g}"
        made, log_det = self.run("forward", x, self.shapes)
        again, again_det = self.run("inverse", made, self.out_shapes)
        if not made.isfinite().all():
            return ""
        wrong = self.led_back(again, x, max(condition, 1e6))
        if wrong or self.estimated:
            return wrong and f"from the module's own noise: {wrong}"
        if not abs(float(log_det + again_det)) <= 1e-5 * (1 + abs(float(log_det))):
            return f"log-det {float(log_det):.6g} there, {float(again_det):.6g} back"
        return ""

    def fix_numbers(self, parts: list[Tensor]) -> None:
        self.numbers = {i: v for i, v, n in zip(self.region.inputs, parts, self.whole, strict=True) if n}

    def led_back(self, found: Tensor, wanted: Tensor, condition: float) -> str:
        for a, c, whole in zip(self.cut(found, self.shapes), self.cut(wanted, self.shapes), self.whole, strict=True):
            error = float((a - c).abs().max())
            if whole and error:
                return f"whole numbers come back wrong by {error:g}"
            if not error <= 1e-8 * (1 + float(c.abs().max())) * max(condition, 1):
                return f"round trip off by {error:.2e} at condition {condition:.1e}"
        return ""

    def tangential(self, jacobian: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Between tangent spaces, where points lie on spheres."""
        if not any((*self.spheres, *self.out_spheres)):
            return jacobian
        return (
            self.directions(y, self.out_shapes, self.out_spheres).T
            @ jacobian
            @ self.directions(x, self.shapes, self.spheres)
        )

    def directions(self, flat: Tensor, shapes: list[tuple[int, ...]], spheres: list[bool]) -> Tensor:
        blocks = []
        for v, sphere in zip(self.cut(flat, shapes), spheres, strict=True):
            if sphere:
                blocks += [torch.linalg.svd(p.reshape(1, -1)).Vh[1:].T for p in v.reshape(-1, v.shape[-1])]
            else:
                blocks.append(torch.eye(v.numel()))
        return torch.block_diag(*blocks)

    def at(self, x: Tensor) -> str:
        y = self.forward(x)
        jacobian = torch.autograd.functional.jacobian(self.forward, x)
        assert isinstance(jacobian, Tensor)
        if not (torch.isfinite(jacobian).all() and torch.isfinite(y).all()):
            return ""  # saturated in float64
        for v, sphere in zip(self.cut(y, self.out_shapes), self.out_spheres, strict=True):
            if sphere and not torch.allclose(v.norm(dim=-1), torch.ones(())):
                return "a result that is said to lie on a sphere does not"
        jacobian = self.tangential(jacobian, x, y)
        if jacobian.shape[0] != jacobian.shape[1]:
            return f"{jacobian.shape[1]} coordinates go to {jacobian.shape[0]}"
        singular = torch.linalg.svdvals(jacobian)
        condition = float(singular[0] / singular[-1].clamp_min(1e-300))
        if condition > 1e10:
            return ""
        made, log_det = self.run("forward", x, self.shapes)
        back, back_det = self.run("inverse", y, self.out_shapes)
        if not torch.allclose(made, y, rtol=1e-9, atol=1e-9):
            return f"forward differs by {float((made - y).abs().max()):.2e}"
        error = float((back - x).abs().max())
        if not error <= 1e-8 * (1 + float(x.abs().max())) * max(condition, 1):
            return f"round trip off by {error:.2e} at condition {condition:.1e}"
        reference = float(torch.linalg.slogdet(jacobian)[1])
        if self.estimated:
            return self.mean_estimate(x, reference)
        if not abs(reference - float(log_det)) <= 1e-7 * (1 + abs(reference)):
            return f"log-det {float(log_det):.6g}, and the Jacobian says {reference:.6g}"
        if not abs(reference + float(back_det)) <= 1e-6 * (1 + abs(reference)) * max(1, math.log10(condition)):
            return f"inverse log-det {float(back_det):.6g}, and the Jacobian says {-reference:.6g}"
        return ""

    def mean_estimate(self, x: Tensor, reference: float) -> str:
        for count in (ESTIMATES, MORE):
            runs = torch.stack([self.run("forward", x, self.shapes)[1] for _ in range(count)])
            error = abs(float(runs.mean()) - reference) / (float(runs.std()) / math.sqrt(count) + 1e-6)
            if error <= 5:
                return ""
        return f"mean of the estimated log-det off by {error:.1f} standard errors"

    def reaches_image(self) -> str:
        """Values of the claimed image have a preimage in the domain that leads back to them.

        Where float64 does not hold the preimage, the interpreter looks for it in the reals. It cannot where it has
        to solve for inverted calls at each step: there only what is missed at every scale is wrong.
        """
        solved = any(n.attrs.get("method") == "inverse" for r in self.region.walk() for n in r.graph) or any(
            self.spheres
        )
        missed = ""
        for scale in (2.0, 1.0, 0.3):
            goals = [
                torch.nn.functional.normalize(torch.randn(s), dim=-1) if sphere else inside(iv, scale * torch.randn(s))
                for iv, s, sphere in zip(self.images, self.out_shapes, self.out_spheres, strict=True)
            ]
            goal = torch.cat([g.reshape(-1) for g in goals])
            point = self.run("inverse", goal, self.out_shapes)[0]
            missed = ""
            if not torch.isfinite(point).all():
                missed = "values of the claimed image have no finite preimage"
            elif any(
                not ((v >= d.interval.lo - e) & (v <= d.interval.hi + e)).all() for v, d, e in self.coordinates(point)
            ):
                return "a value of the claimed image comes from outside the domain"
            elif any(
                (v != v.round()).any() for v, n in zip(self.cut(point, self.shapes), self.whole, strict=True) if n
            ):
                return "a value of the claimed image comes from what is no whole number"
            elif self.draws or any(self.whole):
                self.fix_numbers(self.cut(point, self.shapes))
                if not (self.noise_behind(goal) or self.has_preimage(goal)):
                    missed = "a value of the claimed image comes from no noise"
                if missed:
                    return missed
            else:
                error = (self.forward(point) - goal).abs().max() / (1 + point.abs().max() + goal.abs().max())
                if not float(error) <= 1e-5:
                    missed = f"a value of the claimed image is missed by {float(error):.2e}"
            if solved:
                if not missed:
                    return ""
            elif missed and not self.has_preimage(goal) and not self.beyond(point):
                return missed
        return missed if solved else ""

    def beyond(self, point: Tensor) -> bool:
        """Whether float64 cannot hold what was found: it went to infinity, or the map is nearly singular there.

        Products of many small factors do so. A value that the map does not take at all is not a number, or small.
        """
        if point.isinf().any():  # differences of infinite values may stand beside them, and are not numbers
            return True
        if point.isnan().any():
            return False
        jacobian = torch.autograd.functional.jacobian(self.forward, point)
        if not jacobian.isfinite().all():
            return True
        values = torch.linalg.svdvals(jacobian)
        return bool(values[-1] <= 1e-12 * values[0])

    def noise_behind(self, goal: Tensor) -> bool:
        """Whether noise that the interpreter leads to the goal is found by the compiler itself, asked for it as for an input."""
        opened = replace(self.region, inputs=[*self.region.inputs, *self.draws], draws=[], programs={})
        analyses = Analyses()
        if isinstance(analyses.plan(opened), Failure):
            return False
        generated = Generator(opened, analyses, opened.name).generate()
        text = module_text(generated, standalone=False, title=opened.name, origin="random")
        module = getattr(load_module(text), generated.root)()
        module.load_state_dict(self.module.state_dict())
        values = [v.unsqueeze(0) for v in (*self.cut(goal, self.out_shapes), *self.context)]
        with torch.no_grad():
            found = module.inverse(*values)[:-1]
        wanted = dict(zip([*self.region.inputs, *self.draws], found, strict=True))
        real = [wanted[i][0].reshape(-1) for i in self.moving]
        supports = {d: self.graph[d].attrs["domain"].interval for d in self.draws}
        if not all(((wanted[d] >= iv.lo) & (wanted[d] <= iv.hi)).all() for d, iv in supports.items()):
            return False
        if any(not torch.equal(wanted[i][0], v) for i, v in self.numbers.items()):
            return False
        error = (self.forward(torch.cat(real)) - goal).abs().max() / (1 + goal.abs().max())
        return float(error) <= 1e-5

    def coordinates(self, flat: Tensor) -> Iterator[tuple[Tensor, Domain, float]]:
        """Each input with its domain, and by how much rounding may leave it."""
        slack = [1e-9 if sphere else 0.0 for sphere in self.spheres]
        return zip(self.cut(flat, self.shapes), self.domains, slack, strict=True)

    def has_preimage(self, goal: Tensor) -> bool:
        """Whether a preimage is found from some start. What goes to the reals at once is sought there."""

        def f(flat: Tensor) -> Tensor:
            values = dict(zip(self.region.context, self.context, strict=True)) | self.numbers
            shapes = [self.graph[i].tensor.shape for i in self.moving]
            for i, z in zip(self.moving, self.cut(flat, shapes), strict=True):
                d = self.graph[i].attrs["domain"]
                values[i] = inside(d.interval, z)
                for user, _ in self.graph.users(i):
                    if INTO_REAL.get(user.op) == d.name:
                        values[user.id] = z
            return torch.cat(
                [v.reshape(-1) for v in evaluate(self.graph, values, self.parameters, self.region.outputs)]
            )

        starts = [0.5 * torch.randn_like(goal) for _ in range(3)]
        if self.numbers:  # what they leave to the noise is no convex set: begin near the goal as well
            drawn = [2 * torch.randn_like(goal) for _ in range(300)]
            starts += sorted(drawn, key=lambda v: float((f(v) - goal).norm()))[:5]
        return any(bool(follow(f, start, goal).isfinite().all()) for start in starts)
