"""The worked examples of docs/analyses.md are reported as they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flowlang as fl

PAGE = Path(__file__).parents[2] / "docs" / "analyses.md"
BLOCKS = re.findall(r"^```flow (.*)\n((?:.*\n)*?)```$", PAGE.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("mark", "text"), BLOCKS, ids=[str(k) for k in range(len(BLOCKS))])
def test_example(mark: str, text: str) -> None:
    if mark.startswith("refused "):
        assert [d.code for d in fl.check(text).errors] == [mark.removeprefix("refused ")]
        return
    flow = next(d for d in fl.info(text) if d["kind"] == "flow")
    for key, value in re.findall(r"(\w+)=(.*?)(?= \w+=|$)", mark):
        assert str(flow[key]) == value


def test_every_fallback_is_shown() -> None:
    ways = {m for mark, _ in BLOCKS for m in re.findall(r"inverse=(.*?)(?= \w+=|$)", mark)}
    assert {"analytic", "bracketing", "scan over D", "fixed point"} <= ways
