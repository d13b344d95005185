"""The standard library as a list: what each entry is, its family, card and source."""

from __future__ import annotations

import re
from typing import Any

from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.elaborate.scope import did_you_mean
from flowlang.library import standard_library
from flowlang.syntax import tree
from flowlang.syntax.parser import parse

CARD = re.compile(r"\bcard (\d{3})\b")
YEAR = re.compile(r"\(([^()]*?(?:19|20)\d\d[^()]*)\)")


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
                card, cited = CARD.search(doc), YEAR.search(doc)
                out.append(
                    {
                        "name": item.name, "kind": item.kind, "family": path.removeprefix("std."), "file": path,
                        "card": card.group(1) if card else None, "source": cited.group(1) if cited else None,
                        "summary": re.split(r"(?<=[.:])\s", doc.replace("\n", " "))[0].strip() if doc else "",
                        "doc": doc,
                    }
                )  # fmt: skip
    return sorted(out, key=lambda e: (e["family"], e["name"]))


def entry_text(name: str) -> str:
    """An entry's own text, with its comment."""
    library = standard_library()
    source = library.find(name)
    if source is None:
        raise FlowError(
            Diagnostic(
                "FL0201",
                f"the library has no `{name}`",
                suggestion=did_you_mean(name, library.names()) or "see `flowlang std`",
            )
        )
    module = parse(source, Report()).module
    for item in module.items:
        if isinstance(item, tree.Declaration) and item.name == name:
            doc = "".join(f"## {line}\n" for line in (item.doc or "").splitlines())
            return doc + item.span.text
    raise AssertionError(name)
