"""The state of one search for an inverse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from flowlang.derive.plan import Failure, Step
from flowlang.ir.graph import Node
from flowlang.ir.ops.base import Need


@dataclass(frozen=True)
class ScanContext:
    """One scan around a problem: for each usable node its axes along the scanned ones, in their order."""

    carriers: Mapping[int, tuple[str, ...]]


@dataclass
class Problem:
    """One search: from members to targets.

    Under scans a value is *known*, or *known at the slice* (A5): right where every scanned axis stands,
    as long as the entry is right at the slices before.
    """

    members: Counter[int]
    targets: frozenset[int]
    unknown: set[int]
    scans: tuple[ScanContext, ...] = ()
    cut: frozenset[int] = frozenset()  # dropped nodes: they do not depend on the slice that is solved
    slice_known: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)
    conditions: list[tuple[Node, int, Need | str]] = field(default_factory=list)
    notes: list[Failure] = field(default_factory=list)
    lost: int | None = None
