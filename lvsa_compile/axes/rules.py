"""What each ATen op does to symbolic axes.  A rule is a small function; ``RULES`` says which serves which op.

A rule gets the ``Call`` and returns the axes of each output tensor, or None where it cannot tell; then the outputs start new trails
that name the op, so that a site can say where its trail was lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvsa_compile.axes.algebra import (
    ARANGE,
    BROADCAST,
    CREATED,
    LOST,
    Axis,
    Factor,
    Source,
    axis_of,
    axis_size,
    concat,
    quotient,
    repeats,
    same,
    slice_axis,
)
from lvsa_compile.axes.call import Axes, Call, Rule, axis_index, sizes_of, with_axis
from lvsa_compile.axes.combining import combine
from lvsa_compile.axes.device_rules import attention, geglu, library_attention, repeat_interleave
from lvsa_compile.axes.flipping import turned_around
from lvsa_compile.axes.overwriting import holds_tokens, informed, lost_axes, overwritten
from lvsa_compile.axes.patch_rules import columns_to_image, convolution, image_to_columns, pad, pixel_shuffle, pool, unfold
from lvsa_compile.axes.pointwise_rules import broadcast_axes, pointwise
from lvsa_compile.axes.positions import Run, runs_along, runs_of
from lvsa_compile.axes.shard_rules import all_to_all
from lvsa_compile.axes.view_rules import (
    expand,
    matrix_transpose,
    permute,
    select,
    slice_,
    slice_bounds,
    split,
    transpose,
    unbind,
    view,
    with_place_apart,
)

# --- elementwise, copies, creation ---------------------------------------------------------------------------------------------


def copied(call: Call) -> Sequence[Axes]:
    """The same elements."""
    axes, sizes = call.input(), sizes_of(call.args[0])
    return [
        axes if len(axes) == output.dim() and all(map(same, sizes, sizes_of(output))) else call.new_axes(output) for output in call.outputs
    ]


def unchanged(call: Call) -> Sequence[Axes]:
    """Every output of the first input's shape keeps its axes, though what repeated along one may now differ from position to position."""
    return [tuple(call.uneven(axis, i) for i, axis in enumerate(axes)) for axes in copied(call)]


def created(call: Call) -> Sequence[Axes]:
    """A tensor made from nothing."""
    return [call.new_axes(output, CREATED) for output in call.outputs]


def arange(call: Call) -> Sequence[Axes]:
    """Counting: a source of its own, since rope tables are made from such counts of frames, height and width."""
    return [(axis_of(Source(ARANGE, call.node_name, 0, sizes_of(call.outputs[0])[0], call.node_name)),)]


def view_as_complex(call: Call) -> Sequence[Axes]:
    """The last axis of pairs becomes complex numbers."""
    return [call.input()[:-1]]


def view_as_real(call: Call) -> Sequence[Axes]:
    """Complex numbers become a last axis of pairs."""
    return [(*call.input(), call.new_axis(2, CREATED, len(call.input())))]


# --- sums and products ---------------------------------------------------------------------------------------------------------


