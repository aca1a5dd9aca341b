"""Symbolic axes: an axis of a tensor is a product of factors, a factor a digit of some source axis or a concatenation of axes.

Flattening ``[F, H, W]`` into tokens gives one axis with three factors; a reshape splits and merges factors; ``cat`` makes a
``Concat``.  Sizes are ints or sympy expressions, and no function here adds a guard.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Union

import sympy

Size = Any
"""An int or a sympy expression, in elements."""

INPUT, ARANGE, PARAMETER = "input", "arange", "parameter"
LOST, CREATED, BROADCAST = "lost", "created", "broadcast"


@dataclass(frozen=True)
class Source:
    """One axis of a tensor the trail starts from.

    ``kind`` is INPUT (a graph input), PARAMETER (a weight or buffer), ARANGE, LOST (an op of which no rule says how it orders what
    came from an input), CREATED (made from nothing, or from weights and counts alone) or BROADCAST (repeats); ``name`` is the
    input's name or the op's; ``node_name`` the graph node it is or was made at; ``rank`` the number of axes of the whole tensor;
    ``origins`` the names of the inputs that a LOST axis may count; ``stands_for_axis`` what the axis was before it was taken for one piece,
    so that it could be cut anywhere, or before it was turned around, if LOST.
    """

    kind: str
    name: str
    axis: int = 0
    size: Size = 1
    node_name: str = ""
    rank: int = 1
    origins: frozenset[str] = frozenset()
    stands_for_axis: Axis = ()


@dataclass(frozen=True)
class Digit:
    """``start + (index // stride) % size`` of a source axis: what one factor of a split axis counts."""

    source: Source
    size: Size
    stride: Size = 1
    start: Size = 0

    @property
    def is_whole(self) -> bool:
        """Whether it counts its source's axis from the first position to the last, in steps of ``stride``."""
        return same(self.start, 0) and same(self.size * self.stride, self.source.size)


@dataclass(frozen=True)
class Factor:
    """One factor of an axis.  ``digits`` are all source axes that it is known to run along."""

    size: Size
    digits: frozenset[Digit]

    @cached_property
    def kinds(self) -> frozenset[str]:
        """Kinds of the sources it runs along."""
        return frozenset(digit.source.kind for digit in self.digits)


@dataclass(frozen=True)
class Concat:
    """Axes laid one after the other."""

    parts: tuple[Axis, ...]

    @cached_property
    def size(self) -> Size:
        """Sum of the parts."""
        return sum(axis_size(part) for part in self.parts)


Axis = tuple[Union[Factor, Concat], ...]  # noqa: UP007 - a forward reference needs Union at run time
"""Factors from the slowest to the fastest; the empty product is an axis of size 1."""


def axis_size(axis: Axis) -> Size:
    """Number of elements along the axis."""
    size: Size = 1
    for factor in axis:
        size = size * factor.size
    return size


def axis_of(source: Source) -> Axis:
    """The whole of a source axis."""
    return () if same(source.size, 1) else (Factor(source.size, frozenset((Digit(source, source.size),))),)


def plain(size: Size) -> Size:
    """A size as an int where it is one, whatever symbols went into it."""
    if isinstance(size, int):
        return size
    size = sympy.expand(size)
    return int(size) if size.is_number else size


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for all values of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(a - b) == 0)


def quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` where it is a whole number for all values of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if isinstance(b, int) and b == 0:
        return None
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = ratio.as_numer_denom()
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_number else numerator


def split_factor(factor: Factor | Concat, outer: Size) -> tuple[Axis, Axis] | None:
    """The factor as an outer axis of ``outer`` elements and an inner one of the rest, or None where that is not a product."""
    inner = quotient(factor.size, outer)
    if inner is None:
        return None
    if isinstance(factor, Factor):
        outers, inners = set(), set()
        for digit in factor.digits:
            start = quotient(digit.start, inner)
            if start is not None:
                outers.add(Digit(digit.source, outer, digit.stride * inner, start))
                inners.add(Digit(digit.source, inner, digit.stride))
        if not outers:
            return None
        return (Factor(outer, frozenset(outers)),), (Factor(inner, frozenset(inners)),)
    outer_parts, inner_parts = [], []
    for part in factor.parts:
        count = quotient(axis_size(part), inner)
        split = None if count is None else split_axis(part, count)
        if split is None:
            return None
        outer_parts.append(split[0])
        inner_parts.append(split[1])
    if any(part != inner_parts[0] for part in inner_parts):
        return None
    return concat(outer_parts), inner_parts[0]


def split_axis(axis: Axis, outer: Size) -> tuple[Axis, Axis] | None:
    """An axis as an outer axis of ``outer`` elements and an inner one of the rest, or None."""
    taken: list[Factor | Concat] = []
    need = outer
    for index, factor in enumerate(axis):
        if same(need, 1):
            return tuple(taken), axis[index:]
        left = quotient(need, factor.size)
        if left is not None:
            taken.append(factor)
            need = left
            continue
        split = split_factor(factor, need)
        if split is None:
            return None
        return (*taken, *split[0]), (*split[1], *axis[index + 1 :])
    return (tuple(taken), ()) if same(need, 1) else None


def regroup(axes: tuple[Axis, ...], sizes: list[Size]) -> tuple[Axis, ...] | None:
    """The axes of a tensor viewed with other ``sizes``, or None where a boundary falls inside a factor."""
    remaining: Axis = tuple(factor for axis in axes for factor in axis)
    result: list[Axis] = []
    for size in sizes:
        split = split_axis(remaining, size)
        if split is None:
            return None
        outer, remaining = split
        result.append(merge_factors(outer))
    return tuple(result) if same(axis_size(remaining), 1) else None


def merge_factors(axis: Axis) -> Axis:
    """Neighbouring factors made one where every source says they are neighbouring digits of one axis."""
    merged: list[Factor | Concat] = []
    for factor in axis:
        before = merged[-1] if merged else None
        if isinstance(factor, Factor) and isinstance(before, Factor):
            joined = {
                Digit(high.source, high.size * low.size, low.stride)
                for high in before.digits
                for low in factor.digits
                if high.source == low.source and same(high.stride, low.stride * low.size) and same(high.start, 0) and same(low.start, 0)
            }
            if len(joined) == len(before.digits) == len(factor.digits):
                merged[-1] = Factor(before.size * factor.size, frozenset(joined))
                continue
        merged.append(factor)
    return tuple(merged)


def slice_axis(axis: Axis, start: Size, stop: Size) -> Axis | None:
    """Elements ``[start, stop)`` of an axis, or None where they are no product of digits."""
    if same(start, 0) and same(stop, axis_size(axis)):
        return axis
    if same(start, stop):
        return axis_of(Source(CREATED, "empty", 0, 0))
    if not axis:
        return None
    first, rest = axis[0], axis[1:]
    inner = axis_size(rest)
    low, high = quotient(start, inner), quotient(stop, inner)
    if low is None or high is None:
        return None
    if isinstance(first, Factor):
        if same(high, low + 1) and INPUT not in first.kinds:
            return rest  # a position of an input's axis is kept, so that slices can be joined again; others only stand in the way
        size = plain(high - low)
        return (Factor(size, frozenset(Digit(d.source, size, d.stride, plain(d.start + low)) for d in first.digits)), *rest)
    pieces = _parts_between(first.parts, low, high)
    return None if pieces is None else (*concat(pieces), *rest)


def _parts_between(parts: tuple[Axis, ...], low: Size, high: Size) -> list[Axis] | None:
    """The pieces of consecutive axes that lie in ``[low, high)``, or None where it cannot be told in which part a symbolic end falls."""
    ends: list[Size] = [0]
    for part in parts:
        ends.append(ends[-1] + axis_size(part))
    first, last = (next((number for number, end in enumerate(ends) if same(end, bound)), None) for bound in (low, high))
    pieces: list[Axis] = []
    for number, (part, offset, end) in enumerate(zip(parts, ends[:-1], ends[1:], strict=True)):
        before = _up_to(end, low) if first is None else number < first
        behind = _up_to(high, offset) if last is None else number >= last
        if before or behind:
            continue
        start = offset if first is not None or _up_to(low, offset) else low if _up_to(offset, low) else None
        stop = end if last is not None or _up_to(end, high) else high if _up_to(high, end) or number == len(parts) - 1 else None
        piece = None if start is None or stop is None else slice_axis(part, plain(start - offset), plain(stop - offset))
        if piece is None:
            return None
        pieces.append(piece)
    return pieces or None


def _up_to(a: Size, b: Size) -> bool:
    """Whether ``a <= b`` for all values of the symbols."""
    return a <= b if isinstance(a, int) and isinstance(b, int) else bool(sympy.expand(b - a).is_nonnegative)


def concat(parts: list[Axis]) -> Axis:
    """The axes one after the other: empty ones dropped, neighbouring slices of one axis joined again."""
    flat = [inner for part in parts for inner in (part[0].parts if len(part) == 1 and isinstance(part[0], Concat) else (part,))]
    so_far: list[Axis] = []
    for part in flat:
        if same(axis_size(part), 0):
            continue
        joined = _join_slices(so_far[-1], part) if so_far else None
        if joined is None:
            so_far.append(part)
        else:
            so_far[-1] = joined
    return so_far[0] if len(so_far) == 1 else (Concat(tuple(so_far)),)


def _join_slices(a: Axis, b: Axis) -> Axis | None:
    """One axis from ``[.., s)`` and ``[s, ..)`` of the same source axes, or None where an input would be forgotten."""
    if not a or not b or a[1:] != b[1:] or not isinstance(a[0], Factor) or not isinstance(b[0], Factor):
        return None
    size = a[0].size + b[0].size
    digits = frozenset(
        Digit(x.source, size, x.stride, x.start)
        for x in a[0].digits
        for y in b[0].digits
        if x.source == y.source and x.source.kind != BROADCAST and same(x.stride, y.stride) and same(x.start + x.size, y.start)
    )
    inputs = [sum(d.source.kind == INPUT for d in some) for some in (a[0].digits, b[0].digits, digits)]
    return (Factor(size, digits), *a[1:]) if digits and inputs[0] == inputs[1] == inputs[2] else None


def leaves(axis: Axis) -> list[Factor]:
    """All factors of an axis, those inside concatenations too."""
    found: list[Factor] = []
    for factor in axis:
        if isinstance(factor, Factor):
            found.append(factor)
        else:
            found.extend(leaf for part in factor.parts for leaf in leaves(part))
    return found


def repeats(axis: Axis) -> bool:
    """Whether an axis of more than one position holds the same at all of them."""
    return bool(axis) and all(isinstance(factor, Factor) and factor.kinds == {BROADCAST} for factor in axis)


def origins(axes: Iterable[Axis]) -> frozenset[str]:
    """Names of the inputs that the axes count, directly or by a lost trail."""
    digits = [digit for axis in axes for factor in leaves(axis) for digit in factor.digits]
    direct = {digit.source.node_name for digit in digits if digit.source.kind == INPUT}
    return frozenset(direct.union(*(digit.source.origins for digit in digits)))
