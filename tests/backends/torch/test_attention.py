"""Attention that is written out is torch's kernel, and says so: equal values and gradients, of any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowlang as fl
from flowlang.api import generate
from tests.catalogue.nets import data, in_onnx, shaken

QKV = """net f(q: R[T = 5, h = 2, d = 3], k: R[S = 4, h = 2, d = 3], v: R[S = 4, h = 2, e = 6]) -> R[T, h, e] {
  a: R[h, T, S] = softmax[S](sum[d](q * k) / sqrt(q.d))
  sum[S](a * v)
}
"""
FOUND = {
    "written out": ("net f(x: R[T = 5, D = 8]) { pre_norm_block(8, 2, 16)(x) }", 1), "library": ("net f(x: R[T = 5, D = 8]) { attention[T](x, 2) }", 1),
    "causal": ("net f(x: R[T = 5, D = 8]) { attention[T](x, 2, causal = true) }", 1), "stack": ("net f(x: R[T = 5, D = 8]) { repeat 2 { x := x + attention[T](x, 4) }; x }".replace("x := x", "h := h").replace("{ repeat", "{ h = x; repeat").replace("attention[T](x", "attention[T](h").replace("; x }", "; h }"), 1),
    "three values": (QKV, 1), "one head": ("net f(x: R[T = 5, D = 8]) -> R[T, D] { a: R[T, S = T] = softmax[S](sum[D](x * x[T -> S])); sum[S](a * x[T -> S]) }", 1),
}  # fmt: skip
OTHERS = {
    "weights are read again": "net f(x: R[T = 5, D = 8]) -> R[T, D] { a: R[T, S = T] = softmax[S](sum[D](x * x[T -> S])); sum[S](a * x[T -> S]) + sum[S](a) }",
    "a scale that is learnt": "net f(x: R[T = 5, D = 8]) -> R[T, D] { param s: R = 1; a: R[T, S = T] = softmax[S](s * sum[D](x * x[T -> S])); sum[S](a * x[T -> S]) }",
    "another softmax": "net f(x: R[T = 5, D = 8]) -> R[T, D] { a: R[T, S = T] = softmax[T](sum[D](x * x[T -> S])); sum[S](a * x[T -> S]) }",
}  # fmt: skip


def both(text: str) -> tuple[Any, Any]:
    """The module, and one whose scores cannot be told: 0 · x is added to them in the runtime's place of the kernel."""
    module = shaken(fl.compile(text, flow="f", seed=0, dtype=torch.float64))
    return module, [data(3, *s, seed=k) for k, s in enumerate(module.inputs.values())]


@pytest.mark.parametrize("case", FOUND)
def test_the_kernel_is_used_and_named(case: str) -> None:
    text, count = FOUND[case]
    source, _ = generate(text, flow="f", standalone=False)
    assert source.count("torch's own scaled_dot_product_attention") == count
    assert source.count("attend(") == count


@pytest.mark.parametrize("case", OTHERS)
def test_other_formulas_are_written_out(case: str) -> None:
    assert "attend(" not in generate(OTHERS[case], flow="f", standalone=False)[0]


@pytest.mark.parametrize("case", FOUND)
def test_values_and_gradients_are_the_formula_s(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the module whose kernel is replaced by the formula; by finite differences, twice."""
    import flowlang.backends.torch.runtime as runtime

    text, _ = FOUND[case]
    module, values = both(text)
    inside = next(vars(m) for n, m in __import__("sys").modules.items() if n == type(module).__module__)
    ours = [v.clone().requires_grad_() for v in values]
    y = module(*ours)
    monkeypatch.setitem(
        inside, "attend", lambda q, k, v, scale, causal=False: runtime.attend_plain(q, k, v, scale, causal)
    )
    theirs = [v.clone().requires_grad_() for v in values]
    z = module(*theirs)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    weight = data(*y.shape, seed=9)
    parameters = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad((y * weight).sum(), [*ours, *parameters], allow_unused=True),
        torch.autograd.grad((z * weight).sum(), [*theirs, *parameters], allow_unused=True), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    monkeypatch.undo()
    small = [v[:1].clone().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(module, small)
    assert torch.autograd.gradgradcheck(module, small)


def test_compiled_mapped_exported(tmp_path: Path) -> None:
    module = shaken(fl.compile(FOUND["causal"][0], flow="f", seed=0))
    x = data(3, 5, 8, dtype=torch.float32)
    expected = module(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), expected)
    torch.testing.assert_close(torch.vmap(module)(x), expected)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), expected)
    found, _ = in_onnx(module, x, tmp_path)
    torch.testing.assert_close(torch.as_tensor(found), expected.detach(), rtol=1e-4, atol=1e-5)
