"""Rewritten networks: text and weights of an equal one, compared in float64 apart from the command's own comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import flowlang as fl
from flowlang.cli.main import cli
from flowlang.rewrite import rewrite
from tests.catalogue.nets import data, shaken

VIT = """net vit(x: R[C = 3, H = 8, W = 8]) -> R[K = 5] {
  pre_ln_transformer(16, inner = 8, heads = 2, hidden = 24, depth = 2, classes = 5NORM)(x)
}
"""
NAMED = VIT.replace("(16, ", "(width = 16, ")
CONVOLUTIONS = """## Two blocks.
net small(x: R[C = 3, H = 8, W = 8]) -> R[K = 5] {
  h = relu(batch_norm[C]()(conv(x, 4, bias = false, weight = weight_standardization)))
  repeat 2 { h := h + relu(conv(h, 4, kernel = 3, start = kaiming_normal) |> batch_norm_2d()) }
  2 * linear[C -> K = 5](mean[H, W](h)) + 1
}
"""
RESNET = "net r(x: R[C = 3, H = 32, W = 32]) -> R[K = 5] { resnet([1, 1, 1, 1], width = 4, classes = 5)(x) }\n"
SPIKES = """net snn(lif: net = lif_mpbn()) (x: R[C = 3, H = 8, W = 8]) -> R[K = 4] { mpbn_resnet(4, [1, 1], 2, lif)(x) }
"""
CASES = {
    "plain": ("pre_rmsnorm", VIT.replace("NORM", "")), "with gain and offset": ("pre_rmsnorm", VIT.replace("NORM", ", norm = layer_norm")),
    "compressed": ("pre_crmsnorm", NAMED.replace("NORM", "")),
    "compressed, by positions": ("pre_crmsnorm", VIT.replace("NORM", "").replace("(16, inner = 8,", "(16, 8,")), "convolutions": ("fold_batch_norm", CONVOLUTIONS),
    "library": ("fold_batch_norm", RESNET), "spikes": ("thresholds", SPIKES),
}  # fmt: skip


def trained(text: str) -> Any:
    """Weights away from their starts; running statistics of a few batches."""
    module: Any = fl.compile(text, flow=text.split("net ")[1].split("(")[0], seed=0, dtype=torch.float64)
    shaken(module)
    (shape,) = module.inputs.values()
    with torch.no_grad():
        for k in range(3):
            module(data(8, *shape, seed=k) + 0.5)
    return module.eval()


@pytest.mark.parametrize("case", CASES)
def test_the_new_text_with_the_new_weights_is_the_same_function(case: str, tmp_path: Path) -> None:
    to, text = CASES[case]
    module = trained(text)
    made = rewrite(module, to)
    fl.save(made.module, tmp_path / "n.safetensors")
    other = fl.compile(made.text, flow=made.name, dtype=torch.float64)
    other.load_state_dict(made.module.state_dict())
    other.eval()
    (shape,) = module.inputs.values()
    a, b = (data(6, *shape, seed=21).requires_grad_() for _ in range(2))
    y, z = module(a), other(b)
    torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-9)
    if to.startswith("pre_"):
        weight = data(*y.shape, seed=2)
        (y * weight).sum().backward(), (z * weight).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-7, atol=1e-9)
    assert fl.check(made.text).ok
    if to == "fold_batch_norm":
        assert not [n for n, _ in other.named_modules() if "norm" in n]


def test_the_text_reads_as_if_written() -> None:
    made = rewrite(trained(CONVOLUTIONS), "fold_batch_norm")
    assert made.text == CONVOLUTIONS.replace(
        "batch_norm[C]()(conv(x, 4, bias = false, weight = weight_standardization))", "conv(x, 4)"
    ).replace("conv(h, 4, kernel = 3, start = kaiming_normal) |> batch_norm_2d()", "conv(h, 4, kernel = 3)")
    made = rewrite(trained(NAMED.replace("NORM", "")), "pre_crmsnorm")
    assert "net vit_pre_crmsnorm(" in made.text
    assert "width = 15" in made.text


def test_the_command_writes_text_and_weights(tmp_path: Path) -> None:
    spec, out = tmp_path / "s.flow", tmp_path / "new"
    spec.write_text(CONVOLUTIONS)
    module = trained(CONVOLUTIONS).float()
    fl.save(module, tmp_path / "w.safetensors")
    ran = CliRunner().invoke(
        cli, ["rewrite", str(spec), "--to", "fold_batch_norm", "-w", str(tmp_path / "w.safetensors"), "-o", str(out)]
    )
    assert ran.exit_code == 0, ran.output
    assert "results differ by" in ran.output
    assert out.with_suffix(".flow").read_text() == rewrite(module, "fold_batch_norm").text
    again = fl.load(out.with_suffix(".safetensors")).eval()
    x = data(4, 3, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(again(x), module(x), rtol=1e-4, atol=1e-5)


REFUSED = {
    "post norm": ("pre_rmsnorm", "net n(x: R[T = 3, D = 4]) { h = x; repeat 2 { h := layer_norm[D](h + linear[D -> D](h)) }; h }", "forget its mean"),
    "no arguments": ("pre_rmsnorm", "net n(x: R[T = 3, D = 4]) { h = x; repeat 2 { h := h + linear[D -> D](layer_norm[D](h)) }; layer_norm[D](h) }", "no parameters"),
    "nothing folds": ("fold_batch_norm", "net n(x: R[D = 4]) { layer_norm(linear[D -> D](x)) }", "nothing in `n` folds"),
    "no neurons": ("thresholds", "net n(x: R[D = 4]) { 2 * x }", "no `lif_mpbn`"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_equal_is_refused(case: str) -> None:
    to, text, words = REFUSED[case]
    with pytest.raises(fl.FlowError, match=words):
        rewrite(fl.compile(text, flow="n"), to)
