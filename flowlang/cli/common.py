"""What the commands share: reading specs, options, exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flowlang import limits
from flowlang.api import MEMORY, source_of
from flowlang.compiler import Compilation, compile_source
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.files import cannot_write, replace_file
from flowlang.library import Folders, library_folders
from flowlang.source import Source


def give_folders(context: click.Context, _: click.Parameter, folders: tuple[str, ...]) -> None:
    """Until the command ends, imports are looked for in these folders too."""
    context.with_resource(library_folders(*folders))


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command that reads a spec takes."""
    library = click.option(
        "--library", multiple=True, metavar="FOLDER", expose_value=False, callback=give_folders,
        help="Also import from this folder, after the spec's own; `FLOWLANG_PATH` may name such folders too.",
    )  # fmt: skip
    sets = click.option(
        "--set", "sets", multiple=True, metavar="NAME=VALUE", help="Set a size or a static parameter of the flow."
    )
    return sets(library(command))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
seed_option = click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
memory_option = click.option(
    "--memory", type=click.Choice(MEMORY), default="plain", show_default=True,
    help="`reversible` keeps no activations of repeated bijections: they are found again by inverses.",
)  # fmt: skip
flow_option = click.option("--flow", metavar="NAME", help="Which flow of the spec; the first by default.")


def parse_sets(pairs: tuple[str, ...]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq or not name:
            raise click.UsageError(f"--set takes NAME=VALUE, and this is {pair!r}")
        out[name.strip()] = parse_value(value)
    return out


def parse_value(value: str) -> Any:
    for convert in (lambda v: int(v.replace("_", "")), float):
        try:
            return convert(value)
        except ValueError:
            continue
    if value in ("true", "false"):
        return value == "true"
    raise click.UsageError(f"--set takes a number, `true` or `false`, and this is {value!r}")


def read_source(spec: str) -> tuple[Source, Path | None]:
    """A spec by its path, the name of a library entry, or `-` for standard input; and the folder of its imports."""
    if spec != "-":
        return source_of(spec)
    try:
        return Source.of("<stdin>", sys.stdin.read()), Path.cwd()
    except UnicodeDecodeError as e:
        raise FlowError(
            Diagnostic(
                "FL0801", f"standard input is not UTF-8 text (byte {e.start})", suggestion="save the text as UTF-8"
            )
        ) from None


def write_text(path: str | Path, text: str) -> None:
    """Whole or not at all: an interrupt or a full disk must not cost a spec."""
    replace_file(Path(path), text.encode())


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except (OSError, ValueError) as e:
        raise cannot_write(path, e) from None


def load(
    spec: str, sets: tuple[str, ...], *, sized: bool = False, max_parameters: int = limits.PARAMETERS, build: str | None = None
) -> Compilation:  # fmt: skip
    source, folder = read_source(spec)
    return compile_source(
        source, loader=Folders(folder), sets=parse_sets(sets), sized=sized, max_parameters=max_parameters, build=build
    )


def load_ok(
    spec: str, sets: tuple[str, ...], as_json: bool, *, sized: bool = False, max_parameters: int = limits.PARAMETERS,
    build: str | None = None,
) -> Compilation:  # fmt: skip
    """A spec without errors; others are shown and end the command. `build` names a net whose open sizes are those set."""
    comp = load(spec, sets, sized=sized, max_parameters=max_parameters, build=build)
    if not comp.ok:
        stop(comp.report, as_json)
    return comp


def stop(diagnostics: Any, as_json: bool) -> None:
    from flowlang.diagnostics.render import render_report, to_json

    items = list(diagnostics)
    if as_json:
        click.echo(json.dumps({"diagnostics": [to_json(d) for d in items]}, ensure_ascii=False, indent=1))
    else:
        click.echo(render_report(items, color=sys.stderr.isatty()), err=True)
    raise SystemExit(1)
