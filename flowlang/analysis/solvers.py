"""Runge-Kutta tableaus: order by rooted trees, consistency, stability (Butcher 1963; Hairer, Norsett & Wanner, II.2).

All arithmetic is exact. A method has order p when for every rooted tree t of at most p nodes the weight
sum b·Φ(t) equals 1/γ(t), γ being the tree's density.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from flowlang.ir.tableau import Tableau

MAX_ORDER = 10  # 1,842 trees have at most ten nodes

RootedTree = tuple[Any, ...]  # a node as the sorted tuple of its children


@lru_cache(maxsize=MAX_ORDER)
def rooted_trees(nodes: int) -> tuple[RootedTree, ...]:
    """All rooted trees with that many nodes (1, 1, 2, 4, 9, 20, 48, 115, 286, 719)."""
    return tuple(sorted({tuple(sorted(forest)) for forest in _forests(nodes - 1, nodes - 1)}))


def _forests(nodes: int, largest: int) -> Iterator[tuple[RootedTree, ...]]:
    if nodes == 0:
        yield ()
        return
    for size in range(min(nodes, largest), 0, -1):
        for tree in rooted_trees(size):
            for rest in _forests(nodes - size, size):
                yield (tree, *rest)


@lru_cache(maxsize=4096)
def node_count(tree: RootedTree) -> int:
    return 1 + sum(node_count(t) for t in tree)


@lru_cache(maxsize=4096)
def density(tree: RootedTree) -> int:
    """γ: the product over all nodes of the size of the subtree below."""
    out = node_count(tree)
    for t in tree:
        out *= density(t)
    return out


class Weights:
    """Elementary weights of one tableau: Φ_i(t) for each stage, computed once for each tree."""

    def __init__(self, tableau: Tableau):
        self.tableau = tableau
        self._known: dict[RootedTree, tuple[Fraction, ...]] = {}

    def stage(self, tree: RootedTree) -> tuple[Fraction, ...]:
        if tree not in self._known:
            out = [Fraction(1)] * self.tableau.stages
            for child in tree:
                inner = self.stage(child)
                for i, row in enumerate(self.tableau.a):
                    out[i] *= sum((x * y for x, y in zip(row, inner, strict=True)), Fraction(0))
            self._known[tree] = tuple(out)
        return self._known[tree]

    def residual(self, b: tuple[Fraction, ...], tree: RootedTree) -> Fraction:
        return sum((x * y for x, y in zip(b, self.stage(tree), strict=True)), Fraction(0)) - Fraction(1, density(tree))


@dataclass(frozen=True, slots=True)
class Order:
    """The order reached, and the first tree whose condition fails (None at the cap)."""

    value: int
    failing: RootedTree | None = None
    residual: Fraction = Fraction(0)


def order(tableau: Tableau, weights: tuple[Fraction, ...] | None = None, cap: int = MAX_ORDER) -> Order:
    """The order of the method, or of other weights on the same stages (the embedded pair)."""
    b = tableau.b if weights is None else weights
    phi = Weights(tableau)
    cap = min(cap, 2 * tableau.stages)  # no method is of higher order (Gauss's)
    for p in range(1, cap + 1):
        for tree in rooted_trees(p):
            residual = phi.residual(b, tree)
            if not tableau.zero(residual):
                return Order(p - 1, tree, residual)
    return Order(cap)


def condition(tree: RootedTree) -> str:
    """The order condition of a tree in words of the tableau: `Σ b·c² = 1/3`."""
    return f"Σ b·{_term(tree)} = 1/{density(tree)}" if tree else "Σ b = 1"


def _term(tree: RootedTree) -> str:
    leaves = sum(1 for t in tree if not t)
    powers = {0: "", 1: "c", 2: "c²", 3: "c³"}
    parts = [powers.get(leaves, f"c^{leaves}")] if leaves else []
    parts += [f"(A·{_term(t)})" for t in tree if t]
    return "·".join(parts)


def row_sum_faults(tableau: Tableau) -> list[tuple[int, Fraction]]:
    """Stages whose time c_i is not the sum of its row: (stage, the sum). A field that depends on t loses order there."""
    out = []
    for i, row in enumerate(tableau.a):
        total = sum(row, Fraction(0))
        if not tableau.zero(total - tableau.c[i]):
            out.append((i, total))
    return out


def stability(tableau: Tableau) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
    """R(z) = P(z)/Q(z) with x₁ = R(hλ)·x₀ for x' = λx: coefficients from the constant up.

    P = det(I - zA + z·1·bᵀ), Q = det(I - zA); Q = 1 for an explicit method.
    """
    n = tableau.stages
    top = [[tableau.b[j] - tableau.a[i][j] for j in range(n)] for i in range(n)]
    bottom = [[-tableau.a[i][j] for j in range(n)] for i in range(n)]
    return _det_plus(top), _det_plus(bottom)


def _det_plus(matrix: list[list[Fraction]]) -> tuple[Fraction, ...]:
    """Coefficients of det(I + z·M), by Newton's identities on the traces of powers."""
    n = len(matrix)
    power = [row[:] for row in matrix]
    traces = []
    for k in range(n):
        traces.append(sum((power[i][i] for i in range(n)), Fraction(0)))
        if k + 1 < n:
            power = [
                [sum((power[i][m] * matrix[m][j] for m in range(n)), Fraction(0)) for j in range(n)] for i in range(n)
            ]
    out = [Fraction(1)]
    for k in range(1, n + 1):
        total = sum(((-1) ** (i - 1) * out[k - i] * traces[i - 1] for i in range(1, k + 1)), Fraction(0))
        out.append(total / k)
    while len(out) > 1 and out[-1] == 0:
        out.pop()
    return tuple(out)


