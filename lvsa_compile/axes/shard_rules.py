"""Rules of collectives that exchange shards of an axis between processes, all of which run the same program."""

from __future__ import annotations

from collections.abc import Sequence

from lvsa_compile import compat
from lvsa_compile.axes.algebra import CREATED, INPUT, LOST, Axis, Digit, Factor, axis_size, quotient, same, split_axis
from lvsa_compile.axes.call import Axes, Call


def all_to_all(call: Call) -> Sequence[Axes] | None:
    """``all_to_all_single``: the slowest part of the first axis counts what goes to each process, and then what came from each.

    Where each process held its part of an axis, in the order of ranks, the slowest part now counts those parts, and the axis is whole:
    Ulysses (arXiv 2309.14509) so trades heads for tokens.  On the way back it is the other way round.
    """
    axes, splits = call.input(), (call.arg(1, "output_split_sizes"), call.arg(2, "input_split_sizes"))
    processes, rank = compat.group_of(call.arg(3, "group_name"))
    size = axis_size(axes[0])
    parts = split_axis(axes[0], processes)
    even = all(split == [quotient(size, processes)] * processes for split in splits)
    if parts is None or not even:
        return None
    outer, rest = parts[0], (parts[1], *axes[1:])
    for swap in (_scattered, _gathered):  # a part that begins at 0 is the inside of a whole that was cut, if its cuts are counted
        found = swap(outer, rest, processes, rank, call)
        if found is not None:
            return [((*found[0], *found[1][0]), *found[1][1:])]
    counted = any(isinstance(f, Factor) and f.kinds & {INPUT, LOST} for f in outer)
    return None if counted else [axes]


def _gathered(outer: Axis, rest: Axes, processes: int, rank: int, call: Call) -> tuple[Axis, Axes] | None:
    """Each process's part of an axis comes together: the parts are counted by the slowest axis."""

    def is_part(digit: Digit) -> bool:
        alone = same(digit.stride, 1) and same(digit.size * processes, digit.source.size)
        return digit.source.kind == INPUT and alone and same(digit.start, rank * digit.size)

    found = [f for axis in rest for f in axis if isinstance(f, Factor) and any(map(is_part, f.digits))]
    if len(found) != 1 or LOST in found[0].kinds:
        return None
    parts = [digit for digit in found[0].digits if is_part(digit)]
    whole = Factor(found[0].size, frozenset(Digit(digit.source, digit.size) for digit in parts))
    counts = Factor(processes, frozenset(Digit(digit.source, processes, digit.size) for digit in parts))
    return (counts,), tuple(tuple(whole if f is found[0] else f for f in axis) for axis in rest)


def _scattered(outer: Axis, rest: Axes, processes: int, rank: int, call: Call) -> tuple[Axis, Axes] | None:
    """A whole axis, its parts counted by the slowest axis, becomes this process's part."""
    if len(outer) != 1 or not isinstance(outer[0], Factor):
        return None
    strides = {digit.source: digit.stride for digit in outer[0].digits if digit.source.kind == INPUT and same(digit.start, 0)}

    def is_inside(digit: Digit) -> bool:
        return digit.source in strides and same(digit.stride, 1) and same(digit.start, 0) and same(digit.size, strides[digit.source])

    found = [f for axis in rest for f in axis if isinstance(f, Factor) and any(map(is_inside, f.digits))]
    if len(found) != 1 or LOST in found[0].kinds | outer[0].kinds:
        return None
    digits = (Digit(digit.source, digit.size, 1, rank * digit.size) for digit in found[0].digits if is_inside(digit))
    part = Factor(found[0].size, frozenset(digits))
    return call.new_axis(processes, CREATED), tuple(tuple(part if f is found[0] else f for f in axis) for axis in rest)
