"""Runge-Kutta methods as data: exact coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

ROUNDED = Fraction(1, 10**12)  # residual that printed decimals may leave


@dataclass(frozen=True, slots=True)
class Tableau:
    """Stages y_i = x + h·Σ a_ij·k_j at times t + c_i·h; x + h·Σ b_i·k_i. `embedded`: the weights of the error estimate.

    `rounded` says that some entry is a printed decimal, so that conditions hold to its last digits only.
    """

    a: tuple[tuple[Fraction, ...], ...]
    b: tuple[Fraction, ...]
    c: tuple[Fraction, ...]
    embedded: tuple[Fraction, ...] | None = None
    rounded: bool = False

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def explicit(self) -> bool:
        return all(v == 0 for i, row in enumerate(self.a) for v in row[i:])

    @property
    def first_same_as_last(self) -> bool:
        """The last stage is the result, so it serves as the next step's first."""
        return self.explicit and self.stages > 1 and self.a[-1] == self.b and self.c[-1] == 1

    def zero(self, residual: Fraction) -> bool:
        return abs(residual) <= ROUNDED if self.rounded else residual == 0
