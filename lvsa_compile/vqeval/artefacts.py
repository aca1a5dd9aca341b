"""Artefacts of single frames: banding, tiles, halos and noise."""

from __future__ import annotations

import functools
import math
from typing import Any

import cv2
import numpy

from lvsa_compile.vqeval.clip import Clip, Frames, Numbers
from lvsa_compile.vqeval.scores import Dimension, Metric, ramp

_BLOCK = 16
_EDGES, _LEAST_EDGES, _FAR = 400, 12, 12  # edges looked at, at most and at least, and how many pixels on either side


def artefacts(clip: Clip) -> Dimension:
    """VQeval's parts and weights; anatomy needs a network and is missing, never "no errors"."""
    grey = clip.large_grey[clip.chosen, 0]
    levels = float(numpy.median([levels_apart(frame) for frame in clip.large[clip.chosen, 0]]))
    measured = {name: float(numpy.median([measure(frame) for frame in grey])) for name, measure in _MEASURES.items()}
    banded = min(ramp(math.log2(levels), math.log2(24), 1.0), ramp(measured["banding"], 0.7, 0.1))
    return Dimension(
        "artefacts",
        (
            Metric("banding", 0.25, banded, levels, f"levels apart; {measured['banding']:.2f} of the levels left out in smooth parts"),
            Metric("anatomy", 0.25, None, why="needs MediaPipe, which is not used here"),
            Metric("tiling", 0.15, ramp(measured["tiling"], 0.65, 0.25), measured["tiling"], "autocorrelation of edges elsewhere"),
            Metric("halo", 0.15, ramp(measured["halo"], 0.15, 0.04), measured["halo"], "overshoot beside edges, share of the edge"),
            Metric("noise", 0.20, ramp(grain_of(clip), 20.0, 2.0), grain_of(clip), "standard deviation, of 255"),
        ),
    )


def banding(frame: Frames) -> float:
    """Share of the grey levels between the darkest and the brightest that blocks with a gentle slope leave out; survives compression."""
    blocks = _blocks(frame).astype(int)
    square = blocks.reshape(-1, _BLOCK, _BLOCK)
    range_ = blocks.max(1) - blocks.min(1)
    slopes = numpy.zeros(len(blocks))
    for axis in (1, 2):  # all of the way in one direction, which a grid or a tile has not
        way = numpy.abs(numpy.diff(square, axis=axis)).sum((1, 2))
        net = numpy.abs(square.take(-1, axis) - square.take(0, axis)).sum(1)
        slopes = numpy.maximum(slopes, net / numpy.maximum(way, 1) * (way > _BLOCK))
    rough = numpy.abs(numpy.diff(square, axis=2)).mean((1, 2))
    smooth = (range_ >= 4) & (range_ <= 40) & (rough < 3) & (slopes > 0.6)
    if smooth.sum() < 8:
        return 0.0
    left_out = [1 - (len(numpy.unique(block)) - 1) / (block.max() - block.min()) for block in blocks[smooth]]
    return float(numpy.mean(left_out))


def levels_apart(frame: Frames) -> float:
    """How far the levels of a coloured frame ``[rows, columns, 3]`` lie apart, 1 where all are used, the median of its channels.

    The largest step of which nearly all differences of neighbours are multiples, and many are that step itself; a picture of fewer than
    three levels is a drawing, and no banded picture.
    """
    return float(numpy.median([_lattice(frame[..., channel].astype(int)) for channel in range(3)]))


def _lattice(channel: Any) -> float:
    differences = numpy.concatenate([numpy.abs(numpy.diff(channel, axis=axis)).ravel() for axis in (0, 1)])
    counts = numpy.bincount(differences, minlength=256).astype(float)
    counts[0] = 0
    used = numpy.flatnonzero(numpy.bincount(channel.ravel(), minlength=256) > 0.005 * channel.size)
    if counts.sum() < 30 or len(used) < 3:
        return 1.0
    counts /= counts.sum()
    sizes, found = numpy.arange(256), 1.0
    for step in numpy.arange(2, 128.5, 0.5):
        near = 1.01 if step >= 6 else 0.51
        fits = numpy.abs(sizes - step * numpy.round(sizes / step)) <= near
        by_chance = min(0.99, 2 * near / step)
        fills = len(used) >= 0.5 * (used[-1] - used[0]) / step  # a drawing leaves most of its levels out
        if fills and (counts[fits].sum() - by_chance) / (1 - by_chance) > 0.85 and counts[numpy.abs(sizes - step) <= 1.01].sum() > 0.4:
            found = float(step)
    return found


