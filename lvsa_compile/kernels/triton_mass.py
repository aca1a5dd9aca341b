"""Block mass in Triton: the sum of softmax probabilities in each block of the video, once the log-sum-exp of its queries is known."""

from __future__ import annotations

import triton
import triton.language as tl

from lvsa_compile.kernels.triton_attention import block_of_rows, load_columns, score_of
from lvsa_compile.kernels.triton_schedule import HEADER, LISTED, TILE


@triton.jit
def _add(to, weight, counted):
    """Adds the sum of the weights of rows that count.  Triton 3.7 fails to compile a sum over the last axis of one for Blackwell."""
    sums = tl.where(counted, tl.sum(weight, 1), 0.0)
    tl.atomic_add(to + tl.arange(0, 1), tl.sum(sums[None, :], 1), sem="relaxed")


@triton.jit
def mass_kernel(
    query, key, key_mask, query_bounds, segments, tiles, items, segment_of, listed, moment, log_sum_exp, mass,
    query_batch, query_head, query_row, query_column, key_batch, key_head, key_row, key_column, mask_batch, mask_head, mask_row, mask_key,
    heads, group, query_blocks, all_segments, all_items, schedule_batch, query_first, key_first, tokens, query_block, key_block, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr,
    WORDS: tl.constexpr, HAS_MASK: tl.constexpr, STRADDLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one head, where ``moment`` is 2: a search.

    The tile is a query block of the video and its items are in one key block each, so that sums are always made in the same order.
    ``log_sum_exp`` float32 ``[B, heads, tokens]`` weighs the scores; ``mass`` float32 ``[B, heads, query blocks, key blocks]``, zeros;
    ``scale`` is positive, and times log2(e).
    """
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    schedule = b * schedule_batch * tl.num_programs(0) + tl.program_id(0)
    first_row = tl.load(tiles + TILE * schedule)
    rows_here = tl.load(tiles + TILE * schedule + 1) - first_row
    if (tl.load(moment) == 2) & (first_row >= query_first) & (first_row < query_first + tokens):
        row = tl.arange(0, BLOCK_M)
        query += b.to(tl.int64) * query_batch + h.to(tl.int64) * query_head + first_row.to(tl.int64) * query_row
        key += b.to(tl.int64) * key_batch + (h // group).to(tl.int64) * key_head
        key_mask += b.to(tl.int64) * mask_batch + h.to(tl.int64) * mask_head
        log_sum_exp += tl.program_id(1).to(tl.int64) * tokens + first_row - query_first
        of_head = tl.program_id(1).to(tl.int64) * ((tokens + query_block - 1) // query_block)
        mass += (of_head + (first_row - query_first) // query_block) * ((tokens + key_block - 1) // key_block)
        block = tl.zeros([BLOCK_M], dtype=tl.int32)
        if STRADDLES:
            block = block_of_rows(query_bounds, first_row + row, first_row + rows_here, tl.load(tiles + TILE * schedule + 2), query_blocks)
        query_0 = load_columns(query, row, query_row, query_column, rows_here, 0, WIDTH_0, HEAD_DIM, True)
        if WIDTH_1 > 0:  # noqa: SIM108
            query_1 = load_columns(query, row, query_row, query_column, rows_here, WIDTH_0, WIDTH_1, HEAD_DIM, True)
        else:  # not used
            query_1 = 0.0
        known = tl.load(log_sum_exp + row, mask=row < rows_here, other=float("-inf")) * 1.4426950408889634
        counted = known > float("-inf")
        known = tl.where(counted, known, 0.0)
        of_list = (b * schedule_batch).to(tl.int64)
        segments += (of_list * all_segments + tl.load(tiles + TILE * schedule + 4)) * (HEADER + WORDS) + HEADER
        last = of_list * all_items + tl.load(tiles + TILE * schedule + 6) - 1
        segment_of += last
        first = items + of_list * all_items + tl.load(tiles + TILE * schedule + 5)
        for i in range(tl.load(listed + LISTED * schedule)):
            n = tl.load(first + i) >> 8
            score = score_of(
                query_0, query_1, key, 0, 0, key_mask, b, h, n, BLOCK_N, segments, block, block, scale, key_row, key_column, mask_key,
                BLOCK_N, HEAD_DIM, WIDTH_0, WIDTH_1, HAS_MASK, False, STRADDLES, False, PRECISION,
            )  # fmt: skip
            _add(mass + (n - key_first) // key_block, tl.exp2(score * scale - known[:, None]), counted)
        items += last
        for i in range(tl.load(listed + LISTED * schedule + 1)):
            item = tl.load(items - i)
            words = segments + tl.load(segment_of - i) * (HEADER + WORDS)
            score = score_of(
                query_0, query_1, key, 0, 0, key_mask, b, h, item >> 8, item & 255, words, block // 32, block % 32, scale, key_row,
                key_column, mask_key, BLOCK_N, HEAD_DIM, WIDTH_0, WIDTH_1, HAS_MASK, True, STRADDLES, False, PRECISION,
            )  # fmt: skip
            _add(mass + ((item >> 8) - key_first) // key_block, tl.exp2(score - known[:, None]), counted)
