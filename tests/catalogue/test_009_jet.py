"""Card 009, Jet (Kolesnikov et al. 2024): what must hold, item by item."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.verify import perturb

KINDS = (
    "kind = channels, seed = 3",
    "kind = checkers",
    "kind = checkers, odd = 1",
    "kind = vstripes",
    "kind = hstripes",
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def coupling(kind: str, moved: bool = True) -> fl.Flow:
    text = f"""flow f {{
      data x: R[T = 16, D = 4]
      jet_coupling(jet_vit(8, 1, 2), {kind}, side = 4)
      base normal
    }}
    """
    model = fl.compile(text, seed=0, dtype=torch.float64)
    if moved:
        perturb(model, generator(1), 0.5)
    return model


@cache
def tiny() -> fl.Flow:
    model = fl.compile("jet_tiny", seed=0, dtype=torch.float64)
    perturb(model, generator(2), 0.3)
    return model


def images(n: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=generator(seed), dtype=dtype) * 2 - 1


def test_item_1_round_trip_and_log_det() -> None:
    x = images(3)
    z, log_det = tiny()(x)
    assert (tiny().inverse(z)[0] - x).abs().max() <= 1e-9
    for k in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: tiny()(v)[0].flatten(), x[k]).reshape(64, 64)
        assert abs(torch.linalg.slogdet(jacobian)[1] - log_det[k]) <= 1e-8
    single = fl.compile("jet_tiny", seed=0)
    perturb(single, generator(2), 0.3)
    y = x.float()
    assert (single.inverse(single(y)[0])[0] - y).abs().max() <= 1e-5


def test_item_2_starts_as_the_identity_bit_by_bit() -> None:
    model, x = fl.compile("jet_tiny", seed=0), images(5, dtype=torch.float32)
    z, log_det = model(x)
    patches = x.reshape(5, 1, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(5, 16, 4)
    assert torch.equal(z, patches)
    assert log_det.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_item_3_log_det_of_a_layer_is_at_most_log_2_for_each_moved_entry(kind: str) -> None:
    model = coupling(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    log_det = model(10 * torch.randn(200, 16, 4, dtype=torch.float64, generator=generator(4)))[1]
    coupling.cache_clear()
    assert log_det.max() <= 32 * math.log(2)
    assert torch.isfinite(log_det).all()


def test_item_4_every_kind_has_the_same_parameters() -> None:
    shapes = [[(n.split(".")[-1], tuple(p.shape)) for n, p in coupling(k).named_parameters()] for k in KINDS]
    assert all(s == shapes[0] for s in shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_item_5_orders_are_permutations_and_equal_the_product_with_a_matrix(kind: str) -> None:
    step = "random_permutation[D](seed = 3)" if "channels" in kind else {
        "kind = checkers": "jet_tokens(4, 1, 1, 0)", "kind = checkers, odd = 1": "jet_tokens(4, 1, 1, 1)",
        "kind = vstripes": "jet_tokens(4, 0, 1, 0)", "kind = hstripes": "jet_tokens(4, 1, 0, 0)",
    }[kind]  # fmt: skip
    model = fl.compile(f"flow f {{\n data x: R[T = 16, D = 4]\n {step}\n base normal\n}}\n", dtype=torch.float64)
    x = torch.randn(16, 4, dtype=torch.float64, generator=generator(5))
    matrix = torch.autograd.functional.jacobian(lambda v: model(v)[0].flatten(), x).reshape(64, 64)
    assert ((matrix == 0) | (matrix == 1)).all()
    assert (matrix.sum(0) == 1).all()
    assert (matrix.sum(1) == 1).all()
    assert torch.equal(matrix @ x.flatten(), model(x)[0].flatten())


def moved_tokens(kind: str) -> Tensor:
    x = torch.randn(1, 16, 4, dtype=torch.float64, generator=generator(6))
    return (coupling(kind)(x)[0] != x).any(-1).squeeze(0)


def test_item_6_a_kind_and_its_opposite_move_every_token_once() -> None:
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    expected = {"checkers": row + column, "vstripes": column, "hstripes": row}
    for kind, place in expected.items():
        one, other = moved_tokens(f"kind = {kind}"), moved_tokens(f"kind = {kind}, odd = 1")
        assert torch.equal(one, place % 2 == 1)
        assert torch.equal(other, ~one)


def test_item_7_parameters_of_the_imagenet64_preset() -> None:
    assert fl.check("flow j = jet_imagenet64\nrequire parameters(j) == 207_177_216\n").ok


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) * 15.9375  # 17 levels onto 0 .. 255


def test_item_7_the_module_on_meta_has_as_many() -> None:
    """The published preset, all 32 couplings, built without memory."""
    with torch.device("meta"):
        model = fl.compile("flow j = jet_imagenet64\n")
    assert sum(p.numel() for p in model.parameters()) == 207_177_216


@pytest.mark.slow
def test_item_8_beats_the_gaussian_on_digits() -> None:
    text = "model m = jet_model(channels = 1, size = 8, steps = jet_steps(8, 2, 6, 2, 32, 1, 2))\n"
    model, data = fl.compile(text, seed=0), digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    g, rows = generator(7), generator(8)
    with torch.no_grad():
        start = float(model.loss(data[1500:], generator=g))  # the identity: a Gaussian
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(data[torch.randint(1500, (128,), generator=rows)], generator=g).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        assert float(model.loss(data[1500:], generator=g)) <= start - 0.3


def test_bits_per_dimension_are_those_of_the_flow() -> None:
    """The model's loss at its start: the Gaussian's density of the dequantised image, in bits, with 7 for a level."""
    text = "model m = jet_model(channels = 1, size = 8, steps = jet_steps(8, 2, 4, 2, 8, 1, 2))\n"
    model, x = fl.compile(text, seed=0), digits()[:400]
    found = model.loss(x, generator=generator(9))
    u = 1 / 2  # the mean over the noise, to second order
    y = 2 * (x + u) / 256 - 1
    second = y.square() + (2 / 256) ** 2 / 12
    expected = ((0.5 * second + 0.5 * math.log(2 * math.pi)).mean() / math.log(2)) + math.log2(128)
    assert abs(found - expected) <= 1e-3


def test_onnx_of_all_programs(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = fl.compile("jet_tiny", seed=0).eval()
    perturb(model, generator(10), 0.3)
    paths = fl.export_onnx(model, tmp_path / "m.onnx", programs=["log_prob", "forward", "inverse", "sample"])
    x = images(6, dtype=torch.float32)
    z = model(x)[0].detach()
    for program, given, expected in (("log_prob", x, model.log_prob(x)), ("forward", x, z), ("inverse", z, x)):
        session = ort.InferenceSession(str(paths[program]))
        found = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
        assert np.allclose(found, expected.detach().numpy(), atol=2e-4)
    onnx = ort.InferenceSession(str(paths["sample"]))
    assert onnx.get_outputs()[0].shape[1:] == [1, 8, 8]
