"""`tableau { .. }` as exact numbers."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.elaborate.arithmetic import Algebra, Evaluator, NotPlain, static_names
from flowlang.ir.tableau import Tableau
from flowlang.source import Span
from flowlang.syntax import tree


def _ratio(n: tree.Number) -> Fraction:
    return Fraction(n.text.replace("_", ""))


RATIOS = Algebra(_ratio, {"abs": abs, "min": min, "max": max})


def tableau_of(declaration: tree.Declaration) -> tree.Tableau | None:
    """The tableau of a solver's body, if it is given by one."""
    return next((s for s in declaration.body or () if isinstance(s, tree.Tableau)), None)


def problem(code: str, message: str, span: Span, suggestion: str | None = None) -> FlowError:
    return FlowError(Diagnostic(code, message, span, suggestion=suggestion))


def read_tableau(declaration: tree.Declaration, given: Mapping[str, Any] | None = None) -> Tableau:
    """The solver's tableau; raises FlowError where it is not one."""
    found = tableau_of(declaration)
    assert found is not None
    names = static_names(RATIOS, declaration, given or {})
    stages = [r for r in found.rows if r.head is not None]
    weights = [r for r in found.rows if r.head is None]
    if not stages or not weights:
        raise problem(
            "FL0602",
            "a tableau has a row `c | a ..` for each stage, and below them the weights `| b ..`",
            found.span,
            "see `flowlang std rk4`",
        )
    for early, later in zip(found.rows, found.rows[1:], strict=False):
        if early.head is None and later.head is not None:
            raise problem("FL0602", "a stage stands below the weights", later.span, "move it above them")
    if len(weights) > 2:
        raise problem(
            "FL0602",
            "a tableau has one row of weights, and a second one for the error estimate",
            weights[2].span,
            suggestion="remove the third row",
        )
    n = len(stages)
    reader = _Reader(names)
    c = tuple(reader.cell(r.head) for r in stages if r.head is not None)
    a = []
    for r in stages:
        if len(r.cells) > n:
            raise problem(
                "FL0602",
                f"this row has {len(r.cells)} entries, and the method {n} stages",
                r.span,
                suggestion="give at most one entry for each stage",
            )
        row = [reader.cell(x) for x in r.cells]
        a.append((*row, *(Fraction(0),) * (n - len(row))))
    rows = []
    for r in weights:
        if len(r.cells) != n:
            raise problem(
                "FL0602", f"{len(r.cells)} weights for {n} stages", r.span, "give one weight for each stage, 0 included"
            )
        rows.append(tuple(reader.cell(x) for x in r.cells))
    return Tableau(tuple(a), rows[0], c, rows[1] if len(rows) > 1 else None, reader.rounded)


class _Reader:
    def __init__(self, names: Mapping[str, Any]):
        self.names = names
        self.rounded = False

    def cell(self, cell: tree.Cell) -> Fraction:
        top = self.part(cell.numerator)
        bottom = self.part(cell.denominator) if cell.denominator is not None else Fraction(1)
        if bottom == 0:
            raise problem("FL0602", "an entry divides by zero", cell.span, suggestion="write another ratio")
        return (-top if cell.negative else top) / bottom

    def part(self, e: tree.Expr) -> Fraction:
        if isinstance(e, tree.Number) and len(e.text.partition(".")[2]) > 8:
            self.rounded = True
        try:
            value = Evaluator(RATIOS, self.names).value(e)
        except NotPlain as stop:
            raise problem(
                "FL0602", f"an entry of a tableau is an exact ratio, and {stop.what} is not", stop.span,
                "write numbers, ratios and static parameters, as in `1/2`",
            ) from None  # fmt: skip
        if not isinstance(value, Fraction | int):
            raise problem("FL0602", "an entry of a tableau is an exact ratio", e.span, suggestion="as in `1/2`")
        return Fraction(value)
