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


__all__ = ["Order", "Tableau", "condition", "order", "rooted_trees", "row_sum_faults", "stability"]
