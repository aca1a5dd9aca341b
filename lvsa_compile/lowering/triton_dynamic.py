"""Lowering ``triton_dynamic``: the kernel of lowering ``triton`` over blocks that are chosen in the call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lvsa_compile.kernels.configurations import Configuration
from lvsa_compile.lowering.shared.triton_lists import Blocks, Schedule, make_schedule
from lvsa_compile.lowering.triton import LOWERING as OF_RANGES
from lvsa_compile.lowering.triton import chosen_tile, run_kernel
from lvsa_compile.lowering.triton_blocks import fitting
from lvsa_compile.ops.attention import define_stateful_op, on_the_querys_device
from lvsa_compile.ops.block_attention import shared_by_heads
from lvsa_compile.ops.dynamic_attention import ARGUMENTS, kept_now
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
    choice: str,
    numbers: Sequence[float],
    query_block: int,
    key_block: int,
    most_drift: float,
    layer_gate: Sequence[float],
    relative: bool,
    video: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Computes ``lvsa::dynamic_attention`` (see ``ops.dynamic_attention`` for shapes and meaning); asks nothing of the host."""
    ranges, row, (query_first, key_first, tokens) = shared_by_heads(key_ranges), phase.to(query.device), video
    kept = kept_now(
        query, key, row, branch, state, scale=scale, choice=choice, numbers=numbers, query_block=query_block, key_block=key_block,
        most_drift=most_drift, layer_gate=layer_gate, relative=relative, video=video,
    )  # fmt: skip
    blocks = Blocks(kept, (row == 0).int(), query_block, key_block, query_first, key_first, tokens)

    def schedule(tile: Configuration, mask: Tensor | None) -> Schedule:
        return make_schedule(query_bounds, ranges, phase, query.shape[2], key.shape[2], tile, mask, blocks)

    tile, described = chosen_tile(query, key, value)
    return run_kernel(query, key, value, query_bounds, schedule, fitting(tile, query_block), described, scale, key_mask)


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
