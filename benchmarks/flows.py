"""Speed of compiled flows beside zuko, nflows, normflows and FrEIA.

    pip install -e '.[bench]'
    python benchmarks/flows.py                        # everything (an hour on two cores)
    python benchmarks/flows.py --kinds maf --dims 64 --batches 4096 --ops sample
    python benchmarks/flows.py --against old.json --plot flows.png

All have 8 transforms, a conditioner with 2 x 128 ReLU units and, for splines, 8 bins on [-5, 5]. In every
cell the libraries take turns, so that other work on the machine hurts all of them alike. Tables show
the best time in ms, time(fastest peer) / time(FlowLang), the least that is possible (`products`: the cell's
matrix products alone, in the same turns) and the share of it that FlowLang reaches, and the most memory that
a call holds at once, of FlowLang and of the peer that holds least. Raw numbers go to a JSON file (`--json`);
`--against` compares with one of another commit, by the ratio to the peers, which other work on the machine moves
little. Before the tables FlowLang and nflows compute densities with the same weights, copied from one to the
other, where a spec says the same map. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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


# The same with nflows' own form of a scale, where that differs: with copied weights both give the same densities.
SAME = {
    **SPECS,
    "realnvp": """
bijector step(x: R[D]) {
  a, b = halves[D](x)
  shift: R[b.D], raw: R[b.D] = mlp(128, 128, act = relu)(a)
  join[D](a, b * (sigmoid(raw + 2) + 0.001) + shift)
}
flow realnvp { data x: R[D = 8];  repeat 8 { step;  reverse };  base normal }""",
    "maf": """
