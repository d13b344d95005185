"""Paths as pictures: what of the data and of the noise they hold at each time, and how fast that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.elaborate.arithmetic import NotPlain
from flowlang.elaborate.paths import read_path

if TYPE_CHECKING:
    from flowlang.compiler import Compilation

TIMES = tuple(k / 100 for k in range(1, 100))


@dataclass(frozen=True)
class Levels:
    """α, σ and their rates at `TIMES`; of a path that draws they are the weights of x1 and x0."""

    name: str
    drawn: bool
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    alpha_rate: tuple[float, ...]
    sigma_rate: tuple[float, ...]


def levels(comp: Compilation, name: str) -> Levels:
    import sympy as sp

    from flowlang.analysis.paths import SymbolicPath, t

    found: Any = comp.module.names.get(name) or comp.elab.global_name(name)
    if getattr(found, "kind", "") != "path" or found.declaration.body is None:
        raise FlowError(
            Diagnostic("FL0804", f"no path `{name}` is declared here", suggestion="as in `--path cond_ot`; `flowlang std` lists them")
        )  # fmt: skip
    try:
        form = read_path(found.declaration)
    except NotPlain as stop:
        raise FlowError(
            Diagnostic("FL0804", f"`{name}` is no formula: {stop.what}", suggestion="`flowlang check` tells more")
        ) from None
    pair = None
    if form.weights is not None:
        pair = form.weights[1], form.weights[0]
    elif form.place is not None:
        pair = SymbolicPath(form.place, form.identities).affine
    if pair is None or any(e.atoms(sp.core.function.AppliedUndef) for e in pair):
        raise FlowError(
            Diagnostic("FL0804", f"`{name}` has no levels: they are of paths x_t = σ(t) x0 + α(t) x1", suggestion="`flowlang info` tells what is known of it")
        )  # fmt: skip

    def values(e: Any) -> tuple[float, ...]:
        f = sp.lambdify(t, e, "mpmath")
        return tuple(float(f(time)) for time in TIMES)

    return Levels(name, form.weights is not None, *map(values, (*pair, *(sp.diff(e, t) for e in pair))))


def plot(found: Sequence[Levels], path: str | Path) -> None:
    """Levels beside their rates: of x1 drawn through, of x0 dashed."""
    from flowlang.plots import figure, plain, write

    fig = figure(8.6, 3.6)
    left, right = fig.subplots(1, 2)
    colors = ["#33659b", "#c2513c", "#4f8a4c", "#8a5fa0", "#b08a2e", "#4a4a4a"]
    for k, p in enumerate(found):
        color = colors[k % len(colors)]
        for ax, one, two in ((left, p.alpha, p.sigma), (right, p.alpha_rate, p.sigma_rate)):
            ax.plot(TIMES, one, "-", lw=1.3, color=color, label=p.name if ax is left else None)
            ax.plot(TIMES, two, "--", lw=1.1, color=color)
    left.set_title("of x1, and of x0 (dashed)", fontsize=10)
    right.set_title("how fast that changes", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    for ax in (left, right):
        ax.set_xlabel("t", fontsize=9)
        plain(ax)
    write(fig, path)
