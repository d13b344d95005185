"""train, sample, score: from a file of samples to weights, and from weights to samples and densities."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Container, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from flowlang.api import analyse, compile_from, compile_function, load, need_kind, pick_flow, save, source_of
from flowlang.cli.common import (
    flow_option,
    json_option,
    load_ok,
    make_folder,
    memory_option,
    parse_sets,
    seed_option,
    spec_options,
)
from flowlang.cli.tables import certified
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.train.data import Recipe, Table, read_table
from flowlang.train.loop import FREE, Options, Result, begun_with
from flowlang.train.loop import train as fit
from flowlang.train.loop import train_energy as fit_energy
from flowlang.train.problem import is_model

if TYPE_CHECKING:
    from flowlang.compiler import Compilation

DEFAULT = Options()
PATHS = 200  # ways in the picture that training leaves


def names_of(text: str | None) -> list[str]:
    return [n.strip() for n in text.split(",") if n.strip()] if text else []


def parse_given(pairs: Sequence[str], example: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for p in pairs:
        name, eq, values = p.partition("=")
        if not eq or not name.strip():
            raise click.UsageError(f"--given takes {example}, and this is {p!r}")
        out[name.strip()] = names_of(values)
    return out


def parse_steps(text: str | None) -> bool | dict[str, float]:
    """`all`, or columns, each perhaps with its step: `carat=0.01,price`."""
    if text == "all":
        return True
    out: dict[str, float] = {}
    for part in names_of(text):
        name, eq, step = part.partition("=")
        try:
            out[name] = float(step) if eq else 0.0
        except ValueError:
            raise click.UsageError(f"--dequantise takes NAME or NAME=STEP, and this is {part!r}") from None
        if eq and not 0 < out[name] < float("inf"):
            raise click.UsageError(f"the step of --dequantise {name} is above 0")
    return out


data_options = [
    click.option("--columns", help="Data columns, separated by commas; all that are not context by default."),
    click.option("--given", "given", multiple=True, metavar="NAME=COLUMNS", help="Columns of a context input."),
    click.option("--onehot", help="Context columns that hold categories."),
    click.option(
        "--dequantise", metavar="COLUMNS",
        help="Columns of rounded numbers or categories, NAME or NAME=STEP, or `all`: uniform noise of the step is added.",
    ),
]  # fmt: skip


def with_data(f: Any) -> Any:
    for option in reversed(data_options):
        f = option(f)
    return f


def read(data: str, chosen: dict[str, Any], seed: int, recipe: Recipe | None = None) -> Table:
    return read_table(
        data, columns=names_of(chosen["columns"]), given=parse_given(chosen["given"], "NAME=COLUMN,COLUMN"),
        onehot=names_of(chosen["onehot"]), dequantise=parse_steps(chosen["dequantise"]), recipe=recipe, seed=seed,
    )  # fmt: skip


def main_process() -> bool:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def say(text: str, *, err: bool = False) -> None:
    """Only one of several processes speaks."""
    if main_process():
        click.echo(text, err=err)


# ---- train --------------------------------------------------------------------------------------


@click.command()
@click.argument("spec")
@spec_options
@flow_option
@click.option("--data", type=click.Path(), help=".npy, .npz, .csv or .parquet")
@with_data
@click.option("--energy", metavar="NET", help="Fit exp(-NET(x)) instead of data; NET is a net of the spec.")
@click.option(
    "-o",
    "--out",
    default="run",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Folder for weights, curves, pictures.",
)
@click.option("--epochs", default=DEFAULT.epochs, show_default=True)
@click.option("--batch", default=DEFAULT.batch, show_default=True, help="Samples in a step, over all processes.")
@click.option("--steps", default=DEFAULT.steps, show_default=True, help="Steps in an epoch, with --energy.")
@click.option("--lr", default=DEFAULT.lr, show_default=True, help="Learning rate of AdamW.")
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), default=DEFAULT.schedule, show_default=True)
@click.option("--warmup", default=DEFAULT.warmup, show_default=True, help="Steps of linear growth before.")
@click.option("--weight-decay", default=DEFAULT.weight_decay, show_default=True)
@click.option(
    "--rule", "rules", multiple=True, metavar="'PATTERN: lr=X, weight_decay=Y'", callback=lambda _c, _p, v: "; ".join(v),
    help="Rules of parameters by their names, as '*.g: lr=1e-4'; the last that fits wins. `clip=X`: a unit's gradient is at "
         "most X times as long as its weights. `unit=K`: vectors along axis K have length 1. May be repeated.",
)  # fmt: skip
@click.option("--clip", default=DEFAULT.clip, show_default=True, help="Largest norm of the gradient; 0 for none.")
@click.option("--ema", default=DEFAULT.ema, show_default=True, help="Weight kept per step by an average; 0 for none.")
@click.option("--validation", default=DEFAULT.validation, show_default=True, help="Share of rows held out.")
@click.option(
    "--patience", default=DEFAULT.patience, show_default=True, help="Epochs without a better validation before the end."
)
@click.option("--max-seconds", default=DEFAULT.max_seconds, help="End after this time.")
@seed_option
@memory_option
@click.option("--devices", default=DEFAULT.devices, show_default=True, help="Processes; torchrun's own count wins.")
@click.option(
    "--accelerator", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default=DEFAULT.accelerator, show_default=True
)
@click.option(
    "--start",
    type=click.Path(),
    help="Begin with the weights of a run (or a file) that have the same names and shapes.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out, with its options.")
@click.option("--no-standardise", is_flag=True, help="Leave the data as it is.")
@click.pass_context
def train(ctx: click.Context, spec: str, sets: tuple[str, ...], flow: str | None, data: str | None, energy: str | None,
          out: str, start: str | None, resume: bool, no_standardise: bool, **rest: Any) -> None:  # fmt: skip
    """Train a flow on a file of samples, or on an energy.

    A model is trained by its program `loss`; its program `accuracy` (or `error`), of the same data, is reported beside it.

    Writes model.safetensors (the best weights, with spec and standardisation), last.safetensors (to resume),
    history.csv, curves.png and samples.png, and paths.png of a model that integrates. Ctrl-C keeps everything; --resume goes on as if nothing had happened.
    """
    chosen = {k: rest.pop(k) for k in ("columns", "given", "onehot", "dequantise")}
    if (data is None) == (energy is None):
        raise click.UsageError("give either --data FILE or --energy NET")
    folder = Path(out)
    source_of(spec)  # a spec that is not there is told before anything about the data
    options = options_of(ctx, folder, {**rest, "standardise": not no_standardise}, resume)
    table = read(data, chosen, options.seed) if data is not None else None
    comp, name = sized(spec, sets, flow, table)
    module = compile_from(comp, name, seed=options.seed, memory=options.memory)
    if start is not None and not resume:
        begin_with(module, Path(start))
    make_folder(folder)
    if table is not None:
        for note in table.notes:
            say(note)
        result = fit(module, table, folder, options, {"recipe": vars(table.recipe)})
    else:
        function = compile_function(comp, str(energy), name).requires_grad_(False)
        result = fit_energy(module, function, folder, options, {"energy": energy})
    if not result.main:
        return
    if energy is not None:
        report_energy(module, function, options.seed)
    pictures(module, table, folder, result)
    report(result, out, "KL - log Z" if energy is not None else "validation loss" if is_model(module) else "validation")


def begin_with(module: Any, path: Path) -> None:
    """The weights of an earlier run; what it lacks is told, but for averages and copies, which follow."""
    from flowlang.backends.torch.store import listed, load_alike, read_tensors

    file = path / "model.safetensors" if path.is_dir() else path
    left = load_alike(module, read_tensors(file)[0], str(file))
    names = [name for name, *_ in getattr(module, "followers", ())]
    own = [n for n in left if n != "_steps" and not any(n.startswith(f"{f}.") for f in names)]
    if own:
        say(f"not in {file}, and begun anew: {listed(own)}")


def options_of(ctx: click.Context, folder: Path, values: dict[str, Any], resume: bool) -> Options:
    """The options as given; on resume, those of the run where none are given anew."""
    if not resume:
        return Options(**values)
    from click.core import ParameterSource

    own = {f.name: f.name for f in fields(Options)} | {"standardise": "no_standardise"}
    anew = {
        k: v for k, v in values.items()
        if (ctx.get_parameter_source(own[k]) is ParameterSource.COMMANDLINE)
    }  # fmt: skip
    return begun_with(folder, anew)


def sized(spec: str, sets: tuple[str, ...], flow: str | None, table: Table | None) -> tuple[Compilation, str]:
    """The spec, its open size taken from the data."""
    if table is not None and table.x.ndim == 2:
        sets = fit_sizes(spec, sets, flow, table)
    comp = load_ok(spec, sets, False, sized=True)
    return comp, need_kind(comp, pick_flow(comp, flow), "data are fitted by the density or the loss", "flow", "model")


def fit_sizes(spec: str, sets: tuple[str, ...], flow: str | None, table: Table) -> tuple[str, ...]:
    """When the flow leaves the size of its only data axis open, the data decides it."""
    if spec == "-":
        return sets
    comp = analyse(spec, parse_sets(sets))
    if not comp.ok or not comp.flows() + comp.models():
        return sets
    region = comp.regions.get(pick_flow(comp, flow))
    if region is None or id(region) not in comp.elab.witnessed:
        return sets
    types = region.input_types() or [t for word, t in region.data.values() if word == "data"]
    axes = types[0].axes if types else ()
    if len(axes) != 1 or any(s.partition("=")[0].strip() == axes[0].name for s in sets):
        return sets
    return (*sets, f"{axes[0].name}={table.x.shape[1]}")


def report(result: Result, out: str, what: str) -> None:
    unit = "" if what.endswith("loss") else " nats"
    click.echo(
        f"{out}: best {what} {result.best_validation:.4f}{unit} at epoch {result.best_epoch} of"
        f" {result.history[-1]['epoch']:.0f} (stopped: {result.stopped})"
    )
    at = next(h for h in result.history if h["epoch"] == result.best_epoch)
    for name, value in at.items():
        if name not in ("epoch", "train", "validation"):
            click.echo(f"{name} on the held-out rows then: {value:.4f}")
    if result.certificate:
        click.echo(certified(result.certificate))
    if result.skipped:
        click.echo(f"{result.skipped} batches were left out: their loss or gradient was not finite", err=True)
    if result.stopped == "interrupted":
        click.echo(f"everything is kept; go on with `--resume -o {out}`")
        raise SystemExit(130)


def report_energy(module: Any, function: Any, seed: int) -> None:
    from flowlang.train.problem import importance

    found = importance(module, function, seed=seed)
    click.echo(
        f"log Z: at least {found['elbo']:.4f}, by importance sampling {found['log_z']:.4f};"
        f" effective samples {100 * found['effective']:.1f} %"
    )


def pictures(module: Any, table: Table | None, folder: Path, result: Result) -> None:
    """Learning curves and samples, where matplotlib is installed."""
    from flowlang.plots import learning_curve, samples_plot

    try:
        model = is_model(module)
        learning_curve(result.history, folder / "curves.png", "" if model else "nats for each sample")
        trained = load(folder)
        most = 64 if len(module.data_shape) > 1 else 2000  # images take long, and few are shown
        n = most if table is None else min(len(table), most)
        context = {} if table is None else {k: v[:n] for k, v in table.given.items()}
        if model and not set(module.programs.get("sample", ("",))) <= set(context):
            return  # no program `sample`, or one that needs more than there is
        drawn = draw_samples(trained, n, 0, context)
        columns = table.columns if table else ()
        samples_plot(None if table is None else table.x[:n], drawn, folder / "samples.png", columns)
        ways_picture(trained, folder, context, columns)
    except FlowError as e:
        if e.diagnostics[0].code != "FL0805":
            raise
        click.echo("no pictures: pip install 'flowlang[plots]'", err=True)


def ways_picture(module: Any, folder: Path, context: dict[str, Any], columns: Sequence[str]) -> None:
    """Where the samples of a model come from, if its `sample` integrates."""
    from flowlang.draw.paths import FRAMES, followed, plot

    if not is_model(module) or "sample" not in module.programs:
        return
    n = FRAMES if len(module.data_shape) > 1 else PATHS
    try:
        found = followed(module, lambda: draw_samples(module, n, 0, {k: v[:n] for k, v in context.items()}))
    except FlowError as e:
        if e.diagnostics[0].code != "FL0804":  # which says that nothing is integrated
            raise
        return
    plot(*found, folder / "paths.png", columns)


# ---- what is trained ----------------------------------------------------------------------------


def weights_file(weights: str) -> Path:
    path = Path(weights)
    return path / "model.safetensors" if path.is_dir() else path


def trained_flow(spec: str | None, sets: tuple[str, ...], weights: str) -> tuple[Any, dict[str, Any]]:
    """The flow with its weights, in the data's units; and what the file says beside them."""
    from flowlang.backends.torch.store import read_tensors

    if spec is not None and (Path(spec) / "model.safetensors").is_file():
        weights, spec = spec, None  # a run's folder in the place of its spec
    file = weights_file(weights)
    meta = read_tensors(file)[1]
    return load(file, spec, **parse_sets(sets)).eval(), meta


