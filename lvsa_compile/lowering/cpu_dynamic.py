"""Lowering ``cpu_dynamic``: the C++ kernel of lowering ``cpu`` over blocks that are chosen in the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvsa_compile.lowering.cpu import LOWERING as OF_RANGES
from lvsa_compile.lowering.cpu import Blocks, run_kernel
from lvsa_compile.ops.attention import default_scale, define_stateful_op
from lvsa_compile.ops.block_attention import shared_by_heads
from lvsa_compile.ops.dynamic_attention import ARGUMENTS, Choosing, Memory, means_of
from lvsa_compile.selection.contract import Lowering


def dynamic_attention_cpu(
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
    **choosing: Any,
) -> tuple[Tensor, Tensor]:
    """Computes ``lvsa::dynamic_attention`` (see ``ops.dynamic_attention`` for shapes and meaning) on the CPU, where asking is free.

    Heads that keep their blocks do not choose.

    Raises:
        MemoryError: there is no room for packed keys and values.
    """
    row, given, blocks = int(phase), Choosing(**choosing), Blocks(0, 0, 0, 0, 0)
    memory, again, mass = None, None, None
    if row == 0:
        of_video, size = given.of_video(query, key, key_mask), default_scale(query.shape[3], scale)
        if len(state) == 1:
            kept = given.chosen(*of_video, size)
        else:
            memory = Memory(*(each[int(branch)] for each in state))
            means = means_of(*of_video)
            again = given.again(memory, means)
            kept = memory.kept.masked_fill(again[..., None, None], 255) if given.by_mass else memory.kept
            for sample, anew in enumerate(again):
                heads = anew.nonzero().flatten()
                memory.means[sample][:, heads] = means[sample][:, heads]
                if len(heads) and not given.by_mass:
                    queries, keys, counts = of_video
                    some = counts if counts is None else counts[sample : sample + 1, heads]
                    kept[sample, heads] = given.chosen(
                        queries[sample : sample + 1, heads], keys[sample : sample + 1, heads], some, size, heads
                    )[0]
            memory.holds.fill_(1)
            if given.by_mass and bool(again.any()):
                mass = torch.zeros(*kept.shape[:3], -(-given.video[2] // given.key_block), dtype=torch.float32)
        query_first, key_first, tokens = given.video
        blocks = Blocks(given.query_block, given.key_block, query_first, key_first, tokens, kept=kept.contiguous(), mass=mass)
    found = run_kernel(query, key, value, query_bounds, shared_by_heads(key_ranges)[row], scale, key_mask, blocks)
    if memory is not None and again is not None and mass is not None:
        memory.kept[again] = given.chosen_by_mass(mass)[again]
    return found


LOWERING = Lowering(
    "cpu_dynamic",
    "the C++ kernel of lowering cpu over blocks that each call chooses",
    priority=12,
    op="dynamic_attention",
    body=dynamic_attention_cpu,
    operator=define_stateful_op("dynamic_attention_cpu", dynamic_attention_cpu, ARGUMENTS),
    unavailable=OF_RANGES.unavailable,
    refuses=OF_RANGES.refuses,
    speedup=OF_RANGES.speedup,
)
