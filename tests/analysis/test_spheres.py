"""Records and spheres: what is derived when a map takes several values, some of them points of spheres (analyses.md)."""

from __future__ import annotations

import pytest
import torch

import flowlang as fl
from flowlang.api import analyse
from flowlang.verify import verify

DATA = "data x: R[D = 2], p: Sphere[N = 3, Q = 3]"
ENDS = "base normal, uniform_sphere"

RIGHT = {
    "one after the other": "bijector b(x: R[D], p: Sphere[N, Q]) {\n  w: R[p.N, p.Q] = mlp(8)(x)\n"
    "  q = symmetrized_moebius(p, w = w)\n  x * exp(tanh(sum[N, Q](q))), q\n}\n",
    "coupled both ways": "bijector b(x: R[D], p: Sphere[N, Q]) {\n  w: R[p.N, p.Q] = mlp(8)(x)\n  q = moebius_sphere(p, w = w)\n"
    "  s: R[x.D] = mlp[N, Q](8)(q)\n  x + s, q\n}\n",
    "some of the points": "bijector b(x: R[D], p: Sphere[N, Q]) {\n  a = p[N = 0..1]\n  w: R[N = 2, p.Q] = mlp[N, Q](8)(a)\n"
    "  x, join[N](a, moebius_sphere(p[N = 1..], w = w))\n}\n",
    "points turned round": "bijector b(x: R[D], p: Sphere[N, Q]) {\n  x, reverse[N](permute[N](p, order = [1, 0, 2]))\n}\n",
    "picked and stacked": "bijector b(x: R[D], p: Sphere[N, Q]) {\n  x, stack[N](p[N = 2], p[N = 0], p[N = 1])\n}\n",
    "a copy of itself inverted": "bijector c(x: R[D], p: Sphere[N, Q]) {\n  w: R[p.N, p.Q] = mlp(8)(x)\n  x, moebius_sphere(p, w = w)\n}\n"
    "bijector b { repeat 2 { c;  inverse(c) } }\n",
    "a point drawn and emitted": "bijector b(x: R[D], p: Sphere[N, Q]) {\n  u: R[Q = 3] ~ uniform_sphere\n"
    "  emit moebius_sphere(u, w = 0.1 * sum[N](p)) ~ uniform_sphere\n  x + u[Q = 0], p\n}\n",
}  # fmt: skip


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_is_derived(text: str) -> None:
    """Accepted, and right by numbers: round trip, and log|det| against the Jacobian between tangent spaces."""
    spec = f"{text}flow f {{\n  {DATA}\n  b\n  {ENDS}\n}}\n"
    comp = analyse(spec, sized=True)
    assert comp.ok, comp.report.errors
    for check in verify(comp, "f"):
        assert check.ok, check


WRONG = {
    "scaled": ("x, 2 * p", "FL0403"), "negated": ("x, -p", "FL0403"), "moved": ("x, p + 1", "FL0403"),
    "squeezed and pointed again": ("x, normalize[Q](2 * p + 1)", "FL0403"),
    "cut along its own axis": ("x, join[Q](p[Q = 1..], p[Q = 0..1])", "FL0403"),
    "turned along its own axis": ("x, reverse[Q](p)", "FL0403"),
    "its axes exchanged": ("y: R[N, Q] = p[N -> M, Q -> N][M -> Q]\n  x, y", "FL0403"),
    "taken apart": ("x, reverse[D2](p[(N, Q) -> D2])[D2 -> (N = 3, Q = 3)]", "FL0403"),
    "a coordinate handed over": ("x + p[N = 0, Q = 0], join[N](2 * p[N = 0..1], p[N = 1..])", "FL04"),
    "lost": ("x, 0 * p", "FL04"), "doubled": ("x, p + p", "FL04"),
    "mapped as a vector": ("x, affine_elementwise(p)", "FL0408"),
    "a vector as a point": ("x, moebius_sphere(0 * p + x[D = 0], w = p)", "FL04"),
    "emitted as a vector": ("u: R[N = 3, Q = 3] ~ uniform_sphere\n  emit p ~ normal\n  x, u", "FL0408"),
    "a vector emitted on it": ("emit x ~ uniform_sphere\n  x, p", "FL04"),
    "a direction drawn as a vector": ("u: R[Q = 3] ~ normal\n  emit normalize[Q](u) ~ uniform_sphere\n  x, p", "FL04"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "code"), WRONG.values(), ids=WRONG)
