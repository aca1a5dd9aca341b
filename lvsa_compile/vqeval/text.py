"""Text alignment: whether the video shows what the prompt says; nothing but a network can tell."""

from __future__ import annotations

from lvsa_compile.vqeval.scores import Dimension, Metric


def text(prompt: str | None) -> Dimension:
    """Missing: without a prompt, and without a CLIP model."""
    return Dimension("text", (Metric("clip", 1.0, None, why="needs a CLIP model" if prompt else "no prompt was given"),))
