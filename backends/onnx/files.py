"""Models of a compiled flow as files. Everything that can go wrong for a user is a diagnostic."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import Diagnostic, FlowError

if TYPE_CHECKING:
    from flowlang.compiler import Compilation

PROGRAMS = ("log_prob", "forward", "inverse", "sample", "sample_and_log_prob")


def need_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise FlowError(
            Diagnostic("FL0805", "export needs the package onnx", suggestion="pip install 'flowlang[onnx]'")
        ) from None


def check_options(programs: Sequence[str], opset: int | None) -> None:
    from flowlang.backends.onnx.model import HIGHEST_OPSET, LOWEST_OPSET

    unknown = [p for p in programs if p not in PROGRAMS]
    if unknown or not programs:
        message = f"`{unknown[0]}` is no program of a flow" if unknown else "no program is named"
        raise FlowError(
            Diagnostic("FL0804", message, suggestion=f"choose from {', '.join(f'`{p}`' for p in PROGRAMS)}")
        )
    if opset is not None and not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise FlowError(
            Diagnostic("FL0804", f"opset {opset} is not supported",
                       suggestion=f"opsets {LOWEST_OPSET} to {HIGHEST_OPSET} are")
        )  # fmt: skip


def file_of(path: Path, program: str, several: bool) -> Path:
    """FILE.onnx for one program; FILE.PROGRAM.onnx for each of several."""
    stem = path.with_suffix("") if path.suffix == ".onnx" else path
    return stem.with_name(f"{stem.name}.{program}.onnx") if several else stem.with_name(f"{stem.name}.onnx")


def write(path: Path, blob: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(blob)
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise FlowError(
            Diagnostic("FL0801", f"`{path}` cannot be written: {e.strerror or e}", suggestion="choose another path")
        ) from None


def export_files(
    comp: Compilation, name: str, module: Any, path: str | Path, programs: Sequence[str], *, opset: int | None = None,
    seed: int | None = None, standard: Any = None, given_standard: Any = None,
) -> dict[str, Path]:  # fmt: skip
    """Writes one checked model for each program; gives their paths."""
    need_onnx()
    if comp.regions[name].kind == "model":
        raise FlowError(
            Diagnostic("FL0701", f"`{name}` is a model, and programs of models cannot be exported to ONNX yet",
                       comp.regions[name].span, suggestion="a flow with the step `cnf(v)` exports density and sampler of a field")
        )  # fmt: skip
    from flowlang.backends.onnx.build import DEFAULT_OPSET, Options, Standard, Unlowered, export

    check_options(programs, opset)
    if comp.regions[name].kind in ("net", "norm") and set(programs) != {"forward"}:
        other = next(p for p in programs if p != "forward")
        raise FlowError(Diagnostic("FL0804", f"`{other}` is no program of a network", suggestion="export `forward`"))

    def kept(s: Any) -> Standard | None:
        if s is None or ((s.mean == 0).all() and (s.scale == 1).all()):
            return None
        return Standard(s.mean, s.scale)

    given = {k: s for k, v in (given_standard or {}).items() if (s := kept(v)) is not None}
    metadata = {"spec_sha256": hashlib.sha256(comp.source.text.encode()).hexdigest()}
    if comp.elab.sets:
        metadata["set"] = json.dumps(dict(comp.elab.sets))
    options = Options(opset or DEFAULT_OPSET, seed, kept(standard), given, metadata)
    out: dict[str, Path] = {}
    for program in dict.fromkeys(programs):
        try:
            model = export(comp.regions[name], comp.analyses, module, program, options)
        except Unlowered as e:
            raise FlowError(
                Diagnostic("FL0701", f"cannot be exported to ONNX: {e.reason}", e.node.span, suggestion=e.suggestion)
            ) from None
        file = file_of(Path(path), program, len(set(programs)) > 1)
        write(file, model.SerializeToString())
        out[program] = file
    return out
