"""Two sets of videos beside each other: means, and how sure their difference is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from scipy.stats import bootstrap

from lvsa_compile.vqeval.scores import DIMENSIONS, Scores

_RESAMPLES = 4000
LEAST_VIDEOS = 5  # of each set, from which on an interval is worth its name


@dataclass(frozen=True)
class Difference:
    """Of one dimension or the composite: the means of two sets, and the 95 % interval of the second's less the first's.

    The interval is None where a set has fewer than ``LEAST_VIDEOS`` videos with a score.
    """

    name: str
    first: float
    second: float
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def compared(first: Sequence[Scores], second: Sequence[Scores]) -> list[Difference]:
    """The composite and each dimension that both sets have; with intervals."""
    found = []
    for name in ("composite", *DIMENSIONS):
        sets = [[value for scores in group if (value := getattr(scores, name)) is not None] for group in (first, second)]
        if all(sets):
            found.append(Difference(name, float(numpy.mean(sets[0])), float(numpy.mean(sets[1])), _interval(*sets)))
    return found


def _interval(first: list[float], second: list[float]) -> tuple[float, float] | None:
    if min(len(first), len(second)) < LEAST_VIDEOS:
        return None
    if numpy.ptp(first) == 0 and numpy.ptp(second) == 0:
        return (second[0] - first[0],) * 2

    def difference(a: numpy.ndarray, b: numpy.ndarray, axis: int = -1) -> numpy.ndarray:
        return numpy.asarray(b.mean(axis) - a.mean(axis))

    return bootstrap_interval((first, second), difference)


def bootstrap_interval(sets: Sequence[Sequence[float]], statistic: Callable[..., Any]) -> tuple[float, float]:
    """The 95 % interval of a statistic of sets, which takes ``axis``, by the percentile bootstrap (Efron 1979), seeded."""
    found = bootstrap(sets, statistic, n_resamples=_RESAMPLES, rng=numpy.random.default_rng(0), method="percentile").confidence_interval
    return float(found.low), float(found.high)
