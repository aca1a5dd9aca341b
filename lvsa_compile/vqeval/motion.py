"""What moves between neighbouring frames: dense optical flow (Farneback 2003), by OpenCV."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy

from lvsa_compile.vqeval.artefacts import grain_of
from lvsa_compile.vqeval.clip import Clip, Frames, Numbers

_GRAIN, _MOST_BLUR = 2.0, 4.0  # of 255, and pixels
_SERIES = 512  # pairs of neighbours that motion over time is looked at in, at most


@dataclass(frozen=True)
class Motion:
    """``flows`` ``[m, H, W, 2]`` in pixels per frame of the large pairs; ``series`` their mean length in the small frames, in time.

    ``series`` is scaled to a longest side of 854 pixels, as the large frames have; ``stride`` frames lie between its numbers.
    """

    flows: Numbers
    series: Numbers
    stride: int

    @property
    def lengths(self) -> Numbers:
        """Pixels per frame at each pixel of the large pairs."""
        return numpy.asarray(numpy.linalg.norm(self.flows, axis=3), numpy.float32)


@functools.lru_cache(maxsize=1)
def motion_of(clip: Clip) -> Motion:
    """The motion of a clip."""
    grain = grain_of(clip)
    flows = numpy.stack([_flow(*(_halved(frame, grain) for frame in pair)) * 2 for pair in clip.large_grey])
    stride = max(1, -(-(clip.count - 1) // _SERIES))
    grey = (clip.grey * 255).astype(numpy.uint8)
    scale = max(clip.large.shape[2:4]) / max(grey.shape[1:])
    series = [float(numpy.linalg.norm(_flow(grey[i], grey[i + 1]), axis=2).mean()) * scale for i in range(0, clip.count - 1, stride)]
    return Motion(flows, numpy.array(series, numpy.float32), stride)


def _halved(frame: Frames, grain: float) -> Frames:
    """Half the size, which is as telling and four times as fast, and blurred where there is grain, whose flow is no motion."""
    halved = cv2.resize(frame, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return (cv2.GaussianBlur(halved, (0, 0), min(_MOST_BLUR, grain / 2.5)) if grain > _GRAIN else halved).astype(numpy.uint8)


def _flow(first: Frames, second: Frames) -> Numbers:
    start = numpy.zeros((*first.shape, 2), numpy.float32)
    return numpy.asarray(cv2.calcOpticalFlowFarneback(first, second, start, 0.5, 3, 15, 3, 5, 1.2, 0), numpy.float32)
