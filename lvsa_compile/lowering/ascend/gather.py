"""Lowering ``ascend_gather``: dense attention of Ascend NPUs over the keys of each latent frame, gathered for a few frames at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvsa_compile.lowering.ascend.ops import (
    around_of,
    fused_attention,
    joined,
    of_phase,
    operands,
    padded_width,
    video_of,
    why_no_npu,
    why_not_ascend,
)
from lvsa_compile.lowering.ascend.pages import FrameSlots, frame_slots
from lvsa_compile.selection.contract import AttentionCall, Lowering, Prepared

_MOST_BYTES = 2**30  # of gathered keys, and as many of values, at a time


@dataclass(frozen=True)
class GatheredAttention:
    """Computes a call from a table of slots ``[phases, frames, slots]``."""

    call: AttentionCall
    slots: FrameSlots

    __name__ = "attention_ascend_gather"  # what a graph prints it as

    @property
    def frames_at_a_time(self) -> int:
        """Frames whose keys are gathered together."""
        call = self.call
        width = padded_width(call.head_dim, call.value_dim, score_columns=True)
        keys = self.slots.slots * call.key.tokens_per_frame + call.key.prefix + call.key.suffix
        return max(1, _MOST_BYTES // (call.batch * call.key_heads * keys * width * call.dtype.itemsize))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        phase: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``ops.attention.attention``."""
        call, batch, at_a_time = self.call, query.shape[0], self.frames_at_a_time
        given = operands(query, key, value, call.dtype, scale, key_mask, self.slots.some_empty)
        own_slots = of_phase(slots, phase)
        rows = video_of(given.query, call.query)
        outputs, sums = [], []
        for first in range(0, self.slots.frames, at_a_time):
            some = own_slots[first : first + at_a_time]
            keys = self._gathered(given.key, given.nothing, some)
            values = self._gathered(given.value, torch.zeros_like(given.nothing), some)
            found, found_lse = fused_attention(rows[:, first : first + at_a_time].flatten(0, 1), keys, values, given.scale, call.key_heads)
            outputs.append(found.unflatten(0, (batch, -1)))
            sums.append(found_lse.unflatten(0, (batch, -1)))
        video = torch.cat(outputs, 1).flatten(1, 2), torch.cat(sums, 1).transpose(1, 2).flatten(2, 3)
        return joined(video, given, call)

    def _gathered(self, tensor: Tensor, nothing: Tensor, slots: Tensor) -> Tensor:
        """Keys or values of some frames ``[B * frames, slots * tokens + around, key_heads, width]``."""
        batch, count = tensor.shape[0], slots.shape[0]
        video, span = video_of(tensor, self.call.key), self.call.key
        if self.slots.some_empty:
            video = torch.cat([video, nothing.expand(batch, 1, span.tokens_per_frame, *nothing.shape)], 1)
        own = video.index_select(1, slots.flatten()).reshape(batch, count, -1, *nothing.shape)
        if around := span.prefix + span.suffix:
            beside = around_of(tensor, span)[:, None].expand(batch, count, around, *nothing.shape)
            own = torch.cat([own, beside], 2)
        return own.flatten(0, 1)


def _prepare(call: AttentionCall) -> Prepared:
    assert call.plan.frames is not None
    slots = frame_slots(call.plan.frames, call.plan.table.rows)
    return Prepared(GatheredAttention(call, slots), (slots.attended,))


LOWERING = Lowering(
    "ascend_gather",
    "torch_npu's fused attention over keys gathered for a few frames at a time",
    priority=70,
    prepare=_prepare,
    traceable=True,
    unavailable=why_no_npu,
    refuses=why_not_ascend,
    rates={"npu": 0.70},
)
