"""Lowering ``ascend_paged``: paged attention of Ascend NPUs, a latent frame being a sequence, its anchors and window the pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvsa_compile.lowering.ascend.ops import around_of, fused_attention, joined, of_phase, operands, video_of, why_no_npu, why_not_ascend
from lvsa_compile.lowering.ascend.pages import PAGE, PageLayout, frame_slots
from lvsa_compile.selection.contract import AttentionCall, Lowering, Prepared


@dataclass(frozen=True)
class PagedAttention:
    """Computes a call from tables of slots ``[phases, frames, slots]`` and of pages ``[phases, frames, pages]``."""

    call: AttentionCall
    layout: PageLayout

    __name__ = "attention_ascend_paged"  # what a graph prints it as

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        pages: Tensor,
        phase: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``ops.attention.attention``."""
        call, batch = self.call, query.shape[0]
        given = operands(query, key, value, call.dtype, scale, key_mask, self.layout.slots.some_empty)
        own_slots = of_phase(slots, phase).flatten()
        keys = self._paged(given.key, given.nothing, own_slots)
        values = self._paged(given.value, torch.zeros_like(given.nothing), own_slots)
        first = torch.arange(batch, dtype=pages.dtype, device=pages.device) * self.layout.pages
        own_pages = (first[:, None, None] + of_phase(pages, phase)).flatten(0, 1)
        rows = video_of(given.query, call.query).flatten(0, 1)
        output, log_sum_exp = fused_attention(rows, keys, values, given.scale, call.key_heads, own_pages, self.layout.keys)
        video = output.unflatten(0, (batch, -1)).flatten(1, 2), log_sum_exp.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
        return joined(video, given, call)

    def _paged(self, tensor: Tensor, nothing: Tensor, slots: Tensor) -> Tensor:
        """Keys or values ``[B, Sk, key_heads, width]`` as pages ``[B * pages, PAGE, key_heads * width]``."""
        layout, batch = self.layout, tensor.shape[0]
        frames, most = layout.slots.frames, layout.slots.slots
        video, around = video_of(tensor, self.call.key).flatten(-2), around_of(tensor, self.call.key).flatten(-2)
        columns = video.shape[-1]
        nobody = nothing.flatten().expand(batch, 1, PAGE, columns)
        whole, text = layout.full * PAGE, layout.around_full * PAGE
        parts = [video[:, :, :whole].reshape(batch, frames * layout.full, PAGE, columns)] if whole else []
        if text:
            parts.append(around[:, :text].reshape(batch, layout.around_full, PAGE, columns))
        if layout.slots.some_empty:
            parts.append(nobody)
        packed = []
        if remainder := layout.tokens_per_frame % PAGE:
            rest = video[:, :, whole:]
            if layout.slots.some_empty:
                rest = torch.cat([rest, nobody[:, :, :remainder]], 1)
            packed.append(rest.index_select(1, slots).reshape(batch, frames, most * remainder, columns))
        if layout.around % PAGE:
            packed.append(around[:, None, text:].expand(batch, frames, layout.around % PAGE, columns))
        if packed:
            tail = torch.nn.functional.pad(torch.cat(packed, 2), (0, 0, 0, layout.tail * PAGE - layout.tail_tokens))
            parts.append(tail.reshape(batch, frames * layout.tail, PAGE, columns))
        return torch.cat(parts, 1).flatten(0, 1)


def _prepare(call: AttentionCall) -> Prepared:
    assert call.plan.frames is not None
    slots = frame_slots(call.plan.frames, call.plan.table.rows)
    layout = PageLayout(slots, call.key.tokens_per_frame, call.key.prefix + call.key.suffix)
    return Prepared(PagedAttention(call, layout), (slots.attended, layout.table()))


LOWERING = Lowering(
    "ascend_paged",
    "torch_npu's fused attention over pages of keys: no frame is copied for each that attends it",
    priority=60,
    prepare=_prepare,
    traceable=True,
    unavailable=why_no_npu,
    refuses=why_not_ascend,
    rates={"npu": 0.80},
    smoke_test_tokens=(200, 140),  # pages that frames share, of the text, and tails
)
