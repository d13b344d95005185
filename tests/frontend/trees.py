"""Hypothesis strategies for syntax trees that the grammar can produce (spans are dummies: they do not compare)."""

from __future__ import annotations

from typing import TypeVar

from hypothesis import strategies as st

from flowlang.source import Source, Span
from flowlang.syntax import tree
from flowlang.syntax.lexing import HARD

T = TypeVar("T")
SOURCE = Source.of("generated", "")
AT = Span(SOURCE, 0, 0)

# Kind words, soft words and axes with primes are names like others.
PLAIN = ["x", "y", "h", "D", "C", "B", "a_1", "γ", "β2", "net", "path", "solver", "flow", "norm", "data", "given", "state",
         "param", "base", "emit", "def", "scan", "require", "import", "tableau", "reverse", "edition", "exp", "normal"]  # fmt: skip
names = st.sampled_from(PLAIN)
axes = st.sampled_from(["D", "C", "H", "T", "D'", "C''", "k"])
texts = st.text(
    st.characters(codec="utf-8", exclude_characters='"\n\r', exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"]),
    max_size=6,
)


def short(strategy: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """The same strategy under a short name: hypothesis prints strategies, and warns where that grows long."""

    @st.composite
    def one(draw: st.DrawFn) -> T:
        return draw(strategy)

    return one()


def numbers() -> st.SearchStrategy[tree.Number]:
    ints = st.integers(0, 2**63 - 1).map(lambda v: tree.Number(str(v), v, span=AT))
    grouped = st.integers(1000, 10**9).map(lambda v: tree.Number(f"{v:_}", v, span=AT))
    reals = st.floats(0, 1e300, allow_nan=False, allow_subnormal=False).map(
        lambda v: tree.Number(repr(v).replace("+", ""), float(repr(v)), span=AT)
    )
    return st.one_of(ints, grouped, reals)


def name(id: str) -> tree.Name:
    return tree.Name(id, span=AT)


def leaves() -> st.SearchStrategy[tree.Expr]:
    return st.one_of(names.map(name), axes.map(name), numbers(), texts.map(lambda t: tree.String(t, span=AT)))


LEVEL = {"|>": 1, "or": 2, "and": 3, "==": 5, "!=": 5, "<": 5, "<=": 5, ">": 5, ">=": 5, "+": 6, "-": 6, "*": 7, "/": 7}


def level(e: tree.Expr) -> int:
    match e:
        case tree.Binary(op="^"):
            return 9
        case tree.Binary():
            return LEVEL[e.op]
        case tree.Unary(op="not"):
            return 4
        case tree.Unary():
            return 8
    return 10


def paren(e: tree.Expr) -> tree.Expr:
    return tree.Paren((tree.Item(e, span=AT),), span=AT)


def at_least(e: tree.Expr, least: int) -> tree.Expr:
    """The expression as it may stand there: trees hold the parentheses that their text needs."""
    return e if level(e) >= least else paren(e)


def left_of(e: tree.Expr, op: str) -> tree.Expr:
    # One rule makes a chain of one level: `a == b < c` leans left, and so does `a + b - c`.
    return at_least(e, LEVEL[op])


@st.composite
def binary(draw: st.DrawFn, inner: st.SearchStrategy[tree.Expr]) -> tree.Expr:
    op = draw(st.sampled_from(sorted(LEVEL)))
    return tree.Binary(op, left_of(draw(inner), op), at_least(draw(inner), LEVEL[op] + 1), span=AT)


def values(inner: st.SearchStrategy[tree.Expr]) -> st.SearchStrategy[tree.Expr]:
    """What may stand in an item: an expression, a range, or `..`."""
    ranges = st.one_of(
        st.builds(lambda a, b: tree.Range(a, b, span=AT), inner, st.none() | inner),
        inner.map(lambda b: tree.Range(None, b, span=AT)),
        st.just(tree.Ellipsis(span=AT)),
    )
    return st.one_of(inner, inner, ranges)


def items(inner: st.SearchStrategy[tree.Expr]) -> st.SearchStrategy[tuple[tree.Item, ...]]:
    v = values(inner)
    typed = inner.map(lambda e: at_least(e, 10))
    one = st.one_of(
        v.map(lambda a: tree.Item(a, span=AT)),
        st.builds(lambda a, t: tree.Item(a, type=t, span=AT), v, typed),
        st.builds(lambda a, b, c: tree.Item(a, b, c, span=AT), v, v, st.none() | v),
        st.builds(lambda a, b, t: tree.Item(a, b, type=t, span=AT), v, v, typed),
        st.builds(lambda a, b, c: tree.Item(a, None, b, c, span=AT), v, v, st.none() | v),
        st.builds(lambda b, c: tree.Item(None, None, b, c, span=AT), v, st.none() | v),
    )
    return st.lists(one, max_size=3).map(tuple)


def extend(inner: st.SearchStrategy[tree.Expr]) -> st.SearchStrategy[tree.Expr]:
    tight = inner.map(lambda e: at_least(e, 10))
    bound = st.lists(names, min_size=1, max_size=2).map(tuple)
    return st.one_of(
        binary(inner),
        binary(inner),
        st.builds(lambda a, b: tree.Binary("^", at_least(a, 10), at_least(b, 8), span=AT), inner, inner),
        inner.map(lambda e: tree.Unary("-", at_least(e, 8), span=AT)),
        inner.map(lambda e: tree.Unary("not", at_least(e, 4), span=AT)),
        st.builds(lambda e, n: tree.Attribute(e, n, span=AT), tight, names),
        st.builds(lambda e, i: tree.Call(e, i, span=AT), tight, items(inner)),
        st.builds(lambda e, i: tree.Brackets(e, i, span=AT), tight, items(inner)),
        tight.map(lambda e: tree.Optional(e, span=AT)),
        items(inner).map(lambda i: tree.Paren(i, span=AT)),
        st.lists(inner, max_size=3).map(lambda v: tree.ListExpr(tuple(v), span=AT)),
        st.builds(
            lambda e, n, i, c: tree.Comprehension(e, n, i, c, span=AT), inner, bound, values(inner), st.none() | inner
        ),
    )


expressions = short(st.recursive(leaves(), extend, max_leaves=8))
types = short(expressions.map(lambda e: at_least(e, 10)))


# ---- statements and files -----------------------------------------------------------------------


def begins_well(e: tree.Expr) -> bool:
    """Whether a statement may begin with this expression: not with a word that begins another statement."""
    while True:
        match e:
            case tree.Binary():
                e = e.left
            case tree.Attribute() | tree.Brackets():
                e = e.value
            case tree.Call():
                e = e.fn
            case tree.Optional():
                e = e.type
            case _:
                return True


def targets() -> st.SearchStrategy[tree.Target]:
    return st.builds(
        lambda n, i, t: tree.Target(n, i, t, span=AT),
        names, st.just(()) | items(leaves()).filter(bool), st.none() | types,
    )  # fmt: skip


def typed_result(e: tree.Expr, t: tree.Expr) -> tree.Expr:
    return tree.Paren((tree.Item(e, type=t, span=AT),), span=AT)


def simple_statements() -> st.SearchStrategy[tree.Statement]:
    bind = st.builds(
        lambda ts, op, vs: tree.Bind(tuple(ts), op, tuple(vs), span=AT),
        st.lists(targets(), min_size=1, max_size=3), st.sampled_from(["=", ":=", "~"]),
        st.lists(expressions, min_size=1, max_size=2),
    )  # fmt: skip
    plain = st.lists(
        expressions.filter(begins_well) | st.builds(typed_result, expressions, types), min_size=1, max_size=2
    )
    entry = st.builds(
        lambda n, t, op, v: tree.Entry(n, t, op if v is not None else None, v, span=AT),
        names, st.none() | types, st.sampled_from(["=", "~"]), st.none() | expressions,
    )  # fmt: skip
    return st.one_of(
        bind,
        plain.map(lambda v: tree.ExprStatement(tuple(v), span=AT)),
        st.builds(
            lambda w, es: tree.Declare(w, tuple(es), span=AT),
            st.sampled_from(["param", "state", "data", "given"]), st.lists(entry, min_size=1, max_size=2),
        ),
        st.lists(named_first, min_size=1, max_size=3).map(lambda e: tree.Base(tuple(e), span=AT)),
        st.builds(lambda a, b: tree.Emit(a, b, span=AT), named_first, expressions),
        named_first.map(lambda e: tree.Require(e, span=AT)),
    )  # fmt: skip


# `base`, `emit` and `require` are words where a name or a number follows.
named_first = st.one_of(
    names.map(name),
    numbers(),
    st.builds(lambda n, i: tree.Call(name(n), i, span=AT), names, items(leaves())),
    st.builds(lambda n, e: tree.Binary("==", name(n), at_least(e, 6), span=AT), names, expressions),
)


def compound(inner: st.SearchStrategy[tree.Statement]) -> st.SearchStrategy[tree.Statement]:
    body = st.lists(inner, max_size=3).map(tuple)
    some = st.lists(inner, min_size=1, max_size=2).map(tuple)
    bound = st.lists(names, min_size=1, max_size=2).map(tuple)
    return st.one_of(
        st.builds(lambda c, a, b: tree.If(c, a, b, span=AT), expressions, body, st.just(()) | some),
        st.builds(lambda n, u, b: tree.Repeat(n, u, b, span=AT), expressions, st.none() | expressions, body),
        st.builds(
            lambda n, i, u, b: tree.For(n, i, u, b, span=AT), bound, values(expressions), st.none() | expressions, body
        ),
        st.builds(lambda a, r, b: tree.Scan(a, r, b, span=AT), st.sampled_from(["T", "D", "B"]), st.booleans(), body),
        st.builds(
            lambda n, p, b: tree.Declaration("def", n, p, (), b, span=AT), names, parameter_lists(), body
        ),
    )  # fmt: skip


def parameter_lists() -> st.SearchStrategy[tuple[tuple[tree.Parameter, ...], ...]]:
    plain = st.builds(
        lambda n, t, d, v, g: tree.Parameter(n, t, d, v, g, span=AT),
        names.filter(lambda n: n != "given"), st.none() | types, st.none() | expressions, st.booleans(), st.booleans(),
    )  # fmt: skip
    one = st.lists(plain, max_size=3).map(lambda ps: tuple(sorted(ps, key=lambda p: p.given)))
    return st.lists(one, max_size=2).map(tuple)


statements = short(st.recursive(short(simple_statements()), compound, max_leaves=5))


def cells() -> st.SearchStrategy[tree.Cell]:
    ratio = st.one_of(
        names.map(name), numbers(), expressions.filter(lambda e: not isinstance(e, tree.Name | tree.Number))
    )
    return st.builds(lambda n, a, b: tree.Cell(n, a, b, span=AT), st.booleans(), ratio, st.none() | ratio)


tableaus = st.lists(
    st.builds(lambda h, c: tree.Row(h, tuple(c), span=AT), st.none() | cells(), st.lists(cells(), max_size=3)),
    max_size=3,
).map(lambda rows: tree.Tableau(tuple(rows), span=AT))

results = st.lists(
    st.builds(lambda n, t: tree.Result(n, t, span=AT), st.none() | names, types), max_size=2
).map(tuple)  # fmt: skip

declarations = short(st.one_of(
    st.builds(
        lambda k, n, p, r, b: tree.Declaration(k, n, p, r, tuple(b), span=AT),
        st.sampled_from(["bijector", "net", "flow", "solver"]), names, parameter_lists(), results,
        st.lists(statements | tableaus, max_size=3),
    ),
    st.builds(
        lambda k, n, e: tree.Declaration(k, n, alias=e, span=AT), st.sampled_from(["const", "bijector"]), names, expressions
    ),
))  # fmt: skip

imports = st.builds(
    lambda p, n: tree.Import(tuple(p), tuple(n), span=AT),
    st.lists(names, min_size=1, max_size=3),
    st.lists(names, max_size=2),
)

modules = st.builds(
    lambda e, i: tree.Module(SOURCE, e, tuple(i), span=AT),
    st.none() | st.just(1),
    st.lists(st.one_of(declarations, imports, named_first.map(lambda e: tree.Require(e, span=AT))), max_size=3),
)

__all__ = ["HARD", "declarations", "expressions", "modules", "statements"]
