"""The C++ kernel where it is cut into tiles, waves and panels, against attention in float64; and what happens where it cannot be built."""

from __future__ import annotations

import itertools
import subprocess
import sys

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import attention_call
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise

import lvsa_compile
from lvsa_compile import FramePattern, compat
from lvsa_compile.errors import CpuKindError
from lvsa_compile.lowering import cpu
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.contract import AttentionCall
from lvsa_compile.selection.cpu_kind import KINDS, compiler_flags, cpu_kind, of_machine
from lvsa_compile.selection.select import select

pytestmark = pytest.mark.kernel
PHASE = torch.tensor(0, dtype=torch.int32)


def sparse(query, key, value, bounds, ranges, **more):
    table = [torch.tensor(rows, dtype=torch.int32) for rows in (bounds, [[ranges]])]
    return torch.ops.lvsa.attention_cpu(query, key, value, *table, PHASE, **more)


def mask_of(bounds, ranges, queries, keys):
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for (start, end), of_block in zip(itertools.pairwise(bounds), ranges, strict=True):
        for low, high in of_block:
            mask[start:end, low:high] = True
    return mask


def assert_close(found, expected, tolerance=3e-6):
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got.isinf(), wanted.isinf())
        assert (got.double() - wanted).nan_to_num(0.0).abs().max() < tolerance * max(1.0, wanted.nan_to_num(0.0, 0.0, 0.0).abs().max())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ranges_blocks_and_widths(data):
    """Blocks from one row to several tiles, ranges from nothing to several blocks of keys, head dims that fill no panel."""
    draw = data.draw
    keys = draw(st.integers(1, 700))
    lengths = draw(st.lists(st.sampled_from([1, 2, 5, 11, 12, 13, 40, 119, 120, 121, 250]), min_size=1, max_size=6))
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    widest = draw(st.integers(1, 4))
    ranges = []
    for _ in lengths:
        cuts = sorted(draw(st.lists(st.integers(0, keys), min_size=2 * widest, max_size=2 * widest)))
        ranges.append(
            [[0, keys], *[[0, 0]] * (widest - 1)] if draw(st.integers(0, 4)) == 0 else [cuts[i : i + 2] for i in range(0, 2 * widest, 2)]
        )
    batch, key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    head_dim, value_dim = draw(st.sampled_from([1, 8, 24, 33, 64, 256])), draw(st.sampled_from([1, 16, 40, 128, 256]))
    scale = draw(st.sampled_from([None, 0.0, -0.7, 0.2]))
    torch.manual_seed(draw(st.integers(0, 9)))
    dtype, tolerance = draw(st.sampled_from([(torch.float32, 3e-6), (torch.bfloat16, 1e-2)]))
    query = torch.randn(batch, key_heads * group, bounds[-1], head_dim, dtype=dtype)
    key, value = (torch.randn(batch, key_heads, keys, width, dtype=dtype) for width in (head_dim, value_dim))
    added, more = None, {}
    if draw(st.booleans()):
        added = torch.randn(draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, key_heads * group])), 1, keys)
        added = added.masked_fill(torch.rand(keys) < 0.2, float("-inf"))
        more = dict(key_mask=added)
    threads = torch.get_num_threads()
    torch.set_num_threads(draw(st.integers(1, 3)))
    try:
        found = sparse(query, key, value, bounds, ranges, scale=scale, **more)
    finally:
        torch.set_num_threads(threads)
    of_scores = max(1.0, abs(scale or 0.0) * head_dim**0.5)  # rounding of a score counts as much as the score is large
    expected = oracle.dense(query, key, value, mask_of(bounds, ranges, bounds[-1], keys), scale, added=added)
    assert_close(found, expected, tolerance * of_scores)


