"""Training on Lightning Fabric: one process or several, exact resume, nothing lost.

Every batch and every random draw depends only on the seed, the epoch, the number of the batch and the process. So
the state of a run is its weights, the optimizer's moments and two counters, and a run that was interrupted anywhere
goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowlang.api import certificate
from flowlang.backends.torch.store import load_state, read_tensors, write_tensors
from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.files import replace_file
from flowlang.train.problem import Likelihood, Problem, Variational, one_value, seed_of
from flowlang.train.units import clip_units, keep_units

if TYPE_CHECKING:
    from flowlang.backends.torch.runtime import Flow
    from flowlang.train.data import Table

SKIPS = 5  # batches in a row whose loss may be not finite
PAUSE = 5.0  # seconds between checkpoints


@dataclass(frozen=True)
class Options:
    """How to train.

    epochs, batch    passes over the data; samples in a step, over all processes
    lr, schedule     learning rate, `cosine` (down to 0) or `constant`, after `warmup` steps of linear growth
    weight_decay     of AdamW
    rules            of parameters by their names, as `*.g: lr=1e-4, weight_decay=0; d.*: lr=2e-3`, the last that fits wins;
                     with rules, `weight_decay` is for weights of two axes or more; `clip` bounds a unit's gradient by
                     its weights, `unit` keeps vectors along an axis at length 1 (train/units.py)
    clip             bound of the gradient's norm; 0 for none
    ema              weight kept per step by the average that is validated and saved; 0 for none
    validation       fraction held out; `patience` epochs without a better value end the run
    seed             of the split, the order, and every draw
    standardise      data to mean 0 and deviation 1; kept with the model
    max_seconds      ends the run early; 0 for no limit
    steps            batches in an epoch, where an energy and not data is fitted
    devices          processes; torchrun's own setting wins
    memory           how the flow was compiled, `plain` or `reversible`; kept for a resumed run
    """

    epochs: int = 100
    batch: int = 512
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    rules: str = ""
    clip: float = 5.0
    ema: float = 0.0
    validation: float = 0.1
    patience: int = 20
    seed: int = 0
    standardise: bool = True
    max_seconds: float = 0.0
    steps: int = 100
    devices: int = 1
    accelerator: str = "auto"
    memory: str = "plain"
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        problems = {
            "--epochs, --batch, --steps, --patience and --devices are at least 1": min(
                self.epochs, self.batch, self.steps, self.patience, self.devices) < 1,
            "--lr is above 0": not 0 < self.lr < math.inf,
            "--validation lies between 0 and 1": not 0 < self.validation < 1,
            "--ema lies in [0, 1)": not 0 <= self.ema < 1,
            "--clip, --weight-decay, --warmup and --max-seconds are at least 0": not min(
                self.clip, self.weight_decay, self.warmup, self.max_seconds) >= 0,
            "--seed is at least 0": self.seed < 0,
            "--schedule is `cosine` or `constant`": self.schedule not in ("cosine", "constant"),
        }  # fmt: skip
        rules_of(self.rules)
        for words, wrong in problems.items():
            if wrong:
                raise FlowError(Diagnostic("FL0804", words, suggestion="see `flowlang train --help`"))


RULES = ("lr", "weight_decay", "clip", "unit")


def rules_of(text: str) -> dict[str, dict[str, float]]:
    """Options of an optimizer by patterns of parameters' names."""
    found: dict[str, dict[str, float]] = {}
    for rule in filter(None, (r.strip() for r in text.split(";"))):
        pattern, _, said = rule.partition(":")
        options: dict[str, float] = {}
        for part in said.split(","):
            name, _, value = (p.strip() for p in part.partition("="))
            try:
                options[name] = float(value)
            except ValueError:
                options[name] = math.nan
        if not pattern.strip() or any(
            k not in RULES or not 0 <= v < math.inf or (k == "unit" and v != int(v)) for k, v in options.items()
        ):
            raise FlowError(
                Diagnostic(
                    "FL0804", f"`{rule}` is no rule for parameters",
                    suggestion="as in `--rule '*.g: lr=1e-4, weight_decay=0'`: a pattern of names, and `lr`, `weight_decay`, `clip` or `unit`",
                )
            )  # fmt: skip
        found[pattern.strip()] = options
    return found


