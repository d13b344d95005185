"""Triangular convolutions: what is recognised, how many rounds their inverses take, and what a kernel's mask lets through."""

from __future__ import annotations

import pytest

from flowlang.compiler import compile_source
from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import Plan, Scan
from flowlang.ir.graph import Region
from flowlang.source import Source
from tests.analysis.maps import BIJECTIVE

MAPS = {m.name: m for m in BIJECTIVE}


def mapped(name: str, data: str | None = None) -> Region:
    text = MAPS[name].text if data is None else MAPS[name].text.replace(MAPS[name].data, data)
    comp = compile_source(Source("conv.flow", text))
    assert comp.ok
    return next(r for r in comp.regions["f"].walk() if r.name == "m")


def levels(region: Region) -> list[tuple[int, ...]]:
    plan = Analyses().plan(region)
    assert isinstance(plan, Plan)
    return [s.levels for s in plan.steps if isinstance(s, Scan)]


@pytest.mark.parametrize(("height", "width"), [(3, 3), (5, 4), (1, 6), (8, 8)])
@pytest.mark.parametrize("name", ["corner convolution", "strict convolution and a channel matrix"])
def test_a_corner_convolution_goes_by_anti_diagonals(name: str, height: int, width: int) -> None:
    (found,) = levels(mapped(name, f"R[C = 2, H = {height}, W = {width}]"))
    assert max(found) + 1 == height + width - 1
    assert found == tuple(i + j for i in range(height) for j in range(width))


def test_a_raster_convolution_waits_for_the_place_above_and_to_the_right() -> None:
    (found,) = levels(mapped("raster convolution", "R[C = 2, H = 4, W = 5]"))
    assert found == tuple(2 * i + j for i in range(4) for j in range(5))


def test_a_lag_of_two_makes_two_entries_a_round() -> None:
    assert levels(mapped("every other entry", "R[D = 7]")) == [(0, 0, 1, 1, 2, 2, 3)]
