"""The values that every way to a stuck result crosses, against networkx."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import networkx as nx

from flowlang.derive.search import Inverter
from flowlang.ir.types import SCALAR


def test_dominators_agree_with_networkx() -> None:
    draw = random.Random(3)
    for _ in range(300):
        count = draw.randint(2, 14)
        nodes: dict[int, Any] = {
            n: SimpleNamespace(inputs=tuple(draw.sample(range(n), min(n, draw.randint(0, 3)))), type=SCALAR)
            for n in range(count)
        }
        unknown = set(draw.sample(range(count), draw.randint(1, count)))
        targets = {n for n in unknown if not nodes[n].inputs or draw.random() < 0.2}
        stuck = draw.sample(range(count), draw.randint(1, count))
        found = Inverter.dominators(
            SimpleNamespace(graph=nodes), SimpleNamespace(unknown=unknown, targets=targets), stuck
        )
        g: nx.DiGraph[int] = nx.DiGraph()
        g.add_node(-1)
        for n in unknown | set(stuck):
            g.add_edges_from((-1, n) for _ in range(n in targets))
            g.add_edges_from((i, n) for i in nodes[n].inputs if i in unknown and n not in targets)
        idom = nx.immediate_dominators(g, -1)
        for m in stuck:
            chain, at = [], idom.get(m, -1)
            while at not in (-1, None):
                chain.append(at)
                at = idom[at]
            assert found[m] == chain
