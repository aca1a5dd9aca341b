"""Lowering ``flex``: FlexAttention (arXiv 2412.05496) with a block mask that is computed on the device from the key ranges.

The tables of the mask are inputs of the compiled kernel, so rotating the anchors does not recompile it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.ops.attention import default_scale, define_attention_op, on_the_querys_device, output_like, score_mask
from lvsa_compile.selection.accelerator import why_no_gpu
from lvsa_compile.selection.contract import AttentionCall, Lowering

log = logging.getLogger(__name__)
_flex: Any = importlib.import_module("torch.nn.attention.flex_attention")  # the package has a function of this name, too
_BLOCK = 128
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@on_the_querys_device
def attention_flex(
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
    ranges = key_ranges.index_select(0, phase.reshape(1).long())[0].clamp(max=key.shape[2])
    added = None if key_mask is None else score_mask(key_mask, key.shape[2])
    shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (query, key, value, query_bounds, ranges))
    mask_of, attend = _compiled(shapes, None if added is None else added.shape, scale)
    mask = mask_of(query_bounds, ranges, query.shape[2], key.shape[2])
    found, log_sum_exp = attend(query, key, value, mask, added, scale, _has_flash(query.device))
    return output_like(query, value).copy_(found), log_sum_exp


@dropped_on_reset
@functools.lru_cache(maxsize=256)
def _compiled(*kind: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiled functions per kind of call: Dynamo counts compiles by function, and gives up beyond a few.

    Two, since FlexAttention reads the mask's tables from memory.
    """
    return compat.compiled_apart(_mask), compat.compiled_apart(_attend)


def _mask(query_bounds: Tensor, ranges: Tensor, query_length: int, key_length: int) -> tuple[Tensor, ...]:
    cells = attended_cells(query_bounds, ranges, query_length, key_length)
    some, full = tiles(*cells)
    return (*cells, *_lists(some), *_lists(full))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: tuple[Tensor, ...], added: Tensor | None, scale: float | None, flash: bool,
    return_lse: bool = True,
) -> Any:  # fmt: skip
    block_of_row, cell_of_key, attends, *lists = mask

    def attended(batch: Tensor, head: Tensor, row: Tensor, key_index: Tensor) -> Tensor:
        return attends[block_of_row[row], cell_of_key[key_index]]

    def score(found: Tensor, batch: Tensor, head: Tensor, row: Tensor, key_index: Tensor) -> Tensor:
        assert added is not None
        return found + added[batch if added.shape[0] > 1 else 0, head if added.shape[1] > 1 else 0, 0, key_index]

    block_mask = _flex.BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=_BLOCK, mask_mod=attended, seq_lengths=(query.shape[2], key.shape[2]), compute_q_blocks=False
    )
    return _flex.flex_attention(
        query, key, value, None if added is None else score, block_mask, default_scale(query.shape[-1], scale),
        enable_gqa=query.shape[1] != key.shape[1], return_lse=return_lse, kernel_options={"BACKEND": "FLASH"} if flash else None,
    )  # fmt: skip


