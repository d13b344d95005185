"""Modules, imports and the order in which names are found: body, module, imports, prelude, builtins."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flowlang.elaborate.values import Declared
from flowlang.source import Source, Span
from flowlang.syntax import tree
from flowlang.syntax.habits import NAMES

# Kinds whose declarations have a meaning now; others are parsed and refused with one diagnostic.
KINDS = ("bijector", "net", "norm", "flow", "model", "solver", "path", "const")
LATER_KINDS = {
    "optimizer": "optimizers",
    "recipe": "recipes",
}
LATER_ADVICE = "the text is kept and formatted; a later release compiles it"


@dataclass(eq=False)
class ModuleScope:
    """One file: its declarations and what it imports."""

    source: Source
    module: tree.Module
    names: dict[str, Any] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()  # declarations that did not parse

    def declared(self) -> list[Declared]:
        return [v for v in self.names.values() if isinstance(v, Declared) and v.module is self]


def close_names(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Names that a slip of the finger away could have meant, best first."""
    known = sorted(set(known))
    folded = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), list(folded), n=limit, cutoff=0.66)
    likeness = [difflib.SequenceMatcher(None, f, name.lower()).ratio() for f in found]
    found = [
        f for f, r in zip(found, likeness, strict=True) if r >= likeness[0] - 0.1
    ]  # the others would only distract
    return [folded[f] for f in found]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    close = close_names(name, known)
    if not close:
        return None
    return "did you mean " + " or ".join(f"`{c}`" for c in close) + "?"


def name_help(name: str, known: Iterable[str]) -> str:
    """What a habit should have been, else names like this one, else the few that are known, else where names are listed."""
    names = [n for n in dict.fromkeys(known) if not n.startswith("_")]
    if name in NAMES:
        return NAMES[name]
    if found := did_you_mean(name, names):
        return found
    if 0 < len(names) <= 12:
        return ("known is " if len(names) == 1 else "known are ") + ", ".join(f"`{n}`" for n in names)
    return "`flowlang std` lists the library's names, and docs/ops.md the functions"


def item_name(item: tree.Item) -> str | None:
    """The keyword of `name = value`, or None for a positional item."""
    if item.eq is not None and isinstance(item.left, tree.Name):
        return item.left.id
    return None


def span_of(items: tuple[tree.Item, ...], default: Span) -> Span:
    return items[0].span.until(items[-1].span) if items else default
