"""Card 034, FInC Flow (Kallappa et al. 2023): what must hold, item by item."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import flowlang as fl
from flowlang.verify import perturb
from tests.catalogue.corner import (
    by_hand,
    generator,
    images,
    jacobian,
    kernel_of,
    learns_from_pixels,
    rounds,
    same_in_onnx,
    step,
)

CORNERS = [(False, False), (True, False), (False, True), (True, True)]
WORDS = {c: f"finc_conv(3, {str(c[0]).lower()}, {str(c[1]).lower()})" for c in CORNERS}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_item_1_round_trip(dtype: torch.dtype, limit: float) -> None:
    """At the start, N(0, 0.05²), and away from it. Large kernels grow without bound along the diagonals, whoever inverts."""
    for size in (0.0, 0.3):
        flow = step("finc_unit", 8, 16, 16, size=size, dtype=dtype)
        x = images(4, 8, 16, 16, dtype=dtype)
        assert (flow.inverse(flow(x)[0])[0] - x).abs().max() < limit


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_item_2_unit_triangular_after_its_flip(channels: int, corner: tuple[bool, bool]) -> None:
    flow = step(WORDS[corner], channels, 4, 4)
    flips = [d for d, f in ((-1, corner[0]), (-2, corner[1])) if f]
    flipped = jacobian(lambda v: flow(v.flip(flips))[0].flip(flips), images(channels, 4, 4))
    assert torch.equal(flipped.triu(1), torch.zeros_like(flipped))
    assert torch.equal(flipped.diagonal(), torch.ones_like(flipped.diagonal()))
    dense = jacobian(lambda v: flow(v)[0], images(channels, 4, 4))
    assert abs(torch.linalg.slogdet(dense)[1]) < 1e-10
    assert flow(images(2, channels, 4, 4))[1].abs().max() == 0


@pytest.mark.parametrize(("channels", "k"), [(8, 3), (16, 3), (12, 2), (8, 5)])
def test_item_3_free_parameters(channels: int, k: int) -> None:
    text = f"flow f {{\n data x: R[C = {channels}, H = 6, W = 6]\n finc_unit({k})\n base normal\n}}\n"
    said = next(d for d in fl.info(text) if d["name"] == "f")
    c = channels // 4
    assert said["free_parameters"] == 4 * (c * c * k * k - c * (c + 1) // 2)
    assert said["parameters"] - said["free_parameters"] == 4 * c * (c + 1) // 2  # what the mask fixes


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (5, 3)])
def test_item_4_rounds_of_the_inverse(
    height: int, width: int, corner: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loop iterations, and the result against a dense triangular solve. A unit's four inverses take as many each."""
    flow = step(WORDS[corner], 2, height, width)
    y = images(3, 2, height, width)
    with torch.no_grad():
        assert rounds(monkeypatch, flow, lambda: flow.finc_conv.inverse_value(y)) == height + width - 1
        found = flow.inverse(y)[0]
    dense = jacobian(lambda v: flow(v)[0], y[0])
    flips = [d for d, f in ((-1, corner[0]), (-2, corner[1])) if f]
    order = torch.arange(y[0].numel()).reshape(height, width, 2).permute(2, 0, 1).flip(flips).permute(1, 2, 0).flatten()
    flat = y.permute(0, 2, 3, 1).reshape(3, -1)
    solved = torch.empty_like(flat)
    lower = dense[order][:, order]
    assert torch.equal(lower.triu(1), torch.zeros_like(lower))
    solved[:, order] = torch.linalg.solve_triangular(lower, flat[:, order].mT, upper=False).mT
    assert (found.permute(0, 2, 3, 1).reshape(3, -1) - solved).abs().max() < 1e-6


def test_item_4_rounds_grow_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    """O(n k²): 2n - 1 rounds for an n x n image, of four convolutions in a unit."""
    found = []
    for n in (4, 8, 16):
        flow = step("finc_unit", 4, n, n, size=0.0)
        found.append(rounds(monkeypatch, flow, partial(flow.sample, (1,))))
    assert found == [4 * (2 * n - 1) for n in (4, 8, 16)]


def test_item_5_each_group_sees_one_quadrant() -> None:
    flow, n, mid = step("finc_unit", 8, 5, 5), 5, 2
    x = images(8, n, n).requires_grad_()
    y = flow(x)[0]
    quadrants = torch.zeros(n, n, dtype=torch.bool)
    for group, (right, bottom) in enumerate(CORNERS):
        (seen,) = torch.autograd.grad(y[2 * group : 2 * group + 2, mid, mid].sum(), x, retain_graph=True)
        places = (seen[2 * group : 2 * group + 2] != 0).any(0)
        expected = torch.zeros(n, n, dtype=torch.bool)
        expected[
            slice(mid, None) if bottom else slice(None, mid + 1), slice(mid, None) if right else slice(None, mid + 1)
        ] = True
        assert torch.equal(places, expected)
        assert (seen != 0).any(-1).any(-1).nonzero().flatten().tolist() == [2 * group, 2 * group + 1]
        quadrants |= places
    assert quadrants.all()


