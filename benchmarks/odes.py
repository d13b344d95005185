"""Integration beside torchdiffeq, torchode, torchdyn, zuko and flow_matching, at equal measured accuracy.

    SP=$(ls -d /path/to/peers/lib/python3*/site-packages); PYTHONPATH=$OWN:$SP python benchmarks/odes.py

OWN is this environment's `site-packages`: otherwise a link to FlowLang in the peers' folder is measured.

One field (2 x 128 tanh units that see the time) with the same weights everywhere, float32, no gradient. Every library solves
at several tolerances; its error is measured against float64 at 1e-12, and its time and evaluations are read at the errors
asked for, between two tolerances by their logarithms. `limit` is evaluations times the time of one. Times are of the
processor, one thread, and the libraries take turns in every cell. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 128
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SPEC = """
net field(x: R[D], t: R) -> R[D] {{ y: R[D] = mlp({w}, {w}, act = tanh)(x, t);  y }}
net end(x: R[D = {d}]) {{ integrate(field(), x, t = 0 -> 1, {solver}) }}
flow likelihood {{
  data x: R[D = {d}]
  cnf(v = field(), solver = {solver})
  base normal
}}
"""


class Field(nn.Module):
    """The peers' field."""

    def __init__(self, size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size + 1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, size)
        )
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], -1))


