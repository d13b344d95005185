"""A program of a flow as an ONNX model: named dynamic axes, weights folded, raw data in and out."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from flowlang.backends.onnx.dynamic import WAY_AROUND, General, OtherWeights, points_of, small_points
from flowlang.backends.onnx.graph import INT, REAL, Builder, Shape, Value
from flowlang.backends.onnx.lower import Lowering, Noise, Shared, Unlowered, Weights
from flowlang.backends.onnx.model import DEFAULT_OPSET, HIGHEST_OPSET, LOWEST_OPSET, finish
from flowlang.backends.torch.codegen import ClassScope, Generator

from flowlang.derive.analyse import Analyses, seen_from
from flowlang.derive.programs import Program
from flowlang.ir.graph import Node, Region
from flowlang.version import __version__

PROGRAMS = ("log_prob", "forward", "inverse", "sample", "sample_and_log_prob")
TRAIN = "train"  # of a network: the pass of a training step, with the states that it renews as more outputs


@dataclass(frozen=True)
class Standard:
    """x -> (x - mean) / scale, as kept with a trained model."""

    mean: Any
    scale: Any

    def log_det(self, shape: Sequence[int]) -> float:
        """Of a sample of that shape: the constants may be one for an axis of any size."""
        return -float(np.log(np.broadcast_to(self.scale, shape)).sum())

    def along(self, free: Sequence[bool]) -> Standard | None:
        """With one number along the free axes, None where they differ there."""
        mean, scale = (
            np.broadcast_to(v, np.broadcast_shapes(np.shape(v), (1,) * len(free))) for v in (self.mean, self.scale)
        )
        at = tuple(slice(0, 1) if f else slice(None) for f in free)
        same = all((v == v[at]).all() for v in (mean, scale))
        return Standard(mean[at], scale[at]) if same else None


@dataclass(frozen=True)
class Options:
    """What a model is made for. `seed` None: noise is an input; else a seeded random op draws it.

    Without `incremental` each round of an inverse's loop computes the whole body again. An incremental loop of at most
    `unroll` stages is written out: more nodes, which grow with the stages, and less time.
    """

    opset: int = DEFAULT_OPSET
    seed: int | None = None
    standard: Standard | None = None
    given_standard: Mapping[str, Standard] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    incremental: bool = True
    unroll: int = 0


class ModuleWeights:
    """The weights of a compiled module: parametrisations are evaluated once, in float64."""

    def __init__(self, generator: Generator, region: Region, module: Any):
        self.generator, self.region, self.module = generator, region, module
        self.names = ClassScope(generator, region)
        self.known: dict[str, Any] = {}

    @property
    def identity(self) -> object:
        return self.module

    def value(self, name: str) -> Any:
        import torch

        if name not in self.known:
            found = getattr(self.module, self.names.attributes[name])
            with torch.no_grad():
                made = found() if isinstance(found, torch.nn.Module) else found
            self.known[name] = made.detach().cpu().numpy().astype(np.float64, copy=False)
        return self.known[name]

    def child(self, name: str) -> Weights:
        region = self.region.children[name].region
        return ModuleWeights(self.generator, region, getattr(self.module, self.names.children[name]))

    def copies(self, name: str) -> Sequence[Weights]:
        region = self.region.children[name].region
        found = getattr(self.module, self.names.children[name])
        return [
            ModuleWeights(self.generator, region, m)
            for m in (found if self.region.children[name].count > 1 else [found])
        ]


class Model:
    """One program being exported."""

    def __init__(self, region: Region, analyses: Analyses, module: Any, name: str, options: Options):
        import torch

        self.region, self.analyses, self.name, self.options = region, analyses, name, options
        self.program = self.program_of()
        kept = itertools.chain(module.parameters(), module.buffers())
        dtype = next((t.dtype for t in kept if t.is_floating_point()), torch.get_default_dtype())
        self.g = Builder("float64" if dtype == torch.float64 else "float32", options.opset)
        exact = copy.deepcopy(module).double().eval()
        self.paths = {id(m): name for name, m in exact.named_modules()}
        self.weights = ModuleWeights(Generator(region, analyses, ""), region, exact)
        self.noise: list[Noise] = []
        self.taken: set[str] = set()
        self.shared = Shared(
            analyses.program, self.draw, incremental=options.incremental, unroll=options.unroll, training=name == TRAIN
        )

    def program_of(self) -> Program:
        return self.analyses.program(self.region, "forward" if self.name == TRAIN else self.name)

    @property
    def place(self) -> Node:
        """What a refusal without a place of its own points at."""
        region = self.program.region
        return region.graph[[*region.inputs, *region.outputs][0]]

    def build(self) -> onnx.ModelProto:
        return self.finished(self.lowered())

    def finished(self, outputs: Mapping[str, Value], free: Mapping[str, Any] | None = None) -> onnx.ModelProto:
        return finish(self.g, self.region.name, outputs, self.metadata(free or {}), self.region.doc or "")

    def lowered(self) -> dict[str, Value]:
        """The graph of the program in the builder; gives the outputs by name."""
        g, program = self.g, self.program
        if not program.inputs and (self.options.seed is not None or not self.noisy()):
            g.batch = g.input(self.fresh("batch_size"), (1,), INT)
        arguments = self.inputs(program)
        names = self.output_names(program)  # before those of noise
        found = Lowering(g, self.shared, self.weights, ("batch",)).program(program, arguments)
        outputs = self.outputs(program, names, found)
        for key, v in outputs.items():
            rank = self.output_ranks[key]
            outputs[key] = g.expand(v, ("batch", *v.shape[v.rank - rank :]))
        for (_, state), (weights, v) in self.shared.states.items():
            outputs[self.fresh(self.state_name(weights, state))] = v
        return outputs

    def state_name(self, weights: Weights, state: str) -> str:
        """A state's name in the module's `state_dict`."""
        assert isinstance(weights, ModuleWeights)
        owner, own = self.paths[id(weights.module)], str(weights.names.attributes[state])
        return f"{owner}.{own}" if owner else own

    def noisy(self) -> bool:
        """Whether the program draws noise, whose inputs tell the batch."""
        return self.weights.generator.noisy(self.program.region, self.program.name)

    # ---- inputs and outputs -----------------------------------------------------------------------------

    def fresh(self, wanted: str) -> str:
        name, k = wanted, 1
        while name in self.taken:
            k += 1
            name = f"{wanted}_{k}"
        self.taken.add(name)
        return name

    def inputs(self, program: Program) -> list[Value]:
        arguments: list[Value] = []
        mapped = len(program.inputs) - program.context
        for k, i in enumerate(program.inputs):
            node = program.graph[i]
            default = "x"
            if self.name == "inverse" and k < mapped:
                default = "z" if k == 0 else f"part{k}"
            label = default if self.name == "inverse" and k == 0 else node.label or node.attrs.get("name") or default
            name = self.fresh(label)
            v = self.g.input(name, ("batch", *node.tensor.shape))
            self.see(v)
            standard = self.standard_of(label, mapped=k < mapped)
            if standard is not None:
                v = self.g.div(self.g.sub(v, self.g.const(standard.mean)), self.g.const(standard.scale))
            arguments.append(v)
        return arguments

    def standard_of(self, label: str, mapped: bool) -> Standard | None:
        """The constants by which an input is standardised."""
        if not mapped:
            return self.options.given_standard.get(label)
        return self.options.standard if self.name in ("log_prob", "forward") else None

    def see(self, v: Value) -> None:
        """The batch size can be read from the first batched input."""
        if self.g.batch is None and "batch" in v.shape[:1]:
            self.g.batch = self.g.op("Shape", v, shape=(1,), kind=INT, start=0, end=1)

    def outputs(self, program: Program, names: list[str], found: list[Value]) -> dict[str, Value]:
        out = dict(zip(names, found, strict=True))
        self.output_ranks = {k: program.graph[o].tensor.rank for k, o in zip(names, program.outputs, strict=True)}
        standard = self.options.standard
        if standard is None:
            return out
        g = self.g
        log_det = standard.log_det(self.region.graph[self.region.inputs[0]].tensor.shape)
        if self.name == "log_prob":
            return {names[0]: g.add(found[0], log_det)}
        if self.name == "forward":
            return {**out, names[-1]: g.add(found[-1], log_det)}
        raw = g.add(g.mul(found[0], g.const(standard.scale)), g.const(standard.mean))
        out[names[0]] = raw
        if self.name == "inverse":
            out[names[-1]] = g.sub(found[-1], log_det)
        if self.name == "sample_and_log_prob":
            out[names[-1]] = g.add(found[-1], log_det)
        return out

    def output_names(self, program: Program) -> list[str]:
        data = [self.region.graph[i].label or "x" for i in self.region.inputs]
        if self.region.kind in ("net", "norm"):
            labels = [program.graph[o].label for o in program.outputs]
            given = {program.graph[i].label for i in program.inputs}
            return [self.fresh(n if n is not None and n not in given else "y") for n in labels]
        match self.name:
            case "log_prob":
                return [self.fresh("log_prob")]
            case "sample" | "sample_and_log_prob":
                return [self.fresh(n) for n in [*data, *(["log_prob"] if self.name != "sample" else [])]]
            case "inverse":
                return [self.fresh(n) for n in [*data, "log_det"]]
        parts = [self.region.graph[e.value].label or f"part{k}" for k, e in enumerate(self.region.emissions, 1)]
        return [self.fresh(n) for n in ["z", *parts, "log_det"]]

    # ---- noise ------------------------------------------------------------------------------------------

    def draw(self, name: str, kind: str, shape: Shape, df: float | None, degrees: Value | None) -> Value:
        if self.options.seed is not None:
            return self.random(name, kind, shape, degrees)
        if len(self.g.stack) > 1:  # one input would be the same draw in each round
            raise Unlowered(self.g.origin, "a draw in each round of a loop cannot be an input", "export with a seed")
        name = self.fresh(name)
        self.noise.append(Noise(name, kind, shape, df))
        v = self.g.input(name, shape, INT if kind == "geometric" else REAL)
        self.see(v)
        return v

    def random(self, name: str, kind: str, shape: Shape, degrees: Value | None) -> Value:
        """A seeded random op, transformed as the PyTorch runtime's `standard_noise` does."""
        g = self.g
        if kind == "normal":
            return self.random_op("RandomNormalLike", name, shape)
        u = self.random_op("RandomUniformLike", name, shape)
        top = 1 - g.eps
        match kind:
            case "uniform":
                return u
            case "exponential":
                return g.neg(g.unary("Log", g.sub(1.0, u)))
            case "geometric":
                return g.cast(g.unary("Floor", g.div(g.unary("Log", g.clip(u, g.tiny, 1.0)), math.log(0.5))), INT)
            case "logistic":
                u = g.clip(u, g.tiny, top)
                return g.unary("Log", g.div(u, g.sub(1.0, u)))
            case "gumbel":
                return g.neg(g.unary("Log", g.clip(g.neg(g.unary("Log", g.clip(u, g.tiny, None))), g.tiny, None)))
            case "von_mises":
                return g.const(0.0)  # the caller says that there is no such op
            case "laplace":
                w = g.sub(g.mul(u, 2.0), 1.0)
                size = g.clip(g.unary("Abs", w), None, top)
                return g.neg(g.mul(g.unary("Sign", w), g.unary("Log", g.sub(1.0, size))))
        assert kind == "student_t", kind
        assert degrees is not None
        from flowlang.backends.onnx.special import expm1

        angle = g.mul(self.random_op("RandomUniformLike", f"{name}/angle", shape), 2 * math.pi)
        power = g.div(g.mul(g.unary("Log", g.clip(u, g.tiny, None)), -2.0), degrees)
        radius = g.unary("Sqrt", g.clip(g.mul(degrees, expm1(g, power)), 0.0, None))
        return g.mul(radius, g.unary("Cos", angle))

    def random_op(self, op: str, name: str, shape: Shape) -> Value:
        assert self.options.seed is not None
        like = self.g.filled(0.0, shape)
        seed = float((self.options.seed * 1_000_003 + len(self.noise)) % 2**24)
        self.noise.append(Noise(name, op, shape))
        made = self.g.multi(op, like, shapes=[shape], pure=False, seed=seed)[0]
        if made.node is not None:
            made.node.hint = name.rsplit("/", 1)[-1]
        return made

    def named(self) -> list[int]:
        """The inputs whose axes the metadata name."""
        return [*self.region.inputs, *self.region.context]

    # ---- metadata ---------------------------------------------------------------------------------------

    def metadata(self, free: Mapping[str, Any]) -> dict[str, str]:
        graph, o = self.program.region.graph, self.options
        axes = {
            (graph[i].label or f"x{k}"): [[a.name, None if a.name in free else a.size] for a in graph[i].tensor.axes]
            for k, i in enumerate(self.named())
        }
        found: dict[str, Any] = {
            "flowlang_version": __version__, "flow": self.region.name, "program": self.name, "opset": str(o.opset),
            "dtype": self.g.dtype, "axes": json.dumps(axes, ensure_ascii=False), **o.metadata,
        }  # fmt: skip
        own = self.region.programs.get(self.name)
        exactness = self.analyses.exactness(own or self.region)
        if own is None and self.name == "sample_and_log_prob":
            exactness = seen_from("generate", exactness)
        if "log_prob" in self.name or (own is not None and exactness != "exact"):
            found["exactness"] = exactness
        if self.shared.written_out:
            found["written_out"] = str(self.shared.written_out)
        if free:
            found["free_axes"] = json.dumps(free, ensure_ascii=False)
        if o.seed is not None and self.noise:
            found["seed"] = str(o.seed)
        elif self.noise:
            found["noise"] = json.dumps(
                {n.name: {"kind": n.kind, **({"df": n.df} if n.df is not None else {})} for n in self.noise}
            )
        constants = {"data": o.standard, **o.given_standard}
        kept = {k: {"mean": np.asarray(s.mean).tolist(), "scale": np.asarray(s.scale).tolist()}
                for k, s in constants.items() if s is not None}  # fmt: skip
        if kept:
            found["standardisation"] = json.dumps(kept)
        return found


