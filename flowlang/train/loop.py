"""Maximum-likelihood training on Lightning Fabric: one process or several, exact resume, nothing lost."""

from __future__ import annotations

import csv
import math
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.train.data import Standardiser, Table, split
from flowlang.train.store import load_state, read_tensors, write_tensors

if TYPE_CHECKING:
    from flowlang.backends.torch.runtime import Flow

SKIPS = 5


@dataclass
class Options:
    """How to train. Times are in seconds; `clip` bounds the gradient's norm; `ema` is the weight kept per step."""

    epochs: int = 100
    batch: int = 512
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    clip: float = 5.0
    ema: float = 0.0
    validation: float = 0.1
    patience: int = 20
    seed: int = 0
    standardise: bool = True
    max_seconds: float = 0.0
    devices: int = 1
    resume: bool = False
    progress: bool = True


@dataclass
class Result:
    """What came of it; nats for each sample, in the units of the data."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_validation: float = math.inf
    best_epoch: int = 0
    stopped: str = "epochs"


class NegativeLogLikelihood(nn.Module):
    """-log p as `forward`, so that wrappers for several processes see the call."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        return -self.flow.log_prob(x, **given)


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


def train(
    flow: Flow, table: Table, out: str | Path, options: Options | None = None, meta: dict[str, Any] | None = None
) -> Result:
    """Trains a flow on a table; writes `model.safetensors` (best), `last.safetensors`, `state.json`, `history.csv` to `out`."""
    o = options or Options()
    fabric_class = need_fabric()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = fabric_class(accelerator="cpu", devices=o.devices, strategy="ddp" if o.devices > 1 else "auto")
        if o.devices > 1:
            fabric.launch()
        return Trainer(fabric, flow, table, Path(out), o, meta or {}).run()


