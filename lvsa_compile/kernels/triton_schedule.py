"""What each tile of query rows walks, in Triton: a phase of the table of key ranges, and the blocks that are kept, as a flat list.

``segments_kernel`` finds, for the rows of a tile, stretches of keys that the same rows attend.  ``items_kernel`` cuts them into items of up
to a key tile, those first that need no test.  All is found on the device, so that another denoising step asks nothing of the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

SOME: tl.constexpr = tl.constexpr(1)  # some rows of a tile attend the segment: the tile straddles query blocks
ALL: tl.constexpr = tl.constexpr(2)  # every row does
MASKED: tl.constexpr = tl.constexpr(4)  # added to either where the mask must be asked
HEADER: tl.constexpr = tl.constexpr(3)  # of a segment, before its words: first key, end, kind
TILE: tl.constexpr = tl.constexpr(7)  # numbers of a tile: see Schedule
LISTED: tl.constexpr = tl.constexpr(2)  # numbers of a tile's list: items that need no test, and others


@triton.jit
def _rows_of_tile(tile, query_length, query_first, tokens, query_block, BLOCK_M: tl.constexpr):
    """First row of a tile and their end: tiles do not straddle the video's ends, nor its blocks of ``query_block``."""
    before = (query_first + BLOCK_M - 1) // BLOCK_M
    per_block = (query_block + BLOCK_M - 1) // BLOCK_M
    of_video = (tokens + query_block - 1) // query_block * per_block
    block = (tile - before) // per_block
    start = query_first + block * query_block + (tile - before) % per_block * BLOCK_M
    end = query_first + tl.minimum((block + 1) * query_block, tokens)
    behind = tile >= before + of_video
    start = tl.where(behind, query_first + tokens + (tile - before - of_video) * BLOCK_M, start)
    end = tl.where(behind, query_length, end)
    start = tl.where(tile < before, tile * BLOCK_M, start)
    end = tl.where(tile < before, query_first, end)
    return start, tl.minimum(start + BLOCK_M, end)


