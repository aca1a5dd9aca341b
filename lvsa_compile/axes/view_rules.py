"""Rules of ops that look at the same elements under other axes: reshape, permute, slice, split and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lvsa_compile.axes.algebra import BROADCAST, INPUT, Axis, Concat, Factor, Size, axis_size, leaves, regroup, same, slice_axis
from lvsa_compile.axes.call import Axes, Call, axis_index, sizes_of, with_axis
from lvsa_compile.axes.opaque import cut_axis
from lvsa_compile.compat import settle_slice, size_expression


def view(call: Call) -> Sequence[Axes] | None:
    """Reshape, squeeze, unsqueeze: the same factors under other boundaries."""
    sizes = sizes_of(call.outputs[0])
    grouped = regroup(call.input(), sizes)
    if grouped is None:
        grouped = regroup(tuple(_one_above_the_other(axis, i, call) for i, axis in enumerate(call.input())), sizes)
    return [_regroup_where_possible(call) if grouped is None else grouped]


def _one_above_the_other(axis: Axis, position: int, call: Call) -> Axis:
    """A concatenation of one axis several times, as of the tokens of samples, as an axis that counts the samples, and that axis."""
    parts = [_without_sample(part) for part in axis[0].parts] if len(axis) == 1 and isinstance(axis[0], Concat) else []
    alike = bool(parts) and all(part == parts[0] for part in parts)
    return (*call.new_axis(len(parts), axis=position), *parts[0]) if alike else axis


def _without_sample(axis: Axis) -> Axis:
    """An axis without the one position of a first axis, that of the batch, which it lies at."""

    def is_sample(factor: Factor | Concat) -> bool:
        whole = isinstance(factor, Factor) and same(factor.size, 1)
        return whole and all(d.source.axis == 0 and not d.source.stands_for_axis for f in leaves((factor,)) for d in f.digits)

    return tuple(factor for factor in axis if not is_sample(factor))


def _regroup_where_possible(call: Call) -> Axes:
    """Axes before and after a boundary inside a factor keep their trail; the ones that straddle it start a new one."""
    sizes = sizes_of(call.outputs[0])
    axes = list(call.input())
    lead = 0
    while lead < min(len(axes), len(sizes)) and same(axis_size(axes[lead]), sizes[lead]):
        lead += 1
    tail = 0
    while tail < min(len(axes), len(sizes)) - lead and same(axis_size(axes[-1 - tail]), sizes[-1 - tail]):
        tail += 1
    middle = tuple(call.new_axis(size, axis=lead + i) for i, size in enumerate(sizes[lead : len(sizes) - tail]))
    return (*axes[:lead], *middle, *axes[len(axes) - tail :])


def expand(call: Call) -> Sequence[Axes]:
    """Repeats along axes of size 1."""
    sizes = sizes_of(call.outputs[0])
    axes = call.input()
    padded = (*(() for _ in range(len(sizes) - len(axes))), *axes)
    return [
        tuple(
            axis if same(axis_size(axis), size) else call.new_axis(size, BROADCAST, i)
            for i, (axis, size) in enumerate(zip(padded, sizes, strict=True))
        )
    ]


def permute(call: Call) -> Sequence[Axes]:
    """Axes in another order."""
    axes = call.input()
    return [tuple(axes[axis_index(dim, len(axes))] for dim in call.arg(1, "dims"))]


def transpose(call: Call) -> Sequence[Axes]:
    """Two axes swapped."""
    axes = list(call.input())
    a, b = (axis_index(call.arg(i, n, d), len(axes)) for i, n, d in ((1, "dim0", 0), (2, "dim1", 1)))
    axes[a], axes[b] = axes[b], axes[a]
    return [tuple(axes)]


def matrix_transpose(call: Call) -> Sequence[Axes]:
    """``t()``: both axes of a matrix swapped."""
    return [call.input()[::-1]]


def slice_bounds(size: Size, start: Any, stop: Any) -> tuple[Size, Size]:
    """Python slice bounds on an axis of ``size`` as offsets from its start; symbolic bounds are taken as they are."""
    start, stop = (size_expression(n) if n is not None else None for n in (start, stop))
    low = 0 if start is None else start
    high = size if stop is None or (isinstance(stop, int) and stop >= 1 << 62) else stop
    if isinstance(low, int) and low < 0:
        low = size + low
    if isinstance(high, int) and high < 0:
        high = size + high
    low, high = (size + n if not isinstance(n, int) and n.could_extract_minus_sign() else n for n in (low, high))
    if isinstance(size, int) and isinstance(low, int) and isinstance(high, int):
        low, high = max(0, min(low, size)), max(0, min(high, size))
        high = max(low, high)
    return low, high


def slice_(call: Call) -> Sequence[Axes]:
    """``x[start:stop:step]`` along one axis."""
    axes = call.input()
    dim = axis_index(call.arg(1, "dim", 0), len(axes))
    size, output = axis_size(axes[dim]), call.outputs[0]
    low, high = slice_bounds(size, call.arg(2, "start"), call.arg(3, "end"))
    if call.arg(4, "step", 1) == 1:
        settle_slice(output, dim, low, high, size)
    wanted = sizes_of(output)[dim]
    piece = cut_axis(axes[dim], low, high) if call.arg(4, "step", 1) == 1 else None
    if piece is None or not same(axis_size(piece), wanted):
        call.cut_off(axes[dim], low, high)
        piece = call.new_axis(wanted, axis=dim, of=axes[dim])
    return [with_axis(axes, dim, piece)]


def select(call: Call) -> Sequence[Axes]:
    """One element of an axis: the axis is gone, its position kept for the case that all positions are stacked again."""
    dim = axis_index(call.arg(1, "dim"), len(call.input()))
    return [_without(call.input(), dim, call.arg(2, "index"))]


def _without(axes: Axes, dim: int, index: Any) -> Axes:
    """Axes without one of them.  Which position of an input's axis was taken goes before the next axis as a factor of size 1."""
    left = (*axes[:dim], *axes[dim + 1 :])
    size = axis_size(axes[dim])
    if not (left and isinstance(index, int) and isinstance(size, int)):
        return left
    taken = slice_axis(axes[dim], index % size, index % size + 1) if size > 1 else axes[dim]
    position = tuple(factor for factor in taken or () if isinstance(factor, Factor) and INPUT in factor.kinds and same(factor.size, 1))
    beside = min(dim, len(left) - 1)
    return with_axis(left, beside, (*position, *left[beside]))


