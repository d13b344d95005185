"""Maps that must be accepted, each compared with an independent interpreter and its Jacobian."""

from __future__ import annotations

import pytest

from flowlang.compiler import Compilation, compile_source
from flowlang.derive.programs import is_random
from flowlang.ir.graph import Region
from flowlang.source import Source
from tests.analysis.maps import BIJECTIVE, Map
from tests.soundness.judge import compare


def compiled(m: Map) -> tuple[Compilation, Region]:
    comp = compile_source(Source(f"{m.name}.flow", m.text))
    assert comp.ok, [d.message for d in comp.report.errors]
    return comp, next(r for r in comp.regions["f"].walk() if r.name == "m")


@pytest.mark.parametrize("m", BIJECTIVE, ids=str)
def test_is_accepted_and_right(m: Map) -> None:
    comp, region = compiled(m)
    if not is_random(region):
        assert compare(region, comp.analyses, 1) == ""
