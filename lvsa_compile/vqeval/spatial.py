"""Spatial quality: whether single frames are sharp and look well."""

from __future__ import annotations

import math

import cv2
import numpy

from lvsa_compile.vqeval.artefacts import noise
from lvsa_compile.vqeval.clip import Clip, Frames
from lvsa_compile.vqeval.networks import NONE, Networks, quality_of
from lvsa_compile.vqeval.scores import Dimension, Metric, by_network, ramp


def spatial(clip: Clip, networks: Networks = NONE) -> Dimension:
    """Sharpness from the Laplacian, and VQeval's ratings of single frames where they were given.

    VQeval counts frames whose Laplacian variance is below 100; that jumps, and noise passes for detail.  Here sharpness is a ramp over the
    logarithm of the variance without that of the noise.  CLIP-IQA is asked of the CLIP model that was given, with one pair of texts.
    """
    variances = [_variance(pair[0]) for pair in clip.large_grey]
    sharpness = [ramp(float(numpy.log10(variance)), -0.5, 2.5) for variance in variances]
    return Dimension(
        "spatial",
        (
            _rating(clip, networks, "brisque", (80.0, 0.0)),
            _rating(clip, networks, "niqe", (10.0, 2.0)),
            by_network("clip_iqa", 0.35, quality_of(clip, networks).get("clip_iqa"), (0.0, 1.0), "of 1", "CLIP", surrogate=True),
            Metric("sharpness", 0.15, float(numpy.mean(sharpness)), float(numpy.median(variances)), "Laplacian variance, median"),
        ),
    )


def _rating(clip: Clip, networks: Networks, name: str, worst_best: tuple[float, float]) -> Metric:
    network = getattr(networks, name)
    rated = None if network is None else float(network(clip.large[clip.chosen, 0]).mean())
    if rated is not None and not math.isfinite(rated):
        return Metric(name, 0.25, None, why="pyiqa has no number for frames as small as these")
    return by_network(name, 0.25, rated, worst_best, "mean", "pyiqa")


def _variance(frame: Frames) -> float:
    """Of the Laplacian, less what noise adds: its squares sum to 20, and noise is measured in the smoother parts."""
    return max(float(cv2.Laplacian(frame, cv2.CV_64F).var()) - 30 * noise(frame) ** 2, 1e-3)