def test_is_refused(body: str, code: str) -> None:
    found = fl.check(
        f"bijector b(x: R[D], p: Sphere[N, Q]) {{\n  {body}\n}}\nflow f {{\n  {DATA}\n  b\n  {ENDS}\n}}\n"
    ).errors
    assert found, "accepted"
    assert found[0].code.startswith(code), found


@pytest.mark.parametrize(
    "ends", ["uniform_sphere, normal", "normal, normal", "normal, uniform(-1, 1)", "uniform_sphere, uniform_sphere"]
)
def test_each_value_ends_where_it_lies(ends: str) -> None:
    found = fl.check(f"flow f {{\n  {DATA}\n  base {ends}\n}}\n").errors
    assert [e.code for e in found][:1] == ["FL0408"], found


def test_a_round_gives_back_what_it_takes() -> None:
    """Values of one type that change places: in the second round a vector would stand for a point."""
    swap = "bijector b(x: R[D], p: Sphere[Q]) { moebius_sphere(p, w = x[D -> Q])[Q -> D], x[D -> Q] }\n"
    data = "data x: R[D = 3], p: Sphere[Q = 3]"
    assert fl.check(f"{swap}flow f {{\n  {data}\n  b\n  base uniform_sphere, normal\n}}\n").ok
    for steps in ("repeat 2 { b }", "b\n  b"):
        assert not fl.check(f"{swap}flow f {{\n  {data}\n  {steps}\n  base normal, uniform_sphere\n}}\n").ok


@pytest.mark.parametrize("n", [2, 5])
def test_rules_by_hand_keep_the_number_of_dimensions(n: int) -> None:
    """A chart of the sphere has as many numbers as the point, and one dimension too many."""
    text = (
        "bijector b(p: Sphere[Q]) {\n  def inverse(y) { normalize[Q](y) }\n  def log_det(p) { 0 * sum[Q](p) }\n  2 * p\n}\n"
        f"flow f {{\n  data p: Sphere[Q = {n}]\n  b\n  base normal\n}}\n"
    )
    assert [e.code for e in fl.check(text).errors] == ["FL0402"]


def test_wrong_rules_of_a_record_are_found() -> None:
    text = (
        "bijector b(x: R[D], p: Sphere[Q]) {\n  def inverse(y, q) { y - 1, q }\n  def log_det(x, p) { sum[D](x) }\n"
        "  x + 1, normalize[Q](p)\n}\nflow f {\n  data x: R[D = 2], p: Sphere[Q = 3]\n  b\n  base normal, uniform_sphere\n}\n"
    )
    with pytest.raises(fl.FlowError, match="log_det"):
        fl.compile(text, seed=0)
    assert fl.compile(text.replace("sum[D](x)", "0 * sum[D](x)"), seed=0) is not None


def test_determinants_and_jacobians() -> None:
    """`jacobian(f)(x)` and `det` in the language, against autograd and torch; gradients go on through both."""
    text = "net f(x: R[D = 3]) {\n  def g(x) { sum[D](x ^ 2) * x + sin(x) }\n  det[D, D'](jacobian(g)(x))\n}\n"
    f = fl.compile(text, flow="f", seed=0, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def g(v: torch.Tensor) -> torch.Tensor:
        return v.square().sum() * v + torch.sin(v)

    wanted = torch.stack([torch.linalg.det(torch.autograd.functional.jacobian(g, v)) for v in x])
    torch.testing.assert_close(f(x), wanted, rtol=1e-10, atol=1e-10)
    v = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, v)


@pytest.mark.parametrize(("text", "code"), [
    ("net f(x: R[D = 3, E = 2]) { det[D, E](x) }\n", "FL0311"), ("net f(x: R[D = 3, E = 3]) { det[D](x) }\n", "FL0307"),
    ("net f(x: R[D = 3, E = 3]) { det[D, D](x) }\n", "FL0307"), ("net f(x: R[D = 3, E = 3]) { det[D, F](x) }\n", "FL0302"),
])  # fmt: skip
def test_what_has_no_determinant(text: str, code: str) -> None:
    assert [e.code for e in fl.check(text).errors] == [code]