def compiled(kind: str, size: int, solver: str, field: Field, dtype: torch.dtype = torch.float32) -> Any:
    import flowlang as fl

    made: Any = fl.compile(SPEC.format(w=WIDTH, d=size, solver=solver), flow=kind, dtype=dtype)
    found = dict(made.named_parameters())
    layers = [m for m in field.layers if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for part, rank in (("weight", 2), ("bias", 1)):
            own = [p for k, p in found.items() if part in k and p.dim() == rank]
            for p, layer in zip(own, layers, strict=True):
                p.copy_(getattr(layer, part))
    return made


def field_of(size: int) -> Field:
    torch.manual_seed(0)
    field = Field(size)
    with torch.no_grad():
        for m in field.layers:
            if isinstance(m, nn.Linear):
                m.weight.mul_(2.5)  # a field that bends
    return field


Solve = Callable[[Tensor], Tensor]


def ours(field: Field, size: int, tol: float, name: str) -> tuple[Solve, Callable[[Tensor], int]]:
    import flowlang as fl

    name, _, shared = name.partition(" ")
    more = ", shared = true" if shared else ""
    made = compiled("end", size, f"{name}(rtol = {tol}, atol = {tol}{more})", field)

    def count(x: Tensor) -> int:
        with fl.count_steps() as counts:
            made(x)
        return counts.evaluations

    return made, count


def peers(field: Field, tol: float) -> dict[str, Solve]:
    out: dict[str, Solve] = {}
    ends = torch.tensor([0.0, 1.0])
    try:
        from torchdiffeq import odeint

        out["torchdiffeq"] = lambda x: odeint(lambda t, y: field(y, t), x, ends, rtol=tol, atol=tol, method="dopri5")[
            -1
        ]
    except ImportError:
        pass
    try:
        import torchode as to

        term = to.ODETerm(lambda t, y: field(y, t))
        method = to.Dopri5(term=term)
        adjoint = to.AutoDiffAdjoint(method, to.IntegralController(atol=tol, rtol=tol, term=term))

        def torchode(x: Tensor) -> Tensor:
            problem = to.InitialValueProblem(y0=x, t_start=torch.zeros(len(x)), t_end=torch.ones(len(x)))
            return adjoint.solve(problem).ys[:, -1]

        out["torchode"] = torchode
    except ImportError:
        pass
    try:
        from torchdyn.numerics import odeint as dyn

        out["torchdyn"] = lambda x: dyn(lambda t, y, args=None: field(y, t), x, ends, "dopri5", atol=tol, rtol=tol)[1][
            -1
        ]
    except ImportError:
        pass
    try:
        from zuko.utils import odeint as zuko

        out["zuko"] = lambda x: zuko(lambda t, y: field(y, t), x, 0.0, 1.0, atol=tol, rtol=tol)
    except ImportError:
        pass
    try:
        from flow_matching.solver import ODESolver

        class Wrapped(nn.Module):
            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                return field(x, t)

        solver = ODESolver(velocity_model=Wrapped())
        out["flow_matching"] = lambda x: solver.sample(x, step_size=None, method="dopri5", atol=tol, rtol=tol)
    except ImportError:
        pass
    return out


def solved(solve: Solve, x: Tensor) -> Callable[[], Tensor]:
    return lambda: solve(x)


def evaluated(field: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    t = torch.zeros(len(x))
    return lambda: field(x, t)


def turns(work: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The least processor time of each, in ms; those at work take turns.

    A turn of short work is three runs, so that no one pays for what the one before left in the caches.
    """
    best = dict.fromkeys(work, math.inf)
    for run in work.values():
        run()
    spent, rounds = 0.0, 0
    while rounds < 4 or (spent < seconds * len(work) and rounds < 200):
        for name, run in work.items():
            for _ in range(1 if best[name] < math.inf and best[name] > 0.02 else 3):
                start = time.process_time()
                run()
                took = time.process_time() - start
                best[name], spent = min(best[name], took), spent + took
        rounds += 1
    return {k: v * 1e3 for k, v in best.items()}


def at_error(points: list[tuple[float, float, float]], target: float) -> tuple[float, float] | None:
    """(evaluations, time) at an error, between two tolerances by logarithms.

    A solver that is more exact at every tolerance is read at its cheapest; None where none is exact enough.
    """
    points = sorted(points)
    if points[0][0] <= target and points[-1][0] < target:
        return min((n, t) for _, n, t in points)
    for (e0, n0, t0), (e1, n1, t1) in pairwise(points):
        if e0 <= target <= e1:
            share = (math.log(target) - math.log(e0)) / max(math.log(e1) - math.log(e0), 1e-12)
            return n0 * (n1 / n0) ** share, t0 * (t1 / t0) ** share
    return None


def precision(
    batches: list[int], targets: list[float], seconds: float, tolerances: Sequence[float] = TOLERANCES
) -> dict[str, Any]:
    size = 2
    field = field_of(size)
    out: dict[str, Any] = {}
    exact = compiled("end", size, "dopri5(rtol = 1e-12, atol = 1e-12)", field, torch.float64)
    for batch in batches:
        x = torch.randn(batch, size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            truth = exact(x.double())
            one = compiled("end", size, "euler(steps = 1)", field).field
            field_time = min(turns({"theirs": evaluated(field, x), "ours": evaluated(one, x)}, seconds).values())
            curves: dict[str, list[tuple[float, float, float]]] = {}
            for tol in tolerances:
                solves: dict[str, Solve] = {}
                counts: dict[str, int] = {}
                for name in ("dopri5", "tsit5", "dopri5 shared", "tsit5 shared")[: 2 if batch == 1 else 4]:
                    solves[f"flowlang {name}"], count = ours(field, size, tol, name)
                    counts[f"flowlang {name}"] = count(x)
                for name, solve in peers(field, tol).items():
                    field.calls = 0
                    try:
                        solve(x)
                    except Exception as e:
                        print(f"{name} left out: {type(e).__name__}: {str(e)[:80]}")
                        continue
                    solves[name], counts[name] = solve, field.calls
                times = turns({k: solved(s, x) for k, s in solves.items()}, seconds)
                for k, s in solves.items():
                    error = float((s(x).double() - truth).square().mean().sqrt())
                    curves.setdefault(k, []).append((error, counts[k], times[k]))
        out[str(batch)] = {"field_ms": field_time, "curves": curves}
        for target in targets:
            found = {k: v for k, p in curves.items() if (v := at_error(p, target)) is not None}
            print(f"\nbatch {batch}, error {target:g}, one evaluation {field_time:.3f} ms")
            for k, (n, ms) in sorted(found.items(), key=lambda kv: kv[1][1]):
                print(
                    f"  {k:<24}{n:>8.1f} evaluations{ms:>10.3f} ms{100 * (ms / (n * field_time) - 1):>8.0f} % over the limit",
                    flush=True,
                )
    return out


def likelihood(batches: list[int], seconds: float) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for size in (2, 16):
        field = field_of(size)
        for batch in batches:
            x = torch.randn(batch, size, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                truth = compiled(
                    "likelihood", size, "dopri5(rtol = 1e-10, atol = 1e-10)", field, torch.float64
                ).log_prob(x.double())
            mid = compiled("likelihood", size, "midpoint(steps = 20)", field)
            adaptive = compiled("likelihood", size, "dopri5(rtol = 1e-5, atol = 1e-5)", field)

            def log_p0(z: Tensor) -> Tensor:
                return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)

            runs: dict[str, Callable[[], Tensor]] = {
                "flowlang midpoint 20": solved(mid.log_prob, x),
                "flowlang dopri5 1e-5": solved(adaptive.log_prob, x),
            }
            try:
                from flow_matching.solver import ODESolver

                class Wrapped(nn.Module):
                    def __init__(self, field: Field):
                        super().__init__()
                        self.field = field

                    def forward(self, x: Tensor, t: Tensor) -> Tensor:
                        return self.field(x, t)

                solver = ODESolver(velocity_model=Wrapped(field))

                def flow_matching(x: Tensor, solver: Any = solver) -> Tensor:
                    found: Tensor = solver.compute_likelihood(
                        x, log_p0, step_size=0.05, method="midpoint", exact_divergence=True
                    )[1]
                    return found

                runs["flow_matching midpoint 20"] = solved(flow_matching, x)
            except ImportError:
                pass
            try:
                from zuko.transforms import FreeFormJacobianTransform

                transform = FreeFormJacobianTransform(
                    lambda t, y, field=field: field(y, t),
                    1.0,
                    0.0,
                    phi=tuple(field.parameters()),
                    atol=1e-5,
                    rtol=1e-5,
                    exact=True,
                )

                def zuko(transform: Any = transform, x: Tensor = x) -> Tensor:
                    z, log_det = transform.call_and_ladj(x)
                    return log_p0(z) + log_det

                runs["zuko dopri5 1e-5"] = zuko
            except ImportError:
                pass

            def quiet(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
                def go() -> Tensor:
                    with torch.no_grad():
                        return run()

                return go

            work = {k: quiet(r) if k.startswith(("flowlang", "zuko")) else r for k, r in runs.items()}
            times = turns(work, seconds)
            errors = {k: float((r().detach().double() - truth).abs().mean()) for k, r in work.items()}
            out[f"{size}|{batch}"] = {k: (errors[k], times[k]) for k in work}
            print(f"\nlikelihood, D = {size}, batch {batch}")
            for k in work:
                print(f"  {k:<28}{times[k]:>10.2f} ms   mean error {errors[k]:.1e}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,64,4096")
    parser.add_argument("--errors", default="1e-3,1e-4,1e-5")
    parser.add_argument("--tolerances", default=",".join(map(str, TOLERANCES)))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each library and cell")
    parser.add_argument("--parts", default="precision,likelihood")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = [int(b) for b in options.batches.split(",")]
    results: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    if "precision" in options.parts:
        errors, tolerances = ([float(e) for e in text.split(",")] for text in (options.errors, options.tolerances))
        results["precision"] = precision(batches, errors, options.seconds, tolerances)
    if "likelihood" in options.parts:
        results["likelihood"] = likelihood(batches, options.seconds)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
