"""From raw tokens to the parser's: statements end, words are decided, brackets are matched.

All state is local to one call, so that parses may run in parallel threads.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flowlang import limits
from flowlang.diagnostics import Diagnostic, Label
from flowlang.source import Source, Span

HARD = {"if": "IF", "else": "ELSE", "for": "FOR", "in": "IN", "until": "UNTIL", "repeat": "REPEAT", "and": "AND",
        "or": "OR", "not": "NOT"}  # fmt: skip
SOFT = {"import": "IMPORT", "data": "DATA", "given": "GIVEN", "param": "PARAM", "state": "STATE", "base": "BASE",
        "emit": "EMIT", "def": "DEF", "scan": "SCAN", "require": "REQUIRE"}  # fmt: skip
TOP_WORDS = {"import": "IMPORT", "require": "REQUIRE", "edition": "EDITION"}
KIND_WORDS = ("bijector", "net", "norm", "flow", "model", "path", "solver", "optimizer", "recipe", "const")

OPENING = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
CLOSING = {"RPAR": "LPAR", "RSQB": "LSQB", "RBRACE": "LBRACE"}
SHOWN = {"LPAR": "(", "RPAR": ")", "LSQB": "[", "RSQB": "]", "LBRACE": "{", "RBRACE": "}"}
# A newline does not count after these, nor before those.
CONTINUES = {"PIPE", "ARROW", "ASSIGN", "CMP", "DOT", "COLON", "EQ", "TILDE", "COMMA", "PLUS", "MINUS", "STAR", "SLASH",
             "CARET", "AND", "OR", "NOT", "LBRACE", "RANGE", "IN"}  # fmt: skip
JOINS = {"PLUS", "STAR", "SLASH", "CARET", "PIPE", "AND", "OR", "ARROW", "ELSE", "RBRACE"}
TOP_JOINS = {"LPAR", "LBRACE", "ARROW"}
INFIX = {"PIPE", "CMP", "PLUS", "MINUS", "STAR", "SLASH", "CARET", "AND", "OR", "DOT", "QMARK"}
BIDI = {chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200B, 0x200E, 0x200F, 0xFEFF)}


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment with its `#`; `own_line` when nothing stands before it on its line."""

    start: int
    end: int
    text: str
    own_line: bool


@dataclass
class Shaped:
    tokens: list[Any] = field(default_factory=list)
    comments: list[Comment] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)
    broken_spans: list[tuple[int, int]] = field(default_factory=list)  # offsets that a reported problem covers


def shape(source: Source, raw: Iterable[Any], *, top: bool = True) -> Shaped:
    """Decides words and statement ends; reports what is wrong with characters and brackets.

    `top`: the text is a file, whose first words are those of items; otherwise it is one expression.
    """
    out = Shaped()
    spellings: dict[str, str] = {}
    clean: list[Any] = []
    line_start = True
    for token in raw:
        kind = token.type
        start, end = token.start_pos, token.end_pos
        if len(clean) >= limits.TOKENS:
            out.problems = [_limit(source, start, end, f"more than {limits.TOKENS:,} words and signs")]
            return out
        if kind == "COMMENT":
            out.comments.append(Comment(start, end, str(token).rstrip(), line_start))
            continue
        if kind in ("BAD", "BADNUMBER"):
            out.problems.append(_bad(source, token))
            out.broken_spans.append((start, end))
            if kind == "BAD":
                continue
            token = token.update(type="NUMBER")
        if kind == "NAME":
            folded = unicodedata.normalize("NFKC", str(token))
            known = spellings.setdefault(folded, str(token))
            if known != str(token):
                out.problems.append(
                    Diagnostic(
                        "FL0103", f"`{token}` and `{known}` look alike and count as one name", Span(source, start, end),
                        suggestion=f"write `{folded}` in both places",
                    )
                )  # fmt: skip
            token = token.update(value=folded)
        line_start = kind == "NEWLINE"
        clean.append(token)
    _structure(source, clean, out, top)
    return out


def _bad(source: Source, token: Any) -> Diagnostic:
    span = Span(source, token.start_pos, token.end_pos)
    text = str(token)
    if token.type == "BADNUMBER":
        return Diagnostic(
            "FL0104",
            "a number runs into a name here",
            span,
            suggestion="put a sign or a space between them, as in `2 * x`",
        )
    if text in BIDI or unicodedata.category(text) in ("Cc", "Cf"):
        return Diagnostic(
            "FL0103", f"an invisible character (U+{ord(text):04X}) stands here", span, suggestion="remove it"
        )
    if text in "²³¹":
        return Diagnostic("FL0103", f"`{text}` is no operator", span, suggestion=f"write `^ {unicodedata.digit(text)}`")
    if text == '"':
        return Diagnostic("FL0103", "this text has no closing quote on its line", span, suggestion='close it with `"`')
    known = {
        "!": "`not`",
        "&": "`and`",
        "%": "`mod(a, b)`",
        "@": "`sum[D](a * b)`",
        "'": '`"text"`',
        "\\": "nothing: lines continue after an operator",
    }
    return Diagnostic("FL0103", f"the character `{text}` means nothing here", span,
                      suggestion=f"write {known[text]}" if text in known else "remove it")  # fmt: skip