# ---- dense output -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interpolant:
    """x(t + θh) = x + h·Σ_i k_i·Σ_j weights[i][j]·θ^(j+1) inside a step; the last k is the slope at the step's end.

    It is of `order` at every θ, and its value and slope agree with the steps' at both ends.
    """

    weights: tuple[tuple[Fraction, ...], ...]
    order: int


@lru_cache(maxsize=64)
def interpolant(tableau: Tableau) -> Interpolant:
    """The polynomial through a step of the highest order that its own stages allow (Hairer, Norsett & Wanner, II.6).

    For every tree of at most that order the weights' elementary weight is θ^|tree|/γ; with value and slope at both
    ends these are linear equations in the coefficients, and of their solutions the least is taken.
    """
    wide = tableau if tableau.first_same_as_last else with_end(tableau)
    n, reached = wide.stages, order(tableau).value
    phi = Weights(wide)
    for q in range(reached, 0, -1):
        degree = max(q, 3)
        rows: list[list[Fraction]] = []

        def equation(terms: dict[tuple[int, int], Fraction], value: Fraction, degree: int = degree) -> list[Fraction]:
            row = [Fraction(0)] * (n * degree + 1)
            for (i, k), c in terms.items():
                row[i * degree + k - 1] = c
            row[-1] = value
            return row

        powers = range(1, degree + 1)
        for i in range(n):
            rows.append(equation({(i, k): Fraction(1) for k in powers}, wide.b[i]))
            rows.append(equation({(i, 1): Fraction(1)}, Fraction(int(i == 0))))
            rows.append(equation({(i, k): Fraction(k) for k in powers}, Fraction(int(i == n - 1))))
        for p in range(1, q + 1):
            for tree in rooted_trees(p):
                stage = phi.stage(tree)
                for k in powers:
                    value = Fraction(1, density(tree)) if k == p else Fraction(0)
                    rows.append(equation({(i, k): stage[i] for i in range(n)}, value))
        found = least_solution(rows, n * degree, Fraction(1, 10**9) if tableau.rounded else Fraction(0))
        if found is not None:
            return Interpolant(tuple(tuple(found[i * degree : (i + 1) * degree]) for i in range(n)), q)
    raise AssertionError("a consistent method has an interpolant of order 1")


def with_end(tableau: Tableau) -> Tableau:
    """The method with one more stage, of weight 0: the slope at the step's end."""
    a = (*((*row, Fraction(0)) for row in tableau.a), (*tableau.b, Fraction(0)))
    return Tableau(a, (*tableau.b, Fraction(0)), (*tableau.c, Fraction(1)), None, tableau.rounded)


def least_solution(rows: list[list[Fraction]], unknowns: int, small: Fraction) -> list[Fraction] | None:
    """The solution of least Euclidean norm; None where the equations contradict each other."""
    reduced = row_reduced(rows, unknowns, small)
    if reduced is None:
        return None
    # x = Aᵀy with AAᵀy = b: the rows are independent now.
    gram = [
        [sum((p * q for p, q in zip(r[:-1], s[:-1], strict=True) if p and q), Fraction(0)) for s in reduced] + [r[-1]]
        for r in reduced
    ]
    solved = row_reduced(gram, len(reduced), Fraction(0))
    assert solved is not None
    assert len(solved) == len(reduced)
    y = [r[-1] for r in solved]
    return [sum((r[j] * v for r, v in zip(reduced, y, strict=True) if r[j]), Fraction(0)) for j in range(unknowns)]


def row_reduced(rows: list[list[Fraction]], unknowns: int, small: Fraction) -> list[list[Fraction]] | None:
    """Gauss and Jordan's reduced rows that are not 0."""
    work = [r[:] for r in rows]
    top = 0
    for j in range(unknowns):
        pivot = max(range(top, len(work)), key=lambda i: abs(work[i][j]), default=None)
        if pivot is None or abs(work[pivot][j]) <= small:
            continue
        work[top], work[pivot] = work[pivot], work[top]
        head = work[top][j]
        work[top] = [v / head for v in work[top]]
        for i, row in enumerate(work):
            if i != top and row[j]:
                factor = row[j]
                work[i] = [v - factor * w if w else v for v, w in zip(row, work[top], strict=True)]
        top += 1
    if any(abs(r[-1]) > small for r in work[top:]):
        return None
    return work[:top]


__all__ = [
    "Interpolant", "Order", "Tableau", "condition", "interpolant", "order", "rooted_trees", "row_sum_faults", "stability",
]  # fmt: skip
