"""What an evaluation says: six dimensions, each made of metrics, of which some may be missing; and their weights by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from lvsa_compile.errors import VideoQualityError

DIMENSIONS = ("spatial", "temporal", "loop", "artefacts", "dynamics", "text")
Weights: TypeAlias = "str | Mapping[str, float]"
"""A preset by name, or a weight for each dimension that counts."""
PRESETS: dict[str, dict[str, float]] = {
    "default": {"spatial": 0.20, "temporal": 0.25, "loop": 0.15, "artefacts": 0.20, "dynamics": 0.10, "text": 0.10},
    "paper": {"spatial": 0.20, "loop": 0.15, "artefacts": 0.20, "dynamics": 0.10, "text": 0.10},
}
"""Weights of the composite: "default" are those of VQeval 1.0, "paper" those behind the tables of arXiv 2605.31057, which leave
temporal coherence out: a frozen video is most coherent."""


@dataclass(frozen=True)
class Metric:
    """One measurement of a dimension: its ``value`` from 0 (worst) to 100, its weight there, what was ``measured`` and in what unit.

    ``value`` is None where it could not be computed, and ``why`` says why; it then counts nothing.  ``surrogate`` marks what stands in for
    a metric of a pretrained network, with thresholds of its own.
    """

    name: str
    weight: float
    value: float | None
    measured: float | None = None
    unit: str = ""
    why: str = ""
    surrogate: bool = False


@dataclass(frozen=True)
class Dimension:
    """A dimension: the weighted mean of the metrics that could be computed, None where none could."""

    name: str
    metrics: tuple[Metric, ...]

    @property
    def score(self) -> float | None:
        """From 0 to 100."""
        known = [(metric.weight, metric.value) for metric in self.metrics if metric.value is not None]
        whole = sum(weight for weight, _ in known)
        return sum(weight * value for weight, value in known) / whole if whole else None


@dataclass(frozen=True)
class Scores:
    """The scores of one video, 0 to 100, None where a dimension could not be computed.

    ``composite`` is their mean by ``weights``, which are those of the preset over what is there, so that they add up to 1; ``missing``
    names dimensions and ``dimension.metric`` that could not be computed, with why; ``details`` holds the dimensions with their metrics,
    facts of the video and what was sampled.
    """

    spatial: float | None
    temporal: float | None
    loop: float | None
    artefacts: float | None
    dynamics: float | None
    text: float | None
    composite: float | None
    weights: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {_number(getattr(self, name))}" for name in DIMENSIONS)
        return f"composite {_number(self.composite)} ({shown})"


def combined(dimensions: Mapping[str, Dimension], preset: Weights, facts: Mapping[str, Any]) -> Scores:
    """The scores of a video from its dimensions.

    Raises:
        VideoQualityError: there is no such preset, or what was given are no weights.
    """
    values = {name: dimensions[name].score if name in dimensions else None for name in DIMENSIONS}
    known = {name: weight for name, weight in weights_of(preset).items() if values[name] is not None}
    whole = sum(known.values())
    weights = {name: weight / whole for name, weight in known.items()} if whole else {}
    composite = sum(weight * (values[name] or 0.0) for name, weight in weights.items()) if weights else None
    missing = {name: "no metric of it could be computed" for name, value in values.items() if value is None}
    missing |= {
        f"{name}.{metric.name}": metric.why
        for name, dimension in dimensions.items()
        for metric in dimension.metrics
        if metric.value is None
    }
    return Scores(**values, composite=composite, weights=weights, missing=missing, details={**facts, "dimensions": dict(dimensions)})


def weights_of(given: Weights) -> dict[str, float]:
    """Weights of dimensions, from a preset or as given.

    Raises:
        VideoQualityError: there is no such preset, or a weight is of no dimension or not a positive number.
    """
    if isinstance(given, str):
        if given not in PRESETS:
            raise VideoQualityError("weights", given, "not a known preset", f"Choose one of: {', '.join(PRESETS)}.")
        return PRESETS[given]
    for name, weight in given.items():
        if name not in DIMENSIONS:
            raise VideoQualityError("weights", name, "not a dimension", f"Choose some of: {', '.join(DIMENSIONS)}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise VideoQualityError("weights", {name: weight}, "not a number of at least 0", "Give a weight, such as 0.2.")
    if not sum(given.values()):
        raise VideoQualityError("weights", dict(given), "nothing counts", "Give at least one dimension a weight above 0.")
    return dict(given)


def by_network(
    name: str, weight: float, measured: float | None, worst_best: tuple[float, float], unit: str, network: str, *, surrogate: bool = False
) -> Metric:
    """A metric that a pretrained network measured, on a ramp from ``worst_best[0]`` to ``[1]``; missing where the network was not given."""
    if measured is None:
        return Metric(name, weight, None, why=f"needs a folder with weights of {network}, which was not given", surrogate=surrogate)
    return Metric(name, weight, ramp(measured, *worst_best), measured, unit, surrogate=surrogate)


def beside(stand_in: Metric, network: Metric) -> tuple[Metric, Metric]:
    """A metric that needs no network and the one of a network that it stands in for: where both are there, each counts half."""
    if network.value is None:
        return stand_in, network
    return replace(stand_in, weight=stand_in.weight / 2), replace(network, weight=network.weight / 2)


def ramp(value: float, worst: float, best: float) -> float:
    """0 to 100, linear between ``worst`` and ``best``, whichever is larger."""
    if math.isnan(value):
        return 0.0
    return 100.0 * min(1.0, max(0.0, (value - worst) / (best - worst)))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
