"""PyTorch source from programs: one module class for each distinct region, one method for each program."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from flowlang.backends.torch.emit import ATOM, EMITTERS, Expr, Writer, called, method_name
from flowlang.backends.torch.files import file_text, runtime_names
from flowlang.backends.torch.forms import cheaper
from flowlang.backends.torch.names import RESERVED, Names, ascii_name, class_name
from flowlang.backends.torch.native import with_native_norms
from flowlang.backends.torch.polish import folded, reuse_names

from flowlang.analysis.solvers import interpolant, order
from flowlang.derive.analyse import Analyses
from flowlang.derive.prepared import fixed_values, prepared
from flowlang.derive.programs import Program, is_map, is_random
from flowlang.derive.tidy import graphs, tidy, without_log_det, zero_log_det
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Child, Node, Region
from flowlang.ir.interval import REAL
from flowlang.ir.noise import draws
from flowlang.ir.tableau import Tableau
from flowlang.ir.tangents import FROZEN, probes_of

LINE_WIDTH = 120


@dataclass
class Generated:
    """Source text with the name of the class to make, and of the runtime helpers it uses."""

    text: str
    root: str
    helpers: list[str] = field(default_factory=list)


class Unlowered(Exception):
    """An op without an emitter; the caller makes the diagnostic."""

    def __init__(self, node: Node):
        super().__init__(node.op)
        self.node = node


class Generator:
    """Writes the classes of one root region.

    With `memory` "reversible" the copies of a `repeat` that have closed inverses keep no activations for gradients;
    `kept` says why others do.
    """

    def __init__(self, root: Region, analyses: Analyses, origin: str, memory: str = "plain"):
        self.root = root
        self.memory = memory
        self.kept: dict[str, str] = {}
        self.undone: set[str] = set()
        self.analyses = analyses
        self.origin = origin
        self.regions = list(root.walk())
        names = Names(runtime_names())
        self.classes: dict[int, str] = {}
        for region in self.regions:
            self.classes[id(region)] = names.fresh(class_name(region.name))
        self.helpers: set[str] = set()
        self.reserved = runtime_names() | set(self.classes.values())
        self._programs: dict[tuple[int, str, bool], Program] = {}
        self._prepared: dict[tuple[int, str], Program | None] = {}
        self._noisy: dict[tuple[int, str, bool], bool] = {}
        self._scopes: dict[int, ClassScope] = {}

    def generate(self) -> Generated:
        asked = self.asked()
        blocks = [self.write_class(r, asked[id(r)]) for r in self.regions]
        text = "\n\n\n".join(blocks)
        return Generated(text + "\n", self.classes[id(self.root)], sorted(self.helpers))

    # ---- programs -------------------------------------------------------------------------------

    def program(self, region: Region, name: str, value_only: bool = False) -> Program:
        """A region's program, tidied; `value_only` leaves its log-det out."""
        key = (id(region), name, value_only)
        if key not in self._programs and name.startswith(PREPARED):
            made = self.prepared(region, name)
            assert made is not None
            self._programs[key] = made
        if key not in self._programs:
            program = self.analyses.program(region, name)
            if value_only:
                program = without_log_det(program)
            self._programs[key] = tidy(program, self.zero_log_det)
        return self._programs[key]

    def prepared(self, region: Region, name: str) -> Program | None:
        """A field's program as one function whose weights are fetched once; `name` says which, and for whose times."""
        key = (id(region), name)
        if key not in self._prepared:
            plain, together = name.removeprefix(PREPARED).removesuffix(TOGETHER), name.endswith(TOGETHER)
            along = probes_of(plain.removeprefix(FROZEN), region.graph[region.inputs[0]].tensor) is not None
            self._prepared[key] = prepared(self.program(region, plain), 1 + along, together=together)
        return self._prepared[key]

    def solved_with(self, n: Node) -> list[str]:
        """The prepared programs of a field that the steps of `integrate` call: for shared times, for each sample's, or both."""
        if n.attrs.get("gradient", "through") != "through" or implicit(n):
            return []
        region, method, _ = called(n)
        names = [f"{PREPARED}{method}{TOGETHER}"]
        if "rtol" in n.attrs and not n.attrs.get("shared"):
            names.append(f"{PREPARED}{method}")
        return [x for x in names if self.prepared(region, x) is not None]

    def zero_log_det(self, region: Region, name: str) -> bool:
        return zero_log_det(self.program(region, name))

    def noisy(self, region: Region, name: str, value_only: bool = False) -> bool:
        """Whether a program draws noise, itself or below."""
        key = (id(region), name, value_only)
        if key not in self._noisy and not value_only and self.solved_first(self.program(region, name)):
            self._noisy[key] = self.noisy(region, "inverse", True) or self.noisy(region, "forward")
        if key not in self._noisy:
            self._noisy[key] = any(
                n.op in ("random_like", "estimate_log_det") or (n.op in RUNS and self.noisy(*called(n)))
                for graph in graphs(self.program(region, name, value_only))
                for n in graph
            )
        return self._noisy[key]

    def undoes(self, n: Node) -> str | None:
        """The method that undoes a step of a `repeat` whose activations are not kept; None where they are."""
        if self.memory != "reversible" or n.op != "repeat":
            return None
        region, method, _ = called(n)
        if not is_map(region) or method not in UNDOES:
            return None
        reason = self.keeps(region)
        if reason:
            self.kept.setdefault(region.name, reason)
            return None
        self.undone.add(region.name)
        return method_name(UNDOES[method], True)

    def recalls(self, n: Node, scope: Region) -> bool:
        """Whether a call is of a network that a reversible chain evaluates once on the way back."""
        region: Region = n.attrs["region"]
        plain_call = called(n)[1] == "forward" and not is_map(region) and not self.noisy(*called(n))
        if self.memory != "reversible" or not plain_call or not is_map(scope) or scope is self.root:
            return False
        tensors = all(
            region.graph[i].tensor.kind == "real" and region.graph[i].attrs.get("role") != "field"
            for i in (*region.inputs, *region.context)
        )
        return tensors and not any(m.op in ("state", "running") for r in region.walk() for m in r.graph)

    def keeps(self, region: Region) -> str:
        """Why the activations of a repeated region have to be kept; empty where they need not be."""
        nodes = [n for r in region.walk() for n in r.graph]
        if is_random(region) or any(self.noisy(region, p) for p in UNDOES):
            return "its steps draw random numbers"
        if any(n.op in ("state", "running") for n in nodes):
            return "training changes its state"
        if any(n.attrs.get("role") == "field" for n in nodes):
            return "it is given a function"
        solved = [n for r in region.walk() if is_map(r) for n in self.program(r, "inverse").graph]
        if any(n.op in (*SOLVERS, "integrate") for n in solved):
            return "its inverse is found by steps or rounds, and has no closed form"
        return ""

    def roots(self) -> list[tuple[str, str]]:
        """(program, method) pairs of the root's class."""
        if self.root.kind == "flow":
            names = ["forward", "inverse", "log_prob", "sample", "sample_and_log_prob"]
            return [(n, f"_{n}") for n in (*names, *(["initialise"] if self.root.has_starts else []))]
        if self.root.kind == "model":
            return []
        if not is_map(self.root):
            return [(n, n) for n in ("forward", *(["initialise"] if self.root.has_starts else []))]
        extra = [("score", "score"), ("generate", "generate")] if is_random(self.root) else []
        return [("forward", "forward"), ("inverse", "inverse"), *extra]

    def asked(self) -> dict[int, list[tuple[str, bool]]]:
        """For each region, the programs that the root needs of it, in a fixed order."""
        found: dict[int, set[tuple[str, bool]]] = {id(r): set() for r in self.regions}
        todo = [(self.root, p, False) for p, _ in self.roots()]
        todo += [(r, "forward", False) for r in self.root.programs.values()]
        found |= {id(r): set() for r in self.root.programs.values()}
        while todo:
            region, name, value_only = todo.pop()
            if (name, value_only) in found[id(region)]:
                continue
            found[id(region)].add((name, value_only))
            if name == "forward" and "backward" in region.rules:
                todo += [(region, p, False) for p in OWN_GRADIENT]
                continue
            if is_map(region) and region is not self.root:  # so that every part is a module that can be called
                todo += [(region, "forward", False), (region, "inverse", False)]
            if not value_only and self.solved_first(self.program(region, name)):
                todo += [(region, "inverse", True), (region, "forward", False)]
                continue
            for graph in graphs(self.program(region, name, value_only)):
                todo += [called(n) for n in graph if n.op in RUNS]
                todo += [(n.attrs["region"], UNDOES[called(n)[1]], True) for n in graph if self.undoes(n)]
                todo += [(n.attrs["region"], "forward", False) for n in graph if implicit(n)]
                todo += [
                    (n.attrs["region"], p, False) for n in graph if n.op == "integrate" for p in self.solved_with(n)
                ]
                todo += [(r, "forward", False) for n in graph for r in n.attrs.get("rule_regions", ())]
        return {k: sorted(v, key=lambda p: (p[1], program_rank(p[0]), p[0])) for k, v in found.items()}

    # ---- one class ------------------------------------------------------------------------------

    def write_class(self, region: Region, asked: list[tuple[str, bool]]) -> str:
        name = self.classes[id(region)]
        root = region is self.root and region.kind == "flow"
        scope = ClassScope(self, region)
        alone = region is self.root and region.kind in ("net", "norm")
        prefix = "_" if root or alone else ""
        bodies: list[list[str]] = []
        for p, v in asked:
            program, method = self.program(region, p, v), prefix + method_name(p, v)
            if p == "forward" and "backward" in region.rules:
                bodies.append(self.write_own_gradient(program, method))
                continue
            if p.startswith(PREPARED):
                bodies.append(self.write_prepared(scope, program, p))
                continue
            bodies.append(self.write_method(scope, program, f"_{p}" if p in OWN_GRADIENT else method))
        for program in region.programs.values():
            bodies += [
                self.program_face(program),
                self.write_method(scope, self.program(program, "forward"), f"_run_{ascii_name(program.name)}"),
            ]
        base = (
            ("Flow" if len(region.inputs) == 1 else "RecordFlow")
            if root
            else "Model"
            if region.programs
            else "Net"
            if alone
            else "nn.Module"
        )
        lines = [f"class {name}({base}):"]
        if base != "nn.Module":
            self.helpers.add(base)
        lines += [f"    {x}".rstrip() for x in self.docstring(region)]
        if root:
            lines += [f"    {x}".rstrip() for x in self.shapes(region)]
        elif alone:
            lines += [f"    {x}".rstrip() for x in self.net_inputs(region)]
        elif region.programs:
            lines += [f"    {x}".rstrip() for x in self.programs(region, scope)]
        constructor = scope.constructor()
        for body in [constructor, *bodies] if constructor else bodies:
            lines.append("")
            lines += [f"    {x}".rstrip() for x in body]
        return "\n".join(lines)

    def names_of(self, region: Region) -> ClassScope:
        """The attributes of a region's class, for what reaches into its instances."""
        if id(region) not in self._scopes:
            self._scopes[id(region)] = ClassScope(self, region)
        return self._scopes[id(region)]

    def docstring(self, region: Region) -> list[str]:
        graph = region.graph
        ins = ", ".join(str(graph[i].type) for i in region.inputs)
        given = "".join(
            f"{', ' if k else ' given '}{graph[c].label}: {graph[c].type}" for k, c in enumerate(region.context)
        )
        outs = ", ".join(str(graph[o].type) for o in region.outputs)
        title = plain(f"{region.signature or region.name}: {ins}{given} -> {outs}")
        lines = [*wrap(title), *(x for d in plain(region.doc or "").splitlines() for x in wrap(d))]
        if region.doc:
            lines.insert(len(wrap(title)), "")
        return quoted(lines)

    def shapes(self, region: Region) -> list[str]:
        graph = region.graph
        data, base = [graph[i] for i in region.inputs], graph[region.outputs[0]]
        given = {graph[c].label or graph[c].attrs["name"]: graph[c].tensor for c in region.context}
        if len(data) == 1:
            lines = [f"data_shape = {data[0].tensor.shape!r}"]
        else:
            lines = [f"data_shapes = {dictionary({str(n.label): repr(n.tensor.shape) for n in data})}"]
        lines.append(f"base_shape = {base.tensor.shape!r}")
        domain = data[0].attrs.get("domain")
        if len(data) == 1 and isinstance(domain, Domain) and (domain.interval != REAL or domain.structure):
            lines.append(f"data_domain = {data_domain(domain)!r}")
        exactness = self.analyses.exactness(region)
        if exactness != "exact":
            lines.append(f"exactness = {string(exactness)}")
        if region.emissions:
            lines.append(f"emitted_shapes = {tuple(graph[e.value].tensor.shape for e in region.emissions)!r}")
        if given:
            lines.append(f"given_shapes = {dictionary({k: repr(t.shape) for k, t in given.items()})}")
        own = {"data": data[0].tensor} if len(data) == 1 else {str(n.label): n.tensor for n in data}
        types = {**own, "base": base.tensor, **given}
        lines.append(f"types = {dictionary({k: string(str(t)) for k, t in types.items()})}")
        return ["", *"\n".join(lines).split("\n")]

    def net_inputs(self, region: Region) -> list[str]:
        nodes = [region.graph[i] for i in [*region.inputs, *region.context]]
        lines = [f"inputs = {dictionary({str(n.label): repr(n.tensor.shape) for n in nodes})}"]
        lines.append(f"types = {dictionary({str(n.label): string(str(n.tensor)) for n in nodes})}")
        return ["", *"\n".join(lines).split("\n")]

    def programs(self, region: Region, scope: ClassScope) -> list[str]:
        """The class attributes of a model: its programs with the shapes of their inputs, and all types."""
        table: dict[str, str] = {}
        types: dict[str, str] = {}
        for name, program in region.programs.items():
            nodes = [program.graph[i] for i in program.inputs]
            table[ascii_name(name)] = dictionary({str(n.label): repr(n.tensor.shape) for n in nodes})
            types |= {str(n.label): string(str(n.tensor)) for n in nodes}
        types |= {name: string(str(t)) for name, (_, t) in region.data.items()}
        lines = [f"programs = {dictionary(table)}", f"types = {dictionary(types)}"]
        exactness = {
            ascii_name(n): found for n, p in region.programs.items() if (found := self.analyses.exactness(p)) != "exact"
        }
        if exactness:
            lines.append(f"exactness = {dictionary({k: string(v) for k, v in exactness.items()})}")
        first = next((n for n, (word, _) in region.data.items() if word == "data"), None)
        if first is not None:
            rest = {n: repr(t.shape) for n, (_, t) in region.data.items() if n != first}
            lines += [f"data_name, data_shape = {string(first)}, {region.data[first][1].shape!r}"]
            lines += [f"given_shapes = {dictionary(rest)}"] if rest else []
        follows = [c for c in region.children.values() if c.follows is not None]
        if follows:
            table_ = ", ".join(
                f"({string(scope.children[c.name])}, {string(scope.children[c.follows.source])}, {c.follows.decay!r}, {c.follows.every})"
                for c in follows
                if c.follows is not None
            )
            lines.append(f"followers = ({table_},)")
        context = tuple(n for n, (word, _) in region.data.items() if word == "given")
        lines += [f"context = {context!r}"] if context else []
        return ["", *"\n".join(lines).split("\n")]

    def program_face(self, region: Region) -> list[str]:
        """The method that users call for a program: it checks its inputs and broadcasts their batch dimensions."""
        fresh = Names()
        names = [fresh.fresh(str(region.graph[i].label)) for i in region.inputs]
        results = ", ".join(["Tensor"] * len(region.outputs))
        returns = results if len(region.outputs) == 1 else f"tuple[{results}]"
        inputs = "".join(f", {n}: Tensor" for n in names) or ", shape: Any = ()"
        head = f"def {ascii_name(region.name)}(self{inputs}, generator: torch.Generator | None = None) -> {returns}:"
        values = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
        doc = plain(region.doc or f"The program `{region.name}` of the spec.").splitlines()
        doc += EXACTNESS.get(self.analyses.exactness(region), [])
        body = f"return self.run({string(ascii_name(region.name))}, {values}, {'()' if names else 'shape'}, generator)"
        return [head, *(f"    {x}" for x in quoted(doc)), f"    {body}"]

    def write_method(self, scope: ClassScope, program: Program, method: str) -> list[str]:
        if self.solved_first(program):
            return self.write_inverse(program, method)
        program = cheaper(with_native_norms(program))
        writer = Writer(scope, program.graph)
        region = program.region
        names: list[str] = []
        for i in program.inputs:
            node = program.graph[i]
            var = writer.names.fresh(node.label or node.attrs.get("name") or "x")
            writer.env[i] = Expr(var)
            names.append(var)
        named = region.kind == "program"
        sampling = program.name in ("sample", "sample_and_log_prob") or (named and not names)
        if sampling:
            writer.batch, writer.reference = "batch", "self.like"
        elif not names:  # a value of the region's own weights, as a recipe of `derive/folding.py`
            writer.batch, writer.reference = "()", scope.weight()
        else:
            rank = program.graph[program.inputs[0]].tensor.rank
            writer.batch = f"{names[0]}.shape[:-{rank}]" if rank else f"{names[0]}.shape"
            writer.reference = names[0]
        signature = [
            "self",
            *(["batch: tuple[int, ...]"] if sampling else []),
            *(f"{n}: {annotation(program.graph[i])}" for n, i in zip(names, program.inputs, strict=True)),
        ]
        value_only = is_map(region) and not program.log_det and not sampling
        if sampling or named or self.noisy(region, program.name, value_only):
            signature.append("generator: torch.Generator | None = None")
            writer.generator = "generator"
        results = writer.run(program.outputs, program.effects)
        final: list[str] = []
        for k, o in enumerate(program.outputs):
            node = program.graph[o]
            text = results[k]
            if not node.batched and (named or is_map(region)):
                sizes = ", ".join(str(a.size) for a in node.tensor.axes)
                shape = f"*{writer.batch}, {sizes}" if sizes else writer.batch
                if writer.is_number(o):
                    text = writer.full(f"({shape})" if sizes else shape, o)
                else:
                    text = f"{writer.env[o].at(ATOM)}.expand({shape})"
            final.append(text)
        shown = ", ".join(f"{n}: {program.graph[i].type}" for n, i in zip(names, program.inputs, strict=True))
        if program.effects:
            final = writer.write_effects(program.effects, final, program.name in OWN_GRADIENT)
        body = reuse_names(names, [*writer.lines, f"return {', '.join(final)}"], self.reserved | RESERVED)
        body = [x for line in body for x in folded(line, LINE_WIDTH - 8)]
        return [
            *header(method, signature, len(final)),
            *([f"    # {plain(shown)}"] if shown else []),
            *(f"    {x}" for x in body),
        ]

    def write_prepared(self, scope: ClassScope, program: Program, method: str) -> list[str]:
        """A method that gives a function: what its arguments do not change is found when the function is made."""
        program = with_native_norms(program)
        graph = program.graph
        plain = method.removeprefix(PREPARED).removesuffix(TOGETHER)
        tensor = graph[program.inputs[0]].tensor
        own = 2 + (probes_of(plain.removeprefix(FROZEN), tensor) is not None)
        moving, held = program.inputs[:own], program.inputs[own:]
        writer = Writer(scope, graph)
        names = []
        for i in (*held, *moving):
            names.append(writer.names.fresh(graph[i].label or graph[i].attrs.get("name") or "x"))
            writer.env[i] = Expr(names[-1])
        arguments, inner = names[: len(held)], names[len(held) :]
        weight = next(n for n in graph if n.op == "param")
        first = next((i for i in held if graph[i].batched), None)
        writer.reference = scope.parameter(weight)
        if first is not None:
            rank = graph[first].tensor.rank
            writer.batch = f"{writer.env[first].text}.shape[:-{rank}]" if rank else f"{writer.env[first].text}.shape"
        fixed = [i for i in fixed_values(program, moving) if not writer.is_number(i)]
        writer.run(fixed)
        for i in fixed:
            writer.variable(i)
        outside, writer.lines, writer.uses = writer.lines, [], {}
        writer.reference, rank = inner[0], tensor.rank
        writer.batch = f"{inner[0]}.shape[:-{rank}]" if rank else f"{inner[0]}.shape"
        results = writer.run(program.outputs)
        final = [
            writer.as_tensor(o) if writer.is_number(o) else r for o, r in zip(program.outputs, results, strict=True)
        ]
        several = f"tuple[{', '.join(['Tensor'] * len(final))}]" if len(final) > 1 else "Tensor"
        function = writer.names.fresh("rates" if plain.removeprefix(FROZEN) == "forward" else "rates_and_divergence")
        own_time = "one for all samples" if method.endswith(TOGETHER) else "one for each sample"
        signature = ["self", *(f"{n}: {annotation(graph[i])}" for n, i in zip(arguments, held, strict=True))]
        head = f"def {method}({', '.join(signature)}) -> Callable[..., {several}]:"
        lines = [
            f'"""The field as a function of {", ".join(inner)}, the time {own_time}."""',
            *outside,
            "",
            f"def {function}({', '.join(f'{n}: Tensor' for n in inner)}) -> {several}:",
            *(f"    {x}" for x in [*writer.lines, f"return {', '.join(final)}"]),
            "",
            f"return {function}",
        ]
        return [head, *(f"    {y}" for x in lines for y in folded(x, LINE_WIDTH - 8))]

    def write_own_gradient(self, program: Program, method: str) -> list[str]:
        """The forward method of a region with a backward pass of its own, which holds while training."""
        fresh = Names(self.reserved)
        names = [fresh.fresh(program.graph[i].label or "x") for i in program.inputs]
        count = len(program.outputs)
        self.helpers.add("OwnGradient")
        return [
            *header(method, ["self", *(f"{n}: Tensor" for n in names)], count),
            "    if self.training:",
            f"        return OwnGradient.apply(self._trained, self._backward, {count}, {', '.join(names)})",
            f"    return self._plain({', '.join(names)})",
        ]

    def solved_first(self, program: Program) -> bool:
        """Whether an inverse solves for its value and then takes the log-det from the forward map."""
        return (
            program.name == "inverse"
            and program.log_det
            and not is_random(program.region)
            and not program.region.emissions
            and any(n.op in SOLVERS for n in program.graph)
            and not draws(program.region, training=True)
            and not any(n.op == "running" for r in program.region.walk() for n in r.graph)
        )

    def write_inverse(self, program: Program, method: str) -> list[str]:
        region = program.region
        names = Names(self.reserved)
        arguments = [
            names.fresh(program.graph[i].label or program.graph[i].attrs.get("name") or "x") for i in program.inputs
        ]
        values = [names.fresh(program.graph[o].label or "x") for o in program.outputs[:-1]]
        context = arguments[len(region.outputs) :]
        prefix = method.removesuffix("inverse")
        signature = ["self", *(f"{a}: Tensor" for a in arguments)]
        noise = {
            v: [] if not self.noisy(region, p, v) else ["generator=generator"]
            for p, v in (("inverse", True), ("forward", False))
        }
        if any(noise.values()):
            signature.append("generator: torch.Generator | None = None")
        solve = f"self.{prefix}inverse_value({', '.join([*arguments, *noise[True]])})"
        forward = f"self{'._forward' if prefix else ''}({', '.join([*values, *context, *noise[False]])})"
        log_det = names.fresh("log_det")
        blank = "_" if len(region.outputs) == 1 else "*_"
        return [
            *header(method, signature, len(program.outputs)),
            f"    # {plain(', '.join(f'{a}: {program.graph[i].type}' for a, i in zip(arguments, program.inputs, strict=True)))}",
            f"    {', '.join(values)} = {solve}",
            f"    {blank}, {log_det} = {forward}",
            f"    return {', '.join(values)}, -{log_det}",
        ]


