"""The variance of a network's values along its depth at initialisation: predicted beside measured, and their squared means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.analysis.signal import innermost, propagate
from flowlang.diagnostics import Diagnostic, FlowError

if TYPE_CHECKING:
    from flowlang.compiler import Compilation

SEEDS, BATCH, FAR = 5, 256, 100.0


@dataclass(frozen=True)
class Row:
    """A place along the network: predicted variance (None: not known), and what the seeds gave.

    `means` are the squares of the entries' means over the batch: what every sample has in common (Brock et al. 2021).
    """

    name: str
    predicted: float | None
    measured: tuple[float, ...]
    means: tuple[float, ...]

    @property
    def middle(self) -> float:
        return median(self.measured)

    @property
    def mean(self) -> float:
        return median(self.means)


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def signal(comp: Compilation, name: str, seeds: int = SEEDS, batch: int = BATCH) -> list[Row]:
    """Variances for standard normal inputs; each seed draws its own weights and inputs."""
    region = comp.regions[name]
    if region.kind not in ("net", "norm"):
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"`{name}` is a {region.kind}, and a signal goes through a net",
                suggestion="name a net by --flow",
            )
        )
    predicted = propagate(region)
    runs = [measure(comp, name, seed, batch) for seed in range(seeds)]
    names = [n for n, _, _ in runs[0]]
    fits = [p.name.split(".")[0] for p in predicted] == [n.split(".")[0] for n in names]
    return [
        Row(
            n,
            predicted[k].var if fits else predicted[-1].var if n == "result" else None,
            tuple(r[k][1] for r in runs),
            tuple(r[k][2] for r in runs),
        )
        for k, n in enumerate(names)
    ]


def moments(label: str, out: Any) -> tuple[str, float, float]:
    """The variance of a value, and the mean square of its entries' means over the batch, less what a finite batch adds."""
    first = (out[0] if isinstance(out, tuple) else out).detach().double()
    common = first.mean(0).square().mean() - first.var(0).mean() / len(first)
    return label, float(first.var()), max(float(common), 0.0)


def measure(comp: Compilation, name: str, seed: int, batch: int) -> list[tuple[str, float, float]]:
    """What the parts of one initialisation give, in the order in which they run."""
    import torch

    from flowlang.api import compile_from

    module = compile_from(comp, name, seed=seed)
    depth = 0
    region = comp.regions[name]
    while innermost(region) is not region and depth < 64:
        region = region.graph[region.outputs[0]].attrs["region"]
        depth += 1
    inside: Any = module
    for _ in range(depth):
        inside = next(iter(inside.children()))
    found: list[tuple[str, float, float]] = []

    def watch(label: str) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            found.append(moments(label, out))

        return hook

    for label, part in inside.named_children():
        parts = (
            [(f"{label}.{k}", p) for k, p in enumerate(part)]
            if isinstance(part, torch.nn.ModuleList)
            else [(label, part)]
        )
        for n, p in parts:
            p.register_forward_hook(watch(n))
    g = torch.Generator().manual_seed(1000 + seed)
    inputs = [torch.randn(batch, *shape, generator=g, dtype=module.like.dtype) for shape in module.inputs.values()]
    with torch.no_grad():
        out = module(*inputs)
    return [*found, moments("result", out)]


def verdict(rows: Sequence[Row]) -> str:
    """Whether the signal keeps its size."""
    first, last = rows[0].middle, rows[-1].middle
    if len(rows) < 3 or first <= 0:
        return ""
    rate = last / first
    if rate > FAR:
        return f"the signal grows {rate:.3g} times from `{rows[0].name}` to `{rows[-1].name}`: normalise, or scale the branches down"
    if rate < 1 / FAR:
        return f"the signal shrinks to {rate:.3g} of itself from `{rows[0].name}` to `{rows[-1].name}`: scale the starts up, or normalise"
    return ""


def plot(rows: Sequence[Row], title: str, path: str | Path) -> None:
    """Predicted and measured variance along the depth, on a logarithmic scale; the band spans the seeds."""
    from flowlang.plots import DATA, SAMPLES, figure, plain, write

    fig = figure(7, 3.6)
    ax = fig.subplots()
    at = list(range(len(rows)))
    ax.fill_between(at, [min(r.measured) for r in rows], [max(r.measured) for r in rows], color=DATA, alpha=0.25, lw=0)
    ax.plot(
        at, [r.middle for r in rows], "-o", ms=3, lw=1.2, color=DATA, label=f"measured, {len(rows[0].measured)} starts"
    )
    known = [(k, r.predicted) for k, r in enumerate(rows) if r.predicted is not None]
    if known:
        ax.plot([k for k, _ in known], [v for _, v in known], "x", ms=6, color=SAMPLES, label="closed form")
    if all(r.mean > 0 for r in rows):
        ax.plot(at, [r.mean for r in rows], ":", lw=1.2, color=DATA, label="squared mean of an entry")
    if all(v > 0 for r in rows for v in r.measured):
        ax.set_yscale("log")
    ax.set_xticks(at, [r.name for r in rows], rotation=60, ha="right", fontsize=7)
    ax.set_ylabel("variance", fontsize=9)
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    plain(ax)
    write(fig, path)
