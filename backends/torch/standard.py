"""A flow together with the standardisation of its data: densities and samples in the data's own units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flowlang.backends.torch.runtime import Flow
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Mean and scale of each coordinate, float64 arrays."""

    mean: Any
    scale: Any

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist()}


class Standardised(Flow):
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
        self.types = flow.types
        dtype = flow.like.dtype
        self.register_buffer("like", torch.zeros((), dtype=dtype), persistent=False)
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float64).to(dtype))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64).to(dtype))
        for name, (m, s) in (given or {}).items():
            self.register_buffer(f"mean_{name}", torch.as_tensor(m, dtype=torch.float64).to(dtype))
            self.register_buffer(f"scale_{name}", torch.as_tensor(s, dtype=torch.float64).to(dtype))
        self.origin = getattr(flow, "origin", None)

    mean: Tensor
    scale: Tensor

    @staticmethod
    def of(flow: Flow, meta: Mapping[str, Any]) -> Flow:
        """The flow with the statistics that a weights file carries; the flow itself if it carries none."""
        if "standardiser" not in meta:
            return flow
        own = meta["standardiser"]
        given = {k: (v["mean"], v["scale"]) for k, v in meta.get("given_standardiser", {}).items()}
        return Standardised(flow, own["mean"], own["scale"], given)

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

    def _standard(self, given: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for name, c in zip(self.given_shapes, given, strict=True):
            mean = getattr(self, f"mean_{name}", None)
            out.append(c if mean is None else (c - mean) / getattr(self, f"scale_{name}"))
        return out

    @property
    def _log_det(self) -> Tensor:
        return -self.scale.log().sum()

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
