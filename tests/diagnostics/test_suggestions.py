"""Every diagnostic of the sources says what to do: each call that makes one gives a suggestion."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import flowlang

ROOT = Path(flowlang.__file__).parent
# The place of `suggestion` among the positional arguments, where a maker takes it by position.
POSITION = {"refuse": 3, "problem": 4, "Failure": 6}
# Makers whose callees add the suggestion themselves.
ELSEWHERE = {"Claims"}


def silent(file: Path) -> Iterator[str]:
    for call in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func).rsplit(".", 1)[-1]
        codes = [a for a in call.args if isinstance(a, ast.Constant) and str(a.value).startswith("FL0")]
        given = any(k.arg in ("suggestion", None) for k in call.keywords)
        if codes and not given and len(call.args) < POSITION.get(name, 99) and name not in ELSEWHERE:
            yield f"{file.relative_to(ROOT)}:{call.lineno}"


def test_every_diagnostic_suggests_something() -> None:
    files = [*ROOT.rglob("*.py"), *(ROOT.parent / "backends").rglob("*.py")]
    assert len(files) > 100
    assert [place for f in sorted(set(files)) for place in silent(f)] == []
