"""The op ``lvsa::block_attention``: attention over blocks of the video that a search chose at an earlier denoising step.

Blocks of ``query_block`` and ``key_block`` tokens begin with the video; other tokens are attended by all and attend all.  A step does one
of three things, as the row of the table says on the device: everything is attended (dense); everything is attended and blocks are chosen
by their mass (a search); the chosen blocks are attended.  The table of key ranges holds in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvsa_compile.errors import ShapeError
from lvsa_compile.ops.attention import accumulation_dtype, define_stateful_op, output_like, scores_of, weights_of
from lvsa_compile.policies.block_choice import CHOICES, packed, unpacked

ARGUMENTS = "str choice, float share, int query_block, int key_block, int searches, SymInt[] video"
"""How blocks are chosen, by name, and a number for it; tokens of a block; how many rows of the table, from the first on, are those of
searches; first token of the video in the query and in the key sequence, and its tokens."""


def block_attention(
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
    share: float,
    query_block: int,
    key_block: int,
    searches: int,
    video: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The meaning of the op, without a question to the host: every step computes all scores and their mass.

    Row ``n`` of the table, below ``searches``, is that of steps from search ``n`` on: the first of them that runs does the search.  In
    other rows everything is attended.

    Args:
        query, key, value, query_bounds, key_ranges, phase, scale, key_mask: as of ``lvsa::attention``; heads share their ranges.
        branch: int32 scalar, the entry of the state.
        state: int32 ``[entries, B, 2]``, how many searches were done and whether a log-sum-exp is stored, alike for all samples; uint8
            ``[entries, B, heads, query blocks, bytes]``, a bit for each key block that is kept; and, for a policy whose searches weigh by
            the log-sum-exp of the step before, float32 ``[entries, B, heads, tokens]``.
        choice, share, query_block, key_block, searches, video: see ``ARGUMENTS``.

    Returns:
        Output and log-sum-exp, as of ``lvsa::attention``.
    """
    ranges = shared_by_heads(key_ranges)
    now = moment_of(phase, branch, state, searches, query.device)
    query_first, key_first, tokens = video
    columns = -(-tokens // key_block)
    of_key = block_numbers(key.shape[2], key_first, tokens, key_block, query.device)
    attended = unpacked(now.kept, columns) | now.dense | now.searching

    value_a = value.to(accumulation_dtype(query.dtype)).repeat_interleave(query.shape[1] // key.shape[1], 1)
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=value_a.dtype, device=query.device)
    mass = torch.zeros(attended.shape, dtype=value_a.dtype, device=query.device)
    given = (query, key, query_bounds, ranges, now.row, attended, query_block, key_block, video)
    for part, rows, scores in scores_in_blocks(*given, scale=scale, key_mask=key_mask):
        weights, own = weights_of(scores)
        log_sum_exp[:, :, part] = own
        output[:, :, part] = (weights @ value_a).to(query.dtype)
        if now.stored is not None:
            places = (torch.arange(part.start, part.start + len(rows), device=query.device) - query_first).clamp(0, tokens - 1)
            weighed_by = torch.where(now.is_stored, now.stored[:, :, places].to(own.dtype), own)
            weights = (scores - weighed_by[..., None]).exp().masked_fill(own[..., None] == float("-inf"), 0)
        add_mass(mass, weights, rows, of_key)

    found = chosen(choice, share, mass, query_block, tokens)
    keep(now, state, found, log_sum_exp[:, :, query_first : query_first + tokens])
    return output, log_sum_exp


def scores_in_blocks(
    query: Tensor,
    key: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    row: Tensor,
    attended: Tensor,
    query_block: int,
    key_block: int,
    video: Sequence[int],
    *,
    scale: float | None,
    key_mask: Tensor | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """As ``scores_of``, minus infinity also in blocks of the video that are not attended.

    ``attended`` is bool ``[B, heads, query blocks, key blocks]``.  With the rows of each part comes the block of each, -1 beside the video.
    """
    query_first, key_first, tokens = video
    of_query = block_numbers(query.shape[2], query_first, tokens, query_block, query.device)
    of_key = block_numbers(key.shape[2], key_first, tokens, key_block, query.device)
    for part, scores in scores_of(query, key, query_bounds, key_ranges, row, scale=scale, key_mask=key_mask):
        rows = of_query[part]
        left_out = ~attended[:, :, rows.clamp(min=0)][..., of_key.clamp(min=0)] & (rows >= 0)[:, None] & (of_key >= 0)
        yield part, rows, scores.masked_fill(left_out, float("-inf"))


@dataclass(frozen=True)
class Moment:
    """What one call finds in its entry of the state, and what its row of the table says, all on the device.

    ``dense`` and ``searching`` are bool scalars; both attend everything.  ``kept`` are the packed blocks of the search before, ``stored``
    the log-sum-exp of the step before, float32 ``[B, heads, tokens]``, which counts where ``is_stored``.
    """

    entry: Tensor
    row: Tensor
    done: Tensor
    dense: Tensor
    searching: Tensor
    kept: Tensor
    stored: Tensor | None
    is_stored: Tensor


def moment_of(phase: Tensor, branch: Tensor, state: Sequence[Tensor], searches: int, device: torch.device) -> Moment:
    """Reads the state for the row ``phase`` and the entry ``branch``; asks nothing of the host."""
    known, kept, *stored = state
    entry, row = branch.reshape(1).long(), phase.to(device)
    done, is_stored = known.index_select(0, entry)[0, 0].unbind()
    dense = row >= searches
    last = stored[0].index_select(0, entry)[0] if stored else None
    return Moment(entry, row, done, dense, ~dense & (done <= row), kept.index_select(0, entry)[0], last, is_stored > 0)


def keep(now: Moment, state: Sequence[Tensor], found: Tensor, log_sum_exp: Tensor) -> None:
    """Writes the state: the blocks that a search ``found``, and the log-sum-exp ``[B, heads, tokens]`` where everything was attended."""
    known, kept, *stored = state
    kept.index_copy_(0, now.entry, torch.where(now.searching, packed(found), now.kept)[None])
    everything = now.dense | now.searching
    for each in stored:
        assert now.stored is not None
        each.index_copy_(0, now.entry, torch.where(everything, log_sum_exp.to(each.dtype), now.stored)[None])
    told = torch.stack([torch.where(now.searching, now.row + 1, now.done), everything | now.is_stored])
    known.index_copy_(0, now.entry, told.to(known.dtype).expand(1, *known.shape[1:]))


def add_mass(mass: Tensor, weights: Tensor, rows: Tensor, of_key: Tensor) -> None:
    """Adds the weights ``[B, heads, rows, keys]`` of some rows to a mass, by the blocks of rows and keys, -1 beside the video."""
    of_keys = weights.new_zeros(*weights.shape[:3], mass.shape[3])
    of_keys.index_add_(3, of_key.clamp(min=0), weights.masked_fill(of_key < 0, 0))
    mass.index_add_(2, rows.clamp(min=0), of_keys.masked_fill((rows < 0)[:, None], 0))


def chosen(choice: str, share: float, mass: Tensor, query_block: int, tokens: int) -> Tensor:
    """Which blocks a policy keeps by their mass ``[B, heads, query blocks, key blocks]``, where each query has a mass of 1."""
    rows = torch.full((mass.shape[2],), query_block, dtype=torch.float64, device=mass.device)
    rows[-1] = tokens - query_block * (mass.shape[2] - 1)
    return CHOICES[choice](mass, rows, share)


def block_numbers(length: int, first: int, tokens: int, block: int, device: torch.device) -> Tensor:
    """The number of the video's block that each token of a sequence is in, -1 beside the video."""
    places = torch.arange(length, device=device) - first
    return torch.where((places >= 0) & (places < tokens), places // block, -1)


def shared_by_heads(key_ranges: Tensor) -> Tensor:
    """The table ``[rows, query_blocks, ranges, 2]`` that all heads share.

    Raises:
        ShapeError: they do not share one.
    """
    if key_ranges.dim() != 5 or key_ranges.shape[1] != 1:
        remedy = "Let heads differ by the blocks that are chosen, not by the table."
        raise ShapeError("key_ranges", tuple(key_ranges.shape), "not [rows, 1, query_blocks, ranges, 2]", remedy)
    return key_ranges[:, 0]


BLOCK_ATTENTION = define_stateful_op("block_attention", block_attention, ARGUMENTS)
