"""The canonical form of a text: two-space indents, one space around signs, comments kept."""

from __future__ import annotations

from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.source import Source, Span
from flowlang.syntax import tree
from flowlang.syntax.lexing import Comment
from flowlang.syntax.parser import parse

WIDTH = 110
LEVELS = {
    "|>": 1,
    "or": 2,
    "and": 3,
    "==": 5,
    "!=": 5,
    "<": 5,
    "<=": 5,
    ">": 5,
    ">=": 5,
    "+": 6,
    "-": 6,
    "*": 7,
    "/": 7,
    "^": 9,
}
TIGHT = 10


def format_source(source: Source) -> str:
    """The text in canonical form. Raises FlowError for a text that does not parse, and never changes its meaning."""
    report = Report()
    parsed = parse(source, report)
    if not report.ok:
        raise FlowError(report.errors)
    text = _Printer(source, parsed.comments).module(parsed.module)
    again_report = Report()
    again = parse(Source.of(source.name, text), again_report)
    same = again_report.ok and again.module == parsed.module
    kept = [c.text for c in again.comments] == [c.text for c in parsed.comments]
    if not (same and kept):
        raise FlowError(
            Diagnostic(
                "FL0101", f"formatting `{source.name}` would change its " + ("meaning" if not same else "comments") + ", so it was left alone",
                Span(source, 0, 0), suggestion="this is a fault of the formatter; please report the text",
            )
        )  # fmt: skip
    return text


