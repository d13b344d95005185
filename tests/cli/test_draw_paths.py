"""`flowlang draw --path`, and rules of jumps in `--solver`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowlang.api import analyse
from flowlang.cli.main import cli
from flowlang.diagnostics import FlowError
from flowlang.draw.levels import TIMES, levels
from flowlang.draw.solvers import curve

SPEC = "path mine (t, x0, x1) { x_t ~ (1 - t ^ 2) * delta(x0) + t ^ 2 * delta(x1) }\nsolver rare (rate, x, t, h) { x + h * rate(x, t) }\n"


def test_levels_are_those_of_the_formulas() -> None:
    comp = analyse(SPEC, {})
    cosine, mine = levels(comp, "cosine"), levels(comp, "mine")
    assert mine.drawn
    for k in (0, 40, 98):
        time = TIMES[k]
        quarter = math.pi * time / 2
        assert cosine.alpha[k] == pytest.approx(math.sin(quarter))
        assert cosine.sigma_rate[k] == pytest.approx(-math.pi / 2 * math.sin(quarter))
        assert (mine.alpha[k], mine.sigma[k], mine.alpha_rate[k]) == pytest.approx((time**2, 1 - time**2, 2 * time))
    for name in ("nfdm_gaussian", "geodesic", "nothing"):
        with pytest.raises(FlowError):
            levels(comp, name)


@pytest.mark.parametrize("name", ["jumps", "jump_euler", "rare"])
def test_rules_of_jumps_have_the_slope_of_their_order(name: str) -> None:
    found = curve(analyse(SPEC, {}), name)
    (n0, e0), (n1, e1) = found.work[5], found.work[-1]
    assert -math.log(e1 / e0) / math.log(n1 / n0) == pytest.approx(1, abs=0.1)


def test_pictures_are_written(tmp_path: Path) -> None:
    spec = tmp_path / "s.flow"
    spec.write_text(SPEC)
    out = tmp_path / "p.png"
    found = CliRunner().invoke(cli, ["draw", str(spec), "--path", "mine", "--path", "vp", "-o", str(out)])
    assert found.exit_code == 0, found.output
    assert out.stat().st_size > 5000
    assert "mine" in found.output
    solvers = CliRunner().invoke(cli, ["draw", str(spec), "--solver", "rare", "--solver", "jumps", "-o", str(out)])
    assert solvers.exit_code == 0, solvers.output
