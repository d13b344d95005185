"""What people import: `import flowlang as fl`."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang import limits
from flowlang.compiler import Compilation, compile_source
from flowlang.compiler import info as describe
from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.elaborate.scope import did_you_mean
from flowlang.elaborate.types import is_tensor_type
from flowlang.library import Folders, Texts, read_text, standard_library
from flowlang.source import Source
from flowlang.syntax import tree
from flowlang.syntax.parser import parse
from flowlang.version import __version__

if TYPE_CHECKING:
    from flowlang.backends.onnx.compare import Comparison
    from flowlang.backends.torch.runtime import Flow
    from flowlang.derive.folding import Folded
    from flowlang.ir.graph import Region


def source_of(spec: str | Path) -> tuple[Source, Path | None]:
    """A spec given as a path, as text, or as the name of a library entry (its own flow, or a flow of that one step)."""
    text = str(spec)
    if not isinstance(spec, Path) and ("\n" in text or "{" in text or declares(text)):
        return Source.of("<text>", text), None
    if not isinstance(spec, Path) and text.isidentifier() and not is_there(text):
        found = library_flow(text)
        if found is not None:
            return found, None
        raise FlowError(
            Diagnostic("FL0801", f"`{text}` is neither a file nor an entry of the library",
                       suggestion=did_you_mean(text, standard_library().names()) or "a spec is a path, its text, or a name that `flowlang std` lists")
        )  # fmt: skip
    return Source.of(text, read_text(text)), Path(text).resolve().parent


def is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # no file can have such a name
        return False


def declares(text: str) -> bool:
    """Whether a line is a declaration, as `flow f = glow()`, and not the name of a file (`flow a = b.flow` may be one)."""
    if "=" not in text or len(text.split("=")[0].split()) < 2:
        return False
    try:
        if Path(text).exists():
            return False
    except (OSError, ValueError):  # no file can have such a name
        return True
    return any(isinstance(i, tree.Declaration) for i in parse(Source.of("<text>", text), Report()).module.items)


def library_flow(name: str) -> Source | None:
    """A library entry as a spec: a flow or model as it stands; a bijector as the only step of a flow of its name."""
    library = standard_library()
    source = library.find(name)
    if source is None:
        return None
    items = parse(source, Report()).module.items
    entry = next(i for i in items if isinstance(i, tree.Declaration) and i.name == name)
    if entry.kind in ("flow", "model"):
        doc = "".join(f"## {line}\n" for line in (entry.doc or "").splitlines())
        return Source.of(f"std:{name}", f"{doc}{entry.span.text}\n")
    if entry.kind != "bijector":
        return None
    tensors = [
        p for ps in entry.parameters for p in ps if p.type is not None and not p.given and is_tensor_type(p.type)
    ]
    data = tensors[0].type.span.text if tensors and tensors[0].type is not None else "R[D]"
    data = re.sub(r",?\s*\.\.", "", data).replace("[]", "[D]")
    return Source.of(f"std:{name}", f"flow {name}_flow {{\n  data x: {data}\n  {name}\n  base normal\n}}\n")


def analyse(
    spec: str | Path, sets: Mapping[str, Any] | None = None, *, sized: bool = False, max_parameters: int | None = None,
    build: str | None = None,
) -> Compilation:  # fmt: skip
    """Everything that is known of a spec (see `flowlang.compiler`). Larger flows than `max_parameters` are refused."""
    source, folder = source_of(spec)
    loader = Folders(folder)
    limit = max_parameters or limits.PARAMETERS
    return compile_source(source, loader=loader, sets=sets, sized=sized, max_parameters=limit, build=build)


def check(spec: str | Path, **sets: Any) -> Report:
    """The diagnostics of a spec: a path or its text. Never an exception for a bad spec."""
    try:
        return analyse(spec, sets).report
    except FlowError as e:
        report = Report()
        report.extend(e.diagnostics)
        return report


def info(spec: str | Path, **sets: Any) -> list[dict[str, Any]]:
    """What is known of each declaration: steps, inverse, log-det, sizes."""
    comp = analyse(spec, sets)
    if not comp.ok:
        raise FlowError(comp.report.errors)
    return describe(comp)


def pick_flow(comp: Compilation, name: str | None) -> str:
    """The region that is meant by a name; without one the first flow or model, or the only net whose sizes are known."""
    flows = comp.flows() + comp.models()
    sized = [n for n in comp.nets() if n in comp.regions]
    if name is not None:
        if name in sized:
            return name
        if name not in flows:
            raise FlowError(
                Diagnostic(
                    "FL0804",
                    f"`{name}` is no flow or model of this spec, nor a net whose sizes are known",
                    suggestion=f"it has {', '.join(f'`{f}`' for f in (*flows, *sized)) or 'none'}",
                )
            )
        return name
    if not flows and len(sized) == 1:
        return sized[0]
    if not flows:
        raise FlowError(
            Diagnostic(
                "FL0804",
                "this spec has no flow and no model",
                suggestion=f"choose a net by name (`flow=`, `--flow`): {', '.join(f'`{n}`' for n in sized)}"
                if sized
                else "declare one, as in `flow name { data x: R[D = 2] .. base normal }`, or give a net's sizes, as in `x: R[D = 2]`",
            )
        )
    return flows[0]


def need_kind(comp: Compilation, name: str, what: str, *kinds: str) -> str:
    """The name, if its declaration is of these kinds; else FL0804: `what` is not done to it."""
    kind = comp.regions[name].kind
    if kind not in kinds:
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"{what} of a {' or a '.join(kinds)}, and `{name}` is a {kind}",
                suggestion=f"declare a {kinds[-1]} that uses it, or choose one by `--flow`",
            )
        )
    return name


def generate(
    spec: str | Path, *, flow: str | None = None, standalone: bool = True, memory: str = "plain", **sets: Any
) -> tuple[str, str]:
    """The PyTorch source of a flow, and the name of its class; `memory` as for `compile`."""
    comp = analyse(spec, sets, sized=True, build=flow)
    if not comp.ok:
        raise FlowError(comp.report.errors)
    verify_rules(comp, pick_flow(comp, flow))
    return generate_from(comp, flow, standalone=standalone, memory=memory)


def generate_from(
    comp: Compilation, flow: str | None = None, *, standalone: bool = True, memory: str = "plain"
) -> tuple[str, str]:
    from flowlang.backends.torch.codegen import Generator, Unlowered, module_text

    name = pick_flow(comp, flow)
    region = comp.regions[name]
    if memory not in MEMORY:
        raise FlowError(
            Diagnostic("FL0804", f"there is no memory {memory!r}", suggestion=did_you_mean(memory, MEMORY) or f"it is {' or '.join(map(repr, MEMORY))}")
        )  # fmt: skip
    generator = Generator(region, comp.analyses, comp.source.name, memory)
    try:
        made = generator.generate()
    except Unlowered as e:
        raise FlowError(
            Diagnostic(
                "FL0701",
                f"`{e.node.op}` has no PyTorch form yet",
                e.node.span,
                suggestion="write it with other functions",
            )
        ) from None
    if memory == "reversible" and not generator.undone:
        raise FlowError(nothing_undone(name, region, generator.kept))
    title = f"{region.kind} {name}" + (f": {region.graph[region.inputs[0]].type}" if region.inputs else "")
    text = module_text(made, standalone=standalone, title=title, origin=Path(comp.source.name).name)
    return text, made.root


MEMORY = ("plain", "reversible")


def nothing_undone(name: str, region: Region, kept: Mapping[str, str]) -> Diagnostic:
    notes = tuple(f"the activations of `{k}` are kept: {reason}" for k, reason in kept.items())
    return Diagnostic(
        "FL0704", f"no step of `{name}` can be undone to save memory: " + ("those that are repeated cannot" if notes else "none is repeated"),
        region.span, notes=notes, suggestion="write the steps in a `repeat` of bijections with closed inverses, such as couplings",
    )  # fmt: skip


def compile(
    spec: str | Path, *, flow: str | None = None, seed: int | None = None, dtype: Any = None, fold: bool = False,
    memory: str = "plain", jit: bool | str = False, **sets: Any,
) -> Flow:  # fmt: skip
    """A flow as an `nn.Module` with `log_prob`, `sample`, `forward` and `inverse`.

    `spec` is a path, text, or the name of a library entry; keyword arguments set sizes and static parameters, as in `D=6`. Raises
    FlowError with the diagnostics of a bad spec. `seed` fixes the start of the parameters. `fold` gives a network for
    inference whose norms by running statistics are inside the linear maps beside them (see `folded`). With `memory` as
    "reversible" a `repeat` of bijections with closed inverses keeps no activations: the way back undoes step after step, so that
    memory for gradients does not grow with depth (Gomez et al. 2017); FL0704 where no `repeat` is of that kind. `jit` runs the programs
    by `torch.compile`, each when it is first called: True for its own backend, which needs a C++ compiler, or another's name.
    """
    if jit and memory == "reversible":
        raise FlowError(
            Diagnostic(
                "FL0804",
                "a program that torch compiles keeps its own activations",
                suggestion='choose one of `jit` and `memory="reversible"`',
            )
        )
    comp = analyse(spec, sets, sized=True, build=flow)
    if not comp.ok:
        raise FlowError(comp.report.errors)
    module = compile_from(comp, flow, seed=seed, dtype=dtype, memory=memory)
    module = folded(module) if fold else module
    if jit:
        module.jit = compilable(jit)
    return module


def compilable(jit: bool | str) -> bool | str:
    """A backend of `torch.compile` that can run here."""
    import torch

    if jit is True and not torch.cuda.is_available():
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise FlowError(
                Diagnostic(
                    "FL0805",
                    "`jit` needs a C++ compiler, and none is found",
                    suggestion="install g++ or clang, name one in the variable CXX, or leave `jit` out",
                )
            ) from None
    if isinstance(jit, str) and jit not in torch.compiler.list_backends(None):
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"torch has no backend {jit!r}",
                suggestion=did_you_mean(jit, torch.compiler.list_backends(None)) or "use `jit=True`",
            )
        )
    return jit


def folded(module: Any) -> Any:
    """A compiled network for inference, its weights as they are now, with every norm that folds inside the linear map beside it.

    Results are equal to those in evaluation mode up to rounding. `verdicts` of what it gives says of each norm whether it
    went, and why not. Raises FlowError (FL0412) where nothing folds. `save`, `load` and `export_onnx` take the result.
    """
    comp, name = origin_of(module)
    return folded_from(comp, name, folding(comp, name), module)


def folding(comp: Compilation, name: str, *, norms_only: bool = False) -> Folded:
    """What folds in a network; raises FlowError (FL0412) where nothing does. `norms_only` leaves other affine steps."""
    found = folded_of(comp, name, norms_only=norms_only)
    if not found.recipes:
        raise FlowError(nothing_folds(name, comp, found))
    return found


def origin_of(module: Any) -> tuple[Compilation, str]:
    if type(module) not in origins:
        raise FlowError(
            Diagnostic(
                "FL0804", "this is no flow that `flowlang.compile` made here", suggestion="compile it from its spec"
            )
        )
    return origins[type(module)]


def certificate(flow: Flow) -> dict[str, Any]:
    """What is proved of a flow with the weights that it has; empty where nothing has to be.

    `contraction` is the largest constant of a contraction x + g(x). It rests on the norms of the weights in `Lipschitz(c)`: how
    many there are, and the one that is nearest to its bound. FL0702 where a norm exceeds its bound.
    """
    from flowlang.backends.torch.standard import Standardised, StandardisedModel

    module: Any = flow.flow if isinstance(flow, Standardised | StandardisedModel) else flow
    norms = module.certify()
    found: dict[str, Any] = {}
    if type(module) in origins:
        comp, name = origins[type(module)]
        constant = comp.analyses.contraction(comp.regions[name])
        found = {} if constant is None else {"contraction": constant}
    if norms:
        nearest = max(norms, key=lambda n: norms[n][0] / norms[n][1])
        found |= {"weights": len(norms), "nearest": nearest, "norm": norms[nearest][0], "bound": norms[nearest][1]}
    return found


def folded_of(comp: Compilation, name: str, *, norms_only: bool = False) -> Folded:
    from flowlang.derive.folding import fold as run

    return run(comp.regions[name], norms_only=norms_only)


def nothing_folds(name: str, comp: Compilation, found: Folded) -> Diagnostic:
    notes = tuple(dict.fromkeys(f"`{v.name}`: {v.reason}" for v in found.verdicts if not v.folds))
    return Diagnostic(
        "FL0412", f"nothing in `{name}` folds: " + (f"none of its {len(found.verdicts)} norms does" if notes else "it calls no norm"),
        comp.regions[name].span, notes=notes,
        suggestion="a norm folds when its statistics are constants at inference and a `linear` or `conv` of its own stands beside it",
    )  # fmt: skip


def folded_from(comp: Compilation, name: str, found: Folded, module: Any) -> Any:
    """The folded network with the weights of `module`."""
    import copy

    from flowlang.backends.torch.fold import folded_module

    made = folded_module(found, module, comp.regions[name], comp.analyses, Path(comp.source.name).name)
    made.verdicts = found.verdicts
    made.origin = {**getattr(module, "origin", {}), "fold": True}
    other = copy.copy(comp)
    other.regions = {**comp.regions, name: found.region}
    origins[type(made)] = (other, name)
    return made


def compile_from(
    comp: Compilation, flow: str | None = None, *, seed: int | None = None, dtype: Any = None, memory: str = "plain"
) -> Flow:
    """`compile` for a spec that is analysed already."""
    name = pick_flow(comp, flow)
    module: Flow = fresh(*generate_from(comp, name, standalone=False, memory=memory), seed, dtype)
    verify_rules(comp, name, module)
    module.certify()
    module.origin = {
        "spec": comp.source.text, "spec_name": comp.source.name, "flow": name, "sets": dict(comp.elab.sets),
        "imports": dict(getattr(comp.elab.loader, "loaded", {})), "flowlang": __version__,
    }  # fmt: skip
    origins[type(module)] = (comp, name)
    return module


def verify_rules(comp: Compilation, name: str, module: Any = None) -> None:
    """Compares the hand-given rules in a flow with its map, in float64; raises FlowError (FL0412) where one is wrong."""
    region = comp.regions[name]
    if not any(r.has_map_rules for r in region.walk()):
        return
    from flowlang.backends.torch.explicit import wrong_rules

    if module is None:
        module = fresh(*generate_from(comp, name, standalone=False), 0, None)
    if any(p.is_meta for p in module.parameters()):
        return  # no numbers to compare
    found = wrong_rules(region, module, comp.analyses)
    if found:
        raise FlowError(found)


def compile_function(comp: Compilation, name: str, like: str) -> Any:
    """A net of the spec as an `nn.Module`, for inputs of the shape of the data of the flow `like`."""
    from flowlang.backends.torch.codegen import Generator, Unlowered, module_text

    target = next((d for d in comp.module.declared() if d.name == name and d.kind in ("net", "norm")), None)
    if target is None:
        nets = [f"`{d.name}`" for d in comp.module.declared() if d.kind in ("net", "norm")]
        raise FlowError(
            Diagnostic(
                "FL0804", f"this spec has no net `{name}`", suggestion=f"its nets are {', '.join(nets) or 'none'}"
            )
        )
    declaration = target.declaration
    tensors = [p for ps in declaration.parameters for p in ps if p.type is not None and is_tensor_type(p.type)]
    span = declaration.name_span or declaration.span
    if len(tensors) != 1:
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"`{name}` takes {len(tensors)} values, and one is needed: a sample of the flow",
                span,
                suggestion="name one tensor, as in `flow.log_prob(x)`",
            )
        )
    flow = comp.regions[like]
    region = comp.elab.instance_region(target, {tensors[0].name: flow.graph[flow.inputs[0]].tensor}, span)
    if region is None or region.broken or not comp.ok:
        raise FlowError(comp.report.errors)
    try:
        made = Generator(region, comp.analyses, comp.source.name).generate()
    except Unlowered as e:
        raise FlowError(
            Diagnostic(
                "FL0701",
                f"`{e.node.op}` has no PyTorch form yet",
                e.node.span,
                suggestion="write the map with other functions, or report the missing one",
            )
        ) from None
    text = module_text(made, standalone=False, title=f"net {name}", origin=Path(comp.source.name).name)
    return fresh(text, made.root, 0, None)


def fresh(text: str, cls: str, seed: int | None, dtype: Any) -> Any:
    """An instance of a generated class; `seed` fixes its start without touching the global generator."""
    import torch

    from flowlang.backends.torch.load import instantiate

    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise FlowError(
            Diagnostic("FL0804", f"`seed` is a whole number, and this is {seed!r}", suggestion="as in `seed=0`")
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"`dtype` is a floating type of torch, and this is {dtype!r}",
                suggestion="as in `dtype=torch.float64`",
            )
        )
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        module = instantiate(text, cls)
    return module.to(dtype) if dtype is not None else module


# What a generated class came from, for those that need the graph again (export).
origins: weakref.WeakKeyDictionary[type, tuple[Compilation, str]] = weakref.WeakKeyDictionary()


def export_onnx(
    flow: Any, path: str | Path, programs: Sequence[str] | None = None, *, opset: int | None = None,
    seed: int | None = None, dynamic: Sequence[str] | None = None, unroll: int = limits.WRITTEN_STAGES,
) -> dict[str, Path]:  # fmt: skip
    """Writes ONNX models of a compiled flow, one file for each program; gives their paths.

    `flow` is what `compile` gave, or a trained flow, whose standardisation is then part of the models. One program
    goes to `path`, several to `FILE.PROGRAM.onnx`. Programs: log_prob, forward, inverse, sample,
    sample_and_log_prob; by default log_prob and sample. A network has `forward`, and `train`: the pass of a training step by the
    statistics of the batch, with the states that it renews as more outputs (nothing is folded then). A model has its named
    programs (losses for each sample; by default all the others). Noise is an input of the
    sampling programs, unless `seed` asks for a random op inside.

    The batch may have any size. So may the axes named by `dynamic`; by default those whose size the spec leaves open
    (`data x: R[C = 3, H, W]`) where no weight depends on it. What cannot keep them open is refused (FL0701).
    The loop of an autoregressive inverse is written out where it has at most `unroll` stages (with fixed sizes), which is
    twice as fast; beyond that it is a loop, so that the number of nodes does not grow with the dimension.
    """
    from flowlang.backends.onnx.files import check_weights, default_programs, export_files
    from flowlang.backends.torch.standard import Standardised, StandardisedModel

    whole = flow if isinstance(flow, Standardised | StandardisedModel) else None
    module = whole.flow if whole is not None else flow
    comp, name = origin_of(module)
    proved = certificate(module)
    folds, trains = hasattr(module, "verdicts"), programs is not None and "train" in programs
    if folds and trains:
        raise FlowError(Diagnostic("FL0804", "a folded network has no training pass", comp.regions[name].span,
                                   suggestion="export the network that it was folded from"))  # fmt: skip
    if comp.regions[name].kind in ("net", "norm") and not folds and not trains:
        found = folded_of(comp, name)
        folds = bool(found.recipes)
        if folds:
            check_weights(module)
            module = folded_from(comp, name, found, module)
            comp, name = origins[type(module)]
    at = Resized(comp, name, module, folds)
    return export_files(
        comp, name, module, path, list(default_programs(comp.regions[name]) if programs is None else programs), opset=opset, seed=seed,
        standard=whole.standard() if whole is not None else None,
        given_standard=whole.given_standard() if whole is not None else None,
        dynamic=dynamic, at=at, certificate=proved, unroll=unroll,
    )  # fmt: skip


def compare_onnx(flow: Any, files: Mapping[str, Path]) -> dict[str, Comparison]:
    """Models that `export_onnx` wrote, beside the flow that they were made of: the same inputs and noise through both.

    Gives for each program the largest difference relative to the size of the result (rounding, 1e-6 or so), or why
    it cannot be told: no onnxruntime, no kernels in this precision, noise that only the model can draw.
    """
    from flowlang.backends.onnx.compare import compare

    comp, name = origin_of(getattr(flow, "flow", flow) if hasattr(flow, "standard") else flow)
    return {program: compare(Path(file), comp.regions[name], program, flow) for program, file in files.items()}


class Resized:
    """The same flow, weights included, at other sizes of its inputs' axes."""

    def __init__(self, comp: Compilation, name: str, module: Any, folds: bool = False):
        self.comp, self.name, self.module, self.folds = comp, name, module, folds
        self.known: dict[tuple[tuple[str, int], ...], Any] = {}

    def __call__(self, sizes: Mapping[str, int]) -> Any:
        """Region, facts and module; None where the spec does not allow the sizes. Raises OtherWeights."""
        from flowlang.backends.onnx.dynamic import OtherWeights

        key = tuple(sorted(sizes.items()))
        if key not in self.known:
            elab = self.comp.elab
            comp = compile_source(
                self.comp.source, loader=elab.loader, sets={**elab.sets, **sizes}, sized=True, build=self.name
            )
            self.known[key] = None
            if comp.ok:
                if self.folds:
                    comp.regions[self.name] = folded_of(comp, self.name).region
                module = fresh(*generate_from(comp, self.name, standalone=False), 0, None)
                try:
                    module.load_state_dict(self.module.state_dict())
                except RuntimeError:
                    raise OtherWeights from None
                dtypes = {t.dtype for t in self.module.parameters()}
                self.known[key] = (
                    comp.regions[self.name],
                    comp.analyses,
                    module.to(*dtypes) if len(dtypes) == 1 else module,
                )
        return self.known[key]


