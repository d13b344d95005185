"""Proof of invertibility by propagation of knowledge (ANALYSIS.md A3, A4).

A member is a block of coordinates whose value is known when running backwards: at first the outputs
and emissions. Each step swaps one member for another of equal dimension; in the end the members must
be exactly the inputs and draws. Where single steps do not suffice, a region between an unknown value
and the members that need it is judged as a whole, by the fallbacks of the sibling modules.

Each clause of ANALYSIS.md is one small function, so that the tests can turn it off by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from flowlang.analysis.dependence import Dependence, Supports, call_relation, local_relation
from flowlang.derive import blocks, bottleneck, contraction, explain, linear, lowrank, polar, scalar, scan
from flowlang.derive.plan import (
    CallInverse,
    Digits,
    Failure,
    Gather,
    Integrate,
    Plan,
    Solve,
    Step,
    Unjoin,
    call_results,
    mapped_slots,
)
from flowlang.derive.problem import Problem, ScanContext
from flowlang.derive.program import is_random
from flowlang.ir.graph import Node, Region
from flowlang.ir.interval import UNIT, Interval
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import Need
from flowlang.ir.relation import Relation
from flowlang.ir.tangents import trace_method
from flowlang.ir.types import TensorType

if TYPE_CHECKING:
    from flowlang.derive.analyse import Analyses


Fallback = Callable[["Inverter", Problem, int, tuple[int, ...]], Step | None]
FALLBACKS: Sequence[Fallback] = (
    scalar.scalar_map, scan.scan, lowrank.low_rank, bottleneck.bottleneck, polar.polar, linear.linear, contraction.contraction,
)  # fmt: skip


class Inverter:
    """The search in one region."""

    def __init__(self, region: Region, analyses: Analyses):
        self.region = region
        self.graph = region.graph
        self.analyses = analyses
        self.summaries = analyses.summaries
        self.ranges = analyses.ranges(region)
        self._dependence: dict[tuple[int, frozenset[int]], Dependence] = {}
        self._supports = Supports(self.graph)
        self._failed: set[tuple[object, ...]] = set()

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

    def local(self, node: Node, slot: int) -> Relation | None:
        """How a result index depends on an index of one operand; None for no dependence."""
        if not isinstance(node.type, TensorType) or node.op == "get":
            operand = self.graph[node.inputs[slot]].type
            rows = node.type.axes if isinstance(node.type, TensorType) else ()
            return Relation.full(rows, operand.axes if isinstance(operand, TensorType) else ())
        if node.op in ("call", "repeat"):
            return call_relation(self.graph, node, 0, slot, self.summaries)
        return local_relation(self.graph, node, slot, [self._supports.of(j) for j in node.inputs])

    # ---- the whole region -----------------------------------------------------------------------

    def run(self) -> Plan | Failure:
        region, graph = self.region, self.graph
        targets = [*region.inputs, *(d.value for d in region.draws)]
        results = [*region.outputs, *(e.value for e in region.emissions)]
        problem = Problem(Counter(results), frozenset(targets), graph.descendants(targets))
        problem.unknown.difference_update(results)
        wanted = sum(graph[t].tensor.count for t in targets)
        have = sum(graph[r].tensor.count for r in results)
        refused = self.refused_at_once(targets, results, have, wanted)
        if refused is not None:
            return refused
        if self.propagate(problem):
            plan = Plan(region, problem.steps)
            return self.unbalanced(plan) or plan
        if have != wanted:
            return explain.wrong_count(self, have, wanted)
        return explain.explain(self, problem, wanted)

    def refused_at_once(self, targets: list[int], results: list[int], have: int, wanted: int) -> Failure | None:
        for v in (*targets, *results):
            # Whole numbers come in to be dequantised, or pass untouched to a distribution on them.
            if not self.real(v) and v not in targets:
                return explain.not_real(self, v)
        reaching = self.graph.reachable(results)
        for n in sorted(reaching & self.graph.descendants(targets)):
            if OPS[self.graph[n].op].pools:
                return explain.couples_samples(self, n)
        for t in targets:
            if t not in reaching:
                return explain.lost(self, f"the value of {explain.called(self, t)} reaches no output", wanted)
        duplicate = [r for r, n in Counter(results).items() if n > 1]
        if duplicate:
            return explain.lost(self, "one value leaves twice", wanted)
        return None

    def unbalanced(self, plan: Plan) -> Failure | None:
        """A12: what draws or emits must be a step of the inverse, else its draw has no counterpart."""
        steps = set(plan.inverted_calls())
        region = self.region
        for n in sorted(self.graph.reachable([*region.outputs, *(e.value for e in region.emissions)])):
            node = self.graph[n]
            inner = node.attrs.get("region")
            if isinstance(inner, Region) and node.id not in steps and is_random(inner):
                return explain.unbalanced(self, node)
        return None

    def real(self, v: int) -> bool:
        """A3: a change of variables is one of real numbers; integers are dequantised first."""
        return self.graph[v].tensor.kind == "real"

    # ---- propagation ----------------------------------------------------------------------------

    def propagate(self, p: Problem) -> bool:
        """Runs until the members are the targets (True) or nothing more can be done (False)."""
        for m in sorted(p.members):
            self.spread(p, m)
        while not self.finished(p):
            if p.lost is not None:
                return False
            if not self.advance(p) and not self.solve_block(p) and (p.lost is not None or not self.fall_back(p)):
                return False
        return True

    def finished(self, p: Problem) -> bool:
        """A3: the members must end exactly as the inputs."""
        return p.members == Counter(p.targets)

    def advance(self, p: Problem) -> bool:
        for m in self.solvable(p):
            if self.step_from(p, m):
                return True
            if p.lost is not None:
                return False
        return self.gather(p)

    def solvable(self, p: Problem) -> list[int]:
        """Only members are solved from, never a value that a scan assumes (A3, A5.5)."""
        return [m for m in sorted(p.members, reverse=True) if m not in p.targets]

    def replace(self, p: Problem, old: Iterable[int], new: Iterable[int], step: Step) -> None:
        p.members.subtract(old)
        p.members += Counter()
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
            for user, _ in self.graph.users(stack.pop()):
                if user.id in p.unknown and self.computable(p, user):
                    p.unknown.discard(user.id)
                    if any(i in p.slice_known for i in user.inputs):
                        p.slice_known.add(user.id)
                    stack.append(user.id)

    def computable(self, p: Problem, node: Node) -> bool:
        return not any(i in p.unknown for i in node.inputs) and self.slicewise(p, node)

    def slicewise(self, p: Problem, node: Node, *solved: int) -> bool:
        """A5.3: along every scanned axis the op relates equal indices of its result and of each operand that is known
        at the slice or solved. So nothing is gathered or un-joined along one: parts stand elsewhere than in the whole."""
        slots = [k for k, i in enumerate(node.inputs) if i in p.slice_known or k in solved]
        return all(self.equal_slices(node, k, c) for c in p.scans for k in slots)

    def equal_slices(self, node: Node, slot: int, context: ScanContext) -> bool:
        own, other = context.carriers.get(node.id), context.carriers.get(node.inputs[slot])
        if own is None or other is None:
            return False
        local = self.local(node, slot)
        return local is None or all(local.within(o, c, "==") for o, c in zip(own, other, strict=True))

    def sound_region(self, p: Problem, entry: int, nodes: Iterable[int]) -> bool:
        """What lies between entry and exits reads nothing unknown beside it, and under a scan nothing
        across slices (A5.4)."""
        inside = set(nodes)
        for n in inside - {entry}:
            for k, i in enumerate(self.graph[n].inputs):
                if i in p.unknown and i not in inside:
                    return False
                if (i in p.slice_known or i in inside) and not self.within_slice(p, n, k):
                    return False
        return True

    def within_slice(self, p: Problem, n: int, slot: int) -> bool:
        return all(self.equal_slices(self.graph[n], slot, c) for c in p.scans)

    # ---- single steps ---------------------------------------------------------------------------

    def step_from(self, p: Problem, m: int) -> bool:
        node = self.graph[m]
        if node.op in ("join", "stack"):
            return self.unjoin(p, node)
        if node.op in ("call", "repeat"):
            return self.call_inverse(p, node)
        if node.op == "get":
            source = self.graph[node.inputs[0]]
            return source.op not in ("scan", "choose") and self.call_inverse(p, source)
        if node.op == "integrate":
            return self.integrate_back(p, node)
        slots = self.unknown_slots(p, node)
        if node.op == "add" and slots == [0, 1]:
            return self.digits(p, node)
        if not slots:
            p.lost = m  # its value follows from what is known: it carries no coordinate of its own
            return False
        if len(slots) != 1:
            return False
        op, slot = OPS[node.op], slots[0]
        if op.invert is None or op.needs is None or not self.slicewise(p, node, slot):
            return False
        why = self.unmet(node, slot)
        if why is None and not self.real(node.inputs[slot]) and (self.real(m) or OPS[node.op].elementwise):
            why = "whole numbers do not fill what arithmetic with them needs"
        if why is not None:
            p.conditions.append((node, slot, why))
            return False
        self.replace(p, [m], [node.inputs[slot]], Solve(m, slot))
        return True

    def digits(self, p: Problem, node: Node) -> bool:
        """A whole number plus one in (0, 1): the sum has both (A3: integers carry no coordinate)."""
        kinds = [self.graph[i].tensor.kind for i in node.inputs]
        if p.scans or sorted(kinds) != ["int", "real"]:
            return False
        whole = kinds.index("int")
        fraction = 1 - whole
        if any(self.missing_axes(node, k) for k in (0, 1)) or not self.below_one(node.inputs[fraction]):
            return False
        self.replace(p, [node.id], list(node.inputs), Digits(node.id, whole, fraction))
        return True

    def below_one(self, fraction: int) -> bool:
        """A3: digits are told apart only by a number in (0, 1)."""
        return self.interval(fraction).within(UNIT)

    def unknown_slots(self, p: Problem, node: Node) -> list[int]:
        """A3: operands count by slot, so x · x has two."""
        return [k for k, i in enumerate(node.inputs) if i in p.unknown]

    def unmet(self, node: Node, slot: int) -> Need | str | None:
        """The condition of a solving step that is not proved."""
        missing = self.missing_axes(node, slot)
        if missing:
            return f"it is broadcast along `{missing[0]}` here"
        needs = OPS[node.op].needs
        assert needs is not None
        found = needs(node, slot, self)
        if isinstance(found, str):
            return found
        return next((n for n in found if not n.holds(self.interval(node.inputs[n.slot]))), None)

    def missing_axes(self, node: Node, slot: int) -> list[str]:
        """A3: a solved operand of an elementwise op has every axis of the result."""
        have = self.graph[node.inputs[slot]].tensor
        return [n for n in node.tensor.names if not have.has(n)] if OPS[node.op].elementwise else []

    def unjoin(self, p: Problem, node: Node) -> bool:
        if not self.slicewise(p, node, *range(len(node.inputs))):
            return False
        repeated = [i for i, n in Counter(node.inputs).items() if n > 1 or i not in p.unknown]
        if repeated:  # a part that is known already carries no coordinate of its own
            p.lost = repeated[0]
            return False
        self.replace(p, [node.id], list(node.inputs), Unjoin(node.id))
        return True

    def call_inverse(self, p: Problem, node: Node) -> bool:
        region: Region = node.attrs["region"]
        if region.kind not in ("bijector", "chain", "flow"):
            return False
        results = call_results(self.graph, node)
        if results is None or any(r not in p.members for r in results):
            return False
        mapped = mapped_slots(node, region)
        if not self.context_known(p, node, mapped):
            return False
        operands = [node.inputs[k] for k in mapped]
        used = [i for i, n in Counter(operands).items() if n > 1 or i not in p.unknown]
        if used:
            p.lost = used[0]
            return False
        if p.scans and not (len(operands) == 1 and results == [node.id] and self.slicewise(p, node, mapped[0])):
            return False
        bare = self.unlifted(node, operands)
        if bare is not None:
            p.conditions.append((node, 0, f"it is broadcast along `{bare}` here"))
            return False
        if isinstance(self.analyses.plan(region), Failure):
            self.analyses.failed_calls.append((self.region, node))
            return False
        p.unknown.discard(node.id)
        self.replace(p, results, operands, CallInverse(node.id))
        return True

    def context_known(self, p: Problem, node: Node, mapped: Sequence[int]) -> bool:
        """A12: a call's context is an operand like another, and the inverse needs it."""
        return not any(i in p.unknown for k, i in enumerate(node.inputs) if k not in mapped)

    def integrate_back(self, p: Problem, node: Node) -> bool:
        """A trajectory is told from its end when what the field reads besides it is known."""
        start, *others = node.inputs
        if p.scans or node.attrs.get("timed") or "at" in node.attrs or any(i in p.unknown for i in others):
            return False
        if start not in p.unknown:
            p.lost = node.id
            return False
        if not node.attrs.get("linear", True) or node.attrs.get("indexed"):
            why = (
                "depend on their index"
                if node.attrs.get("indexed")
                else "are no sums of values and slopes times numbers"
            )
            p.conditions.append(
                (
                    node,
                    0,
                    f"the steps of `{node.attrs['solver']}` {why}, so they cannot be taken backwards with a log-det",
                )
            )
            return False
        method = trace_method(node.attrs, node.tensor.count)
        rough = self.analyses.rough(node.attrs["region"], method)
        if rough is not None:
            why = f"`{explain.shown(rough)}` in the field that is integrated has no derivative, so its divergence is not known"
            p.conditions.append((node, 0, why))
            return False
        self.replace(p, [node.id], [start], Integrate(node.id))
        return True

    def unlifted(self, node: Node, operands: Iterable[int]) -> str | None:
        """A3 for calls: a mapped operand has every axis over which the call is lifted."""
        lifted = [n for n, _ in node.attrs.get("lifted", ())]
        return next((n for i in operands for n in lifted if not self.graph[i].tensor.has(n)), None)

    def gather(self, p: Problem) -> bool:
        """Slices or picks that partition an axis of an unknown value, all of them members."""
        parts: dict[tuple[int, str], list[int]] = {}
        for m in sorted(p.members):
            node = self.graph[m]
            if node.op in ("slice", "pick") and node.inputs[0] in p.unknown:
                parts.setdefault((node.inputs[0], node.attrs["axis"]), []).append(m)
        for (value, axis), members in sorted(parts.items()):
            ordered = tuple(sorted(members, key=lambda m: self.extent(m)))
            slicewise = all(self.slicewise(p, self.graph[m], 0) for m in ordered)
            if slicewise and self.partitions(value, axis, ordered):
                self.replace(p, ordered, [value], Gather(value, ordered))
                return True
        return False

    def partitions(self, value: int, axis: str, ordered: Sequence[int]) -> bool:
        """A3: slices move knowledge only if they partition the axis."""
        at = 0
        for m in ordered:
            start, stop = self.extent(m)
            if start != at:
                return False
            at = stop
        return at == self.graph[value].tensor.size(axis)

    def extent(self, m: int) -> tuple[int, int]:
        node = self.graph[m]
        if node.op == "pick":
            return node.attrs["index"], node.attrs["index"] + 1
        return node.attrs["start"], node.attrs["stop"]

    def solve_block(self, p: Problem) -> bool:
        """A11: sums of parts that are solved together."""
        step = blocks.block(self, p) if p.lost is None else None
        if step is not None:
            self.replace(p, step.exits, step.entries, step)
        return step is not None

    # ---- fallbacks (A4) -------------------------------------------------------------------------

    def fall_back(self, p: Problem) -> bool:
        """The nearest candidate first; its single exits of equal dimension, then all of them together."""
        stuck = [m for m in sorted(p.members, reverse=True) if m not in p.targets]
        if not stuck:
            return False
        dominators = self.dominators(p, stuck)
        for u in sorted({u for chain in dominators.values() for u in chain if self.real(u)}, reverse=True):
            exits = [m for m in stuck if u in dominators[m]]
            for chosen in self.choices(u, exits):
                if self.attempt(p, u, chosen):
                    return True
        return False

    def choices(self, u: int, exits: list[int]) -> list[tuple[int, ...]]:
        count = self.graph[u].tensor.count
        out: list[tuple[int, ...]] = [(e,) for e in exits if self.graph[e].tensor.count == count]
        if len(exits) > 1 and sum(self.graph[e].tensor.count for e in exits) == count:
            out.append(tuple(sorted(exits)))
        return out

    def attempt(self, p: Problem, u: int, exits: tuple[int, ...]) -> bool:
        region = tuple(self.between(p, u, exits))
        for fallback in FALLBACKS:
            key = (u, exits, region, fallback, tuple(tuple(sorted(c.carriers)) for c in p.scans), p.cut)
            if key in self._failed:
                continue
            step = fallback(self, p, u, exits)
            if step is not None:
                self.replace(p, exits, [u], step)
                return True
            self._failed.add(key)
        return False

    def dominators(self, p: Problem, stuck: list[int]) -> dict[int, list[int]]:
        """For each stuck member the unknown values that every way from the unknown targets to it crosses."""
        root = -1
        above: dict[int, int] = {root: root}  # the nearest dominator of each value that is reached
        depth = {root: 0}
        for n in sorted(p.unknown | set(stuck)):  # operands have smaller numbers
            ways = [root] if n in p.targets else [i for i in self.graph[n].inputs if i in p.unknown and i in above]
            if not ways:
                continue
            met = ways[0]
            for way in ways[1:]:
                while met != way:
                    if depth[met] >= depth[way]:
                        met = above[met]
                    else:
                        way = above[way]
            above[n], depth[n] = met, depth[met] + 1
        out: dict[int, list[int]] = {}
        for m in stuck:
            chain: list[int] = []
            at = above.get(m, root)
            while at != root:
                if isinstance(self.graph[at].type, TensorType):
                    chain.append(at)
                at = above[at]
            out[m] = chain
        return out

    def between(self, p: Problem, u: int, exits: Iterable[int]) -> list[int]:
        """Unknown nodes on paths from u to the exits, both ends included.

        A path through a known value (one dropped by a scan, say) brings nothing unknown.
        """
        ends = set(exits)
        free = p.unknown | {u}
        up, stack = set(ends), list(ends)
        while stack:
            n = stack.pop()
            new = [i for i in self.graph[n].inputs if n != u and i in free and i not in up]
            up.update(new)
            stack.extend(new)
        below = {u}
        for n in sorted(up):
            if any(i in below for i in self.graph[n].inputs):
                below.add(n)
        return sorted(up & below)
