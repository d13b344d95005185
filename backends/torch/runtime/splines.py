"""Monotone splines: each gives its value and the logarithm of its slope."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from flowlang.backends.torch.runtime.parameters import soft_bound
from torch import Tensor

LOGIT_BOUND = 8.0


def spline_knots(logits: Tensor, bound: float, least: float) -> tuple[Tensor, Tensor]:
    """Sizes and knots of bins on [-bound, bound]; every bin has at least the share `least`."""
    k = logits.shape[-1]
    sizes = least + (1 - least * k) * torch.softmax(soft_bound(logits, LOGIT_BOUND), -1)
    inner = torch.cumsum(sizes, -1)[..., :-1]
    edges = torch.cat((torch.zeros_like(sizes[..., :1]), inner, torch.ones_like(sizes[..., :1])), -1)
    knots = bound * (2 * edges - 1)
    return knots[..., 1:] - knots[..., :-1], knots


def find_bin(x: Tensor, knots: Tensor) -> Tensor:
    """The index of the bin that holds x (inside), along the last axis."""
    return (x.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1, keepdim=True)


def at_bin(table: Tensor, index: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(table.shape[:-1], index.shape[:-1])
    return torch.gather(table.expand(*shape, table.shape[-1]), -1, index.expand(*shape, 1)).squeeze(-1)


def rqs_table(widths: Tensor, heights: Tensor, slopes: Tensor, bound: float) -> tuple[Tensor, ...]:
    w, x_knots = spline_knots(widths, bound, 1e-3)
    h, y_knots = spline_knots(heights, bound, 1e-3)
    inner = 1e-3 + F.softplus(soft_bound(slopes, LOGIT_BOUND) + math.log(math.expm1(1 - 1e-3)))
    shape = torch.broadcast_shapes(w.shape[:-1], inner.shape[:-1])
    ones = torch.ones((*shape, 1), dtype=w.dtype, device=w.device)
    d = torch.cat((ones, inner.expand(*shape, inner.shape[-1]), ones), -1)
    return w, x_knots, h, y_knots, d


def rqs_slope(theta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    rest = 1 - theta
    den = s + (d1 + d0 - 2 * s) * theta * rest
    return 2 * torch.log(s) + torch.log(d1 * theta**2 + 2 * s * theta * rest + d0 * rest**2) - 2 * torch.log(den)


def rqs(x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    """Rational-quadratic spline and its log-slope (Durkan et al. 2019, eq. 4-5); the identity outside [-bound, bound]."""
    w, xk, h, yk, d = rqs_table(widths, heights, slopes, bound)
    inside = (x >= -bound) & (x <= bound)
    xc = x.clamp(-bound, bound)
    k = find_bin(xc, xk)
    w0, x0, h0, y0 = at_bin(w, k), at_bin(xk, k), at_bin(h, k), at_bin(yk, k)
    d0, d1, s = at_bin(d, k), at_bin(d, k + 1), h0 / w0
    theta = ((xc - x0) / w0).clamp(0, 1)
    den = s + (d1 + d0 - 2 * s) * theta * (1 - theta)
    y = y0 + h0 * (s * theta**2 + d0 * theta * (1 - theta)) / den
    return torch.where(inside, y, x), torch.where(inside, rqs_slope(theta, s, d0, d1), torch.zeros_like(y))


def rqs_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float = 3.0
) -> tuple[Tensor, Tensor]:
    """The inverse, and the log-slope of the forward map there (eq. 6-8, in the form without cancellation)."""
    w, xk, h, yk, d = rqs_table(widths, heights, slopes, bound)
    inside = (y >= -bound) & (y <= bound)
    yc = y.clamp(-bound, bound)
    k = find_bin(yc, yk)
    w0, x0, h0, y0 = at_bin(w, k), at_bin(xk, k), at_bin(h, k), at_bin(yk, k)
    d0, d1, s = at_bin(d, k), at_bin(d, k + 1), h0 / w0
    rise = (yc - y0).clamp_min(0)
    bend = rise * (d1 + d0 - 2 * s)
    a, b, c = h0 * (s - d0) + bend, h0 * d0 - bend, -s * rise
    root = torch.sqrt((b * b - 4 * a * c).clamp_min(torch.finfo(y.dtype).tiny))
    theta = (2 * c / (-b - root)).clamp(0, 1)
    x = x0 + theta * w0
    return torch.where(inside, x, y), torch.where(inside, rqs_slope(theta, s, d0, d1), torch.zeros_like(x))


def linear_spline(x: Tensor, heights: Tensor, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    """Piecewise-linear map with bins of equal width (Müller et al. 2019, section 4.1)."""
    h, yk = spline_knots(heights, bound, 1e-3)
    n = heights.shape[-1]
    width = 2 * bound / n
    inside = (x >= -bound) & (x <= bound)
    xc = x.clamp(-bound, bound)
    k = torch.floor((xc.detach() + bound) / width).nan_to_num(0).clamp(0, n - 1).long().unsqueeze(-1)
    slope = at_bin(h, k) / width
    y = at_bin(yk, k) + slope * (xc - (k.squeeze(-1) * width - bound))
    return torch.where(inside, y, x), torch.where(inside, torch.log(slope), torch.zeros_like(y))


def linear_spline_inverse(y: Tensor, heights: Tensor, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    h, yk = spline_knots(heights, bound, 1e-3)
    width = 2 * bound / heights.shape[-1]
    inside = (y >= -bound) & (y <= bound)
    yc = y.clamp(-bound, bound)
    k = find_bin(yc, yk)
    slope = at_bin(h, k) / width
    x = (k.squeeze(-1) * width - bound) + (yc - at_bin(yk, k)) / slope
    return torch.where(inside, x, y), torch.where(inside, torch.log(slope), torch.zeros_like(x))


def quadratic_table(widths: Tensor, heights: Tensor, bound: float) -> tuple[Tensor, ...]:
    w, xk = spline_knots(widths, bound, 1e-3)
    v = torch.exp(soft_bound(heights, LOGIT_BOUND)) + 1e-3
    area = ((v[..., 1:] + v[..., :-1]) * w).sum(-1, keepdim=True) / 2
    v = v * (2 * bound) / area
    steps = (v[..., 1:] + v[..., :-1]) * w / 2
    edges = torch.cumsum(steps, -1)[..., :-1] - bound
    end = torch.full_like(steps[..., :1], bound)
    return w, xk, v, torch.cat((-end, edges, end), -1)


def quadratic_spline(x: Tensor, widths: Tensor, heights: Tensor, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    """Piecewise-quadratic map (Müller et al. 2019, section 4.2)."""
    w, xk, v, yk = quadratic_table(widths, heights, bound)
    inside = (x >= -bound) & (x <= bound)
    xc = x.clamp(-bound, bound)
    k = find_bin(xc, xk)
    w0, v0, v1 = at_bin(w, k), at_bin(v, k), at_bin(v, k + 1)
    alpha = ((xc - at_bin(xk, k)) / w0).clamp(0, 1)
    y = at_bin(yk, k) + w0 * alpha * (v0 + (v1 - v0) * alpha / 2)
    slope = v0 + (v1 - v0) * alpha
    return torch.where(inside, y, x), torch.where(inside, torch.log(slope), torch.zeros_like(y))


def quadratic_spline_inverse(y: Tensor, widths: Tensor, heights: Tensor, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    w, xk, v, yk = quadratic_table(widths, heights, bound)
    inside = (y >= -bound) & (y <= bound)
    yc = y.clamp(-bound, bound)
    k = find_bin(yc, yk)
    w0, v0, v1 = at_bin(w, k), at_bin(v, k), at_bin(v, k + 1)
    rise = ((yc - at_bin(yk, k)) / w0).clamp_min(0)
    root = torch.sqrt((v0 * v0 + 2 * (v1 - v0) * rise).clamp_min(torch.finfo(y.dtype).tiny))
    alpha = (2 * rise / (v0 + root)).clamp(0, 1)
    x = at_bin(xk, k) + alpha * w0
    slope = v0 + (v1 - v0) * alpha
    return torch.where(inside, x, y), torch.where(inside, torch.log(slope), torch.zeros_like(x))


def cubic_table(widths: Tensor, heights: Tensor, ends: Tensor, bound: float) -> tuple[Tensor, ...]:
    """Knots and slopes there, monotone by Steffen's rule (Durkan et al. 2019, Cubic-Spline Flows)."""
    w, xk = spline_knots(widths, bound, 1e-3)
    h, yk = spline_knots(heights, bound, 1e-3)
    s = h / w
    mean = (s[..., :-1] * w[..., 1:] + s[..., 1:] * w[..., :-1]) / (w[..., 1:] + w[..., :-1])
    inner = torch.minimum(2 * torch.minimum(s[..., :-1], s[..., 1:]), mean)
    edge = 3 * torch.sigmoid(soft_bound(ends, LOGIT_BOUND) - math.log(2))
    d = torch.cat((edge[..., :1] * s[..., :1], inner, edge[..., 1:] * s[..., -1:]), -1)
    return w, xk, h, yk, d


