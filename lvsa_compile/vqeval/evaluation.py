"""One video from reading to scores."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from lvsa_compile.vqeval.artefacts import artefacts
from lvsa_compile.vqeval.clip import Clip, from_frames, read
from lvsa_compile.vqeval.dynamics import dynamics
from lvsa_compile.vqeval.loop import loop
from lvsa_compile.vqeval.networks import NONE, Networks
from lvsa_compile.vqeval.scores import Scores, Weights, combined
from lvsa_compile.vqeval.spatial import spatial
from lvsa_compile.vqeval.temporal import temporal
from lvsa_compile.vqeval.text import text


def evaluate(
    video: str | PathLike[str] | Any,
    fps: float = 16.0,
    prompt: str | None = None,
    *,
    weights: Weights = "default",
    networks: Networks = NONE,
) -> Scores:
    """Six dimensions of a video's quality, 0 to 100, after VQeval (arXiv 2605.31057); what cannot be computed is None and named.

    Args:
        video: path of a file, or a float tensor ``[frames, 3, H, W]`` in [0, 1].
        fps: frames per second of a tensor; a file says its own.
        prompt: what the video should show; for the dimension ``text``.
        weights: name of the composite's weights, "default" or "paper", or a weight for each dimension by name.
        networks: pretrained networks from folders, see ``load_networks``; without them their metrics are missing.

    Raises:
        VideoQualityError: the video cannot be read, is too long, too large or too short, or an argument cannot be used.
    """
    clip = read(Path(video)) if isinstance(video, (str, PathLike)) else from_frames(video, fps)
    return scored(clip, prompt, weights, networks)


def scored(clip: Clip, prompt: str | None = None, weights: Weights = "default", networks: Networks = NONE) -> Scores:
    """The scores of a clip that was read."""
    found = (
        spatial(clip, networks),
        temporal(clip, networks),
        loop(clip, networks),
        artefacts(clip),
        dynamics(clip, networks),
        text(clip, prompt, networks),
    )
    facts = {
        "name": clip.name,
        "fps": clip.fps,
        "frames": clip.count,
        "rows_columns": clip.size,
        "truncated": clip.truncated,
        "frames_looked_at_closely": len(clip.large),
        "preset": weights if isinstance(weights, str) else "given",
    }
    return combined({dimension.name: dimension for dimension in found}, weights, facts)
