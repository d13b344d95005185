"""What an op is: one record with a rule for every analysis.

Rules get the node (for attributes), operand types, and, where they build graphs, a `Builder` with
the ids of operand values in the program being built. See docs/ops.md for how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flowlang.ir.interval import REAL, Interval
from flowlang.ir.types import TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node
    from flowlang.ir.relation import Relation, Support

Attrs = Mapping[str, Any]


class OpProblem(Exception):
    """A type rule's refusal; the caller knows the place."""

    def __init__(self, code: str, message: str, *, suggestion: str | None = None, notes: Sequence[str] = ()):
        super().__init__(message)
        self.code, self.message, self.suggestion, self.notes = code, message, suggestion, tuple(notes)


class NoTangent(Exception):
    """A jvp rule's refusal: the op has no derivative in that operand that is a graph."""


@dataclass(frozen=True, slots=True)
class Need:
    """What an operand must satisfy for a rule to hold: its values lie in `interval`.

    `nonzero` asks only that 0 is excluded. `words` complete "`e` ...": "may be zero".
    """

    slot: int
    interval: Interval = REAL
    nonzero: bool = False
    words: str = ""

    def holds(self, iv: Interval) -> bool:
        return iv.nonzero if self.nonzero else iv.within(self.interval)


@dataclass(frozen=True, slots=True)
class LocalLogDet:
    """log|det| of one inverse step as a value in the program.

    It is expanded over the solved operand's axes but `consumed` (the axes a matrix rule has summed
    over already), then summed. `value` None means exactly zero.
    """

    value: int | None
    consumed: tuple[str, ...] = ()


class Facts(Protocol):
    """What the analyses know about forward nodes while a rule decides whether it holds."""

    def interval(self, node: int) -> Interval: ...

    def node(self, node: int) -> Node: ...


Infer = Callable[[Sequence[TensorType], Attrs], Type]
DependRule = Callable[["Node", Sequence[TensorType], int, Sequence["Support | None"]], "Relation"]
IntervalRule = Callable[[Sequence[Interval], Sequence[TensorType], "Node"], Interval]
TotalRule = Callable[["Node", Sequence[TensorType]], Sequence[Need]]
JvpRule = Callable[["Builder", "Node", Sequence[int], int, int, int], "int | None"]
InvertRule = Callable[["Builder", "Node", int, Sequence["int | None"], int], int]
LogDetRule = Callable[["Builder", "Node", int, Sequence[int], int], LocalLogDet]
NeedsRule = Callable[["Node", int, Facts], "Sequence[Need] | str"]
CostRule = Callable[["Node", Sequence[TensorType]], int]
LipschitzRule = Callable[["Node", Sequence[TensorType], int, Sequence[Interval]], "float | None"]
SimplifyRule = Callable[["Builder", Sequence[int], Attrs], "int | None"]


@dataclass(frozen=True)
class Op:
    """One op. Rules that do not apply stay None; `why_not` says why for the registry test.

    infer       operand types, attrs -> result type; raises OpProblem
    depend      (node, operand types, slot, supports) -> local relation of result indices to operand
                indices; `supports[i]` is the known support of operand i or None
    support     (node, operand types, supports) -> support of the result or None
    interval    operand intervals, types, node -> bounds of the result (assumes `total` holds)
    total       what operands must satisfy for the op to be defined (log needs a positive one)
    continuous  (slot) -> whether the op has no jump in that operand
    jvp         (b, node, args, out, slot, tangent) -> contribution of that operand's tangent, or None
                for zero; `args`, `out` are ids in the program being built. Raises NoTangent where none exists
    invert      (b, node, slot, args, out) -> the operand from the result and the other operands
    needs       (node, slot, facts) -> the conditions of `invert`, or words that say why not
    log_det     (b, node, slot, args, out) -> log|d result / d operand|, other operands held fixed
    log_det_cost  cost class of that term: "0" (absent), "1", "D", or "D3:n" for a dense n x n matrix
    cost        FLOPs for one sample
    lipschitz   (node, types, slot, intervals) -> l2 constant in that operand, others held fixed
    simplify    smart constructor: an equal, simpler node, or None
    """

    name: str
    infer: Infer
    depend: DependRule
    elementwise: bool = False
    support: Callable[[Node, Sequence[TensorType], Sequence[Support | None]], Support | None] | None = None
    interval: IntervalRule | None = None
    total: TotalRule | None = None
    continuous: Callable[[int], bool] = lambda slot: True
    jvp: JvpRule | None = None
    invert: InvertRule | None = None
    needs: NeedsRule | None = None
    log_det: LogDetRule | None = None
    log_det_cost: str | Callable[[Node, int, Facts], str] = "D"
    cost: CostRule = lambda node, types: 0
    lipschitz: LipschitzRule | None = None
    simplify: SimplifyRule | None = None
    pure: bool = True  # equal calls may be merged
    pools: bool = False  # the result is one for the whole batch
    made: bool = False  # its nodes are made with their type, which no rule can tell
    why_not: Mapping[str, str] = field(default_factory=dict)
    doc: str = ""
