"""Proof of invertibility by propagation of knowledge, with fallbacks (ANALYSIS.md A3 to A9).

A member is a block of coordinates whose value is known when running backwards: at first the outputs
and emissions. Each step swaps one member for another of equal dimension; in the end the members must
be exactly the inputs and draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowlang.analysis.dependence import Dependence, Summaries, call_relation, local_relation
from flowlang.analysis.ranges import Ranges
from flowlang.derive.jvp import NoDerivative, tangent
from flowlang.derive.plan import (
    CallInverse,
    Failure,
    FixedPoint,
    Gather,
    Plan,
    Scalar,
    Scan,
    Solve,
    Step,
    Unjoin,
)
from flowlang.ir.build import Builder
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.interval import REAL, Interval, point, split
from flowlang.ir.lipschitz import constant
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import Need
from flowlang.ir.relation import Relation
from flowlang.ir.types import TensorType
from flowlang.source import Span

if TYPE_CHECKING:
    from flowlang.derive.analyse import Analyses

SUBDIVISIONS = 64


@dataclass(frozen=True)
class ScanContext:
    """One scanned axis: the axis of each slice-known node that carries it."""

    carriers: dict[int, str]
    slice_known: frozenset[int]
    dependence: Dependence


@dataclass
class Problem:
    """One search: members to targets."""

    members: Counter[int]
    targets: frozenset[int]
    unknown: set[int]
    scans: tuple[ScanContext, ...] = ()
    cut: frozenset[int] = frozenset()
    steps: list[Step] = field(default_factory=list)
    slice_known: set[int] = field(default_factory=set)
    conditions: list[tuple[Node, int, Need | str]] = field(default_factory=list)
    notes: list[Failure] = field(default_factory=list)
    lost: int | None = None


class Inverter:
    """The search in one region."""

    def __init__(self, region: Region, analyses: Analyses):
        self.region = region
        self.graph = region.graph
        self.analyses = analyses
        self.summaries: Summaries = analyses.summaries
        self.ranges: Ranges = analyses.ranges(region)
        self._dependence: dict[tuple[int, frozenset[int]], Dependence] = {}
        self._failed: set[tuple[int, int, str]] = set()

    # Facts, for the ops' rules.

    def interval(self, node: int) -> Interval:
        return self.ranges.interval(node)

    def node(self, node: int) -> Node:
        return self.graph[node]

    def dependence(self, entry: int, cut: frozenset[int] = frozenset()) -> Dependence:
        key = (entry, cut)
        if key not in self._dependence:
            self._dependence[key] = Dependence(self.graph, entry, self.summaries, cut)
        return self._dependence[key]

    # ---- the whole region -----------------------------------------------------------------------

    def run(self) -> Plan | Failure:
        region, graph = self.region, self.graph
        targets = frozenset([*region.inputs, *(d.value for d in region.draws)])
        results = [*region.outputs, *(e.value for e in region.emissions)]
        unknown = descendants(graph, targets)
        problem = Problem(Counter(results), targets, set(unknown))
        wanted = sum(graph[t].tensor.count for t in targets)
        have = sum(graph[r].tensor.count for r in results)
        reaching = graph.reachable(results)
        for t in targets:
            if t not in reaching:
                return self.lost(t, f"the value of {self.called(t)} reaches no output", have, wanted)
        duplicate = [r for r, n in Counter(results).items() if n > 1]
        if duplicate:
            return self.lost(duplicate[0], "one value leaves twice", have, wanted)
        for m in list(problem.members):
            problem.unknown.discard(m)
        if self.propagate(problem):
            return Plan(problem.steps)
        if have != wanted:
            return Failure(
                "FL0402",
                f"not invertible: {wanted} dimensions go in and {have} come out",
                self.result_span(),
                suggestion="a bijector keeps the number of coordinates; `emit` lets some leave under their own distribution",
            )
        return self.explain(problem, have, wanted)

    # ---- propagation ----------------------------------------------------------------------------

    def propagate(self, p: Problem) -> bool:
        """Runs until the members are the targets (True) or nothing more can be done (False)."""
        for m in sorted(p.members):
            self.spread(p, m)
        while True:
            if self.finished(p):
                return True
            if p.lost is not None:
                return False
            if self.advance(p):
                continue
            if not self.fall_back(p):
                return False

    def finished(self, p: Problem) -> bool:
        return set(p.members) == set(p.targets) and all(n == 1 for n in p.members.values())

    def advance(self, p: Problem) -> bool:
        for m in sorted(p.members, reverse=True):
            if m in p.targets:
                continue
            if p.members[m] > 1:
                p.lost = m
                return False
            if self.step_from(p, m):
                return True
        return self.gather(p)

    def replace(self, p: Problem, old: Iterable[int], new: Iterable[int], step: Step) -> None:
        for o in old:
            p.members[o] -= 1
            if not p.members[o]:
                del p.members[o]
        p.steps.append(step)
        for n in new:
            p.members[n] += 1
            if n in p.unknown:
                p.unknown.discard(n)
                if p.scans:
                    p.slice_known.add(n)
        for n in new:
            self.spread(p, n)

    def spread(self, p: Problem, start: int) -> None:
        """A known value makes those known that need nothing else."""
        stack = [start]
        while stack:
            n = stack.pop()
            for user, _ in self.graph.users(n):
                if user.id in p.unknown and not any(i in p.unknown for i in user.inputs):
                    if p.scans and not self.slice_ok(p, user, None):
                        continue
                    p.unknown.discard(user.id)
                    if p.scans and any(i in p.slice_known for i in user.inputs):
                        p.slice_known.add(user.id)
                    stack.append(user.id)

    def slice_ok(self, p: Problem, node: Node, solved: int | None) -> bool:
        """A5.3: along every scanned axis the op relates equal indices of slice-known operands and its result."""
        for ctx in p.scans:
            own = self.carrier(ctx, node.id)
            slots = [k for k, i in enumerate(node.inputs) if i in p.slice_known or k == solved]
            if not slots:
                continue
            if own is None:
                return False
            for k in slots:
                other = self.carrier(ctx, node.inputs[k])
                if other is None:
                    return False
                local = self.local(p, node, k)
                if local is not None and not local.within(own, other, "=="):
                    return False
        return True

    def carrier(self, ctx: ScanContext, n: int) -> str | None:
        return ctx.carriers.get(n)

    def local(self, p: Problem, node: Node, slot: int) -> Relation | None:
        if node.op == "get":
            return Relation.full(node.tensor.axes, ())
        if node.op in ("call", "repeat"):
            if not isinstance(node.type, TensorType):
                return Relation.full((), self.graph[node.inputs[slot]].tensor.axes)
            return call_relation(self.graph, node, 0, slot, self.summaries)
        dep = self.dependence(self.region.inputs[0] if self.region.inputs else 0)
        return local_relation(self.graph, node, slot, [dep.support(j) for j in node.inputs])

    # ---- single steps ---------------------------------------------------------------------------

    def step_from(self, p: Problem, m: int) -> bool:
        node = self.graph[m]
        if node.op in ("join", "stack"):
            return self.unjoin(p, node)
        if node.op in ("call", "repeat"):
            return self.call_inverse(p, node)
        if node.op == "get":
            return self.call_inverse(p, self.graph[node.inputs[0]])
        unknown = [k for k, i in enumerate(node.inputs) if i in p.unknown]
        if not unknown:
            if all(i not in p.targets for i in node.inputs) or not node.inputs:
                p.lost = m
            return False
        if len(unknown) != 1:
            return False
        op, slot = OPS[node.op], unknown[0]
        if op.invert is None or op.needs is None:
            return False
        if p.scans and not self.slice_ok(p, node, slot):
            return False
        needs = op.needs(node, slot, self)
        if isinstance(needs, str):
            p.conditions.append((node, slot, needs))
            return False
        for need in needs:
            if not self.need_holds(need, node):
                p.conditions.append((node, slot, need))
                return False
        self.replace(p, [m], [node.inputs[slot]], Solve(m, slot))
        return True

    def need_holds(self, need: Need, node: Node) -> bool:
        return need.holds(self.interval(node.inputs[need.slot]))

    def unjoin(self, p: Problem, node: Node) -> bool:
        if not any(i in p.unknown for i in node.inputs):
            p.lost = node.id
            return False
        axis = node.attrs["axis"]
        for ctx in p.scans:
            if self.carrier(ctx, node.id) == axis and node.op == "join":
                return False
        known = [i for i in node.inputs if i not in p.unknown]
        if known or len(set(node.inputs)) != len(node.inputs):
            repeated = known[0] if known else next(i for i, n in Counter(node.inputs).items() if n > 1)
            # A part that is known already carries no coordinate of its own.
            p.lost = repeated
            return False
        self.replace(p, [node.id], list(node.inputs), Unjoin(node.id))
        return True

    def call_inverse(self, p: Problem, node: Node) -> bool:
        region: Region = node.attrs["region"]
        if region.kind not in ("bijector", "chain", "flow") or p.scans:
            return False
        if isinstance(node.type, TensorType):
            results = [node.id]
        else:
            results = [u.id for u, _ in self.graph.users(node.id) if u.op == "get"]
            indices = {self.graph[r].attrs["index"] for r in results}
            if len(indices) != len(result_types(node.type)):
                return False
        if any(r not in p.members for r in results):
            return False
        mapped = mapped_slots(node, region)
        context = [i for k, i in enumerate(node.inputs) if k not in mapped]
        if any(i in p.unknown for i in context):
            return False
        operands = [node.inputs[k] for k in mapped]
        if any(i not in p.unknown for i in operands) or len(set(operands)) != len(operands):
            p.lost = next((i for i in operands if i not in p.unknown), operands[0])
            return False
        if isinstance(self.analyses.plan(region), Failure):
            self.analyses.failed_calls.append((self.region, node))
            return False
        p.unknown.discard(node.id)
        self.replace(p, results, operands, CallInverse(node.id))
        return True

    def gather(self, p: Problem) -> bool:
        """Slices or picks that partition an axis of an unknown value, all of them members."""
        parts: dict[tuple[int, str], list[int]] = {}
        for m in sorted(p.members):
            node = self.graph[m]
            if node.op in ("slice", "pick") and node.inputs[0] in p.unknown:
                parts.setdefault((node.inputs[0], node.attrs["axis"]), []).append(m)
        for (value, axis), members in sorted(parts.items()):
            size = self.graph[value].tensor.size(axis)
            if any(self.carrier(ctx, value) == axis for ctx in p.scans):
                continue
            ranges = sorted((*self.extent(m), m) for m in members)
            at = 0
            for start, stop, _ in ranges:
                if start != at:
                    break
                at = stop
            else:
                if at == size:
                    ordered = tuple(m for _, _, m in ranges)
                    if p.scans and not all(self.carrier(c, value) is not None for c in p.scans):
                        continue
                    self.replace(p, ordered, [value], Gather(value, ordered))
                    return True
        return False

    def extent(self, m: int) -> tuple[int, int]:
        node = self.graph[m]
        if node.op == "pick":
            return node.attrs["index"], node.attrs["index"] + 1
        return node.attrs["start"], node.attrs["stop"]

    # ---- fallbacks ------------------------------------------------------------------------------

    def fall_back(self, p: Problem) -> bool:
        stuck = [m for m in sorted(p.members, reverse=True) if m not in p.targets]
        if not stuck:
            return False
        dominators = self.dominators(p, stuck)
        candidates = sorted({u for chain in dominators.values() for u in chain}, reverse=True)
        for u in candidates:
            exits = [m for m in stuck if u in dominators[m]]
            for e in exits:
                if self.graph[e].tensor.count != self.graph[u].tensor.count:
                    continue
                for name, attempt in (
                    ("scalar", self.scalar), ("scan", self.scan), ("low rank", self.low_rank), ("contraction", self.contraction),
                ):  # fmt: skip
                    key = (u, e, name)
                    if not p.scans and key in self._failed:
                        continue
                    step = attempt(p, u, e)
                    if step is not None:
                        self.replace(p, [e], [u], step)
                        return True
                    if not p.scans:
                        self._failed.add(key)
        return False

    def dominators(self, p: Problem, stuck: list[int]) -> dict[int, list[int]]:
        """For each stuck member, the unknown values that every way from the unknown targets to it crosses."""
        import networkx as nx  # takes longer than checking most specs: only where propagation sticks

        g: nx.DiGraph[int] = nx.DiGraph()
        root = -1
        g.add_node(root)
        allowed = p.unknown | set(stuck)
        for n in allowed:
            if n in p.targets and n in p.unknown:
                g.add_edge(root, n)
            for i in self.graph[n].inputs:
                if i in p.unknown and n not in p.targets:
                    g.add_edge(i, n)
        idom = nx.immediate_dominators(g, root)
        out: dict[int, list[int]] = {}
        for m in stuck:
            chain: list[int] = []
            at: int | None = idom.get(m)
            while at is not None and at != root:
                if isinstance(self.graph[at].type, TensorType):
                    chain.append(at)
                up = idom.get(at)
                at = None if up == at else up
            out[m] = chain
        return out

    def between(self, p: Problem, u: int, e: int) -> list[int]:
        """Unknown nodes on paths from u to e, both included."""
        # A path through a known value (one dropped by a scan, say) brings nothing unknown.
        free = p.unknown | {u, e}
        up, stack = {e}, [e]
        while stack:
            n = stack.pop()
            new = [i for i in self.graph[n].inputs if i in free and i not in up and n != u]
            up.update(new)
            stack.extend(new)
        below = {u}
        for n in sorted(up):
            if n != u and any(i in below for i in self.graph[n].inputs):
                below.add(n)
        return sorted(up & below)

    def scalar(self, p: Problem, u: int, e: int) -> Step | None:
        graph = self.graph
        tu, te = graph[u].tensor, graph[e].tensor
        if set(tu.axes) != set(te.axes):
            return None
        path = self.between(p, u, e)
        dep = self.dependence(u, p.cut)
        for n in path:
            if n == u:
                continue
            node = graph[n]
            if node.op in ("call", "repeat", "get"):
                return None
            relation = dep.of(n)
            if relation is None or not relation.pointwise():
                return None
            for slot, i in enumerate(node.inputs):
                if i in path and not OPS[node.op].continuous(slot):
                    p.notes.append(self.not_continuous(node))
                    return None
            if p.scans:
                for k, i in enumerate(node.inputs):
                    if i in path and not self.slice_ok(p, node, k):
                        return None
                if not self.slice_ok(p, node, None):
                    return None
        scratch = Scratch(self, u, e, path)
        if scratch.slope is None:
            if scratch.blocked is not None:
                p.notes.append(self.no_derivative(scratch.blocked))
            return None
        domain = self.interval(u)
        sign = scratch.sign(domain)
        if sign == 0:
            p.notes.append(self.not_monotone(u, e, path, scratch))
            return None
        return Scalar(u, e, tuple(path), sign > 0, domain, scratch.image(domain, sign))

    def scan(self, p: Problem, u: int, e: int) -> Step | None:
        graph = self.graph
        dep = self.dependence(u, p.cut)
        relation = dep.of(e)
        if relation is None:
            return None
        region = self.between(p, u, e)
        for axis in graph[u].tensor.names:
            if not graph[e].tensor.has(axis) or graph[u].tensor.size(axis) < 2:
                continue
            if any(self.carrier(ctx, u) == axis for ctx in p.scans):
                continue
            for reverse in (False, True):
                cmp = "<=" if reverse else ">="
                if not relation.within(axis, axis, cmp) or relation.within(axis, axis, "=="):
                    continue
                step = self.scan_along(p, u, e, axis, reverse, dep, region)
                if step is not None:
                    return step
            if not relation.within(axis, axis, ">=") and not relation.within(axis, axis, "<="):
                p.notes.append(self.not_causal(axis, u, e))
        return None

    def scan_along(
        self, p: Problem, u: int, e: int, axis: str, reverse: bool, dep: Dependence, region: list[int]
    ) -> Step | None:
        graph = self.graph
        size = graph[u].tensor.size(axis)
        cmp = "<=" if reverse else ">="
        carriers: dict[int, str] = {u: axis}
        dropped: set[int] = set()
        for n in region:
            if n == u:
                continue
            node = graph[n]
            if not isinstance(node.type, TensorType):
                continue
            relation = dep.of(n)
            if relation is None:
                continue
            names = [axis, *(x for x in node.tensor.names if x != axis)]
            for r in names:
                if node.tensor.has(r) and node.tensor.size(r) == size and relation.within(r, axis, cmp):
                    carriers[n] = r
                    if relation.restrict_equal(r, axis).is_empty():
                        dropped.add(n)
                    break
        if e in dropped or not dropped:
            return None
        # Tuple nodes of calls whose every result is dropped are dropped with them.
        for n in region:
            node = graph[n]
            if not isinstance(node.type, TensorType):
                gets = [x.id for x, _ in graph.users(n) if x.id in region]
                if gets and all(x in dropped for x in gets):
                    dropped.add(n)
        cut = p.cut | dropped
        inner_dep = Dependence(graph, u, self.summaries, cut)
        unknown = {
            n
            for n in region
            if n not in dropped
            and n != e
            and (n == u or not isinstance(graph[n].type, TensorType) or inner_dep.of(n) is not None)
        }
        # Values that depend on u only through dropped ones are known at the slice too.
        known_now = {n for n in region if n not in unknown and n != e and n not in dropped}
        ctx = ScanContext(carriers, frozenset(dropped), inner_dep)
        inner = Problem(
            Counter([e]),
            frozenset([u]),
            set(unknown),
            (*p.scans, ctx),
            frozenset(cut),
            slice_known={e, *dropped, *known_now},
        )
        inner.slice_known |= p.slice_known
        for n in sorted(known_now):
            if not self.slice_ok(inner, graph[n], None):
                inner.unknown.add(n)
                inner.slice_known.discard(n)
        if not self.propagate(inner):
            p.conditions.extend(inner.conditions)
            p.notes.extend(inner.notes)
            return None
        return Scan(u, e, axis, reverse, tuple(inner.steps), tuple(sorted(dropped)), tuple(sorted(unknown)))

    def contraction(self, p: Problem, u: int, e: int) -> Step | None:
        node = self.graph[e]
        if node.op != "add" or p.scans or node.tensor != self.graph[u].tensor or u not in node.inputs:
            return None
        g = node.inputs[1 - node.inputs.index(u)]
        if g == u or self.graph[g].tensor.names != node.tensor.names:
            return None
        found = constant(self.graph, u, g, self.interval, self.analyses.lipschitz)
        if found is None:
            return None
        if found >= 1:
            p.notes.append(
                Failure(
                    "FL0407",
                    f"not invertible: the Lipschitz constant of what is added to {self.called(u)} is {found:g}, "
                    "which is not below 1",
                    node.span,
                    suggestion="bound it, as in `lipschitz(net, 0.97)`",
                )
            )
            return None
        if self.interval(u) != REAL:
            return None
        return FixedPoint(u, e, g, tuple(self.between(p, u, e)), found)

    def low_rank(self, p: Problem, u: int, e: int) -> Step | None:
        """exit = u + w(s), s = V·u a scalar for each sample, and s + V·w(s) strictly monotone in s (A8)."""
        from flowlang.derive.lowrank import low_rank_update

        if p.scans:
            return None
        return low_rank_update(self, p.unknown, u, e)

    # ---- words ----------------------------------------------------------------------------------

    def called(self, n: int) -> str:
        node = self.graph[n]
        if node.label:
            return f"`{node.label}`"
        if node.op == "rename" or node.op in ("order", "expand", "slice", "get"):
            inner = self.called(node.inputs[0])
            return f"a part of {inner}" if node.op == "slice" else inner
        if node.op in ("call", "repeat"):
            return f"the result of `{node.attrs['region'].name}`"
        return f"the result of `{shown(node.op)}`"

    def result_span(self) -> Span | None:
        for o in self.region.outputs:
            if self.graph[o].span is not None:
                return self.graph[o].span
        return self.region.span

    def lost(self, n: int, why: str, have: int, wanted: int) -> Failure:
        span = self.result_span()
        kept = max(wanted - self.graph[n].tensor.count, 0) if n in self.region.inputs else None
        count = wanted - self.count_reaching()
        amount = f"{count} of {wanted}" if count > 0 else f"some of {wanted}"
        del kept
        return Failure(
            "FL0402",
            f"not invertible: {amount} dimensions are lost; {why}",
            span,
            suggestion="every coordinate must reach the result once",
        )

    def count_reaching(self) -> int:
        """How many input coordinates can be told apart from the outputs, by slices alone."""
        graph, region = self.graph, self.region
        seen: set[tuple[int, int]] = set()
        for x in region.inputs:
            dep = self.dependence(x)
            t = graph[x].tensor
            if t.rank != 1:
                return sum(graph[r].tensor.count for r in {*region.outputs})
            for r in {*region.outputs, *(e.value for e in region.emissions)}:
                relation = dep.of(r)
                if relation is None:
                    continue
                for part in relation.parts:
                    found: int | None = None
                    for (_, col), m in part:
                        if col == t.names[0]:
                            bits = 0
                            for row in m.bits():
                                bits |= row
                            found = bits if found is None else found & bits
                    if found is None:
                        return t.count
                    seen |= {(x, j) for j in range(t.count) if found >> j & 1}
        return len(seen)

    def not_continuous(self, node: Node) -> Failure:
        return Failure(
            "FL0405", f"not invertible: `{shown(node.op)}` jumps, so the map is not continuous here", node.span,
            suggestion="use a continuous function of the coordinate",
        )  # fmt: skip

    def no_derivative(self, n: int) -> Failure:
        node = self.graph[n]
        return Failure(
            "FL0404",
            f"not invertible: nothing shows that this is monotone; `{shown(node.op)}` has no derivative rule",
            node.span,
        )

    def not_monotone(self, u: int, e: int, path: list[int], scratch: Scratch) -> Failure:
        slope = scratch.bounds
        blame = [
            shown(self.graph[n].op)
            for n in path
            if self.graph[n].op
            in (
                "sin",
                "cos",
                "silu",
                "gelu",
                "square",
                "abs",
                "relu",
                "clamp",
                "min",
                "max",
                "tanh",
                "where",
                "pow",
                "mul",
            )
        ]
        through = ", ".join(f"`{b}`" for b in dict.fromkeys(blame))
        where = f"its slope may be anything in {slope}" if slope is not None else "its slope may change sign"
        notes = (f"the slope was bounded through {through}",) if through else ()
        span = self.graph[e].span
        return Failure(
            "FL0404", f"not invertible: this is not shown to be strictly monotone in {self.called(u)}: {where}", span,
            notes=notes, suggestion="bound the coefficients, as in `param a: Interval(0, 0.9)`, so that the slope keeps its sign",
        )  # fmt: skip

    def not_causal(self, axis: str, u: int, e: int) -> Failure:
        return Failure(
            "FL0406", f"not invertible: along `{axis}` the result depends on {self.called(u)} both before and after", self.graph[e].span,
            suggestion=f"make what it reads causal along `{axis}`",
        )  # fmt: skip

    def explain(self, p: Problem, have: int, wanted: int) -> Failure:
        """A14: which of the reasons is the one to show."""
        if p.lost is not None:
            return self.lost(p.lost, f"{self.called(p.lost)} is used where a new coordinate is needed", have, wanted)
        for _, call in self.analyses.failed_calls:
            if call.id in self.graph.reachable(list(p.members)):
                inner: Region = call.attrs["region"]
                found = self.analyses.plan(inner)
                if isinstance(found, Failure):
                    span = call.span if inner.library else found.span
                    return Failure(found.code, found.message, span, found.labels, found.notes, found.suggestion)
        stuck = [m for m in sorted(p.members, reverse=True) if m not in p.targets]
        m = stuck[0]
        node = self.graph[m]
        for cond, slot, need in p.conditions:
            if isinstance(need, Need):
                other = cond.inputs[need.slot]
                if need.slot != slot:
                    found_iv = self.interval(other)
                    return Failure(
                        "FL0403",
                        f"not invertible: {self.called(other)} {need.words} (it lies in {found_iv}), "
                        f"and the inverse of `{shown(cond.op)}` needs it nonzero",
                        cond.span,
                        suggestion=f"give it a domain without 0, as in `param {self.graph[other].label or 'scale'}: Positive[..]`, or use `exp(..)`",
                    )
        notes = p.notes
        for code in ("FL0405", "FL0404", "FL0407"):
            for f in notes:
                if f.code == code:
                    return f
        strict = self.causal_but_not_strict(p, m)
        if strict is not None:
            return strict
        for f in notes:
            if f.code == "FL0406" and self.mostly_causal(f):
                return f
        for cond, _, need in p.conditions:
            if isinstance(need, Need):
                return Failure(
                    "FL0403",
                    f"not invertible: {self.called(cond.inputs[need.slot])} {need.words}",
                    cond.span,
                    suggestion="restrict its domain, or use a function that is monotone on all of it",
                )
        twice = self.twice(p, stuck)
        if twice is not None:
            return twice
        for cond, _slot, need in p.conditions:
            if isinstance(need, str):
                return Failure("FL0403", f"not invertible: {need}", cond.span)
        unknown = [i for i in node.inputs if i in p.unknown]
        if len(unknown) == 1 and OPS[node.op].why_not.get("invert"):
            return Failure(
                "FL0403", f"not invertible: {OPS[node.op].why_not['invert']}, so {self.called(unknown[0])} cannot be told from it",
                node.span or self.result_span(),
            )  # fmt: skip
        return Failure(
            "FL0401",
            "not invertible: no way was found to tell the inputs from the result",
            node.span or self.result_span(),
        )

    def mostly_causal(self, f: Failure) -> bool:
        return False

    def causal_but_not_strict(self, p: Problem, m: int) -> Failure | None:
        """The exit is causal along an axis of an input, but something else is not strictly so."""
        for t in sorted(p.targets):
            if t not in p.unknown:
                continue
            dep = self.dependence(t)
            relation = dep.of(m)
            if relation is None:
                continue
            for axis in self.graph[t].tensor.names:
                if not self.graph[m].tensor.has(axis):
                    continue
                for cmp in (">=", "<="):
                    if relation.within(axis, axis, cmp) and not relation.within(axis, axis, "=="):
                        blame = self.not_strict_node(t, m, axis, dep)
                        label = (
                            ((blame.span, "this reads the same place as well as earlier ones"),)
                            if blame is not None and blame.span
                            else ()
                        )
                        return Failure(
                            "FL0406",
                            f"not invertible: what scales or shifts {self.called(t)} is causal along `{axis}`, but not strictly: "
                            f"at each place it reads that place itself",
                            self.graph[m].span,
                            labels=label,
                            suggestion=f"shift its input by one, as in `shift[{axis}]({self.graph[t].label or 'x'}, 1)`",
                        )
        return None

    def not_strict_node(self, t: int, m: int, axis: str, dep: Dependence) -> Node | None:
        for n in sorted(self.graph.reachable([m])):
            node = self.graph[n]
            if n == t or not isinstance(node.type, TensorType):
                continue
            relation = dep.of(n)
            if relation is not None and node.tensor.has(axis) and not relation.within(axis, axis, "=="):
                return node
        return None

    def twice(self, p: Problem, stuck: list[int]) -> Failure | None:
        """The smallest stuck node that an unknown value reaches along two ways."""
        for m in stuck:
            for n in sorted(self.graph.reachable([m]), reverse=True):
                node = self.graph[n]
                slots = [i for i in node.inputs if i in p.unknown]
                if len(slots) < 2 and not (len(slots) == 1 and len(node.inputs) > len(set(node.inputs))):
                    continue
                common: set[int] | None = None
                for i in slots:
                    up = self.graph.reachable([i]) & p.unknown
                    common = up if common is None else common & up
                if not common:
                    continue
                u = max(common)
                labels: list[tuple[Span, str]] = []
                for i in slots[:2]:
                    span = self.graph[i].span
                    if span is not None and not span.source.library:
                        labels.append((span, f"one way: through {self.called(i)}"))
                name = self.called(u)
                return Failure(
                    "FL0401",
                    f"not invertible: {name} arrives twice here, so it cannot be told from the result",
                    node.span or self.graph[m].span,
                    tuple(labels),
                    (
                        f"the result depends on {name} by itself and through "
                        + " and ".join(self.called(i) for i in slots if i != u),
                    ),
                    f"let the other factor or term read only what is kept, not {name} itself",
                )
        return None


def shown(op: str) -> str:
    """An op's name as the spec writes it."""
    signs = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "^", "neg": "-", "contract": "sum", "square": "^ 2"}
    return signs.get(op, op.removeprefix("reduce_"))