def _limit(source: Source, start: int, end: int, what: str) -> Diagnostic:
    return Diagnostic("FL0901", f"{what}: limit reached", Span(source, start, end), suggestion="split the file")


def _structure(source: Source, raw: list[Any], out: Shaped, top: bool) -> None:
    """One pass: brackets, statement ends, words."""
    stack: list[Any] = []
    tokens = out.tokens
    header = False  # between a declaration's name and its body
    statement_start = True
    tableau_depth = 0
    infix = 0
    reported_infix = False
    n = len(raw)
    i = 0
    while i < n:
        token = raw[i]
        kind = token.type
        if kind in ("NEWLINE", "SEMICOLON"):
            inner = stack[-1].type if stack else None
            if kind == "SEMICOLON" and inner in ("LPAR", "LSQB"):
                out.problems.append(
                    Diagnostic("FL0101", "`;` ends a statement and cannot stand inside brackets",
                               Span(source, token.start_pos, token.end_pos), suggestion="write `,` or close the bracket")
                )  # fmt: skip
                out.broken_spans.append((token.start_pos, token.end_pos))
                i += 1
                continue
            if inner in ("LPAR", "LSQB"):
                if _resyncs(raw, i):
                    _unclosed(source, stack, tokens, out)
                    stack.clear()
                    header, statement_start, infix = False, True, 0
                    _separate(tokens, token)
                i += 1
                continue
            after = _next(raw, i)
            if stack and kind == "NEWLINE" and _resyncs(raw, i):
                _unclosed(source, stack, tokens, out)
                stack.clear()
                header, tableau_depth = False, 0
                tokens.append(token.update(type="SEP"))
                statement_start, infix = True, 0
                i += 1
                continue
            previous = tokens[-1].type if tokens else "SEP"
            word = (
                HARD.get(str(after), after.type)
                if after is not None and after.type == "NAME"
                else after.type
                if after is not None
                else None
            )
            quiet = kind == "NEWLINE" and (
                (previous in CONTINUES and not (tableau_depth and previous != "LBRACE"))
                or (word in JOINS and not (tableau_depth and word != "RBRACE"))
                or (not stack and word in TOP_JOINS)
            )
            if not quiet and previous not in ("SEP", "LBRACE") and after is not None and word != "RBRACE":
                tokens.append(token.update(type="SEP"))
                statement_start, infix = True, 0
            elif previous in ("SEP", "LBRACE"):
                statement_start = True
            if not quiet and not stack:
                header = False
            i += 1
            continue
        if kind == "NAME":
            token = _word(raw, i, token, tokens, stack, header, statement_start, top)
            kind = token.type
            if kind in ("KIND", "DEF"):
                header = True
            if kind == "TABLEAU":
                tableau_depth = len(stack) + 1
        elif kind in OPENING:
            if kind == "LBRACE":
                header = False
            stack.append(token)
            if len(stack) > limits.NESTING:
                out.problems.append(
                    _limit(source, token.start_pos, token.end_pos, f"brackets nested deeper than {limits.NESTING}")
                )
                out.broken_spans.append((0, len(source.text)))
                tokens.clear()
                return
        elif kind in CLOSING:
            if not stack or stack[-1].type != CLOSING[kind]:
                _stray(source, token, stack, out)
                if any(s.type == CLOSING[kind] for s in stack):
                    while stack and stack[-1].type != CLOSING[kind]:
                        stack.pop()
                    if stack:
                        stack.pop()
                i += 1
                continue
            stack.pop()
            if kind == "RBRACE" and tokens and tokens[-1].type == "SEP":
                tokens.pop()
            if len(stack) < tableau_depth:
                tableau_depth = 0
        if kind in INFIX:
            infix += 1
            if infix > limits.INFIX and not reported_infix:
                reported_infix = True
                out.problems.append(
                    _limit(
                        source, token.start_pos, token.end_pos, f"more than {limits.INFIX} operators in one statement"
                    )
                )
                out.broken_spans.append((token.start_pos, token.end_pos))
        tokens.append(token)
        statement_start = kind == "LBRACE"
        if kind == "RBRACE":
            infix = 0
        i += 1
    if stack:
        _unclosed(source, stack, tokens, out)
    while tokens and tokens[-1].type == "SEP":
        tokens.pop()


