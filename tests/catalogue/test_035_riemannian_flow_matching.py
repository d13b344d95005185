"""Card 035, Riemannian flow matching (Chen & Lipman 2023): what must hold, item by item."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.analysis.size import parameter_count
from flowlang.api import analyse
from tests.catalogue.programs import same_in_onnx

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_sphere(n: int, seed: int = 0, dim: int = 3) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, dim, dtype=F64, generator=generator(seed)), dim=-1)


def angles(n: int, seed: int = 0, dim: int = 2) -> Tensor:
    return 2 * math.pi * torch.rand(n, dim, dtype=F64, generator=generator(seed))


def turns(x: Tensor, y: Tensor) -> Tensor:
    return torch.atan2((y - x).sin(), (y - x).cos())


def arc(x: Tensor, y: Tensor) -> Tensor:
    return torch.acos((x * y).sum(-1).clamp(-1, 1))


@cache
def sphere(dim: int = 3) -> Any:
    return fl.compile("rfm_sphere_tiny", D=dim, seed=0, dtype=F64)


@cache
def torus(dim: int = 2) -> Any:
    return fl.compile("rfm_torus_tiny", D=dim, seed=0, dtype=F64)


FLAT = """
model m = rfm(v = time_mlp(16), exp = flat_exp, log = flat_log, project = flat_project, tangent = torus_tangent, noise = normal,
  solver = euler(steps = 8))
"""


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_item_1_the_distance_left_falls_evenly(t: float) -> None:
    at = torch.full((50,), t, dtype=F64)
    x0, x1 = on_sphere(50, 1), on_sphere(50, 2)
    x, _ = sphere().along(at, x0, x1)
    assert (arc(x, x1) - (1 - t) * arc(x0, x1)).abs().max() <= 1e-5
    a0, a1 = angles(50, 1), angles(50, 2)
    a, _ = torus().along(at, a0, a1)
    assert (turns(a, a1).norm(dim=-1) - (1 - t) * turns(a0, a1).norm(dim=-1)).abs().max() <= 1e-5


PREMETRIC = """
model m(steps: int = 200) {
  data x1: R[D = 3]
  def sphere(t: R, x0: R[D], x1) {
    y: R[D] = premetric_path(steps = steps)(t, x0, x1)
    y
  }
  def flat(x: R[D], x0: R[D], x1) {
    y: R[D] = premetric_velocity(flat_distance, torus_tangent)(x, x0, x1)
    y
  }
}
"""


def test_item_1_the_premetric_flow_finds_the_geodesic() -> None:
    x0, x1 = on_sphere(20, 3), on_sphere(20, 4)
    at = torch.full((20,), 0.7, dtype=F64)
    model: Any = fl.compile(PREMETRIC, dtype=F64)
    found, wanted = model.sphere(at, x0, x1), sphere().along(at, x0, x1)[0]
    assert (arc(found, x1) - 0.3 * arc(x0, x1)).abs().max() <= 1e-3
    assert (found - wanted).abs().max() <= 1e-3


def icosahedron() -> tuple[np.ndarray, np.ndarray]:
    g = (1 + 5**0.5) / 2
    points = np.array([p for a, b in itertools.product((-1, 1), (-g, g)) for p in ((0, a, b), (a, b, 0), (b, 0, a))])
    points = points / np.linalg.norm(points[0])
    edge = min(np.linalg.norm(points[0] - p) for p in points[1:])

    def near(i: int, j: int) -> bool:
        return bool(abs(np.linalg.norm(points[i] - points[j]) - edge) < 1e-6)

    faces = [
        f for f in itertools.combinations(range(12), 3) if all(near(i, j) for i, j in itertools.combinations(f, 2))
    ]
    return points, np.array(faces)


def eigenfunctions(points: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the cotangent Laplacian with lumped masses, the constant one left out."""
    n = len(points)
    stiffness, mass = np.zeros((n, n)), np.zeros(n)
    for face in faces:
        for k in range(3):
            i, j, o = face[k], face[(k + 1) % 3], face[(k + 2) % 3]
            u, v = points[i] - points[o], points[j] - points[o]
            area2 = np.linalg.norm(np.cross(u, v))
            weight = 0.5 * (u @ v) / area2
            stiffness[[i, j], [i, j]] += weight
            stiffness[[i, j], [j, i]] -= weight
            mass[i] += area2 / 6
    root = 1 / np.sqrt(mass)
    rates, vectors = np.linalg.eigh(root[:, None] * stiffness * root)
    return rates[1 : count + 1], (root[:, None] * vectors)[:, 1 : count + 1]


