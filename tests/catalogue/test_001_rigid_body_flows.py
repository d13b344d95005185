"""Card 001, rigid body flows: the maps of spheres and circles, item by item.

Not built: the convex gradient map (its inverse is an optimisation), and with it the coupling stack, the conditioner and the
Boltzmann generator; items 6 and 7 are those of the whole flow and wait for them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl

MAPS = ("moebius_sphere", "symmetrized_moebius")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flow(name: str, n: int, dtype: torch.dtype = torch.float64) -> Any:
    text = f"flow f {{\n data p: Sphere[Q = {n}]\n given w: R[Q = {n}]\n {name}\n base uniform_sphere\n}}\n"
    return fl.compile(text, seed=0, dtype=dtype)


def points(count: int, n: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, n, dtype=torch.float64, generator=generator(seed)), dim=-1)


def inside(count: int, n: int, seed: int = 1, most: float = 0.95) -> Tensor:
    return points(count, n, seed) * (most * torch.rand(count, 1, dtype=torch.float64, generator=generator(seed + 1)))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_1_inverses(name: str, n: int) -> None:
    """Item 1: 1e-6, in float32 1e-5, for |w| up to 0.95 (drawn by length; the last ones at 0.95)."""
    p, w = points(400, n), inside(400, n)
    w[-50:] = 0.95 * torch.nn.functional.normalize(w[-50:], dim=-1)
    for dtype, most in ((torch.float64, 1e-6), (torch.float32, 1e-5 if name != "moebius_sphere" else 2e-4)):
        f = flow(name, n, dtype)
        z, log_det = f(p.to(dtype), w=w.to(dtype))
        back, inverse_log_det = f.inverse(z, w=w.to(dtype))
        assert float((back - p.to(dtype)).abs().max()) < most
        assert float((z.norm(dim=-1) - 1).abs().max()) < most
        if dtype == torch.float64:
            assert float((log_det + inverse_log_det).abs().max()) < 1e-6


def test_2_the_symmetrised_map_is_odd() -> None:
    """Item 2, for the symmetrised map: g(-p) = -g(p), log|det| even, 1e-6."""
    f, p, w = flow(MAPS[1], 4), points(300, 4), inside(300, 4)
    z, log_det = f(p, w=w)
    other, log_det_other = f(-p, w=w)
    assert float((z + other).abs().max()) < 1e-6
    assert float((log_det - log_det_other).abs().max()) < 1e-6


def basis(p: Tensor) -> Tensor:
    return torch.linalg.svd(p.unsqueeze(0))[2][1:].mT


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_3_log_dets_are_those_of_the_tangent_map(name: str, n: int) -> None:
    """Item 3: against the tangent-projected Jacobian by autograd, 1e-6."""
    f, p, w = flow(name, n), points(6, n), inside(6, n)
    z, log_det = f(p, w=w)
    for k in range(6):
        j = torch.autograd.functional.jacobian(lambda v, k=k: f(v.unsqueeze(0), w=w[k : k + 1])[0][0], p[k])  # type: ignore[no-untyped-call]
        tangential = basis(z[k]).mT @ j @ basis(p[k])
        assert abs(float(torch.linalg.slogdet(tangential)[1] - log_det[k])) < 1e-6


@pytest.mark.parametrize("name", MAPS)
def test_4_mass(name: str) -> None:
    """Item 4: the mean of exp(log|det|) over 200,000 uniform points is 1 within 1%; |w| = 0.5 and, symmetrised, 0.7."""
    n = 200_000
    size = 0.5 if name == "moebius_sphere" else 0.7
    w = size * points(1, 4, seed=3).expand(n, -1)
    with torch.no_grad():
        log_det = flow(name, 4)(points(n, 4, seed=4), w=w)[1]
    assert abs(float(log_det.exp().mean()) - 1) < 0.01


def test_5_the_symmetrised_map_is_a_matrix_and_a_direction() -> None:
    """Item 5, with the sum of the two Möbius maps beside it, 1e-6."""
    p, w = points(300, 4), inside(300, 4)
    z = flow(MAPS[1], 4)(p, w=w)[0]
    s = w.square().sum(-1, keepdim=True)
    by_matrix = torch.nn.functional.normalize((1 + s) * p - 2 * w * (w * p).sum(-1, keepdim=True), dim=-1)
    both = flow(MAPS[0], 4)
    by_sum = torch.nn.functional.normalize(both(p, w=w)[0] + both(p, w=-w)[0], dim=-1)
    assert float((z - by_matrix).abs().max()) < 1e-6
    assert float((z - by_sum).abs().max()) < 1e-6


TORUS = "flow f {\n data θ: Torus[D = 3]\n given a: R[D = 3], b: R[D = 3]\n torus_moebius\n base uniform(-pi, pi)\n}\n"


def test_8_the_periodic_map() -> None:
    """Item 8: the inverse up to turns; an angle and the same with a whole turn more have one image; the derivative by autograd."""
    f = fl.compile(TORUS, seed=0, dtype=torch.float64)
    θ = (2 * torch.rand(300, 3, dtype=torch.float64, generator=generator()) - 1) * math.pi
    w = inside(900, 2).reshape(300, 3, 2)
    a, b = w[..., 0], w[..., 1]
    z, log_det = f(θ, a=a, b=b)
    back = f.inverse(z, a=a, b=b)[0]
    assert float((torch.remainder(back - θ + 1, 2 * math.pi) - 1).abs().max()) < 1e-6
    again, log_det_again = f(θ + 2 * math.pi, a=a, b=b)
    assert float((torch.remainder(again - z + 1, 2 * math.pi) - 1).abs().max()) < 1e-6
    torch.testing.assert_close(log_det, log_det_again, rtol=0, atol=1e-9)
    θ.requires_grad_()
    (slope,) = torch.autograd.grad(f(θ, a=a, b=b)[0].sum(), θ)
    torch.testing.assert_close(slope.log().sum(-1), log_det, rtol=0, atol=1e-6)
    assert bool(((z >= -math.pi) & (z < math.pi)).all())


def test_the_density_on_rotations() -> None:
    """Item 6, of the map alone: an even density of unit quaternions has the mass 2·p(q) against Haar's measure: its integral is 1."""
    f, w = flow(MAPS[1], 4), inside(1, 4).expand(100_000, -1)
    q = points(100_000, 4, seed=8)
    with torch.no_grad():
        log_p, other = f.log_prob(q, w=w), f.log_prob(-q, w=w)
    assert float((log_p - other).abs().max()) < 1e-5
    half = math.pi**2  # the area of half of S³
    assert abs(float((2 * log_p.exp()).mean()) * half - 1) < 0.02


