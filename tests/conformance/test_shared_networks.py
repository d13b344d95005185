"""LANGUAGE.md §3: a network bound to a name, or given as an argument, is one, whoever uses it and however often.

The networks here are those that make weights themselves (`linear`, `conv`, `autoregressive_mlp`), which stand in no
module of their own: their weights belong to the body in which the network is bound.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flowlang as fl
from tests.conformance.support import codes, made, parameters

REPEATED = "net f(x: R[D = 3]) { g = linear[D -> D];  h = x;  repeat 3 { h := tanh(g(h)) };  h }"
GIVEN = "net s(g: net) (x: R[D]) { h = x;  repeat 3 { h := tanh(g(h)) };  h }\n"
SHARED = {
    "repeat": REPEATED,
    "for": REPEATED.replace("repeat 3", "for i in 0..3"),
    "nested repeats": REPEATED.replace("repeat 3 { h := tanh(g(h)) }", "repeat 3 { repeat 2 { h := tanh(g(h)) } }"),
    "a list": REPEATED.replace("g = linear[D -> D]", "gs = [linear[D -> D]]").replace("g(h)", "gs[0](h)"),
    "a preset": "net lin(x: R[D]) { linear[D -> D](x) }\nnet big = lin\n" + REPEATED.replace("linear[D -> D]", "big"),
    "a bare name": "net lin(x: R[D]) { linear[D -> D](x) }\n" + REPEATED.replace("linear[D -> D]", "lin"),
    "a scan": "net f(x: R[T = 4, D = 3]) { g = linear[D -> D];  h: R[D] = 0;  scan T { h := tanh(g(h) + x);  y = h };  y }",
    "an argument": GIVEN + "net f(x: R[D = 3]) { s(linear[D -> D])(x) }",
    "a bare argument": GIVEN.replace("h :=", "h: R[D] :=") + "net f(x: R[D = 3]) { s(linear)(x) }",
    "a default": GIVEN.replace("g: net", "g: net = linear[D -> D]") + "net f(x: R[D = 3]) { s()(x) }",
    "two callees": GIVEN + "net f(x: R[D = 3]) { g = linear[D -> D];  g(s(g)(s(g)(x))) }",
    "handed on": GIVEN + "net t(k: net) (x: R[D]) { k(k(x)) }\n"
    "net f(x: R[D = 3]) { g = linear[D -> D];  k = s(g);  g(t(s(g))(t(k)(x))) }",
    "a lifted call": GIVEN + "net f(x: R[T = 2, D = 3]) { g = linear[D -> D];  s[D](g)(s[D](g)(x)) }",
    "axes of other names": "net f(x: R[D = 3]) { g = linear;  a: R[E = 3] = g(x);  b: R[D] = g(a);  b }",
    "conv": "net f(x: R[C = 1, H = 3, W = 4]) { g = conv(1, kernel = [1, 11]);  repeat 2 { x := g(g(x)) };  x }",
    "two programs": "model f { data x: R[D = 3];  g = linear[D -> D];  def loss { mean(g(x) ^ 2) }\n"
    "def twice(x) { h = x;  repeat 2 { h := g(h) };  h } }",
}


@pytest.mark.parametrize("how", SHARED)
def test_a_network_bound_outside_is_one(how: str) -> None:
    assert parameters(SHARED[how]) == 12


OWN = {
    "written inside": "net f(x: R[D = 3]) { repeat 3 { x := tanh(linear[D -> D](x)) };  x }",
    "bound inside": "net f(x: R[D = 3]) { repeat 3 { g = linear[D -> D];  x := g(tanh(g(x))) };  x }",
    "a fresh one": "net f(x: R[D = 3]) { g = linear[D -> D];  g()(g()(g()(x))) }",
    "an argument inside": GIVEN + "net f(x: R[D = 3]) { repeat 3 { x := s(linear[D -> D])(x) };  x }",
    "a list inside": "net f(x: R[D = 3]) { for g in [linear[D -> D] for i in 0..3] { x := g(g(x)) };  x }",
}


@pytest.mark.parametrize("how", OWN)
def test_a_network_bound_inside_is_each_copys_own(how: str) -> None:
    assert parameters(OWN[how]) == 36


def test_a_shared_network_computes_what_one_network_does() -> None:
    m, x = made(REPEATED), torch.randn(5, 3, dtype=torch.float64)
    h = x
    for _ in range(3):
        h = torch.tanh(F.linear(h, m.g_weight, m.g_bias))
    assert torch.allclose(m(x), h, atol=1e-14)
    assert list(m.state_dict()) == ["g_weight", "g_bias"]
    grad = torch.autograd.grad(m(x).sum(), m.g_weight)[0]
    assert torch.allclose(grad, torch.autograd.grad(h.sum(), m.g_weight)[0], atol=1e-13)


def test_copies_of_their_own_do_not_share() -> None:
    m, x = made(OWN["bound inside"]), torch.randn(5, 3, dtype=torch.float64)
    h = x
    for b in m.blocks:
        h = F.linear(torch.tanh(F.linear(h, b.g_weight, b.g_bias)), b.g_weight, b.g_bias)
    assert torch.allclose(m(x), h, atol=1e-14)


def test_the_compiler_notes_that_copies_share_it() -> None:
    assert [d.code for d in fl.check(REPEATED)] == ["FL0214"]
    assert [d.code for d in fl.check(OWN["bound inside"])] == []


def test_a_weights_own_map_is_shared_with_it() -> None:
    assert parameters(REPEATED.replace("linear[D -> D]", "linear[D -> D](weight = weight_norm)")) == 15


def test_one_network_has_one_size() -> None:
    text = "net f(x: R[D = 3]) { g = linear;  a: R[E = 4] = g(x);  b: R[D] = g(a);  b }"
    assert codes(text) == ["FL0301"]


def test_a_bounded_linear_map_is_bounded() -> None:
    m = made("net f(x: R[D = 3]) { lipschitz(linear[D -> D](start = normal(0, 9)), 0.5)(x) }")
    slope = m(torch.eye(3, dtype=torch.float64)) - m(torch.zeros(3, 3, dtype=torch.float64))
    assert torch.linalg.matrix_norm(slope, 2) <= 0.5 + 1e-12


@pytest.mark.parametrize("call", ["frozen(g)(x)", "frozen(s(g))(x)", "frozen(s(linear[D -> D]))(x)"])
def test_a_frozen_network_gets_no_gradient(call: str) -> None:
    text = "net s(g: net) (x: R[D]) { g(x) }\nmodel f { data x: R[D = 3];  g = linear[D -> D];  def loss { mean(CALL + g(x)) } }"
    m, x = made(text.replace("CALL", call)), torch.randn(4, 3, dtype=torch.float64)
    m.loss(x).backward()
    found = dict(m.named_parameters())
    assert torch.allclose(found["g_bias"].grad, torch.full((3,), 1 / 3, dtype=torch.float64))  # of g(x) alone
    assert all(p.grad is None or not p.grad.any() for n, p in found.items() if not n.startswith("g_"))


COUPLING = "bijector shear(g: net) (x: R[D]) { a: R[D], b: R[D] = g(x);  x * exp(tanh(a)) + b }\n"
FLOWS = {
    "linear": "flow f { data x: R[D = 4];  g = linear;  repeat 3 { affine_coupling(net = g);  reverse };  base normal }",
    "made": COUPLING
    + "flow f { data x: R[D = 3];  g = autoregressive_mlp[D](hidden = [4]);  repeat 2 { shear(g);  reverse }\n"
    "shear(g);  base normal }",
    "conv": "flow f { data x: R[C = 2, H = 3, W = 3];  g = conv(kernel = 3);  repeat 2 { affine_coupling[C](net = g);  reverse[C] }\n"
    "base normal }",
    "weight map": "flow f { data x: R[D = 4];  g = linear(weight = weight_norm);  repeat 2 { affine_coupling(net = g);  reverse }\n"
    "affine_coupling(net = g);  base normal }",
    "one bijector": "flow f { data x: R[D = 4];  g = linear;  c = affine_coupling(net = g);  c;  reverse;  inverse(c);  c;  base normal }",
    "lifted": "flow f { data x: R[T = 2, D = 4];  g = linear[D];  repeat 2 { affine_coupling[D](net = g);  reverse[D] };  base normal }",
    "residual": "flow f { data x: R[D = 3];  g = linear[D -> D];  repeat 2 { residual_block(net = g);  reverse };  base normal }",
    "by hand": "bijector h(g: net) (x: R[D]) { a, b = halves[D](x);  s: R[b.D] = g(a)\n"
    "def inverse(y) { u, w = halves[D](y);  t: R[w.D] = g(u);  join[D](u, w - t) }\n"
    "join[D](a, b + s) }\nflow f { data x: R[D = 4];  g = linear;  h(g);  reverse;  h(g);  base normal }",
}
COUNTS = {
    "linear": 12,
    "made": 46,
    "conv": 20,
    "weight map": 16,
    "one bijector": 12,
    "lifted": 12,
    "residual": 12,
    "by hand": 6,
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_shared_network_has_its_inverse_and_log_det(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    m = made(FLOWS[name]).eval()
    with torch.no_grad():
        for p in m.parameters():
            p += 0.2 * torch.randn_like(p)
    assert sum(p.numel() for p in m.parameters()) == COUNTS[name]
    x = torch.randn(4, *m.data_shape, dtype=torch.float64)
    z, log_det = m(x)
    assert torch.allclose(m.inverse(z)[0], x, atol=1e-9)
    if name != "residual":  # whose log-det is an estimate
        for k in range(4):
            j = torch.autograd.functional.jacobian(lambda v: m(v[None])[0].flatten(), x[k]).reshape(z[0].numel(), -1)
            assert abs(torch.linalg.slogdet(j)[1] - log_det[k]) <= 1e-10
    m.log_prob(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in m.parameters())
    other = copy.deepcopy(m)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x)[0], z)
    fl.save(m, tmp_path / "m.safetensors")
    assert torch.allclose(fl.load(tmp_path / "m.safetensors").double()(x)[0], z, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "made", "conv", "weight map", "one bijector"])
def test_a_shared_network_is_exported(name: str, tmp_path: Path) -> None:
    m = fl.compile(FLOWS[name], seed=0).eval()
    x = torch.randn(6, *m.data_shape)
    assert np.allclose(exported(m, x, tmp_path / "m.onnx"), m.log_prob(x).detach().numpy(), atol=1e-4)


def test_a_shared_network_stands_once_in_the_exported_file(tmp_path: Path) -> None:
    import onnx

    m = fl.compile(FLOWS["linear"].replace(";  reverse", ""), seed=0).eval()  # which is folded into weights
    exported(m, torch.randn(6, 4), tmp_path / "m.onnx")
    held = [i.dims for i in onnx.load(tmp_path / "m.onnx").graph.initializer if len(i.dims) == 2]
    assert sum(math.prod(dims) for dims in held) == 2 * 4, held  # whole, or as the layers that it was split into


def exported(m: Any, x: torch.Tensor, path: Path) -> np.ndarray:
    import onnxruntime as ort

    fl.export_onnx(m, path, programs=["log_prob"])
    session = ort.InferenceSession(path)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
