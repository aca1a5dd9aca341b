"""Radial attention: a band that narrows with the distance of frames; static, for any number of tokens in a frame (arXiv 2506.19852).

Example:
    >>> half_width, kept = radial.frame_window(distance=4, tokens_per_frame=1560, decay=1.0)
"""

from lvsa_compile.policies.radial.pattern import frame_window
from lvsa_compile.policies.radial.policy import Radial

__all__ = ["Radial", "frame_window"]
