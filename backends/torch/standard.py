"""Flows and models together with the standardisation of their data: densities and samples in the data's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flowlang.backends.torch.runtime import Flow, Model
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Mean and scale of each coordinate, float64 arrays."""

    mean: Any
    scale: Any

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist()}


class Scales:
    """Buffers with the means and scales of the data and of each value beside it."""

    flow: Any
    given_shapes: Any
    mean: Tensor
    scale: Tensor

    def _keep(self, mean: Any, scale: Any, given: Mapping[str, tuple[Any, Any]] | None) -> None:
        dtype = self.flow.like.dtype
        register: Any = getattr(self, "register_buffer")  # noqa: B009 (of nn.Module)
        register("like", torch.zeros((), dtype=dtype), persistent=False)
        for name, m, s in [("", mean, scale), *((f"_{k}", *v) for k, v in (given or {}).items())]:
            register(f"mean{name}", torch.as_tensor(m, dtype=torch.float64).to(dtype))
            register(f"scale{name}", torch.as_tensor(s, dtype=torch.float64).to(dtype))

    def standard(self) -> Statistics:
        return Statistics(self.mean.double().cpu().numpy(), self.scale.double().cpu().numpy())

    def given_standard(self) -> dict[str, Statistics]:
        names = [n for n in self.given_shapes if hasattr(self, f"mean_{n}")]
        return {
            n: Statistics(*(getattr(self, f"{k}_{n}").double().cpu().numpy() for k in ("mean", "scale"))) for n in names
        }

    def statistics(self) -> dict[str, Any]:
        """What `of` reads."""
        return {
            "standardiser": self.standard().to_dict(),
            "given_standardiser": {n: s.to_dict() for n, s in self.given_standard().items()},
        }

    def _given(self, name: str, value: Tensor) -> Tensor:
        mean = getattr(self, f"mean_{name}", None)
        return value if mean is None else (value - mean) / getattr(self, f"scale_{name}")

    @property
    def _log_det(self) -> Tensor:
        return -self.scale.log().sum()


def statistics_of(meta: Mapping[str, Any]) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
    own = meta["standardiser"]
    return (
        own["mean"],
        own["scale"],
        {k: (v["mean"], v["scale"]) for k, v in meta.get("given_standardiser", {}).items()},
    )


class Standardised(Scales, Flow):
    """log p(x) = log p_flow((x - mean) / scale) - Σ log scale, and samples mapped back.

    `x` has the shape of the inner flow's data; context inputs are standardised by their own mean and scale.
    """

    def __init__(
        self,
        flow: Flow,
        mean: Any,
        scale: Any,
        given: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.data_shape, self.base_shape = flow.data_shape, flow.base_shape
        self.emitted_shapes, self.given_shapes = flow.emitted_shapes, flow.given_shapes
        self.exactness = flow.exactness
        self.types = flow.types
        self._keep(mean, scale, given)
        self.origin = getattr(flow, "origin", None)

    @staticmethod
    def of(flow: Flow, meta: Mapping[str, Any]) -> Flow:
        """The flow with the statistics that a weights file carries; the flow itself if it carries none."""
        if "standardiser" not in meta:
            return flow
        return Standardised(flow, *statistics_of(meta))

    def _standard(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [self._given(n, c) for n, c in zip(self.given_shapes, given, strict=True)]

    def _forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        x, *given = values
        *parts, log_det = self.flow._forward((x - self.mean) / self.scale, *self._standard(given))
        return (*parts, log_det + self._log_det)

    def _inverse(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        n = 1 + len(self.emitted_shapes)
        x, log_det = self.flow._inverse(*values[:n], *self._standard(values[n:]))
        return x * self.scale + self.mean, log_det - self._log_det

    def _log_prob(self, *values: Tensor) -> Tensor:
        x, *given = values
        return self.flow._log_prob((x - self.mean) / self.scale, *self._standard(given)) + self._log_det

    def _sample(self, batch: tuple[int, ...], *context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.flow._sample(batch, *self._standard(context), generator=generator) * self.scale + self.mean

    def _sample_and_log_prob(
        self, batch: tuple[int, ...], *context: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        x, log_p = self.flow._sample_and_log_prob(batch, *self._standard(context), generator=generator)
        return x * self.scale + self.mean, log_p + self._log_det


class StandardisedModel(Scales, Model):
    """A trained model whose programs take and give values in the units of the data.

    Inputs that are data of the model are standardised. What `sample`, and programs named `sample_..`, give is mapped
    back where it has the shape of the data; `log_prob` counts the change of units. Other results are as they are.
    """

    def __init__(self, flow: Model, mean: Any, scale: Any, given: Mapping[str, tuple[Any, Any]] | None = None) -> None:
        super().__init__()
        self.flow = flow
        self.programs, self.types, self.context, self.exactness = (
            flow.programs,
            flow.types,
            flow.context,
            flow.exactness,
        )  # type: ignore[misc]  # class attributes of a model are an instance's here
        self.data_name, self.data_shape, self.given_shapes = flow.data_name, flow.data_shape, flow.given_shapes  # type: ignore[misc]
        self._keep(mean, scale, given)
        self.origin = getattr(flow, "origin", None)

    @staticmethod
    def of(flow: Model, meta: Mapping[str, Any]) -> Model:
        """The model with the statistics that a weights file carries; the model itself if it carries none."""
        return StandardisedModel(flow, *statistics_of(meta)) if "standardiser" in meta else flow

    def __getattr__(self, name: str) -> Any:
        programs = self.__dict__.get("programs", {})
        if name not in programs:
            return super().__getattr__(name)

        def program(*values: Any, shape: Any = (), generator: torch.Generator | None = None) -> Any:
            if not programs[name] and values:
                (shape,) = values
                values = ()
            return self.run(name, values, shape, generator)

        program.__doc__ = getattr(type(self.flow), name).__doc__
        return program

    def run(self, name: str, values: tuple[Any, ...], shape: Any, generator: torch.Generator | None) -> Any:
        fitted = self._fitted(name, values)
        inputs = [self._in(n, v) for n, v in zip(self.programs[name], fitted, strict=True)]
        out = self.flow.run(name, tuple(inputs), shape, generator)
        if name == "log_prob":
            return out + self._log_det
        if name.split("_")[0] == "sample":
            return tuple(map(self._out, out)) if isinstance(out, tuple) else self._out(out)
        return out

    def _in(self, name: str, value: Tensor) -> Tensor:
        return (value - self.mean) / self.scale if name == self.data_name else self._given(name, value)

    def _out(self, value: Tensor) -> Tensor:
        n = len(self.data_shape)
        fits = tuple(value.shape[value.dim() - n :]) == tuple(self.data_shape)
        return value * self.scale + self.mean if fits else value