def _separate(tokens: list[Any], token: Any) -> None:
    if tokens and tokens[-1].type != "SEP":
        tokens.append(token.update(type="SEP"))


def _next(raw: list[Any], i: int) -> Any | None:
    for k in range(i + 1, len(raw)):
        if raw[k].type not in ("NEWLINE", "SEMICOLON"):
            return raw[k]
    return None


def _resyncs(raw: list[Any], i: int) -> bool:
    """Whether a declaration begins at the first column of the next line."""
    return (
        i + 2 < len(raw)
        and raw[i + 1].type == "NAME"
        and raw[i + 1].start_pos == raw[i].end_pos
        and str(raw[i + 1]) in KIND_WORDS
        and raw[i + 2].type == "NAME"
    )


def _word(
    raw: list[Any], i: int, token: Any, tokens: list[Any], stack: list[Any], header: bool, start: bool, top: bool
) -> Any:
    text = str(token)
    if text in HARD:
        return token.update(type=HARD[text])
    after = raw[i + 1] if i + 1 < len(raw) else None
    previous = tokens[-1].type if tokens else None
    named = after is not None and after.type == "NAME"
    if top and not stack and previous in (None, "SEP"):
        if text == "edition" and after is not None and after.type == "NUMBER":
            return token.update(type="EDITION")
        if named and text in TOP_WORDS and text != "edition":
            return token.update(type=TOP_WORDS[text])
        if text == "require" and after is not None and after.type in ("NUMBER", "LPAR"):
            return token.update(type="REQUIRE")
        if named and str(after) not in HARD:
            return token.update(type="KIND")
    variadic = after is not None and after.type == "STAR"
    if header and text == "given" and stack and stack[-1].type == "LPAR" and (named or variadic):
        return token.update(type="GIVEN")
    if previous == "SCAN" and text == "reverse" and named:
        return token.update(type="REVERSE")
    if start and stack and stack[-1].type == "LBRACE":
        if text == "tableau" and after is not None and after.type == "LBRACE":
            return token.update(type="TABLEAU")
        follows = named or (after is not None and after.type == "NUMBER")
        operator = named and str(after) in HARD and str(after) != "not"
        if text in SOFT and follows and not operator:
            return token.update(type=SOFT[text])
    return token


def _unclosed(source: Source, stack: list[Any], tokens: list[Any], out: Shaped) -> None:
    opening = stack[-1]
    last = tokens[-1] if tokens else opening
    closer = SHOWN[OPENING[opening.type]]
    outer = stack[0]
    end = max(last.end_pos, opening.end_pos)
    out.problems.append(
        Diagnostic(
            "FL0102",
            f"`{closer}` is missing: a bracket is still open here, at the end of "
            + ("the file" if last is tokens[-1] and end >= len(source.text.rstrip()) else "the declaration"),
            Span(source, max(end - 1, 0), end),
            labels=(Label(Span(source, opening.start_pos, opening.end_pos), f"`{SHOWN[opening.type]}` opens here"),),
            suggestion=f"close it with `{closer}`",
        )
    )
    out.broken_spans.append((outer.start_pos, end))


def _stray(source: Source, token: Any, stack: list[Any], out: Shaped) -> None:
    shown = SHOWN[token.type]
    labels: tuple[Label, ...] = ()
    if stack:
        opening = stack[-1]
        message = f"`{shown}` stands where `{SHOWN[OPENING[opening.type]]}` is needed"
        labels = (Label(Span(source, opening.start_pos, opening.end_pos), f"`{SHOWN[opening.type]}` opens here"),)
    else:
        message = f"`{shown}` closes nothing"
    out.problems.append(Diagnostic("FL0102", message, Span(source, token.start_pos, token.end_pos), labels=labels,
                                   suggestion="check the brackets before it"))  # fmt: skip
    out.broken_spans.append((stack[0].start_pos if stack else token.start_pos, token.end_pos))


def items_of(tokens: list[Any]) -> Iterator[list[Any]]:
    """Splits at separators outside all brackets."""
    depth = 0
    current: list[Any] = []
    for t in tokens:
        if t.type in OPENING:
            depth += 1
        elif t.type in CLOSING:
            depth -= 1
        if t.type == "SEP" and depth <= 0:
            if current:
                yield current
            current, depth = [], 0
        else:
            current.append(t)
    if current:
        yield current
