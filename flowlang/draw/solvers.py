"""Solvers as pictures: where a step does not grow on x' = λx, and what accuracy costs on a field whose solution is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.analysis.solvers import stability
from flowlang.checks.jumps import Along, probabilities
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.elaborate.arithmetic import NotPlain
from flowlang.elaborate.jumps import is_jump
from flowlang.elaborate.tableaus import read_tableau, tableau_of

if TYPE_CHECKING:
    from flowlang.compiler import Compilation
    from flowlang.syntax import tree

STEPS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
# Turning and sinking, with a time in it: x' = (t - 1/2)·x + y, y' = -x + (t - 1/2)·y, from (1, 0) over [0, 2]; the solution is
# exp(t²/2 - t/2)·(cos t, -sin t). A solver that ignores t shows.
FIELD = """
net turning_(x: R[D = 2], t: R) -> R[D = 2] {{
  a = x[D = 0]
  b = x[D = 1]
  stack[D]((t - 1 / 2) * a + b, (t - 1 / 2) * b - a)
}}
net end_(x: R[D = 2]) {{ integrate(turning_, x, t = 0 -> 2, {solver}({how})) }}
"""
END = 2.0


@dataclass(frozen=True)
class Curve:
    """A solver's stability polynomials (None for a step rule), and (evaluations, error) for its steps or tolerances."""

    name: str
    stability: tuple[tuple[Fraction, ...], tuple[Fraction, ...]] | None
    work: tuple[tuple[int, float], ...]


def curve(comp: Compilation, name: str) -> Curve:
    found = comp.module.names.get(name) or comp.elab.global_name(name)
    declaration = getattr(found, "declaration", None)
    if declaration is None or getattr(found, "kind", "") != "solver":
        raise FlowError(
            Diagnostic("FL0804", f"there is no solver `{name}` here", suggestion="as in `--solver rk4`; `flowlang std` lists them")
        )  # fmt: skip
    if is_jump(declaration):
        return Curve(name, None, tuple((n, jump_error(declaration, n)) for n in STEPS))
    tableau = None if tableau_of(declaration) is None else read_tableau(declaration)
    polynomials = None if tableau is None else stability(tableau)
    adaptive = tableau is not None and tableau.embedded is not None and tableau.explicit
    hows = [f"rtol = {t}, atol = {t}" for t in TOLERANCES] if adaptive else [f"steps = {n}" for n in STEPS]
    return Curve(name, polynomials, tuple(measured(comp, name, how) for how in hows))


def measured(comp: Compilation, name: str, how: str) -> tuple[int, float]:
    import math

    import torch

    from flowlang.api import compile
    from flowlang.backends.torch.runtime import count_steps

    net = compile(comp.source.text + FIELD.format(solver=name, how=how), flow="end_", dtype=torch.float64)
    with torch.no_grad(), count_steps() as counts:
        found = net(torch.tensor([1.0, 0.0], dtype=torch.float64))
    scale = math.exp(END * END / 2 - END / 2)
    exact = torch.tensor([scale * math.cos(END), -scale * math.sin(END)], dtype=torch.float64)
    return counts.evaluations, float((found - exact).norm())


CHAIN = ((-0.7, 0.5, 0.2), (0.1, -0.4, 0.3), (0.6, 0.0, -0.6))  # rates of jumps, over [0, 2] from the first value


def jump_error(declaration: tree.Declaration, steps: int) -> float:
    """By how much the law at the end, of so many steps of a rule of jumps, misses the matrix exponential (total variation)."""
    import numpy as np
    from scipy.linalg import expm

    h = END / steps
    try:
        rows = [
            probabilities(declaration, Along(*(float(i == k) for i in range(3))), Along(*rates), h, 0.5).parts
            for k, rates in enumerate(CHAIN)
        ]
    except NotPlain as stop:
        raise FlowError(
            Diagnostic("FL0804", f"`{declaration.name}` is not drawn: {stop.what} is outside the arithmetic that is followed", stop.span,
                       suggestion="write the step with rate, x, t, h and arithmetic alone")
        ) from None  # fmt: skip
    law = np.linalg.matrix_power(np.array(rows, dtype=float), steps)[0]
    return float(abs(law - expm(END * np.array(CHAIN))[0]).sum() / 2)


def region(polynomials: tuple[Sequence[Fraction], Sequence[Fraction]], z: Any) -> Any:
    """|R(z)| on a grid of complex numbers."""
    import numpy as np

    top, bottom = (np.polyval([float(c) for c in reversed(p)], z) for p in polynomials)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(top / bottom)


def plot(curves: Sequence[Curve], path: str | Path) -> None:
    """The borders |R(z)| = 1 beside error against evaluations."""
    import numpy as np

    from flowlang.plots import figure, plain, write

    fig = figure(8.6, 3.8)
    left, right = fig.subplots(1, 2)
    colors = ["#33659b", "#c2513c", "#4f8a4c", "#8a5fa0", "#b08a2e", "#4a4a4a"]
    re, im = np.meshgrid(np.linspace(-6, 3, 361), np.linspace(-5, 5, 401))
    for k, c in enumerate(curves):
        color = colors[k % len(colors)]
        if c.stability is not None:
            size = region(c.stability, re + 1j * im)
            left.contour(re, im, size, levels=[1.0], colors=[color], linewidths=1.3)
            left.contourf(re, im, size, levels=[0.0, 1.0], colors=[color], alpha=0.12)
        shown = [(n, e) for n, e in c.work if np.isfinite(e) and e > 0]
        right.loglog([n for n, _ in shown], [e for _, e in shown], "-o", ms=3, lw=1.2, color=color, label=c.name)
    left.axhline(0, lw=0.5, color="#999999")
    left.axvline(0, lw=0.5, color="#999999")
    left.set_aspect("equal")
    left.set_xlabel("Re hλ", fontsize=9)
    left.set_ylabel("Im hλ", fontsize=9)
    left.set_title("a step does not grow", fontsize=10)
    right.set_xlabel("evaluations", fontsize=9)
    right.set_ylabel("error at the end", fontsize=9)
    right.set_title("work and precision", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for ax in (left, right):
        plain(ax)
    write(fig, path)
