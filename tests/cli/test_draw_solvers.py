"""`flowlang draw --solver`: stability regions and work against precision."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowlang.api import analyse
from flowlang.cli.main import cli
from flowlang.draw.solvers import curve, region

SPEC = "net f(x: R[D = 2]) { x }\nsolver mine (v, x, t, h) { x + h * v(x + h / 2 * v(x, t), t + h / 2) }\n"


def test_regions_and_slopes_are_those_of_the_methods(tmp_path: Path) -> None:
    comp = analyse(SPEC, {})
    rk4 = curve(comp, "rk4")
    assert rk4.stability is not None
    inside, outside = region(rk4.stability, -2.7852), region(rk4.stability, -2.7854)  # the textbook's real border
    assert inside <= 1.0001
    assert outside >= 0.9999
    assert region(rk4.stability, 2.828j) < 1 < region(rk4.stability, 2.83j)
    euler = curve(comp, "backward_euler").stability
    assert euler is not None
    assert abs(region(euler, -1e6)) < 1e-5
    mine = curve(comp, "mine")
    assert mine.stability is None  # a rule has no tableau
    for c, order in ((rk4, 4), (mine, 2)):
        (n0, e0), (n1, e1) = c.work[5], c.work[-1]
        assert -math.log(e1 / e0) / math.log(n1 / n0) == pytest.approx(order, abs=0.25)


def test_a_picture_is_written_and_strangers_are_told(tmp_path: Path) -> None:
    spec = tmp_path / "s.flow"
    spec.write_text(SPEC)
    out = tmp_path / "s.png"
    found = CliRunner().invoke(cli, ["draw", str(spec), "--solver", "euler", "--solver", "mine", "-o", str(out)])
    assert found.exit_code == 0, found.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "evaluations" in found.output
    from flowlang.diagnostics import FlowError

    with pytest.raises(FlowError, match="no solver"):
        curve(analyse(SPEC, {}), "nobody")
