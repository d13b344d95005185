"""LANGUAGE.md §7: imports resolve in the spec's folder, then the library, and nothing else of the file system is read.

Every import that fails is one error: at its place, with a code and what to write instead.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import flowlang as fl
from flowlang import limits

NET = "net mine(x: R[D]) -> R[out] { linear[D -> out](x) }\n"
FLOW = "\nflow f { data x: R[D = 2];  affine_coupling(net = mlp(4));  base normal }\n"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/nets.flow").write_text(NET)
    (tmp_path / "lib/other.flow").write_text("import lib.nets (mine)\nnet more(x: R[D]) -> R[out] { mine(x) }\n")
    return tmp_path / "main.flow"


def told(spec: Path, text: str | bytes) -> list[tuple[str, str, str]]:
    """Code, place and suggestion of each error and warning."""
    spec.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(d.code, d.span.text if d.span else "", d.suggestion or "") for d in fl.check(spec) if d.severity != "note"]


def using(net: str) -> str:
    return FLOW.replace("mlp(4)", net)


@pytest.mark.parametrize(
    "text",
    [
        "import lib.nets (mine)" + using("mine"),
        "import lib.nets" + using("nets.mine"),
        "import lib.other (more)" + using("more"),
        "import std.flows.coupling (rqs_coupling)" + FLOW,
        "import lib.nets (mine)\nimport lib.nets (mine)" + using("mine"),
        FLOW,
    ],
)
def test_what_is_found(spec: Path, text: str) -> None:
    assert told(spec, text) == []
    assert told(spec, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()) == []


def test_a_mark_and_line_ends_of_other_systems_are_accepted_in_what_is_imported(spec: Path) -> None:
    (spec.parent / "dos.flow").write_bytes(b"\xef\xbb\xbf" + NET.replace("\n", "\r\n").encode())
    assert told(spec, "import dos (mine)" + using("mine")) == []


MISSING = [
    ("import nowhere", "import nowhere", "paths resolve in the spec's folder"),
    ("import lib.nest (mine)", "import lib.nest (mine)", "did you mean `lib.nets`?"),
    ("import lib", "import lib", "`lib` is a folder; its files are `lib.nets`, `lib.other`"),
    ("import lib.nets.flow", "import lib.nets.flow", "leave the ending out: `import lib.nets`"),
    ("import lib.nets (mines)", "mines", "did you mean `mine`?"),
    ("import lib.nets (zzz)", "zzz", "it declares `mine`"),
    ("import std.flows.couplin", "import std.flows.couplin", "did you mean `std.flows.coupling`?"),
    ("import std.flows", "import std.flows", "`std.flows` is a folder"),
    ("import std.rqs_coupling", "import std.rqs_coupling", "declared in `std.flows.coupling`, and needs no import"),
    ("import std.flows.coupling (rqs_couplin)", "rqs_couplin", "did you mean `rqs_coupling`"),
]


@pytest.mark.parametrize(("line", "place", "advice"), MISSING, ids=[m[0] for m in MISSING])
def test_what_is_not_found_is_told_with_what_may_be_meant(spec: Path, line: str, place: str, advice: str) -> None:
    ((code, where, suggestion),) = told(spec, line + FLOW)
    assert (code, where) == ("FL0207", place)
    assert advice in suggestion


def test_a_missing_name_is_told_once_however_often_it_is_used(spec: Path) -> None:
    assert [t[0] for t in told(spec, "import nowhere (mine)" + using("mine"))] == ["FL0207"]
    assert [t[0] for t in told(spec, "import lib.nets (mines)" + using("mines"))] == ["FL0207"]


@pytest.mark.parametrize(
    "line",
    ["import ..lib.nets", "import /etc/passwd", 'import "lib/nets.flow"', "import lib/nets", "import https://a.b/c"],
)
def test_a_path_is_names_with_dots(spec: Path, line: str) -> None:
    found = told(spec, line + FLOW)
    assert [f[0] for f in found] == ["FL0101"]
    assert "as in `import std.flows.coupling (rqs_coupling)`" in found[0][2]


def test_paths_begin_in_the_specs_own_folder(spec: Path) -> None:
    (spec.parent / "lib/inner.flow").write_text("import nets (mine)\nnet use(x: R[D]) -> R[out] { mine(x) }\n")
    ((code, place, suggestion),) = told(spec, "import lib.inner (use)" + using("use"))
    assert (code, place, suggestion) == (
        "FL0207",
        "import nets (mine)",
        "paths begin in the spec's own folder: `import lib.nets`",
    )


def test_a_cycle_is_told_once_with_its_way(spec: Path) -> None:
    (spec.parent / "a.flow").write_text("import b (two)\nnet one(x: R[D]) { x }\n")
    (spec.parent / "b.flow").write_text("import a (one)\nnet two(x: R[D]) { x }\n")
    assert [t[:2] for t in told(spec, "import a (one)" + FLOW)] == [("FL0208", "import a (one)")]
    (found,) = [d for d in fl.check(spec) if d.code == "FL0208"]
    assert found.notes[0].count("->") == 2
    assert [t[0] for t in told(spec, "import main" + FLOW)] == ["FL0208"]


def test_two_meanings_of_one_name_are_refused(spec: Path) -> None:
    (spec.parent / "two.flow").write_text(NET)
    assert [t[:2] for t in told(spec, "import lib.nets (mine)\nimport two (mine)" + FLOW)] == [("FL0204", "mine")]
    assert [t[:2] for t in told(spec, "import lib.nets (mine)\n" + NET + FLOW)] == [("FL0204", "mine")]


def test_an_import_may_shadow_the_library_and_no_file_replaces_it(spec: Path) -> None:
    (spec.parent / "own.flow").write_text(NET.replace("mine", "mlp"))
    assert told(spec, "import own (mlp)" + using("mlp")) == []
    (spec.parent / "std/flows").mkdir(parents=True)
    (spec.parent / "std/flows/coupling.flow").write_text(NET)
    assert [t[:2] for t in told(spec, "import std.flows.coupling (mine)" + FLOW)] == [("FL0207", "mine")]


def test_a_file_that_cannot_be_read_is_told_where_it_is_imported_and_the_rest_is_checked(spec: Path) -> None:
    (spec.parent / "bad.flow").write_bytes(b"net mine(x: R[D]) { \xff }\n")
    (spec.parent / "wide.flow").write_bytes(NET.encode("utf-16"))
    (spec.parent / "huge.flow").write_text(NET + "#" * (4 * limits.SOURCE_SIZE))
    found = told(spec, "import bad (mine)\nimport wide\nimport huge" + FLOW.replace("normal", "norml"))
    assert [f[:2] for f in found] == [
        ("FL0801", "import bad (mine)"), ("FL0801", "import wide"), ("FL0901", "import huge"), ("FL0201", "norml"),
    ]  # fmt: skip
    assert all(f[2] for f in found)


def test_links_stay_inside_the_folder(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    away = tmp_path_factory.mktemp("away") / "secret.flow"
    away.write_text(NET)
    folder = spec.parent
    (folder / "out.flow").symlink_to(away)
    (folder / "near.flow").symlink_to(folder / "lib/nets.flow")
    (folder / "loop.flow").symlink_to(folder / "loop.flow")
    (folder / "gone.flow").symlink_to(folder / "nothing.flow")
    (folder / "folder.flow").mkdir()
    assert told(spec, "import near (mine)" + using("mine")) == []
    for name, advice in (
        ("out", "leads out"),
        ("loop", "not a file"),
        ("gone", "not a file"),
        ("folder", "not a file"),
    ):
        ((code, place, suggestion),) = told(spec, f"import {name}" + FLOW)
        assert (code, place) == ("FL0207", f"import {name}")
        assert advice in suggestion


@pytest.mark.skipif(not hasattr(os, "mkfifo") or not hasattr(os, "geteuid"), reason="POSIX")
def test_pipes_and_locked_files_are_not_waited_for(spec: Path) -> None:
    os.mkfifo(spec.parent / "pipe.flow")
    assert [t[:2] for t in told(spec, "import pipe" + FLOW)] == [("FL0207", "import pipe")]
    if os.geteuid():  # root reads everything
        (spec.parent / "locked.flow").write_text(NET)
        (spec.parent / "locked.flow").chmod(0)
        assert [t[:2] for t in told(spec, "import locked" + FLOW)] == [("FL0801", "import locked")]


def test_mistakes_in_what_is_imported_are_told_there(spec: Path) -> None:
    (spec.parent / "broken.flow").write_text("net mine(x: R[D]) -> R[D] { y }\n")
    assert [t[:2] for t in told(spec, "import broken (mine)" + using("mine"))] == [("FL0201", "y")]
    (spec.parent / "broken.flow").write_text("net mine(x: R[D] { x }\n")
    assert [t[0] for t in told(spec, "import broken (mine)" + using("mine"))] == ["FL0102"]


def test_a_long_chain_of_imports_has_a_limit(spec: Path) -> None:
    for k in range(limits.IMPORT_DEPTH + 3):
        (spec.parent / f"c{k}.flow").write_text(f"import c{k + 1}\n" + NET)
    assert [t[0] for t in told(spec, "import c0" + FLOW)] == ["FL0901"]
