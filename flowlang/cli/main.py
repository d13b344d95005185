"""The command line: `flowlang COMMAND`. Exit codes: 0 fine, 1 refused, 2 wrong usage, 3 a fault of FlowLang's own, 130 interrupted."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from flowlang import limits
from flowlang.cli.common import flow_option, json_option, load, load_ok, read_source, spec_options, stop, write_text
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.elaborate.scope import did_you_mean
from flowlang.version import __version__

# Commands that need torch: their module, and the first line of their help, so that `--help` imports none of them.
LAZY = {
    "verify": ("run", "Check inverse and log-det numerically, in float64."),
    "build": ("run", "Write the flow as one Python file that needs torch alone."),
    "export": ("export", "Write the flow's programs as ONNX models that need no PyTorch."),
    "train": ("training", "Train a flow on a file of samples, or on an energy."),
    "evolve": ("evolving", "Search layers of normalisation and activation by evolution (Liu et al. 2020)."),
    "rewrite": (
        "rewriting",
        "Rewrite a network as an equivalent one: its text and its weights, compared with the original in float64.",
    ),
    "sample": ("training", "Draw samples from a trained flow (of its own spec, if none is named)."),
    "score": ("training", "Log-density of each row under a trained flow or model, in the units of the data."),
}
ORDER = (
    "check",
    "info",
    "verify",
    "fmt",
    "explain",
    "draw",
    "build",
    "export",
    "train",
    "sample",
    "score",
    "evolve",
    "rewrite",
    "std",
    "new",
)


class Commands(click.Group):
    """Commands that need torch are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(ORDER)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in LAZY:
            import importlib

            found: click.Command = getattr(importlib.import_module(f"flowlang.cli.{LAZY[name][0]}"), name)
            return found
        return super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in ORDER:
            close = did_you_mean(args[0], ORDER)
            ctx.fail(f"No such command {args[0]!r}." + (f" {close[0].upper()}{close[1:]}" if close else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = {name: command.get_short_help_str(90) for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, LAZY[name][1] if name in LAZY else own[name]) for name in ORDER])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flowlang", message="flowlang %(version)s")
def cli() -> None:
    """Write the forward map; get the inverse, the log-determinant and PyTorch."""


@cli.command()
@click.argument("specs", nargs=-1, required=True)
@spec_options
@json_option
def check(specs: tuple[str, ...], sets: tuple[str, ...], as_json: bool) -> None:
    """Check specs: shapes, domains, invertibility, cost."""
    from flowlang.diagnostics.render import render_report, to_json

    found: list[Diagnostic] = []
    ok = True
    for spec in specs:
        comp = load(spec, sets)
        ok = ok and comp.ok
        found.extend(comp.report)
        if not as_json and comp.ok:
            click.echo(f"{spec}: no errors")
    if as_json:
        click.echo(json.dumps({"diagnostics": [to_json(d) for d in found]}, ensure_ascii=False, indent=1))
    elif found:
        click.echo(render_report(found, color=sys.stderr.isatty()), err=True)
    if not ok:
        raise SystemExit(1)


@cli.command("info")
@click.argument("spec")
@spec_options
@json_option
@click.option("--graph", is_flag=True, help="Print the typed graph of each declaration instead.")
@click.option("--formula", is_flag=True, help="Add parameter and FLOP counts as polynomials in the sizes of the data.")
@click.option(
    "--max-parameters", type=click.IntRange(min=1), default=limits.PARAMETERS, help="Count flows up to this size."
)
def info_command(
    spec: str, sets: tuple[str, ...], as_json: bool, graph: bool, formula: bool, max_parameters: int
) -> None:
    """Show each declaration: steps, how they are inverted, cost, size."""
    from flowlang.compiler import info

    if graph:
        from flowlang.ir.text import print_region

        regions = load_ok(spec, sets, as_json).regions
        click.echo("\n".join(f"# {name}\n{print_region(r)}" for name, r in regions.items() if not r.broken), nl=False)
        return
    comp = load_ok(spec, sets, as_json, max_parameters=max_parameters)
    found = info(comp)
    if formula:
        from flowlang.analysis.size import flop_count
        from flowlang.compiler import size_formula

        for entry in found:
            if entry["name"] in comp.flows():
                name = entry["name"]
                entry["parameter_formula"] = size_formula(comp, name)
                entry["flop_formula"] = size_formula(comp, name, flop_count)
    if as_json:
        click.echo(json.dumps({"declarations": found}, ensure_ascii=False, indent=1))
        return
    from flowlang.cli.tables import info_text

    click.echo(info_text(found))


