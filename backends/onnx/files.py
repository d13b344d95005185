"""Models of a compiled flow as files. Everything that can go wrong for a user is a diagnostic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang import limits
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.files import replace_file

if TYPE_CHECKING:
    import onnx
    from flowlang.backends.onnx.build import At, Options, Standard

    from flowlang.compiler import Compilation
    from flowlang.ir.graph import Region
    from flowlang.ir.types import TensorType
    from flowlang.source import Span

PROGRAMS = ("log_prob", "forward", "inverse", "sample", "sample_and_log_prob")


def need_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise FlowError(
            Diagnostic("FL0805", "export needs the package onnx", suggestion="pip install 'flowlang[onnx]'")
        ) from None


def programs_of(region: Region) -> tuple[str, ...]:
    """What can be exported of a flow, a model or a network."""
    if region.kind == "model":
        return tuple(region.programs)
    return ("forward", "train") if region.kind in ("net", "norm") else PROGRAMS


def default_programs(region: Region) -> tuple[str, ...]:
    """Density and sampler of a flow, the one program of a network, all but losses of a model."""
    have = programs_of(region)
    if region.kind == "model":
        return tuple(p for p in have if "loss" not in p.split("_")) or have
    return ("forward",) if region.kind in ("net", "norm") else ("log_prob", "sample")


def check_programs(region: Region, programs: Sequence[str]) -> None:
    have = programs_of(region)
    unknown = [p for p in programs if p not in have]
    if unknown or not programs:
        kind = "network" if region.kind in ("net", "norm") else region.kind
        message = f"`{unknown[0]}` is no program of a {kind}" if unknown else "no program is named"
        raise FlowError(Diagnostic("FL0804", message, suggestion=f"choose from {', '.join(f'`{p}`' for p in have)}"))


def check_opset(opset: int | None) -> None:
    from flowlang.backends.onnx.model import HIGHEST_OPSET, LOWEST_OPSET

    if opset is not None and not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise FlowError(
            Diagnostic("FL0804", f"opset {opset} is not supported",
                       suggestion=f"opsets {LOWEST_OPSET} to {HIGHEST_OPSET} are")
        )  # fmt: skip


def check_weights(module: Any) -> None:
    """A model with weights that are not numbers would answer NaN to everything."""
    bad = [n for n, t in module.named_parameters() if not t.detach().isfinite().all()]
    bad += [n for n, t in module.named_buffers() if t.is_floating_point() and t.isnan().any()]
    if bad:
        named = ", ".join(f"`{n}`" for n in bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise FlowError(
            Diagnostic("FL0803", f"the weights hold values that are not finite: {named}",
                       suggestion="export the weights of an earlier checkpoint, or train again with a smaller rate")
        )  # fmt: skip


def check_sizes(module: Any) -> None:
    """A single tensor is one message too."""
    from flowlang.backends.onnx.model import LARGEST

    for n, t in module.named_parameters():
        if t.numel() * t.element_size() > LARGEST:
            raise FlowError(
                Diagnostic("FL0701", f"cannot be exported to ONNX: the weight `{n}` alone has more than 2 GB, which no ONNX file holds",
                           suggestion="make the layer of several smaller ones")
            )  # fmt: skip


def file_of(path: Path, program: str, several: bool) -> Path:
    """FILE.onnx for one program; FILE.PROGRAM.onnx for each of several."""
    if not path.name:
        raise FlowError(
            Diagnostic("FL0801", f"`{path}` is a folder, and a file is to be written", suggestion="add a file's name")
        )
    stem = path.with_suffix("") if path.suffix == ".onnx" else path
    return stem.with_name(f"{stem.name}.{program}.onnx") if several else stem.with_name(f"{stem.name}.onnx")


def inputs_of(region: Region) -> dict[str, TensorType]:
    """The types of data and context, by name."""
    if region.kind == "model":
        return {n: t for n, (_, t) in region.data.items()}
    nodes = [region.graph[i] for i in (*region.inputs, *region.context)]
    return {n.label or f"x{k}": n.tensor for k, n in enumerate(nodes)}


def data_of(region: Region) -> str:
    """The name of the data."""
    if region.kind == "model":
        return next((n for n, (word, _) in region.data.items() if word == "data"), "")
    return next(iter(inputs_of(region)))


def free_axes(
    comp: Compilation, name: str, wanted: Sequence[str] | None, at: At | None, options: Options
) -> dict[str, int]:
    """The axes of any size, with the number of which each size is a multiple.

    Not named (`wanted` None), they are those that the spec leaves open and on which neither a weight's shape nor a
    standardisation constant depends. A named one that cannot be open is refused.
    """
    from flowlang.backends.onnx.dynamic import multiple_of

    if at is None:
        return {}
    types = inputs_of(comp.regions[name])
    have = {a.name for t in types.values() for a in t.axes}
    unknown = [a for a in wanted or () if a not in have]
    if unknown:
        raise FlowError(
            Diagnostic("FL0804", f"`{unknown[0]}` is no axis of the inputs of `{name}`",
                       suggestion=f"its axes are {', '.join(f'`{a}`' for a in sorted(have))}")
        )  # fmt: skip
    out: dict[str, int] = {}
    for axis in dict.fromkeys(wanted if wanted is not None else [a for a in comp.elab.open_axes if a in have]):
        found = multiple_of(at, axis)
        reason = "the flow's weights, or what they act on, have its size"
        if found is not None and not along_one(comp.regions[name], options, [axis]):
            found, reason = None, "its standardisation has numbers for each place of it"
        if found is not None:
            out[axis] = found
        elif wanted is not None:
            raise FlowError(
                Diagnostic(
                    "FL0804", f"axis `{axis}` cannot be of any size: {reason}", suggestion="leave it out of `dynamic`"
                )
            )
    return out


def along_one(region: Region, options: Options, free: Sequence[str]) -> Options | None:
    """The options with standardisation constants that have one number along the free axes; None where they differ."""
    types = inputs_of(region)
    data = data_of(region)
    made: dict[str, Standard | None] = {data: None}
    for key, s in {data: options.standard, **options.given_standard}.items():
        made[key] = s.along([a.name in free for a in types[key].axes]) if s is not None else None
        if s is not None and made[key] is None:
            return None
    given = {k: v for k, v in made.items() if k in options.given_standard and v is not None}
    return replace(options, standard=made[data], given_standard=given)


def along(region: Region, options: Options, free: Mapping[str, int]) -> Options:
    found = along_one(region, options, list(free))
    assert found is not None
    return found


def place_of(region: Region) -> Span | None:
    """Of a node that stands nowhere in the spec: what a derived program adds to a flow is its base."""
    return region.base.span if region.base is not None else region.span


def export_files(
    comp: Compilation, name: str, module: Any, path: str | Path, programs: Sequence[str], *, opset: int | None = None,
    seed: int | None = None, standard: Any = None, given_standard: Any = None, dynamic: Sequence[str] | None = None,
    at: At | None = None, certificate: Mapping[str, Any] | None = None, unroll: int = limits.WRITTEN_STAGES,
) -> dict[str, Path]:  # fmt: skip
    """Writes one checked model for each program; gives their paths. `at` gives the flow at other sizes of its axes."""
    need_onnx()
    from flowlang.backends.onnx.build import DEFAULT_OPSET, Options, Standard, Unlowered, export, export_open

    check_programs(comp.regions[name], programs)
    check_opset(opset)
    check_weights(module)
    check_sizes(module)

    def kept(s: Any) -> Standard | None:
        if s is None or ((s.mean == 0).all() and (s.scale == 1).all()):
            return None
        return Standard(s.mean, s.scale)

    given = {k: s for k, v in (given_standard or {}).items() if (s := kept(v)) is not None}
    metadata = {"spec_sha256": hashlib.sha256(comp.source.text.encode()).hexdigest()}
    if comp.elab.sets:
        metadata["set"] = json.dumps(dict(comp.elab.sets))
    if certificate:
        metadata["certificate"] = json.dumps(dict(certificate))
    options = Options(opset or DEFAULT_OPSET, seed, kept(standard), given, metadata, unroll=unroll)
    free = free_axes(comp, name, dynamic, at, options)
    if free:
        options = along(comp.regions[name], options, free)
    made: dict[Path, onnx.ModelProto] = {}
    out: dict[str, Path] = {}
    for program in dict.fromkeys(programs):
        try:
            if at is not None and free:
                model = export_open(at, free, program, options)
            else:
                model = export(comp.regions[name], comp.analyses, module, program, options)
        except Unlowered as e:
            raise FlowError(
                Diagnostic(
                    "FL0701",
                    f"cannot be exported to ONNX: {e.reason}",
                    e.node.span or place_of(comp.regions[name]),
                    suggestion=e.suggestion,
                )
            ) from None
        out[program] = file_of(Path(path), program, len(set(programs)) > 1)
        made[out[program]] = model
    for file, model in made.items():  # none before all are made
        write(file, model)
    return out


def write(file: Path, model: onnx.ModelProto) -> None:
    """More weights than one message holds stand in FILE.data, which belongs beside the model."""
    from flowlang.backends.onnx.model import LARGEST, put_outside, weights_size

    if weights_size(model.graph.initializer) > LARGEST:
        beside = file.with_name(f"{file.name}.data")
        replace_file(beside, put_outside(model, beside.name))
    replace_file(file, model.SerializeToString())


class Written:
    """What a model's file tells, read once; its weights are left where they are."""

    def __init__(self, file: Path):
        import onnx

        self.file, self.model = file, onnx.load(file, load_external_data=False)
        self.metadata = {p.key: p.value for p in self.model.metadata_props}

    @property
    def weights(self) -> Path | None:
        """The file beside it that holds its weights, where they are too many for one message."""
        places = {e.value for w in self.model.graph.initializer for e in w.external_data if e.key == "location"}
        return self.file.with_name(places.pop()) if places else None

    @property
    def certificate(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.metadata.get("certificate", "{}"))
        return found

    @property
    def interface(self) -> str:
        """Inputs and outputs with their shapes, the axes named where the model tells their names."""
        axes = json.loads(self.metadata.get("axes", "{}"))

        def one(v: Any) -> str:
            dims = [d.dim_param or str(d.dim_value) for d in v.type.tensor_type.shape.dim]
            own = axes.get(v.name, [])
            if own and len(own) == len(dims) - 1:
                dims[1:] = [f"{name} = {d}" if name != d else d for (name, _), d in zip(own, dims[1:], strict=True)]
            return f"{v.name} [{', '.join(dims)}]"

        return f"{', '.join(map(one, self.model.graph.input))} -> {', '.join(map(one, self.model.graph.output))}"

    @property
    def nodes(self) -> tuple[int, int]:
        """How many nodes it has, those of functions and loops' bodies where they are written; and how many loops."""
        ops = [op for graph in (self.model.graph, *self.model.functions) for op in ops_of(graph)]
        return len(ops), ops.count("Loop")


def ops_of(graph: Any) -> list[str]:
    """The ops of a graph's nodes and of those in bodies; constants are none."""
    out: list[str] = []
    for n in graph.node:
        out += [n.op_type] if n.op_type != "Constant" else []
        for a in n.attribute:
            out += ops_of(a.g) if a.HasField("g") else []
    return out
