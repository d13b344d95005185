"""Domains of values and parameters.

A scalar domain bounds each element; a matrix domain also fixes a structure that gives a cheap
inverse and determinant. Backends hold one parametrisation for each domain (and each variant of it,
the domain's first argument): the stored tensors and the constrained value made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, pi

from flowlang.ir.interval import POSITIVE, REAL, UNIT, Interval


@dataclass(frozen=True, slots=True)
class Domain:
    name: str
    args: tuple[float | int | str, ...] = ()
    interval: Interval = REAL
    kind: str = "real"
    structure: str | None = None  # plu dense orthogonal lower unit_lower spd stiefel zero_mean simplex sphere lipschitz

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.args))})" if self.args else self.name

    @property
    def is_matrix(self) -> bool:
        return self.structure in MATRIX_STRUCTURES


MATRIX_STRUCTURES = ("plu", "dense", "orthogonal", "lower", "unit_lower", "spd", "stiefel")
SQUARE_STRUCTURES = ("plu", "dense", "orthogonal", "lower", "unit_lower", "spd")

R = Domain("R")
BOUNDED = Interval(-1.0, 1.0)

# Matrix domains: name -> variant (first argument; the first listed is the default) -> structure.
MATRIX_DOMAINS: dict[str, dict[str, str]] = {
    "Invertible": {"plu": "plu", "dense": "dense"},
    "Orthogonal": {"householder": "orthogonal", "cayley": "orthogonal", "exp": "orthogonal"},
    "LowerTriangular": {"": "lower"},
    "UnitLowerTriangular": {"": "unit_lower"},
    "Spd": {"": "spd"},
    "Stiefel": {"householder": "stiefel"},
}


def domain(name: str, args: tuple[float | int | str, ...] = ()) -> Domain | None:
    """The domain of that name; None if there is none. Raises ValueError with words for bad arguments."""
    if name == "R":
        return R
    if name == "Positive":
        return Domain("Positive", args, POSITIVE)
    if name == "Unit":
        return Domain("Unit", args, UNIT)
    if name == "Interval":
        if len(args) != 2 or not all(isinstance(a, int | float) for a in args):
            raise ValueError("`Interval` takes two numbers, as in `Interval(0, 1)`")
        lo, hi = float(args[0]), float(args[1])
        if not lo < hi:
            raise ValueError(f"`Interval({lo:g}, {hi:g})` is empty")
        return Domain("Interval", (lo, hi), Interval(lo, hi, True, True))
    if name == "Bool":
        return Domain("Bool", (), Interval(0, 1), "bool")
    if name == "Int":
        lo, hi = (float(args[0]), float(args[1]) - 1) if len(args) == 2 else (-inf, inf)
        return Domain("Int", args, Interval(lo, hi, lo == -inf, hi == inf), "int")
    if name == "Simplex":
        return Domain("Simplex", args, UNIT, structure="simplex")
    if name == "Sphere":
        return Domain("Sphere", args, BOUNDED, structure="sphere")
    if name == "Torus":
        return Domain("Torus", args, Interval(-pi, pi, False, True))
    if name == "Lipschitz":
        good = all(isinstance(a, int | float) and not isinstance(a, bool) and a > 0 for a in args)
        if not args or not good or not all(isinstance(a, int) for a in args[1:]) or len(args) > 4:
            raise ValueError(
                "`Lipschitz` takes a bound, and for a kernel the sizes it moves over, as in `Lipschitz(0.97, 8, 8)`"
            )
        return Domain("Lipschitz", args, REAL, structure="lipschitz")
    if name == "ZeroMean":
        return Domain("ZeroMean", args, REAL, structure="zero_mean")
    if name in MATRIX_DOMAINS:
        variants = MATRIX_DOMAINS[name]
        variant = str(args[0]) if args else next(iter(variants))
        if variant not in variants:
            known = ", ".join(f"`{v}`" for v in variants if v)
            raise ValueError(f"`{name}` has no parametrisation `{variant}`; known: {known or 'none'}")
        extra = args[1:]
        counted = variant == "householder"
        if len(extra) > counted or not all(isinstance(a, int) and a >= 0 for a in extra):
            what = "a number of reflections, as in `Orthogonal(householder, 4)`" if counted else "no further argument"
            raise ValueError(f"`{name}({variant})` takes {what}")
        interval = Interval(-1.0, 1.0) if variants[variant] in ("orthogonal", "stiefel") else REAL
        return Domain(name, (variant, *(a for a in extra if a)), interval, structure=variants[variant])
    return None


DOMAIN_NAMES = (
    "R",
    "Positive",
    "Unit",
    "Interval",
    "Int",
    "Bool",
    "Simplex",
    "Sphere",
    "Torus",
    "Rotation",
    "Ball",
    "ZeroMean",
    "Lipschitz",
    *MATRIX_DOMAINS,
)
