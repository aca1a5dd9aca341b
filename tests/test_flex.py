"""The block mask that FlexAttention gets, tile by tile, and FlexAttention's CPU kernel under it."""

from __future__ import annotations

import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import attention_call, key_range_table, tables_of_body

from lvsa_compile import FramePattern
from lvsa_compile.lowering import flex
from lvsa_compile.ops.attention import score_mask
from lvsa_compile.policies.tables import VideoSpan


def tables(pattern: FramePattern, span: VideoSpan, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    table = key_range_table(pattern, span, span)
    bounds, ranges = tables_of_body(table)
    return bounds, ranges[step % pattern.phases]


@settings(max_examples=60)
@given(
    tokens=st.sampled_from([1, 5, 64, 100, 128, 200]), frames=st.integers(1, 9), prefix=st.integers(0, 150), suffix=st.integers(0, 150),
    reference=st.integers(1, 6), window=st.integers(0, 2), step=st.integers(0, 9),
)  # fmt: skip
def test_tiles_are_those_of_the_mask(tokens, frames, prefix, suffix, reference, window, step):
    pattern, span = FramePattern(frames, window, 1, reference), VideoSpan(prefix, frames, tokens, suffix)
    cells = flex.attended_cells(*tables(pattern, span, step), span.length, span.length)
    block_of_row, cell_of_key, attends = cells
    mask = oracle.token_mask(frames, tokens, step % pattern.phases, prefix=prefix, suffix=suffix, window=window, reference=reference)
    assert torch.equal(attends[block_of_row][:, cell_of_key], mask)
    some, full = flex.tiles(*cells)
    for row, rows in enumerate(mask.split(128)):
        for column, tile in enumerate(rows.split(128, dim=1)):
            assert bool(full[row, column]) == bool(tile.all())
            assert bool(some[row, column]) == bool(tile.any() and not tile.all())
    count, order = flex._lists(some)
    for row in range(len(some)):
        assert sorted(order[0, 0, row, : count[0, 0, row]].tolist()) == some[row].nonzero().flatten().tolist()


def test_the_compiled_kernel_is_masked_attention_at_every_phase_and_compiled_once():
    pattern, span = FramePattern(20, 2, 1, 8), VideoSpan(13, 20, 50, 21)
    query, key, value = (torch.randn(2, span.length, heads, 32).transpose(1, 2) for heads in (4, 2, 2))
    padding = torch.arange(span.length).reshape(1, 1, 1, -1) < span.length - 9
    added = score_mask(padding, span.length)
    mask_of, attend = flex._compiled("test")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for step in range(pattern.phases):
            bounds, ranges = tables(pattern, span, step)
            tables_of_mask = mask_of(bounds, ranges, span.length, span.length)
            found = attend(query, key, value, tables_of_mask, added, 0.2, False, return_lse=False)  # which the CPU cannot
            mask = oracle.token_mask(20, 50, step, prefix=13, suffix=21, window=2, reference=8)
            expected, _ = oracle.dense(query, key, value, mask, 0.2, added=added)
            assert (found - expected).abs().max() < 4e-6
    assert pattern.phases > 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    flex._compiled.cache_clear()


def test_what_it_refuses():
    span = VideoSpan(0, 30, 24, 0)

    def call(dtype=torch.bfloat16, head_dim=64, value_dim=64):
        return attention_call(torch.device("cuda"), dtype, 1, 2, 2, head_dim, value_dim, span, span, FramePattern(30))

    assert flex._refuses(call()) is None
    assert flex._refuses(call(dtype=torch.float64)) == "FlexAttention does not take torch.float64"
    assert flex._refuses(call(head_dim=8, value_dim=8)) == "FlexAttention takes head dims from 16, not 8"
    assert flex._refuses(call(value_dim=32)) == "it was not tried with different head dims, 64 and 32"
    assert flex._unavailable(torch.device("cpu")) == "it runs on cuda, not on cpu"
