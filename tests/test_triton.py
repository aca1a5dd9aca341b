"""The Triton kernels under Triton's interpreter, which runs them on the CPU one program at a time, against attention by definition."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import oracle
import pytest
import torch
from choosing_oracle import check_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import attention_call, key_range_table, tables_of_body
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from lvsa_compile import FramePattern
from lvsa_compile.cli import app
from lvsa_compile.errors import TargetError
from lvsa_compile.kernels import inspection
from lvsa_compile.kernels.configurations import Configuration, column_widths
from lvsa_compile.lowering import triton as lowering
from lvsa_compile.lowering.shared import dense_kernels
from lvsa_compile.lowering.shared import triton_lists as lists
from lvsa_compile.lowering.triton_blocks import block_attention_triton
from lvsa_compile.policies.block_choice import packed
from lvsa_compile.policies.tables import VideoSpan

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3}  # Triton's interpreter multiplies no bfloat16


def tables(pattern: FramePattern, span: VideoSpan) -> tuple[torch.Tensor, torch.Tensor]:
    table = key_range_table(pattern, span, span)
    return tables_of_body(table)


def number(n: int) -> torch.Tensor:
    return torch.tensor(n, dtype=torch.int32)


def walked(schedule, query_bounds, keys, block_n, sample=0):
    """How often each row attends each key by the lists, int ``[rows, keys]``, and for which keys of a tile the mask is asked."""
    tiles, bounds = schedule.tiles[sample].tolist(), query_bounds.tolist()
    rows = max((tile[1] for tile in tiles), default=0)
    attended, asked = torch.zeros(rows, keys, dtype=torch.int64), torch.zeros(rows, keys, dtype=torch.bool)
    for tile, (first, end, first_block, segments, first_segment, first_item, last_item) in enumerate(tiles):
        plain, others = schedule.listed[sample, tile].tolist()
        items, segment_of = (each[sample, first_item:last_item].tolist() for each in (schedule.items, schedule.segment_of))
        assert plain + others < len(items)
        if tile + 1 < len(tiles) and first < end and tiles[tile + 1][0] < tiles[tile + 1][1]:  # each has room of its own
            assert first_segment + segments <= tiles[tile + 1][4]
            assert last_item <= tiles[tile + 1][5]
        assert schedule.order.shape[1] == len(tiles)
        for item in items[:plain]:
            assert item % 256 == block_n
            attended[first:end, item // 256 : item // 256 + block_n] += 1
        for place in range(len(items) - others, len(items)):
            start, valid = divmod(items[place], 256)
            segment = segment_of[place]
            assert 0 <= segment < segments
            assert 0 < valid <= block_n
            assert start + valid <= keys
            words = schedule.segments[sample, first_segment + segment, 3:].tolist()
            asked[first:end, start : start + valid] = True
            for row in range(first, end):
                block = sum(bound <= row for bound in bounds[1:]) - first_block
                attended[row, start : start + valid] += words[block // 32] >> block % 32 & 1
    return attended, asked


@settings(max_examples=40)
@given(
    tokens=st.sampled_from([1, 2, 5, 15, 16, 17, 40]), frames=st.integers(1, 12), prefix=st.integers(0, 20), suffix=st.integers(0, 20),
    reference=st.integers(1, 8), window=st.integers(0, 2), step=st.integers(0, 9), cut=st.integers(0, 30), rows=st.sampled_from([16, 32]),
)  # fmt: skip
def test_a_schedule_lists_what_the_rows_of_each_tile_attend(tokens, frames, prefix, suffix, reference, window, step, cut, rows):
    """``cut`` shortens the sequences, as open-ended tables meet them."""
    pattern, span = FramePattern(frames, window, 1, reference), VideoSpan(prefix, frames, tokens, suffix)
    step %= pattern.phases
    length = max(1, span.length - cut)
    mask = oracle.token_mask(frames, tokens, step, prefix=prefix, suffix=suffix, window=window, reference=reference)[:length, :length]
    bounds, ranges = tables(pattern, span)
    schedule = lists.make_schedule(bounds, ranges, number(step), length, length, Configuration(rows, 16, 4, 1))
    assert torch.equal(walked(schedule, bounds, length, 16)[0], mask.long())
    work = schedule.listed[0].sum(-1)[schedule.order[0]].tolist()
    assert sorted(schedule.order[0].tolist()) == list(range(-(-length // rows)))
    assert work == sorted(work, reverse=True)
    for tile, (plain, _) in enumerate(schedule.listed[0].tolist()):  # as many without a test as fit into stretches that all rows attend
        everyone = mask[tile * rows : (tile + 1) * rows].all(0).tolist()
        assert plain == sum(len(list(run)) // 16 for attends, run in itertools.groupby(everyone) if attends)


@settings(max_examples=60)
@given(
    samples=st.integers(1, 3), heads=st.integers(1, 2), keys=st.integers(1, 70), places=st.lists(st.integers(0, 69), max_size=6),
    values=st.lists(st.sampled_from([0.0, 1.5, float("-inf")]), min_size=6, max_size=6),
    valid=st.lists(st.integers(0, 70), min_size=3, max_size=3),
)  # fmt: skip
def test_a_schedule_walks_what_counts_and_asks_the_mask_where_it_says_anything(samples, heads, keys, places, values, valid):
    mask = torch.zeros(samples, heads, 1, keys)
    for n, place in enumerate(places):
        mask[n % samples, n % heads, 0, place % keys] = values[n]
    for sample in range(samples):
        mask[sample, ..., valid[sample] :] = float("-inf")
    bounds, ranges = (
        torch.tensor([0, 16, 40], dtype=torch.int32),
        torch.tensor([[[[0, 50], [0, 0]], [[10, 30], [40, 70]]]], dtype=torch.int32),
    )
    schedule = lists.make_schedule(bounds, ranges, number(0), 40, keys, Configuration(32, 16, 4, 1), mask)
    assert schedule.order.shape == (samples, 2)
    attended = torch.zeros(40, keys, dtype=torch.bool)
    attended[:16, :50], attended[16:, 10:30], attended[16:, 40:70] = True, True, True
    for sample in range(samples):
        found, asked = walked(schedule, bounds, keys, 16, sample)
        counts, says = (mask[sample] > float("-inf")).any(0)[0], (mask[sample] != 0).any(0)[0]
        last = int(counts.nonzero().max()) if counts.any() else -1
        assert torch.equal(found[:, : last + 1], attended[:, : last + 1].long())  # once, and nothing that counts is left out
        assert not found[:, last + 1 :].any()
        assert not ((found > 0) & says & ~asked).any()


@settings(max_examples=40)
@given(data=st.data())
def test_a_schedule_lists_the_blocks_that_are_kept(data):
    """Per head, in frames and text of a table, and all of them where a step is dense."""
    draw = data.draw
    query_block, key_block = draw(st.sampled_from([16, 24, 90])), draw(st.sampled_from([3, 8, 16, 24, 40]))
    prefix, tokens, suffix = draw(st.sampled_from([0, 1, 7, 16])), draw(st.integers(1, 90)), draw(st.sampled_from([0, 5]))
    length, heads, moment = prefix + tokens + suffix, draw(st.integers(1, 2)), draw(st.sampled_from([0, 1, 1, 1]))
    rows, columns = -(-tokens // query_block), -(-tokens // key_block)
    whole = draw(st.booleans())
    bounds = sorted({0, prefix, prefix + tokens, length, *(draw(st.integers(0, length)) for _ in range(0 if whole else 3))})
    cuts = [[0, length, 0, 0] if whole else sorted(draw(st.integers(0, length)) for _ in range(4)) for _ in bounds[1:]]
    table = torch.tensor([[[cut[:2], cut[2:]] for cut in cuts]], dtype=torch.int32)
    attended = torch.zeros(length, length, dtype=torch.bool)
    for (first, end), cut in zip(itertools.pairwise(bounds), cuts, strict=True):
        attended[first:end, cut[0] : cut[1]], attended[first:end, cut[2] : cut[3]] = True, True
    kept = torch.rand(1, heads, rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < draw(
        st.sampled_from([0.2, 0.5, 0.9])
    )
    blocks = lists.Blocks(packed(kept), number(moment), query_block, key_block, prefix, prefix, tokens)
    of_rows = torch.tensor(bounds, dtype=torch.int32)
    tile = Configuration(draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32])), 4, 1)
    schedule = lists.make_schedule(of_rows, table, number(0), length, length, tile, None, blocks)
    assert schedule.items.shape[0] == heads
    for head in range(heads):
        expected = attended.clone()
        if moment == 1:
            of_tokens = kept[0, head].repeat_interleave(query_block, 0)[:tokens].repeat_interleave(key_block, 1)[:, :tokens]
            expected[prefix : prefix + tokens, prefix : prefix + tokens] &= of_tokens
        of_head = dataclasses.replace(
            schedule, segments=schedule.segments.expand(heads, -1, -1), tiles=schedule.tiles.expand(heads, -1, -1)
        )
        assert torch.equal(walked(of_head, of_rows, length, tile.block_n, head)[0], expected.long())


@settings(max_examples=6)
@given(data=st.data())
def test_steps_that_choose_blocks_are_those_of_the_definition(data):
    check_steps(data.draw, [block_attention_triton], most_tokens=40, blocks=[3, 16, 24])


@pytest.mark.parametrize("described", [False, True])
@settings(max_examples=12)
@given(
    tokens=st.sampled_from([1, 3, 16, 21]), frames=st.integers(2, 9), prefix=st.integers(0, 9), suffix=st.integers(0, 9),
    reference=st.integers(1, 6), window=st.integers(0, 2), step=st.integers(0, 9), group=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([8, 16, 24, 48]), scale=st.sampled_from([None, -0.3, 0.0]),
    kind=st.sampled_from(["none", "padding", "nothing", "added"]),
)  # fmt: skip
def test_attention_is_that_of_the_mask(described, tokens, frames, prefix, suffix, reference, window, step, group, head_dim, scale, kind):
    torch.manual_seed(0)
    pattern, span = FramePattern(frames, window, 1, reference), VideoSpan(prefix, frames, tokens, suffix)
    step, length = step % pattern.phases, span.length
    query, key, value = (torch.randn(2, length, n, head_dim).transpose(1, 2) for n in (2, 2 // group, 2 // group))
    lengths = torch.tensor([length, length // 2]).reshape(2, 1, 1, 1)
    key_mask = {
        "none": None,
        "padding": torch.arange(length).expand(2, 1, 1, length) < lengths,
        "nothing": torch.zeros(2, 1, 1, length, dtype=torch.bool),
        "added": torch.randn(1, 2, 1, length),
    }[kind]
    with pytest.MonkeyPatch.context() as patched:
        if not described:
            patched.setattr(lowering, "_describable", lambda tensor: False)
        found, found_lse = lowering.attention_triton(
            query, key, value, *tables(pattern, span), number(step), scale=scale, key_mask=key_mask
        )
    mask = oracle.token_mask(frames, tokens, step, prefix=prefix, suffix=suffix, window=window, reference=reference)
    added = key_mask if kind in ("none", "added") else torch.zeros(key_mask.shape).masked_fill(~key_mask, float("-inf"))
    expected, expected_lse = oracle.dense(query, key, value, mask, scale, added=added)
    assert (found.double() - expected).abs().max() < 4e-6
    assert torch.equal(found_lse.isinf(), expected_lse.isinf())
    assert (found_lse - expected_lse).nan_to_num(0.0).abs().max() < 4e-6


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_dtypes_head_dims_and_a_fused_projection(dtype, head_dim, described, monkeypatch):
    """Query, key and value as slices of one tensor: strides that are none of a tensor of their own."""
    if not described:
        monkeypatch.setattr(lowering, "_describable", lambda tensor: False)
    pattern, span = FramePattern(7, 1, 1, 3), VideoSpan(0, 7, 9, 4)
    query, key, value = torch.randn(1, span.length, 3, 2, head_dim).to(dtype).permute(2, 0, 3, 1, 4)
    found, found_lse = lowering.attention_triton(query, key, value, *tables(pattern, span), number(1))
    expected, expected_lse = oracle.dense(query, key, value, oracle.token_mask(7, 9, 1, suffix=4, window=1, reference=3))
    assert found.dtype == dtype
    assert found_lse.dtype == torch.float32
    assert (found.double() - expected).abs().max() < TOLERANCE[dtype]
    assert (found_lse - expected_lse).abs().max() < max(TOLERANCE[dtype], 4e-6)


def test_what_a_tensor_descriptor_can_tell():
    plain = torch.zeros(2, 10, 3, 64, dtype=torch.float16)
    assert lowering._describable(plain.transpose(1, 2))
    assert not lowering._describable(plain[..., 1:])  # starts between two places
    assert not lowering._describable(plain[..., ::2])  # columns apart
    assert not lowering._describable(torch.zeros(2, 3, 10, 68, dtype=torch.float16))  # rows 136 bytes apart
    assert not lowering._describable(plain[:1].expand(2, -1, -1, -1).transpose(1, 2))  # two samples in one place
    assert lowering._describable(torch.zeros(1, 3, 10, 64, dtype=torch.float16).as_strided((1, 3, 10, 64), (7, 640, 64, 1)))


def test_nothing_is_asked_of_the_host_and_the_phase_is_read_on_the_device():
    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
            return function(*args, **(kwargs or {}))

    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(2, 9, 5, 3)
    query, key, value = (torch.randn(1, span.length, 2, 16).transpose(1, 2) for _ in range(3))
    phase, key_mask = number(0), torch.arange(span.length).reshape(1, 1, 1, -1) < span.length - 2
    for step in range(pattern.phases):
        phase.fill_(step)
        with Watched():
            found, _ = lowering.attention_triton(query, key, value, *tables(pattern, span), phase, key_mask=key_mask)
        mask = oracle.token_mask(9, 5, step, prefix=2, suffix=3, window=1, reference=4)
        added = torch.zeros(key_mask.shape).masked_fill(~key_mask, float("-inf"))
        assert (found - oracle.dense(query, key, value, mask, added=added)[0]).abs().max() < 4e-6


def test_measuring_prefers_the_fastest_configuration_for_calls_of_its_kind(monkeypatch):
    listed = (Configuration(16, 16, 4, 1), Configuration(32, 16, 4, 1), Configuration(16, 32, 4, 1))
    monkeypatch.setattr(lowering, "_listed", lambda device, head_dim, dtype, described: (listed, described))
    monkeypatch.setattr(lowering, "_preferred", {})
    span = VideoSpan(0, 9, 5, 3)
    call = attention_call(torch.device("cpu"), torch.float32, 1, 2, 2, 16, 16, span, span, FramePattern(9, 1, 1, 4))
    query = torch.randn(1, span.length, 2, 16).transpose(1, 2)
    took = {"16x16 4/1": 3.0, "32x16 4/1": 1.0, "16x32 4/1": 2.0}
    assert lowering._chosen(query, span.length, True) == (listed[0], True)
    assert lowering._tuned(call, lambda setup: took[setup]) == 1.0
    assert lowering._chosen(query, span.length, True) == (listed[1], True)
    assert lowering._chosen(query, 10 * span.length, True) == (listed[0], True)  # another class of length
    bounds, ranges = tables(call.plan.frames, span)
    found, _ = lowering.attention_triton(query, query, query, bounds, ranges, number(0))
    assert (found - oracle.dense(query, query, query, oracle.token_mask(9, 5, 0, suffix=3, window=1, reference=4))[0]).abs().max() < 4e-6


def test_a_configuration_that_fails_is_not_preferred(monkeypatch):
    listed = (Configuration(16, 16, 4, 1), Configuration(32, 16, 4, 1))
    monkeypatch.setattr(lowering, "_listed", lambda device, head_dim, dtype, described: (listed, described))
    monkeypatch.setattr(lowering, "_preferred", {})
    span = VideoSpan(0, 9, 5, 3)
    call = attention_call(torch.device("cpu"), torch.float32, 1, 2, 2, 16, 16, span, span, FramePattern(9, 1, 1, 4))

    def failing(setup, which=("32x16 4/1",)):
        if setup in which:
            raise RuntimeError("out of shared memory")
        return 1.0

    assert lowering._tuned(call, failing) == 1.0
    assert set(lowering._preferred.values()) == {listed[0]}
    with pytest.raises(RuntimeError, match="out of shared memory"):
        lowering._tuned(call, lambda setup: failing(setup, ("16x16 4/1", "32x16 4/1")))
    assert lowering._preferred == {}


def test_a_mask_of_the_least_finite_number_is_finite():
    """What models write for "not this key": where all keys of a row have it, it says nothing."""
    query, key, value = (torch.randn(1, 2, 40, 16) for _ in range(3))
    bounds, ranges = torch.tensor([0, 40], dtype=torch.int32), torch.tensor([[[[0, 40]]]], dtype=torch.int32)
    key_mask = torch.full((1, 1, 1, 40), torch.finfo(torch.float32).min)
    found, _ = lowering.attention_triton(query, key, value, bounds, ranges, number(0), key_mask=key_mask)
    assert (found - value.mean(2, keepdim=True)).abs().max() < 4e-6


def test_rows_that_may_attend_nothing():
    query, key, value = (torch.randn(1, 2, 40, 16) for _ in range(3))
    bounds, ranges = torch.tensor([0, 10, 20, 40], dtype=torch.int32), torch.tensor([[[[0, 40]], [[0, 0]], [[4, 8]]]], dtype=torch.int32)
    found, found_lse = lowering.attention_triton(query, key, value, bounds, ranges, number(0))
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:10], mask[20:, 4:8] = True, True
    expected, expected_lse = oracle.dense(query, key, value, mask)
    assert (found[:, :, 10:20] == 0).all()
    assert (found.double() - expected).abs().max() < 4e-6
    assert torch.equal(found_lse.isinf(), expected_lse.isinf())


@pytest.mark.parametrize(("head_dim", "widths"), [
    (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0)), (192, (128, 64)), (8, (16, 0)), (24, (32, 0)), (72, (128, 0)),
])  # fmt: skip
def test_head_dims_as_powers_of_two(head_dim, widths):
    assert column_widths(head_dim) == widths


def test_what_it_refuses_and_why(monkeypatch):
    span = VideoSpan(0, 30, 12, 0)

    def call(dtype=torch.bfloat16, head_dim=64, value_dim=64):
        return attention_call(torch.device("cuda"), dtype, 1, 2, 2, head_dim, value_dim, span, span, FramePattern(30))

    assert lowering._refuses(call()) is None
    assert lowering._refuses(call(dtype=torch.float64)) == "its kernel computes in float32, not in torch.float64"
    assert lowering._refuses(call(value_dim=32)) == "its kernel wants equal head dims, not 64 and 32"
    assert lowering._refuses(call(head_dim=320, value_dim=320)) == "its kernel takes head dims up to 256, not 320"
    assert lowering._unavailable(torch.device("cpu")) is None  # under the interpreter
    monkeypatch.delenv("TRITON_INTERPRET")
    assert lowering._unavailable(torch.device("cpu")) == "it runs on cuda, not on cpu"
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda name: None)
    assert lowering._unavailable(torch.device("cuda")) == "triton is not installed"


@pytest.mark.process
def test_the_kernel_compiles_for_a_device_that_is_not_here():
    """The whole compiler, in a process without the interpreter: matrix instructions come out, and shared memory that the part has."""
    code = """