SOLVERS = ("scan_solve", "bracket_solve", "fixed_point_solve")
PROGRAMS = ("forward", "inverse", "score", "generate", "log_prob", "sample", "sample_and_log_prob", "initialise")
UNDOES = {"forward": "inverse", "inverse": "forward"}  # what undoes a program
OWN_GRADIENT = ("plain", "trained", "backward")  # of a region with a hand-given backward pass
EXACTNESS = {  # what is added to the words of a program
    "lower bound": ["", "Its log-density is a lower bound: one draw of log w with E[w] = p, so E[log w] <= log p."],
    "upper bound": ["", "Its log-density is an upper bound in the mean: its draws are those that made the sample."],
    "biased": ["", "Its log-density is an estimate, and not unbiased."],
    "unbiased": ["", "Its log-density is an unbiased estimate."],
    "ratio": ["", "Its log-density is right up to a constant."],
}
PREPARED, TOGETHER = "prepared_", "_together"  # around the name of a field's program
RUNS = ("call", "repeat", "integrate", "scan")  # ops that run a program of a child


def implicit(n: Node) -> bool:
    """Whether a trajectory's steps are solved for, by the field itself."""
    return n.op == "integrate" and "tableau" in n.attrs and not n.attrs["tableau"].explicit


def annotation(node: Node) -> str:
    return "Any" if node.attrs.get("role") == "field" else "Tensor"


