"""Lowering ``triton_blocks``: the kernel of lowering ``triton`` over blocks that a search chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lvsa_compile.kernels.configurations import Configuration, column_widths, power_of_two
from lvsa_compile.lowering.shared.triton_lists import Blocks, Schedule, kernels, make_schedule
from lvsa_compile.lowering.triton import LOWERING as OF_RANGES
from lvsa_compile.lowering.triton import chosen_tile, positively_scaled, run_kernel
from lvsa_compile.ops.attention import broadcast_strides, define_stateful_op, on_the_querys_device, score_mask
from lvsa_compile.ops.block_attention import ARGUMENTS, Moment, chosen, keep, moment_of, shared_by_heads
from lvsa_compile.selection.contract import Lowering


@on_the_querys_device
def block_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    phase: Tensor,
    branch: Tensor,
    state: Sequence[Tensor],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    choice: str,
    share: float,
    query_block: int,
    key_block: int,
    searches: int,
    video: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Computes ``lvsa::block_attention`` (see ``ops.block_attention`` for shapes and meaning); asks nothing of the host.

    The kernel that sums the mass returns at once in steps that do not search; the choice, some sorting, is made in all.
    """
    ranges, (query_first, key_first, tokens) = shared_by_heads(key_ranges), video
    now = moment_of(phase, branch, state, searches, query.device)
    moment = torch.where(now.dense, 0, torch.where(now.searching, 2, 1)).int()
    blocks = Blocks(now.kept, moment, query_block, key_block, query_first, key_first, tokens)

    def schedule(tile: Configuration, mask: Tensor | None) -> Schedule:
        return make_schedule(query_bounds, ranges, phase, query.shape[2], key.shape[2], tile, mask, blocks)

    tile, described = chosen_tile(query, key, value)
    output, log_sum_exp = run_kernel(query, key, value, query_bounds, schedule, fitting(tile, query_block), described, scale, key_mask)
    own = log_sum_exp[:, :, query_first : query_first + tokens]
    mass = mass_of(query, key, query_bounds, ranges, phase, blocks, _weighed_by(now, own), scale, key_mask)
    keep(now, state, chosen(choice, share, mass, query_block, tokens), own)
    return output, log_sum_exp


def fitting(tile: Configuration, query_block: int) -> Configuration:
    """A configuration whose tiles have no more rows than a query block, and a warp for 16 of them."""
    rows = max(16, min(tile.block_m, power_of_two(query_block + 1) // 2))
    return dataclasses.replace(tile, block_m=rows, warps=min(tile.warps, max(4, rows // 16)))


def _weighed_by(now: Moment, own: Tensor) -> Tensor:
    """The log-sum-exp that weighs the mass: that of the step before where it is stored; rows that attend nothing have none."""
    if now.stored is None:
        return own.contiguous()
    return torch.where(now.is_stored & (own > float("-inf")), now.stored, own)


def mass_of(
    query: Tensor, key: Tensor, query_bounds: Tensor, ranges: Tensor, phase: Tensor, blocks: Blocks, log_sum_exp: Tensor,
    scale: float | None, key_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """The mass of the video's blocks, float32 ``[B, heads, query blocks, key blocks]``; zeros where the step does not search."""
    batch, heads, _, head_dim = query.shape
    rows, columns = -(-blocks.tokens // blocks.query_block), -(-blocks.tokens // blocks.key_block)
    mass = torch.zeros(batch, heads, rows, columns, device=query.device)
    if not mass.numel():
        return mass
    query, factor = positively_scaled(query, scale)
    mask = None if key_mask is None else score_mask(key_mask, key.shape[2])
    widths = column_widths(head_dim)
    rows, keys = (max(16, power_of_two(size)) for size in (blocks.query_block, blocks.key_block))
    tile = Configuration(rows, min(keys, 64), 8 if rows > 64 else 4, 2)
    shared = dataclasses.replace(blocks, kept=None)
    lists = make_schedule(query_bounds, ranges, phase, query.shape[2], key.shape[2], tile, mask, shared)
    all_segments, all_items, per_sample, *_ = lists.distances(batch)
    kernels().mass_kernel[(lists.tiles.shape[1], batch * heads)](
        query, key, query if mask is None else mask, query_bounds, *lists.tensors[:-1], blocks.moment, log_sum_exp, mass,
        *query.stride(), *key.stride(), *broadcast_strides(mask), heads, heads // key.shape[1], ranges.shape[1], all_segments, all_items,
        per_sample, blocks.query_first, blocks.key_first, blocks.tokens, blocks.query_block, blocks.key_block, factor,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HEAD_DIM=head_dim, WIDTH_0=widths[0], WIDTH_1=widths[1], WORDS=lists.words,
        HAS_MASK=mask is not None, STRADDLES=query_bounds.shape[0] > 2, PRECISION="ieee",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return mass


LOWERING = Lowering(
    "triton_blocks",
    "the Triton kernel of lowering triton over the blocks of each head that a search chose",
    priority=31,
    op="block_attention",
    body=block_attention_triton,
    operator=define_stateful_op("block_attention_triton", block_attention_triton, ARGUMENTS),
    unavailable=OF_RANGES.unavailable,
    refuses=OF_RANGES.refuses,
    rates=OF_RANGES.rates,
)
