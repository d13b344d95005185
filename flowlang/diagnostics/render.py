"""Diagnostics as text for people, and as JSON for programs."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from flowlang.diagnostics.model import Diagnostic, Label
from flowlang.limits import DIAGNOSTICS_SHOWN
from flowlang.source import Span

COLORS = {"error": "\x1b[1;31m", "warning": "\x1b[1;33m", "note": "\x1b[1;36m", "line": "\x1b[1;34m", "off": "\x1b[0m"}
WIDTH = 100
TAB = "    "


def _cells(text: str) -> int:
    """Columns on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _clean(text: str) -> str:
    """Source text with tabs expanded and control characters made visible."""
    return "".join(TAB if c == "\t" else c if unicodedata.category(c) not in ("Cc", "Cf") else f"<U+{ord(c):04X}>" for c in text)


def _excerpt(span: Span, mark: str, text: str, paint: Any, margin: str) -> list[str]:
    line, column = span.source.position(span.start)
    source = span.source.line(line)
    end_line, end_column = span.source.position(span.end)
    stop = end_column if end_line == line else len(source) + 1
    before, inside = _clean(source[: column - 1]), _clean(source[column - 1 : max(stop - 1, column - 1)])
    after = _clean(source[max(stop - 1, column - 1) :])
    cut = ""
    if _cells(before) > WIDTH // 2:
        keep = before[-WIDTH // 2 :]
        before, cut = keep, "…"
    room = max(WIDTH - _cells(cut + before), 20)
    if len(inside) > room:
        inside, after = inside[:room], "…"
    elif len(inside) + len(after) > room:
        after = after[: room - len(inside)] + "…"
    width = max(_cells(inside), 1)
    more = " …" if end_line != line else ""
    number = str(line).rjust(len(margin))
    return [
        f"{paint('line', number + ' |')} {cut}{before}{inside}{after}",
        f"{paint('line', margin + ' |')} {' ' * _cells(cut + before)}{mark * width}{more}{' ' + text if text else ''}",
    ]


def render(d: Diagnostic, *, color: bool = False) -> str:
    """The diagnostic with its source line underlined, its reasons and its way out."""

    def paint(kind: str, text: str) -> str:
        return f"{COLORS[kind]}{text}{COLORS['off']}" if color else text

    out = [f"{paint(d.severity, f'{d.severity}[{d.code}]')}: {d.message}"]
    margin = "  "
    if d.span is not None:
        labels = sorted((x for x in d.labels), key=lambda x: (x.span.source.name, x.span.start))
        lines = [d.span.line, *(x.span.line for x in labels)]
        margin = " " * max(len(str(n)) for n in lines)
        out.append(f"{paint('line', margin + '-->')} {d.span}")
        out.append(paint("line", f"{margin} |"))
        parts: list[tuple[int, list[str]]] = [
            (d.span.start, [paint(d.severity, x) if k == 1 and False else x for k, x in enumerate(_excerpt(d.span, "^", "", paint, margin))])
        ]
        for x in labels:
            if x.span.source is d.span.source or x.span.source.name == d.span.source.name:
                parts.append((x.span.start, _excerpt(x.span, "-", x.text, paint, margin)))
        for _, part in sorted(parts, key=lambda p: p[0]):
            out.extend(part)
        for x in labels:
            if x.span.source.name != d.span.source.name:
                out.append(f"{margin} = {x.span}: {x.text}")
    for n in d.notes:
        out.append(f"{margin} {paint('line', '=')} note: {n}")
    if d.suggestion:
        out.append(f"{margin} {paint('line', '=')} help: {d.suggestion}")
    return "\n".join(out)


def render_report(diagnostics: Iterable[Diagnostic], *, color: bool = False, limit: int = DIAGNOSTICS_SHOWN) -> str:
    """All diagnostics, and how many there were; empty when there are none."""
    items = list(diagnostics)
    if not items:
        return ""
    blocks = [render(d, color=color) for d in items[:limit]]
    if len(items) > limit:
        blocks.append(f"... and {len(items) - limit} more")
    counts = []
    for severity, word in (("error", "error"), ("warning", "warning"), ("note", "note")):
        n = sum(d.severity == severity for d in items)
        if n:
            counts.append(f"{n} {word}{'s' if n > 1 else ''}")
    summary = ", ".join(counts)
    codes = sorted({d.code for d in items if d.severity == "error"})
    hint = f"; `flowlang explain {codes[0]}` tells more" if codes else ""
    return "\n\n".join(blocks) + f"\n\n{summary}{hint}"


def _label_note(label: Label) -> str:
    return f"line {label.span.line}: {label.text}"


def to_json(d: Diagnostic) -> dict[str, Any]:
    """The diagnostic as plain data; places are 1-based, labels become notes."""
    out: dict[str, Any] = {"code": d.code, "severity": d.severity, "file": None, "line": None, "column": None,
                           "end_line": None, "end_column": None}  # fmt: skip
    if d.span is not None:
        out["file"] = d.span.source.name
        out["line"], out["column"] = d.span.source.position(d.span.start)
        out["end_line"], out["end_column"] = d.span.source.position(d.span.end)
    out["message"] = d.message
    out["notes"] = [*d.notes, *(_label_note(x) for x in d.labels)]
    out["suggestion"] = d.suggestion
    return out