class _Printer:
    def __init__(self, source: Source, comments: tuple[Comment, ...]):
        self.source = source
        self.comments = sorted(comments, key=lambda c: c.start)
        self.at = 0  # next comment
        self.lines: list[str] = []

    # ---- lines, comments, blanks ----------------------------------------------------------------

    def module(self, module: tree.Module) -> str:
        if module.edition is not None:
            self.lines.append(f"edition {module.edition}")
        end = 0
        for item in module.items:
            self.before(item.span.start, end, 0, first=not self.lines)
            self.statement(item, 0)
            end = item.span.end
            self.trailing(end)
        self.before(len(self.source.text), end, 0, first=not self.lines, closing=True)
        return "\n".join(self.lines).rstrip("\n") + "\n" if self.lines else ""

    def before(self, start: int, end: int, indent: int, *, first: bool, closing: bool = False) -> None:
        """Comments that stand before an offset, and a blank line where the source has one."""
        place = end
        while self.at < len(self.comments) and self.comments[self.at].start < start:
            c = self.comments[self.at]
            self.at += 1
            if not first and self.blank(place, c.start):
                self.lines.append("")
            self.lines.append("  " * indent + c.text)
            first = False
            place = c.end
        if not first and not closing and self.blank(place, start):
            self.lines.append("")

    def blank(self, start: int, end: int) -> bool:
        return self.source.text[start:end].count("\n") > 1

    def trailing(self, end: int) -> None:
        """Comments on the line where a statement ends; those inside it move to its end."""
        stop = self.source.text.find("\n", end)
        stop = len(self.source.text) if stop < 0 else stop
        own: list[str] = []
        while self.at < len(self.comments) and self.comments[self.at].start < stop:
            c = self.comments[self.at]
            if c.own_line or any(
                not ch.isspace() and ch != ";" for ch in self.source.text[max(end, 0) : c.start] if c.start > end
            ):
                break
            own.append(c.text)
            self.at += 1
        for text in own:
            self.lines[-1] += f"  {text}"

    def inside(self, start: int, end: int, indent: int) -> None:
        """Comments in the middle of a statement are put before it."""
        while self.at < len(self.comments) and start <= self.comments[self.at].start < end:
            self.lines.append("  " * indent + self.comments[self.at].text)
            self.at += 1

    def has_comment(self, start: int, end: int) -> bool:
        return any(start <= c.start < end for c in self.comments)

    # ---- statements -----------------------------------------------------------------------------

    def statement(self, s: tree.Statement, indent: int) -> None:
        pad = "  " * indent
        match s:
            case tree.Declaration() if s.body is not None:
                self.block(s, pad + header(s), s.body, indent, s.span.start)
            case tree.If():
                self.block(s, f"{pad}if {expr(s.condition)}", s.then, indent, s.span.start, more=bool(s.orelse))
                self.orelse(s, indent)
            case tree.Repeat():
                until = f" until {expr(s.until)}" if s.until is not None else ""
                self.block(s, f"{pad}repeat {expr(s.count)}{until}", s.body, indent, s.span.start)
            case tree.For():
                until = f" until {expr(s.until)}" if s.until is not None else ""
                self.block(
                    s, f"{pad}for {', '.join(s.names)} in {expr(s.iterable)}{until}", s.body, indent, s.span.start
                )
            case tree.Scan():
                word = "scan reverse" if s.reverse else "scan"
                self.block(s, f"{pad}{word} {s.axis}", s.body, indent, s.span.start)
            case tree.Tableau():
                self.tableau(s, indent)
            case _:
                self.inside(s.span.start, s.span.end, indent)
                self.lines.append(pad + simple(s))

    def orelse(self, s: tree.If, indent: int) -> None:
        if not s.orelse:
            return
        only = s.orelse[0]
        if len(s.orelse) == 1 and isinstance(only, tree.If) and self.is_else_if(s, only):
            head = f"else if {expr(only.condition)}"
            self.continue_block(head, only.then, indent, only, more=bool(only.orelse))
            self.orelse(only, indent)
            return
        self.continue_block("else", s.orelse, indent, s)

    def is_else_if(self, s: tree.If, only: tree.If) -> bool:
        return self.source.text[s.span.start : only.span.start].rstrip().endswith("else")

    def continue_block(
        self, head: str, body: tuple[tree.Statement, ...], indent: int, node: tree.Node, *, more: bool = False
    ) -> None:
        last = self.lines.pop()
        start = body[0].span.start if body else node.span.end
        single = self.one_line(f"{last} {head}", body, start, body[-1].span.end if body else start)
        if single is not None and last.endswith("}"):
            self.lines.append(single)
            return
        self.lines.append(f"{last} {head} {{")
        self.body(body, indent + 1, self.brace(start) if body else start, node.span.end)
        self.lines.append("  " * indent + "}")

    def block(
        self,
        node: tree.Node,
        head: str,
        body: tuple[tree.Statement, ...],
        indent: int,
        start: int,
        *,
        more: bool = False,
    ) -> None:
        if not body:
            self.inside(start, node.span.end, indent)
            self.lines.append(f"{head} {{}}")
            return
        first = body[0].span.start
        self.inside(start, self.brace(first), indent)
        end = body[-1].span.end
        single = self.one_line(head, body, first, end)
        if single is not None:
            self.lines.append(single)
            return
        self.lines.append(f"{head} {{")
        close = end if more else node.span.end
        self.body(body, indent + 1, self.brace(first), close)
        self.lines.append("  " * indent + "}")

    def brace(self, first: int) -> int:
        """The offset of the brace that opens the block in which a statement is first."""
        text, depth = self.source.text, first
        spans = {(c.start, c.end) for c in self.comments}
        while depth > 0:
            depth -= 1
            if text[depth] == "{" and not any(s <= depth < e for s, e in spans):
                return depth
        return first

    def one_line(self, head: str, body: tuple[tree.Statement, ...], start: int, end: int) -> str | None:
        """`head { a;  b }` when the source has it on one line and it fits."""
        close = self.source.text.find("}", end)
        if "\n" in self.source.text[self.brace(start) : close if close >= 0 else end] or self.has_comment(start, end):
            return None
        parts = []
        for s in body:
            text = inline(s)
            if text is None:
                return None
            parts.append(text)
        line = f"{head} {{ {';  '.join(parts)} }}"
        return line if len(line) <= WIDTH else None

    def body(self, body: tuple[tree.Statement, ...], indent: int, start: int, stop: int) -> None:
        end = start
        if body:
            self.trailing_brace(start)
        for k, s in enumerate(body):
            self.before(s.span.start, end, indent, first=k == 0)
            self.statement(s, indent)
            end = s.span.end
            self.trailing(end)
        self.before(stop, end, indent, first=False, closing=True)

    def trailing_brace(self, brace: int) -> None:
        """A comment right after the brace stays on its line."""
        if self.at < len(self.comments):
            c = self.comments[self.at]
            if not c.own_line and "\n" not in self.source.text[brace : c.start] and c.start > brace:
                self.lines[-1] += f"  {c.text}"
                self.at += 1

    def tableau(self, s: tree.Tableau, indent: int) -> None:
        pad = "  " * (indent + 1)
        rows = [[cell(r.head) if r.head else "", *(cell(c) for c in r.cells)] for r in s.rows]
        widths = [
            max((len(r[k]) for r in rows if len(r) > k), default=0)
            for k in range(max((len(r) for r in rows), default=0))
        ]
        self.inside(s.span.start, s.rows[0].span.start if s.rows else s.span.end, indent)
        self.lines.append("  " * indent + "tableau {")
        for row, r in zip(s.rows, rows, strict=True):
            self.before(row.span.start, row.span.start, indent + 1, first=True)
            cells = " ".join(c.ljust(widths[k + 1]) for k, c in enumerate(r[1:]))
            self.lines.append(f"{pad}{r[0].ljust(widths[0])} | {cells}".rstrip())
            self.trailing(row.span.end)
        self.before(s.span.end, s.span.end, indent + 1, first=False, closing=True)
        self.lines.append("  " * indent + "}")


