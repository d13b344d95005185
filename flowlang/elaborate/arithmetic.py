"""Bodies evaluated over any algebra: exact ratios (tableaus), sympy expressions (paths), power series (step rules).

Only arithmetic, local names, `def`, static choice, lists, loops over them and known functions are understood; everything else
raises `NotPlain` with its place, and the caller says what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowlang import limits
from flowlang.source import Span
from flowlang.syntax import tree

DEPTH = 64
MOST_ROUNDS = 4096  # of all loops of a body


def number_above(value: Any, limit: int) -> bool:
    """Whether a value is a number, exact or not, of a size beyond a limit."""
    try:
        return bool(abs(value) > limit)
    except TypeError:  # a formula
        return False


class NotPlain(Exception):
    """A construct that is not plain arithmetic."""

    def __init__(self, span: Span, what: str):
        super().__init__(what)
        self.span, self.what = span, what


@dataclass(frozen=True)
class Algebra:
    """How numbers are made, and the functions and constants by name. Values support + - * / ** among themselves."""

    number: Callable[[tree.Number], Any]
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class LocalFunction:
    declaration: tree.Declaration


class Evaluator:
    """One body; `names` holds what its parameters stand for."""

    def __init__(self, algebra: Algebra, names: Mapping[str, Any]):
        self.algebra = algebra
        self.names = dict(names)
        self.depth = 0
        self.rounds = 0

    # ---- statements -----------------------------------------------------------------------------

    def run(self, statements: tuple[tree.Statement, ...]) -> Any:
        """The value of the last expression, named or not; None for a body without one."""
        result: Any = None
        for s in statements:
            match s:
                case tree.Bind(op="=" | ":="):
                    result = self.bind(s)
                case tree.ExprStatement():
                    values = [self.ev(e) for e in s.values]
                    result = values[0] if len(values) == 1 else tuple(values)
                case tree.Declaration(kind="def"):
                    self.names[s.name] = LocalFunction(s)
                case tree.If():
                    chosen = self.run(s.then if self.truth(s.condition) else s.orelse)
                    result = chosen if chosen is not None else result
                case tree.For() if s.until is None and len(s.names) == 1:
                    for item in self.items(s.iterable):
                        self.names[s.names[0]] = item
                        self.run(s.body)
                case tree.Require():
                    pass
                case _:
                    raise NotPlain(s.span, "this statement")
        return result

    def items(self, e: tree.Expr) -> list[Any]:
        """What a loop goes over: a list, or the whole numbers of a range."""
        found = list(range(*self.ends(e, None))) if isinstance(e, tree.Range) else self.ev(e)
        if not isinstance(found, list):
            raise NotPlain(e.span, "a loop over this")
        self.rounds += len(found)
        if self.rounds > MOST_ROUNDS:
            raise NotPlain(e.span, "so long a loop")
        return found

    def ends(self, e: tree.Range, size: int | None) -> tuple[int, int]:
        stop = size if e.stop is None else self.whole(e.stop)
        if stop is None:
            raise NotPlain(e.span, "a range without an end")
        return 0 if e.start is None else self.whole(e.start), stop

    def whole(self, e: tree.Expr) -> int:
        found = self.value(e)
        try:
            if int(found) == found:
                return int(found)
        except (TypeError, ValueError):
            pass
        raise NotPlain(e.span, "a number that is not whole")

    def bind(self, s: tree.Bind) -> Any:
        if any(t.index for t in s.targets):
            raise NotPlain(s.span, "assignment to a part")
        values = [self.ev(e) for e in s.values]
        if len(values) == 1 and len(s.targets) > 1 and isinstance(values[0], tuple):
            values = list(values[0])
        if len(values) != len(s.targets):
            raise NotPlain(s.span, f"{len(s.targets)} names for {len(values)} values")
        for t, v in zip(s.targets, values, strict=True):
            self.names[t.name] = v
        return values[0] if len(values) == 1 else tuple(values)

    # ---- expressions ----------------------------------------------------------------------------

    def ev(self, e: tree.Expr) -> Any:
        self.depth += 1
        try:
            if self.depth > DEPTH * 4:
                raise NotPlain(e.span, "so deep an expression")
            return self._ev(e)
        finally:
            self.depth -= 1

    def _ev(self, e: tree.Expr) -> Any:
        match e:
            case tree.Number():
                return self.algebra.number(e)
            case tree.Name():
                if e.id in self.names:
                    return self.names[e.id]
                if e.id in self.algebra.constants:
                    return self.algebra.constants[e.id]
                raise NotPlain(e.span, f"`{e.id}`")
            case tree.Unary(op="-"):
                return -self.value(e.operand)
            case tree.Unary(op="not"):
                return not self.truth(e.operand)
            case tree.Binary(op="|>"):
                return self.apply(e.right, [self.ev(e.left)], e.span)
            case tree.Binary():
                return self.binary(e)
            case tree.Paren(items=items) if len(items) == 1 and items[0].left is not None and items[0].eq is None:
                return self.ev(items[0].left)
            case tree.Paren(items=items) if all(i.left is not None and i.eq is None for i in items):
                return tuple(self.ev(i.left) for i in items if i.left is not None)
            case tree.ListExpr():
                return [self.ev(i) for i in e.items]
            case tree.Comprehension() if len(e.names) == 1:
                return self.comprehension(e)
            case tree.Brackets(items=items) if len(items) == 1 and items[0].left is not None and items[0].eq is None:
                return self.index(e, items[0].left)
            case tree.Call(fn=tree.Name(id="size"), items=items) if len(items) == 1 and items[0].left is not None:
                return len(self.listed(items[0].left))
            case tree.Call(fn=fn, items=items):
                if any(i.left is None or i.eq is not None or i.arrow is not None for i in items):
                    raise NotPlain(e.span, "a keyword argument")
                return self.apply(fn, [self.ev(i.left) for i in items if i.left is not None], e.span)
        raise NotPlain(e.span, "this expression")

    def comprehension(self, e: tree.Comprehension) -> list[Any]:
        saved, out = dict(self.names), []
        for item in self.items(e.iterable):
            self.names[e.names[0]] = item
            if e.condition is None or self.truth(e.condition):
                out.append(self.ev(e.value))
        self.names = saved
        return out

    def listed(self, e: tree.Expr) -> list[Any]:
        found = self.ev(e)
        if not isinstance(found, list):
            raise NotPlain(e.span, "this, which is no list,")
        return found

    def index(self, e: tree.Brackets, at: tree.Expr) -> Any:
        values = self.listed(e.value)
        if isinstance(at, tree.Range):
            return values[slice(*self.ends(at, len(values)))]
        k = self.whole(at)
        if not -len(values) <= k < len(values):
            raise NotPlain(at.span, "an index outside the list")
        return values[k]

    def value(self, e: tree.Expr) -> Any:
        found = self.ev(e)
        if isinstance(found, tuple | LocalFunction) or found is None or is_truth(found):
            raise NotPlain(e.span, "this value")
        return found

    def binary(self, e: tree.Binary) -> Any:
        if e.op in ("and", "or"):
            a, b = self.truth(e.left), self.truth(e.right)
            return (a and b) if e.op == "and" else (a or b)
        a, b = self.value(e.left), self.value(e.right)
        try:
            match e.op:
                case "+":
                    return a + b
                case "-":
                    return a - b
                case "*":
                    return a * b
                case "/":
                    return a / b
                case "^":
                    if number_above(b, limits.EXACT_POWER) or number_above(a, limits.INTEGER):
                        raise NotPlain(e.span, "a power this high")
                    return a**b
                case "==":
                    return a == b
                case "!=":
                    return a != b
                case "<":
                    return a < b
                case "<=":
                    return a <= b
                case ">":
                    return a > b
                case ">=":
                    return a >= b
        except ZeroDivisionError:
            raise NotPlain(e.span, "division by zero") from None
        except (TypeError, OverflowError, ValueError):
            raise NotPlain(e.span, f"`{e.op}` between these") from None
        raise NotPlain(e.span, f"`{e.op}`")

    def truth(self, e: tree.Expr) -> bool:
        found = self.ev(e)
        if not isinstance(found, bool):
            raise NotPlain(e.span, "a choice that is not static")
        return found

    def apply(self, fn: tree.Expr, arguments: list[Any], span: Span) -> Any:
        if not isinstance(fn, tree.Name):
            raise NotPlain(fn.span, "this call")
        found = self.names.get(fn.id)
        if isinstance(found, LocalFunction):
            return self.call_local(found.declaration, arguments, span)
        if callable(found):
            try:
                return found(*arguments)
            except TypeError:
                raise NotPlain(span, f"`{fn.id}` of {len(arguments)} arguments") from None
        function = self.algebra.functions.get(fn.id)
        if function is None or found is not None:
            raise NotPlain(fn.span, f"`{fn.id}`")
        if any(map(is_truth, arguments[fn.id == "where" :])):
            raise NotPlain(span, f"`{fn.id}` of a truth value")
        try:
            return function(*arguments)
        except TypeError:
            raise NotPlain(span, f"`{fn.id}` of {len(arguments)} arguments") from None

    def call_local(self, declaration: tree.Declaration, arguments: list[Any], span: Span) -> Any:
        names = [p.name for ps in declaration.parameters for p in ps]
        if len(names) != len(arguments):
            raise NotPlain(span, f"`{declaration.name}` of {len(arguments)} arguments")
        self.depth += 4
        if self.depth > DEPTH * 4:
            raise NotPlain(span, "so deep a call")
        saved = self.names
        self.names = {**saved, **dict(zip(names, arguments, strict=True))}
        try:
            return self.run(declaration.body or ())
        finally:
            self.names = saved
            self.depth -= 4


def is_truth(value: Any) -> bool:
    """Whether a value is true or false, or a comparison of symbols that is left open."""
    return isinstance(value, bool) or any(getattr(value, kind, False) for kind in ("is_Boolean", "is_Relational"))


def static_names(algebra: Algebra, declaration: tree.Declaration, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the static parameters: those given, then defaults that are plain; others stay out."""
    out: dict[str, Any] = {}
    for ps in declaration.parameters:
        for p in ps:
            if p.name in given:
                out[p.name] = given[p.name]
            elif p.default is not None:
                try:
                    out[p.name] = Evaluator(algebra, out).ev(p.default)
                except NotPlain:
                    continue
    return out


def claims(declaration: tree.Declaration) -> Iterator[tree.Expr]:
    """The conditions that a body requires, one by one."""
    for s in declaration.body or ():
        if isinstance(s, tree.Require):
            yield from conjuncts(s.condition)


def conjuncts(e: tree.Expr) -> Iterator[tree.Expr]:
    if isinstance(e, tree.Binary) and e.op == "and":
        yield from conjuncts(e.left)
        yield from conjuncts(e.right)
    elif isinstance(e, tree.Paren) and len(e.items) == 1 and e.items[0].left is not None:
        yield from conjuncts(e.items[0].left)
    else:
        yield e
