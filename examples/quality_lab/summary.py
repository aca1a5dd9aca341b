"""What the lab's results come to: means over seeds with 95 % bootstrap intervals (Efron 1979), and paired differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lvsa_compile.vqeval.comparison import bootstrap_interval


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and its interval."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero; for differences."""
        return self.low > 0 or self.high < 0


def values_of(results: dict[str, Any], method: str, multiple: int, measure: str) -> list[float]:
    """One number per seed.

    Raises:
        KeyError: there is no such run.
    """
    for run in results["runs"]:
        if (run["method"], run["multiple"]) == (method, multiple):
            return [video[measure] for video in run["videos"]]
    raise KeyError((method, multiple))


def mean_of(results: dict[str, Any], method: str, multiple: int, measure: str) -> Mean:
    """Over all seeds."""
    return _mean(values_of(results, method, multiple, measure))


def difference(results: dict[str, Any], method: str, other: str, multiple: int, measure: str) -> Mean:
    """``method`` less ``other``, seed by seed: both began from the same noise and caption."""
    pairs = zip(values_of(results, method, multiple, measure), values_of(results, other, multiple, measure), strict=True)
    return _mean([mine - theirs for mine, theirs in pairs])


def _mean(values: list[float]) -> Mean:
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return Mean(mean, mean, mean)
    return Mean(mean, *bootstrap_interval((values,), np.mean))
