"""Diagnostics as text for people, and as JSON for programs."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flowlang.diagnostics.model import Diagnostic, Label
from flowlang.limits import DIAGNOSTICS_SHOWN
from flowlang.source import Source, Span

WIDTH = 100  # cells of source text in one excerpt
TAB = "    "
CUT = "..."
NEAR = 4 * WIDTH  # code points looked at on each side of a span; lines may be very long
ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, invisible and bidirectional marks, lone surrogates

OFF = "\x1b[0m"
COLORS = {
    "error": "\x1b[1;31m",
    "warning": "\x1b[1;33m",
    "note": "\x1b[1;36m",
    "frame": "\x1b[1;34m",
    "strong": "\x1b[1m",
}


@dataclass(frozen=True)
class _Pen:
    color: bool

    def __call__(self, kind: str, text: str) -> str:
        return f"{COLORS[kind]}{text}{OFF}" if self.color and text else text


@dataclass(frozen=True)
class _Mark:
    """What to underline on one line: columns are 0-based offsets into the line's text."""

    source: Source
    line: int
    start: int
    end: int
    sign: str
    kind: str
    text: str


def _glyph(c: str) -> str:
    """A character of the source as it is shown."""
    if c == "\t":
        return TAB
    return f"<U+{ord(c):04X}>" if unicodedata.category(c) in ESCAPED else c


def _clean(text: str) -> str:
    """Text for one line of output, without anything that could steer a terminal."""
    return "".join(map(_glyph, text))


def _cells(text: str) -> int:
    """How many terminal columns the text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    none = sum(unicodedata.category(c) in ("Mn", "Me") for c in text)
    return len(text) + wide - none


def _mark(span: Span, sign: str, kind: str, text: str) -> _Mark:
    source, length = span.source, len(span.source.text)
    start = min(max(span.start, 0), length)
    last = min(max(span.end - 1, start), length)
    line, column = source.position(start)
    last_line, last_column = source.position(last)
    if last_line == line:
        end = last_column if span.end > span.start else column - 1
    else:
        end = len(source.line(line).rstrip())
        text = f"{CUT} to line {last_line}{': ' if text else ''}{text}"
    return _Mark(source, line, column - 1, max(end, column - 1), sign, kind, text)


def _window(text: str, mark: _Mark) -> tuple[str, int, int]:
    """The line cut around the mark; the mark's first cell there, and its width."""
    low, high = max(0, mark.start - NEAR), min(len(text), mark.start + 2 * NEAR)
    glyphs = [_glyph(c) for c in text[low:high]]
    sizes = [_cells(g) for g in glyphs]
    first, last = mark.start - low, min(mark.end, high) - low
    i, j = 0, len(glyphs)
    if low > 0 or high < len(text) or sum(sizes) > WIDTH:
        room = WIDTH - 2 * len(CUT)
        i = j = first
        while j < last and sizes[j] <= room:
            room -= sizes[j]
            j += 1
        spare = room // 2  # half of what is left goes before the span, the rest after it, then before it
        while i > 0 and sizes[i - 1] <= spare:
            i -= 1
            room -= sizes[i]
            spare -= sizes[i]
        while j >= last and j < len(glyphs) and sizes[j] <= room:
            room -= sizes[j]
            j += 1
        while i > 0 and sizes[i - 1] <= room:
            i -= 1
            room -= sizes[i]
        while i < first and sizes[i] == 0:  # a combining character without its base
            i += 1
    before = CUT if low + i > 0 else ""
    after = CUT if low + j < len(text) else ""
    shown = before + "".join(glyphs[i:j]) + after
    return shown, len(before) + sum(sizes[i:first]), max(sum(sizes[first : min(last, j)]), 1)


def _underlines(text: str, marks: Sequence[_Mark], pen: _Pen) -> list[tuple[str, list[str]]]:
    """Source lines with the rows of marks below each; a long line is shown once for each mark."""
    windows = [_window(text, m) for m in marks]
    out: list[tuple[str, list[str]]] = []
    end, closed = 0, True  # of the last row
    for mark, (shown, start, width) in zip(marks, windows, strict=True):
        if not out or out[-1][0] != shown:
            out.append((shown, []))
            closed = True
        rows = out[-1][1]
        if closed or start <= end:
            rows.append("")
            end = 0
        words = [_clean(w) for w in mark.text.split("\n")]
        rows[-1] += " " * (start - end) + pen(mark.kind, mark.sign * width)
        if mark.text:
            rows[-1] += " " + pen(mark.kind, words[0])
            rows.extend(" " * (start + width + 1) + pen(mark.kind, w) for w in words[1:])
        end, closed = start + width, bool(mark.text)
    return out


def _excerpt(marks: Sequence[_Mark], gutter: int, pen: _Pen) -> list[str]:
    """The marked lines of one source, in order."""
    blank = f"{' ' * gutter} {pen('frame', '|')}"
    out = [blank]
    previous = 0
    for line in sorted({m.line for m in marks}):
        if previous and line > previous + 1:
            out.append(pen("frame", CUT))
        previous = line
        here = [m for m in marks if m.line == line]
        here.sort(key=lambda m: (m.start, m.sign != "^", m.end))
        text = here[0].source.line(line)
        for shown, rows in _underlines(text, here, pen):
            out.append(f"{pen('frame', f'{line:>{gutter}} |')} {shown}".rstrip())
            out.extend(f"{blank} {row}".rstrip() for row in rows)
    return out


