"""The axis of an elementwise result: what both operands know of it."""

from __future__ import annotations

from lvsa_compile.axes.algebra import (
    ARANGE,
    BROADCAST,
    CREATED,
    INPUT,
    LOST,
    PARAMETER,
    Axis,
    Concat,
    Factor,
    Size,
    axis_size,
    concat,
    leaves,
    quotient,
    same,
    slice_axis,
    split_factor,
)


def combine(a: Axis, b: Axis) -> Axis:
    """The axis of an elementwise result: what both operands know of it."""
    if a == b or not b:
        return a
    if not a:
        return b
    if same(axis_size(a), 1) != same(axis_size(b), 1):
        return b if same(axis_size(a), 1) else a
    refined = _refine(a, b)
    if refined is not None:
        return refined
    for joined, whole in ((a, b), (b, a)):
        if len(joined) == 1 and isinstance(joined[0], Concat):
            return _combine_along(joined[0].parts, whole)
    return a if _knowledge(a) >= _knowledge(b) else b


def _refine(a: Axis, b: Axis) -> Axis | None:
    pairs = align(a, b)
    if pairs is None:
        return None
    result: list[Factor | Concat] = []
    for x, y in pairs:
        result.extend((x,) if y is None else _combine_factors(x, y))
    return tuple(result)


def align(first: Axis, second: Axis) -> list[tuple[Factor | Concat, Factor | Concat | None]] | None:
    """Pairs of factors of equal size from two products of equal size, larger ones split; None where boundaries cross.

    A factor of size 1, one position of an axis, stands alone.
    """
    a, b = list(first), list(second)
    pairs: list[tuple[Factor | Concat, Factor | Concat | None]] = []
    while a and b:
        x, y = a.pop(0), b.pop(0)
        if same(x.size, 1) != same(y.size, 1):
            pairs.append((x if same(x.size, 1) else y, None))
            (b if same(x.size, 1) else a).insert(0, y if same(x.size, 1) else x)
            continue
        if not same(x.size, y.size):
            if quotient(x.size, y.size) is not None:
                split = split_factor(x, y.size)
                if split is None:
                    return None
                x, a = split[0][0], [*split[0][1:], *split[1], *a]
            elif quotient(y.size, x.size) is not None:
                split = split_factor(y, x.size)
                if split is None:
                    return None
                y, b = split[0][0], [*split[0][1:], *split[1], *b]
            if not same(x.size, y.size):
                return None
        pairs.append((x, y))
    left = [*a, *b]
    return [*pairs, *((factor, None) for factor in left)] if all(same(factor.size, 1) for factor in left) else None


def _combine_factors(a: Factor | Concat, b: Factor | Concat) -> Axis:
    if isinstance(a, Concat) and isinstance(b, Concat):
        if len(a.parts) == len(b.parts) and all(same(axis_size(x), axis_size(y)) for x, y in zip(a.parts, b.parts, strict=True)):
            return concat([combine(x, y) for x, y in zip(a.parts, b.parts, strict=True)])
        return (a,) if _knowledge((a,)) >= _knowledge((b,)) else (b,)
    if isinstance(a, Concat) or isinstance(b, Concat):
        parts, whole = (a.parts, b) if isinstance(a, Concat) else (b.parts, a)  # type: ignore[union-attr]
        return _combine_along(parts, (whole,))
    telling = frozenset(d for d in a.digits | b.digits if d.source.kind in (INPUT, ARANGE))
    lost = sorted(
        (d for d in a.digits | b.digits if d.source.kind == LOST), key=lambda d: (d.source.node_name, d.source.name, d.source.axis)
    )
    if telling or lost:  # a lost order stays lost; weights and repeats say nothing more, and would grow with every layer
        return (Factor(a.size, telling | frozenset(lost[:1])),)
    return (a,) if _knowledge((a,)) >= _knowledge((b,)) else (b,)


def _combine_along(parts: tuple[Axis, ...], whole: Axis) -> Axis:
    """A concatenation combined with an axis that runs along all of it."""
    combined: list[Axis] = []
    offset: Size = 0
    for part in parts:
        end = offset + axis_size(part)
        piece = slice_axis(whole, offset, end)
        combined.append(part if piece is None else combine(part, piece))
        offset = end
    return concat(combined)


_RANK = {LOST: 5, INPUT: 4, ARANGE: 3, PARAMETER: 2, CREATED: 1, BROADCAST: 0}


def _knowledge(axis: Axis) -> tuple[int, int]:
    """Orders axes by how much they tell: the best kind of source, then the number of factors."""
    factors = list(leaves(axis))
    return max((_RANK[kind] for factor in factors for kind in factor.kinds), default=-1), len(factors)
