"""The syntax tree. Spans are exact and do not take part in comparison.

Two trees are equal when they mean the same text but for layout and comments; the formatter relies
on this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flowlang.source import Source, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    span: Span = field(compare=False, repr=False)


# ---- expressions (types are expressions too) ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Name(Node):
    """`x`, `γ`, `C'`: the identifier in NFKC form, primes included."""

    id: str


@dataclass(frozen=True, slots=True)
class Number(Node):
    """A literal as written (`64`, `1e-5`, `460_142_784`); `value` is int or float."""

    text: str
    value: int | float


@dataclass(frozen=True, slots=True)
class String(Node):
    value: str


@dataclass(frozen=True, slots=True)
class Ellipsis(Node):
    """`..` standing alone: the remaining axes."""


@dataclass(frozen=True, slots=True)
class Range(Node):
    """`a..b`, `a..`, `..b`."""

    start: Expr | None
    stop: Expr | None


@dataclass(frozen=True, slots=True)
class Unary(Node):
    op: Literal["-", "not"]
    operand: Expr


@dataclass(frozen=True, slots=True)
class Binary(Node):
    """`+ - * / ^`, comparisons (`== != < <= > >=`), `and`, `or`, `|>`; all binary."""

    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class Attribute(Node):
    value: Expr
    name: str


@dataclass(frozen=True, slots=True)
class Item(Node):
    """One entry of a call, of brackets or of a tuple: `left = eq -> arrow = arrow_eq`.

    `f(bins = 8)`: left `bins`, eq `8`. `x[T = 0]` likewise. `linear[D -> E = 64]`: left `D`, arrow `E`,
    arrow_eq `64`. `linear[-> E]`: left None. `integrate(.., t = 1 -> 0)`: left `t`, eq `1`, arrow `0`.
    `x[T = 1..]` has a Range as eq. A plain value is `left` alone. `type` is the written type of
    `(value : T)`.
    """

    left: Expr | None
    eq: Expr | None = None
    arrow: Expr | None = None
    arrow_eq: Expr | None = None
    type: Expr | None = None


@dataclass(frozen=True, slots=True)
class Call(Node):
    fn: Expr
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Brackets(Node):
    """`value[items]`: rename, split, merge, slice, gather, or axes of a type or of an operator."""

    value: Expr
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Optional(Node):
    """A type with `?`."""

    type: Expr


@dataclass(frozen=True, slots=True)
class Paren(Node):
    """`(a)` with one plain item, `(a, b)`, `()`, `(h = 4, d)`, `(e : T)`."""

    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class ListExpr(Node):
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Comprehension(Node):
    """`[value for names in iterable if condition]`."""

    value: Expr
    names: tuple[str, ...]
    iterable: Expr
    condition: Expr | None


Expr = (
    Name
    | Number
    | String
    | Ellipsis
    | Range
    | Unary
    | Binary
    | Attribute
    | Call
    | Brackets
    | Optional
    | Paren
    | ListExpr
    | Comprehension
)


# ---- statements ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target(Node):
    """A name being bound: `x`, `x: T`, `x[T = i]`."""

    name: str
    index: tuple[Item, ...] = ()
    type: Expr | None = None


@dataclass(frozen=True, slots=True)
class Bind(Node):
    """`targets = values`, `targets := values`, `targets ~ value`. Several values: `a, b = b, a`."""

    targets: tuple[Target, ...]
    op: Literal["=", ":=", "~"]
    values: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class ExprStatement(Node):
    """An expression by itself; `values` has several for `a, b` (a result tuple)."""

    values: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Entry(Node):
    """One of `param γ: R[C] = 1,  β: R[C] ~ normal`; op and value are None when absent."""

    name: str
    type: Expr | None
    op: Literal["=", "~"] | None = None
    value: Expr | None = None


@dataclass(frozen=True, slots=True)
class Declare(Node):
    """`param`, `state`, `data`, `given` with their entries."""

    word: Literal["param", "state", "data", "given"]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Base(Node):
    values: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Emit(Node):
    value: Expr
    distribution: Expr


@dataclass(frozen=True, slots=True)
class Require(Node):
    condition: Expr


@dataclass(frozen=True, slots=True)
class Import(Node):
    """`import std.flows.coupling (a, b)`; no names means the last part is bound as a namespace."""

    path: tuple[str, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class If(Node):
    condition: Expr
    then: tuple[Statement, ...]
    orelse: tuple[Statement, ...] = ()


@dataclass(frozen=True, slots=True)
class Repeat(Node):
    count: Expr
    until: Expr | None
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class For(Node):
    names: tuple[str, ...]
    iterable: Expr
    until: Expr | None
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Scan(Node):
    axis: str
    reverse: bool
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Cell(Node):
    """A tableau cell: an exact ratio of two expressions, maybe negative."""

    negative: bool
    numerator: Expr
    denominator: Expr | None = None


@dataclass(frozen=True, slots=True)
class Row(Node):
    """One line of a tableau: `head | cells`."""

    head: Cell | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Tableau(Node):
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Invalid(Node):
    """A statement that does not parse; what is wrong was reported. `names` are those it would have bound."""

    names: tuple[str, ...]


# ---- declarations -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameter(Node):
    """`name: type = default`, `*name: type`, or a bare `name` (as in `path p (t, x0, x1)`)."""

    name: str
    type: Expr | None = None
    default: Expr | None = None
    variadic: bool = False
    given: bool = False  # stands after the word `given` in its list


@dataclass(frozen=True, slots=True)
class Result(Node):
    """A declared result: `a: R[T]` or `R[T]`; a bare word (`-> estimate`) is a type."""

    name: str | None
    type: Expr


@dataclass(frozen=True, slots=True)
class Declaration(Node):
    """`KIND name (..)(..) -> results { body }` or `KIND name = alias`; `def` inside bodies too."""

    kind: str
    name: str
    parameters: tuple[tuple[Parameter, ...], ...] = ()
    results: tuple[Result, ...] = ()
    body: tuple[Statement, ...] | None = None
    alias: Expr | None = None
    doc: str | None = field(default=None, compare=False)  # the `##` lines before it
    name_span: Span | None = field(default=None, compare=False, repr=False)


Statement = (
    Bind
    | ExprStatement
    | Declare
    | Base
    | Emit
    | Require
    | Import
    | If
    | Repeat
    | For
    | Scan
    | Tableau
    | Invalid
    | Declaration
)


@dataclass(frozen=True, slots=True)
class Module(Node):
    """A file: imports, `require` and declarations, in text order."""

    source: Source = field(compare=False, repr=False)
    edition: int | None
    items: tuple[Import | Require | Declaration, ...]