@cli.command()
@click.argument("specs", nargs=-1, required=True)
@click.option("--check", "only_check", is_flag=True, help="Change nothing; fail where a file is not in canonical form.")
def fmt(specs: tuple[str, ...], only_check: bool) -> None:
    """Write specs in canonical form (`-` reads standard input)."""
    from flowlang.syntax.printer import format_source

    changed = []
    for spec in specs:
        source, _ = read_source(spec)
        text = format_source(source)
        if spec == "-":
            click.echo(text, nl=False)
        elif text != source.text:
            changed.append(spec)
            if not only_check:
                write_text(spec, text)
    for spec in changed:
        click.echo(f"{spec}: {'not in canonical form' if only_check else 'formatted'}")
    if only_check and changed:
        raise SystemExit(1)


@cli.command()
@click.argument("code")
def explain(code: str) -> None:
    """Tell what a diagnostic's code means, with a wrong and a right example."""
    from flowlang.diagnostics.explain import explain as text

    click.echo(text(code))


@cli.command()
@click.argument("spec")
@spec_options
@flow_option
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False), help=".svg or .mmd; Mermaid on standard output by default."
)
@click.option(
    "--signal",
    "signal_",
    is_flag=True,
    help="The variance of a net's values along its depth at initialisation; -o FILE.png plots it.",
)
@click.option(
    "--solver",
    "solvers_",
    multiple=True,
    metavar="NAME",
    help="A solver's stability region and what accuracy costs; may be repeated; -o FILE.png plots them together.",
)
@click.option(
    "--path",
    "paths_",
    multiple=True,
    metavar="NAME",
    help="What a path holds of data and noise at each time; may be repeated; -o FILE.png plots them together.",
)
def draw(
    spec: str, sets: tuple[str, ...], flow: str | None, out: str | None, signal_: bool, solvers_: tuple[str, ...],
    paths_: tuple[str, ...],
) -> None:  # fmt: skip
    """Draw a flow's chain as SVG or Mermaid, how a signal goes through a net, solvers, or paths."""
    from flowlang.api import pick_flow
    from flowlang.draw.chain import mermaid, svg

    comp = load_ok(spec, sets, False, build=flow)
    if solvers_:
        draw_solvers(comp, solvers_, out)
        return
    if paths_:
        draw_levels(comp, paths_, out)
        return
    if signal_:
        draw_signal(comp, flow, out)
        return
    name = pick_flow(comp, flow)
    text = svg(comp, name) if out and out.endswith(".svg") else mermaid(comp, name)
    if out is None:
        click.echo(text)
    else:
        write_text(out, text)
        click.echo(f"{out}: flow {name}")


def draw_solvers(comp: Any, names: tuple[str, ...], out: str | None) -> None:
    from flowlang.cli.tables import table
    from flowlang.draw.solvers import curve, plot

    if out is not None and not out.endswith(".png"):
        raise FlowError(
            Diagnostic("FL0804", f"`{out}` is no .png", suggestion="solvers are drawn as in `-o solvers.png`")
        )
    curves = [curve(comp, n) for n in names]
    rows = [[c.name, str(n), f"{e:.2e}"] for c in curves for n, e in c.work]
    click.echo(table(["solver", "evaluations", "error"], rows, numbers=(1, 2)))
    if out is not None:
        plot(curves, out)
        click.echo(f"{out}: {', '.join(names)}")


def draw_levels(comp: Any, names: tuple[str, ...], out: str | None) -> None:
    from flowlang.cli.tables import table
    from flowlang.draw.levels import TIMES, levels, plot

    if out is not None and not out.endswith(".png"):
        raise FlowError(Diagnostic("FL0804", f"`{out}` is no .png", suggestion="paths are drawn as in `-o paths.png`"))
    found = [levels(comp, n) for n in names]
    rows = [
        [p.name, f"{TIMES[k]:.2f}", *(f"{v[k]:.4g}" for v in (p.alpha, p.sigma, p.alpha_rate, p.sigma_rate))]
        for p in found
        for k in range(9, len(TIMES), 20)
    ]
    click.echo(table(["path", "t", "of x1", "of x0", "rate", "rate"], rows, numbers=(1, 2, 3, 4, 5)))
    if out is not None:
        plot(found, out)
        click.echo(f"{out}: {', '.join(names)}")


