"""Numerical proof-reading in float64: round trip, log-det against the dense Jacobian, samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.compiler import Compilation, describe_region
from flowlang.ir.domains import Domain
from flowlang.ir.interval import Interval
from flowlang.ir.manifolds import on_sphere

if TYPE_CHECKING:
    import torch

    from flowlang.backends.torch.runtime import Flow
    from flowlang.ir.graph import Region

SOLVER_ERROR = 1e-3  # what the solver of a differential equation may leave
SAMPLES = "samples are finite"  # the check that a map of too steep an inverse fails
JACOBIAN_LIMIT = 1024  # coordinates; the log-det of larger flows is compared with an estimate


@dataclass(frozen=True)
class Check:
    """One comparison: its error, the tolerance, and whether it holds."""

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # NaN fails


def probes(domain: Domain | None, n: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Points in a domain, some of them near its edges."""
    import torch

    from flowlang.backends.torch.explicit import into

    iv = domain.interval if domain is not None else Interval(-math.inf, math.inf, True, True)
    if domain is not None and domain.kind == "int":
        low, high = (int(v) if math.isfinite(v) else d for v, d in ((iv.lo, -8), (iv.hi, 8)))
        return torch.randint(low, high + 1, (n, *shape), generator=generator).to(torch.float64)
    z = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    z[: n // 4] *= 3
    if domain is not None and domain.structure == "sphere":
        return torch.nn.functional.normalize(z, dim=-1)
    if n > 4:
        z[0], z[1] = 0.0, 1e-6
    return into(iv, z)


def perturb(flow: Flow, generator: torch.Generator, size: float = 0.1) -> None:
    """Away from the start, where many maps are the identity."""
    import torch

    with torch.no_grad():
        for p in flow.parameters():
            scale = size * (0.2 + p.square().mean().sqrt())
            p += (
                scale
                * torch.randn(p.shape, dtype=p.dtype, generator=generator)
                / max(p.shape[-1] if p.dim() > 1 else 1, 1) ** 0.5
            )
    flow.certify()


@dataclass(frozen=True)
class Space:
    """Where a flow's data lie, and which of its results are points of a sphere."""

    domains: tuple[Domain | None, ...] = (None,)
    spheres: tuple[bool, ...] = (False,)

    @staticmethod
    def of(region: Region) -> Space:
        domains = [region.graph[i].attrs.get("domain") for i in region.inputs]
        leaving = [*region.outputs, *(e.value for e in region.emissions)]
        return Space(
            tuple(d if isinstance(d, Domain) else None for d in domains),
            tuple(on_sphere(region.graph, n, region=region) for n in leaving),
        )

    @property
    def on(self) -> tuple[bool, ...]:
        """Which data are points of a sphere."""
        return tuple(d is not None and d.structure == "sphere" for d in self.domains)

    @property
    def flat(self) -> bool:
        return not any((*self.on, *self.spheres))


def verify_flow(
    flow: Flow, facts: dict[str, Any], space: Space | None = None, *, points: int = 24, seed: int = 0
) -> list[Check]:
    """Checks a compiled flow (made float64 in place)."""
    import torch

    space = space or Space()
    g = torch.Generator().manual_seed(seed)
    flow.double().eval()
    shapes = list(getattr(flow, "data_shapes", {"data": flow.data_shape}).values())
    count = sum(math.prod(s) for s in shapes)
    if count > 128:
        points = min(points, 3)  # a dense Jacobian takes a pass for each coordinate
    xs = [probes(d, points, s, g) for d, s in zip(space.domains, shapes, strict=True)]
    given = {k: torch.randn(points, *s, dtype=torch.float64, generator=g) for k, s in flow.given_shapes.items()}
    estimated = facts.get("exactness") == "unbiased"
    iterative = facts.get("inverse") not in ("analytic",) and not str(facts.get("inverse")).startswith("scan")
    solver = facts.get("inverse") == "integration"  # exact up to the solver's own error
    out: list[Check] = []
    x = flow._whole(xs)
    with torch.no_grad():
        forward = flow(x, **given)
        found, back_log_det = flow.inverse(*forward[:-1], **given)
    back = [found] if isinstance(found, torch.Tensor) else list(found)
    condition = torch.ones(points, dtype=torch.float64)
    jacobian = None
    # With draws inside, x alone does not determine what leaves: the Jacobian of x to it is not square.
    drawn = (
        facts.get("exactness") == "lower bound"
        or facts.get("draws", False)
        or sum(y[0].numel() for y in forward[:-1]) != count
    )
    ratio = facts.get("exactness") == "ratio"  # right up to a constant
    if count <= JACOBIAN_LIMIT and not drawn:
        jacobian = dense_jacobian(flow, xs, given, space)
        usable = torch.isfinite(jacobian).flatten(1).all(1)  # LAPACK stops at what is not a number
        out.append(Check("Jacobian is finite", float((~usable).sum()), 0.0, "points where it is not"))
        jacobian = torch.where(usable[:, None, None], jacobian, torch.eye(jacobian.shape[-1], dtype=torch.float64))
        singular = torch.linalg.svdvals(jacobian)
        condition = (singular[:, 0] / singular[:, -1]).clamp_min(1)
    scale = (1 + torch.stack([v.abs().reshape(points, -1).amax(1) for v in xs]).amax(0)) * condition
    error = (
        torch.stack([(b - v).abs().reshape(points, -1).amax(1) for b, v in zip(back, xs, strict=True)]).amax(0) / scale
    )
    out.append(
        Check(
            "round trip",
            float(error.max()),
            SOLVER_ERROR if solver else 1e-7 if iterative else 1e-9,
            "relative to 1 + |x| and the condition number",
        )
    )
    if jacobian is not None and not estimated:
        dense = torch.linalg.slogdet(jacobian)[1]
        difference = dense - forward[-1]
        difference = (difference - difference.median() * ratio).abs() / (1 + dense.abs()) / condition.log().clamp_min(1)
        out.append(Check("log-det against slogdet", float(difference.max()), SOLVER_ERROR if solver else 1e-8))
    elif not (estimated or drawn or ratio) and space.flat:  # the estimate knows no tangent spaces
        first = [v[0] for v in xs]
        out.append(large_check(flow, first, {k: v[:1] for k, v in given.items()}, float(forward[-1][0]), g))
    if estimated and jacobian is not None:
        out.append(estimate_check(flow, [v[:4] for v in xs], {k: v[:4] for k, v in given.items()}, jacobian[:4]))
    elif not estimated and not drawn:
        with torch.no_grad():  # at the x that was found: what it misses is the round trip's to tell
            there = flow(found, **given)[-1]
        difference = (there + back_log_det).abs() / (1 + there.abs()) / condition.log().clamp_min(1)
        out.append(
            Check(
                "log-det of the inverse",
                float(difference.max()),
                SOLVER_ERROR if solver else 1e-6 if iterative else 1e-8,
            )
        )
    with torch.no_grad():
        finite = flow.log_prob(x, **given)
    out.append(Check("log-density is finite", float((~torch.isfinite(finite)).sum()), 0.0))
    samples = flow.sample((points,), generator=g, **given)
    bad = sum(int((~torch.isfinite(s)).sum()) for s in ([samples] if isinstance(samples, torch.Tensor) else samples))
    out.append(Check(SAMPLES, float(bad), 0.0))
    return out


def dense_jacobian(flow: Flow, xs: list[torch.Tensor], given: dict[str, torch.Tensor], space: Space) -> torch.Tensor:
    """dz/dx for each point, all parts that leave included; between tangent spaces where they are points of spheres."""
    import torch

    from flowlang.backends.torch.explicit import tangential

    sizes = [v[0].numel() for v in xs]
    rows = []
    for k in range(len(xs[0])):
        one = {n: c[k : k + 1] for n, c in given.items()}

        def apart(v: torch.Tensor, one: dict[str, torch.Tensor] = one) -> list[torch.Tensor]:
            parts = [p.reshape(1, *x.shape[1:]) for p, x in zip(v.split(sizes), xs, strict=True)]
            return [o[0] for o in flow(flow._whole(parts), **one)[:-1]]

        def f(v: torch.Tensor, apart: Any = apart) -> torch.Tensor:
            return torch.cat([o.reshape(-1) for o in apart(v)])

        point = torch.cat([v[k].reshape(-1) for v in xs])
        j = torch.autograd.functional.jacobian(f, point)
        assert isinstance(j, torch.Tensor)
        j = j.reshape(-1, len(point))
        if not space.flat:
            with torch.no_grad():
                j = tangential(j, [v[k] for v in xs], space.on, apart(point), space.spheres)
        rows.append(j)
    return torch.stack(rows)


def large_check(
    flow: Flow, xs: list[torch.Tensor], given: dict[str, torch.Tensor], found: float, generator: torch.Generator
) -> Check:
    """A log-det beside an estimate of it that needs no dense Jacobian: right to about one part in a thousand."""
    import torch

    from flowlang.backends.torch.explicit import estimated_log_det

    sizes = [v.numel() for v in xs]

    def f(flat: torch.Tensor) -> torch.Tensor:
        wide = {k: v.expand(len(flat), *v.shape[1:]) for k, v in given.items()}
        parts = [p.reshape(-1, *v.shape) for p, v in zip(flat.split(sizes, 1), xs, strict=True)]
        return torch.cat([o.reshape(len(flat), -1) for o in flow(flow._whole(parts), **wide)[:-1]], 1)

    mean, error = estimated_log_det(f, torch.cat([v.reshape(-1) for v in xs]), generator)
    off = abs(found - mean) / (error + 2e-4 * (1 + abs(mean)))
    return Check("log-det against an estimate", off, 5.0, "in standard errors")


def estimate_check(
    flow: Flow, xs: list[torch.Tensor], given: dict[str, torch.Tensor], jacobian: torch.Tensor, runs: int = 400
) -> Check:
    """The mean of many estimates lies within four standard errors of the log-det."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        found = torch.stack([flow(flow._whole(xs), **given)[-1] for _ in range(runs)])
    dense = torch.linalg.slogdet(jacobian)[1]
    errors = (found.mean(0) - dense).abs() / (found.std(0) / math.sqrt(runs) + 1e-9)
    return Check("mean of the estimated log-det", float(errors.max()), 4.0, "in standard errors")


def verify(comp: Compilation, name: str, *, seed: int = 0) -> list[Check]:
    """Compiles a flow of a spec in float64, moves its parameters away from the start, and checks it."""
    import torch

    from flowlang.api import compile_from

    region = comp.regions[name]
    flow = compile_from(comp, name, seed=seed, dtype=torch.float64)
    perturb(flow, torch.Generator().manual_seed(seed))
    facts = {**describe_region(comp, region), "draws": any(r.draws for r in region.walk())}
    return verify_flow(flow, facts, Space.of(region), seed=seed)