from lvsa_compile.kernels.inspection import inspect
for target in ("cuda:80", "cuda:90"):
    found = next(inspect([target], [128], ["bf16"]))
    shared = 2**15 < found.shared_bytes < 2**18
    print(target, found.registers > 100, found.matrix_instructions > 10, shared, "compile" in str(found.problems))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.splitlines() == ["cuda:80 True True True False", "cuda:90 True True True False"], run.stderr


@pytest.mark.process
def test_the_small_kernels_compile_for_devices_that_are_not_here():
    code = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lvsa_compile.kernels.triton_mass import mass_kernel
from lvsa_compile.kernels.triton_merge import merge_kernel
from lvsa_compile.kernels.triton_schedule import items_kernel, segments_kernel
constants = {
    segments_kernel: {"BLOCK_M": 128, "BLOCKS": 64, "RANGES": 16, "WORDS": 2, "HAS_MASK": True},
    items_kernel: {"WORDS": 2, "BLOCK_N": 64, "HAS_BLOCKS": True, "BY_BLOCK": False, "PER_BLOCK": 2, "AHEAD": 1},
    mass_kernel: {"BLOCK_M": 128, "BLOCK_N": 128, "HEAD_DIM": 96, "WIDTH_0": 64, "WIDTH_1": 32, "WORDS": 2,
                  "HAS_MASK": True, "STRADDLES": True, "PRECISION": "ieee"},
    merge_kernel: {"WIDTH": 96, "COLUMNS": 128},
}
pointers = {name: "*bf16" for name in ("output", "part", "query", "key")} | {"kept": "*u8", "scale": "fp32"}
pointers |= {name: "*fp32" for name in ("log_sum_exp", "part_lse", "mass", "key_mask")}
tables = ("query_bounds", "key_ranges", "phase", "mask_zones", "segments", "tiles", "items", "segment_of", "listed", "work", "moment")
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)):
    for kernel, fixed in constants.items():
        types = {name: "*i32" for name in tables} | pointers | {name: "constexpr" for name in fixed}
        compile(ASTSource(kernel, {name: types.get(name, "i32") for name in kernel.arg_names}, fixed), target=target)
        print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.split() == ["compiled"] * 16, run.stderr


