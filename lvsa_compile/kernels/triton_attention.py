"""Attention of query blocks over ranges of keys in Triton: the kernels of the lowering "triton".

``schedule_kernel`` turns the key ranges of one phase into segments per tile of query rows, on the device, so that rotating the anchors
asks nothing of the host.  ``attention_kernel`` walks a tile's segments with the online softmax of FlashAttention (arXiv 2205.14135),
straight from the model's keys and values.
"""

from __future__ import annotations

import triton
import triton.language as tl

SOME: tl.constexpr = tl.constexpr(1)  # some rows of a tile attend the segment: the tile straddles query blocks
ALL: tl.constexpr = tl.constexpr(2)  # every row does
MASKED: tl.constexpr = tl.constexpr(4)  # added to either where the mask must be asked


@triton.jit
def schedule_kernel(
    query_bounds, key_ranges, phase, mask_zones, segments, tiles, key_counts, query_length, key_length, query_blocks, ranges,
    most_segments, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, RANGES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Segments ``[start, end, kind]`` of a tile of a sample, in the order of the keys: where all or some of its query blocks attend.

    ``tiles`` gets ``[segments, first query block, last query block]`` of each tile, ``key_counts`` how many keys it walks;
    ``mask_zones`` holds, per sample, from where to where the mask must be asked and where the keys end that count at all.
    A sweep over the keys: from each place to the next at which any range of the tile's blocks, or the zone, begins or ends.
    """
    tile = tl.program_id(0)
    tile_out = tl.program_id(1) * tl.num_programs(0) + tile
    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, query_length) - 1
    first_block = 0
    last_block = 0
    for base in range(0, query_blocks, 128):
        block = base + tl.arange(0, 128)
        ends = tl.load(query_bounds + block + 1, mask=block < query_blocks, other=2147483647)
        first_block += tl.sum((ends <= first_row).to(tl.int32))
        last_block += tl.sum((ends <= last_row).to(tl.int32))

    zone_start = key_length
    zone_end = key_length
    limit = key_length
    if HAS_MASK:
        zone_start = tl.load(mask_zones + 3 * tl.program_id(1))
        zone_end = tl.load(mask_zones + 3 * tl.program_id(1) + 1)
        limit = tl.load(mask_zones + 3 * tl.program_id(1) + 2)

    block = first_block + tl.arange(0, BLOCKS)
    present = block <= last_block
    present &= tl.load(query_bounds + block, mask=present, other=0) < tl.load(query_bounds + block + 1, mask=present, other=0)
    offset = (tl.load(phase) * query_blocks + block)[:, None] * ranges + tl.arange(0, RANGES)[None, :]
    known = present[:, None] & (tl.arange(0, RANGES) < ranges)[None, :]
    start = tl.load(key_ranges + 2 * offset, mask=known, other=0)
    end = tl.minimum(tl.load(key_ranges + 2 * offset + 1, mask=known, other=0), limit)

    segments += tile_out * most_segments * 3
    count = 0
    keys = 0
    kind = 0  # of the segment that began at ``opened``; 0 where nobody attends
    opened = 0
    at = 0
    while at < limit:
        inside = tl.max(((start <= at) & (at < end)).to(tl.int32), 1)
        anyone = tl.max(inside, 0)
        everyone = tl.min(tl.where(present, inside, 1), 0)
        masked = (zone_start <= at) & (at < zone_end) & (anyone > 0)
        now = anyone + everyone + tl.where(masked, MASKED, 0)
        closes = (kind != now) & (kind > 0)
        tl.store(segments + 3 * count, opened, mask=closes)
        tl.store(segments + 3 * count + 1, at, mask=closes)
        tl.store(segments + 3 * count + 2, kind, mask=closes)
        count += closes.to(tl.int32)
        keys += tl.where(closes, at - opened, 0)
        opened = tl.where(kind != now, at, opened)
        kind = now
        next_start = tl.min(tl.min(tl.where((start > at) & (start < end), start, limit), 1), 0)
        next_end = tl.min(tl.min(tl.where(end > at, end, limit), 1), 0)
        next_zone = tl.minimum(tl.where(zone_start > at, zone_start, limit), tl.where(zone_end > at, zone_end, limit))
        at = tl.minimum(tl.minimum(next_start, next_end), next_zone)
    closes = kind > 0
    tl.store(segments + 3 * count, opened, mask=closes)
    tl.store(segments + 3 * count + 1, limit, mask=closes)
    tl.store(segments + 3 * count + 2, kind, mask=closes)
    tl.store(tiles + 3 * tile_out, count + closes.to(tl.int32))
    tl.store(tiles + 3 * tile_out + 1, first_block)
    tl.store(tiles + 3 * tile_out + 2, last_block)
    tl.store(key_counts + tile_out, keys + tl.where(closes, limit - opened, 0))


@triton.jit
def _load_columns(
    first, rows, row_stride, column_stride, count,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """``[rows, WIDTH]`` from column ``FIRST`` on, ``first`` pointing to row 0; zero beyond the head dim and, where ``COUNTED``, from row
    ``count`` on.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = first + rows[:, None] * row_stride + columns[None, :] * column_stride
    if FIRST + WIDTH > HEAD_DIM:
        if COUNTED:
            return tl.load(offsets, mask=(rows < count)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        return tl.load(offsets, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    if COUNTED:
        return tl.load(offsets, mask=(rows < count)[:, None], other=0.0)
    return tl.load(offsets)


@triton.jit
def _load_keys(
    described, first, b, h, n, row_stride, column_stride, end,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, EDGE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_N, WIDTH]`` of keys or values from ``n`` on, by tensor descriptor where there is one.

    A descriptor gives what lies beyond ``end``, or zero beyond the sequence; a pointer gives zero at once.
    """
    if DESCRIBED:
        return described.load([b, h, n, FIRST]).reshape([BLOCK_N, WIDTH])
    offset = first + tl.cast(n, tl.int64) * row_stride
    return _load_columns(offset, tl.arange(0, BLOCK_N), row_stride, column_stride, end - n, FIRST, WIDTH, HEAD_DIM, EDGE)


@triton.jit
def _where_rows_attend(rows, keys, first_block, last_block, query_bounds, key_ranges, phase, query_blocks, ranges):
    """bool ``[rows, keys]``, from the table: for the few keys that only some rows of a tile attend."""
    block = tl.zeros(rows.shape, dtype=tl.int32) + first_block
    for n in range(first_block + 1, last_block + 1):
        block += (rows >= tl.load(query_bounds + n)).to(tl.int32)
    of_row = key_ranges + 2 * (tl.load(phase) * query_blocks + block) * ranges
    attended = tl.zeros([rows.shape[0], keys.shape[0]], dtype=tl.int1)
    for r in range(ranges):
        start = tl.load(of_row + 2 * r)
        end = tl.load(of_row + 2 * r + 1)
        attended |= (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
    return attended


@triton.jit
def _attend(
    largest, total, sum_0, sum_1, query_0, query_1, key, value, key_0, key_1, value_0, value_1, key_mask, b, h, n, end, kind, rows,
    first_block, last_block, query_bounds, key_ranges, phase, query_blocks, ranges, scale, key_row, key_column, value_row, value_column,
    mask_key, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, HAS_MASK: tl.constexpr,
    EDGE: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys ``[n, n + BLOCK_N)``.  At an ``EDGE`` those from ``end`` on do not count, the mask is asked where ``kind`` says
    so, and what only some rows attend is looked up.
    """
    columns = _load_keys(key_0, key, b, h, n, key_row, key_column, end, 0, WIDTH_0, BLOCK_N, HEAD_DIM, EDGE, DESCRIBED)
    score = tl.dot(query_0, tl.trans(columns), input_precision=PRECISION)
    if WIDTH_1 > 0:
        columns = _load_keys(key_1, key, b, h, n, key_row, key_column, end, WIDTH_0, WIDTH_1, BLOCK_N, HEAD_DIM, EDGE, DESCRIBED)
        score = tl.dot(query_1, tl.trans(columns), score, input_precision=PRECISION)
    if EDGE:
        keys = n + tl.arange(0, BLOCK_N)
        score *= scale
        if HAS_MASK:
            asked = (keys < end) & (kind >= MASKED)
            score += tl.load(key_mask + keys * mask_key, mask=asked, other=0.0)[None, :] * 1.4426950408889634
        counts = (keys < end)[None, :] & (rows >= 0)[:, None]
        if (kind & SOME) != 0:
            counts &= _where_rows_attend(rows, keys, first_block, last_block, query_bounds, key_ranges, phase, query_blocks, ranges)
        score = tl.where(counts, score, float("-inf"))
        now = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(now == float("-inf"), 0.0, now)  # a row may have met no key yet
        weight = tl.exp2(score - base[:, None])
    else:
        now = tl.maximum(largest, tl.max(score, 1) * scale)
        base = now
        weight = tl.exp2(score * scale - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(weight, 1)
    weight = weight.to(query_0.dtype)
    columns = _load_keys(value_0, value, b, h, n, value_row, value_column, end, 0, WIDTH_0, BLOCK_N, HEAD_DIM, EDGE, DESCRIBED)
    sum_0 = tl.dot(weight, columns, sum_0 * shrink[:, None], input_precision=PRECISION)
    if WIDTH_1 > 0:
        columns = _load_keys(value_1, value, b, h, n, value_row, value_column, end, WIDTH_0, WIDTH_1, BLOCK_N, HEAD_DIM, EDGE, DESCRIBED)
        sum_1 = tl.dot(weight, columns, sum_1 * shrink[:, None], input_precision=PRECISION)
    return now, total, sum_0, sum_1


@triton.jit
def attention_kernel(
    query, key, value, key_0, key_1, value_0, value_1, key_mask, output, log_sum_exp, query_bounds, key_ranges, phase,
    segments, tiles, tile_order,
    query_batch, query_head, query_row, query_column, key_batch, key_head, key_row, key_column,
    value_batch, value_head, value_row, value_column, output_batch, output_head, output_row, output_column,
    mask_batch, mask_head, mask_row, mask_key, heads, group, query_length, query_blocks, ranges, most_segments, schedule_batch, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr,
    HAS_MASK: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of query rows of one head; ``scale`` is positive, and times log2(e).  A head dim of 96 is computed as 64 and 32 columns.

    ``key_0`` to ``value_1`` are tensor descriptors of the two parts of keys and values, for parts that load by them (``DESCRIBED``);
    ``schedule_batch`` is the distance, in tiles, of the schedules of two samples.
    """
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    sample = b * schedule_batch
    tile = tl.load(tile_order + sample + tl.program_id(0)).to(tl.int32)
    first_row = tile * BLOCK_M
    query += b.to(tl.int64) * query_batch + h.to(tl.int64) * query_head + first_row.to(tl.int64) * query_row
    key += b.to(tl.int64) * key_batch + (h // group).to(tl.int64) * key_head
    value += b.to(tl.int64) * value_batch + (h // group).to(tl.int64) * value_head
    output += b.to(tl.int64) * output_batch + h.to(tl.int64) * output_head + first_row.to(tl.int64) * output_row
    key_mask += b.to(tl.int64) * mask_batch + h.to(tl.int64) * mask_head

    row = tl.arange(0, BLOCK_M)
    rows_here = query_length - first_row
    query_0 = _load_columns(query, row, query_row, query_column, rows_here, 0, WIDTH_0, HEAD_DIM, True)
    sum_0 = tl.zeros([BLOCK_M, WIDTH_0], dtype=tl.float32)
    if WIDTH_1 > 0:
        query_1 = _load_columns(query, row, query_row, query_column, rows_here, WIDTH_0, WIDTH_1, HEAD_DIM, True)
        sum_1 = tl.zeros([BLOCK_M, WIDTH_1], dtype=tl.float32)
    else:  # not used
        query_1 = 0.0
        sum_1 = 0.0
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    segments += (sample + tile) * most_segments * 3
    tiles += (sample + tile) * 3
    first_block = tl.load(tiles + 1)
    last_block = tl.load(tiles + 2)
    for s in range(tl.load(tiles)):
        start = tl.load(segments + 3 * s)
        end = tl.load(segments + 3 * s + 1)
        kind = tl.load(segments + 3 * s + 2)
        edge = tl.where(kind == ALL, start + (end - start) // BLOCK_N * BLOCK_N, start)
        for n in range(start, edge, BLOCK_N):
            largest, total, sum_0, sum_1 = _attend(
                largest, total, sum_0, sum_1, query_0, query_1, key, value, key_0, key_1, value_0, value_1, key_mask, b, h // group, n, end,
                kind, first_row + row, first_block, last_block, query_bounds, key_ranges, phase, query_blocks, ranges, scale,
                key_row, key_column, value_row, value_column, mask_key,
                BLOCK_N, HEAD_DIM, WIDTH_0, WIDTH_1, HAS_MASK, False, DESCRIBED, PRECISION,
            )  # fmt: skip
        for n in range(edge, end, BLOCK_N):
            largest, total, sum_0, sum_1 = _attend(
                largest, total, sum_0, sum_1, query_0, query_1, key, value, key_0, key_1, value_0, value_1, key_mask, b, h // group, n, end,
                kind, first_row + row, first_block, last_block, query_bounds, key_ranges, phase, query_blocks, ranges, scale,
                key_row, key_column, value_row, value_column, mask_key,
                BLOCK_N, HEAD_DIM, WIDTH_0, WIDTH_1, HAS_MASK, True, DESCRIBED, PRECISION,
            )  # fmt: skip

    factor = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    columns = tl.arange(0, WIDTH_0)
    inside = (row < rows_here)[:, None]
    answer = (sum_0 * factor[:, None]).to(output.dtype.element_ty)
    offsets = output + row[:, None] * output_row + columns[None, :] * output_column
    tl.store(offsets, answer, mask=inside & (columns < HEAD_DIM)[None, :])
    if WIDTH_1 > 0:
        columns = WIDTH_0 + tl.arange(0, WIDTH_1)
        answer = (sum_1 * factor[:, None]).to(output.dtype.element_ty)
        offsets = output + row[:, None] * output_row + columns[None, :] * output_column
        tl.store(offsets, answer, mask=inside & (columns < HEAD_DIM)[None, :])
    natural = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453)
    log_sum_exp += tl.program_id(1).to(tl.int64) * query_length + first_row
    tl.store(log_sum_exp + row, natural, mask=row < rows_here)
