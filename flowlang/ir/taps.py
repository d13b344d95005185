"""Places inside a net: named values that a call reads out beside the results, or puts its own in the place of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.ir.text import readable
from flowlang.ir.types import Axis, TensorType

if TYPE_CHECKING:
    from flowlang.ir.graph import Region

TAPPED = "tapped_"  # before the number of a program that reads or replaces inner values
Place = tuple[int, ...]  # the calls that lead to a value, from the outside in, then the value


@readable
@dataclass(frozen=True, slots=True)
class Taps:
    """Inner values that one program of a region gives beside its results, and those that it is given instead."""

    read: tuple[Place, ...] = ()
    write: tuple[Place, ...] = ()

    def below(self, call: int) -> Taps:
        """What is asked of a call on the way, seen from inside."""
        inner = [tuple(p[1:] for p in places if len(p) > 1 and p[0] == call) for places in (self.read, self.write)]
        return Taps(*inner)

    def calls(self) -> list[int]:
        """The calls on the way to a place, each once."""
        return sorted({p[0] for p in (*self.read, *self.write) if len(p) > 1})


def method_of(region: Region, taps: Taps) -> str:
    """The name of the program that does so; the first time it is asked for, regions on the way are told too."""
    for call in taps.calls():
        method_of(region.graph[call].attrs["region"], taps.below(call))
    if taps not in region.taps:
        region.taps.append(taps)
    return f"{TAPPED}{region.taps.index(taps)}"


def taps_of(region: Region, method: str) -> Taps | None:
    """What a program of this name reads and replaces; None for programs of other kinds."""
    return region.taps[int(method.removeprefix(TAPPED))] if method.startswith(TAPPED) else None


def place_type(region: Region, place: Place) -> TensorType:
    """The type of the value at a place: what the calls on the way are lifted over stands in front."""
    if len(place) == 1:
        return region.graph[place[0]].tensor
    call = region.graph[place[0]]
    inner = place_type(call.attrs["region"], place[1:])
    front: Any = call.attrs.get("lifted", ())
    return TensorType((*(Axis(n, s) for n, s in front), *inner.axes), inner.kind)
