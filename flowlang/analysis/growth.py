"""Whether a velocity field is Lipschitz in its state for every value of its parameters.

Then its solutions exist for all times and are unique (Picard and Lindelöf), so that integration is a
bijection. Parameters count as fixed but unknown: what matters is that a constant exists, not its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from flowlang.ir.graph import Node, Region, result_types
from flowlang.ir.interval import REAL
from flowlang.ir.ops import OPS
from flowlang.ir.types import TensorType

PRODUCTS = ("mul", "contract", "conv")


@dataclass(frozen=True, slots=True)
class Growth:
    """What is known of a value that depends on the state; `blame` is the op that lost the constant."""

    lipschitz: bool = True
    bounded: bool = False
    blame: Node | None = None


class Fields:
    """Growth of regions' results in their arguments, computed once for each region."""

    def __init__(self) -> None:
        # Each entry keeps its region alive, so that no other can take its id.
        self._known: dict[tuple[int, tuple[Growth | None, ...]], tuple[Region, list[Growth | None]]] = {}

    def of(self, region: Region, arguments: tuple[Growth | None, ...]) -> list[Growth | None]:
        """Growth of each result, from that of the arguments (inputs, then context); None: independent."""
        key = (id(region), arguments)
        if key not in self._known:
            given = dict(zip([*region.inputs, *region.context], arguments, strict=False))
            values: dict[int, Growth | None] = {}
            calls: dict[int, list[Growth | None]] = {}
            for n in sorted(region.graph.reachable(list(region.outputs))):
                node = region.graph[n]
                if n in given:
                    values[n] = given[n]
                elif node.op in ("call", "repeat"):
                    calls[n] = self.call(node, [values[i] for i in node.inputs])
                    values[n] = calls[n][0]
                elif node.op == "get":
                    values[n] = calls[node.inputs[0]][node.attrs["index"]]
                else:
                    values[n] = step(node, [values[i] for i in node.inputs], region)
            self._known[key] = (region, [values[o] for o in region.outputs])
        return self._known[key][1]

    def call(self, node: Node, operands: list[Growth | None]) -> list[Growth | None]:
        region: Region = node.attrs["region"]
        if "tangents" in node.attrs:  # a derivative of what is Lipschitz need not be
            moves = any(o is not None for o in operands)
            return [Growth(False, False, node) if moves else None for _ in result_types(node.type)]
        if node.op != "repeat":
            return self.of(region, tuple(operands))
        carried = int(node.attrs["carried"])
        now = list(operands)
        for _ in range(carried + 2):
            found = self.of(region, tuple(now))
            merged = [worse(a, b) for a, b in zip(now[:carried], found, strict=True)]
            if merged == now[:carried]:
                break
            now[:carried] = merged
        return self.of(region, tuple(now))

    def loses(self, region: Region) -> Node | None:
        """The op by which a field (state first) loses its Lipschitz constant; None where it keeps one."""
        arguments = (Growth(), *(None for _ in [*region.inputs[1:], *region.context]))
        found = self.of(region, arguments)[0]
        return None if found is None or found.lipschitz else found.blame


def worse(a: Growth | None, b: Growth | None) -> Growth | None:
    if a is None or b is None:
        return a or b
    return Growth(a.lipschitz and b.lipschitz, a.bounded and b.bounded, a.blame or b.blame)


def step(node: Node, operands: list[Growth | None], region: Region) -> Growth | None:
    moving = [(k, g) for k, g in enumerate(operands) if g is not None]
    if not moving or not isinstance(node.type, TensorType):
        return None
    bounded = all(g.bounded for _, g in moving) or confined(node, region)
    for _, g in moving:
        if not g.lipschitz:
            return Growth(False, bounded, g.blame)
    if node.op in PRODUCTS:
        good = len(moving) == 1 or all(g.bounded for _, g in moving)
    elif node.op == "div":
        good = [k for k, _ in moving] == [0]
    elif node.op in ("clamp", "order", "rename", "expand"):
        good = True
    else:
        good = all(constant(node, k, region) for k, _ in moving)
    return Growth(good, bounded, None if good else node)


def constant(node: Node, slot: int, region: Region) -> bool:
    """Whether the op has a finite constant in that operand, wherever the operands are."""
    rule = OPS[node.op].lipschitz
    if rule is None:
        return False
    types = [region.graph[i].tensor for i in node.inputs]
    found = rule(node, types, slot, [REAL] * len(types))
    return found is not None and found < inf


def confined(node: Node, region: Region) -> bool:
    """Whether the op's results are bounded whatever its operands are."""
    rule = OPS[node.op].interval
    if rule is None:
        return False
    types = [region.graph[i].tensor for i in node.inputs]
    return rule([REAL] * len(types), types, node).finite


__all__ = ["Fields", "Growth"]
