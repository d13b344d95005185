"""Every block of the language reference compiles, or is refused with the code it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flowlang as fl

PAGE = Path(__file__).parents[2] / "docs" / "language.md"
BLOCKS = re.findall(r"^```flow ?(.*)\n((?:.*\n)*?)```$", PAGE.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("mark", "text"), BLOCKS, ids=[f"{k}" for k in range(len(BLOCKS))])
def test_block(mark: str, text: str) -> None:
    report = fl.check(text)
    if mark:
        assert mark.startswith("refused ")
        assert [d.code for d in report.errors] == [mark.removeprefix("refused ")]
    else:
        assert not [d for d in report if d.severity in ("error", "warning")]


def test_there_are_blocks_of_both_kinds() -> None:
    assert sum(bool(mark) for mark, _ in BLOCKS) >= 5
    assert sum(not mark for mark, _ in BLOCKS) >= 15