@triton.jit
def segments_kernel(
    query_bounds, key_ranges, phase, mask_zones, segments, tiles, query_length, key_length, query_first, tokens, query_block, query_blocks,
    ranges, all_segments, least_items,
    BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, RANGES: tl.constexpr, WORDS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Segments ``[start, end, kind, words]`` of a tile of a sample, in the order of the keys: where all or some of its query blocks attend.

    Bit ``n`` of the words says whether query block ``n`` of the tile does.  ``mask_zones`` holds, per sample, from where to where the mask
    must be asked and where the keys end that count at all.  A sweep over the keys: from each place to the next at which any range of the
    tile's blocks, or the zone, begins or ends.

    A tile has room for the segments and items that its query blocks can make, behind that of the tiles before it.
    """
    tile = tl.program_id(0)
    tile_out = tl.program_id(1) * tl.num_programs(0) + tile
    first_row, end_row = _rows_of_tile(tile, query_length, query_first, tokens, query_block, BLOCK_M)
    first_block = 0
    last_block = 0
    for base in range(0, query_blocks, 128):
        block = base + tl.arange(0, 128)
        ends = tl.load(query_bounds + block + 1, mask=block < query_blocks, other=2147483647)
        first_block += tl.sum((ends <= first_row).to(tl.int32))
        last_block += tl.sum((ends < end_row).to(tl.int32))

    zone_start = key_length
    zone_end = key_length
    limit = key_length
    if HAS_MASK:
        zone_start = tl.load(mask_zones + 3 * tl.program_id(1))
        zone_end = tl.load(mask_zones + 3 * tl.program_id(1) + 1)
        limit = tl.load(mask_zones + 3 * tl.program_id(1) + 2)

    number = tl.arange(0, BLOCKS)
    block = first_block + number
    present = (block <= last_block) & (first_row < end_row)
    present &= tl.load(query_bounds + block, mask=present, other=0) < tl.load(query_bounds + block + 1, mask=present, other=0)
    offset = (tl.load(phase) * query_blocks + block)[:, None] * ranges + tl.arange(0, RANGES)[None, :]
    known = present[:, None] & (tl.arange(0, RANGES) < ranges)[None, :]
    start = tl.load(key_ranges + 2 * offset, mask=known, other=0)
    end = tl.minimum(tl.load(key_ranges + 2 * offset + 1, mask=known, other=0), limit)

    segment_start = 2 * ranges * (first_block + tile) + 3 * tile
    segments += (tl.program_id(1).to(tl.int64) * all_segments + segment_start) * (HEADER + WORDS)
    count = 0
    kind = 0  # of the segment that began at ``opened``; 0 where nobody attends
    opened = 0
    words = tl.zeros([WORDS], dtype=tl.int32)
    at = 0
    while at <= limit:
        inside = tl.max(((start <= at) & (at < end)).to(tl.int32), 1)
        anyone = tl.max(inside, 0)
        everyone = tl.min(tl.where(present, inside, 1), 0)
        masked = (zone_start <= at) & (at < zone_end) & (anyone > 0)
        now = tl.where(at < limit, anyone + anyone * everyone + tl.where(masked, MASKED, 0), 0)
        now_words = tl.sum((inside << (number % 32)).reshape([WORDS, BLOCKS // WORDS]), 1)
        another = (kind != now) | (tl.max((words != now_words).to(tl.int32), 0) > 0)
        closes = another & (kind > 0)
        to = segments + (HEADER + WORDS) * count
        tl.store(to, opened, mask=closes)
        tl.store(to + 1, at, mask=closes)
        tl.store(to + 2, kind, mask=closes)
        tl.store(to + HEADER + tl.arange(0, WORDS), words, mask=(tl.arange(0, WORDS) < WORDS) & closes)
        count += closes.to(tl.int32)
        opened = tl.where(another, at, opened)
        kind = now
        words = now_words
        next_start = tl.min(tl.min(tl.where((start > at) & (start < end), start, limit), 1), 0)
        next_end = tl.min(tl.min(tl.where(end > at, end, limit), 1), 0)
        next_zone = tl.minimum(tl.where(zone_start > at, zone_start, limit), tl.where(zone_end > at, zone_end, limit))
        at = tl.where(at < limit, tl.minimum(tl.minimum(next_start, next_end), next_zone), limit + 1)
    tiles += TILE * tile_out
    tl.store(tiles, first_row)
    tl.store(tiles + 1, end_row)
    tl.store(tiles + 2, first_block)
    tl.store(tiles + 3, count)
    item_start = tile * least_items + 3 * segment_start
    tl.store(tiles + 4, segment_start)
    tl.store(tiles + 5, item_start)
    tl.store(tiles + 6, item_start + least_items + 3 * (2 * ranges * (last_block - first_block + 1) + 3))


@triton.jit
def _put(items, segment_of, end_of_list, full, edges, place, valid, wanted, plain, s, BLOCK_N: tl.constexpr):
    """Adds an item for each of ``wanted``; those without a test from the front, others from the back."""
    untested = wanted & plain & (valid == BLOCK_N)
    tested = wanted & ~untested
    item = place * 256 + valid
    tl.store(items + full + tl.cumsum(untested.to(tl.int32), 0) - 1, item, mask=untested)
    to = end_of_list - edges - tl.cumsum(tested.to(tl.int32), 0)
    tl.store(items + to, item, mask=tested)
    tl.store(segment_of + to, s + tl.zeros_like(item), mask=tested)
    return full + tl.sum(untested.to(tl.int32)), edges + tl.sum(tested.to(tl.int32))


@triton.jit
def _put_stretch(items, segment_of, most, full, edges, start, end, plain, s, BLOCK_N: tl.constexpr):
    """Adds the items of a stretch of keys."""
    for base in range(start, end, 64 * BLOCK_N):
        place = base + tl.arange(0, 64) * BLOCK_N
        valid = tl.minimum(end - place, BLOCK_N)
        full, edges = _put(items, segment_of, most, full, edges, place, valid, place < end, plain, s, BLOCK_N)
    return full, edges


@triton.jit
def _put_blocks(
    items, segment_of, most, full, edges, start, end, key_first, plain, s, key_block, BLOCK_N: tl.constexpr, PER_BLOCK: tl.constexpr
):  # fmt: skip
    """Adds up to ``PER_BLOCK`` items for each block of the video's keys ``[start, end)``."""
    first = (start - key_first) // key_block * PER_BLOCK
    last = (end - 1 - key_first) // key_block * PER_BLOCK + PER_BLOCK - 1
    for base in range(first, last + 1, 64):
        piece = base + tl.arange(0, 64)
        of_block = key_first + piece // PER_BLOCK * key_block
        offset = piece % PER_BLOCK * BLOCK_N
        place = tl.maximum(of_block + offset, start)
        valid = tl.minimum(of_block + tl.minimum(offset + BLOCK_N, key_block), end) - place
        full, edges = _put(items, segment_of, most, full, edges, place, valid, valid > 0, plain, s, BLOCK_N)
    return full, edges


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _is_kept(kept, block, first, last):
    inside = (block >= first) & (block <= last)
    return inside & ((tl.load(kept + block // 8, mask=inside, other=0).to(tl.int32) >> (block % 8) & 1) > 0)


@triton.jit
def _put_kept(
    items, segment_of, most, full, edges, kept, start, end, key_first, plain, s, key_block, BLOCK_N: tl.constexpr, PER_BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Adds the items of blocks of the video that are kept, of keys ``[start, end)``; neighbours among them are one stretch.

    A block has up to ``PER_BLOCK`` items that begin in it, and they end up to ``AHEAD`` blocks later.
    """
    first = (start - key_first) // key_block
    last = (end - 1 - key_first) // key_block
    run_before = -1  # the first block of the run that the last block is in
    for base in range(first, last + 1, 128):
        block = base + tl.arange(0, 128)
        here = _is_kept(kept, block, first, last)
        begins = here & ~_is_kept(kept, block - 1, first, last)
        run = tl.maximum(tl.associative_scan(tl.where(begins, block, -1), 0, _larger), run_before)
        run_before = tl.max(tl.where(block == base + 127, run, -1), 0)
        run_start = tl.maximum(key_first + run * key_block, start)
        block_start = tl.maximum(key_first + block * key_block, start)
        block_end = tl.minimum(key_first + (block + 1) * key_block, end)
        run_end = block_end
        goes_on = here
        for ahead in tl.static_range(1, AHEAD + 1):
            goes_on &= _is_kept(kept, block + ahead, first, last)
            run_end = tl.where(goes_on, tl.minimum(block_end + ahead * key_block, end), run_end)
        place = run_start + (block_start - run_start + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        for _ in tl.static_range(PER_BLOCK):
            wanted = here & (place < block_end)
            valid = tl.minimum(run_end - place, BLOCK_N)
            full, edges = _put(items, segment_of, most, full, edges, place, valid, wanted, plain, s, BLOCK_N)
            place += BLOCK_N
    return full, edges


@triton.jit
def items_kernel(
    segments, tiles, items, segment_of, listed, work, kept, moment, all_segments, all_items, lists_per_schedule, schedules, query_first,
    key_first, tokens, query_block, key_block, query_blocks, bytes_per_block, WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, BY_BLOCK: tl.constexpr, PER_BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The list of a tile: ``[first key * 256 + keys]``, and for items that are tested the segment that says which rows attend.

    ``BY_BLOCK`` lists the video alone, and no item is in two of its blocks.

    ``listed`` gets how many there are of both kinds, ``work`` how many keys that is, in whole items.  A list is that of a sample, or where
    ``HAS_BLOCKS`` of a head of a sample, whose ``kept`` blocks of ``key_block`` are attended; all are where ``moment`` is not 1.
    """
    tile = tl.program_id(0)
    tile_out = tl.program_id(1) * tl.num_programs(0) + tile
    of_schedule = tl.program_id(1) // lists_per_schedule % schedules * tl.num_programs(0) + tile
    first_row = tl.load(tiles + TILE * of_schedule)
    segment_start = tl.load(tiles + TILE * of_schedule + 4)
    schedule = of_schedule // tl.num_programs(0)
    segments += (schedule.to(tl.int64) * all_segments + segment_start) * (HEADER + WORDS)
    item_start = tl.load(tiles + TILE * of_schedule + 5)
    most = tl.load(tiles + TILE * of_schedule + 6) - item_start
    items += tl.program_id(1).to(tl.int64) * all_items + item_start
    segment_of += tl.program_id(1).to(tl.int64) * all_items + item_start
    all_of_them = True
    if HAS_BLOCKS:
        block = (first_row - query_first) // query_block
        in_video = (first_row >= query_first) & (first_row < query_first + tokens)
        all_of_them = (tl.load(moment) != 1) | ~in_video
        kept += (tl.program_id(1).to(tl.int64) * query_blocks + tl.where(in_video, block, 0)) * bytes_per_block
    full = 0
    edges = 0
    for s in range(tl.load(tiles + TILE * of_schedule + 3)):
        start = tl.load(segments + s * (HEADER + WORDS))
        end = tl.load(segments + s * (HEADER + WORDS) + 1)
        plain = tl.load(segments + s * (HEADER + WORDS) + 2) == ALL
        if BY_BLOCK:
            start = tl.maximum(start, key_first)
            end = tl.minimum(end, key_first + tokens)
            if start < end:
                full, edges = _put_blocks(
                    items, segment_of, most, full, edges, start, end, key_first, plain, s, key_block, BLOCK_N, PER_BLOCK,
                )  # fmt: skip
        elif HAS_BLOCKS:
            before = tl.where(all_of_them, end, tl.minimum(end, key_first))
            full, edges = _put_stretch(items, segment_of, most, full, edges, start, before, plain, s, BLOCK_N)
            video_start = tl.maximum(start, key_first)
            video_end = tl.where(all_of_them, video_start, tl.minimum(end, key_first + tokens))
            if video_start < video_end:
                full, edges = _put_kept(
                    items, segment_of, most, full, edges, kept, video_start, video_end, key_first, plain, s, key_block, BLOCK_N, PER_BLOCK,
                    AHEAD,
                )  # fmt: skip
            behind = tl.where(all_of_them, end, tl.maximum(start, key_first + tokens))
            full, edges = _put_stretch(items, segment_of, most, full, edges, behind, end, plain, s, BLOCK_N)
        else:
            full, edges = _put_stretch(items, segment_of, most, full, edges, start, end, plain, s, BLOCK_N)
    tl.store(listed + LISTED * tile_out, full)
    tl.store(listed + LISTED * tile_out + 1, edges)
    tl.store(work + tile_out, full + edges)
