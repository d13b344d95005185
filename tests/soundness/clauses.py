"""A switch for each clause of ANALYSIS.md: what it is without that clause.

Each clause is one small function of the compiler; a switch replaces it, in tests only. `WITNESSES` holds for
each one a map or a random graph that the compiler then judges wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from flowlang.analysis import dependence, ranges
from flowlang.derive import analyse, contraction, lowrank, replay, scalar, scan, search
from flowlang.derive.search import Inverter
from flowlang.ir import lipschitz
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node
from flowlang.ir.interval import REAL, Interval
from flowlang.ir.ops import OPS
from flowlang.ir.relation import Relation, Support


@dataclass(frozen=True)
class Switch:
    """Turns one clause off: replaced attributes of modules or classes, and replaced rules of ops."""

    clause: str
    words: str
    patches: tuple[tuple[Any, str, Any], ...] = ()
    ops: tuple[tuple[str, str, Any], ...] = ()

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
        m: sorted((n for n in self.graph.reachable([m]) & p.unknown if isinstance(self.graph[n].type, TensorType)), reverse=True)
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


def weigh_all(plan: Any) -> Any:
    return (n.id for n in plan.region.graph if n.op in ("call", "repeat"))


def constant_of(value: float) -> Callable[..., float]:
    return lambda *_: value


def unbounded_product(node: Node, types: Any, slot: int, ivs: Sequence[Interval]) -> float:
    return 1.0


SWITCHES: tuple[Switch, ...] = (
    Switch("A1", "index identity is not name identity", ((dependence, "local_relation", by_name), (search, "local_relation", by_name))),
    Switch("A1", "every way of depending counts", ((Relation, "union", lambda self, other: self),)),
    Switch("A2", "support is where a value is exactly zero", ((dependence.Supports, "evaluate", passed_on),)),
    Switch("A2", "empty is not no information", ((scan, "reads_nothing", no),)),
    Switch("A3", "the members end exactly as the inputs", ((Inverter, "finished", ends_anyhow),)),
    Switch("A3", "operands count by slot", ((Inverter, "unknown_slots", distinct),)),
    Switch("A3", "a solved operand has every axis", ((Inverter, "missing_axes", lambda *_: []), (Inverter, "unlifted", nothing))),
    Switch("A3", "slices move knowledge only if they partition", ((Inverter, "partitions", yes),)),
    Switch("A3", "integers are dequantised", ((Inverter, "real", yes),)),
    Switch("A4", "exits are those that u dominates", ((Inverter, "dominators", any_above), (Inverter, "sound_region", yes))),
    Switch("A4", "exits together", ((Inverter, "choices", single_exits),)),
    Switch("A5.2", "only the strict part is dropped", ((scan, "drops", drops_all),)),
    # Each of the two keeps out what the other lets in: an exit outside has a node outside before it.
    Switch("A5.1", "exits and what is used lie within the order", ((scan, "exit_within", scan.same_sizes), (scan, "usable", scan.same_sizes))),
    Switch("A5.3", "slice knowledge passes through equal slices only", ((Inverter, "slicewise", yes),)),
    Switch("A5.3", "no gathering along a scanned axis", ((Inverter, "barred", no),)),
    Switch("A5.4", "inner fallbacks read nothing across slices", ((Inverter, "within_slice", yes),)),
    Switch("A5.5", "assumed nodes are never solved from", ((Inverter, "solvable", with_assumed), (Inverter, "finished", ends_anyhow))),
    Switch("A6", "all relations are equality", ((scalar, "pointwise", yes),)),
    Switch("A6", "the exit has u's axes", ((scalar, "same_axes", yes),)),
    Switch("A6", "each op is continuous", ((scalar.Proof, "continuous", yes),)),
    Switch("A6", "branches provably meet", ((scalar.Proof, "branches_meet", yes),)),
    Switch("A6", "the slope excludes 0", ((scalar, "one_sign", touching),)),
    Switch("A7", "the constant is below 1", ((contraction, "contracts", yes),)),
    Switch("A7", "broadcasting costs √n", (), (("expand", "lipschitz", constant_of(1.0)),)),
    Switch("A7", "the outer broadcast costs √n", ((contraction, "broadcast_cost", constant_of(1.0)),)),
    Switch("A7", "a sum costs √n", (), (("sum", "lipschitz", constant_of(1.0)),)),
    Switch("A7", "a join takes the root of the sum of squares", ((lipschitz, "joined", max),)),
    Switch("A7", "a product needs bounded factors", (), (("mul", "lipschitz", unbounded_product),)),
    Switch("A7", "what jumps has no constant", (), (("round", "lipschitz", constant_of(1.0)),)),
    Switch("A8", "s + VU h(s) is itself proved", ((lowrank, "kept_sign", lambda *_: 1),)),
    Switch("A8", "s + VU h(s) is onto", ((lowrank, "onto", yes),)),
    Switch("A9a", "partial ops are total on the data's domain", ((analyse.Analyses, "violations", no_violations),)),
    Switch("A9b", "inverse ops are total on the support", ((analyse.Analyses, "program_bounds", bounds_alone),)),
    Switch("A9b", "going back ends in the data's domain", ((analyse, "leads_back", yes),)),
    Switch("A9", "what is emitted fills its support", ((analyse, "fills", yes),)),
    Switch("A9c", "the image of a scalar map", ((scalar.Proof, "image", image_of_all),)),
    Switch("A9d", "a weighted sum lies in the hull", ((ranges, "hull_operand", nothing),)),
    Switch("A10", "a local log-det is expanded to all axes", ((Builder, "total", unexpanded),)),
    Switch("A12", "a draw is balanced", ((Inverter, "unbalanced", nothing),)),
    Switch("A12", "calls that only condition do not weigh", ((search.Plan, "inverted_calls", weigh_all),)),
    Switch("A13", "the placeholder lies in the domain", ((replay, "placeholder", constant_of(0.0)),)),
)  # fmt: skip
