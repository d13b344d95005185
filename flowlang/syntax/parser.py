"""Text to tree. Lark does the parsing; recovery is by item and by statement."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from flowlang import limits
from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.source import Source, Span
from flowlang.syntax import habits, tree
from flowlang.syntax.lexing import CLOSING, OPENING, Comment, items_of, shape
from flowlang.syntax.tables import Node, Token, engine, scan

EDITION = 1


@dataclass(frozen=True)
class Parsed:
    """A file's tree, the declarations that did not parse, and its comments."""

    module: tree.Module
    broken: frozenset[str]
    comments: tuple[Comment, ...]


IMPORTS = "as in `import std.flows.coupling (rqs_coupling)`, or `import nets.mine` for `nets/mine.flow` beside the spec"


def parse(source: Source, report: Report) -> Parsed:
    """The tree of a text. Every problem goes to `report`; nothing is raised."""
    if len(source.text) > limits.SOURCE_SIZE:
        report.add(
            Diagnostic("FL0901", f"a file of {len(source.text):,} characters exceeds the limit of {limits.SOURCE_SIZE:,}",
                       Span(source, 0, 0), suggestion="split it, and use `import`")
        )  # fmt: skip
        return Parsed(tree.Module(source, None, (), span=Span(source, 0, 0)), frozenset(), ())
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _Parser(source, report).run()
    finally:
        if enabled:
            gc.enable()


@lru_cache(maxsize=128)
def parse_library(source: Source) -> Parsed:
    """A file of the standard library, parsed once in a process. Trees are never changed, so runs may share them."""
    report = Report()
    parsed = parse(source, report)
    if not report.ok:
        raise FlowError(report.errors)
    return parsed


def parse_expression(text: str) -> tree.Expr:
    """One expression, for tests and tools; raises FlowError."""
    source = Source.of("expression", text)
    report = Report()
    shaped = shape(source, scan(text), top=False)
    report.extend(shaped.problems)
    parser = _Parser(source, report)
    found = parser.piece(shaped.tokens, "expr") if report.ok else None
    if found is None:
        raise FlowError(report.errors)
    return parser.expr(found)


class _Failure(Exception):
    def __init__(self, diagnostic: Diagnostic):
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


