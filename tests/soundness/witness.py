"""Whether the compiler, as it stands, misjudges a map or a random graph."""

from __future__ import annotations

from flowlang.compiler import compile_source
from flowlang.derive.programs import is_random
from flowlang.source import Source
from tests.analysis.maps import BIJECTIVE, Map
from tests.soundness.generate import make
from tests.soundness.judge import compare, judge


def flips_map(m: Map) -> bool:
    """A non-bijection accepted, a bijection refused, or one accepted and compiled to something else."""
    try:
        comp = compile_source(Source("witness.flow", m.text))
        if m not in BIJECTIVE:
            return comp.ok
        if not comp.ok:
            return True
        region = next(r for r in comp.regions["f"].walk() if r.name == "m")
        return not is_random(region) and compare(region, comp.analyses, 1) != ""
    except Exception:  # what is accepted wrongly often cannot be built
        return True


def flips_seed(seed: int) -> bool:
    try:
        return judge(make(seed), seed).wrong != ""
    except Exception:
        return True