def cubic_terms(k: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    w, xk, h, yk, d = table
    w0, h0 = at_bin(w, k), at_bin(h, k)
    d0, d1 = at_bin(d, k) * w0 / h0, at_bin(d, k + 1) * w0 / h0
    return w0, at_bin(xk, k), h0, at_bin(yk, k), d0, d1


def cubic_unit(t: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """The cubic from (0, 0) to (1, 1) with end slopes d0, d1: value and slope."""
    a, b = d0 + d1 - 2, 3 - 2 * d0 - d1
    return t * (d0 + t * (b + t * a)), d0 + t * (2 * b + 3 * a * t)


def cubic_spline(x: Tensor, widths: Tensor, heights: Tensor, ends: Tensor, bound: float = 3.0) -> tuple[Tensor, Tensor]:
    """Monotone piecewise-cubic map (Durkan et al. 2019, Cubic-Spline Flows)."""
    table = cubic_table(widths, heights, ends, bound)
    inside = (x >= -bound) & (x <= bound)
    xc = x.clamp(-bound, bound)
    w0, x0, h0, y0, d0, d1 = cubic_terms(find_bin(xc, table[1]), table)
    value, slope = cubic_unit(((xc - x0) / w0).clamp(0, 1), d0, d1)
    slope = slope.clamp_min(torch.finfo(x.dtype).eps) * h0 / w0
    return torch.where(inside, y0 + h0 * value, x), torch.where(inside, torch.log(slope), torch.zeros_like(x))


def cubic_spline_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, ends: Tensor, bound: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Bisection to the last digits, then one Newton step that carries the gradient."""
    table = cubic_table(widths, heights, ends, bound)
    inside = (y >= -bound) & (y <= bound)
    yc = y.clamp(-bound, bound)
    w0, x0, h0, y0, d0, d1 = cubic_terms(find_bin(yc, table[3]), table)
    goal = ((yc - y0) / h0).clamp(0, 1)
    with torch.no_grad():
        lo, hi = torch.zeros_like(goal), torch.ones_like(goal)
        for _ in range(54 if y.dtype == torch.float64 else 26):
            mid = (lo + hi) / 2
            below = cubic_unit(mid, d0, d1)[0] < goal
            lo, hi = torch.where(below, mid, lo), torch.where(below, hi, mid)
        t = (lo + hi) / 2
    value, slope = cubic_unit(t, d0, d1)
    slope = slope.clamp_min(torch.finfo(y.dtype).eps)
    t = (t - (value - goal) / slope.detach()).clamp(0, 1)
    slope = cubic_unit(t, d0, d1)[1].clamp_min(torch.finfo(y.dtype).eps) * h0 / w0
    return torch.where(inside, x0 + t * w0, y), torch.where(inside, torch.log(slope), torch.zeros_like(y))
