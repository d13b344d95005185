"""Everything that is known about regions: bounds, plans, programs, cost classes; computed on demand, once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from flowlang.analysis.dependence import Summaries
from flowlang.analysis.ranges import Ranges, Violation, law_support
from flowlang.derive import explain
from flowlang.derive.forms import forms
from flowlang.derive.forward_mode import divergence_plus, divergence_program, jvp_program
from flowlang.derive.frozen import frozen
from flowlang.derive.jvp import NoDerivative
from flowlang.derive.masks import split_by_mask
from flowlang.derive.plan import (
    Block,
    Bottleneck,
    CallInverse,
    Failure,
    FixedPoint,
    Integrate,
    Linear,
    LowRank,
    Plan,
    Polar,
    Scalar,
    Scan,
    Solve,
    Step,
)
from flowlang.derive.programs import Program, build, is_map
from flowlang.derive.quiet import quiet
from flowlang.derive.search import Inverter
from flowlang.derive.surfaces import no_rule, off_the_sphere
from flowlang.derive.tapped import tapped_program
from flowlang.derive.traces import short_divergence
from flowlang.ir.domains import Domain
from flowlang.ir.graph import BaseDistribution, Draw, Emission, Graph, Node, Region, Update, result_types
from flowlang.ir.interval import POSITIVE, REAL, Interval
from flowlang.ir.lipschitz import constant
from flowlang.ir.manifolds import all_spheres, on_sphere, takes_sphere
from flowlang.ir.noise import QUIET, draws
from flowlang.ir.ops import OPS
from flowlang.ir.ops.base import Need
from flowlang.ir.tangents import FROZEN, PLUS, Tangents, plain_method
from flowlang.ir.taps import Place, Taps, taps_of

REPEAT_BOUND_ROUNDS = 4
BACKWARDS = ("inverse", "generate", "sample", "sample_and_log_prob")


@dataclass
class Evaluated:
    """Bounds of a program's or region's results for given bounds of its inputs."""

    outputs: tuple[Interval, ...]
    violations: tuple[Violation, ...]


@dataclass
class Analyses:
    """Facts about regions, shared by everything that asks."""

    summaries: Summaries = field(default_factory=Summaries)
    failed_calls: list[tuple[Region, Node]] = field(default_factory=list)
    _ranges: dict[int, Ranges] = field(default_factory=dict)
    _violations: dict[int, list[Violation]] = field(default_factory=dict)
    _plans: dict[int, Plan | Failure] = field(default_factory=dict)
    _programs: dict[tuple[int, str], Program] = field(default_factory=dict)
    _bounds: dict[object, Evaluated] = field(default_factory=dict)
    _settled: dict[tuple[int, int], Interval] = field(default_factory=dict)
    _kept: dict[int, Region | Program] = field(default_factory=dict)
    _lipschitz: dict[tuple[int, int, int], float | None] = field(default_factory=dict)

    def key(self, thing: Region | Program) -> int:
        """The identity of a region or program, kept alive: that of a dead one may be given to another."""
        self._kept[id(thing)] = thing
        return id(thing)

    # ---- domains of what declares none ----------------------------------------------------------

    def settle(self, root: Region) -> None:
        """Gives the inputs of chains and `repeat` bodies the domain of what arrives there, from all their places.

        A carried value has a domain that holds what comes in and what each round makes of it; all reals where
        no smaller one is found. Whoever declares a domain keeps it.
        """
        for region in reversed(list(root.walk())):  # callers first
            if region.broken:
                continue
            ranges = self.ranges(region)
            for o in [*region.outputs, *(e.value for e in region.emissions)]:
                ranges.bounds(o)
            for node in list(region.graph):
                inner = node.attrs.get("region")
                if isinstance(inner, Region) and not inner.broken and node.op in ("call", "repeat"):
                    self.settle_call(ranges, node, inner)

    def settle_call(self, ranges: Ranges, node: Node, inner: Region) -> None:
        arguments = [*inner.inputs, *inner.context]
        own = {a for a in arguments if inner.graph[a].attrs.get("domain") is None}
        own |= {a for a in arguments if (self.key(inner), a) in self._settled}
        if not own:
            return
        operands = [ranges.interval(i) for i in node.inputs]
        how: Tangents | None = node.attrs.get("tangents")
        if how is not None:
            operands = [operands[k] for k in how.values(len(inner.inputs), len(operands))]
        elif plain_method(node.attrs) != "forward" and taps_of(inner, plain_method(node.attrs)) is None:
            operands = [wanted(inner, a) for a in arguments]
        elif node.op == "repeat":
            operands = self.carried_bounds(inner, int(node.attrs["carried"]), operands)[0]
        for a, found in zip(arguments, operands, strict=False):
            if a in own:
                self.settle_input(inner, a, found)

    def settle_input(self, region: Region, input: int, found: Interval) -> None:
        key = (self.key(region), input)
        before = self._settled.get(key)
        now = found if before is None else before.union(found)
        if now == before:
            return
        self._settled[key] = now
        sphere = input in region.inputs and takes_sphere(region, region.inputs.index(input))
        region.graph.declare(input, Domain("Sphere", (), now, structure="sphere") if sphere else Domain("R", (), now))
        if key[0] in self._ranges:  # judged for less: judge it again
            del self._ranges[key[0]], self._violations[key[0]]
            self._plans.pop(key[0], None)
            self._programs = {k: p for k, p in self._programs.items() if k[0] != key[0]}

    # ---- bounds ---------------------------------------------------------------------------------

    def ranges(self, region: Region) -> Ranges:
        """Bounds in a region whose inputs lie anywhere in their declared domains."""
        if self.key(region) not in self._ranges:
            sink: list[Violation] = []
            self._violations[self.key(region)] = sink
            self._ranges[self.key(region)] = Ranges(
                region.graph,
                {d.value: law_support(region.graph, d) for d in region.draws},
                lambda node, ivs: self.call_bounds(region.graph, node, ivs, sink),
            )
        return self._ranges[self.key(region)]

    def violations(self, region: Region) -> list[Violation]:
        """Partial ops that the region's declared domains do not make total."""
        ranges = self.ranges(region)
        for o in [*region.outputs, *(e.value for e in region.emissions)]:
            ranges.bounds(o)
        laws: list[Emission | Draw | BaseDistribution] = [*region.emissions, *region.draws]
        if region.base is not None:
            laws.append(region.base)
        found = [v for law in laws for v in self.argument_violations(region, law)]
        found += self.update_violations(region, region.updates)
        for rule in (r for r in region.rules.values() if r.updates):
            found += self.update_violations(region, rule.updates)
            for o in rule.outputs:
                ranges.bounds(o)
        return [*ranges.violations, *self._violations[self.key(region)], *found]

    def argument_violations(self, region: Region, law: Emission | Draw | BaseDistribution) -> list[Violation]:
        """Arguments of a distribution that may leave where they must lie."""
        out: list[Violation] = []
        if law.distribution is None:
            return out
        for slot, (name, id) in enumerate(law.arguments):
            found = self.ranges(region).interval(id)
            wanted = law.distribution.parameters[name][1]
            if not found.within(wanted):
                node = region.graph[id]
                use = Node(-1, law.distribution.name, (), node.type, span=law.span or node.span)
                words = f"a positive `{name}`" if wanted == POSITIVE else f"`{name}` in {wanted}"
                out.append(Violation(use, Need(slot, wanted, words=words), found, region.graph))
        return out

    def call_bounds(
        self, graph: Graph, node: Node, operands: Sequence[Interval], sink: list[Violation]
    ) -> tuple[Interval, ...]:
        """Bounds of a call's results; a violation where an argument leaves its declared domain."""
        if node.op in ("bracket_solve", "scan_solve", "fixed_point_solve", "estimate_log_det"):
            return (self.solver_bounds(graph, node, operands, sink),)
        region: Region = node.attrs["region"]
        method = plain_method(node.attrs)
        how: Tangents | None = node.attrs.get("tangents")
        if how is not None:
            operands = [operands[k] for k in how.values(len(region.inputs), len(operands))]
        if node.attrs.get("log_det"):
            return self.program_call_bounds(graph, node, region, method, operands, sink)
        if method == "inverse":
            found = self.program_call_bounds(graph, node, region, "inverse", operands, sink)
            return found[:-1]
        arguments = [*region.inputs, *region.context]
        for k, (a, iv) in enumerate(zip(arguments, operands, strict=False)):
            domain = region.graph[a].attrs.get("domain")
            settled = (self.key(region), a) in self._settled
            if isinstance(domain, Domain) and not settled and not iv.within(domain.interval):
                sink.append(Violation(node, Need(k, domain.interval, words=f"values in `{domain}`"), iv, graph))
                operands = [domain.interval if j == k else o for j, o in enumerate(operands)]
        if how is not None:
            return tuple(REAL for _ in result_types(node.type))
        for k in range(len(region.inputs)):
            taken, held = takes_sphere(region, k), on_sphere(graph, node.inputs[k])
            if taken and not on_sphere(graph, node.inputs[k], assumed=True):
                sink.append(Violation(node, Need(k, REAL, words="points of a `Sphere`"), operands[k], graph))
            elif held and not taken and is_map(region):
                sink.append(
                    Violation(
                        node,
                        Need(k, REAL, words="values of an open set, and no points of a sphere"),
                        operands[k],
                        graph,
                    )
                )
            elif (
                node.op == "repeat"
                and is_map(region)
                and taken != on_sphere(region.graph, region.outputs[k], region=region)
            ):
                words = "points of a `Sphere` from each round" if taken else "no points of a sphere from a round"
                sink.append(Violation(node, Need(k, REAL, words=words), operands[k], graph))
        taps = taps_of(region, method)
        if taps is not None:
            return self.tapped_bounds(graph, node, taps, operands, sink)
        if node.op == "scan":
            return self.scan_bounds(graph, node, operands, sink)
        if node.op == "repeat":
            return self.repeat_bounds(region, int(node.attrs["carried"]), operands)
        return self.region_bounds(region, operands).outputs

    def tapped_bounds(
        self, graph: Graph, node: Node, taps: Taps, operands: Sequence[Interval], sink: list[Violation]
    ) -> tuple[Interval, ...]:
        """A value that replaces an inner one lies where that one may, so that the net stays total; no more is said of results."""
        region: Region = node.attrs["region"]
        own = len(region.inputs) + len(region.context)

        def known(place: Place) -> Interval:
            inner = region
            for call in place[:-1]:
                inner = inner.graph[call].attrs["region"]
            return self.ranges(inner).interval(place[-1])

        for k, (place, iv) in enumerate(zip(taps.write, operands[own:], strict=True), own):
            if not iv.within(known(place)):
                sink.append(Violation(node, Need(k, known(place), words=f"a value in {known(place)}"), iv, graph))
        results = self.region_bounds(region, operands[:own]).outputs
        return (*(REAL if taps.write else iv for iv in results), *map(known, taps.read))

    def region_bounds(self, region: Region, operands: Sequence[Interval]) -> Evaluated:
        key = ("region", self.key(region), tuple(operands))
        if key not in self._bounds:
            inputs = dict(zip([*region.inputs, *region.context], operands, strict=False))
            sink: list[Violation] = []
            ranges = Ranges(region.graph, inputs, lambda node, ivs: self.call_bounds(region.graph, node, ivs, sink))
            outputs = tuple(ranges.interval(o) for o in [*region.outputs, *(e.value for e in region.emissions)])
            self._bounds[key] = Evaluated(outputs, (*ranges.violations, *sink))
        return self._bounds[key]

    def repeat_bounds(self, region: Region, carried: int, operands: Sequence[Interval]) -> tuple[Interval, ...]:
        return self.carried_bounds(region, carried, operands)[1]

    def carried_bounds(
        self, region: Region, carried: int, operands: Sequence[Interval]
    ) -> tuple[list[Interval], tuple[Interval, ...]]:
        """Bounds that hold before every round, and those of the results."""
        now = list(operands)
        for _ in range(REPEAT_BOUND_ROUNDS):
            found = self.region_bounds(region, now).outputs
            wider = [a.union(b) for a, b in zip(now[:carried], found, strict=False)]
            if wider == now[:carried]:
                return now, tuple(found)
            now[:carried] = wider
        now[:carried] = [REAL] * carried
        found = self.region_bounds(region, now).outputs
        return now, tuple(REAL if k < carried else b for k, b in enumerate(found))

    def scan_bounds(
        self, graph: Graph, node: Node, operands: Sequence[Interval], sink: list[Violation]
    ) -> tuple[Interval, ...]:
        """Bounds of a scan's results. What is carried under a state's name must stay in the state's domain."""
        region: Region = node.attrs["region"]
        carried = int(node.attrs["carried"])
        domains = [region.graph[i].attrs.get("domain") for i in region.inputs[:carried]]
        now = [d.interval if isinstance(d, Domain) else iv for d, iv in zip(domains, operands, strict=False)]
        now += operands[carried:]
        for _ in range(REPEAT_BOUND_ROUNDS):
            found = self.region_bounds(region, now)
            wider = [a.union(b) if d is None else a for d, a, b in zip(domains, now, found.outputs, strict=False)]
            if wider == now[:carried]:
                break
            now[:carried] = wider
        else:
            now[:carried] = [REAL if d is None else iv for d, iv in zip(domains, now, strict=False)]
            found = self.region_bounds(region, now)
        sink.extend(v if v.graph is not None else Violation(node, v.need, v.found, graph) for v in found.violations)
        for k, domain in enumerate(domains):
            if isinstance(domain, Domain) and not found.outputs[k].within(domain.interval):
                sink.append(
                    Violation(node, Need(k, domain.interval, words=f"values in `{domain}`"), found.outputs[k], graph)
                )
        return (*now[:carried], *found.outputs[carried:])

    def update_violations(self, region: Region, updates: Sequence[Update]) -> list[Violation]:
        """States whose new value may leave their domain."""
        out: list[Violation] = []
        for u in updates:
            state = region.graph[u.state]
            domain, found = state.attrs["domain"], self.ranges(region).interval(u.new)
            if u.live is None and not found.within(domain.interval):
                use = Node(-1, "state", (u.state,), state.type, span=region.graph[u.new].span or state.span)
                out.append(Violation(use, Need(0, domain.interval, words=f"values in `{domain}`"), found, region.graph))
        return out

    def program_call_bounds(
        self, graph: Graph, node: Node, region: Region, method: str, operands: Sequence[Interval], sink: list[Violation]
    ) -> tuple[Interval, ...]:
        if isinstance(self.plan(region), Failure):
            return (REAL,) * (len(region.inputs) + len(region.outputs) + len(region.emissions) + 1)
        if "inverse" in region.rules and method in ("inverse", "generate"):
            # A hand-given inverse is verified by numbers; what it gives lies in the declared domains.
            return (*(self.ranges(region).interval(i) for i in region.inputs), REAL)
        program = self.program(region, method)
        rounds = REPEAT_BOUND_ROUNDS if node.op == "repeat" else 1
        now = list(operands)
        for k in range(rounds):
            found = self.program_bounds(program, now)
            for v in found.violations:
                sink.append(Violation(node, v.need, v.found, graph) if v.graph is not graph else v)
            if node.op != "repeat":
                return found.outputs
            carried = int(node.attrs["carried"])
            wider = [a.union(b) for a, b in zip(now[:carried], found.outputs, strict=False)]
            if wider == now[:carried]:
                return found.outputs
            now[:carried] = wider if k + 2 < rounds else [REAL] * carried
        return (*now[: int(node.attrs["carried"])], REAL)

    def program_bounds(self, program: Program, operands: Sequence[Interval]) -> Evaluated:
        key = ("program", self.key(program), tuple(operands))
        if key not in self._bounds:
            inputs = dict(zip(program.inputs, operands, strict=False))
            sink: list[Violation] = []
            ranges = Ranges(program.graph, inputs, lambda node, ivs: self.call_bounds(program.graph, node, ivs, sink))
            outputs = tuple(ranges.interval(o) for o in program.outputs)
            self._bounds[key] = Evaluated(outputs, (*ranges.violations, *sink))
        return self._bounds[key]

    def solver_bounds(self, graph: Graph, node: Node, operands: Sequence[Interval], sink: list[Violation]) -> Interval:
        if node.op in ("fixed_point_solve", "estimate_log_det"):
            return REAL
        domain: Interval = node.attrs["domain"]
        if node.op == "scan_solve":
            body: Program = node.attrs["body"]
            inner = self.program_bounds(body, [domain, *operands[1:]])
            sink.extend(Violation(node, v.need, v.found, graph) for v in inner.violations)
            if not inner.outputs[0].within(domain):
                sink.append(Violation(node, Need(0, domain, words=f"a result in {domain}"), inner.outputs[0], graph))
            return inner.outputs[0]
        needed: list[Interval] = [node.attrs["image"], *node.attrs["assumed"]]
        for k, (iv, wanted) in enumerate(zip(operands, needed, strict=True)):
            if not iv.within(wanted):
                sink.append(Violation(node, Need(k, wanted, words=f"a value in {wanted}"), iv, graph))
        return domain

    # ---- plans and programs ---------------------------------------------------------------------

    def plan(self, region: Region) -> Plan | Failure:
        if self.key(region) not in self._plans:
            found = Plan(region) if len(region.rules) == 2 else self.search(region)
            if isinstance(found, Plan):
                found = off_the_sphere(region, found) or found
            elif all_spheres(region) and region.kind == "bijector" and not region.rules:
                found = no_rule(region, region.span)
            if isinstance(found, Failure) and region.rules:
                found = explain.one_rule_alone(region, found)
            self._plans[self.key(region)] = found
        return self._plans[self.key(region)]

    def search(self, region: Region) -> Plan | Failure:
        """An inverse for the region as written, or for an equal form of it; the first reason where there is none."""
        first = explain.draws_twice(region)
        if first is not None:
            return first
        for form in itertools.chain([region], () if region.rules else equal_forms(region)):
            found = Inverter(form, self).run()
            if isinstance(found, Plan) and "inverse" not in region.rules:
                found = self.check_image(region, found) or found  # what callers take for the image: that of the text
            if isinstance(found, Plan):
                return found
            first = first or found
        assert first is not None
        return first

    def check_image(self, region: Region, plan: Plan) -> Failure | None:
        """A9b: every inverse step is total on what the outputs may be, and leads back into the declared domain;
        what is emitted fills the support of its distribution. The outputs of a flow are its base's affair."""
        ranges = self.ranges(region)
        for e in region.emissions:
            if e.distribution is not None:
                image, support = ranges.interval(e.value), law_support(region.graph, e)
                if not fills(image, support):
                    return explain.wrong_support(region, e, image, support)
        if region.kind == "flow":
            return None
        program = build(plan.region, plan, "preimage")
        results = [*region.outputs, *(e.value for e in region.emissions)]
        found = self.program_bounds(program, [ranges.interval(v) for v in (*results, *region.context)])
        for v in found.violations:
            return explain.not_onto(region, v)
        for i, iv in zip([*region.inputs, *(d.value for d in region.draws)], found.outputs, strict=True):
            if not leads_back(iv, ranges.interval(i)):
                return explain.leaves_domain(region, i, iv, ranges.interval(i))
        return None

    def program(self, region: Region, name: str) -> Program:
        key = (self.key(region), name)
        if key not in self._programs:
            plan = self.plan(region) if is_map(region) else None
            assert not isinstance(plan, Failure), plan
            if name.startswith(QUIET):
                self._programs[key] = quiet(self.program(region, name.removeprefix(QUIET)), name)
            elif name.startswith(FROZEN):
                self._programs[key] = frozen(self.program(region, name.removeprefix(FROZEN)))
            elif (taps := taps_of(region, name)) is not None:
                self._programs[key] = tapped_program(region, name, taps)
            else:
                self._programs[key] = derivative(region, name) or build(
                    region if plan is None else plan.region, plan, name
                )
                if name in BACKWARDS and is_map(region) and draws(region, training=True):
                    self._programs[key] = quiet(self._programs[key], name)
        return self._programs[key]

    def rough(self, region: Region, name: str) -> str | None:
        """The op that leaves one of a net's derivatives, or one it calls, without a graph; None where all have one."""
        todo, seen = [(region, name)], set()
        while todo:
            at, program = todo.pop()
            if (id(at), program) in seen:
                continue
            seen.add((id(at), program))
            try:
                found = self.program(at, program)
            except NoDerivative as stop:
                return at.graph[stop.node].op
            todo += [(n.attrs["region"], n.attrs["method"]) for n in found.graph if "tangents" in n.attrs]
        return None

    def lipschitz(self, region: Region, slot: int, index: int) -> float | None:
        key = (self.key(region), slot, index)
        if key not in self._lipschitz:
            entry = [*region.inputs, *region.context][slot]
            ranges = self.ranges(region)
            self._lipschitz[key] = constant(region.graph, entry, region.outputs[index], ranges.interval, self.lipschitz)
        return self._lipschitz[key]

    # ---- what an inversion costs ----------------------------------------------------------------

    def view(self, region: Region) -> Region:
        """The form of the region that its plan's steps refer to."""
        plan = self.plan(region)
        return plan.region if isinstance(plan, Plan) else region

    def steps_of(self, region: Region) -> list[Step]:
        plan = self.plan(region)
        return plan.steps if isinstance(plan, Plan) else []

    def way(self, region: Region) -> str:
        """The costliest way that the inverse uses."""
        if "inverse" in region.rules:
            return "explicit"
        best = "analytic"
        for step in self.steps_of(region):
            best = costlier(best, self.step_way(region, step))
        return best

    def step_way(self, region: Region, step: Step) -> str:
        match step:
            case Scalar() | LowRank():
                return "bracketing"
            case Bottleneck():
                return self.way(step.plan.region)
            case Scan():
                inner = "analytic"
                for s in step.steps:
                    inner = costlier(inner, self.step_way(region, s))
                return costlier(f"scan over {step.axes}", inner)
            case FixedPoint():
                return "fixed point"
            case Integrate():
                return "integration"
            case CallInverse(n):
                node = self.view(region).graph[n]
                return "analytic" if node.attrs.get("method") == "inverse" else self.way(node.attrs["region"])
        return "analytic"

    def log_det_class(self, region: Region, step: Step) -> str:
        """Cost class of a step's log-det: "0", "1", "D", "D3:n" or "estimator"."""
        match step:
            case Solve(n, slot):
                view = self.view(region)
                node = view.graph[n]
                cost = OPS[node.op].log_det_cost
                return cost if isinstance(cost, str) else cost(node, slot, Inverter(view, self))
            case Linear():
                return "0"
            case Block(determinant=d):
                return "0" if d is not None else "D"
            case Scalar() | LowRank() | Polar():
                return "D"
            case Bottleneck():
                return self.region_class(step.plan.region)
            case FixedPoint():
                return "estimator"
            case Integrate():
                return "ode"
            case Scan():
                return worst(self.log_det_class(region, s) for s in step.steps)
            case CallInverse(n):
                return self.region_class(self.view(region).graph[n].attrs["region"])
        return "0"

    def rounds(self, region: Region, method: str = "inverse") -> int:
        """How many slices, or sets of independent ones, scans go through one after the other when the map is run."""
        graph = self.view(region).graph
        if method == "forward":
            turned = [n for n in graph if n.op in ("call", "repeat") and n.attrs.get("method") == "inverse"]
            straight = [
                n for n in graph if n.op in ("call", "repeat") and n.attrs.get("method", "forward") == "forward"
            ]
            return sum(self.called_rounds(n, "inverse") for n in turned) + sum(
                self.called_rounds(n, "forward") for n in straight
            )
        total = 0
        for step in self.steps_of(region):
            if isinstance(step, Scan):
                total += max(step.levels, default=-1) + 1
            elif isinstance(step, CallInverse):
                node = graph[step.node]
                total += self.called_rounds(node, "forward" if node.attrs.get("method") == "inverse" else "inverse")
        return total

    def called_rounds(self, node: Node, method: str) -> int:
        region: Region = node.attrs["region"]
        if region.kind not in ("bijector", "chain", "flow"):
            return 0
        return int(node.attrs.get("count", 1)) * self.rounds(region, method)

    def exactness(self, region: Region) -> str:
        """What the log-density is, as the worst of the parts (EXACTNESS).

        A draw inside makes it a lower bound: its mean over draws is log p less a Kullback-Leibler divergence.
        """
        if region.kind == "program":
            return combined(seen_from(method, self.exactness(inner)) for inner, method in weighed_maps(region))
        rule = region.rules.get("log_det")
        own = rule.exactness if rule is not None else "lower bound" if region.draws else "exact"
        steps = () if rule is not None else self.steps_of(region)
        return combined([own, *(self.step_exactness(region, s) for s in steps)])

    def contraction(self, region: Region) -> float | None:
        """The largest constant that is proved of a contraction here or below; None where there is none."""
        plans = [self.plan(r) for r in region.walk() if is_map(r)]
        steps = [s for p in plans if isinstance(p, Plan) for s in p.steps]
        return max((s.constant for s in steps if isinstance(s, FixedPoint)), default=None)

    def step_exactness(self, region: Region, step: Step) -> str:
        match step:
            case FixedPoint():
                return "unbiased"
            case Integrate(n):
                return "unbiased" if self.view(region).graph[n].attrs["trace"] != "exact" else "exact"
            case Scan():
                return combined(self.step_exactness(region, s) for s in step.steps)
            case CallInverse(n):
                return self.exactness(self.view(region).graph[n].attrs["region"])
        return "exact"

    def region_class(self, region: Region) -> str:
        if "log_det" in region.rules:
            # Its cost is its author's affair; it is not analysed.
            return "estimator" if region.rules["log_det"].exactness == "unbiased" else "D"
        return worst(self.log_det_class(region, s) for s in self.steps_of(region))


