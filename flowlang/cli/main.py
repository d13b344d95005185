"""The command line: `flowlang COMMAND`. Exit codes: 0 fine, 1 refused, 2 wrong usage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from flowlang.compiler import Compilation, compile_source, info
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.library import Folders
from flowlang.source import Source


def parse_sets(pairs: tuple[str, ...]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq or not name:
            raise click.UsageError(f"--set takes NAME=VALUE, and this is {pair!r}")
        try:
            out[name.strip()] = int(value.replace("_", ""))
        except ValueError:
            try:
                out[name.strip()] = float(value)
            except ValueError:
                if value in ("true", "false"):
                    out[name.strip()] = value == "true"
                else:
                    raise click.UsageError(f"--set takes a number, `true` or `false`, and this is {value!r}") from None
    return out


def read_source(spec: str) -> Source:
    """The text of a spec: a path, or the name of a library entry's file (`std.flows.coupling`)."""
    if spec == "-":
        return Source.of("<stdin>", sys.stdin.read())
    path = Path(spec)
    try:
        return Source.of(spec, path.read_text("utf-8"))
    except UnicodeDecodeError as e:
        raise FlowError(Diagnostic("FL0801", f"`{spec}` is not UTF-8 text (byte {e.start})", suggestion="save it as UTF-8")) from None
    except OSError as e:
        raise FlowError(
            Diagnostic("FL0801", f"`{spec}` cannot be read: {e.strerror or e}", suggestion="check the path")
        ) from None


def load(spec: str, sets: tuple[str, ...], *, sized: bool = False) -> Compilation:
    source = read_source(spec)
    folder = Path(spec).resolve().parent if spec != "-" else Path.cwd()
    return compile_source(source, loader=Folders([folder]), sets=parse_sets(sets), sized=sized)


def show(comp: Compilation, *, color: bool) -> None:
    from flowlang.diagnostics.render import render_report

    text = render_report(comp.report, color=color)
    if text:
        click.echo(text, err=True)


def to_stop(diagnostics: Any, as_json: bool) -> None:
    from flowlang.diagnostics.render import render, to_json

    if as_json:
        click.echo(json.dumps({"diagnostics": [to_json(d) for d in diagnostics]}, ensure_ascii=False, indent=1))
    else:
        for d in diagnostics:
            click.echo(render(d, color=sys.stderr.isatty()), err=True)
    raise SystemExit(1)


set_option = click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="Set a size or a static parameter of the flow.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flowlang", message="flowlang %(version)s")
def cli() -> None:
    """Write the forward map; get the inverse, the log-determinant and PyTorch."""


@cli.command()
@click.argument("spec")
@set_option
@json_option
def check(spec: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Check a spec: shapes, domains, invertibility, cost."""
    from flowlang.diagnostics.render import to_json

    comp = load(spec, sets)
    if as_json:
        click.echo(json.dumps({"diagnostics": [to_json(d) for d in comp.report]}, ensure_ascii=False, indent=1))
    else:
        show(comp, color=sys.stderr.isatty())
        if comp.ok:
            click.echo(f"{spec}: no errors")
    if not comp.ok:
        raise SystemExit(1)


@cli.command("info")
@click.argument("spec")
@set_option
@json_option
def info_command(spec: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Show each declaration: steps, how they are inverted, cost, parameters."""
    comp = load(spec, sets)
    if not comp.ok:
        to_stop(comp.report.errors, as_json)
    found = info(comp)
    if as_json:
        click.echo(json.dumps({"declarations": found}, ensure_ascii=False, indent=1))
        return
    from flowlang.cli.tables import info_text

    click.echo(info_text(found))


def main() -> None:
    """Entry point: diagnostics are shown as such, and nothing else reaches the user as a traceback."""
    as_json = "--json" in sys.argv
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as e:
        e.show()
        raise SystemExit(2) from None
    except click.Abort:
        raise SystemExit(130) from None
    except FlowError as e:
        to_stop(e.diagnostics, as_json)


if __name__ == "__main__":
    main()
