"""Sums and extrema over the batch, updates of a part, borders and new sizes: beside torch's own, and in ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flowlang as fl
from tests.catalogue.nets import in_onnx

IMAGE = "R[C = 3, H = 4, W = 5]"


def compiled(body: str, type_: str = IMAGE, dtype: torch.dtype = torch.float64, kind: str = "norm") -> Any:
    return fl.compile(f"{kind} f(x: {type_}) {{ {body} }}", flow="f", dtype=dtype, seed=0)


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def agrees(body: str, expected: Any, type_: str = IMAGE, shape: tuple[int, ...] = (6, 3, 4, 5)) -> None:
    x = data(*shape).requires_grad_()
    y = x.detach().clone().requires_grad_()
    found, other = compiled(body, type_)(x), expected(y)
    torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)
    weight = data(*found.shape, seed=1)
    (found * weight).sum().backward(), (other * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("body", "expected"), [
    ("x - sum[B](x)", lambda x: x - x.sum(0)), ("x - sum[B, H, W](x)", lambda x: x - x.sum((0, 2, 3))[:, None, None]),
    ("x - max[B, H](x)", lambda x: x - x.amax((0, 2))[:, None]), ("x - min[B](x)", lambda x: x - x.amin(0)),
    ("g: R[C, C'] = sum[B](mean[H, W](x) * mean[H, W](x)[C -> C']); sum[C'](g * x[C -> C'])",
     lambda x: torch.einsum("cd,bdhw->bchw", x.mean((2, 3)).T @ x.mean((2, 3)), x)),
])  # fmt: skip
def test_sums_and_extrema_over_the_batch(body: str, expected: Any) -> None:
    agrees(body, expected)


def test_a_sum_over_the_batch_takes_every_batch_dimension() -> None:
    x = data(2, 6, 3, 4, 5)
    torch.testing.assert_close(compiled("x - sum[B](x)")(x), x - x.sum((0, 1)))


@pytest.mark.parametrize(("body", "words"), [
    ("x * sum[B](ones[C])", "one for the whole batch"), ("x * prod[B](x)", "over the batch has no meaning"),
])  # fmt: skip
def test_what_has_no_sum_over_the_batch_is_refused(body: str, words: str) -> None:
    assert words in " ".join(d.message for d in fl.check(f"norm f(x: {IMAGE}) {{ {body} }}"))


def test_what_a_sum_over_the_batch_says_of_the_norm() -> None:
    with pytest.raises(fl.FlowError, match="FL04"):
        fl.compile(f"bijector f(x: {IMAGE}) {{ x - sum[B](x) }}", flow="f")
    assert not fl.check(f"norm f(x: {IMAGE}) {{ x / (max[B](abs(x)) + 1) + log(sum[B](x ^ 2) + 1) }}")


@pytest.mark.parametrize(("body", "place", "value"), [
    ("x[H = 1] := 0", (slice(None), slice(None), 1), lambda x: 0 * x),
    ("x[H = -1] := 2 * x[H = 0]", (slice(None), slice(None), 3), lambda x: 2 * x[:, :, :1]),
    ("x[H = 1..3] := mean[H](x)", (slice(None), slice(None), slice(1, 3)), lambda x: x.mean(2, keepdim=True)),
    ("x[W = 3..] := 0", (..., slice(3, 5)), lambda x: 0 * x),
    ("x[C = 1, W = 2] := x[C = 0, W = 0] + 1", (slice(None), 1, slice(None), 2), lambda x: x[:, :1, :, :1] + 1),
])  # fmt: skip
def test_a_part_is_updated(body: str, place: Any, value: Any) -> None:
    def expected(x: Tensor) -> Tensor:
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[place] = True
        return torch.where(mask, value(x).expand_as(x), x)

    agrees(f"{body}; x", expected)


def test_a_ring_of_the_last_batches() -> None:
    """A state of which each batch writes one row, by an index that is counted."""
    body = """
      state rows: R[M = 3, C] = 0, steps: Int = 0
      if training {
        rows[M = mod(steps, 3)] := mean[B](x)
        steps := steps + 1
      }
      x - mean[M](rows)
    """
    module = compiled(body, "R[C = 2]")
    kept = torch.zeros(3, 2, dtype=torch.float64)
    for k in range(7):
        x = data(5, 2, seed=k)
        kept[k % 3] = x.mean(0)
        torch.testing.assert_close(module(x), x - kept.mean(0))
    torch.testing.assert_close(module.rows, kept)


@pytest.mark.parametrize(("body", "words"), [
    ("y = x; y[C = 7] := 0; y", "7"), ("y = x; y[D = 0] := 0; y", "no axis `D`"), ("y = x; y[C = 0..2] := x; y", "this part is"),
    ("x[C = 0] = 1; x", "updated, and not bound"), ("y = 2; y[C = 0] := 1; x", "do not apply"),
])  # fmt: skip
def test_updates_that_do_not_fit_are_refused(body: str, words: str) -> None:
    found = fl.check(f"net f(x: {IMAGE}) {{ {body} }}")
    assert words in " ".join(d.message for d in found)
    assert all(d.suggestion for d in found)


@pytest.mark.parametrize("border", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("amount", ["1", "[2, 0]", "[0, 3]"])
def test_borders_are_torch_s(border: str, amount: str) -> None:
    before, after = (1, 1) if amount == "1" else eval(amount)
    mode = {"zeros": "constant"}.get(border, border)
    agrees(f"pad[H, W](x, {amount}, border = {border})", lambda x: F.pad(x, (before, after, before, after), mode=mode))


@pytest.mark.parametrize("method", ["nearest", "linear"])
@pytest.mark.parametrize("sizes", [(8, 10), (2, 3), (7, 4), (4, 9)])
def test_new_sizes_are_torch_s(method: str, sizes: tuple[int, int]) -> None:
    more = {"mode": "nearest"} if method == "nearest" else {"mode": "bilinear", "align_corners": False}
    body = f"resize[H = {sizes[0]}, W = {sizes[1]}](x, method = {method})"
    agrees(body, lambda x: F.interpolate(x, size=sizes, **more))


@pytest.mark.parametrize(("body", "code"), [
    ("pad[H](x, 4, border = reflect)", "FL0312"), ("pad[Q](x, 1)", "FL0302"), ("pad[H](x)", "FL0203"), ("pad[H](x, 1, mode = 2)", "FL0202"),
    ("pad[H](x, 1, border = mirror)", "FL0306"), ("resize[H](x)", "FL0203"), ("resize[H = 0](x)", "FL0312"), ("resize[H = 2](x, size = 3)", "FL0202"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(body: str, code: str) -> None:
    found = [d for d in fl.check(f"net f(x: {IMAGE}) {{ {body} }}") if d.severity == "error"]
    assert code in [d.code for d in found]
    assert all(d.suggestion for d in found)


@pytest.mark.parametrize("body", [
    "x - sum[B, H](x)", "x / (max[B](abs(x)) + 1)", "y = x; y[H = 1] := 0; y[C = 0..2] := mean[C](x); y",
    "pad[H, W](x, [1, 2], border = reflect)", "resize[H = 7, W = 3](x, method = linear)", "resize[H = 8](x)",
])  # fmt: skip
def test_all_of_it_in_onnx(body: str, tmp_path: Path) -> None:
    module = compiled(body, dtype=torch.float32).eval()
    x = data(4, 3, 4, 5, dtype=torch.float32)
    found, _ = in_onnx(module, x, tmp_path)
    np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=1e-5, atol=1e-5)
