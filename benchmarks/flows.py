"""Speed of compiled flows beside zuko, nflows, normflows and FrEIA.

    pip install -e '.[bench]'
    python benchmarks/flows.py                        # everything (an hour on two cores)
    python benchmarks/flows.py --kinds maf --dims 64 --batches 4096 --ops sample

All have 8 transforms, a conditioner with 2 x 128 ReLU units and, for splines, 8 bins on [-5, 5]. In every
cell the libraries take turns, so that other work on the machine hurts all of them alike. Tables show
the best time in ms, the median over the best peer's, and time(fastest peer) / time(FlowLang); raw
numbers go to a JSON file (`--json`), to be compared between commits. A peer that is not installed is
left out.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH, BINS, BOUND = 8, 128, 8, 5.0

SPECS = {
    "realnvp": """
flow realnvp {
  data x: R[D = 8]
  repeat 8 { affine_coupling(net = mlp(128, 128, act = relu));  reverse }
  base normal
}""",
    "nsf_coupling": """
flow nsf_coupling {
  data x: R[D = 8]
  repeat 8 { rqs_coupling(bins = 8, bound = 5, net = mlp(128, 128, act = relu));  reverse }
  base normal
}""",
    "maf": """
bijector step(x: R[D]) {
  shift: R[D], raw: R[D] = autoregressive_mlp[D](x, hidden = [128, 128], act = relu)
  x * exp(2 * tanh(raw / 2)) + shift
}
flow maf { data x: R[D = 8];  repeat 8 { step;  reverse };  base normal }""",
    "nsf_ar": """
bijector step(x: R[D]) {
  w: R[D, K = 8], h: R[D, K = 8], s: R[D, K1 = 7] = autoregressive_mlp[D](x, hidden = [128, 128], act = relu)
  rqs[K](x, w, h, s, bound = 5)
}
flow nsf_ar { data x: R[D = 8];  repeat 8 { step;  reverse };  base normal }""",
}


@dataclass
class Model:
    """A flow of some library: its parameters, and what is timed."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def flowlang(kind: str, size: int) -> Model:
    import flowlang as fl

    flow = fl.compile(SPECS[kind], D=size)
    return Model(flow, flow.log_prob, lambda n: flow.sample((n,)))


def flowlang_jit(kind: str, size: int) -> Model:
    import flowlang as fl

    flow = fl.compile(SPECS[kind], D=size, jit=True)
    return Model(flow, flow.log_prob, lambda n: flow.sample((n,)))


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    class Net(nn.Sequential):
        hidden_features = WIDTH  # nflows scales spline logits by it

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            for layer in self:
                x = layer(x)
            return x

    return Net(
        nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs)
    )  # fmt: skip


def zuko(kind: str, size: int) -> Model:
    import zuko

    options: dict[str, Any] = {"hidden_features": (WIDTH, WIDTH), "transforms": LAYERS}
    if kind == "nsf_coupling":
        spline = partial(zuko.transforms.MonotonicRQSTransform, bound=BOUND)
        flow = zuko.flows.NICE(size, univariate=spline, shapes=[(BINS,), (BINS,), (BINS - 1,)], **options)
    elif kind == "nsf_ar":
        flow = zuko.flows.NSF(size, bins=BINS, **options)
    else:
        flow = {"realnvp": zuko.flows.RealNVP, "maf": zuko.flows.MAF}[kind](size, **options)
    return Model(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def nflows(kind: str, size: int) -> Model:
    from nflows import distributions, flows, transforms
    from nflows.utils import torchutils

    steps: list[nn.Module] = []
    for k in range(LAYERS):
        mask = torchutils.create_alternating_binary_mask(size, even=k % 2 == 0)
        masked: dict[str, Any] = {
            "features": size, "hidden_features": WIDTH, "num_blocks": 1, "use_residual_blocks": False,
        }  # fmt: skip
        spline: dict[str, Any] = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
        if k and kind in ("maf", "nsf_ar"):
            steps.append(transforms.ReversePermutation(size))
        if kind == "realnvp":
            steps.append(transforms.AffineCouplingTransform(mask, perceptron))
        elif kind == "nsf_coupling":
            steps.append(transforms.PiecewiseRationalQuadraticCouplingTransform(mask, perceptron, **spline))
        elif kind == "maf":
            steps.append(transforms.MaskedAffineAutoregressiveTransform(**masked))
        else:
            made = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**masked, **spline)
            steps.append(made)
    flow = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([size]))
    return Model(flow, flow.log_prob, flow.sample)


def normflows(kind: str, size: int) -> Model:
    import normflows as nf
    from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
    from normflows.utils.masks import create_alternating_binary_mask

    steps: list[nn.Module] = []
    spline: dict[str, Any] = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    masked: dict[str, Any] = {
        "features": size, "hidden_features": WIDTH, "num_blocks": 1, "use_residual_blocks": False,
    }  # fmt: skip
    for k in range(LAYERS):
        if kind == "realnvp":
            half = size // 2
            net = nf.nets.MLP([size - half, WIDTH, WIDTH, 2 * half], init_zeros=False)
            steps += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(size, mode="swap")]
            continue
        if kind == "nsf_coupling":
            mask = create_alternating_binary_mask(size, even=k % 2 == 0)
            made = PiecewiseRationalQuadraticCoupling(mask, perceptron, apply_unconditional_transform=False, **spline)
            steps.append(nf.flows.Reverse(made))
            continue
        if k:
            steps.append(nf.flows.Permute(size, mode="swap"))
        if kind == "maf":
            made = nf.flows.MaskedAffineAutoregressive(**masked)
        else:
            made = MaskedPiecewiseRationalQuadraticAutoregressive(init_identity=False, **masked, **spline)
        steps.append(nf.flows.Reverse(made))  # so that the density is the direction of one pass
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(size, trainable=False), steps)
    return Model(flow, flow.log_prob, lambda n: flow.sample(n)[0])


