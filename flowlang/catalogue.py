"""The standard library as a list: what each entry is, its family, card and source."""

from __future__ import annotations

import re
from typing import Any

from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.elaborate.forms import FORMS
from flowlang.elaborate.scope import did_you_mean
from flowlang.library import standard_library
from flowlang.syntax import tree
from flowlang.syntax.parser import parse

CARDS = re.compile(r"\bcards? (\d{3}(?:(?:, | and )\d{3})*)", re.I)
SAID = re.compile(r"\bSources?: (.+?)(?:(?<!\bal)(?<!\beq)\.\s|\.?$)", re.S)
CITED = re.compile(r"\(([^()]*?(?:1[6-9]|20)\d\d[^()]*)\)")
OWN = re.compile(r"\(own\b|\bown form\b")
ABBREVIATION = re.compile(r"(?:\bal|\bvs|\beq|\bet|\b[A-Z])\.$")


def source_of(doc: str) -> str | None:
    """Where an entry comes from: what follows `Source:`, or the first citation in brackets, or `own`."""
    said = SAID.search(doc) or CITED.search(doc)
    if said is not None:
        return " ".join(said.group(1).split())
    return "own" if OWN.search(doc) else None


def cards_of(doc: str) -> list[str]:
    """The catalogue's cards that an entry names, in order."""
    return list(dict.fromkeys(c for found in CARDS.findall(doc) for c in re.findall(r"\d{3}", found)))


def summary_of(doc: str) -> str:
    """The first sentence of a comment; an abbreviation's full stop does not end it."""
    out: list[str] = []
    for word in doc.split():
        out.append(word)
        if word.endswith((".", ".)")) and not word.endswith("..") and not ABBREVIATION.search(word):
            break
    return " ".join(out)


def entries() -> list[dict[str, Any]]:
    """Every declaration of the library, by family and name."""
    out: list[dict[str, Any]] = []
    library = standard_library()
    for path in library.paths():
        source = library.source(path)
        assert source is not None
        module = parse(source, Report()).module
        for item in module.items:
            if isinstance(item, tree.Declaration):
                doc = item.doc or ""
                cards = cards_of(doc)
                out.append(
                    {
                        "name": item.name, "kind": item.kind, "family": path.removeprefix("std."), "file": path,
                        "card": cards[0] if cards else None, "cards": cards, "source": source_of(doc),
                        "summary": summary_of(doc), "doc": doc,
                    }
                )  # fmt: skip
    return sorted(out, key=lambda e: (e["family"], e["name"]))


def entry_text(name: str) -> str:
    """An entry's own text with its comment, or what a built-in name does."""
    library = standard_library()
    source = library.find(name)
    if source is None and name in FORMS:
        form, meaning = FORMS[name]
        return f"## Built in: {meaning}.\n{form}"
    if source is None:
        raise FlowError(
            Diagnostic(
                "FL0201",
                f"the library has no `{name}`",
                suggestion=did_you_mean(name, {*library.names(), *FORMS}) or "see `flowlang std`",
            )
        )
    module = parse(source, Report()).module
    for item in module.items:
        if isinstance(item, tree.Declaration) and item.name == name:
            doc = "".join(f"## {line}\n" for line in (item.doc or "").splitlines())
            return doc + item.span.text
    raise AssertionError(name)