def test_parameters_begin_near_the_identity() -> None:
    from tests.catalogue.nets import net

    mine: Any = net("moebius_parameter(x, 0 * x)", Q=4)
    u = 100 * torch.randn(50, 4, dtype=torch.float64, generator=generator())
    assert float(mine(u).norm(dim=-1).max()) < 0.95
    assert float(mine(0.1 * points(50, 4)).norm(dim=-1).max()) < 0.01


WRONG = {
    "a step that leaves the sphere": ("flow f {\n data p: Sphere[Q = 3]\n affine_elementwise\n base uniform_sphere\n}\n", "FL0408"),
    "a base that is not on it": (
        "flow f {\n data p: Sphere[Q = 3]\n given w: R[Q = 3]\n moebius_sphere\n base uniform(-1, 1)\n}\n", "FL0408"),
    "data that are not on it": (
        "flow f {\n data p: Interval(-1, 1)[Q = 3]\n given w: R[Q = 3]\n moebius_sphere\n base uniform_sphere\n}\n", "FL0408"),
    "no rules by hand": (
        "bijector turn(p: Sphere[Q]) { -p }\nflow f {\n data p: Sphere[Q = 3]\n turn\n base uniform_sphere\n}\n", "FL0403"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "code"), WRONG.values(), ids=WRONG)
def test_what_leaves_the_manifold_is_refused(text: str, code: str) -> None:
    """A chart's change of measure is never taken for the sphere's."""
    found = fl.check(text).errors
    assert [e.code for e in found][:1] == [code], found


def test_a_wrong_log_det_on_the_sphere_is_found() -> None:
    text = """bijector half(p: Sphere[Q] given w: R[Q]) {
  u = w / (1 + length[Q](w))
  s = sum[Q](u ^ 2)
  def inverse(y) { normalize[Q]((1 - s) * y + 2 * u * sum[Q](u * y)) }
  def log_det(p) { sum[Q](0 * p) }
  normalize[Q]((1 + s) * p - 2 * u * sum[Q](u * p))
}
flow f {
  data p: Sphere[Q = 3]
  given w: R[Q = 3]
  half
  base uniform_sphere
}
"""
    with pytest.raises(fl.FlowError, match="log_det"):
        fl.compile(text, seed=0)


def test_exported(tmp_path: Path) -> None:
    """ONNX: forward, inverse and density of the Möbius maps of spheres and circles."""
    import onnxruntime as ort

    p, w = points(5, 4).float(), inside(5, 4).float()
    θ = torch.linspace(-3, 3, 15).reshape(5, 3)
    for f, x, given in (
        (flow(MAPS[0], 4, torch.float32), p, {"w": w}), (flow(MAPS[1], 4, torch.float32), p, {"w": w}),
        (fl.compile(TORUS, seed=0), θ, {"a": w[:, :3], "b": 0.3 * w[:, 1:]}),
    ):  # fmt: skip
        files = fl.export_onnx(f, tmp_path / "f.onnx", programs=["forward", "inverse", "log_prob"])
        wanted = {"forward": f(x, **given)[0], "inverse": f.inverse(x, **given)[0], "log_prob": f.log_prob(x, **given)}
        for name, path in files.items():
            session = ort.InferenceSession(str(path))
            names = [i.name for i in session.get_inputs()]
            feeds = {k: given[k].numpy() if k in given else x.numpy() for k in names}
            np.testing.assert_allclose(session.run(None, feeds)[0], wanted[name].detach().numpy(), rtol=1e-4, atol=1e-4)
