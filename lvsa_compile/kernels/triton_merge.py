"""Merges two attention answers over different keys by their log-sum-exp, in place (arXiv 2205.14135)."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS: tl.constexpr = tl.constexpr(16)


@triton.jit
def merge_kernel(
    output, log_sum_exp, part, part_lse,
    output_batch, output_head, output_row, output_column, lse_batch, lse_head, lse_row,
    part_batch, part_head, part_row, part_column, part_lse_batch, part_lse_head, part_lse_row,
    heads, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``output`` and ``log_sum_exp`` become those over the keys of both; a row that neither has a key for stays 0 and -inf."""
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    block = inside[:, None] & (column < WIDTH)[None, :]
    lse_place = log_sum_exp + b * lse_batch + h * lse_head + row * lse_row
    offset = output + b * output_batch + h * output_head + row[:, None] * output_row + column[None, :] * output_column
    part_place = part + b * part_batch + h * part_head + row[:, None] * part_row + column[None, :] * part_column
    a = tl.load(lse_place, mask=inside, other=0.0)
    c = tl.load(part_lse + b * part_lse_batch + h * part_lse_head + row * part_lse_row, mask=inside, other=0.0)
    largest = tl.maximum(a, c)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a = tl.exp(a - base)
    weight_c = tl.exp(c - base)
    total = weight_a + weight_c
    divisor = tl.where(total == 0.0, 1.0, total)
    first = tl.load(offset, mask=block, other=0.0).to(tl.float32) * (weight_a / divisor)[:, None]
    second = tl.load(part_place, mask=block, other=0.0).to(tl.float32) * (weight_c / divisor)[:, None]
    tl.store(offset, (first + second).to(output.dtype.element_ty), mask=block)
    tl.store(lse_place, tl.where(total == 0.0, float("-inf"), base + tl.log(divisor)), mask=inside)