def freia(kind: str, size: int) -> Model | None:
    import FrEIA.framework as framework
    import FrEIA.modules as modules

    block = {"realnvp": "GLOWCouplingBlock", "nsf_coupling": "RationalQuadraticSpline"}.get(kind)
    if block is None or not hasattr(modules, block):
        return None
    flow = framework.SequenceINN(size)
    for _ in range(LAYERS // 2):  # a block transforms both halves
        options = {"bins": BINS} if kind == "nsf_coupling" else {}
        flow.append(getattr(modules, block), subnet_constructor=perceptron, **options)
    constant = -0.5 * size * math.log(2 * math.pi)

    def log_prob(x: Tensor) -> Tensor:
        z, log_det = flow(x)
        return constant - 0.5 * z.square().sum(-1) + log_det

    return Model(flow, log_prob, lambda n: flow(torch.randn(n, size), rev=True)[0])


LIBRARIES: dict[str, Callable[[str, int], Model | None]] = {
    "flowlang": flowlang, "zuko": zuko, "nflows": nflows, "normflows": normflows, "FrEIA": freia,
}  # fmt: skip


def operation(model: Model, name: str, x: Tensor) -> Callable[[], None]:
    def log_prob() -> None:
        with torch.no_grad():
            model.log_prob(x)

    def backward() -> None:
        model.module.zero_grad(set_to_none=True)
        model.log_prob(x).mean().backward()

    def sample() -> None:
        with torch.no_grad():
            model.sample(len(x))

    return {"log_prob": log_prob, "backward": backward, "sample": sample}[name]


def interleaved(work: dict[str, Callable[[], None]], seconds: float, slow: float = 5.0) -> dict[str, dict[str, float]]:
    """Times in ms: the least, the median and the number of rounds. What is slow is run less often."""
    times: dict[str, list[float]] = {k: [] for k in work}
    warm: dict[str, float] = {}
    for name, run in work.items():
        start = time.perf_counter()
        run()
        warm[name] = time.perf_counter() - start
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 100 and time.perf_counter() - start < seconds * len(work)):
        for name, run in work.items():
            if warm[name] > slow and rounds:
                continue
            t = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - t)
        rounds += 1
    return {k: {"min": min(v) * 1e3, "median": statistics.median(v) * 1e3, "rounds": len(v)} for k, v in times.items()}


def models(kind: str, size: int, jit: bool) -> dict[str, Model]:
    found: dict[str, Model] = {}
    for name, make in {**LIBRARIES, **({"flowlang jit": flowlang_jit} if jit else {})}.items():
        torch.manual_seed(0)
        try:
            made = make(kind, size)
        except ImportError:
            continue
        if made is not None:
            made.module.eval()
            found[name] = made
    return found


def row(kind: str, size: int, batch: int, op: str, found: dict[str, dict[str, float]]) -> str:
    cells = "".join(f"{found[k]['min']:>12.2f}" if k in found else f"{'-':>12}" for k in LIBRARIES)
    peers = [v["min"] for k, v in found.items() if not k.startswith("flowlang")]
    ratio = f"{min(peers) / found['flowlang']['min']:>9.2f}" if peers else ""
    jit = f"{min(peers) / found['flowlang jit']['min']:>9.2f}" if peers and "flowlang jit" in found else ""
    return f"{kind:<13}{size:>5}{batch:>6}  {op:<9}{cells}{ratio}{jit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(SPECS))
    parser.add_argument("--dims", default="8,64", help="autoregressive kinds also take 16, 32, 128")
    parser.add_argument("--batches", default="1,256,4096")
    parser.add_argument("--ops", default="log_prob,backward,sample")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each library and cell")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jit", action="store_true", help="also under torch.compile")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/flows.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "torch": torch.__version__, "threads": options.threads, "machine": platform.processor() or platform.machine(),
        "cells": {},
    }  # fmt: skip
    print(f"{'':<35}{''.join(f'{k:>12}' for k in LIBRARIES)}  peer/ours")
    ratios: list[float] = []
    for kind in options.kinds.split(","):
        for size in map(int, options.dims.split(",")):
            built = models(kind, size, options.jit)
            print(f"{kind} {size}: parameters", {k: m.parameters for k, m in built.items()})
            for batch in map(int, options.batches.split(",")):
                x = torch.randn(batch, size)
                for op in options.ops.split(","):
                    found = interleaved({k: operation(m, op, x) for k, m in built.items()}, options.seconds)
                    results["cells"][f"{kind}|{size}|{batch}|{op}"] = found
                    print(row(kind, size, batch, op, found), flush=True)
                    peers = [v["min"] for k, v in found.items() if not k.startswith("flowlang")]
                    if peers:
                        ratios.append(min(peers) / found["flowlang"]["min"])
    if ratios:
        print(f"geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
