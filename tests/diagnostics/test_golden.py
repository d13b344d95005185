"""The golden texts, and that every code which `check` can give has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowlang.diagnostics.codes import CODES
from flowlang.diagnostics.explain import explain
from tests.diagnostics.golden import shown, specs


@pytest.mark.parametrize("spec", specs(), ids=lambda p: p.stem)
def test_as_shown(spec: Path) -> None:
    assert shown(spec) == spec.with_suffix(".txt").read_text("utf-8"), "see tests/diagnostics/golden.py"


def test_every_code_of_check_is_shown() -> None:
    """A code whose page has a wrong spec is one that `check` gives."""
    wanted = {c for c in CODES if "## Wrong" in explain(c)}
    told = "\n".join(s.with_suffix(".txt").read_text("utf-8") for s in specs())
    assert {c for c in wanted if f"[{c}]" not in told} == set()
