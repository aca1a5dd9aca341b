"""Lowering ``cpu_dynamic``: the C++ kernel of lowering ``cpu`` over blocks that are chosen in the call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lvsa_compile.lowering.cpu import LOWERING as OF_RANGES
from lvsa_compile.lowering.cpu import Blocks, run_kernel
from lvsa_compile.ops.attention import default_scale, define_stateful_op
from lvsa_compile.ops.block_attention import shared_by_heads
from lvsa_compile.ops.dynamic_attention import ARGUMENTS, Memory, means_of, tokens_of_video
from lvsa_compile.policies.block_choice import ESTIMATES, packed
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
    choice: str,
    numbers: Sequence[float],
    query_block: int,
    key_block: int,
    most_drift: float,
    layer_gate: Sequence[float],
    relative: bool,
    video: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Computes ``lvsa::dynamic_attention`` (see ``ops.dynamic_attention`` for shapes and meaning) on the CPU, where asking is free.

    Heads that keep their blocks do not choose.

    Raises:
        MemoryError: there is no room for packed keys and values.
    """
    row, (query_first, key_first, tokens), blocks = int(phase), video, Blocks(0, 0, 0, 0, 0)
    if row == 0:
        of_video, size = tokens_of_video(query, key, video), default_scale(query.shape[3], scale)

        def chosen(queries: Tensor, keys: Tensor) -> Tensor:
            return packed(ESTIMATES[choice](queries, keys, numbers, query_block=query_block, key_block=key_block, scale=size))

        if len(state) == 1:
            kept = chosen(*of_video)
        else:
            memory = Memory(*(each[int(branch)] for each in state))
            means = means_of(*of_video)
            again = memory.again(means, most_drift, layer_gate, relative)
            for sample, heads in enumerate(again):
                which = heads.nonzero().flatten()
                if len(which):
                    memory.kept[sample, which] = chosen(*(each[sample : sample + 1, which] for each in of_video))[0]
                    memory.means[sample][:, which] = means[sample][:, which]
            memory.holds.fill_(1)
            kept = memory.kept
        blocks = Blocks(query_block, key_block, query_first, key_first, tokens, kept=kept.contiguous())
    return run_kernel(query, key, value, query_bounds, shared_by_heads(key_ranges)[row], scale, key_mask, blocks)


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