def test_a_target_that_is_not_known_is_named_with_those_that_are():
    with pytest.raises(TargetError) as raised:
        next(inspection.inspect(["cuda:70"]))
    assert str(raised.value) == ("target 'cuda:70': unknown. Name some of: cuda:80, cuda:89, cuda:90, cuda:100, cuda:120, hip:gfx942.")


@pytest.mark.parametrize(("problems", "code"), [((), 0), (("spills 8 bytes",), 1)])
def test_the_exit_code_says_whether_a_variant_has_a_problem(monkeypatch, problems, code):
    variant = inspection.Compiled("cuda:90", "bf16", 128, False, True, Configuration(128, 128, 8, 2), 255, 8, 180224, 44, problems)
    asked = []
    monkeypatch.setattr(inspection, "inspect", lambda targets: asked.append(targets) or [variant])
    run = CliRunner().invoke(app, ["kernels", "--target", "cuda:90", "cuda:100", "--json"])
    assert run.exit_code == code
    assert asked == [["cuda:90", "cuda:100"]]
    (printed,) = json.loads(run.stdout)
    shown = CliRunner().invoke(app, ["kernels", "--target", "cuda:90"]).stdout
    assert "44 wgmma" in shown
    assert "descriptor" in shown
    assert (printed["registers"], printed["problems"]) == (255, list(problems))


