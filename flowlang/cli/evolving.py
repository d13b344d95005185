"""evolve: the search for layers of normalisation and activation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import torch

from flowlang.api import analyse
from flowlang.cli.common import json_option, make_folder, read_source, seed_option, write_text
from flowlang.cli.tables import table
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.evolve.fitness import Trial
from flowlang.evolve.search import Plan, Search, State, report

DEFAULT = Plan()


@click.command()
@click.argument("spec", required=False)
@click.option(
    "-o", "--out", default="evolved", show_default=True, help="Folder for the report and the state of the search."
)
@click.option(
    "--anchors",
    default=",".join(DEFAULT.trial.anchors),
    show_default=True,
    help="Networks with a parameter `layer: net`.",
)
@click.option(
    "--population",
    type=click.IntRange(2),
    default=DEFAULT.population,
    show_default=True,
    help="Layers that live at a time.",
)
@click.option(
    "--generations",
    type=click.IntRange(0),
    default=DEFAULT.generations,
    show_default=True,
    help="Times as many children.",
)
@click.option(
    "--nodes", type=click.IntRange(1, 64), default=DEFAULT.nodes, show_default=True, help="Nodes of a layer's graph."
)
@click.option(
    "--tournament",
    type=click.IntRange(1),
    default=DEFAULT.tournament,
    show_default=True,
    help="Layers in a tournament.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=DEFAULT.trial.steps,
    show_default=True,
    help="Steps of training on each network.",
)
@click.option(
    "--quality",
    type=click.FloatRange(0, 1),
    default=DEFAULT.trial.quality,
    show_default=True,
    help="Accuracy below which a layer is rejected.",
)
@click.option(
    "--ascent",
    type=click.IntRange(0),
    default=DEFAULT.trial.ascent,
    show_default=True,
    help="Steps of ascent on the gradient's norm.",
)
@click.option("--resume", is_flag=True, help="Go on with the search in --out; --generations may be larger than before.")
@seed_option
@json_option
def evolve(
    spec: str | None, out: str, anchors: str, population: int, generations: int, nodes: int, tournament: int, steps: int,
    quality: float, ascent: int, resume: bool, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Search layers of normalisation and activation by evolution (Liu et al. 2020).

    Layers are random graphs, written in the language and judged by its checks, by a short training inside each anchor
    network and by gradient ascent. SPEC may hold other networks for --anchors. The best are printed as `.flow`.
    """
    extra = read_source(spec)[0].text if spec is not None else ""
    folder = Path(out)
    make_folder(folder)
    state_file = folder / "search.json"
    trial = Trial(anchors=tuple(a.strip() for a in anchors.split(",")), steps=steps, quality=quality, ascent=ascent)
    plan = Plan(population, generations, nodes, tournament, seed, trial)
    state = begin(state_file, plan, resume)
    check_anchors(trial.anchors, extra)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small to share a step among threads
    try:
        run(state, state_file, extra)
    except KeyboardInterrupt:
        click.echo(
            f"\ninterrupted after {state.trials} trials, which are kept; go on with `--resume -o {out}`", err=True
        )
        raise
    finally:
        torch.set_num_threads(threads)
    text = report(state)
    write_text(str(folder / "best.flow"), text)
    tell(state, folder, text, as_json)


def begin(path: Path, plan: Plan, resume: bool) -> State:
    """A new state, or the one that was left; a resumed search keeps its plan but for the number of generations."""
    if not resume:
        if path.exists():
            raise FlowError(
                Diagnostic(
                    "FL0804",
                    f"`{path}` holds a search already",
                    suggestion="go on with `--resume`, or choose another --out",
                )
            )
        return State(plan)
    if not path.exists():
        raise FlowError(
            Diagnostic("FL0804", f"there is no search in `{path.parent}`", suggestion="begin one without --resume")
        )
    try:
        state = State.load(path)
    except (ValueError, KeyError, TypeError) as e:
        raise FlowError(
            Diagnostic(
                "FL0804",
                f"`{path}` is no state of a search: {e}",
                suggestion="give the folder of an earlier `flowlang evolve`, or begin anew in another one",
            )
        ) from None
    state.plan = replace(state.plan, generations=plan.generations)
    return state


def check_anchors(anchors: tuple[str, ...], extra: str) -> None:
    """Each anchor must take a layer that works: its own diagnostics are told, not those of some layer."""
    layer = "norm candidate(x: R[C, H, W]) { relu(x) }\n"
    for anchor in anchors:
        comp = analyse(
            f"{extra}\n{layer}net classifier(x: R[C = 3, H = 8, W = 8]) -> R[K = 8] {{ {anchor}(candidate)(x) }}\n"
        )
        if not comp.ok:
            raise FlowError(comp.report.errors)


def run(state: State, path: Path, extra: str) -> None:
    from tqdm import tqdm

    total = state.plan.population + state.children
    done = (
        len(state.members) if not state.best else state.plan.population + state.plan.population * (len(state.best) - 1)
    )
    bar = tqdm(total=total, initial=min(done, total), disable=None, unit="layer", dynamic_ncols=True)
    begun = len(state.members)

    def told(s: State) -> None:
        nonlocal begun
        if s.best or len(s.members) > begun:
            bar.update()
        begun = max(begun, len(s.members))
        best = max((m.fitness for m in s.members), default=0.0)
        bar.set_postfix_str(f"trial {s.trials}, best {best:.3f}, rejected {sum(s.rejected.values())}")

    try:
        Search(state, lambda s: s.save(path), told, extra).run()
    except RuntimeError as e:
        raise FlowError(
            Diagnostic("FL0804", str(e), suggestion="as by --quality 0.2, --steps 100 or --ascent 0")
        ) from None
    finally:
        bar.close()


def tell(state: State, folder: Path, text: str, as_json: bool) -> None:
    facts = {
        "trials": state.trials, "rejected": state.rejected, "best": state.best, "report": str(folder / "best.flow"),
        "members": [{"fitness": m.fitness, "scores": m.scores, "trial": m.born} for m in state.members],
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(text)
    rows = [[str(k), f"{b:.3f}"] for k, b in enumerate(state.best)]
    click.echo(table(["generation", "best accuracy"], rows, numbers=(0, 1)))
    words = ", ".join(f"{n} {why}" for why, n in sorted(state.rejected.items()))
    click.echo(f"{state.trials} trials, rejected: {words or 'none'}; the best are in {folder / 'best.flow'}")