def combined(parts: Iterable[str]) -> str:
    """The exactness of a sum: the worst of its terms'; bounds from both sides leave nothing but a biased estimate."""
    found = {"exact", *parts}
    return "biased" if found >= {"lower bound", "upper bound"} else max(found, key=EXACTNESS.index)


def seen_from(method: str, exactness: str) -> str:
    """What a program learns in a direction: the draws that made a sample make its weight too large in the mean."""
    return "upper bound" if (method, exactness) == ("generate", "lower bound") else exactness


def weighed_maps(program: Region) -> Iterator[tuple[Region, str]]:
    """The bijectors whose log-det a model's program depends on, and the method that is run."""
    graph = program.graph
    for n in graph.reachable(list(program.outputs)):
        call = graph[graph[n].inputs[0]] if graph[n].op == "get" else None
        if (
            call is not None
            and call.attrs.get("log_det")
            and graph[n].attrs["index"] == len(result_types(call.type)) - 1
        ):
            yield call.attrs["region"], plain_method(call.attrs)


def wanted(region: Region, leaf: int) -> Interval:
    """Where a chain's value lies by what its first step declares: run backwards, it ends there."""
    found = REAL
    for user, slot in region.graph.users(leaf):
        if user.op in ("call", "repeat") and plain_method(user.attrs) == "forward":
            inner: Region = user.attrs["region"]
            own = [*inner.inputs, *inner.context][slot : slot + 1]
            domain = inner.graph[own[0]].attrs.get("domain") if own else None
            asked = domain.interval if isinstance(domain, Domain) else wanted(inner, own[0]) if own else REAL
            found = found.meet(asked) or found
    return found


