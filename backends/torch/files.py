"""Whole files: the docstring, the imports that are used, the runtime or an import of it, the classes."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

RUNTIME = "flowlang.backends.torch.runtime"
MODULES = (
    "parameters",
    "functions",
    "norms",
    "attention",
    "splines",
    "solvers",
    "errors",
    "odes",
    "adaptive",
    "ode_gradients",
    "reversible",
    "noise",
    "face",
    "flow",
    "model",
)
STANDALONE = {"errors": "errors_standalone"}  # what stands in for a module in a file that needs torch alone

FUTURE = "from __future__ import annotations"
STANDARD = {
    "math": "import math",
    "warnings": "import warnings",
    "Callable": "from collections.abc import Callable",
    "Iterator": "from collections.abc import Iterator",
    "Sequence": "from collections.abc import Sequence",
    "AbstractContextManager": "from contextlib import AbstractContextManager",
    "lru_cache": "from functools import lru_cache",
    "contextmanager": "from contextlib import contextmanager",
    "nullcontext": "from contextlib import nullcontext",
    "ContextVar": "from contextvars import ContextVar",
    "fnmatchcase": "from fnmatch import fnmatchcase",
    "pairwise": "from itertools import pairwise",
    "once_differentiable": "from torch.autograd.function import once_differentiable",
    "MethodType": "from types import MethodType",
    "Any": "from typing import Any",
    "ClassVar": "from typing import ClassVar",
    "NamedTuple": "from typing import NamedTuple",
}
THIRD_PARTY = {
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
    "Tensor": "from torch import Tensor",
    "nn": "from torch import nn",
}


@dataclass(frozen=True)
class Part:
    """A top-level definition of the runtime: its text, and the names that it uses."""

    text: str
    uses: frozenset[str]


@lru_cache(maxsize=2)
def runtime_parts(standalone: bool) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for module in MODULES:
        source = STANDALONE.get(module, module) if standalone else module
        text = inspect.getsource(importlib.import_module(f"{RUNTIME}.{source}"))
        lines = text.splitlines()
        for node in ast.parse(text).body:
            name = defined(node)
            if name is None or name == "__all__":
                continue
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(d.lineno for d in decorators)])
            body = "\n".join(lines[first - 1 : node.end_lineno])
            parts[name] = Part(body, frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name)))
    return parts


def defined(node: ast.stmt) -> str | None:
    """The name that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    return None


def runtime_names() -> set[str]:
    return set(runtime_parts(False))


def needed_parts(helpers: Iterable[str]) -> list[str]:
    """The runtime's definitions that are used, directly or not, in the runtime's order."""
    parts = runtime_parts(True)
    seen: set[str] = set()
    stack = [h for h in helpers if h in parts]
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack.extend(u for u in parts[name].uses if u in parts)
    return [p for p in parts if p in seen]


def imports(code: str) -> str:
    """Import lines for the modules that a text uses."""
    used = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)}
    groups = [[FUTURE]]
    for table in (STANDARD, THIRD_PARTY):
        lines = [line for name, line in table.items() if name in used]
        if table is THIRD_PARTY and {"Tensor", "nn"} <= used:
            lines = [x for x in lines if not x.startswith("from torch")] + ["from torch import Tensor, nn"]
        if lines:
            plain = [x for x in lines if x.startswith("import")]
            groups.append([*plain, *merged([x for x in lines if x not in plain])])
    return "\n\n".join("\n".join(g) for g in groups)


def merged(lines: list[str]) -> list[str]:
    """`from` imports of one module on one line."""
    found: dict[str, list[str]] = {}
    for line in lines:
        module, names = re.fullmatch(r"from (\S+) import (.+)", line).groups()  # type: ignore[union-attr]
        found.setdefault(module, []).append(names)
    return [f"from {m} import {', '.join(n)}" for m, n in found.items()]


def wrapped(head: str, names: list[str]) -> str:
    """`from head import names` within the line width."""
    line = f"from {head} import {', '.join(names)}"
    if len(line) <= 120:
        return line
    return f"from {head} import (\n" + "".join(f"    {n},\n" for n in names) + ")"


def file_text(docstring: str, classes: str, helpers: list[str], *, standalone: bool) -> str:
    """A file of generated classes: with imports of the runtime, or with the parts of it that are used."""
    if standalone:
        parts = runtime_parts(True)
        body = "\n\n\n".join([*joined([(p, parts[p].text) for p in needed_parts(helpers)]), classes])
        return f"{docstring}\n\n{imports(body)}\n\n{gap(body)}{body}"
    runtime = wrapped(RUNTIME, helpers) if helpers else ""
    return f"{docstring}\n\n{imports(classes)}\n\n{runtime}\n\n\n{classes}"


def gap(body: str) -> str:
    return "" if not body.startswith(("class ", "def ", "@")) else "\n"


def joined(parts: list[tuple[str, str]]) -> list[str]:
    """Definitions, constants in one block each with no more than one empty line between them."""
    out: list[str] = []
    for name, text in parts:
        if name.isupper() and out and out[-1].split(" =")[0].isupper():
            out[-1] += f"\n{text}"
        else:
            out.append(text)
    return out
