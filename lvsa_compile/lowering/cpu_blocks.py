"""Lowering ``cpu_blocks``: the C++ kernel of lowering ``cpu`` over blocks that a search chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lvsa_compile.lowering.cpu import LOWERING as OF_RANGES
from lvsa_compile.lowering.cpu import Blocks, run_kernel
from lvsa_compile.ops.attention import define_stateful_op
from lvsa_compile.ops.block_attention import ARGUMENTS, chosen, shared_by_heads
from lvsa_compile.policies.block_choice import packed
from lvsa_compile.selection.contract import Lowering


def block_attention_cpu(
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
    """Computes ``lvsa::block_attention`` (see ``ops.block_attention`` for shapes and meaning) on the CPU, where reading the row is free.

    Raises:
        MemoryError: there is no room for packed keys and values.
    """
    row, entry = int(phase), int(branch)
    known, kept, *stored = (each[entry] for each in state)
    query_first, key_first, tokens = video
    dense = row >= searches
    searching = not dense and int(known[0, 0]) <= row
    blocks = Blocks(query_block, key_block, query_first, key_first, tokens)
    if searching:
        mass = torch.zeros(*kept.shape[:3], -(-tokens // key_block), dtype=torch.float32)
        blocks = dataclasses.replace(blocks, mass=mass, known=stored[0] if stored and int(known[0, 1]) else None)
    elif not dense:
        blocks = dataclasses.replace(blocks, kept=kept)
    output, log_sum_exp = run_kernel(query, key, value, query_bounds, shared_by_heads(key_ranges)[row], scale, key_mask, blocks)
    if searching:
        assert blocks.mass is not None
        kept.copy_(packed(chosen(choice, share, blocks.mass, query_block, tokens)))
        known[:, 0] = row + 1
    if stored and (dense or searching):
        stored[0].copy_(log_sum_exp[:, :, query_first : query_first + tokens])
        known[:, 1] = 1
    return output, log_sum_exp


LOWERING = Lowering(
    "cpu_blocks",
    "the C++ kernel of lowering cpu over the blocks of each head that a search chose",
    priority=11,
    op="block_attention",
    body=block_attention_cpu,
    operator=define_stateful_op("block_attention_cpu", block_attention_cpu, ARGUMENTS),
    unavailable=OF_RANGES.unavailable,
    refuses=OF_RANGES.refuses,
    speedup=OF_RANGES.speedup,
)