# ---- parts --------------------------------------------------------------------------------------


def header(d: tree.Declaration) -> str:
    lists = " ".join(f"({params(ps)})" for ps in d.parameters)
    # One list of tensors stands close to the name, as in `net f(x: R[D])`.
    out = f"{d.kind} {d.name}{lists}"
    if d.results:
        out += " -> " + ", ".join(f"{r.name}: {expr(r.type)}" if r.name else expr(r.type) for r in d.results)
    return out


def params(ps: tuple[tree.Parameter, ...]) -> str:
    plain = ", ".join(param(p) for p in ps if not p.given)
    given = ", ".join(param(p) for p in ps if p.given)
    return " ".join(x for x in (plain, f"given {given}" if given else "") if x)


def param(p: tree.Parameter) -> str:
    out = ("*" if p.variadic else "") + p.name
    if p.type is not None:
        out += f": {expr(p.type)}"
    if p.default is not None:
        out += f" = {expr(p.default)}"
    return out


def simple(s: tree.Statement) -> str:
    """A statement of one line."""
    match s:
        case tree.Declaration(alias=alias) if alias is not None:
            return f"{s.kind} {s.name} = {expr(alias)}"
        case tree.Bind():
            return f"{', '.join(target(t) for t in s.targets)} {s.op} {', '.join(expr(v) for v in s.values)}"
        case tree.ExprStatement():
            return ", ".join(element(v) for v in s.values)
        case tree.Declare():
            return f"{s.word} {', '.join(entry(e) for e in s.entries)}"
        case tree.Base():
            return f"base {', '.join(map(expr, s.values))}"
        case tree.Emit():
            return f"emit {expr(s.value)} ~ {expr(s.distribution)}"
        case tree.Require():
            return f"require {expr(s.condition)}"
        case tree.Import():
            names = f" ({', '.join(s.names)})" if s.names else ""
            return f"import {'.'.join(s.path)}{names}"
    raise AssertionError(type(s).__name__)


def element(v: tree.Expr) -> str:
    """A typed result `e: T` is held as a parenthesis; it is printed as it was written."""
    if isinstance(v, tree.Paren) and len(v.items) == 1 and v.items[0].type is not None and v.items[0].left is not None:
        return f"{expr(v.items[0].left)}: {expr(v.items[0].type)}"
    return expr(v)


def inline(s: tree.Statement) -> str | None:
    """A statement inside a one-line body; None where it needs lines of its own."""
    match s:
        case tree.Declaration() if s.body is not None:
            return nested(header(s), s.body)
        case tree.Repeat():
            until = f" until {expr(s.until)}" if s.until is not None else ""
            return nested(f"repeat {expr(s.count)}{until}", s.body)
        case tree.For():
            until = f" until {expr(s.until)}" if s.until is not None else ""
            return nested(f"for {', '.join(s.names)} in {expr(s.iterable)}{until}", s.body)
        case tree.Scan():
            return nested(f"{'scan reverse' if s.reverse else 'scan'} {s.axis}", s.body)
        case tree.If():
            then = nested(f"if {expr(s.condition)}", s.then)
            if then is None or not s.orelse:
                return then
            if len(s.orelse) == 1 and isinstance(s.orelse[0], tree.If):
                return None
            other = nested("else", s.orelse)
            return None if other is None else f"{then} {other}"
        case tree.Tableau():
            return None
    return simple(s)


