"""Of bijections by construction at most one in ten is refused, and what is accepted is right."""

from __future__ import annotations

from collections import Counter

import pytest

from flowlang.derive.analyse import Analyses
from flowlang.derive.plan import Failure
from tests.soundness.construct import construct
from tests.soundness.judge import judge


def refusals(seeds: range) -> dict[int, str]:
    out = {}
    for seed in seeds:
        analyses, region = Analyses(), construct(seed)
        for r in region.walk():
            found = analyses.plan(r)
            if isinstance(found, Failure):
                out[seed] = f"{found.code} {found.message}"
                break
    return out


def test_few_bijections_are_refused() -> None:
    seeds = range(400)
    refused = refusals(seeds)
    reasons = Counter(refused.values())
    assert len(refused) <= 0.10 * len(seeds), (len(refused), reasons.most_common(), sorted(refused)[:20])


@pytest.mark.slow
def test_accepted_bijections_are_right() -> None:
    wrong = {s: v.wrong for s in range(200) if (v := judge(construct(s), s)).wrong}
    assert not wrong
