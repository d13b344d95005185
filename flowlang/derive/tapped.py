"""A net's forward program that also gives inner values, or takes others in their place (`v.tap(..)`, `v.with(..)`)."""

from __future__ import annotations

from flowlang.derive.program import Program
from flowlang.derive.programs import update
from flowlang.derive.replay import Replay
from flowlang.ir.graph import Node, Region, result_types
from flowlang.ir.taps import Place, Taps, method_of, place_type
from flowlang.ir.types import TupleType


def tapped_program(region: Region, name: str, taps: Taps) -> Program:
    """Results, then what is read; the inputs, the context, then what replaces inner values."""
    r = TappedReplay(region, taps)
    r.program.name = name
    for i in region.inputs:
        r.feed(i)
    r.feed_context()
    for place in taps.write:
        r.hand(place)
    outputs = [r.value(o) for o in region.outputs]
    outputs += [r.read(place) for place in taps.read]
    update(r, region.updates)
    return r.finish(outputs, log_det=False)


class TappedReplay(Replay):
    """Calls on the way to a place become calls of their own tapped programs."""

    def __init__(self, region: Region, taps: Taps):
        super().__init__(region, None, "forward")
        self.taps = taps
        self.handed: dict[Place, int] = {}
        self.found: dict[Place, int] = {}  # values read inside calls
        self.on_the_way = set(taps.calls())

    def hand(self, place: Place) -> None:
        """An input that stands for an inner value."""
        inner = self.region
        for call in place[:-1]:
            inner = inner.graph[call].attrs["region"]
        node = inner.graph[place[-1]]
        label = node.label or "value"
        new = self.b.leaf(
            "input",
            place_type(self.region, place),
            batched=True,
            span=node.span,
            label=label,
            name=label,
            role="context",
        )
        self.program.inputs.append(new)
        self.program.context += 1
        self.handed[place] = new
        if len(place) == 1:
            self.env[place[0]] = new

    def read(self, place: Place) -> int:
        if len(place) > 1:
            self.value(place[0])
        return self.found[place] if len(place) > 1 else self.value(place[0])

    def call(self, node: Node) -> None:
        if node.id not in self.on_the_way:
            super().call(node)
            return
        callee: Region = node.attrs["region"]
        inner = self.taps.below(node.id)
        inputs = [self.value(i) for i in node.inputs] + [self.handed[node.id, *place] for place in inner.write]
        types = result_types(node.type)
        moved = [place_type(self.region, (node.id, *place)) for place in inner.read]
        whole = (*types, *moved)
        attrs = {**dict(node.attrs), "method": method_of(callee, inner)}
        made = self.b.graph.add(
            node.op, tuple(inputs), whole[0] if len(whole) == 1 else TupleType(whole), attrs, span=node.span
        ).id
        values = [made] if len(whole) == 1 else [self.b.op_get(made, k, node.span) for k in range(len(whole))]
        self.env[node.id] = values[0] if len(types) == 1 else made
        if node.label and len(types) == 1:
            self.b.graph.relabel(values[0], node.label)
        for place, value in zip(inner.read, values[len(types) :], strict=True):
            self.found[node.id, *place] = value
