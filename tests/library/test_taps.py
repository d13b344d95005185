"""`tap` and `with`: inner values of networks read and replaced, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowlang as fl
from tests.catalogue.programs import same_in_onnx

NETS = """
net inner(x: R[D]) {
  a = tanh(linear[D -> D](x))
  b = a * x
  linear[D -> D](b)
}
net outer(x: R[D], t: R) -> R[D] {
  parts = [inner() for i in 0..3]
  h = x + t
  for p in parts { h := h + p(h) }
  last = inner(h)
  h + last
}
net rough(x: R[D]) {
  l = linear[D -> D](x)
  positive = sigmoid(l)
  repeat 2 { l := l + inner(l) }
  sqrt(positive) + l
}
net wide(x: R[D]) -> R[out] {
  h = tanh(linear[D -> H = 5](x))
  linear[H -> out](h)
}
"""
MODEL = (
    NETS
    + """
model m(v: net = outer(), r: net = rough(), w: net = wide()) {
  data x: R[D = 3]
  def plain(x, t: R) { v(x, t) }
  def read(x, t: R) {
    u, a, l = v.tap(parts[1].a, inner.b)(x, t)
    u, a, l
  }
  def all(x, t: R) {
    u, a = v.tap(parts.a)(x, t)
    stack[K](a)
  }
  def swap(x, t: R, y: R[D = 3]) {
    u, a = v.tap(parts[1..].a)(y, t)
    v.with(parts[1..].a = a)(x, t)
  }
  def both(x, t: R, y: R[D = 3]) {
    u, l = v.with(parts[0].a = tanh(y)).tap(last)(x, t)
    u, l
  }
  def followed(x, y: R[D = 3]) { integrate(v.with(last = y), x, t = 0 -> 1, euler(steps = 3)) }
  def open(x) { u, h = w.tap(h)[-> D](x)
    u, h }
  def still(x, t: R, y: R[D = 3]) { mean(frozen(v).with(last = y)(x, t) ^ 2) }
}
"""
)


@pytest.fixture(scope="module")
def model() -> Any:
    return fl.compile(MODEL, flow="m", seed=0, dtype=torch.float64)


@pytest.fixture
def values() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(4, 3, generator=g, dtype=torch.float64),
        torch.rand(4, generator=g, dtype=torch.float64),
        torch.randn(4, 3, generator=g, dtype=torch.float64),
    ]


def seen(
    module: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    a: dict[int, torch.Tensor] | None = None,
    last: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """The outer network by the weights of its parts."""

    def run(part: Any, h: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, bias, second, bias2 = part.parameters()
        inside = (a or {}).get(k, torch.tanh(h @ first.T + bias))
        return inside, inside * h, (inside * h) @ second.T + bias2

    h, inside = x + t[:, None], []
    for k, part in enumerate((module.parts, module.parts_2, module.parts_3)):
        found, _, out = run(part, h, k)
        inside.append(found)
        h = h + out
    _, b, out = run(module.inner, h, 3)
    out = out if last is None else last
    return h + out, inside, b, out


def test_what_is_read_is_what_is_computed(model: Any, values: list[torch.Tensor]) -> None:
    x, t, _ = values
    wanted, inside, b, _ = seen(model.v, x, t)
    u, a, l = model.read(x, t)
    torch.testing.assert_close(u, wanted)
    assert torch.equal(u, model.plain(x, t))
    torch.testing.assert_close(a, inside[1])
    torch.testing.assert_close(l, b)
    torch.testing.assert_close(model.all(x, t), torch.stack(inside, 1))


def test_what_replaces_is_what_the_rest_sees(model: Any, values: list[torch.Tensor]) -> None:
    x, t, y = values
    _, inside, _, _ = seen(model.v, y, t)
    torch.testing.assert_close(model.swap(x, t, y), seen(model.v, x, t, {1: inside[1], 2: inside[2]})[0])
    u, l = model.both(x, t, y)
    wanted = seen(model.v, x, t, {0: y.tanh()})
    torch.testing.assert_close(u, wanted[0])
    torch.testing.assert_close(l, wanted[3])


def test_in_fields_in_open_networks_and_frozen(model: Any, values: list[torch.Tensor]) -> None:
    x, t, y = values
    z = x
    for k in range(3):
        z = z + seen(model.v, z, torch.full_like(t, k / 3), last=y)[0] / 3
    torch.testing.assert_close(model.followed(x, y), z)
    u, h = model.open(x)
    assert (u.shape, h.shape) == ((4, 3), (4, 5))
    y.requires_grad_()
    model.still(x, t, y).sum().backward()
    assert y.grad is not None
    assert all(p.grad is None for p in model.v.parameters())


def test_onnx(tmp_path: Path, values: list[torch.Tensor]) -> None:
    single: Any = fl.compile(MODEL, flow="m", seed=0)
    x, t, y = (v.float() for v in values)
    same_in_onnx(single, "read", tmp_path, x, t)
    same_in_onnx(single, "swap", tmp_path, x, t, y)
    same_in_onnx(single, "followed", tmp_path, x, y)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("v.tap(b)(x, t)", "FL0201"), ("v.tap(parts.c)(x, t)", "FL0201"), ("v.tap(parts[3].a)(x, t)", "FL0307"),
        ("v.tap(last[0])(x, t)", "FL0307"), ("v.tap(parts[0])(x, t)", "FL0306"), ("v.tap(last.a)(x, t)", "FL0306"),
        ("v.tap()(x, t)", "FL0203"), ("v.tap(last = x)(x, t)", "FL0202"), ("v.with(last)(x, t)", "FL0202"),
        ("v.tap(last, last)(x, t)", "FL0204"), ("x.tap(last)(x)", "FL0211"), ("v.with(last = t)(x, t)", "FL0301"),
        ("v.with(last = [x])(x, t)", "FL0308"), ("v.with(parts.a = x)(x, t)", "FL0308"), ("r.tap(inner.a)(x)", "FL0201"),
        ("r.tap(blocks.a)(x)", "FL0902"), ("r.with(positive = x)(x)", "FL0408"), ("w.tap(h)(x)", "FL0304"),
        ("cnf(v.with(last = x))(x)", "FL0902"), ("v.tap(1 + 2)(x, t)", "FL0306"),
    ],
)  # fmt: skip
def test_refusals(body: str, code: str) -> None:
    text = (
        NETS
        + f"model m(v: net = outer(), r: net = rough(), w: net = wide()) {{\n data x: R[D = 3]\n def f(x, t: R) {{ {body} }} }}"
    )
    found = [d for d in fl.check(text) if d.severity == "error"]
    assert [d.code for d in found] == [code], found
    assert all(d.suggestion for d in found)


def test_what_replaces_may_be_where_the_value_may_be() -> None:
    text = NETS + "model m(r: net = rough()) { data x: R[D = 3]\n def f(x) { r.with(positive = sigmoid(x))(x) } }"
    assert fl.check(text).ok


def test_an_untaken_branch_may_name_places() -> None:
    text = (
        NETS
        + """model m(v: net = outer(), deep: bool = false) {
      data x: R[D = 3]
      def f(x) { if deep { v.with(parts[0].a = x)(x, 0) } else { v(x, 0) } }
    }"""
    )
    assert not list(fl.check(text))
