"""How far the frames of a video are apart, by small blurred pictures or by embeddings, in ways that the evidence for loops is asked of."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy

from lvsa_compile.vqeval.artefacts import noise
from lvsa_compile.vqeval.clip import Clip, Numbers
from lvsa_compile.vqeval.networks import Images, series_of

_MOST_COMPARED = 600
_ELSEWHERE = 4.0  # from how many distances of neighbours on a frame is elsewhere, where neighbours have much in common
_UNRELATED = math.sqrt(2)  # distance of pictures that have nothing in common, in contrasts
_GRAIN_TAKEN = 0.8  # share of what grain adds to squared distances that is taken off; the rest keeps a frozen video with grain frozen


@dataclass(frozen=True)
class Distances:
    """``between[i, j]`` is how far frames are apart, root mean square over the contrast of the pictures; every ``stride``-th frame.

    ``changed`` is how far neighbours are apart in those parts of the picture that change, the median: a thing that crosses a still
    picture by its own width in a frame has nothing in common with where it was, however little of the picture it is.
    """

    between: Numbers
    stride: int
    changed: float

    @property
    def gap(self) -> int:
        """From how many frames apart on a return counts."""
        return max(3, len(self.between) // 10)

    @property
    def step(self) -> float:
        """Between neighbours, the median."""
        return max(float(numpy.median(numpy.diag(self.between, 1))), 1e-4)

    @property
    def elsewhere(self) -> float:
        """From how many distances of neighbours on a frame is elsewhere: fewer where neighbours have little in common themselves."""
        return min(_ELSEWHERE, max(1.2, 0.85 * _UNRELATED / max(self.changed, 1e-3)))

    @property
    def common(self) -> float:
        """How much neighbours have in common, 0 to 1; where it is nothing, being no farther apart than they are says nothing."""
        return min(1.0, max(0.0, 4 * (1 - max(self.step, self.changed) / _UNRELATED)))

    @cached_property
    def by_lag(self) -> Numbers:
        """The mean at each distance in time, up to where fewer than ``gap`` pairs are so far apart."""
        return numpy.array([numpy.diag(self.between, lag).mean() for lag in range(len(self.between) - self.gap)], numpy.float32)

    @property
    def far(self) -> float:
        """Between frames that are ``gap`` to half the video apart, the median over that."""
        return float(numpy.median(self.by_lag[self.gap : len(self.between) // 2 + 1]))


@functools.lru_cache(maxsize=1)
def distances_of(clip: Clip) -> Distances:
    """Distances of all pairs of frames."""
    stride = max(1, -(-clip.count // _MOST_COMPARED))
    frames = [cv2.GaussianBlur(cv2.resize(frame, (64, 36), interpolation=cv2.INTER_AREA), (0, 0), 1.0) for frame in clip.small[::stride]]
    flat = numpy.stack(frames).reshape(len(frames), -1).astype(numpy.float32) / 255
    contrast = max(float(flat.std(axis=1).mean()), 1e-2)
    squares = (flat**2).mean(1)
    products = flat @ flat.T / flat.shape[1]
    apart = numpy.maximum(squares[:, None] + squares[None] - 2 * products, 0)
    apart = numpy.maximum(apart - _GRAIN_TAKEN * _grain(clip, apart), (1 - _GRAIN_TAKEN) * apart)
    between = numpy.sqrt(apart) / contrast
    changed = float(numpy.median([_apart_where_changed(a, b, contrast) for a, b in itertools.pairwise(numpy.stack(frames) / 255)]))
    return Distances(between.astype(numpy.float32), stride, changed)


def _grain(clip: Clip, apart: Numbers) -> float:
    """What grain adds to squared distances: no more than the noise of single frames, nor than is left at no distance in time."""
    if len(apart) < 3:
        return 0.0
    rows, columns = clip.small.shape[1:3]
    chosen = (clip.grey[:: max(1, clip.count // 9)] * 255).astype(numpy.uint8)
    single = float(numpy.median([noise(frame) for frame in chosen])) / 255
    kept = min(1.0, 64 * 36 / (rows * columns)) / (4 * math.pi)  # of the variance, after scaling down and blurring
    first, second = (float(numpy.median(numpy.diag(apart, lag))) for lag in (1, 2))
    return float(max(0.0, min(2 * single**2 * kept, (4 * first - second) / 3)))


def _apart_where_changed(first: Numbers, second: Numbers, contrast: float) -> float:
    """How far two pictures are apart in contrasts of the parts that differ; 0 where they differ by no more than grain."""
    differs = numpy.abs(first - second).max(-1)
    most = float(differs.max())
    if most < max(0.02, 0.15 * contrast):
        return 0.0
    parts = cv2.dilate((differs > 0.3 * most).astype(numpy.uint8), numpy.ones((7, 7), numpy.uint8)) > 0
    one, other = (picture[parts] - picture[parts].mean(0) for picture in (first, second))
    alike = float((one * other).sum() / max(1e-9, 0.5 * ((one**2).sum() + (other**2).sum())))
    return float(math.sqrt(2 * max(0.0, 1 - alike)))


def embedded_distances(clip: Clip, network: Images) -> Distances:
    """Distances of unit vectors, of the frames that were looked at closely."""
    frames, _ = series_of(clip, network)
    between = numpy.sqrt(numpy.maximum(2 - 2 * frames @ frames.T, 0)).astype(numpy.float32)
    return Distances(between, max(1, clip.count // len(frames)), float(numpy.median(numpy.diag(between, 1))))