def generative(spec: str | None, sets: tuple[str, ...], weights: str) -> tuple[Any, dict[str, Any]]:
    """As `trained_flow`; FL0804 for a network, which has no samples or densities."""
    flow, meta = trained_flow(spec, sets, weights)
    if not hasattr(flow, "data_shape"):
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"`{weights}` holds the weights of a network, and samples and densities are of a flow or a model",
                suggestion="run the network from Python, as in `fl.load(file)(x)`",
            )
        )
    return flow, meta


def draw_samples(flow: Any, n: int, seed: int, given: dict[str, Any], program: str = "sample") -> Any:
    """Samples as a float64 array; with context rows, one for each."""
    import torch

    context = {k: torch.as_tensor(np.asarray(v)).to(flow.like.dtype) for k, v in given.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        if is_model(flow):
            with torch.no_grad():
                found = run_program(flow, program, n, context, generator)
        else:
            need_given("sample", flow.given_shapes, context)
            found = flow.sample((n,), generator=generator, **context)
    return found.double().numpy()


def need_program(flow: Any, name: str) -> dict[str, tuple[int, ...]]:
    """The inputs of a model's program (FL0804)."""
    if name not in flow.programs:
        raise FlowError(
            Diagnostic("FL0804", f"this model has no program `{name}`",
                       suggestion=f"choose one by --program; it has {', '.join(f'`{p}`' for p in flow.programs)}")
        )  # fmt: skip
    inputs: dict[str, tuple[int, ...]] = flow.programs[name]
    return inputs


def need_given(program: str, inputs: Iterable[str], values: Container[str]) -> None:
    """FL0804 for an input that has no value."""
    for wanted in inputs:
        if wanted not in values:
            raise FlowError(
                Diagnostic(
                    "FL0804",
                    f"`{program}` takes `{wanted}`, which is not given",
                    suggestion=f"as in `--given {wanted}=..`",
                )
            )


def run_program(flow: Any, name: str, n: int, values: dict[str, Any], generator: Any) -> Any:
    """The (first) result of a model's program at values by name, or n draws of one that takes none."""
    inputs = need_program(flow, name)
    need_given(name, inputs, values)
    found = flow.run(name, tuple(values[k] for k in inputs), (n,), generator)
    return found[0] if isinstance(found, tuple) else found


def densities(flow: Any, table: Table, seed: int = 0, batch: int = 8192, program: str = "log_prob") -> Any:
    """Values of `log_prob`, or of another program of a model, for each row; what a program averages, for each batch."""
    import torch

    x = torch.as_tensor(table.x).to(flow.like.dtype)
    given = {k: torch.as_tensor(v).to(flow.like.dtype) for k, v in table.given.items()}
    parts = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for k in range(0, len(x), batch):
            part, context = x[k : k + batch], {n: v[k : k + batch] for n, v in given.items()}
            if is_model(flow):
                found = run_program(flow, program, len(part), {flow.data_name: part, **context}, None)
                parts.append(found if found.dim() else found.expand(len(part)))
            else:
                parts.append(flow.log_prob(part, **context))
    return torch.cat(parts).double().numpy()


spec_argument = click.argument("spec", required=False)
weights_option = click.option(
    "-w", "--weights", default="run", show_default=True, type=click.Path(),
    help="A run's folder, or a file that it or `fl.save` wrote.",
)  # fmt: skip


@click.command()
@spec_argument
@spec_options
@weights_option
@click.option("-n", "--count", default=1000, show_default=True)
@seed_option
@click.option(
    "-o", "--out", default="samples.npy", show_default=True, type=click.Path(dir_okay=False), help=".npy, .csv or .png"
)
@click.option(
    "--given",
    "given",
    multiple=True,
    metavar="NAME=NUMBERS",
    help="A value of a context input, the same for all samples; several values are taken in turn, sample after sample.",
)
@click.option("--raw", is_flag=True, help="Leave dequantised columns as they are, instead of rounding to their steps.")
@click.option(
    "--program", default="sample", show_default=True, metavar="NAME", help="Which program of a model draws them."
)
@click.option(
    "--paths",
    is_flag=True,
    help="The ways from noise instead: the values after each step of the solver, as a picture (.png) or numbers.",
)
def sample(
    spec: str | None, sets: tuple[str, ...], weights: str, count: int, seed: int, out: str, given: tuple[str, ...], raw: bool,
    program: str, paths: bool,
) -> None:  # fmt: skip
    """Draw samples from a trained flow (of its own spec, if none is named)."""
    if count < 1:
        raise FlowError(Diagnostic("FL0804", "--count is at least 1", suggestion="as in `--count 1000`"))
    from flowlang.train.problem import one_value

    flow, meta = generative(spec, sets, weights)
    one_value(flow)
    context, turns = {}, 0
    for name, numbers in parse_given(given, "NAME=NUMBER,NUMBER").items():
        try:
            value = np.array([float(v) for v in numbers])
        except ValueError:
            raise click.UsageError(f"--given {name} takes numbers here") from None
        shape = {**flow.given_shapes, **getattr(flow, "programs", {}).get(program, {})}.get(name)
        size = value.size if shape is None else int(np.prod(shape))
        rows = value[None] if shape is None or not value.size or value.size % size else value.reshape(-1, *shape)
        turns = max(turns, len(rows))
        context[name] = np.resize(rows, (count, *rows.shape[1:]))  # over and over
    flow.check_inverse = True
    recipe = Recipe.from_dict(meta["recipe"]) if "recipe" in meta else Recipe()
    if paths:
        from flowlang.draw.paths import followed

        times, values = followed(flow, lambda: draw_samples(flow, count, seed, context, program))
        write_paths(Path(out), times, values, recipe)
        click.echo(f"{out}: {count} ways of {values.shape[1] - 1} steps")
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        drawn = draw_samples(flow, count, seed, context, program)
    for w in told:
        click.echo(f"note: {w.message}", err=True)
    write_samples(Path(out), drawn, recipe, raw, turns if turns > 1 else 0)
    click.echo(f"{out}: {count} samples of shape {tuple(drawn.shape[1:])}")


def write_paths(path: Path, times: Any, values: Any, recipe: Recipe) -> None:
    """A picture; or numbers: [n, steps + 1, ..] as .npy, a row for each sample and time as .csv."""
    if path.suffix == ".png":
        from flowlang.draw.paths import plot

        make_folder(path.parent)
        plot(times, values, path, recipe.columns)
    elif path.suffix == ".csv":
        flat = values.reshape(*values.shape[:2], -1)
        names = recipe.columns if len(recipe.columns) == flat.shape[2] else [f"x{k}" for k in range(flat.shape[2])]
        which = np.broadcast_to(np.arange(len(flat))[:, None], times.shape)
        rows = np.concatenate([which[..., None], times[..., None], flat], -1)
        write_samples(path, rows.reshape(-1, rows.shape[-1]), Recipe(("sample", "t", *names)), True)
    else:
        write_samples(path, values, Recipe(), True)


def write_samples(path: Path, drawn: Any, recipe: Recipe, raw: bool, across: int = 0) -> None:
    import csv
    import io

    from flowlang.files import replace_file

    if path.suffix == ".png":
        from flowlang.plots import samples_plot

        make_folder(path.parent)
        samples_plot(None, drawn, path, recipe.columns, across)
        return
    if path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        flat = drawn.reshape(len(drawn), -1)
        named = len(recipe.columns) == flat.shape[1] and drawn.ndim == 2
        writer.writerow(recipe.columns if named else [f"x{k}" for k in range(flat.shape[1])])
        writer.writerows(zip(*printed(flat, recipe if named and not raw else Recipe()), strict=True))
        replace_file(path, text.getvalue().encode())
        return
    blob = io.BytesIO()
    np.save(blob, drawn)
    replace_file(path, blob.getvalue())


def printed(x: Any, recipe: Recipe) -> list[list[Any]]:
    """Columns as the training file had them: categories by name, dequantised numbers on their grid."""
    out: list[list[Any]] = []
    for k in range(x.shape[1]):
        name = recipe.columns[k] if k < len(recipe.columns) else ""
        if name in recipe.categories:
            kinds = recipe.categories[name]
            out.append([kinds[int(c)] for c in np.clip(np.round(x[:, k]), 0, len(kinds) - 1)])
        elif name in recipe.steps:
            step = recipe.steps[name]
            out.append([float(f"{v:.12g}") for v in np.round(x[:, k] / step) * step])
        else:
            out.append([float(f"{v:.9g}") for v in x[:, k]])
    return out


@click.command()
@spec_argument
@spec_options
@weights_option
@click.option("--data", required=True, type=click.Path(), help=".npy, .npz, .csv or .parquet")
@with_data
@seed_option
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write log p of each row (.npy or .csv).")
@click.option(
    "--program",
    default="log_prob",
    show_default=True,
    metavar="NAME",
    help="What to evaluate, of a model: any program of its data.",
)
@click.option(
    "--draws",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Average over N draws where the density is an estimate or a bound, and say how far that mean may be off.",
)
@json_option
def score(
    spec: str | None, sets: tuple[str, ...], weights: str, data: str, seed: int, out: str | None, program: str, draws: int, as_json: bool,
    **chosen: Any,
) -> None:  # fmt: skip
    """Log-density of each row under a trained flow or model, in the units of the data.

    Columns, categories and steps are those of the training, unless they are chosen anew. Of a model, `--program`
    takes another of its programs, as `accuracy`.
    """
    from flowlang.train.problem import check_shapes, scalars

    flow, meta = generative(spec, sets, weights)
    recipe = Recipe.from_dict(meta["recipe"]) if "recipe" in meta else None
    table = scalars(flow, read(data, chosen, seed, recipe))
    check_shapes(flow, table)
    runs = np.stack([densities(flow, table, seed + k, program=program) for k in range(draws)])
    found = runs.mean(0)
    if out is not None:
        write_samples(Path(out), found[:, None] if out.endswith(".csv") else found, Recipe((program,)), True)
    averaged = program.startswith("loss") or program.endswith("_loss")  # one number for each batch, not each row
    error = float(found.std() / np.sqrt(len(found)))
    facts = {"rows": len(found), "mean": float(found.mean())} | ({} if averaged else {"standard_error": error})
    exactness = flow.exactness.get(program, "exact") if is_model(flow) else flow.exactness
    facts |= {"exactness": exactness}
    said = "" if exactness == "exact" else f" ({exactness})"
    drawn = ""
    if draws > 1:  # the spread of the whole run's mean over draws, and that of a row
        facts["draw_error"] = float(runs.mean(1).std(ddof=1) / np.sqrt(draws))
        facts["draw_deviation"] = float(np.sqrt(runs.var(0, ddof=1).mean()))
        drawn = (
            f"; {draws} draws: the mean ± {facts['draw_error']:.4f}, one draw of a row ± {facts['draw_deviation']:.4f}"
        )
    click.echo(
        json.dumps(facts)
        if as_json
        else f"{len(found)} rows: mean log p {facts['mean']:.4f} ± {error:.4f} nats{said}{drawn}"
        if program == "log_prob"
        else f"{len(found)} rows: mean {program} {facts['mean']:.4f}" + ("" if averaged else f" ± {error:.4f}") + drawn
    )


__all__ = ["FREE", "sample", "save", "score", "train"]