class ModelProgram(Model):
    """A named program of a `model`: its inputs are data, labels and parameters, and each result has an output."""

    def program_of(self) -> Program:
        return self.analyses.program(self.region.programs[self.name], "forward")

    @property
    def data(self) -> str | None:
        return next((n for n, (word, _) in self.region.data.items() if word == "data"), None)

    def standard_of(self, label: str, mapped: bool) -> Standard | None:
        return self.options.standard if label == self.data else self.options.given_standard.get(label)

    def outputs(self, program: Program, names: list[str], found: list[Value]) -> dict[str, Value]:
        """Samples and densities are those of raw data; a loss comes out for each sample."""
        g, standard = self.g, self.options.standard
        self.output_ranks = {k: program.graph[o].tensor.rank for k, o in zip(names, program.outputs, strict=True)}
        out = dict(zip(names, found, strict=True))
        shape = self.region.data[self.data][1].shape if self.data is not None else None
        if standard is not None and shape is not None:
            for (key, v), o in zip(out.items(), program.outputs, strict=True):
                if self.name == "log_prob":
                    out[key] = g.add(v, standard.log_det(shape))
                elif self.name.split("_")[0] == "sample" and program.graph[o].tensor.shape == shape:
                    out[key] = g.add(g.mul(v, g.const(standard.scale)), g.const(standard.mean))
        return out

    def output_names(self, program: Program) -> list[str]:
        """The name that the program gives a result; of one that has none, or an input's, the program's own."""
        taken = {program.graph[i].label for i in program.inputs}
        labels = [program.graph[o].label for o in program.outputs]
        return [self.fresh(n if n is not None and n not in taken else self.name) for n in labels]

    def named(self) -> list[int]:
        return list(self.program.inputs)


