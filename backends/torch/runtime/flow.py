"""A flow as users call it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from flowlang.backends.torch.runtime.errors import bad_input
from flowlang.backends.torch.runtime.face import Face
from torch import Tensor

LOOKED_AT = 256  # of a batch that is inverted, those that lie farthest out
LOST = 1e-3  # a round trip that misses by more, relative to 1 + |x|, is no inverse


class NumericalWarning(UserWarning):
    """Values were met that the module cannot invert in its precision."""


class Flow(Face):
    """A density model: data -> base. Every value may have any number of leading batch dimensions.

    Generated classes give the shapes of one sample, and `types`, which has them in the spec's words.
    Not-a-number in one sample makes the results of that sample not-a-number, and of no other.

    `inverse` looks at what it found and warns (`NumericalWarning`) of samples that the module cannot invert in its
    precision: at the 256 of a batch whose values lie farthest out, which costs one pass forward and one back of these.
    `check_inverse = False` leaves that out; with `True` all are looked at, by `rsample` and `sample` too. Nothing is
    checked while a program is traced, compiled or transformed (`torch.func`). `round_trip` tells the same of any data.
    """

    check_inverse: bool | None = None  # None: `inverse` alone

    exactness: str = "exact"  # of the log-density: exact, unbiased (an estimate), lower bound, ratio (up to a constant)
    data_shape: tuple[int, ...] = ()
    base_shape: tuple[int, ...] = ()
    data_domain: tuple[str, float | None, float | None] = ("real", None, None)  # kind and ends of the values
    emitted_shapes: tuple[tuple[int, ...], ...] = ()
    given_shapes: ClassVar[dict[str, tuple[int, ...]]] = {}

    def forward(self, x: Tensor, /, **given: Tensor) -> tuple[Tensor, ...]:
        """z and log|det dz/dx|; parts that leave on the way stand between them."""
        values, context = self._fit(self._data(x), given)
        return self._program("_forward")(*values, *context)

    def inverse(self, z: Tensor, /, *parts: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|det dx/dz| from the base's value and the parts that left."""
        if len(parts) != len(self.emitted_shapes):
            raise bad_input(
                f"{len(self.emitted_shapes)} parts leave this flow on the way, and `inverse` got {len(parts)}",
                "give the parts in the order in which `forward` returns them",
            )
        named = [(f"part {k + 1}", p, s) for k, (p, s) in enumerate(zip(parts, self.emitted_shapes, strict=True))]
        values, context = self._fit([("base", z, self.base_shape), *named], given)
        *found, log_det = self._program("_inverse")(*values, *context)
        if self.check_inverse is not False:
            self._warn(lambda: self._doubt(*self._picked(values, context, found)))
        return self._whole(found), log_det

    @torch.no_grad()
    def round_trip(self, x: Tensor, /, **given: Tensor) -> Tensor:
        """How far the inverse misses x after the forward map, for each sample: the largest |x' - x| / (1 + |x|).

        Infinite where a value on the way is not finite. At most 1e-3 (mostly far less) where the module can invert x.
        """
        data = self._data(x)
        values, context = self._fit(data, given)
        back = self._program("_inverse")(*self._program("_forward")(*values, *context)[:-1], *context)[:-1]
        each = [
            self._distance(b, v, len(shape), "Torus" in self.types.get(name, ""))
            for (name, _, shape), b, v in zip(data, back, values, strict=True)
        ]
        return torch.stack(each).amax(0)

    def log_prob(self, x: Tensor, /, **given: Tensor) -> Tensor:
        """log p(x | given), for each sample, in nats, as exact as `exactness` says.

        Of a flow that draws on its way it is a lower bound: one draw of log w with E[w] = p(x), and so
        E[log w] <= log p(x).
        """
        values, context = self._fit(self._data(x), given)
        return self._program("_log_prob")(*values, *context)

    def log_prob_bound(self, x: Tensor, /, samples: int = 1, **given: Tensor) -> Tensor:
        """log of the mean weight of `samples` draws, for each sample: a lower bound of log p(x | given) in the mean.

        It rises with their number, to log p itself (Burda et al. 2015). One draw is `log_prob`, and so is any
        number of them where the log-density is exact.
        """
        if self.exactness not in ("exact", "lower bound"):
            raise bad_input(
                f"the log-density of this flow is no bound ({self.exactness})",
                "use `log_prob`, and average an estimate",
            )
        if self.exactness == "exact" or samples == 1:
            return self.log_prob(x, **given)
        data, context = self._fit(self._data(x), given)
        values = [v.expand(samples, *v.shape) for v in (*data, *context)]
        return self._program("_log_prob")(*values).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def log_prob_mean(self, x: Tensor, /, draws: int = 16, **given: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of `log_prob` over draws and its standard error, for each sample.

        For a flow whose log-density is estimated, or a bound with draws inside; the error of an exact one is 0.
        """
        if draws < 2:
            raise bad_input(f"{draws} draws have no spread", "ask for two or more")
        found = torch.stack([self.log_prob(x, **given) for _ in range(draws)])
        return found.mean(0), found.std(0) / draws**0.5

    @torch.no_grad()
    def initialise(self, x: Tensor, /, *, force: bool = False, **given: Tensor) -> bool:
        """Puts the parameters that start from data (as of `actnorm`) where this batch says, in the chain's order.

        Call it once with a first batch before training; `flowlang train` does. That it was done is kept in the
        state dict (`initialised`), and later calls change nothing unless `force`. Returns whether anything was
        set. Nothing needs it: without it those parameters begin at their defaults.
        """
        if not self._to_initialise(force):
            return False
        values, context = self._fit(self._data(x), given)
        self._initialise(*values, *context)
        return True

    def rsample(self, shape: Any = (), generator: torch.Generator | None = None, **given: Tensor) -> Tensor:
        """Samples through which gradients flow. `shape` is the batch shape (a number or a tuple).

        Context is broadcast to it; when `shape` is (), the batch shape is the context's.
        """
        batch, context = self._fit_sample(shape, given)
        found = self._whole(self._program("_sample", generator)(batch, *context, generator=generator))
        if self.check_inverse:
            self._warn(lambda: self.round_trip(found, **given))
        return found

    @torch.no_grad()
    def sample(self, shape: Any = (), generator: torch.Generator | None = None, **given: Tensor) -> Tensor:
        """Samples, as `rsample` gives them, without gradient."""
        return self.rsample(shape, generator, **given)

    def sample_and_log_prob(
        self, shape: Any = (), generator: torch.Generator | None = None, **given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Samples through which gradients flow, with their log-density, in one pass.

        Where `log_prob` is a lower bound this is an upper one in the mean: its draws are those that made the sample.
        """
        batch, context = self._fit_sample(shape, given)
        *found, log_p = self._program("_sample_and_log_prob", generator)(batch, *context, generator=generator)
        return self._whole(found), log_p

    def to_distribution(self, **given: Tensor) -> torch.distributions.Distribution:
        """The flow, with its context fixed, as a torch distribution."""
        return FlowDistribution(self, given)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Flow:
        """Memory for parameters that were made on "meta"; constants keep their values."""
        found = [(m, k, m._buffers[k]) for m in self.modules() for k in m._non_persistent_buffers_set]
        kept = [(m, k, b) for m, k, b in found if b is not None and not b.is_meta]
        super().to_empty(device=device, recurse=recurse)
        for module, name, buffer in kept:
            module._buffers[name] = buffer.to(device)
        return self

    def extra_repr(self) -> str:
        given = ", ".join(f"{k}: {self.types.get(k, v)}" for k, v in self.given_shapes.items())
        maps = f"{self.types.get('data', self.data_shape)} -> {self.types.get('base', self.base_shape)}"
        bound = "" if self.exactness == "exact" else f"; log_prob: {self.exactness}"
        return f"{maps} given {given}{bound}" if given else maps + bound

    # ---- whether an inverse can be trusted ----------------------------------------------------------

    @staticmethod
    def _distance(found: Tensor, wanted: Tensor, event: int, turns: bool = False) -> Tensor:
        """The largest |found - wanted| / (1 + |wanted|) of each sample; infinite where it is not a number."""
        gap = (found - wanted).abs()
        if turns:
            gap = torch.minimum(gap, (gap - 2 * torch.pi).abs())
        gap = gap / (1 + wanted.abs())
        gap = gap.flatten(gap.dim() - event) if event else gap[..., None]
        return torch.nan_to_num(gap.amax(-1) if gap.shape[-1] else gap.sum(-1), nan=torch.inf)

    @torch.no_grad()
    def _doubt(self, values: list[Tensor], context: list[Tensor], found: list[Tensor]) -> Tensor:
        """An estimate of how far x may be off, for each sample, from what was inverted alone.

        The larger of two signs: the forward map of x misses the values; a change of them by several units in the last
        place, which rounding in the forward map makes, moves x far.
        """
        events = [len(shape) for _, _, shape in self._data(self._whole(found))]
        if self.exactness not in ("exact", "unbiased"):
            # Other noise is drawn on the way there: what was found comes back, or not.
            back = self._program("_inverse")(*self._program("_forward")(*found, *context)[:-1], *context)[:-1]
            each = [self._distance(b, x, event) for b, x, event in zip(back, found, events, strict=True)]
            return torch.stack(each).amax(0)
        doubt = found[0].new_zeros(found[0].shape[: found[0].dim() - events[0]])
        unknown = torch.zeros_like(doubt, dtype=torch.bool)
        moved = []
        for v, again in zip(values, self._program("_forward")(*found, *context)[:-1], strict=True):
            rest = v.dim() - doubt.dim()
            flat = v.flatten(doubt.dim()) if rest else v[..., None]
            unknown = unknown | torch.isnan(flat).any(-1)
            doubt = torch.maximum(doubt, self._distance(again, v, rest))
            signs = torch.arange(flat.shape[-1], device=v.device) % 2 * 2 - 1
            step = 8 * torch.finfo(v.dtype).eps * flat.abs().amax(-1, keepdim=True)
            moved.append((flat + signs * step).reshape(v.shape))
        for x, again, event in zip(found, self._program("_inverse")(*moved, *context)[:-1], events, strict=True):
            # Values at the end of a bounded support may have left it by the step: nothing is learnt from those.
            doubt = torch.maximum(doubt, self._distance(torch.where(torch.isfinite(again), again, x), x, event))
        return torch.where(unknown, 0.0, doubt)

    @torch.no_grad()
    def _picked(
        self, values: list[Tensor], context: list[Tensor], found: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The samples that are looked at: those whose values are the largest beside what is usual in the batch."""
        event = len(self._data(self._whole(found))[0][2])
        batch = found[0].shape[: found[0].dim() - event]
        n = math.prod(batch)
        if self.check_inverse or n <= LOOKED_AT:
            return values, context, found
        flat = [[v.reshape(n, *v.shape[len(batch) :]) for v in part] for part in (values, context, found)]
        sizes = [v.abs().reshape(n, -1) for v in flat[0]]
        each = torch.stack([(v / v.mean(0).clamp_min(1e-30)).amax(1) for v in sizes if v.shape[1]]).amax(0)
        rows = torch.nan_to_num(each, nan=0.0).topk(LOOKED_AT).indices
        picked = [[v[rows] for v in part] for part in flat]
        return picked[0], picked[1], picked[2]

    def _has_states(self) -> bool:
        """Whether something is kept beside the parameters, as running statistics are."""
        for m in self.modules():
            if any(b is not None and k not in m._non_persistent_buffers_set for k, b in m._buffers.items()):
                return True
        return False

    def _warn(self, look: Callable[[], Tensor]) -> None:
        """Warns of what `look` doubts. It runs the flow again: not where that is recorded, or moves states."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or (self.training and self._has_states()):
            return
        with torch.random.fork_rng(devices=[]):  # an estimated log-det draws, and nobody asks for it here
            doubt = look()
        lost = (doubt > LOST).sum()
        try:
            bad = int(lost)
        except RuntimeError:
            return  # no number: of fake tensors, on "meta", under `torch.func`
        if bad:
            warnings.warn(
                f"{bad} of {doubt.numel()} samples lie outside what this flow can invert in {self.like.dtype}: "
                f"the round trip may be off by {float(doubt.max()):.1g} of 1 + |x|; use .double(), or bound its scales",
                NumericalWarning,
                stacklevel=4,
            )

    # ---- programs of a generated class ------------------------------------------------------------

    def _forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _inverse(self, *values: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _log_prob(self, *values: Tensor) -> Tensor:
        raise NotImplementedError

    def _sample(self, batch: tuple[int, ...], *context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError

    def _sample_and_log_prob(
        self, batch: tuple[int, ...], *context: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    # ---- inputs ---------------------------------------------------------------------------------

    def _data(self, x: Any) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        """The data as given, each value with its name and the shape of one sample."""
        return [("data", x, self.data_shape)]

    def _whole(self, values: Any) -> Any:
        """What was found for the data, as users give it: one value is no tuple."""
        return values if isinstance(values, Tensor) else values[0]

    def _fit(
        self, values: list[tuple[str, Tensor, tuple[int, ...]]], given: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The values and the context, checked and broadcast to one batch shape."""
        checked = [(name, self._check(name, v, shape), shape) for name, v, shape in values]
        checked += self._context(given)
        n = len(values)
        if len(checked) > 1:
            batches = {name: v.shape[: v.dim() - len(shape)] for name, v, shape in checked}
            batch = self._common(batches)
            fitted = [v.expand(batch + shape) for _, v, shape in checked]
            return fitted[:n], fitted[n:]
        return [checked[0][1]], []

    def _fit_sample(self, shape: Any, given: dict[str, Any]) -> tuple[tuple[int, ...], list[Tensor]]:
        """The batch shape of samples, and the context broadcast to it."""
        sizes = (shape,) if isinstance(shape, int | torch.SymInt) or not hasattr(shape, "__iter__") else shape
        if not torch.compiler.is_compiling() and not all(hasattr(n, "__index__") and n >= 0 for n in sizes):
            raise bad_input(f"the shape of a sample is {shape!r}", "give a number from 0 on, or a tuple of them")
        batch = tuple(sizes)
        context = self._context(given)
        batches = {name: tuple(c.shape[: c.dim() - len(s)]) for name, c, s in context}
        if not batch:
            batch = self._common(batches) if batches else ()
        elif batches and self._common({"shape": batch, **batches}) != batch:
            raise bad_input(
                f"samples of batch shape {batch} were asked for, and the context has batch shape "
                f"{', '.join(str(b) for b in batches.values())}",
                "ask for a shape to which the context broadcasts, or leave it out",
            )
        return batch, [c.expand(batch + s) for _, c, s in context]

    def _context(self, given: dict[str, Any]) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        if given.keys() != self.given_shapes.keys():
            expected = ", ".join(f"`{k}`: {self.types.get(k, s)}" for k, s in self.given_shapes.items())
            for name in given:
                if name not in self.given_shapes:
                    raise bad_input(
                        f"`{name}` is no context of this flow",
                        f"its context is {expected}" if expected else "it takes none",
                    )
            name = next(k for k in self.given_shapes if k not in given)
            raise bad_input(
                f"the context `{name}` is missing; it is {self.types.get(name, self.given_shapes[name])}",
                f"give it by name, as in `{name} = ...`",
            )
        return [(name, self._check(name, given[name], shape), shape) for name, shape in self.given_shapes.items()]


class RecordFlow(Flow):
    """A flow with several data: wherever a flow takes or gives x, this one does a tuple of them, in their order.

    Their bases leave as parts: `z, *parts, log_det = flow((x, y))`, `(x, y), log_det = flow.inverse(z, *parts)`.
    """

    data_shapes: ClassVar[dict[str, tuple[int, ...]]] = {}

    def _data(self, x: Any) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        names = ", ".join(f"`{k}`: {self.types.get(k, s)}" for k, s in self.data_shapes.items())
        if not isinstance(x, tuple | list) or len(x) != len(self.data_shapes):
            found = f"{len(x)} values" if isinstance(x, tuple | list) else "one value"
            raise bad_input(
                f"the data of this flow are {names}, and it got {found}", "give a tuple of them, in their order"
            )
        return [(k, v, shape) for (k, shape), v in zip(self.data_shapes.items(), x, strict=True)]

    def _whole(self, values: Any) -> Any:
        return tuple(values)

    def to_distribution(self, **given: Tensor) -> torch.distributions.Distribution:
        raise bad_input(
            "a flow with several data is no torch distribution, whose values are one tensor",
            "use `log_prob` and `sample`",
        )

    def extra_repr(self) -> str:
        data = ", ".join(f"{k}: {self.types.get(k, s)}" for k, s in self.data_shapes.items())
        given = ", ".join(f"{k}: {self.types.get(k, v)}" for k, v in self.given_shapes.items())
        bound = "" if self.exactness == "exact" else f"; log_prob: {self.exactness}"
        return f"{data} given {given}{bound}" if given else data + bound


class FlowDistribution(torch.distributions.Distribution):
    """A flow with fixed context as `torch.distributions.Distribution`."""

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, flow: Flow, given: dict[str, Tensor]):
        self.flow, self.given = flow, given
        batch, _ = flow._fit_sample((), given)
        super().__init__(torch.Size(batch), torch.Size(flow.data_shape), validate_args=False)

    @property
    def support(self) -> Any:
        """What the spec says of the data: every sample lies there, and nothing outside has a density."""
        known = torch.distributions.constraints
        kind, lo, hi = self.flow.data_domain
        each: Any = known.real
        if kind == "simplex":
            each = known.simplex
        elif kind in ("int", "bool") and lo is not None and hi is not None:
            each = known.integer_interval(int(lo), int(hi))
        elif lo is not None and hi is not None:
            each = known.interval(lo, hi)
        elif lo is not None:
            each = known.greater_than(lo)
        elif hi is not None:
            each = known.less_than(hi)
        return known.independent(each, len(self.event_shape) - each.event_dim)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flow.log_prob(value, **self.given)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.flow.rsample((*tuple(sample_shape), *self.batch_shape), **self.given)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)
