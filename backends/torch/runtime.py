"""What generated modules call: parametrisations, splines, solvers, and the face of a flow.

`flowlang build` copies this text into the standalone file, so it imports torch and nothing else.
Values are laid out `[*batch, *axes]`; all dims below are negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- starts of parameters -----------------------------------------------------------------------


def initial(shape: Sequence[int], kind: str | float, *args: float) -> Tensor:
    """A start of a parameter: a number, or random by name (torch's global generator)."""
    if not isinstance(kind, str):
        return torch.full(tuple(shape), float(kind))
    t = torch.empty(tuple(shape))
    fan = max(math.prod(shape[1:]), 1)
    if kind == "uniform":
        return t.uniform_(args[0], args[1])
    if kind == "normal":
        return t.normal_(args[0], args[1])
    if kind == "unit_normal":
        t.normal_()
        return t / t.norm().clamp_min(1e-12)
    if kind == "kaiming_uniform":
        return t.uniform_(-math.sqrt(3 / fan), math.sqrt(3 / fan))
    if kind in ("kaiming_normal", "lecun_normal"):
        return t.normal_(0, math.sqrt((2 if kind == "kaiming_normal" else 1) / fan))
    if kind == "xavier_uniform":
        bound = math.sqrt(6 / (fan + shape[0]))
        return t.uniform_(-bound, bound)
    raise ValueError(kind)


def initial_values(data: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """A start from a list of numbers."""
    return torch.tensor(data, dtype=torch.get_default_dtype()).reshape(tuple(shape))


# ---- parameters in a domain ---------------------------------------------------------------------

SOFT_BOUND = 6.0


def soft_bound(x: Tensor, bound: float) -> Tensor:
    """x for small x, never beyond ±bound: keeps scales finite whatever training does."""
    return bound * torch.tanh(x / bound)


class Positive(nn.Module):
    """A positive parameter: exp of a softly bounded number."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.raw = nn.Parameter(SOFT_BOUND * torch.atanh(torch.log(value).clamp(-5.9, 5.9) / SOFT_BOUND))

    def forward(self) -> Tensor:
        return torch.exp(soft_bound(self.raw, SOFT_BOUND))


class Interval(nn.Module):
    """A parameter strictly between lo and hi."""

    def __init__(self, value: Tensor, lo: float, hi: float):
        super().__init__()
        self.lo, self.hi = lo, hi
        p = ((value - lo) / (hi - lo)).clamp(1e-4, 1 - 1e-4)
        self.raw = nn.Parameter(torch.log(p) - torch.log1p(-p))

    def forward(self) -> Tensor:
        return self.lo + (self.hi - self.lo) * torch.sigmoid(soft_bound(self.raw, 12.0))


class Simplex(nn.Module):
    """Positive weights that sum to 1 along the last axis."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(tuple(shape)))

    def forward(self) -> Tensor:
        return torch.softmax(self.raw, -1)


class Sphere(nn.Module):
    """A unit vector along the last axis."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.raw = nn.Parameter(torch.randn(tuple(shape)))

    def forward(self) -> Tensor:
        return self.raw / torch.linalg.vector_norm(self.raw, dim=-1, keepdim=True).clamp_min(1e-12)


class ZeroMean(nn.Module):
    """A parameter whose mean along one axis is 0."""

    def __init__(self, value: Tensor, dim: int):
        super().__init__()
        self.dim = dim
        self.raw = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.raw - self.raw.mean(self.dim, keepdim=True)


def orthogonal_start(shape: Sequence[int]) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(tuple(shape), dtype=torch.float64))
    return (q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)).to(torch.get_default_dtype())


def solve_rows(matrix: Tensor, y: Tensor, *, upper: bool, unit: bool, transposed: bool) -> Tensor:
    """x with M x = y along the last axis of y (Mᵀ x = y when transposed), M triangular."""
    if transposed:
        matrix, upper = matrix.mT, not upper
    return torch.linalg.solve_triangular(matrix, y.unsqueeze(-1), upper=upper, unitriangular=unit).squeeze(-1)


class PluMatrix(nn.Module):
    """An invertible matrix P·L·U with a fixed permutation and a diagonal that cannot vanish (Glow, eq. 10)."""

    perm: Tensor
    sign: Tensor

    def __init__(self, shape: Sequence[int], identity: bool = False):
        super().__init__()
        n = shape[-1]
        w = torch.eye(n).expand(tuple(shape)) if identity else orthogonal_start(shape)
        p, lower, upper = torch.linalg.lu(w.to(torch.float64))
        diagonal = torch.diagonal(upper, dim1=-2, dim2=-1)
        dtype = torch.get_default_dtype()
        self.register_buffer("perm", p.to(dtype))
        self.register_buffer("sign", torch.sign(diagonal).to(dtype))
        self.lower = nn.Parameter(torch.tril(lower, -1).to(dtype))
        self.upper = nn.Parameter(torch.triu(upper, 1).to(dtype))
        size = SOFT_BOUND * torch.atanh(torch.log(diagonal.abs().clamp_min(1e-3)).clamp(-5.9, 5.9) / SOFT_BOUND)
        self.log_diagonal = nn.Parameter(size.to(dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        n = self.lower.shape[-1]
        eye = torch.eye(n, dtype=self.lower.dtype, device=self.lower.device)
        diagonal = self.sign * torch.exp(soft_bound(self.log_diagonal, SOFT_BOUND))
        return torch.tril(self.lower, -1) + eye, torch.triu(self.upper, 1) + torch.diag_embed(diagonal)

    def forward(self) -> Tensor:
        lower, upper = self.factors()
        return self.perm @ lower @ upper

    def solve(self, y: Tensor, transposed: bool = False) -> Tensor:
        lower, upper = self.factors()
        if transposed:
            x = solve_rows(upper, y, upper=True, unit=False, transposed=True)
            x = solve_rows(lower, x, upper=False, unit=True, transposed=True)
            return (self.perm @ x.unsqueeze(-1)).squeeze(-1)
        x = (self.perm.mT @ y.unsqueeze(-1)).squeeze(-1)
        x = solve_rows(lower, x, upper=False, unit=True, transposed=False)
        return solve_rows(upper, x, upper=True, unit=False, transposed=False)

    def log_det(self) -> Tensor:
        return soft_bound(self.log_diagonal, SOFT_BOUND).sum(-1)


class DenseMatrix(nn.Module):
    """An invertible matrix stored as such; its determinant is a factorisation."""

    def __init__(self, shape: Sequence[int], identity: bool = False):
        super().__init__()
        w = torch.eye(shape[-1]).expand(tuple(shape)).clone() if identity else orthogonal_start(shape)
        self.matrix = nn.Parameter(w)

    def forward(self) -> Tensor:
        return self.matrix

    def solve(self, y: Tensor, transposed: bool = False) -> Tensor:
        m = self.matrix.mT if transposed else self.matrix
        return torch.linalg.solve(m, y.unsqueeze(-1)).squeeze(-1)

    def log_det(self) -> Tensor:
        return torch.linalg.slogdet(self.matrix)[1]


class Rotation(nn.Module):
    """An orthogonal matrix as a product of Householder reflections; the first `columns` of it for Stiefel."""

    def __init__(self, shape: Sequence[int], columns: int | None = None):
        super().__init__()
        n = shape[-2]
        self.columns = columns
        self.vectors = nn.Parameter(torch.randn(*shape[:-2], n, n))

    def forward(self) -> Tensor:
        n = self.vectors.shape[-1]
        v = self.vectors / torch.linalg.vector_norm(self.vectors, dim=-1, keepdim=True).clamp_min(1e-12)
        q = torch.eye(n, dtype=v.dtype, device=v.device)
        for k in range(n):
            u = v[..., k, :]
            q = q - 2 * u.unsqueeze(-1) * (u.unsqueeze(-2) @ q)
        return q if self.columns is None else q[..., : self.columns]

    def solve(self, y: Tensor, transposed: bool = False) -> Tensor:
        q = self()
        return ((q if transposed else q.mT) @ y.unsqueeze(-1)).squeeze(-1)

    def log_det(self) -> Tensor:
        return self.vectors.new_zeros(self.vectors.shape[:-2])


class Cayley(nn.Module):
    """An orthogonal matrix (I - A)(I + A)⁻¹ of a skew-symmetric A."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.raw = nn.Parameter(0.1 * torch.randn(tuple(shape)))

    def forward(self) -> Tensor:
        skew = torch.tril(self.raw, -1)
        skew = skew - skew.mT
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(eye + skew, eye - skew)

    def solve(self, y: Tensor, transposed: bool = False) -> Tensor:
        q = self()
        return ((q if transposed else q.mT) @ y.unsqueeze(-1)).squeeze(-1)

    def log_det(self) -> Tensor:
        return self.raw.new_zeros(self.raw.shape[:-2])


class LowerMatrix(nn.Module):
    """A lower-triangular matrix with a positive diagonal (or a diagonal of ones)."""

    def __init__(self, shape: Sequence[int], unit: bool = False):
        super().__init__()
        self.unit = unit
        self.lower = nn.Parameter(torch.zeros(tuple(shape)))
        if not unit:
            self.log_diagonal = nn.Parameter(torch.zeros(*shape[:-2], shape[-1]))

    def diagonal(self) -> Tensor:
        if self.unit:
            return torch.ones(self.lower.shape[-1], dtype=self.lower.dtype, device=self.lower.device)
        return torch.exp(soft_bound(self.log_diagonal, SOFT_BOUND))

    def forward(self) -> Tensor:
        return torch.tril(self.lower, -1) + torch.diag_embed(self.diagonal())

    def solve(self, y: Tensor, transposed: bool = False) -> Tensor:
        return solve_rows(self(), y, upper=False, unit=self.unit, transposed=transposed)

    def log_det(self) -> Tensor:
        if self.unit:
            return self.lower.new_zeros(self.lower.shape[:-2])
        return soft_bound(self.log_diagonal, SOFT_BOUND).sum(-1)


class SpdMatrix(nn.Module):
    """A symmetric positive-definite matrix L·Lᵀ."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.factor = LowerMatrix(shape)

    def forward(self) -> Tensor:
        lower = self.factor()
        return lower @ lower.mT

    def solve(self, y: Tensor, transposed: bool = False) -> Tensor:
        return self.factor.solve(self.factor.solve(y), transposed=True)

    def log_det(self) -> Tensor:
        return 2 * self.factor.log_det()


def norm_bounded(weight: Tensor, bound: float, inputs: int) -> Tensor:
    """The weight scaled so that its spectral norm, the last `inputs` axes against the others, is at most `bound`."""
    rows = math.prod(weight.shape[: weight.dim() - inputs])
    norm = torch.linalg.matrix_norm(weight.reshape(rows, -1), ord=2)
    return weight * (bound / torch.clamp_min(norm, bound))


def degree_mask(rows: Sequence[int], cols: Sequence[int], strict: bool) -> Tensor:
    """1 where a row's degree is at least (strictly: above) a column's (MADE, Germain et al. 2015)."""
    r, c = torch.tensor(rows).unsqueeze(1), torch.tensor(cols).unsqueeze(0)
    return ((r > c) if strict else (r >= c)).to(torch.get_default_dtype())


# ---- elementwise --------------------------------------------------------------------------------


def softplus_inverse(y: Tensor) -> Tensor:
    """log(exp(y) - 1), stable; NaN for y <= 0."""
    return y + torch.log(-torch.expm1(-y))


def log_cosh(x: Tensor) -> Tensor:
    a = x.abs()
    return a + F.softplus(-2 * a) - math.log(2)


def log_tanh_slope(x: Tensor) -> Tensor:
    """log(1 - tanh²x), from x."""
    return -2 * log_cosh(x)


def tanh_slope(x: Tensor) -> Tensor:
    return torch.exp(-2 * log_cosh(x))


def sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def log_sigmoid_slope(x: Tensor) -> Tensor:
    return -F.softplus(x) - F.softplus(-x)


def log_abs(x: Tensor) -> Tensor:
    return torch.log(torch.abs(x))


def log_bessel_i0e(x: Tensor) -> Tensor:
    """log(exp(-x)·I0(x)) for x >= 0."""
    return torch.log(torch.special.i0e(x))


def rotate(x: Tensor, by: Tensor | float) -> Tensor:
    """The angle x turned by `by`, in [-π, π)."""
    top = math.pi if x.dtype == torch.float64 else 3.1415925  # the largest number below π
    return (torch.remainder(x + by + math.pi, 2 * math.pi) - math.pi).clamp(-top, top - torch.finfo(x.dtype).eps)


def safe_pow(x: Tensor, e: float) -> Tensor:
    return torch.pow(x, e)


# ---- structure ----------------------------------------------------------------------------------


def broadcast(parts: Sequence[Tensor], event: int) -> list[Tensor]:
    """Parts with their leading (batch) dims expanded to a common shape; the last `event` dims stay."""
    batch = torch.broadcast_shapes(*(p.shape[: p.dim() - event] for p in parts))
    return [p.expand(*batch, *p.shape[p.dim() - event :]) for p in parts]


def broadcast_cat(parts: Sequence[Tensor], dim: int, event: int) -> Tensor:
    return torch.cat(broadcast(parts, event), dim)


def broadcast_stack(parts: Sequence[Tensor], dim: int, event: int) -> Tensor:
    return torch.stack(broadcast(parts, event), dim)


def shift_along(x: Tensor, k: int, dim: int) -> Tensor:
    """x[t - k] at t, zeros where there is none."""
    n = x.shape[dim]
    k = max(min(k, n), -n)
    if k == 0:
        return x
    zeros = torch.zeros_like(x.narrow(dim, 0, abs(k)))
    if k > 0:
        return torch.cat((zeros, x.narrow(dim, 0, n - k)), dim)
    return torch.cat((x.narrow(dim, -k, n + k), zeros), dim)


def take_along(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """x at an index along `dim`; the index's axes come in front of x's other axes."""
    return torch.movedim(x, dim, 0)[index.long()]


def cumsum_along(x: Tensor, dim: int, exclusive: bool, reverse: bool) -> Tensor:
    if reverse:
        x = x.flip(dim)
    y = torch.cumsum(x, dim)
    if exclusive:
        y = y - x
    return y.flip(dim) if reverse else y


def causal_softmax(x: Tensor, dim: int, query: int, log: bool = False) -> Tensor:
    """Softmax along `dim` over the entries up to the query's index."""
    n = x.shape[dim]
    i = torch.arange(n, device=x.device)
    shape_q = [1] * x.dim()
    shape_k = [1] * x.dim()
    shape_q[query], shape_k[dim] = n, n
    hidden = i.view(shape_k) > i.view(shape_q)
    x = x.masked_fill(hidden, -math.inf)
    return torch.log_softmax(x, dim) if log else torch.softmax(x, dim)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, dilation: int) -> Tensor:
    """Convolution over the last two dims with any number of batch dims; zeros keep the size (before striding)."""
    kh, kw = ((weight.shape[k] - 1) * dilation for k in (-2, -1))
    padded = F.pad(x.reshape(-1, *x.shape[-3:]), (kw // 2, kw - kw // 2, kh // 2, kh - kh // 2))
    y = F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
    return y.reshape(*x.shape[:-3], *y.shape[-3:])


# ---- monotone splines ---------------------------------------------------------------------------

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


# ---- solvers ------------------------------------------------------------------------------------


def bracket_solve(
    f: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor, lo: float, hi: float, increasing: bool
) -> Tensor:
    """x in (lo, hi) with f(x) = y for each entry; f gives its value and slope and is strictly monotone.

    Safeguarded Newton inside a bracket, without gradient; one Newton step at the end carries the
    implicit gradient.
    """

    def place(t: Tensor) -> tuple[Tensor, Tensor]:
        """The real line onto (lo, hi), with its slope."""
        if lo > -math.inf and hi < math.inf:
            p = torch.sigmoid(t)
            return lo + (hi - lo) * p, (hi - lo) * p * (1 - p)
        if lo > -math.inf:
            return lo + F.softplus(t), torch.sigmoid(t)
        if hi < math.inf:
            return hi - F.softplus(-t), torch.sigmoid(-t)
        return t, torch.ones_like(t)

    with torch.no_grad():
        goal = y.detach()
        sign = 1.0 if increasing else -1.0
        wide = lo > -math.inf and hi < math.inf
        a, b = torch.full_like(goal, -1.0), torch.full_like(goal, 1.0)
        eager = not torch.compiler.is_compiling()
        for _ in range(6 if wide else 20):
            high = sign * (f(place(a)[0])[0] - goal) > 0
            low = sign * (f(place(b)[0])[0] - goal) < 0
            if eager and not bool((high | low).any()):
                break
            a, b = torch.where(high, a * 4, torch.where(low, b, a)), torch.where(low, b * 4, torch.where(high, a, b))
        t = (a + b) / 2
        rounds = 80 if y.dtype == torch.float64 else 48
        for k in range(rounds):
            x, dx = place(t)
            value, slope = f(x)
            error = sign * (value - goal)
            a, b = torch.where(error <= 0, t, a), torch.where(error >= 0, t, b)
            newton = t - sign * error / (slope * dx)
            middle = (a + b) / 2
            good = (newton > a) & (newton < b) if k % 4 != 3 else torch.zeros_like(newton, dtype=torch.bool)
            new = torch.where(good, newton, middle)
            done = (new - t).abs() <= torch.finfo(y.dtype).eps * (1 + t.abs())
            t = new
            if eager and k % 4 != 3 and bool((done | ~torch.isfinite(goal)).all()):
                break
        x = place(t)[0]
        x = torch.where(torch.isnan(goal), goal, x)
    value, slope = f(x)
    step = (value - y) / slope.detach()
    return x - torch.where(torch.isfinite(step) | torch.isnan(y), step, torch.zeros_like(step))


def scan_solve(step: Callable[[Tensor], Tensor], like: Tensor, dim: int, reverse: bool, placeholder: float) -> Tensor:
    """Solves slice after slice along `dim`: in each round `step` is right at the next slice."""
    n = like.shape[dim]
    shape = [1] * like.dim()
    shape[dim] = n
    index = torch.arange(n, device=like.device).view(shape)
    u = torch.full_like(like, placeholder)
    for t in range(n - 1, -1, -1) if reverse else range(n):
        u = torch.where(index == t, step(u), u)
    return u


def fixed_point_solve(g: Callable[[Tensor], Tensor], y: Tensor, constant: float) -> Tensor:
    """x with x + g(x) = y for a contraction g; the gradient comes from the same iteration backwards."""
    eps = torch.finfo(y.dtype).eps
    rounds = min(math.ceil(math.log(eps) / math.log(max(constant, 1e-3))) + 2, 2000)
    with torch.no_grad():
        x = y.detach()
        for _ in range(rounds):
            new = y - g(x)
            moved = (new - x).abs().max() if x.numel() else x.new_zeros(())
            x = new
            if not torch.compiler.is_compiling() and not bool(moved > eps * (1 + x.abs().max())):
                break
    if not torch.is_grad_enabled():
        return x
    x = x.detach().requires_grad_()
    g_x = g(x)
    out = y - g_x
    if not out.requires_grad:
        return out.detach()

    def back(grad: Tensor) -> Tensor:
        """Solves v = grad - Jᵀv."""
        v = grad
        for _ in range(rounds):
            (jv,) = torch.autograd.grad(g_x, x, v, retain_graph=True)
            new = grad - jv
            small = (new - v).abs().max() <= eps * (1 + v.abs().max())
            v = new
            if bool(small):
                break
        return v

    out.register_hook(back)
    return out


def estimate_log_det(
    g: Callable[[Tensor], Tensor], x: Tensor, event: int, constant: float, generator: torch.Generator | None = None
) -> Tensor:
    """Unbiased log|det(I + dg/dx)| for each sample: power series, random length, Hutchinson's trace.

    Chen et al. 2019 (Residual Flows), eq. 6: the first terms always, the rest with weights 1/P(N >= k).
    """
    exact, p = 10, 0.5
    extra = 0
    while float(torch.rand((), generator=generator)) > p and extra < 60:
        extra += 1
    dims = tuple(range(-event, 0))
    with torch.enable_grad():
        inner = x if x.requires_grad else x.detach().requires_grad_()
        value = g(inner)
        v = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        w = v
        total = x.new_zeros(x.shape[: x.dim() - event])
        keep = torch.is_grad_enabled()
        for k in range(1, exact + extra + 1):
            (w,) = torch.autograd.grad(value, inner, w, create_graph=keep, retain_graph=True)
            weight = 1.0 if k <= exact else (1 - p) ** -(k - exact)
            total = total + (-1) ** (k + 1) / k * weight * (w * v).sum(dims)
    return total


# ---- noise --------------------------------------------------------------------------------------


def standard_noise(
    kind: str, shape: Sequence[int], like: Tensor, generator: torch.Generator | None, form: Any = None
) -> Tensor:
    """Standard noise of a kind, in the dtype and on the device of `like`; `form` is its shape parameter.

    `onehot` takes log weights along the last axis, `student_t` degrees of freedom, `von_mises` a concentration.
    """
    size = tuple(shape)
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "generator": generator}
    if kind == "normal":
        return torch.randn(size, **options)
    if kind == "von_mises":
        return von_mises_noise(size, torch.as_tensor(form, dtype=like.dtype, device=like.device), generator)
    u = torch.rand(size, **options)
    eps = torch.finfo(like.dtype).tiny
    if kind == "uniform":
        return u
    if kind == "exponential":
        return -torch.log1p(-u)
    if kind == "logistic":
        u = u.clamp(eps, 1 - torch.finfo(like.dtype).eps)
        return torch.log(u) - torch.log1p(-u)
    if kind == "laplace":
        w = 2 * u - 1
        return -torch.sign(w) * torch.log1p(-w.abs().clamp_max(1 - torch.finfo(like.dtype).eps))
    if kind == "student_t":
        # Bailey 1994: polar method in closed form.
        angle = 2 * math.pi * torch.rand(size, **options)
        nu = torch.as_tensor(form, dtype=like.dtype, device=like.device)
        r2 = nu * torch.expm1(-2 / nu * torch.log(u.clamp_min(eps)))
        return torch.sqrt(r2.clamp_min(0)) * torch.cos(angle)
    if kind == "onehot":
        # The Gumbel-max trick: the largest of log weight + Gumbel noise is a draw by weight.
        gumbel = -torch.log((-torch.log(u.clamp_min(eps))).clamp_min(eps))
        choice = (form.detach() + gumbel).argmax(-1, keepdim=True)
        return torch.zeros(size, dtype=like.dtype, device=like.device).scatter(-1, choice, 1.0)
    raise ValueError(kind)


def von_mises_noise(size: tuple[int, ...], concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    """Angles around 0 by the rejection method of Best & Fisher 1979, in float64; no gradient to the concentration.

    A round accepts with probability of at least 0.65, so that 40 rounds leave none in 10^18.
    """
    k = concentration.detach().to(torch.float64).expand(size)
    root = torch.sqrt(1 + 4 * k * k) + 1
    rho = (root - torch.sqrt(2 * root)) / (2 * k)
    # Near 0 the quotient loses its digits; r ~ 1/k there.
    r = torch.where(k < 1e-4, 1 / k + k, (1 + rho * rho) / (2 * rho).clamp_min(1e-300))
    angle, done = torch.zeros_like(k), torch.zeros_like(k, dtype=torch.bool)
    for _ in range(40):
        u = torch.rand(3, *size, dtype=torch.float64, device=k.device, generator=generator)
        z = torch.cos(math.pi * u[0])
        f = ((1 + r * z) / (r + z)).clamp(-1, 1)
        c = k * (r - f)
        good = (c * (2 - c) > u[1]) | (torch.log(c) - torch.log(u[1]) + 1 - c >= 0)
        angle = torch.where(done, angle, torch.sign(u[2] - 0.5) * torch.acos(f))
        done = done | good
        if not torch.compiler.is_compiling() and bool(done.all()):
            break
    return rotate(angle.to(concentration.dtype), 0.0)


# ---- the face of a flow -------------------------------------------------------------------------


class Flow(nn.Module):
    """A density model: data -> base. Any number of leading batch dimensions.

    `data_shape` is the shape of one sample, `given_shapes` those of the context inputs by name.
    """

    data_shape: tuple[int, ...] = ()
    base_shape: tuple[int, ...] = ()
    emitted_shapes: tuple[tuple[int, ...], ...] = ()
    given_shapes: dict[str, tuple[int, ...]] = {}  # noqa: RUF012
    _zero: Tensor

    def _program(self, name: str) -> Any:
        return getattr(self, f"_{name}")

    def _check(self, x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        if not isinstance(x, Tensor):
            x = torch.as_tensor(x)
        if tuple(x.shape[x.dim() - len(shape) :]) != shape or x.dim() < len(shape):
            raise ValueError(
                f"FL0702: `{name}` has shape {tuple(x.shape)}, and its last dimensions should be {shape}: one sample is {shape}"
            )
        if not torch.is_floating_point(x):
            x = x.to(self._zero.dtype)
        if x.dtype != self._zero.dtype:
            raise ValueError(
                f"FL0702: `{name}` is {x.dtype}, and the flow is {self._zero.dtype}: convert one of them, as by `.to({self._zero.dtype})`"
            )
        return x

    def _given(self, given: dict[str, Any], batch: torch.Size | tuple[int, ...]) -> list[Tensor]:
        unknown = sorted(set(given) - set(self.given_shapes))
        if unknown:
            raise ValueError(
                f"FL0702: `{unknown[0]}` is no context of this flow; it has {sorted(self.given_shapes) or 'none'}"
            )
        out = []
        for name, shape in self.given_shapes.items():
            if name not in given:
                raise ValueError(
                    f"FL0702: the context `{name}` of shape {shape} is missing: give it by name, as in `{name} = ...`"
                )
            c = self._check(given[name], shape, name)
            try:
                out.append(c.expand(*batch, *shape))
            except RuntimeError:
                raise ValueError(
                    f"FL0702: `{name}` has batch shape {tuple(c.shape[: c.dim() - len(shape)])}, which does not fit {tuple(batch)}"
                ) from None
        return out

    def _batch(self, x: Tensor, shape: tuple[int, ...]) -> torch.Size:
        return x.shape[: x.dim() - len(shape)]

    def forward(self, x: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        """z and log|det dz/dx|; parts that leave on the way stand between them."""
        x = self._check(x, self.data_shape, "x")
        return self._program("forward")(x, *self._given(given, self._batch(x, self.data_shape)))

    def inverse(self, z: Tensor, *parts: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        """x and log|det dx/dz| from the base's value and the parts that left."""
        z = self._check(z, self.base_shape, "z")
        if len(parts) != len(self.emitted_shapes):
            raise ValueError(
                f"FL0702: {len(self.emitted_shapes)} parts leave this flow on the way, and {len(parts)} were given"
            )
        return self._program("inverse")(z, *parts, *self._given(given, self._batch(z, self.base_shape)))

    def log_prob(self, x: Tensor, **given: Tensor) -> Tensor:
        """log p(x | given), for each sample, in nats."""
        x = self._check(x, self.data_shape, "x")
        return self._program("log_prob")(x, *self._given(given, self._batch(x, self.data_shape)))

    def rsample(self, shape: Any = (), generator: torch.Generator | None = None, **given: Tensor) -> Tensor:
        """Samples through which gradients flow. `shape` is the batch shape (a number or a tuple)."""
        batch = self._sample_batch(shape, given)
        return self._program("sample")(batch, *self._given(given, batch), generator=generator)

    @torch.no_grad()
    def sample(self, shape: Any = (), generator: torch.Generator | None = None, **given: Tensor) -> Tensor:
        """Samples of batch shape `shape`; with context, its batch shape is used when `shape` is ()."""
        return self.rsample(shape, generator, **given)

    def sample_and_log_prob(
        self, shape: Any = (), generator: torch.Generator | None = None, **given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reparametrised samples with their log-density, in one pass."""
        batch = self._sample_batch(shape, given)
        return self._program("sample_and_log_prob")(batch, *self._given(given, batch), generator=generator)

    def _sample_batch(self, shape: Any, given: dict[str, Any]) -> tuple[int, ...]:
        batch = (shape,) if isinstance(shape, int) else tuple(shape)
        if not batch and given:
            for name, own in self.given_shapes.items():
                if name in given:
                    c = given[name]
                    batch = torch.broadcast_shapes(batch, tuple(c.shape[: c.dim() - len(own)]))
        return tuple(batch)

    def to_distribution(self, **given: Tensor) -> torch.distributions.Distribution:
        """The flow, with its context fixed, as a torch distribution."""
        return FlowDistribution(self, given)


class FlowDistribution(torch.distributions.Distribution):
    """A flow with fixed context as `torch.distributions.Distribution`."""

    has_rsample = True
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, flow: Flow, given: dict[str, Tensor]):
        self.flow, self.given = flow, given
        batch = flow._sample_batch((), given)
        super().__init__(torch.Size(batch), torch.Size(flow.data_shape), validate_args=False)

    @property
    def support(self) -> Any:
        return torch.distributions.constraints.real

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flow.log_prob(value, **self.given)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.flow.rsample((*tuple(sample_shape), *self.batch_shape), **self.given)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)
