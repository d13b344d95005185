"""The drafts are ahead of the compiler: what has no meaning yet is told once as such, and nothing else is told.

`DISAGREES` lists the places where a draft contradicts LANGUAGE.md itself or divides by what may be zero: there
the compiler is right, and another code is allowed (not asked for) at that line.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from flowlang.compiler import compile_source
from flowlang.elaborate import later
from flowlang.elaborate.builtins import BUILTINS
from flowlang.library import standard_library
from flowlang.source import Source

DRAFTS = Path(__file__).parents[1] / "drafts"

DISAGREES = {
    ("003", 11): "FL0408",  # a temperature of type R may be 0
    ("003", 19): "FL0408",
    ("038", 31): "FL0503",  # a bias before batch norm, which takes it away
    ("038", 32): "FL0503",
    ("038", 33): "FL0503",
    ("049", 24): "FL0409",  # eps is a tensor parameter, so that n + eps may be 0
    ("050", 10): "FL0409",  # a variance kept in a state of type R may be negative
    ("080", 21): "FL0409",  # likewise
    ("058", 39): "FL0201",  # `z, l :=` updates an `l` that nothing bound
    ("061", 18): "FL0310",  # a bare `normal` in a model without data
    ("080", 8): "FL0302",  # `conv` keeps the name of its channels: there is no `O` to rename
    ("095", 4): "FL0409",  # a sum of products of any sign as divisor
    ("104", 7): "FL0409",  # w may be 0
    ("134", 16): "FL0312",  # `out: net` is one network, and is used with two sizes; told for the first witness size
    ("113", 33): "FL0203",  # `polynomial` is a path of the library, and the draft wants a schedule
    ("121", 11): "FL0304",  # `linear(n)[..]`: no result type sizes it
    ("121", 17): "FL0303",  # the library's time embedding has an axis of its own, and nothing maps it to D
    ("123", 15): "FL0308",  # one declared result, two given
    ("144", 16): "FL0304",  # a product does not size a network
    ("145", 15): "FL0307",  # `mlp` of rank 2 without its axis
}


def told(draft: Path) -> list[tuple[str, int]]:
    """Code and line of each diagnostic but notes."""
    source = Source(draft.name, draft.read_text(encoding="utf-8"))
    out, places = [], Counter[object]()
    for d in compile_source(source).report:
        assert d.span is not None, d
        places[d.code, d.span] += 1
        line = d.span.source.text.count("\n", 0, d.span.start) + 1
        if d.severity != "note":
            out.append((d.code, line))
    assert max(places.values(), default=0) <= 1
    return out


@pytest.mark.parametrize("draft", sorted(DRAFTS.glob("*.flow")), ids=lambda p: p.stem)
def test_a_draft_is_told_only_what_has_no_meaning_yet_and_each_thing_once(draft: Path) -> None:
    found = told(draft)
    others = {(draft.stem, line): code for code, line in found if code != "FL0902"}
    assert others.items() <= DISAGREES.items()


def test_names_of_later_versions_say_so_until_they_exist() -> None:
    library = standard_library().names()
    for names in later.NAMES.values():
        for name in names:
            if name in library or name in BUILTINS:
                continue  # it has come to exist, and is found before the list is asked
            text = f"net f(x: R[D]) {{ y = {name};  x * y }}"
            (error,) = compile_source(Source("spec.flow", text)).report.errors
            assert (error.code, error.span and error.span.text) == ("FL0902", name)


def test_a_name_of_a_later_version_is_told_once_and_hides_no_other_mistake() -> None:
    text = "net f(x: R[D]) {\n  y = gru(x);  z = gru(y)\n  x + zz\n}\nnet g(x: R[D]) { gru(x) }"
    found = [(d.code, d.span and d.span.text) for d in compile_source(Source("spec.flow", text)).report.errors]
    assert found == [("FL0902", "gru"), ("FL0201", "zz")]
