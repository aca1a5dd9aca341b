"""Loop: whether the video comes back to where it was, or never left.

VQeval 1.0 looks at the similarities of CLIP embeddings, with thresholds that belong to CLIP.  Here frames are compared as small blurred
pictures, so that nothing pretrained is needed, and thresholds are derived anew: distances are measured against the distance of
neighbours and the contrast of the picture, so that a still camera with something moving is no loop and a frozen video is one.  Where CLIP
is given, the same is asked of the distances of its embeddings, which see that a scene is there again though its pixels differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy

from lvsa_compile.vqeval.clip import Clip, Numbers
from lvsa_compile.vqeval.distances import Distances, distances_of, embedded_distances
from lvsa_compile.vqeval.motion import motion_of
from lvsa_compile.vqeval.networks import NONE, Networks
from lvsa_compile.vqeval.scores import Dimension, Metric, beside, by_network

LEAST_FRAMES = 10
_LEAST_RHYTHM = 12  # steps
_WEIGHTS = {"cycle": 0.35, "recurrence": 0.25, "flow_period": 0.20, "autocorrelation": 0.20}
_AGAIN = 1.0  # distance of a frame that comes back, in distances of neighbours
_STANDS = 0.5  # distance in contrasts from which on nothing stands still


def loop(clip: Clip, networks: Networks = NONE) -> Dimension:
    """VQeval's four parts with its weights; cycle and recurrence half by pictures and half by CLIP, where it was given."""
    why = "" if clip.count >= LEAST_FRAMES else f"the video has {clip.count} frames, {LEAST_FRAMES} are the least a loop can be told from"
    if why:
        return Dimension("loop", tuple(Metric(name, weight, None, why=why) for name, weight in _WEIGHTS.items()))
    distances = distances_of(clip)
    cycle, recurrence = _cycle(distances), _recurrence(distances)
    embedded = None if networks.clip_images is None else embedded_distances(clip, networks.clip_images)
    clip_cycle, clip_recurrence = (None, None) if embedded is None else (_cycle(embedded), _recurrence(embedded))
    still = _stays(distances) > 0.9
    steps = numpy.diag(distances.between, 1)
    period = None if still else _rhythm(_period, motion_of(clip).series, cycle)
    again = None if still else _rhythm(_comes_again, steps, cycle)
    nothing = "nothing moves, so there is no rhythm"
    return Dimension(
        "loop",
        (
            *beside(
                _metric("cycle", cycle, "of 1: how much of a cycle", surrogate=True),
                by_network("clip_cycle", _WEIGHTS["cycle"], clip_cycle, (1.0, 0.0), "of 1: how much of a cycle", "CLIP"),
            ),
            *beside(
                _metric("recurrence", recurrence, "of 1: frames that are there again", surrogate=True),
                by_network(
                    "clip_recurrence", _WEIGHTS["recurrence"], clip_recurrence, (1.0, 0.0), "of 1: frames that are there again", "CLIP"
                ),
            ),
            _metric("flow_period", period, "of 1: how much of a rhythm", nothing),
            _metric("autocorrelation", again, "of 1: how much of a rhythm", nothing, surrogate=True),
        ),
    )


def _metric(name: str, found: float | None, unit: str, why: str = "", *, surrogate: bool = False) -> Metric:
    """From 0, nothing of the kind, to 1; or why it could not be told."""
    if found is None:
        return Metric(name, _WEIGHTS[name], None, why=why, surrogate=surrogate)
    return Metric(name, _WEIGHTS[name], 100 * (1 - found), found, unit, surrogate=surrogate)


def _cycle(distances: Distances) -> float:
    return max(_dip(distances), _mirror(distances), _stays(distances), _stood(distances))


def _stood(distances: Distances) -> float:
    """The longest time for which the video stands still, as a share of it: no frame is farther than the closest neighbours are."""
    between, count = distances.between, len(distances.between)
    near = min(_STANDS, max(1.5 * float(numpy.percentile(numpy.diag(between, 1), 10)), 0.01))
    lengths = [int(numpy.argmax(numpy.append(between[place, place:] > near, True))) - 1 for place in range(count)]
    return distances.common * max(lengths) / (count - 1)


