"""How diagnostics look: each expected text is written out in full."""

from __future__ import annotations

import json
import re
import unicodedata
from textwrap import dedent

import pytest

from flowlang.diagnostics import Diagnostic, FlowError, Label, Report
from flowlang.diagnostics.render import WIDTH, render, render_report, to_json
from flowlang.source import Source, Span

SPEC = Source.of(
    "a.flow",
    "flow f {\n\tdata x: R[D = 4]\n  γ = 深い + b\u0301ar * baz\n  repeat 2 {\n    reverse\n  }\n  base normal\n",
)


def at(text: str, source: Source = SPEC) -> Span:
    start = source.text.index(text)
    return Span(source, start, start + len(text))


def block(text: str) -> str:
    return dedent(text).strip("\n")


def test_plain() -> None:
    d = Diagnostic(
        "FL0212",
        "the flow has no `base`",
        at("flow"),
        notes=("a base says how the result is distributed", "one line\nand another"),
        suggestion="write `base normal`",
    )
    assert render(d) == block("""
        error[FL0212]: the flow has no `base`
         --> a.flow:1:1
          |
        1 | flow f {
          | ^^^^
          |
          = note: a base says how the result is distributed
          = note: one line
                  and another
          = help: write `base normal`
        For more: `flowlang explain FL0212`
    """)


def test_tabs_are_expanded() -> None:
    assert render(Diagnostic("FL0302", "no axis", at("R[D = 4]"), "warning")) == block("""
        warning[FL0302]: no axis
         --> a.flow:2:10
          |
        2 |     data x: R[D = 4]
          |             ^^^^^^^^
        For more: `flowlang explain FL0302`
    """)


def test_wide_and_combining_characters_with_labels_on_one_line() -> None:
    labels = (Label(at("baz"), "after"), Label(at("深い"), "before"))
    assert render(Diagnostic("FL0301", "sizes", at("b\u0301ar"), labels=labels)) == block("""
        error[FL0301]: sizes
         --> a.flow:3:12
          |
        3 |   γ = 深い + b\u0301ar * baz
          |       ---- before
          |              ^^^   --- after
        For more: `flowlang explain FL0301`
    """)


def test_several_lines_and_a_gap() -> None:
    inner = at("repeat 2 {\n    reverse\n  }")
    labels = (Label(at("flow"), "in this flow"), Label(at("reverse"), "one copy"))
    assert render(Diagnostic("FL0901", "too many copies", inner, labels=labels)) == block("""
        error[FL0901]: too many copies
         --> a.flow:4:3
          |
        1 | flow f {
          | ---- in this flow
        ...
        4 |   repeat 2 {
          |   ^^^^^^^^^^ ... to line 6
        5 |     reverse
          |     ------- one copy
        For more: `flowlang explain FL0901`
    """)


def test_labels_in_another_file_come_last() -> None:
    other = Source.of("b.flow", "net g(x: R[D]) -> R[D] { x }")
    d = Diagnostic("FL0204", "`g` is declared twice", at("x"), labels=(Label(at("g", other), "first here"),))
    assert render(d) == block("""
        error[FL0204]: `g` is declared twice
         --> a.flow:2:7
          |
        2 |     data x: R[D = 4]
          |          ^
         ::: b.flow:1:5
          |
        1 | net g(x: R[D]) -> R[D] { x }
          |     - first here
        For more: `flowlang explain FL0204`
    """)


def test_the_end_of_the_text() -> None:
    end = len(SPEC.text)
    assert render(Diagnostic("FL0102", "`}` is missing", Span(SPEC, end, end))) == block("""
        error[FL0102]: `}` is missing
         --> a.flow:8:1
          |
        8 |
          | ^
        For more: `flowlang explain FL0102`
    """)


def test_control_characters_are_escaped() -> None:
    source = Source.of("c\x1b.flow", "a\x1b[31m \u202e b\u200dc")
    assert render(Diagnostic("FL0103", "bad \x07", at("b\u200dc", source))) == block("""
        error[FL0103]: bad <U+0007>
         --> c<U+001B>.flow:1:10
          |
        1 | a<U+001B>[31m <U+202E> b<U+200D>c
          |                        ^^^^^^^^^^
        For more: `flowlang explain FL0103`
    """)


def test_without_a_place() -> None:
    d = Diagnostic("FL0801", "`x.flow` cannot be read", labels=(Label(at("flow"), "asked for here"),))
    assert render(d) == block("""
        error[FL0801]: `x.flow` cannot be read
          = note: a.flow:1:1: asked for here
        For more: `flowlang explain FL0801`
    """)


