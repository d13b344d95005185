"""Pictures of training: learning curves and samples beside data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.files import replace_file

DATA, SAMPLES = "#33659b", "#c2513c"
POINTS = 2000  # in one scatter


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


def write(fig: Any, path: str | Path) -> None:
    blob = io.BytesIO()
    fig.savefig(blob, format="png")
    replace_file(Path(path), blob.getvalue())


def plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def learning_curve(history: Sequence[dict[str, float]], path: str | Path, unit: str = "nats for each sample") -> None:
    """Training and held-out loss over epochs, scaled to what happens after the first steps."""
    fig = figure(6, 3.6)
    ax = fig.subplots()
    shown = [h for h in history if np.isfinite(h["validation"])]
    epochs = [h["epoch"] for h in shown]
    ax.plot(epochs, [h["train"] for h in shown], label="training", color=DATA, lw=1.3)
    ax.plot(epochs, [h["validation"] for h in shown], label="held out", color=SAMPLES, lw=1.3)
    if shown:
        best = min(shown, key=lambda h: h["validation"])
        ax.plot(best["epoch"], best["validation"], "o", ms=4, color=SAMPLES)
        ax.annotate(f"{best['validation']:.3f}", (best["epoch"], best["validation"]), xytext=(0, -13),
                    textcoords="offset points", ha="center", fontsize=8, color=SAMPLES)  # fmt: skip
        values = np.array([[h["train"], h["validation"]] for h in shown])
        tail = values[len(values) // 10 + 1 :] if len(values) > 3 else values
        tail = tail[np.isfinite(tail)]
        if tail.size:
            low, high = float(tail.min()), float(np.quantile(tail, 0.98))
            ax.set_ylim(low - 0.15 * (high - low + 1e-3), high + 0.15 * (high - low + 1e-3))
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"loss ({unit})" if unit else "loss")
    ax.legend(frameon=False, fontsize=8)
    plain(ax)
    write(fig, path)


def samples_plot(data: Any, samples: Any, path: str | Path, columns: Sequence[str] = (), across: int = 0) -> None:
    """Samples beside data, if there are any: a histogram, a scatter, all pairs of up to four coordinates, or images
    (`across` in a row)."""
    samples = np.asarray(samples)
    rows = [("data", np.asarray(data), DATA)] if data is not None else []
    rows.append(("samples", samples, SAMPLES))
    if samples.ndim > 2:
        image_grid(rows[-1][1], path, across)
        return
    reference = rows[0][1]
    k = min(samples.shape[1], 4)
    names = [columns[i] if i < len(columns) else f"x{i}" for i in range(k)]
    ranges = []
    for i in range(k):
        low, high = np.quantile(reference[np.isfinite(reference[:, i]), i], [0.002, 0.998])
        pad = 0.08 * (high - low) + 1e-9
        ranges.append((float(low - pad), float(high + pad)))
    if k == 1:
        histogram(rows, ranges[0], names[0], path)
        return
    pairs = [(i, j) for i in range(k) for j in range(i)]
    side = 3.2 if len(pairs) == 1 else 2.3
    fig = figure(side * len(pairs) + 0.4, side * len(rows) + 0.2)
    axes = np.asarray(fig.subplots(len(rows), len(pairs), squeeze=False))
    for row, (title, values, color) in enumerate(rows):
        for col, (i, j) in enumerate(pairs):
            ax = axes[row, col]
            ax.scatter(values[:POINTS, j], values[:POINTS, i], s=3, alpha=0.35, color=color, linewidths=0)
            ax.set_xlim(*ranges[j])
            ax.set_ylim(*ranges[i])
            ax.set_xlabel(names[j], fontsize=8)
            ax.set_ylabel(names[i], fontsize=8)
            plain(ax)
            ax.tick_params(labelsize=7)
            if len(pairs) == 1:
                ax.set_aspect("equal" if 0.3 < np.ptp(ranges[j]) / np.ptp(ranges[i]) < 3 else "auto")
            if col == 0:
                ax.set_title(title, fontsize=9, loc="left", color=color)
    write(fig, path)


def histogram(rows: Sequence[tuple[str, Any, str]], span: tuple[float, float], name: str, path: str | Path) -> None:
    fig = figure(5, 3.2)
    ax = fig.subplots()
    bins = np.linspace(*span, 60)
    for title, values, color in rows:
        filled = title == "data"
        ax.hist(values[:, 0], bins, density=True, alpha=0.45 if filled else 1.0,
                histtype="stepfilled" if filled else "step", label=title, color=color)  # fmt: skip
    ax.set_xlabel(name)
    ax.legend(frameon=False, fontsize=8)
    plain(ax)
    write(fig, path)


def image_grid(samples: Any, path: str | Path, columns: int = 0) -> None:
    """Images [n, C, H, W] or [n, H, W] in a grid: up to 64 in a square, or up to 12 rows of `columns`."""
    images = samples[: 12 * columns or 64]
    if images.ndim == 4:
        images = images.mean(axis=1) if images.shape[1] != 3 else np.moveaxis(images, 1, -1)
    if images.ndim != 3 and not (images.ndim == 4 and images.shape[-1] == 3):
        images = images.reshape(len(images), 1, -1)
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    fig = figure(5, 5 * rows / columns)
    axes = np.asarray(fig.subplots(rows, columns, squeeze=False)).reshape(-1)
    low, high = np.quantile(images[np.isfinite(images)], [0.01, 0.99])
    for ax in axes:
        ax.axis("off")
    for ax, image in zip(axes, images, strict=False):
        ax.imshow(np.clip((image - low) / (high - low + 1e-9), 0, 1), cmap="gray", vmin=0, vmax=1)
    write(fig, path)
