"""What the Triton kernels walk: the flat list of each tile of query rows, made on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lvsa_compile.kernels.configurations import Configuration, power_of_two

MOST_KEYS = (1 << 23) - 1
"""The place of a key and the size of an item share 32 bits."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of the video, and those that heads attend where ``moment`` is 1; where it is not they attend all of it.

    ``kept`` has a bit for each key block, uint8 ``[B, heads, query blocks, bytes]``; ``moment`` is an int32 scalar; blocks have
    ``query_block`` and ``key_block`` tokens, and begin at ``query_first`` and ``key_first`` with the video, which has ``tokens``.
    Without ``kept`` all heads share lists of the video alone, of which no item is in two key blocks.
    """

    kept: Tensor | None
    moment: Tensor
    query_block: int
    key_block: int
    query_first: int
    key_first: int
    tokens: int


@dataclass(frozen=True)
class Schedule:
    """What each tile of query rows walks, in the device's memory.

    For each sample, or for all at once: ``tiles`` int32 ``[samples, tiles, 7]``, first row, end, first query block of the table, number of
    segments, and where its segments begin, its items begin and end; ``segments`` int32 ``[samples, segments, 3 + words]``, first key, end,
    whether all or some rows attend and whether the mask is to be asked, and a bit for each query block of the tile that attends.

    For each list, of a sample or of a head of a sample: ``items`` int32 ``[lists, items]``, first key times 256 plus keys, those of a tile
    that need no test from where its items begin, and the others backwards from where they end; ``segment_of`` of the same shape, the number
    of the tile's segment of each of the others; ``listed`` int32 ``[lists, tiles, 2]``, how many of both; ``order`` int64
    ``[lists, tiles]``, the tiles with most items first.
    """

    segments: Tensor
    tiles: Tensor
    items: Tensor
    segment_of: Tensor
    listed: Tensor
    order: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As the attention kernel takes them."""
        return self.segments, self.tiles, self.items, self.segment_of, self.listed, self.order

    @property
    def words(self) -> int:
        """Words of bits of a segment."""
        return self.segments.shape[2] - 3

    def distances(self, batch: int) -> tuple[int, int, int, int, int]:
        """All segments and items of a list; from a sample's lists to the next one's, from a head's, from a sample's segments."""
        samples, lists = self.segments.shape[0], self.items.shape[0]
        heads = lists // batch if lists > samples else 0
        return self.segments.shape[1], self.items.shape[1], heads if heads else int(samples > 1), int(heads > 0), int(samples > 1)


def make_schedule(
    query_bounds: Tensor, key_ranges: Tensor, phase: Tensor, query_length: int, key_length: int, tile: Configuration,
    mask: Tensor | None = None, blocks: Blocks | None = None,
) -> Schedule:  # fmt: skip
    """The schedule of one phase of a table ``[phases, query_blocks, ranges, 2]``: two small kernels and a sort, on the device.

    Keys that ``mask``, added to the scores, leaves to no row are not walked, and it is asked only where it says anything.
    """
    _, table_blocks, ranges, _ = key_ranges.shape
    samples, block_m, block_n = 1 if mask is None else mask.shape[0], tile.block_m, tile.block_n
    given = blocks or Blocks(None, phase, block_m, block_n, query_length, 0, 0)
    first, tokens, per_block = given.query_first, given.tokens, -(-given.key_block // block_n)
    lists, heads, bytes_per_block = (samples, 1, 1) if given.kept is None else (given.kept.shape[:2].numel(), *given.kept.shape[1::2])
    rows, columns = -(-tokens // given.query_block), -(-tokens // given.key_block)
    count = -(-first // block_m) + rows * -(-given.query_block // block_m) + -(-(query_length - first - tokens) // block_m)
    blocks_per_tile = power_of_two(min(table_blocks, block_m + 3))  # a table ends in few blocks without rows: open ends that are empty now
    words = max(1, blocks_per_tile // 32)
    all_segments = 2 * ranges * (table_blocks + count) + 3 * count
    least_items = -(-key_length // block_n) + columns * per_block + 1
    all_items = least_items * count + 3 * all_segments

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=key_ranges.device)

    segments, tiles = empty(samples, all_segments, 3 + words), empty(samples, count, 7)
    items, segment_of, listed, work = empty(lists, all_items), empty(lists, all_items), empty(lists, count, 2), empty(lists, count)
    kernels().segments_kernel[(count, samples)](
        query_bounds, key_ranges, phase, phase if mask is None else _mask_zones(mask), segments, tiles,
        query_length, key_length, first, tokens, given.query_block, table_blocks, ranges, all_segments, least_items,
        BLOCK_M=block_m, BLOCKS=blocks_per_tile, RANGES=power_of_two(ranges), WORDS=words, HAS_MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    kernels().items_kernel[(count, lists)](
        segments, tiles, items, segment_of, listed, work, phase if given.kept is None else given.kept, given.moment,
        all_segments, all_items, heads, samples, first, given.key_first, tokens, given.query_block, given.key_block, rows, bytes_per_block,
        WORDS=words, BLOCK_N=block_n, HAS_BLOCKS=given.kept is not None, BY_BLOCK=blocks is not None and given.kept is None,
        PER_BLOCK=per_block, AHEAD=-(-block_n // given.key_block), num_warps=4,
    )  # fmt: skip
    return Schedule(segments, tiles, items, segment_of, listed, torch.argsort(work, descending=True, stable=True))


def _mask_zones(mask: Tensor) -> Tensor:
    """int32 ``[samples, 3]`` of a mask ``[samples, heads or 1, 1, keys]``: the first key for which it says anything, the end of those,
    and the end of the keys that count for any head.
    """
    number = torch.arange(mask.shape[3], device=mask.device)
    limit = ((mask != float("-inf")).any(1)[:, 0] * (number + 1)).amax(-1)
    says = (mask != 0).any(1)[:, 0] & (number < limit[:, None])
    first = len(number) - (says * (len(number) - number)).amax(-1)
    return torch.stack([first, (says * (number + 1)).amax(-1), limit], 1).int()


@functools.cache
def kernels() -> Any:
    """The Triton kernels, imported when first needed."""
    from lvsa_compile.kernels import triton_attention, triton_mass, triton_schedule

    return SimpleNamespace(
        **vars(triton_schedule),
        **{name: getattr(module, name) for module, name in ((triton_attention, "attention_kernel"), (triton_mass, "mass_kernel"))},
    )
