"""Norms that are affine at inference go into the linear map beside them (Ioffe & Szegedy 2015; Jacob et al. 2018).

a · conv(x, W, b) + c = conv(x, a · W, a · b + c) for numbers a, c of each unit, and W (a · x + c) = (W a) x + W c. A norm by
running statistics is such a step once training is over. `fold` gives a network without these steps, whose new weights
are parameters, and for each of its regions the recipe by which they follow from the old ones: a region with the old
one's parameters, states and children that gives them as results. Both backends fold by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from flowlang.ir.build import Builder
from flowlang.ir.domains import R
from flowlang.ir.graph import Child, Graph, Node, Region
from flowlang.ir.types import Axis, TensorType, TupleType
from flowlang.source import Span

LINEAR = ("conv", "conv_transpose", "contract")
STEPS = ("add", "sub", "mul", "div")
PASSED = ("rename", "order", "identity")
RUNS = ("call", "repeat", "scan", "integrate")


@dataclass(frozen=True)
class Verdict:
    """What became of one norm: where it stands, whether it folds, and why not."""

    name: str
    folds: bool
    reason: str
    span: Span | None = None
    linear: Span | None = None  # the linear map that took it up


@dataclass
class Recipe:
    """The new weights of one region: results of `region`, under these names."""

    region: Region
    names: list[str]


@dataclass
class Folded:
    """A network without the steps that fold; recipes by the old regions' identities."""

    region: Region
    recipes: dict[int, Recipe] = field(default_factory=dict)
    made: dict[int, Region] = field(default_factory=dict)  # old region -> new one
    verdicts: list[Verdict] = field(default_factory=list)


class Coefficients:
    """Values that no sample changes at inference, copied from a region into a graph of their own."""

    def __init__(self, region: Region):
        self.region, self.source = region, region.graph
        graph = Graph()
        self.b = Builder(graph)
        self.env: dict[int, int] = {}
        self.children = dict(region.children)
        for node in self.source:  # all of them, so that the names of attributes stay those of the region
            if node.op in ("param", "state"):
                self.env[node.id] = self.b.copy(node, ())

    def copy(self, root: int) -> int | None:
        """The value in the new graph; None where it depends on the sample or on the batch."""
        stack = [root]
        while stack:
            n = stack[-1]
            node = self.source[n]
            if n in self.env:
                stack.pop()
                continue
            if node.op == "input" or node.op.startswith("batch_") or node.batched or node.attrs.get("axis") == "B":
                return None
            inputs = at_inference(self.source, node)
            missing = [i for i in inputs if i not in self.env]
            if missing:
                stack += missing
                continue
            stack.pop()
            if len(inputs) == 1 and node.op == "get" and inputs[0] != node.inputs[0]:
                self.env[n] = self.env[inputs[0]]
            elif node.op == "get":
                self.env[n] = self.b.op_get(self.env[node.inputs[0]], node.attrs["index"])
            else:
                self.env[n] = self.b.copy(node, [self.env[i] for i in inputs])
        return self.env[root]

    def finish(self, outputs: Sequence[int], name: str) -> Region:
        r = self.region
        return Region(
            name, "net", self.b.graph, [], [], list(outputs), children=self.children, span=r.span, library=r.library
        )