def program_rank(name: str) -> int:
    """Programs in the order of the list, derivatives of nets after them."""
    return PROGRAMS.index(name) if name in PROGRAMS else len(PROGRAMS)


def header(method: str, signature: list[str], results: int) -> list[str]:
    returns = "Tensor" if results == 1 else f"tuple[{', '.join(['Tensor'] * results)}]"
    head = f"def {method}({', '.join(signature)}) -> {returns}:"
    if len(head) <= LINE_WIDTH - 4:
        return [head]
    return [f"def {method}(", f"    {', '.join(signature)}", f") -> {returns}:"]


def wrap(text: str) -> list[str]:
    return textwrap.wrap(text, LINE_WIDTH - 6, break_long_words=False) or [""]


def quoted(lines: list[str]) -> list[str]:
    """A docstring of these lines."""
    if len(lines) == 1:
        return [f'"""{lines[0]}"""']
    return [f'"""{lines[0]}', *lines[1:], '"""']


def data_domain(domain: Domain) -> tuple[str, float | None, float | None]:
    """Kind and ends of the values of a sample, as the runtime reads it (None: no end)."""
    kind = domain.structure if domain.structure in ("simplex", "sphere") else domain.kind
    lo, hi = domain.interval.lo, domain.interval.hi
    return str(kind), None if lo == -math.inf else lo, None if hi == math.inf else hi


