"""Policies that choose blocks while the model runs: the op by its definition, models against an eager one that follows the reference."""

from __future__ import annotations

import dataclasses
import itertools
import threading

import pytest
import torch
from choosing_oracle import Choosing, check_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VideoDiT, dit_inputs, randomise, wan, wan_inputs

import lvsa_compile
from lvsa_compile import AdaSpa, LoSA
from lvsa_compile.errors import OptionError, PlanError, ShapeError, StepCountError
from lvsa_compile.forward.clock import Clock
from lvsa_compile.lowering.cpu_blocks import block_attention_cpu
from lvsa_compile.ops.attention import check_op
from lvsa_compile.ops.block_attention import block_attention
from lvsa_compile.policies.block_choice import packed, unpacked
from lvsa_compile.policies.contract import Facts, Geometry
from lvsa_compile.policies.rows import Searches
from lvsa_compile.policies.tables import VideoSpan

ADASPA = AdaSpa(block=16, sparsity=0.5, dense_steps=2, search_steps=(2, 5), min_tokens=0)
LOSA = LoSA(query_block=32, key_block=16, threshold=0.6, dense_steps=3, min_tokens=0)
SCHEDULED = {"adaspa": dict(dense=2, last=99, searches=(2, 5)), "losa": dict(dense=3, last=99, searches=(3,))}
BODIES = [block_attention, block_attention_cpu]
VIDEO = 9 * 3 * 4


def at_step(step, branch=0, batch=1, make=wan_inputs, **sizes):
    """Inputs of a denoising step, other at each one and for each guidance branch."""
    inputs = make(timestep=900.0 - 50 * step, batch=batch, **sizes)
    noise = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(step))
    return {
        **inputs,
        "hidden_states": inputs["hidden_states"] + 0.3 * step * noise,
        "encoder_hidden_states": inputs["encoder_hidden_states"] + branch,
    }


# --- the op -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_each_step_is_what_its_row_says(data):
    check_steps(data.draw, BODIES)


def test_bits_are_packed_and_unpacked():
    kept = torch.rand(2, 3, 5, 21) < 0.5
    assert packed(kept).shape == (2, 3, 5, 3)
    assert torch.equal(unpacked(packed(kept), 21), kept)
    assert packed(torch.tensor([False] * 8 + [True])).tolist() == [0, 1]


@pytest.mark.parametrize("operator", [torch.ops.lvsa.block_attention.default, torch.ops.lvsa.block_attention_cpu.default])
def test_opcheck(operator):
    tensors = [torch.randn(2, 2, 40, 16) for _ in range(3)]
    table = torch.tensor([0, 4, 20, 36, 40], dtype=torch.int32), torch.tensor([[[[[0, 40]]] * 4]] * 2, dtype=torch.int32)
    state = [torch.zeros(8, 2, 2, dtype=torch.int32), torch.zeros(8, 2, 2, 2, 1, dtype=torch.uint8), torch.zeros(8, 2, 2, 32)]
    scalars = [torch.tensor(n, dtype=torch.int32) for n in (0, 3)]
    given = dict(scale=0.2, choice="adaspa", share=0.5, query_block=16, key_block=16, searches=1, video=[4, 4, 32])
    torch.library.opcheck(operator, (*tensors, *table, *scalars, state), given)


def test_heads_share_the_table():
    with pytest.raises(ShapeError, match="Let heads differ by the blocks that are chosen"):
        block_attention(
            *[torch.randn(1, 2, 16, 8)] * 3, torch.tensor([0, 16]), torch.zeros(1, 2, 1, 1, 2, dtype=torch.int32), torch.tensor(0),
            torch.tensor(0), [torch.zeros(1, 2), torch.zeros(1, 1, 2, 1, 1)], choice="losa", share=0.9, query_block=16, key_block=16,
            searches=1, video=[0, 0, 16],
        )  # fmt: skip


# --- the schedule -------------------------------------------------------------------------------------------------------------------


