"""Norms by running statistics vanish in the linear map before them when a network is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.catalogue.nets import data, in_onnx, net, shaken

IMAGE = {"C": 3, "H": 6, "W": 5}
FOLDED = {
    "batch_norm[C](conv(x, 4))": IMAGE, "batch_norm[C](conv(x, 4, bias = false, stride = 2, weight = weight_norm))": IMAGE,
    "batch_norm[C](conv(x, 6, groups = 3))": IMAGE, "batch_norm[C](conv_transpose(x, 4, kernel = 4, stride = 2))": IMAGE,
    "batch_norm[C](conv_transpose(x, 6, kernel = 4, stride = 2, groups = 3))": IMAGE,
    "batch_norm[E](linear[D -> E = 4](x))": {"D": 5}, "2 - batch_norm[C](conv(x, 4)) * 3": IMAGE,
    "est_batch_norm[C](conv(x, 4))": IMAGE,
}  # fmt: skip
KEPT = {
    "conv(x, 4) + x[C = 0]": "Add", "batch_norm[C](relu(conv(x, 4)))": "Mul", "h = conv(x, 4); batch_norm[C](h) + relu(h)": "Relu",
}  # fmt: skip


@pytest.mark.parametrize("body", [*FOLDED, *KEPT])
def test_outputs_are_equal_and_steps_gone(body: str, tmp_path: Path) -> None:
    sizes = FOLDED.get(body, IMAGE)
    mine = shaken(net(body, torch.float32, **sizes))
    for module in mine.modules():
        if hasattr(module, "speed"):
            module.speed.fill_(0.3)
    for step in range(3):
        mine(data(7, *sizes.values(), seed=step, dtype=torch.float32) + 1)
    mine.eval()
    x = data(4, *sizes.values(), seed=9, dtype=torch.float32)
    found, ops = in_onnx(mine, x, tmp_path)
    torch.testing.assert_close(torch.as_tensor(found), mine(x).detach(), rtol=1e-4, atol=1e-5)
    steps = [o for o in ops if o in ("Add", "Sub", "Mul", "Div", "Sqrt")]
    if body in FOLDED:
        assert steps == [], ops
    else:
        assert KEPT[body] in ops