def test_an_answer_does_not_depend_on_threads_or_on_other_heads():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 5, 400, 48) for _ in range(3))
    table = [0, 130, 260, 400], [[[0, 50], [130, 300]], [[0, 50], [260, 400]], [[0, 400], [0, 0]]]
    answers = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        answers.append(sparse(query, key, value, *table)[0])
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    alone = sparse(*(t[1:, 3:4] for t in (query, key, value)), *table)[0]
    assert torch.equal(alone, answers[0][1:, 3:4])


def test_large_and_tiny_scores():
    """Scores over hundreds of powers of two: neither overflow nor a lost row."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 300, 16) * s for s in (40.0, 40.0, 1.0))
    table = [0, 300], [[[7, 290]]]
    found = sparse(query, key, value, *table)
    expected = oracle.dense(query, key, value, mask_of(*table, 300, 300))
    assert (found[0].double() - expected[0]).abs().max() < 2e-3  # scores near 7000 carry errors of 5e-4
    assert (found[1].double() / expected[1] - 1).abs().max() < 3e-7


def test_keys_outside_the_ranges_may_hold_anything():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 70, 8) for _ in range(3))
    bounds, ranges = [0, 35, 70], [[[3, 20], [40, 50]], [[3, 20], [50, 63]]]
    expected = sparse(query, key, value, bounds, ranges)
    for spoilt in (float("nan"), float("inf")):
        for tensor in (key, value):
            tensor[:, :, [0, 1, 2, 20, 39, 63, 69]] = spoilt
        assert all(torch.equal(a, b) for a, b in zip(sparse(query, key, value, bounds, ranges), expected, strict=True))


def test_what_is_not_finite_is_seen():
    query, key, value = (torch.randn(1, 1, 40, 8) for _ in range(3))
    query[0, 0, 3, 2] = float("nan")
    value[0, 0, 5, 1] = float("inf")
    output, _ = sparse(query, key, value, [0, 40], [[[0, 39]]])
    assert output[0, 0, 3].isnan().all()
    assert (output[0, 0, [0, 39], 1] == float("inf")).all()
    assert output[0, 0, 0, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    """Inputs are exact, so the error is that of rounding weights and the answer: no more than dense attention's."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 500, 64, dtype=dtype) for _ in range(3))
    table = [0, 500], [[[0, 499]]]
    expected, _ = oracle.dense(query, key, value, mask_of(*table, 500, 500))
    ours = (sparse(query, key, value, *table)[0].double() - expected).abs().max()
    dense = (torch.nn.functional.scaled_dot_product_attention(query, key[:, :, :499], value[:, :, :499]).double() - expected).abs().max()
    assert ours <= dense * 1.1


def test_nothing_to_compute():
    for batch, queries, keys in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        query, key = torch.randn(batch, 2, queries, 8), torch.randn(batch, 2, keys, 8)
        output, log_sum_exp = sparse(query, key, key, [0, queries], [[[0, 9]]])
        assert output.shape == query.shape
        assert (output == 0).all()
        assert (log_sum_exp == float("-inf")).all()


def call_of(**more) -> AttentionCall:
    span = VideoSpan(0, 30, 12, 0)
    facts = dict(device=torch.device("cpu"), dtype=torch.float32, batch=1, query_heads=2, key_heads=2, head_dim=64, value_dim=64)
    return attention_call(**{**facts, **more}, query=span, key=span, pattern=FramePattern(30))


@pytest.mark.parametrize(("more", "why"), [
    (dict(dtype=torch.float64), "its kernel computes in float32, not in torch.float64"),
    (dict(head_dim=320, value_dim=320), "its kernel takes head dims up to 256, not 320"),
])  # fmt: skip
def test_what_the_kernel_does_not_take_goes_to_the_dense_kernel_and_merge(more, why):
    choice = select(call_of(**more))
    assert choice.lowering.name == "dense_merge"
    assert dict(choice.passed_over)["cpu"] == why


