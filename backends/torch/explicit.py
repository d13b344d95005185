"""Hand-given rules against the map itself, in float64 on probe points (DESIGN §5, "Explicit rules")."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from flowlang.backends.torch.codegen import Generator, module_text
from flowlang.backends.torch.load import load_module
from flowlang.backends.torch.runtime import BoundedWeight
from torch import Tensor, nn

from flowlang.derive.analyse import Analyses
from flowlang.diagnostics import Diagnostic
from flowlang.ir.graph import Region, Rule
from flowlang.ir.interval import Interval
from flowlang.ir.manifolds import on_sphere

POINTS = 16
TOLERANCE = 1e-7  # relative to 1 + |x| and the condition number
CONDITION = 1e8  # beyond it a point says nothing
DRAWS, PROBES = 24, 16  # of an estimated log-det: runs, and samples of each point in a run
JACOBIAN_LIMIT = 1024  # coordinates; beyond them log-dets are compared with an estimate
LANCZOS, DIRECTIONS = 30, 8  # steps and random directions of that estimate


def wrong_rules(root: Region, flow: nn.Module, analyses: Analyses) -> list[Diagnostic]:
    """What is wrong with the hand-given rules in a flow: FL0412 for each rule that the body contradicts.

    `flow` is a generated module of `root`; it is copied, not touched. Its own parameters are used, and a
    second time parameters moved away from their start, where many maps are the identity.
    """
    flow = copy.deepcopy(flow).double().eval()
    classes = Generator(root, analyses, "").classes
    out: list[Diagnostic] = []
    for region in root.walk():
        if not region.has_map_rules:
            continue
        held = next((m for m in flow.modules() if type(m).__name__ == classes[id(region)]), None)
        if held is None:
            continue  # the flow never runs it
        try:
            for moved in (False, True):
                Probe(region, held, analyses, moved).run()
        except Wrong as e:
            out.append(e.diagnostic)
    return out


class Wrong(Exception):
    def __init__(self, region: Region, name: str, rule: Rule, message: str, suggestion: str):
        super().__init__(message)
        self.diagnostic = Diagnostic(
            "FL0412",
            f"`def {name}` of `{region.name}` is wrong: {message}",
            rule.span or region.span,
            suggestion=suggestion,
        )


class Probe:
    """One region's class with the parameters of one of its instances."""

    def __init__(self, region: Region, held: nn.Module, analyses: Analyses, moved: bool):
        self.region, self.analyses = region, analyses
        made = Generator(region, analyses, "").generate()
        cls = getattr(load_module(module_text(made, standalone=False, title=region.name, origin="")), made.root)
        shared = [getattr(held, c.name) for c in region.children.values() if c.shared]
        self.module: nn.Module = cls(*shared).double().eval()
        self.module.load_state_dict(held.state_dict())
        self.random = torch.Generator().manual_seed(20)
        if moved:
            with torch.no_grad():
                for p in self.module.parameters():
                    p += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=self.random)
                for m in self.module.modules():
                    if isinstance(m, BoundedWeight):
                        m.settle()

    def sample(self, node: int) -> Tensor:
        """Points in the range that the analysis finds for a value, some of them near its edges."""
        shape = self.region.graph[node].tensor.shape
        if not self.region.graph[node].batched:  # a weight that the caller lends
            return 0.3 * torch.randn(*shape, dtype=torch.float64, generator=self.random)
        z = 1.5 * torch.randn(POINTS, *shape, dtype=torch.float64, generator=self.random)
        z[0] = 0.0
        if on_sphere(self.region.graph, node):
            z[0, ..., 0] = 1.0
            return torch.nn.functional.normalize(z, dim=-1)
        return into(self.analyses.ranges(self.region).interval(node), z)

    def run(self) -> None:
        region = self.region
        x = [self.sample(i) for i in region.inputs]
        context = [self.sample(c) for c in region.context]
        with torch.no_grad():
            *y, log_det = self.module(*x, *context)
        jacobians = list(self.jacobians(x, context))
        condition = torch.tensor([conditioned(j) for j in jacobians]) if jacobians else torch.ones(POINTS)
        if "inverse" in region.rules:
            self.check_inverse(x, y, context, condition)
            self.check_image(context)
        if "log_det" in region.rules and jacobians:
            dense = torch.stack([torch.linalg.slogdet(j)[1] for j in jacobians])
            self.check_log_det(x, context, log_det, dense, TOLERANCE * (1 + dense.abs()), condition)
        elif "log_det" in region.rules:
            self.check_by_estimate(x, log_det, context)

    def check_by_estimate(self, x: list[Tensor], log_det: Tensor, context: list[Tensor]) -> None:
        """Of a map with many coordinates: the log-det of one point, as far as an estimate tells."""
        region = self.region
        if any(on_sphere(region.graph, i) for i in (*region.inputs, *region.outputs)):
            return  # the estimate knows no tangent spaces
        sizes = [v[0].numel() for v in x]
        k = 1  # the first is 0
        own = [c[k : k + 1].expand(DIRECTIONS, *c.shape[1:]) for c in context]

        def f(flat: Tensor) -> Tensor:
            parts = [p.reshape(-1, *v.shape[1:]) for p, v in zip(flat.split(sizes, 1), x, strict=True)]
            return torch.cat([o.reshape(len(flat), -1) for o in self.module(*parts, *own)[:-1]], 1)

        mean, error = estimated_log_det(f, torch.cat([v[k].reshape(-1) for v in x]), self.random)
        allowed = torch.full((POINTS,), math.inf, dtype=torch.float64)
        allowed[k] = 5 * error + 1e-3 * (1 + abs(mean))
        dense = torch.full_like(allowed, mean)
        if self.region.rules["log_det"].exactness in ("exact", "lower bound"):  # one point tells nothing of a constant
            self.check_log_det(x, context, log_det, dense, allowed, torch.ones(POINTS))

    def jacobians(self, x: list[Tensor], context: list[Tensor]) -> Iterator[Tensor]:
        sizes = [v[0].numel() for v in x]
        if sum(sizes) > JACOBIAN_LIMIT:
            return
        for k in range(POINTS):
            lent = [not self.region.graph[c].batched for c in self.region.context]
            own = [c if whole else c[k : k + 1] for c, whole in zip(context, lent, strict=True)]

            def f(flat: Tensor, k: int = k, own: list[Tensor] = own) -> Tensor:
                parts = [p.reshape(1, *v.shape[1:]) for p, v in zip(flat.split(sizes), x, strict=True)]
                return torch.cat([o.reshape(-1) for o in self.module(*parts, *own)[:-1]])

            flat = torch.cat([v[k].reshape(-1) for v in x])
            j = torch.autograd.functional.jacobian(f, flat)
            assert isinstance(j, Tensor)
            yield self.tangential(j, [v[k] for v in x], f(flat))

    def tangential(self, j: Tensor, x: list[Tensor], y: Tensor) -> Tensor:
        """The Jacobian between tangent spaces, where the region maps points of spheres."""
        graph, region = self.region.graph, self.region
        into_, out = [on_sphere(graph, i) for i in region.inputs], [on_sphere(graph, o) for o in region.outputs]
        if not any((*into_, *out)):
            return j
        shapes = [graph[o].tensor.shape for o in region.outputs]
        parts = [p.reshape(s) for p, s in zip(y.split([math.prod(s) for s in shapes]), shapes, strict=True)]
        return tangential(j, x, into_, parts, out)

    def check_inverse(self, x: list[Tensor], y: list[Tensor], context: list[Tensor], condition: Tensor) -> None:
        with torch.no_grad():
            back = self.module.inverse(*y, *context)[:-1]  # type: ignore[operator]
        k = worst(x, back, condition)
        if k is not None:
            raise Wrong(
                self.region, "inverse", self.region.rules["inverse"],
                f"x = {shown(x, k)} is mapped to {shown(y, k)}, and the inverse of that is {shown(back, k)}",
                "correct it, or delete it and let the compiler derive the inverse",
            )  # fmt: skip

    def check_image(self, context: list[Tensor]) -> None:
        """Values of the range that the body is said to have must come from somewhere."""
        y = [self.sample(o) for o in self.region.outputs]
        with torch.no_grad():
            x = self.module.inverse(*y, *context)[:-1]  # type: ignore[operator]
            again = self.module(*x, *context)[:-1]
        jacobians = list(self.jacobians(list(x), context)) if all(bool(torch.isfinite(v).all()) for v in x) else []
        condition = (
            torch.tensor([1 / conditioned(j, smallest=True) for j in jacobians]) if jacobians else torch.ones(POINTS)
        )
        k = worst(y, again, condition.clamp_min(1))
        if k is not None:
            raise Wrong(
                self.region, "inverse", self.region.rules["inverse"],
                f"the inverse of y = {shown(y, k)} is {shown(x, k)}, which is mapped to {shown(again, k)}",
                "the inverse must hold for every value that the body may give; a domain may be missing",
            )  # fmt: skip

    def mean_error(self, x: list[Tensor], context: list[Tensor], dense: Tensor) -> tuple[Tensor, Tensor]:
        """How far the mean of many draws is off, and six standard errors of it; the first draws may agree by chance."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            many = [v.repeat(PROBES, *[1] * (v.dim() - 1)) for v in (*x, *context)]
            runs = [self.module(*many)[-1].reshape(PROBES, POINTS) for _ in range(DRAWS)]
        each = torch.stack(runs).mean(1)  # the length of the series is one for a whole run
        return each.mean(0) - dense, 6 * each.std(0) / math.sqrt(DRAWS)

    def check_log_det(
        self, x: list[Tensor], context: list[Tensor], found: Tensor, dense: Tensor, allowed: Tensor, condition: Tensor
    ) -> None:
        rule = self.region.rules["log_det"]
        usable = torch.isfinite(dense) & (condition < CONDITION) & torch.isfinite(allowed)
        error = found - dense
        margin: Tensor | float = 0.0
        if rule.exactness == "unbiased":
            error, margin = self.mean_error(x, context, dense)
        if rule.exactness == "ratio":  # right up to a constant
            error = error - error[usable].median() if bool(usable.any()) else error
        allowed = allowed + margin
        bad = ~(error <= allowed) if rule.exactness == "lower bound" else ~(error.abs() <= allowed)
        bad &= usable
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            is_at_most = " at most" if rule.exactness == "lower bound" else ""
            raise Wrong(
                self.region, "log_det", rule,
                f"at x = {shown(x, k)} it gives {float(found[k]):.6g}, and log|det J| is{is_at_most} {float(dense[k]):.6g}",
                "correct it, or delete it and let the compiler derive the log-det",
            )  # fmt: skip


def tangential(
    j: Tensor, x: Sequence[Tensor], from_: Sequence[bool], y: Sequence[Tensor], to: Sequence[bool]
) -> Tensor:
    """A Jacobian from values x to values y between their tangent spaces, where they are points of spheres."""
    rows = torch.block_diag(*(tangent_basis(p, s) for p, s in zip(y, to, strict=True)))
    return rows.mT @ j @ torch.block_diag(*(tangent_basis(p, s) for p, s in zip(x, from_, strict=True)))


def tangent_basis(p: Tensor, sphere: bool = True) -> Tensor:
    """Orthonormal columns that span the tangent space at p: of the sphere of its last axis, or of all of space."""
    if not sphere:
        return torch.eye(p.numel(), dtype=p.dtype)
    each = [torch.linalg.svd(v.unsqueeze(0))[2][1:].mT for v in p.reshape(-1, p.shape[-1])]
    return torch.block_diag(*each)


def estimated_log_det(f: Callable[[Tensor], Tensor], x: Tensor, random: torch.Generator) -> tuple[float, float]:
    """log|det J| of a map of batched vectors at one point, and its error: ½ tr log JᵀJ by Lanczos' method on random
    directions (Ubaru, Chen & Saad 2017), Jv by central differences.

    The error is that of the directions and what the second half of the steps changed: badly conditioned maps need more.
    """
    n, size = x.numel(), 1e-6 * (1 + float(x.abs().max()))
    at = x.expand(DIRECTIONS, n).clone().requires_grad_()
    with torch.enable_grad():
        y = f(at)

    def normal(v: Tensor) -> Tensor:
        with torch.no_grad():
            pushed = (f(at + size * v) - f(at - size * v)) / (2 * size)
        return torch.autograd.grad(y, at, pushed, retain_graph=True)[0]

    v = torch.randint(0, 2, (DIRECTIONS, n), generator=random).to(x) * 2 - 1
    basis = [v / math.sqrt(n)]
    steps = min(LANCZOS, n)
    inner = torch.eye(steps, dtype=x.dtype).repeat(
        DIRECTIONS, 1, 1
    )  # what a basis that ends early leaves counts as log 1
    for k in range(steps):
        w = normal(basis[k])
        inner[:, k, k] = torch.where(basis[k].square().sum(1) > 0.5, (w * basis[k]).sum(1), 1.0)
        for _ in range(2):
            for b in basis:
                w = w - (w * b).sum(1, keepdim=True) * b
        length = w.norm(dim=1)
        goes_on = length > 1e-7 * inner[:, k, k].abs()
        basis.append(torch.where(goes_on, 1 / length.clamp_min(1e-300), 0.0)[:, None] * w)
        if k + 1 < steps:
            inner[:, k, k + 1] = inner[:, k + 1, k] = torch.where(goes_on, length, 0.0)

    def means(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return n / 2 * (vectors[:, 0].square() * values.clamp_min(1e-300).log()).sum(1)

    each = means(inner)
    early = means(inner[:, : (steps + 1) // 2, : (steps + 1) // 2])
    return float(each.mean()), float(each.std() / math.sqrt(DIRECTIONS) + (each - early).mean().abs())


def into(iv: Interval, z: Tensor) -> Tensor:
    """Points of the line as points of an open interval."""
    if iv.finite:
        return iv.lo + (iv.hi - iv.lo) * torch.sigmoid(z)
    if iv.lo > -math.inf:
        return iv.lo + torch.exp(z)
    if iv.hi < math.inf:
        return iv.hi - torch.exp(z)
    return z


def conditioned(j: Tensor, *, smallest: bool = False) -> float:
    if not bool(torch.isfinite(j).all()):
        return 1e-300 if smallest else math.inf
    s = torch.linalg.svdvals(j)
    return float(s[-1].clamp_min(1e-300)) if smallest else float(s[0] / s[-1].clamp_min(1e-300))


def worst(wanted: list[Tensor], found: tuple[Tensor, ...], condition: Tensor) -> int | None:
    """The first point at which the values differ by more than rounding explains."""
    bad = torch.zeros(POINTS, dtype=torch.bool)
    for w, f in zip(wanted, found, strict=True):
        error = (f - w).abs().reshape(POINTS, -1).amax(1)
        scale = 1 + w.abs().reshape(POINTS, -1).amax(1)
        bad |= ~(error <= TOLERANCE * scale * condition.clamp_min(1))  # NaN is bad
    bad &= condition < CONDITION
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def shown(values: list[Tensor] | tuple[Tensor, ...], k: int) -> str:
    """The first numbers of a point."""
    flat = torch.cat([v[k].reshape(-1) for v in values]).tolist()
    text = ", ".join(f"{v:.4g}" for v in flat[:4])
    return f"[{text}{', ..' if len(flat) > 4 else ''}]" if len(flat) > 1 else text
