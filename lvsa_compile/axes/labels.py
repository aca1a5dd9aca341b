"""What is kept of a tensor's axes when it leaves the graph it was made in, and the tensors of which something is kept.

A forward may be several graphs: Dynamo breaks it, or its blocks are compiled one by one.  What one graph found out about its outputs is
said of the tensors themselves, so that the next graph that gets such a tensor goes on from there.  Nothing is said of tensors that eager
code made of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Container, Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile.axes.algebra import ARANGE, INPUT, LOST, Axis, Concat, Digit, Factor, Size, Source, axis_size, leaves
from lvsa_compile.axes.call import Axes

_GENERATED, _CONDITIONING = "^", "~"
_OTHER = f"{_CONDITIONING}other"


def is_conditioning(place: str) -> bool:
    """Whether what comes from another graph is known not to be the generated video."""
    return place.startswith(_CONDITIONING)


def shows_generated(axes: Axes) -> bool:
    """Whether axes that were handed on run along the generated video."""
    return any(is_generated(digit.source.place) for axis in axes for factor in leaves(axis) for digit in factor.digits)


def is_told(place: str) -> bool:
    """Whether what comes from another graph is known to be a video, generated or not."""
    return place.startswith((_GENERATED, _CONDITIONING)) and place != _OTHER


def is_generated(place: str) -> bool:
    """Whether what comes from another graph is known to be the generated video."""
    return place.startswith(_GENERATED)


LostAt = Callable[[Source], str]
"""Says where the trail of a LOST source was lost, for a graph that does not hold the op."""


def carried(axes: Axes, generated: Container[str], lost_at: LostAt) -> Axes | None:
    """What the next graph should know of a tensor's axes; None where they show no picture, video or table of counts.

    Blocks that pass the same video on get equal axes, whatever else they did to it: only the places of latents, counts of a rope table
    and lost orders are kept.  ``generated`` are the places of inputs that hold the generated video.
    """
    kept = tuple(_kept(axis, position, generated, lost_at) for position, axis in enumerate(axes))
    return kept if any(digit.source.place != _OTHER for axis in kept for factor in leaves(axis) for digit in factor.digits) else None


def _kept(axis: Axis, position: int, generated: Container[str], lost_at: LostAt) -> Axis:
    telling = _telling([digit.source for factor in axis if isinstance(factor, Factor) for digit in factor.digits], generated)
    done: list[Factor | Concat] = []
    for factor in axis:
        if isinstance(factor, Concat):
            done.append(Concat(tuple(_kept(part, position, generated, lost_at) for part in factor.parts)))
        else:
            told = {Digit(_renamed(d.source, generated, lost_at), d.size, d.stride, d.start) for d in factor.digits if d.source in telling}
            done.append(Factor(factor.size, frozenset(told or {_other(position, factor.size)})))
    whole = Factor(axis_size(axis), frozenset({_other(position, axis_size(axis))}))
    return tuple(done) if not axis or any(d.source.place != _OTHER for f in leaves(tuple(done)) for d in f.digits) else (whole,)


def _other(position: int, size: Size) -> Digit:
    return Digit(Source(INPUT, "other tokens", position, size, _OTHER, 3), size)


def _telling(sources: Sequence[Source], generated: Container[str]) -> frozenset[Source]:
    """Which of the sources that the factors of one axis run along are worth keeping.

    Latents; else the packed tokens, of all inputs that run along the one of the highest rank, and the counts that were witnessed; else
    the counts of a rope table, and the generated video where they count it.
    """
    lost = [source for source in sources if source.kind == LOST and source.origins]
    inputs = [source for source in sources if source.kind == INPUT and source.place != _OTHER]
    packed = [source for source in inputs if source.made_of]
    latents = packed or [source for source in inputs if source.rank >= 5 or (source.rank == 4 and source.place in generated)]
    witnessed = [source for source in sources if source.kind == ARANGE and source.place == ""]
    counts = {source for source in sources if source.kind == ARANGE}
    if latents:
        return frozenset((*lost, *latents))
    by_rank = sorted(inputs, key=lambda source: (-source.rank, source.place))
    if witnessed:
        return frozenset((*lost, *witnessed, *by_rank[:1]))
    video = [source for source in by_rank if source.place in generated or is_generated(source.place)]
    return frozenset((*lost, *counts, *video[:1])) if len(counts) >= 3 else frozenset(lost)


def _renamed(source: Source, generated: Container[str], lost_at: LostAt) -> Source:
    """The source under a place that no node of another graph has."""

    def marked(place: str) -> str:
        if place[:1] in (_GENERATED, _CONDITIONING):
            return place
        return (_GENERATED if place in generated else _CONDITIONING) + place

    if source.kind == LOST:
        return Source(LOST, lost_at(source), 0, source.size, "", 1, frozenset(map(marked, source.origins)))
    return dataclasses.replace(source, place=marked(source.place) if source.place else "")


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


# --- the tensors ---------------------------------------------------------------------------------------------------------------

_labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
_forward = threading.local()


def begin_forward() -> None:
    """A model's forward begins: what was said before is of another one, and holds no more in this thread."""
    _forward.number = next(_numbers)


_numbers = itertools.count(1)


def say(tensor: Tensor, axes: Axes | None, at_once: bool = False) -> None:
    """Says what the axes of a real tensor are, or that nothing is known any more.

    Writes to tensors of inference mode are not counted, so of those something is said only where the next graph runs ``at_once``.
    """
    if axes is None or (tensor.is_inference() and not at_once):
        _labels.pop(tensor, None)
    elif [axis_size(axis) for axis in axes] == list(tensor.shape):
        _labels[tensor] = (axes, _version(tensor), getattr(_forward, "number", 0))


def said_of(tensor: Tensor) -> Axes | None:
    """What was said of a tensor's axes in this forward; None where nothing was, or it was written to since."""
    found = _labels.get(tensor)
    return found[0] if found is not None and found[1:] == (_version(tensor), getattr(_forward, "number", 0)) else None


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class SameAxes:
    """Whether a tensor carries the axes a graph was compiled for."""

    def __init__(self, expected: Axes | None) -> None:
        self._expected = expected

    def __call__(self, tensor: Tensor) -> bool:
        """Compares."""
        axes = said_of(tensor)
        return axes is self._expected or axes == self._expected
