"""Latency of exported models in onnxruntime beside eager PyTorch, zuko and nflows, and zuko's own traced ONNX.

    python benchmarks/onnx_latency.py [--layers 8] [--dims 8] [--rounds 40] [--clock cpu] [--compile] [--out FILE]

Everything runs in one process, one thread, float32, with the same sizes (hidden layers of 64 and 64, 8 bins); the
competitors take turns in a changing order, each after a call that is not timed, so that noise of the machine and the
caches meet all of them alike. Libraries that are not installed are left
out and named. Times are medians over the rounds, in microseconds, with quartiles. Export times and node counts
(bodies of loops and of functions included) are given as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import inliner

import flowlang as fl

Call = Callable[[], Any]
STEPS = {
    "nsf": "rqs_coupling(bins = 8, net = mlp(64, 64, act = relu))",
    "realnvp": "affine_coupling(net = mlp(64, 64, act = relu))",
    "maf": "affine_autoregressive(hidden = [64, 64], act = relu)",
}


def spec(kind: str, dims: int, layers: int) -> str:
    return f"flow f {{ data x: R[D = {dims}]\n repeat {layers} {{ {STEPS[kind]}\n reverse }}\n base normal }}"


def count(model: onnx.ModelProto) -> int:
    """Nodes with the bodies of loops, and of functions at each call; without constants."""

    def inside(graph: onnx.GraphProto) -> int:
        own = (n for n in graph.node if n.op_type != "Constant")
        return sum(1 + sum(inside(a.g) for a in n.attribute if a.HasField("g")) for n in own)

    return inside(inliner.inline_local_functions(model).graph)


def runtime(path: str | Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Bench:
    def __init__(self, kind: str, args: argparse.Namespace):
        self.kind, self.args = kind, args
        self.calls: dict[tuple[str, int], dict[str, Call]] = {}
        self.facts: dict[str, dict[str, float]] = {}
        self.left_out: dict[str, str] = {}
        self.folder = Path(tempfile.mkdtemp())

    def add(self, program: str, batch: int, name: str, call: Call) -> None:
        try:
            call()
        except Exception as e:
            self.left_out[f"{name} {program}"] = f"{type(e).__name__}: {str(e).splitlines()[0][:100]}"
            return
        self.calls.setdefault((program, batch), {})[name] = call

    def flowlang(self) -> None:
        a = self.args
        flow = fl.compile(spec(self.kind, a.dims, a.layers), seed=0).eval()
        began = time.perf_counter()
        files = fl.export_onnx(flow, self.folder / "f.onnx", ["log_prob", "sample"])
        seconds = time.perf_counter() - began
        for program, file in files.items():
            self.facts[f"flowlang {program}"] = {
                "nodes": count(onnx.load(file)), "kB": round(file.stat().st_size / 1000), "seconds": round(seconds / 2, 2),
            }  # fmt: skip
            self.onnx("flowlang onnx", program, file, "x" if program == "log_prob" else "noise")
        if self.kind == "maf":  # its few stages as a loop, as more of them are
            file = fl.export_onnx(flow, self.folder / "u.onnx", ["sample"], unroll=0)["sample"]
            self.facts["flowlang sample, loop"] = {
                "nodes": count(onnx.load(file)), "kB": round(file.stat().st_size / 1000), "seconds": 0.0,
            }  # fmt: skip
            self.onnx("flowlang loop", "sample", file, "noise")
        self.eager("flowlang eager", flow.log_prob, flow.sample)
        if a.compile:
            for b in a.batches:
                x = torch.randn(b, a.dims)
                fast = torch.compile(flow.log_prob, fullgraph=False)
                self.add("log_prob", b, "flowlang compiled", no_grad(fast, x))

    def onnx(self, name: str, program: str, file: Path, feed: str) -> None:
        session = runtime(file)
        for b in self.args.batches:
            x = np.random.default_rng(0).standard_normal((b, self.args.dims)).astype(np.float32)
            self.add(program, b, name, lambda x=x: session.run(None, {feed: x}))

    def eager(self, name: str, log_prob: Callable[..., Any], sample: Callable[..., Any]) -> None:
        for b in self.args.batches:
            x = torch.randn(b, self.args.dims)
            self.add("log_prob", b, name, no_grad(log_prob, x))
            self.add("sample", b, name, no_grad(sample, (b,)))

    def zuko(self) -> None:
        try:
            import zuko
        except ImportError:
            self.left_out["zuko"] = "not installed"
            return
        a = self.args
        made: dict[str, Callable[[], Any]] = {
            "nsf": lambda: zuko.flows.NSF(a.dims, bins=8, transforms=a.layers, hidden_features=(64, 64), passes=2),
            "realnvp": lambda: zuko.flows.MAF(a.dims, transforms=a.layers, hidden_features=(64, 64), passes=2),
            "maf": lambda: zuko.flows.MAF(a.dims, transforms=a.layers, hidden_features=(64, 64)),
        }
        flow = made[self.kind]().eval()
        self.eager("zuko eager", lambda x: flow().log_prob(x), lambda shape: flow().sample(shape))

        class Density(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.flow = flow

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.flow().log_prob(x)

        class Sampler(Density):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.flow().transform.inv(x)

        for program, module in (("log_prob", Density()), ("sample", Sampler())):
            if self.kind == "maf" and program == "sample" and not a.unrolled:
                self.left_out["zuko onnx sample"] = "unrolled: minutes to export, ask for it by --unrolled"
                continue
            file = self.folder / f"zuko.{program}.onnx"
            began = time.perf_counter()
            try:
                with torch.no_grad(), quiet():
                    batch = torch.export.Dim("batch")
                    torch.onnx.export(
                        module,
                        (torch.randn(64, a.dims),),
                        str(file),
                        dynamo=True,
                        dynamic_shapes=({0: batch},),
                        input_names=["x"],
                    )
            except Exception as e:
                self.left_out[f"zuko onnx {program}"] = f"{type(e).__name__}: {str(e).splitlines()[0][:100]}"
                continue
            self.facts[f"zuko {program}"] = {
                "nodes": count(onnx.load(file)), "kB": round(file.stat().st_size / 1000),
                "seconds": round(time.perf_counter() - began, 2),
            }  # fmt: skip
            self.onnx("zuko onnx", program, file, "x")

    def nflows(self) -> None:
        try:
            from nflows import transforms
            from nflows.distributions.normal import StandardNormal
            from nflows.flows.base import Flow
            from nflows.nn.nets import ResidualNet
        except ImportError:
            self.left_out["nflows"] = "not installed"
            return
        a = self.args

        def net(n_in: int, n_out: int) -> Any:
            return ResidualNet(n_in, n_out, hidden_features=64, num_blocks=1)

        parts: list[Any] = []
        for k in range(a.layers):
            mask = torch.arange(a.dims) % 2 if k % 2 else 1 - torch.arange(a.dims) % 2
            if self.kind == "nsf":
                parts.append(
                    transforms.PiecewiseRationalQuadraticCouplingTransform(
                        mask, net, num_bins=8, tails="linear", tail_bound=4.0
                    )
                )
            elif self.kind == "realnvp":
                parts.append(transforms.AffineCouplingTransform(mask, net))
            else:
                parts += [
                    transforms.MaskedAffineAutoregressiveTransform(a.dims, 64, num_blocks=1),
                    transforms.ReversePermutation(a.dims),
                ]
        flow = Flow(transforms.CompositeTransform(parts), StandardNormal([a.dims])).eval()
        self.eager("nflows eager", flow.log_prob, lambda shape: flow.sample(shape[0]))

    def run(self) -> dict[str, Any]:
        self.flowlang()
        self.zuko()
        self.nflows()
        times: dict[tuple[str, int], dict[str, list[float]]] = {k: {n: [] for n in v} for k, v in self.calls.items()}
        clock = {"wall": time.perf_counter, "cpu": time.process_time}[self.args.clock]
        for turn in range(self.args.rounds):
            for key, named in self.calls.items():
                # Who comes first meets caches that a call of another size has filled: each in turn, after a call untimed.
                names = list(named)
                names = names[turn % len(names) :] + names[: turn % len(names)]
                for name in names:
                    repeats = 5 if "onnx" in name else 1
                    named[name]()
                    began = clock()
                    for _ in range(repeats):
                        named[name]()
                    times[key][name].append((clock() - began) / repeats * 1e6)
        return {"kind": self.kind, "times": times, "facts": self.facts, "left_out": self.left_out}


def no_grad(f: Callable[..., Any], x: Any) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return f(x)

    return call


class quiet:
    """Exporters talk a lot."""

    def __enter__(self) -> None:
        self.out = sys.stdout
        sys.stdout = open(os.devnull, "w")

    def __exit__(self, *_: Any) -> None:
        sys.stdout.close()
        sys.stdout = self.out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dims", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--kinds", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the thread's own time, where other work shares the machine",
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument(
        "--unrolled", action="store_true", help="also zuko's autoregressive sampler as ONNX (slow to export)"
    )
    parser.add_argument("--out", help="write all numbers as JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    for kind in args.kinds:
        found = Bench(kind, args).run()
        results.append(found)
        print(f"\n{kind}: {args.layers} layers, D = {args.dims}")
        for (program, batch), named in found["times"].items():
            print(f"  {program}, batch {batch}")
            eager = [statistics.median(v) for n, v in named.items() if n in ("zuko eager", "nflows eager")]
            for name, values in sorted(named.items(), key=lambda kv: statistics.median(kv[1])):
                low, middle, high = statistics.quantiles(values, n=4)
                shown = f"    {name:18} {middle:10.0f} µs  ({low:.0f} to {high:.0f})"
                if name == "flowlang onnx" and eager:
                    shown += f"   {min(eager) / middle:.1f} times faster than the fastest eager library"
                print(shown)
        for name, facts in found["facts"].items():
            print(f"  {name}: {facts['nodes']} nodes, {facts['kB']} kB, exported in {facts['seconds']} s")
        for name, why in found["left_out"].items():
            print(f"  left out: {name} ({why})")
    if args.out:
        rows = [{**r, "times": {f"{p} {b}": v for (p, b), v in r["times"].items()}} for r in results]
        Path(args.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