MESH = """
model m(steps: int = 100) {
  data x1: R[D = 3]
  near = mesh_nearest(20)
  features = mesh_features(near, modes = 10)
  def distance(x: R[D], x1) { spectral_distance(features)(x, x1) }
  def nearest(x1) {
    y: R[D] = mesh_project(near)(x1)
    y
  }
  def phi(x1) { features(x1) }
  def path(t: R, x0: R[D], x1) {
    y: R[D] = premetric_path(spectral_distance(features), torus_tangent, mesh_project(near), steps)(t, x0, x1)
    y
  }
}
"""


@cache
def mesh(steps: int = 100, kind: str = "biharmonic", dtype: Any = F64) -> Any:
    model: Any = fl.compile(MESH.replace("steps: int = 100", f"steps: int = {steps}"), seed=0, dtype=dtype)
    points, faces = icosahedron()
    rates, functions = eigenfunctions(points, faces, 10)
    weights = {"biharmonic": 1 / rates**2, "commute": 1 / rates, "diffusion": np.exp(-2 * 0.1 * rates)}[kind]
    with torch.no_grad():
        for name, value in (
            ("near.corners", points[faces]),
            ("features.values", functions[faces]),
            ("features.weights", weights),
        ):
            model.get_buffer(name).copy_(torch.as_tensor(value))
    return model


