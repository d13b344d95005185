"""Functions that torch lacks: stable elementwise ones, and structure along an axis.

Values are laid out `[*batch, *axes]`; dims are negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from flowlang.backends.torch.runtime.errors import bad_input
from torch import Tensor

# ---- gradients ----------------------------------------------------------------------------------


def surrogate(value: Tensor, gradient: Tensor) -> Tensor:
    """The one's value with the other's gradient; exact where `gradient` is finite."""
    return value.to(gradient.dtype).detach() + (gradient - gradient.detach())


class OwnGradient(torch.autograd.Function):
    """A function with a backward pass of its own. `run` gives `results` values and what `back` reads after them."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], back: Callable[..., Any], results: int, *inputs: Tensor) -> Any:
        found = run(*inputs)
        values = found if isinstance(found, tuple) else (found,)
        ctx.back, ctx.count = back, len(inputs)
        ctx.save_for_backward(*values[results:])
        return values[0] if results == 1 else values[:results]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = ctx.back(*gradients, *ctx.saved_tensors)
        found = found if isinstance(found, tuple) else (found,)
        return (None, None, None, *found, *(None,) * (ctx.count - len(found)))


class ByHand(torch.autograd.Function):  # ignores below: torch's functions of autograd are untyped
    """A value, or several, with a gradient written by hand, in fewer passes over memory than those of its parts.

    `plain` says what it is: gradients of gradients are left to it. `run` gives the value and what `back` reads beside
    the inputs; `back` gives a gradient for each input, None for what has none.
    """

    @staticmethod
    def forward(
        ctx: Any, plain: Callable[..., Any], run: Callable[..., Any], back: Callable[..., Any], *inputs: Any
    ) -> Any:
        y, kept = run(*inputs)
        ctx.plain, ctx.back = plain, back
        ctx.options = [None if isinstance(i, Tensor) else i for i in inputs]
        ctx.places = [k for k, i in enumerate(inputs) if isinstance(i, Tensor)]
        ctx.save_for_backward(*(inputs[k] for k in ctx.places), *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *slopes_of: Tensor) -> Any:
        dy: Any = slopes_of if len(slopes_of) > 1 else slopes_of[0]
        inputs, saved = list(ctx.options), ctx.saved_tensors
        for k, value in zip(ctx.places, saved, strict=False):
            inputs[k] = value
        if not torch.is_grad_enabled():
            return (None, None, None, *ctx.back(dy, saved[len(ctx.places) :], *inputs))
        given = [k for k in ctx.places if ctx.needs_input_grad[3 + k]]
        found = torch.autograd.grad(
            ctx.plain(*inputs), [inputs[k] for k in given], dy, create_graph=True, allow_unused=True
        )
        slopes = dict(zip(given, found, strict=True))
        return (None, None, None, *(slopes.get(k) for k in range(len(inputs))))


def by_hand(plain: Callable[..., Any], run: Callable[..., Any], back: Callable[..., Any], *inputs: Any) -> Any:
    """`plain(*inputs)`, with a gradient of its own outside of transformations of programs."""
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    if torch.compiler.is_compiling() or transformed:
        return plain(*inputs)
    if not torch.is_grad_enabled():
        return run(*inputs)[0]
    return ByHand.apply(plain, run, back, *inputs)  # type: ignore[no-untyped-call]  # as said at the class


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


def logit_mixture(logits: Tensor, t: Tensor, dim: int = -2) -> Tensor:
    """logit(Σ softmax(logits) · sigmoid(t)) along `dim`, from logarithms: exact where the sum rounds to 0 or 1."""
    share = torch.log_softmax(logits, dim)
    return torch.logsumexp(share + F.logsigmoid(t), dim) - torch.logsumexp(share + F.logsigmoid(-t), dim)


def log_abs(x: Tensor) -> Tensor:
    return torch.log(torch.abs(x))


def log_bessel_i0e(x: Tensor) -> Tensor:
    """log(exp(-x)·I0(x)) for x >= 0."""
    return torch.log(torch.special.i0e(x))


def rotate(x: Tensor, by: Tensor | float) -> Tensor:
    """The angle x turned by `by`, in [-π, π)."""
    top = math.pi if x.dtype == torch.float64 else 3.1415925  # the largest number below π
    return (torch.remainder(x + by + math.pi, 2 * math.pi) - math.pi).clamp(-top, top - torch.finfo(x.dtype).eps)


def determinant(m: Tensor) -> Tensor:
    """Of matrices in the last two dimensions; small ones are written out: no pivots, no inverse."""
    if m.shape[-1] > 3:
        return torch.linalg.det(m)
    if m.shape[-1] == 1:
        return m[..., 0, 0]
    a, b = m[..., 0, :], m[..., 1, :]
    if m.shape[-1] == 2:
        return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return (a * torch.linalg.cross(b, m[..., 2, :])).sum(-1)


def on_values(v: Tensor, function: str, power: float, floor: float) -> tuple[Tensor, Tensor]:
    """A function of eigenvalues, and its slope."""
    if function == "matrix_exp":
        return v.exp(), v.exp()
    kept, above = v.clamp_min(floor), (v > floor).to(v.dtype)
    if function == "matrix_log":
        return kept.log(), above / kept
    return kept**power, above * power * kept ** (power - 1)


