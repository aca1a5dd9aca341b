"""Where a video is continued: its first frames attend each other, and the rest of them attends all."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lvsa_compile.axes.algebra import Size, Source, same
from lvsa_compile.layout.token_layout import CONDITIONING, SCRAMBLED, VIDEO, Segment, TokenLayout


@dataclass(frozen=True)
class Given:
    """The first ``frames`` of a video, counted along ``frame_sources``, which attend nothing but each other."""

    frame_sources: frozenset[Source]
    frames: Size


def given_frames(layouts: Iterable[tuple[TokenLayout, TokenLayout]]) -> frozenset[Given]:
    """What the layouts of query and key of attention in a forward say is given of a video that is continued."""
    alone = (query.segments[0] for query, key in layouts if len(query.segments) == 1 and query == key)
    return frozenset(
        Given(segment.grid.frame_sources, segment.grid.frames)
        for segment in alone
        if segment.kind == SCRAMBLED and segment.grid is not None and same(segment.grid.first, 0)
    )


def continuing(query: TokenLayout, key: TokenLayout, given: Collection[Given]) -> tuple[TokenLayout, TokenLayout]:
    """The layouts of query and key as they came, or with the frames that are generated as the video.

    Those are a video's last frames, where a query holds them, the keys hold all frames, and those before are ``given``: among the keys
    they are conditioning.
    """
    last = [segment for segment in query.segments if segment.kind == SCRAMBLED and segment.grid is not None]
    whole = key.of_kind(VIDEO)
    if len(last) != 1 or len(whole) != 1 or query.of_kind(VIDEO):
        return query, key
    parts = _before_and_after(whole[0], last[0], given)
    if not parts:
        return query, key
    return _with(query, last[0], parts[1:]), _with(key, whole[0], parts)


def _before_and_after(whole: Segment, last: Segment, given: Collection[Given]) -> list[Segment]:
    """The frames of a video before its last ones, and those; none where the first are not ``given``, or ``last`` not the others."""
    assert whole.grid is not None
    assert last.grid is not None
    first, frames, tokens = last.grid.first, last.grid.frames, last.grid.tokens_per_frame
    together = same(first + frames, whole.grid.frames) and same(tokens, whole.grid.tokens_per_frame)
    known = any(same(each.frames, first) and each.frame_sources & last.grid.frame_sources & whole.grid.frame_sources for each in given)
    if not (together and known):
        return []
    after = dataclasses.replace(whole.grid, frames=frames, shape=(frames, *whole.grid.shape[1:]))
    return [Segment(CONDITIONING, first * tokens, whole.source), Segment(VIDEO, frames * tokens, whole.source, after)]


def _with(layout: TokenLayout, segment: Segment, parts: list[Segment]) -> TokenLayout:
    """A layout with ``parts`` in place of a segment."""
    at = layout.segments.index(segment)
    return dataclasses.replace(layout, segments=(*layout.segments[:at], *parts, *layout.segments[at + 1 :]))
