"""The grid of packed tokens ``[B, N, C]``, which no axis of the input shows: from where the output is unpacked, and from coordinates.

Two kinds of evidence are read here, beside the counts of a rope table that ``token_layout`` knows.  An output whose axes are three
digits of the packed axis says frames, rows and columns.  A tensor of coordinates ``(t, h, w)`` that runs along the tokens says the same
by its values, and shows stretches of conditioning frames that the packed axis hides; what is read is guarded (see ``reading.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from lvsa_compile.axes.algebra import (
    ARANGE,
    INPUT,
    LOST,
    Axis,
    Concat,
    Digit,
    Factor,
    Size,
    Source,
    axis_size,
    concat,
    leaves,
    merge_factors,
    same,
)
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.values import Array

Shape = tuple[Size, Size, Size]
"""Latent frames, rows, columns."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive packed tokens: the video of ``shape``, or other tokens where it is None."""

    size: Size
    shape: Shape | None = None


@dataclass(frozen=True)
class GridIs:
    """That coordinates along ``axis``, from token ``start`` on, ``size`` of them, are those of these stretches."""

    axis: int
    start: Size
    size: int
    stretches: tuple[Stretch, ...]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that it speaks of."""
        return (self.start,)

    def holds(self, values: Array, number: Callable[[Size], int]) -> bool:
        """Whether ``values`` are such coordinates, given what each size is as a ``number``."""
        start = number(self.start)
        if not 0 <= start <= values.shape[self.axis] - self.size:
            return False
        rows = _triples(values, self.axis, start, self.size)
        return rows is not None and stretches_of(rows) == self.stretches


@dataclass(frozen=True)
class Evidence:
    """What one source of evidence says of a packed axis; ``relies_on`` is the name of the input whose values said it.

    ``expected`` is what of the values it relies on, None for all of them.
    """

    witness: str
    stretches: tuple[Stretch, ...]
    relies_on: str = ""
    expected: GridIs | None = None

    def __str__(self) -> str:
        parts = ["×".join(map(str, s.shape)) if s.shape else str(s.size) for s in self.stretches]
        return f"{' | '.join(parts)} ({self.witness})"


def packed_evidence(
    tokens: Iterable[Axis], outputs: Sequence[Axes], read: Callable[[str], Array | None], now: Callable[[Size], int] | None = None
) -> tuple[dict[Digit, Evidence], dict[str, str]]:
    """For each packed axis, or slice of one, among ``tokens`` what is known of it.

    And for the names of inputs whose sources of evidence disagree, what they say.
    """
    found: dict[Digit, dict[Evidence, None]] = {}
    for axis in dict.fromkeys(tokens):
        for source, shape in _counted(axis):
            found.setdefault(Digit(source, source.size), {})[Evidence("counts of a rope table", (Stretch(source.size, shape),))] = None
        for factor in leaves(axis):
            for digit in _packed_digits(factor):
                found.setdefault(digit, {}).update(dict.fromkeys(_from_coordinates(factor, digit.source, read, now)))
    for digit, shown in found.items():
        if digit.is_whole:
            shown.update(dict.fromkeys(e for axes in outputs if (e := _from_output(axes, digit.source)) is not None))
    contradictions = {
        digit.source.node_name: " against ".join(map(str, shown))
        for digit, shown in found.items()
        if len({evidence.stretches for evidence in shown}) > 1
    }
    return {
        digit: next(iter(shown)) for digit, shown in found.items() if shown and digit.source.node_name not in contradictions
    }, contradictions


def _packed_digits(factor: Factor) -> list[Digit]:
    """Packed axes, or slices of them, that a factor runs along."""
    digits = {digit for digit in factor.digits if digit.source.kind == INPUT and same(digit.stride, 1) and digit.source.rank <= 3}
    return sorted((digit for digit in digits if digit.is_whole or _is_slice(digit)), key=lambda d: (d.source.node_name, d.source.axis))


def _is_slice(digit: Digit) -> bool:
    return isinstance(digit.start, int) and isinstance(digit.size, int) and digit.size > 1


def _counted(axis: Axis) -> Iterable[tuple[Source, Shape]]:
    """Packed axes that were multiplied with a table of three counts, and the counts."""
    for part in [axis, *(part for factor in axis if isinstance(factor, Concat) for part in factor.parts)]:
        factors = [factor for factor in part if isinstance(factor, Factor) and not same(factor.size, 1)]
        named = all(may_count_frames(digit.source) for digit in factors[0].digits) if factors else False
        if len(factors) == 3 and named and all(ARANGE in factor.kinds for factor in factors):
            sources = [{digit.source for digit in factor.digits if digit.source.kind == INPUT} for factor in factors]
            shape = (factors[0].size, factors[1].size, factors[2].size)
            for source in sources[0] & sources[1] & sources[2]:
                if same(axis_size(part), source.size) and source.rank <= 3:
                    yield source, shape


def may_count_frames(source: Source) -> bool:
    """Whether the name of a count does not say that it counts rows or columns."""
    return source.kind != ARANGE or not set(source.name.lower().split("_")) & _NOT_FRAMES


_NOT_FRAMES = frozenset(("h", "w", "x", "y", "height", "width", "row", "rows", "col", "cols", "column", "columns"))


def _from_output(axes: Axes, source: Source) -> Evidence | None:
    """Frames, rows and columns where an output has exactly three digits of the packed axis that tile it."""
    digits = [digit for axis in axes for factor in leaves(axis) for digit in factor.digits if digit.source == source]
    if len(digits) != 3:
        return None
    for a, b, c in itertools.permutations(digits):
        tiles = same(c.stride, 1) and same(b.stride, c.size) and same(a.stride, b.size * c.size) and same(a.size * a.stride, source.size)
        if tiles and all(same(digit.start, 0) for digit in digits):
            return Evidence("where the output is unpacked", (Stretch(source.size, (a.size, b.size, c.size)),))
    return None


# --- coordinates ---------------------------------------------------------------------------------------------------------------


def _from_coordinates(
    factor: Factor, source: Source, read: Callable[[str], Array | None], now: Callable[[Size], int] | None
) -> list[Evidence]:
    for digit in sorted(factor.digits, key=lambda d: d.source.node_name):
        other = digit.source
        if other.kind != INPUT or other.node_name == source.node_name or not 2 <= other.rank <= 4 or not same(digit.stride, 1):
            continue
        start = digit.start if now is None else now(digit.start)
        values = read(other.node_name) if isinstance(start, int) and isinstance(digit.size, int) else None
        rows = None if values is None else _triples(values, other.axis, start, digit.size)
        stretches = None if rows is None else stretches_of(rows)
        if stretches is not None:
            symbolic = now is not None and not (isinstance(digit.start, int) and isinstance(other.size, int))
            expected = GridIs(other.axis, digit.start, digit.size, stretches) if symbolic else None
            return [Evidence(f"values of {other.name}", stretches, other.node_name, expected)]
    return []


def _triples(values: Array, axis: int, start: int, size: int) -> Array | None:
    """Coordinates ``[tokens, 3]`` from a tensor with one axis of 3, its last axis perhaps (from, to), the same for all else."""
    tokens = numpy.moveaxis(values, axis, 0)[start : start + size]
    if tokens.shape[-1] == 2 and tokens.ndim >= 3:
        tokens = tokens[..., 0]
    threes = [i for i, n in enumerate(tokens.shape) if n == 3 and i > 0]
    if not threes:
        return None
    rows = numpy.moveaxis(tokens, threes[-1], -1).reshape(size, -1, 3)
    return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None


def stretches_of(rows: Array) -> tuple[Stretch, ...] | None:
    """Stretches of packed tokens by their coordinates ``[tokens, 3]``, time first.

    A frame is a run of tokens of one time that are a raster of rows and columns; frames of the same raster whose time grows make a
    stretch, and the one longest stretch is the video.  None where there is none, or more than one.
    """
    changes = numpy.flatnonzero(numpy.any(rows[1:, :1] != rows[:-1, :1], axis=1)) + 1
    frames = [frame for of_one_time in numpy.split(rows, changes) for frame in _apart(of_one_time)]
    runs: list[list[Array]] = []
    for frame in frames:
        before = runs[-1][-1] if runs else None
        if before is not None and before.shape == frame.shape and (before[:, 1:] == frame[:, 1:]).all() and before[0, 0] < frame[0, 0]:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    longest = max(runs, key=len)
    raster = _raster(longest[0])
    if len(longest) < 2 or raster is None or sum(len(run) == len(longest) for run in runs) > 1:
        return None
    return tuple(Stretch(sum(map(len, run)), (len(run), *raster) if run is longest else None) for run in _joined(runs, longest))


def _apart(tokens: Array) -> list[Array]:
    """Pictures of one time that follow each other, as a still before the first frame: each begins at the place of the first."""
    begins = numpy.flatnonzero((tokens == tokens[:1]).all(axis=1))
    return numpy.split(tokens, begins[1:])


def _joined(runs: list[list[Array]], longest: list[Array]) -> list[list[Array]]:
    """Runs before and after the longest, each side as one."""
    at = next(i for i, run in enumerate(runs) if run is longest)
    sides = [[frame for run in side for frame in run] for side in (runs[:at], runs[at + 1 :])]
    return [run for run in (sides[0], longest, sides[1]) if run]


def _raster(frame: Array) -> tuple[int, int] | None:
    """Rows and columns of a frame's coordinates ``[tokens, 3]``, or None where they are no raster."""
    rows = len(numpy.unique(frame[:, 1]))
    if len(frame) < 2 or len(frame) % rows:
        return None
    grid = frame[:, 1:].reshape(rows, -1, 2)
    regular = (grid[:, :, 0] == grid[:, :1, 0]).all() and (grid[:, :, 1] == grid[:1, :, 1]).all()
    return (rows, grid.shape[1]) if regular and len(numpy.unique(grid[0, :, 1])) == grid.shape[1] else None


