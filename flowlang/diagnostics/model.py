"""What a diagnostic is. Rendering is in `render`, codes are in `codes`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from flowlang.source import Span

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Label:
    """A secondary place, with what is to be seen there."""

    span: Span
    text: str


@dataclass(frozen=True)
class Diagnostic:
    """One finding: a stable code, the place, the reason in the spec's own words, and a way out."""

    code: str
    message: str
    span: Span | None = None
    severity: Severity = "error"
    labels: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    suggestion: str | None = None

    def sort_key(self) -> tuple[str, int, int, str, str]:
        if self.span is None:
            return ("", -1, -1, self.code, self.message)
        return (self.span.source.name, self.span.start, self.span.end, self.code, self.message)


class FlowError(Exception):
    """Raised where work cannot go on; it carries the diagnostics that say why."""

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]):
        items = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = items
        super().__init__("\n".join(d.message for d in items))

    def __str__(self) -> str:
        from flowlang.diagnostics.render import render

        return "\n".join(render(d) for d in self.diagnostics)


@dataclass
class Report:
    """Diagnostics of one run: duplicates dropped, sorted by place when read."""

    _items: list[Diagnostic] = field(default_factory=list)
    _seen: set[tuple[object, ...]] = field(default_factory=set)
    told: set[str] = field(default_factory=set)  # names of later versions: each is told once

    def add(self, diagnostic: Diagnostic) -> None:
        s = diagnostic.span
        key = (diagnostic.code, s and (s.source.name, s.start, s.end))
        if key not in self._seen:
            self._seen.add(key)
            self._items.append(diagnostic)

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        for d in diagnostics:
            self.add(d)

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(sorted(self._items, key=Diagnostic.sort_key))

    def __len__(self) -> int:
        return len(self._items)

    @property
    def errors(self) -> list[Diagnostic]:
        return [d for d in self if d.severity == "error"]

    @property
    def ok(self) -> bool:
        return not any(d.severity == "error" for d in self._items)
