"""docs/ops.md lists the ops there are, in their files."""

from __future__ import annotations

import re
from pathlib import Path

from flowlang.ir.ops import OPS
from flowlang.ir.ops.splines import SPLINES

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text("utf-8")


def test_the_list_is_the_registry() -> None:
    rows = dict(re.findall(r"^\| `(\w+)\.py` \| (.*) \|$", PAGE, re.MULTILINE))
    listed = {name: set(re.findall(r"`(\w+)`", text)) for name, text in rows.items()}
    listed["splines"] = {f"{kind}{suffix}" for kind in SPLINES for suffix in ("", "_inverse", "_log_slope")}
    assert set(re.findall(r"`(\w+)`", rows["splines"])) - {"_inverse", "_log_slope"} == set(SPLINES)
    assert {n for names in listed.values() for n in names} == set(OPS)
    for file, names in listed.items():
        text = (Path(__file__).parents[2] / "flowlang" / "ir" / "ops" / f"{file}.py").read_text("utf-8")
        assert all(f'"{n}"' in text or file == "splines" for n in names), file


def test_the_files_it_names_are_there() -> None:
    root = Path(__file__).parents[2]
    for path in re.findall(r"`((?:flowlang|backends|tests)/[\w/]+\.py)`", PAGE):
        assert (root / path).is_file(), path
