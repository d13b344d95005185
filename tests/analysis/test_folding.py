"""Norms by running statistics inside the linear maps beside them: equal results, nothing left, and the reason where none folds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowlang as fl
from flowlang.api import generate_from, origins
from tests.catalogue.nets import data, net, shaken

IMAGE = {"C": 3, "H": 6, "W": 5}
FOLDED = {
    "batch_norm[C](conv(x, 4))": IMAGE, "batch_norm[C](conv(x, 4, bias = false, stride = 2, weight = weight_norm))": IMAGE,
    "batch_norm[C](conv(x, 6, groups = 3))": IMAGE, "batch_norm[C](conv_transpose(x, 4, kernel = 4, stride = 2))": IMAGE,
    "batch_norm[C](conv_transpose(x, 6, kernel = 4, stride = 2, groups = 3))": IMAGE, "batch_norm_population[C](conv(x, 4))": IMAGE,
    "batch_norm[E](linear[D -> E = 4](x))": {"D": 5}, "2 - batch_norm[C](conv(x, 4)) * 3": IMAGE,
    "est_batch_norm[C](conv(x, 4, weight = spectral))": IMAGE, "mean_only_batch_norm[C](2 * conv(x, 4))": IMAGE,
    "batch_norm_all(linear[D -> E = 4](x))": {"D": 5}, "online_norm_core(0.9, 0.9, 1e-5)(conv(x, 4))": IMAGE,
    "linear[D -> E = 4](batch_norm[D](x))": {"D": 5}, "conv(batch_norm[C](x), 4, padding = 0)": IMAGE,
    "conv(power_norm_core(2, 0.9, 0.9, 1e-5)[C](x), 4, padding = 1)": IMAGE, "linear[D -> E = 4](2 * batch_norm[D](x))": {"T": 3, "D": 5},
    "batch_norm[E](linear[D -> E = 4](relu(batch_norm[E](linear[D -> E = 4](x))[E -> D])))": {"T": 3, "D": 5},
}  # fmt: skip
LEFT = ("norm", "Norm", "sqrt", "running")


def trained(body: str, **sizes: int) -> Any:
    """Weights away from their starts, running statistics away from 0 and 1, in evaluation mode."""
    module = shaken(net(body, **sizes))
    for part in module.modules():
        if hasattr(part, "speed"):
            part.speed.fill_(0.3)
    for step in range(3):
        module(data(7, *sizes.values(), seed=step) + 1)
    return module.eval()


@pytest.mark.parametrize("body", FOLDED)
def test_results_are_equal_and_nothing_is_left(body: str) -> None:
    sizes = FOLDED[body]
    mine = trained(body, **sizes)
    other = fl.folded(mine)
    x = data(2, 4, *sizes.values(), seed=9)
    torch.testing.assert_close(other(x), mine(x), rtol=1e-12, atol=1e-12)
    assert all(v.folds for v in other.verdicts)
    comp, name = origins[type(other)]
    text = generate_from(comp, name, standalone=False)[0].split("class ", 1)[1]
    assert not [w for w in LEFT if w in text], text


def test_it_folds_inside_copies_and_blocks() -> None:
    body = "h = batch_norm[C](conv(x, 8, bias = false)); repeat 2 { h := h + relu(batch_norm_2d()(conv(h, 8))) }; bottleneck(2)(h)"
    mine = trained(body, **IMAGE)
    other = fl.folded(mine)
    x = data(4, *IMAGE.values(), seed=9)
    torch.testing.assert_close(other(x), mine(x), rtol=1e-11, atol=1e-11)
    assert len(list(other.buffers())) == 1
    assert [v.folds for v in other.verdicts] == [True] * len(other.verdicts)


REFUSED = {
    "layer_norm[D](linear[D -> D](x))": "its statistics are those of each sample, at inference too",
    "relu(linear[D -> D](x))": "it calls no norm", "batch_norm[D](relu(linear[D -> D](x)))": "no linear map of its own stands before it",
    "h = linear[D -> D](x); batch_norm[D](h) + h": "no linear map of its own stands before it",
}  # fmt: skip


@pytest.mark.parametrize("body", REFUSED)
def test_what_does_not_fold_is_refused_with_its_reason(body: str) -> None:
    with pytest.raises(fl.FlowError) as e:
        fl.compile(f"net n(x: R[D = 4]) {{ {body} }}", flow="n", fold=True)
    (d,) = e.value.diagnostics
    assert d.code == "FL0412"
    assert REFUSED[body] in d.message + " ".join(d.notes)


def test_where_some_fold_the_others_stay() -> None:
    mine = trained("layer_norm[E](batch_norm[E](linear[D -> E = 4](x)))", D=5)
    other = fl.folded(mine)
    assert [(v.name, v.folds) for v in other.verdicts] == [("batch_norm", True), ("layer_norm", False)]
    x = data(6, 5)
    torch.testing.assert_close(other(x), mine(x), rtol=1e-12, atol=1e-12)


def test_saved_and_compiled(tmp_path: Path) -> None:
    text = "net n(x: R[C = 3, H = 6, W = 6]) { batch_norm[C](conv(x, 4)) }"
    made = fl.compile(text, flow="n", seed=0, fold=True)
    x = data(2, 3, 6, 6, dtype=torch.float32)
    torch.testing.assert_close(made(x), fl.compile(text, flow="n", seed=0).eval()(x))
    fl.save(made, tmp_path / "f.safetensors")
    again = fl.load(tmp_path / "f.safetensors")
    assert torch.equal(again(x), made(x))


def test_info_says_whether_a_norm_folds() -> None:
    text = "norm a(x: R[C = 3, H = 6, W = 6]) { batch_norm[C](x) }\nnorm b(x: R[D = 3]) { layer_norm(x) }\n"
    found = {e["name"]: e["norm"]["folds"] for e in fl.info(text)}
    assert found == {"a": "yes", "b": "no: its statistics are those of each sample, at inference too"}


def test_a_model_s_networks_fold() -> None:
    model = fl.compile(Path("specs/classify/digits_conv.flow"), flow="digits_conv", seed=0)
    x = data(8, 1, 8, 8, dtype=torch.float32)
    model.loss(x, torch.arange(8))
    other = fl.folded(model.eval())
    torch.testing.assert_close(other.scores(x), model.scores(x), rtol=1e-4, atol=1e-5)
    assert len(other.verdicts) == 4
