"""Monotone splines: each gives its value and the logarithm of its slope.

x is [*batch, *axes]; raw parameters are [*batch, K, *axes], with the bins along `dim` in front of x's
axes: reductions over a leading axis are vectorised, over a short last axis they are not. Where a network made
them they are laid out with the bins in front of all (`bins_first`), so that few coordinates cost no more. Inside the
box everything happens on the square [-1/2, 1/2]², u = x / 2B: floating numbers are dense around 0, and
what a knot's rounding does to the log-slope grows with the number of bins. Values outside (and NaN) take
the place of the centre first, so that neither they nor their gradients pass through a bin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from flowlang.backends.torch.runtime.functions import by_hand
from torch import Tensor


def unit_of(x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Whether x lies in the box, and its place on [-1/2, 1/2] (the centre where it does not)."""
    inside = x.abs() < bound
    return inside, torch.where(inside, x * (0.5 / bound), 0.0)


def from_unit(inside: Tensor, x: Tensor, y: Tensor, slope: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The value and log-slope in x's own units; the identity outside the box."""
    return torch.where(inside, y * (2 * bound), x), torch.where(inside, torch.log(slope), 0.0)


def spline_bins(logits: Tensor, least: float, dim: int, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Shares of [-1/2, 1/2], each at least `least`, and where they end. `exact`: rounded once, at the end."""
    n, dtype = logits.shape[dim], logits.dtype
    if exact and logits.device.type != "mps":
        logits = logits.double()
    shares = torch.softmax(logits, dim)
    if least > 0:
        shares = torch.lerp(shares, shares.new_full((), 1 / n), least * n)
    return shares.to(dtype), (torch.cumsum(shares, dim) - 0.5).to(dtype)


def of_weights(x: Tensor, raw: Tensor) -> bool:
    """Whether parameters are the same for every sample: their tables are small, and cheap to make exactly."""
    return raw.dim() <= x.dim()


def bins_first(x: Tensor, dim: int, *tables: Tensor) -> tuple[int, tuple[Tensor, ...]]:
    """Where the bins' axis is, and the tables: those of a network are seen with it in front of the batch.

    `softmax` then lays them out so too, and what follows works along the whole batch, however few coordinates there
    are: for [4096, 8, 4] softmax, comparison and sum are four to six times as fast.
    """
    if any(of_weights(x, t) for t in tables):
        return dim, tables
    return -tables[0].dim(), tuple(t.movedim(dim, 0) for t in tables)


def bin_count(before: Tensor, dim: int) -> Tensor:
    """How many bins lie before, kept as an axis of size 1 at `dim`."""
    # Asked first: a program that is traced for any batch must not look at its size.
    if not torch.compiler.is_compiling() and before.numel() > 10_000 and before.shape[dim] < 256:
        return before.view(torch.uint8).sum(dim, keepdim=True, dtype=torch.uint8).long()  # vectorised
    return before.sum(dim, keepdim=True)


def find_bin(u: Tensor, ends: Tensor, dim: int) -> Tensor:
    """The index of the bin that holds u, kept as an axis of size 1 at `dim`."""
    n = ends.shape[dim] - 1
    return bin_count(u.unsqueeze(dim) >= ends.narrow(dim, 0, n), dim)


def at_bins(table: Tensor, k: Tensor, dim: int) -> Tensor:
    """The table's entries at k, which has an axis of its own at `dim`."""
    own = list(table.shape)
    own[dim] = k.shape[dim]
    if own == list(k.shape):
        return table.gather(dim, k)
    shape = list(torch.broadcast_shapes(table.movedim(dim, 0).shape[1:], k.movedim(dim, 0).shape[1:]))
    place = len(shape) + 1 + dim
    wide = [*shape[:place], table.shape[dim], *shape[place:]]
    return table.expand(wide).gather(dim, k.expand(*shape[:place], k.shape[dim], *shape[place:]))


def at_bin(table: Tensor, k: Tensor, dim: int) -> Tensor:
    """The table's entries at k, without the axis of bins."""
    return at_bins(table, k, dim).squeeze(dim)


def bin_at(bins: tuple[Tensor, Tensor], k: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Start and size of the bins k."""
    size = at_bin(bins[0], k, dim)
    return at_bin(bins[1], k, dim) - size, size


def in_bin(t: Tensor) -> Tensor:
    """t held to [0, 1], which rounding at a joint may leave; its gradient is that of t."""
    if not torch.is_grad_enabled():
        return t.clamp(0, 1)
    return t + (t.clamp(0, 1) - t).detach()


def knot_slopes(raw: Tensor, k: Tensor, least: float, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes at both ends of bin k as an axis at `dim`, their places in `raw`, and whether they have one.

    It is 1 at the ends of the box; raw 0 is slope 1 (least + softplus of a shifted raw).
    """
    ends = torch.cat((k - 1, k), dim)
    knots = ends.clamp(0, raw.shape[dim] - 1)
    inner = knots == ends
    unit = math.log(math.expm1(1 - least))
    return torch.where(inner, least + F.softplus(at_bins(raw, knots, dim) + unit), 1.0), knots, inner


def inner_slopes(raw: Tensor, k: Tensor, least: float, dim: int) -> tuple[Tensor, ...]:
    """Slopes at both ends of bin k."""
    if raw.shape[dim] == 0:
        one = torch.ones_like(k.squeeze(dim), dtype=raw.dtype)
        return one, one
    return knot_slopes(raw, k, least, dim)[0].unbind(dim)


def tied_slopes(raw: Tensor, k: Tensor, least: float, dim: int) -> tuple[Tensor, Tensor]:
    """Slopes at both ends of bin k on a circle, where the last knot is the first."""
    unit = math.log(math.expm1(1 - least))
    after = torch.where(k + 1 < raw.shape[dim], k + 1, 0)
    left, right = at_bin(raw, k, dim), at_bin(raw, after, dim)
    return least + F.softplus(left + unit), least + F.softplus(right + unit)


def rational(t: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """The rational quadratic on one bin, as a share of its height, and its slope (Durkan et al. 2019, eq. 4-5)."""
    rest = 1 - t
    both, square = t * rest, t * t
    below = torch.addcmul(s, torch.sub(d1 + d0, s, alpha=2), both)
    scale = s / below
    share = torch.addcmul(d0 * both, s, square) / below
    slope = torch.addcmul(torch.addcmul(d1 * square, s, both, value=2), d0, rest * rest)
    return share, slope * scale * scale


def rational_inverse(rise: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """t from the share of the height (eq. 6-8): of the two forms of the root the one whose terms have one sign.

    The paper's 2c / (-b - √(b² - 4ac)) alone loses all digits where b < 0: a steep end after a flat bin.
    """
    bend = rise * torch.sub(d1 + d0, s, alpha=2)
    b, c = d0 - bend, s * rise
    a = s - b
    square = torch.addcmul(b * b, a, c, value=4).clamp_min(torch.finfo(b.dtype).tiny)
    both = b.abs() + torch.sqrt(square)
    return in_bin(torch.where(b >= 0, 2 * c, both) / torch.where(b >= 0, both, 2 * a))


def rqs_plain(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, min_width: float, min_height: float,
    min_slope: float, dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inside, u = unit_of(x, bound)
    dim, (widths, heights, slopes) = bins_first(x, dim, widths, heights, slopes)
    bins = spline_bins(widths, min_width, dim, of_weights(x, widths))
    k = find_bin(u, bins[1], dim)
    x0, w = bin_at(bins, k, dim)
    y0, h = bin_at(spline_bins(heights, min_height, dim, of_weights(x, heights)), k, dim)
    d0, d1 = inner_slopes(slopes, k, min_slope, dim)
    share, slope = rational(in_bin((u - x0) / w), h / w, d0, d1)
    return from_unit(inside, x, torch.addcmul(y0, h, share), slope, bound)


def rqs_run(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, min_width: float, min_height: float,
    min_slope: float, dim: int,
) -> tuple[tuple[Tensor, Tensor], Sequence[Tensor]]:  # fmt: skip
    inside, u = unit_of(x, bound)
    n = widths.shape[dim]
    wide, high = (torch.softmax(t.movedim(dim, 0), 0) for t in (widths, heights))
    sizes = [torch.lerp(p, p.new_full((), 1 / n), a * n) for p, a in ((wide, min_width), (high, min_height))]
    ends = torch.cumsum(sizes[0], 0).sub_(0.5)
    before = u >= ends[:-1]  # the bins before x's
    k = bin_count(before, 0)
    w, h = sizes[0].gather(0, k)[0], sizes[1].gather(0, k)[0]
    x0 = ends.gather(0, k)[0].sub_(w)
    y0 = torch.cumsum(sizes[1], 0).gather(0, k)[0].sub_(0.5).sub_(h)
    d, knots, inner = knot_slopes(slopes.movedim(dim, 0), k, min_slope, -x.dim() - 1)
    d0, d1 = d.unbind()
    s = h / w
    t = u.sub_(x0).div_(w).clamp_(0, 1)
    share, slope = rational(t, s, d0, d1)
    found = from_unit(inside, x, y0.addcmul_(h, share), slope, bound)
    return found, (inside, before, k, wide, high, w, s, t, d, share, knots, inner)


def rational_back(
    dshare: Tensor, dlog: Tensor, t: Tensor, s: Tensor, d0: Tensor, d1: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for t, s, d0 and d1 from those of a rational's share and of the logarithm of its slope.

    share = top / below, slope = s² · mean / below².
    """
    rest = 1 - t
    both, square, other, twist = t * rest, t * t, rest * rest, rest - t
    bend = torch.sub(d0 + d1, s, alpha=2)
    below = torch.addcmul(s, bend, both)
    mean = torch.addcmul(torch.addcmul(d1 * square, s, both, value=2), d0, other)
    dmean, dtop = dlog / mean, dshare / below
    dbelow = torch.addcdiv(dtop * share, dlog, below, value=2).neg_()
    at = torch.addcmul(torch.addcmul(d1 * t, s, twist), d0, rest, value=-1).mul_(dmean).mul_(2)
    at.addcmul_(dtop, torch.addcmul(d0 * twist, s, t, value=2)).addcmul_(dbelow, bend.mul_(twist))
    ds = torch.addcdiv(dbelow, dlog, s, value=2)
    ds.addcmul_(dtop, square).addcmul_(both, torch.sub(dmean, dbelow), value=2)
    d_left = torch.addcmul(dmean * other, dtop.add_(dbelow), both)
    return at, ds, d_left, torch.addcmul(dmean.mul_(square), dbelow, both)


def logits_back(shares: Tensor, before: Tensor, k: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """The gradient for the logits of `shares`, from those of where bin k starts and of its size."""
    slope = torch.empty_like(shares)
    torch.mul(before, start, out=slope[:-1])
    slope[-1].zero_()
    slope.scatter_(0, k, size[None]).mul_(shares)
    return slope.addcmul_(shares, slope.sum(0), value=-1)


def rqs_back(
    dfound: Sequence[Tensor], kept: Sequence[Tensor], x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor,
    bound: float, min_width: float, min_height: float, min_slope: float, dim: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    inside, before, k, wide, high, w, s, t, d, share, knots, inner = kept
    n = len(wide)
    dy = torch.where(inside, dfound[0] * (2 * bound), 0.0)
    dlog = torch.where(inside, dfound[1], 0.0)
    d0, d1 = d.unbind()
    dt, ds, d_left, d_right = rational_back(dy * (w * s), dlog, t, s, d0, d1, share)
    du, ds = dt.div_(w), ds.div_(w)
    by = 1 - min_width * n
    dwidths = logits_back(wide, before, k, du * -by, torch.addcmul(du * t, ds, s).mul_(-by))
    by = 1 - min_height * n
    dheights = logits_back(high, before, k, dy * by, ds.addcmul_(dy, share).mul_(by))
    # The slope of softplus, from its value; the ends of the box have no knot of their own.
    dd = torch.stack((d_left, d_right)).mul_(torch.expm1(min_slope - d)).mul_(inner)
    dslopes = torch.zeros_like(wide[1:]).scatter_add_(0, knots, dd.neg_())
    dx = torch.where(inside, du * (0.5 / bound), dfound[0])
    return dx, *(d.movedim(0, dim) for d in (dwidths, dheights, dslopes)), None, None, None, None, None


def rqs(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *, bound: float = 3.0, min_width: float = 1e-3,
    min_height: float = 1e-3, min_slope: float = 1e-3, dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rational-quadratic spline and its log-slope (Durkan et al. 2019); the identity outside [-bound, bound]."""
    options = (x, widths, heights, slopes, bound, min_width, min_height, min_slope, dim)
    table = widths.movedim(dim, 0)
    if table.shape[1:] != x.shape or heights.shape != widths.shape or len(table) < 2 or x.dtype != table.dtype:
        return rqs_plain(*options)
    return by_hand(rqs_plain, rqs_run, rqs_back, *options)


def rqs_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *, bound: float = 3.0, min_width: float = 1e-3,
    min_height: float = 1e-3, min_slope: float = 1e-3, dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The inverse of `rqs`, and the log-slope of the forward map there."""
    inside, v = unit_of(y, bound)
    dim, (widths, heights, slopes) = bins_first(y, dim, widths, heights, slopes)
    bins = spline_bins(heights, min_height, dim, of_weights(y, heights))
    k = find_bin(v, bins[1], dim)
    y0, h = bin_at(bins, k, dim)
    x0, w = bin_at(spline_bins(widths, min_width, dim, of_weights(y, widths)), k, dim)
    d0, d1 = inner_slopes(slopes, k, min_slope, dim)
    s = h / w
    t = rational_inverse((v - y0) / h, s, d0, d1)
    return from_unit(inside, y, x0 + w * t, rational(t, s, d0, d1)[1], bound)


def rqs_circular(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *, bound: float = math.pi,
    min_width: float = 1e-3, min_height: float = 1e-3, min_slope: float = 1e-3, dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rational-quadratic spline on the circle [-bound, bound) (Rezende et al. 2020, 2.1.2)."""
    u = x * (0.5 / bound)
    dim, (widths, heights, slopes) = bins_first(x, dim, widths, heights, slopes)
    bins = spline_bins(widths, min_width, dim, of_weights(x, widths))
    k = find_bin(u, bins[1], dim)
    x0, w = bin_at(bins, k, dim)
    y0, h = bin_at(spline_bins(heights, min_height, dim, of_weights(x, heights)), k, dim)
    share, slope = rational(in_bin((u - x0) / w), h / w, *tied_slopes(slopes, k, min_slope, dim))
    return (y0 + h * share) * (2 * bound), torch.log(slope)


def rqs_circular_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, *, bound: float = math.pi,
    min_width: float = 1e-3, min_height: float = 1e-3, min_slope: float = 1e-3, dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    v = y * (0.5 / bound)
    dim, (widths, heights, slopes) = bins_first(y, dim, widths, heights, slopes)
    bins = spline_bins(heights, min_height, dim, of_weights(y, heights))
    k = find_bin(v, bins[1], dim)
    y0, h = bin_at(bins, k, dim)
    x0, w = bin_at(spline_bins(widths, min_width, dim, of_weights(y, widths)), k, dim)
    d0, d1 = tied_slopes(slopes, k, min_slope, dim)
    s = h / w
    t = rational_inverse((v - y0) / h, s, d0, d1)
    return (x0 + w * t) * (2 * bound), torch.log(rational(t, s, d0, d1)[1])


def linear_spline(
    x: Tensor, heights: Tensor, *, bound: float = 3.0, min_height: float = 1e-3, dim: int = -2
) -> tuple[Tensor, Tensor]:
    """Piecewise-linear map with bins of equal width (Müller et al. 2019, section 4.1)."""
    n = heights.shape[dim]
    inside, u = unit_of(x, bound)
    place = (u + 0.5) * n
    at = torch.floor(place.detach()).clamp(0, n - 1)
    y0, h = bin_at(spline_bins(heights, min_height, dim, of_weights(x, heights)), at.long().unsqueeze(dim), dim)
    return from_unit(inside, x, y0 + h * (place - at), h * n, bound)


def linear_spline_inverse(
    y: Tensor, heights: Tensor, *, bound: float = 3.0, min_height: float = 1e-3, dim: int = -2
) -> tuple[Tensor, Tensor]:
    n = heights.shape[dim]
    inside, v = unit_of(y, bound)
    dim, (heights,) = bins_first(y, dim, heights)
    bins = spline_bins(heights, min_height, dim, of_weights(y, heights))
    k = find_bin(v, bins[1], dim)
    y0, h = bin_at(bins, k, dim)
    return from_unit(inside, y, (k.squeeze(dim) + (v - y0) / h) / n - 0.5, h * n, bound)


def quadratic_table(
    widths: Tensor, heights: Tensor, min_width: float, min_slope: float, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Widths and ends of the bins, slopes at the knots (of mean 1 over the box), and the values at the ends."""
    shares, ends = spline_bins(widths, min_width, dim)
    n = shares.shape[dim]
    raw = 1e-3 + F.softplus(heights)
    area = ((raw.narrow(dim, 0, n) + raw.narrow(dim, 1, n)) * shares).sum(dim, keepdim=True) / 2
    v = min_slope + (1 - min_slope) * raw / area
    rise = (v.narrow(dim, 0, n) + v.narrow(dim, 1, n)) * shares / 2
    return shares, ends, v, torch.cumsum(rise, dim) - 0.5


def quadratic_bin(
    table: tuple[Tensor, Tensor, Tensor, Tensor], k: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shares, ends, v, rises = table
    x0, w = bin_at((shares, ends), k, dim)
    v0, v1 = at_bin(v, k, dim), at_bin(v, k + 1, dim)
    return x0, w, at_bin(rises, k, dim) - (v0 + v1) * w / 2, v0, v1


def quadratic_spline(
    x: Tensor, widths: Tensor, heights: Tensor, *, bound: float = 3.0, min_width: float = 1e-3,
    min_slope: float = 1e-3, dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Piecewise-quadratic map: the integral of a piecewise-linear density (Müller et al. 2019, section 4.2)."""
    inside, u = unit_of(x, bound)
    table = quadratic_table(widths, heights, min_width, min_slope, dim)
    x0, w, y0, v0, v1 = quadratic_bin(table, find_bin(u, table[1], dim), dim)
    t = in_bin((u - x0) / w)
    return from_unit(inside, x, y0 + w * t * (v0 + (v1 - v0) * t / 2), v0 + (v1 - v0) * t, bound)


def quadratic_spline_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, *, bound: float = 3.0, min_width: float = 1e-3,
    min_slope: float = 1e-3, dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inside, v = unit_of(y, bound)
    table = quadratic_table(widths, heights, min_width, min_slope, dim)
    x0, w, y0, v0, v1 = quadratic_bin(table, find_bin(v, table[3], dim), dim)
    rise = (v - y0) / w
    root = torch.sqrt((v0 * v0 + 2 * (v1 - v0) * rise).clamp_min(torch.finfo(y.dtype).tiny))
    t = in_bin(2 * rise / (v0 + root))
    return from_unit(inside, y, x0 + w * t, v0 + (v1 - v0) * t, bound)


def cubic_bin(
    k: Tensor, widths: tuple[Tensor, Tensor], heights: tuple[Tensor, Tensor], ends: Tensor, min_slope: float, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A bin and the slopes at its ends in the bin's own units, monotone by Steffen's rule (1990)."""
    n = widths[0].shape[dim]
    secants = heights[0] / widths[0]
    # The end slopes lie between 3·least and 3·(1 - least) secants; raw 0 is one secant.
    third = math.log((1 / 3 - min_slope) / (2 / 3 - min_slope))
    edge = 3 * (min_slope + (1 - 2 * min_slope) * torch.sigmoid(ends + third))
    x0, w = bin_at(widths, k, dim)
    y0, h = bin_at(heights, k, dim)
    s, at = h / w, k.squeeze(dim)

    def inner(j: Tensor) -> Tensor:
        sj, wj = at_bin(secants, j, dim), at_bin(widths[0], j, dim)
        return torch.minimum(2 * torch.minimum(s, sj), (s * wj + sj * w) / (w + wj)) / s

    d0 = torch.where(at > 0, inner((k - 1).clamp_min(0)), edge.select(dim, 0))
    d1 = torch.where(at < n - 1, inner((k + 1).clamp_max(n - 1)), edge.select(dim, 1))
    return x0, w, y0, h, d0, d1


def cubic_unit(t: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """The cubic from (0, 0) to (1, 1) with end slopes d0, d1: value and slope, in Bernstein's form."""
    rest = 1 - t
    both, square, other = t * rest, t * t, rest * rest
    return t * (d0 * other + (3 - d1) * both + square), d0 * other + 2 * (3 - d0 - d1) * both + d1 * square


def cubic_spline(
    x: Tensor, widths: Tensor, heights: Tensor, ends: Tensor, *, bound: float = 3.0, min_width: float = 1e-3,
    min_height: float = 1e-3, min_slope: float = 1e-3, dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Monotone piecewise-cubic map (Durkan et al. 2019, Cubic-Spline Flows)."""
    inside, u = unit_of(x, bound)
    shares = spline_bins(widths, min_width, dim, of_weights(x, widths))
    k = find_bin(u, shares[1], dim)
    rises = spline_bins(heights, min_height, dim, of_weights(x, heights))
    x0, w, y0, h, d0, d1 = cubic_bin(k, shares, rises, ends, min_slope, dim)
    value, slope = cubic_unit(in_bin((u - x0) / w), d0, d1)
    return from_unit(inside, x, y0 + h * value, slope * (h / w), bound)


def cubic_spline_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, ends: Tensor, *, bound: float = 3.0, min_width: float = 1e-3,
    min_height: float = 1e-3, min_slope: float = 1e-3, dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Newton's steps kept in a bracket, every third a halving, without gradient; one more step carries the gradient."""
    inside, v = unit_of(y, bound)
    rises = spline_bins(heights, min_height, dim, of_weights(y, heights))
    k = find_bin(v, rises[1], dim)
    shares = spline_bins(widths, min_width, dim, of_weights(y, widths))
    x0, w, y0, h, d0, d1 = cubic_bin(k, shares, rises, ends, min_slope, dim)
    goal = (v - y0) / h
    with torch.no_grad():
        lo, hi = torch.zeros_like(goal), torch.ones_like(goal)
        t = goal.clamp(0, 1)
        for k_round in range(36 if y.dtype == torch.float64 else 24):
            value, slope = cubic_unit(t, d0, d1)
            below = value < goal
            lo, hi = torch.where(below, t, lo), torch.where(below, hi, t)
            step = t - (value - goal) / slope
            good = (step > lo) & (step < hi) if k_round % 3 != 2 else torch.zeros_like(below)
            t = torch.where(good, step, (lo + hi) / 2)
    value, slope = cubic_unit(t, d0, d1)
    t = in_bin(t - (value - goal) / slope.detach())
    return from_unit(inside, y, x0 + w * t, cubic_unit(t, d0, d1)[1] * (h / w), bound)