@pytest.fixture
def on_machine(monkeypatch):
    """Plays a machine with the features of a kind of CPU, whatever this one has: for decisions, no kernel is run."""

    def play(kind):
        have = KINDS.index(kind)
        monkeypatch.setattr(compat, "cpu_features", lambda: tuple(place < have for place in range(3)))
        monkeypatch.delenv("LVSA_CPU", raising=False)
        of_machine.cache_clear()

    yield play
    monkeypatch.undo()
    of_machine.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [True, False])
def test_matrix_units_are_used_where_the_kernel_lets_us(kind, tiles, on_machine, monkeypatch):
    monkeypatch.setattr(cpu, "_why_not", lambda kind: None)
    monkeypatch.setattr(cpu, "_has_tiles", lambda: tiles)
    on_machine(kind)
    half = select(call_of(dtype=torch.bfloat16))
    left_to_dense = kind == "amx" and not tiles
    assert half.lowering.name in (["dense_merge"] if left_to_dense else ["cpu", "dense_merge"] if kind == "plain" else ["cpu"])
    why = "dense attention in bfloat16 uses the matrix units of this CPU, and its own kernel was not let use them"
    assert dict(half.passed_over).get("cpu") == (why if left_to_dense else None)
    assert select(call_of()).lowering.name == "cpu" or kind == "plain"


def test_the_variable_hides_and_never_adds(on_machine, monkeypatch):
    on_machine("avx512")
    for wanted, played in (("plain", "plain"), ("avx2", "avx2"), ("avx512", "avx512"), ("amx", "avx512"), ("", "avx512")):
        monkeypatch.setenv("LVSA_CPU", wanted)
        assert cpu_kind() == played
    assert [bool(compiler_flags(kind)) for kind in KINDS[:3]] == [True, True, False]
    monkeypatch.setenv("LVSA_CPU", "sse")
    with pytest.raises(CpuKindError, match="environment variable LVSA_CPU='sse': no kind of CPU"):
        cpu_kind()


def test_a_kernel_for_another_kind_is_another_library(played_cpu):
    assert cpu_kind() == played_cpu
    assert (cpu._built("plain") is cpu._kernel()) == (played_cpu == "plain")


def test_without_a_compiler_the_model_is_sparse_all_the_same_and_the_reason_is_known(monkeypatch):
    def no_compiler(source, flags):
        raise OSError("g++: not found\nand more lines")

    monkeypatch.setattr(compat, "load_cpp", no_compiler)
    caches = (cpu._built, cpu._why_not)
    for cached in caches:
        cached.cache_clear()
    try:
        model, inputs = randomise(VideoDiT()), dit_inputs()
        with torch.no_grad():
            torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*inputs)
        (report,) = lvsa_compile.reports()
        assert report.sparse_sites[0].lowering == "dense_merge"
        assert dict(select(call_of()).passed_over)["cpu"] == "its kernel could not be compiled (OSError: g++: not found)"
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.mark.process
def test_it_holds_no_more_than_keys_and_values_beside_its_answer():
    """What it packs, counted from outside: the growth of the process's resident memory."""
    code = """
import ctypes, re, torch
from lvsa_compile import FramePattern
from lvsa_compile.lowering import cpu
from lvsa_compile.policies.lvsa.policy import plan_with
from lvsa_compile.policies.tables import VideoSpan
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
pattern, span = FramePattern(41), VideoSpan(0, 41, 96, 0)
table = plan_with(pattern, span, span).table
bounds, ranges = (torch.tensor(rows, dtype=torch.int32) for rows in (table.query_bounds, table.key_ranges))
query, key, value = (torch.randn(1, 8, span.length, 128) for _ in range(3))
torch.ops.lvsa.attention_cpu(query[:, :1], key[:, :1], value[:, :1], bounds, ranges, torch.tensor(0))
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
output, _ = torch.ops.lvsa.attention_cpu(query, key, value, bounds, ranges, torch.tensor(0))
print((status("VmHWM") - before - output.nbytes) / (4 * query.nbytes))
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.6
