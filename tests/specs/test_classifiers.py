"""The classifiers in specs/classify: clean, canonical, and they learn with any of the norms of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowlang as fl

FOLDER = Path(__file__).parents[2] / "specs" / "classify"
SPECS = sorted(FOLDER.glob("*.flow"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_spec_is_clean_and_canonical(spec: Path) -> None:
    from flowlang.source import Source
    from flowlang.syntax.printer import format_source

    text = spec.read_text("utf-8")
    # The norm is a parameter: with `no_norm` the biases count, with the batch norm of the default they do not (FL0503).
    assert [d.message for d in fl.check(spec) if d.code != "FL0503"] == []
    assert format_source(Source.of(spec.name, text)) == text


@pytest.mark.parametrize(("spec", "options"), [
    ("digits_conv", ""), ("digits_conv", "norm = group_norm(4), weight = weight_standardization"),
    ("digits_conv", "norm = no_norm, weight = spectral"), ("digits_transformer", ""),
    ("digits_transformer", "norm = rms_norm, weight = weight_norm"), ("digits_transformer", "norm = batch_norm"),
])  # fmt: skip
def test_it_learns(spec: str, options: str) -> None:
    """Two classes of patterns under noise: the loss halves in 30 steps."""
    torch.set_num_threads(1)
    text = (FOLDER / f"{spec}.flow").read_text("utf-8") + f"\nmodel chosen = {spec}({options})\n"
    model: Any = fl.compile(text, flow="chosen", seed=0)
    g = torch.Generator().manual_seed(0)
    opt = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(30):
        y = torch.randint(2, (32,), generator=g)
        x = 0.3 * torch.randn(32, 1, 8, 8, generator=g)
        x[:, :, :, :4] += y[:, None, None, None].float()
        opt.zero_grad()
        loss = model.loss(x, y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert model.scores(x).shape == (32, 10)


def test_the_command_trains_it_and_reports_accuracy(tmp_path: Path) -> None:
    """`flowlang train` on rows of pixels with the label as a column; a constant pixel is no fault without a density."""
    from click.testing import CliRunner

    from flowlang.cli.main import cli

    g = torch.Generator().manual_seed(0)
    y = torch.randint(10, (400,), generator=g)
    patterns = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    x = patterns[y] + 0.5 * torch.randn(400, 64, generator=g)
    x[:, 0] = 0
    file = tmp_path / "d.csv"
    lines = [
        ",".join([*(f"p{k}" for k in range(64)), "label"]),
        *(",".join(f"{v:.4f}" for v in r) + f",{int(n)}" for r, n in zip(x, y, strict=True)),
    ]
    file.write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    options = [
        "--data",
        str(file),
        "--given",
        "label=label",
        "-o",
        str(out),
        "--epochs",
        "6",
        "--batch",
        "50",
        "--lr",
        "0.01",
        "--validation",
        "0.2",
    ]
    ran = CliRunner().invoke(cli, ["train", str(FOLDER / "digits_conv.flow"), "--flow", "digits_conv_group", *options])
    assert ran.exit_code == 0, ran.output
    assert "accuracy on the held-out rows then: 0.9" in ran.output or "then: 1.0" in ran.output
    rows = (out / "history.csv").read_text().splitlines()
    assert rows[0] == "epoch,train,validation,accuracy"
    assert len(rows) == 8
    again: Any = fl.load(out)
    assert again.scores(x[:5].reshape(5, 1, 8, 8)).shape == (5, 10)
    more = CliRunner().invoke(
        cli,
        [
            "train",
            str(FOLDER / "digits_conv.flow"),
            "--flow",
            "digits_conv_group",
            *options[:-7],
            "--resume",
            "--epochs",
            "7",
        ],
    )
    assert more.exit_code == 0, more.output
