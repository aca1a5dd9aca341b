from __future__ import annotations

import oracle
import pytest
import torch
from flashinfer_emulation import instead_of_flashinfer
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import key_range_table

from lvsa_compile import FramePattern
from lvsa_compile.errors import ShapeError
from lvsa_compile.lowering.dense_merge import plan_of
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.select import lowerings

ELSEWHERE = ("triton", "flex")  # are tested: an interpreter is slow, and FlexAttention tells no log-sum-exp on the CPU
OF_RANGES = [found for found in lowerings() if found.op == "attention" and found.operator is not None]
OPERATORS = {found.name: found.operator for found in OF_RANGES if found.name not in ELSEWHERE}
FINEST = {name: torch.float32 if name in ("cpu", "flashinfer") else torch.float64 for name in OPERATORS}
"""The dtype that shows errors best, of those a lowering takes."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True, scope="module")
def emulated():
    with instead_of_flashinfer():
        yield


def tables(pattern: FramePattern, span: VideoSpan) -> tuple[torch.Tensor, torch.Tensor]:
    table = key_range_table(pattern, span, span)
    return torch.tensor(table.query_bounds, dtype=torch.int32), torch.tensor(table.key_ranges, dtype=torch.int32)


def tensors(batch, heads, key_heads, length, head_dim, dtype=torch.float32, order="BSHD"):
    shapes = [(batch, length, n, head_dim) for n in (heads, key_heads, key_heads)]
    made = [torch.randn(shape, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]
    return [t.contiguous() if order == "BHSD" else t for t in made]


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=40)
@given(
    frames=st.integers(2, 14),
    tokens=st.integers(1, 9),
    prefix=st.integers(0, 5),
    suffix=st.integers(0, 5),
    window=st.integers(0, 3),
    first=st.integers(1, 2),
    reference=st.integers(2, 8),
    expand=st.booleans(),
    group=st.sampled_from([1, 2]),
    step=st.integers(0, 9),
    scale=st.sampled_from([None, 0.3]),
)
def test_every_lowering_is_masked_attention(name, frames, tokens, prefix, suffix, window, first, reference, expand, group, step, scale):
    pattern = FramePattern(frames, window, first, reference, expand_window=expand)
    span = VideoSpan(prefix, frames, tokens, suffix)
    query, key, value = tensors(2, 2, 2 // group, span.length, 8, FINEST[name])
    phase = torch.tensor(step % pattern.phases, dtype=torch.int32)
    output, log_sum_exp = OPERATORS[name](query, key, value, *tables(pattern, span), phase, scale=scale)
    mask = oracle.token_mask(
        frames, tokens, step, prefix=prefix, suffix=suffix, window=window, first=first, reference=reference, expand=expand
    )
    expected, expected_lse = oracle.dense(query, key, value, mask, scale)
    assert (output - expected).abs().max() < TOLERANCE[FINEST[name]]
    assert (log_sum_exp - expected_lse).abs().max() < TOLERANCE[FINEST[name]]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_dtypes_and_head_dims(name, dtype, head_dim):
    if dtype == torch.float64 != FINEST[name]:
        pytest.skip("this lowering refuses float64")
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(3, 9, 8, 2)
    query, key, value = tensors(2, 2, 2, span.length, head_dim, dtype)
    output, log_sum_exp = OPERATORS[name](query, key, value, *tables(pattern, span), torch.tensor(1, dtype=torch.int32))
    mask = oracle.token_mask(9, 8, 1, prefix=3, suffix=2, window=1, reference=4)
    expected, expected_lse = oracle.dense(query, key, value, mask)
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() < TOLERANCE[dtype]
    assert (log_sum_exp.double() - expected_lse).abs().max() < max(TOLERANCE[dtype], 2e-6)


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=40)
@given(
    frames=st.integers(2, 9), tokens=st.integers(1, 5), suffix=st.integers(0, 6), step=st.integers(0, 5), batch=st.sampled_from([1, 2]),
    heads=st.sampled_from([1, 2]), kind=st.sampled_from(["bool", "float", "padding", "nothing"]), seed=st.integers(0, 99),
    open_ended=st.booleans(),
)  # fmt: skip
def test_masks_that_are_the_same_for_every_query(name, frames, tokens, suffix, step, batch, heads, kind, seed, open_ended):
    pattern, span = FramePattern(frames, 1, 1, 3), VideoSpan(0, frames, tokens, 0 if open_ended else suffix, open_ended)
    length = frames * tokens + suffix
    query, key, value = tensors(2, 2, 2, length, 8, FINEST[name])
    generator = torch.Generator().manual_seed(seed)
    key_mask = torch.rand(batch, heads, 1, length, generator=generator) > 0.4
    if kind == "padding":
        key_mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1, 1, 1), generator=generator)).expand(batch, 1, 1, length)
    if kind == "nothing":
        key_mask = torch.zeros(batch, 1, 1, length, dtype=torch.bool)
    if kind == "float":
        key_mask = torch.randn(batch, heads, 1, length, generator=generator).to(query.dtype).masked_fill(~key_mask, float("-inf"))
    phase = torch.tensor(step % pattern.phases, dtype=torch.int32)
    output, log_sum_exp = OPERATORS[name](query, key, value, *tables(pattern, span), phase, key_mask=key_mask)
    added = key_mask if kind == "float" else torch.zeros(key_mask.shape).masked_fill(~key_mask, float("-inf"))
    mask = oracle.token_mask(frames, tokens, step, suffix=suffix, window=1, reference=3)
    expected, expected_lse = oracle.dense(query, key, value, mask, added=added)
    assert (output - expected).abs().max() < TOLERANCE[FINEST[name]]
    assert torch.equal(log_sum_exp.isinf(), expected_lse.isinf())
    assert (log_sum_exp - expected_lse).nan_to_num(0.0).abs().max() < TOLERANCE[FINEST[name]]


@pytest.mark.parametrize("name", OPERATORS)
def test_key_ranges_of_any_shape(name):
    """Not only LVSA's tables: rows that share nothing, gaps, a block that attends everything in the middle."""
    bounds = torch.tensor([0, 3, 5, 9], dtype=torch.int32)
    ranges = torch.tensor([[[[[0, 2], [6, 7]], [[0, 9], [0, 0]], [[3, 4], [8, 9]]]]], dtype=torch.int32)
    query, key, value = tensors(1, 2, 2, 9, 16, FINEST[name])
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[0:3, [0, 1, 6]] = True
    mask[3:5] = True
    mask[5:9, [3, 8]] = True
    output, log_sum_exp = OPERATORS[name](query, key, value, bounds, ranges, torch.tensor(0, dtype=torch.int32))
    expected, expected_lse = oracle.dense(query, key, value, mask)
    assert (output - expected).abs().max() < TOLERANCE[FINEST[name]]
    assert (log_sum_exp - expected_lse).abs().max() < TOLERANCE[FINEST[name]]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("masked", [False, True])