def draw_signal(comp: Any, flow: str | None, out: str | None) -> None:
    from flowlang.api import pick_flow
    from flowlang.cli.tables import table
    from flowlang.draw.signal import plot, signal, verdict

    nets = [n for n in comp.nets() if n in comp.regions]
    if flow is None and not nets:
        raise FlowError(
            Diagnostic(
                "FL0804",
                "this spec has no net whose sizes are known",
                suggestion="give its sizes, as in `net n(x: R[D = 8])`",
            )
        )
    name = pick_flow(comp, flow) if flow is not None else nets[-1]
    if out is not None and not out.endswith(".png"):
        raise FlowError(
            Diagnostic("FL0804", f"`{out}` is no .png", suggestion="a signal is drawn as in `-o signal.png`")
        )
    rows = signal(comp, name)
    shown = [
        [
            r.name,
            "" if r.predicted is None else f"{r.predicted:.4g}",
            f"{r.middle:.4g}",
            f"{min(r.measured):.4g} .. {max(r.measured):.4g}",
            f"{r.mean:.2g}",
        ]
        for r in rows
    ]
    click.echo(table(["part", "closed form", "measured", "over starts", "squared mean"], shown, numbers=(1, 2, 3, 4)))
    words = verdict(rows)
    if words:
        click.echo(words)
    if out is not None:
        plot(rows, f"variance at initialisation: {name}", out)
        click.echo(f"{out}: net {name}")


@cli.command()
@click.argument("name", required=False)
@json_option
def std(name: str | None, as_json: bool) -> None:
    """List the standard library and the built-in names, or show one entry's text."""
    from flowlang.catalogue import entries, entry_text

    if name is not None:
        click.echo(entry_text(name))
        return
    found = entries()
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    from flowlang.cli.tables import table
    from flowlang.elaborate.forms import FORMS

    rows = [[e["name"], e["kind"], e["family"], e["summary"]] for e in found]
    rows += [[name, "built in", "", meaning] for name, (_, meaning) in sorted(FORMS.items())]
    across = shutil.get_terminal_size().columns if sys.stdout.isatty() else None  # a file or pipe gets all of it
    click.echo(table(["name", "kind", "family", "what it is"], rows, across=across))


TEMPLATE = """## A coupling flow on {dims} coordinates. Check it: flowlang check {file}
flow {name} {{
  data x: R[D = {dims}]
  repeat 6 {{
    rqs_coupling(bins = 8, net = mlp(64, 64))
    plu_linear
  }}
  base normal
}}
"""


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--dims", default=2, show_default=True, help="Number of coordinates.")
def new(file: str, dims: int) -> None:
    """Write a first spec to start from."""
    path = Path(file)
    if path.exists():
        raise FlowError(
            Diagnostic("FL0804", f"`{file}` exists already", suggestion="choose another name; nothing was overwritten")
        )
    if dims < 2:
        raise FlowError(
            Diagnostic("FL0804", "--dims is at least 2: a coupling needs two halves", suggestion="as in `--dims 2`")
        )
    name = "".join(c if c.isalnum() and c.isascii() else "_" for c in path.stem) or "flow"
    if name[0].isdigit():
        name = f"flow_{name}"
    write_text(path, TEMPLATE.format(name=name, dims=dims, file=file))
    click.echo(f"{file}: now `flowlang check {file}`, then `flowlang train {file} --data samples.csv`")


def main() -> None:
    """Entry point: diagnostics are shown as such, and nothing else reaches the user as a traceback."""
    as_json = "--json" in sys.argv
    try:
        result: Any = cli.main(standalone_mode=False)
        if isinstance(result, int) and result:
            raise SystemExit(result)
    except click.ClickException as e:
        e.show()
        raise SystemExit(2) from None
    except (click.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except FlowError as e:
        stop(e.diagnostics, as_json)
    except BrokenPipeError:
        raise SystemExit(141) from None
    except Exception as e:
        if os.environ.get("FLOWLANG_TRACEBACK"):
            raise
        click.echo(INTERNAL.format(version=__version__, kind=type(e).__name__, text=str(e).split("\n", 1)[0]), err=True)
        raise SystemExit(3) from None


INTERNAL = """FlowLang {version} met a fault of its own: {kind}: {text}
Please report it with the spec and the command. `FLOWLANG_TRACEBACK=1` shows where it happened."""


if __name__ == "__main__":
    main()
