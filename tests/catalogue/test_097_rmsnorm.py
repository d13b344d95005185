"""Card 097: RMSNorm and pRMSNorm (Zhang & Sennrich 2019). Tests carry the card's item numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import flowlang as fl
from flowlang.api import analyse
from flowlang.diagnostics import FlowError
from tests.catalogue.norms import count, data, gradient, norm, part, runs_in_onnx, same, trains

EXACT = "rms_norm(eps = 1e-8, outside = true)"
PARTIAL = "partial_rms_norm(p = 0.25)"


def ops(call: str) -> Counter[str]:
    comp = analyse(f"net f(x: R[D = 16]) {{ {call}(x) }}", {"D": 16})
    region = next(r for r in comp.regions["f"].walk() if "norm" in r.name)
    return Counter(n.op for n in region.graph)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_is_torch_s_layer(eps: float) -> None:
    module = norm(f"rms_norm(eps = {eps})", moved=0.5, D=16)
    other = nn.RMSNorm(16, eps=eps).double()
    other.load_state_dict({"weight": part(module, "RmsNorm").gamma.detach()})
    same(module, other, data(6, 16))


def test_item_1_unit_mean_square() -> None:
    module = norm("rms_norm(eps = 1e-14)", moved=0.5, D=16)
    y = module(data(6, 16)) / part(module, "RmsNorm").gamma
    assert (y.square().mean(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("call", [EXACT, PARTIAL])
@pytest.mark.parametrize("c", [-3.0, 0.2, 7.0])
def test_item_2_scale_of_the_input_and_of_the_weights(call: str, c: float) -> None:
    module = norm(call, moved=0.5, D=16)
    a = data(6, 16)
    assert torch.allclose(module(c * a), (1 if c > 0 else -1) * module(a), rtol=1e-5)
    text = f"net f(x: R[K]) {{ {call}(linear[K -> D = 16](x, bias = false)) }}"
    layer = fl.compile(text, flow="f", K=5, dtype=torch.float64)
    x = data(6, 5)
    y = layer(x)
    with torch.no_grad():
        layer.linear_weight.mul_(abs(c))
    assert torch.allclose(layer(x), y, rtol=1e-5)


def test_item_3_a_shift_is_seen() -> None:
    a = data(6, 16)
    rms, layer = norm(EXACT, D=16), norm("layer_norm()", D=16)
    assert (rms(a + 1) - rms(a)).norm() > 0.1
    assert (layer(a + 1) - layer(a)).norm() < 1e-5


def test_item_4_centred_inputs_make_it_layer_norm() -> None:
    a = data(6, 16)
    a = a - a.mean(-1, keepdim=True)
    assert torch.allclose(norm("rms_norm()", D=16)(a), norm("layer_norm()", D=16)(a), atol=1e-6)


@pytest.mark.parametrize("c", [0.1, 10.0])
def test_item_5_the_gradient_shrinks_as_the_weights_grow(c: float) -> None:
    layer = fl.compile(
        f"net f(x: R[K]) {{ {EXACT}(linear[K -> D = 16](x, bias = false)) }}", flow="f", K=5, dtype=torch.float64
    )
    x, dy = data(6, 5), data(6, 16, seed=1)
    (g,) = torch.autograd.grad(layer(x), layer.linear_weight, dy)
    with torch.no_grad():
        layer.linear_weight.mul_(c)
    (scaled,) = torch.autograd.grad(layer(x), layer.linear_weight, dy)
    assert torch.allclose(scaled, g / c, rtol=1e-5, atol=1e-7)


def test_item_6_the_jacobian_along_the_input_vanishes() -> None:
    module = norm(EXACT, moved=0.5, D=16)
    a = data(16)
    _, along = torch.autograd.functional.jvp(module, a, a)
    assert along.abs().max() < 1e-5


def test_the_backward_pass_is_the_closed_form() -> None:
    module = norm(EXACT, moved=0.5, D=16)
    g = part(module, "RmsNorm").gamma.detach()
    a, dy = data(6, 16), data(6, 16, seed=1)
    r = a.square().mean(-1, keepdim=True).sqrt()
    expected = g * dy / r - a * (g * dy * a).mean(-1, keepdim=True) / r**3
    assert torch.allclose(gradient(module, a, dy), expected, rtol=1e-6)


def test_item_7_partial_norms() -> None:
    a = data(6, 16)
    assert torch.equal(norm("partial_rms_norm(p = 1)", D=16)(a), norm(EXACT, D=16)(a))
    jacobian = torch.autograd.functional.jacobian(norm(PARTIAL, D=16), a[0])
    later = jacobian[:, 4:].clone()
    assert (jacobian[1:, :4] != 0).any()
    later[torch.arange(4, 16), torch.arange(12)] = 0
    assert torch.equal(later, torch.zeros_like(later))


def test_item_8_one_reduction_and_no_difference() -> None:
    rms, layer = ops("rms_norm()"), ops("layer_norm()")
    assert rms["sub"] == 0 < layer["sub"]
    assert rms["mean"] + rms["var"] == 1 < layer["mean"] + layer["var"] == 2


def test_item_9_is_no_bijector() -> None:
    with pytest.raises(FlowError, match="FL04"):
        fl.compile("bijector f(x: R[D]) { rms_norm()(x) }", flow="f", D=3)
    report = fl.check(
        "bijector f(x: R[D]) { x / sqrt(mean[D](x ^ 2) + 1e-5) }\nflow g { data x: R[D = 3]\n f\n base normal }"
    )
    assert any(d.code.startswith("FL04") for d in report)


def test_the_cell_is_the_card_s_formula() -> None:
    module = fl.compile("net f(x: R[D], h: R[H]) { rms_gru_cell()(x, h) }", flow="f", D=3, H=4, dtype=torch.float64)
    cell = part(module, "RmsGruCell")
    x, h = data(5, 3), data(5, 4, seed=1)
    weights = [p.detach() for n, p in cell.named_parameters() if n.startswith("linear")]
    u, w, uh, wx = weights

    def rms(a: torch.Tensor) -> torch.Tensor:
        return a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    z, r = torch.sigmoid(rms(h @ u.T) + rms(x @ w.T)).chunk(2, -1)
    new = torch.tanh(rms(x @ wx.T) + r * rms(h @ uh.T))
    assert torch.allclose(module(x, h), (1 - z) * h + z * new)


def test_sizes_onnx_training(tmp_path: Path) -> None:
    assert count("net f(x: R[D]) { rms_norm()(x) }", D=512) == 512
    assert count("net f(x: R[D]) { rms_norm(bias = true)(x) }", D=512) == 1024
    for call in ("rms_norm()", EXACT, PARTIAL):
        runs_in_onnx(call, tmp_path, D=16)
    trains("rms_norm()", D=16)
    trains("recurrent(4, rms_gru_cell())", T=5, D=3)