def reduction(call: Call) -> Sequence[Axes] | None:
    """A sum, mean or maximum over some axes."""
    axes = call.input()
    dims = call.arg(2 if call.op in ("linalg_vector_norm", "norm") else 1, "dim")
    if dims is None or isinstance(dims, bool) or dims == []:
        gone = set(range(len(axes)))
    else:
        gone = {axis_index(dim, len(axes)) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    remaining = tuple(axis for i, axis in enumerate(axes) if i not in gone)
    held = tuple(() if i in gone else axis for i, axis in enumerate(axes))
    return [held if output.dim() == len(axes) else remaining for output in call.outputs]


def matrix_product(call: Call) -> Sequence[Axes]:
    """``mm``, ``addmm`` and their kin in lower precision: rows of the first factor, columns of the second."""
    first = 1 if call.op == "addmm" else 0
    a, b = call.input(first), call.input(first + 1)
    return [(a[0], b[1])]


def batched_product(call: Call) -> Sequence[Axes]:
    """``bmm`` and ``baddbmm``."""
    first = 1 if call.op == "baddbmm" else 0
    a, b = call.input(first), call.input(first + 1)
    return [(combine(a[0], b[0]), a[1], b[2])]


def matrix_vector(call: Call) -> Sequence[Axes]:
    """``mv`` and ``addmv``."""
    return [call.input(1 if call.op == "addmv" else 0)[:1]]


def linear(call: Call) -> Sequence[Axes]:
    """``x @ weight.T + bias`` where it was not decomposed."""
    return [(*call.input()[:-1], call.input(1)[0])]


def matmul(call: Call) -> Sequence[Axes] | None:
    """``matmul`` where it was not decomposed."""
    a, b = call.input(), call.input(1)
    if len(a) < 2 or len(b) < 2:
        return None
    rank = call.outputs[0].dim()
    return [(*broadcast_axes([a[:-2], b[:-2]], rank - 2), a[-2], b[-1])]


# --- joining and indexing ------------------------------------------------------------------------------------------------------


def cat(call: Call) -> Sequence[Axes]:
    """Concatenation along one axis; the others are the same axis in every part."""
    parts = [call.axes_of(t) for t in call.arg(0, "tensors") if t.dim() > 1 or not same(sizes_of(t)[0] if t.dim() else 1, 0)]
    rank = call.outputs[0].dim()
    dim = axis_index(call.arg(1, "dim", 0), rank)
    joined = [concat([axes[i] for axes in parts]) if i == dim else _common([axes[i] for axes in parts]) for i in range(rank)]
    return [tuple(joined)]


def stack(call: Call) -> Sequence[Axes]:
    """Concatenation along a new axis, which is an input's axis again where the parts are its positions in order."""
    rank = call.outputs[0].dim()
    dim = axis_index(call.arg(1, "dim", 0), rank)
    parts = [call.axes_of(t) for t in call.arg(0, "tensors")]
    for beside in range(rank - 1):
        taken = [axes[beside][:1] for axes in parts]
        if all(one and same(one[0].size, 1) for one in taken):
            along = concat(list(taken))
            if len(along) == 1 and isinstance(along[0], Factor) and along[0].digits:
                apart = [with_axis(axes, beside, axes[beside][1:]) for axes in parts]
                common = [_common([axes[i] for axes in apart]) for i in range(rank - 1)]
                return [(*common[:dim], along, *common[dim:])]
    common = [_common([tuple(f for f in axes[i] if not same(f.size, 1)) for axes in parts]) for i in range(rank - 1)]
    return [(*common[:dim], call.new_axis(len(parts), axis=dim), *common[dim:])]


def _common(axes: Sequence[Axis]) -> Axis:
    result: Axis = ()
    for axis in axes:
        result = combine(result, axis)
    return result


def repeat(call: Call) -> Sequence[Axes]:
    """The whole tensor several times along some axes."""
    sizes = sizes_of(call.outputs[0])
    axes = call.input()
    padded = (*(() for _ in range(len(sizes) - len(axes))), *axes)
    result = []
    for i, (axis, size) in enumerate(zip(padded, sizes, strict=True)):
        times = quotient(size, axis_size(axis))
        result.append(
            axis if times is not None and same(times, 1) else (*call.new_axis(times or size, BROADCAST, i), *(axis if times else ()))
        )
    return [tuple(result)]


def gather_rows(call: Call) -> Sequence[Axes] | None:
    """``index_select`` and ``embedding``: rows in the order of an index tensor, so the result runs along the index."""
    if call.op == "embedding":
        return [(*call.input(1), *call.input(0)[1:])]
    axes = call.input()
    dim = axis_index(call.arg(1, "dim"), len(axes))
    return _by_index(call, axes, dim, call.arg(2, "index"))


def index(call: Call) -> Sequence[Axes] | None:
    """``x[index_tensor]`` with one index tensor that is not a mask; with several side by side the axes they index are lost."""
    used = [(dim, by) for dim, by in enumerate(call.arg(1, "indices")) if by is not None]
    if any(by.dtype in _MASK_DTYPES for _, by in used):
        return None
    if len(used) == 1:
        return _by_index(call, call.input(), *used[0])
    axes, sizes, first = call.input(), sizes_of(call.outputs[0]), used[0][0]
    if [dim for dim, _ in used] != list(range(first, first + len(used))):
        return None
    after = axes[first + len(used) :]
    indexed = range(first, len(sizes) - len(after))
    return [(*axes[:first], *(call.new_axis(sizes[i], axis=i) for i in indexed), *after)]


def _by_index(call: Call, axes: Axes, dim: int, by: Tensor) -> Sequence[Axes] | None:
    """Axes after the elements of one axis were taken in the order of an index.

    What is taken of a table runs along the index; what is taken of tokens keeps their order where the index has known values that are
    runs of positions, and has lost it otherwise.
    """
    along: Axes
    if not holds_tokens(axes[dim]):
        along = call.axes_of(by)
    else:
        runs = runs_along(call, by, axes[dim])
        pieces = [slice_axis(axes[dim], *run) for run in runs] if runs else [None]
        known = [piece for piece in pieces if piece is not None]
        if len(known) == len(pieces):
            along = (concat(known),)
        else:
            along = tuple(call.new_axis(size, LOST, dim + i, of=axes[dim]) for i, size in enumerate(sizes_of(by)))
    result = (*axes[:dim], *along, *axes[dim + 1 :])
    return [result] if len(result) == call.outputs[0].dim() else None


def index_put(call: Call) -> Sequence[Axes] | None:
    """``x[index_tensor] = y``: positions in the order of the index are overwritten, or added to."""
    used = [(dim, by) for dim, by in enumerate(call.arg(1, "indices")) if by is not None]
    if len(used) == 1 and used[0][1].dtype in _MASK_DTYPES and not any(informed(axis) for axis in call.axes_of(call.arg(2, "values"))):
        return unchanged(call)  # some elements become a constant, all stay where they are
    if len(used) != 1 or used[0][1].dtype in _MASK_DTYPES:
        return None
    dim, by = used[0]
    return _placed(call, dim, runs_along(call, by, call.input()[dim]), call.arg(2, "values"), bool(call.arg(3, "accumulate", False)))


def index_copy(call: Call) -> Sequence[Axes] | None:
    """``index_copy``, ``index_add``: as ``x[:, index] = y`` and ``x[:, index] += y``."""
    dim = axis_index(call.arg(1, "dim"), len(call.input()))
    runs = runs_along(call, call.arg(2, "index"), call.input()[dim])
    return _placed(call, dim, runs, call.arg(3, "source"), call.op == "index_add")


def scatter(call: Call) -> Sequence[Axes] | None:
    """``scatter``, ``scatter_add`` with an index that is the same across all other axes."""
    axes, by = call.input(), call.axes_of(call.arg(2, "index"))
    dim = axis_index(call.arg(1, "dim"), len(axes))
    source = call.arg(3, "src")
    if not isinstance(source, Tensor):
        return None
    if any(not same(axis_size(a), axis_size(b)) for i, (a, b) in enumerate(zip(axes, by, strict=True)) if i != dim):
        return None  # it writes to a part of the other axes
    uniform = all(same(axis_size(axis), 1) or repeats(axis) for i, axis in enumerate(by) if i != dim)
    positions = call.value_of(call.arg(2, "index")) if uniform else None
    if positions is not None:
        positions = positions[tuple(slice(None) if i == dim else 0 for i in range(positions.ndim))]
    return _placed(call, dim, runs_of(positions, axis_size(axes[dim])), source, call.op == "scatter_add")


def slice_scatter(call: Call) -> Sequence[Axes] | None:
    """``slice_scatter`` and ``select_scatter``: a part of an axis takes another tensor."""
    before, new = call.input(), call.input(1)
    dim = axis_index(call.arg(2, "dim", 0), len(before))
    size = axis_size(before[dim])
    if call.op == "select_scatter":
        if not isinstance(call.arg(3, "index"), int) or not isinstance(size, int):
            return None
        low = call.arg(3, "index") % size
        high, new = low + 1, with_place_apart(new, dim)
    elif call.arg(5, "step", 1) == 1:
        low, high = slice_bounds(size, call.arg(3, "start"), call.arg(4, "end"))
    else:
        return None
    lost = lost_axes(call.op, call.node_name, sizes_of(call.outputs[0]), (*before, *new))
    return [overwritten(before, new, dim, [(low, high)], lost)]


def _placed(call: Call, dim: int, runs: list[Run] | None, source: Tensor, added: bool) -> Sequence[Axes] | None:
    before, new = call.input(), call.axes_of(source)
    new = (*(() for _ in range(len(before) - len(new))), *new)
    lost = lost_axes(call.op, call.node_name, sizes_of(call.outputs[0]), (*before, *new))
    count = None if runs is None else sum(stop - start for start, stop in runs)
    if count is not None and len(new) == len(before) and not same(axis_size(new[dim]), count):
        call.cut_off(new[dim], count)
        count = None
    if len(new) != len(before) or count is None:
        runs, new = None, before
    if runs is None:  # somewhere along the axis, and for one position of another axis elsewhere than for the next
        new = tuple(call.uneven(axis, i) for i, axis in enumerate(new))
    return [overwritten(before, new, dim, runs, lost, added=added)]


def reordered(call: Call) -> Sequence[Axes]:
    """``flip``, ``roll``, ``sort`` along some axes: those lose their order, the others keep it; a second ``flip`` restores it."""
    axes = call.input()
    argument = 2 if call.op in ("roll", "topk") else 1
    dims = call.arg(argument, "dims", call.arg(argument, "dim", [] if call.op == "roll" else -1))
    moved = {axis_index(dim, len(axes)) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])} or set(range(len(axes)))
    sizes, new = sizes_of(call.outputs[0]), turned_around if call.op == "flip" else Call.new_axis
    return [tuple(new(call, sizes[i], axis=i, of=axis) if i in moved else axis for i, axis in enumerate(axes))] * len(call.outputs)