# On resume these may differ from those that the run was begun with.
FREE = {"epochs", "patience", "max_seconds", "devices", "accelerator", "resume", "progress"}


@dataclass
class Result:
    """What came of it; nats for each sample, in the units of the data (of a model: its loss)."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_validation: float = math.inf
    best_epoch: int = 0
    stopped: str = "epochs"
    skipped: int = 0
    main: bool = True  # this process reports
    certificate: dict[str, Any] = field(default_factory=dict)  # what is proved of the weights that are kept


def need_fabric() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lightning_fabric import Fabric
    except ImportError:
        raise FlowError(
            Diagnostic("FL0805", "training needs lightning-fabric", suggestion="pip install 'flowlang[train]'")
        ) from None
    return Fabric


def make_fabric(o: Options) -> Any:
    """One process, several that Fabric starts, or those that torchrun has started."""
    cls = need_fabric()
    world = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    devices, nodes = (local, max(world // local, 1)) if world > 1 else (o.devices, 1)
    several = devices * nodes > 1
    # Some parameters of a spec may serve other programs than the loss.
    strategy = "ddp_find_unused_parameters_true" if several else "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fabric = cls(accelerator=o.accelerator, devices=devices, num_nodes=nodes, strategy=strategy)
            if several:
                torch.set_num_threads(max((os.cpu_count() or 1) // devices, 1))
                fabric.launch()
        except (ValueError, RuntimeError) as e:
            message = str(e).splitlines()[0]
            raise FlowError(
                Diagnostic("FL0804", f"training cannot start on these devices: {message}", suggestion="try --accelerator cpu --devices 1")
            ) from None  # fmt: skip
    return fabric


def train(
    flow: Flow, table: Table, out: str | Path, options: Options | None = None, meta: dict[str, Any] | None = None
) -> Result:
    """Fits a flow to a table by maximum likelihood, or a model by its program `loss`.

    Writes to `out`: `model.safetensors` (best validation), `last.safetensors` (everything to go on from) and
    `history.csv`; leaves the best weights in `flow`.
    """
    o = options or Options()
    problem = Likelihood(
        flow, table, batch=o.batch, validation=o.validation, seed=o.seed, standardise=o.standardise
    )  # fmt: skip
    return run(flow, problem, out, o, meta)


def train_energy(
    flow: Flow, energy: Callable[[Tensor], Tensor], out: str | Path, options: Options | None = None, meta: dict[str, Any] | None = None
) -> Result:  # fmt: skip
    """Fits a flow to the density proportional to exp(-energy(x)), by reverse KL on samples of the flow.

    `energy` takes [n, *data] and returns [n], differentiably. The reported loss is KL - log Z: minus the evidence
    bound. Files are as for `train`.
    """
    one_value(flow)
    o = options or Options()
    return run(flow, Variational(flow, energy, batch=o.batch, batches=o.steps, seed=o.seed), out, o, meta)


def run(flow: Flow, problem: Problem, out: str | Path, o: Options, meta: dict[str, Any] | None) -> Result:
    if not any(p.requires_grad for p in flow.parameters()):
        raise FlowError(
            Diagnostic(
                "FL0804",
                "this flow has no parameters to train",
                suggestion="score and sample with it as it is: `flowlang score`, `flowlang sample`",
            )
        )
    with torch.random.fork_rng(devices=[]):
        fabric = make_fabric(o)
        return Trainer(
            fabric, flow, problem, Path(out), o, {**(getattr(flow, "origin", None) or {}), **(meta or {})}
        ).run()


class Interrupts:
    """Ctrl-C and termination become a wish, granted between two steps; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, _frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def heard(self) -> Iterator[Interrupts]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def named_groups(flow: Any, o: Options) -> list[dict[str, Any]]:
    """Parameters in groups by the rules; a rate is kept as its share of the run's, which the schedule moves."""
    groups: list[dict[str, Any]] = flow.parameter_groups(rules_of(o.rules), weight_decay=o.weight_decay)
    for group in groups:
        least = min(p.dim() for p in group["params"])
        if group.get("unit", 0) >= max(least, 1) or ("unit" in group and not least):
            raise FlowError(
                Diagnostic(
                    "FL0804", f"`unit={group['unit']:g}` is no axis of a parameter of {least} axes",
                    suggestion="axes count from 0; name weights alone, as in `--rule '*_weight: unit=1'`",
                )
            )  # fmt: skip
    return [{**g, "share": g.get("lr", o.lr) / o.lr} for g in groups]


