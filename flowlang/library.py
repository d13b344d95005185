"""Loaders: the standard library that ships with FlowLang, and folders of the user's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path

from flowlang.elaborate.elaborator import Library
from flowlang.source import Source

_DECLARATION = re.compile(r"^(?:bijector|net|norm|flow|const|model|path|solver|optimizer|recipe)\s+([^\s(={]+)", re.M)


@lru_cache(maxsize=1)
def standard_library() -> Library:
    """Names of the library to their files. Files are read here, and parsed only when a name is used."""
    sources: dict[str, Source] = {}
    index: dict[str, str] = {}
    stack = [((), resources.files("flowlang.stdlib"))]
    files: list[tuple[tuple[str, ...], str]] = []
    while stack:
        path, folder = stack.pop()
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.name.startswith(("_", ".")):
                stack.append(((*path, entry.name), entry))  # type: ignore[arg-type]
            elif entry.name.endswith(".flow"):
                files.append(((*path, entry.name[: -len(".flow")]), entry.read_text("utf-8")))
    for parts, text in sorted(files):
        name = ".".join(("std", *parts))
        sources[name] = Source.of(name, text, library=True)
        for found in _DECLARATION.finditer(sources[name].text):
            index.setdefault(found.group(1), name)
    return Library(sources, index)


class Folders:
    """Imports resolve in the spec's folder, then the folders given, then the library; nowhere else."""

    def __init__(self, folders: Iterable[Path] = ()):
        self.folders = [Path(f).resolve() for f in folders]

    def load(self, path: tuple[str, ...], importer: Source) -> Source | None:
        if path and path[0] == "std":
            return standard_library().source(".".join(path))
        if importer.library or not all(re.fullmatch(r"\w+", p) for p in path):
            return None
        for folder in self.folders:
            file = folder.joinpath(*path).with_suffix(".flow")
            if file.is_file() and file.resolve().is_relative_to(folder):
                return Source.of(str(file), file.read_text("utf-8"))
        return None
