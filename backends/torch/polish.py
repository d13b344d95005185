"""Names of local variables, made fewer: a value that nobody reads any more hands its name on."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
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
    lines = without_dead(lines, set())
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


def without_dead(lines: list[str], keep: set[str]) -> list[str]:
    """The statements without bindings that nothing reads."""
    while True:
        body = ast.parse("\n".join(lines)).body
        read = {
            n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        } | keep
        dead = {
            s.lineno - 1
            for s in body
            if isinstance(s, ast.Assign) and s.lineno == s.end_lineno
            and isinstance(s.targets[0], ast.Name) and s.targets[0].id not in read
        }  # fmt: skip
        if not dead:
            return lines
        lines = [x for k, x in enumerate(lines) if k not in dead]


def folded(line: str, width: int) -> list[str]:
    """A statement within a line width: what is too long stands on lines of its own, by its structure."""
    if len(line) <= width:
        return [line]
    code, mark, comment = line.partition("  # ")
    indent = " " * (len(code) - len(code.lstrip()))
    code = code.strip()
    lead = [f"{indent}# {comment}"] if mark else []
    if len(code) + len(indent) <= width:
        return [*lead, indent + code]
    try:
        statement = ast.parse(code).body[0]
    except SyntaxError:
        return [*lead, indent + code]
    value = getattr(statement, "value", None)
    if value is None:
        return [*lead, indent + code]
    text = Text(code)
    head, tail = text.before(value), text.after(value)
    found = text.fold(value, width - len(indent), len(head))
    found[0] = head + found[0]
    found[-1] += tail
    return [*lead, *(indent + x for x in found)]


class Text:
    """Source of one line with its syntax tree's offsets, which count bytes."""

    def __init__(self, code: str):
        self.code = code.encode()

    def of(self, node: ast.expr | ast.keyword) -> str:
        return self.code[node.col_offset : node.end_col_offset].decode()

    def before(self, node: ast.expr) -> str:
        return self.code[: node.col_offset].decode()

    def after(self, node: ast.expr) -> str:
        return self.code[node.end_col_offset :].decode()

    def fold(self, node: ast.expr, width: int, used: int) -> list[str]:
        """Lines of an expression; `used` columns of the first are taken."""
        whole = self.of(node)
        if len(whole) + used <= width:
            return [whole]
        if isinstance(node, ast.Call):
            call = node
            while isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call):
                if len(self.of(call.func.value)) < len(whole) - len(self.of(call.func.value)):
                    break
                call = call.func.value
            parts: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
            if parts:
                head = self.code[node.col_offset : parts[0].col_offset].decode()
                tail = self.code[parts[-1].end_col_offset : node.end_col_offset].decode()
                if not tail.startswith(")"):
                    return [whole]
                return [head, *self.items(parts, width), tail]
        if isinstance(node, ast.Tuple) and node.elts:
            return ["(", *self.items(node.elts, width), ")"]
        if isinstance(node, ast.BinOp):
            return ["(", *(f"    {x}" for x in self.terms(node, width - 4)), ")"]
        return [whole]

    def items(self, parts: Sequence[ast.expr | ast.keyword], width: int) -> list[str]:
        out: list[str] = []
        for p in parts:
            lines = [self.of(p)] if isinstance(p, ast.keyword) else self.fold(p, width - 5, 0)
            lines[-1] += ","
            out += [f"    {x}" for x in lines]
        return out

    def terms(self, node: ast.BinOp, width: int) -> list[str]:
        """Operands of equally strong operators, one a line with its operator in front."""
        level = (ast.Add, ast.Sub) if isinstance(node.op, ast.Add | ast.Sub) else (type(node.op),)
        chain: list[ast.expr] = []
        inner: ast.expr = node
        while isinstance(inner, ast.BinOp) and isinstance(inner.op, level):
            chain.append(inner.right)
            inner = inner.left
        chain.append(inner)
        chain.reverse()
        out: list[str] = []
        at = node.col_offset
        for k, operand in enumerate(chain):
            end = chain[k + 1].col_offset if k + 1 < len(chain) else node.end_col_offset
            piece = self.code[at:end].decode().rstrip()
            if k + 1 < len(chain):  # the operator opens the next line
                stem, _, sign = piece.rpartition(" ")
                # An opening parenthesis of the next operand stays with it.
                while sign and sign[0] == "(":
                    stem, _, sign = stem.rpartition(" ")
                cut = len(stem.encode())
                out.append(stem)
                at += cut
                at += len(self.code[at:]) - len(self.code[at:].lstrip())
            else:
                out.append(piece)
            del operand
        return out
