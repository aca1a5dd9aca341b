"""Lowering ``ascend_block_sparse``: torch_npu's block-sparse attention, where latent frames are whole blocks of 128 tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvsa_compile.lowering.ascend.ops import of_phase, why_no_npu, why_not_ascend
from lvsa_compile.ops.attention import default_scale
from lvsa_compile.policies.contract import Frames
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.contract import AttentionCall, Lowering, Prepared

_BLOCK = 128
_HEAD_DIMS = (64, 128)
_MOST_MASK_BYTES = 2**28


@dataclass(frozen=True)
class BlockSparseAttention:
    """Computes a call from a table ``[phases, regions, regions]`` and the region of each block of queries and of keys.

    A region is a latent frame, or all that is before or after the video; the table says which attends which.
    """

    call: AttentionCall

    __name__ = "attention_ascend_block_sparse"  # what a graph prints it as

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attended: Tensor,
        query_regions: Tensor,
        key_regions: Tensor,
        phase: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``ops.attention.attention``; ``key_mask`` is None."""
        query, key, value = (tensor.to(self.call.dtype).contiguous() for tensor in (query, key, value))
        blocks = of_phase(attended, phase).index_select(0, query_regions).index_select(1, key_regions).to(torch.int8)
        output, log_sum_exp = torch.ops.npu.npu_block_sparse_attention(
            query, key, value, blocks.expand(*query.shape[:2], *blocks.shape).contiguous(), [_BLOCK, _BLOCK], q_input_layout="BNSD",
            kv_input_layout="BNSD", num_key_value_heads=key.shape[1], scale_value=default_scale(query.shape[3], scale), inner_precise=0,
            softmax_lse_flag=1,
        )  # fmt: skip
        return output, log_sum_exp.squeeze(3)


def _prepare(call: AttentionCall) -> Prepared:
    assert call.plan.frames is not None
    attended = [_attended(call.plan.frames, phase) for phase in range(call.plan.table.rows)]
    return Prepared(BlockSparseAttention(call), (attended, _regions(call.query), _regions(call.key)))


def _attended(pattern: Frames, phase: int) -> list[list[int]]:
    """Which region attends which: all, but frames only some frames.  Regions are what is before the video, its frames, what is after."""
    everything = [1] * (pattern.frames + 2)
    frames = []
    for frame in range(pattern.frames):
        some = set(pattern.attended(frame, phase))
        frames.append([1, *(int(other in some) for other in range(pattern.frames)), 1])
    return [everything, *frames, everything]


def _regions(span: VideoSpan) -> list[int]:
    """The region of each block of a sequence."""
    frames = [frame + 1 for frame in range(span.frames) for _ in range(span.tokens_per_frame // _BLOCK)]
    return [0] * (span.prefix // _BLOCK) + frames + [span.frames + 1] * -(-span.suffix // _BLOCK)


def _refuses(call: AttentionCall) -> str | None:
    if call.compiler not in ("", "npugraph_ex"):
        return f"{call.compiler} may have no converter for npu_block_sparse_attention"
    if (refusal := why_not_ascend(call)) is not None:
        return refusal
    if call.masked:
        return "npu_block_sparse_attention takes no key mask"
    if call.head_dim not in _HEAD_DIMS or call.value_dim != call.head_dim:
        return f"npu_block_sparse_attention takes equal head dims of 64 or 128, not {call.head_dim} and {call.value_dim}"
    for span in (call.query, call.key):
        if span.tokens_per_frame % _BLOCK or span.prefix % _BLOCK:
            return f"a latent frame has {span.tokens_per_frame} tokens after {span.prefix} others, which are not blocks of {_BLOCK}"
    blocks = -(-call.query.length // _BLOCK) * -(-call.key.length // _BLOCK)
    if call.batch * call.query_heads * blocks > _MOST_MASK_BYTES:
        return f"its mask of blocks would take {call.batch * call.query_heads * blocks / 2**20:.0f} MiB"
    return None


LOWERING = Lowering(
    "ascend_block_sparse",
    "torch_npu's block-sparse attention, where frames are whole blocks of 128 tokens",
    priority=55,
    prepare=_prepare,
    traceable=True,
    unavailable=why_no_npu,
    refuses=_refuses,
    rates={"npu": 0.85},
    smoke_test_tokens=(_BLOCK, 70),
)