def of_eigenvalues_plain(m: Tensor, function: str, power: float, floor: float) -> Tensor:
    values, vectors = torch.linalg.eigh((m + m.mT) / 2)
    return (vectors * on_values(values, function, power, floor)[0].unsqueeze(-2)) @ vectors.mT


def of_eigenvalues_run(m: Tensor, function: str, power: float, floor: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    values, vectors = torch.linalg.eigh((m + m.mT) / 2)
    found = (vectors * on_values(values, function, power, floor)[0].unsqueeze(-2)) @ vectors.mT
    return found, (values, vectors)


def of_eigenvalues_back(
    dy: Tensor, kept: tuple[Tensor, Tensor], m: Tensor, function: str, power: float, floor: float
) -> tuple[Any, ...]:
    """By divided differences (Daleckii & Krein 1965); where eigenvalues nearly agree, by the slope between them."""
    values, vectors = kept
    a, b = values.unsqueeze(-1), values.unsqueeze(-2)
    f, gap = on_values(values, function, power, floor)[0], a - b
    size = torch.maximum(a.abs(), b.abs()).clamp_min(1.0 if function == "matrix_exp" else floor)
    near = gap.abs() <= torch.finfo(m.dtype).eps ** (1 / 3) * size
    slope = on_values((a + b) / 2, function, power, floor)[1]
    quotient = torch.where(
        near, slope, (f.unsqueeze(-1) - f.unsqueeze(-2)) / torch.where(near, torch.ones_like(gap), gap)
    )
    dm = vectors @ (quotient * (vectors.mT @ dy @ vectors)) @ vectors.mT
    return (dm + dm.mT) / 2, None, None, None


def of_eigenvalues(m: Tensor, function: str, power: float, floor: float) -> Tensor:
    """A function of the eigenvalues of the symmetric parts of matrices in the last two dimensions.

    Its gradients are finite where eigenvalues repeat.
    """
    return by_hand(of_eigenvalues_plain, of_eigenvalues_run, of_eigenvalues_back, m, function, power, floor)


def unit_vector(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x over its Euclidean norm along `dims`; where that is 0, the vector of equal entries, without gradient."""
    length = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    even = math.prod([x.shape[d] for d in dims]) ** -0.5
    return torch.where(length > 0, x / torch.where(length > 0, length, 1.0), even)


def batch_mean(x: Tensor, rank: int, dims: tuple[int, ...]) -> Tensor:
    """The mean over all batch dimensions (those before the last `rank`) and over `dims`.

    As a sum, whose gradient is a view; that of `torch.mean` is written out.
    """
    total = over_batch(torch.sum, x, rank, dims)
    return total / (x.numel() // max(total.numel(), 1))


def over_batch(act: Callable[..., Tensor], x: Tensor, rank: int, dims: tuple[int, ...]) -> Tensor:
    """A reduction of torch, `act(x, dims)`, over all batch dimensions and over `dims`."""
    every = (*range(x.dim() - rank), *dims)
    return act(x, every) if every else x


def batch_var(x: Tensor, rank: int, dims: tuple[int, ...], ddof: int = 0) -> Tensor:
    """The variance over all batch dimensions and over `dims`; of one value it is 0, and an error with `ddof`."""
    every = (*range(-x.dim(), -rank), *dims)
    if not every:
        return torch.zeros_like(x)
    n = 1
    for d in every:
        n *= x.shape[d]
    if n <= ddof:
        raise bad_input(f"a batch gives {n} values for a variance", f"train on more than {ddof}")
    return variance(x, every, ddof)


def unbiased(var: Tensor, x: Tensor) -> Tensor:
    """From the variance of x that divides by the number n of values, that which divides by n - 1."""
    n = x.numel() // max(var.numel(), 1)
    if n <= 1:
        raise bad_input(f"a batch gives {n} values for a variance", "train on more than 1")
    return var * (n / (n - 1))


def squares(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum of x² over negative dims: over the last ones as products of vectors, without a square in memory."""
    last = next(k for k in range(x.dim() + 1) if -1 - k not in dims)
    if not last:
        return x.square().sum(dims) if dims else x.square()
    flat = x if last == 1 else x.flatten(-last)
    found = torch.linalg.vecdot(flat, flat)
    rest = tuple(d + last for d in dims if d < -last)
    return found.sum(rest) if rest else found


def variance_plain(x: Tensor, dims: tuple[int, ...], ddof: int) -> Tensor:
    return x.var(dims, correction=ddof)


def variance_run(x: Tensor, dims: tuple[int, ...], ddof: int) -> tuple[Tensor, tuple[Tensor]]:
    mean = x.mean(dims, keepdim=True)
    total = squares(x - mean, dims)
    return total / (x.numel() // max(total.numel(), 1) - ddof), (mean,)


def variance_back(dv: Tensor, kept: tuple[Tensor], x: Tensor, dims: tuple[int, ...], ddof: int) -> tuple[Any, ...]:
    n = x.numel() // max(dv.numel(), 1)
    return (x - kept[0]).mul_(dv.reshape(kept[0].shape) * (2 / (n - ddof))), None, None


def variance(x: Tensor, dims: tuple[int, ...], ddof: int = 0) -> Tensor:
    """The variance over negative dims; on processors `Tensor.var` takes many times as long."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return variance_plain(x, dims, ddof)
    return by_hand(variance_plain, variance_run, variance_back, x, dims, ddof)


def mean_square(x: Tensor, count: int) -> Tensor:
    """The mean of x² over the last `count` dims."""
    return squares(x, tuple(range(-count, 0))) / x.shape[x.dim() - count :].numel()


def batch_mean_square(x: Tensor, rank: int, dims: tuple[int, ...]) -> Tensor:
    """The mean of x² over all batch dimensions and over `dims`."""
    if x.dim() == rank and not dims:
        return x.square()
    total = squares(x, (*range(-x.dim(), -rank), *dims))
    return total / (x.numel() // max(total.numel(), 1))


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
    """A table at an index along `dim`; the index's dims come in front of the table's other ones."""
    return torch.movedim(x, dim, 0)[index.long()]


def pick_along(x: Tensor, index: Tensor, dim: int, event: int) -> Tensor:
    """x at an index that all samples share; the index's dims come in front of x's other `event` dims."""
    found = x.index_select(dim, index.long().reshape(-1)).movedim(dim, -event)
    return found.unflatten(-event, index.shape)


def take_aligned(x: Tensor, index: Tensor) -> Tensor:
    """x along its last dim at an index whose dims stand where x's other dims do."""
    shape = torch.broadcast_shapes(x.shape[:-1], index.shape)
    return x.expand(*shape, x.shape[-1]).gather(-1, index.long().expand(shape).unsqueeze(-1)).squeeze(-1)


def cumsum_along(x: Tensor, dim: int, exclusive: bool, reverse: bool) -> Tensor:
    if reverse:
        x = x.flip(dim)
    y = torch.cumsum(x, dim)
    if exclusive:
        y = shift_along(y, 1, dim)
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


Window = tuple[int, ...]


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Window,
    padding: tuple[Window, ...],
    dilation: Window,
    groups: int = 1,
) -> Tensor:
    """Convolution over as many last dims as the window has, with any number of batch dims and zeros outside."""
    n = weight.dim() - 2
    flat = x.reshape(-1, *x.shape[-1 - n :])
    if any(a != b for a, b in padding):
        flat, padding = F.pad(flat, [p for pair in reversed(padding) for p in pair]), ((0, 0),) * n
    run = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    y = run(flat, weight, bias, stride, [p for p, _ in padding], dilation, groups)
    return y.reshape(*x.shape[: -1 - n], *y.shape[1:])


def convolve_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Window,
    padding: tuple[Window, ...],
    dilation: Window,
    groups: int = 1,
) -> Tensor:
    """`convolve`, or nothing where the window finds no place: a stage of a loop may have no rows."""
    n = weight.dim() - 2
    windows = zip(x.shape[-n:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(size + a + b - (k - 1) * d - 1) // s + 1 for size, k, s, (a, b), d in windows]
    if min(sizes) < 1:
        return x.new_empty(*x.shape[: -1 - n], weight.shape[0], *(max(size, 0) for size in sizes))
    return convolve(x, weight, bias, stride, padding, dilation, groups)


def convolve_transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Window,
    padding: tuple[Window, ...],
    dilation: Window,
    groups: int = 1,
) -> Tensor:
    """The transpose of `convolve` in x; `padding` is what is cut off at either end (below 0: zeros are added)."""
    n = weight.dim() - 2
    flat = x.reshape(-1, *x.shape[-1 - n :])
    cut = [min(before, after) if min(before, after) > 0 else 0 for before, after in padding]
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    more = [
        a - b if p == b and 0 < a - b < max(s, d) else 0
        for (a, b), p, s, d in zip(padding, cut, stride, dilation, strict=True)
    ]
    y = run(
        flat,
        weight,
        None,
        stride,
        [a if m else p for (a, _), p, m in zip(padding, cut, more, strict=True)],
        more,
        groups,
        dilation,
    )
    rest = [(0, 0) if m else (p - a, p - b) for (a, b), p, m in zip(padding, cut, more, strict=True)]
    if any(a or b for a, b in rest):
        y = F.pad(y, [v for pair in reversed(rest) for v in pair])
    if bias is not None:
        y = y + bias.reshape(-1, *[1] * n)
    return y.reshape(*x.shape[: -1 - n], *y.shape[1:])


def pooled(x: Tensor, kind: str, kernel: Window, stride: Window, padding: Window) -> Tensor:
    """The maximum or the mean within windows over the last dims; what lies outside is left out."""
    n = len(kernel)
    flat = x.reshape(-1, 1, *x.shape[-n:])
    if kind == "max":
        y = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1](flat, kernel, stride, padding)
    else:
        y = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1](flat, kernel, stride, padding, count_include_pad=False)
    return y.reshape(*x.shape[:-n], *y.shape[2:])
