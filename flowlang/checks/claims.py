"""`require` on facts that are known by name: `order == 4 and embedded == 3`, `endpoint <= 1e-4`."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from typing import Any

from flowlang.diagnostics import Diagnostic, Report
from flowlang.elaborate.arithmetic import Algebra, Evaluator, NotPlain, claims, static_names
from flowlang.syntax import tree

NUMBERS = Algebra(lambda n: n.value)

COMPARE = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class Claims:
    """Compares the `require` statements of one declaration with its facts."""

    def __init__(self, declaration: tree.Declaration, facts: Mapping[str, Any], report: Report, code: str):
        self.declaration, self.facts, self.report, self.code = declaration, facts, report, code

    def check(self, besides: Container[str] = ()) -> None:
        """Judges every claim but those on the names in `besides`, or on what functions of those names give."""
        for part in claims(self.declaration):
            left = part.left if isinstance(part, tree.Binary) else None
            left = left.fn if isinstance(left, tree.Call) else left
            if not (isinstance(left, tree.Name) and left.id in besides):
                self.judge(part)

    def judge(self, e: tree.Expr) -> None:
        name = fact_name(e.left) if isinstance(e, tree.Binary) and e.op in COMPARE else ""
        if name not in self.facts:
            self.unknown(e)
            return
        assert isinstance(e, tree.Binary)
        have = self.facts[name]
        if isinstance(have, str):
            self.word(e, have)
            return
        want = static_value(self.declaration, e.right)
        if want is None:
            self.unknown(e)
        elif not COMPARE[e.op](have, want):
            why = self.facts.get(f"{name}_fails")
            self.report.add(
                Diagnostic(
                    self.code,
                    f"{name} {e.op} {want:g} is required, and the {name.partition('(')[0]} is {have:g}",
                    e.span,
                    notes=(f"the first condition that fails: {why}",) if why else (),
                    suggestion=f"correct the coefficients, or claim `{name} {e.op} {have:g}`",
                )
            )

    def word(self, e: tree.Binary, have: str) -> None:
        """A fact that is a word: `sense == ito`."""
        assert isinstance(e.left, tree.Name)
        if e.op not in ("==", "!=") or not isinstance(e.right, tree.Name):
            self.unknown(e)
        elif (e.right.id == have) != (e.op == "=="):
            self.report.add(
                Diagnostic(
                    self.code, f"{e.left.id} {e.op} {e.right.id} is required, and the {e.left.id} is {have}", e.span,
                    suggestion=f"correct the rule, or claim `{e.left.id} == {have}`",
                )
            )  # fmt: skip

    def unknown(self, e: tree.Expr) -> None:
        known = ", ".join(f"`{k}`" for k in self.facts if not k.endswith("_fails"))
        self.report.add(
            Diagnostic(
                "FL0902", "this requirement is not one that is checked here", e.span, severity="warning",
                suggestion=f"what is known here: {known}" if known else "nothing can be required here",
            )
        )  # fmt: skip


def fact_name(e: tree.Expr) -> str:
    """`order`, or a fact under a condition: `order(grid = smooth(2))`, `order(fold = identity)`."""
    if isinstance(e, tree.Name):
        return e.id
    found = condition_of(e)
    return "" if found is None else "{}({} = {}{})".format(*found[:3], f"({found[3]})" if found[3] else "")


def condition_of(e: tree.Expr) -> tuple[str, str, str, str] | None:
    """A fact, and the name of which a condition tells it, perhaps with a number: order, grid, smooth and 2; order, fold, identity."""
    match e:
        case tree.Call(
            fn=tree.Name(id=fact),
            items=(tree.Item(left=tree.Name(id=name), eq=tree.Call(fn=tree.Name(id=what), items=(one,))),),
        ) if isinstance(one.left, tree.Number):
            return fact, name, what, one.left.text
        case tree.Call(fn=tree.Name(id=fact), items=(tree.Item(left=tree.Name(id=name), eq=tree.Name(id=what)),)):
            return fact, name, what, ""
    return None


def claim_on(declaration: tree.Declaration, name: str) -> tree.Binary | None:
    """The claim whose left side is that name."""
    for e in claims(declaration):
        if isinstance(e, tree.Binary) and isinstance(e.left, tree.Name) and e.left.id == name:
            return e
    return None


def static_value(declaration: tree.Declaration, e: tree.Expr) -> float | None:
    """The number an expression of static parameters stands for, at their defaults."""
    try:
        found = Evaluator(NUMBERS, static_names(NUMBERS, declaration, {})).value(e)
    except NotPlain:
        return None
    return found if isinstance(found, int | float) else None
