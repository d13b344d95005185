"""Networks that read a time: their sizes as published, their starts, their formulas, and ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowlang as fl
from tests.catalogue.nets import count, shaken


def image_net(call: str, channels: int, size: int, outputs: int = 1) -> Any:
    names = ", ".join(f"u{k}: R[C, H, W]" for k in range(outputs))
    total = " + ".join(f"u{k}" for k in range(outputs))
    text = (
        f"net n(x: R[C = {channels}, H = {size}, W = {size}], t: R, y: Int) {{\n {names} = {call}(x, t, y)\n {total} }}"
    )
    return fl.compile(text, flow="n", seed=0)


@pytest.mark.parametrize(
    ("call", "channels", "size", "millions", "exact"),
    [
        ("dit_s()", 4, 32, 33, 32_865_056), ("dit_b()", 4, 32, 130, 130_315_808), ("dit_l()", 4, 32, 458, 457_840_672),
        ("dit_xl()", 4, 32, 675, 674_834_720), ("adm_unet64()", 3, 64, 296, 295_905_222),
    ],
)  # fmt: skip
def test_published_sizes(call: str, channels: int, size: int, millions: int, exact: int) -> None:
    """The authors' DiT counts fixed positions too (256 · width); ours has one more label than their ADM."""
    with torch.device("meta"):
        found = count(image_net(call, channels, size, 2))
    assert round(found / 1e6) == millions
    assert found == exact


@pytest.mark.parametrize("call", ["dit(24, 2, 4, 2, 10)", "unet(8, [1, 2], 1, [2], 8, 10, 4)"])
def test_a_velocity_starts_at_zero_and_reads_time_and_label(call: str) -> None:
    net = image_net(call, 3, 8)
    g = torch.Generator().manual_seed(0)
    x, t, y = torch.randn(4, 3, 8, 8, generator=g), torch.rand(4, generator=g), torch.tensor([0, 1, 5, 10])
    assert net(x, t, y).abs().max() == 0
    shaken(net, 0.1)
    out = net(x, t, y)
    assert out.shape == x.shape
    assert (net(x, t + 0.1, y) != out).flatten(1).any(1).all()
    assert (net(x, t, (y + 1) % 11) != out).flatten(1).any(1).all()


@pytest.mark.parametrize("call", ["dit(24, 1, 4, 2, 10)", "unet(8, [1, 2], 1, [2], 8, 10, 4)"])
def test_they_go_to_onnx(call: str, tmp_path: Path) -> None:
    import onnxruntime

    net = shaken(image_net(call, 2, 8), 0.1)
    g = torch.Generator().manual_seed(0)
    x, t, y = torch.randn(3, 2, 8, 8, generator=g), torch.rand(3, generator=g), torch.tensor([0.0, 3.0, 10.0])
    (path,) = fl.export_onnx(net, tmp_path / "n.onnx").values()
    run = onnxruntime.InferenceSession(str(path))
    (found,) = run.run(None, {i.name: v.numpy() for i, v in zip(run.get_inputs(), (x, t, y), strict=True)})
    torch.testing.assert_close(torch.as_tensor(found), net(x, t, y.long()).detach(), rtol=1e-4, atol=1e-4)


def test_the_embedding_of_a_time_is_that_of_the_authors() -> None:
    net: Any = fl.compile(
        "net n(t: R) { time_embedding(8, period = 100, scale = 10)(t) }", flow="n", dtype=torch.float64
    )
    t = torch.rand(5, dtype=torch.float64)
    rate = torch.exp(-torch.log(torch.tensor(100.0, dtype=torch.float64)) * torch.arange(4) / 4)
    angle = 10 * t[:, None] * rate
    torch.testing.assert_close(net(t), torch.cat((angle.cos(), angle.sin()), -1))


def test_a_net_of_vectors_with_time_and_label() -> None:
    text = "net n(x: R[D = 3], t: R, y: Int) { u: R[D] = class_time_mlp(4, 16, 16)(x, t, y)\n u }"
    net = shaken(fl.compile(text, flow="n", seed=0))
    x, t = torch.randn(6, 3), torch.rand(6)
    a, b = (net(x, t, torch.full((6,), k)) for k in (0, 4))
    assert a.shape == (6, 3)
    assert (a != b).all()
