"""Symbolic sizes: one compile for prompts of any length, before the video or after it."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spellings import joint
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise

import lvsa_compile
from lvsa_compile.sparsity.frame_pattern import FramePattern
from lvsa_compile.sparsity.key_ranges import OPEN_END, VideoSpan, key_range_table, slopes


def text_last(model, tokens, grid, text):
    return model.attention(torch.cat([tokens, text], 1))[:, : tokens.shape[1]]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize(("block", "place"), [(joint, "prefix"), (text_last, "suffix")])
def test_one_compile_for_prompts_of_any_length(block, place, dynamic, inner):
    model = randomise(VideoDiT(block))
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "inner": inner}, dynamic=dynamic)
    for tokens in (7, 11, 5, 23):
        inputs = dit_inputs(text=tokens)
        lvsa_compile.reset()
        with torch.no_grad():
            output = compiled(*inputs)
            with oracle.MaskedAttention(oracle.token_mask(9, 12, 0, reference=4, window=1, **{place: tokens})) as masked:
                answer = model(*inputs)
        assert masked.calls == 1
        assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
    assert len(lvsa_compile.reports()) == (1 if dynamic else 2)  # None: Dynamo makes sizes symbols once it has seen two
    assert "1 of 1 attention sites sparse" in lvsa_compile.reports()[-1].summary
    assert not any("prefix" in what for graph in lvsa_compile.reports()[-1].graphs for what in graph.specialised)


@settings(max_examples=50)
@given(
    frames=st.integers(6, 12), places=st.integers(1, 4), query=st.integers(0, 3), key=st.integers(1, 40), suffix=st.integers(0, 3),
    follows=st.booleans(), dense_row=st.booleans(),
)  # fmt: skip
def test_a_table_grows_evenly_with_the_tokens_before_the_video(frames, places, query, key, suffix, follows, dense_row):
    """``follows``: query and key are one sequence; else the query has a fixed number of tokens before its video."""
    pattern = FramePattern(frames, window=1, reference_frames=4)
    key_span = VideoSpan(key, frames, places, suffix, free_start=True)
    query_span = key_span if follows else VideoSpan(query, frames, places, 0)
    one = [dataclasses.replace(span, prefix=1) if span.free_start else span for span in (query_span, key_span)]
    base, slope = key_range_table(pattern, *one, dense_row=dense_row), slopes(pattern, *one, dense_row=dense_row)
    table = key_range_table(pattern, query_span, key_span, dense_row=dense_row)
    assert [b + (key - 1) * s for b, s in zip(base.query_bounds, slope.query_bounds, strict=True)] == list(table.query_bounds)
    for phases in zip(base.key_ranges, slope.key_ranges, table.key_ranges, strict=True):
        for blocks in zip(*phases, strict=True):
            for start, grows, there in zip(*blocks, strict=True):
                assert tuple(a + (key - 1) * g for a, g in zip(start, grows, strict=True)) == there
    assert max(table.query_bounds) < OPEN_END