def attended_cells(query_bounds: Tensor, ranges: Tensor, query_length: int, key_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The query block of each row, the cell of each key, and which block attends which cell, bool ``[query_blocks, cells]``.

    Cells are what the ends of all ``ranges`` ``[query_blocks, ranges, 2]`` cut the keys into; as many as there are ends, so that no
    size depends on values.
    """
    rows, keys = (torch.arange(n, device=ranges.device) for n in (query_length, key_length))
    block_of_row = torch.bucketize(rows, query_bounds[1:], right=True)
    cuts = ranges.flatten().sort().values
    cell_of_key = torch.bucketize(keys, cuts, right=True)
    begins = torch.nn.functional.pad(cuts, (1, 0))
    attends = ((ranges[:, :, :1] <= begins) & (begins < ranges[:, :, 1:])).any(1)
    return block_of_row, cell_of_key, attends


def tiles(block_of_row: Tensor, cell_of_key: Tensor, attends: Tensor) -> tuple[Tensor, Tensor]:
    """Which tiles of 128 rows and 128 keys are attended in part and which in full, bool ``[row tiles, key tiles]``.

    A tile's rows lie in a run of query blocks and its keys in a run of cells, so that sums up to the ends of the runs tell.
    """
    blocks, of_block = _runs(block_of_row, attends.shape[0])
    counted = of_block(attends & blocks[:, None], 0)  # [row tiles, cells]: how many of a tile's query blocks attend
    cells, of_cell = _runs(cell_of_key, attends.shape[1])
    some = of_cell((counted > 0) & cells, 1) > 0
    everyone = counted == of_block(blocks[:, None], 0)
    full = of_cell(everyone & cells, 1) == of_cell(cells[None], 1)
    return some & ~full, full


def _runs(positions: Tensor, count: int) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
    """Which of ``count`` occur in sorted ``positions``, and what sums an axis of that size over those of each tile of 128."""
    first, last = positions[::_BLOCK], torch.cat([positions[_BLOCK - 1 :: _BLOCK], positions[-1:]])[: -(-len(positions) // _BLOCK)]
    numbers = torch.arange(count, device=positions.device)
    occurs = torch.searchsorted(positions, numbers) < torch.searchsorted(positions, numbers, right=True)

    def summed(mask: Tensor, axis: int) -> Tensor:
        nothing = torch.zeros_like(mask.narrow(axis, 0, 1), dtype=torch.int32)
        upto = torch.cat([nothing, mask.cumsum(axis, dtype=torch.int32)], axis)
        return upto.index_select(axis, last + 1) - upto.index_select(axis, first)

    return occurs, summed


def _lists(tile_mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each row tile has, and which, these first, as ``BlockMask`` has them: with axes for batch and heads."""
    order = torch.argsort(tile_mask.int(), dim=-1, descending=True, stable=True)
    return tile_mask.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


@dropped_on_reset
@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Whether FlexAttention can use FlashAttention 4: the part is one that it knows, its package is installed, and it runs."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_properties(device).major not in (9, 10):
        return False
    try:
        importlib.import_module("flash_attn.cute")
        query = torch.zeros(1, 1, 2 * _BLOCK, 64, dtype=torch.bfloat16, device=device)
        bounds, ranges = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([0, 2 * _BLOCK], [[[0, _BLOCK]]]))
        mask_of, attend = _compiled("FlashAttention 4", device)  # uncompiled, FlexAttention takes no heed of the backend
        attend(query, query, query, mask_of(bounds, ranges, 2 * _BLOCK, 2 * _BLOCK), None, None, True)
    except Exception as error:  # not installed, or for another CUDA, or a kernel that it does not have: the Triton kernel serves
        log.info("FlexAttention without FlashAttention 4 on %s: %s", device, error)
        return False
    return True


def _unavailable(device: torch.device) -> str | None:
    return "triton is not installed" if importlib.util.find_spec("triton") is None else why_no_gpu(device)


def _refuses(call: AttentionCall) -> str | None:
    if call.dtype not in _DTYPES:
        return f"FlexAttention does not take {call.dtype}"
    if call.head_dim != call.value_dim:
        return f"it was not tried with different head dims, {call.head_dim} and {call.value_dim}"
    if call.head_dim < 16:
        return f"FlexAttention takes head dims from 16, not {call.head_dim}"
    return None


LOWERING = Lowering(
    "flex",
    "FlexAttention with a block mask computed on the device",
    priority=50,
    body=attention_flex,
    operator=define_attention_op("attention_flex", attention_flex),
    unavailable=_unavailable,
    refuses=_refuses,
    rates={"cuda:80": 0.70, "cuda:90": 0.55, "cuda:100": 0.45, "cuda:120": 0.60, "hip": 0.60},
)
