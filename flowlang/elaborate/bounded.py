"""Networks with a certified Lipschitz constant: every weight is scaled by its exact norm."""

from __future__ import annotations

from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Region
from flowlang.ir.interval import REAL, Interval
from flowlang.ir.lipschitz import constant
from flowlang.ir.types import TensorType

ROUNDS = 60


class Unbounded(Exception):
    """The network has a part whose constant is not known."""


def bounded(region: Region, limit: float) -> Region:
    """A copy of a network whose constant in its first input is at most `limit`; every weight gets one bound."""
    entry = region.inputs[0]
    if measure(rewrite(region, 1.0), entry) is None:
        raise Unbounded("its layers are not all linear maps and functions of bounded slope")
    lo, hi = 1e-6, 1e6
    for _ in range(ROUNDS):
        mid = (lo * hi) ** 0.5
        found = measure(rewrite(region, mid), entry)
        if found is not None and found <= limit:
            lo = mid
        else:
            hi = mid
    # The bound is rounded down so that the certificate holds in float arithmetic too.
    return rewrite(region, lo * (1 - 1e-6))


def measure(region: Region, entry: int) -> float | None:
    new = region.inputs[0]
    del entry

    def interval(_: int) -> Interval:
        return REAL

    found = 0.0
    for o in region.outputs:
        part = constant(region.graph, new, o, interval, lambda *_: None)
        if part is None:
            return None
        found += part * part
    return found**0.5


def rewrite(region: Region, bound: float) -> Region:
    """Every product of a parameter and a varying value gets its parameter's norm bounded."""
    graph = Graph()
    b = Builder(graph)
    env: dict[int, int] = {}
    for node in region.graph:
        if not isinstance(node.type, TensorType) or node.op in ("call", "repeat", "get"):
            raise Unbounded(
                f"it calls `{node.attrs['region'].name}`" if "region" in node.attrs else "it has parts of its own"
            )
        if not node.inputs:
            env[node.id] = graph.add(
                node.op, (), node.type, node.attrs, span=node.span, label=node.label, batched=node.batched
            ).id
            continue
        inputs = [env[i] for i in node.inputs]
        if node.op == "contract":
            for k in (0, 1):
                if not graph[inputs[k]].batched and graph[inputs[1 - k]].batched:
                    inputs[k] = b.op("norm_bounded", inputs[k], axes=tuple(node.attrs["axes"]), bound=bound)
        env[node.id] = b.copy(node, inputs)
    return Region(
        region.name, region.kind, graph, [env[i] for i in region.inputs], [env[i] for i in region.context],
        [env[o] for o in region.outputs], children=region.children, span=region.span, doc=region.doc,
        signature=f"{region.signature}, weights bounded", library=region.library,
    )  # fmt: skip