def model_of(region: Region, analyses: Analyses, module: Any, program: str, options: Options) -> Model:
    return (ModelProgram if region.kind == "model" else Model)(region, analyses, module, program, options)


def export(
    region: Region, analyses: Analyses, module: Any, program: str, options: Options | None = None
) -> onnx.ModelProto:
    """The model of one program. Raises Unlowered for what ONNX cannot express."""
    o = options or Options()
    assert LOWEST_OPSET <= o.opset <= HIGHEST_OPSET
    return model_of(region, analyses, module, program, o).build()


Instance = tuple[Region, Analyses, Any]  # a flow at some sizes: region, facts, module
At = Callable[[Mapping[str, int]], Instance | None]  # the same flow at other sizes; None where they are not allowed


def export_open(at: At, multiples: Mapping[str, int], program: str, options: Options) -> onnx.ModelProto:
    """The model of one program with axes of any size (multiples of the given numbers)."""
    failed: Unlowered | None = None
    # What an incremental loop keeps may depend on the size; then rounds of the whole body, which do not, take its place.
    for incremental in (True, False):
        sizes = Sizes(at, program, replace(options, incremental=incremental, unroll=0))
        # Small sizes may meet other rules (a shift beyond the axis). The smallest that does not is what is promised.
        for small in (*small_points(multiples), None):
            points = points_of(multiples)
            try:
                return sizes.model(points if small is None else [*points, small], multiples)
            except Unlowered as e:
                failed = e
        if not sizes.scans:
            break
    assert failed is not None
    raise failed


