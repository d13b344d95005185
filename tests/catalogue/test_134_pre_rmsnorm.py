"""Card 134, Pre-RMSNorm and Pre-CRMSNorm transformers: its items under "What must hold"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.diagnostics import FlowError
from flowlang.rewrite import equivalent, rewrite
from flowlang.rewrite.prenorm import pre_crmsnorm
from tests.catalogue.nets import count, data, in_onnx, net

D = 32
VIT = """
net vit(norm: net = layernorm_plain, out: net = linear_out, centred: bool = false, width: int = 32) (x: R[C = 3, H = 16, W = 16]) {
  pre_ln_transformer(width, inner = 32, hidden = 48, depth = 3, classes = 7, norm = norm, out = out, centred = centred)(x)
}
"""
ZERO = {"out": "linear_zero_mean_out", "centred": "true"}


def vit(dtype: torch.dtype = torch.float64) -> Any:
    """A Pre-LN transformer; every parameter is N(0, 1), as in the authors' example."""
    module = fl.compile(VIT, flow="vit", seed=0, dtype=dtype)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return module


def compressed(module: Any) -> Any:
    """Rewrite 3: writers keep their first D - 1 rows, readers take the last column from the others."""
    text = VIT + "net small(x: R[C = 3, H = 16, W = 16]) { vit(norm = crmsnorm, width = 31)(x) }\n"
    small = fl.compile(text, flow="small", dtype=torch.float64)
    with torch.no_grad():
        for (name, p), q in zip(module.named_parameters(), small.parameters(), strict=True):
            if "linear_out" in name:
                q.copy_((p - p.mean(0))[:-1])
            elif name.endswith("place"):
                q.copy_((p - p.mean(-1, keepdim=True))[:, :-1])
            elif p.dim() == 2:
                q.copy_(p[:, :-1] - p[:, -1:])
            else:
                q.copy_(p)
    return small


def test_1_four_networks_are_one_function() -> None:
    """Item 1: Pre-LN, its main branch of mean 0, Pre-RMSNorm, Pre-CRMSNorm."""
    module = vit()
    x = data(4, 3, 16, 16)
    expected = module(x)
    by_command = [rewrite(module, to).module for to in ("pre_rmsnorm", "pre_crmsnorm")]
    for other in (
        equivalent(module, **ZERO), equivalent(module, norm="rmsnorm_plain", **ZERO), compressed(module), *by_command,
    ):  # fmt: skip
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-8)
    wrong = equivalent(module, norm="rmsnorm_plain")  # the norms alone are not equal
    assert not torch.allclose(wrong(x), expected, rtol=1e-2)


def test_2_and_3_the_norms() -> None:
    """Items 2 and 3: LN(x) = RMS(x - mean), CRMS(y) = RMS([y, -sum y])[:-1], eps and the denominator included."""
    x = 0.01 * data(6, D) + 3
    ln, rms = (net(f"{n}(x)", kind="norm", D=D) for n in ("layernorm_plain", "rmsnorm_plain"))
    torch.testing.assert_close(ln(x), rms(x - x.mean(-1, keepdim=True)), rtol=1e-12, atol=1e-12)
    y = 0.01 * data(6, D - 1)
    crms = net("crmsnorm(x)", kind="norm", D=D - 1)
    whole = torch.cat([y, -y.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(crms(y), rms(whole)[:, :-1], rtol=1e-12, atol=1e-12)
    wrong = y / torch.sqrt((y.square().sum(-1, keepdim=True) + y.sum(-1, keepdim=True) ** 2) / (D - 1) + 1e-5)
    assert (wrong - crms(y)).abs().max() > 1e-3
    torch.testing.assert_close(ln(x), torch.nn.functional.layer_norm(x, (D,)), rtol=1e-12, atol=1e-12)


def branch(module: Any, x: Tensor) -> list[Tensor]:
    """The main branch after each block, as [.., T, D]."""
    seen: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, __, out: seen.append(out))
        for m in module.modules()
        if type(m).__name__.startswith("PreNormBlock")
    ]
    module(x)
    for h in hooks:
        h.remove()
    return seen


def test_4_the_main_branch_has_mean_0() -> None:
    """Item 4: after the rewrite, at every block; before it does not."""
    module = vit()
    x = data(2, 3, 16, 16)
    before, after = branch(module, x), branch(equivalent(module, norm="rmsnorm_plain", **ZERO), x)
    assert len(before) == len(after) == 3
    assert max(float(v.detach().mean(-1).abs().max()) for v in after) < 1e-10
    assert min(float(v.detach().mean(-1).abs().max()) for v in before) > 0.5


def test_5_a_shift_of_the_main_branch_changes_nothing() -> None:
    """Item 5: as the certificate says, numerically, after any block."""
    module = vit()
    x = data(2, 3, 16, 16)
    expected = module(x)
    blocks = [m for m in module.modules() if type(m).__name__.startswith("PreNormBlock")]
    for block in blocks:
        hook = block.register_forward_hook(lambda _, __, out: out + 1.7)
        torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
        hook.remove()