def test_heads_may_have_key_ranges_of_their_own(name, masked):
    """Grouped queries, a mask per head; oracle: an explicit mask per head."""
    bounds = torch.tensor([0, 4, 10, 16], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 12, (2, 4, 3, 2), generator=generator)
    ranges = torch.stack([starts, starts + torch.randint(1, 5, starts.shape, generator=generator)], -1).int()
    query, key, value = tensors(2, 4, 2, 16, 16, FINEST[name])
    key_mask = (torch.rand(1, 4, 1, 16, generator=generator) < 0.8) if masked else None
    for row in range(2):
        mask = torch.zeros(4, 16, 16, dtype=torch.bool)
        for head, block, (start, end) in ((h, b, r) for h in range(4) for b in range(3) for r in ranges[row, h, b].tolist()):
            mask[head, bounds[block] : bounds[block + 1], start:end] = True
        found, found_lse = OPERATORS[name](query, key, value, bounds, ranges, torch.tensor(row, dtype=torch.int32), key_mask=key_mask)
        for head in range(4):
            added = None if key_mask is None else torch.zeros(1, 1, 1, 16).masked_fill(~key_mask[:, head : head + 1], float("-inf"))
            one, of_group = slice(head, head + 1), slice(head // 2, head // 2 + 1)
            expected, expected_lse = oracle.dense(query[:, one], key[:, of_group], value[:, of_group], mask[head], added=added)
            some = expected_lse != float("-inf")
            assert torch.equal(found_lse[:, one] != float("-inf"), some)
            assert (found[:, one] - expected.nan_to_num(0.0)).abs().max() < TOLERANCE[FINEST[name]]
            assert (found_lse[:, one] - expected_lse)[some].abs().max() < TOLERANCE[FINEST[name]]


@pytest.mark.parametrize("name", OPERATORS)
def test_key_ranges_without_an_axis_of_heads_are_an_error(name):
    query, key, value = tensors(1, 2, 2, 9, 16, FINEST[name])
    bounds, ranges = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([[[[0, 9]]]], dtype=torch.int32)
    with pytest.raises(
        ShapeError, match=r"key_ranges=\(1, 1, 1, 2\): not \[rows, heads or 1, query_blocks, ranges, 2\]. Give heads an axis"
    ):
        OPERATORS[name](query, key, value, bounds, ranges, torch.tensor(0, dtype=torch.int32))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
def test_any_memory_order_gives_right_values_in_sdpas_strides(name, axes):
    """A view after attention that works with SDPA must work with the op."""
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(0, 9, 4, 0)
    size = (2, 3, 36, 16)
    query, key, value = (torch.randn([size[a] for a in axes]).permute([axes.index(a) for a in range(4)]) for _ in range(3))
    output, _ = OPERATORS[name](query, key, value, *tables(pattern, span), torch.tensor(0, dtype=torch.int32))
    expected, _ = oracle.dense(query, key, value, oracle.token_mask(9, 4, 0, window=1, reference=4))
    assert (output - expected).abs().max() < 2e-6
    assert output.stride() == torch.nn.functional.scaled_dot_product_attention(query, key, value).stride()


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_computes_in_the_autocast_dtype_as_sdpa_does(name):
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(0, 9, 4, 0)
    query, key, value = tensors(1, 2, 2, 36, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = OPERATORS[name](query, key.bfloat16(), value, *tables(pattern, span), torch.tensor(0, dtype=torch.int32))
        assert output.dtype == torch.nn.functional.scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16
        if FINEST[name] != torch.float64:
            return
        doubles = [t.double() for t in (query, key, value)]
        assert OPERATORS[name](*doubles, *tables(pattern, span), torch.tensor(0, dtype=torch.int32))[0].dtype == torch.float64


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(2, 9, 4, 1)
    query, key, value = tensors(1, 2, 1, 39, 16)
    torch.library.opcheck(OPERATORS[name], (query, key, value, *tables(pattern, span), torch.tensor(0, dtype=torch.int32)), {"scale": 0.2})


@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_without_keys_gives_zero(name):
    query, key, value = (torch.randn(1, 2, 12, 8) for _ in range(3))
    bounds = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    ranges = torch.tensor([[[[[0, 12]], [[0, 0]], [[4, 8]]]]], dtype=torch.int32)
    for _ in range(3):
        output, log_sum_exp = OPERATORS[name](query, key, value, bounds, ranges, torch.tensor(0, dtype=torch.int32))
        mask = torch.zeros(12, 12, dtype=torch.bool)
        mask[:4], mask[8:, 4:8] = True, True
        answer, answer_lse = oracle.dense(query, key, value, mask)
        assert torch.allclose(output.double(), answer, atol=1e-5)
        assert torch.allclose(log_sum_exp.double(), answer_lse, atol=1e-5)


def test_windows_come_in_few_batches_of_few_shapes():
    """121 latent frames under Wan's pattern: what docs/architecture.md says of ``dense_merge``."""
    pattern, span = FramePattern(121), VideoSpan(0, 121, 10, 0)
    bounds, ranges = tables(pattern, span)
    shapes, calls = set(), []
    for (of_phase,) in ranges:
        plan = plan_of(bounds.numpy().tobytes(), of_phase.contiguous().numpy().tobytes(), ranges.shape[3], span.length, span.length)
        assert not plan.others
        calls.append(len(plan.windows))
        shapes |= {(batch.rows, batch.row_step, batch.keys, batch.key_step, batch.count) for batch in plan.windows}
    assert set(calls) == {11, 12}
    assert len(shapes) == 10


def test_what_plans_on_the_host_is_never_recorded_in_a_cuda_graph():
    for lowering in lowerings():
        if lowering.operator is not None:
            assert (torch.Tag.cudagraph_unsafe in lowering.operator.tags) == lowering.plans_on_host
