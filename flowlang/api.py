"""What people import: `import flowlang as fl`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.compiler import Compilation, compile_source
from flowlang.compiler import info as describe
from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.library import Folders
from flowlang.source import Source

if TYPE_CHECKING:
    from flowlang.backends.torch.runtime import Flow


def source_of(spec: str | Path) -> tuple[Source, Path | None]:
    """A spec given as a path or as text."""
    text = str(spec)
    if isinstance(spec, Path) or ("\n" not in text and "{" not in text):
        path = Path(text)
        try:
            return Source.of(text, path.read_text("utf-8")), path.resolve().parent
        except UnicodeDecodeError as e:
            raise FlowError(
                Diagnostic("FL0801", f"`{text}` is not UTF-8 text (byte {e.start})", suggestion="save it as UTF-8")
            ) from None
        except OSError as e:
            raise FlowError(
                Diagnostic(
                    "FL0801",
                    f"`{text}` cannot be read: {e.strerror or e}",
                    suggestion="check the path; a spec may also be given as text",
                )
            ) from None
    return Source.of("<text>", text), None


def analyse(spec: str | Path, sets: Mapping[str, Any] | None = None, *, sized: bool = False) -> Compilation:
    """Everything that is known of a spec (see `flowlang.compiler`)."""
    source, folder = source_of(spec)
    return compile_source(source, loader=Folders([folder] if folder else []), sets=sets, sized=sized)


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
    flows = comp.flows()
    if name is not None:
        if name not in flows:
            raise FlowError(
                Diagnostic(
                    "FL0804",
                    f"`{name}` is no flow of this spec",
                    suggestion=f"its flows are {', '.join(f'`{f}`' for f in flows) or 'none'}",
                )
            )
        return name
    if not flows:
        raise FlowError(
            Diagnostic(
                "FL0804",
                "this spec has no flow",
                suggestion="declare one, as in `flow name { data x: R[D = 2] .. base normal }`",
            )
        )
    return flows[0]


def generate(spec: str | Path, *, flow: str | None = None, standalone: bool = True, **sets: Any) -> tuple[str, str]:
    """The PyTorch source of a flow, and the name of its class."""
    comp = analyse(spec, sets, sized=True)
    if not comp.ok:
        raise FlowError(comp.report.errors)
    return generate_from(comp, flow, standalone=standalone)


def generate_from(comp: Compilation, flow: str | None = None, *, standalone: bool = True) -> tuple[str, str]:
    from flowlang.backends.torch.codegen import Generator, Unlowered, module_text

    name = pick_flow(comp, flow)
    region = comp.regions[name]
    try:
        made = Generator(region, comp.analyses, comp.source.name).generate()
    except Unlowered as e:
        raise FlowError(
            Diagnostic(
                "FL0701",
                f"`{e.node.op}` has no PyTorch form yet",
                e.node.span,
                suggestion="write it with other functions",
            )
        ) from None
    title = f"flow {name}: {region.graph[region.inputs[0]].type}"
    text = module_text(made, standalone=standalone, title=title, origin=Path(comp.source.name).name)
    return text, made.root


def compile(
    spec: str | Path, *, flow: str | None = None, seed: int | None = None, dtype: Any = None, **sets: Any
) -> Flow:
    """A flow as an `nn.Module` with `log_prob`, `sample`, `forward` and `inverse`.

    `spec` is a path or text; keyword arguments set sizes and static parameters, as in `D=6`. Raises
    FlowError with the diagnostics of a bad spec. `seed` fixes the start of the parameters.
    """
    comp = analyse(spec, sets, sized=True)
    if not comp.ok:
        raise FlowError(comp.report.errors)
    return compile_from(comp, flow, seed=seed, dtype=dtype)


def compile_from(comp: Compilation, flow: str | None = None, *, seed: int | None = None, dtype: Any = None) -> Flow:
    import torch

    from flowlang.backends.torch.load import instantiate

    text, cls = generate_from(comp, flow, standalone=False)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        module: Flow = instantiate(text, cls)
    if dtype is not None:
        module = module.to(dtype)
    origins[type(module)] = (comp, pick_flow(comp, flow))
    return module


# What a generated class came from, for those that need the graph again (export).
origins: weakref.WeakKeyDictionary[type, tuple[Compilation, str]] = weakref.WeakKeyDictionary()


def export_onnx(
    flow: Any, path: str | Path, programs: Sequence[str] = ("log_prob", "sample"), *, opset: int | None = None,
    seed: int | None = None,
) -> dict[str, Path]:  # fmt: skip
    """Writes ONNX models of a compiled flow, one file for each program; gives their paths.

    `flow` is what `compile` gave, or a trained flow, whose standardisation is then part of the models. One program
    goes to `path`, several to `FILE.PROGRAM.onnx`. Programs: log_prob, forward, inverse, sample,
    sample_and_log_prob. Noise is an input of the sampling programs, unless `seed` asks for a random op inside.
    """
    from flowlang.backends.onnx.files import export_files

    module = flow if not hasattr(flow, "flow") else flow.flow
    if type(module) not in origins:
        raise FlowError(
            Diagnostic("FL0804", "this is no flow that `flowlang.compile` made here", suggestion="compile it from its spec")
        )
    comp, name = origins[type(module)]
    return export_files(
        comp, name, module, path, list(programs), opset=opset, seed=seed, standard=getattr(flow, "standard", None),
        given_standard=getattr(flow, "given_standard", None),
    )  # fmt: skip


__all__ = ["Compilation", "FlowError", "Report", "analyse", "check", "compile", "export_onnx", "generate", "info"]
