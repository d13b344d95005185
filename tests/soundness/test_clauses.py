"""Turning off any one clause of ANALYSIS.md makes the compiler misjudge a map or a random graph."""

from __future__ import annotations

import pytest

from tests.soundness.clauses import SWITCHES, Switch
from tests.soundness.witness import judged, said, sound


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_clause_is_needed(switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    if switch.says:
        assert switch.says in said(switch.witness)
        switch.off(monkeypatch)
        assert switch.says not in said(switch.witness)
        return
    whole = judged(switch.witness)
    assert sound(switch.witness, whole)
    switch.off(monkeypatch)
    assert judged(switch.witness) != whole