def on_mesh(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points of the mesh, with their faces and barycentric coordinates."""
    points, faces = icosahedron()
    rng = np.random.default_rng(seed)
    face, share = rng.integers(0, 20, n), rng.dirichlet((1, 1, 1), n)
    place = np.einsum("nk,nkd->nd", share, points[faces[face]])
    return torch.as_tensor(place), torch.as_tensor(face), torch.as_tensor(share)


def test_the_mesh_is_read_where_a_point_is_nearest() -> None:
    place, face, share = on_mesh(60, 0)
    points, faces = icosahedron()
    rates, functions = eigenfunctions(points, faces, 10)
    model = mesh()
    wanted = torch.einsum("nk,nkm->nm", share, torch.as_tensor(functions[faces])[face]) / torch.as_tensor(rates)
    torch.testing.assert_close(model.phi(place), wanted, rtol=1e-7, atol=1e-7)
    assert (model.nearest(place) - place).abs().max() <= 1e-9
    away = 1.3 * place + 0.05 * torch.randn(60, 3, dtype=F64, generator=generator(1))
    found = model.nearest(away)
    grid = torch.as_tensor(np.array([(i, j, 40 - i - j) for i in range(41) for j in range(41 - i)]) / 40)
    dense = torch.einsum("gk,fkd->fgd", grid, torch.as_tensor(points[faces])).reshape(-1, 3)
    best = (away[:, None] - dense).norm(dim=-1).min(1)[0]
    assert ((away - found).norm(dim=-1) <= best + 1e-9).all()
    assert ((away - found).norm(dim=-1) >= best - 0.02).all()
    assert rates[0] == pytest.approx(rates[2], rel=1e-6)  # the first is threefold, by symmetry


def test_item_1_on_a_mesh_the_error_halves_with_the_steps() -> None:
    """Inside a face, where the distance is smooth. Over the edges of so coarse a mesh it has kinks, which Euler steps meet
    at places that change with their number; the distance falls there as well, with an error that does not halve evenly."""
    points, faces = icosahedron()
    rng = np.random.default_rng(3)
    face = rng.integers(0, 20, 12)
    x0, x1 = (
        torch.as_tensor(np.einsum("nk,nkd->nd", rng.dirichlet((1, 1, 1), 12) / 2 + 1 / 6, points[faces[face]]))
        for _ in range(2)
    )
    at = torch.full((12,), 0.6, dtype=F64)

    def errors(steps: int) -> Tensor:
        model = mesh(steps)
        with torch.no_grad():
            x = model.path(at, x0, x1)
            return (model.distance(x, x1) - 0.4 * model.distance(x0, x1)).abs() / model.distance(x0, x1)

    coarse, fine = errors(50), errors(100)
    assert fine.max() <= 1e-3
    assert ((coarse / fine - 2).abs() <= 0.1).all()


def test_item_2_ends_and_constant_speed() -> None:
    x0, x1 = on_sphere(40, 7), on_sphere(40, 8)
    a0, a1 = angles(40, 7), angles(40, 8)
    for t in (0.0, 0.25, 0.9, 1.0):
        at = torch.full((40,), t, dtype=F64)
        x, v = sphere().along(at, x0, x1)
        a, w = torus().along(at, a0, a1)
        assert (v.norm(dim=-1) - arc(x0, x1)).abs().max() <= 1e-6
        assert (w.norm(dim=-1) - turns(a0, a1).norm(dim=-1)).abs().max() <= 1e-9
        if t in (0.0, 1.0):
            assert (x - (x1 if t else x0)).abs().max() <= 1e-9
            assert turns(a, a1 if t else a0).abs().max() <= 1e-9


def test_item_3_flat_space_is_conditional_optimal_transport() -> None:
    model: Any = fl.compile(FLAT, D=3, seed=0, dtype=F64)
    x1 = torch.randn(30, 3, dtype=F64, generator=generator(9))
    found = model.loss(x1, generator=generator(10))
    g = generator(10)
    x0 = torch.randn(30, 3, dtype=F64, generator=g)
    t = torch.rand(30, dtype=F64, generator=g)
    x = (1 - t[:, None]) * x0 + t[:, None] * x1
    assert abs(found - ((model.v(x, t) - (x1 - x0)) ** 2).mean()) <= 1e-6
    pre: Any = fl.compile(PREMETRIC, dtype=F64)
    # with d = |x - x1| the field at x_t is (x1 - x_t)/(1 - t)
    torch.testing.assert_close(pre.flat(x, x0, x1), (x1 - x) / (1 - t[:, None]), rtol=1e-6, atol=1e-6)


def test_item_4_the_velocity_is_the_geodesics_and_tangent() -> None:
    x0, x1 = on_sphere(40, 11), on_sphere(40, 12)
    t = torch.rand(40, dtype=F64, generator=generator(13))
    x, v = sphere().along(t, x0, x1)
    θ = arc(x0, x1)[:, None]
    analytic = θ / θ.sin() * (-(((1 - t[:, None]) * θ).cos()) * x0 + (t[:, None] * θ).cos() * x1)
    assert (v - analytic).abs().max() <= 1e-5
    assert (x - (((1 - t[:, None]) * θ).sin() * x0 + (t[:, None] * θ).sin() * x1) / θ.sin()).abs().max() <= 1e-5
    assert (x * v).sum(-1).abs().max() <= 1e-9


def test_item_5_the_field_is_tangent_and_does_not_see_the_normal_part() -> None:
    text = """
    net pushed(inner: net = tmlp(16, 3), by: real = 0) (x: R[D], t: R) -> R[D] { u: R[D] = inner(x, t)
      u + by * x }
    """
    plain: Any = fl.compile(text + "model m = rfm(v = pushed())", D=3, seed=0, dtype=F64)
    moved: Any = fl.compile(text + "model m = rfm(v = pushed(by = 5))", D=3, seed=0, dtype=F64)
    x, t = on_sphere(30, 14), torch.rand(30, dtype=F64, generator=generator(15))
    assert (plain.velocity(x, t) * x).sum(-1).abs().max() <= 1e-6
    torch.testing.assert_close(plain.velocity(x, t), moved.velocity(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["projx_euler", "projx_midpoint", "projx_rk4"])
def test_item_6_samples_stay_on_the_manifold(solver: str) -> None:
    ball: Any = fl.compile(f"model m = rfm(v = tmlp(16, 3), solver = {solver}(steps = 10))", D=3, seed=1)
    assert (ball.sample((50,), generator=generator(16)).norm(dim=-1) - 1).abs().max() <= 1e-6
    ring: Any = fl.compile(
        f"model m = rfm_torus(v = tmlp(16, 3, 2), solver = {solver}(torus_project, steps = 10))", D=2, seed=1
    )
    found = ring.sample((50,), generator=generator(17))
    assert ((found >= 0) & (found < 2 * math.pi)).all()


def test_item_6_so_they_do_along_geodesics() -> None:
    ball: Any = fl.compile("model m = rfm(v = tmlp(16, 3), solver = exp_euler(steps = 10))", D=3, seed=1, dtype=F64)
    assert (ball.sample((50,), generator=generator(16)).norm(dim=-1) - 1).abs().max() <= 1e-9


def lebedev_like(n: int = 40) -> tuple[Tensor, Tensor]:
    """Points and weights on the sphere: Gauss in the height, even in the angle."""
    z, w = np.polynomial.legendre.leggauss(n)
    φ = 2 * math.pi * (np.arange(2 * n) + 0.5) / (2 * n)
    r = np.sqrt(1 - z**2)
    points = np.stack([r[:, None] * np.cos(φ), r[:, None] * np.sin(φ), np.broadcast_to(z[:, None], (n, 2 * n))], -1)
    return torch.as_tensor(points.reshape(-1, 3)), torch.as_tensor(np.repeat(w, 2 * n) * math.pi / n)


def test_item_7_the_density_integrates_to_one_and_is_even_without_a_field() -> None:
    model: Any = fl.compile("model m = rfm(v = tmlp(16, 3), back = rk4(steps = 16))", D=3, seed=3, dtype=F64)
    with torch.no_grad():
        for p in model.v.parameters():  # a field worth the name
            p.mul_(2)
    points, weights = lebedev_like(24)
    with torch.no_grad():
        density = model.log_prob(points).exp()
        assert abs(float((density * weights).sum()) - 1) <= 2e-2
        assert density.max() / density.min() > 1.5
        for p in model.v.parameters():
            p.zero_()
        assert (model.log_prob(points) + math.log(4 * math.pi)).abs().max() <= 1e-9
    flat = torus()
    saved = {k: v.clone() for k, v in flat.state_dict().items()}
    with torch.no_grad():
        for p in flat.v.parameters():
            p.zero_()
        assert (flat.log_prob(angles(5)) + 2 * math.log(2 * math.pi)).abs().max() <= 1e-9
    flat.load_state_dict(saved)


@pytest.mark.parametrize("kind", ["biharmonic", "commute", "diffusion"])
def test_item_8_spectral_distances(kind: str) -> None:
    model = mesh(100, kind)
    (a, _, _), (b, _, _), (c, _, _) = (on_mesh(40, s) for s in (20, 21, 22))
    with torch.no_grad():
        ab, ba, bc, ac = model.distance(a, b), model.distance(b, a), model.distance(b, c), model.distance(a, c)
        assert (ab >= 0).all()
        torch.testing.assert_close(ab, ba)
        assert model.distance(a, a).abs().max() <= 1e-12
        assert (ac <= ab + bc + 1e-12).all()


def test_the_network_is_the_authors_and_its_size_follows() -> None:
    width, layers, dim = 512, 8, 3
    hidden = min(64, 4 * width)
    linear = (dim * width + width + width) + (layers - 2) * (width * width + 2 * width) + (width * dim + 2 * dim)
    swish = (layers - 1) * (hidden + hidden + hidden * width + width)
    region = analyse("net f(x: R[D = 3], t: R) { tmlp()(x, t) }", {}, sized=True, build="f").regions["f"]
    assert parameter_count(region) == linear + swish
    net: Any = fl.compile("net f(x: R[D = 2], t: R) { tmlp(4, 3, 2)(x, t) }", flow="f", seed=0, dtype=F64)
    shapes = [tuple(p.shape) for p in net.parameters()]
    assert (4, 8) in shapes  # two angles, sines and cosines of one and two times each
    t = torch.rand(6, dtype=F64)
    x = angles(6)
    torch.testing.assert_close(net(x, t), net(x + 2 * math.pi, t))


def test_it_learns_two_spots() -> None:
    model: Any = fl.compile("rfm_sphere_tiny", D=3, seed=0)
    poles = torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    optimizer, g = torch.optim.Adam(model.parameters(), lr=1e-2), generator(30)
    for _ in range(150):
        data = torch.nn.functional.normalize(
            poles[torch.randint(2, (256,), generator=g)] + 0.2 * torch.randn(256, 3, generator=g), dim=-1
        )
        optimizer.zero_grad()
        model.loss(data, generator=g).backward()
        optimizer.step()
    with torch.no_grad():
        drawn = model.sample((400,), generator=g)
    nearest = (drawn @ poles.T).max(-1)[0]
    assert (nearest > math.cos(0.6)).float().mean() > 0.75
    assert 0.35 < ((drawn @ poles.T).argmax(-1) == 0).float().mean() < 0.65


def test_onnx(tmp_path: Path) -> None:
    for name, dim in (
        ("rfm(v = tmlp(16, 3), solver = projx_euler(steps = 4))", 3),
        ("rfm_torus(v = tmlp(16, 3, 2), solver = projx_midpoint(torus_project, steps = 4))", 2),
    ):
        model: Any = fl.compile(f"model m = {name}", D=dim, seed=0)
        x0 = (on_sphere(5, 40) if dim == 3 else angles(5, 40)).float()
        x1 = (on_sphere(5, 41) if dim == 3 else angles(5, 41)).float()
        t = torch.rand(5, generator=generator(42))
        same_in_onnx(model, "velocity", tmp_path, x1, t)
        same_in_onnx(model, "along", tmp_path, t, x0, x1, tolerance=1e-4)
        same_in_onnx(model, "sample", tmp_path)
    single = mesh(4, dtype=torch.float32)
    place = on_mesh(5, 43)[0].float()
    same_in_onnx(single, "nearest", tmp_path, place, tolerance=1e-4)
    same_in_onnx(single, "distance", tmp_path, place, on_mesh(5, 44)[0].float(), tolerance=1e-4)
