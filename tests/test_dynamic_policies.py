"""XAttention, SVG2 and HASTE: what they choose, against published codes' and independent references' answers, and their definitions."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_inputs import ints, query_and_key

from lvsa_compile.errors import MissingPackageError, OptionError, ShapeError
from lvsa_compile.policies import haste, svg2, xattention
from lvsa_compile.policies.xattention.choice import blocks_of

DATA = Path(__file__).parent / "data" / "policies"
XATTENTION, SVG2, HASTE = (json.loads((DATA / f"{name}.json").read_text()) for name in ("xattention", "svg2", "haste"))


def shown(mask):
    return [["".join(str(int(kept)) for kept in row) for row in head] for head in mask[0].tolist()]


def named(case):
    return case["name"]


# --- XAttention ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", XATTENTION["cases"], ids=named)
def test_xattention_chooses_the_published_blocks_with_padding_masked(case, dtype):
    query, key = (t.to(dtype) for t in query_and_key(case))
    given = dict(block=case["block"], stride=case["stride"])
    threshold = torch.tensor(case["tau"]) if isinstance(case["tau"], list) else case["tau"]
    assert shown(xattention.choose_blocks(query, key, threshold=threshold, **given)) == case["mask_padding_masked"]
    mass = xattention.estimated_mass(query, key, **given)[0, :, 0].double()
    assert torch.allclose(mass, torch.tensor(case["row0_mass_padding_masked"], dtype=torch.float64), rtol=1e-4, atol=1e-5)


@given(
    tokens=st.integers(1, 21), heads=st.integers(1, 2), groups=st.integers(1, 2), stride=st.integers(1, 3), per_block=st.integers(1, 3),
    threshold=st.sampled_from([0.0, 0.3, 0.9, 1.0]), masked=st.booleans(),
)  # fmt: skip
def test_estimated_mass_is_that_of_its_definition(tokens, heads, groups, stride, per_block, threshold, masked):
    torch.manual_seed(tokens)
    query, key = (torch.randn(2, n, tokens, 4, dtype=torch.float64) for n in (heads * groups, heads))
    tiles, block = -(-tokens // stride), stride * per_block
    blocks = -(-tiles // per_block)
    counts = torch.rand(2, 1, tokens) < 0.5 if masked else torch.ones(2, 1, tokens, dtype=torch.bool)
    counts[..., -1] = True
    found = xattention.estimated_mass(query, key, block=block, stride=stride, scale=0.7, counts=counts if masked else None)
    assert found.shape == (2, heads * groups, blocks, blocks)
    chosen = blocks_of(found, torch.tensor(threshold, dtype=torch.float64))
    if not masked:
        assert torch.equal(chosen, xattention.choose_blocks(query, key, block=block, stride=stride, threshold=threshold, scale=0.7))
    for sample, head in itertools.product(range(2), range(heads * groups)):
        scores = torch.zeros(tiles, tiles, dtype=torch.float64)
        for a, b, u in itertools.product(range(tiles), range(tiles), range(stride)):
            row, column = a * stride + stride - 1 - u, b * stride + u
            if row < tokens and column < tokens and counts[sample, 0, column]:
                scores[a, b] += query[sample, head, row] @ key[sample, head // groups, column] * 0.7 / stride
        for b in range(tiles):
            if not counts[sample, 0, b * stride : (b + 1) * stride].any():
                scores[:, b] = -math.inf
        weights = torch.softmax(scores, -1)
        for p, q in itertools.product(range(blocks), range(blocks)):
            part = weights[p * per_block : (p + 1) * per_block, q * per_block : (q + 1) * per_block]
            assert float(found[sample, head, p, q]) == pytest.approx(float(part.sum()))
        for held, kept in zip(found[sample, head], chosen[sample, head], strict=True):
            largest = sorted(held.tolist(), reverse=True)
            fewest = next(n for n in range(1, blocks + 1) if n == blocks or sum(largest[:n]) >= threshold * sum(largest))
            assert bool(kept[0])
            assert int(kept.sum()) in ((blocks,) if threshold == 1.0 else (fewest, fewest + 1))  # key block 0 may be one more


# --- SVG2 ---------------------------------------------------------------------------------------------------------------------------


def blobs(seed, heads, tokens, width, clusters, noise, step, drift):
    centres, of_token = ints(seed + 1, (heads, clusters, width), -3, 3), ints(seed + 2, (heads, tokens), 0, clusters - 1)
    head = numpy.arange(heads)[:, None]
    moved = 16 * centres[head, of_token] + drift * step * ints(seed + 4, (heads, clusters, width), -1, 1)[head, of_token]
    return torch.from_numpy((moved + ints(seed + 3 + 100 * step, (heads, tokens, width), -noise, noise)) / 16)[None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", SVG2["cases"], ids=named)
def test_svg2_clusters_and_chooses_as_published(case, dtype):
    heads, tokens, width, made = case["H"], case["N"], case["D"], case["input"]
    centroids = {}
    for step, right in enumerate(case["steps"]):
        sizes = {}
        for name, clusters, shift in (("query", case["QC"], 11), ("key", case["KC"], 12)):
            of_data = case[f"{name}_clusters_in_data"]
            points = blobs(made[f"seed_{name}"], heads, tokens, width, of_data, made["noise"], step, made["drift"]).to(dtype)
            if step == 0:
                first = torch.from_numpy(ints(made["seed_query"] + shift, (heads, clusters), 0, tokens - 1))
                centroids[name] = points[:, torch.arange(heads)[:, None], first].clone()
                if "last" in case["initial"]:
                    centroids[name][:, :, -1] = torch.tensor([8.0, *[0.0] * (width - 1)])
            labels, centroids[name] = svg2.kmeans(points, centroids[name], case["iterations"]["later" if step else "first"])
            assert ["".join(chr(48 + label) for label in row) for row in labels[0].tolist()] == right[f"{name}_labels"]
            sizes[name] = svg2.cluster_sizes(labels, clusters)
            assert sizes[name][0].tolist() == right[f"{name}_sizes"]
        kept = svg2.choose_clusters(centroids["query"], centroids["key"], sizes["key"], top_p=case["top_p"], min_ratio=case["min_kc_ratio"])
        assert shown(kept) == right["map"]
        pairs = sizes["query"][0, :, :, None] * sizes["key"][0, :, None] * kept[0]
        assert (pairs.sum((1, 2)) / tokens**2).tolist() == pytest.approx(right["density"], abs=1e-6)


def test_svg2_samples_do_not_move_each_other():
    """A sample whose clusters stand still keeps them, whatever another does."""
    torch.manual_seed(0)
    points = torch.randn(2, 2, 50, 4)
    points[1] = points[1, :, :1]
    both, centroids = svg2.kmeans(points, svg2.first_centroids(points, 5), 6)
    for sample in range(2):
        alone, own = svg2.kmeans(points[sample : sample + 1], svg2.first_centroids(points[sample : sample + 1], 5), 6)
        assert torch.equal(both[sample], alone[0])
        assert torch.equal(centroids[sample], own[0])


def test_svg2_an_empty_cluster_that_scores_most_hides_no_other():
    query, key = torch.ones(1, 1, 1, 2), torch.tensor([[[[500.0, 500.0], [1.0, 1.0], [-1.0, -1.0]]]])
    kept = svg2.choose_clusters(query, key, torch.tensor([[[0, 5, 5]]]), top_p=0.5, min_ratio=0.0)
    assert kept.tolist() == [[[[False, True, False]]]]
    everything = svg2.choose_clusters(query, key, torch.tensor([[[0, 5, 5]]]), top_p=1.0, min_ratio=0.0)
    assert bool(everything.all())


# --- HASTE --------------------------------------------------------------------------------------------------------------------------


def drifting(seed, heads, tokens, width, steps, amounts, jump):
    base, way = ints(seed + 1, (2, heads, width), -32, 32), ints(seed + 2, (2, heads, width), -1, 1)
    moves = ints(seed + 3, (heads, steps), 0, 2)
    for step in range(steps):
        gone = numpy.array([amounts[head] * moves[head, 1 : step + 1].sum() for head in range(heads)])
        if jump and step >= jump:
            gone = gone + 6 * max(amounts) * (numpy.arange(heads) % 2)
        noise = ints(seed + 10 + step, (2, heads, tokens // 2, width), -16, 16)
        yield torch.from_numpy(((base + gone[:, None] * way)[:, :, None] + numpy.concatenate([noise, -noise], 2)) / 16).float()


@pytest.mark.parametrize("case", HASTE["tmr"], ids=named)
def test_haste_refreshes_heads_that_drifted(case):
    made, anchor = case["input"], None
    gate = None if case["layer_gate"] is None else tuple(case["layer_gate"])
    inputs = drifting(made["seed"], made["H"], made["N"], made["D"], made["steps"], made["amps"], made["jump"])
    refreshed = 0
    for right, tokens in zip(case["steps"], inputs, strict=True):
        mean = tokens.mean(2)
        if right["step"] < case["dense_steps"]:
            continue
        if anchor is None:
            assert right["drift"] is None
            again = torch.ones(made["H"], dtype=torch.bool)
            anchor = mean
        else:
            moved = haste.drift(*mean, *anchor)
            assert moved.tolist() == right["drift"]
            again = haste.refresh(moved, case["delta"], gate)
        assert "".join(str(int(each)) for each in again) == right["refresh"]
        anchor = torch.where(again[None, :, None], mean, anchor)
        refreshed += int(again.sum())
    sparse = made["steps"] - case["dense_steps"]
    assert 1 - refreshed / (sparse * made["H"]) == pytest.approx(case["reuse_share"], abs=1e-6)


def test_haste_drift_relative_to_its_anchor_has_no_units():
    torch.manual_seed(0)
    means = torch.randn(4, 3, 8)
    once, scaled = haste.drift(*means, relative=True), haste.drift(*(1000 * means), relative=True)
    assert torch.allclose(once, scaled)
    query, key, anchor_query, anchor_key = means
    by_hand = (query - anchor_query).abs().sum(-1) / anchor_query.abs().sum(-1)
    assert torch.allclose(once, by_hand + (key - anchor_key).abs().sum(-1) / anchor_key.abs().sum(-1))


@pytest.mark.parametrize("case", HASTE["ebc"], ids=named)
def test_haste_allots_thresholds_at_least_error(case):
    heads, candidates = case["heads"], len(case["taus"])
    sparsity = -numpy.sort(-ints(case["seed"], (heads, candidates), 100, 900), 1)
    error = ints(case["seed"] + 5000, (heads, candidates), 1, 1000000)
    error = -numpy.sort(-error, 1) if case["monotone"] else error
    choice = haste.allot(error.tolist(), sparsity.tolist(), case["required_sum"])
    assert int(error[range(heads), choice].sum()) == case["optimum"]
    assert int(sparsity[range(heads), choice].sum()) >= case["required_sum"]
    if case["second_best"] is not None:
        assert choice.tolist() == case["choice"]


@given(st.data())
def test_haste_allotment_is_the_best_of_all(data):
    heads, candidates = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    numbers = st.lists(st.lists(st.integers(0, 9), min_size=candidates, max_size=candidates), min_size=heads, max_size=heads)
    error, sparsity = data.draw(numbers), data.draw(numbers)
    required = data.draw(st.integers(0, sum(map(max, sparsity))))
    choice = haste.allot(error, sparsity, required).tolist()

    def sums(of):
        return sum(error[h][k] for h, k in enumerate(of)), sum(sparsity[h][k] for h, k in enumerate(of))

    best = min(sums(of)[0] for of in itertools.product(range(candidates), repeat=heads) if sums(of)[1] >= required)
    assert sums(choice)[0] == best
    assert sums(choice)[1] >= required


@pytest.mark.parametrize("case", HASTE["spectral"], ids=lambda case: str(case["seed"]))
def test_haste_error_of_a_velocity_by_bands(case):
    dense = torch.from_numpy(ints(case["seed"], case["shape"], -64, 64) / 16)
    sparse = dense + torch.from_numpy(ints(case["seed"] + 1, case["shape"], -case["amp"], case["amp"]) / 16)
    assert {name: float(value) for name, value in haste.band_errors(sparse, dense).items()} == pytest.approx(case["bands"], rel=1e-6)
    assert float(haste.spectral_error(sparse, dense)) == pytest.approx(case["error"], rel=1e-6)


def test_haste_bands_hold_all_of_the_energy():
    torch.manual_seed(0)
    dense, sparse = torch.randn(2, 3, 5, 7, 4, dtype=torch.float64)
    whole = float((sparse - dense).square().sum() / dense.square().sum())  # Parseval
    assert sum(map(float, haste.band_errors(sparse, dense).values())) == pytest.approx(whole, rel=1e-6)


def test_allotting_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingPackageError, match=r"allotting thresholds to heads needs scipy\. Run `pip install scipy`;"):
        haste.allot([[1.0]], [[0.5]], 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: xattention.choose_blocks(*[torch.ones(1, 1, 4, 2)] * 2, block=4, stride=3, threshold=0.9), OptionError, "option stride=3"),
        (lambda: xattention.choose_blocks(*[torch.ones(1, 1, 4, 2)] * 2, block=4, stride=2, threshold=1.5), OptionError, "not shares of"),
        (lambda: xattention.estimated_mass(*[torch.ones(1, 4, 2)] * 2, block=4, stride=2), ShapeError, r"query=\(1, 4, 2\): not \[B, H"),
        (lambda: svg2.kmeans(torch.ones(1, 1, 4, 2), torch.ones(1, 2, 3, 2), 1), ShapeError, r"centroids=\(1, 2, 3, 2\): it does not"),
        (lambda: svg2.kmeans(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 3, 2), 0), OptionError, "option iterations=0: clusters take"),
        (lambda: svg2.choose_clusters(*[torch.ones(1, 1, 4, 2)] * 2, torch.ones(1, 1, 4), top_p=2.0, min_ratio=0.1), OptionError, "top_p"),
        (lambda: haste.refresh(torch.ones(2), -1.0), OptionError, "option threshold=-1.0: it is a distance"),
        (lambda: haste.refresh(torch.ones(2), math.nan), OptionError, "option threshold=nan: it is a distance"),
        (lambda: haste.refresh(torch.ones(2), 1.0, (0.8, 0.4)), OptionError, r"option layer_gate=\(0.8, 0.4\): not two rising shares"),
        (lambda: haste.allot([[1.0]], [[0.5]], 0.6), OptionError, "option required=0.6: the sparsest candidates make 0.5 in sum"),
        (lambda: haste.allot([[1.0]], [[0.5, 0.6]], 0.6), ShapeError, r"sparsity=\(1, 2\): it does not fit errors \(1, 1\)"),
        (lambda: haste.spectral_error(torch.ones(1, 2, 3), torch.ones(1, 2, 3)), ShapeError, r"Give two \[C, T, H, W\]"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