def nested(head: str, body: tuple[tree.Statement, ...]) -> str | None:
    parts = [inline(s) for s in body]
    if any(p is None for p in parts):
        return None
    return f"{head} {{ {';  '.join(p for p in parts if p is not None)} }}" if parts else f"{head} {{}}"


def target(t: tree.Target) -> str:
    out = t.name + (f"[{', '.join(item(i) for i in t.index)}]" if t.index else "")
    return f"{out}: {expr(t.type)}" if t.type is not None else out


def entry(e: tree.Entry) -> str:
    out = e.name + (f": {expr(e.type)}" if e.type is not None else "")
    return f"{out} {e.op} {expr(e.value)}" if e.value is not None and e.op is not None else out


def cell(c: tree.Cell) -> str:
    out = ("-" if c.negative else "") + ratio(c.numerator)
    return f"{out}/{ratio(c.denominator)}" if c.denominator is not None else out


def ratio(e: tree.Expr) -> str:
    return expr(e) if isinstance(e, tree.Name | tree.Number) else f"({expr(e)})"


def item(i: tree.Item) -> str:
    left = expr(i.left) if i.left is not None else ""
    if i.eq is not None:
        left += f" = {expr(i.eq)}"
    if i.arrow is not None:
        left += (" -> " if left else "-> ") + expr(i.arrow)
        if i.arrow_eq is not None:
            left += f" = {expr(i.arrow_eq)}"
    return f"{left} : {expr(i.type)}" if i.type is not None else left


def items(found: tuple[tree.Item, ...]) -> str:
    return ", ".join(item(i) for i in found)


def level(e: tree.Expr) -> int:
    match e:
        case tree.Binary():
            return LEVELS[e.op]
        case tree.Unary(op="not"):
            return 4
        case tree.Unary():
            return 8
        case tree.Range():
            return 0
    return TIGHT


def expr(e: tree.Expr) -> str:
    """An expression with single spaces; parentheses stand where the tree has them."""
    match e:
        case tree.Name():
            return e.id
        case tree.Number():
            return e.text
        case tree.String():
            return f'"{e.value}"'
        case tree.Ellipsis():
            return ".."
        case tree.Range():
            return (expr(e.start) if e.start is not None else "") + ".." + (expr(e.stop) if e.stop is not None else "")
        case tree.Unary(op="not"):
            return f"not {wrap(e.operand, 4)}"
        case tree.Unary():
            return f"-{wrap(e.operand, 8)}"
        case tree.Binary():
            return binary(e)
        case tree.Attribute():
            return f"{wrap(e.value, TIGHT)}.{e.name}"
        case tree.Call():
            return f"{wrap(e.fn, TIGHT)}({items(e.items)})"
        case tree.Brackets():
            return f"{wrap(e.value, TIGHT)}[{items(e.items)}]"
        case tree.Optional():
            return f"{wrap(e.type, TIGHT)}?"
        case tree.Paren():
            return f"({items(e.items)})"
        case tree.ListExpr():
            return f"[{', '.join(expr(v) for v in e.items)}]"
        case tree.Comprehension():
            condition = f" if {expr(e.condition)}" if e.condition is not None else ""
            return f"[{expr(e.value)} for {', '.join(e.names)} in {expr(e.iterable)}{condition}]"
    raise AssertionError(type(e).__name__)


def binary(e: tree.Binary) -> str:
    # Left-leaning chains are walked by a loop.
    chain: list[tree.Binary] = []
    at: tree.Expr = e
    while isinstance(at, tree.Binary) and at.op != "^":
        chain.append(at)
        at = at.left
        if isinstance(at, tree.Binary) and level(at) < level(chain[-1]):
            break
    if not chain:
        return f"{wrap(e.left, TIGHT)} ^ {wrap(e.right, 8)}"
    text = wrap(at, LEVELS[chain[-1].op])
    for node in reversed(chain):
        text = f"{text} {node.op} {wrap(node.right, LEVELS[node.op] + 1)}"
    return text


def wrap(e: tree.Expr, least: int) -> str:
    return expr(e) if level(e) >= least else f"({expr(e)})"


def print_expr(e: tree.Expr) -> str:
    """One expression in canonical form."""
    return expr(e)