def rows_of(schedule, steps, **more):
    return [int(schedule(torch.tensor(step), **more)) for step in range(steps)]


@given(
    searches=st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True).map(sorted),
    dense=st.integers(0, 20),
    last=st.integers(0, 5),
    of=st.sampled_from([4, 25, 50, 77]),
)
def test_rows_of_a_schedule(searches, dense, last, of):
    rows = rows_of(Searches(tuple(searches), dense, last), of, of=of)
    for step, row in enumerate(rows):
        due = [n for n, at in enumerate(searches) if round(at * of / 50) <= step]
        everything = not due or step < round(dense * of / 50) or step >= of - round(last * of / 50)
        assert row == (len(searches) if everything else due[-1])


def test_steps_are_numbers_where_nobody_says_how_many_there_are():
    assert rows_of(Searches((10, 30), 10), 50) == [2] * 10 + [0] * 20 + [1] * 20
    assert rows_of(Searches((10, 30), 10), 25, of=25) == [2] * 5 + [0] * 10 + [1] * 10
    assert rows_of(Searches((10, 30), 10), 25) == [2] * 10 + [0] * 15


def test_a_share_of_dense_steps_is_of_the_steps_that_are_known():
    schedule = Searches((0,), 0.25)
    assert rows_of(schedule, 20).count(1) == 12  # of 50
    assert rows_of(schedule, 20, of=20).count(1) == 5
    assert rows_of(schedule, 20, before=torch.tensor(40.0)).count(1) == 10
    assert rows_of(schedule, 20, before=torch.tensor(0.0)).count(1) == 12


# --- models -------------------------------------------------------------------------------------------------------------------------


def whole(model, policy):
    return torch.compile(model, backend="lvsa", options={"policy": policy, "inner": "aot_eager"})


def by_blocks(model, policy):
    for block in model.blocks:
        block.compile(backend="lvsa", options={"policy": policy, "inner": "aot_eager"})
    return model


def eager(model, policy):
    return lvsa_compile.enable(model, policy=policy)


def regional(model, policy):
    return lvsa_compile.compile_repeated_blocks(model, options={"policy": policy, "inner": "aot_eager"})


@pytest.mark.parametrize("start", [whole, regional, by_blocks, eager])
@pytest.mark.parametrize("policy", [ADASPA, LOSA], ids=["adaspa", "losa"])
def test_a_model_is_that_of_the_reference(policy, start):
    """Two videos, guidance by two calls; the first forward may be one that is not followed yet."""
    alone, model = wan(), wan()
    run = start(model, policy)
    with torch.no_grad():
        if start in (by_blocks, eager):
            for _ in range(2):
                run(**at_step(0))
            lvsa_compile.reset()
        for _ in range(2):
            oracle = Choosing(policy, SCHEDULED[policy.name], VIDEO)
            for step, branch in itertools.product(range(7), range(2)):
                inputs = at_step(step, branch)
                oracle.begin(step, branch)
                with oracle:
                    expected = alone(**inputs)[0]
                found = run(**inputs)[0]
                assert (found - expected).abs().max() < 2e-5, (step, branch)
            assert oracle.margin > 1e-5
            assert (alone(**inputs)[0] - expected).abs().max() > 1e-2, "the last step was sparse"


@pytest.mark.parametrize("policy", [ADASPA, LOSA], ids=["adaspa", "losa"])
def test_samples_of_a_batch_have_blocks_of_their_own(policy):
    alone, run = wan(), whole(wan(), policy)
    oracle = Choosing(policy, SCHEDULED[policy.name], VIDEO)
    with torch.no_grad():
        for step in range(5):
            inputs = at_step(step, batch=2)
            inputs["encoder_hidden_states"][1] += 1.0
            oracle.begin(step, 0)
            with oracle:
                expected = alone(**inputs)[0]
            assert (run(**inputs)[0] - expected).abs().max() < 2e-5, step
    kept = [chooser.kept for chooser in oracle.choosers.values()]
    assert not all(torch.equal(*each) for each in kept)