# --- showing it ----------------------------------------------------------------------------------------------------------------


def refined(axis: Axis, evidence: Mapping[Digit, Evidence], contradictions: Container[str]) -> Axis:
    """The axis with every packed axis replaced by its stretches, the video's as frames, rows and columns.

    Nothing is replaced where an input at one of ``contradictions`` runs along.
    """
    done: list[Factor | Concat] = []
    for factor in _whole_again(axis, evidence):
        if isinstance(factor, Concat):
            done.extend(concat([refined(part, evidence, contradictions) for part in factor.parts]))
            continue
        known = [digit for digit in _packed_digits(factor) if digit in evidence and LOST not in factor.kinds]
        shown = {evidence[digit].stretches for digit in known}
        disputed = any(digit.source.node_name in contradictions for digit in _packed_digits(factor))
        done.extend(_stretched(known, shown.pop()) if len(shown) == 1 and not disputed else (factor,))
    return tuple(done)


def _whole_again(axis: Axis, evidence: Mapping[Digit, Evidence]) -> Axis:
    """The axis with a packed axis of which something is known in one piece, where counts of something else had split it."""
    factors = [factor for factor in axis if isinstance(factor, Factor)]
    if len(factors) < len(axis) or len(axis) < 2 or any(LOST in factor.kinds for factor in factors):
        return axis
    inputs = [frozenset(digit for digit in factor.digits if digit.source.kind == INPUT) for factor in factors]
    merged = merge_factors(tuple(Factor(factor.size, own) for factor, own in zip(factors, inputs, strict=True))) if all(inputs) else axis
    known = any(digit in evidence for factor in merged if isinstance(factor, Factor) for digit in _packed_digits(factor))
    return merged if known else axis


def _stretched(digits: Sequence[Digit], stretches: Sequence[Stretch]) -> Axis:
    parts: list[Axis] = []
    offset: Size = 0
    for stretch in stretches:
        wholes = []
        for digit in digits:
            source, start = digit.source, digit.start + offset
            part = f"[{start}:{start + stretch.size}]" if len(stretches) > 1 or not digit.is_whole else ""
            wholes.append(Source(INPUT, source.name + part, source.axis, stretch.size, source.node_name, source.rank))
        if stretch.shape is None:
            parts.append((Factor(stretch.size, frozenset(Digit(whole, stretch.size) for whole in wholes)),))
        else:
            _, rows, columns = stretch.shape
            strides = (rows * columns, columns, 1)
            counts = [Source(ARANGE, letter, 0, size) for letter, size in zip("tyx", stretch.shape, strict=True)]
            parts.append(
                tuple(
                    Factor(size, frozenset((Digit(count, size), *(Digit(whole, size, stride) for whole in wholes))))
                    for size, stride, count in zip(stretch.shape, strides, counts, strict=True)
                )
            )
        offset = offset + stretch.size
    return concat(parts)