def test_item_6_identity_and_the_plain_corner_convolution() -> None:
    flow = step("finc_unit", 8, 5, 5)
    x = images(3, 8, 5, 5)
    convs = [flow.finc_unit.finc_conv, *(getattr(flow.finc_unit, f"finc_conv_{k}") for k in (2, 3, 4))]
    parts = [
        by_hand(v, kernel_of(c.corner_conv), *corner)
        for v, c, corner in zip(x.chunk(4, 1), convs, CORNERS, strict=True)
    ]
    assert torch.allclose(flow(x)[0], torch.cat(parts, 1), atol=1e-12)
    cinc = step("corner_conv", 2, 5, 5)
    cinc.load_state_dict(dict(zip(cinc.state_dict(), convs[0].state_dict().values(), strict=True)))
    assert torch.allclose(flow(x)[0][:, :2], cinc(x[:, :2])[0], atol=1e-12)
    with torch.no_grad():
        for p in flow.parameters():
            p.zero_()
    assert torch.equal(flow(x)[0], x)


def tiny(dtype: torch.dtype = torch.float64) -> fl.Flow:
    """The steps of a tiny flow on real numbers."""
    return step("finc_steps(2, 1, 3, 8)", 3, 4, 4, size=0.3, dtype=dtype)


def test_item_7_log_prob_by_change_of_variables() -> None:
    flow, x = tiny(), images(3, 3, 4, 4)
    for one, found in zip(x, flow.log_prob(x), strict=True):

        def parts(v: torch.Tensor) -> torch.Tensor:
            return torch.cat([t.flatten() for t in flow(v)[:-1]])

        z = parts(one)
        dense = torch.autograd.functional.jacobian(parts, one).reshape(48, 48)
        expected = -0.5 * z.square().sum() - 24 * math.log(2 * math.pi) + torch.linalg.slogdet(dense)[1]
        assert abs(found - expected) < 1e-4


def test_trains_from_its_first_batch_and_says_that_pixels_have_a_bound() -> None:
    flow = fl.compile("flow f = finc_tiny\n", seed=0)
    assert flow.exactness == "lower bound"  # dequantisation
    x = torch.randint(0, 256, (16, 3, 8, 8), generator=generator(2)).float()
    learns_from_pixels(flow, x, 12)


def count(levels: int, depth: int, channels: int, k: int, width: int) -> int:
    """Declared parameters, layer by layer."""

    def coupling(c: int) -> int:
        a, b = c - c // 2, c // 2
        return a * width * 9 + width + width * width + width + width * 2 * b * 9 + 4 * b

    total, c = 0, channels
    for level in range(levels):
        c *= 4
        total += depth * (c * c * k * k // 4 + 2 * c + c * c + coupling(c))
        if level < levels - 1:
            total += coupling(c)
            c //= 2
    return total


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [("finc_tiny", (2, 1, 3, 3, 16)), ("finc_cifar10", (3, 32, 3, 3, 512)), ("finc_mnist", (2, 16, 1, 3, 512))],
)
def test_parameters_of_the_presets(preset: str, sizes: tuple[int, int, int, int, int]) -> None:
    """No count is published; these follow from the sizes of the authors' scripts."""
    assert fl.check(f"flow p = {preset}\nrequire parameters(p) == {count(*sizes)}\n").ok


def test_onnx(tmp_path: Path) -> None:
    import onnxruntime as ort

    flow = tiny(torch.float32).eval()
    x = images(5, 3, 4, 4, dtype=torch.float32)
    same_in_onnx(flow, x, tmp_path)
    single = step("finc_unit", 4, 4, 4, dtype=torch.float32).eval()
    (path,) = fl.export_onnx(single, tmp_path / "u.onnx", programs=["inverse"]).values()
    session = ort.InferenceSession(str(path))
    y = images(2, 4, 4, 4, dtype=torch.float32)
    found = session.run(None, {session.get_inputs()[0].name: y.numpy()})[0]
    assert np.allclose(found, single.inverse(y)[0].detach().numpy(), atol=1e-5)


def test_any_parameters_keep_the_volume() -> None:
    flow = step("finc_unit", 8, 4, 4, size=0.0)
    perturb(flow, generator(4), 2.0)
    assert flow(images(2, 8, 4, 4))[1].abs().max() == 0
