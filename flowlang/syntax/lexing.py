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
ENDS = {"NAME", "NUMBER", "STRING", "RPAR", "RSQB", "QMARK"}  # a value ends with one of these
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
    _Shaper(source, clean, out, top).run()
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


class _Shaper:
    """One pass over the raw tokens: brackets, statement ends, words.

    What comes out is balanced: a bracket that is never closed is reported, and closed where that is noticed.
    """

    def __init__(self, source: Source, raw: list[Any], out: Shaped, top: bool):
        self.source = source
        self.raw = raw
        self.out = out
        self.tokens = out.tokens
        self.top = top
        self.stack: list[Any] = []
        self.header = False  # between a declaration's name and its body
        self.start = True  # of a statement
        self.tableau = 0  # the depth of brackets inside an open tableau
        self.infix = 0
        self.reported_infix = False

    def run(self) -> None:
        for i, token in enumerate(self.raw):
            kind = token.type
            if kind == "NEWLINE":
                self.newline(i, token)
                continue
            if kind == "SEMICOLON":
                self.semicolon(i, token)
                continue
            if kind == "NAME":
                token = self.word(i, token)
                kind = token.type
            elif kind in OPENING:
                self.header = self.header and kind != "LBRACE"
                self.stack.append(token)
                if len(self.stack) > limits.NESTING:
                    what = f"brackets nested deeper than {limits.NESTING}"
                    self.out.problems = [_limit(self.source, token.start_pos, token.end_pos, what)]
                    self.tokens.clear()
                    return
            elif kind in CLOSING and not self.close(token):
                continue
            self.count_infix(token)
            self.tokens.append(token)
            self.start = kind == "LBRACE"
        if self.stack:
            self.unclosed(len(self.stack), "the file")
        while self.tokens and self.tokens[-1].type == "SEP":
            self.tokens.pop()

    # ---- statement ends -------------------------------------------------------------------------

    def semicolon(self, i: int, token: Any) -> None:
        if self.stack and self.stack[-1].type != "LBRACE":
            self.problem(
                "FL0101",
                "`;` ends a statement and cannot stand inside brackets",
                token,
                "write `,` or close the bracket",
            )
            return
        self.separate(i, token)
        if not self.stack:
            self.header = False

    def newline(self, i: int, token: Any) -> None:
        if self.stack and self.declares(i):
            self.unclosed(len(self.stack), "the declaration")
            self.header, self.tableau = False, 0
            self.separate(i, token)
            return
        if self.stack and self.stack[-1].type != "LBRACE":
            if not self.breaks(i):
                return
            inner = next(k for k, s in enumerate(reversed(self.stack)) if s.type == "LBRACE")
            self.unclosed(inner, "the line")
        if self.quiet(i):
            if self.tokens and self.tokens[-1].type in ("SEP", "LBRACE"):
                self.start = True
            return
        self.separate(i, token)
        if not self.stack:
            self.header = False

    def separate(self, i: int, token: Any) -> None:
        """A statement ends here, unless none has begun or its block ends anyway."""
        after = self.following(i)
        if not self.tokens or self.tokens[-1].type in ("SEP", "LBRACE"):
            self.start = True
        elif after is not None and after.type != "RBRACE":
            self.tokens.append(token.update(type="SEP"))
            self.start, self.infix = True, 0

    def quiet(self, i: int) -> bool:
        """Whether the line goes on: after an infix operator and the like, or before one."""
        previous = self.tokens[-1].type if self.tokens else "SEP"
        after = self.following(i)
        word = after and (HARD.get(str(after), after.type) if after.type == "NAME" else after.type)
        if not self.stack and self.declares(i):
            return False
        if self.tableau:
            return previous == "LBRACE" or word == "RBRACE"
        return previous in CONTINUES or word in JOINS or (not self.stack and word in TOP_JOINS)

    def following(self, i: int) -> Any | None:
        for k in range(i + 1, len(self.raw)):
            if self.raw[k].type not in ("NEWLINE", "SEMICOLON"):
                return self.raw[k]
        return None

    def declares(self, i: int) -> bool:
        """Whether a declaration begins at the first column of the next line."""
        raw = self.raw
        return (
            i + 2 < len(raw)
            and raw[i + 1].type == "NAME"
            and raw[i + 1].start_pos == raw[i].end_pos
            and str(raw[i + 1]) in KIND_WORDS
            and raw[i + 2].type == "NAME"
        )

    def breaks(self, i: int) -> bool:
        """Whether the line ends inside `(` or `[`, though a new statement begins on the next one.

        A value cannot follow a value there: a comma or the closing bracket is missing. It is the comma
        where the next line closes more than it opens.
        """
        after = self.following(i)
        if after is None or after.type != "NAME" or HARD.get(str(after), "REPEAT") != "REPEAT":
            return False
        if self.tokens[-1].type not in ENDS or all(s.type != "LBRACE" for s in self.stack):
            return False
        depth, begun = 0, False
        for t in self.raw[i + 1 :]:
            if t.type in ("NEWLINE", "SEMICOLON"):
                if begun:
                    break
                continue
            begun = True
            depth += (t.type in OPENING) - (t.type in CLOSING)
            if depth < 0:
                return t.type == "RBRACE"
        return True

    # ---- brackets -------------------------------------------------------------------------------

    def close(self, token: Any) -> bool:
        """Matches a closing bracket; False where it is dropped."""
        wanted = CLOSING[token.type]
        if self.stack and self.stack[-1].type == wanted:
            inner = self.undented(token) if wanted == "LBRACE" else 0
            if inner:
                self.unclosed(inner, "the block")
            self.pop(token)
            return True
        above = next((k for k, s in enumerate(reversed(self.stack)) if s.type == wanted), None)
        self.stray(token)
        if above is not None:
            # The bracket closes an outer block: what it closes is not broken.
            self.out.broken_spans.append((self.stack[-above].start_pos, token.start_pos))
            self.mend(above, token.start_pos)
            self.pop(token)
            return True
        start = token.start_pos
        if self.stack and token.type != "RBRACE" and self.stack[-1].type != "LBRACE":
            start = self.stack[-1].start_pos
            self.mend(1, token.start_pos)  # `]` for `)`
        self.out.broken_spans.append((start, token.end_pos))
        return False

    def pop(self, token: Any) -> None:
        self.stack.pop()
        if token.type == "RBRACE":
            self.infix = 0
            if self.tokens and self.tokens[-1].type == "SEP":
                self.tokens.pop()
        if len(self.stack) < self.tableau:
            self.tableau = 0

    def mend(self, count: int, at: int) -> None:
        """Closes the innermost brackets in the user's place."""
        for _ in range(count):
            opening = self.stack[-1]
            closing = opening.update(type=OPENING[opening.type], value=SHOWN[OPENING[opening.type]])
            closing.start_pos = closing.end_pos = at
            self.pop(closing)
            self.tokens.append(closing)

    def indent(self, token: Any) -> int:
        """How far the line is indented on which a token stands."""
        text = self.source.text
        begin = text.rfind("\n", 0, token.start_pos) + 1
        return next((k for k in range(begin, len(text)) if text[k] not in " \t"), len(text)) - begin

    def undented(self, token: Any) -> int:
        """How many blocks a `}` on a line of its own leaves open, judged by the indentation of their lines."""
        text, at = self.source.text, self.indent(token)
        if (
            text[text.rfind("\n", 0, token.start_pos) + 1 : token.start_pos].strip()
            or self.indent(self.stack[-1]) <= at
        ):
            return 0
        for k, s in enumerate(reversed(self.stack)):
            if s.type == "LBRACE" and self.indent(s) <= at:
                return k if self.indent(s) == at else 0
        return 0

    def unclosed(self, count: int, where: str) -> None:
        """Reports that the innermost brackets are not closed, once, and closes them."""
        opening, outer = self.stack[-1], self.stack[-count]
        end = max(self.tokens[-1].end_pos if self.tokens else 0, opening.end_pos)
        closer = SHOWN[OPENING[opening.type]]
        if where == "the declaration" and end >= len(self.source.text.rstrip()):
            where = "the file"
        self.out.problems.append(
            Diagnostic(
                "FL0102",
                f"`{closer}` is missing: a bracket is still open here, at the end of {where}",
                Span(self.source, max(end - 1, 0), end),
                labels=(
                    Label(Span(self.source, opening.start_pos, opening.end_pos), f"`{SHOWN[opening.type]}` opens here"),
                ),
                suggestion=f"close it with `{closer}`",
            )
        )
        self.mend(count, end)
        self.out.broken_spans.append((outer.start_pos, end))

    def stray(self, token: Any) -> None:
        shown = SHOWN[token.type]
        labels: tuple[Label, ...] = ()
        if self.stack:
            opening = self.stack[-1]
            message = f"`{shown}` stands where `{SHOWN[OPENING[opening.type]]}` is needed"
            labels = (
                Label(Span(self.source, opening.start_pos, opening.end_pos), f"`{SHOWN[opening.type]}` opens here"),
            )
        else:
            message = f"`{shown}` closes nothing"
        self.out.problems.append(
            Diagnostic("FL0102", message, Span(self.source, token.start_pos, token.end_pos), labels=labels,
                       suggestion="check the brackets before it")
        )  # fmt: skip

    # ---- words, limits --------------------------------------------------------------------------

    def word(self, i: int, token: Any) -> Any:
        """A name, or the word that it is at its place."""
        kind = self.word_type(i, str(token))
        if kind is None:
            return token
        if kind in ("KIND", "DEF"):
            self.header = True
        if kind == "TABLEAU":
            self.tableau = len(self.stack) + 1
        return token.update(type=kind)

    def word_type(self, i: int, text: str) -> str | None:
        if text in HARD:
            return HARD[text]
        after = self.raw[i + 1].type if i + 1 < len(self.raw) else None
        after_text = str(self.raw[i + 1]) if after == "NAME" else ""
        previous = self.tokens[-1].type if self.tokens else None
        if self.top and not self.stack and previous in (None, "SEP"):
            found = top_word(text, after, after_text)
            if found is not None:
                return found
        inner = self.stack[-1].type if self.stack else None
        if self.header and text == "given" and inner == "LPAR" and after in ("NAME", "STAR"):
            return "GIVEN"
        if previous == "SCAN" and text == "reverse" and after == "NAME":
            return "REVERSE"
        if self.start and inner == "LBRACE":
            if text == "tableau" and after == "LBRACE":
                return "TABLEAU"
            operator = after_text in HARD and after_text != "not"
            if text in SOFT and after in ("NAME", "NUMBER") and not operator:
                return SOFT[text]
        return None

    def count_infix(self, token: Any) -> None:
        if token.type not in INFIX:
            return
        self.infix += 1
        if self.infix > limits.INFIX and not self.reported_infix:
            self.reported_infix = True
            what = f"more than {limits.INFIX} operators in one statement"
            self.out.problems.append(_limit(self.source, token.start_pos, token.end_pos, what))
            self.out.broken_spans.append((token.start_pos, token.end_pos))

    def problem(self, code: str, message: str, token: Any, suggestion: str) -> None:
        span = Span(self.source, token.start_pos, token.end_pos)
        self.out.problems.append(Diagnostic(code, message, span, suggestion=suggestion))
        self.out.broken_spans.append((token.start_pos, token.end_pos))


def top_word(text: str, after: str | None, after_text: str) -> str | None:
    """What a name is that begins an item, by what follows it on its line."""
    if text == "edition":
        return "EDITION" if after == "NUMBER" else "KIND" if after == "NAME" else None
    if text in TOP_WORDS and (after == "NAME" or (text == "require" and after in ("NUMBER", "LPAR"))):
        return TOP_WORDS[text]
    return "KIND" if after == "NAME" and after_text not in HARD else None


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
