"""What is minimised: -log p of samples, a model's own `loss`, or reverse KL to an energy.

The trainer sees only the face `Problem`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flowlang.diagnostics import Diagnostic, FlowError
from flowlang.train.data import Array, Standardiser, Table, split

if TYPE_CHECKING:
    from flowlang.backends.torch.runtime import Flow

    Move = Callable[[Tensor], Tensor]

VALIDATION_BATCH = 4096
METRICS = ("accuracy", "error")  # programs of a model that are reported beside its loss


class Problem(Protocol):
    """A loss for each sample, as a module, and the batches that it is to see."""

    batches: int  # in one epoch
    offset: float  # from what the module says to what is reported
    unit: str  # of what is reported

    @property
    def module(self) -> nn.Module: ...

    def batch(self, epoch: int, step: int, rank: int, world: int) -> tuple[Sequence[Any], float, str]:
        """Arguments of the module for one process, the weight of its mean, and words for where the batch is from."""
        ...

    def validate(self, move: Move) -> float: ...

    def metrics(self, move: Move) -> dict[str, float]:
        """What else is reported of held-out data, by name."""
        ...

    def meta(self) -> dict[str, Any]:
        """What is kept beside the weights."""
        ...

    def fingerprint(self) -> str:
        """Tells whether a resumed run sees the same data."""
        ...


class NegativeLogLikelihood(nn.Module):
    """-log p as `forward`, so that wrappers for several processes see the call."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        return -self.flow.log_prob(x, **given)


