"""What float32 leaves of a result, estimated by Monte Carlo arithmetic (Parker 1997): the same program in float64, each
operation's operands and result moved at random by one unit in the last place of float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

UNIT = 2.0**-24
# They move numbers and make none.
MOVES = {
    "cat", "stack", "gather", "index", "index_select", "clone", "copy_", "flip", "where", "_to_copy", "constant_pad_nd", "full",
    "full_like", "zeros", "zeros_like", "ones", "ones_like", "new_zeros", "new_ones", "new_full", "new_empty", "empty", "empty_like",
    "arange", "scatter", "index_put", "index_put_", "sort", "maximum", "minimum", "clamp", "clamp_min", "relu", "neg", "abs",
    "sign", "lift_fresh", "repeat", "roll", "max", "min", "amax", "amin", "scalar_tensor", "fill_",
}  # fmt: skip
# Sums of many terms, which operands may not share.
SUMS = {
    "mm",
    "bmm",
    "addmm",
    "addbmm",
    "baddbmm",
    "sum",
    "mean",
    "convolution",
    "cumsum",
    "dot",
    "mv",
    "addmv",
    "_fft_r2c",
    "_fft_c2r",
}


class Rounding(TorchDispatchMode):
    """Moves results (of sums: operands too) by ± one unit of float32."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, v: Any) -> Any:
        if not isinstance(v, torch.Tensor) or v.dtype != torch.float64:
            return v
        sign = torch.randint(0, 2, v.shape, generator=self.generator).to(v.dtype) * 2 - 1
        return v * (1 + UNIT * sign)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in SUMS:
            args = tree_map(self.moved, args)
        out = func(*args, **(kwargs or {}))
        if func.is_view or name in MOVES or "rand" in name:
            return out
        if func._schema.is_mutable:  # the result is an operand
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                out.copy_(self.moved(out))
            return out
        return tree_map(self.moved, out)


def float32_error(run: Callable[[], list[np.ndarray]], exact: list[np.ndarray], draws: int = 8) -> list[np.ndarray]:
    """How far each number of a float64 program's results is moved by float32 arithmetic: the largest of some draws."""
    worst = [np.zeros(e.shape) for e in exact]
    for seed in range(draws):
        with Rounding(seed):
            found = run()
        for w, f, e in zip(worst, found, exact, strict=True):
            with np.errstate(invalid="ignore"):
                gap = np.abs(f - e)
            np.maximum(w, np.where(np.isfinite(gap), gap, 0.0), out=w)
    return worst