def save(flow: Flow, path: str | Path, **meta: Any) -> None:
    """Writes a flow to one safetensors file: its weights, its spec's text with what it imports, sizes and version.

    `load` restores the module from that file alone. `meta` adds entries of your own (JSON values). What is proved of the weights
    (`certificate`) is kept beside them; weights that break their bounds are refused.
    """
    from flowlang.backends.torch.standard import Standardised, StandardisedModel
    from flowlang.backends.torch.store import write_tensors

    whole = isinstance(flow, Standardised | StandardisedModel)
    inner: Any = flow.flow if whole else flow
    kept = flow.statistics() if whole else {}
    proved = certificate(inner) if type(inner) in origins else {}
    kept |= {"certificate": proved} if proved else {}
    write_tensors(path, inner.state_dict(), {**(getattr(inner, "origin", None) or {}), **kept, **meta})


def load(path: str | Path, spec: str | Path | None = None, *, dtype: Any = None, **sets: Any) -> Flow:
    """The flow that `save`, or a training run, wrote. FL0803 says what differs if `spec` has another shape.

    Without `spec`, the text inside the file is compiled. A run's folder stands for its `model.safetensors`. With the
    standardisation of a training run, densities and samples are in the units of the data.
    """
    from flowlang.backends.torch.runtime import Model
    from flowlang.backends.torch.standard import Standardised, StandardisedModel
    from flowlang.backends.torch.store import load_state, read_tensors

    if not isinstance(path, str | Path):
        raise FlowError(
            Diagnostic(
                "FL0801", f"weights are read from a path, and this is {path!r}", suggestion='as in `fl.load("run")`'
            )
        )
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    tensors, meta = read_tensors(file)
    comp = recompile(file, meta, spec, sets)
    name = meta.get("flow")
    flow: Flow = compile_from(comp, name if name in comp.regions else None, dtype=dtype)
    if meta.get("fold"):
        flow = folded(flow)
    load_state(flow, tensors, str(file))
    flow.certify()
    return StandardisedModel.of(flow, meta) if isinstance(flow, Model) else Standardised.of(flow, meta)


def recompile(file: Path, meta: Mapping[str, Any], spec: str | Path | None, sets: Mapping[str, Any]) -> Compilation:
    """The spec that weights carry, or the one given in its place, at the sizes of the weights."""
    sizes = {**meta.get("sets", {}), **sets}
    if spec is not None:
        comp = analyse(spec, sizes, sized=True)
    elif "spec" in meta:
        source = Source.of(str(meta.get("spec_name", "<weights>")), str(meta["spec"]))
        comp = compile_source(source, loader=Texts(meta.get("imports", {})), sets=sizes, sized=True)
    else:
        raise FlowError(
            Diagnostic("FL0803", f"`{file}` holds no spec", suggestion="give the spec that the weights belong to")
        )
    if not comp.ok:
        raise FlowError(comp.report.errors)
    return comp


__all__ = [
    "Compilation",
    "FlowError",
    "Report",
    "analyse",
    "certificate",
    "check",
    "compile",
    "export_onnx",
    "folded",
    "generate",
    "info",
    "load",
    "save",
]  # fmt: skip
