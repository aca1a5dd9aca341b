"""Opaque axes: context parallelism may take any slice of one; ``expanded`` restores the factors when the slices are joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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
    concat,
    leaves,
    merge_factors,
    origins,
    quotient,
    same,
    slice_axis,
    split_axis,
)
from lvsa_compile.axes.combining import combine
from lvsa_compile.axes.digits import with_digits


def cut_axis(axis: Axis, start: Size, stop: Size) -> Axis | None:
    """Elements ``[start, stop)`` of an axis, or None where they are no product of digits, and the axis cannot be opaque either."""
    part = slice_axis(axis, start, stop)
    if part is not None or not (isinstance(start, int) and isinstance(stop, int)) or not _may_be_cut(axis):
        return part
    return (Factor(stop - start, frozenset((Digit(opaque_source(axis), stop - start, 1, start),))),)


def _may_be_cut(axis: Axis) -> bool:
    kinds = frozenset[str]().union(*(factor.kinds for factor in leaves(axis)))
    return INPUT in kinds and LOST not in kinds and isinstance(axis_size(axis), int) and all(isinstance(f, Factor) for f in axis)


def opaque_source(axis: Axis) -> Source:
    """A source that stands for a whole axis of an input, factors and all: any slice of it is known; see ``expanded``."""
    digits = (digit for factor in leaves(axis) for digit in factor.digits if digit.source.kind == INPUT)
    source = min((digit.source for digit in digits), key=lambda source: (-source.rank, source.node_name, source.axis))
    return Source(INPUT, source.name, source.axis, axis_size(axis), source.node_name, 3, stands_for_axis=axis)


def expanded(axis: Axis) -> Axis:
    """The axis with the factors of its opaque parts, wherever these are a product again."""
    done: list[Factor | Concat] = []
    for factor in _joined_opaque(axis):
        if isinstance(factor, Concat):
            done.extend(concat([expanded(part) for part in factor.parts]))
            continue
        opaque = [digit for digit in factor.digits if digit.source.stands_for_axis]
        parts = [_counted_by(digit) for digit in opaque]
        if LOST in factor.kinds or not parts or any(part is None for part in parts):
            done.append(factor)
            continue
        rest = factor.digits.difference(opaque)
        result: Axis = (Factor(factor.size, rest),) if rest else ()
        for part in parts:
            result = combine(result, expanded(part)) if part is not None else result
        done.extend(result)
    return tuple(done)


def substituted(axes: tuple[Axis, ...], inputs: Mapping[str, tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """What a graph says of an output in terms of its inputs, in terms of what the axes of these inputs are; by name."""

    def known(source: Source) -> Source:
        if source.kind == LOST and source.origins:
            named = frozenset[str]().union(*(origins(inputs[name]) if name in inputs else {name} for name in source.origins))
            return dataclasses.replace(source, origins=named, stands_for_axis=with_digits(source.stands_for_axis, of_inputs))
        own = inputs.get(source.node_name) if source.kind == INPUT else None
        fits = own is not None and source.axis < len(own) and same(axis_size(own[source.axis]), source.size)
        return dataclasses.replace(source, stands_for_axis=own[source.axis]) if own is not None and fits else source

    def of_inputs(digit: Digit) -> Digit:
        return dataclasses.replace(digit, source=known(digit.source))

    return tuple(expanded(with_digits(axis, of_inputs)) for axis in axes)


def _counted_by(digit: Digit) -> Axis | None:
    """What a digit of an opaque axis counts, in the factors of that axis; None where it is no product."""
    cut = split_axis(digit.source.stands_for_axis, quotient(digit.source.size, digit.stride))
    if cut is None:
        return None
    times = quotient(axis_size(cut[0]), digit.size) if same(digit.start, 0) else None
    if times is None:
        return slice_axis(cut[0], digit.start, digit.start + digit.size)
    inside = split_axis(cut[0], times)
    return None if inside is None else inside[1]


def _joined_opaque(axis: Axis) -> Axis:
    """Neighbouring factors of an opaque axis as one factor, where counts of something else had split them."""
    factors = [factor for factor in axis if isinstance(factor, Factor) and LOST not in factor.kinds]
    opaque = [frozenset(digit for digit in factor.digits if digit.source.stands_for_axis) for factor in factors]
    if len(factors) < len(axis) or len(axis) < 2 or not all(opaque):
        return axis
    merged = merge_factors(tuple(Factor(factor.size, own) for factor, own in zip(factors, opaque, strict=True)))
    return merged if len(merged) < len(axis) else axis
