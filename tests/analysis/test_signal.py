"""Variance at initialisation: the closed form against many starts of the module, and what `draw --signal` says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowlang.analysis.signal import Moments, propagate, through
from flowlang.api import analyse
from flowlang.cli.main import cli
from flowlang.draw.signal import signal, verdict

STACK = """net f(x: R[D = 128]) {{
  h = x
  repeat {depth} {{ h := {block} }}
  {last}
}}
"""
WIDE = "linear[H -> D](relu(linear[D -> H = 256]({})))"
NETS = {
    "residual": STACK.format(depth=6, block=f"h + {WIDE.format('h')}", last="h"),
    "pre-norm": STACK.format(depth=6, block=f"h + {WIDE.format('layer_norm()(h)')}", last="layer_norm()(h)"),
    "post-norm": STACK.format(depth=4, block=f"layer_norm()(h + {WIDE.format('h')})", last="h"),
    "plain": STACK.format(depth=5, block="tanh(linear[D -> D](h))", last="h"),
    "gelu": STACK.format(depth=3, block="gelu(linear[D -> D](rms_norm()(h)))", last="h"),
    "batch norm": STACK.format(depth=3, block="relu(batch_norm()(linear[D -> D](h)))", last="h"),
}


@pytest.mark.parametrize("name", NETS)
def test_the_closed_form_is_what_starts_give(name: str) -> None:
    rows = signal(analyse(NETS[name], sized=True), "f", seeds=6)
    assert len(rows) >= 4
    for row in rows:
        assert row.predicted is not None, row.name
        assert math.isclose(row.predicted, sum(row.measured) / len(row.measured), rel_tol=0.12), row.name


def test_images() -> None:
    text = """net f(x: R[C = 16, H = 16, W = 16]) {
      h = relu(conv(x, 64, kernel = 1))
      repeat 2 { h := h + conv(relu(batch_norm()(conv(h, 64, kernel = 1))), 64, kernel = 1) }
      h
    }"""
    for row in signal(analyse(text, sized=True), "f", seeds=4, batch=32):
        assert row.predicted is not None
        assert math.isclose(row.predicted, sum(row.measured) / len(row.measured), rel_tol=0.15), row.name


@pytest.mark.parametrize("text", [
    "net f(x: R[D = 8]) { x * sigmoid(x) }",  # one source twice
    "net f(x: R[D = 8]) { x + relu(x) }",
    "net f(x: R[T = 4, D = 8]) { attention[T](x, 2) }",
])  # fmt: skip
def test_what_is_not_known_is_left_open(text: str) -> None:
    comp = analyse(text, sized=True)
    assert propagate(comp.regions["f"])[-1].var is None
    assert signal(comp, "f", seeds=2)[-1].middle > 0


def test_moments_of_a_relu() -> None:
    """Half the second moment; mean 1/√(2π) (He et al. 2015)."""
    m = through(lambda t: max(t, 0.0), Moments(0.0, 1.0))
    assert m is not None
    assert math.isclose(m.square, 0.5, rel_tol=2e-2)
    assert math.isclose(m.mean, 1 / math.sqrt(2 * math.pi), rel_tol=2e-2)


def test_squared_means() -> None:
    """Of relu on centred values, 1/π of its second moment; of tanh, none. In residual stacks of convolutions with relu they grow, and
    with scaled weight standardisation they stay small (card 139, item 4)."""
    text = "net a(x: R[D]) {{ {}(linear[D -> D](x, bias = false)) }}\nnet f(x: R[D = 128]) {{ a(a(x)) }}"
    for act, share in (("relu", 1 / math.pi), ("tanh", 0.0)):
        row = signal(analyse(text.format(act), sized=True), "f", seeds=5)[0]
        assert abs(row.mean / (row.mean + row.middle) - share) < 0.05
    block = {
        "plain": "h + 0.2 * conv(sqrt(2.0) * relu(h), 64, kernel = 1, bias = false, start = kaiming_normal(gain = 1))",
        "ws": "nf_block(64, skip = 1)(h)",
    }
    found = {}
    for name, body in block.items():
        text = f"net f(x: R[C = 8, H = 8, W = 8]) {{ h = scaled_ws_conv(64, 1)(x); repeat 10 {{ h := {body} }}; h }}"
        found[name] = signal(analyse(text, sized=True), "f", seeds=3, batch=32)[-1].mean
    assert found["ws"] < 0.05 < 3 * 0.05 < found["plain"]


def test_a_badly_scaled_stack_is_told(tmp_path: Path) -> None:
    bad = "h + linear[H -> D](relu(linear[D -> H = 256](h, weight = 2)), weight = 3)"
    spec = tmp_path / "s.flow"
    spec.write_text(STACK.format(depth=12, block=bad, last="h"))
    out = tmp_path / "s.png"
    done = CliRunner().invoke(cli, ["draw", str(spec), "--signal", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "the signal grows" in done.output
    assert "blocks.11" in done.output
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert verdict(signal(analyse(NETS["pre-norm"], sized=True), "f", seeds=2)) == ""


def test_wrong_uses_are_told(tmp_path: Path) -> None:
    spec = tmp_path / "s.flow"
    spec.write_text("flow g { data x: R[D = 2]\n affine_elementwise\n base normal }\n")
    for options in ([], ["--flow", "g"]):
        done = CliRunner().invoke(cli, ["draw", str(spec), "--signal", *options])
        assert done.exception is not None
        assert "FL0804" in str(done.exception)
