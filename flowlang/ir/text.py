"""The text form of regions and programs: readable, the same under every hash seed, and it parses back.

A text is a list of blocks, those that others refer to first. A region:

    region 0 bijector 'scale' {signature='scale', library=True}
      %0 R[D = 3] = input {name='x', role='map'} 'x'
      %1 R = param {name='a'} 'a' fixed
      %2 R[D = 3] = mul(%0, %1)
      inputs %0
      outputs %2

`fixed` marks a value that does not vary from sample to sample. Values in braces are written as Python
expressions and read without running anything: `region(0)`, `program(1)` and `law('normal')` refer to
blocks and distributions. Places in the source are left out; everything else is kept.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from math import inf
from typing import Any, TypeVar

from flowlang.ir.distributions import DISTRIBUTIONS, Distribution
from flowlang.ir.domains import Domain
from flowlang.ir.graph import (
    BaseDistribution,
    Child,
    Draw,
    Emission,
    Follow,
    Graph,
    Node,
    Region,
    Rule,
    Start,
    Step,
    Update,
)
from flowlang.ir.interval import Interval
from flowlang.ir.ops.control import Series
from flowlang.ir.program import Program
from flowlang.ir.relation import Matrix, Support
from flowlang.ir.tableau import Tableau
from flowlang.ir.types import Axis, TensorType, TupleType, Type
from flowlang.source import Span

READABLE: dict[str, type] = {
    c.__name__: c
    for c in (
        BaseDistribution, Child, Domain, Draw, Emission, Follow, Fraction, Interval, Matrix, Rule, Series, Start, Step, Support, Tableau,
        Update,
    )
}  # fmt: skip
LISTED = ("emissions", "draws", "updates", "starts", "steps", "taps")
KEPT = ("doc", "signature", "broken", "library", "base")
C = TypeVar("C")
HEADS = {"real": "R", "int": "Int", "bool": "Bool"}


class TextProblem(Exception):
    """A text that is no graph: the line says where."""


def readable(cls: type[C]) -> type[C]:
    """Makes a frozen dataclass that stands in attributes part of the text form."""
    READABLE[cls.__name__] = cls
    return cls


# ---- printing -----------------------------------------------------------------------------------


def print_region(region: Region) -> str:
    """The region and all it refers to; itself last."""
    printer = _Printer()
    printer.region(region)
    return printer.text()


def print_program(program: Program) -> str:
    """The program, the regions it refers to and the bodies of its solvers; itself last."""
    printer = _Printer()
    printer.program(program)
    return printer.text()


class _Printer:
    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.regions: dict[int, int] = {}
        self.programs: dict[int, int] = {}

    def text(self) -> str:
        return "\n\n".join(self.blocks) + "\n"

    def region(self, region: Region) -> int:
        if id(region) in self.regions:
            return self.regions[id(region)]
        for r in (*(c.region for c in region.children.values()), *region.programs.values()):
            self.region(r)
        lines = list(self.nodes(region.graph))
        lines += [
            f"{word} {ids(getattr(region, word))}" for word in ("inputs", "context", "outputs") if getattr(region, word)
        ]
        for name, child in region.children.items():
            lines.append(f"child {name!r} {self.value(child)}")
        lines += [f"program {name!r} {self.value(r)}" for name, r in region.programs.items()]
        lines += [f"rule {name!r} {self.value(rule)}" for name, rule in region.rules.items()]
        lines += [f"{what} {self.value(v)}" for what in LISTED for v in getattr(region, what)]
        known = {k: getattr(region, k) for k in KEPT}
        number = self.regions[id(region)] = len(self.regions)
        head = f"region {number} {region.kind} {region.name!r}{self.braces({k: v for k, v in known.items() if v})}"
        self.blocks.append("\n  ".join([head, *lines]))
        return number

    def program(self, program: Program) -> int:
        if id(program) in self.programs:
            return self.programs[id(program)]
        region = self.region(program.region)
        lines = list(self.nodes(program.graph))
        lines += [f"{word} {ids(getattr(program, word))}" for word in ("inputs", "outputs") if getattr(program, word)]
        known = {"context": program.context, "random": program.random, "log_det": program.log_det}
        number = self.programs[id(program)] = len(self.programs)
        head = (
            f"program {number} {program.name!r} of region {region}{self.braces({k: v for k, v in known.items() if v})}"
        )
        self.blocks.append("\n  ".join([head, *lines]))
        return number

    def nodes(self, graph: Graph) -> Iterable[str]:
        for n in graph:
            operands = f"({', '.join(f'%{i}' for i in n.inputs)})" if n.inputs else ""
            label = f" {n.label!r}" if n.label is not None else ""
            fixed = "" if n.batched else " fixed"
            yield f"%{n.id} {type_text(n.type)} = {n.op}{operands}{self.braces(n.attrs)}{label}{fixed}"

    def braces(self, values: Mapping[str, Any]) -> str:
        inner = ", ".join(f"{k}={self.value(v)}" for k, v in sorted(values.items()))
        return f" {{{inner}}}" if inner else ""

    def value(self, v: Any) -> str:
        match v:
            case Region():
                return f"region({self.region(v)})"
            case Program():
                return f"program({self.program(v)})"
            case Distribution():
                return f"law({v.name!r})"
            case Fraction():
                return f"Fraction({v.numerator}, {v.denominator})"
            case tuple():
                return f"({', '.join(map(self.value, v))}{',' if len(v) == 1 else ''})"
            case list():
                return f"[{', '.join(map(self.value, v))}]"
            case dict():
                return "{" + ", ".join(f"{k!r}: {self.value(x)}" for k, x in v.items()) + "}"
            case TensorType() | TupleType():
                return f"type({type_text(v)!r})"
            case None | bool() | int() | float() | str():
                return repr(v)
        if is_dataclass(v) and type(v).__name__ in READABLE:
            return f"{type(v).__name__}({', '.join(self.fields(v))})"
        raise TextProblem(f"no text for {type(v).__name__}")

    def fields(self, v: Any) -> Iterable[str]:
        """The fields that are not their defaults; places in the source are left out."""
        for f in fields(v):
            x = getattr(v, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if not isinstance(x, Span) and ((f.default is MISSING and f.default_factory is MISSING) or x != default):
                yield f"{f.name}={self.value(x)}"


def ids(values: Iterable[int]) -> str:
    return ", ".join(f"%{i}" for i in values)


def type_text(t: Type) -> str:
    return f"({'; '.join(map(type_text, t.items))})" if isinstance(t, TupleType) else str(t)


# ---- parsing ------------------------------------------------------------------------------------


def parse_region(text: str, laws: Mapping[str, Distribution] | None = None) -> Region:
    """The last region of a text. `laws`: distributions that are not among the named ones."""
    found = _Parser(text, laws).run()
    if not isinstance(found, Region):
        raise TextProblem("the text ends with a program")
    return found


def parse_program(text: str, laws: Mapping[str, Distribution] | None = None) -> Program:
    """The last program of a text."""
    found = _Parser(text, laws).run()
    if not isinstance(found, Program):
        raise TextProblem("the text ends with a region")
    return found


REGION = re.compile(r"region (\d+) (\w+) ('[^']*'|\"[^\"]*\")(?: \{(.*)\})?", re.DOTALL)
PROGRAM = re.compile(r"program (\d+) ('[^']*') of region (\d+)(?: \{(.*)\})?")
NODE = re.compile(r"%(\d+) (.+?) = (\w+)(?:\(([%\d, ]+)\))?(?: \{(.*)\})?( '[^']*'| \"[^\"]*\")?( fixed)?")
ENTRY = re.compile(r"(child|program|rule) ('[^']*'|\"[^\"]*\") (.*)")
TYPE = re.compile(r"(R|Int|Bool)(?:\[(.*)\])?")


class _Parser:
    def __init__(self, text: str, laws: Mapping[str, Distribution] | None):
        self.lines = text.split("\n")
        self.laws = {**DISTRIBUTIONS, **(laws or {})}
        self.regions: dict[int, Region] = {}
        self.programs: dict[int, Program] = {}
        self.last: Region | Program | None = None

    def run(self) -> Region | Program:
        for number, line in enumerate(self.lines, 1):
            try:
                self.line(line)
            except (TextProblem, KeyError, ValueError, SyntaxError, TypeError) as e:
                raise TextProblem(f"line {number}: {e}") from None
        if self.last is None:
            raise TextProblem("the text is empty")
        return self.last

    def line(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("  "):
            self.header(line)
            return
        assert self.last is not None
        body = line[2:]
        if body.startswith("%"):
            self.node(self.last.graph, body)
        elif m := ENTRY.fullmatch(body):
            target = {"child": "children", "program": "programs", "rule": "rules"}[m[1]]
            getattr(self.last, target)[ast.literal_eval(m[2])] = self.value(m[3])
        else:
            word, _, rest = body.partition(" ")
            if word in LISTED:
                getattr(self.last, word).append(self.value(rest))
            elif word in ("inputs", "context", "outputs"):
                setattr(self.last, word, [int(i.strip()[1:]) for i in rest.split(",")])
            else:
                raise TextProblem(f"what is `{word}`?")

    def header(self, line: str) -> None:
        if m := REGION.fullmatch(line):
            region = Region(ast.literal_eval(m[3]), m[2], Graph())
            for k, v in self.keywords(m[4]).items():
                setattr(region, k, v)
            self.regions[int(m[1])] = self.last = region
        elif m := PROGRAM.fullmatch(line):
            program = Program(ast.literal_eval(m[2]), self.regions[int(m[3])], Graph(), **self.keywords(m[4]))
            self.programs[int(m[1])] = self.last = program
        else:
            raise TextProblem("a region or a program begins here")

    def node(self, graph: Graph, line: str) -> None:
        m = NODE.fullmatch(line)
        if m is None or int(m[1]) != len(graph):
            raise TextProblem("this is no node, or not the next one")
        inputs = tuple(int(i.strip()[1:]) for i in m[4].split(",")) if m[4] else ()
        label = ast.literal_eval(m[6].strip()) if m[6] else None
        graph.add(m[3], inputs, type_of(m[2]), self.keywords(m[5]), label=label, batched=m[7] is None)

    def keywords(self, text: str | None) -> dict[str, Any]:
        if not text:
            return {}
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        return {k.arg or "": self.read(k.value) for k in call.keywords}

    def value(self, text: str) -> Any:
        return self.read(ast.parse(text, mode="eval").body)

    def read(self, e: ast.expr) -> Any:
        """A value from its expression: literals and the few named forms, nothing else."""
        match e:
            case ast.Constant():
                return e.value
            case ast.UnaryOp(op=ast.USub()):
                return -self.read(e.operand)
            case ast.Name(id="inf"):
                return inf
            case ast.Name(id="nan"):
                return float("nan")
            case ast.Tuple():
                return tuple(self.read(x) for x in e.elts)
            case ast.List():
                return [self.read(x) for x in e.elts]
            case ast.Dict():
                return {self.read(k): self.read(v) for k, v in zip(e.keys, e.values, strict=True) if k is not None}
            case ast.Call(func=ast.Name(id=name)):
                return self.made(
                    name, [self.read(x) for x in e.args], {k.arg or "": self.read(k.value) for k in e.keywords}
                )
        raise TextProblem(f"`{ast.unparse(e)}` is no value")

    def made(self, name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        match name:
            case "region":
                return self.regions[args[0]]
            case "program":
                return self.programs[args[0]]
            case "law":
                return self.laws[args[0]]
            case "type":
                return type_of(args[0])
        if name not in READABLE:
            raise TextProblem(f"`{name}` is no kind of value")
        return READABLE[name](*args, **keywords)


def type_of(text: str) -> Type:
    if text.startswith("("):
        items = text[1:-1].split("; ") if text != "()" else []
        return TupleType(tuple(t for t in map(type_of, items) if isinstance(t, TensorType)))
    m = TYPE.fullmatch(text)
    if m is None:
        raise TextProblem(f"`{text}` is no type")
    axes = []
    for part in m[2].split(", ") if m[2] else ():
        name, _, size = part.rpartition(" = ")
        axes.append(Axis(name, int(size)))
    return TensorType(tuple(axes), {v: k for k, v in HEADS.items()}[m[1]])


# ---- comparing ----------------------------------------------------------------------------------


def same_nodes(a: Graph, b: Graph) -> bool:
    """Equal node by node, places in the source and what attributes refer to aside."""

    def key(n: Node) -> tuple[Any, ...]:
        plain = {k: v for k, v in n.attrs.items() if not isinstance(v, Region | Program)}
        return (n.id, n.op, n.inputs, n.type, plain, n.label, n.batched)

    return len(a) == len(b) and all(key(x) == key(y) for x, y in zip(a, b, strict=True))


__all__ = [
    "TextProblem", "parse_program", "parse_region", "print_program", "print_region", "readable", "same_nodes",
]  # fmt: skip
