"""What happens in a video of the lab, measured from its pixels: how fast the shape moves, whether it freezes, jumps, doubles or vanishes.

The same measures of true scenes say what is right.  Lengths are in pixels, times in frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scenes import COLOURS
from scipy import ndimage, signal

SEEN = 0.35  # brightness from which a pixel belongs to a shape
LEAST_PIXELS = 5
FROZEN = 0.25  # a step shorter than this; the slowest scene moves 0.63 but where it turns
JUMP = 3.0  # a step longer than this; the fastest scene moves 2.0
TURN = 1.5  # how far a way must go back to count as turned
APART = 4  # frames over which what a shape gains is measured, so that trembling on the spot is no speed


@dataclass(frozen=True)
class Physics:
    """Of one video; steps are from a frame to the next in which a shape is seen in both.

    ``speed`` is the mean step in pixels per frame, jumps left out, and ``late_speed`` that of the last quarter; ``net_speed`` is how far
    the shape gets in ``APART`` frames, per frame; ``acceleration`` the median change of the step in pixels per frame², large where a shape
    trembles.  ``frozen`` and ``jumps`` are shares of steps that hardly move and that are too long for any scene; ``seen``, ``alone`` and
    ``coloured`` shares of frames with a shape, with just one, and with one of the caption's colour.  ``size`` is how much its brightness
    varies, the standard deviation over the mean.  ``turns`` counts how often the way turns, per 16 frames; a turn needs a way before and
    after it, so that short videos have fewer.
    """

    speed: float
    late_speed: float
    net_speed: float
    acceleration: float
    frozen: float
    jumps: float
    seen: float
    alone: float
    coloured: float
    size: float
    turns: float


MEASURES = tuple(Physics.__dataclass_fields__)


@dataclass(frozen=True)
class Sighting:
    """The biggest shape of a frame: its centre (across, down), its brightness, whether it is the only one, its colour by name."""

    centre: tuple[float, float]
    brightness: float
    alone: bool
    colour: str


def sighting(frame: NDArray[np.float32]) -> Sighting | None:
    """What is seen in a frame ``[3, rows, columns]``, None where nothing is."""
    light = frame.max(0)
    labels, count = ndimage.label(light > SEEN, np.ones((3, 3)))
    sizes = ndimage.sum_labels(np.ones_like(light), labels, np.arange(1, count + 1))
    if count == 0 or sizes.max() < LEAST_PIXELS:
        return None
    shape = labels == int(sizes.argmax()) + 1
    weights = np.where(ndimage.binary_dilation(shape), light, 0)
    down, across = ndimage.center_of_mass(weights)
    mean = frame[:, shape].mean(1)
    colour = min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - mean).sum()))
    return Sighting((float(across), float(down)), float(weights.sum()), bool((sizes >= LEAST_PIXELS).sum() == 1), colour)


def physics_of(video: NDArray[np.float32], colour: str) -> Physics:
    """Measures ``video`` ``[frames, 3, rows, columns]`` in [0, 1]."""
    sightings = [sighting(frame) for frame in video]
    seen = [found for found in sightings if found is not None]
    way = np.array([(np.nan, np.nan) if found is None else found.centre for found in sightings])
    masses = np.array([found.brightness for found in seen])
    steps = np.linalg.norm(np.diff(way, axis=0), axis=1)
    real = steps[~np.isnan(steps)]
    calm = np.where(steps > JUMP, np.nan, steps)
    gained = np.linalg.norm(way[APART:] - way[:-APART], axis=1) / APART
    unbroken = np.array([np.isfinite(calm[place : place + APART]).all() for place in range(len(gained))], bool)
    changes = np.linalg.norm(np.diff(way, n=2, axis=0), axis=1)
    return Physics(
        speed=_mean(calm),
        late_speed=_mean(calm[-max(1, len(calm) // 4) :]),
        net_speed=_mean(np.where(unbroken, gained, np.nan)),
        acceleration=float(np.nanmedian(changes)) if np.isfinite(changes).any() else 0.0,
        frozen=float((real < FROZEN).mean()) if len(real) else 1.0,
        jumps=float((real > JUMP).mean()) if len(real) else 0.0,
        seen=len(seen) / len(video),
        alone=sum(found.alone for found in seen) / len(video),
        coloured=sum(found.colour == colour for found in seen) / len(video),
        size=float(masses.std() / masses.mean()) if len(seen) else 1.0,
        turns=_turns(way) * 16 / len(video),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def _turns(way: NDArray[np.float64]) -> int:
    """Times at which the way across or down turns back by at least ``TURN``."""
    seen = way[~np.isnan(way).any(1)]
    if len(seen) < 3:
        return 0
    return sum(len(signal.find_peaks(sign * seen[:, axis], prominence=TURN)[0]) for axis in (0, 1) for sign in (1, -1))