class _Parser:
    def __init__(self, source: Source, report: Report):
        self.source = source
        self.report = report
        self.broken: set[str] = set()
        self.hurt_spans: list[tuple[int, int]] = []

    def span(self, node: Any) -> Span:
        if isinstance(node, Node):
            return Span(self.source, max(node.start, 0), max(node.end, 0))
        return Span(self.source, node.start_pos, node.end_pos)

    # ---- files, items, recovery -----------------------------------------------------------------

    def run(self) -> Parsed:
        shaped = shape(self.source, scan(self.source.text))
        self.report.extend(shaped.problems)
        self.hurt_spans = shaped.broken_spans
        whole = Span(self.source, 0, len(self.source.text))
        items: list[Any] = []
        edition: int | None = None
        for k, tokens in enumerate(items_of(shaped.tokens)):
            found = self.item(tokens)
            if isinstance(found, str):
                edition = self.edition(found, tokens, k)
            elif found is not None:
                items.append(found)
        module = tree.Module(self.source, edition, tuple(items), span=whole)
        module = _with_docs(module, self.source, shaped.comments)
        return Parsed(module, frozenset(self.broken), tuple(shaped.comments))

    def edition(self, text: str, tokens: list[Any], k: int) -> int:
        where = Span(self.source, tokens[0].start_pos, tokens[-1].end_pos)
        if k:
            self.report.add(
                Diagnostic("FL0106", "`edition` stands on the first line", where, suggestion="move it to the top")
            )
        if text != str(EDITION):
            self.report.add(
                Diagnostic("FL0105", f"this FlowLang knows edition {EDITION}, and not {text}", where,
                           suggestion=f"write `edition {EDITION}`, or install a newer FlowLang")
            )  # fmt: skip
        return EDITION

    def hurt(self, tokens: list[Any]) -> bool:
        """Whether a problem was reported among these tokens: what they say is not to be trusted."""
        if not self.hurt_spans or not tokens:
            return False
        start, end = tokens[0].start_pos, tokens[-1].end_pos
        return any(s < end and e > start for s, e in self.hurt_spans)

    def mark_broken(self, tokens: list[Any]) -> None:
        if len(tokens) > 1 and tokens[0].type in ("KIND", "DEF"):
            self.broken.add(str(tokens[1]))

    def item(self, tokens: list[Any]) -> Any:
        """An item of a file; a declaration keeps the statements that are good. None where nothing can be kept."""
        failure: Diagnostic | None = None
        if tokens[0].type not in ("KIND", "IMPORT", "REQUIRE", "EDITION"):
            if not self.hurt(tokens):
                self.report.add(self.misplaced(tokens))
            return None
        if not self.hurt(tokens):
            try:
                return self.top(self.feed(tokens, "item"))
            except _Failure as e:
                failure = self.misplaced(tokens) if tokens[0].type == "IMPORT" else e.diagnostic
        found = self.recover(tokens, failure)
        if found is None:
            self.mark_broken(tokens)
        return found

    def misplaced(self, tokens: list[Any]) -> Diagnostic:
        where = Span(self.source, tokens[0].start_pos, tokens[0].end_pos)
        if tokens[0] == "import":
            return Diagnostic("FL0101", "an import names a file by dots, without folders above and without its ending",
                              Span(self.source, tokens[0].start_pos, tokens[-1].end_pos), suggestion=IMPORTS)  # fmt: skip
        return Diagnostic(
            "FL0106" if tokens[0].type == "NAME" else "FL0101",
            "a declaration is needed here", where,
            suggestion="a comment begins with `#`" if str(tokens[0]) == "/"
            else "a file holds imports, `require` and declarations, as in `flow name { .. }`",
        )  # fmt: skip

    def recover(self, tokens: list[Any], failure: Diagnostic | None) -> Any:
        """A declaration or compound statement that does not parse, or that a reported problem touches.

        Its head is parsed with empty blocks, and each statement of its blocks by itself, so that every mistake is
        reported once and the rest is kept. None where the head is at fault.
        """
        before = len(self.report)
        head, blocks = _blocks(tokens)
        found: Any = None
        if blocks and not any(self.hurt([t]) for t in head):
            try:
                top = tokens[0].type == "KIND"
                found = (self.top if top else self.statement)(self.feed(head, "item" if top else "statement"))
            except _Failure as e:
                self.report.add(e.diagnostic)
        bodies = [self.recover_block(b) for b in blocks]
        if failure is not None and len(self.report) == before:
            self.report.add(failure)
            return None
        if found is None:
            return None
        span = Span(self.source, tokens[0].start_pos, tokens[-1].end_pos)
        return replace(_refill(found, bodies), span=span)

    def recover_block(self, tokens: list[Any]) -> tuple[tree.Statement, ...]:
        return tuple(self.recover_statement(part) for part in items_of(tokens))

    def recover_statement(self, tokens: list[Any]) -> tree.Statement:
        failure: Diagnostic | None = None
        hurt = self.hurt(tokens)
        if not hurt:
            try:
                return self.statement(self.feed(tokens, "statement"))
            except _Failure as e:
                failure = e.diagnostic
        found: tree.Statement | None = None
        if tokens[0].type in ("IF", "REPEAT", "FOR", "SCAN", "DEF"):
            found = self.recover(tokens, failure)
        elif failure is not None:
            self.report.add(failure)
        if found is not None:
            return found
        return tree.Invalid(_names_bound(tokens), span=Span(self.source, tokens[0].start_pos, tokens[-1].end_pos))

    def piece(self, tokens: list[Any], start: str) -> Any:
        try:
            return self.feed(tokens, start)
        except _Failure as failure:
            self.report.add(failure.diagnostic)
            return None

    def feed(self, tokens: list[Any], start: str) -> Any:
        from lark.exceptions import UnexpectedInput

        parser = engine().parse_interactive(start=start)
        last = tokens[-1] if tokens else None
        at = last.end_pos if last is not None else 0
        k = 0
        try:
            for k, t in enumerate(tokens):  # noqa: B007 - k tells the token that failed
                parser.feed_token(t)
            k = len(tokens)
            return parser.feed_token(Token("$END", "", at, at))
        except UnexpectedInput as e:
            raise _Failure(self.unexpected(e, tokens, k)) from None

    def unexpected(self, e: Any, tokens: list[Any], k: int) -> Diagnostic:
        token, last = getattr(e, "token", None), tokens[-1] if tokens else None
        expected = set(getattr(e, "expected", ()) or ())
        habit = habits.advice(tokens, k)
        if token is None or token.type == "$END":
            at = last.end_pos if last is not None else 0
            where = Span(self.source, max(at - 1, 0), at)
            found = "here"
            message = f"the text ends where {_wanted(expected)} is needed"
            return Diagnostic("FL0101", message, where, suggestion=habit or _hint(expected, None))
        where = Span(self.source, token.start_pos, token.end_pos)
        found = "the end of the line" if token.type == "SEP" else f"`{token}`"
        if token.type == "SEP":
            where = Span(self.source, max(token.start_pos - 1, 0), token.start_pos)
        return Diagnostic(
            "FL0101",
            f"{found} stands where {_wanted(expected)} is needed",
            where,
            suggestion=habit or _hint(expected, token),
        )

    # ---- top level ------------------------------------------------------------------------------

    def top(self, node: Any) -> Any:
        match node.data:
            case "edition":
                return str(node.children[1])
            case "import_":
                return self.import_(node)
            case "require":
                return tree.Require(self.expr(node.children[1]), span=self.span(node))
            case "alias":
                kind, name, _, value = node.children
                return tree.Declaration(
                    str(kind), str(name), alias=self.expr(value), span=self.span(node), name_span=self.span(name)
                )
        return self.declaration(node)

    def import_(self, node: Any) -> tree.Import:
        path: list[str] = []
        names: list[str] = []
        inside = False
        for c in node.children[1:]:
            if c is None:
                continue
            if c.type == "LPAR":
                inside = True
            elif c.type == "NAME":
                (names if inside else path).append(str(c))
        return tree.Import(tuple(path), tuple(names), span=self.span(node))

    def declaration(self, node: Any) -> tree.Declaration:
        head, name = node.children[0], node.children[1]
        parameters: list[tuple[tree.Parameter, ...]] = []
        results: tuple[tree.Result, ...] = ()
        body: tuple[tree.Statement, ...] = ()
        for c in node.children[2:]:
            if not isinstance(c, Node):
                continue
            if c.data == "plist":
                parameters.append(self.plist(c))
            elif c.data == "results":
                results = tuple(self.result(r) for r in c.children if isinstance(r, Node))
            elif c.data == "block":
                body = self.block(c)
        return tree.Declaration(
            str(head), str(name), tuple(parameters), results, body, span=self.span(node), name_span=self.span(name)
        )

    def plist(self, node: Any) -> tuple[tree.Parameter, ...]:
        out: list[tree.Parameter] = []
        given = False
        for c in node.children:
            if c is None:
                continue
            if not isinstance(c, Node):
                given = given or c.type == "GIVEN"
                continue
            for p in c.children:
                if isinstance(p, Node):
                    out.append(self.param(p, given))
        return tuple(out)

    def param(self, node: Any, given: bool) -> tree.Parameter:
        name, type_, default, variadic = "", None, None, False
        after = ""
        for c in node.children:
            if c is None:
                continue
            if isinstance(c, Node):
                if after == "COLON":
                    type_ = self.expr(c)
                else:
                    default = self.expr(c)
            elif c.type == "STAR":
                variadic = True
            elif c.type == "NAME":
                name = str(c)
            else:
                after = c.type
        return tree.Parameter(name, type_, default, variadic, given, span=self.span(node))

    def result(self, node: Any) -> tree.Result:
        parts = [c for c in node.children if isinstance(c, Node)]
        if len(parts) == 2:
            name = parts[0]
            if name.data != "name":
                raise _Failure(
                    Diagnostic(
                        "FL0101", "a result's name is one word", self.span(name), suggestion="as in `-> y: R[D]`"
                    )
                )
            return tree.Result(str(name.children[0]), self.expr(parts[1]), span=self.span(node))
        return tree.Result(None, self.expr(parts[0]), span=self.span(node))

    # ---- statements -----------------------------------------------------------------------------

    def block(self, node: Any) -> tuple[tree.Statement, ...]:
        return tuple(self.statement(c) for c in node.children if isinstance(c, Node))

    def statement(self, node: Any) -> tree.Statement:
        span = self.span(node)
        parts = [c for c in node.children if c is not None]
        nodes = [c for c in parts if isinstance(c, Node)]
        match node.data:
            case "bind":
                return self.bind(node)
            case "declare":
                entries = tuple(self.entry(c) for c in nodes)
                return tree.Declare(str(parts[0]), entries, span=span)  # type: ignore[arg-type]
            case "base":
                return tree.Base(tuple(self.expr(n) for n in nodes), span=span)
            case "emit":
                return tree.Emit(self.expr(nodes[0]), self.expr(nodes[1]), span=span)
            case "require":
                return tree.Require(self.expr(nodes[0]), span=span)
            case "import_":
                return self.import_(node)
            case "def_":
                return self.declaration(node)
            case "if_":
                orelse: tuple[tree.Statement, ...] = ()
                if len(nodes) == 3:
                    orelse = self.block(nodes[2]) if nodes[2].data == "block" else (self.statement(nodes[2]),)
                return tree.If(self.expr(nodes[0]), self.block(nodes[1]), orelse, span=span)
            case "repeat":
                until = self.expr(nodes[1]) if len(nodes) == 3 else None
                return tree.Repeat(self.expr(nodes[0]), until, self.block(nodes[-1]), span=span)
            case "for_":
                names = tuple(str(c) for c in nodes[0].children if not isinstance(c, Node) and c.type == "NAME")
                until = self.expr(nodes[2]) if len(nodes) == 4 else None
                return tree.For(names, self.expr(nodes[1]), until, self.block(nodes[-1]), span=span)
            case "scan":
                words = [c for c in parts if not isinstance(c, Node)]
                return tree.Scan(str(words[-1]), len(words) == 3, self.block(nodes[0]), span=span)
            case "tableau":
                return tree.Tableau(tuple(self.row(c) for c in nodes), span=span)
        raise AssertionError(node.data)

    def entry(self, node: Any) -> tree.Entry:
        name, type_, op, value, after = "", None, None, None, ""
        for c in node.children:
            if c is None:
                continue
            if isinstance(c, Node):
                if after == "COLON":
                    type_ = self.expr(c)
                else:
                    value = self.expr(c)
                    op = "=" if after == "EQ" else "~"
            elif c.type == "NAME" and not after and not name:
                name = str(c)
            else:
                after = c.type
        return tree.Entry(name, type_, op, value, span=self.span(node))  # type: ignore[arg-type]

    def bind(self, node: Any) -> tree.Statement:
        span = self.span(node)
        elements = [c for c in node.children[0].children if isinstance(c, Node)]
        op = next((c for c in node.children[1:] if c is not None and not isinstance(c, Node)), None)
        if op is None:
            values = []
            for e in elements:
                inner = [c for c in e.children if isinstance(c, Node)]
                value = self.expr(inner[0])
                if len(inner) == 2:  # a typed value as a result
                    item = tree.Item(value, type=self.expr(inner[1]), span=self.span(e))
                    value = tree.Paren((item,), span=self.span(e))
                values.append(value)
            return tree.ExprStatement(tuple(values), span=span)
        exprs = node.children[-1]
        targets = tuple(self.target(e) for e in elements)
        values = [self.expr(c) for c in exprs.children if isinstance(c, Node)]
        return tree.Bind(targets, {"EQ": "=", "ASSIGN": ":=", "TILDE": "~"}[op.type], tuple(values), span=span)  # type: ignore[arg-type]

    def target(self, node: Any) -> tree.Target:
        inner = [c for c in node.children if isinstance(c, Node)]
        type_ = self.expr(inner[1]) if len(inner) == 2 else None
        name = inner[0]
        index: tuple[tree.Item, ...] = ()
        if name.data == "brackets":
            found = self.expr(name)
            assert isinstance(found, tree.Brackets)
            index = found.items
            name = name.children[0]
        if name.data != "name":
            raise _Failure(
                Diagnostic("FL0101", "only a name can be bound here", self.span(inner[0]),
                           suggestion="write `a, b = ..`, without brackets" if name.data == "paren"
                           else "write `name = value`; `==` compares")
            )  # fmt: skip
        return tree.Target(str(name.children[0]), index, type_, span=self.span(node))

    def row(self, node: Any) -> tree.Row:
        head: tree.Cell | None = None
        cells: list[tree.Cell] = []
        seen = False
        for c in node.children:
            if c is None:
                continue
            if not isinstance(c, Node):
                seen = True
            elif seen:
                cells.append(self.cell(c))
            else:
                head = self.cell(c)
        return tree.Row(head, tuple(cells), span=self.span(node))

    def cell(self, node: Any) -> tree.Cell:
        nodes = [c for c in node.children if isinstance(c, Node)]
        negative = any(c is not None and not isinstance(c, Node) and c.type == "MINUS" for c in node.children)
        return tree.Cell(
            negative, self.ratio(nodes[0]), self.ratio(nodes[1]) if len(nodes) > 1 else None, span=self.span(node)
        )

    def ratio(self, node: Any) -> tree.Expr:
        return self.expr(node.children[1]) if node.data == "group" else self.expr(node)

    # ---- expressions ----------------------------------------------------------------------------

    def expr(self, node: Any) -> tree.Expr:
        span = self.span(node)
        c = node.children
        match node.data:
            case "name":
                return tree.Name(str(c[0]), span=span)
            case "number":
                return self.number(c[0], span)
            case "string":
                return tree.String(str(c[0])[1:-1], span=span)
            case "left":
                value = self.expr(c[0])
                for k in range(1, len(c), 2):
                    right = self.expr(c[k + 1])
                    value = tree.Binary(str(c[k]), value, right, span=value.span.until(right.span))
                return value
            case "prefix":
                return tree.Unary("not" if str(c[0]) == "not" else "-", self.expr(c[1]), span=span)
            case "raised":
                return tree.Binary("^", self.expr(c[0]), self.expr(c[2]), span=span)
            case "attribute":
                return tree.Attribute(self.expr(c[0]), str(c[2]), span=span)
            case "call":
                return tree.Call(self.expr(c[0]), self.items(c[2]), span=span)
            case "brackets":
                return tree.Brackets(self.expr(c[0]), self.items(c[2]), span=span)
            case "optional":
                return tree.Optional(self.expr(c[0]), span=span)
            case "paren":
                return tree.Paren(self.items(c[1]), span=span)
            case "list_":
                return tree.ListExpr(tuple(self.expr(x) for x in c if isinstance(x, Node)), span=span)
            case "comprehension":
                nodes = [x for x in c if isinstance(x, Node)]
                names = tuple(str(x) for x in nodes[1].children if not isinstance(x, Node) and x.type == "NAME")
                condition = self.expr(nodes[3]) if len(nodes) > 3 else None
                return tree.Comprehension(self.expr(nodes[0]), names, self.expr(nodes[2]), condition, span=span)
            case "range":
                nodes = [x for x in c if isinstance(x, Node)]
                return tree.Range(self.expr(nodes[0]), self.expr(nodes[1]) if len(nodes) > 1 else None, span=span)
            case "range_to":
                nodes = [x for x in c if isinstance(x, Node)]
                return tree.Range(None, self.expr(nodes[0]), span=span) if nodes else tree.Ellipsis(span=span)
        raise AssertionError(node.data)

    def number(self, token: Any, span: Span) -> tree.Number:
        text = str(token)
        plain = text.replace("_", "")
        if any(x in plain for x in ".eE"):
            value: int | float = float(plain)
            digits = plain.lower().partition("e")[0]
            if value == float("inf") or (value == 0 and digits.strip("0.")):
                what, better = ("exceeds", "smaller") if value else ("is below", "larger")
                raise _Failure(
                    Diagnostic(
                        "FL0901", f"this number {what} the limit of a float", span, suggestion=f"write a {better} one"
                    )
                )
        else:
            if len(plain) > 20 or int(plain) > limits.INTEGER:
                raise _Failure(
                    Diagnostic(
                        "FL0901",
                        "this number exceeds the limit of 64 bits",
                        span,
                        suggestion="write it as a decimal, as in `1e30`",
                    )
                )
            value = int(plain)
        return tree.Number(text, value, span=span)

    def items(self, node: Any) -> tuple[tree.Item, ...]:
        if node is None or not isinstance(node, Node):
            return ()
        return tuple(self.one(c) for c in node.children if isinstance(c, Node))

    def one(self, node: Any) -> tree.Item:
        span = self.span(node)
        nodes = [self.expr(c) for c in node.children if isinstance(c, Node)]
        match node.data:
            case "item_eq":
                third = nodes[2] if len(nodes) > 2 else None
                if any(c is not None and not isinstance(c, Node) and c.type == "COLON" for c in node.children):
                    return tree.Item(nodes[0], nodes[1], type=third, span=span)
                return tree.Item(nodes[0], nodes[1], third, span=span)
            case "item_arrow":
                return tree.Item(nodes[0], None, nodes[1], nodes[2] if len(nodes) > 2 else None, span=span)
            case "item_into":
                return tree.Item(None, None, nodes[0], nodes[1] if len(nodes) > 1 else None, span=span)
        return tree.Item(nodes[0], type=nodes[1] if len(nodes) > 1 else None, span=span)