POST = """
net block(norm: net = layernorm_plain) (x: R[T, D]) { norm[D]()(x + linear[D -> D](gelu(linear[D -> D](x)))) }
net post(norm: net = layernorm_plain) (x: R[T = 5, D = 8]) {
  h = x
  repeat 2 { h := block(norm)(h) }
  h
}
"""
HEADLESS = """
net block(norm: net = layernorm_plain) (x: R[T, D]) { x + linear[D -> D](gelu(linear[D -> D](norm[D]()(x)))) }
net bare(norm: net = layernorm_plain) (x: R[T = 5, D = 8]) {
  h = x
  repeat 2 { h := block(norm)(h) }
  h
}
"""


@pytest.mark.parametrize(("text", "name"), [(POST, "post"), (HEADLESS, "bare")])
def test_5_others_are_refused(text: str, name: str) -> None:
    """Item 5: a Post-LN network, and one whose head reads the branch without a norm."""
    module = fl.compile(text, flow=name)
    with pytest.raises(FlowError, match="does not forget its mean"):
        equivalent(module, norm="rmsnorm_plain")


def test_6_counts() -> None:
    """Item 6: compressed writers have (D - 1)/D of their rows, readers of their columns; the vector norms none at all."""
    module = vit()
    small = compressed(module)
    for (name, p), q in zip(module.named_parameters(), small.parameters(), strict=True):
        if "linear_out" in name or name.endswith("place") or p.dim() == 2:
            assert q.numel() * D == p.numel() * (D - 1), name
    assert count(equivalent(module, norm="rmsnorm_plain", **ZERO)) == count(module)
    for p, q in zip(pre_crmsnorm(module).parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_7_gradients_and_a_step_of_descent() -> None:
    """Item 7: equal gradients in the input, and equal functions after one step of SGD on the free weights."""
    first = vit()
    second, third = equivalent(first, norm="rmsnorm_plain", **ZERO), pre_crmsnorm(first)
    x, weight = data(2, 3, 16, 16), data(2, 7, seed=8)
    a, b, c = (x.clone().requires_grad_() for _ in range(3))
    for module, v in ((first, a), (second, b), (third, c)):
        (module(v) * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(a.grad, c.grad, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        for module in (first, second):
            for p in module.parameters():
                p -= 1e-3 * p.grad
    torch.testing.assert_close(first(x), second(x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["ln", "zero", "rms", "crms"])
def test_variants_export(kind: str, tmp_path: Path) -> None:
    module = fl.compile(VIT, flow="vit", seed=0)
    if kind == "zero":
        module = equivalent(module, **ZERO)
    elif kind != "ln":
        module = rewrite(module, f"pre_{kind}norm").module
    x = data(2, 3, 16, 16, dtype=torch.float32)
    found, _ = in_onnx(module.eval(), x, tmp_path)
    torch.testing.assert_close(torch.as_tensor(found), module(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "width", "hidden", "depth", "numbers"), [
    ("t", 192, 768, 12, 5_717_416), ("s", 384, 1536, 12, 22_050_664), ("b", 768, 3072, 12, 86_567_656), ("l", 1024, 4096, 24, 304_326_632),
])  # fmt: skip
def test_published_sizes(name: str, width: int, hidden: int, depth: int, numbers: int) -> None:
    """ViT-T, S, B and L for 224 x 224 pixels, as published, and what Pre-RMSNorm and Pre-CRMSNorm save: an offset for each norm, since
    the gains are the next layer's, and one row or column in the width."""
    sizes = {"C": 3, "H": 224, "W": 224}
    with torch.device("meta"):
        found = [
            count(net(f"pre_ln_vit_{name}({options})(x)", torch.float32, **sizes))
            for options in ("", "norm = layernorm_plain", f"norm = crmsnorm, width = {width - 1}")
        ]
    norms = 2 * depth + 1
    assert found[0] == numbers
    assert found[1] == numbers - 2 * width * norms
    one = (
        768 + 1 + 197 + 1 + depth * (3 * width + width + 1 + hidden + hidden + 1) + 1000
    )  # patches, tokens, blocks, head
    assert found[2] == found[1] - one


def test_a_class_token_is_rewritten_too() -> None:
    """From layer norms with gain and offset to RMSNorms, and without them to CRMSNorm: as for the networks of the presets."""
    base = "net small(norm: net = {}, out: net = linear_out, centred: bool = false, width: int = 12) (x: R[C = 3, H = 8, W = 8]) {{\n"
    base += "  pre_ln_transformer(width, 12, 3, 24, 2, 5, 4, norm, out, centred, true)(x)\n}}\n"
    for norm, to in (
        ("layer_norm", "pre_rmsnorm"),
        ("layernorm_plain", "pre_rmsnorm"),
        ("layernorm_plain", "pre_crmsnorm"),
    ):
        module: Any = fl.compile(base.format(norm), flow="small", seed=0, dtype=torch.float64)
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
        x = data(4, 3, 8, 8)
        torch.testing.assert_close(rewrite(module, to).module(x), module(x), rtol=1e-9, atol=1e-9)
