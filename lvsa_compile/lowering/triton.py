"""Lowering ``triton``: one kernel that walks each query tile's key ranges in the model's own keys and values.

The kernel is in ``kernels/triton_attention.py``; how a tile's ranges become the list it walks, in ``kernels/triton_schedule.py``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.kernels.configurations import INTERPRETED, Configuration, column_widths, configurations
from lvsa_compile.lowering.shared.triton_lists import MOST_KEYS, Schedule, kernels, make_schedule
from lvsa_compile.ops.attention import broadcast_strides, default_scale, define_attention_op, on_the_querys_device, output_like, score_mask
from lvsa_compile.selection.accelerator import device_target, why_no_gpu
from lvsa_compile.selection.contract import AttentionCall, Lowering

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_HEAD_DIM = 256
_LOG2_E = 1.4426950408889634

_Kind = tuple[torch.device, torch.dtype, int, bool, int]
_preferred: dict[_Kind, Configuration] = dropped_on_reset({})  # what measuring found, by kind of call


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

    def schedule(tile: Configuration, mask: Tensor | None) -> Schedule:
        return make_schedule(query_bounds, key_ranges, phase, query.shape[2], key.shape[2], tile, mask)

    tile, described = chosen_tile(query, key, value)
    return run_kernel(query, key, value, query_bounds, schedule, tile, described, scale, key_mask)


def run_kernel(
    query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, schedule: Callable[[Configuration, Tensor | None], Schedule],
    tile: Configuration, described: bool, scale: float | None, key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of tiles over the lists that ``schedule`` makes of the size of a tile and of the mask that is added to the scores."""
    batch, heads, query_length, head_dim = query.shape
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not output.numel():
        return output, log_sum_exp
    query, factor = positively_scaled(query, scale)
    mask = None if key_mask is None else score_mask(key_mask, key.shape[2])
    lists = schedule(tile, mask)
    widths = column_widths(head_dim)
    parts = [_described(t, tile.block_n, width) if described else None for t in (key, value) for width in widths]
    kernels().attention_kernel[(lists.tiles.shape[1], batch * heads)](
        query, key, value, *parts, query if mask is None else mask, output, log_sum_exp, query_bounds, *lists.tensors,
        *query.stride(), *key.stride(), *value.stride(), *output.stride(), *broadcast_strides(mask),
        heads, heads // key.shape[1], query_length, query_bounds.shape[0] - 1, *lists.distances(batch), factor,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, WIDTH_0=widths[0], WIDTH_1=widths[1], WORDS=lists.words,
        HAS_MASK=mask is not None, STRADDLES=query_bounds.shape[0] > 2, DESCRIBED=described, PRECISION="ieee",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return output, log_sum_exp


def positively_scaled(query: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """The query, and a scale above 0 that makes logarithms to base 2 of its scores: a kernel takes the largest score before it scales."""
    factor = default_scale(query.shape[3], scale) * _LOG2_E
    if factor > 0.0:
        return query, factor
    return (-query, -factor) if factor else (torch.zeros_like(query), 1.0)


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


def chosen_tile(query: Tensor, key: Tensor, value: Tensor) -> tuple[Configuration, bool]:
    """The configuration for a call, and whether it loads keys and values by tensor descriptor."""
    return _chosen(query, key.shape[2], _describable(key) and _describable(value))


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
    if call.key.length > MOST_KEYS:
        return f"its lists hold up to {MOST_KEYS} keys, not {call.key.length}"
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
