"""Exact sizes without allocation: parameters in three modes, floating-point operations, and both as formulas.

Modes of a parameter count (DESIGN §9):
  declared  elements of the parameters as the spec writes them: what papers count, and what `parameters(f)` is
  stored    numbers that the compiled module holds and trains (a PLU matrix keeps two triangles and a diagonal)
  free      degrees of freedom: an orthogonal n x n matrix has n (n - 1) / 2, a masked weight its visible entries
A network that several steps share counts once, with the region that owns it; averages and copies of one do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import product
from math import prod

from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.ops import OPS
from flowlang.ir.ops.linear import mask_rows
from flowlang.ir.types import TensorType

MODES = ("declared", "stored", "free")


def parameter_count(region: Region, mode: str = "declared") -> int:
    """The parameters of a region and of those it owns."""
    assert mode in MODES, mode
    known: dict[int, int] = {}

    def count(r: Region) -> int:
        if id(r) not in known:
            own = sum(COUNTS[mode](r.graph, n) for n in r.graph if n.op == "param" and not n.attrs.get("again"))
            known[id(r)] = own + sum(
                c.count * count(c.region) for c in r.children.values() if not c.shared and c.follows is None
            )
        return known[id(r)]

    return count(region)


def declared(graph: Graph, node: Node) -> int:
    return node.tensor.count


def stored(graph: Graph, node: Node) -> int:
    """What the parametrisation of the node's domain keeps."""
    domain, t = node.attrs["domain"], node.tensor
    if not isinstance(domain, Domain) or not domain.is_matrix:
        return t.count
    n, batch = t.shape[-2], prod(t.shape[:-2])
    match domain.structure:
        case "plu":
            return batch * (2 * n * n + n)
        case "orthogonal" | "stiefel" if domain.args[:1] == ("householder",):
            return batch * n * (int(domain.args[1]) if len(domain.args) > 1 else n)  # reflections
        case "lower" | "spd":
            return batch * (n * n + n)
    return t.count


def free(graph: Graph, node: Node) -> int:
    """Degrees of freedom, entries that a mask hides left out."""
    domain, t = node.attrs["domain"], node.tensor
    structure = domain.structure if isinstance(domain, Domain) else None
    if structure is None or not t.axes:
        return visible(graph, node)
    n = t.shape[-2] if t.rank > 1 else 1
    k, batch = t.shape[-1], prod(t.shape[:-2])
    match structure:
        case "orthogonal":
            return batch * n * (n - 1) // 2
        case "stiefel":
            return batch * (n * k - k * (k + 1) // 2)
        case "lower" | "spd":
            return batch * n * (n + 1) // 2
        case "unit_lower":
            return batch * n * (n - 1) // 2
        case "simplex" | "sphere" | "zero_mean":
            return t.count // k * (k - 1)
    return t.count


def visible(graph: Graph, node: Node) -> int:
    """The entries of a weight that the mask above it, if it is read through one alone, lets through."""
    users = [u for u, _ in graph.users(node.id)]
    if len(users) != 1 or users[0].op != "masked":
        return node.tensor.count
    rows = mask_rows(users[0].attrs)
    if rows is None:
        return node.tensor.count
    pairs = len(users[0].attrs["row_degrees"]) * len(users[0].attrs["col_degrees"])
    return sum(r.bit_count() for r in rows.bits()) * node.tensor.count // max(pairs, 1)


COUNTS: dict[str, Callable[[Graph, Node], int]] = {"declared": declared, "stored": stored, "free": free}


def flop_count(region: Region) -> int:
    """Floating-point operations of one forward pass for one sample; a multiplication and an addition are two.

    An integration with a given number of steps counts its evaluations of the field; an adaptive one counts one step.
    """
    return region_cost(region, {})


def step_flops(region: Region, before: int, after: int) -> int:
    """The operations that lead from one value of a chain to the next."""
    graph = region.graph
    return sum(node_cost(graph, graph[n], {}) for n in graph.reachable([after]) - graph.reachable([before]))


def region_cost(region: Region, known: dict[int, int]) -> int:
    if id(region) not in known:
        results = [*region.outputs, *(e.value for e in region.emissions)]
        graph = region.graph
        known[id(region)] = sum(node_cost(graph, graph[n], known) for n in graph.reachable(results))
    return known[id(region)]


def node_cost(graph: Graph, node: Node, known: dict[int, int]) -> int:
    inner = node.attrs.get("region")
    if isinstance(inner, Region):
        lifted = prod(s for _, s in node.attrs.get("lifted", ()))
        times = int(node.attrs.get("count", 1))
        if node.op == "integrate":
            stages = node.attrs["tableau"].stages if "tableau" in node.attrs else node.attrs.get("evaluations", 1)
            times = int(node.attrs.get("steps", 1)) * int(stages)
        return lifted * times * region_cost(inner, known)
    types = [graph[i].type for i in node.inputs]
    tensors = [t for t in types if isinstance(t, TensorType)]
    if not isinstance(node.type, TensorType) or not tensors or len(tensors) != len(types):
        return 0
    return OPS[node.op].cost(node, tensors)


# ---- formulas -----------------------------------------------------------------------------------

Polynomial = dict[tuple[int, ...], Fraction]  # exponents of the sizes -> coefficient
DEGREE = 3


def formula(count: Callable[[Mapping[str, int]], int], sizes: Mapping[str, int]) -> str | None:
    """The count as a polynomial in sizes, as in `8*D^2 + 130*D`; None where it is none (of degree 3 in each).

    `count` tells it at given sizes. It is interpolated at sizes of the given ones' parities (halves round), and
    compared at others; where only those agree the formula names the parity.
    """
    names = list(sizes)
    parity = [sizes[n] % 2 for n in names]
    grid = [[2 * (k + 1) + p for k in range(DEGREE + 1)] for p in parity]
    found = interpolate(grid, lambda at: count(dict(zip(names, at, strict=True))))

    def holds(at: tuple[int, ...]) -> bool:
        return value(found, at) == count(dict(zip(names, at, strict=True)))

    if not holds(tuple(2 * (DEGREE + 2) + p for p in parity)) or not holds(tuple(sizes[n] for n in names)):
        return None
    text = polynomial_text(found, names)
    for k, n in enumerate(names):
        if not holds(tuple(2 * (DEGREE + 2) + p + (j == k) for j, p in enumerate(parity))):
            text += f" for {'odd' if parity[k] else 'even'} {n}"
    return text


def interpolate(grid: list[list[int]], f: Callable[[tuple[int, ...]], int]) -> Polynomial:
    """The polynomial through the values of f on a grid, axis by axis (Lagrange), in exact arithmetic."""
    out: Polynomial = {}
    bases = [[lagrange(points, k) for k in range(len(points))] for points in grid]
    for place in product(*(range(len(p)) for p in grid)):
        height = f(tuple(points[k] for points, k in zip(grid, place, strict=True)))
        for powers in product(*(range(len(p)) for p in grid)):
            c = Fraction(height)
            for basis, k, e in zip(bases, place, powers, strict=True):
                c *= basis[k][e]
            out[powers] = out.get(powers, Fraction(0)) + c
    return {p: c for p, c in out.items() if c}


def lagrange(points: list[int], k: int) -> list[Fraction]:
    """Coefficients of the polynomial that is 1 at point k and 0 at the others."""
    out = [Fraction(1)]
    for j, p in enumerate(points):
        if j != k:
            scale = Fraction(1, points[k] - p)
            up = [Fraction(0), *out]
            out = [scale * (a - p * b) for a, b in zip(up, [*out, Fraction(0)], strict=True)]
    return out


def value(polynomial: Polynomial, at: tuple[int, ...]) -> Fraction:
    return sum(
        (c * prod(x**e for x, e in zip(at, powers, strict=True)) for powers, c in polynomial.items()), Fraction(0)
    )


def polynomial_text(polynomial: Polynomial, names: list[str]) -> str:
    terms = []
    for powers, c in sorted(polynomial.items(), key=lambda t: (sum(t[0]), t[0]), reverse=True):
        factors = [n if e == 1 else f"{n}^{e}" for n, e in zip(names, powers, strict=True) if e]
        number = str(abs(c)) if c.denominator == 1 else f"{abs(c.numerator)}/{c.denominator}"
        if abs(c) != 1 or not factors:
            factors = [number, *factors]
        terms.append(("-" if c < 0 else "+", "*".join(factors)))
    if not terms:
        return "0"
    first = ("-" if terms[0][0] == "-" else "") + terms[0][1]
    return " ".join([first, *(f"{sign} {term}" for sign, term in terms[1:])])