def _blocks(tokens: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """The tokens outside all braces, with the braces; and what stands in each pair."""
    head: list[Any] = []
    blocks: list[list[Any]] = []
    depth = 0
    for t in tokens:
        closes = t.type == "RBRACE"
        depth -= closes
        if depth == 0:
            head.append(t)
        else:
            blocks[-1].append(t)
        if t.type == "LBRACE":
            if depth == 0:
                blocks.append([])
            depth += 1
    return head, blocks


def _refill(node: Any, bodies: list[tuple[tree.Statement, ...]]) -> Any:
    """A compound statement or declaration with its bodies put back, in text order."""
    match node:
        case tree.If():
            then, *rest = bodies
            if len(node.orelse) == 1:  # an `else if`: its own blocks follow
                return replace(node, then=then, orelse=(_refill(node.orelse[0], rest),))
            return replace(node, then=then, orelse=rest[0] if rest else ())
        case tree.Declaration() if node.body is None:
            return node
    return replace(node, body=bodies[0])


def _names_bound(tokens: list[Any]) -> tuple[str, ...]:
    """Names that a statement which does not parse would have bound: uses of them are no second mistake."""
    found: dict[str, None] = {}
    after: str | None = None  # the next token that closes no bracket; none at the end
    for t in reversed(tokens):
        if t.type == "NAME" and after in (None, "EQ", "ASSIGN", "TILDE", "COLON", "COMMA", "LSQB"):
            found[str(t)] = None
        if t.type != "RPAR" or after is None:
            after = t.type
    if tokens[0].type == "DEF" and len(tokens) > 1:
        found[str(tokens[1])] = None
    return tuple(found)


WORDS = {
    "NAME": "a name", "NUMBER": "a number", "STRING": "a text", "LBRACE": "`{`", "RBRACE": "`}`", "LPAR": "`(`",
    "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "COMMA": "`,`", "EQ": "`=`", "COLON": "`:`", "ARROW": "`->`",
    "TILDE": "`~`", "BAR": "`|`", "IN": "`in`", "SEP": "the end of the statement", "$END": "the end of the statement",
    "KIND": "a declaration", "RANGE": "`..`",
}  # fmt: skip
VALUE_STARTS = {"NAME", "NUMBER", "STRING", "LPAR", "LSQB", "MINUS"}


def _wanted(expected: set[str]) -> str:
    if expected >= {"NAME", "NUMBER", "LPAR"}:
        return "a value" if "RBRACE" not in expected else "a statement"
    for first in ("RBRACE", "RPAR", "RSQB", "LBRACE", "IN", "BAR", "EQ", "COLON", "NAME"):
        if first in expected:
            known = [w for w in (first,) if w in WORDS]
            others = sorted(WORDS[w] for w in expected if w in WORDS and w not in (first, "SEP", "$END"))
            if len(others) <= 2:
                return " or ".join([*(WORDS[w] for w in known), *others])
            return WORDS[first]
    if "SEP" in expected or "$END" in expected:
        return "the end of the statement"
    return "something else"


def _hint(expected: set[str], token: Any) -> str | None:
    if token is not None and token.type == "ASSIGN":
        return "`:=` updates a name by itself on a line"
    if token is not None and str(token) == "=" and "CMP" in expected:
        return "`=` binds a name at the start of a statement; `==` compares"
    if "SEP" in expected or "$END" in expected:
        return "end the statement with a new line or `;`, or check for a missing operator or `,`"
    if token is None and "LBRACE" in expected:
        return habits.BRACES
    if expected & VALUE_STARTS:
        return "a name, a number or a bracket may stand here"
    return "check the brackets and signs before it"


def _with_docs(module: tree.Module, source: Source, comments: list[Comment]) -> tree.Module:
    """Attaches the `##` lines that stand directly before a declaration."""
    docs: dict[int, str] = {}
    lines = {source.position(c.start)[0]: c for c in comments if c.own_line and c.text.startswith("##")}
    if not lines:
        return module
    items: list[Any] = []
    for item in module.items:
        if isinstance(item, tree.Declaration):
            at = source.position(item.span.start)[0] - 1
            found: list[str] = []
            while at in lines:
                found.append(lines[at].text.lstrip("#").strip())
                at -= 1
            if found:
                doc = "\n".join(reversed(found))
                docs[item.span.start] = doc
                item = tree.Declaration(
                    item.kind, item.name, item.parameters, item.results, item.body, item.alias, doc, item.name_span,
                    span=item.span,
                )  # fmt: skip
        items.append(item)
    return tree.Module(module.source, module.edition, tuple(items), span=module.span)


__all__ = ["CLOSING", "OPENING", "Comment", "Parsed", "parse", "parse_expression"]
