"""Lowering ``triton``: one kernel that walks each query tile's key ranges in the model's own keys and values.

The kernels, and how a tile's ranges become segments, are in ``kernels/triton_attention.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.kernels.configurations import INTERPRETED, Configuration, column_widths, configurations, power_of_two
from lvsa_compile.ops.attention import broadcast_strides, default_scale, define_attention_op, on_the_querys_device, output_like, score_mask
from lvsa_compile.selection.accelerator import device_target, why_no_gpu
from lvsa_compile.selection.contract import AttentionCall, Lowering

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_HEAD_DIM = 256
_LOG2_E = 1.4426950408889634

_Kind = tuple[torch.device, torch.dtype, int, bool, int]
_preferred: dict[_Kind, Configuration] = dropped_on_reset({})  # what measuring found, by kind of call


@dataclass(frozen=True)
class Schedule:
    """What each tile of query rows walks, in the device's memory; for each sample, or for all at once (``samples`` 1).

    ``segments`` int32 ``[samples, tiles, most segments, 3]``: first key, end, whether all or some rows attend and whether the mask is
    to be asked; ``tiles`` int32 ``[samples, tiles, 3]``: how many of them, first and last query block; ``order`` int64
    ``[samples, tiles]``: those with most keys first.
    """

    segments: Tensor
    tiles: Tensor
    order: Tensor


def make_schedule(
    query_bounds: Tensor, key_ranges: Tensor, phase: Tensor, query_length: int, key_length: int, block_m: int, mask: Tensor | None = None
) -> Schedule:
    """The schedule of one phase: a small kernel and a sort, on the device.

    Keys that ``mask``, added to the scores, leaves to no row are not walked, and it is asked only where it says anything.
    """
    _, blocks, ranges, _ = key_ranges.shape
    count, samples = -(-query_length // block_m), 1 if mask is None else mask.shape[0]
    blocks_per_tile = min(blocks, block_m + 3)  # a table ends in few blocks without rows: open ends that are empty now
    most = 2 * ranges * blocks_per_tile + 1 + (2 if mask is not None else 0)
    device = key_ranges.device
    segments = torch.empty(samples, count, most, 3, dtype=torch.int32, device=device)
    tiles = torch.empty(samples, count, 3, dtype=torch.int32, device=device)
    keys = torch.empty(samples, count, dtype=torch.int32, device=device)
    _kernels().schedule_kernel[(count, samples)](
        query_bounds, key_ranges, phase, phase if mask is None else _mask_zones(mask), segments, tiles, keys,
        query_length, key_length, blocks, ranges, most,
        BLOCK_M=block_m, BLOCKS=power_of_two(blocks_per_tile), RANGES=power_of_two(ranges), HAS_MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    return Schedule(segments, tiles, torch.argsort(keys, descending=True, stable=True))


def _mask_zones(mask: Tensor) -> Tensor:
    """int32 ``[samples, 3]`` of a mask ``[samples, heads or 1, 1, keys]``: the first key for which it says anything, the end of those,
    and the end of the keys that count for any head.
    """
    number = torch.arange(mask.shape[3], device=mask.device)
    limit = ((mask != float("-inf")).any(1)[:, 0] * (number + 1)).amax(-1)
    says = (mask != 0).any(1)[:, 0] & (number < limit[:, None])
    first = len(number) - (says * (len(number) - number)).amax(-1)
    return torch.stack([first, (says * (number + 1)).amax(-1), limit], 1).int()


@functools.cache
def _kernels() -> Any:
    from lvsa_compile.kernels import triton_attention

    return triton_attention


@on_the_querys_device
def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    phase: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes ``lvsa::attention`` (see ``ops.attention.attention`` for shapes and meaning); asks nothing of the host."""
    batch, heads, query_length, head_dim = query.shape
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not output.numel():
        return output, log_sum_exp
    factor = default_scale(head_dim, scale) * _LOG2_E
    if factor <= 0.0:  # the kernel takes the largest score before it scales
        query, factor = (-query, -factor) if factor else (torch.zeros_like(query), 1.0)
    tile, described = _chosen(query, key.shape[2], _describable(key) and _describable(value))
    mask = None if key_mask is None else score_mask(key_mask, key.shape[2])
    schedule = make_schedule(query_bounds, key_ranges, phase, query_length, key.shape[2], tile.block_m, mask)
    samples, tiles, most = schedule.segments.shape[:3]
    widths = column_widths(head_dim)
    parts = [_described(t, tile.block_n, width) if described else None for t in (key, value) for width in widths]
    _kernels().attention_kernel[(tiles, batch * heads)](
        query, key, value, *parts, query if mask is None else mask, output, log_sum_exp,
        query_bounds, key_ranges, phase, schedule.segments, schedule.tiles, schedule.order,
        *query.stride(), *key.stride(), *value.stride(), *output.stride(), *broadcast_strides(mask),
        heads, heads // key.shape[1], query_length, key_ranges.shape[1], key_ranges.shape[2], most, tiles if samples > 1 else 0, factor,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, WIDTH_0=widths[0], WIDTH_1=widths[1],
        HAS_MASK=mask is not None, DESCRIBED=described, PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return output, log_sum_exp


def _describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can tell where keys or values ``[B, heads, S, head_dim]`` lie: 16 bytes apart, none in two places."""
    apart = [stride * tensor.element_size() for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    return tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(n > 0 and n % 16 == 0 for n in apart)


def _described(tensor: Tensor, block_n: int, width: int) -> Any:
    """The descriptor of blocks of ``width`` columns; None for no columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = 16 // tensor.element_size()
    strides = [stride if size > 1 else aligned for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, block_n, width]) if width else None


