"""The ways that samples take: what a solver passed between noise and data, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowlang.diagnostics import Diagnostic, FlowError

SHOWN = 200  # ways in one picture
FRAMES = 8  # of images


def followed(module: Any, draw: Callable[[], Any]) -> tuple[Any, Any]:
    """The times [n, steps + 1] and values [n, steps + 1, ..] of the integration that ends what `draw` does.

    Integrations that go on where the one before ended are one way. A model's values are in the units of the data, where
    they have its shape; a flow's are in the coordinates in which it integrates.
    """
    import torch

    from flowlang.backends.torch.runtime import record_paths
    from flowlang.backends.torch.standard import StandardisedModel

    with record_paths() as ways, torch.no_grad():
        draw()
    if not ways.runs:
        raise FlowError(
            Diagnostic("FL0804", "nothing is integrated here, so that there are no ways to show",
                       suggestion="choose a program that integrates, by --program")
        )  # fmt: skip
    chain = [ways.runs[-1]]
    for way in reversed(ways.runs[:-1]):
        ends, begins = way[-1][1], chain[0][0][1]
        if ends.shape == begins.shape and torch.equal(ends, begins):
            chain.insert(0, way)
    steps = [*chain[0], *(step for way in chain[1:] for step in way[1:])]
    n = steps[0][1].shape[0]
    values = torch.stack([x for _, x in steps], 1)
    times = torch.stack([torch.as_tensor(t, dtype=values.dtype).expand(n) for t, _ in steps], 1)
    if isinstance(module, StandardisedModel) and tuple(values.shape[2:]) == tuple(module.data_shape):
        values = values * module.scale + module.mean
    return times.double().numpy(), values.double().numpy()


def plot(times: Any, values: Any, path: str | Path, columns: Sequence[str] = ()) -> None:
    """Lines from the start (grey) to the end (red): over time for one number, in the plane for two, else in the planes
    of the first coordinates; of images, some at equal distances of time."""
    from flowlang.plots import DATA, SAMPLES, figure, plain, write

    times, values = times[:SHOWN], values[:SHOWN]
    if values.ndim > 3:
        frames(times, values, path)
        return
    values = values.reshape(*values.shape[:2], -1)
    own = len(columns) == values.shape[2]
    names = [columns[k] if own else f"x{k}" for k in range(values.shape[2])]
    if values.shape[2] == 1:
        fig = figure(5.5, 3.6)
        ax = fig.subplots()
        ax.plot(times.T, values[..., 0].T, color=DATA, lw=0.5, alpha=0.5)
        ax.set_xlabel("t")
        ax.set_ylabel(names[0])
        plain(ax)
        write(fig, path)
        return
    pairs = [(i, j) for i in range(min(values.shape[2], 3)) for j in range(i)]
    side = 4.6 if len(pairs) == 1 else 3.2
    fig = figure(side * len(pairs), side)
    for ax, (i, j) in zip(np.asarray(fig.subplots(1, len(pairs), squeeze=False))[0], pairs, strict=True):
        ax.plot(values[..., j].T, values[..., i].T, color=DATA, lw=0.6, alpha=0.4)
        ax.scatter(values[:, 0, j], values[:, 0, i], s=4, color="#8a8a8a", linewidths=0, zorder=3)
        ax.scatter(values[:, -1, j], values[:, -1, i], s=7, color=SAMPLES, linewidths=0, zorder=4)
        ax.set_xlabel(names[j], fontsize=8)
        ax.set_ylabel(names[i], fontsize=8)
        plain(ax)
        if len(pairs) == 1:
            ax.set_aspect("equal", adjustable="datalim")
    write(fig, path)


def frames(times: Any, values: Any, path: str | Path) -> None:
    """Eight images (rows) at eight times (columns)."""
    from flowlang.plots import image_grid

    rows = min(len(values), FRAMES)
    wanted = np.linspace(0, 1, FRAMES)
    shown = []
    for t, x in zip(times[:rows], values[:rows], strict=True):
        place = (t - t[0]) / (t[-1] - t[0])
        shown += [x[np.abs(place - w).argmin()] for w in wanted]
    image_grid(np.stack(shown), path, columns=FRAMES)


__all__ = ["followed", "plot"]