class ModelLoss(nn.Module):
    """A model's program `loss` as `forward`: its mean over a batch."""

    def __init__(self, model: Any):
        super().__init__()
        self.flow = model

    def forward(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        values = {self.flow.data_name: x, **given}
        found: Tensor = self.flow.loss(*(values[n] for n in self.flow.programs["loss"]))
        return found


class Likelihood:
    """Maximum likelihood on a table; a part is held out, statistics come from the rest.

    A model's own `loss` takes the place of -log p. It reads the model's first `data` standardised, and what is
    `given` too; other `data`, as labels and targets, as they are.
    """

    module: nn.Module

    def __init__(self, flow: Flow, table: Table, *, batch: int, validation: float, seed: int, standardise: bool):
        table = scalars(flow, table)
        check_shapes(flow, table)
        rows, held = split(len(table), [validation], seed)
        if len(rows) < 2 or len(held) < 1:
            raise FlowError(
                Diagnostic("FL0802", f"{len(table)} samples are too few to train and validate", suggestion="bring more data")
            )  # fmt: skip
        self.flow, self.own = flow, is_model(flow)  # own: a loss of its own
        self.module = ModelLoss(flow) if self.own else NegativeLogLikelihood(flow)
        self.unit = "" if self.own else "nats"
        if self.own:
            check_loss(flow)
            check_metrics(flow)
        self.size, self.seed, self.rows = batch, seed, rows
        part = table.take(rows)
        whole = flow.types.get(data_name(flow), "").startswith(
            "Int"
        )  # whole numbers stay as they are: the flow dequantises
        columns = table.columns if table.x.ndim == 2 else ()
        density = not self.own or "log_prob" in flow.programs  # a constant coordinate has none
        fit = (lambda x: Standardiser.fit(x, columns)) if density else Standardiser.fit_context
        self.standard = fit(part.x) if standardise and not whole else Standardiser.identity(table.x.shape[1:])
        labels = set() if not self.own else {k for k in part.given if k not in flow.context}
        self.given_standard = {
            k: Standardiser.identity(v.shape[1:]) if k in labels else Standardiser.fit_context(v)
            for k, v in part.given.items()
        }
        dtype = flow.like.dtype
        self.x, self.given = self.tensors(part, dtype)
        self.rounded = torch.as_tensor(part.rounded) if part.rounded is not None else None
        self.widths = torch.as_tensor(table.widths())
        self.held_x, self.held_given = self.tensors(table.take(held), dtype)
        self.batches = math.ceil(len(self.x) / batch)
        self.offset = 0.0 if self.own else -self.standard.log_det
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))
        self.print = digest(table)
        # Parameters that start from data (actnorm): from the same batch in every process; a resumed run brings its own.
        first = slice(max(batch, 256))
        if not self.own:
            flow.initialise(self.x[first], **{k: c[first] for k, c in self.given.items()})

    def tensors(self, table: Table, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.as_tensor(self.standard.apply(table.x)).to(dtype)
        return x, {
            k: torch.as_tensor(self.given_standard[k].apply(table.given[k])).to(dtype) for k in self.flow.given_shapes
        }

    def batch(self, epoch: int, step: int, rank: int, world: int) -> tuple[Sequence[Any], float, str]:
        """The rows of one process. Means are weighted so that the processes' average is the mean of the whole batch."""
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self.order = (epoch, torch.randperm(len(self.x), generator=generator))
        whole = self.order[1][step * self.size : (step + 1) * self.size]
        own = whole[rank::world]
        weight = len(own) * world / len(whole)
        if len(own) == 0:  # every process takes part in every backward pass
            own = whole[:1]
        shown = ", ".join(str(int(self.rows[i]) + 1) for i in whole[:4])
        words = f"its rows are {shown}{' and others' if len(whole) > 4 else ''}"
        return (self.samples(own, epoch, step, rank, world), {k: c[own] for k, c in self.given.items()}), weight, words

    def samples(self, own: Tensor, epoch: int, step: int, rank: int, world: int) -> Tensor:
        """Standardised rows. Dequantised columns get fresh noise in every epoch, the same however many processes there are."""
        if self.rounded is None:
            return self.x[own]
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, step, 3))
        noise = torch.rand(self.size, len(self.widths), dtype=torch.float64, generator=generator)[rank::world][
            : len(own)
        ]
        x = self.rounded[own] + (noise - 0.5) * self.widths
        return torch.as_tensor(self.standard.apply(x.numpy())).to(self.x.dtype)

    @torch.no_grad()
    def validate(self, move: Move) -> float:
        total = 0.0
        for k in range(0, len(self.held_x), VALIDATION_BATCH):
            given = {n: move(c[k : k + VALIDATION_BATCH]) for n, c in self.held_given.items()}
            x = move(self.held_x[k : k + VALIDATION_BATCH])
            total += float(self.module(x, given).double().mean()) * len(x)
        return total / len(self.held_x) + self.offset

    @torch.no_grad()
    def metrics(self, move: Move) -> dict[str, float]:
        """Means over the held-out rows of the model's programs named in `METRICS`."""
        out: dict[str, float] = {}
        for name in (n for n in METRICS if self.own and n in self.flow.programs):
            wanted = list(self.flow.programs[name])
            total = 0.0
            for k in range(0, len(self.held_x), VALIDATION_BATCH):
                values = {n: move(c[k : k + VALIDATION_BATCH]) for n, c in self.held_given.items()}
                values[self.flow.data_name] = move(self.held_x[k : k + VALIDATION_BATCH])
                found = getattr(self.flow, name)(*(values[n] for n in wanted))
                total += float(found.double().mean()) * len(values[self.flow.data_name])
            out[name] = total / len(self.held_x)
        return out

    def meta(self) -> dict[str, Any]:
        return {
            "standardiser": self.standard.to_dict(),
            "given_standardiser": {k: v.to_dict() for k, v in self.given_standard.items()},
        }

    def fingerprint(self) -> str:
        return self.print


class ReverseKL(nn.Module):
    """log q(x) + energy(x) at samples x of the flow: its mean is KL(q || exp(-energy) / Z) - log Z."""

    def __init__(self, flow: Flow, energy: Callable[[Tensor], Tensor]):
        super().__init__()
        self.flow = flow
        # The target is no part of what is trained: it is called, and not owned.
        object.__setattr__(self, "energy", energy)

    def forward(self, count: int) -> Tensor:
        x, log_q = self.flow.sample_and_log_prob((count,))
        found: Tensor = log_q + self.energy(x)  # type: ignore[operator]
        return found


