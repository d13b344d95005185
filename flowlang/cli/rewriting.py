"""`flowlang rewrite`: a spec and its weights as an equivalent architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flowlang.cli.common import flow_option, json_option, seed_option, spec_options, write_text
from flowlang.rewrite import TARGETS


@click.command()
@click.argument("spec")
@spec_options
@flow_option
@click.option(
    "--to",
    "to",
    type=click.Choice(list(TARGETS)),
    required=True,
    help="; ".join(f"{k}: {v[1]}" for k, v in TARGETS.items()),
)
@click.option("-w", "--weights", type=click.Path(), help="A safetensors file of the network; fresh weights by default.")
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    help="Stem of the files: OUT.flow and OUT.safetensors. [default: NAME of the new network]",
)
@seed_option
@json_option
def rewrite(
    spec: str,
    sets: tuple[str, ...],
    flow: str | None,
    to: str,
    weights: str | None,
    out: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Rewrite a network as an equivalent one: its text and its weights, compared with the original in float64."""
    from flowlang.api import compile_from, pick_flow, save
    from flowlang.backends.torch.store import load_state, read_tensors
    from flowlang.cli.common import load_ok
    from flowlang.rewrite import rewrite as run

    comp = load_ok(spec, sets, as_json, sized=True, build=flow)
    nets = [n for n in comp.nets() if n in comp.regions]
    name = pick_flow(comp, flow if flow is not None or not nets else nets[-1])
    module: Any = compile_from(comp, name, seed=seed)
    if weights is not None:
        load_state(module, read_tensors(Path(weights))[0], weights)
    made = run(module, to, seed=seed)
    stem = Path(out or made.name)
    if not stem.name:
        stem = stem / made.name
    stem = stem.with_suffix("") if stem.suffix in (".flow", ".safetensors") else stem
    text, tensors = stem.with_name(f"{stem.name}.flow"), stem.with_name(f"{stem.name}.safetensors")
    write_text(text, made.text)
    save(made.module, tensors)
    if as_json:
        click.echo(
            json.dumps(
                {"text": str(text), "weights": str(tensors), "net": made.name, "differences": made.checks}, indent=1
            )
        )
        return
    click.echo(f"{text}: net {made.name}; {tensors}: its weights{'' if weights else ' (of a fresh start)'}")
    for what, error in made.checks.items():
        click.echo(f"  {what} differ by {error:.1e} of the largest")
