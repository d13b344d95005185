"""What a call in forward mode carries beside values, and the name of the program that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.ir.text import readable
from flowlang.ir.types import Axis, TensorType

if TYPE_CHECKING:
    from flowlang.ir.build import Builder

DIRECTION = "direction~"
FROZEN = "frozen_"  # before the name of a program: the same with parameters that get no gradient


@readable
@dataclass(frozen=True, slots=True)
class Tangents:
    """Which arguments of a region (inputs, then context) carry a tangent, and in how many directions at once.

    `trace`: the program gives the trace of the Jacobian along the unit vectors, and is fed no tangent.
    """

    slots: tuple[int, ...]
    directions: int | None = None
    trace: bool = False

    def type(self, t: TensorType) -> TensorType:
        """The type of a tangent of a value: directions in front."""
        axes = () if self.directions is None else (Axis(DIRECTION, self.directions),)
        return TensorType((*axes, *t.axes))

    @property
    def method(self) -> str:
        """The name of the program."""
        if self.trace:
            return "divergence"
        slots = "_".join(map(str, self.slots))
        return f"jvp_{slots}" if self.directions is None else f"jvp_{slots}_along_{self.directions}"

    @staticmethod
    def named(method: str) -> Tangents | None:
        """The tangents of a program's name, None for programs of other kinds."""
        if not method.startswith("jvp_"):
            return None
        slots, _, directions = method.removeprefix("jvp_").partition("_along_")
        return Tangents(tuple(map(int, slots.split("_"))), int(directions) if directions else None)

    def values(self, mapped: int, given: int) -> list[int]:
        """Which of a call's operands are the callee's arguments: `mapped` inputs, then context; the rest are tangents."""
        if self.trace:
            return list(range(given))
        moved = sum(k < mapped for k in self.slots)
        context = given - mapped - len(self.slots)
        return [*range(mapped), *range(mapped + moved, mapped + moved + context)]


PLUS = "divergence_plus_"  # with a number of probes


def trace_method(attrs: Mapping[str, Any], size: int) -> str:
    """The program of a field that finds its divergence as `integrate` says."""
    if attrs["trace"] == "hutchpp":
        return f"{PLUS}{min(int(attrs.get('probes', 1)), size)}"
    return "divergence" if attrs["trace"] == "exact" else "divergence_along"


def probes_of(method: str, t: TensorType) -> TensorType | None:
    """The noise that a program's estimate of the divergence reads; None for the exact one."""
    if method.startswith(PLUS):
        return TensorType((Axis(DIRECTION, 2 * int(method.removeprefix(PLUS))), *t.axes))
    return TensorType(t.axes) if method == "divergence_along" else None


def plain_method(attrs: Mapping[str, Any]) -> str:
    """The program that a call runs, whether parameters get gradients or not."""
    return str(attrs.get("method", "forward")).removeprefix(FROZEN)


def basis(b: Builder, t: TensorType) -> int:
    """The unit vectors of a space: 1 where the direction is the entry's flat index."""
    flat: int | None = None
    stride = t.count
    for a in t.axes:
        stride //= a.size
        index = b.op("index", axis=a.name, size=a.size)
        part = index if stride == 1 else b.mul(index, b.const(stride))
        flat = part if flat is None else b.add(flat, part)
    assert flat is not None
    same = b.op("eq", b.op("index", axis=DIRECTION, size=t.count), flat)
    return b.op("where", same, b.const(1.0), b.const(0.0))
