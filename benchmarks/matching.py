"""Quality of flow matching beside torchcfm and flow_matching: one network, one budget, one solver; distances to held-out data.

Each method trains the network of `specs/matching.flow` (the module that FlowLang generates, with the same start) by
its own loss: FlowLang by the model's program `loss`, with noise and data apart or paired (`ot = true`), torchcfm by `ConditionalFlowMatcher` and
`ExactOptimalTransportConditionalFlowMatcher` (pairs by minibatch optimal transport), flow_matching by `CondOTProbPath`.
Samples of all take the same number of midpoint steps. W2 is the 2-Wasserstein distance of 1,000 samples to 1,000 held-out
points (exact assignment), its floor that of two sets of data; MMD has a sum of Gaussian kernels.

    SP=/path/to/site-packages/with/torchcfm; PYTHONPATH=$SP python benchmarks/matching.py --steps 3000
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import flowlang as fl
from flowlang.train.datasets import load

BATCH, POINTS = 256, 1000
Loss = Callable[[Any, Tensor, torch.Generator], Tensor]


def ours(model: Any, x: Tensor, g: torch.Generator) -> Tensor:
    return model.loss(x, generator=g)


def of_torchcfm(name: str) -> Loss:
    from torchcfm import conditional_flow_matching as cfm

    matcher = getattr(cfm, name)(sigma=0.0)

    def loss(model: Any, x: Tensor, g: torch.Generator) -> Tensor:
        x0 = torch.randn(x.shape, generator=g)
        t, xt, u = matcher.sample_location_and_conditional_flow(x0, x)
        return ((model.v(xt, t) - u) ** 2).mean()

    return loss


def of_flow_matching() -> Loss:
    from flow_matching.path import CondOTProbPath

    path = CondOTProbPath()

    def loss(model: Any, x: Tensor, g: torch.Generator) -> Tensor:
        t = torch.rand(len(x), generator=g)
        found = path.sample(t=t, x_0=torch.randn(x.shape, generator=g), x_1=x)
        return ((model.v(found.x_t, found.t) - found.dx_t) ** 2).mean()

    return loss


METHODS: dict[str, Callable[[], Loss]] = {
    "flowlang": lambda: ours,
    "flowlang, minibatch OT": lambda: ours,
    "torchcfm": lambda: of_torchcfm("ConditionalFlowMatcher"),
    "torchcfm, minibatch OT": lambda: of_torchcfm("ExactOptimalTransportConditionalFlowMatcher"),
    "flow_matching": of_flow_matching,
}


def wasserstein(a: Tensor, b: Tensor) -> float:
    cost = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))


def mmd(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        d = torch.cdist(x.double(), y.double()).square()
        return torch.stack([torch.exp(-d / (2 * h * h)) for h in (0.1, 0.3, 1.0)]).mean(0)

    same = sum(float((kernel(v, v).sum() - len(v)) / (len(v) * (len(v) - 1))) for v in (a, b))
    return same - 2 * float(kernel(a, b).mean())


def fit(name: str, loss: Loss, data: Tensor, steps: int, seed: int) -> tuple[Any, float]:
    model: Any = fl.compile("specs/matching.flow", seed=seed, ot=name == "flowlang, minibatch OT")
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    begun = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(model, data[torch.randint(len(data), (BATCH,), generator=g)], g).backward()
        optimizer.step()
        schedule.step()
    return model, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=["checkerboard", "spirals"])
    parser.add_argument("--out")
    o = parser.parse_args()
    rows = []
    for target in o.targets:
        columns = load(target).columns
        whole = torch.as_tensor(np.stack(list(columns.values()), 1), dtype=torch.float32)
        whole = (whole - whole.mean(0)) / whole.std(0)
        held, data = whole[: 2 * POINTS], whole[2 * POINTS :]
        floor = {
            "target": target,
            "method": "data",
            "w2": wasserstein(held[:POINTS], held[POINTS:]),
            "mmd": mmd(held[:POINTS], held[POINTS:]),
        }
        rows.append(floor)
        print(json.dumps(floor), flush=True)
        for name, make in METHODS.items():
            found = []
            for seed in range(o.seeds):
                model, seconds = fit(name, make(), data, o.steps, seed)
                with torch.no_grad():
                    drawn = model.sample((POINTS,), generator=torch.Generator().manual_seed(100))
                found.append((wasserstein(drawn, held[:POINTS]), mmd(drawn, held[:POINTS]), seconds / o.steps * 1e3))
            w2, distance, cost = (float(np.mean(v)) for v in zip(*found, strict=True))
            row = {
                "target": target,
                "method": name,
                "w2": w2,
                "w2_seeds": [f[0] for f in found],
                "mmd": distance,
                "ms_per_step": cost,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if o.out:
        with open(o.out, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
