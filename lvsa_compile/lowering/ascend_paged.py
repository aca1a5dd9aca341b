"""Lowering ``ascend_paged``: paged attention of Ascend NPUs, a latent frame being a sequence, its anchors and window the pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvsa_compile.lowering.ascend_ops import fused_attention, joined, of_phase, operands, split, why_no_npu, why_not_ascend
from lvsa_compile.lowering.contract import AttentionCall, Lowering, Prepared
from lvsa_compile.lowering.rates import by_rate
from lvsa_compile.sparsity.frame_slots import PAGE, PageLayout, frame_slots
from lvsa_compile.sparsity.key_ranges import KeyRangeTable


@dataclass(frozen=True)
class PagedAttention:
    """Computes a call from tables of slots ``[phases, frames, slots]`` and of pages ``[phases, B * frames, pages]``."""

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
        """As ``attention_op.attention``."""
        call, batch = self.call, query.shape[0]
        given = operands(query, key, value, call.dtype, scale, key_mask, self.layout.slots.some_empty)
        own_slots = of_phase(slots, phase).flatten()
        keys = self._paged(given.key, given.nothing, own_slots)
        values = self._paged(given.value, torch.zeros_like(given.nothing), own_slots)
        rows, _ = split(given.query, call.query)
        output, log_sum_exp = fused_attention(
            rows.flatten(0, 1), keys, values, given.scale, call.key_heads, of_phase(pages, phase), self.layout.keys
        )
        video = output.unflatten(0, (batch, -1)).flatten(1, 2), log_sum_exp.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
        return joined(video, given, call.query, call.key_heads, call.value_dim)

    def _paged(self, tensor: Tensor, nothing: Tensor, slots: Tensor) -> Tensor:
        """Keys or values ``[B, Sk, key_heads, width]`` as pages ``[B * pages, PAGE, key_heads * width]``."""
        layout, batch = self.layout, tensor.shape[0]
        frames, most = layout.slots.frames, layout.slots.slots
        video, around = (part.flatten(-2) for part in split(tensor, self.call.key))
        columns = video.shape[-1]
        nobody = nothing.flatten().expand(batch, 1, PAGE, columns)
        whole, text = layout.full * PAGE, layout.around_full * PAGE
        parts = [video[:, :, :whole].reshape(batch, -1, PAGE, columns), around[:, :text].reshape(batch, -1, PAGE, columns)]
        if layout.slots.some_empty:
            parts.append(nobody)
        if layout.tail:
            rest = video[:, :, whole:]
            if layout.slots.some_empty:
                rest = torch.cat([rest, nobody[:, :, : rest.shape[2]]], 1)
            packed = rest.index_select(1, slots).reshape(batch, frames, most * rest.shape[2], columns)
            packed = torch.cat([packed, around[:, None, text:].expand(batch, frames, -1, columns)], 2)
            packed = torch.nn.functional.pad(packed, (0, 0, 0, layout.tail * PAGE - layout.tail_tokens))
            parts.append(packed.reshape(batch, -1, PAGE, columns))
        return torch.cat(parts, 1).flatten(0, 1)


def _prepare(call: AttentionCall, table: KeyRangeTable) -> Prepared:
    slots = frame_slots(call.pattern, table.phases)
    layout = PageLayout(slots, call.key.tokens_per_frame, call.key.prefix + call.key.suffix)
    return Prepared(PagedAttention(call, layout), (slots.attended, layout.table(call.batch)))


LOWERING = Lowering(
    "ascend_paged",
    "torch_npu's fused attention over pages of keys: no frame is copied for each that attends it",
    priority=60,
    prepare=_prepare,
    unavailable=why_no_npu,
    refuses=why_not_ascend,
    speedup=by_rate("ascend_paged"),
)
