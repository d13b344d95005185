"""Generated norms beside torch's own layers, and beside a plain composition of torch ops: forward and backward.

    python benchmarks/norms.py [--rounds 100] [--processes 5] [--only "layer norm" ...]

Each row is measured in several fresh processes: the ratio of a process is that of the medians of its rounds, and the table
has the median and the range over processes. In a round each contender runs once, in an order drawn anew, so that a slow
moment of the machine falls on both. Times are of the processor, in one thread: what other work takes is left out. float32,
training mode; the input and the gradient that comes back are made once.

The processes run with glibc's settings below, which keep freed memory in the heap. Without them blocks of some MB go back
to the system and come again as pages that fault at their first touch: a thousand faults for 4 MB, 0.5 to 6 ms, or none,
as the heap's top happens to lie. That is more than a layer norm takes (1.2 ms), and made its ratio swing from 0.4 to 1.4.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import flowlang as fl

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(2**28),
}  # fmt: skip
IMAGE, TOKENS = (32, 64, 16, 16), (32, 128, 256)


def compiled(body: str, shape: tuple[int, ...]) -> Any:
    """The norm as it stands in a network, whose face has checked the input (about 15 microseconds) once."""
    names = ("C", "H", "W") if len(shape) == 4 else ("T", "D")
    axes = ", ".join(f"{n} = {s}" for n, s in zip(names, shape[1:], strict=True))
    return next(fl.compile(f"norm n(x: R[{axes}]) {{ {body} }}", flow="n", seed=0).children())


def evonorm_s0(x: Tensor, m: Any) -> Tensor:
    """The paper's listing, op by op."""
    n, c, h, w = x.shape
    var = x.reshape(n, 32, c // 32, h, w).var((2, 3, 4), unbiased=False, keepdim=True)
    std = torch.sqrt(var + 1e-5).expand(n, 32, c // 32, h, w).reshape(n, c, h, w)
    num = x * torch.sigmoid(m.v[:, None, None] * x)
    return num / std * m.gamma[:, None, None] + m.beta[:, None, None]


def channel_norm(x: Tensor, m: Any) -> Tensor:
    n, c, h, w = x.shape
    g = x.reshape(n, 32, c // 32 * h * w)
    mean, var = g.mean(-1, keepdim=True), g.var(-1, unbiased=False, keepdim=True)
    g = (g - mean) / torch.sqrt(var + 1e-5) * m.gamma[:, None] + m.beta[:, None]
    return g.reshape(n, c, h, w)


def evonorm_s(x: Tensor, m: Any, squares: bool) -> Tensor:
    """S1, or S2 with `squares`."""
    n, c, h, w = x.shape
    g = x.reshape(n, 32, c // 32, h, w)
    var = g.square().mean((2, 3, 4), keepdim=True) if squares else g.var((2, 3, 4), unbiased=False, keepdim=True)
    std = torch.sqrt(var + 1e-5).expand(n, 32, c // 32, h, w).reshape(n, c, h, w)
    return x * torch.sigmoid(x) / std * m.gamma[:, None, None] + m.beta[:, None, None]


def evonorm_b0(x: Tensor, m: Any) -> Tensor:
    """The paper's listing, with the running variance kept."""
    var = x.var((0, 2, 3), unbiased=False)
    with torch.no_grad():
        n = x.numel() / x.shape[1]
        m.running_var.mul_(0.9).add_(0.1 * var * n / (n - 1))
    own = torch.sqrt(x.var((2, 3), unbiased=False, keepdim=True) + 1e-5)
    left = torch.sqrt(var + 1e-5)[:, None, None]
    return x / torch.maximum(left, m.v[:, None, None] * x + own) * m.gamma[:, None, None] + m.beta[:, None, None]


def power_norm_v(x: Tensor, m: Any) -> Tensor:
    square = (x**2).mean((0, 2, 3))
    with torch.no_grad():
        m.running_mean.mul_(0.9).add_(0.1 * square)
    return x / torch.sqrt(square + 1e-5)[:, None, None] * m.gamma[:, None, None] + m.beta[:, None, None]


def partial_rms(x: Tensor, m: Any) -> Tensor:
    part = x[..., :16]
    return x / (torch.sqrt((part**2).mean(-1, keepdim=True)) + 1e-8) * m.gamma


def channels(v: Tensor) -> Tensor:
    return v[:, None, None]


class PowerFunction(torch.autograd.Function):
    """PowerNorm after its warm-up, with the paper's backward pass; the statistics are the module's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Any) -> Tensor:
        q = (x * x).mean((0, 2, 3))
        z = x / channels(torch.sqrt(core.other_phi + 1e-5))
        core.other_phi.mul_(0.9).add_(0.1 * q)
        ctx.save_for_backward(z, q)
        ctx.core = core
        return z

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, q = ctx.saved_tensors
        g = dy - channels(0.1 * ctx.core.other_nu) * z
        ctx.core.other_nu.add_((g * z).mean((0, 2, 3)))
        return g / channels(torch.sqrt(q + 1e-5)), None


def power_norm(x: Tensor, m: Any) -> Tensor:
    if not hasattr(m, "other_phi"):
        m.other_phi, m.other_nu = torch.ones(64), torch.zeros(64)
    return PowerFunction.apply(x, m) * channels(m.gamma) + channels(m.beta)


class OnlineFunction(torch.autograd.Function):
    """Online normalisation, sample after sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Any) -> Tensor:
        ys, sds = [], []
        for row in x:
            sd = torch.sqrt(m.other_var + 1e-5)
            ys.append((row - channels(m.other_mu)) / channels(sd))
            sds.append(sd)
            mean, var = row.mean((1, 2)), row.var((1, 2), unbiased=False)
            m.other_var = 0.99 * m.other_var + 0.01 * var + 0.99 * 0.01 * (mean - m.other_mu) ** 2
            m.other_mu = m.other_mu + 0.01 * (mean - m.other_mu)
        y = torch.stack(ys)
        ctx.save_for_backward(y, torch.stack(sds))
        ctx.m = m
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (y, sds), m, out = ctx.saved_tensors, ctx.m, []
        for g, row, sd in zip(dy, y, sds, strict=True):
            a = g - channels(0.01 * m.other_v) * row
            m.other_v = m.other_v + (a * row).mean((1, 2))
            d = a / channels(sd) - channels(0.01 * m.other_u)
            m.other_u = m.other_u + d.mean((1, 2))
            out.append(d)
        return torch.stack(out), None


def online(x: Tensor, m: Any) -> Tensor:
    if not hasattr(m, "other_mu"):
        m.other_mu, m.other_var, m.other_u, m.other_v = (
            torch.zeros(64),
            torch.ones(64),
            torch.zeros(64),
            torch.zeros(64),
        )
    return OnlineFunction.apply(x, m)


def group_scaling(x: Tensor, m: Any) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)


def mean_only(x: Tensor, m: Any) -> Tensor:
    mean = x.mean((0, 2, 3))
    with torch.no_grad():
        m.running_mean.mul_(0.9).add_(0.1 * mean)
    return x - channels(mean) + channels(m.beta)


def weights(body: str, other: nn.Module, pairs: dict[str, str]) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """A linear layer with a map of its weights, and torch's with the same numbers."""
    mine: Any = fl.compile(f"net n(x: R[D = 256]) {{ {body} }}", flow="n", seed=0)
    own, theirs = (
        dict(mine.named_parameters()) | dict(mine.named_buffers()),
        dict(other.named_parameters()) | dict(other.named_buffers()),
    )
    with torch.no_grad():
        for a, b in pairs.items():
            theirs[b].copy_(own[a].reshape(theirs[b].shape))
    return mine._forward, other


def weight_norm() -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    key = "parametrizations.weight.original"
    return weights(
        "linear[D -> E = 256](x, weight = weight_norm)", nn.utils.parametrizations.weight_norm(nn.Linear(256, 256)),
        {"linear_weight": f"{key}1", "weight_norm.g": f"{key}0", "linear_bias": "bias"},
    )  # fmt: skip


def spectral() -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    return weights(
        "linear[D -> E = 256](x, weight = spectral)", nn.utils.spectral_norm(nn.Linear(256, 256)),
        {"linear_weight": "weight_orig", "spectral.u": "weight_u", "linear_bias": "bias"},
    )  # fmt: skip


NATIVE: list[tuple[str, str, tuple[int, ...], Callable[[], nn.Module]]] = [
    ("layer norm", "layer_norm[D](x)", TOKENS, lambda: nn.LayerNorm(256)),
    ("RMSNorm", "rms_norm[D](x)", TOKENS, lambda: nn.RMSNorm(256, eps=1e-5)),
    ("group norm (32)", "group_norm[C](32)(x)", IMAGE, lambda: nn.GroupNorm(32, 64)),
    ("instance norm", "instance_norm[C](x)", IMAGE, lambda: nn.InstanceNorm2d(64)),
    ("batch norm", "batch_norm[C](x)", IMAGE, lambda: nn.BatchNorm2d(64)),
]
COMPOSED: list[tuple[str, str, tuple[int, ...], Callable[[Tensor, Any], Tensor]]] = [
    ("EvoNorm-S0 (32)", "evonorm_s0(32)(x)", IMAGE, evonorm_s0),
    ("EvoNorm-S1 (32)", "evonorm_s1(32)(x)", IMAGE, lambda x, m: evonorm_s(x, m, False)),
    ("EvoNorm-S2 (32)", "evonorm_s2(32)(x)", IMAGE, lambda x, m: evonorm_s(x, m, True)),
    ("EvoNorm-B0", "evonorm_b0()(x)", IMAGE, evonorm_b0), ("PN-V", "power_norm_v()(x)", IMAGE, power_norm_v),
    ("channel norm (32)", "channel_norm[C](32)(x)", IMAGE, channel_norm),
    ("partial RMSNorm (1/16)", "partial_rms_norm(0.0625)[D](x)", TOKENS, partial_rms),
    ("group scaling", "group_scaling()[D](x)", TOKENS, group_scaling), ("mean-only batch norm", "mean_only_batch_norm()[C](x)", IMAGE, mean_only),
    ("PowerNorm", "power_norm(warmup = 0, group = 0)[C](x)", IMAGE, power_norm),
    ("online norm", "online_norm_core(0.99, 0.99, 1e-5)[C](x)", (32, 64, 8, 8), online),
]  # fmt: skip


WEIGHTS = {"weight norm, linear": weight_norm, "spectral norm, linear": spectral}
OWN, PLAIN = "torch's own layer", "composition of torch ops"
CONTROL = "torch's batch norm"  # beside itself: what the measure is worth
ROWS = {
    CONTROL: "the same again",
    **{name: OWN for name, *_ in NATIVE}, **dict.fromkeys(WEIGHTS, OWN), **{name: PLAIN for name, *_ in COMPOSED},
}  # fmt: skip


def contenders(row: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """The generated one, the other one, and an input."""
    if row == CONTROL:
        return nn.BatchNorm2d(64), nn.BatchNorm2d(64), torch.randn(*IMAGE)
    if row in WEIGHTS:
        mine, other = WEIGHTS[row]()
        return mine, other, torch.randn(128, 256)
    for name, body, shape, layer in NATIVE:
        if name == row:
            return compiled(body, shape), layer(), torch.randn(*shape)
    _, body, shape, formula = next(r for r in COMPOSED if r[0] == row)
    module = compiled(body, shape)
    return module, lambda x: formula(x, module), torch.randn(*shape)


def measure(row: str, rounds: int) -> tuple[float, float]:
    """Median seconds of each, forward and backward."""
    mine, other, x = contenders(row)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-3, atol=1e-4)
    x.requires_grad_()
    back = torch.randn_like(mine(x))
    found: tuple[list[float], list[float]] = ([], [])
    order = [0, 1]
    for k in range(rounds + 10):
        random.shuffle(order)
        for which in order:
            x.grad = None
            start = time.process_time()
            (mine, other)[which](x).backward(back)
            seconds = time.process_time() - start
            if k >= 10:
                found[which].append(seconds)
    return statistics.median(found[0]), statistics.median(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--here", action="store_true", help="one process, this one: the seconds of each as JSON")
    args = parser.parse_args()
    if args.here:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        print(json.dumps([measure(row, args.rounds) for row in args.only]))
        return
    print(f"{'norm':24} {'generated':>10} {'other':>10} {'other / generated':>18} {'range':>12}")
    for row in args.only:
        command = [sys.executable, __file__, "--here", "--rounds", str(args.rounds), "--only", row]
        runs = [
            json.loads(subprocess.run(command, env=os.environ | MALLOC, check=True, capture_output=True).stdout)[0]
            for _ in range(args.processes)
        ]
        a, b = (1e3 * statistics.median(r[k] for r in runs) for k in (0, 1))
        ratios = sorted(r[1] / r[0] for r in runs)
        span = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
        print(f"{row:24} {a:8.2f}ms {b:8.2f}ms {statistics.median(ratios):17.2f}x {span:>12}  {ROWS[row]}", flush=True)


if __name__ == "__main__":
    main()
