"""Card 048: EvoNorm (Liu et al. 2020). Tests carry the card's item numbers; the formulas are compared in tests/library/test_norms.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.catalogue.norms import count, data, norm, part, runs_in_onnx, trains

SIZES = {"C": 8, "H": 4, "W": 4}
C = (slice(None), None, None)
ALL = ["b0", "b1", "b2", "s0", "s1", "s2"]


def call(kind: str, **options: object) -> str:
    words = {**({"groups": 4} if kind[0] == "s" else {}), **options}
    return f"evonorm_{kind}({', '.join(f'{k} = {v}' for k, v in words.items())})"


def evonorm(kind: str, v: float | None = None, **options: object) -> torch.nn.Module:
    module = norm(call(kind, **options), **SIZES)
    if v is not None:
        with torch.no_grad():
            part(module, f"Evonorm{kind.title()}").v.fill_(v)
    return module


def instance(x: Tensor) -> Tensor:
    return (x.var((-2, -1), correction=0, keepdim=True) + 1e-5).sqrt()


def test_item_1_b0_without_v() -> None:
    x = data(6, 8, 4, 4)
    batch = (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()[C]
    assert torch.allclose(evonorm("b0", 0.0)(x), x / torch.maximum(batch, instance(x)))
    assert torch.allclose(evonorm("b0", 0.0)(x[:1]), x[:1] / instance(x[:1]))


def test_item_2_s0_without_v() -> None:
    x = data(6, 8, 4, 4)
    group = x.reshape(6, 4, 2, 4, 4).var((2, 3, 4), correction=0).repeat_interleave(2, 1)[..., None, None]
    assert torch.allclose(evonorm("s0", 0.0)(x), 0.5 * x / (group + 1e-5).sqrt(), rtol=1e-6)


@pytest.mark.parametrize(("kind", "v", "invariant"), [
    ("b0", 1.0, True), ("b0", -2.3, True), ("b2", None, True), ("s0", 0.0, True),
    ("b1", None, False), ("s1", None, False), ("s2", None, False), ("s0", 1.0, False),
])  # fmt: skip
@pytest.mark.parametrize("c", [0.3, 4.0])
def test_item_3_scale(kind: str, v: float | None, invariant: bool, c: float) -> None:
    module = evonorm(kind, v, eps=1e-14)
    x = data(6, 8, 4, 4)
    far = float((module(c * x) - module(x)).detach().abs().max())
    assert far < 1e-4 if invariant else far > 1e-2


@pytest.mark.parametrize("kind", ALL)
def test_item_4_other_samples(kind: str) -> None:
    module = evonorm(kind)
    x, y = data(4, 8, 4, 4), data(4, 8, 4, 4)
    y[1:] = data(3, 8, 4, 4, seed=1, scale=3)
    assert torch.equal(module(x)[0], module(y)[0]) == (kind[0] == "s")
    module.eval()
    assert torch.equal(module(x)[0], module(y)[0])


@pytest.mark.parametrize("kind", ["b0", "b1", "b2"])
def test_item_5_inference_uses_the_running_variance(kind: str) -> None:
    module = evonorm(kind)
    m = part(module, f"Evonorm{kind.title()}")
    x = data(6, 8, 4, 4, scale=2)
    trained = module(x)
    biased, n = x.var((0, 2, 3), correction=0), 6 * 16
    assert torch.allclose(m.running_var, 0.9 + 0.1 * biased * n / (n - 1))
    with torch.no_grad():
        m.running_var.copy_(biased)
    assert torch.allclose(module.eval()(x), trained, atol=1e-6)
    assert {k for k, _ in m.named_buffers()} == {"running_var"}  # the instance's own has none


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_item_6_the_denominator_stays_positive(sign: float) -> None:
    module = evonorm("b0")
    x = data(6, 8, 4, 4)
    x[0] = sign * 1e4
    y = module(x)
    assert torch.isfinite(y).all()
    assert (y.abs() <= x.abs() / (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()[C] + 1e-9).all()


@pytest.mark.parametrize("kind", ALL)
def test_without_activation_the_affine_map_is_left(kind: str) -> None:
    module = norm(call(kind, act="false"), moved=0.5, **SIZES)
    m = part(module, f"Evonorm{kind.title()}")
    x = data(6, 8, 4, 4)
    assert torch.allclose(module(x), x * m.gamma[C] + m.beta[C])
    assert not list(m.buffers())


@pytest.mark.parametrize("kind", ALL)
def test_sizes_onnx_training(kind: str, tmp_path: Path) -> None:
    expected = (3 if kind in ("b0", "s0") else 2) * 64
    assert count(f"net f(x: R[C, H, W]) {{ evonorm_{kind}()(x) }}", C=64, H=4, W=4) == expected
    runs_in_onnx(call(kind), tmp_path, **SIZES)
    trains(call(kind), **SIZES)
