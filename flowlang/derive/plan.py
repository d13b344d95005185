"""An inversion as found by the search: steps in the order in which they make values known."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowlang.ir.interval import Interval
from flowlang.source import Span

INVERSE_ORDER = ("analytic", "bracketing", "scan", "fixed point", "integration")


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
class Scalar:
    """A strictly monotone map of each entry, solved by bracketing."""

    entry: int
    exit: int
    path: tuple[int, ...]
    increasing: bool
    domain: Interval
    image: Interval


@dataclass(frozen=True, slots=True)
class Scan:
    """Slice after slice along an axis: everything else reads earlier slices only."""

    entry: int
    exit: int
    axis: str
    reverse: bool
    steps: tuple[Step, ...]
    dropped: tuple[int, ...]
    unknown: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """entry + g(entry) = exit for a certified contraction g."""

    entry: int
    exit: int
    residual: int  # the node g(entry)
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


Step = Solve | Unjoin | Gather | CallInverse | Scalar | Scan | FixedPoint | LowRank


@dataclass
class Plan:
    """How a region is inverted."""

    steps: list[Step] = field(default_factory=list)
    ways: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a region is not invertible, in the spec's words."""

    code: str
    message: str
    span: Span | None
    labels: tuple[tuple[Span, str], ...] = ()
    notes: tuple[str, ...] = ()
    suggestion: str | None = None