class Variational:
    """A flow fitted to an unnormalised density exp(-energy(x)), by samples of its own (Rezende & Mohamed 2015)."""

    offset = 0.0
    unit = "nats"

    def __init__(self, flow: Flow, energy: Callable[[Tensor], Tensor], *, batch: int, batches: int, seed: int):
        if flow.given_shapes:
            name = next(iter(flow.given_shapes))
            raise FlowError(
                Diagnostic(
                    "FL0804",
                    f"the flow has the context `{name}`, and an energy is fitted without one",
                    suggestion="fit a flow without `given`",
                )
            )
        probe = energy(torch.zeros(2, *flow.data_shape, dtype=flow.like.dtype))
        if tuple(probe.shape) != (2,):
            raise FlowError(
                Diagnostic("FL0804", f"the energy of one sample has shape {tuple(probe.shape[1:])}, and must be one number",
                           suggestion="reduce it, as in `net energy(x: R[D]) -> R { sum[D](x ^ 2) }`")
            )  # fmt: skip
        self.flow, self.energy, self.module = flow, energy, ReverseKL(flow, energy)
        self.size, self.batches = batch, batches
        self.seed = seed

    def batch(self, epoch: int, step: int, rank: int, world: int) -> tuple[Sequence[Any], float, str]:
        count = len(range(rank, self.size, world))
        return (max(count, 1),), count * world / self.size, "its samples are the flow's own"

    @torch.no_grad()
    def validate(self, move: Move) -> float:
        torch.manual_seed(self.seed)
        return float(self.module(VALIDATION_BATCH).double().mean())

    def metrics(self, move: Move) -> dict[str, float]:
        return {}

    def meta(self) -> dict[str, Any]:
        return {}

    def fingerprint(self) -> str:
        return "energy"


@torch.no_grad()
def importance(
    flow: Flow, energy: Callable[[Tensor], Tensor], *, count: int = 20_000, seed: int = 0
) -> dict[str, float]:
    """How well a flow q fits exp(-energy)/Z: log Z by importance sampling with q, and the effective sample size.

    `log_z` is consistent where q covers the target; `elbo` is a lower bound of it; `effective` is the fraction
    (Σw)² / (n Σw²) of the weights w = exp(-energy(x)) / q(x).
    """
    flow.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x, log_q = flow.sample_and_log_prob((count,))
    log_w = (-energy(x) - log_q).double()
    total = torch.logsumexp(log_w, 0)
    return {
        "elbo": float(log_w.mean()), "log_z": float(total) - math.log(count),
        "effective": float(torch.exp(2 * total - torch.logsumexp(2 * log_w, 0))) / count,
    }  # fmt: skip


def is_model(flow: Any) -> bool:
    """Whether this is a model, with programs of its own."""
    return hasattr(flow, "programs")


def data_name(flow: Any) -> str:
    return str(getattr(flow, "data_name", "data"))


def check_loss(model: Any) -> None:
    """A model is trained by its program `loss`, of its data (FL0804)."""
    if "loss" not in model.programs:
        raise FlowError(
            Diagnostic(
                "FL0804", "this model has no program `loss`, by which to train it", suggestion="as in `def loss { .. }`"
            )
        )
    for name in model.programs["loss"]:
        if name != model.data_name and name not in model.given_shapes:
            raise FlowError(
                Diagnostic("FL0804", f"`loss` takes `{name}`, which is no data of the model",
                           suggestion=f"declare it, as in `given {name}: R`, or draw it in `loss`")
            )  # fmt: skip


