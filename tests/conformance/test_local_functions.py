"""LANGUAGE.md §2: functions are values; a `def` closes over its owner and makes no instances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flowlang as fl
from tests.conformance.support import codes, made, told, value

X = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
TWICE = "net twice(k: {}) (x: R[D]) {{ k(k(x)) }}\n"


@pytest.mark.parametrize("kind", ["net", "fn"])
def test_a_local_function_is_a_network_argument(kind: str) -> None:
    text = TWICE.format(kind) + "net f(x: R[D]) { def g(a) { 2 * a + 1 };  twice(g)(x) }"
    assert torch.equal(value(text, X, D=3), 4 * X + 3)


def test_it_closes_over_values_and_networks_of_its_owner() -> None:
    text = TWICE.format("net") + (
        "net f(x: R[D]) { param w: R[D] = 3;  m = linear[D -> D];  c = 10\n"
        "def g(a) { w * m(a) + x + c };  y = twice(g)(x);  m(y) + twice(g)(y) }"
    )
    m = made(text, D=3)
    assert sorted(m.state_dict()) == ["m_bias", "m_weight", "w"]

    def g(a: torch.Tensor) -> torch.Tensor:
        return m.w * F.linear(a, m.m_weight, m.m_bias) + X + 10

    y = g(g(X))
    assert torch.allclose(m(X), F.linear(y, m.m_weight, m.m_bias) + g(g(y)), atol=1e-12)


def test_its_names_are_its_owners_not_its_callers() -> None:
    text = "net other(k: net) (x: R[D]) { c = 100;  k(x) + c }\nnet f(x: R[D]) { c = 1;  def g(a) { a + c };  other(g)(x) }"
    assert torch.equal(value(text, X, D=3), X + 101)


def test_it_may_be_handed_on_and_used_in_copies() -> None:
    text = TWICE.format("net") + (
        "net outer(j: net) (x: R[D]) { def l(b) { j(b) + 1 };  repeat 2 { x := twice(l)(x) };  twice(j)(x) }\n"
        "net f(x: R[D]) { m = mlp(4);  def g(a) { y: R[D] = m(a);  y };  outer(g)(x) }"
    )
    m = made(text, D=3)
    assert all(k.startswith("m.") for k in m.state_dict())
    g = lambda a: m.m(a)  # noqa: E731
    x = X
    for _ in range(2):
        x = g(g(x) + 1) + 1
    assert torch.allclose(m(X), g(g(x)), atol=1e-12)


SHEAR = "bijector shear(net: net) (x: R[D]) { a, b = halves[D](x);  s: R[b.D], t: R[b.D] = net(a);  join[D](a, b * exp(tanh(s)) + t) }\n"
FLOW = SHEAR + (
    "flow f { data x: R[D = 4];  given c: R[C = 2];  m = mlp(8)\n"
    "def g(a) { s: R[a.D], t: R[a.D] = m(a, c);  s, tanh(t) }\n"
    "shear(g);  reverse;  repeat 2 { shear(g);  reverse };  base normal }"
)


def test_a_flow_through_a_local_function_is_inverted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    m = made(FLOW)
    with torch.no_grad():
        for p in m.parameters():
            p += 0.2 * torch.randn_like(p)
    x, c = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    z, log_det = m(x, c=c)
    assert torch.allclose(m.inverse(z, c=c)[0], x, atol=1e-12)
    for k in range(4):
        j = torch.autograd.functional.jacobian(lambda v, k=k: m(v[None], c=c[k : k + 1])[0][0], x[k])
        assert abs(torch.linalg.slogdet(j)[1] - log_det[k]) <= 1e-10
    import onnxruntime as ort

    single = m.float()
    fl.export_onnx(single, tmp_path / "m.onnx", programs=["log_prob"])
    session = ort.InferenceSession(tmp_path / "m.onnx")
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, [x.float().numpy(), c.float().numpy()], strict=True)))[0]
    assert np.allclose(found, single.log_prob(x.float(), c=c.float()).detach().numpy(), atol=1e-4)


def test_a_models_function_is_a_field_of_its_programs() -> None:
    text = (
        "model f { data x: R[D = 3];  m = mlp(8, act = tanh);  def v(x, t) { y: R[D] = m(x, t);  y }\n"
        "def log_prob(x) { z, l = cnf(v, rk4(steps = 4))(x);  normal.log_prob(z) + l }\n"
        "def loss { t ~ uniform(0, 1);  mean(v(x, t) ^ 2) } }"
    )
    m = made(text)
    assert m.log_prob(X.expand(2, 3)).shape == (2,)
    assert all(k.startswith("m.") for k in m.state_dict())


def test_a_value_that_the_map_reads_twice_is_still_found() -> None:
    """A function that reads what is mapped makes it arrive twice."""
    text = SHEAR + "bijector b(x: R[D]) { def g(a) { s = a * sum[D](x);  s, s };  shear(g)(x) }"
    assert codes(text + "\nflow f { data x: R[D = 4];  b;  base normal }") == ["FL0401"]


def test_a_function_that_gives_another_shape_is_told() -> None:
    found = told("flow f { data x: R[D = 4];  def g(a) { a };  affine_coupling(net = g);  base normal }")
    assert [t.split()[0] for t in found] == ["FL0308"]


def test_a_function_takes_as_many_values_as_it_names() -> None:
    assert codes(TWICE.format("net") + "net f(x: R[D]) { def g(a, b) { a + b };  twice(g)(x) }") == ["FL0203"]