def tiling(frame: Frames) -> float:
    """How much a frame's edges repeat across and down: the height of the autocorrelation's peaks over the dips before them, the mean."""
    scale = min(1.0, 256 / max(frame.shape))
    small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(numpy.float32)
    across, down = (cv2.Sobel(small, cv2.CV_32F, *order, ksize=3) / 8 for order in ((1, 0), (0, 1)))
    if float(numpy.hypot(across, down).mean()) < 0.3:
        return 0.0
    return min(1.0, (_repeats(across, down, 0) + _repeats(across, down, 1)) / 2)


def _repeats(across: Any, down: Any, axis: int) -> float:
    """The highest peak of the edges' autocorrelation along an axis, over the deepest dip of the third of the way before it."""
    length = across.shape[axis]
    found = []
    for lag in range(length // 2 + 1):
        early, late = (numpy.take(numpy.stack([across, down]), range(*ends), axis + 1) for ends in ((0, length - lag), (lag, length)))
        found.append(float((early * late).sum() / max(1e-6, float(numpy.sqrt((early**2).sum() * (late**2).sum())))))
    peak = 0.0
    for lag in range(4, len(found) - 1):
        if found[lag] >= max(found[lag - 1], found[lag + 1]):
            peak = max(peak, found[lag] - min(found[max(2, lag - max(3, lag // 3)) : lag]))
    return peak


def halo(frame: Frames) -> float:
    """How far brightness shoots over beside edges, over the height of the edge and over what it does farther away, half the median."""
    grey = cv2.GaussianBlur(frame, (0, 0), 1.0).astype(numpy.float32)
    across, down = (cv2.Sobel(grey, cv2.CV_32F, *order, ksize=3) / 8 for order in ((1, 0), (0, 1)))
    strength = numpy.hypot(across, down)
    margin = min(_FAR + 1, min(strength.shape) // 6)
    strength[:margin], strength[-margin:], strength[:, :margin], strength[:, -margin:] = 0, 0, 0, 0
    peaks = (strength == cv2.dilate(strength, numpy.ones((3, 3)))) & (strength > 4)
    rows, columns = numpy.nonzero(peaks)
    strongest = numpy.argsort(strength[rows, columns])[::-1][:_EDGES]
    rows, columns = rows[strongest], columns[strongest]
    if len(rows) < _LEAST_EDGES:
        return 0.0
    norm = strength[rows, columns]
    normal = numpy.stack([down[rows, columns] / norm, across[rows, columns] / norm])

    def profile(near: int, far: int) -> Numbers:
        """Brightness along the normal, from ``near`` to ``far`` pixels on."""
        along = numpy.arange(near, far + 1)[:, None]
        places = [(at + along * part).astype(numpy.float32) for at, part in zip((rows, columns), normal, strict=True)]
        return numpy.asarray(cv2.remap(grey, places[1], places[0], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), numpy.float32)

    bright, dark = numpy.median(profile(7, _FAR - 1), 0), numpy.median(profile(1 - _FAR, -7), 0)
    height = numpy.maximum(bright - dark, 1.0)
    beside = numpy.maximum(profile(1, 6).max(0) - bright, 0) + numpy.maximum(dark - profile(-6, -1).min(0), 0)
    farther = numpy.maximum(profile(7, _FAR).max(0) - bright, 0) + numpy.maximum(dark - profile(-_FAR, -7).min(0), 0)
    clear = height > 15
    return max(0.0, float(numpy.median(((beside - farther) / height)[clear]))) / 2 if clear.sum() >= _LEAST_EDGES else 0.0


def noise(frame: Frames) -> float:
    """Standard deviation of noise by Immerkær's mask (CVIU 1996), in the smoother half of the blocks."""
    mask = numpy.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], numpy.float32)
    response = numpy.abs(cv2.filter2D(frame.astype(numpy.float32), cv2.CV_32F, mask))
    blocks = _blocks(response).mean(1) if min(frame.shape) >= _BLOCK else response.mean()[None]
    return float(numpy.sort(blocks)[: max(1, len(blocks) // 2)].mean() * numpy.sqrt(numpy.pi / 2) / 6)


@functools.lru_cache(maxsize=1)
def grain_of(clip: Clip) -> float:
    """The noise of a clip's large frames, the median, of 255."""
    return float(numpy.median([noise(frame) for frame in clip.large_grey[clip.chosen, 0]]))


_MEASURES = {"banding": banding, "tiling": tiling, "halo": halo}


def _blocks(frame: Frames | Numbers) -> Frames | Numbers:
    """``[blocks, pixels of a block]``."""
    rows, columns = (size // _BLOCK * _BLOCK for size in frame.shape)
    cut = frame[:rows, :columns].reshape(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
    return cut.transpose(0, 2, 1, 3).reshape(-1, _BLOCK * _BLOCK)
