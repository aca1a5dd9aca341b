"""Attention of tiles of query rows over flat lists of keys in Triton: the kernel of the lowerings "triton" and "triton_blocks".

``attention_kernel`` walks the list of a tile (``kernels/triton_schedule.py``) with the online softmax of FlashAttention (arXiv 2205.14135),
straight from the model's keys and values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lvsa_compile.kernels.triton_schedule import HEADER, LISTED, TILE


@triton.jit
def load_columns(
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
    return load_columns(offset, tl.arange(0, BLOCK_N), row_stride, column_stride, end - n, FIRST, WIDTH, HEAD_DIM, EDGE)


@triton.jit
def score_of(
    query_0, query_1, key, key_0, key_1, key_mask, b, h, n, valid, words, word, bit, scale, key_row, key_column, mask_key,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, HAS_MASK: tl.constexpr,
    TESTED: tl.constexpr, STRADDLES: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of an item's keys ``[n, n + BLOCK_N)``.

    Where they are ``TESTED`` they are scaled, the first ``valid`` count, the mask is asked, and a row attends where its bit is set.
    """
    columns = _load_keys(key_0, key, b, h, n, key_row, key_column, n + valid, 0, WIDTH_0, BLOCK_N, HEAD_DIM, TESTED, DESCRIBED)
    score = tl.dot(query_0, tl.trans(columns), input_precision=PRECISION)
    if WIDTH_1 > 0:
        columns = _load_keys(key_1, key, b, h, n, key_row, key_column, n + valid, WIDTH_0, WIDTH_1, BLOCK_N, HEAD_DIM, TESTED, DESCRIBED)
        score = tl.dot(query_1, tl.trans(columns), score, input_precision=PRECISION)
    if TESTED:
        number = tl.arange(0, BLOCK_N)
        score *= scale
        if HAS_MASK:
            asked = tl.load(key_mask + (n + number) * mask_key, mask=number < valid, other=0.0)
            score += asked[None, :] * 1.4426950408889634
        counts = (number < valid)[None, :]
        if STRADDLES:
            counts = counts & ((tl.load(words + word) >> bit & 1) > 0)[:, None]
        score = tl.where(counts, score, float("-inf"))
    return score