class Sizes:
    """A program lowered at several sizes, at each once."""

    def __init__(self, at: At, program: str, options: Options):
        self.at, self.program, self.options = at, program, options
        self.known: dict[tuple[tuple[str, int], ...], tuple[Model, dict[str, Value]] | Unlowered | None] = {}
        self.scans = False  # whether any has a loop that could be incremental

    def lowered(self, point: Mapping[str, int]) -> tuple[Model, dict[str, Value]] | None:
        """None where the size is not allowed."""
        key = tuple(point.items())
        if key not in self.known:
            flow = self.flow(point)
            self.known[key] = None
            if flow is not None:
                model = model_of(*flow, self.program, self.options)
                try:
                    self.known[key] = (model, model.lowered())
                except Unlowered as e:
                    self.known[key] = e
                self.scans |= model.shared.scans
        found = self.known[key]
        if isinstance(found, Unlowered):
            raise found
        return found

    def flow(self, point: Mapping[str, int]) -> Instance | None:
        try:
            return self.at(point)
        except OtherWeights:
            return None

    def model(self, points: Sequence[Mapping[str, int]], multiples: Mapping[str, int]) -> onnx.ModelProto:
        made = [f for p in points if (f := self.lowered(p)) is not None]
        if len(made) < len(points):
            given = self.flow({})
            assert given is not None
            place = model_of(*given, self.program, self.options).place
            raise Unlowered(place, "not all sizes are allowed, or some have other weights", WAY_AROUND)
        base, outputs = made[0]
        general = General(points, [m.g for m, _ in made], base.place)
        general.compare([o for _, o in made])
        general.apply()
        free = {a: {"multiple_of": m, "at_least": min(p[a] for p in points)} for a, m in multiples.items()}
        return base.finished(outputs, free)


__all__ = [
    "DEFAULT_OPSET",
    "HIGHEST_OPSET",
    "LOWEST_OPSET",
    "PROGRAMS",
    "Options",
    "Standard",
    "Unlowered",
    "export",
    "export_open",
]
