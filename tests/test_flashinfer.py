"""FlashInfer with no GPU: its arguments against the installed signature, and its documented contract emulated on them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from types import SimpleNamespace

import flashinfer_emulation
import oracle
import pytest
import torch
from flashinfer_emulation import Wrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import attention_call, key_range_table, tables_of_body

from lvsa_compile import FramePattern
from lvsa_compile.lowering import flashinfer as lowering
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.contract import AttentionCall


@pytest.fixture
def emulated():
    Wrapper.made = 0
    with flashinfer_emulation.instead_of_flashinfer():
        yield


def tables(pattern, span, **more):
    table = key_range_table(pattern, span, span, **more)
    return tables_of_body(table)


def test_every_phase_is_that_of_the_mask(emulated):
    @settings(max_examples=40)
    @given(
        tokens=st.integers(1, 9), frames=st.integers(2, 12), prefix=st.integers(0, 10), suffix=st.integers(0, 10),
        reference=st.integers(1, 8), window=st.integers(0, 2), group=st.sampled_from([1, 2]), batch=st.integers(1, 2),
        scale=st.sampled_from([None, 0.4]), expand=st.booleans(),
    )  # fmt: skip
    def run(tokens, frames, prefix, suffix, reference, window, group, batch, scale, expand):
        pattern, span = FramePattern(frames, window, 1, reference, expand_window=expand), VideoSpan(prefix, frames, tokens, suffix)
        query, key, value = (torch.randn(batch, span.length, n, 16).transpose(1, 2) for n in (2, 2 // group, 2 // group))
        for step in range(pattern.phases):
            phase = torch.tensor(step, dtype=torch.int32)
            found, found_lse = lowering.attention_flashinfer(query, key, value, *tables(pattern, span), phase, scale=scale)
            mask = oracle.token_mask(frames, tokens, step, prefix=prefix, suffix=suffix, window=window, reference=reference, expand=expand)
            expected, expected_lse = oracle.dense(query, key, value, mask, scale)
            assert (found - expected).abs().max() < 4e-6
            assert (found_lse - expected_lse).abs().max() < 4e-6

    run()


def test_any_memory_order_is_right(emulated):
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(0, 9, 16, 5)
    query, key, value = (torch.randn(1, span.length, 2, 64).transpose(1, 2) for _ in range(3))
    mask = oracle.token_mask(9, 16, 1, suffix=5, window=1, reference=4)
    expected, _ = oracle.dense(query, key, value, mask)
    for mixed in ((query.contiguous(), key, value), (query, key.contiguous(), value), (query, key, value.contiguous())):
        found, _ = lowering.attention_flashinfer(*mixed, *tables(pattern, span), torch.tensor(1, dtype=torch.int32))
        assert (found - expected).abs().max() < 4e-6


def test_one_plan_per_phase_serves_all_layers(emulated):
    pattern, span = FramePattern(12, 1, 1, 4), VideoSpan(0, 12, 16, 5)
    query, key, value = (torch.randn(1, span.length, 2, 64).transpose(1, 2) for _ in range(3))
    for _ in range(3):
        for step in range(pattern.phases):
            lowering.attention_flashinfer(query, key, value, *tables(pattern, span), torch.tensor(step, dtype=torch.int32))
    assert Wrapper.made == pattern.phases > 1


def test_a_dense_step_and_what_is_not_whole_frames_are_right_all_the_same(emulated):
    pattern, span = FramePattern(8, 1, 1, 3), VideoSpan(3, 8, 4, 0)
    query, key, value = (torch.randn(1, span.length, 2, 16).transpose(1, 2) for _ in range(3))
    bounds, ranges = tables(pattern, span, dense_row=True)
    found, _ = lowering.attention_flashinfer(query, key, value, bounds, ranges, torch.tensor(pattern.phases, dtype=torch.int32))
    assert (found - oracle.dense(query, key, value, torch.ones(35, 35, dtype=torch.bool))[0]).abs().max() < 4e-6
    ranges[0, 3, 0, 1] -= 1  # a frame attends all but a token
    mask = oracle.token_mask(8, 4, 0, prefix=3, window=1, reference=3)
    mask[11:15, int(ranges[0, 3, 0, 1])] = False
    found, _ = lowering.attention_flashinfer(query, key, value, bounds, ranges, torch.tensor(0, dtype=torch.int32))
    assert (found - oracle.dense(query, key, value, mask)[0]).abs().max() < 4e-6
    assert Wrapper.made == 0


def test_the_dtype_of_the_output_is_that_of_the_query(emulated):
    pattern, span = FramePattern(8, 1, 1, 3), VideoSpan(0, 8, 16, 0)
    query, key, value = (torch.randn(1, span.length, 2, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    found, _ = lowering.attention_flashinfer(query, key, value, *tables(pattern, span), torch.tensor(1, dtype=torch.int32))
    expected, _ = oracle.dense(query, key, value, oracle.token_mask(8, 16, 1, window=1, reference=3))
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 2e-2


def test_the_installed_flashinfer_takes_the_arguments_and_means_the_same(monkeypatch):
    """Its own ``plan`` and ``run`` on the CPU, with the compiled module replaced by paged attention as its documentation has it."""
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed")
    import flashinfer.sparse as real

    wrapper = flashinfer.BlockSparseAttentionWrapper
    assert {"sm_scale", "q_data_type", "kv_data_type", "o_data_type"} <= set(inspect.signature(wrapper.plan).parameters)
    asked = []

    def paged_run(workspace, integers, info, q, k, v, q_ends, k_ends, pages, last, out, lse, mode, layout, window, *others):
        scale = next(x for x in others if isinstance(x, float) and x == 0.3)
        assert (last == k.shape[1]).all()
        for row in range(len(q_ends) - 1):
            of_row = pages[k_ends[row] : k_ends[row + 1]].long()
            rows = slice(int(q_ends[row]), int(q_ends[row + 1]))
            keys, values = (t[of_row].flatten(0, 1).transpose(0, 1)[None] for t in (k, v))
            everything = torch.ones(rows.stop - rows.start, keys.shape[2], dtype=torch.bool)
            found, found_lse = oracle.dense(q[rows].transpose(0, 1)[None], keys, values, everything, scale)
            out[rows], lse[rows] = found[0].transpose(0, 1).to(out.dtype), (found_lse[0].T / math.log(2.0)).float()

    def module(backend, *arguments):
        asked.append((backend, arguments[:3]))
        return SimpleNamespace(plan=lambda *args: args, paged_run=paged_run)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
    monkeypatch.setattr(real, "get_batch_prefill_module", module)
    monkeypatch.setattr(real, "determine_attention_backend", lambda *args, **kwargs: "fa3")
    monkeypatch.setattr(real, "_get_cache_alibi_slopes_buf", lambda *args: None)
    monkeypatch.setattr(real, "device_support_pdl", lambda *args: False)
    monkeypatch.setattr(lowering, "_WORKSPACE_BYTES", 64)
    for cached in (lowering._planned, lowering._workspace):
        cached.cache_clear()
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(3, 9, 8, 2)
    query, key, value = (torch.randn(2, span.length, n, 64, dtype=torch.bfloat16).transpose(1, 2) for n in (4, 2, 2))
    for step in range(pattern.phases):
        phase = torch.tensor(step, dtype=torch.int32)
        found, found_lse = lowering.attention_flashinfer(query, key, value, *tables(pattern, span), phase, scale=0.3)
        expected, expected_lse = oracle.dense(
            query, key, value, oracle.token_mask(9, 8, step, prefix=3, suffix=2, window=1, reference=4), 0.3
        )
        assert (found.double() - expected).abs().max() < 3e-2  # rounded again where text is merged
        assert (found_lse - expected_lse).abs().max() < 2e-2
    assert set(asked) == {("fa3", (torch.bfloat16,) * 3)}
    for cached in (lowering._planned, lowering._workspace):
        cached.cache_clear()


def call(**more) -> AttentionCall:
    span = VideoSpan(0, 30, 24, 0)
    facts = dict(dtype=torch.bfloat16, batch=1, query_heads=2, key_heads=2, head_dim=64, value_dim=64, query=span, key=span)
    return attention_call(**{**facts, "device": torch.device("cuda"), "pattern": FramePattern(30), **more})


@pytest.mark.parametrize(("more", "why"), [
    (dict(dtype=torch.float32), "FlashInfer does not take torch.float32"),
    (dict(masked=True), "its blocks are whole frames, and a mask leaves out others"),
    (dict(head_dim=80, value_dim=80), "FlashInfer takes equal head dims of 64, 128 or 256, not 80 and 80"),
    (dict(key=VideoSpan(4, 30, 24, 0)), "query and key are not the same tokens"),
    (dict(query=VideoSpan(0, 30, 4, 0), key=VideoSpan(0, 30, 4, 0)), "frames of 4 tokens are too small for blocks, it wants 16"),
])  # fmt: skip
def test_what_it_refuses(more, why):
    assert lowering._refuses(call()) is None
    assert lowering._refuses(call(**more)) == why


def test_it_leaves_cuda_graphs_to_others():
    here = dataclasses.replace(lowering.LOWERING, unavailable=lambda device: None)
    assert here.refusal(call()) is None
    assert here.refusal(call(device_only=True)) == "it plans on the host, which CUDA graphs leave out"


def test_without_flashinfer_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda name: None)
    assert lowering._unavailable(torch.device("cuda")) == "flashinfer is not installed: pip install flashinfer-python"