class Trainer:
    """One training run in one process."""

    def __init__(self, fabric: Any, flow: Flow, problem: Problem, out: Path, o: Options, meta: dict[str, Any]):
        self.fabric, self.flow, self.problem, self.o, self.out = fabric, flow, problem, o, out
        self.fixed = {**meta, **problem.meta(), "data": problem.fingerprint(), "options": asdict(o)}
        self.rank, self.world = int(fabric.global_rank), int(fabric.world_size)
        groups = named_groups(flow, o) if o.rules else flow.parameters()
        self.module, self.optimizer = fabric.setup(
            problem.module, torch.optim.AdamW(groups, lr=o.lr, weight_decay=o.weight_decay)
        )
        keep_units(self.optimizer.param_groups)
        self.average = self.weights() if o.ema > 0 else {}
        self.best = self.weights()
        self.result = Result(main=self.rank == 0)
        self.epoch, self.step = 0, 0
        self.total, self.count = 0.0, 0
        self.row, self.halved = 0, False  # batches skipped in a row; whether the rate was halved for that
        self.saved = -math.inf

    def weights(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.flow.state_dict().items()}

    # ---- the run --------------------------------------------------------------------------------

    def run(self) -> Result:
        o = self.o
        if self.result.main:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise FlowError(
                    Diagnostic(
                        "FL0801",
                        f"`{self.out}` cannot be made: {e.strerror or e}",
                        suggestion="choose a folder that can be written, with `-o`",
                    )
                ) from None
        if o.resume:
            self.restore()
        elif hasattr(self.flow, "begin"):
            self.flow.begin()
            self.best = self.weights()
        until = time.monotonic() + o.max_seconds if o.max_seconds else math.inf
        bar = Bar(
            o, self.problem.unit, self.problem.batches, self.result.main, self.epoch * self.problem.batches + self.step
        )
        with Interrupts().heard() as interrupts, bar:
            if not self.result.history:
                self.validate(math.nan)
                self.checkpoint()
            while self.epoch < o.epochs and self.result.stopped != "patience":
                stop = self.one_epoch(interrupts, until, bar)
                if stop:
                    self.result.stopped = stop
                    break
                self.end_epoch(bar)
            # A run that ends for want of time keeps what it has reached, as at the end of an epoch.
            if self.result.stopped == "time" and self.step:
                self.end_epoch(bar)
                self.result.stopped = "time"
            self.checkpoint(always=True)
        self.flow.load_state_dict(self.best)
        self.result.certificate = certificate(self.flow)
        self.best = self.weights()
        self.write_best()
        return self.result

    def one_epoch(self, interrupts: Interrupts, until: float, bar: Bar) -> str:
        """Steps to the end of the epoch; else why they ended before."""
        self.flow.train()
        while self.step < self.problem.batches:
            self.one_step(interrupts.asked, time.monotonic() > until)
            bar.step()
            if self.asked:
                return "interrupted"
            if self.late and self.step < self.problem.batches:
                return "time"
        return ""

    def one_step(self, asked: bool, late: bool) -> None:
        o = self.o
        torch.manual_seed(seed_of(o.seed, self.epoch, self.step, self.rank, 1))
        arguments, weight, words = self.problem.batch(self.epoch, self.step, self.rank, self.world)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.epoch * self.problem.batches + self.step) * group.get("share", 1.0)
        loss = self.module(*(self.moved(a) for a in arguments)).mean()
        self.optimizer.zero_grad()
        self.fabric.backward(loss * weight)
        clip_units(self.optimizer.param_groups)
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), o.clip if o.clip > 0 else math.inf)
        # One exchange tells every process what all of them saw, so that they take the same turn.
        said = torch.tensor(
            [float(loss.detach()) * weight, float(norm), float(asked), float(late)], dtype=torch.float64
        )
        if self.world > 1:
            said = self.fabric.all_reduce(said, reduce_op="sum")
            said[0] /= self.world
        value, size = float(said[0]), float(said[1])
        self.asked, self.late = bool(said[2]), bool(said[3])
        if math.isfinite(value) and math.isfinite(size):
            self.optimizer.step()
            keep_units(self.optimizer.param_groups)
            self.followed()
            self.row = 0
            self.total += value
            self.count += 1
            if o.ema > 0:
                self.follow()
        else:
            self.skip(words)
        self.step += 1

    asked = late = False

    def moved(self, argument: Any) -> Any:
        return self.fabric.to_device(argument) if isinstance(argument, Tensor | dict) else argument

    def followed(self) -> None:
        """A model's own averages and copies of its networks."""
        if hasattr(self.flow, "follow"):
            self.flow.follow()

    @torch.no_grad()
    def follow(self) -> None:
        for name, v in self.flow.state_dict().items():
            kept = self.average[name]
            kept.lerp_(v, 1 - self.o.ema) if v.is_floating_point() else kept.copy_(v)

    def lr(self, step: int) -> float:
        base = self.o.lr * (0.5 if self.halved else 1.0)
        if step < self.o.warmup:
            return base * (step + 1) / self.o.warmup
        if self.o.schedule == "cosine":
            whole = self.o.epochs * self.problem.batches - self.o.warmup
            return base * 0.5 * (1 + math.cos(math.pi * min((step - self.o.warmup) / max(whole, 1), 1.0)))
        return base

    def skip(self, words: str) -> None:
        """A batch whose loss or gradient is not finite changes nothing. Too many in a row: once more, slower; then the end."""
        self.row += 1
        self.result.skipped += 1
        if self.row <= SKIPS:
            return
        if not self.halved and self.result.best_epoch > 0:
            self.flow.load_state_dict(self.best)
            self.optimizer.state.clear()
            self.halved, self.row = True, 0
            return
        self.flow.load_state_dict(self.best)
        self.write_best()
        raise FlowError(
            Diagnostic(
                "FL0806",
                f"the loss was not finite for {self.row} batches in a row, the last of them batch {self.step + 1} of epoch {self.epoch + 1}",
                notes=(words, f"the best weights (epoch {self.result.best_epoch}) are kept in `{self.out / 'model.safetensors'}`"),
                suggestion="lower --lr, bound the scales of the spec, or look at those rows for outliers",
            )
        )  # fmt: skip

    def end_epoch(self, bar: Bar) -> None:
        mean = self.total / self.count + self.problem.offset if self.count else math.nan
        self.epoch, self.step = self.epoch + 1, 0
        self.total, self.count = 0.0, 0
        self.validate(mean)
        if self.epoch - self.result.best_epoch >= self.o.patience:
            self.result.stopped = "patience"
        self.checkpoint()
        bar.say(self.result.history[-1])

    def validate(self, mean: float) -> None:
        """The held-out loss of the weights, or of their average; the best are kept."""
        state = None
        if self.o.ema > 0 and self.epoch > 0:
            state = self.weights()
            self.flow.load_state_dict(self.average)
            self.flow.settle()
        self.flow.eval()
        torch.manual_seed(seed_of(self.o.seed, 2))
        value = self.problem.validate(self.moved)
        if value < self.result.best_validation:
            self.result.best_validation, self.result.best_epoch = value, self.epoch
            self.best = self.weights()
        more = self.problem.metrics(self.moved)
        if state is not None:
            self.flow.load_state_dict(state)
        self.result.history.append({"epoch": self.epoch, "train": mean, "validation": value, **more})

    # ---- what is kept ---------------------------------------------------------------------------

    def write_best(self) -> None:
        if self.result.main:
            proved = self.result.certificate
            meta = {**self.fixed, "certificate": proved} if proved else self.fixed
            write_tensors(self.out / "model.safetensors", self.best, meta)

    def checkpoint(self, always: bool = False) -> None:
        """Everything that the rest of the run depends on, in one file that replaces the last one whole."""
        if not self.result.main or (not always and time.monotonic() - self.saved < PAUSE):
            return
        tensors = {f"model.{k}": v for k, v in self.flow.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            for name, v in slots.items():
                tensors[f"optimizer.{i}.{name}"] = v if isinstance(v, Tensor) else torch.tensor(v)
        r = self.result
        progress = {
            "epoch": self.epoch, "step": self.step, "total": self.total, "count": self.count, "row": self.row,
            "halved": self.halved, "history": r.history, "best_validation": r.best_validation,
            "best_epoch": r.best_epoch, "stopped": r.stopped, "skipped": r.skipped,
        }  # fmt: skip
        write_tensors(self.out / "last.safetensors", tensors, {**self.fixed, "progress": progress})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(
            text, list(r.history[-1]) if r.history else ["epoch", "train", "validation"], restval=""
        )
        writer.writeheader()
        writer.writerows(r.history)
        replace_file(self.out / "history.csv", text.getvalue().encode())
        self.saved = time.monotonic()

    def restore(self) -> None:
        tensors, meta = read_checkpoint(self.out)
        self.check_same(meta)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}

        path = str(self.out / "last.safetensors")
        load_state(self.flow, part("best"), path)
        self.best = self.weights()
        if self.o.ema > 0:
            load_state(self.flow, part("average"), path)
            self.average = self.weights()
        load_state(self.flow, part("model"), path)
        slots: dict[int, dict[str, Any]] = {}
        for k, v in part("optimizer").items():
            i, name = k.split(".", 1)
            slots.setdefault(int(i), {})[name] = v
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        kept = meta["progress"]
        for name in ("epoch", "step", "total", "count", "row", "halved"):
            setattr(self, name, kept[name])
        for name in ("history", "best_validation", "best_epoch", "skipped"):
            setattr(self.result, name, kept[name])
        if self.epoch - self.result.best_epoch >= self.o.patience:
            self.result.stopped = "patience"

    def check_same(self, meta: dict[str, Any]) -> None:
        """A resumed run has the data and the options that it was begun with."""
        if meta["data"] != self.fixed["data"]:
            raise FlowError(
                Diagnostic("FL0803", f"the run in `{self.out}` was begun with other data", suggestion="give the same file and columns, or start without --resume")
            )  # fmt: skip
        begun, now = meta["options"], asdict(self.o)
        for name in sorted(set(begun) & set(now) - FREE):
            if begun[name] != now[name]:
                flag = "--" + name.replace("_", "-")
                raise FlowError(
                    Diagnostic("FL0803", f"the run in `{self.out}` was begun with {flag} {begun[name]}, and now it is {now[name]}",
                               suggestion="go on with the same options, or start without --resume")
                )  # fmt: skip


