"""Training steps of deep flows with kept activations and with `memory="reversible"`: bytes held for gradients, and time.

    python benchmarks/memory.py [--depths 8 32 128] [--batch 512] [--rounds 10] [--out FILE]

The two take turns; medians over the rounds, one thread, float32. Held is what autograd keeps for the way back, weights
left out; gradients are compared by the largest difference, relative to the largest slope of the parameter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flowlang as fl

STEPS = {
    "realnvp": "affine_coupling(net = mlp(128, 128))",
    "nsf": "rqs_coupling(bins = 8, net = mlp(128, 128))",
    "glow": "actnorm\n plu_linear\n affine_coupling(net = mlp(128, 128))",
}


def spec(steps: str, depth: int) -> str:
    return f"flow f {{\n data x: R[D = 64]\n repeat {depth} {{ {steps}\n reverse }}\n base normal\n}}\n"


def held(flow: nn.Module, x: Tensor) -> int:
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        flow.log_prob(x).mean()
    return sum(found.values())


def step(flow: nn.Module, x: Tensor) -> float:
    flow.zero_grad()
    began = time.perf_counter()
    (-flow.log_prob(x).mean()).backward()
    return time.perf_counter() - began


def compare(steps: str, depth: int, batch: int, rounds: int) -> dict[str, Any]:
    flows = [fl.compile(spec(steps, depth), seed=0, memory=m).train() for m in ("plain", "reversible")]
    x = torch.randn(batch, 64, generator=torch.Generator().manual_seed(0))
    times = [[step(f, x) for f in flows] for _ in range(rounds + 1)][1:]
    plain, saving = (statistics.median(t) for t in zip(*times, strict=True))
    difference = max(
        float((a.grad - b.grad).abs().max() / a.grad.abs().max().clamp_min(1e-12))
        for a, b in zip(*(f.parameters() for f in flows), strict=True)
    )
    return {
        "depth": depth, "plain_held": held(flows[0], x), "reversible_held": held(flows[1], x), "plain_seconds": plain,
        "reversible_seconds": saving, "ratio": saving / plain, "difference": difference,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {}
    print("steps     depth   held, plain   held, reversible     time   gradients differ by")
    for name, steps in STEPS.items():
        rows[name] = [compare(steps, d, chosen.batch, chosen.rounds) for d in chosen.depths]
        for r in rows[name]:
            print(f"{name:8} {r['depth']:6} {r['plain_held'] / 1e6:10.1f} MB {r['reversible_held'] / 1e6:15.2f} MB"
                  f" {r['ratio']:8.2f}x {r['difference']:14.1e}")  # fmt: skip
    if chosen.out:
        chosen.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