def gather(call: Call) -> Sequence[Axes]:
    """``gather`` and ``take_along_dim``: along ``dim`` a table's rows run along the index, and tokens lose their order.

    Each position of another axis has an order of its own, unless the index repeats along it.
    """
    axes, by, sizes = call.input(), call.axes_of(call.arg(2, "index")), sizes_of(call.outputs[0])
    dim = axis_index(call.arg(1, "dim"), len(axes))
    others = [axis if repeats(along) else call.uneven(axis, i) for i, (axis, along) in enumerate(zip(axes, by, strict=True))]
    taken = call.new_axis(sizes[dim], axis=dim, of=axes[dim]) if holds_tokens(axes[dim]) else by[dim]
    return [(*others[:dim], taken, *others[dim + 1 :])]


_MASK_DTYPES = (torch.bool, torch.uint8)


def _table(*groups: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in groups for name in names.split()}


RULES: dict[str, Rule] = _table(
    (pointwise, "masked_fill polar complex hardswish _prelu_kernel log_sigmoid_forward floor_divide"),
    (view, "view _unsafe_view reshape _reshape_alias squeeze unsqueeze"),
    (expand, "expand"),
    (permute, "permute"),
    (transpose, "transpose"),
    (matrix_transpose, "t"),
    (slice_, "slice"),
    (select, "select"),
    (split, "split split_with_sizes"),
    (unbind, "unbind"),
    (copied, "clone contiguous detach alias lift lift_fresh lift_fresh_copy _to_copy wait_tensor _conj _neg_view"),
    (
        unchanged,
        "native_layer_norm native_group_norm native_batch_norm"
        " _fused_rms_norm rms_norm npu.npu_rms_norm _softmax _log_softmax _safe_softmax cumsum native_dropout triu tril"
        " all_reduce all_reduce_ cumprod renorm bernoulli bucketize index_fill",
    ),
    (
        created,
        "empty empty_like empty_strided empty_permuted new_empty new_empty_strided new_zeros new_ones new_full zeros zeros_like"
        " ones ones_like full full_like scalar_tensor rand rand_like randn randn_like randint eye linspace",
    ),
    (arange, "arange"),
    (view_as_complex, "view_as_complex"),
    (view_as_real, "view_as_real"),
    (reduction, "sum mean amax amin var var_mean std std_mean any all prod argmax argmin logsumexp linalg_vector_norm norm max min"),
    (matrix_product, "mm addmm _int_mm _scaled_mm"),
    (batched_product, "bmm baddbmm"),
    (matrix_vector, "mv addmv"),
    (linear, "linear"),
    (matmul, "matmul"),
    (convolution, "convolution"),
    (pool, "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices"),
    (pixel_shuffle, "pixel_shuffle pixel_unshuffle"),
    (unfold, "unfold"),
    (image_to_columns, "im2col"),
    (columns_to_image, "col2im"),
    (
        attention,
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"
        " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable"
        " _scaled_dot_product_attention_math attention",
    ),
    (
        library_attention,
        "npu.npu_fusion_attention npu.npu_fusion_attention_v2 npu.npu_fusion_attention_v3 npu.npu_prompt_flash_attention"
        " flash_attn._flash_attn_forward flash_attn._flash_attn_varlen_forward flash_attn_3.fwd flash_attn_3._flash_attn_forward"
        " _diffusers_flash_attn_3._flash_attn_forward xformers_flash.flash_fwd torch_attn._varlen_attn _flash_attention_forward",
    ),
    (repeat_interleave, "repeat_interleave"),
    (geglu, "npu.npu_geglu"),
    (all_to_all, "all_to_all_single"),
    (cat, "cat"),
    (stack, "stack"),
    (pad, "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"),
    (repeat, "repeat"),
    (gather_rows, "index_select embedding"),
    (index, "index _unsafe_index"),
    (index_put, "index_put"),
    (index_copy, "index_copy index_add"),
    (scatter, "scatter scatter_add"),
    (reordered, "flip roll sort topk"),
    (gather, "gather"),
    (slice_scatter, "slice_scatter select_scatter"),
)
"""Rule by the name of an op, see ``compat.name_of_op``.

Ops with torch's ``pointwise`` tag need no entry; the in-place twin of an op needs none either.
"""