@settings(max_examples=15)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 3), rows=st.integers(1, 40), width=st.sampled_from([8, 24, 64]),
    empty=st.sampled_from(["none", "first", "second", "both"]), dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_merging_two_answers_is_attention_over_all_their_keys(batch, heads, rows, width, empty, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, n, heads, width).transpose(1, 2) for n in (rows, 30, 30))
    kept = {"none": (10, 10), "first": (0, 10), "second": (10, 10), "both": (0, 0)}[empty]
    last = 10 if empty in ("second", "both") else 30
    parts = [slice(0, kept[0]), slice(kept[1], last)]
    answers = []
    for part in parts:
        mask = torch.zeros(rows, 30, dtype=torch.bool)
        mask[:, part] = True
        answers.append(oracle.dense(query, key, value, mask))
    (output, lse), (part, part_lse) = [(o.to(dtype), lse.float()) for o, lse in answers]
    dense_kernels._merge_by_triton(output, lse, part, part_lse)
    mask = torch.zeros(rows, 30, dtype=torch.bool)
    mask[:, parts[0]], mask[:, parts[1]] = True, True
    expected, expected_lse = oracle.dense(query, key, value, mask)
    assert (output - expected).abs().max() < TOLERANCE[dtype]
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert (lse - expected_lse).nan_to_num(0.0).abs().max() < 4e-6
