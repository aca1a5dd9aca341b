"""Radial attention as a policy: static key ranges for any number of tokens in a frame (arXiv 2506.19852)."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

from lvsa_compile import reasons
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import OptionError
from lvsa_compile.policies.contract import Facts, Geometry, Plan
from lvsa_compile.policies.radial.pattern import check, frame_window
from lvsa_compile.policies.tables import OPEN_END, KeyRangeTable, Range, VideoSpan, padded
from lvsa_compile.reasons import Miss


@dataclass(frozen=True)
class Radial:
    """Each token attends its own and the next latent frames, and the same place of farther ones, in a band that narrows with distance.

    Query blocks are ``block`` tokens of a frame and share the band of all their rows.  The published code keeps blocks of a grid of 128
    tokens instead, and fails where frames do not end on it.  Tokens beside the video are attended by every query, and attend everything.
    The first denoising steps are dense in the paper, 10 to 12 of 50: give ``dense_steps`` of the backend.

    Args:
        decay: multiplies the half-width of the bands; the paper has 0.2 to 1.
        block: tokens of a query block, and the least half-width.
        first_frame: every query attends the first latent frame whole, as published for Wan.

    Raises:
        OptionError: a value that it cannot have, named with its remedy.

    Example:
        >>> torch.compile(model, backend="lvsa", options={"policy": "radial", "dense_steps": 10})
    """

    name: ClassVar[str] = "radial"
    needs_horizon: ClassVar[bool] = False

    decay: float = 1.0
    block: int = 128
    first_frame: bool = True

    def __post_init__(self) -> None:
        check(self.decay, self.block)
        if not isinstance(self.first_frame, bool):
            raise OptionError("first_frame", self.first_frame, "not True or False", "Give True or False.")

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        """Not where every token attends every token."""
        frames, tokens = geometry.total_frames, geometry.key.tokens_per_frame
        if all(band is None for band in self._bands(frames, tokens)):
            return reasons.PATTERN_FULL.because(f"{frames} latent frames of {tokens} tokens, policy 'radial' with decay={self.decay:g}")
        return None

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        """One row for all denoising steps."""
        table = _table(self, geometry.query, geometry.key, geometry.first_frame, geometry.total_frames)
        return Plan(self, geometry, facts, table)

    def _bands(self, frames: int, tokens: int) -> list[int | None]:
        """By distance of frames the half-width in tokens, None where frames are attended whole, -1 where not at all."""
        found: list[int | None] = []
        for distance in range(frames):
            half_width, kept = frame_window(distance, tokens, self.decay, self.block)
            found.append(-1 if not kept else None if half_width >= tokens - 1 else math.floor(half_width))
        return found

    def ranges(self, frame: int, first: int, last: int, bands: list[int | None], key: VideoSpan) -> list[Range]:
        """What rows at places ``[first, last)`` of a frame attend, in tokens of the key sequence."""
        size = key.tokens_per_frame
        found = [(0, key.prefix), (key.video[1], key.whole[1])]
        for other in range(key.frames):
            band, start = bands[abs(frame - other)], key.prefix + other * size
            if band is None or (self.first_frame and other == 0):
                found.append((start, start + size))
            elif band >= 0:
                found.append((start + max(first - band, 0), start + min(last + band, size)))
        return [each for each in found if each[0] < each[1]]


@dropped_on_reset
@functools.lru_cache(maxsize=16)
def _table(policy: Radial, query: VideoSpan, key: VideoSpan, first_frame: int, total_frames: int) -> KeyRangeTable:
    size = query.tokens_per_frame
    bands = policy._bands(total_frames, size)
    bounds, blocks = [0], []
    if query.prefix:
        bounds.append(query.prefix)
        blocks.append([key.whole])
    cuts = [*range(0, size, policy.block), size]
    for frame in range(query.frames):
        for first, last in itertools.pairwise(cuts):
            bounds.append(query.prefix + frame * size + last)
            blocks.append(policy.ranges(first_frame + frame, first, last, bands, key))
    if query.open_ended or query.suffix:
        bounds.append(OPEN_END if query.open_ended else bounds[-1] + query.suffix)
        blocks.append([key.whole])
    return padded(bounds, [[blocks]])


POLICY = Radial
