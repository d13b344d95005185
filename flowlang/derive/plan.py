"""An inversion as found by the search: steps in the order in which they make values known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from flowlang.ir.graph import Graph, Node, Region, Rule, result_types
from flowlang.ir.interval import Interval
from flowlang.ir.types import TensorType
from flowlang.source import Span

Order = tuple[tuple[str, bool], ...]  # scanned axes, the slowest first, and whether each runs backwards


@dataclass(frozen=True, slots=True)
class Solve:
    """One operand of a node from its value and the other operands."""

    node: int
    slot: int


@dataclass(frozen=True, slots=True)
class Unjoin:
    """The parts of a join or stack."""

    node: int


@dataclass(frozen=True, slots=True)
class Gather:
    """A value from slices or picks of it that partition an axis."""

    value: int
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CallInverse:
    """The inputs of a called bijector from all of its results."""

    node: int


@dataclass(frozen=True, slots=True)
class Integrate:
    """The start of a trajectory from its end: the same field, integrated backwards."""

    node: int


@dataclass(frozen=True, slots=True)
class Scalar:
    """A strictly monotone map of each entry, solved by bracketing."""

    entry: int
    exit: int
    path: tuple[int, ...]
    increasing: bool
    domain: Interval
    image: Interval
    assumed: tuple[tuple[int, Interval], ...] = ()  # known values that the proof reads, and their bounds there


@dataclass(frozen=True, slots=True)
class Scan:
    """Slice after slice in an order: everything else reads earlier slices only."""

    entry: int
    exits: tuple[int, ...]
    order: Order
    steps: tuple[Step, ...]
    domain: Interval
    dropped: tuple[int, ...]  # what reads earlier slices only
    region: tuple[int, ...]  # everything between entry and exits
    levels: tuple[
        int, ...
    ]  # for each slice in the order, the round that makes it right: those of one round are independent

    @property
    def axes(self) -> str:
        return ", ".join(axis for axis, _ in self.order)


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """entry + g(entry) = exit for a certified contraction g, a sum of terms."""

    entry: int
    exit: int
    residual: tuple[tuple[int, bool], ...]  # the terms of g(entry), and whether each is subtracted
    path: tuple[int, ...]
    constant: float


@dataclass(frozen=True, slots=True)
class LowRank:
    """exit = entry + w(s) with a bottleneck s = V·entry: s is solved first (planar, Sylvester, radial)."""

    entry: int
    exit: int
    update: int  # the node w
    bottleneck: int  # the node s
    project_axes: tuple[str, ...]
    weight: int  # the node V
    path: tuple[int, ...]  # from s to w
    increasing: bool
    image: Interval


@dataclass(frozen=True, slots=True)
class Digits:
    """node = a whole number + a number in (0, 1): both from the sum (dequantisation)."""

    node: int
    whole: int  # slots
    fraction: int


@dataclass(frozen=True, slots=True)
class Polar:
    """exit = offset + a(r)·arm, arm = entry - z0, r = |arm|: solved along rays (radial flows).

    a = over / under and slope / under² = d(r·a)/dr are polynomials in r and in scalars that do not depend on entry.
    """

    entry: int
    exit: int
    radius: int
    arm: int
    offset: tuple[tuple[float, int], ...]
    over: tuple[tuple[tuple[tuple[int, int], ...], float], ...]
    under: tuple[tuple[tuple[tuple[int, int], ...], float], ...]
    slope: tuple[tuple[tuple[tuple[int, int], ...], float], ...]


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """exit = entry + Q·h(s), s = Qᵀ·entry, Q with orthonormal columns: s ↦ s + h(s) is solved by a plan of its own."""

    entry: int
    exit: int
    update: int  # the node Q·h(s)
    bottleneck: int  # the node s
    weight: int  # the node Q
    inner: int  # the node h(s)
    plan: Plan  # of the region s ↦ s + h(s)
    outer: tuple[tuple[int, int], ...]  # (leaf of that region, node here)
    result: int  # that region's result


@dataclass(frozen=True, slots=True)
class Block:
    """exit i = sum over j of c_ij · entry j + k_i, entry for entry, with a determinant that excludes 0 (A11).

    `rows` has the polynomials c_i1 .. c_in, k_i as (monomial, factor) in known nodes.
    """

    entries: tuple[int, ...]
    exits: tuple[int, ...]
    rows: tuple[tuple[tuple[tuple[tuple[tuple[int, int], ...], float], ...], ...], ...]
    determinant: float | None  # where it is a number


@dataclass(frozen=True, slots=True)
class Linear:
    """The exits, entries in a row, are a matrix of numbers times those of entry, plus what is known.

    The matrix stands once for all indices of the axes `lifted`, and its determinant counts for each of them.
    """

    entry: int
    exits: tuple[int, ...]
    path: tuple[int, ...]
    lifted: tuple[str, ...]
    inverse: tuple[tuple[float, ...], ...]
    log_det: float


Step = (
    Block
    | Linear
    | Solve
    | Unjoin
    | Gather
    | CallInverse
    | Integrate
    | Scalar
    | Scan
    | FixedPoint
    | LowRank
    | Polar
    | Digits
    | Bottleneck
)


@dataclass
class Plan:
    """How a region is inverted: steps on the graph of `region`, which may be an equal form of the one asked about.

    With both rules given by hand there are no steps.
    """

    region: Region
    steps: list[Step] = field(default_factory=list)

    @property
    def inverse(self) -> Rule | None:
        """A hand-given inverse, which takes the place of the steps."""
        return self.region.rules.get("inverse")

    @property
    def log_det(self) -> Rule | None:
        """A hand-given log-det, which takes the place of the steps' own."""
        return self.region.rules.get("log_det")

    def inverted_calls(self) -> Iterator[int]:
        """The calls and integrations that are coordinates' own steps, those inside scans included."""
        stack = list(self.steps)
        while stack:
            step = stack.pop()
            if isinstance(step, CallInverse | Integrate):
                yield step.node
            elif isinstance(step, Scan):
                stack.extend(step.steps)


@dataclass(frozen=True)
class Failure:
    """Why a region is not invertible, in the spec's words."""

    code: str
    message: str
    span: Span | None
    labels: tuple[tuple[Span, str], ...] = ()
    notes: tuple[str, ...] = ()
    suggestion: str | None = None


def mapped_slots(node: Node, region: Region) -> list[int]:
    """Which operands of a call are the callee's mapped inputs (results, when it is called inverted)."""
    if node.op == "repeat":
        return list(range(int(node.attrs["carried"])))
    if node.attrs.get("method") == "inverse":
        return list(range(len(region.outputs)))
    return list(range(len(region.inputs)))


def call_results(graph: Graph, node: Node) -> list[int] | None:
    """The values of a call's results in their order; None when one of them is never read."""
    if isinstance(node.type, TensorType):
        return [node.id]
    gets = {u.attrs["index"]: u.id for u, _ in graph.users(node.id) if u.op == "get"}
    return [gets[k] for k in sorted(gets)] if len(gets) == len(result_types(node.type)) else None
