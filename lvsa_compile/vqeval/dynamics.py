"""Dynamics: whether anything moves, and in how many ways."""

from __future__ import annotations

import math

import numpy

from lvsa_compile.vqeval.clip import Clip
from lvsa_compile.vqeval.motion import motion_of
from lvsa_compile.vqeval.networks import NONE, Networks, quality_of
from lvsa_compile.vqeval.scores import Dimension, Metric, by_network, ramp

_BINS = 16
_MOVES = 0.25  # pixels per frame


def dynamics(clip: Clip, networks: Networks = NONE) -> Dimension:
    """How fast the fastest twentieth of the picture moves, and how even its directions are.

    VQeval 1.0 counts pairs whose mean flow is above a pixel, which a small thing before a still camera never reaches; the fastest
    twentieth of the pixels is what VBench's dynamic degree looks at (arXiv 2311.17982).
    """
    motion = motion_of(clip)
    lengths = motion.lengths
    fastest = numpy.sort(lengths.reshape(len(lengths), -1), axis=1)[:, -max(1, lengths[0].size // 20) :].mean(1)
    degree = float(numpy.mean([ramp(float(speed), 0.1, 2.0) for speed in fastest]))
    moving = lengths > _MOVES
    entropy = None
    if moving.any():
        angles = numpy.arctan2(motion.flows[..., 1], motion.flows[..., 0])[moving]
        shares = numpy.histogram(angles, _BINS, (-numpy.pi, numpy.pi), weights=lengths[moving])[0]
        shares = shares / shares.sum()
        entropy = float((shares[shares > 0] * -numpy.log2(shares[shares > 0])).sum())
    return Dimension(
        "dynamics",
        (
            Metric("degree", 0.35, degree, float(numpy.median(fastest)), "pixels per frame of the fastest twentieth, median"),
            Metric(
                "directions", 0.25, None if entropy is None else 100 * entropy / math.log2(_BINS) * min(1.0, degree / 20), entropy, "bits",
                why="" if entropy is not None else "nothing moves, so it has no direction",
            ),
            by_network("aesthetic", 0.40, quality_of(clip, networks).get("aesthetic"), (0.0, 1.0), "of 1", "CLIP", surrogate=True),
        ),
    )  # fmt: skip