def with_place_apart(axes: Axes, dim: int) -> Axes:
    """Axes with a new one of size 1 at ``dim``: the position that ``select`` put before its neighbour."""
    beside = min(dim, len(axes) - 1)
    if beside < 0 or not axes[beside] or not same(axes[beside][0].size, 1):
        return (*axes[:dim], (), *axes[dim:])
    left = with_axis(axes, beside, axes[beside][1:])
    return (*left[:dim], axes[beside][:1], *left[dim:])


def split(call: Call) -> Sequence[Axes]:
    """Consecutive pieces of one axis."""
    axes = call.input()
    dim = axis_index(call.arg(2, "dim", 0), len(axes))
    results: list[Axes] = []
    offset: Size = 0
    for output in call.outputs:
        size = sizes_of(output)[dim]
        piece = cut_axis(axes[dim], offset, offset + size)
        if piece is None:
            call.cut_off(axes[dim], offset, offset + size)
        results.append(with_axis(axes, dim, call.new_axis(size, axis=dim, of=axes[dim]) if piece is None else piece))
        offset = offset + size
    return results


def unbind(call: Call) -> Sequence[Axes]:
    """All elements of one axis apart."""
    axes = call.input()
    dim = axis_index(call.arg(1, "dim", 0), len(axes))
    return [_without(axes, dim, index) for index in range(len(call.outputs))]
