"""Rules of ops that make patches of rows and columns, or of frames: convolutions, pooling, folding and shuffling of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lvsa_compile.axes.algebra import CREATED, INPUT, Axis, Concat, Size, axis_size, concat, leaves, quotient, same, slice_axis, split_axis
from lvsa_compile.axes.call import Axes, Call, axis_index, sizes_of
from lvsa_compile.compat import size_expression

_POOLS = frozenset(("avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"))
CONVOLUTIONS = _POOLS | {"convolution"}
"""Ops that may mix positions."""


def convolution(call: Call) -> Sequence[Axes]:
    """Batch kept, channels new; a spatial axis keeps its order: whole at stride 1, its outer digit where patches tile it."""
    axes, weight = call.input(), call.input(1)
    stride, transposed = call.arg(3, "stride"), call.arg(6, "transposed", False)
    sizes = sizes_of(call.outputs[0])
    strides = [stride[min(i, len(stride) - 1)] for i in range(len(axes) - 2)]
    spatial: list[Axis] = []
    for i, axis in enumerate(axes[2:], start=2):
        step = strides[i - 2]
        if transposed:
            grown = quotient(sizes[i], axis_size(axis))
            outer = None if grown is None or not same(grown, step) else (*axis, *call.new_axis(grown, CREATED, i))
        else:
            outer = _under_window(call.uneven(axis, i), sizes[i], step, axis_size(weight[i]))
        spatial.append(call.new_axis(sizes[i], axis=i) if outer is None else outer)
    channels = weight[1] if transposed else weight[0]
    return [(axes[0], channels if same(axis_size(channels), sizes[1]) else call.new_axis(sizes[1], axis=1), *spatial)]


def mixes_places(op: str, args: Sequence[Any]) -> bool:
    """Whether an op is a convolution or a pool that mixes positions which lie in two of its windows."""
    if op in _POOLS:
        return bool(args[2:]) and list(args[2]) not in ([], list(args[1]))
    if op != "convolution":
        return False
    windows, stride = sizes_of(args[1])[2:], args[3]
    return any(not same(window, stride[min(i, len(stride) - 1)]) and not same(window, 1) for i, window in enumerate(windows))


def _under_window(axis: Axis, size: Size, step: Any, window: Size) -> Axis | None:
    """What the ``size`` positions of a window that moves by ``step`` run along, or None.

    A window that moves by one over a padded axis runs along what was padded, wherever in the window its position is.
    """
    if same(axis_size(axis), size):
        return axis
    if step == 1 and len(axis) == 1 and isinstance(axis[0], Concat) and isinstance(window, int):
        offset: Size = 0
        for part in axis[0].parts:
            if same(axis_size(part), size) and isinstance(offset, int) and offset < window and any(INPUT in f.kinds for f in leaves(part)):
                return part
            offset = offset + axis_size(part)
    whole = slice_axis(axis, 0, size * step)
    halves = None if whole is None else split_axis(whole, size)
    return None if halves is None else halves[0]


def pad(call: Call) -> Sequence[Axes]:
    """Padding before and after some of the last axes; a negative amount cuts."""
    axes = list(call.input())
    amounts = [size_expression(n) for n in call.arg(1, "pad")]
    sizes = sizes_of(call.outputs[0])
    for i in range(len(amounts) // 2):
        dim, (before, after) = len(axes) - 1 - i, amounts[2 * i : 2 * i + 2]
        if same(before, 0) and same(after, 0):
            continue
        cut = [-n if isinstance(n, int) and n < 0 else 0 for n in (before, after)]
        inner = slice_axis(axes[dim], cut[0], axis_size(axes[dim]) - cut[1])
        edges = [[] if n == 0 or (isinstance(n, int) and n < 0) else [call.new_axis(n, CREATED, dim)] for n in (before, after)]
        joined = None if inner is None else concat([*edges[0], inner, *edges[1]])
        known = joined is not None and same(axis_size(joined), sizes[dim])
        axes[dim] = joined if known and joined is not None else call.new_axis(sizes[dim], axis=dim, of=axes[dim])
    return [tuple(axes)]


def pool(call: Call) -> Sequence[Axes]:
    """Pooling: each spatial axis keeps its order where its windows tile it."""
    axes, sizes = call.input(), sizes_of(call.outputs[0])
    outer = []
    for i, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        halves = split_axis(axis, size)
        outer.append(call.new_axis(size, axis=i, of=axis) if halves is None else call.uneven(halves[0], i))
    return [tuple(outer)] * len(call.outputs)


def pixel_shuffle(call: Call) -> Sequence[Axes]:
    """Channels become positions of a finer grid, or the other way round."""
    axes, sizes = call.input(), sizes_of(call.outputs[0])
    channels = call.new_axis(sizes[-3], axis=len(axes) - 3)
    spatial: list[Axis] = []
    for i in (-2, -1):
        if call.op == "pixel_shuffle":
            spatial.append((*axes[i], *call.new_axis(call.arg(1, "upscale_factor"), CREATED, i)))
        else:
            halves = split_axis(axes[i], sizes[i])
            spatial.append(call.new_axis(sizes[i], axis=i, of=axes[i]) if halves is None else halves[0])
    return [(*axes[:-3], channels, *spatial)]


def unfold(call: Call) -> Sequence[Axes] | None:
    """``x.unfold(dim, size, step)``: windows that tile an axis become an axis of windows and a last axis inside them."""
    axes = call.input()
    dim, size, step = axis_index(call.arg(1, "dimension"), len(axes)), call.arg(2, "size"), call.arg(3, "step")
    windows = sizes_of(call.outputs[0])[dim]
    whole = slice_axis(axes[dim], 0, windows * step) if size == step else None
    halves = None if whole is None else split_axis(whole, windows)
    return None if halves is None else [(*axes[:dim], halves[0], *axes[dim + 1 :], halves[1])]


def image_to_columns(call: Call) -> Sequence[Axes] | None:
    """``F.unfold``: patches that tile an image, ``[B, C, H, W]`` to ``[B, C * patch, rows * columns]``."""
    axes, patch, stride = call.input(), call.arg(1, "kernel_size"), call.arg(4, "stride")
    if len(axes) != 4 or list(patch) != list(stride) or any(call.arg(3, "padding")):
        return None
    counts = [quotient(axis_size(axis), n) for axis, n in zip(axes[2:], patch, strict=True)]
    rows, columns = (None if count is None else split_axis(axis, count) for axis, count in zip(axes[2:], counts, strict=True))
    if rows is None or columns is None:
        return None
    return [(axes[0], call.new_axis(sizes_of(call.outputs[0])[1], axis=1), (*rows[0], *columns[0]))]


def columns_to_image(call: Call) -> Sequence[Axes] | None:
    """``F.fold``: the way back from ``image_to_columns``."""
    axes, patch, stride = call.input(), call.arg(2, "kernel_size"), call.arg(5, "stride")
    sizes = sizes_of(call.outputs[0])
    if len(axes) != 3 or list(patch) != list(stride) or any(call.arg(4, "padding")):
        return None
    rows = quotient(sizes[2], patch[0])
    halves = None if rows is None else split_axis(axes[2], rows)
    if halves is None:
        return None
    inside = [call.new_axis(n, CREATED, i) for i, n in enumerate(patch)]
    return [(axes[0], call.new_axis(sizes[1], axis=1), (*halves[0], *inside[0]), (*halves[1], *inside[1]))]