def read_checkpoint(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = out / "last.safetensors"
    if not path.is_file():
        raise FlowError(
            Diagnostic("FL0803", f"there is nothing to resume in `{out}`", suggestion="start without --resume")
        )
    tensors, meta = read_tensors(path)
    if "progress" not in meta or "options" not in meta:
        raise FlowError(
            Diagnostic(
                "FL0803",
                f"`{path}` is no checkpoint of a run",
                suggestion="give the folder of an earlier `flowlang train`",
            )
        )
    return tensors, meta


def begun_with(out: Path, given: dict[str, Any]) -> Options:
    """The options of the run in a folder, where none are given anew."""
    known = {f.name for f in fields(Options)}
    kept = {k: v for k, v in read_checkpoint(out)[1]["options"].items() if k in known}
    return replace(Options(**kept), **given, resume=True)


class Bar:
    """Progress on a terminal, batch by batch; quiet elsewhere."""

    def __init__(self, o: Options, unit: str, batches: int, main: bool, done: int):
        self.shown: Any = None
        self.unit = f" {unit}" if unit else ""
        if not (o.progress and main):
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.shown = tqdm(total=o.epochs * batches, initial=done, disable=None, bar_format=form, dynamic_ncols=True)
        self.batches = batches

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown is not None:
            self.shown.close()

    def step(self) -> None:
        if self.shown is not None:
            self.shown.update(1)

    def say(self, last: dict[str, float]) -> None:
        if self.shown is not None:
            more = "".join(f", {k} {v:.4f}" for k, v in last.items() if k not in ("epoch", "train", "validation"))
            self.shown.set_postfix_str(
                f"train {last['train']:.4f}, validation {last['validation']:.4f}{self.unit}{more}"
            )


__all__ = ["Options", "Result", "begun_with", "train", "train_energy"]