def at_inference(graph: Graph, node: Node) -> tuple[int, ...]:
    """The operands that count at inference: of a choice by the mode, the value for inference."""
    if node.op == "get" and graph[node.inputs[0]].op == "choose":
        chosen = graph[node.inputs[0]].inputs
        return (chosen[len(chosen) // 2 + node.attrs["index"]],)
    return node.inputs_in(training=False)


def reached(graph: Graph, roots: Sequence[int]) -> set[int]:
    """What the roots need at inference."""
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack += at_inference(graph, graph[n])
    return seen


def readers(graph: Graph, roots: Sequence[int]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for n in sorted(reached(graph, roots)):
        for i in at_inference(graph, graph[n]):
            out.setdefault(i, []).append(n)
    return out


# ---- affine steps -------------------------------------------------------------------------------


@dataclass
class Steps:
    """scale · v + shift, as values of a recipe in v's names of axes (None: 1, 0), after these nodes."""

    at: Coefficients
    type: TensorType  # of v
    scaled: frozenset[str]  # the axes along which a scale may vary, in v's names
    shifted: frozenset[str]
    scale: int | None = None
    shift: int | None = None
    nodes: list[int] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # of v's axes now -> v's own

    def __post_init__(self) -> None:
        self.names = {n: n for n in self.type.names}

    def own(self, v: int) -> int | None:
        """A value in v's own names; None where it has another axis."""
        have = self.at.b.type(v).names
        if any(n not in self.names for n in have):
            return None
        pairs = tuple((n, self.names[n]) for n in have if self.names[n] != n)
        return self.at.b.op("rename", v, pairs=pairs) if pairs else v

    def shown(self, v: int | None) -> int | None:
        """A value in the names that the axes have after the steps."""
        if v is None:
            return None
        now = {old: new for new, old in self.names.items()}
        pairs = tuple((n, now[n]) for n in self.at.b.type(v).names if now[n] != n)
        return self.at.b.op("rename", v, pairs=pairs) if pairs else v

    def times(self, op: str, other: int) -> bool:
        b, v = self.at.b, self.own(other)
        if v is None or not set(b.type(v).names) <= self.scaled:
            return False
        self.scale = b.op(op, self.scale if self.scale is not None else b.const(1.0), v)
        self.shift = b.op(op, self.shift, v) if self.shift is not None else None
        return True

    def plus(self, op: str, other: int) -> bool:
        b, v = self.at.b, self.own(other)
        if v is None or not set(b.type(v).names) <= self.shifted:
            return False
        self.shift = b.op(op, self.shift if self.shift is not None else b.const(0.0), v)
        return True

    def take(self, node: Node, value: int) -> bool:
        """Whether `node` is an affine step of `value`; then it is taken in."""
        if not self.affine(node, value):
            return False
        self.nodes.append(node.id)
        return True

    def affine(self, node: Node, value: int) -> bool:
        copied = self.at
        if node.op == "rename":
            pairs = dict(node.attrs["pairs"])
            self.names = {pairs.get(n, n): own for n, own in self.names.items()}
            return True
        if node.op in PASSED or node.op == "get":
            return True
        if node.op == "neg":
            return self.times("mul", copied.b.const(-1.0))
        if node.op == "call":
            found = affine_call(copied, node)
            if found is None:
                return False
            scale, shift = found
            if (scale is not None and not self.times("mul", scale)) or (
                shift is not None and not self.plus("add", shift)
            ):
                return False
            if node.attrs["region"].kind == "norm":
                self.norms.append(node)
            return True
        if node.op not in STEPS or node.inputs[0] == node.inputs[1]:
            return False
        first = node.inputs[0] == value
        if not set(node.tensor.names) <= set(self.names) or (node.op == "div" and not first):
            return False
        other = copied.copy(node.inputs[1 if first else 0])
        if other is None:
            return False
        if node.op in ("mul", "div"):
            return self.times(node.op, other)
        if node.op == "sub" and not first:
            return self.times("mul", copied.b.const(-1.0)) and self.plus("add", other)
        return self.plus(node.op, other)


def affine_call(at: Coefficients, node: Node) -> tuple[int | None, int | None] | None:
    """Scale and shift of a called region that is affine in its one value at inference."""
    name = node.attrs["child"]
    child = at.region.children[name]
    inner: Region = node.attrs["region"]
    plain = node.attrs.get("method", "forward") == "forward" and not child.shared and child.count == 1
    if not plain or len(node.inputs) != 1 or len(inner.inputs) != 1 or isinstance(node.type, TupleType):
        return None
    form = affine_form(inner)
    if form is None:
        return None
    region, has = form
    if not region.outputs:
        return None, None
    known = at.children[name]
    if known.region is inner:
        at.children[name] = replace(known, region=region)
    types = tuple(region.graph[o].type for o in region.outputs)
    type_ = types[0] if len(types) == 1 else TupleType(types)  # type: ignore[arg-type]
    attrs = {"child": name, "region": at.children[name].region, "method": "forward", "lifted": ()}
    made = at.b.graph.add("call", (), type_, attrs, span=node.span, batched=False).id
    values = [made] if len(types) == 1 else [at.b.op_get(made, k) for k in range(len(types))]
    found = iter(values)
    return (next(found) if has[0] else None), (next(found) if has[1] else None)


def affine_form(region: Region) -> tuple[Region, tuple[bool, bool]] | None:
    """A region that gives scale and shift of a map that is affine at inference, and which of the two there are."""
    if len(region.inputs) != 1 or region.context or len(region.outputs) != 1 or region.kind not in ("norm", "net"):
        return None
    at = Coefficients(region)
    graph, value = region.graph, region.inputs[0]
    every = frozenset(graph[value].tensor.names)
    steps = Steps(at, graph[value].tensor, every, every)
    read = readers(graph, region.outputs)
    while value != region.outputs[0]:
        after_ = [n for n in read.get(value, ()) if graph[n].batched]
        if len(after_) != 1 or not steps.take(graph[after_[0]], value):
            return None
        value = after_[0]
    scale, shift = steps.shown(steps.scale), steps.shown(steps.shift)
    outputs = [v for v in (scale, shift) if v is not None]
    return at.finish(outputs, f"{region.name}_coefficients"), (scale is not None, shift is not None)


def why_not(region: Region) -> str | None:
    """None where a norm is affine at inference, with numbers that no sample changes; else what stands against it."""
    if affine_form(region) is not None:
        return None
    for r, n in needed(region):
        if n.op in ("var", "mean", "std", "length") and r.graph[n.inputs[0]].batched:
            return "its statistics are those of each sample, at inference too"
    if any(n.op == "scan" for r in region.walk() for n in r.graph):
        return "it goes through its values one after the other"
    return "at inference it is no affine map with numbers of each unit"


def needed(region: Region) -> list[tuple[Region, Node]]:
    out = []
    for r in region.walk():
        out += [(r, r.graph[n]) for n in sorted(reached(r.graph, r.outputs))]
    return out


# ---- the pass -----------------------------------------------------------------------------------


@dataclass
class Site:
    """A linear map with the steps that it takes up: those after it or, `before`, those before it."""

    linear: int
    steps: Steps
    weight: int
    bias: int | None
    entry: int  # what the map reads now
    end: int  # the node whose value the map gives now
    before: bool


def is_norm(graph: Graph, n: int, linear: Node) -> bool:
    """Whether a step is a norm's call or belongs to the linear map's own text."""
    node = graph[n]
    return node.op in PASSED or node.span == linear.span or (node.op == "call" and node.attrs["region"].kind == "norm")


def after(region: Region, node: Node, at: Coefficients, read: dict[int, list[int]], norms_only: bool) -> Site | None:
    """The affine steps that follow a linear map, each the only reader of the one before."""
    graph = region.graph
    weight = at.copy(node.inputs[1])
    if weight is None or not graph[node.inputs[0]].batched:
        return None
    w = at.b.type(weight)
    if node.op == "contract":
        summed = set(node.attrs["axes"])
        if not summed <= set(w.names):
            return None
        free = frozenset(n for n in w.names if n not in summed and n not in graph[node.inputs[0]].tensor.names)
        steps = Steps(at, node.tensor, free, frozenset(node.tensor.names))
    else:
        units = frozenset({node.attrs["channel"]})
        steps = Steps(at, node.tensor, units, units)
    value = node.id
    kept: tuple[list[int], list[Node], int, int | None] | None = None
    while value not in region.outputs and len(read.get(value, ())) == 1:
        step = read[value][0]
        if (norms_only and not is_norm(graph, step, node)) or not steps.take(graph[step], value):
            break
        value = step
        if steps.scale is not None and (not norms_only or graph[step].op == "call"):
            kept = (list(steps.nodes), list(steps.norms), steps.scale, steps.shift)
    if kept is None:
        return None
    steps.nodes, steps.norms, scale, shift = kept
    b = at.b
    if node.op == "contract":
        return Site(node.id, steps, b.mul(weight, scale), shift, node.inputs[0], steps.nodes[-1], False)
    unit, channel = w.axes[0 if node.op == "conv" else 1].name, node.attrs["channel"]
    own = b.op("rename", scale, pairs=((channel, unit),)) if b.type(scale).names else scale
    groups = node.attrs["groups"]
    if node.op == "conv_transpose" and groups > 1 and b.type(scale).names:
        taken = w.axes[0]
        parts = b.op("split", weight, axis=taken.name, into=(("g", groups), ("i", taken.size // groups)))
        each = b.op("split", scale, axis=channel, into=(("g", groups), (unit, w.axes[1].size)))
        made = b.op("merge", b.mul(parts, each), axes=("g", "i"), into=taken.name)
    else:
        made = b.mul(weight, own)
    bias = at.copy(node.inputs[2]) if len(node.inputs) > 2 else None
    if len(node.inputs) > 2 and bias is None:
        return None
    outer = TensorType((Axis("C^", node.tensor.size(channel)),), "real")

    def units_of(v: int) -> int:
        names = b.type(v).names
        if not names:
            return b.expand(v, outer)
        return b.op("rename", v, pairs=((names[0], "C^"),)) if names != ("C^",) else v

    total = None
    if bias is not None:
        total = b.mul(units_of(bias), units_of(scale))
    if shift is not None:
        total = b.add(total, units_of(shift)) if total is not None else units_of(shift)
    return Site(node.id, steps, made, total, node.inputs[0], steps.nodes[-1], False)


def before(region: Region, node: Node, at: Coefficients, read: dict[int, list[int]], norms_only: bool) -> Site | None:
    """The affine steps whose only reader is a linear map: W (a · x + c) = (W a) x + W c."""
    graph = region.graph
    weight = at.copy(node.inputs[1])
    if weight is None or node.op == "conv_transpose" or (node.op == "conv" and node.attrs["groups"] != 1):
        return None
    path: list[int] = []
    value = node.inputs[0]
    while read.get(value, ()) == [path[-1] if path else node.id] and value not in region.outputs:
        batched = [i for i in at_inference(graph, graph[value]) if graph[i].batched]
        if (
            len(batched) != 1
            or graph[value].op not in (*STEPS, *PASSED, "get", "call")
            or (norms_only and not is_norm(graph, value, node))
        ):
            break
        path.append(value)
        value = batched[0]
    for start in range(len(path)):  # the longest run of steps that is affine
        run = path[: len(path) - start][::-1]
        entry = next(i for i in at_inference(graph, graph[run[0]]) if graph[i].batched)
        site = taken_before(region, node, at, weight, run, entry)
        if site is not None:
            return site
    return None


def taken_before(region: Region, node: Node, at: Coefficients, weight: int, run: list[int], entry: int) -> Site | None:
    graph, b = region.graph, at.b
    w = b.type(weight)
    summed = tuple(node.attrs["axes"]) if node.op == "contract" else (node.attrs["channel"],)
    every = frozenset(graph[entry].tensor.names)
    steps = Steps(at, graph[entry].tensor, every, every)
    value = entry
    for n in run:
        if not steps.take(graph[n], value):
            return None
        value = n
    scale, shift = steps.shown(steps.scale), steps.shown(steps.shift)
    if scale is None or not all(set(b.type(v).names) <= set(summed) for v in (scale, shift) if v is not None):
        return None
    if node.op == "conv" and shift is not None and any(map(any, node.attrs["padding"])):
        return None  # zeros stand outside of x, not of a · x + c
    if node.op == "conv":
        own = w.axes[1].name
        pairs = ((summed[0], own),)
        scale = b.op("rename", scale, pairs=pairs) if b.type(scale).names else scale
        shift = b.op("rename", shift, pairs=pairs) if shift is not None and b.type(shift).names else shift
        summed = (own, *(a.name for a in w.axes[2:]))
    bias = None
    if shift is not None:
        full = b.expand(shift, TensorType(tuple(a for a in w.axes if a.name in summed), "real"))
        bias = b.op("sum", b.mul(weight, full), axes=summed)
    if node.op == "conv" and len(node.inputs) > 2:
        old = at.copy(node.inputs[2])
        if old is None:
            return None
        bias = b.add(old, bias) if bias is not None else old
    return Site(node.id, steps, b.mul(weight, scale), bias, entry, node.id, True)


def fold(region: Region, *, norms_only: bool = False) -> Folded:
    """The network with everything folded that folds; the same one where nothing does. `norms_only` leaves other steps."""
    out = Folded(region)
    out.region = Folding(out, norms_only).region(region)
    return out


class Folding:
    def __init__(self, out: Folded, norms_only: bool):
        self.out, self.norms_only = out, norms_only

    def region(self, region: Region) -> Region:
        if id(region) not in self.out.made:
            self.out.made[id(region)] = self.made(region)
        return self.out.made[id(region)]

    def made(self, region: Region) -> Region:
        children = {}
        for name, c in region.children.items():
            children[name] = replace(c, region=self.region(c.region))
        other = {id(c.region): children[n].region for n, c in region.children.items()}
        at = Coefficients(region)
        sites = (
            []
            if region.rules or region.programs or region.kind not in ("net", "norm", "step")
            else self.sites(region, at)
        )
        if region.kind != "norm":
            self.judge(region, sites)
        if not sites and all(children[n].region is c.region for n, c in region.children.items()):
            return region
        made = self.rewritten(region, at, sites, children, other)
        programs = {n: self.rewritten(p, Coefficients(p), [], children, other) for n, p in region.programs.items()}
        return replace(made, programs=programs, children=children) if programs else made

    def sites(self, region: Region, at: Coefficients) -> list[Site]:
        graph = region.graph
        read = readers(graph, region.outputs)
        found: list[Site] = []
        taken: set[int] = set()
        for rule in (after, before):
            for n in sorted(reached(graph, region.outputs)):
                if graph[n].op in LINEAR and n not in taken:
                    site = rule(region, graph[n], at, read, self.norms_only)
                    if site is not None and not taken & set(site.steps.nodes):
                        found.append(site)
                        taken |= {n, *site.steps.nodes}
        return found

    def judge(self, region: Region, sites: list[Site]) -> None:
        """Notes what becomes of each norm that the region calls."""
        taken = {n.id: region.graph[s.linear].span for s in sites for n in s.steps.norms}
        for n in sorted(reached(region.graph, region.outputs)):
            node = region.graph[n]
            if node.op != "call" or node.attrs["region"].kind != "norm" or not node.batched:
                continue
            reason = "" if n in taken else why_not(node.attrs["region"]) or "no linear map of its own stands before it"
            self.out.verdicts.append(Verdict(node.attrs["region"].name, n in taken, reason, node.span, taken.get(n)))

    def rewritten(
        self, region: Region, at: Coefficients, sites: list[Site], children: dict[str, Child], other: dict[int, Region]
    ) -> Region:
        """The region with new weights; where something folds in it, as it runs at inference."""
        graph = region.graph
        ends = {s.end: s for s in sites}
        new, env = Graph(), dict[int, int]()
        names = {str(n.attrs["name"]) for n in graph if n.op in ("param", "state")}
        recipe = Recipe(region, [])
        results: list[int] = []

        def stored(value: int, wanted: str) -> int:
            name = wanted
            while name in names:
                name += "_"
            names.add(name)
            recipe.names.append(name)
            results.append(value)
            attrs = {"name": name, "domain": R, "init": 0.0}
            return new.add("param", (), at.b.graph[value].type, attrs, label=name, batched=False).id

        def inputs_of(node: Node) -> tuple[int, ...]:
            return at_inference(graph, node) if sites else node.inputs

        wanted: set[int] = {*region.inputs, *region.context}
        stack = [
            *region.outputs,
            *(
                []
                if sites
                else [i for u in region.updates for i in (u.state, u.new, *([u.live] if u.live is not None else []))]
            ),
        ]
        while stack:
            n = stack.pop()
            if n not in wanted:
                wanted.add(n)
                stack += [ends[n].entry] if n in ends else inputs_of(graph[n])
        for n in sorted(wanted):
            node = graph[n]
            if n in ends:
                env[n] = self.line(new, env, graph, ends[n], stored)
            elif sites and node.op == "get" and inputs_of(node) != node.inputs:
                env[n] = env[inputs_of(node)[0]]
            else:
                attrs = dict(node.attrs)
                if node.op in RUNS and id(attrs.get("region")) in other:
                    attrs["region"] = other[id(attrs["region"])]
                env[n] = new.add(
                    node.op,
                    tuple(env[i] for i in node.inputs),
                    node.type,
                    attrs,
                    span=node.span,
                    label=node.label,
                    batched=node.batched,
                ).id
        updates = [] if sites else [
            replace(u, state=env[u.state], new=env[u.new], live=env[u.live] if u.live is not None else None) for u in region.updates
        ]  # fmt: skip
        called = {n.attrs["child"] for n in new if n.op in RUNS and "child" in n.attrs}
        bound = {v for n, c in children.items() if n in called for v in c.bindings.values()}
        kept = {n: c for n, c in children.items() if n in called or c.shared or n in bound}
        if sites:
            recipe.region = at.finish(results, f"{region.name}_weights")
            self.out.recipes[id(region)] = recipe
        return replace(
            region, graph=new, inputs=[env[i] for i in region.inputs], context=[env[i] for i in region.context],
            outputs=[env[o] for o in region.outputs], updates=updates, starts=[], steps=[], children=kept,
        )  # fmt: skip

    def line(self, new: Graph, env: dict[int, int], graph: Graph, site: Site, stored: Callable[[int, str], int]) -> int:
        """The linear map with its new weights, and the renamings that stood among the steps."""
        node, x = graph[site.linear], env[site.entry]
        stem = str(graph[node.inputs[1]].attrs.get("name", f"{node.op}_weight")).removesuffix("weight")
        weight = stored(site.weight, f"{stem}folded_weight")
        if site.before:
            for n in site.steps.nodes:
                if graph[n].op in PASSED:
                    x = new.add(
                        graph[n].op, (x,), graph[n].type, dict(graph[n].attrs), span=graph[n].span, batched=True
                    ).id
        inputs = [x, weight]
        if site.bias is not None:
            inputs.append(stored(site.bias, f"{stem}folded_bias"))
        bias = inputs.pop() if node.op == "contract" and len(inputs) == 3 else None
        made = new.add(
            node.op, tuple(inputs), node.type, dict(node.attrs), span=node.span, label=node.label, batched=True
        ).id
        if bias is not None:
            made = new.add("add", (made, bias), node.type, {}, span=node.span, batched=True).id
        for n in site.steps.nodes if not site.before else ():
            if graph[n].op in PASSED:
                made = new.add(
                    graph[n].op, (made,), graph[n].type, dict(graph[n].attrs), span=graph[n].span, batched=True
                ).id
        if graph[site.end].label:
            new.relabel(made, graph[site.end].label or "")
        return made


__all__ = ["Coefficients", "Folded", "Recipe", "Verdict", "fold", "why_not"]