def dictionary(items: dict[str, str]) -> str:
    line = "{" + ", ".join(f"{string(k)}: {v}" for k, v in items.items()) + "}"
    if len(line) < LINE_WIDTH - 24:
        return line
    return "{\n" + "".join(f"    {string(k)}: {v},\n" for k, v in items.items()) + "}"


def string(text: str) -> str:
    """A Python string in double quotes, as formatters like it."""
    return json.dumps(text, ensure_ascii=False)


def plain(text: str) -> str:
    """Text that may stand in a comment or docstring."""
    return text.replace("\\", "/").replace('"""', "'''").replace("\r", " ")


def reflections(domain: Domain) -> str:
    """The number of Householder reflections, when it is stated."""
    return f", reflections={int(domain.args[1])}" if len(domain.args) > 1 else ""


@lru_cache(maxsize=1)
def attributes_taken() -> set[str]:
    """What a module has of its own, and no parameter or part of it may hide."""
    from flowlang.backends.torch import runtime

    return {name for base in (runtime.Flow, runtime.Net, runtime.Model) for name in dir(base)} | {"origin", "verdicts"}


class ClassScope:
    """Attributes of one class: parameters, buffers, children."""

    def __init__(self, generator: Generator, region: Region):
        self.generator = generator
        self.region = region
        self.names = Names(attributes_taken())
        self.attributes: dict[str, str] = {}  # spec parameter -> attribute
        self.lines: list[str] = []
        self.buffers: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.children: dict[str, str] = {}
        self.shared: list[tuple[str, str]] = []
        self.tableaus: list[tuple[Tableau, bool, str]] = []
        for child in region.children.values():
            self.add_child(child)
        for node in region.graph:
            if node.op in ("param", "state"):
                self.add_parameter(node)

    def use(self, helper: str) -> str:
        self.generator.helpers.add(helper)
        return helper

    # ---- children -------------------------------------------------------------------------------

    def add_child(self, child: Child) -> None:
        name = self.names.fresh(child.name)
        self.children[child.name] = name
        if child.shared:
            self.shared.append((child.name, name))
            # Referred to, not owned: its parameters belong to the module that hands it in.
            self.lines.append(f'object.__setattr__(self, "{name}", {name})')
            return
        cls = self.generator.classes[id(child.region)]
        order = [c.name for c in child.region.children.values() if c.shared]
        arguments = ", ".join(f"self.{self.children[child.bindings[n]]}" for n in order if n in child.bindings)
        made = f"{cls}({arguments})"
        if child.count > 1:
            self.lines.append(f"self.{name} = nn.ModuleList({made} for _ in range({child.count}))")
        else:
            self.lines.append(f"self.{name} = {made}")

    # ---- solvers --------------------------------------------------------------------------------

    def tableau(self, name: str, tableau: Tableau, *, dense: bool = False) -> str:
        """An attribute that holds a Runge-Kutta method, with its values inside a step if asked."""
        for known, has_dense, attribute in self.tableaus:
            if known == tableau and has_dense == dense:
                return f"self.{attribute}"
        attribute = self.names.fresh(name)
        self.tableaus.append((tableau, dense, attribute))
        a = tuple(tuple(float(v) for v in (row[:i] if tableau.explicit else row)) for i, row in enumerate(tableau.a))
        b, c = (tuple(map(float, values)) for values in (tableau.b, tableau.c))
        parts = [repr(a), repr(b), repr(c)]
        if tableau.embedded is not None:
            parts.append(repr(tuple(float(x - y) for x, y in zip(tableau.b, tableau.embedded, strict=True))))
            parts.append(str(order(tableau, tableau.embedded).value + 1))
        if dense:
            parts.append(f"dense={tuple(tuple(map(float, row)) for row in interpolant(tableau).weights)!r}")
        self.lines.append(f"self.{attribute} = {self.use('RungeKutta')}({', '.join(parts)})")
        return f"self.{attribute}"

    # ---- parameters -----------------------------------------------------------------------------

    def add_parameter(self, node: Node) -> None:
        spec = node.attrs["name"]
        if spec in self.attributes:
            return
        name = self.names.fresh(spec)
        self.attributes[spec] = name
        shape = node.tensor.shape
        init = node.attrs.get("init")
        domain: Domain = node.attrs["domain"]
        value = self.start(init, shape, plain=node.op == "state" or domain.structure is None)
        comment = f"  # {plain(str(node.type))}" if shape else ""
        if node.op == "state":
            if node.tensor.kind == "int":
                value += ".long()"
            self.lines.append(f'self.register_buffer("{name}", {value}){comment}')
            return
        made = self.parametrised(domain, shape, init, value)
        if made is None:
            self.lines.append(f"self.{name} = nn.Parameter({value}){comment}")
        else:
            self.lines.append(f"self.{name} = {made}{comment}")

    def start(self, init: Any, shape: tuple[int, ...], plain: bool = True) -> str:
        """Text that makes a start; a parametrised matrix (not `plain`) makes its own."""
        if isinstance(init, tuple) and init and init[0] == "values":
            self.use("initial_values")
            return f"initial_values({list(init[1])!r}, {shape!r})"
        if isinstance(init, tuple) and init and init[0] in ("orthogonal", "identity"):
            if not plain:
                return ""
            init = ("orthogonal_rows", 1.0) if init[0] == "orthogonal" else init
        self.use("initial")
        if isinstance(init, tuple):
            return f"initial({shape!r}, {', '.join(string(a) if isinstance(a, str) else repr(a) for a in init)})"
        return f"initial({shape!r}, {float(init or 0.0)!r})"

    def parametrised(self, domain: Domain, shape: tuple[int, ...], init: Any, value: str) -> str | None:
        identity = isinstance(init, tuple) and bool(init) and init[0] == "identity"
        match domain.structure:
            case "plu" | "dense":
                cls = self.use({"plu": "PluMatrix", "dense": "DenseMatrix"}[domain.structure])
                return f"{cls}({shape!r}{', identity=True' if identity else ''})"
            case "orthogonal":
                if domain.args and domain.args[0] == "cayley":
                    return f"{self.use('Cayley')}({shape!r})"
                if domain.args and domain.args[0] == "exp":
                    return f"{self.use('SkewExponential')}({shape!r}{', identity=True' if identity else ''})"
                return f"{self.use('Rotation')}({shape!r}{reflections(domain)})"
            case "stiefel":
                return f"{self.use('Rotation')}({shape!r}, columns={shape[-1]}{reflections(domain)})"
            case "lower" | "unit_lower":
                unit = ", unit=True" if domain.structure == "unit_lower" else ""
                below = f", below={value}" if isinstance(init, tuple) and init[0] in ("normal", "uniform") else ""
                return f"{self.use('LowerMatrix')}({shape!r}{unit}{below})"
            case "spd":
                return f"{self.use('SpdMatrix')}({shape!r})"
            case "simplex":
                return f"{self.use('Simplex')}({shape!r})"
            case "sphere":
                return f"{self.use('Sphere')}({shape!r})"
            case "lipschitz":
                return f"{self.use('BoundedWeight')}({value}, {', '.join(map(repr, domain.args))})"
            case "zero_mean":
                return f"{self.use('ZeroMean')}({value}, -1)"
        match domain.name:
            case "Positive":
                return f"{self.use('Positive')}({value})"
            case "Unit":
                return f"{self.use('Interval')}({value}, 0.0, 1.0)"
            case "Interval":
                return f"{self.use('Interval')}({value}, {domain.args[0]!r}, {domain.args[1]!r})"
        return None

    def parameter(self, node: Node) -> str:
        """The value of a parameter in a method: of the class's own, or of a child's down a path."""
        scope, owner = self, "self"
        for child, copy in node.attrs.get("path", ()):
            owner += f".{scope.children[child]}" + (f"[{copy}]" if copy is not None else "")
            scope = self.generator.names_of(scope.region.children[child].region)
        name = scope.attributes[node.attrs["name"]]
        domain: Domain = node.attrs["domain"]
        constrained = node.op == "param" and (
            domain.structure is not None or domain.name in ("Positive", "Unit", "Interval")
        )
        return f"{owner}.{name}()" if constrained else f"{owner}.{name}"

    def weight(self) -> str:
        """A tensor with the module's dtype and device."""
        for node in self.region.graph:
            if node.op in ("param", "state") and node.tensor.kind == "real":
                return self.parameter(node)
        return "torch.zeros(())"

    def matrix(self, node: Node) -> str:
        return f"self.{self.attributes[node.attrs['name']]}"

    def constant(self, wanted: str, value: str) -> str:
        """Plain data that a method reads, made once."""
        for name, known in self.constants.items():
            if known == value:
                return f"self.{name}"
        name = self.names.fresh(wanted)
        self.constants[name] = value
        return f"self.{name}"

    def buffer(self, wanted: str, value: str) -> str:
        """A constant tensor that follows the module's dtype and device."""
        for name, known in self.buffers.items():
            if known == value:
                return f"self.{name}"
        name = self.names.fresh(wanted)
        self.buffers[name] = value
        return f"self.{name}"

    def constructor(self) -> list[str]:
        """Lines of `__init__`; none where it would only call the base's."""
        root = self.region is self.generator.root and self.region.kind in ("flow", "net", "norm")
        if root and self.region.has_starts:
            self.lines.append('self.register_buffer("initialised", torch.tensor(False))')
        shared = "".join(f", {name}: nn.Module" for _, name in self.shared)
        lines = [f"    {x}" for statement in self.lines for x in folded(statement, LINE_WIDTH - 8)]
        if self.buffers:
            lines.append(f"    with {self.use('constants')}():")
        for name, value in self.buffers.items():
            made = f'self.register_buffer("{name}", {value}, persistent=False)'
            lines += [f"        {x}" for x in folded(made, LINE_WIDTH - 12)]
        for name, value in self.constants.items():
            lines += [f"    {x}" for x in folded(f"self.{name} = {value}", LINE_WIDTH - 8)]
        if any(c.follows is not None for c in self.region.children.values()):
            steps = 'self.register_buffer("_steps", torch.zeros((), dtype=torch.long))'
            lines += [f"    {steps}", "    self.begin()"]
        if not lines:
            return []
        return [f"def __init__(self{shared}) -> None:", "    super().__init__()", *lines]


def module_text(generated: Generated, *, standalone: bool, title: str, origin: str) -> str:
    """A whole Python file: with imports of the runtime, or with the parts of it that are used."""
    from flowlang.version import __version__

    lines = [f"{plain(title)}", "", f"Generated by FlowLang {__version__} from {plain(origin)}."]
    lines += ["Values are laid out [*batch, *axes]; comments name the axes."]
    if standalone:
        lines += ["This file needs torch and nothing else:", "", f"    flow = {generated.root}()"]
        lines += ["    flow.load_state_dict(...)  # the weights, as `flow.state_dict()` gives them"]
        lines += ["    flow.log_prob(x), flow.sample((100,))"]
    return file_text("\n".join(quoted(lines)), generated.text, generated.helpers, standalone=standalone)


__all__ = ["EMITTERS", "Generated", "Generator", "Unlowered", "module_text"]
