"""Starts of parameters, and parameters that stay in a domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# ---- starts of parameters -----------------------------------------------------------------------


def initial(shape: Sequence[int], kind: str | float, *args: float) -> Tensor:
    """A start of a parameter: a number, or random by name (torch's global generator)."""
    if not isinstance(kind, str):
        return torch.full(tuple(shape), float(kind))
    t = torch.empty(tuple(shape))
    if kind == "uniform":
        return t.uniform_(args[0], args[1])
    if kind == "normal":
        return t.normal_(args[0], args[1])
    if kind == "unit_normal":
        t.normal_()
        return t / t.norm().clamp_min(1e-12)
    if kind == "identity":  # each matrix of the last two dims
        return t.copy_(torch.eye(*t.shape[-2:]))
    if kind == "orthogonal_rows":  # of the matrix [out, everything else]; made on the cpu by a QR decomposition
        return t if t.is_meta else torch.nn.init.orthogonal_(t, args[0])
    raise ValueError(kind)


def constants() -> AbstractContextManager[Any]:
    """Where constant buffers are made: in memory, also while the parameters are made on "meta"."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def initial_values(data: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """A start from a list of numbers."""
    return torch.tensor(data, dtype=torch.get_default_dtype()).reshape(tuple(shape))


# ---- parameters in a domain ---------------------------------------------------------------------

SOFT_BOUND = 6.0


def soft_bound(x: Tensor, bound: float) -> Tensor:
    """x for small x, never beyond ±bound: keeps scales finite whatever training does."""
    return bound * torch.tanh(x / bound)


def assign(parameter: Tensor, value: Tensor) -> None:
    """Puts a parameter where the first batch says; entries that are not finite keep their start."""
    parameter.copy_(torch.where(torch.isfinite(value), value, parameter))


class Positive(nn.Module):
    """A positive parameter: exp of a softly bounded number."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.raw = nn.Parameter(self.stored(value))

    @staticmethod
    def stored(value: Tensor) -> Tensor:
        return SOFT_BOUND * torch.atanh(torch.log(value).clamp(-5.9, 5.9) / SOFT_BOUND)

    def assign(self, value: Tensor) -> None:
        assign(self.raw, self.stored(value))

    def forward(self) -> Tensor:
        return torch.exp(soft_bound(self.raw, SOFT_BOUND))


class Interval(nn.Module):
    """A parameter strictly between lo and hi."""

    def __init__(self, value: Tensor, lo: float, hi: float):
        super().__init__()
        self.lo, self.hi = lo, hi
        self.raw = nn.Parameter(self.stored(value))

    def stored(self, value: Tensor) -> Tensor:
        p = ((value - self.lo) / (self.hi - self.lo)).clamp(1e-4, 1 - 1e-4)
        return torch.log(p) - torch.log1p(-p)

    def assign(self, value: Tensor) -> None:
        assign(self.raw, self.stored(value))

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


def by_columns(act: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, y: Tensor) -> Tensor:
    """What `act(matrix, columns)` makes of the vectors along the last axis of y, all of them in one call.

    y is [.., *own, n] for a matrix [*own, n, n], one matrix for each index of `own`.
    """
    own = matrix.dim() - 2
    lead = y.shape[: y.dim() - 1 - own]
    found = act(matrix, y.reshape(-1, *y.shape[len(lead) :]).movedim(0, -1)).movedim(-1, 0)
    return found.reshape(*lead, *found.shape[1:])


def times(matrix: Tensor, y: Tensor) -> Tensor:
    """M y along the last axis of y."""
    return by_columns(torch.matmul, matrix, y)


def solve_rows(matrix: Tensor, y: Tensor, *, upper: bool, unit: bool, transposed: bool) -> Tensor:
    """x with M x = y along the last axis of y (Mᵀ x = y when transposed), M triangular."""
    if transposed:
        matrix, upper = matrix.mT, not upper

    def act(m: Tensor, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(m, columns, upper=upper, unitriangular=unit)

    return by_columns(act, matrix, y)


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
            return times(self.perm, x)
        x = times(self.perm.mT, y)
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
        return by_columns(torch.linalg.solve, m, y)

    def log_det(self) -> Tensor:
        return torch.linalg.slogdet(self.matrix)[1]


class Rotation(nn.Module):
    """An orthogonal matrix as a product of Householder reflections; the first `columns` of it for Stiefel.

    n of them reach every orthogonal n x n matrix of determinant (-1)^n; `reflections` sets another number.
    """

    def __init__(self, shape: Sequence[int], columns: int | None = None, reflections: int | None = None):
        super().__init__()
        n = shape[-2]
        self.columns = columns
        self.vectors = nn.Parameter(torch.randn(*shape[:-2], reflections or n, n))

    def forward(self) -> Tensor:
        n = self.vectors.shape[-1]
        v = self.vectors / torch.linalg.vector_norm(self.vectors, dim=-1, keepdim=True).clamp_min(1e-12)
        q = torch.eye(n, dtype=v.dtype, device=v.device)
        for k in range(v.shape[-2]):
            u = v[..., k, :]
            q = q - 2 * u.unsqueeze(-1) * (u.unsqueeze(-2) @ q)
        return q if self.columns is None else q[..., : self.columns]

    def solve(self, y: Tensor, transposed: bool = False) -> Tensor:
        q = self()
        return times(q if transposed else q.mT, y)

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
        return times(q if transposed else q.mT, y)

    def log_det(self) -> Tensor:
        return self.raw.new_zeros(self.raw.shape[:-2])


class SkewExponential(nn.Module):
    """A rotation exp(S) of a skew-symmetric S, whose upper triangle is stored; it starts uniform in (-π, π), or at 0.

    Every rotation is such an exponential, and none has determinant -1.
    """

    def __init__(self, shape: Sequence[int], identity: bool = False):
        super().__init__()
        start = torch.zeros(tuple(shape)) if identity else math.pi * (2 * torch.rand(tuple(shape)) - 1)
        self.raw = nn.Parameter(torch.triu(start, 1))

    def forward(self) -> Tensor:
        skew = torch.triu(self.raw, 1)
        if skew.device.type != "mps":  # there is no float64; elsewhere Q'Q = I holds to the last digit of float32
            skew = skew.double()
        return torch.linalg.matrix_exp(skew - skew.mT).to(self.raw.dtype)

    def solve(self, y: Tensor, transposed: bool = False) -> Tensor:
        q = self()
        return times(q if transposed else q.mT, y)

    def log_det(self) -> Tensor:
        return self.raw.new_zeros(self.raw.shape[:-2])


class LowerMatrix(nn.Module):
    """A lower-triangular matrix with a positive diagonal (or a diagonal of ones).

    It starts as the identity, with the entries of `below` under the diagonal where they are given.
    """

    def __init__(self, shape: Sequence[int], unit: bool = False, below: Tensor | None = None):
        super().__init__()
        self.unit = unit
        self.lower = nn.Parameter(torch.zeros(tuple(shape)) if below is None else below)
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


def torus_of(window: Sequence[int], space: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a torus that holds a value of the sizes `space` with zeros around; none for a window of 1."""
    return tuple(n + k - 1 for n, k in zip(space, window, strict=True)) if math.prod(window) > 1 and space else ()


def torus_norm(weight: Tensor, torus: Sequence[int]) -> Tensor:
    """The spectral norm of a kernel [out, in, *window] on a torus; without one, of the matrix [out, all others]."""
    if torus:
        taps = torch.fft.fftn(weight, s=tuple(torus), dim=tuple(range(2, weight.dim()))).flatten(2).permute(2, 0, 1)
    else:
        taps = weight.flatten(1).unsqueeze(0)
    gram = taps @ taps.mH if taps.shape[1] <= taps.shape[2] else taps.mH @ taps
    return torch.linalg.eigvalsh(gram).amax().clamp_min(1e-60).sqrt()


class BoundedWeight(nn.Module):
    """A weight scaled down where an estimate of its norm, by power iteration, exceeds `bound`.

    The norm is that of the matrix [first axis, all others], or of a kernel [out, in, *window] as the convolution of a
    value of the sizes `space` on a torus that holds it with zeros around: there the norm can be known exactly, and it
    bounds the convolution's. Training improves the estimate (the buffer `u`); `settle` brings it to rest,
    `norm` is exact.
    """

    slack = 1.02  # the analysis reckons with a norm of bound·slack

    def __init__(self, value: Tensor, bound: float, *space: int):
        super().__init__()
        self.bound, self.space = bound, space
        self.raw = nn.Parameter(value)
        window = value.shape[2:]
        self.torus = torus_of(window, space)
        u = torch.randn(value.shape[0], *self.torus)
        self.register_buffer("u", u / u.norm().clamp_min(1e-12))
        self.settle()

    def apply_to(self, v: Tensor) -> Tensor:
        """The linear map of the unscaled weight."""
        if not self.torus:
            return self.raw.flatten(1) @ v
        taps = torch.fft.fftn(self.raw, s=self.torus, dim=tuple(range(2, self.raw.dim())))
        dims = tuple(range(1, v.dim()))
        return torch.fft.ifftn(torch.einsum("oi...,i...->o...", taps, torch.fft.fftn(v, dim=dims)), dim=dims).real

    def apply_transposed(self, u: Tensor) -> Tensor:
        if not self.torus:
            return self.raw.flatten(1).mT @ u
        taps = torch.fft.fftn(self.raw, s=self.torus, dim=tuple(range(2, self.raw.dim()))).conj()
        dims = tuple(range(1, u.dim()))
        return torch.fft.ifftn(torch.einsum("oi...,o...->i...", taps, torch.fft.fftn(u, dim=dims)), dim=dims).real

    @torch.no_grad()
    def improve(self, rounds: int, tolerance: float) -> None:
        if self.raw.is_meta:
            return
        for _ in range(rounds):
            v = self.apply_transposed(self.u)
            new = self.apply_to(v / v.norm().clamp_min(1e-12))
            new = new / new.norm().clamp_min(1e-12)
            moved = new - self.u
            self.u.copy_(new)
            if not torch.compiler.is_compiling() and float(moved.norm()) < tolerance:
                return

    def settle(self) -> None:
        """Two hundred rounds, or until the estimate rests."""
        self.improve(200, 1e-5)

    def estimate(self) -> Tensor:
        u = self.u.clone()  # later passes improve it in place
        v = self.apply_transposed(u).detach()
        return (self.apply_to(v / v.norm().clamp_min(1e-12)) * u).sum()

    @torch.no_grad()
    def norm(self) -> float:
        """The norm of the scaled weight: what certifies."""
        return float(torus_norm(self().double(), self.torus))

    def forward(self) -> Tensor:
        if self.training:
            self.improve(1 if torch.compiler.is_compiling() else 200, 1e-3)
        return self.raw * (self.bound / torch.clamp_min(self.estimate(), self.bound))


def norm_bounded(
    weight: Tensor, bound: float, inputs: int, *orders: Tensor | float, space: Sequence[int] = ()
) -> Tensor:
    """The weight scaled so that its norm, the last `inputs` axes against the others, is at most `bound`.

    The spectral norm, or with orders p and q a bound of the norm from lp to lq; with `space`, that of the
    convolution of a value of these sizes by the kernel [out, in, *window].
    """
    rows = math.prod(weight.shape[: weight.dim() - inputs])
    matrix = weight if space else weight.reshape(rows, -1)
    norm = induced_norm(matrix, *orders, space=space) if orders else torch.linalg.matrix_norm(matrix, ord=2)
    return weight * (bound / torch.clamp_min(norm, bound))


def induced_norm(weight: Tensor, p: Tensor | float, q: Tensor | float, space: Sequence[int] = ()) -> Tensor:
    """A bound of max |Wx|_q / |x|_p: exact for p = 1, for q = inf and for p = q = 2, between them by Riesz and Thorin.

    With a = 1/p and b = 1/q, b <= a, the logarithm of the norm is convex in (a, b), and it is known at the middle
    (the spectral norm), for a = 1 (the largest column) and for b = 0 (the largest row). Where q < p, lengths in the
    two norms differ by at most a power of the number of entries. (Finding the norm itself is NP-hard; a power method
    gives a bound from below.)

    A kernel [out, in, *window] is the convolution of a value of the sizes `space` whose result has no more places: the
    rows and columns of its matrix have a kernel's entries or some of them, and its spectral norm is at most that on
    a torus (`torus_norm`).
    """
    a, b = (1 / torch.as_tensor(v, dtype=weight.dtype, device=weight.device) for v in (p, q))
    rows, columns, places = weight.flatten(1), weight.transpose(0, 1).flatten(1), math.prod(space)
    torus = torus_of(weight.shape[2:], space)
    if torus:
        wide = weight if weight.device.type == "mps" else weight.double()
        middle = torus_norm(wide, torus).to(weight.dtype)
    else:
        middle = torch.linalg.matrix_norm(rows, ord=2)
    gap = torch.clamp_min(b - a, 0)
    small, large = torch.minimum(a, b), torch.maximum(a, b)
    by_rows = (rows.shape[0] * places) ** gap * between_norms(middle, rows, columns, a, small)
    by_columns = (columns.shape[0] * places) ** gap * between_norms(middle, rows, columns, large, b)
    return torch.minimum(by_rows, by_columns) * (1 + 1e-6)  # rounding


def between_norms(middle: Tensor, rows: Tensor, columns: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The bound for 1/p = a and 1/q = b <= a, on the line from the middle through (a, b) to where the norm is known."""
    part = torch.maximum(2 * a - 1, 1 - 2 * b)
    far = torch.clamp_min(part, 1e-6)
    by_columns = longest(columns, 0.5 + (b - 0.5) / far)
    by_rows = longest(rows, 0.5 - (a - 0.5) / far)
    edge = torch.where(2 * a - 1 >= 1 - 2 * b, by_columns, by_rows)
    return middle ** (1 - part) * edge**part


def longest(lines: Tensor, order: Tensor) -> Tensor:
    """The largest norm of a line, its order being 1/`order`; large orders are taken smaller: it is longer."""
    order = order.clamp(1e-3, 1)
    size = lines.abs()
    top = size.amax(-1, keepdim=True).clamp_min(1e-30)
    return (top.squeeze(-1) * ((size / top) ** (1 / order)).sum(-1) ** order).amax()


def degree_mask(rows: Sequence[int], cols: Sequence[int], strict: bool) -> Tensor:
    """1 where a row's degree is at least (strictly: above) a column's (MADE, Germain et al. 2015)."""
    r, c = torch.tensor(rows).unsqueeze(1), torch.tensor(cols).unsqueeze(0)
    return ((r > c) if strict else (r >= c)).to(torch.get_default_dtype())