def equal_forms(region: Region) -> Iterator[Region]:
    """Forms of a region worth a second search, made when it is reached."""
    yield from forms(region)
    masked = split_by_mask(region)
    if masked is not None:
        yield masked


def fills(image: Interval, support: Interval) -> bool:
    """A9: the image is the support; an end that is attained or not has measure 0."""
    return (image.lo, image.hi) == (support.lo, support.hi)


def leads_back(found: Interval, domain: Interval) -> bool:
    """A9b: going back ends in the data's domain."""
    return found.within(domain)


def derivative(region: Region, name: str) -> Program | None:
    """The program of that name if it is one of a net's derivatives. Raises NoDerivative where an op has none."""
    if name == "divergence":
        return short_divergence(region) or divergence_program(region)
    if name == "divergence_along":
        return divergence_program(region, exact=False)
    if name.startswith(PLUS):
        return divergence_plus(region, int(name.removeprefix(PLUS)))
    how = Tangents.named(name)
    return None if how is None else jvp_program(region, how)


EXACTNESS = ("exact", "unbiased", "lower bound", "upper bound", "biased", "ratio")  # from the best to the worst
WAYS = ("analytic", "explicit", "bracketing", "scan", "fixed point", "integration")


def rank(way: str) -> int:
    return WAYS.index("scan" if way.startswith("scan") else way)


def costlier(a: str, b: str) -> str:
    return a if rank(a) >= rank(b) else b


def class_rank(c: str) -> tuple[int, int]:
    if c.startswith("D3"):
        return 3, int(c.split(":")[1])
    return {"0": (0, 0), "1": (1, 0), "D": (2, 0), "estimator": (4, 0), "ode": (5, 0)}[c]


def worst(classes: object) -> str:
    out = "0"
    for c in classes:  # type: ignore[attr-defined]
        if class_rank(c) > class_rank(out):
            out = c
    return out


def shown_class(c: str, data: int) -> str:
    """The class in terms of D, the number of data coordinates."""
    if c.startswith("D3:"):
        n = int(c.split(":")[1])
        return "O(D)" if n**3 <= data else "O(D²)" if n**3 <= data**2 else "O(D³)"
    return {"0": "O(1)", "1": "O(1)", "D": "O(D)"}.get(c, c)


__all__ = ["Analyses", "Evaluated", "costlier", "seen_from", "shown_class"]
