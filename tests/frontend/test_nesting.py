"""How deep declarations may nest does not hang on which of them is made first, and what is tried out is made once."""

from __future__ import annotations

import random

import pytest

from flowlang import limits
from flowlang.compiler import compile_source
from flowlang.diagnostics import Diagnostic
from flowlang.source import Source
from tests.frontend.bombs import flow, nested_declarations


def told(text: str) -> list[Diagnostic]:
    return list(compile_source(Source.of("nesting.flow", text)).report)


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_declarations_does_not_matter(seed: int) -> None:
    for levels, codes in ((limits.INSTANTIATION_DEPTH, []), (limits.INSTANTIATION_DEPTH + 1, ["FL0901"])):
        lines = nested_declarations(levels, "{ BEFORE }", backwards=seed == 1).splitlines(keepends=True)
        if seed > 1:
            random.Random(seed).shuffle(lines)
        assert [d.code for d in told("".join(lines))] == codes


@pytest.mark.parametrize("first", [True, False])
def test_a_flow_counts_as_one_level(first: bool) -> None:
    for levels, codes in ((limits.INSTANTIATION_DEPTH - 1, []), (limits.INSTANTIATION_DEPTH, ["FL0901"])):
        used, nested = flow(f"b{levels - 1}"), nested_declarations(levels, "{ BEFORE }")
        assert [d.code for d in told(used + nested if first else nested + used)] == codes


def test_inverses_of_inverses_are_made_once() -> None:
    """Of `inverse(b)` it is tried first what b makes of the shape: each level once more doubled the work."""
    levels = 40
    comp = compile_source(
        Source.of("nesting.flow", flow(f"b{levels - 1}") + nested_declarations(levels, "{ inverse(BEFORE) }"))
    )
    assert comp.ok
    assert len(list(comp.regions["f"].walk())) == levels + 1  # and the flow


def test_what_a_trial_finds_is_told_once_where_it_is_wanted() -> None:
    wrong = nested_declarations(6, "{ inverse(BEFORE) }").replace("reverse", "affine_coupling\n  revers")
    assert [d.code for d in told(flow("b5") + wrong)] == ["FL0201"]
    noted = "bijector b0 { reverse }\nbijector b1 {\n  unread = 1\n  inverse(b0)\n}\nbijector b2 { inverse(b1) }\n"
    assert [d.code for d in told(flow("b2") + noted)] == [d.code for d in told(flow("b1") + noted)]


def test_a_limit_is_told_of_what_nothing_uses() -> None:
    """A trial met the limit, told nothing, and nothing was told after it."""
    many = "bijector b {\n  for i in 0..3000 { reverse }\n}\n"
    assert [d.code for d in told(many)] == ["FL0901"]


def test_frames_do_not_hang_on_the_caller() -> None:
    text = flow("b29") + nested_declarations(30, "(x: R[D]) { " + "-(" * 5 + "BEFORE(x)" + ")" * 5 + " }")

    def deeper(n: int) -> list[Diagnostic]:
        return deeper(n - 1) if n else told(text)

    assert told(text) == deeper(400) == []
