"""Orders of Runge-Kutta tableaus against known methods, quadrature, and measured convergence."""

from __future__ import annotations

import math
from fractions import Fraction as F

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.analysis.solvers import Tableau, condition, density, order, rooted_trees, row_sum_faults, stability


def explicit(rows: list[list[F | int]], b: list[F | int], embedded: list[F | int] | None = None) -> Tableau:
    n = len(b)
    a = tuple(tuple(F(v) for v in row) + (F(0),) * (n - len(row)) for row in rows)
    return Tableau(a, tuple(map(F, b)), tuple(sum(r, F(0)) for r in a), tuple(map(F, embedded)) if embedded else None)


EULER = explicit([[]], [1])
MIDPOINT = explicit([[], [F(1, 2)]], [0, 1])
HEUN3 = explicit([[], [F(1, 3)], [0, F(2, 3)]], [F(1, 4), 0, F(3, 4)])
RK4 = explicit([[], [F(1, 2)], [0, F(1, 2)], [0, 0, 1]], [F(1, 6), F(1, 3), F(1, 3), F(1, 6)])
THREE_EIGHTHS = explicit([[], [F(1, 3)], [F(-1, 3), 1], [1, -1, 1]], [F(1, 8), F(3, 8), F(3, 8), F(1, 8)])
BOGACKI_SHAMPINE = explicit(
    [[], [F(1, 2)], [0, F(3, 4)], [F(2, 9), F(1, 3), F(4, 9)]],
    [F(2, 9), F(1, 3), F(4, 9), 0],
    [F(7, 24), F(1, 4), F(1, 3), F(1, 8)],
)
RADAU3 = Tableau(((F(5, 12), F(-1, 12)), (F(3, 4), F(1, 4))), (F(3, 4), F(1, 4)), (F(1, 3), F(1)))


@pytest.mark.parametrize(
    ("method", "expected"),
    [(EULER, 1), (MIDPOINT, 2), (HEUN3, 3), (RK4, 4), (THREE_EIGHTHS, 4), (BOGACKI_SHAMPINE, 3), (RADAU3, 3)],
)
def test_order_of_known_methods(method: Tableau, expected: int) -> None:
    assert order(method).value == expected


def test_embedded_weights_have_their_own_order() -> None:
    assert BOGACKI_SHAMPINE.embedded is not None
    assert order(BOGACKI_SHAMPINE, BOGACKI_SHAMPINE.embedded).value == 2
    assert BOGACKI_SHAMPINE.first_same_as_last


def test_counts_of_rooted_trees() -> None:
    # https://oeis.org/A000081
    assert [len(rooted_trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


def test_density_of_a_chain_and_a_bush() -> None:
    chain: tuple[object, ...] = ()
    for _ in range(4):
        chain = (chain,)
    assert density(chain) == math.factorial(5)
    assert density(((), (), (), ())) == 5


def test_conditions_read_as_in_the_books() -> None:
    assert condition(()) == "Σ b = 1"
    assert condition(((),)) == "Σ b·c = 1/2"
    assert condition((((),),)) == "Σ b·(A·c) = 1/6"
    assert condition(((), ())) == "Σ b·c² = 1/3"


def test_shifted_times_are_found() -> None:
    shifted = Tableau(RK4.a, RK4.b, (F(0), F(0), F(1, 2), F(1, 2)))
    assert [i for i, _ in row_sum_faults(shifted)] == [1, 3]
    assert not row_sum_faults(RK4)


def run(method: Tableau, steps: int) -> float:
    """y' = y·cos t, y(0) = 1 to t = 2, in floating point."""
    t, y, h = 0.0, 1.0, 2.0 / steps
    for _ in range(steps):
        k: list[float] = []
        for row, c in zip(method.a, method.c, strict=True):
            state = y + h * sum(float(w) * v for w, v in zip(row, k, strict=False))
            k.append(state * math.cos(t + float(c) * h))
        y += h * sum(float(w) * v for w, v in zip(method.b, k, strict=True))
        t += h
    return abs(y - math.exp(math.sin(2.0)))


@pytest.mark.parametrize("method", [EULER, MIDPOINT, HEUN3, RK4, THREE_EIGHTHS])
def test_proved_order_is_the_measured_one(method: Tableau) -> None:
    slope = math.log2(run(method, 64) / run(method, 128))
    assert abs(slope - order(method).value) < 0.2


@given(st.fractions(F(1, 10), F(9, 10), max_denominator=20))
@settings(derandomize=True, max_examples=30)
def test_every_two_stage_method_of_the_family_is_of_second_order(c: F) -> None:
    # b2 = 1/(2c), b1 = 1 - b2: Ralston's, Heun's and the midpoint method are members.
    b2 = 1 / (2 * c)
    assert order(explicit([[], [c]], [1 - b2, b2])).value == 2
    assert order(explicit([[], [c]], [F(9, 10) - b2, b2])).value == 0
    assert order(explicit([[], [c]], [F(1, 2), F(1, 2)])).value == (2 if c == 1 else 1)


@pytest.mark.parametrize("method", [EULER, MIDPOINT, HEUN3, RK4, BOGACKI_SHAMPINE])
def test_stability_function_starts_as_the_exponential(method: Tableau) -> None:
    top, bottom = stability(method)
    assert bottom == (1,)
    p = order(method).value
    assert top[: p + 1] == tuple(F(1, math.factorial(k)) for k in range(p + 1))


def test_stability_function_of_an_implicit_method() -> None:
    # Radau IIA of order 3: R(z) = (1 + z/3) / (1 - 2z/3 + z²/6).
    assert stability(RADAU3) == ((F(1), F(1, 3)), (F(1), F(-2, 3), F(1, 6)))