def _listed(device: torch.device, head_dim: int, dtype: torch.dtype, described: bool) -> tuple[tuple[Configuration, ...], bool]:
    """Configurations for a device, and whether they are for tensor descriptors, as ``described`` would have them."""
    if device.type == "cpu":
        return (INTERPRETED,), described
    by_descriptor = configurations(device_target(device), head_dim, dtype.itemsize, described=True) if described else ()
    return (by_descriptor, True) if by_descriptor else (configurations(device_target(device), head_dim, dtype.itemsize), False)


def _chosen(query: Tensor, keys: int, describable: bool) -> tuple[Configuration, bool]:
    """What measuring preferred for this kind of call, else the first of the list; and whether it loads by tensor descriptor."""
    listed, described = _listed(query.device, query.shape[3], query.dtype, describable)
    preferred = _preferred.get(_kind(query.device, query.dtype, query.shape[3], described, keys))
    return preferred if preferred in listed else listed[0], described


def _kind(device: torch.device, dtype: torch.dtype, head_dim: int, described: bool, keys: int) -> _Kind:
    return device, dtype, head_dim, described, keys.bit_length()


def _tuned(call: AttentionCall, seconds: Callable[[str], float]) -> float:
    """The least seconds of the listed configurations, which is preferred from now on for calls of this kind."""
    listed, described = _listed(call.device, call.head_dim, call.dtype, call.head_dim * call.dtype.itemsize % 16 == 0)
    kind = _kind(call.device, call.dtype, call.head_dim, described, call.key.length)
    found: dict[Configuration, float] = {}
    failure = None
    for configuration in listed:
        _preferred[kind] = configuration
        name = f"{configuration.block_m}x{configuration.block_n} {configuration.warps}/{configuration.stages}"
        try:
            found[configuration] = seconds(name)
        except Exception as error:  # too much shared memory for this part, say; another configuration may do
            failure = error
    del _preferred[kind]
    if failure is not None and not found:
        raise failure
    _preferred[kind] = min(found, key=lambda configuration: found[configuration])
    return found[_preferred[kind]]


def _unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return why_no_gpu(device)


def _refuses(call: AttentionCall) -> str | None:
    if call.dtype not in _DTYPES:
        return f"its kernel computes in float32, not in {call.dtype}"
    if call.head_dim != call.value_dim:
        return f"its kernel wants equal head dims, not {call.head_dim} and {call.value_dim}"
    if call.head_dim > _LARGEST_HEAD_DIM:
        return f"its kernel takes head dims up to {_LARGEST_HEAD_DIM}, not {call.head_dim}"
    return None


LOWERING = Lowering(
    "triton",
    "one Triton kernel that walks each tile's key ranges",
    priority=30,
    body=attention_triton,
    operator=define_attention_op("attention_triton", attention_triton),
    unavailable=_unavailable,
    refuses=_refuses,
    rates={"cuda:80": 0.85, "cuda:90": 0.62, "cuda:100": 0.55, "cuda:120": 0.80, "hip": 0.90},
    tuned=_tuned,
)
