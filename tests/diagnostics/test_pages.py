"""Every code has its page, every page its parts."""

from __future__ import annotations

import re

import pytest

from flowlang.diagnostics import FlowError
from flowlang.diagnostics.codes import CODES
from flowlang.diagnostics.explain import explain, pages

HEADINGS = (["Wrong", "Right"], ["When", "What to do"])


def test_a_page_for_each_code_and_no_other() -> None:
    assert pages() == sorted(CODES)


@pytest.mark.parametrize("code", sorted(CODES))
def test_parts_of_a_page(code: str) -> None:
    page = explain(code)
    assert page.startswith(f"# {code} {CODES[code]}\n\n")
    intro = page.split("\n## ", 1)[0].split("\n", 1)[1].strip()
    assert 2 <= len(re.findall(r"[.:?](?=\s|$)", intro)) <= 7
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings in HEADINGS
    language = "flow" if headings == HEADINGS[0] else "sh"
    for part in page.split("\n## ")[1:]:
        assert re.findall(r"^```(\w*)$", part, re.MULTILINE) == [language, ""]
    assert page.endswith("```\n")
    assert max(map(len, page.splitlines())) <= 130


def test_codes_about_files_and_runs_have_no_spec_to_show() -> None:
    for code in CODES:
        if code.startswith(("FL07", "FL08")):
            assert "## When" in explain(code)


@pytest.mark.parametrize("name", ["FL0301", "fl0301", " FL0301 ", "size-mismatch", "Size-Mismatch"])
def test_ways_to_name_a_code(name: str) -> None:
    assert explain(name) == explain("FL0301")


@pytest.mark.parametrize(
    ("name", "close"), [("FL301", "FL0301"), ("size-mismtach", "size-mismatch"), ("zzz", None), ("", None)]
)
def test_unknown_codes(name: str, close: str | None) -> None:
    with pytest.raises(FlowError) as caught:
        explain(name)
    (found,) = caught.value.diagnostics
    assert found.code == "FL0804"
    assert f"`{name}`" in found.message
    assert close is None or f"`{close}`" in (found.suggestion or "")
