"""Axes that are cut where their factors do not allow it, as parallel models cut tokens, and put together again."""

from __future__ import annotations

from lvsa_compile.axes.algebra import (
    INPUT,
    LOST,
    Axis,
    Concat,
    Digit,
    Factor,
    Size,
    Source,
    axis_size,
    combine,
    concat,
    leaves,
    merge_factors,
    quotient,
    same,
    slice_axis,
    split_axis,
)


def cut_axis(axis: Axis, start: Size, stop: Size) -> Axis | None:
    """Elements ``[start, stop)`` of an axis, or None where they are no product of digits, and not of an input's in one piece either."""
    piece = slice_axis(axis, start, stop)
    if piece is not None or not (isinstance(start, int) and isinstance(stop, int)) or not _may_be_cut(axis):
        return piece
    return (Factor(stop - start, frozenset((Digit(in_one_piece(axis), stop - start, 1, start),))),)


def _may_be_cut(axis: Axis) -> bool:
    kinds = frozenset[str]().union(*(factor.kinds for factor in leaves(axis)))
    return INPUT in kinds and LOST not in kinds and isinstance(axis_size(axis), int) and all(isinstance(f, Factor) for f in axis)


def in_one_piece(axis: Axis) -> Source:
    """A source that stands for a whole axis of an input, to be cut where its factors do not allow it; see ``expanded``."""
    digits = (digit for factor in leaves(axis) for digit in factor.digits if digit.source.kind == INPUT)
    source = min((digit.source for digit in digits), key=lambda source: (-source.rank, source.place, source.axis))
    return Source(INPUT, source.name, source.axis, axis_size(axis), source.place, 3, made_of=axis)


def expanded(axis: Axis) -> Axis:
    """The axis with what was taken for one piece as it was before, wherever a part of it is a product again."""
    done: list[Factor | Concat] = []
    for factor in _joined_pieces(axis):
        if isinstance(factor, Concat):
            done.extend(concat([expanded(part) for part in factor.parts]))
            continue
        pieces = [digit for digit in factor.digits if digit.source.made_of]
        parts = [_counted_by(digit) for digit in pieces]
        if LOST in factor.kinds or not parts or any(part is None for part in parts):
            done.append(factor)
            continue
        rest = factor.digits.difference(pieces)
        result: Axis = (Factor(factor.size, rest),) if rest else ()
        for part in parts:
            result = combine(result, expanded(part)) if part is not None else result
        done.extend(result)
    return tuple(done)


def _counted_by(digit: Digit) -> Axis | None:
    """What a digit of something taken for one piece counts, in the terms of what that was; None where it is no product."""
    cut = split_axis(digit.source.made_of, quotient(digit.source.size, digit.stride))
    if cut is None:
        return None
    times = quotient(axis_size(cut[0]), digit.size) if same(digit.start, 0) else None
    if times is None:
        return slice_axis(cut[0], digit.start, digit.start + digit.size)
    inside = split_axis(cut[0], times)
    return None if inside is None else inside[1]


def _joined_pieces(axis: Axis) -> Axis:
    """Neighbouring factors of something taken for one piece as one factor, where counts of something else had split them."""
    factors = [factor for factor in axis if isinstance(factor, Factor) and LOST not in factor.kinds]
    pieces = [frozenset(digit for digit in factor.digits if digit.source.made_of) for factor in factors]
    if len(factors) < len(axis) or len(axis) < 2 or not all(pieces):
        return axis
    merged = merge_factors(tuple(Factor(factor.size, own) for factor, own in zip(factors, pieces, strict=True)))
    return merged if len(merged) < len(axis) else axis
