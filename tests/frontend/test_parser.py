"""The grammar and its parser: no conflict, fresh tables, exact offsets, words, newlines, limits."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from flowlang import limits
from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.source import Source
from flowlang.syntax import tables, tree
from flowlang.syntax.parser import Parsed, parse, parse_expression
from flowlang.syntax.printer import print_expr
from tests.frontend import trees

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/drafts", "tests/acceptance/good", "tests/acceptance/bad", "stdlib", "specs")
FILES = sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.flow"))
PROFILE = settings(
    max_examples=150, derandomize=True, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip


def parsed(text: str) -> tuple[Parsed, list[Diagnostic]]:
    report = Report()
    return parse(Source.of("test", text), report), list(report)


def good(text: str) -> tree.Module:
    found, problems = parsed(text)
    assert not problems, [d.message for d in problems]
    return found.module


def statement(text: str) -> tree.Statement:
    """The first statement of a body that holds this text."""
    item = good(f"net f (x: R[D]) {{\n{text}\n}}").items[0]
    assert isinstance(item, tree.Declaration)
    assert item.body
    return item.body[0]


# ---- grammar and tables -------------------------------------------------------------------------


def test_the_grammar_has_no_conflict_and_no_collision() -> None:
    tables.build(strict=True)  # raises on a shift/reduce conflict and on terminals that overlap


def test_the_tables_are_fresh() -> None:
    shipped = resources.files("flowlang.grammar").joinpath("tables.json").read_text("utf-8")
    assert shipped == tables.dump(), "run `make tables`"


def test_tables_of_another_grammar_are_not_used() -> None:
    text = tables.dump()
    head, rest = text[1:].split(",\n", 1)
    other = json.dumps({**json.loads(head), "fingerprint": "0"})
    assert tables.load(f"[{other},\n{rest}") is None


@lru_cache(maxsize=1)
def larks() -> Any:
    """Lark with its own lexer, which it would make anew for each text."""
    made = tables.build()
    made.lexer = made._build_lexer()
    return made


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_our_scanner_is_larks(file: Path) -> None:
    text = file.read_text("utf-8") + '\n² 1.5x "a" "b\n\t!\x00'
    mine = [(t.type, str(t), t.start_pos, t.end_pos) for t in tables.scan(text)]
    assert mine == [(t.type, str(t), t.start_pos, t.end_pos) for t in larks().lex(text)]


@pytest.mark.parametrize(
    "file", [f for f in FILES if "unclosed" not in f.stem], ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_every_spec_of_ours_parses(file: Path) -> None:
    good(file.read_text("utf-8"))


# ---- offsets ------------------------------------------------------------------------------------


def nodes(value: Any) -> Iterator[tree.Node]:
    if isinstance(value, tree.Node):
        yield value
        for f in dataclasses.fields(value):
            yield from nodes(getattr(value, f.name))
    elif isinstance(value, tuple):
        for v in value:
            yield from nodes(v)


def check_spans(module: tree.Module) -> None:
    """Each node's text, parsed alone, is the node again; and it lies inside its parent's."""
    for node in nodes(module):
        for child in nodes(tuple(getattr(node, f.name) for f in dataclasses.fields(node) if f.name != "span")):
            assert node.span.start <= child.span.start <= child.span.end <= node.span.end
    for node in nodes(module):
        text = node.span.text
        match node:
            case tree.Range() | tree.Ellipsis():
                found = parse_expression(f"({text})")
                assert isinstance(found, tree.Paren)
                assert found.items[0].left == node
            case tree.Item() if node.type is None or node.left is not None:
                found = parse_expression(f"f({text})")
                assert isinstance(found, tree.Call)
                assert found.items == (node,)
            case tree.Paren(items=(tree.Item(type=kind),)) if kind is not None and not text.startswith("("):
                pass  # a typed result `e: T` has no parentheses of its own
            case _ if isinstance(node, tree.Expr):
                assert parse_expression(text) == node
            case _ if isinstance(node, tree.Import | tree.Require) or (
                isinstance(node, tree.Declaration) and node.kind != "def"
            ):
                assert good(text).items == (node,)
            case _ if isinstance(node, tree.Statement) and not isinstance(node, tree.Declaration):
                assert statement(text) == node


@pytest.mark.parametrize(
    "file", [f for f in FILES if "unclosed" not in f.stem], ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_spans_are_exact_in_real_files(file: Path) -> None:
    check_spans(good(file.read_text("utf-8")))


@PROFILE
@given(trees.expressions)
def test_spans_are_exact(e: tree.Expr) -> None:
    check_spans(good(f"const a =  {print_expr(e)}  # end"))


# ---- words and newlines -------------------------------------------------------------------------

WORDS = ["bijector", "net", "norm", "flow", "model", "path", "solver", "optimizer", "recipe", "const", "import", "data",
         "given", "param", "state", "base", "emit", "def", "scan", "require", "tableau", "edition", "reverse"]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_words_stay_names_inside_bodies(word: str) -> None:
    text = (
        f"net f ({word}: R[D], k: net = {word}) {{\n"
        f"  {word} = {word} + 1\n  {word} := {word}({word} = {word})\n  y: R[{word}] = {word}[{word} -> {word}].{word}\n"
        f"  -{word}\n  {word} |> {word}\n  {word}\n}}\n"
        f"bijector {word} = {word}({word})\n"
    )
    item = good(text).items[0]
    assert isinstance(item, tree.Declaration)
    assert [type(s).__name__ for s in item.body or ()] == ["Bind"] * 3 + ["ExprStatement"] * 3


@pytest.mark.parametrize("word", ["if", "else", "for", "in", "until", "repeat", "and", "or", "not"])
def test_hard_words_are_no_names(word: str) -> None:
    _, problems = parsed(f"net f (x: R[D]) {{\n  {word} = 1\n  x\n}}")
    assert [d.code for d in problems] == ["FL0101"]
    assert problems[0].span is not None
    assert problems[0].span.line == 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a = 1\nb = 2", 2),
        ("a = 1; b = 2", 2),
        ("a = 1;;\n;b = 2;", 2),
        ("a = x +\n  y", 1),
        ("a = x\n  + y", 1),
        ("a = x\n  * y\n  / z ^ 2", 1),
        ("a = x\n  and y", 1),
        ("x\n|> exp\n|> log", 1),
        ("x  # why\n  |> exp", 1),
        ("a = f(\n  x,\n  y\n)", 1),
        ("a = [\n1,\n2\n]", 1),
        ("a =\n  x", 1),
        ("a = x\n-y", 2),  # a line that begins with `-` begins a statement
        ("a = x\n(y)", 2),
        ("a = x\n[y]", 2),
        ("a, b = f(x)\na", 2),
        ("if c { a } else { b }", 1),
        ("if c {\n a\n}\nelse {\n b\n}", 1),
        ("if c { a }\nelse if d { b }", 1),
        ("for a, b in xs { a }", 1),
        ("repeat n until c { a }", 1),
        ("scan reverse T { a }", 1),
        ("x[T = i] := y", 1),
        ("param w: R[D] = 1,\n  b: R[D] ~ normal", 1),
        ("emit e ~ normal(0, 1)", 1),
    ],
)
def test_where_statements_end(text: str, count: int) -> None:
    item = good(f"net f (x: R[D]) {{\n{text}\n}}").items[0]
    assert isinstance(item, tree.Declaration)
    assert len(item.body or ()) == count


@pytest.mark.parametrize(
    "text",
    [
        "flow f\n{ base normal }", "net f\n(x: R[D])\n-> R[E]\n{ x }", "net f (x: R[D])\n(y: R[D]) { x }",
        "require x == 1", "require f(x) == 1", "require (x) == 1", "edition 1\nconst a = 1", "const a =\n 1",
    ],
)  # fmt: skip
def test_layouts_at_top_level(text: str) -> None:
    good(text)


def test_a_tableau_has_rows_of_cells() -> None:
    found = statement("tableau {\n 0 |\n 1/2 | 1/2\n 44/45 | 44/45 -56/15 (1 + s)/2\n | 1/6 a 1/6\n }")
    assert isinstance(found, tree.Tableau)
    assert [len(r.cells) for r in found.rows] == [0, 1, 3, 3]
    assert found.rows[2].cells[1].negative
    assert found.rows[3].head is None


# ---- text ---------------------------------------------------------------------------------------


def test_line_ends_and_byte_order_mark() -> None:
    text = "flow f {\n  data x: R[D = 2]\n  base normal\n}\n"
    wanted = good(text)
    for other in (
        text.replace("\n", "\r\n"),
        "\ufeff" + text,
        "\ufeff" + text.replace("\n", "\r\n"),
        text.replace("\n", "\r"),
    ):
        assert good(other) == wanted


def test_names_in_nfkc_form() -> None:
    # U+00B5 MICRO SIGN and U+03BC GREEK SMALL LETTER MU look alike and are one name.
    assert print_expr(parse_expression("\u00b5 + 1")) == "\u03bc + 1"
    _, problems = parsed("const a = \u00b5 + \u03bc")
    assert [d.code for d in problems] == ["FL0103"]
    assert "look alike" in problems[0].message


@pytest.mark.parametrize("char", ["\u200b", "\u202e", "\x00", "é", "Ａ", "ﬁ", "日", "🙂", "²", "½", "\u0301", "\xa0"])
def test_other_characters_are_refused_by_name(char: str) -> None:
    _, problems = parsed(f"const a = x{char}\nconst b = 1")
    assert [d.code for d in problems] == ["FL0103"]
    assert problems[0].span is not None
    assert problems[0].span.start == len("const a = x")


def test_any_character_may_stand_in_comments_and_texts() -> None:
    found = good('## 日本 ²\nconst a = "é²🙂"  # Ａ').items[0]
    assert isinstance(found, tree.Declaration)
    assert found.alias == tree.String("é²🙂", span=found.span)
    assert found.doc == "日本 ²"


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("64", 64), ("460_142_784", 460142784), ("1e-5", 1e-5), ("2.5", 2.5), ("1e30", 1e30),
     ("9223372036854775807", 2**63 - 1), ("1_0.2_5e+1", 102.5)],
)  # fmt: skip
def test_numbers(text: str, value: float) -> None:
    found = parse_expression(text)
    assert isinstance(found, tree.Number)
    assert found.value == value
    assert type(found.value) is type(value)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("9223372036854775808", "FL0901"),
        ("1e999", "FL0901"),
        ("1e-999", "FL0901"),
        ("0.0e-999", None),
        ("9" * 5000, "FL0901"),
        ("2x", "FL0104"),
        ("1.5γ", "FL0104"),
    ],
)
def test_bad_numbers(text: str, code: str | None) -> None:
    _, problems = parsed(f"const a = {text}")
    assert [d.code for d in problems] == ([code] if code else [])


@pytest.mark.parametrize(
    ("text", "codes"),
    [("edition 1\nconst a = 1", []), ("## words\n\nedition 1\n", []), ("edition 2\nconst a = 1", ["FL0105"]),
     ("const a = 1\nedition 1", ["FL0106"]), ("edition 1\nedition 1", ["FL0106"]), ("edition 99999999999999999999", ["FL0105"]),
     ("edition 1.5", ["FL0105"])],
)  # fmt: skip
def test_editions(text: str, codes: list[str]) -> None:
    found, problems = parsed(text)
    assert [d.code for d in problems] == codes
    assert found.module.edition is not None


# ---- precedence ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a + b * c", "a + (b * c)"),
        ("a - b - c", "(a - b) - c"),
        ("a / b * c", "(a / b) * c"),
        ("-a ^ 2", "-(a ^ 2)"),
        ("a ^ b ^ c", "a ^ (b ^ c)"),
        ("a ^ -b", "a ^ (-b)"),
        ("-a * b", "(-a) * b"),
        ("a * -b", "a * (-b)"),
        ("not a == b", "not (a == b)"),
        ("a or b and c", "a or (b and c)"),
        ("not a and b", "(not a) and b"),
        ("a + b < c", "(a + b) < c"),
        ("a |> f or b", "a |> (f or b)"),
        ("a |> f |> g", "(a |> f) |> g"),
        ("-f(x)[D].y", "-(f(x)[D].y)"),
    ],
)
def test_precedence(text: str, meant: str) -> None:
    def plain(e: Any) -> Any:
        """The tree without the parentheses that only group."""
        if isinstance(e, tree.Paren) and len(e.items) == 1 and e.items[0].left is not None:
            return plain(e.items[0].left)
        if isinstance(e, tree.Node):
            changes = {
                f.name: plain(getattr(e, f.name)) for f in dataclasses.fields(e) if f.name not in ("span", "op", "id")
            }
            return dataclasses.replace(e, **changes)
        return e

    assert plain(parse_expression(text)) == plain(parse_expression(meant))


# ---- limits -------------------------------------------------------------------------------------


def nested(n: int) -> str:
    return "const a = " + "(" * n + "x" + ")" * n


@pytest.mark.parametrize(
    ("name", "at", "beyond"),
    [
        ("NESTING", nested(50), nested(51)),
        ("INFIX", "const a = x" + " + x" * 50, "const a = x" + " + x" * 51),
        ("SOURCE_SIZE", "#" * 50, "#" * 51),
        ("TOKENS", "const a = [" + "1," * 22 + "1]", "const a = [" + "1," * 22 + "1,]"),
    ],
)
def test_limits_hold_exactly(name: str, at: str, beyond: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, name, 50)
    assert parsed(at)[1] == []
    problems = parsed(beyond)[1]
    assert [d.code for d in problems] == ["FL0901"]
    assert problems[0].span is not None


def test_expressions_alone_raise() -> None:
    with pytest.raises(FlowError):
        parse_expression("x +")
    with pytest.raises(FlowError):
        parse_expression(")")


def test_threads_share_one_parser() -> None:
    texts = [f.read_text("utf-8") for f in FILES[:8]]
    wanted = [parsed(t)[0].module for t in texts]
    wrong: list[int] = []

    def run() -> None:
        for k, t in enumerate(texts):
            if parsed(t)[0].module != wanted[k]:
                wrong.append(k)

    workers = [threading.Thread(target=run) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong
