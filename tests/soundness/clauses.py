"""A switch for each clause of ANALYSIS.md: what it is without that clause.

Each clause is one small function of the compiler; a switch replaces it, in tests only. `witness` is a map, or
the seed of a random graph, that the compiler then judges wrongly.

A15 and A16 are clauses of docs/analyses.md alone: linear maps whose coefficients are numbers, and rules by hand and points of
spheres.

The bar of A5.3 on gathering and un-joining along a scanned axis is the rule of equal slices itself, asked of slices and joins.
The congruence of A10 has no switch, as there are no symmetric matrices yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from flowlang.analysis import dependence, ranges
from flowlang.derive import (
    analyse,
    blocks,
    bottleneck,
    contraction,
    explain,
    forms,
    linear,
    lowrank,
    polar,
    replay,
    scalar,
    scan,
    search,
)
from flowlang.derive.plan import Failure
from flowlang.derive.search import Inverter
from flowlang.elaborate import body
from flowlang.ir import lipschitz, relation
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node
from flowlang.ir.interval import REAL, Interval
from flowlang.ir.ops import OPS
from flowlang.ir.relation import Matrix, Relation, Support, product
from tests.soundness import judge


@dataclass(frozen=True)
class Switch:
    """Turns one clause off: replaced attributes of modules or classes, and replaced rules of ops."""

    clause: str
    words: str
    witness: str | int
    patches: tuple[tuple[Any, str, Any], ...] = ()
    ops: tuple[tuple[str, str, Any], ...] = ()
    says: str = ""  # of a clause about what is said: words that the diagnostic has with it, and lacks without it

    def __str__(self) -> str:
        return f"{self.clause} {self.words}"

    def off(self, patch: pytest.MonkeyPatch) -> None:
        for owner, name, value in self.patches:
            assert hasattr(owner, name)
            patch.setattr(owner, name, value)
        for op, rule, value in self.ops:
            patch.setitem(OPS, op, replace(OPS[op], **{rule: value}))


def yes(*_: object, **__: object) -> bool:
    return True


def no(*_: object, **__: object) -> bool:
    return False


def nothing(*_: object, **__: object) -> None:
    return None


def by_name(graph: Graph, node: Node, slot: int, supports: Sequence[Support | None]) -> Relation:
    """Equal names taken for equal indices."""
    return Relation.equal(node.tensor.axes, graph[node.inputs[slot]].tensor.axes)


def passed_on(self: dependence.Supports, node: Node) -> Support | None:
    """Zeros kept by every op of one operand."""
    op = OPS.get(node.op)
    if op is not None and op.support is None and op.elementwise and len(node.inputs) == 1:
        return self._known[node.inputs[0]]
    return evaluate_support(self, node)


evaluate_support = dependence.Supports.evaluate


def distinct(self: Inverter, p: Any, node: Node) -> list[int]:
    """Operands counted by value."""
    slots = [k for k, i in enumerate(node.inputs) if i in p.unknown]
    return [k for k in slots if node.inputs.index(node.inputs[k]) == k]


def any_above(self: Inverter, p: Any, stuck: list[int]) -> dict[int, list[int]]:
    """Every unknown value above an exit, whether or not other unknown ones reach it."""
    from flowlang.ir.types import TensorType

    return {
        m: sorted(
            (n for n in self.graph.reachable([m]) & p.unknown if isinstance(self.graph[n].type, TensorType)),
            reverse=True,
        )
        for m in stuck
    }


def single_exits(self: Inverter, u: int, exits: list[int]) -> list[tuple[int, ...]]:
    return [(e,) for e in exits if self.graph[e].tensor.count == self.graph[u].tensor.count]


def ends_anyhow(self: Inverter, p: Any) -> bool:
    return set(p.targets) <= set(p.members)


def drops_all(relation: Relation | None, rows: tuple[str, ...], order: Any) -> bool:
    return relation is not None and not relation.pointwise()


def with_assumed(self: Inverter, p: Any) -> list[int]:
    return sorted({*p.members, *(n for n in p.cut if n not in p.unknown)} - set(p.targets), reverse=True)


def touching(pieces: list[Interval]) -> int:
    lo, hi = min(iv.lo for iv in pieces), max(iv.hi for iv in pieces)
    return 1 if lo >= 0 else -1 if hi <= 0 else 0


def unexpanded(self: Builder, id: int, over: Any) -> int:
    return self.sum_all(id)


def image_of_all(self: Any, domain: Interval, sign: int) -> Interval:
    return REAL


def no_violations(self: Any, region: Any) -> list[Any]:
    return []


def bounds_alone(self: Any, program: Any, operands: Any) -> Any:
    return replace(program_bounds(self, program, operands), violations=())


program_bounds = analyse.Analyses.program_bounds


def unexplained(*_: object) -> Failure:
    return Failure("FL0401", "not invertible", None)


def weigh_all(plan: Any) -> Any:
    return (n.id for n in plan.region.graph if n.op in ("call", "repeat"))


def one_axis(matrix: Any) -> Any:
    """A matrix rule whose log-det stands for all other axes too."""

    def rule(b: Builder, node: Node, slot: int, args: Sequence[int], out: int) -> Any:
        found = matrix(b, node, slot, args, out)
        return replace(found, consumed=node.tensor.names + found.consumed)

    return rule


def constant_of(value: float) -> Callable[..., float]:
    return lambda *_: value


def whole_domain(domain: Interval, parts: int) -> list[Interval]:
    return [domain]


def one_by_one(outer: Matrix, first: Matrix, second: Matrix) -> tuple[tuple[tuple[int, Matrix], ...], ...]:
    """Each part of a split axis by itself."""
    return (((0, product(outer, first)), (1, product(outer, second))),)


def two_at_once(*args: Any) -> tuple[int, ...]:
    return tuple(k // 2 for k in rounds(*args))


rounds = scan.rounds


def any_parameter(node: Node) -> bool:
    return node.op == "param"


def one(*_: object) -> float:
    return 1.0


def first_two(self: Any, a: int, b: int) -> tuple[int, int]:
    return a, b


def unbounded_product(node: Node, types: Any, slot: int, ivs: Sequence[Interval]) -> float:
    return 1.0


SWITCHES: tuple[Switch, ...] = (
    Switch("A1", "index identity is not name identity", "reversed reader", ((dependence, "local_relation", by_name), (search, "local_relation", by_name))),
    Switch("A1", "every way of depending counts", "earlier rows, and earlier in the row", ((Relation, "union", lambda self, other: self),)),
    Switch("A1", "a merged axis is split in lexicographic parts", "raster", ((relation, "lexicographic", one_by_one),)),
    Switch("A1", "the batch is no axis to mix", "half shifted by the batch", (), tuple((name, "pools", False) for name, op in OPS.items() if op.pools)),
    Switch("A2", "support is where a value is exactly zero", "triangle lost by exp", ((dependence.Supports, "evaluate", passed_on),)),
    Switch("A2", "empty is not no information", "all but nothing", ((scan, "reads_nothing", no),)),
    Switch("A3", "the members end exactly as the inputs", "an emission without a draw", ((Inverter, "finished", ends_anyhow),)),
    Switch("A3", "operands count by slot", "a difference of one value", ((Inverter, "unknown_slots", distinct),)),
    Switch("A3", "a solved operand has every axis", "one number broadcast", ((Inverter, "missing_axes", lambda *_: []), (Inverter, "unlifted", nothing))),
    Switch("A3", "slices move knowledge only if they partition", "overlapping slices", ((Inverter, "partitions", yes),)),
    Switch("A3", "integers are dequantised", "whole numbers without end", ((Inverter, "real", yes),)),
    Switch("A3", "digits are told apart by a number below one", "noise wider than a step", ((Inverter, "below_one", yes),)),
    Switch("A4", "exits are those that u dominates", "both halves scaled by each other", ((Inverter, "dominators", any_above), (Inverter, "sound_region", yes))),
    Switch("A4", "exits together", "both halves by earlier slices", ((Inverter, "choices", single_exits),)),
    Switch("A5.2", "only the strict part is dropped", "mean of earlier and own", ((scan, "drops", drops_all),)),
    # Each of the two keeps out what the other lets in: an exit outside has a node outside before it.
    Switch("A5.1", "exits and what is used lie within the order", "before and after", ((scan, "exit_within", scan.same_sizes), (scan, "usable", scan.same_sizes))),
    Switch("A5.3", "slice knowledge passes through equal slices only", 11, ((Inverter, "slicewise", yes),)),
    Switch("A5.3", "nothing is gathered along a scanned axis", "halves swapped, shifted and swapped back", ((Inverter, "slicewise", yes),)),
    Switch("A5.4", "inner fallbacks read nothing across slices", "what a later place holds", ((Inverter, "within_slice", yes),)),
    Switch("A5", "slices go at once where none reads another", "raster", ((scan, "rounds", two_at_once),)),
    Switch("A5", "what is causal is its strict part and its diagonal", "x + tanh of a cumulative sum", ((forms, "split_causal", nothing),)),
    Switch("A5.5", "assumed nodes are never solved from", "own autoregression", ((Inverter, "solvable", with_assumed), (Inverter, "finished", ends_anyhow))),
    Switch("A6", "all relations are equality", "reversed reader", ((scalar, "pointwise", yes),)),
    Switch("A6", "the exit has u's axes", "renamed on the way", ((scalar, "same_axes", yes),)),
    Switch("A6", "each op is continuous", "branches that do not meet", ((scalar.Proof, "continuous", yes),)),
    Switch("A6", "branches provably meet", "branches that meet elsewhere", ((scalar.Proof, "branches_meet", yes),)),
    Switch("A6", "the slope excludes 0", "flat between", ((scalar, "one_sign", touching),)),
    Switch("A6", "u is subdivided before bounding", "sine times tanh", ((scalar, "split", whole_domain),)),
    Switch("A6", "a ratio of polynomials is decided exactly", "cubic without a turn", ((scalar.Proof, "rational_sign", lambda self, domain: 0),)),
    Switch("A7", "the constant is below 1", "merged axis read crosswise", ((contraction, "contracts", yes),)),
    Switch("A7", "broadcasting costs √n", 546, (), (("expand", "lipschitz", constant_of(1.0)),)),
    Switch("A7", "the outer broadcast costs √n", "projection onto zero mean", ((contraction, "broadcast_cost", constant_of(1.0)),)),
    Switch("A7", "a sum costs √n", 546, (), (("sum", "lipschitz", constant_of(1.0)),)),
    Switch("A7", "a join takes the root of the sum of squares", "a join is a root of squares", ((lipschitz, "joined", max),)),
    Switch("A7", "a product needs bounded factors", "mixing contraction", (), (("mul", "lipschitz", unbounded_product),)),
    Switch("A7", "what jumps has no constant", "jumps", (), (("round", "lipschitz", constant_of(1.0)),)),
    Switch("A7", "a matrix that nothing bounds has no constant", "a network without bound", (), (("contract", "lipschitz", constant_of(0.9)),)),
    Switch("A8", "QᵀQ is one by the domain alone", "Sylvester without orthonormal columns", ((bottleneck, "orthonormal", any_parameter),)),
    Switch("A8", "ρ is strictly increasing", "radial below -1", ((polar, "positive", yes),)),
    # Each of the two keeps out what the other lets in: what is bounded has a divisor that vanishes on the way back.
    Switch("A8", "ρ is unbounded", "radial into a ball", ((polar, "unbounded", yes), (analyse.Analyses, "program_bounds", bounds_alone))),
    Switch("A8", "s + VU h(s) is itself proved", "planar with sine", ((lowrank, "kept_sign", lambda *_: 1),)),
    Switch("A8", "s + VU h(s) is onto", "planar that saturates", ((lowrank, "onto", yes),)),
    Switch("A9a", "partial ops are total on the data's domain", "log of all reals", ((analyse.Analyses, "violations", no_violations),)),
    Switch("A9b", "inverse ops are total on the support", "exp of a half, shifted", ((analyse.Analyses, "program_bounds", bounds_alone),)),
    Switch("A9b", "going back ends in the data's domain", "sum of halves on Positive", ((analyse, "leads_back", yes),)),
    Switch("A9", "what is emitted fills its support", "emission off its support", ((analyse, "fills", yes),)),
    Switch("A9c", "the image of a scalar map", 301, ((scalar.Proof, "image", image_of_all),)),
    Switch("A9d", "a weighted sum lies in the hull", "mixture of tanh", ((ranges, "hull_operand", nothing),)),
    Switch("A9e", "what is inverted lies in the image", "inverse outside its image", ((analyse.Analyses, "program_bounds", bounds_alone),)),
    Switch("A10", "a local log-det is expanded to all axes", "scale of one axis", ((Builder, "total", unexpanded),)),
    Switch("A10", "a matrix rule counts for each index of the other axes", "matrix over one axis", (), (("contract", "log_det", one_axis(OPS["contract"].log_det)),)),
    Switch("A11", "a constant mask splits the index set", "printed RealNVP", ((analyse, "split_by_mask", nothing),)),
    # Each of the two keeps out what the other lets in: dividing by a determinant that may be 0 is not total.
    Switch("A11", "the determinant of a block excludes 0", "mixing that may be singular", ((blocks, "regular", yes), (analyse.Analyses, "program_bounds", bounds_alone))),
    Switch("A11", "parts of a block have the same axes", "one part broadcast", ((blocks, "alike", yes),)),
    Switch("A12", "calls that only condition do not weigh", "own bijector as a conditioner", ((search.Plan, "inverted_calls", weigh_all),)),
    Switch("A12", "a call's context is an operand", "called with its own mirror", ((Inverter, "context_known", yes),)),
    Switch("A12", "what draws is a step of the inverse", "a draw in a conditioner", ((Inverter, "unbalanced", nothing),)),
    Switch("A12", "networks of a bijector do not draw", "a network that draws", ((body, "draws", no),)),
    Switch("A13", "the placeholder lies in the domain", "triangle of logs", ((replay, "placeholder", constant_of(0.0)),)),
    Switch("A14", "what reaches no output is told as lost", "a half twice", ((explain, "lost", unexplained),), says="dimensions are lost"),
    Switch("A14", "a condition that fails is told before all else", "scale by a half may vanish", ((explain, "may_vanish", nothing),), says="may be zero"),
    Switch("A14", "a pointwise region is told by its slope", "sine too steep", ((explain, "noted", nothing),), says="strictly monotone"),
    Switch("A14", "a pointwise region is told by its jump", "floor", ((explain, "noted", nothing),), says="jumps"),
    Switch("A14", "what is causal, not strictly, is told with its axis", "not strictly causal", ((explain, "not_strict", nothing),), says="causal along `D`"),
    Switch("A14", "what arrives twice is told with both paths", "both halves scaled by each other", ((explain, "twice", nothing),), says="arrives twice"),
    Switch("A14", "totality is told before invertibility", "division by a half", ((analyse.Analyses, "violations", no_violations),), says="needs a divisor"),
    Switch("A15", "coefficients are numbers", "coefficient that is no number", ((linear.Forms, "number", one),)),
    # What depends on the unknown value is no number either.
    Switch("A15", "one factor is known", "linear and a product", ((linear.Forms, "one_of", first_two), (linear.Forms, "number", one))),
    Switch("A15", "the matrix is regular with room to spare", "projection of three", ((linear, "regular", yes),)),
    Switch("A16", "rules by hand are verified by numbers", 248, ((judge, "wrong_rules", lambda *_: []),)),
    Switch("A16", "points of spheres move whole", 153, ((analyse, "off_the_sphere", nothing),)),
)  # fmt: skip
