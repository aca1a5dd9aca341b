"""Axes whose positions are turned around: twice, and they are in order again."""

from __future__ import annotations

import dataclasses

from lvsa_compile.axes.algebra import LOST, Axis, Digit, Factor, Size
from lvsa_compile.axes.call import Call
from lvsa_compile.axes.digits import with_digits


def turned_around(call: Call, size: Size, axis: int, of: Axis) -> Axis:
    """What ``flip`` makes of the axis ``of``: a lost one that knows what it was, or what it was where it is one that was turned before."""
    for digit in of[0].digits if len(of) == 1 and isinstance(of[0], Factor) else ():
        if digit.source.kind == LOST and digit.source.stands_for_axis and digit.is_whole:
            return digit.source.stands_for_axis

    def knowing(digit: Digit) -> Digit:
        known = dataclasses.replace(digit.source, stands_for_axis=of) if digit.source.kind == LOST else digit.source
        return dataclasses.replace(digit, source=known)

    return with_digits(call.new_axis(size, axis=axis, of=of), knowing)
