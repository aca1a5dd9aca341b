"""Axes whose positions are turned around: twice, and they are in order again."""

from __future__ import annotations

import dataclasses

from lvsa_compile.axes.algebra import LOST, Axis, Factor, Size, axis_of
from lvsa_compile.axes.call import Call


def turned_around(call: Call, size: Size, axis: int, of: Axis) -> Axis:
    """What ``flip`` makes of the axis ``of``: a lost one that knows what it was, or what it was where it is one that was turned before."""
    before = [digit for factor in of for digit in (factor.digits if isinstance(factor, Factor) else ())] if len(of) == 1 else []
    for digit in before:
        if digit.source.kind == LOST and digit.source.stands_for_axis and digit.is_whole:
            return digit.source.stands_for_axis
    new = call.new_axis(size, axis=axis, of=of)
    sources = [digit.source for factor in new if isinstance(factor, Factor) for digit in factor.digits if digit.source.kind == LOST]
    return axis_of(dataclasses.replace(sources[0], stands_for_axis=of)) if sources else new
