"""From blocks to tokens: where the video lies in a sequence, and the table of key ranges that the attention op reads.

A *query block* is a run of query rows that share their keys: one latent frame, a block of tokens, or a whole text or conditioning segment.
Its keys are a few contiguous ranges ``[start, end)`` of the key sequence, in tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]

OPEN_END = 2**31 - 1
"""End of a range that reaches to the end of its sequence, however long that is."""


@dataclass(frozen=True)
class VideoSpan:
    """Where the video lies in a sequence: ``prefix`` tokens, ``frames * tokens_per_frame`` video tokens, ``suffix`` tokens.

    ``open_ended`` says that ``suffix`` is only what it is now, or unknown (then 0): the table must do for any number of tokens there.
    ``free_start`` says the same of ``prefix``, which is then given as 1: see ``Plan.slopes``.
    """

    prefix: int
    frames: int
    tokens_per_frame: int
    suffix: int
    open_ended: bool = False
    free_start: bool = False

    @property
    def video(self) -> Range:
        """First token of the video, and the one after its last."""
        return self.prefix, self.prefix + self.frames * self.tokens_per_frame

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.video[1] + self.suffix

    @property
    def whole(self) -> Range:
        """The range of all tokens."""
        return 0, OPEN_END if self.open_ended else self.length


@dataclass(frozen=True)
class KeyRangeTable:
    """Which keys each query block attends, in every row that a denoising step may choose.

    ``query_bounds`` holds ``query_blocks + 1`` row numbers of the query; ``key_ranges[row][head][query_block]`` the ranges of that block,
    each list padded with empty ranges to the longest, so that the table is ``[rows, heads or 1, query_blocks, ranges, 2]``.
    """

    query_bounds: tuple[int, ...]
    key_ranges: tuple[tuple[tuple[tuple[Range, ...], ...], ...], ...]

    @property
    def rows(self) -> int:
        """Rows that a denoising step chooses from."""
        return len(self.key_ranges)

    @property
    def heads(self) -> int:
        """Heads that have key ranges of their own; 1 where all heads share them."""
        return len(self.key_ranges[0])

    def with_row_of_everything(self, key: VideoSpan) -> KeyRangeTable:
        """The table with a row more, the last, in which every block attends every key."""
        blocks = [[(key.whole,)] * (len(self.query_bounds) - 1)] * self.heads
        return padded(self.query_bounds, [*self.key_ranges, blocks])

    def restricted(self, allowed: Sequence[Sequence[Range]]) -> KeyRangeTable:
        """The table where each query block attends nothing beside the ranges that ``allowed`` holds for it."""
        return padded(
            self.query_bounds,
            [
                [[intersection(ranges, left) for ranges, left in zip(blocks, allowed, strict=True)] for blocks in heads]
                for heads in self.key_ranges
            ],
        )

    def some_attend_nothing(self) -> bool:
        """Whether any query block attends no key at all, in any row."""
        return any(all(start == end for start, end in ranges) for heads in self.key_ranges for blocks in heads for ranges in blocks)

    def density(self, query: VideoSpan, key: VideoSpan) -> float:
        """Attended pairs of video tokens over all pairs of them, mean over rows and heads."""
        (first, last), pairs = query.video, 0
        for blocks in itertools.chain.from_iterable(self.key_ranges):
            for (start, end), ranges in zip(itertools.pairwise(self.query_bounds), blocks, strict=True):
                attended = intersection(ranges, (key.video,))
                pairs += max(min(end, last) - max(start, first), 0) * sum(high - low for low, high in attended)
        return pairs / (self.rows * self.heads * (last - first) * (key.video[1] - key.video[0]))


def padded(query_bounds: Sequence[int], key_ranges: Sequence[Sequence[Sequence[Sequence[Range]]]]) -> KeyRangeTable:
    """The table of ``key_ranges[row][head][query_block]``, lists of ranges in any order; empty ones are left out, neighbours joined.

    Raises:
        ValueError: a range ends before it begins.

    Example:
        >>> two_blocks = padded((0, 64, 128), [[[[(0, 64)], [(0, 128)]]]])  # one row, for all heads alike
    """
    joined = [[[join_ranges(ranges) for ranges in blocks] for blocks in heads] for heads in key_ranges]
    widest = max((len(ranges) for heads in joined for blocks in heads for ranges in blocks), default=1)
    rows = tuple(tuple(tuple((*ranges, *((0, 0),) * (widest - len(ranges))) for ranges in blocks) for blocks in heads) for heads in joined)
    return KeyRangeTable(tuple(query_bounds), rows)


def query_blocks(span: VideoSpan) -> list[Range]:
    """Rows of each query block of a sequence cut by frames: what is before the video, each latent frame, what is after it."""
    lengths = [n for n in (span.prefix, *[span.tokens_per_frame] * span.frames, span.suffix) if n]
    ends = list(itertools.accumulate(lengths))
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def intersection(a: Sequence[Range], b: Sequence[Range]) -> tuple[Range, ...]:
    """What two lists of sorted ranges have in common."""
    return tuple((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b if max(x[0], y[0]) < min(x[1], y[1]))


def join_ranges(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Ranges in order, those that touch or overlap made one, without empty ones.

    Raises:
        ValueError: a range ends before it begins.
    """
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if end < start:
            raise ValueError(f"the range ({start}, {end}) of keys ends before it begins")
        if joined and joined[-1][1] >= start:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif start < end:
            joined.append((start, end))
    return tuple(joined)
