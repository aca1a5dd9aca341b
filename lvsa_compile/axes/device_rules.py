"""Rules for attention, for ops that some devices keep whole where others take them apart, and for those that only one device has."""

from __future__ import annotations

from collections.abc import Sequence

from lvsa_compile.axes.algebra import BROADCAST
from lvsa_compile.axes.call import Axes, Call, axis_index


def attention(call: Call) -> Sequence[Axes]:
    """``scaled_dot_product_attention`` in any of its kernels, and this package's own op."""
    query, value = call.input(0), call.input(2)
    results = [(*query[:-1], value[-1])]
    for output in call.outputs[1:]:
        results.append(query[:-1] if output.dim() == len(query) - 1 else call.new_axes(output))
    return results


def library_attention(call: Call) -> Sequence[Axes]:
    """Attention of torch_npu, flash-attn, xformers in any layout: the result has the query's axes, the last of them the value's."""
    return [(*call.input(0)[:-1], call.input(2)[-1]), *(call.new_axes(output) for output in call.outputs[1:])]


def repeat_interleave(call: Call) -> Sequence[Axes] | None:
    """Each position of an axis several times in a row."""
    times, dim = call.arg(1, "repeats"), call.arg(2, "dim")
    if not isinstance(times, int) or dim is None:
        return None
    axes = list(call.input())
    position = axis_index(dim, len(axes))
    axes[position] = (*axes[position], *call.new_axis(times, BROADCAST, position))
    return [tuple(axes)]


def geglu(call: Call) -> Sequence[Axes]:
    """Half of the last axis gates the other half."""
    axes = call.input()[:-1]
    return [(*axes, call.new_axis(output.shape[-1], axis=len(axes), of=call.input()[-1])) for output in call.outputs]