class Trainer:
    """One training run in one process."""

    def __init__(self, fabric: Any, flow: Flow, table: Table, out: Path, o: Options, meta: dict[str, Any]):
        self.fabric, self.o, self.out, self.meta = fabric, o, out, meta
        if tuple(table.x.shape[1:]) != tuple(flow.data_shape):
            raise FlowError(
                Diagnostic("FL0802", f"a sample of the data has shape {tuple(table.x.shape[1:])}, and the flow's data {tuple(flow.data_shape)}",
                           suggestion="choose columns with --columns, or set the size, as in `--set D=6`")
            )  # fmt: skip
        for name, shape in flow.given_shapes.items():
            if name not in table.given:
                raise FlowError(
                    Diagnostic(
                        "FL0802",
                        f"the flow's context `{name}` has no columns",
                        suggestion=f"name them, as in `--given {name}=column`",
                    )
                )
            if tuple(table.given[name].shape[1:]) != tuple(shape):
                raise FlowError(
                    Diagnostic(
                        "FL0802",
                        f"the context `{name}` has shape {tuple(table.given[name].shape[1:])} in the data and {shape} in the flow",
                    )
                )
        rows, held = split(len(table), [o.validation], o.seed)
        if len(rows) < 2 or len(held) < 1:
            raise FlowError(
                Diagnostic(
                    "FL0802", f"{len(table)} samples are too few to train and validate", suggestion="bring more data"
                )
            )
        train_table, valid_table = table.take(rows), table.take(held)
        columns = table.columns if table.x.ndim == 2 else ()
        self.standard = (
            Standardiser.fit(train_table.x, columns) if o.standardise else Standardiser.identity(table.x.shape[1:])
        )
        self.given_standard = {k: Standardiser.fit_context(v) for k, v in train_table.given.items()}
        self.flow = flow
        dtype = next((p.dtype for p in flow.parameters()), torch.get_default_dtype())
        self.train_x, self.train_c = self.tensors(train_table, dtype)
        self.valid_x, self.valid_c = self.tensors(valid_table, dtype)
        self.loss = NegativeLogLikelihood(flow)
        self.optimizer = torch.optim.AdamW(flow.parameters(), lr=o.lr, weight_decay=o.weight_decay)
        self.average = {k: v.detach().clone() for k, v in flow.state_dict().items()} if o.ema > 0 else {}
        self.best: dict[str, Tensor] = {k: v.detach().clone() for k, v in flow.state_dict().items()}
        self.result = Result()
        self.epoch = 0
        self.skipped = 0
        self.halved = False
        self.interrupted = False

    def tensors(self, table: Table, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.as_tensor(self.standard.apply(table.x)).to(dtype)
        return x, {k: torch.as_tensor(self.given_standard[k].apply(v)).to(dtype) for k, v in table.given.items()}

    # ---- the run --------------------------------------------------------------------------------

    def run(self) -> Result:
        o = self.o
        if o.resume:
            self.restore()
        module, optimizer = self.fabric.setup(self.loss, self.optimizer)
        began = time.monotonic()
        bar = self.bar()
        per_epoch = max(math.ceil(len(self.train_x) / o.batch), 1)
        try:
            if not self.result.history:
                self.record(math.nan, self.validate())
            while self.epoch < o.epochs:
                mean = self.one_epoch(module, optimizer, per_epoch)
                self.epoch += 1
                valid = self.validate()
                self.record(mean, valid)
                self.checkpoint()
                bar(self.epoch, mean + self.offset, valid)
                if self.epoch - self.result.best_epoch >= o.patience:
                    self.result.stopped = "patience"
                    break
                if o.max_seconds and time.monotonic() - began > o.max_seconds:
                    self.result.stopped = "time"
                    break
        except KeyboardInterrupt:
            # The epoch that was cut short is run again on resume.
            self.result.stopped = "interrupted"
        self.flow.load_state_dict(self.best)
        self.write_best()
        self.write_history()
        return self.result

    @property
    def offset(self) -> float:
        """From nats of standardised data to nats of the data."""
        return -self.standard.log_det

    def lr(self, step: int, total: int) -> float:
        base = self.o.lr * (0.5 if self.halved else 1.0)
        if self.o.schedule == "cosine":
            return base * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))
        return base

    def one_epoch(self, module: Any, optimizer: Any, per_epoch: int) -> float:
        o = self.o
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + self.epoch)
        torch.manual_seed(o.seed * 1_000_003 + self.epoch + 1)
        order = torch.randperm(len(self.train_x), generator=generator)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        self.flow.train()
        total, count = 0.0, 0
        for k in range(per_epoch):
            rows = order[k * o.batch : (k + 1) * o.batch]
            if world > 1:
                rows = rows[: len(rows) // world * world][rank::world]
                if len(rows) == 0:
                    continue
            for group in optimizer.param_groups:
                group["lr"] = self.lr(self.epoch * per_epoch + k, o.epochs * per_epoch)
            loss = module(self.train_x[rows], {n: c[rows] for n, c in self.train_c.items()}).mean()
            if not torch.isfinite(loss):
                self.skip()
                continue
            optimizer.zero_grad()
            self.fabric.backward(loss)
            norm = nn.utils.clip_grad_norm_(self.flow.parameters(), o.clip if o.clip > 0 else math.inf)
            if not torch.isfinite(norm):
                self.skip()
                continue
            optimizer.step()
            self.skipped = 0
            if o.ema > 0:
                with torch.no_grad():
                    for name, v in self.flow.state_dict().items():
                        self.average[name].lerp_(v, 1 - o.ema) if v.is_floating_point() else self.average[name].copy_(v)
            total += loss.item() * len(rows)
            count += len(rows)
        return total / max(count, 1)

    def skip(self) -> None:
        """A batch whose loss or gradient is not finite is left out; many in a row end the run or start it again lower."""
        self.skipped += 1
        if self.skipped <= SKIPS:
            return
        if self.halved:
            raise FlowError(
                Diagnostic(
                    "FL0806",
                    f"the loss was not finite for {self.skipped} batches in a row, twice",
                    suggestion="lower --lr, or check the data for outliers",
                )
            )
        self.flow.load_state_dict(self.best)
        self.halved, self.skipped = True, 0

    @torch.no_grad()
    def validate(self) -> float:
        """Mean negative log-likelihood of the held-out part, in the units of the data."""
        state = None
        if self.o.ema > 0 and self.epoch > 0:
            state = {k: v.detach().clone() for k, v in self.flow.state_dict().items()}
            self.flow.load_state_dict(self.average)
        self.flow.eval()
        torch.manual_seed(self.o.seed)
        parts = []
        for k in range(0, len(self.valid_x), 4096):
            given = {n: c[k : k + 4096] for n, c in self.valid_c.items()}
            parts.append(-self.flow.log_prob(self.valid_x[k : k + 4096], **given))
        value = float(torch.cat(parts).mean()) + self.offset
        if value < self.result.best_validation:
            self.result.best_validation, self.result.best_epoch = value, self.epoch
            self.best = {k: v.detach().clone() for k, v in self.flow.state_dict().items()}
        if state is not None:
            self.flow.load_state_dict(state)
        return value

    # ---- what is kept ---------------------------------------------------------------------------

    def record(self, mean: float, valid: float) -> None:
        self.result.history.append({"epoch": self.epoch, "train": mean + self.offset, "validation": valid})

    def everything(self) -> dict[str, Any]:
        return {
            **self.meta,
            "standardiser": self.standard.to_dict(),
            "given_standardiser": {k: v.to_dict() for k, v in self.given_standard.items()},
        }

    def write_best(self) -> None:
        if self.fabric.global_rank == 0:
            write_tensors(self.out / "model.safetensors", self.best, self.everything())

    def write_history(self) -> None:
        if self.fabric.global_rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "history.csv").open("w", newline="") as f:
                writer = csv.DictWriter(f, ["epoch", "train", "validation"])
                writer.writeheader()
                writer.writerows(self.result.history)

    def checkpoint(self) -> None:
        if self.fabric.global_rank != 0:
            return
        tensors = {f"model.{k}": v for k, v in self.flow.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        state = self.optimizer.state_dict()
        for i, slots in state["state"].items():
            for name, v in slots.items():
                tensors[f"optimizer.{i}.{name}"] = v if isinstance(v, Tensor) else torch.tensor(v)
        r = self.result
        meta = {
            **self.everything(), "epoch": self.epoch, "history": r.history, "best_validation": r.best_validation,
            "best_epoch": r.best_epoch, "halved": self.halved, "options": asdict(self.o),
        }  # fmt: skip
        write_tensors(self.out / "last.safetensors", tensors, meta)
        self.write_history()

    def restore(self) -> None:
        path = self.out / "last.safetensors"
        if not path.is_file():
            raise FlowError(
                Diagnostic("FL0803", f"there is nothing to resume in `{self.out}`", suggestion="start without --resume")
            )
        tensors, meta = read_tensors(path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}

        load_state(self.flow, part("model"), str(path))
        self.best = part("best")
        if self.o.ema > 0:
            self.average = part("average") or self.average
        state = self.optimizer.state_dict()
        slots: dict[int, dict[str, Any]] = {}
        for k, v in part("optimizer").items():
            i, name = k.split(".", 1)
            slots.setdefault(int(i), {})[name] = v
        self.optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
        self.epoch = int(meta["epoch"])
        self.halved = bool(meta["halved"])
        self.result.history = list(meta["history"])
        self.result.best_validation = float(meta["best_validation"])
        self.result.best_epoch = int(meta["best_epoch"])

    def bar(self) -> Any:
        """Shows progress on a terminal; quiet elsewhere."""
        if not self.o.progress or self.fabric.global_rank != 0:
            return lambda *_: None
        try:
            from tqdm import tqdm
        except ImportError:
            return lambda *_: None
        shown = tqdm(total=self.o.epochs, initial=self.epoch, unit="epoch", disable=None)

        def update(epoch: int, mean: float, valid: float) -> None:
            shown.update(epoch - shown.n)
            shown.set_postfix_str(f"train {mean:.4f}, validation {valid:.4f} nats")
            if epoch >= self.o.epochs:
                shown.close()

        return update


class Trained:
    """A flow with the standardisation it was trained with: densities and samples in the data's units."""

    def __init__(self, flow: Flow, meta: dict[str, Any]):
        self.flow = flow
        self.standard = (
            Standardiser.from_dict(meta["standardiser"])
            if "standardiser" in meta
            else Standardiser.identity(flow.data_shape)
        )
        self.given_standard = {k: Standardiser.from_dict(v) for k, v in meta.get("given_standardiser", {}).items()}
        self.dtype = next((p.dtype for p in flow.parameters()), torch.get_default_dtype())

    def given(self, given: dict[str, Any]) -> dict[str, Tensor]:
        return {
            k: torch.as_tensor(self.given_standard[k].apply(np.asarray(v)) if k in self.given_standard else v).to(
                self.dtype
            )
            for k, v in given.items()
        }

    @torch.no_grad()
    def log_prob(self, x: Any, given: dict[str, Any] | None = None, batch: int = 8192) -> Any:
        """log p in nats for each row."""
        self.flow.eval()
        z = torch.as_tensor(self.standard.apply(np.asarray(x))).to(self.dtype)
        c = self.given(given or {})
        parts = [
            self.flow.log_prob(z[k : k + batch], **{n: v[k : k + batch] for n, v in c.items()})
            for k in range(0, len(z), batch)
        ]
        return torch.cat(parts).double().numpy() + self.standard.log_det

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0, given: dict[str, Any] | None = None) -> Any:
        """Samples in the data's units; with context rows, one for each."""
        self.flow.eval()
        generator = torch.Generator().manual_seed(seed)
        c = self.given(given or {})
        z = self.flow.sample(() if c else (n,), generator=generator, **c)
        return self.standard.undo(z.double().numpy())


def load_trained(flow: Flow, path: str | Path) -> Trained:
    """Weights and standardisation from a run's folder or file."""
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    tensors, meta = read_tensors(file)
    load_state(flow, tensors, str(file))
    return Trained(flow, meta)


__all__ = ["Options", "Result", "Trained", "load_trained", "train"]
