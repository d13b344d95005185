"""Loaders: the standard library that ships with FlowLang, and folders of the user's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import resources
from pathlib import Path

from flowlang import limits
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.elaborate.elaborator import Library
from flowlang.elaborate.scope import did_you_mean
from flowlang.source import Source
from flowlang.syntax.habits import FOREIGN, LIBRARY

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


def read_text(path: str | Path) -> str:
    """The text of a spec file; FL0801 where there is none to read, FL0901 where it is too large."""
    limit = 4 * limits.SOURCE_SIZE
    try:
        with Path(path).open("rb") as f:
            blob = f.read(limit + 1)
        if len(blob) > limit:
            message, advice = (
                f"`{path}` is larger than the limit of {limit:,} bytes for one spec",
                "check that it is a spec",
            )
            raise FlowError(Diagnostic("FL0901", message, suggestion=advice))
        return blob.decode("utf-8")
    except UnicodeDecodeError as e:
        message, advice = f"`{path}` is not UTF-8 text (byte {e.start})", "save it as UTF-8"
    except OSError as e:
        message, advice = (
            f"`{path}` cannot be read: {e.strerror or e}",
            "check the path; a spec may also be given as text",
        )
    except ValueError:
        message, advice = f"{str(path)!r} is no path", "a path holds no zero byte"
    raise FlowError(Diagnostic("FL0801", message, suggestion=advice))


GIVEN: ContextVar[tuple[Path, ...]] = ContextVar("folders of imports", default=())


def folders_given() -> tuple[Path, ...]:
    """Folders in which imports are looked for after the spec's own: those of `library_folders`, then `FLOWLANG_PATH`."""
    named = (Path(f) for f in os.environ.get("FLOWLANG_PATH", "").split(os.pathsep) if f)
    return (*GIVEN.get(), *named)


@contextmanager
def library_folders(*folders: str | Path) -> Iterator[None]:
    """Inside this block specs may import from these folders too, after their own: `with fl.library_folders("shared"): ..`.

    The environment variable `FLOWLANG_PATH` names such folders for a whole session. A trained flow carries what it
    imported, so that `load` needs none of them. Raises FlowError (FL0801) where there is no such folder.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise FlowError(
                Diagnostic(
                    "FL0801",
                    f"`{folder}` is no folder",
                    suggestion="name a folder that holds the `.flow` files to import",
                )
            )
    token = GIVEN.set((*GIVEN.get(), *(Path(f) for f in folders)))
    try:
        yield
    finally:
        GIVEN.reset(token)


class Folders:
    """Imports resolve in the spec's folder, then the folders given, then the library; nowhere else."""

    def __init__(self, own: Path | None = None):
        self.folders = [Path(f).resolve() for f in (*((own,) if own else ()), *folders_given())]
        self.loaded: dict[str, str] = {}  # what was imported: dotted path to text, so that weights can carry it

    def load(self, path: tuple[str, ...], importer: Source) -> Source | None:
        if path and path[0] == "std":
            return standard_library().source(".".join(path))
        if importer.library or not all(re.fullmatch(r"\w+", p) for p in path):
            return None
        for folder in self.folders:
            file = folder.joinpath(*path).with_suffix(".flow")
            if file.is_file() and file.resolve().is_relative_to(folder):
                self.loaded[".".join(path)] = text = read_text(file)
                return Source.of(str(file), text)
        return None

    def advice(self, path: tuple[str, ...], importer: Source) -> str | None:
        name = ".".join(path)
        if path[0] in FOREIGN:
            return LIBRARY
        if path[0] == "std":
            return library_advice(name)
        if importer.library or not all(re.fullmatch(r"\w+", p) for p in path):
            return None
        if path[-1] == "flow":
            return f"leave the ending out: `import {'.'.join(path[:-1])}`"
        for folder in self.folders:
            place = folder.joinpath(*path)
            if place.is_dir():
                files = sorted(f.stem for f in place.glob("*.flow"))
                held = ", ".join(f"`{name}.{f}`" for f in files[:4])
                return f"`{name}` is a folder; " + (f"its files are {held}" if files else "it holds no `.flow` file")
            file = place.with_suffix(".flow")
            if file.is_symlink() and file.is_file() and not file.resolve().is_relative_to(folder):
                return (
                    f"`{file.name}` is a link that leads out of the spec's folder, where nothing can be imported from"
                )
            if file.exists() or file.is_symlink():
                return f"`{file.name}` is not a file that can be read"
            beside = Path(importer.name).parent.joinpath(*path).with_suffix(".flow")
            if beside.is_file() and beside.resolve().is_relative_to(folder):
                whole = ".".join(beside.resolve().relative_to(folder).with_suffix("").parts)
                return f"paths begin in the spec's own folder: `import {whole}`"
            if place.parent.is_dir():
                near = [".".join((*path[:-1], f.stem)) for f in place.parent.glob("*.flow")]
                found = did_you_mean(name, near)
                if found:
                    return found
        return None


def library_advice(name: str) -> str | None:
    """What of the library may be meant by a path."""
    library = standard_library()
    held = [p for p in library.paths() if p.startswith(f"{name}.")]
    if held:
        return f"`{name}` is a folder; its files are {', '.join(f'`{p}`' for p in held[:4])}{', ..' if len(held) > 4 else ''}"
    last = library.find(name.rpartition(".")[2])
    if last is not None:
        return f"`{name.rpartition('.')[2]}` is declared in `{last.name}`, and needs no import"
    return did_you_mean(name, library.paths())


class Texts:
    """Imports from texts that were kept beside weights; the library as ever."""

    def __init__(self, texts: Mapping[str, str]):
        self.loaded = dict(texts)

    def load(self, path: tuple[str, ...], importer: Source) -> Source | None:
        name = ".".join(path)
        if path and path[0] == "std":
            return standard_library().source(name)
        return Source.of(name, self.loaded[name]) if name in self.loaded and not importer.library else None

    def advice(self, path: tuple[str, ...], importer: Source) -> str | None:
        name = ".".join(path)
        if path[0] in FOREIGN:
            return LIBRARY
        return library_advice(name) if path[0] == "std" else did_you_mean(name, self.loaded)
