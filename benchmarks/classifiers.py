"""Norms compared as classifiers of handwritten digits: the same networks, budget and seeds, with spread.

    python benchmarks/classifiers.py -o out/classifiers [--epochs 12] [--seeds 5]

Trains specs/classify/digits_conv.flow and digits_transformer.flow (scikit-learn's 1,797 digits; 1,000 to train on, the
rest held out) with each norm, by Adam with one learning rate for all. Writes `classifiers.md` (the table), `classifiers.json`
(every run) and `classifiers.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import flowlang as fl

SPECS = Path(__file__).parents[1] / "specs" / "classify"
CONV = {
    "none": "norm = no_norm", "batch norm": "norm = batch_norm", "layer norm (all)": "norm = channel_layer_norm",
    "group norm (4)": "norm = group_norm(4)", "instance norm": "norm = instance_norm",
    "batch-channel norm (4)": "norm = batch_channel_norm(4)", "EvoNorm-B0": "norm = evonorm_b0(act = false)",
    "EvoNorm-S0 (4)": "norm = evonorm_s0(4)", "PowerNorm": "norm = power_norm_v", "mean-only BN, weight norm":
    "norm = mean_only_batch_norm, weight = weight_norm", "weight norm": "norm = no_norm, weight = weight_norm",
    "WS, group norm (4)": "norm = group_norm(4), weight = weight_standardization",
    "scaled WS": "norm = no_norm, weight = scaled_weight_standardization", "spectral norm": "norm = no_norm, weight = spectral",
}  # fmt: skip
TRANSFORMER = {
    "none": "norm = no_norm", "layer norm": "norm = layer_norm", "RMSNorm": "norm = rms_norm",
    "partial RMSNorm (1/4)": "norm = partial_rms_norm(0.25)", "batch norm": "norm = batch_norm",
    "group norm (4)": "norm = group_norm(4)", "PowerNorm": "norm = power_norm_v", "group scaling": "norm = group_scaling",
    "channel norm (4)": "norm = channel_norm(4)", "batch-channel norm (4)": "norm = batch_channel_norm(4)",
    "layer norm, weight norm": "norm = layer_norm, weight = weight_norm",
    "layer norm, spectral norm": "norm = layer_norm, weight = spectral",
}  # fmt: skip


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [-1, 1] and labels: to train on, and held out (a fixed split)."""
    found = load_digits()
    x = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.as_tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    a, b = order[:1000], order[1000:]
    return x[a], y[a], x[b], y[b]


def run(spec: str, name: str, options: str, seed: int, epochs: int, lr: float, batch: int) -> dict[str, float]:
    """One training: held-out accuracy and loss at the end, and seconds for a step."""
    text = f"{(SPECS / f'{spec}.flow').read_text('utf-8')}\nmodel chosen = {spec}({options})\n"
    model: Any = fl.compile(text, flow="chosen", seed=seed)
    x, y, other, label = digits()
    opt = torch.optim.Adam(model.parameters(), lr)
    g = torch.Generator().manual_seed(seed)
    began, steps = time.perf_counter(), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(batch):
            opt.zero_grad()
            model.loss(x[rows], y[rows]).backward()
            opt.step()
            steps += 1
    seconds = (time.perf_counter() - began) / steps
    model.eval()
    with torch.no_grad():
        scores = model.scores(other)
        loss = F.cross_entropy(scores, label).item()
        accuracy = (scores.argmax(-1) == label).float().mean().item()
    return {"accuracy": accuracy, "loss": loss, "seconds": seconds}


def table(results: dict[str, dict[str, list[dict[str, float]]]], args: Any) -> str:
    lines = [
        f"{args.epochs} epochs of 1,000 digits in batches of {args.batch}, Adam at {args.lr:g}, {args.seeds} seeds; held out: 797.",
        "Mean ± standard deviation over seeds.", "",
    ]  # fmt: skip
    for spec, runs in results.items():
        lines += [f"## {spec}", "", "| norm | accuracy, % | loss | ms a step |", "|---|---|---|---|"]
        order = sorted(runs.items(), key=lambda kv: -statistics.mean(r["accuracy"] for r in kv[1]))
        for name, found in order:
            cells = []
            for key, factor, digits_ in (("accuracy", 100.0, 1), ("loss", 1.0, 3), ("seconds", 1000.0, 1)):
                values = [factor * r[key] for r in found]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.{digits_}f} ± {spread:.{digits_}f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[dict[str, float]]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, parts = plt.subplots(1, len(results), figsize=(6 * len(results), 5), layout="constrained")
    for part, (spec, runs) in zip(parts, results.items(), strict=True):
        order = sorted(runs, key=lambda n: statistics.mean(r["accuracy"] for r in runs[n]))
        for k, name in enumerate(order):
            values = [100 * r["accuracy"] for r in runs[name]]
            part.plot(values, [k] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
            part.plot(statistics.mean(values), k, "|", color="black", markersize=14)
        part.set_yticks(range(len(order)), order)
        part.set_xlabel("held-out accuracy, % (points: seeds; bar: mean)")
        part.set_title(spec)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/classifiers"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for spec, norms in (("digits_conv", CONV), ("digits_transformer", TRANSFORMER)):
        results[spec] = {name: [] for name in norms}
        for seed in range(args.seeds):  # seeds outside: a slow moment of the machine falls on every norm
            for name, options in norms.items():
                results[spec][name].append(run(spec, name, options, seed, args.epochs, args.lr, args.batch))
                print(f"{spec} {name} seed {seed}: {results[spec][name][-1]}", flush=True)
    (args.out / "classifiers.json").write_text(
        json.dumps({"options": {k: str(v) for k, v in vars(args).items()}, "runs": results}, indent=1)
    )
    (args.out / "classifiers.md").write_text(table(results, args))
    plot(results, args.out / "classifiers.png")
    print(table(results, args))


if __name__ == "__main__":
    main()
