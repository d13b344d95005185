"""Source text, spans and line tables.

Trees and graphs hold offsets only (code points from the start of the text); lines and columns are
computed at the edge, when a diagnostic is shown.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol


@dataclass(frozen=True, eq=False)
class Source:
    """One text with the name under which the user knows it.

    `library` marks text that ships with FlowLang: a diagnostic never points there while some of the
    user's own text is on the path to it.
    """

    name: str
    text: str
    library: bool = False

    @staticmethod
    def of(name: str, text: str, *, library: bool = False) -> Source:
        """A source with line ends normalised and one leading byte-order mark dropped."""
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        return Source(name, text, library)

    @cached_property
    def _line_starts(self) -> Sequence[int]:
        starts = [0]
        starts.extend(i + 1 for i, c in enumerate(self.text) if c == "\n")
        return starts

    def position(self, offset: int) -> tuple[int, int]:
        """1-based line and column (in code points) of an offset."""
        line = bisect_right(self._line_starts, offset)
        return line, offset - self._line_starts[line - 1] + 1

    def line(self, number: int) -> str:
        """The text of a 1-based line, without its end."""
        start = self._line_starts[number - 1]
        end = self._line_starts[number] - 1 if number < len(self._line_starts) else len(self.text)
        return self.text[start:end]


@dataclass(frozen=True)
class Span:
    """A half-open range of offsets in one source."""

    source: Source = field(repr=False)
    start: int
    end: int

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    @property
    def line(self) -> int:
        return self.source.position(self.start)[0]

    def until(self, other: Span) -> Span:
        return Span(self.source, self.start, other.end)

    def __str__(self) -> str:
        line, column = self.source.position(self.start)
        return f"{self.source.name}:{line}:{column}"


class Loader(Protocol):
    """Where imported texts come from. The compiler itself touches no file."""

    def load(self, path: tuple[str, ...], importer: Source) -> Source | None:
        """The source for a dotted import path, or None where there is none."""
        ...

    def advice(self, path: tuple[str, ...], importer: Source) -> str | None:
        """What may be meant by a path at which there is nothing."""
        ...
