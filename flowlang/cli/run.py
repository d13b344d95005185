"""verify and build: commands that need torch."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flowlang.api import folding, generate_from, need_kind, pick_flow, verify_rules
from flowlang.cli.common import flow_option, json_option, load_ok, memory_option, seed_option, spec_options, write_text
from flowlang.diagnostics import Diagnostic, FlowError


@click.command()
@click.argument("spec")
@spec_options
@flow_option
@seed_option
@json_option
def verify(spec: str, sets: tuple[str, ...], flow: str | None, seed: int, as_json: bool) -> None:
    """Check inverse and log-det numerically, in float64."""
    from flowlang.verify import SAMPLES
    from flowlang.verify import verify as run

    comp = load_ok(spec, sets, as_json, sized=True)
    names = comp.flows() if flow is None else []
    if not names:
        names = [need_kind(comp, pick_flow(comp, flow), "inverse and log-det are checked", "flow")]
    found = {name: run(comp, name, seed=seed) for name in names}
    ok = all(c.ok for checks in found.values() for c in checks)
    if as_json:
        rows = {
            n: [{"check": c.name, "error": c.error, "tolerance": c.tolerance, "ok": c.ok} for c in cs]
            for n, cs in found.items()
        }
        click.echo(json.dumps({"ok": ok, "flows": rows}, indent=1))
    else:
        for name, checks in found.items():
            click.echo(f"flow {name}")
            for c in checks:
                click.echo(
                    f"  {'ok  ' if c.ok else 'FAIL'} {c.name}: {c.error:.2e} (at most {c.tolerance:.0e}){'; ' + c.note if c.note else ''}"
                )
    if not ok:
        failed = {c.name for checks in found.values() for c in checks if not c.ok}
        advice = "see the lines above; if the spec is right, this is a fault of FlowLang"
        if failed == {SAMPLES}:
            advice = "the inverse grows beyond what float64 holds: bound what it multiplies or adds, as by `tanh`"
        raise FlowError(Diagnostic("FL0703", "a numerical check failed", suggestion=advice))


@click.command()
@click.argument("spec")
@spec_options
@flow_option
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="File to write; standard output by default.")
@memory_option
@click.option(
    "--fold", is_flag=True, help="For inference: norms by running statistics go into the linear maps beside them."
)
def build(spec: str, sets: tuple[str, ...], flow: str | None, out: str | None, memory: str, fold: bool) -> None:
    """Write the flow as one Python file that needs torch alone."""
    comp = load_ok(spec, sets, False, sized=True, build=flow)
    verify_rules(comp, pick_flow(comp, flow))
    if fold:
        name = pick_flow(comp, flow)
        found = folding(comp, name)
        comp.regions[name] = found.region
        for v in found.verdicts:
            click.echo(f"{v.name}: {'folded' if v.folds else f'kept, {v.reason}'}", err=True)
    text, cls = generate_from(comp, flow, standalone=True, memory=memory)
    if out is None:
        click.echo(text, nl=False)
        return
    write_text(Path(out), text)
    click.echo(f"{out}: class {cls}, {len(text.splitlines())} lines, needs torch alone")
