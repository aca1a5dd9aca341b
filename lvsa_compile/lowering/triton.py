"""Lowering ``triton``: one kernel that walks each query tile's key ranges in the model's own keys and values."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvsa_compile.kernels.configurations import INTERPRETED, Configuration, column_widths, configurations, power_of_two
from lvsa_compile.lowering.attention_op import broadcast_strides, default_scale, define_attention_op, output_like, score_mask
from lvsa_compile.lowering.contract import AttentionCall, Lowering
from lvsa_compile.lowering.rates import device_target, share_of_dense

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cuda",)  # ROCm calls itself so, too
_LARGEST_HEAD_DIM = 256
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Schedule:
    """What each tile of query rows walks, in the device's memory.

    ``segments`` int32 ``[tiles, most segments, 3]``: first key, end, whether all or some rows attend; ``tiles`` int32 ``[tiles, 3]``:
    how many of them, first and last query block; ``order`` int64 ``[tiles]``: those with most keys first.
    """

    segments: Tensor
    tiles: Tensor
    order: Tensor


def make_schedule(
    query_bounds: Tensor, key_ranges: Tensor, phase: Tensor, query_length: int, key_length: int, tile: Configuration
) -> Schedule:
    """The schedule of one phase: a small kernel and a sort, on the device."""
    _, blocks, ranges, _ = key_ranges.shape
    count = -(-query_length // tile.block_m)
    blocks_per_tile = min(blocks, tile.block_m + 3)  # a table ends in few blocks without rows: open ends that are empty now
    most = 2 * ranges * blocks_per_tile + 1
    device = key_ranges.device
    segments = torch.empty(count, most, 3, dtype=torch.int32, device=device)
    tiles = torch.empty(count, 3, dtype=torch.int32, device=device)
    keys = torch.empty(count, dtype=torch.int32, device=device)
    _kernels().schedule_kernel[(count,)](
        query_bounds, key_ranges, phase, segments, tiles, keys, query_length, key_length, blocks, ranges, most,
        BLOCK_M=tile.block_m, BLOCKS=power_of_two(blocks_per_tile), RANGES=power_of_two(ranges), num_warps=4,
    )  # fmt: skip
    return Schedule(segments, tiles, torch.argsort(keys, descending=True, stable=True))


@functools.cache
def _kernels() -> Any:
    from lvsa_compile.kernels import triton_attention

    return triton_attention


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
    """Computes ``lvsa::attention`` (see ``attention_op.attention`` for shapes and meaning); asks nothing of the host."""
    batch, heads, query_length, head_dim = query.shape
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not output.numel():
        return output, log_sum_exp
    tile = configurations(device_target(query.device), head_dim, query.element_size())[0] if query.device.type != "cpu" else INTERPRETED
    kernels = _kernels()
    schedule = make_schedule(query_bounds, key_ranges, phase, query_length, key.shape[2], tile)
    mask = None if key_mask is None else score_mask(key_mask, key.shape[2])
    width_0, width_1 = column_widths(head_dim)
    kernels.attention_kernel[(schedule.order.shape[0], batch * heads)](
        query, key, value, query if mask is None else mask, output, log_sum_exp,
        query_bounds, key_ranges, phase, schedule.segments, schedule.tiles, schedule.order,
        *query.stride(), *key.stride(), *value.stride(), *output.stride(), *broadcast_strides(mask),
        heads, heads // key.shape[1], query_length, key.shape[2], key_ranges.shape[1], key_ranges.shape[2], schedule.segments.shape[1],
        default_scale(head_dim, scale) * _LOG2_E,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, WIDTH_0=width_0, WIDTH_1=width_1,
        HAS_MASK=mask is not None, PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return output, log_sum_exp


def _unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type not in _DEVICES:
        return f"it runs on {' and '.join(_DEVICES)}, not on {device.type}"
    if not torch.cuda.is_available():
        return "no device of this kind is here to compile for"
    if not torch.version.hip and torch.cuda.get_device_properties(device).major < 8:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_properties(device).name} has less"
    return None


def _refuses(call: AttentionCall) -> str | None:
    if call.dtype not in _DTYPES:
        return f"its kernel computes in float32, not in {call.dtype}"
    if call.head_dim != call.value_dim:
        return f"its kernel wants equal head dims, not {call.head_dim} and {call.value_dim}"
    if call.head_dim > _LARGEST_HEAD_DIM:
        return f"its kernel takes head dims up to {_LARGEST_HEAD_DIM}, not {call.head_dim}"
    return None


def _speedup(call: AttentionCall) -> float:
    """Dense time over sparse time, from counted FLOPs."""
    return share_of_dense("triton", call.device) / call.density


LOWERING = Lowering(
    "triton",
    "one Triton kernel that walks each tile's key ranges",
    priority=30,
    body=attention_triton,
    operator=define_attention_op("attention_triton", attention_triton),
    unavailable=_unavailable,
    refuses=_refuses,
    speedup=_speedup,
)
