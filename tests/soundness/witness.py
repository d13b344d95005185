"""Whether the compiler, as it stands, misjudges a map or a random graph."""

from __future__ import annotations

from dataclasses import dataclass

from flowlang.compiler import compile_source
from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import Plan
from flowlang.derive.programs import is_random
from flowlang.ir.graph import Region
from flowlang.source import Source
from tests.analysis.maps import BIJECTIVE, NOT_BIJECTIVE, NOT_PROVED, Map
from tests.soundness.judge import compare, judge
from tests.soundness.wide import make

MAPS: dict[str, Map] = {m.name: m for m in (*BIJECTIVE, *NOT_BIJECTIVE, *NOT_PROVED)}


@dataclass(frozen=True)
class Judgement:
    """Of a map: the whole spec passes; the map by itself has a plan; what it compiles to is right."""

    spec: bool
    plan: bool
    right: bool


def judgement(m: Map) -> Judgement:
    comp = compile_source(Source("witness.flow", m.text))
    region = next((r for r in comp.regions["f"].walk() if r.name == "m"), None)
    if region is None:  # refused before there is a graph
        return Judgement(comp.ok, False, False)
    try:
        plan = isinstance(Analyses().plan(region), Plan)
        right = plan and (not comp.ok or is_random(region) or compare(region, Analyses(), 1) == "")
    except Exception:  # what is accepted wrongly often cannot be built
        return Judgement(comp.ok, True, False)
    return Judgement(comp.ok, plan, right)


def judged(witness: str | int) -> object:
    """What the compiler makes of a map by name, or of a random graph by seed."""
    if isinstance(witness, str):
        try:
            return judgement(MAPS[witness])
        except Exception as error:
            return repr(error)
    try:
        return judge(make(witness), witness).wrong
    except Exception as error:
        return repr(error)


def said(witness: str | int) -> str:
    """The first diagnostic of a map."""
    assert isinstance(witness, str)
    errors = compile_source(Source("witness.flow", MAPS[witness].text)).report.errors
    return errors[0].message if errors else ""


def sound(witness: str | int, found: object) -> bool:
    """Whether that is as it should be."""
    if isinstance(witness, int):
        return found == ""
    m = MAPS[witness]
    if not isinstance(found, Judgement):
        return False
    return found == Judgement(True, True, True) if m in BIJECTIVE else not found.spec


__all__ = ["MAPS", "Region", "judged", "judgement", "said", "sound"]