@triton.jit
def _attend(
    largest, total, sum_0, sum_1, query_0, query_1, key, value, key_0, key_1, value_0, value_1, key_mask, b, h, n, valid, words, word, bit,
    scale, key_row, key_column, value_row, value_column, mask_key, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr, HAS_MASK: tl.constexpr, TESTED: tl.constexpr, STRADDLES: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax goes on by one item."""
    score = score_of(
        query_0, query_1, key, key_0, key_1, key_mask, b, h, n, valid, words, word, bit, scale, key_row, key_column, mask_key,
        BLOCK_N, HEAD_DIM, WIDTH_0, WIDTH_1, HAS_MASK, TESTED, STRADDLES, DESCRIBED, PRECISION,
    )  # fmt: skip
    if TESTED:
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
    columns = _load_keys(value_0, value, b, h, n, value_row, value_column, n + valid, 0, WIDTH_0, BLOCK_N, HEAD_DIM, TESTED, DESCRIBED)
    sum_0 = tl.dot(weight, columns, sum_0 * shrink[:, None], input_precision=PRECISION)
    if WIDTH_1 > 0:
        columns = _load_keys(
            value_1, value, b, h, n, value_row, value_column, n + valid, WIDTH_0, WIDTH_1, BLOCK_N, HEAD_DIM, TESTED, DESCRIBED,
        )  # fmt: skip
        sum_1 = tl.dot(weight, columns, sum_1 * shrink[:, None], input_precision=PRECISION)
    return now, total, sum_0, sum_1


@triton.jit
def block_of_rows(query_bounds, row, end_row, first_block, query_blocks):
    """Of each row the query block, counted from the tile's first."""
    block = tl.zeros(row.shape, dtype=tl.int32)
    at = first_block + 1
    while at < query_blocks:
        start = tl.load(query_bounds + at)
        block += ((row >= start) & (start < end_row)).to(tl.int32)
        at = tl.where(start < end_row, at + 1, query_blocks)
    return block


@triton.jit
def attention_kernel(
    query, key, value, key_0, key_1, value_0, value_1, key_mask, output, log_sum_exp, query_bounds,
    segments, tiles, items, segment_of, listed, tile_order,
    query_batch, query_head, query_row, query_column, key_batch, key_head, key_row, key_column,
    value_batch, value_head, value_row, value_column, output_batch, output_head, output_row, output_column,
    mask_batch, mask_head, mask_row, mask_key, heads, group, query_length, query_blocks, all_segments, all_items, list_batch, list_head,
    schedule_batch, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr,
    WORDS: tl.constexpr, HAS_MASK: tl.constexpr, STRADDLES: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of query rows of one head; ``scale`` is positive, and times log2(e).  A head dim of 96 is computed as 64 and 32 columns.

    ``key_0`` to ``value_1`` are tensor descriptors of the two parts of keys and values, for parts that load by them (``DESCRIBED``);
    ``list_batch`` and ``list_head`` are the distances, in lists, of those of two samples and heads, ``schedule_batch`` that of two samples'
    segments; ``STRADDLES`` says that the rows of a tile may be of several query blocks.
    """
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    of_list = b * list_batch + h * list_head
    tile = tl.load(tile_order + of_list * tl.num_programs(0) + tl.program_id(0)).to(tl.int32)
    number = of_list * tl.num_programs(0) + tile
    schedule = b * schedule_batch * tl.num_programs(0) + tile
    first_row = tl.load(tiles + TILE * schedule)
    rows_here = tl.load(tiles + TILE * schedule + 1) - first_row
    query += b.to(tl.int64) * query_batch + h.to(tl.int64) * query_head + first_row.to(tl.int64) * query_row
    key += b.to(tl.int64) * key_batch + (h // group).to(tl.int64) * key_head
    value += b.to(tl.int64) * value_batch + (h // group).to(tl.int64) * value_head
    output += b.to(tl.int64) * output_batch + h.to(tl.int64) * output_head + first_row.to(tl.int64) * output_row
    key_mask += b.to(tl.int64) * mask_batch + h.to(tl.int64) * mask_head

    row = tl.arange(0, BLOCK_M)
    block = tl.zeros([BLOCK_M], dtype=tl.int32)
    if STRADDLES:
        block = block_of_rows(query_bounds, first_row + row, first_row + rows_here, tl.load(tiles + TILE * schedule + 2), query_blocks)
    word = block // 32
    bit = block % 32
    query_0 = load_columns(query, row, query_row, query_column, rows_here, 0, WIDTH_0, HEAD_DIM, True)
    sum_0 = tl.zeros([BLOCK_M, WIDTH_0], dtype=tl.float32)
    if WIDTH_1 > 0:
        query_1 = load_columns(query, row, query_row, query_column, rows_here, WIDTH_0, WIDTH_1, HEAD_DIM, True)
        sum_1 = tl.zeros([BLOCK_M, WIDTH_1], dtype=tl.float32)
    else:  # not used
        query_1 = 0.0
        sum_1 = 0.0
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    segments += ((b * schedule_batch).to(tl.int64) * all_segments + tl.load(tiles + TILE * schedule + 4)) * (HEADER + WORDS) + HEADER
    last = of_list.to(tl.int64) * all_items + tl.load(tiles + TILE * schedule + 6) - 1
    segment_of += last
    ahead = items + of_list.to(tl.int64) * all_items + tl.load(tiles + TILE * schedule + 5)
    item = tl.load(ahead)
    for i in range(tl.load(listed + LISTED * number)):
        n = item >> 8
        item = tl.load(ahead + i + 1)  # ahead, so that keys are loaded without waiting for where they are
        largest, total, sum_0, sum_1 = _attend(
            largest, total, sum_0, sum_1, query_0, query_1, key, value, key_0, key_1, value_0, value_1, key_mask, b, h // group, n, BLOCK_N,
            segments, word, bit, scale, key_row, key_column, value_row, value_column, mask_key,
            BLOCK_N, HEAD_DIM, WIDTH_0, WIDTH_1, HAS_MASK, False, STRADDLES, DESCRIBED, PRECISION,
        )  # fmt: skip
    items += last
    following = tl.load(items)
    for i in range(tl.load(listed + LISTED * number + 1)):
        item = following
        following = tl.load(items - i - 1)
        words = segments + tl.load(segment_of - i) * (HEADER + WORDS)
        largest, total, sum_0, sum_1 = _attend(
            largest, total, sum_0, sum_1, query_0, query_1, key, value, key_0, key_1, value_0, value_1, key_mask, b, h // group, item >> 8,
            item & 255, words, word, bit, scale, key_row, key_column, value_row, value_column, mask_key,
            BLOCK_N, HEAD_DIM, WIDTH_0, WIDTH_1, HAS_MASK, True, STRADDLES, DESCRIBED, PRECISION,
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