def _stays(distances: Distances) -> float:
    """1 where frames far apart are no farther from each other than neighbours: the video never leaves."""
    return distances.common * (1 - _how_far(distances.far, distances))


def _how_far(distance: float, distances: Distances) -> float:
    """0 for a distance of neighbours or less, 1 for a frame that is elsewhere."""
    ratio = max(distance / distances.step, 1e-6)
    return min(1.0, max(0.0, math.log(ratio / _AGAIN) / math.log(distances.elsewhere / _AGAIN)))


def _dip(distances: Distances) -> float:
    """How far the mean distance falls at some lag below what it was before: the period of a hard loop brings it to nothing."""
    lags, count = distances.by_lag, len(distances.between)
    before = numpy.maximum.accumulate(lags)
    fall = _fallen(lags / numpy.maximum(before, 1e-6))
    share = numpy.minimum(1, 2 * (count - numpy.arange(len(lags))) / count)  # a repeat of the last quarter is half a cycle
    return float((fall * share)[distances.gap :].max(initial=0.0))


def _mirror(distances: Distances) -> float:
    """How near frames are that lie equally far before and after some moment: a video that turns back."""
    count, gap = len(distances.between), distances.gap
    best = 0.0
    for middle in range(gap, count - gap):
        reach = numpy.arange(gap // 2 + 1, min(middle, count - 1 - middle) + 1)
        reach = reach[2 * reach < len(distances.by_lag)]
        if len(reach) < gap:
            continue
        nearness = distances.between[middle - reach, middle + reach] / numpy.maximum(distances.by_lag[2 * reach], 1e-6)
        best = max(best, float(_fallen(nearness.mean())) * min(1.0, 4 * len(reach) / count))
    return best


def _fallen(share: Any) -> Any:
    """0 where a distance is at least 0.7 of what it should be, 1 where it is at most 0.2."""
    return numpy.clip((0.7 - share) / 0.5, 0, 1)


def _recurrence(distances: Distances) -> float:
    """Share of frames that are there again at least ``gap`` later or earlier, as near as their neighbours are."""
    between, count = distances.between, len(distances.between)
    apart = numpy.abs(numpy.arange(count)[:, None] - numpy.arange(count)[None]) >= distances.gap
    nearest = numpy.where(apart, between, numpy.inf).min(1)
    return float(numpy.mean([1 - _how_far(float(near), distances) for near in nearest])) * distances.common


def _rhythm(measure: Callable[[Numbers], float], series: Numbers, cycle: float) -> float:
    """How much of a rhythm a series has, 0 to 1, by a measure and by how deep it goes.

    What is shorter than four frames is stutter and the raster of pixels, and counts only so far as the pictures cycle.
    """
    if len(series) < _LEAST_RHYTHM:
        return 0.0
    slow = numpy.convolve(series, numpy.ones(max(4, len(series) // 16)) / max(4, len(series) // 16), "valid").astype(numpy.float32)
    return max(measure(slow) * _depth(slow), cycle * measure(series) * _depth(series))


def _depth(series: Numbers) -> float:
    """How much a series varies, 0 for hardly to 1."""
    return min(1.0, max(0.0, (float(series.std()) / max(float(series.mean()), 1e-9) - 0.15) / 0.2))


def _period(series: Numbers) -> float:
    """VQeval's: the largest share of one frequency in the power of the motion's strength, above 0.3."""
    power = numpy.abs(numpy.fft.rfft((series - series.mean()) * numpy.hanning(len(series)))) ** 2
    share = float(power[3:].max(initial=0.0) / max(power[1:].sum(), 1e-12))  # slower than three periods in the video is a trend
    return min(1.0, max(0.0, (share - 0.3) / 0.4))


def _comes_again(steps: Numbers) -> float:
    """Height of the peak to which the autocorrelation of step lengths comes back after it has fallen; smooth change alone has none."""
    centred = steps - steps.mean()
    whole = float((centred**2).sum())
    if whole < 1e-9:
        return 0.0
    lags = numpy.correlate(centred, centred, "full")[len(steps) - 1 :] / whole
    lags = lags[: len(steps) // 2] * len(steps) / (len(steps) - numpy.arange(len(steps) // 2))
    fallen = numpy.flatnonzero(lags < 0.2)
    return min(1.0, max(0.0, float(lags[fallen[0] :].max()))) if len(fallen) else 0.0