bijector step(x: R[D]) {
  shift: R[D], raw: R[D] = autoregressive_mlp[D](x, hidden = [128, 128], act = relu)
  x * (softplus(raw) + 0.001) + shift
}
flow maf { data x: R[D = 8];  repeat 8 { step;  reverse };  base normal }""",
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


def same_function(kind: str, batch: int = 64) -> float:
    """The largest difference of log-densities in float64 between FlowLang and nflows with the same weights.

    Masked networks at D = 9, where both have as many hidden units of each degree (in FlowLang sorted by it).
    """
    import flowlang as fl

    size = 9 if kind in ("maf", "nsf_ar") else 8

    torch.manual_seed(0)
    theirs = nflows(kind, size).module.double().eval()
    ours = fl.compile(SAME[kind], D=size, dtype=torch.float64).eval()
    parameters = iter(ours.parameters())
    half = size // 2
    masked = kind in ("maf", "nsf_ar")
    outputs = 2 if kind in ("realnvp", "maf") else 3 * BINS - 1
    steps = [m for m in theirs.modules() if type(m).__name__.endswith("Transform") and list(m.parameters(recurse=True))]
    steps = [m for m in steps if type(m).__name__ != "CompositeTransform"]
    with torch.no_grad():
        for k, step in enumerate(steps):
            layers = [p.clone() for p in step.parameters()]
            weights, biases = layers[0::2], layers[1::2]
            n = size if masked else half
            # Rows by parameter, then coordinate; nflows has coordinates first but for affine couplings.
            by_coordinate = kind != "realnvp"
            shape = (n, outputs) if by_coordinate else (outputs, n)
            w, b = weights[-1].unflatten(0, shape), biases[-1].unflatten(0, shape)
            w, b = (w.transpose(0, 1), b.T) if by_coordinate else (w, b)
            w, b = w.contiguous(), b.contiguous()
            if kind == "maf":  # scale, shift
                w, b = w.flip(0), b.flip(0)
            if outputs > 2:
                if not masked:  # nflows divides logits by it where a network tells its width
                    w[: 2 * BINS] /= math.sqrt(WIDTH)
                    b[: 2 * BINS] /= math.sqrt(WIDTH)
                b[2 * BINS :] -= math.log(math.expm1(1 - 1e-3))  # raw 0 is slope 1 in FlowLang
            if not masked and k % 2:  # every other coupling sees the coordinates reversed
                weights[0], w, b = weights[0].flip(1), w.flip(1), b.flip(1)
            if masked:
                order = torch.argsort(torch.arange(WIDTH) % (size - 1), stable=True)
                weights = [weights[0][order], weights[1][order][:, order]]
                biases, w = [biases[0][order], biases[1][order]], w[..., order]
            for made in (weights[0], biases[0], weights[1], biases[1], w, b):
                own = next(parameters)
                own.copy_(made.reshape(own.shape))
        x = 2 * torch.randn(batch, size, dtype=torch.float64)
        seen = x if masked else torch.cat((x[:, 1::2], x[:, 0::2]), -1)
        return float((ours.log_prob(seen) - theirs.log_prob(x)).abs().max())


def products(kind: str, size: int, op: str, batch: int) -> Callable[[], None]:
    """The matrix products of one call of the operation and nothing else: what no implementation does without."""
    masked = kind in ("maf", "nsf_ar")
    n = size if masked else size // 2
    outputs = (2 if kind in ("realnvp", "maf") else 3 * BINS - 1) * n
    sizes = [(n, WIDTH), (WIDTH, WIDTH), (WIDTH, outputs)]
    layers = [[torch.randn(b, a) for a, b in sizes] for _ in range(LAYERS)]
    values = {a: torch.randn(batch, a) for a in {n, WIDTH, outputs}}

    def forward() -> None:
        with torch.no_grad():
            for layer in layers:
                for weight in layer:
                    torch.mm(values[weight.shape[1]], weight.t())

    def backward() -> None:
        forward()
        with torch.no_grad():
            for k, layer in enumerate(layers):
                for j, weight in enumerate(layer):
                    slope = values[weight.shape[0]]
                    torch.mm(slope.t(), values[weight.shape[1]])
                    if k or j:  # nothing asks for the slope of the data
                        torch.mm(slope, weight)

    return backward if op == "backward" else forward


def peak_memory(run: Callable[[], None]) -> float:
    """MB that a call holds at once beyond what stood before: allocations by the profiler, less what is freed."""
    from torch.profiler import ProfilerActivity, profile

    run()
    spoken = os.dup(2)  # the profiler tells of each start and stop
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
                run()
        finally:
            os.dup2(spoken, 2)
            os.close(spoken)
    held, most = 0, 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for e in sorted(events, key=lambda e: e.start_ns()):
        held += e.nbytes()
        most = max(most, held)
    return most / 1e6


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


def interleaved(
    work: dict[str, Callable[[], None]],
    seconds: float,
    slow: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
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
            t = clock()
            run()
            times[name].append(clock() - t)
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


SPLINES = ("nsf_coupling", "nsf_ar")


def goal(kind: str, size: int, batch: int, op: str, limit: float) -> float:
    """What the ratio to the fastest peer should be at least. `limit`: what it would be with the products alone."""
    if op == "sample" and kind in ("maf", "nsf_ar") and batch == 4096 and size >= 64:
        return 20.0 if size >= 128 else 10.0
    return min(2.0, 0.8 * limit) if kind in SPLINES else 1.0


def fastest(found: dict[str, dict[str, float]]) -> float | None:
    peers = [v["min"] for k, v in found.items() if not k.startswith("flowlang") and k != "products"]
    return min(peers) if peers else None


def row(kind: str, size: int, batch: int, op: str, found: dict[str, dict[str, float]]) -> str:
    cells = "".join(f"{found[k]['min']:>11.2f}" if k in found else f"{'-':>11}" for k in (*LIBRARIES, "products"))
    ours, peer, least = found["flowlang"]["min"], fastest(found), found["products"]["min"]
    shown = f"{least / ours:>7.0%}"
    if peer is not None:
        wanted = goal(kind, size, batch, op, peer / least)
        shown = f"{peer / ours:>9.2f} {'' if peer / ours >= wanted else f'(< {wanted:.1f})':<8}" + shown
    if "flowlang jit" in found and peer is not None:
        shown += f"{peer / found['flowlang jit']['min']:>7.2f}"
    memory = {k: v["MB"] for k, v in found.items() if "MB" in v}
    if memory:
        others = [v for k, v in memory.items() if not k.startswith("flowlang")]
        shown += f"{memory['flowlang']:>9.1f}" + (f" {min(others):>8.1f}" if others else "")
    return f"{kind:<13}{size:>4}{batch:>6}  {op:<9}{cells}{shown}"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Cells of two files whose ratio to the fastest peer differs by more than a tenth, and the mean of all."""
    lines, factors = [], []
    for key, found in new["cells"].items():
        before = old["cells"].get(key)
        if before is None or (a := fastest(before)) is None or (b := fastest(found)) is None:
            continue
        was, now = a / before["flowlang"]["min"], b / found["flowlang"]["min"]
        factors.append(now / was)
        if abs(math.log(now / was)) > math.log(1.1):
            lines.append(f"{key:<34} {was:.2f} -> {now:.2f}")
    if factors:
        lines.append(
            f"{len(factors)} cells in both, geometric mean {statistics.geometric_mean(factors):.3f} times as fast"
        )
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """The ratio to the fastest peer over the batch, a picture for each kind and operation; grey: the products alone."""
    from flowlang import plots

    cells = {tuple(k.split("|")): v for k, v in results["cells"].items()}
    kinds, ops = (list(dict.fromkeys(k[i] for k in cells)) for i in (0, 3))
    fig = plots.figure(3.0 * len(ops), 2.4 * len(kinds))
    axes = fig.subplots(len(kinds), len(ops), squeeze=False, sharex=True)
    for r, kind in enumerate(kinds):
        for c, op in enumerate(ops):
            ax = axes[r][c]
            for j, size in enumerate(dict.fromkeys(k[1] for k in cells if k[0] == kind)):
                own = [(int(k[2]), v) for k, v in cells.items() if k[0] == kind and k[1] == size and k[3] == op]
                known = [(b, peer, v) for b, v in own if (peer := fastest(v)) is not None]
                x = [b for b, _, _ in known]
                ax.plot(x, [p / v["flowlang"]["min"] for _, p, v in known], "o-", label=f"D = {size}", color=f"C{j}")
                ax.plot(x, [p / v["products"]["min"] for _, p, v in known], ":", color=f"C{j}", alpha=0.4)
            ax.axhline(1, color="0.6", lw=0.8)
            ax.set(xscale="log", yscale="log", title=f"{kind}, {op}")
            ax.title.set_size(9)
            plots.plain(ax)
    axes[0][0].legend(fontsize=7, frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel("batch", fontsize=8)
    plots.write(fig, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(SPECS))
    parser.add_argument("--dims", default="8,64", help="autoregressive kinds also take 16, 32, 128")
    parser.add_argument("--batches", default="1,256,4096")
    parser.add_argument("--ops", default="log_prob,backward,sample")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each library and cell")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, beside other work"
    )
    parser.add_argument("--jit", action="store_true", help="also under torch.compile")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/flows.json"))
    parser.add_argument("--against", type=Path, help="numbers of another commit, to compare with")
    parser.add_argument("--plot", type=Path, help="a PNG of the ratios (extra `plots`)")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="without a profiled call for each cell"
    )
    options = parser.parse_args()
    before = json.loads(options.against.read_text()) if options.against else None
    torch.set_num_threads(options.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    results: dict[str, Any] = {
        "torch": torch.__version__, "threads": options.threads, "machine": platform.processor() or platform.machine(),
        "same": {}, "cells": {},
    }  # fmt: skip
    kinds = options.kinds.split(",")
    for kind in kinds:
        try:
            results["same"][kind] = same_function(kind)
        except ImportError:
            break
        print(f"{kind}: with the weights of nflows, log-densities in float64 differ by {results['same'][kind]:.1e}")
    heads = "".join(f"{k:>11}" for k in (*LIBRARIES, "products"))
    print(
        f"{'':<34}{heads}  peer/ours (goal)  share{'   jit' if options.jit else ''}"
        + "  MB ours   peers" * options.memory
    )
    ratios: list[float] = []
    for kind in kinds:
        for size in map(int, options.dims.split(",")):
            built = models(kind, size, options.jit)
            print(f"{kind} {size}: parameters", {k: m.parameters for k, m in built.items()})
            for batch in map(int, options.batches.split(",")):
                x = torch.randn(batch, size)
                for op in options.ops.split(","):
                    work = {k: operation(m, op, x) for k, m in built.items()}
                    found = interleaved(
                        {**work, "products": products(kind, size, op, batch)}, options.seconds, clock=clock
                    )
                    if options.memory:
                        for k, run in work.items():
                            found[k]["MB"] = peak_memory(run)
                    results["cells"][f"{kind}|{size}|{batch}|{op}"] = found
                    options.json.write_text(json.dumps(results, indent=1))  # an hour's run may be stopped
                    print(row(kind, size, batch, op, found), flush=True)
                    peer = fastest(found)
                    if peer is not None:
                        ratios.append(peer / found["flowlang"]["min"])
    if ratios:
        print(f"geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    if before is not None:
        print("\n".join(changes(before, results)))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
