"""Commands that need torch: verify, build, train, sample, score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from flowlang.api import generate_from, pick_flow
from flowlang.cli.common import flow_option, json_option, load_ok, set_option
from flowlang.diagnostics import Diagnostic, FlowError


@click.command()
@click.argument("spec")
@set_option
@flow_option
@click.option("--seed", default=0, show_default=True)
@json_option
def verify(spec: str, sets: tuple[str, ...], flow: str | None, seed: int, as_json: bool) -> None:
    """Check inverse and log-det numerically, in float64."""
    from flowlang.verify import verify as run

    comp = load_ok(spec, sets, as_json, sized=True)
    names = [pick_flow(comp, flow)] if flow else comp.flows()
    if not names:
        pick_flow(comp, None)
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
        raise FlowError(
            Diagnostic(
                "FL0703",
                "a numerical check failed",
                suggestion="see the lines above; if the spec is right, this is a fault of FlowLang",
            )
        )


@click.command()
@click.argument("spec")
@set_option
@flow_option
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="File to write; standard output by default.")
def build(spec: str, sets: tuple[str, ...], flow: str | None, out: str | None) -> None:
    """Write the flow as one Python file that needs torch alone."""
    comp = load_ok(spec, sets, False, sized=True)
    text, cls = generate_from(comp, flow, standalone=True)
    if out is None:
        click.echo(text, nl=False)
        return
    write_text(Path(out), text)
    click.echo(f"{out}: class {cls}, {len(text.splitlines())} lines, needs torch alone")


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as e:
        raise FlowError(Diagnostic("FL0801", f"`{path}` cannot be written: {e.strerror or e}")) from None


def names_of(text: str | None) -> list[str] | None:
    return [n.strip() for n in text.split(",") if n.strip()] if text else None


def parse_given(pairs: Sequence[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for p in pairs:
        name, eq, columns = p.partition("=")
        if not eq:
            raise click.UsageError(f"--given takes NAME=COLUMN,COLUMN, and this is {p!r}")
        out[name.strip()] = [c.strip() for c in columns.split(",") if c.strip()]
    return out


data_options = [
    click.option("--data", required=True, type=click.Path(), help=".npy, .npz, .csv or .parquet"),
    click.option("--columns", help="Data columns, separated by commas; all by default."),
    click.option("--given", "given", multiple=True, metavar="NAME=COLUMNS", help="Columns of a context input."),
    click.option("--onehot", help="Context columns that hold categories."),
    click.option("--dequantise", help="Columns with rounded values, or `all`: uniform noise of their step is added."),
]


def with_data(f: Any) -> Any:
    for option in reversed(data_options):
        f = option(f)
    return f


def read(
    data: str, columns: str | None, given: Sequence[str], onehot: str | None, dequantise: str | None, seed: int
) -> Any:
    from flowlang.train.data import read_table

    return read_table(
        data, columns=names_of(columns), given=parse_given(given), onehot=names_of(onehot) or (),
        dequantise=True if dequantise == "all" else names_of(dequantise) or (), seed=seed,
    )  # fmt: skip


@click.command()
@click.argument("spec")
@set_option
@flow_option
@with_data
@click.option(
    "-o",
    "--out",
    default="run",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Folder for weights, curves, pictures.",
)
@click.option("--epochs", default=100, show_default=True)
@click.option("--batch", default=512, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), default="cosine", show_default=True)
@click.option("--clip", default=5.0, show_default=True, help="Largest norm of the gradient; 0 for none.")
@click.option("--ema", default=0.0, show_default=True, help="Weight of the old average per step; 0 for none.")
@click.option("--validation", default=0.1, show_default=True, help="Share of rows held out.")
@click.option("--patience", default=20, show_default=True, help="Epochs without a better validation before stopping.")
@click.option("--seed", default=0, show_default=True)
@click.option("--devices", default=1, show_default=True, help="Processes.")
@click.option("--max-seconds", default=0.0, help="Stop after this time.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
@click.option("--no-standardise", is_flag=True, help="Leave the data as it is.")
def train(
    spec: str, sets: tuple[str, ...], flow: str | None, data: str, columns: str | None, given: tuple[str, ...],
    onehot: str | None, dequantise: str | None, out: str, epochs: int, batch: int, lr: float, weight_decay: float,
    schedule: str, clip: float, ema: float, validation: float, patience: int, seed: int, devices: int, max_seconds: float,
    resume: bool, no_standardise: bool,
) -> None:  # fmt: skip
    """Train a flow on a file of samples."""
    from flowlang.api import compile_from
    from flowlang.train.loop import Options
    from flowlang.train.loop import train as run

    if epochs < 1 or batch < 1 or lr <= 0 or not 0 < validation < 1 or not 0 <= ema < 1 or devices < 1:
        raise FlowError(
            Diagnostic(
                "FL0804", "--epochs, --batch and --devices are at least 1, --lr above 0, --validation and --ema below 1"
            )
        )
    table = read(data, columns, given, onehot, dequantise, seed)
    if len(table.x.shape) == 2 and not any(s.startswith("D=") for s in sets):
        sets = fit_sizes(spec, sets, flow, table)
    comp = load_ok(spec, sets, False, sized=True)
    name = pick_flow(comp, flow)
    module = compile_from(comp, name, seed=seed)
    for note in table.notes:
        click.echo(note)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"spec": comp.source.text, "flow": name, "sets": list(sets), "columns": table.columns, "seed": seed}
    options = Options(
        epochs=epochs, batch=batch, lr=lr, weight_decay=weight_decay, schedule=schedule, clip=clip, ema=ema,
        validation=validation, patience=patience, seed=seed, devices=devices, max_seconds=max_seconds, resume=resume,
        standardise=not no_standardise,
    )  # fmt: skip
    result = run(module, table, folder, options, meta)
    pictures(module, table, folder, result)
    click.echo(
        f"{out}: best validation {result.best_validation:.4f} nats at epoch {result.best_epoch} of {result.history[-1]['epoch']:.0f}"
        f" (stopped: {result.stopped})"
    )
    if result.stopped == "interrupted":
        click.echo(f"everything is kept; go on with `--resume -o {out}`")
        raise SystemExit(130)


def fit_sizes(spec: str, sets: tuple[str, ...], flow: str | None, table: Any) -> tuple[str, ...]:
    """When the flow leaves the size of its only data axis open, the data decides it."""
    from flowlang.api import analyse

    comp = analyse(spec)
    if not comp.ok or not comp.flows():
        return sets
    region = comp.regions.get(pick_flow(comp, flow))
    if region is None or not region.inputs or id(region) not in comp.elab.witnessed:
        return sets
    axes = region.graph[region.inputs[0]].tensor.axes
    return (*sets, f"{axes[0].name}={table.x.shape[1]}") if len(axes) == 1 else sets


def pictures(module: Any, table: Any, folder: Path, result: Any) -> None:
    """Learning curves and samples, where matplotlib is installed."""
    from flowlang.train.loop import load_trained
    from flowlang.train.plots import learning_curve, samples_plot

    try:
        learning_curve(result.history, folder / "curves.png")
    except FlowError:
        click.echo("no pictures: pip install 'flowlang[plots]'")
        return
    trained = load_trained(module, folder)
    n = min(len(table), 2000)
    context = {k: v[:n] for k, v in table.given.items()}
    samples_plot(table.x[:n], trained.sample(n, given=context or None), folder / "samples.png", table.columns)


def trained_flow(spec: str, sets: tuple[str, ...], flow: str | None, weights: str) -> Any:
    from flowlang.api import compile_from
    from flowlang.train.loop import load_trained
    from flowlang.train.store import read_tensors

    if not sets:
        file = Path(weights) / "model.safetensors" if Path(weights).is_dir() else Path(weights)
        sets = tuple(read_tensors(file)[1].get("sets", ()))
    comp = load_ok(spec, sets, False, sized=True)
    return load_trained(compile_from(comp, flow), weights)


weights_option = click.option(
    "-w",
    "--weights",
    default="run",
    show_default=True,
    type=click.Path(),
    help="A run's folder, or its model.safetensors.",
)


@click.command()
@click.argument("spec")
@set_option
@flow_option
@weights_option
@click.option("-n", "--count", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "-o", "--out", default="samples.npy", show_default=True, type=click.Path(dir_okay=False), help=".npy, .csv or .png"
)
@click.option("--given", "given", multiple=True, metavar="NAME=NUMBERS", help="A value of a context input.")
def sample(
    spec: str,
    sets: tuple[str, ...],
    flow: str | None,
    weights: str,
    count: int,
    seed: int,
    out: str,
    given: tuple[str, ...],
) -> None:
    """Draw samples from a trained flow."""
    if count < 1:
        raise FlowError(Diagnostic("FL0804", "--count is at least 1"))
    trained = trained_flow(spec, sets, flow, weights)
    context: dict[str, Any] = {}
    for name, numbers in parse_given(given).items():
        try:
            value = np.array([float(v) for v in numbers])
        except ValueError:
            raise click.UsageError(f"--given {name} takes numbers here") from None
        context[name] = np.broadcast_to(value, (count, *value.shape))
    drawn = trained.sample(count, seed, context or None)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        np.savetxt(
            path,
            drawn.reshape(count, -1),
            delimiter=",",
            header=",".join(f"x{k}" for k in range(drawn.reshape(count, -1).shape[1])),
            comments="",
        )
    elif path.suffix == ".png":
        from flowlang.train.plots import samples_plot

        samples_plot(drawn, drawn, path)
    else:
        np.save(path, drawn)
    click.echo(f"{out}: {count} samples of shape {tuple(drawn.shape[1:])}")


@click.command()
@click.argument("spec")
@set_option
@flow_option
@weights_option
@with_data
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write log p of each row (.npy or .csv).")
@json_option
def score(
    spec: str, sets: tuple[str, ...], flow: str | None, weights: str, data: str, columns: str | None, given: tuple[str, ...],
    onehot: str | None, dequantise: str | None, seed: int, out: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Log-density of each row under a trained flow."""
    trained = trained_flow(spec, sets, flow, weights)
    table = read(data, columns, given, onehot, dequantise, seed)
    if tuple(table.x.shape[1:]) != tuple(trained.flow.data_shape):
        raise FlowError(
            Diagnostic(
                "FL0802",
                f"a sample of the data has shape {tuple(table.x.shape[1:])}, and the flow's data {tuple(trained.flow.data_shape)}",
            )
        )
    found = trained.log_prob(table.x, table.given)
    if out is not None:
        (np.savetxt if out.endswith(".csv") else np.save)(out, found)
    facts = {
        "rows": len(found),
        "mean": float(found.mean()),
        "standard_error": float(found.std() / np.sqrt(len(found))),
    }
    click.echo(
        json.dumps(facts)
        if as_json
        else f"{len(found)} rows: mean log p {facts['mean']:.4f} ± {facts['standard_error']:.4f} nats"
    )
