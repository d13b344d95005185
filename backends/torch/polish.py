"""Names of local variables, made fewer: a value that nobody reads any more hands its name on."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass


@dataclass
class Life:
    """The top-level statements at which a variable is first bound and last used."""

    born: int
    dies: int
    inside: bool = False  # bound first inside a loop or a `with`
    held: bool = False  # a closure has it


def lives(body: list[ast.stmt]) -> dict[str, Life]:
    found: dict[str, Life] = {}
    for k, statement in enumerate(body):
        closure = isinstance(statement, ast.FunctionDef)
        for node in ast.walk(statement):
            name = (
                node.id
                if isinstance(node, ast.Name)
                else node.arg
                if isinstance(node, ast.arg)
                else node.name
                if isinstance(node, ast.FunctionDef)
                else None
            )
            if name is None:
                continue
            life = found.setdefault(name, Life(k, k, inside=isinstance(statement, ast.For | ast.With | ast.If)))
            life.dies = k
            life.held = life.held or closure
    return found


def reuse_names(arguments: list[str], lines: list[str], reserved: set[str]) -> list[str]:
    """The statements of a method with `h`, `h_2`, `h_3` folded into `h` where their lives do not overlap."""
    if not lines:
        return lines
    known = lives(ast.parse("\n".join(lines)).body)
    until = {a: known[a].dies if a in known else -1 for a in arguments}
    # A helper that is called is held as well: its name must keep its meaning.
    bound = {
        n.id for n in ast.walk(ast.parse("\n".join(lines))) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    held = {n for n, life in known.items() if life.held or not (n in bound or n in until)}
    renamed: dict[str, str] = {}
    for name in sorted((n for n in known if n not in arguments), key=lambda n: (known[n].born, n)):
        life = known[name]
        stem = re.fullmatch(r"(.*?)_?\d+", name)
        base = stem[1] if stem else name
        if base == name or name in held or base in held or base in reserved or base not in until:
            until.setdefault(name, life.dies)
            continue
        if until[base] < life.born or (until[base] == life.born and not life.inside):
            renamed[name] = base
            until[base] = life.dies
    out = [substitute(line, renamed) for line in lines]
    return [x for x in out if not re.fullmatch(r"(\w+) = \1", x)]


def substitute(line: str, renamed: dict[str, str]) -> str:
    """Renames in code, not in comments or strings or after a dot."""
    code, mark, comment = line.partition("  # ")
    return re.sub(r"(?<![\w.\"'])[A-Za-z_]\w*(?![\w\"'])", lambda m: renamed.get(m[0], m[0]), code) + mark + comment


def folded(line: str, width: int) -> list[str]:
    """A statement that is too long, with the arguments of its outermost call on lines of their own."""
    if len(line) <= width:
        return [line]
    code, mark, comment = line.partition("  # ")
    indent = " " * (len(code) - len(code.lstrip()))
    code = code.strip()
    lead = [f"{indent}# {comment}"] if mark else []
    try:
        statement = ast.parse(code).body[0]
    except SyntaxError:
        return [*lead, indent + code]
    value = getattr(statement, "value", None)
    if len(code) + len(indent) <= width or not isinstance(value, ast.Call) or not value.args:
        return [*lead, indent + code]
    data = code.encode()  # offsets of the syntax tree count bytes
    parts = [*value.args, *(k for k in value.keywords)]
    inner = [data[n.col_offset : n.end_col_offset].decode() for n in parts]
    head, tail = data[: parts[0].col_offset].decode(), data[parts[-1].end_col_offset :].decode()
    return [*lead, indent + head, *(f"{indent}    {x}," for x in inner), indent + tail]
