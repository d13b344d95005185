"""Maps that are no bijections are refused, each for its reason (A14)."""

from __future__ import annotations

from collections import Counter

import pytest

import flowlang as fl
from tests.analysis.maps import NOT_BIJECTIVE, Map

# What may be said of a map that breaks a clause; FL0401 ("arrives twice") is the last resort of every search.
CODES = {
    "A1": {"FL0401", "FL0402", "FL0406", "FL0407", "FL0411", "FL0414"},
    "A2": {"FL0401", "FL0406", "FL0407"},
    "A3": {"FL0401", "FL0402", "FL0403", "FL0404", "FL0406", "FL0407"},
    "A4": {"FL0401"},
    "A5": {"FL0401", "FL0403", "FL0404", "FL0406", "FL0407"},
    "A6": {"FL0401", "FL0403", "FL0404", "FL0405"},
    "A7": {"FL0401", "FL0407"},
    "A8": {"FL0401", "FL0404", "FL0407"},
    "A9": {"FL0404", "FL0408", "FL0409", "FL0414"},
    "A11": {"FL0401", "FL0402", "FL0403", "FL0404"},
    "A12": {"FL0402", "FL0410"},
    "A15": {"FL0401", "FL0403"},
}


@pytest.mark.parametrize("m", NOT_BIJECTIVE, ids=str)
def test_is_refused(m: Map) -> None:
    errors = fl.check(m.text).errors
    assert len(errors) == 1, [d.message for d in errors]
    assert errors[0].code in CODES[m.clause], errors[0].message
    assert errors[0].span is not None
    assert errors[0].code in ("FL0408", "FL0409") or errors[0].message.startswith("not invertible")


def test_every_clause_and_fallback_has_four() -> None:
    assert len(NOT_BIJECTIVE) >= 60
    assert len({m.name for m in NOT_BIJECTIVE}) == len(NOT_BIJECTIVE)
    clauses = Counter(m.clause for m in NOT_BIJECTIVE)
    assert min(clauses[c] for c in CODES) >= 4, clauses
    fallbacks = Counter(m.fallback for m in NOT_BIJECTIVE)
    assert min(fallbacks[f] for f in ("scalar", "scan", "low rank", "contraction", "linear", "ode")) >= 4, fallbacks