def _place(span: Span) -> str:
    return _clean(str(span))


def _places(d: Diagnostic, span: Span, gutter: int, pen: _Pen) -> list[str]:
    """The primary place and the labels, the labels in other files after those in the primary one."""
    files: list[tuple[Span, list[_Mark]]] = [(span, [_mark(span, "^", d.severity, "")])]
    labels = sorted(d.labels, key=lambda x: (x.span.source.name, x.span.start, x.span.end, x.text))
    for label in labels:
        mark = _mark(label.span, "-", "frame", label.text)
        for seen, marks in files:
            if (seen.source.name, seen.source.text) == (label.span.source.name, label.span.source.text):
                marks.append(mark)
                break
        else:
            files.append((label.span, [mark]))
    out: list[str] = []
    for k, (first, marks) in enumerate(files):
        arrow = pen("frame", ":::" if k else "-->")
        out.append(f"{' ' * gutter}{arrow} {_place(first)}")
        out.extend(_excerpt(marks, gutter, pen))
    return out


def _remark(kind: str, text: str, gutter: int, pen: _Pen) -> list[str]:
    head, *rest = [_clean(x) for x in text.split("\n")]
    indent = " " * (gutter + len(kind) + 5)
    first = f"{' ' * gutter} {pen('frame', '=')} {pen('strong', kind)}: {head}"
    return [first, *((indent + x).rstrip() for x in rest)]


def _block(d: Diagnostic, pen: _Pen) -> str:
    """One diagnostic without the hint at its end."""
    title = " ".join(map(_clean, d.message.split("\n")))
    out = [f"{pen(d.severity, f'{d.severity}[{d.code}]')}{pen('strong', f': {title}')}"]
    gutter = 1
    labels = d.labels
    if d.span is not None:
        gutter = max(len(str(s.line)) for s in (d.span, *(x.span for x in labels)))
        out.extend(_places(d, d.span, gutter, pen))
        labels = ()
        if d.notes or d.suggestion:
            out.append(f"{' ' * gutter} {pen('frame', '|')}")
    for note in d.notes:
        out.extend(_remark("note", note, gutter, pen))
    for label in labels:
        out.extend(_remark("note", f"{label.span}: {label.text}", gutter, pen))
    if d.suggestion:
        out.extend(_remark("help", d.suggestion, gutter, pen))
    return "\n".join(out)


def render(d: Diagnostic, *, color: bool = False) -> str:
    """The diagnostic with its place underlined, its reasons, its way out, and where to read more."""
    return f"{_block(d, _Pen(color))}\nFor more: `flowlang explain {d.code}`"


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def render_report(diagnostics: Iterable[Diagnostic], *, color: bool = False, limit: int = DIAGNOSTICS_SHOWN) -> str:
    """All diagnostics and how many there are; empty when there are none.

    Beyond `limit` the rest is only counted. Errors are shown before warnings are, both in their order.
    """
    items = list(diagnostics)
    if not items:
        return ""
    pen = _Pen(color)
    ranks = {"error": 0, "warning": 1, "note": 2}
    chosen = sorted(range(len(items)), key=lambda i: (ranks[items[i].severity], i))[: max(limit, 0)]
    blocks = [_block(items[i], pen) for i in sorted(chosen)]
    if len(items) > len(chosen):
        blocks.append(f"{CUT} and {len(items) - len(chosen)} more")
    numbers = [(sum(d.severity == word for d in items), word) for word in ranks]
    summary = ", ".join(_count(n, word) for n, word in numbers if n)
    code = items[chosen[0]].code if chosen else items[0].code
    hint = f"For more: `flowlang explain {code}`"
    return "\n\n".join([*blocks, f"{pen('strong', summary)}\n{hint}"])


def _label_note(label: Label, home: Source | None) -> str:
    source = label.span.source
    name = "" if home is None or source.name == home.name else f" of {source.name}"
    return f"line {label.span.line}{name}: {label.text}"


def to_json(d: Diagnostic) -> dict[str, Any]:
    """The diagnostic as plain data: places count from 1, the end is exclusive, labels become notes."""
    file: str | None = None
    start: tuple[int | None, int | None] = (None, None)
    end: tuple[int | None, int | None] = (None, None)
    if d.span is not None:
        file = d.span.source.name
        start = d.span.source.position(d.span.start)
        end = d.span.source.position(d.span.end)
    home = d.span.source if d.span else None
    return {
        "code": d.code,
        "severity": d.severity,
        "file": file,
        "line": start[0],
        "column": start[1],
        "end_line": end[0],
        "end_column": end[1],
        "message": d.message,
        "notes": [*d.notes, *(_label_note(x, home) for x in d.labels)],
        "suggestion": d.suggestion,
    }
