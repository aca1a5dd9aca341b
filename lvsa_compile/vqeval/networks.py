"""What the metrics know of pretrained networks: embeddings and ratings of frames, each there or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy

from lvsa_compile.vqeval.clip import Clip, Frames, Numbers

_ASKED = {"clip_iqa": ("Good photo.", "Bad photo."), "aesthetic": ("Beautiful photo.", "Ugly photo.")}

Images = Callable[[Frames], Numbers]
"""Frames ``[n, rows, columns, 3]`` to unit vectors ``[n, width]``, or to one number each ``[n]``."""


@dataclass(frozen=True)
class Networks:
    """What was given, each None where it was not: embeddings of frames and of text as unit vectors, and scores of single frames.

    ``contrast`` is by what CLIP multiplies cosines before a softmax.
    """

    clip_images: Images | None = None
    clip_text: Callable[[list[str]], Numbers] | None = None
    dino_images: Images | None = None
    brisque: Images | None = None
    niqe: Images | None = None
    contrast: float = 100.0


NONE = Networks()


@functools.lru_cache(maxsize=2)
def series_of(clip: Clip, network: Images) -> tuple[Numbers, Numbers]:
    """A clip's large pairs embedded: the first frames ``[pairs, width]``, which lie evenly over the video, and their next frames."""
    pairs = clip.large
    embedded = network(pairs.reshape(-1, *pairs.shape[2:])).reshape(len(pairs), 2, -1)
    return embedded[:, 0], embedded[:, 1]


def quality_of(clip: Clip, networks: Networks) -> dict[str, float]:
    """The mean probability that CLIP gives to one text rather than its opposite, as CLIP-IQA asks it (arXiv 2207.12396).

    ``clip_iqa`` is good rather than bad, ``aesthetic`` beautiful rather than ugly.
    """
    if networks.clip_images is None or networks.clip_text is None:
        return {}
    frames = series_of(clip, networks.clip_images)[0]
    found = {}
    for name, texts in _ASKED.items():
        cosines = frames @ networks.clip_text(list(texts)).T
        found[name] = float((1 / (1 + numpy.exp(-networks.contrast * (cosines[:, 0] - cosines[:, 1])))).mean())
    return found
