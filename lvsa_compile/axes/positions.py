"""Positions along an axis that an index tensor names, as runs of consecutive ones; their ends may be symbolic.

Where sizes are symbols, as text lengths are that change from prompt to prompt, an index is followed by its structure: how many runs it
has, and at which boundary of the axis each begins.  What is relied on is guarded, so that any other index compiles anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy
from torch import Tensor

from lvsa_compile.axes.algebra import Axis, Concat, Size, axis_size, same
from lvsa_compile.axes.call import Call, sizes_of
from lvsa_compile.axes.values import Array, Later
from lvsa_compile.compat import Equality

Run = tuple[Size, Size]
"""Consecutive positions ``[start, stop)``."""

_MOST_RUNS = 1024
_MOST_SYMBOLIC_RUNS = 8


@dataclass(frozen=True)
class RunsAre:
    """That the values of an index are these runs, one after the other."""

    runs: tuple[Run, ...]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that it speaks of."""
        return tuple(itertools.chain.from_iterable(self.runs))

    def holds(self, values: Array, number: Callable[[Size], int]) -> bool:
        """Whether ``values`` are the runs, given what each size is as a ``number``."""
        found = runs_of(values)
        return found == [(number(start), number(stop)) for start, stop in self.runs] and found == sorted(found)


@dataclass
class Relations:
    """What symbolic sizes are ``now``, and the equalities among them that ends of runs would need: ``noticed`` for the next trace."""

    now: Callable[[Size], int]
    noticed: dict[Equality, None] = field(default_factory=dict)

    def notice(self, axis: Axis, *ends: Size) -> None:
        """Notes which of ``ends`` meet a boundary of the axis now, and not for all values of the symbols."""
        for end, boundary in itertools.product(ends, self._boundaries(axis)):
            if not same(end, boundary) and self.now(end) == self.now(boundary):
                self.noticed[end, boundary] = None

    def runs(self, later: Later, axis: Axis, count: Size) -> list[Run] | None:
        """The runs of an input ``later``, of ``count`` positions along the axis, from boundary to boundary and in rising order.

        None where all are numbers, or the index names positions in another order.
        """
        known = self._boundaries(axis)
        if all(isinstance(size, int) for size in (*known, count)):
            return None
        values = later.peek()
        numbers = runs_of(values) if values is not None else None
        if not numbers or numbers != sorted(numbers) or len(numbers) > _MOST_SYMBOLIC_RUNS:
            return None
        if self.now(count) < 0 or (len(numbers) > 1 and not isinstance(count, int)):  # which run is longer than before cannot be seen
            return None
        lengths = [count] if len(numbers) == 1 else [stop - start for start, stop in numbers]
        starts = [self._start(start, length, known) for (start, _), length in zip(numbers, lengths, strict=True)]
        runs = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        later.rely_on(RunsAre(tuple(runs)))
        self.notice(axis, *itertools.chain.from_iterable(runs))
        return runs

    def _boundaries(self, axis: Axis) -> list[Size]:
        """Boundaries of the axis but those that only run time knows."""
        return [each for each in boundaries(axis) if self.now(each) >= 0]

    def _start(self, start: int, length: Size, known: Sequence[Size]) -> Size:
        """Where a run begins: at a boundary, or as many positions before one; else so many from the nearest boundary.

        That is the nearest one before it where the run's own length is free, and otherwise the nearest that may move.
        """
        candidates = [*known, *(boundary - length for boundary in known)]
        met = next((each for each in candidates if self.now(each) == start), None)
        if met is not None:
            return met
        if isinstance(length, int):
            candidates = [each for each in candidates if not isinstance(each, int)]
        else:
            candidates = [each for each in known if self.now(each) < start]
        nearest = min(candidates, key=lambda each: abs(start - self.now(each)), default=0)
        return nearest + start - self.now(nearest)


def boundaries(axis: Axis) -> list[Size]:
    """Positions at which the parts of an axis begin or end, the first and the last among them."""
    found: list[Size] = [0]
    if axis and isinstance(axis[0], Concat):
        inside = axis_size(axis[1:])
        for part in axis[0].parts:
            found.append(found[-1] + axis_size(part) * inside)
        return found
    return [0, axis_size(axis)]


def runs_along(call: Call, by: Tensor, axis: Axis) -> list[Run] | None:
    """Positions along ``axis`` that the index ``by`` of a call names; None where they are unknown, repeat, or make too many runs."""
    later = None if call.relations is None or by.dim() != 1 else call.later_of(by)
    found = None if later is None or call.relations is None else call.relations.runs(later, axis, sizes_of(by)[0])
    return runs_of(call.value_of(by), axis_size(axis)) if found is None else found


def runs_of(positions: Array | None, size: Size = 0) -> list[Run] | None:
    """Positions ``[n]`` on an axis of ``size`` as runs of consecutive positions, in the order given.

    None where they are unknown, repeat, or make more than 1,024 runs.
    """
    if positions is None or positions.ndim != 1 or positions.dtype.kind not in "iu":
        return None
    if positions.size == 0:
        return []
    positions = positions.astype(numpy.int64)
    if isinstance(size, int):
        positions = numpy.where(positions < 0, positions + size, positions)
    if len(numpy.unique(positions)) != len(positions) or positions.min() < 0:
        return None
    ends = [*numpy.flatnonzero(numpy.diff(positions) != 1).tolist(), len(positions) - 1]
    if len(ends) > _MOST_RUNS:
        return None
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [(int(positions[start]), int(positions[end]) + 1) for start, end in zip(starts, ends, strict=True)]
