"""Symbolic sizes: one compile for prompts of any length, before the video or after it."""

from __future__ import annotations

import dataclasses
import functools

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import key_range_table, plan
from test_spellings import joint
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise, wan, wan_inputs
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lvsa_compile
from lvsa_compile import backend
from lvsa_compile.axes import rules
from lvsa_compile.errors import AheadOfTimeError
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.policies.tables import OPEN_END, VideoSpan


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
    base, slope = key_range_table(pattern, *one, dense_row=dense_row), plan(pattern, *one, dense_row=dense_row).slopes()
    table = key_range_table(pattern, query_span, key_span, dense_row=dense_row)
    assert [b + (key - 1) * s for b, s in zip(base.query_bounds, slope.query_bounds, strict=True)] == list(table.query_bounds)
    for phases in zip(base.key_ranges, slope.key_ranges, table.key_ranges, strict=True):
        for blocks in zip(*(of_head for (of_head,) in phases), strict=True):
            for start, grows, there in zip(*blocks, strict=True):
                assert tuple(a + (key - 1) * g for a, g in zip(start, grows, strict=True)) == there
    assert max(table.query_bounds) < OPEN_END


def in_sizes_read_back(times):
    """A block that reads frames, rows and columns from a tensor ``times`` times; above five torch 2.13 fails with any backend."""

    def block(model, tokens, grid, text):
        sizes = torch.tensor(grid)
        for _ in range(times):
            frames, rows, columns = sizes.tolist()
            turn = torch.cos(torch.arange(64.0))[:frames].view(frames, 1, 1).expand(frames, rows, columns).reshape(1, -1, 1)
            tokens = tokens + model.attention(tokens * turn)
        return tokens

    return block


@pytest.mark.parametrize(("inner", "times"), [("aot_eager", 1), ("aot_eager", 5), pytest.param("inductor", 4, marks=pytest.mark.inductor)])
def test_sizes_that_are_read_back_in_every_block(inner, times):
    model, inputs = randomise(VideoDiT(in_sizes_read_back(times))), dit_inputs()
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        output = torch.compile(model, backend="lvsa", options={**EXACT, "inner": inner})(*inputs)
        with oracle.MaskedAttention(oracle.token_mask(9, 12, 0, reference=4, window=1)):
            answer = model(*inputs)
    assert lvsa_compile.reports()[0].summary.endswith(f"{times} of {times} attention sites sparse")
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())


def state_of(environment):
    """What a ShapeEnv knows, as text, and how full its caches are; the numbers of versions and new symbols only grow."""
    grows = ("_version_counter", "_prev_cache_key", "unbacked_symint_counter", "unbacked_symfloat_counter")
    known = {name: str(value) for name, value in vars(environment).items() if name not in grows}
    caches = {
        name: method.cache_info().misses for name, method in vars(ShapeEnv).items() if isinstance(method, functools._lru_cache_wrapper)
    }
    return known, caches


@pytest.mark.parametrize("fails", [False, True])
def test_following_axes_leaves_nothing_in_the_compile_in_progress(fails, monkeypatch):
    seen = []

    def traced(compilation):
        environment = torch._guards.TracingContext.get().fake_mode.shape_env
        before = state_of(environment)
        try:
            return backend.trace_layout(compilation)
        finally:
            seen.append((before, state_of(environment)))

    if fails:
        monkeypatch.setitem(rules.RULES, "addmm", lambda call: 1 / 0)
    steps = tuple(traced if step is backend.trace_layout else step for step in backend.PIPELINE)
    monkeypatch.setattr(backend, "PIPELINE", steps)
    model = randomise(VideoDiT(in_sizes_read_back(3)))
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"}, dynamic=True)(*dit_inputs())
    ((before, after),) = seen
    assert after == before
    assert lvsa_compile.reports()[0].sites[0].reason == ("internal_error" if fails else "")


@pytest.mark.parametrize(("axis", "what"), [(2, "frames"), (3, "tokens per frame"), (4, "tokens per frame")])
@pytest.mark.parametrize("mark", ["mark_dynamic", pytest.param("maybe_mark_dynamic", marks=pytest.mark.slow)])
def test_a_mark_on_the_video_is_kept(axis, what, mark):
    """The hand-written model computes rows and columns by a division, which a guard can hold without fixing the axis."""
    model = wan()
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})
    for more in (0, 1):
        grid = [9, 3, 4]
        grid[axis - 2] += more
        inputs = wan_inputs(*grid)
        getattr(torch._dynamo, mark)(inputs["hidden_states"], axis)
        lvsa_compile.reset()
        with torch.no_grad():
            (output,) = compiled(**inputs)
            sparse = lvsa_compile.reports()[-1].sites[0].decision == "sparse"
            keep = oracle.token_mask(grid[0], grid[1] * grid[2], 0, reference=4, window=1)
            with oracle.MaskedAttention(keep if sparse else torch.ones_like(keep)):
                (answer,) = model(**inputs)
        assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
    site = lvsa_compile.reports()[-1].sites[0]
    if axis == 2 and mark == "mark_dynamic":
        said = "frames would be fixed at this size, and axis 2 of L['kwargs']['hidden_states'] is marked dynamic"
        assert (site.decision, site.reason, site.detail) == ("dense", "size_marked_dynamic", said)
        assert "maybe_mark_dynamic" in site.remedy
        assert len(lvsa_compile.reports()) == 1, "and one graph serves all lengths"
    else:
        assert site.decision == "sparse"


@pytest.mark.inductor
def test_compiling_ahead_of_time_is_dense_or_an_error_that_says_what_works():
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with torch.no_grad():
        with pytest.raises(AheadOfTimeError, match="lvsa cannot compile a model ahead of time") as caught:
            torch.compile(model, backend="lvsa", fullgraph=True, options=EXACT).forward.aot_compile((inputs, {}))
        assert 'torch.compile(model, backend="lvsa")' in str(caught.value)
        options = {"reference_frames": 21}
        dense = torch.compile(model, backend="lvsa", fullgraph=True, options=options).forward.aot_compile((inputs, {}))
        assert torch.allclose(dense(model, *inputs), model(*inputs), atol=1e-4)
