"""Axis annotations across graph breaks: what of a tensor's axes the next graph of a forward is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence

from lvsa_compile.axes.algebra import ARANGE, INPUT, LOST, Axis, Concat, Digit, Factor, Size, Source, axis_size, leaves
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.digits import with_digits

_GENERATED, _CONDITIONING, _COORDINATES = "^", "~", "@"
_MARKS = (_GENERATED, _CONDITIONING, _COORDINATES)
_OTHER = f"{_CONDITIONING}other"


def is_conditioning(node_name: str) -> bool:
    """Whether what comes from another graph is known not to be the generated video."""
    return node_name.startswith(_CONDITIONING)


def shows_generated(axes: Axes) -> bool:
    """Whether axes that were handed on run along the generated video."""
    return any(is_generated(digit.source.node_name) for axis in axes for factor in leaves(axis) for digit in factor.digits)


def is_known_video(node_name: str) -> bool:
    """Whether what comes from another graph is known to be a video, generated or not."""
    return node_name.startswith((_GENERATED, _CONDITIONING)) and node_name != _OTHER


def is_generated(node_name: str) -> bool:
    """Whether what comes from another graph is known to be the generated video."""
    return node_name.startswith(_GENERATED)


def of_coordinates(name: str, value: int) -> str:
    """The node name of an input that may hold the coordinates of tokens; ``value`` is the number of what it holds."""
    return f"{_COORDINATES}{name}#{value}"


def input_of(node_name: str) -> str:
    """The name of the input of a forward that a node name of another graph stands for."""
    bare = node_name[1:] if node_name.startswith(_MARKS) else node_name
    return bare.rpartition("#")[0] if node_name.startswith(_COORDINATES) else bare


LostAt = Callable[[Source], str]
"""Says where the trail of a LOST source was lost, for a graph that does not hold the op."""


def carried(axes: Axes, generated: Container[str], lost_at: LostAt) -> Axes | None:
    """What the next graph should know of a tensor's axes; None where they show no picture, video or table of counts.

    Blocks that pass the same video on get equal axes, whatever else they did to it: only the names of latents, counts of a rope table
    and lost orders are kept.  ``generated`` are the names of inputs that hold the generated video.
    """
    remaining = tuple(_carried_axis(axis, position, generated, lost_at) for position, axis in enumerate(axes))
    return (
        remaining
        if any(digit.source.node_name != _OTHER for axis in remaining for factor in leaves(axis) for digit in factor.digits)
        else None
    )


def _carried_axis(axis: Axis, position: int, generated: Container[str], lost_at: LostAt) -> Axis:
    factors = [factor for factor in axis if isinstance(factor, Factor)]
    telling = _telling([digit.source for factor in factors for digit in factor.digits], generated, _is_counted(factors))
    done: list[Factor | Concat] = []
    for factor in axis:
        if isinstance(factor, Concat):
            done.append(Concat(tuple(_carried_axis(part, position, generated, lost_at) for part in factor.parts)))
        else:
            digits = {
                Digit(_renamed(d.source, generated, lost_at), d.size, d.stride, d.start) for d in factor.digits if d.source in telling
            }
            done.append(Factor(factor.size, frozenset(digits or {_other(position, factor.size)})))
    whole = Factor(axis_size(axis), frozenset({_other(position, axis_size(axis))}))
    return tuple(done) if not axis or any(d.source.node_name != _OTHER for f in leaves(tuple(done)) for d in f.digits) else (whole,)


def runs_along_counts(axis: Axis) -> bool:
    """Whether an axis, or a part that is joined into it, runs along three counts, as those of frames, rows and columns in a rope table."""
    parts = [part for factor in axis if isinstance(factor, Concat) for part in factor.parts]
    return _is_counted([factor for factor in axis if isinstance(factor, Factor)]) or any(map(runs_along_counts, parts))


def _is_counted(factors: Sequence[Factor]) -> bool:
    return sum(ARANGE in factor.kinds for factor in factors) >= 3


def without_coordinates(axis: Axis, position: int, generated: Container[str]) -> Axis:
    """The axis at a position where the video on it is known: coordinates that the tokens were met with then say nothing more.

    Only an input's shape says that it may hold coordinates; one that is ``generated`` holds none.
    """

    def tells(name: str) -> bool:
        return name in generated or not name.startswith(_COORDINATES)

    def bare(factor: Factor | Concat) -> Factor | Concat:
        if isinstance(factor, Concat):
            return Concat(tuple(tuple(map(bare, part)) for part in factor.parts))
        digits = frozenset(digit for digit in factor.digits if tells(digit.source.node_name))
        return Factor(factor.size, digits or frozenset({_other(position, factor.size)}))

    return tuple(map(bare, axis))


def _other(position: int, size: Size) -> Digit:
    return Digit(Source(INPUT, "other tokens", position, size, _OTHER, 3), size)


def _telling(sources: Sequence[Source], generated: Container[str], is_table: bool) -> frozenset[Source]:
    """Which of the sources that the factors of one axis run along are worth keeping.

    Latents; else the packed tokens, of all inputs that run along the one of the highest rank, and the counts that were witnessed; else
    the counts of a rope table, and the generated video where they count it.
    """
    lost = [source for source in sources if source.kind == LOST and source.origins]
    inputs = [source for source in sources if source.kind == INPUT and source.node_name != _OTHER]
    packed = [source for source in inputs if source.stands_for_axis]
    latents = packed or [source for source in inputs if source.rank >= 5 or (source.rank == 4 and source.node_name in generated)]
    counted = [source for source in sources if source.kind == ARANGE and source.node_name == ""]
    counts = {source for source in sources if source.kind == ARANGE}
    if latents:
        return frozenset((*lost, *latents))
    by_rank = sorted(inputs, key=lambda source: (-source.rank, source.node_name))
    if counted:
        return frozenset((*lost, *counted, *by_rank[:1]))
    video = [source for source in by_rank if source.node_name in generated or is_generated(source.node_name)]
    coordinates = [source for source in inputs if source.node_name.startswith(_COORDINATES)]
    return frozenset((*lost, *(counts if is_table else ()), *video[:1], *coordinates))


def _renamed(source: Source, generated: Container[str], lost_at: LostAt) -> Source:
    """The source under a name that no node of another graph has."""

    def marked(node_name: str) -> str:
        if node_name.startswith(_MARKS):
            return node_name
        return (_GENERATED if node_name in generated else _CONDITIONING) + node_name

    if source.kind == LOST:
        return Source(LOST, lost_at(source), 0, source.size, "", 1, frozenset(map(marked, source.origins)))

    def inside(digit: Digit) -> Digit:
        return dataclasses.replace(digit, source=_renamed(digit.source, generated, lost_at))

    node_name = marked(source.node_name) if source.node_name else ""
    return dataclasses.replace(source, node_name=node_name, stands_for_axis=with_digits(source.stands_for_axis, inside))


def unmarked(axes: Axes, inputs: Container[str]) -> Axes:
    """The axes with the names that the forward's own code has for its ``inputs``."""

    def name(node_name: str) -> str:
        return node_name[1:] if node_name.startswith((_GENERATED, _CONDITIONING)) and node_name[1:] in inputs else node_name

    def bare(digit: Digit) -> Digit:
        source = digit.source
        origins, inside = frozenset(map(name, source.origins)), with_digits(source.stands_for_axis, bare)
        return dataclasses.replace(
            digit, source=dataclasses.replace(source, node_name=name(source.node_name), origins=origins, stands_for_axis=inside)
        )

    return tuple(with_digits(axis, bare) for axis in axes)


def in_numbers(axes: Axes, number: Callable[[Size], int]) -> Axes:
    """The axes with every size as the int it has now."""

    def factor_of(factor: Factor | Concat) -> Factor | Concat:
        if isinstance(factor, Concat):
            return Concat(tuple(tuple(map(factor_of, part)) for part in factor.parts))
        digits = (
            Digit(dataclasses.replace(d.source, size=number(d.source.size)), number(d.size), number(d.stride), number(d.start))
            for d in factor.digits
        )
        return Factor(number(factor.size), frozenset(digits))

    return tuple(tuple(map(factor_of, axis)) for axis in axes)
