"""Tails of data: tail indices, the plan of a tail-adaptive flow, and how far two tails lie apart.

Source: Laszkiewicz et al. 2022, arXiv 2206.10311 (card 028). The authors combine several estimators of an outside
package; here the moments estimator (Dekkers, Einmahl & de Haan 1989) tells light tails from heavy ones and Hill's
estimator (Hill 1975) gives the index of those that are heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LIGHT = 10.0  # a larger tail index counts as light (the paper's rule)


def upper_order(x: NDArray[Any], share: float) -> NDArray[Any]:
    """log of the largest |x| over the one below them: the k log-spacings that both estimators use."""
    size = np.sort(np.abs(x))[::-1]
    k = max(2, min(len(size) - 1, round(share * len(size))))
    if size[k] <= 0:
        raise ValueError("more than half of the values are 0: no tail can be seen")
    logs: NDArray[Any] = np.log(size[:k]) - np.log(size[k])
    return logs


def hill(x: ArrayLike, share: float = 0.01) -> float:
    """Hill's estimate of the tail index of |x| (Student-t: its degrees of freedom) from the largest `share`."""
    mean = float(np.mean(upper_order(np.asarray(x, np.float64).ravel(), share)))
    return np.inf if mean <= 0 else 1 / mean


def moments(x: ArrayLike, share: float = 0.01) -> float:
    """The moments estimate of the tail index of |x|; infinite where the tail falls faster than any power."""
    logs = upper_order(np.asarray(x, np.float64).ravel(), share)
    first, second = float(np.mean(logs)), float(np.mean(logs**2))
    if second <= 0 or first * first >= second:
        return np.inf
    ξ = first + 1 - 0.5 / (1 - first * first / second)
    return 1 / ξ if ξ > 0 else np.inf


def tail_index(x: ArrayLike, share: float = 0.01) -> float:
    """The tail index of one marginal: Hill's where the moments estimate says heavy, infinity where it says light."""
    found = moments(x, share)
    return np.inf if found > LIGHT else hill(x, share)


@dataclass(frozen=True)
class Plan:
    """What `mtaf` asks for: data columns sorted light first, how many are light, an index for each heavy one."""

    order: list[int]
    light: int
    df: list[float]

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of `flowlang.compile("mtaf", ..)`."""
        return {"dims": len(self.order), "order": self.order, "light": self.light, "df": self.df}


def plan(data: ArrayLike, share: float = 0.01) -> Plan:
    """The plan for data [samples, dims], from the tail index of each column about its median."""
    x = np.asarray(data, np.float64)
    if x.ndim != 2:
        raise ValueError(f"data are [samples, dims], not {list(x.shape)}")
    index = [tail_index(c - np.median(c), share) for c in x.T]
    light = [j for j, v in enumerate(index) if v > LIGHT]
    heavy = [j for j, v in enumerate(index) if v <= LIGHT]
    return Plan(light + heavy, len(light), [index[j] for j in heavy])


def tail_value_at_risk(x: ArrayLike, level: float = 0.99) -> float:
    """The mean of |x| beyond its `level` quantile (tVaR)."""
    size = np.abs(np.asarray(x, np.float64).ravel())
    return float(size[size >= np.quantile(size, level)].mean())


def tail_area(x: ArrayLike, y: ArrayLike, level: float = 0.95, points: int = 200) -> float:
    """The area between two tails in a log-log plot of quantiles of |x| and |y| beyond `level`, and their diagonal."""
    p = 1 - (1 - level) * np.geomspace(1, 1e-2, points)
    a, b = (np.log(np.quantile(np.abs(np.asarray(v, np.float64).ravel()), p)) for v in (x, y))
    return float(np.trapezoid(np.abs(b - a), a))
