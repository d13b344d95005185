"""Networks and models as users call them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from flowlang.backends.torch.runtime.errors import bad_input
from flowlang.backends.torch.runtime.face import Face
from torch import Tensor


class Net(Face):
    """A network by itself. `inputs` has the shapes of one sample of each value that it takes."""

    inputs: dict[str, tuple[int, ...]] = {}  # noqa: RUF012

    def forward(self, *values: Tensor) -> Any:
        """The network's result; values may have any number of leading batch dimensions."""
        return self._program("_forward")(*self._fit(values))

    @torch.no_grad()
    def initialise(self, *values: Tensor, force: bool = False) -> bool:
        """Puts the parameters that start from data where this batch says, layer after layer; see `Flow.initialise`."""
        if not self._to_initialise(force):
            return False
        self._initialise(*self._fit(values))
        return True

    def _fit(self, values: tuple[Tensor, ...]) -> list[Tensor]:
        if len(values) != len(self.inputs):
            expected = ", ".join(f"`{k}`: {self.types.get(k, v)}" for k, v in self.inputs.items())
            raise bad_input(f"{len(values)} values were given", f"this network takes {expected}")
        checked = [(k, self._check(k, v, s), s) for (k, s), v in zip(self.inputs.items(), values, strict=True)]
        batch = self._common({k: v.shape[: v.dim() - len(s)] for k, v, s in checked})
        return [v if v.shape == batch + s else v.expand(batch + s) for _, v, s in checked]

    def _forward(self, *values: Tensor) -> Any:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{k}: {self.types.get(k, v)}" for k, v in self.inputs.items())


class Model(Face):
    """Networks with named programs. Every value may have any number of leading batch dimensions.

    A program's inputs are tensors, in the order of `programs[name]`; `shape` is the batch shape of one that takes
    none. Draws come from `generator`. A loss is averaged over the batch.
    """

    programs: dict[str, dict[str, tuple[int, ...]]] = {}  # noqa: RUF012
    exactness: ClassVar[
        dict[str, str]
    ] = {}  # of programs whose log-densities are not exact: unbiased, lower bound, ratio
    data_name = ""  # the first entry of `data`: what is fitted; others, labels and targets too, are in `given_shapes`
    data_shape: tuple[int, ...] = ()
    given_shapes: ClassVar[dict[str, tuple[int, ...]]] = {}
    context: tuple[str, ...] = ()  # those of them that are declared as `given`
    # Networks that are not trained: (name, the one it follows, how much it keeps of itself, every so many steps).
    # 0 steps: at the start.
    followers: ClassVar[tuple[tuple[str, str, float, int], ...]] = ()

    @torch.no_grad()
    def begin(self) -> None:
        """Averages and copies take the weights of what they follow.

        Done when the model is made, and when training begins.
        """
        for name, source, _, _ in self.followers:
            self.get_submodule(name).requires_grad_(False).load_state_dict(self.get_submodule(source).state_dict())
        if self.followers:
            self._steps.zero_()

    @torch.no_grad()
    def follow(self) -> None:
        """To be called after each step of an optimizer.

        Averages move towards what they follow, and copies are taken that are due.
        """
        if self.followers:
            self._steps += 1
        for name, source, decay, every in self.followers:
            if every and int(self._steps) % every == 0:
                mine, theirs = self.get_submodule(name), self.get_submodule(source)
                for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                    p.lerp_(q, 1 - decay)
                for p, q in zip(mine.buffers(), theirs.buffers(), strict=True):
                    p.copy_(q)

    def forward(self, *values: Tensor, generator: torch.Generator | None = None) -> Any:
        """The program `loss`, so that wrappers for several processes see a forward pass."""
        return self.run("loss", values, (), generator)

    def run(self, name: str, values: tuple[Any, ...], shape: Any, generator: torch.Generator | None) -> Any:
        """Runs a program on checked values of one batch shape."""
        fitted = self._fitted(name, values)
        program = self._program(f"_run_{name}", generator)
        if not self.programs[name]:
            fitted = [(shape,) if isinstance(shape, int) else tuple(shape)]
        out = program(*fitted, generator)
        averaged = name.startswith("loss") or name.endswith("_loss")
        return out.mean() if averaged and isinstance(out, Tensor) else out

    def _fitted(self, name: str, values: tuple[Any, ...]) -> list[Any]:
        """A program's values, checked and broadcast to one batch shape."""
        if name not in self.programs:
            raise bad_input(
                f"this model has no program `{name}`", f"its programs are {', '.join(f'`{p}`' for p in self.programs)}"
            )
        inputs = self.programs[name]
        if len(values) != len(inputs):
            expected = ", ".join(f"`{k}`: {self.types.get(k, v)}" for k, v in inputs.items()) or "no values"
            raise bad_input(f"`{name}` got {len(values)} values", f"it takes {expected}")
        if not inputs:
            return []
        checked = [(k, self._check(k, v, s), s) for (k, s), v in zip(inputs.items(), values, strict=True)]
        batch = self._common({k: v.shape[: v.dim() - len(s)] for k, v, s in checked})
        return [v.expand(batch + s) for _, v, s in checked]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}({', '.join(inputs)})" for name, inputs in self.programs.items())
