"""The pattern as lists of equal length: which frame each frame attends in each slot, for kernels whose shapes must not change."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lvsa_compile.policies.contract import Frames

PAGE = 128
"""Tokens of a page of keys."""


@dataclass(frozen=True)
class FrameSlots:
    """``attended[phase][frame]`` are the latent frames that a frame attends, as many in every phase.

    Where a phase attends fewer, the number of frames, which no frame has, stands for none.
    """

    frames: int
    attended: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def slots(self) -> int:
        """Frames that each frame attends, at most."""
        return len(self.attended[0][0])

    @property
    def some_empty(self) -> bool:
        """Whether any slot holds no frame."""
        return any(frame == self.frames for phase in self.attended for row in phase for frame in row)


@functools.lru_cache(maxsize=64)
def frame_slots(pattern: Frames, phases: int) -> FrameSlots:
    """The slots of the first ``phases`` phases of a pattern."""
    attended = [[pattern.attended(frame, phase) for frame in range(pattern.frames)] for phase in range(phases)]
    most = max(len(row) for phase in attended for row in phase)
    return FrameSlots(pattern.frames, tuple(tuple((*row, *[pattern.frames] * (most - len(row))) for row in phase) for phase in attended))


@dataclass(frozen=True)
class PageLayout:
    """How the keys of one sample lie in pages of ``PAGE`` tokens: frames' full pages, those of the text, one of nothing, tails.

    A frame of ``tokens_per_frame`` tokens has full pages and a remainder; the remainders of all frames that a frame attends, and of the
    ``around`` tokens beside the video, are packed into that frame's own *tail* pages.  So only the end of its keys may be part of a page.
    """

    slots: FrameSlots
    tokens_per_frame: int
    around: int

    @property
    def full(self) -> int:
        """Full pages of a frame."""
        return self.tokens_per_frame // PAGE

    @property
    def around_full(self) -> int:
        """Full pages of what is beside the video."""
        return self.around // PAGE

    @property
    def tail(self) -> int:
        """Pages of the remainders that a frame attends."""
        return -(-self.tail_tokens // PAGE)

    @property
    def tail_tokens(self) -> int:
        """Tokens of the remainders that a frame attends."""
        return self.slots.slots * (self.tokens_per_frame % PAGE) + self.around % PAGE

    @property
    def keys(self) -> int:
        """Tokens that a frame attends, those of empty slots counted."""
        return self.slots.slots * self.tokens_per_frame + self.around

    @property
    def pages(self) -> int:
        """Pages of a sample."""
        frames = self.slots.frames
        return frames * (self.full + self.tail) + self.around_full + self.slots.some_empty

    def table(self) -> list[list[list[int]]]:
        """``[phases, frames, pages of a frame's keys]``: which pages of a sample, in order, hold the keys of a frame."""
        frames, text = self.slots.frames, self.slots.frames * self.full
        nothing, tails = text + self.around_full, text + self.around_full + self.slots.some_empty

        def row(frame: int, attended: tuple[int, ...]) -> list[int]:
            own = [nothing if other == frames else other * self.full + page for other in attended for page in range(self.full)]
            own += [text + page for page in range(self.around_full)]
            return own + [tails + frame * self.tail + page for page in range(self.tail)]

        return [[row(frame, attended) for frame, attended in enumerate(phase)] for phase in self.slots.attended]
