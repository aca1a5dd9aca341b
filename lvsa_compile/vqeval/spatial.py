"""Spatial quality: whether single frames are sharp."""

from __future__ import annotations

import cv2
import numpy

from lvsa_compile.vqeval.artefacts import noise
from lvsa_compile.vqeval.clip import Clip, Frames
from lvsa_compile.vqeval.scores import Dimension, Metric, ramp

_NO_NETWORK = "needs pyiqa and its weights, which are never downloaded here"


def spatial(clip: Clip) -> Dimension:
    """Sharpness from the Laplacian; the no-reference networks of VQeval 1.0 are missing.

    VQeval counts frames whose Laplacian variance is below 100; that jumps, and noise passes for detail.  Here sharpness is a ramp over the
    logarithm of the variance without that of the noise.
    """
    variances = [_variance(pair[0]) for pair in clip.large_grey]
    sharpness = [ramp(float(numpy.log10(variance)), -0.5, 2.5) for variance in variances]
    return Dimension(
        "spatial",
        (
            Metric("brisque", 0.25, None, why=_NO_NETWORK),
            Metric("niqe", 0.25, None, why=_NO_NETWORK),
            Metric("clip_iqa", 0.35, None, why=_NO_NETWORK),
            Metric("sharpness", 0.15, float(numpy.mean(sharpness)), float(numpy.median(variances)), "Laplacian variance, median"),
        ),
    )


def _variance(frame: Frames) -> float:
    """Of the Laplacian, less what noise adds: its squares sum to 20, and noise is measured in the smoother parts."""
    return max(float(cv2.Laplacian(frame, cv2.CV_64F).var()) - 30 * noise(frame) ** 2, 1e-3)
