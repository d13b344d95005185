"""Monotone splines from their definitions, entry by entry: the reference for the ops of ir/ops/splines.py.

That file says what raw parameters mean; the curves here are written from it and from the papers, in the
units of the box [-B, B] and one number at a time, with nothing of the generated code's form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Curve = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> value and slope
Numbers = Mapping[str, float]


def knots(raw: Tensor, least: float, bound: float) -> Tensor:
    k = len(raw)
    share = least + (1 - least * k) * torch.exp(raw - torch.logsumexp(raw, 0))
    end = torch.full((1,), bound, dtype=raw.dtype)
    return torch.cat((-end, -bound + 2 * bound * torch.cumsum(share, 0)[:-1], end))


def bin_of(x: Tensor, edges: Tensor) -> int:
    return int(torch.clamp((x.detach() >= edges).sum() - 1, 0, len(edges) - 2))


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def rational(xs: Tensor, ys: Tensor, d: Tensor) -> Curve:
    """Durkan et al. 2019, Neural Spline Flows, eq. 4 and 5."""

    def curve(x: Tensor) -> tuple[Tensor, Tensor]:
        k = bin_of(x, xs)
        s = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])
        xi = (x - xs[k]) / (xs[k + 1] - xs[k])
        den = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
        y = ys[k] + (ys[k + 1] - ys[k]) * (s * xi**2 + d[k] * xi * (1 - xi)) / den
        return y, s**2 * (d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2) / den**2

    return curve


def slopes(raw: Tensor, least: float) -> Tensor:
    return least + softplus(raw + math.log(math.exp(1 - least) - 1))


def rqs(params: list[Tensor], n: Numbers) -> Curve:
    one = torch.ones(1, dtype=params[0].dtype)
    xs, ys = knots(params[0], n["min_width"], n["bound"]), knots(params[1], n["min_height"], n["bound"])
    return rational(xs, ys, torch.cat((one, slopes(params[2], n["min_slope"]), one)))


def rqs_circular(params: list[Tensor], n: Numbers) -> Curve:
    xs, ys = knots(params[0], n["min_width"], n["bound"]), knots(params[1], n["min_height"], n["bound"])
    d = slopes(params[2], n["min_slope"])
    return rational(xs, ys, torch.cat((d, d[:1])))


def linear_spline(params: list[Tensor], n: Numbers) -> Curve:
    ys = knots(params[0], n["min_height"], n["bound"])
    xs = torch.linspace(-n["bound"], n["bound"], len(ys), dtype=ys.dtype)

    def curve(x: Tensor) -> tuple[Tensor, Tensor]:
        k = bin_of(x, xs)
        slope = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])
        return ys[k] + slope * (x - xs[k]), slope

    return curve


def quadratic_spline(params: list[Tensor], n: Numbers) -> Curve:
    """The integral of a piecewise-linear density of mean 1 over the box (Müller et al. 2019, 4.2)."""
    xs = knots(params[0], n["min_width"], n["bound"])
    raw = 1e-3 + softplus(params[1])
    v = n["min_slope"] + (1 - n["min_slope"]) * raw / (torch.trapezoid(raw, xs) / (2 * n["bound"]))

    def curve(x: Tensor) -> tuple[Tensor, Tensor]:
        k = bin_of(x, xs)
        before = torch.trapezoid(v[: k + 1], xs[: k + 1]) if k else torch.zeros((), dtype=v.dtype)
        here = v[k] + (v[k + 1] - v[k]) * (x - xs[k]) / (xs[k + 1] - xs[k])
        return -n["bound"] + before + (x - xs[k]) * (v[k] + here) / 2, here

    return curve


def cubic_spline(params: list[Tensor], n: Numbers) -> Curve:
    """Hermite cubic whose slopes at the knots keep it monotone (Steffen 1990, as in Durkan et al. 2019)."""
    xs, ys = knots(params[0], n["min_width"], n["bound"]), knots(params[1], n["min_height"], n["bound"])
    w, s, least = xs.diff(), ys.diff() / xs.diff(), n["min_slope"]
    shift = math.log((1 / 3 - least) / (2 / 3 - least))  # raw 0 is the secant
    ends = 3 * (least + (1 - 2 * least) / (1 + torch.exp(-params[2] - shift)))
    d = [ends[0] * s[0]]
    for k in range(1, len(w)):
        p = (s[k - 1] * w[k] + s[k] * w[k - 1]) / (w[k - 1] + w[k])
        d.append(torch.stack((2 * s[k - 1], 2 * s[k], p)).min())
    d.append(ends[1] * s[-1])

    def curve(x: Tensor) -> tuple[Tensor, Tensor]:
        k = bin_of(x, xs)
        t, h = (x - xs[k]) / w[k], w[k]
        y = (
            (2 * t**3 - 3 * t**2 + 1) * ys[k] + (t**3 - 2 * t**2 + t) * h * d[k]
            + (3 * t**2 - 2 * t**3) * ys[k + 1] + (t**3 - t**2) * h * d[k + 1]
        )  # fmt: skip
        slope = 6 * (t - t**2) * s[k] + (3 * t**2 - 4 * t + 1) * d[k] + (3 * t**2 - 2 * t) * d[k + 1]
        return y, slope

    return curve


CURVES: dict[str, Callable[[list[Tensor], Numbers], Curve]] = {
    "rqs": rqs, "rqs_circular": rqs_circular, "linear_spline": linear_spline, "quadratic_spline": quadratic_spline,
    "cubic_spline": cubic_spline,
}  # fmt: skip


def each(kind: str, x: Tensor, params: list[Tensor], n: Numbers, read: Callable[[Curve, Tensor], Tensor]) -> Tensor:
    """Entry by entry: every entry of x has its own row of parameters."""
    wide = [p.expand(*x.shape, p.shape[-1]).reshape(-1, p.shape[-1]) for p in params]
    flat = x.reshape(-1)
    return torch.stack([read(CURVES[kind]([p[i] for p in wide], n), flat[i]) for i in range(len(flat))]).reshape(
        x.shape
    )


def inside(kind: str, v: Tensor, n: Numbers) -> bool:
    """The circle has no outside."""
    return kind == "rqs_circular" or abs(float(v.detach())) < n["bound"]


def spline(kind: str, x: Tensor, params: list[Tensor], n: Numbers) -> Tensor:
    return each(kind, x, params, n, lambda c, v: c(v)[0] if inside(kind, v, n) else v)


def spline_log_slope(kind: str, x: Tensor, params: list[Tensor], n: Numbers) -> Tensor:
    return each(kind, x, params, n, lambda c, v: torch.log(c(v)[1]) if inside(kind, v, n) else 0 * v)


def spline_inverse(kind: str, y: Tensor, params: list[Tensor], n: Numbers) -> Tensor:
    def bisect(c: Curve, v: Tensor) -> Tensor:
        if not inside(kind, v, n):
            return v
        lo, hi = torch.full_like(v, -n["bound"]), torch.full_like(v, n["bound"])
        for _ in range(100):
            middle = (lo + hi) / 2
            lo, hi = (middle, hi) if bool(c(middle)[0] < v) else (lo, middle)
        return (lo + hi) / 2

    return each(kind, y, params, n, bisect)
