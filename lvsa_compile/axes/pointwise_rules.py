"""Axis rules of elementwise ops, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lvsa_compile.axes.algebra import Axis, Size, axis_size, same
from lvsa_compile.axes.call import Axes, Call, sizes_of, tensors_in
from lvsa_compile.axes.combining import combine


def broadcast_axes(all_axes: Sequence[Axes], rank: int) -> Axes:
    """Axes of an elementwise result of ``rank`` axes, aligned from the last as broadcasting does."""
    result: list[Axis] = [()] * rank
    for axes in all_axes:
        for position, axis in enumerate(axes, start=rank - len(axes)):
            result[position] = combine(result[position], axis)
    return tuple(result)


def pointwise(call: Call) -> Sequence[Axes]:
    """Elementwise with broadcasting."""
    operands = [call.axes_of(tensor) for tensor in tensors_in(call.args, call.kwargs.values())]
    return [
        _fitting(call, broadcast_axes([_of_sizes(axes, sizes_of(output)) for axes in operands], output.dim()), output)
        for output in call.outputs
    ]


def _of_sizes(axes: Axes, sizes: Sequence[Size]) -> Axes:
    """The axes of an operand, without those of which it is not known that they are as long as the result's (symbols that a guard ties)."""
    aligned = sizes[len(sizes) - len(axes) :]
    return tuple(axis if same(axis_size(axis), size) else () for axis, size in zip(axes, aligned, strict=True))


def _fitting(call: Call, axes: Axes, output: Tensor) -> Axes:
    """The axes, a new one where no operand has an axis of the output's size."""
    pairs = enumerate(zip(axes, sizes_of(output), strict=True))
    return tuple(axis if same(axis_size(axis), size) else call.new_axis(size, axis=i) for i, (axis, size) in pairs)
