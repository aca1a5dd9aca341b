"""The op ``lvsa::dynamic_attention``: attention over blocks of the video that are chosen in the call, from its queries and keys.

With state, heads keep the blocks of an earlier call until the means of their queries and keys drifted (HASTE, arXiv 2605.14513).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvsa_compile.ops.attention import accumulation_dtype, default_scale, define_stateful_op, output_like, weights_of
from lvsa_compile.ops.block_attention import scores_in_blocks, shared_by_heads
from lvsa_compile.policies.block_choice import ESTIMATES, packed, unpacked
from lvsa_compile.policies.haste.refreshing import drift, refresh

ARGUMENTS = (
    "str choice, float[] numbers, int query_block, int key_block, float most_drift, float[] layer_gate, bool relative, SymInt[] video"
)
"""How blocks are chosen, by name, and the numbers of the policy; tokens of a block; up to which drift a head keeps its blocks, and the
rest of ``haste.refresh`` and ``haste.drift``; first token of the video in the query and in the key sequence, and its tokens."""


def dynamic_attention(
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
    """The meaning of the op, without a question to the host: every step computes all scores.

    In row 0 of the table the chosen blocks are attended, in others everything is.  Tokens beside the video attend and are attended by all.

    Args:
        query, key, value, query_bounds, key_ranges, phase, scale, key_mask: as of ``lvsa::attention``; heads share their ranges.
        branch: int32 scalar, the entry of the state.
        state: int32 ``[entries, B]``, whether blocks are kept; and, where heads keep them, uint8 ``[entries, B, heads, query blocks,
            bytes]``, a bit for each key block, and float32 ``[entries, B, 2, heads, head_dim]``, the means of queries and keys when they
            were chosen.
        choice, numbers, query_block, key_block, most_drift, layer_gate, relative, video: see ``ARGUMENTS``.

    Returns:
        Output and log-sum-exp, as of ``lvsa::attention``.
    """
    ranges, row = shared_by_heads(key_ranges), phase.to(query.device)
    bits = kept_now(
        query, key, row, branch, state, scale=scale, choice=choice, numbers=numbers, query_block=query_block, key_block=key_block,
        most_drift=most_drift, layer_gate=layer_gate, relative=relative, video=video,
    )  # fmt: skip
    attended = unpacked(bits, -(-video[2] // key_block)) | (row > 0)
    value_a = value.to(accumulation_dtype(query.dtype)).repeat_interleave(query.shape[1] // key.shape[1], 1)
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=value_a.dtype, device=query.device)
    given = (query, key, query_bounds, ranges, row, attended, query_block, key_block, video)
    for part, _, scores in scores_in_blocks(*given, scale=scale, key_mask=key_mask):
        weights, log_sum_exp[:, :, part] = weights_of(scores)
        output[:, :, part] = (weights @ value_a).to(query.dtype)
    return output, log_sum_exp


def kept_now(
    query: Tensor,
    key: Tensor,
    row: Tensor,
    branch: Tensor,
    state: Sequence[Tensor],
    *,
    scale: float | None,
    choice: str,
    numbers: Sequence[float],
    query_block: int,
    key_block: int,
    most_drift: float,
    layer_gate: Sequence[float],
    relative: bool,
    video: Sequence[int],
) -> Tensor:
    """The blocks that are kept in this call, packed, uint8 ``[B, heads, query blocks, bytes]``; the state is brought forward.

    Every head chooses, also those that keep their blocks: leaving them out would ask the host.
    """
    of_video = tokens_of_video(query, key, video)
    size = default_scale(query.shape[3], scale)
    found = packed(ESTIMATES[choice](*of_video, numbers, query_block=query_block, key_block=key_block, scale=size))
    if len(state) == 1:
        return found
    entry = branch.reshape(1).long()
    memory = Memory(*(each.index_select(0, entry)[0] for each in state))
    means = means_of(*of_video)
    again = memory.again(means, most_drift, layer_gate, relative) & (row == 0)
    kept = torch.where(again[..., None, None], found, memory.kept)
    anchors = torch.where(again[:, None, :, None], means, memory.means)
    for each, value in zip(state, (memory.holds | (row == 0), kept, anchors), strict=True):
        each.index_copy_(0, entry, value[None].to(each.dtype))
    return kept


@dataclass(frozen=True)
class Memory:
    """An entry of the state: whether it ``holds`` something, int32 ``[B]``; ``kept`` blocks; the ``means`` when they were chosen."""

    holds: Tensor
    kept: Tensor
    means: Tensor

    def again(self, means: Tensor, most_drift: float, layer_gate: Sequence[float], relative: bool) -> Tensor:
        """Which heads choose anew, bool ``[B, heads]``."""
        moved = drift(means[:, 0], means[:, 1], self.means[:, 0], self.means[:, 1], relative)
        gate = (layer_gate[0], layer_gate[1]) if layer_gate else None
        return refresh(moved, most_drift, gate) | (self.holds == 0)[:, None]


def tokens_of_video(query: Tensor, key: Tensor, video: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Queries and keys of the video, ``[B, heads, tokens, head_dim]`` both."""
    query_first, key_first, tokens = video
    key = key[:, :, key_first : key_first + tokens].repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query[:, :, query_first : query_first + tokens], key


def means_of(query: Tensor, key: Tensor) -> Tensor:
    """The means of the video's queries and keys over its tokens, float32 ``[B, 2, heads, head_dim]``."""
    return torch.stack([each.float().mean(2) for each in (query, key)], 1)


DYNAMIC_ATTENTION = define_stateful_op("dynamic_attention", dynamic_attention, ARGUMENTS)
