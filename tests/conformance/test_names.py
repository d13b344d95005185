"""LANGUAGE.md, section 7: imports and names. Each test names the sentence it is about.

Not implemented: "the folders given". No command and no argument of the Python API takes folders to import from
(`flowlang.library.Folders` does). Imports have more tests in tests/frontend/test_imports.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flowlang as fl
from tests.conformance.support import codes, made, same, told, value

X = [[1.0, 2.0, 3.0]]
STEP = "flow f {{ data x: R[D = 2];  {};  base normal }}"


def test_the_library_is_imported_by_its_path() -> None:
    assert told("import std.flows.coupling (rqs_coupling)\n" + STEP.format("rqs_coupling(net = mlp(4))")) == []


def test_the_prelude_needs_no_import() -> None:
    assert told(STEP.format("rqs_coupling(net = mlp(4))")) == []


def test_paths_resolve_inside_the_specs_folder_then_the_library(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/steps.flow").write_text("bijector turn { reverse }\n")
    spec = tmp_path / "main.flow"
    spec.write_text("import mine.steps (turn)\n" + STEP.format("turn"))
    assert fl.check(spec).ok
    assert codes("import mine.steps (turn)\n" + STEP.format("turn")) == ["FL0207"]  # a text has no folder


@pytest.mark.parametrize("line", ["import ..above", "import /etc/passwd", "import os (system)", "import https://a.b/c"])
def test_nothing_else_of_the_file_system_nor_the_network_nor_python_can_be_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "spec").mkdir()
    (tmp_path / "above.flow").write_text("bijector turn { reverse }\n")
    spec = tmp_path / "spec/main.flow"
    spec.write_text(f"{line}\n" + STEP.format("reverse"))
    assert [d.code for d in fl.check(spec)] in (["FL0101"], ["FL0207"])


@pytest.mark.parametrize("name", ["a", "A9", "a_b", "γ", "Σ2", "ω_x", "x'", "x''"])
def test_names_are_letters_greek_letters_digits_underscores_and_primes(name: str) -> None:
    assert same(value(f"net f(x: R[D]) {{ {name} = 2 * x;  {name} + 1 }}", X, D=3), [[3.0, 5.0, 7.0]])


@pytest.mark.parametrize("name", ["é", "ж", "名", "a²", "x\u200b"])
def test_other_letters_are_refused(name: str) -> None:
    assert "FL0103" in codes(f"net f(x: R[D]) {{ {name} = 2 * x;  {name} + 1 }}")


def test_names_that_would_merge_in_nfkc_form_are_refused() -> None:
    # µ (micro sign) and μ (Greek mu) look the same and are one in NFKC form.
    assert "FL0103" in codes("net f(x: R[D]) { \u00b5 = 2 * x;  \u03bc = 3 * x;  \u00b5 + \u03bc }")


def test_generated_code_uses_ascii_spellings() -> None:
    text = "net f(x: R[D]) { param γ: R[D] = 2;  Σ = γ * x;  Σ + γ }"
    source, _ = fl.generate(text, flow="f", D=3)
    assert "class " in source
    code = "\n".join(line.split("#")[0] for line in source.splitlines())
    tail = code[code.rindex("class ") :]
    assert tail.isascii()
    assert same(made(text, D=3)(torch.tensor(X, dtype=torch.float64)), [[4.0, 6.0, 8.0]])


def test_files_are_utf_8_and_line_ends_of_windows_are_accepted(tmp_path: Path) -> None:
    spec = tmp_path / "main.flow"
    text = "flow f {\n  data x: R[D = 2]\n  reverse\n  base normal\n}\n"
    spec.write_bytes(text.replace("\n", "\r\n").encode())
    assert fl.check(spec).ok
    spec.write_bytes(text.replace("reverse", "reverse  # \u00e9").encode("latin-1"))
    assert [d.code for d in fl.check(spec)] == ["FL0801"]
