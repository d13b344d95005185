"""What `flowlang std` says of the library: every declaration is documented, with its source and card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowlang.catalogue import entries, summary_of
from flowlang.cli.main import cli

STDLIB = Path(__file__).parents[2] / "stdlib"
ENTRIES = entries()


def test_every_declaration_is_listed_once() -> None:
    text = "\n".join(f.read_text("utf-8") for f in STDLIB.rglob("*.flow"))
    declared = re.findall(r"^(?:bijector|net|norm|flow|model|path|solver|optimizer|recipe|const) (\w+)", text, re.M)
    assert sorted(e["name"] for e in ENTRIES) == sorted(declared)
    assert len(set(declared)) == len(declared)


@pytest.mark.parametrize("entry", ENTRIES, ids=[e["name"] for e in ENTRIES])
def test_an_entry_says_what_it_is_and_where_it_comes_from(entry: dict[str, object]) -> None:
    assert len(str(entry["doc"]).split()) >= 5
    assert entry["source"], "a comment needs `(Authors year)`, `Source: ...` or `(own)`"
    assert entry["source"] == "own" or re.search(r"own|1[6-9]\d\d|20\d\d", str(entry["source"]))


def test_std_json_lists_name_kind_family_card_and_source() -> None:
    result = CliRunner().invoke(cli, ["std", "--json"])
    assert result.exit_code == 0
    found = {e["name"]: e for e in json.loads(result.output)}
    spline = found["rqs_coupling"]
    assert (spline["kind"], spline["family"], spline["card"]) == ("bijector", "flows.coupling", "012")
    assert "Durkan et al. 2019" in spline["source"]
    assert found["rq_nsf_c"]["kind"] == "flow"
    assert found["rq_coupling"]["card"] == "012"


def test_a_summary_is_the_first_sentence() -> None:
    assert summary_of("Additive coupling (NICE, Dinh et al. 2014). Keeps volume.") == (
        "Additive coupling (NICE, Dinh et al. 2014)."
    )


def test_a_range_does_not_end_a_sentence() -> None:
    assert summary_of("Glow on pixels 0 .. 255 of an image. More.") == "Glow on pixels 0 .. 255 of an image."
