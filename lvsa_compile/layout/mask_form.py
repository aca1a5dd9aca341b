"""What a site's mask says, part by part: which keys count, which queries count, a constant table of pairs, or sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lvsa_compile.axes.algebra import BROADCAST, Axis, Factor, axis_size, same
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.values import Array
from lvsa_compile.compat import example_value
from lvsa_compile.patterns.masks import AS_GOOD_AS_MINUS_INFINITY


@dataclass(frozen=True, eq=False)
class MaskForm:
    """A mask as the conjunction of its parts.

    ``keys`` are nodes ``[.., Sq, Sk]`` that are the same for every query, ``queries`` boolean ones that are the same for every key;
    ``pairs`` is a constant bool ``[Sq, Sk]``, True where a query may attend a key.  ``sequences`` is a node that calls
    ``lvsa::same_sequence``; then the mask has no other part, and ``ends`` is what its ends of sequences are, where they are constant.
    """

    keys: tuple[fx.Node, ...] = ()
    queries: tuple[fx.Node, ...] = ()
    pairs: Array | None = None
    sequences: fx.Node | None = None
    ends: Array | None = None


def mask_form(parts: Sequence[fx.Node], axes: Sequence[Axes], constant: Callable[[fx.Node], Array | None]) -> MaskForm | None:
    """The form of the mask made of ``parts``; None where a part tells neither keys, queries nor constant pairs."""
    keys, queries = [], []
    pairs: Array | None = None
    for part, part_axes in zip(parts, axes, strict=True):
        if not 2 <= len(part_axes) <= 4:
            return None
        if _repeats(part_axes[-2]) and not same(axis_size(part_axes[-1]), 1):
            keys.append(part)
        elif _repeats(part_axes[-1]) and example_value(part).dtype == torch.bool and not same(axis_size(part_axes[-2]), 1):
            queries.append(part)
        else:
            table = _pairs(constant(part))
            if table is None:
                return None
            pairs = table if pairs is None else pairs & table
    return MaskForm(tuple(keys), tuple(queries), pairs)


def _repeats(axis: Axis) -> bool:
    """Whether all positions of an axis hold the same; parts laid one after the other need not, though each repeats."""
    return all(isinstance(factor, Factor) and (factor.kinds == {BROADCAST} or same(factor.size, 1)) for factor in axis)


def _pairs(values: Array | None) -> Array | None:
    """A constant mask as bool ``[Sq, Sk]``; None where it differs between samples or heads, or adds anything else than -inf."""
    if values is None:
        return None
    tables: Array = values.reshape(-1, *values.shape[-2:])
    if not (tables == tables[:1]).all():
        return None
    table: Array = tables[0]
    if table.dtype == bool:
        return table
    masked: Array = table <= AS_GOOD_AS_MINUS_INFINITY
    return ~masked if (masked | (table == 0)).all() else None
