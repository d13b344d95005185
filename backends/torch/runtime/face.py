"""What generated modules check of the values that they are called with."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from flowlang.backends.torch.runtime.errors import bad_input
from torch import Tensor, nn

COMPILED: dict[tuple[type, str, Any], Any] = {}  # by class, method and backend: instances share what torch compiles


class Face(nn.Module):
    """A generated module that users call. `types` has the types of its inputs in the spec's words.

    With `jit` its programs run by `torch.compile`: True for torch's own backend, or the name of another.
    """

    types: dict[str, str] = {}  # noqa: RUF012
    jit: bool | str = False
    like: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Has the dtype and the device of the module, also when it has no parameters.
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def _program(self, name: str, generator: torch.Generator | None = None) -> Any:
        """A generated method, compiled where `jit` asks for it; graphs that torch.compile traces know no generator."""
        method = getattr(self, name)
        if not self.jit or generator is not None or torch.compiler.is_compiling():
            return method
        key = (type(self), name, self.jit)
        if key not in COMPILED:
            # Of torch's tracer, which looks at the parts of a value whether it has a gradient or not.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", module="torch")
            backend = "inductor" if self.jit is True else self.jit
            COMPILED[key] = torch.compile(getattr(type(self), name), backend=backend)
        return MethodType(COMPILED[key], self)

    def parameter_groups(
        self, rules: dict[str, dict[str, Any]] | None = None, *, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer, by role and by name; every parameter stands in exactly one.

        `weight_decay` is for weights that multiply values, those of two axes or more; gains, offsets and other
        vectors get none. `rules` maps patterns of parameters' names (`"*.g"`, `"d.*"`) to options; the last that
        fits wins over both.
        """
        rules = rules or {}
        unused, groups = set(rules), dict[tuple[Any, ...], dict[str, Any]]()
        for name, p in self.named_parameters():
            options: dict[str, Any] = {"weight_decay": weight_decay if p.dim() >= 2 else 0.0}
            for pattern, given in rules.items():
                if fnmatchcase(name, pattern):
                    options |= given
                    unused.discard(pattern)
            key = tuple(sorted((k, repr(v)) for k, v in options.items()))
            groups.setdefault(key, {"params": [], **options})["params"].append(p)
        if unused:
            raise bad_input(f"no parameter is named `{sorted(unused)[0]}`", "names are those of `named_parameters()`")
        return list(groups.values())

    def settle(self) -> None:
        """Brings the estimates of the norms of weights to rest, as after a change outside training."""
        for m in self.modules():
            if hasattr(m, "improve"):
                m.settle()

    def certificates(self) -> dict[str, tuple[float, float]]:
        """For each weight of `Lipschitz(c)`: an upper bound of its norm as it is used, and what the proofs allow."""
        held = {n: m for n, m in self.named_modules() if hasattr(m, "improve") and not m.raw.is_meta}
        return {name: (m.norm(), m.bound * m.slack) for name, m in held.items()}

    def certify(self) -> dict[str, tuple[float, float]]:
        """Brings the estimates of norms to rest and gives `certificates()`; refuses a weight that exceeds its bound.

        Done when the module is made, when training ends, and at export.
        """
        self.settle()
        found = self.certificates()
        for name, (norm, bound) in found.items():
            if not norm <= bound:
                raise bad_input(
                    f"the norm of the weight `{name}` is {norm:.6g}, and {bound:.6g} is what makes the flow invertible",
                    "weights that are not finite, or changed outside training, have no certificate",
                )
        return found

    def _to_initialise(self, force: bool) -> bool:
        """Whether parameters that start from data are to be set now; if so, they count as set from here on."""
        done = getattr(self, "initialised", None)
        if done is None or (bool(done) and not force):
            return False
        done.fill_(True)
        return True

    def _initialise(self, *values: Tensor) -> Any:
        raise NotImplementedError

    def _common(self, batches: dict[str, Any]) -> tuple[int, ...]:
        shapes = list(batches.values())
        if all(s == shapes[0] for s in shapes):
            return tuple(shapes[0])
        try:
            return tuple(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            found = ", ".join(f"`{k}` {tuple(s)}" for k, s in batches.items())
            raise bad_input(f"the batch shapes do not fit each other: {found}", "give shapes that broadcast") from None

    def _check(self, name: str, x: Any, shape: tuple[int, ...]) -> Tensor:
        """The value as a tensor of the module's dtype whose last dimensions are `shape`."""
        like = self.like
        if not isinstance(x, Tensor):
            try:
                x = torch.as_tensor(x, dtype=like.dtype, device=like.device)
            except (TypeError, ValueError, RuntimeError):
                raise bad_input(f"`{name}` is a {type(x).__name__}", "give a tensor") from None
        if x.shape[x.dim() - len(shape) :] != shape or x.dim() < len(shape):
            wanted = self.types.get(name, str(shape))
            raise bad_input(
                f"`{name}` has shape {tuple(x.shape)}, and one sample is {wanted}",
                f"give a shape that ends in {shape}; batch dimensions come first",
            )
        if x.dtype != like.dtype:
            if x.is_complex() or x.is_floating_point():
                raise bad_input(
                    f"`{name}` is {x.dtype}, and the module is {like.dtype}",
                    f"convert one of them, as by `.to({like.dtype})`",
                )
            x = x.to(like.dtype)
        if x.device != like.device:
            raise bad_input(
                f"`{name}` is on {x.device}, and the module is on {like.device}",
                f"move one of them, as by `.to({str(like.device)!r})`",
            )
        return x
