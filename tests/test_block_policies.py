"""AdaSpa and LoSA: which blocks they choose, against an independent float64 implementation's answers and against their definitions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_inputs import ints, query_and_key

from lvsa_compile.errors import OptionError, ShapeError
from lvsa_compile.policies import adaspa, losa
from lvsa_compile.policies.blocks import block_bounds

DATA = Path(__file__).parent / "data" / "policies"
ADASPA = json.loads((DATA / "adaspa.json").read_text())
LOSA = json.loads((DATA / "sol_losa.json").read_text())["losa"]


def shown(mask):
    return [["".join(str(int(kept)) for kept in row) for row in head] for head in mask[0].tolist()]


def named(case):
    return case["name"]


def test_the_recipe_of_the_inputs():
    check = ADASPA["recipe"]["check"]
    assert ints(check["seed"], check["shape"], check["lo"], check["hi"]).tolist() == check["value"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ADASPA["cases"], ids=named)
def test_adaspa_chooses_the_blocks_of_the_reference(case, dtype):
    (query, key), (query_later, key_later) = query_and_key(case), query_and_key(case, later=True)
    query, key, query_later, key_later = (t.to(dtype) for t in (query, key, query_later, key_later))
    given = {"block": case["block"], "video_tokens": case["N"] - case["text_tokens"]}
    scores = query.double() @ key.double().mT * case["D"] ** -0.5
    log_sum_exp = scores.logsumexp(-1)
    assert torch.allclose(log_sum_exp[0, :, 0], torch.tensor(case["lse_row0"], dtype=torch.float64), atol=1e-6)
    mass = adaspa.block_mass(query, key, **given)
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(mass[0, :, 0].double(), torch.tensor(case["mass_row0"], dtype=torch.float64), atol=2e-5)
    assert torch.allclose(mass.sum((-2, -1))[0].double(), torch.tensor(case["mass_total"], dtype=torch.float64), rtol=1e-5)
    searches = {
        "first_search": mass,
        "second_search_cached_lse": adaspa.block_mass(query_later, key_later, log_sum_exp=log_sum_exp, **given),
        "second_search_exact_lse": adaspa.block_mass(query_later, key_later, **given),
    }
    for name, found in searches.items():
        right, video = case[name], case["video_blocks"]
        recall = adaspa.recall(found, case["sparsity"], video)
        assert torch.allclose(recall[0].double(), torch.tensor(right["recall"], dtype=torch.float64), atol=1e-5)
        sparsity = adaspa.head_sparsity(recall, case["sparsity"])
        assert torch.allclose(sparsity[0], torch.tensor(right["sparsity"], dtype=torch.float64), atol=1e-12)
        assert shown(adaspa.choose_blocks(found, sparsity, video)) == right["mask"]


@pytest.mark.parametrize("case", ADASPA["allotment"])
def test_adaspa_shares_its_sparsity_among_heads(case):
    found = adaspa.head_sparsity(torch.tensor([case["recall"]], dtype=torch.float64), case["sparsity"])
    assert torch.allclose(found[0], torch.tensor(case["result"], dtype=torch.float64), atol=1e-12)
    assert float(found.mean()) == pytest.approx(case["mean"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", LOSA, ids=named)
def test_losa_chooses_the_blocks_of_the_reference(case, dtype):
    query, key = (t.to(dtype) for t in query_and_key(case))
    mass = losa.block_mass(query, key, block=case["query_block"], key_block=case["key_block"])
    rows = numpy.diff(block_bounds(case["N"], case["query_block"])).tolist()
    chosen = losa.choose_blocks(mass, rows, case["theta"])
    assert shown(chosen) == case["mask"]
    recall = (mass * chosen).sum((-2, -1)) / case["N"]
    assert torch.allclose(recall[0].double(), torch.tensor(case["recall_same_step"], dtype=torch.float64), atol=1e-5)


@given(st.data())
def test_mass_and_choice_are_those_of_their_definitions(data):
    draw = data.draw
    heads, groups, block, key_block = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    tokens = draw(st.integers(1, 12))
    video = draw(st.integers(1, tokens))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    query = torch.randn(1, heads * groups, tokens, 4, generator=numbers, dtype=torch.float64)
    key = torch.randn(1, heads, tokens, 4, generator=numbers, dtype=torch.float64)
    mass = adaspa.block_mass(query, key, block=block, key_block=key_block, scale=0.7, video_tokens=video)
    rows, columns = block_bounds(tokens, block, video), block_bounds(tokens, key_block, video)
    for head in range(heads * groups):
        weights = torch.softmax(query[0, head] @ key[0, head // groups].T * 0.7, -1)
        for (i, (r0, r1)), (j, (c0, c1)) in itertools.product(enumerate(itertools.pairwise(rows)), enumerate(itertools.pairwise(columns))):
            assert float(mass[0, head, i, j]) == pytest.approx(float(weights[r0:r1, c0:c1].sum()))
    threshold = draw(st.floats(0.1, 0.99))
    chosen = losa.choose_blocks(mass, numpy.diff(rows).tolist(), threshold)
    for held, kept in zip(mass.flatten(0, 2), chosen.flatten(0, 2), strict=True):
        largest = sorted(held.tolist(), reverse=True)
        fewest = next(n for n in range(1, len(largest) + 1) if sum(largest[:n]) >= threshold * float(held.sum()) - 1e-12)
        assert int(kept.sum()) == fewest
        assert float(held[kept].sum()) == pytest.approx(sum(largest[:fewest]))


def test_text_is_kept_beside_the_budget_and_attends_all():
    mass = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    chosen = adaspa.choose_blocks(mass, torch.tensor([[0.75, 0.25]]), 4)
    assert chosen[:, :, 4:].all()
    assert chosen[:, :, :, 4:].all()
    assert chosen[0, :, :4, :4].sum(-1).tolist() == [[1] * 4, [3] * 4]


def test_of_equal_blocks_and_heads_the_first_comes_first():
    assert adaspa.choose_blocks(torch.ones(1, 1, 1, 4), 0.5, 1).tolist() == [[[[True, True, True, True]]]]
    assert adaspa.choose_blocks(torch.ones(1, 1, 4, 4), 0.5, 4)[0, 0, 0].tolist() == [True, True, False, False]
    assert adaspa.head_sparsity(torch.full((1, 4), 0.9), 0.8)[0].tolist() == pytest.approx([0.9, 0.9, 0.7, 0.7])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adaspa.head_sparsity(torch.ones(1, 2), 0.2), OptionError, "option sparsity=0.2: heads that need more would get less"),
        (lambda: losa.choose_blocks(torch.ones(1, 1, 2, 2), [1, 1], 0.0), OptionError, "option threshold=0.0: it is a share of the mass"),
        (lambda: losa.choose_blocks(torch.ones(1, 1, 2, 2), [1], 0.9), ShapeError, r"rows=\(1,\): it does not fit a mass \(1, 1, 2, 2\)"),
        (lambda: adaspa.choose_blocks(torch.ones(1, 1, 2, 2), 0.5, 3), ShapeError, r"mass=\(1, 1, 2, 2\): .* video_blocks=3 of both"),
        (lambda: adaspa.block_mass(torch.ones(2, 2, 4), torch.ones(2, 2, 4), block=2), ShapeError, r"query=\(2, 2, 4\): not \[B, H"),
        (lambda: adaspa.block_mass(torch.ones(1, 3, 4, 2), torch.ones(1, 2, 4, 2), block=2), ShapeError, r"key=\(1, 2, 4, 2\): it does"),
        (lambda: adaspa.block_mass(*[torch.ones(1, 1, 4, 2)] * 2, block=0), OptionError, "option block=0: a block has at least one token"),
        (lambda: adaspa.block_mass(*[torch.ones(1, 1, 4, 2)] * 2, block=2, video_tokens=5), OptionError, "option video_tokens=5: there"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
