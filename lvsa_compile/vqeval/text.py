"""Text alignment: whether the video shows what the prompt says; nothing but a network can tell."""

from __future__ import annotations

import numpy
from scipy.stats import linregress

from lvsa_compile.vqeval.clip import Clip
from lvsa_compile.vqeval.networks import NONE, Networks, series_of
from lvsa_compile.vqeval.scores import Dimension, Metric, ramp

_BEST = 0.45  # a cosine of CLIP's embeddings of an image and a text that describes it well
_SURE = 0.05  # p value from which on a drift counts


def text(clip: Clip, prompt: str | None, networks: Networks = NONE) -> Dimension:
    """VQeval's: the mean cosine of CLIP's embeddings of frames and prompt, less a penalty where it falls over the video for sure.

    CLIP reads the first 77 tokens of a prompt.
    """
    if not prompt or networks.clip_images is None or networks.clip_text is None:
        why = "no prompt was given" if not prompt else "needs a folder with weights of CLIP, which was not given"
        return Dimension("text", (Metric("clip", 1.0, None, why=why),))
    cosines = series_of(clip, networks.clip_images)[0] @ networks.clip_text([prompt])[0]
    drift = linregress(numpy.array(clip.places, float), cosines) if len(cosines) > 2 and float(numpy.ptp(cosines)) > 0 else None
    penalty = min(15.0, 1000 * abs(float(drift.slope))) if drift is not None and drift.slope < 0 and drift.pvalue < _SURE else 0.0
    mean = float(cosines.mean())
    return Dimension("text", (Metric("clip", 1.0, max(0.0, ramp(mean, 0.0, _BEST) - penalty), mean, "mean cosine"),))
