"""What is known of a tensor's axes after some of its positions were overwritten."""

from __future__ import annotations

from collections.abc import Sequence

from lvsa_compile.axes.algebra import (
    ARANGE,
    CREATED,
    INPUT,
    LOST,
    Axis,
    Factor,
    Size,
    Source,
    axis_of,
    axis_size,
    concat,
    leaves,
    merge_factors,
    origins,
    repeats,
    same,
    slice_axis,
)
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.combining import align, combine
from lvsa_compile.axes.positions import Run


def overwritten(before: Axes, new: Axes, dim: int, runs: Sequence[Run] | None, lost: Axes, *, added: bool = False) -> Axes:
    """Axes after the positions ``runs`` along ``dim`` took the elements of ``new`` in turn, or had them ``added``.

    ``runs`` None: some positions, nobody knows which.  ``lost`` are the axes of a tensor of which nothing is known.
    """
    along = None if runs is None else _along(before[dim], new[dim], runs, added)
    if runs is not None and len(runs) == 1 and same(runs[0][0], 0) and same(runs[0][1], axis_size(before[dim])) and not added:
        return new
    agreed = [_agreed(old, fresh, gone) for old, fresh, gone in zip(before, new, lost, strict=True)]
    agreed[dim] = lost[dim] if along is None else along
    return tuple(agreed)


def _along(before: Axis, new: Axis, runs: Sequence[Run], added: bool) -> Axis | None:
    """The axis whose positions were written to: pieces of the old one and of the new one in the order of positions."""
    pieces: list[Axis | None] = []
    taken: Size = 0
    sources = []
    for start, stop in runs:
        sources.append((start, stop, taken))
        taken = taken + stop - start
    end: Size = 0
    if all(isinstance(start, int) for start, _, _ in sources):  # others are guarded to rise
        sources.sort()
    for start, stop, offset in sources:
        fresh = slice_axis(new, offset, offset + stop - start)
        if added and fresh is not None:
            old = slice_axis(before, start, stop)
            fresh = None if old is None else combine(old, fresh)
        pieces += [slice_axis(before, end, start), fresh]
        end = stop
    pieces.append(slice_axis(before, end, axis_size(before)))
    known = [piece for piece in pieces if piece is not None]
    return concat(known) if len(known) == len(pieces) else None


def lost_axes(name: str, node_name: str, sizes: Sequence[Size], counted: Sequence[Axis]) -> Axes:
    """Axes of a tensor that was written to at positions that are not followed; ``counted`` are all axes that went into it."""
    kind = LOST if any(factor.kinds & {INPUT, LOST} for axis in counted for factor in leaves(axis)) else CREATED
    return tuple(axis_of(Source(kind, name, i, size, node_name, origins=origins(counted))) for i, size in enumerate(sizes))


def _agreed(old: Axis, new: Axis, lost: Axis) -> Axis:
    """What holds for an axis of which one part has the axis ``old`` and another the axis ``new``.

    Both must run along something in common; what else one of them was met with is then evidence of what the axis is for both.
    """
    if old == new:
        return old
    if not informed(new):
        return lost if repeats(old) and not repeats(new) else old
    old, new = (tuple(factor for factor in axis if not same(factor.size, 1)) for axis in (old, new))  # positions that parts were taken at
    if old == new:
        return old
    if not informed(old):
        return new
    aligned = align(old, new) or []
    pairs = [(f, g) for f, g in aligned if isinstance(f, Factor) and isinstance(g, Factor)]
    shared = bool(pairs) and len(pairs) == len(aligned) and all(f.digits & g.digits for f, g in pairs)
    return merge_factors(combine(old, new)) if shared else lost


def informed(axis: Axis) -> bool:
    """Whether an axis says anything about inputs or counts."""
    return any(factor.kinds & {INPUT, ARANGE, LOST} for factor in leaves(axis))


def holds_tokens(axis: Axis) -> bool:
    """Whether an axis may count tokens, or their order was lost; that of a table made of numbers, as of timesteps, does not."""
    digits = [digit for factor in leaves(axis) for digit in factor.digits]
    return any(digit.source.kind == LOST or (digit.source.kind == INPUT and digit.source.rank > 1) for digit in digits)
