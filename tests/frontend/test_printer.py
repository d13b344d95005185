"""The formatter: trees survive printing, comments stay, and formatting twice changes nothing more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import FlowError, Report
from flowlang.source import Source
from flowlang.syntax import printer, tree
from flowlang.syntax.parser import Parsed, parse, parse_expression
from flowlang.syntax.printer import format_source, print_expr
from tests.frontend import trees

ROOT = Path(__file__).parents[2]
FILES = sorted(
    f
    for folder in ("tests/drafts", "tests/acceptance/good", "stdlib", "specs")
    for f in (ROOT / folder).rglob("*.flow")
)
PROFILE = settings(
    max_examples=150, derandomize=True, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip


def parsed(text: str) -> Parsed:
    report = Report()
    found = parse(Source.of("test", text), report)
    assert report.ok, (text, [d.message for d in report])
    return found


@PROFILE
@given(trees.expressions)
def test_an_expression_survives_printing(e: tree.Expr) -> None:
    assert parse_expression(print_expr(e)) == e, print_expr(e)


@PROFILE
@given(trees.modules)
def test_a_file_survives_printing(module: tree.Module) -> None:
    text = printer._Printer(module.source, ()).module(module)
    again = parsed(text).module
    assert again == module, text
    once = format_source(Source.of("test", text))
    assert format_source(Source.of("test", once)) == once


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_real_file_formats(file: Path) -> None:
    text = file.read_text("utf-8")
    once = format_source(Source.of(file.name, text))
    assert format_source(Source.of(file.name, once)) == once
    before, after = parsed(text), parsed(once)
    assert before.module == after.module
    assert [c.text for c in before.comments] == [c.text for c in after.comments]
    assert not any(line != line.rstrip() for line in once.split("\n"))
    assert once.endswith("\n")
    assert not once.endswith("\n\n")


@settings(PROFILE, max_examples=60)
@given(st.sampled_from(FILES), st.integers(0, 2**32))
def test_comments_survive_wherever_they_stand(file: Path, seed: int) -> None:
    """A comment is put at the end of some lines, and on lines of its own; none is lost, moved over another or doubled."""
    r = random.Random(seed)
    lines = file.read_text("utf-8").split("\n")
    out: list[str] = []
    for k, line in enumerate(lines):
        if r.random() < 0.1:
            out.append(" " * r.randrange(6) + f"# own {k}")
        out.append(f"{line}  # end {k}" if r.random() < 0.15 and "#" not in line and '"' not in line else line)
    text = "\n".join(out)
    report = Report()
    parse(Source.of("test", text), report)
    if not report.ok:
        return  # a comment after a line that its statement needs whole
    once = format_source(Source.of("test", text))
    assert [c.text for c in parsed(once).comments] == [c.text for c in parsed(text).comments]
    assert format_source(Source.of("test", once)) == once


@pytest.mark.parametrize("text", ["flow f {", "flow f { data x: }", "²", "flow a { x = }\n"])
def test_a_text_that_does_not_parse_is_refused(text: str) -> None:
    with pytest.raises(FlowError) as caught:
        format_source(Source.of("test", text))
    assert all(d.code.startswith("FL01") for d in caught.value.diagnostics)


def test_it_refuses_to_change_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fault the printer may have, the formatter compares before it hands out a text."""
    monkeypatch.setattr(printer, "binary", lambda e: "x + y")
    with pytest.raises(FlowError) as caught:
        format_source(Source.of("test", "const a = x * y\n"))
    assert "left alone" in str(caught.value)


CANONICAL = [
    ("flow  f{data x:R[D=2];base   normal}", "flow f { data x: R[D = 2];  base normal }\n"),
    ("const a=1+2*3^-x", "const a = 1 + 2 * 3 ^ -x\n"),
    ("const a = (1+2)*3", "const a = (1 + 2) * 3\n"),
    (
        "net f(x:R[D]given c:R[..]?)->R[O]{\nlinear(x,c)\n}",
        "net f(x: R[D] given c: R[..]?) -> R[O] {\n  linear(x, c)\n}\n",
    ),
    ("const b = x[D->(h=4,d),T=1..]", "const b = x[D -> (h = 4, d), T = 1..]\n"),
    ("edition 1\nimport std.flows.coupling(a,b)", "edition 1\nimport std.flows.coupling (a, b)\n"),
]


@pytest.mark.parametrize(("text", "wanted"), CANONICAL)
def test_the_canonical_form(text: str, wanted: str) -> None:
    assert format_source(Source.of("test", text)) == wanted