def test_long_lines_are_cut_around_the_span() -> None:
    source = Source.of("l.flow", "x = " + "a + " * 60 + "HERE" + " + b" * 60)
    shown = render(Diagnostic("FL0301", "sizes", at("HERE", source))).splitlines()
    assert shown[3] == "1 | ... " + "a + " * 11 + "HERE" + " + b" * 11 + " ..."
    assert shown[4] == "  | " + " " * 48 + "^^^^"
    labelled = Diagnostic("FL0301", "sizes", at("HERE", source), labels=(Label(at("x", source), "start"),))
    assert [x for x in render(labelled).splitlines() if x.startswith("  | -")] == ["  | - start"]


@pytest.mark.parametrize("text", ["y" * 300, "深" * 300, "\t" * 300, "e\u0301" * 300, "\x01" * 300])
@pytest.mark.parametrize(("start", "end"), [(0, 300), (0, 1), (150, 151), (290, 300), (300, 300)])
def test_no_excerpt_is_too_wide(text: str, start: int, end: int) -> None:
    shown = render(Diagnostic("FL0101", "m", Span(Source.of("w", text), start, end))).splitlines()
    for line in shown[3:5]:
        cells = sum(2 if unicodedata.east_asian_width(c) == "W" else not unicodedata.combining(c) for c in line)
        assert cells <= WIDTH + len("1 | ") + 1
    assert "^" in shown[4]


@pytest.mark.parametrize("text", ["", "\n", "a", "a\n\n"])
def test_any_span_renders(text: str) -> None:
    source = Source.of("s", text)
    for start in range(len(text) + 3):
        for end in range(start, len(text) + 4):
            assert "^" in render(Diagnostic("FL0101", "m", Span(source, start, end)))


def test_color_changes_nothing_but_color() -> None:
    d = Diagnostic("FL0301", "sizes", at("baz"), labels=(Label(at("深い"), "left"),), notes=("n",), suggestion="s")
    colored = render(d, color=True)
    assert "\x1b[1;31merror[FL0301]\x1b[0m" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(d)


def test_report_and_its_summary() -> None:
    report = Report()
    report.add(Diagnostic("FL0210", "`b` is never read", at("baz"), "warning"))
    report.add(Diagnostic("FL0201", "unknown name", at("深い")))
    report.add(Diagnostic("FL0212", "no base", at("flow")))
    text = render_report(report)
    assert text.endswith("\n\n2 errors, 1 warning\nFor more: `flowlang explain FL0212`")
    assert text.count("flowlang explain") == 1
    heads = [x for x in text.splitlines() if x.startswith(("error", "warning"))]
    assert heads == ["error[FL0212]: no base", "error[FL0201]: unknown name", "warning[FL0210]: `b` is never read"]


def test_report_beyond_its_limit_keeps_errors() -> None:
    many = [Diagnostic("FL0210", f"w{k}", severity="warning") for k in range(5)]
    text = render_report([*many, Diagnostic("FL0201", "the error")], limit=2)
    assert text == block("""
        warning[FL0210]: w0

        error[FL0201]: the error

        ... and 4 more

        1 error, 5 warnings
        For more: `flowlang explain FL0201`
    """)


def test_empty_report() -> None:
    assert render_report(Report()) == ""


def test_an_error_prints_its_diagnostics() -> None:
    assert str(FlowError(Diagnostic("FL0804", "no such option"))).startswith("error[FL0804]: no such option\n")


def test_json() -> None:
    other = Source.of("b.flow", "\nnet g")
    d = Diagnostic(
        "FL0301",
        "sizes differ",
        at("baz"),
        labels=(Label(at("reverse"), "here"), Label(at("net", other), "there")),
        notes=("a note",),
        suggestion="rename one",
    )
    found = to_json(d)
    assert list(found) == [
        "code", "severity", "file", "line", "column", "end_line", "end_column", "message", "notes", "suggestion",
    ]  # fmt: skip
    assert found == {
        "code": "FL0301",
        "severity": "error",
        "file": "a.flow",
        "line": 3,
        "column": 19,
        "end_line": 3,
        "end_column": 22,
        "message": "sizes differ",
        "notes": ["a note", "line 5: here", "line 2 of b.flow: there"],
        "suggestion": "rename one",
    }
    assert json.loads(json.dumps(found)) == found


def test_json_without_a_place() -> None:
    found = to_json(Diagnostic("FL0801", "cannot be read"))
    assert [found[k] for k in ("file", "line", "column", "end_line", "end_column")] == [None] * 5
    assert found["notes"] == []
    assert found["suggestion"] is None