@pytest.mark.parametrize("policy", [ADASPA, LOSA], ids=["adaspa", "losa"])
def test_a_batch_of_another_size_searches_by_itself(policy):
    """Guidance that stops, and begins again: what one size found is not taken for what the other did."""
    alone, run = wan(), whole(wan(), policy)
    oracles = {batch: Choosing(policy, SCHEDULED[policy.name], VIDEO) for batch in (1, 2)}
    with torch.no_grad():
        for step, batch in enumerate((2, 2, 2, 2, 1, 1, 2, 1)):
            inputs = at_step(step, batch=batch)
            oracles[batch].begin(step, 0)
            with oracles[batch]:
                expected = alone(**inputs)[0]
            assert (run(**inputs)[0] - expected).abs().max() < 2e-5, step


@pytest.mark.kernel
def test_masked_keys_have_no_mass_whatever_ran_before():
    """A mask over all keys that are scored at once, after another layout left numbers in what a thread works in."""
    torch.manual_seed(0)

    def searched(body, tokens, masked):
        query, key, value = (torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
        columns, rows = -(-tokens // 32), -(-tokens // 128)
        state = [torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, rows, -(-columns // 8), dtype=torch.uint8)]
        bounds = torch.tensor([*range(0, tokens, 128), tokens], dtype=torch.int32)
        ranges = torch.tensor([[[[[0, tokens]]] * rows]], dtype=torch.int32)
        mask = (torch.arange(tokens) < tokens - masked)[None, None, None]
        zero = torch.zeros((), dtype=torch.int32)
        given = dict(choice="losa", share=0.9, query_block=128, key_block=32, searches=1, video=[0, 0, tokens])
        body(query, key, value, bounds, ranges, zero, zero, state, key_mask=mask, **given)
        return unpacked(state[1][0], columns)

    for tokens, masked in ((700, 0), (257, 1), (600, 344), (300, 50)):
        assert torch.equal(searched(block_attention_cpu, tokens, masked), searched(block_attention, tokens, masked)), (tokens, masked)


def test_text_in_the_sequence_is_kept_and_padding_is_not():
    """Text before the video, some of it padding: an odd number of tokens, masked keys."""

    def block(model, tokens, grid, text):
        joint = torch.cat([text, tokens], 1)
        mask = torch.arange(joint.shape[1]) != 3
        return tokens + model.attention(joint, attn_mask=mask[None, None, None])[:, text.shape[1] :]

    model = randomise(VideoDiT(block))
    run = torch.compile(model, backend="lvsa", options={"policy": ADASPA, "inner": "aot_eager", "strict": True})
    outputs = []
    with torch.no_grad():
        for step in range(4):
            latents, timestep, text = dit_inputs(timestep=900.0 - step)
            outputs.append((run(latents, timestep, text), model(latents, timestep, text)))
    assert lvsa_compile.reports()[0].sites[0].decision == "sparse"
    errors = [float((found - dense).abs().max()) for found, dense in outputs]
    assert max(errors[:3]) < 1e-5
    assert errors[3] > 1e-3


def test_a_search_that_a_cache_skipped_is_made_up_for():
    alone, run = wan(), whole(wan(), ADASPA)
    oracle = Choosing(ADASPA, SCHEDULED["adaspa"], VIDEO)
    with torch.no_grad():
        for step in (0, 1, 3, 4, 6, 7):  # neither 2 nor 5
            inputs = at_step(step)
            oracle.begin(step, 0)
            with oracle, lvsa_compile.step(step):
                expected = alone(**inputs)[0]
            with lvsa_compile.step(step):
                found = run(**inputs)[0]
            assert (found - expected).abs().max() < 2e-5, step
    assert all(chooser.searched == 5 for chooser in oracle.choosers.values())


def test_nothing_compiles_again_over_steps_videos_and_branches():
    run = whole(wan(), ADASPA)
    with torch.no_grad():
        for _, step in itertools.product(range(2), range(7)):
            run(**at_step(step))
            run(**at_step(step, 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_share_of_the_video_before_counts_with_explicit_steps_too():
    run = whole(wan(), AdaSpa(block=16, sparsity=0.5, dense_steps=0.5, search_steps=(0,), min_tokens=0))
    model, unlike = wan(), []
    with torch.no_grad():
        for _, step in itertools.product(range(2), range(8)):
            inputs = at_step(step)
            with lvsa_compile.step(step):
                unlike.append(float((run(**inputs)[0] - model(**inputs)[0]).abs().max()) > 1e-3)
    assert unlike == [False] * 8 + [False] * 5 + [True] * 3


def test_another_threads_tick_does_not_enter_again():
    clock = Clock()
    clock.tick(torch.tensor([900.0]))
    with lvsa_compile.step(0):
        first = int(clock.branch(torch.device("cpu")))
        other = threading.Thread(target=lambda: clock.tick(torch.tensor([500.0])))
        other.start()
        other.join()
        assert int(clock.branch(torch.device("cpu"))) == first


# --- what is said -------------------------------------------------------------------------------------------------------------------


def test_a_short_video_stays_dense_with_the_reason():
    run = torch.compile(wan(), backend="lvsa", options={"policy": "adaspa", "inner": "eager"})
    with torch.no_grad():
        run(**at_step(0))
    site = lvsa_compile.reports()[0].sites[0]
    assert (site.reason, site.detail) == ("few_tokens", "108 tokens of the video, and policy 'adaspa' has min_tokens=8192")
    assert "smaller min_tokens" in site.remedy


def test_dense_steps_at_the_end_need_their_number():
    run = whole(wan(), AdaSpa(block=16, sparsity=0.5, dense_last=1, min_tokens=0))
    with torch.no_grad():
        with pytest.raises(StepCountError, match=r"dense_last=1 counts from the last .*attach\(pipe\), or run each step inside"):
            run(**at_step(0))
        with lvsa_compile.step(0, of=4):
            run(**at_step(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaSpa(block=8), "option block=8: a block has 16 to 128 tokens. Give 64 or 128"),
        (lambda: AdaSpa(sparsity=0.2), "option sparsity=0.2: heads that need more would get less than none"),
        (lambda: AdaSpa(search_steps=(30, 10)), r"option search_steps=\(30, 10\): not denoising steps, rising. Give a tuple such as"),
        (lambda: AdaSpa(dense_steps=1.5), "option dense_steps=1.5: neither a number of denoising steps nor a share of them"),
        (lambda: LoSA(dense_last=-1), "option dense_last=-1: not a number of denoising steps"),
        (lambda: LoSA(min_tokens=True), "option min_tokens=True: not a number of tokens of the video"),
        (lambda: LoSA(threshold=0), "option threshold=0: it is a share of the mass"),
        (lambda: LoSA(key_block="32"), "option key_block='32': a block has 16 to 128 tokens"),
    ],
)
def test_fields_that_cannot_be(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_queries_and_keys_hold_the_same_video():
    short, long = VideoSpan(0, 4, 12, 0), VideoSpan(0, 8, 12, 0)
    miss = ADASPA.applies(Geometry.of(short, long), Facts())
    assert miss.detail == "the queries hold 4 latent frames, the keys 8, and policy 'adaspa' chooses blocks among the same"


def test_arguments_that_the_op_has_not():
    span = VideoSpan(0, 4, 12, 0)
    plan = ADASPA.plan(Geometry.of(span, span, heads=2), Facts())
    check_op(plan)
    with pytest.raises(PlanError, match=r"lvsa::block_attention has no shares. Give what its schema has"):
        check_op(dataclasses.replace(plan, arguments=(("shares", 1.0),)))
