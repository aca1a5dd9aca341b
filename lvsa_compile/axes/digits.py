"""The same axis with other digits."""

from __future__ import annotations

from collections.abc import Callable

from lvsa_compile.axes.algebra import Axis, Concat, Digit, Factor


def with_digits(axis: Axis, change: Callable[[Digit], Digit]) -> Axis:
    """The axis with every digit changed; its factors, and the parts of concatenations, stay as long as they are."""
    return tuple(
        Concat(tuple(with_digits(part, change) for part in factor.parts))
        if isinstance(factor, Concat)
        else Factor(factor.size, frozenset(map(change, factor.digits)))
        for factor in axis
    )
