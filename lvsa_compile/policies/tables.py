"""From frames to tokens: the table of key ranges that the attention op reads.

A *query block* is a run of query rows that share their keys: one latent frame, or a whole text or conditioning segment.  Its keys
are a few contiguous ranges ``[start, end)`` of the key sequence, in tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lvsa_compile.policies.lvsa.frame_pattern import FramePattern

Range = tuple[int, int]

OPEN_END = 2**31 - 1
"""End of a range that reaches to the end of its sequence, however long that is."""


@dataclass(frozen=True)
class VideoSpan:
    """Where the video lies in a sequence: ``prefix`` tokens, ``frames * tokens_per_frame`` video tokens, ``suffix`` tokens.

    ``open_ended`` says that ``suffix`` is only what it is now, or unknown (then 0): the table must do for any number of tokens there.
    ``free_start`` says the same of ``prefix``: see ``slopes``.
    """

    prefix: int
    frames: int
    tokens_per_frame: int
    suffix: int
    open_ended: bool = False
    free_start: bool = False

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.prefix + self.frames * self.tokens_per_frame + self.suffix


@dataclass(frozen=True)
class KeyRangeTable:
    """All phases of a pattern over one query and one key sequence.

    ``query_bounds`` holds ``query_blocks + 1`` row numbers; ``key_ranges[phase][query_block]`` the ranges of that block, each list
    padded with empty ranges to the longest, so that the table is a rectangle ``[phases, query_blocks, ranges, 2]``.
    """

    query_bounds: tuple[int, ...]
    key_ranges: tuple[tuple[tuple[Range, ...], ...], ...]

    @property
    def phases(self) -> int:
        """Rows of the table a denoising step chooses from."""
        return len(self.key_ranges)


@functools.lru_cache(maxsize=64)
def key_range_table(
    pattern: FramePattern,
    query: VideoSpan,
    key: VideoSpan,
    rotate: bool = True,
    dense_row: bool = False,
    allowed: tuple[tuple[Range, ...], ...] | None = None,
) -> KeyRangeTable:
    """The table of ``pattern`` for video at ``query`` in the query and at ``key`` in the key sequence.

    ``rotate=False`` keeps phase 0 alone; ``dense_row`` adds a row after the last phase in which every block attends everything.
    Tokens outside the video are attended by every row, and their rows attend everything (arXiv 2605.31057, joint attention).
    ``allowed`` holds for each query block, in the order of ``query_blocks``, the ranges that a mask leaves it; it attends nothing else.
    """
    bounds = [0]
    blocks: list[int | None] = []  # the latent frame of each query block, None for a block that attends everything
    for length, frame in [
        (query.prefix, None),
        *((query.tokens_per_frame, f) for f in range(query.frames)),
        (OPEN_END if query.open_ended else query.suffix, None),
    ]:
        if length:
            bounds.append(min(bounds[-1] + length, OPEN_END))
            blocks.append(frame)
    everything: tuple[Range, ...] = ((0, OPEN_END if key.open_ended else key.length),)
    phases = [
        [everything if f is None else _token_ranges(pattern.attended(f, phase), key) for f in blocks]
        for phase in range(pattern.phases if rotate else 1)
    ]
    if dense_row:
        phases.append([everything] * len(blocks))
    if allowed is not None:
        phases = [[intersection(ranges, left) for ranges, left in zip(phase, allowed, strict=True)] for phase in phases]
    widest = max(len(ranges) for phase in phases for ranges in phase)
    padded = tuple(tuple((*ranges, *((0, 0),) * (widest - len(ranges))) for ranges in phase) for phase in phases)
    return KeyRangeTable(tuple(bounds), padded)


def slopes(pattern: FramePattern, query: VideoSpan, key: VideoSpan, rotate: bool = True, dense_row: bool = False) -> KeyRangeTable:
    """By how much every entry of the table grows when the prefixes with a free start grow by one token; the rest of it is 0.

    Entries are linear in the prefixes: for ``p`` prefix tokens they are those for one token and ``(p - 1)`` times these.
    """

    def table(tokens: int) -> KeyRangeTable:
        spans = (dataclasses.replace(span, prefix=tokens) if span.free_start else span for span in (query, key))
        return key_range_table(pattern, *spans, rotate, dense_row)

    one, two = table(1), table(2)
    phases = tuple(
        tuple(tuple((c - a, d - b) for (a, b), (c, d) in zip(x, y, strict=True)) for x, y in zip(of_one, of_two, strict=True))
        for of_one, of_two in zip(one.key_ranges, two.key_ranges, strict=True)
    )
    return KeyRangeTable(tuple(b - a for a, b in zip(one.query_bounds, two.query_bounds, strict=True)), phases)


def _token_ranges(frames: list[int], key: VideoSpan) -> tuple[Range, ...]:
    """Token ranges of the sorted ``frames`` and of everything around the video, touching ranges joined."""
    size, video_end = key.tokens_per_frame, key.prefix + key.frames * key.tokens_per_frame
    pieces = [
        (0, key.prefix),
        *((key.prefix + f * size, key.prefix + (f + 1) * size) for f in frames),
        (video_end, OPEN_END if key.open_ended else key.length),
    ]
    return join_ranges([piece for piece in pieces if piece[0] < piece[1]])


def query_blocks(span: VideoSpan) -> list[Range]:
    """Rows of each query block of a sequence: what is before the video, each latent frame, what is after it."""
    lengths = [n for n in (span.prefix, *[span.tokens_per_frame] * span.frames, span.suffix) if n]
    ends = list(itertools.accumulate(lengths))
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def intersection(a: Sequence[Range], b: Sequence[Range]) -> tuple[Range, ...]:
    """What two lists of sorted ranges have in common."""
    return tuple((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b if max(x[0], y[0]) < min(x[1], y[1]))


def join_ranges(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Sorted ranges with touching neighbours made one."""
    joined: list[Range] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
