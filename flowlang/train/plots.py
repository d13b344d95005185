"""Pictures of training: learning curves and samples beside data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowlang.diagnostics import Diagnostic, FlowError


def figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise FlowError(
            Diagnostic("FL0805", "plots need matplotlib", suggestion="pip install 'flowlang[plots]'")
        ) from None
    made = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(made)
    return made


def learning_curve(history: Sequence[dict[str, float]], path: str | Path) -> None:
    """Training and validation negative log-likelihood over epochs."""
    fig = figure(6, 3.6)
    ax = fig.subplots()
    epochs = [h["epoch"] for h in history]
    ax.plot(epochs, [h["train"] for h in history], label="training", color="#4477aa")
    ax.plot(epochs, [h["validation"] for h in history], label="validation", color="#ee6677")
    best = min(history, key=lambda h: h["validation"])
    ax.axvline(best["epoch"], color="#999999", lw=0.8, ls="--")
    ax.set_xlabel("epoch")
    ax.set_ylabel("negative log-likelihood (nats)")
    # The start may be far off; show what happens after it.
    tail = [h["validation"] for h in history[1:]] or [h["validation"] for h in history]
    low, high = min(tail), max(tail[: max(len(tail) // 2, 1)])
    ax.set_ylim(low - 0.08 * (high - low + 1e-6), high + 0.3 * (high - low + 1e-6))
    ax.legend(frameon=False)
    fig.savefig(path)


def samples_plot(data: Any, samples: Any, path: str | Path, columns: Sequence[str] = ()) -> None:
    """Data and samples: a scatter for two coordinates, pairs of the first four for more, a grid for images."""
    data, samples = np.asarray(data), np.asarray(samples)
    if data.ndim > 2:
        return image_grid(samples, path)
    k = min(data.shape[1], 4)
    names = [columns[i] if i < len(columns) else f"x{i}" for i in range(k)]
    ranges = [np.quantile(data[:, i], [0.002, 0.998]) for i in range(k)]
    ranges = [(a - 0.08 * (b - a + 1e-9), b + 0.08 * (b - a + 1e-9)) for a, b in ranges]
    pairs = [(i, j) for i in range(k) for j in range(i)] if k > 1 else []
    n = 2000
    if not pairs:
        fig = figure(5, 3.2)
        ax = fig.subplots()
        bins = np.linspace(float(ranges[0][0]), float(ranges[0][1]), 60)
        ax.hist(data[:, 0], bins, density=True, alpha=0.5, label="data", color="#4477aa")
        ax.hist(samples[:, 0], bins, density=True, histtype="step", label="samples", color="#ee6677")
        ax.set_xlabel(names[0])
        ax.legend(frameon=False)
        fig.savefig(path)
        return None
    fig = figure(2.6 * len(pairs) if len(pairs) <= 3 else 2.2 * len(pairs), 5.2)
    axes = np.asarray(fig.subplots(2, len(pairs), squeeze=False))
    for row, (title, values, color) in enumerate((("data", data, "#4477aa"), ("samples", samples, "#ee6677"))):
        for col, (i, j) in enumerate(pairs):
            ax = axes[row, col]
            ax.scatter(values[:n, j], values[:n, i], s=2, alpha=0.35, color=color, linewidths=0)
            ax.set_xlim(*ranges[j])
            ax.set_ylim(*ranges[i])
            ax.set_xlabel(names[j], fontsize=8)
            ax.set_ylabel(names[i], fontsize=8)
            ax.tick_params(labelsize=7)
            if col == 0:
                ax.set_title(title, fontsize=9, loc="left")
    fig.savefig(path)
    return None


def image_grid(samples: Any, path: str | Path) -> None:
    """Up to 64 images in a grid."""
    images = samples[:64]
    if images.ndim == 4:
        images = images.mean(axis=1) if images.shape[1] != 3 else np.moveaxis(images, 1, -1)
    side = int(np.ceil(np.sqrt(len(images))))
    fig = figure(5, 5)
    axes = np.asarray(fig.subplots(side, side, squeeze=False)).reshape(-1)
    low, high = np.quantile(images, [0.01, 0.99])
    for ax in axes:
        ax.axis("off")
    for ax, image in zip(axes, images, strict=False):
        ax.imshow(np.clip((image - low) / (high - low + 1e-9), 0, 1), cmap="gray")
    fig.savefig(path)