def check_metrics(model: Any) -> None:
    """What is reported beside the loss is read from the same data (FL0804)."""
    for name in (n for n in METRICS if n in model.programs):
        for wanted in model.programs[name]:
            if wanted != model.data_name and wanted not in model.given_shapes:
                raise FlowError(
                    Diagnostic("FL0804", f"`{name}` is reported while training, and takes `{wanted}`, which is no data of the model",
                               suggestion="give the program another name, or declare what it takes")
                )  # fmt: skip


def one_value(flow: Any) -> None:
    """Tables and energies know one value of a sample; a flow with several data is trained as a module (FL0902)."""
    names = list(getattr(flow, "data_shapes", ()))
    if names:
        raise FlowError(
            Diagnostic("FL0902", f"a flow with several data ({', '.join(f'`{n}`' for n in names)}) has no form as a table yet",
                       suggestion="use the module: `flow.log_prob((x, y))` and `flow.sample((n,))` give what a loss needs")
        )  # fmt: skip


def scalars(flow: Flow, table: Table) -> Table:
    """One column for a value of one number has no axis; as many columns as a value with several axes has entries are laid
    out in its shape, the last axis fastest."""
    one_value(flow)

    def fitted(x: Array, shape: Any) -> Array:
        if shape is None or x.ndim != 2:
            return x
        if tuple(shape) == () and x.shape[1:] == (1,):
            return x[:, 0]
        return x.reshape(len(x), *shape) if len(shape) > 1 and x.shape[1] == math.prod(shape) else x

    given = {k: fitted(v, flow.given_shapes.get(k)) for k, v in table.given.items()}
    if table.rounded is not None:  # noise is drawn for columns
        return replace(table, given=given)
    return replace(table, x=fitted(table.x, flow.data_shape), given=given)


def check_shapes(flow: Flow, table: Table) -> None:
    """Data and context of a table against those of a flow (FL0802)."""
    have, want = tuple(table.x.shape[1:]), tuple(flow.data_shape)
    if have != want:
        missing = "".join(
            f" `--given {n}=column` names those of `{n}`." for n in flow.given_shapes if n not in table.given
        )
        raise FlowError(
            Diagnostic("FL0802", f"a sample of the data has shape {have}, and the flow's data {want}",
                       suggestion=f"choose columns with --columns, or set the size, as in `--set D=6`.{missing}".removesuffix("."))
        )  # fmt: skip
    for name in table.given:
        if name not in flow.given_shapes:
            known = ", ".join(f"`{k}`" for k in flow.given_shapes)
            raise FlowError(
                Diagnostic("FL0802", f"the flow has no context `{name}`",
                           suggestion=f"its context is {known}" if known else "it takes none: leave `--given` out")
            )  # fmt: skip
    for name, shape in flow.given_shapes.items():
        if name not in table.given:
            raise FlowError(
                Diagnostic("FL0802", f"the flow's context `{name}` has no columns",
                           suggestion=f"name them, as in `--given {name}=column`")
            )  # fmt: skip
        found = tuple(table.given[name].shape[1:])
        if found != tuple(shape):
            raise FlowError(
                Diagnostic(
                    "FL0802",
                    f"the context `{name}` has shape {found} in the data and {tuple(shape)} in the flow",
                    suggestion="choose columns that fill it, or change the size in the spec",
                )
            )
    for name in table.given:
        if name not in flow.given_shapes:
            raise FlowError(
                Diagnostic("FL0802", f"the flow has no context `{name}`",
                           suggestion=f"it has {', '.join(flow.given_shapes) or 'none'}")
            )  # fmt: skip


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def digest(table: Table) -> str:
    found = hashlib.sha256()
    arrays: list[tuple[str, Array]] = [("", table.x), *sorted(table.given.items())]
    for name, values in arrays:
        found.update(f"{name} {values.shape}".encode())
        found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


__all__ = ["Likelihood", "Problem", "Variational", "check_shapes", "importance", "is_model", "scalars", "seed_of"]