def descendants(graph: Graph, start: Iterable[int]) -> set[int]:
    seen = set(start)
    stack = list(seen)
    while stack:
        n = stack.pop()
        for user, _ in graph.users(n):
            if user.id not in seen:
                seen.add(user.id)
                stack.append(user.id)
    return seen


def mapped_slots(node: Node, region: Region) -> list[int]:
    """Which operands of a call are the callee's mapped inputs (results, when it is called inverted)."""
    if node.op == "repeat":
        return list(range(int(node.attrs["carried"])))
    if node.attrs.get("method") == "inverse":
        return list(range(len(region.outputs)))
    return list(range(len(region.inputs)))


class Scratch:
    """A copy of a pointwise path with its derivative, for bounding the slope."""

    def __init__(self, inv: Inverter, u: int, e: int, path: list[int]):
        self.graph = Graph()
        b = Builder(self.graph)
        env: dict[int, int] = {}
        inputs: dict[int, Interval] = {}
        on_path = set(path)
        for n in sorted(inv.graph.reachable([e])):
            node = inv.graph[n]
            if n == u or (n not in on_path and self.opaque(inv, node, on_path)):
                if not isinstance(node.type, TensorType):
                    continue
                if node.op == "const":
                    env[n] = b.copy(node, ())
                    continue
                env[n] = b.leaf("input", node.type, batched=True, name=f"v{n}")
                inputs[env[n]] = inv.interval(n)
            elif all(i in env for i in node.inputs):
                env[n] = b.copy(node, [env[i] for i in node.inputs])
        self.u, self.e = env[u], env[e]
        self.blocked: int | None = None
        self.slope: int | None = None
        self.bounds: Interval | None = None
        try:
            self.slope = tangent(b, inv.graph, env, on_path, u, e)
        except NoDerivative as stop:
            self.blocked = stop.node
        self.ranges = Ranges(self.graph, inputs, inv.ranges.call_bounds)

    def opaque(self, inv: Inverter, node: Node, path: set[int]) -> bool:
        """Known values enter as bounded inputs, but parts that structure the path keep their ops."""
        if node.op in ("const", "softmax", "order", "rename", "expand"):
            return node.op == "const" or not all(True for _ in node.inputs)
        return True

    def sign(self, domain: Interval) -> int:
        """+1 or -1 when the slope keeps that sign on the whole domain, else 0."""
        assert self.slope is not None
        self.bounds = self.ranges.interval(self.slope)
        if self.bounds.nonzero:
            return self.bounds.sign
        signs: set[int] = set()
        for piece in split(domain, SUBDIVISIONS):
            found = self.ranges.with_override(self.slope, self.u, piece)
            signs.add(found.sign)
            if found.sign == 0 or len(signs) > 1:
                return 0
        return signs.pop() if len(signs) == 1 else 0

    def image(self, domain: Interval, sign: int) -> Interval:
        """What the map surely reaches: between its limits at the ends of the domain (A9c)."""
        at_lo = self.ranges.with_override(self.e, self.u, point(domain.lo))
        at_hi = self.ranges.with_override(self.e, self.u, point(domain.hi))
        low, high = (at_lo, at_hi) if sign > 0 else (at_hi, at_lo)
        if low.hi < high.lo:
            return Interval(low.hi, high.lo, True, True)
        bounds = self.bounds
        if domain == REAL and bounds is not None and (bounds.lo > 0 or bounds.hi < 0):
            return REAL
        return Interval(0.0, 0.0, True, True)


Attempt = Callable[[Problem, int, int], Step | None]
