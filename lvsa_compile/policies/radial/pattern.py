"""Radial attention's pattern: a band around the same place in other frames that narrows with their distance (arXiv 2506.19852)."""

from __future__ import annotations

import math

from lvsa_compile.errors import OptionError

_WIDEST_THIN_BAND = 128  # tokens; the published rule has this number whatever the block is


def frame_window(distance: int, tokens_per_frame: int, decay: float, block: int = 128) -> tuple[float, bool]:
    """How far from its own place a token attends in a frame at a distance, and whether it attends that frame at all.

    Frames up to one apart are attended whole.  Beyond, the half-width halves each time the distance doubles, down to ``block``; where
    it would be under 128 tokens only every so many frames are attended.

    Args:
        distance: latent frames between query and key.
        tokens_per_frame: tokens of a latent frame.
        decay: multiplies the half-width.
        block: least half-width in tokens.

    Returns:
        The half-width in tokens, and whether the frame is attended.

    Raises:
        OptionError: a value that it cannot have.

    Example:
        >>> frame_window(2, 1560, 1.0)
        (512.0, True)
    """
    check(decay, block)
    if distance < 0 or tokens_per_frame < 1:
        raise OptionError("distance", distance, f"of frames of {tokens_per_frame} tokens", "Give 0 or more, and frames of 1 token or more.")
    if distance <= 1:
        return float(tokens_per_frame), True
    share = 2 ** tokens_per_frame.bit_length() / 2 ** distance.bit_length()
    kept = share >= _WIDEST_THIN_BAND or distance % int(_WIDEST_THIN_BAND / share) == 0
    return max(share * decay, float(block)), kept


def check(decay: object, block: object) -> None:
    """Raises OptionError where a pattern cannot be."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay < math.inf:
        raise OptionError("decay", decay, "it multiplies the width of the band", "Give a number above 0; the paper has 0.2 to 1.")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise OptionError("block", block, "not a number of tokens", "Give 1 or more; the paper has 128.")
