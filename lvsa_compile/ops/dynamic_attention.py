"""The op ``lvsa::dynamic_attention``: attention over blocks of the video that are chosen in the call, from its queries and keys.

With state, heads keep the blocks of an earlier call until the means of their queries and keys drifted (HASTE, arXiv 2605.14513).  Then
blocks may be chosen by their mass, too: a head that chooses anew attends everything, and keeps what has most of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvsa_compile.ops.attention import accumulation_dtype, default_scale, define_stateful_op, output_like, weights_of
from lvsa_compile.ops.block_attention import add_mass, block_numbers, chosen, scores_in_blocks, shared_by_heads
from lvsa_compile.policies.block_choice import CHOICES, ESTIMATES, packed, unpacked
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
    **choosing: Any,
) -> tuple[Tensor, Tensor]:
    """The meaning of the op, without a question to the host: every step computes all scores.

    In row 0 of the table the chosen blocks are attended, in others everything is.  Tokens beside the video attend and are attended by all.

    Args:
        query, key, value, query_bounds, key_ranges, phase, scale, key_mask: as of ``lvsa::attention``; heads share their ranges.
        branch: int32 scalar, the entry of the state.
        state: int32 ``[entries, B or 1]``, whether blocks are kept; and, where heads keep them, uint8 ``[entries, B, heads, query blocks,
            bytes]``, a bit for each key block, and float32 ``[entries, B, 2, heads, head_dim]``, the means of queries and keys when they
            were chosen.
        choosing: see ``ARGUMENTS``.

    Returns:
        Output and log-sum-exp, as of ``lvsa::attention``.
    """
    ranges, row, given = shared_by_heads(key_ranges), phase.to(query.device), Choosing(**choosing)
    _, key_first, tokens = given.video
    now = begin(query, key, key_mask, row, branch, state, scale, given)
    attended = unpacked(now.bits, -(-tokens // given.key_block)) | (row > 0)
    value_a = value.to(accumulation_dtype(query.dtype)).repeat_interleave(query.shape[1] // key.shape[1], 1)
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=value_a.dtype, device=query.device)
    mass = torch.zeros(attended.shape, dtype=value_a.dtype, device=query.device) if given.by_mass else None
    of_key = block_numbers(key.shape[2], key_first, tokens, given.key_block, query.device)
    of_blocks = (query, key, query_bounds, ranges, row, attended, given.query_block, given.key_block, given.video)
    for part, rows, scores in scores_in_blocks(*of_blocks, scale=scale, key_mask=key_mask):
        weights, log_sum_exp[:, :, part] = weights_of(scores)
        output[:, :, part] = (weights @ value_a).to(query.dtype)
        if mass is not None:
            add_mass(mass, weights, rows, of_key)
    finish(now, row, branch, state, given, mass)
    return output, log_sum_exp


@dataclass(frozen=True)
class Choosing:
    """The op's own arguments: see ``ARGUMENTS``."""

    choice: str
    numbers: Sequence[float]
    query_block: int
    key_block: int
    most_drift: float
    layer_gate: Sequence[float]
    relative: bool
    video: Sequence[int]

    @property
    def by_mass(self) -> bool:
        """Whether blocks are chosen by their mass, which is known once everything was attended."""
        return self.choice in CHOICES

    def of_video(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys of the video, ``[B, heads, tokens, head_dim]`` both; which keys a mask leaves, ``[B, heads, tokens]``."""
        query_first, key_first, tokens = self.video
        counts = None
        if key_mask is not None:
            of_keys = key_mask.expand(query.shape[0], query.shape[1], -1, key.shape[2])[:, :, 0, key_first : key_first + tokens]
            counts = of_keys if of_keys.dtype == torch.bool else of_keys > float("-inf")
        key = key[:, :, key_first : key_first + tokens].repeat_interleave(query.shape[1] // key.shape[1], 1)
        return query[:, :, query_first : query_first + tokens], key, counts

    def chosen(self, query: Tensor, key: Tensor, counts: Tensor | None, scale: float, heads: Tensor | None = None) -> Tensor:
        """The blocks that heads of the video choose, packed, uint8 ``[B, heads, query blocks, bytes]``."""
        blocks = {"query_block": self.query_block, "key_block": self.key_block}
        return packed(ESTIMATES[self.choice](query, key, counts, self.numbers, heads, **blocks, scale=scale))

    def chosen_by_mass(self, mass: Tensor) -> Tensor:
        """The blocks that are kept by their mass ``[B, heads, query blocks, key blocks]``, packed."""
        return packed(chosen(self.choice, self.numbers[0], mass, self.query_block, self.video[2]))

    def again(self, memory: Memory, means: Tensor) -> Tensor:
        """Which heads choose anew, bool ``[B, heads]``."""
        moved = drift(means[:, 0], means[:, 1], memory.means[:, 0], memory.means[:, 1], self.relative)
        gate = (self.layer_gate[0], self.layer_gate[1]) if self.layer_gate else None
        return refresh(moved, self.most_drift, gate) | (memory.holds == 0)[:, None]


@dataclass(frozen=True)
class Memory:
    """An entry of the state: whether it ``holds`` something, int32 ``[B]``; ``kept`` blocks; the ``means`` when they were chosen."""

    holds: Tensor
    kept: Tensor
    means: Tensor


@dataclass(frozen=True)
class Now:
    """The blocks that a call attends, packed, and, where heads keep them, which heads choose anew, the means, and what was kept before."""

    bits: Tensor
    again: Tensor | None = None
    means: Tensor | None = None
    memory: Memory | None = None


def begin(
    query: Tensor, key: Tensor, key_mask: Tensor | None, row: Tensor, branch: Tensor, state: Sequence[Tensor], scale: float | None,
    given: Choosing,
) -> Now:  # fmt: skip
    """What a call attends, all on the device.

    Every head estimates, also those that keep their blocks: leaving them out would ask the host.
    """
    of_video = given.of_video(query, key, key_mask)
    size = default_scale(query.shape[3], scale)
    if len(state) == 1:
        return Now(given.chosen(*of_video, size))
    entry = branch.reshape(1).long()
    memory = Memory(*(each.index_select(0, entry)[0] for each in state))
    means = means_of(*of_video)
    again = given.again(memory, means) & (row == 0)
    found = torch.full_like(memory.kept, 255) if given.by_mass else given.chosen(*of_video, size)
    return Now(torch.where(again[..., None, None], found, memory.kept), again, means, memory)


def finish(now: Now, row: Tensor, branch: Tensor, state: Sequence[Tensor], given: Choosing, mass: Tensor | None) -> None:
    """Brings the state forward; ``mass`` is None where blocks are not chosen by it."""
    if now.again is None or now.means is None or now.memory is None:
        return
    kept = now.bits
    if mass is not None:
        kept = torch.where(now.again[..., None, None], given.chosen_by_mass(mass), now.memory.kept)
    anchors = torch.where(now.again[:, None, :, None], now.means, now.memory.means)
    for each, value in zip(state, (now.memory.holds | (row == 0), kept, anchors), strict=True):
        each.index_copy_(0, branch.reshape(1).long(), value[None].to(each.dtype))


def means_of(query: Tensor, key: Tensor, counts: Tensor | None) -> Tensor:
    """The means of the video's queries and keys over the tokens that a mask leaves, float32 ``[B, 2, heads, head_dim]``."""
    if counts is None:
        return torch.stack([each.float().mean(2) for each in (query, key)], 1)
    share = counts.float() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.stack([(each.float() * share[..., None]).sum(2) for each in (query, key)], 1)


DYNAMIC_ATTENTION = define_stateful_op("dynamic_attention", dynamic_attention, ARGUMENTS)
