"""`flowlang explain CODE`: one Markdown page for each code."""

from __future__ import annotations

import difflib
from importlib import resources

from flowlang.diagnostics.codes import CODES
from flowlang.diagnostics.model import Diagnostic, FlowError


def explain(code: str) -> str:
    """The page of a code (`FL0301`, or its name `size-mismatch`)."""
    wanted = code.strip()
    by_name = {name: c for c, name in CODES.items()}
    found = by_name.get(wanted.lower(), wanted.upper())
    if found not in CODES:
        close = difflib.get_close_matches(found, CODES, 1) or difflib.get_close_matches(wanted.lower(), by_name, 1)
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"there is no code `{wanted}`",
                suggestion=f"did you mean `{close[0]}`?" if close else "codes look like FL0301",
            )
        )
    page = resources.files("flowlang.diagnostics").joinpath("pages", f"{found}.md")
    return page.read_text("utf-8")


def pages() -> list[str]:
    """Codes that have a page."""
    folder = resources.files("flowlang.diagnostics").joinpath("pages")
    return sorted(p.name.removesuffix(".md") for p in folder.iterdir() if p.name.endswith(".md"))
