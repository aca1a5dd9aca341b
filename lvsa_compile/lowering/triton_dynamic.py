"""Lowering ``triton_dynamic``: the kernel of lowering ``triton`` over blocks that are chosen in the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lvsa_compile.kernels.configurations import Configuration
from lvsa_compile.lowering.shared.triton_lists import Blocks, Schedule, make_schedule
from lvsa_compile.lowering.triton import LOWERING as OF_RANGES
from lvsa_compile.lowering.triton import chosen_tile, run_kernel
from lvsa_compile.lowering.triton_blocks import fitting, mass_of
from lvsa_compile.ops.attention import define_stateful_op, on_the_querys_device
from lvsa_compile.ops.block_attention import shared_by_heads
from lvsa_compile.ops.dynamic_attention import ARGUMENTS, Choosing, begin, finish
from lvsa_compile.selection.contract import Lowering


@on_the_querys_device
def dynamic_attention_triton(
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
    """Computes ``lvsa::dynamic_attention`` (see ``ops.dynamic_attention`` for shapes and meaning); asks nothing of the host."""
    ranges, row, given = shared_by_heads(key_ranges), phase.to(query.device), Choosing(**choosing)
    now = begin(query, key, key_mask, row, branch, state, scale, given)
    blocks = Blocks(now.bits, (row == 0).int(), given.query_block, given.key_block, *given.video)

    def schedule(tile: Configuration, mask: Tensor | None) -> Schedule:
        return make_schedule(query_bounds, ranges, phase, query.shape[2], key.shape[2], tile, mask, blocks)

    tile, described = chosen_tile(query, key, value)
    tile = fitting(tile, given.query_block)
    output, log_sum_exp = run_kernel(query, key, value, query_bounds, schedule, tile, described, scale, key_mask)
    mass = None
    if given.by_mass and now.again is not None:
        first, _, tokens = given.video
        searching = dataclasses.replace(blocks, moment=2 * now.again.any().int())
        own = log_sum_exp[:, :, first : first + tokens].contiguous()
        mass = mass_of(query, key, query_bounds, ranges, phase, searching, own, scale, key_mask)
    finish(now, row, branch, state, given, mass)
    return output, log_sum_exp


LOWERING = Lowering(
    "triton_dynamic",
    "the Triton kernel of lowering triton over blocks that each call chooses",
    priority=32,
    op="dynamic_attention",
    body=dynamic_attention_triton,
    operator=define_stateful_op("dynamic_attention_triton", dynamic_attention_triton, ARGUMENTS),
    unavailable=OF_RANGES.unavailable,
    refuses=OF_RANGES.refuses,
    rates=OF_RANGES.rates,
)
