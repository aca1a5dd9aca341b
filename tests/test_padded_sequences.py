"""Sequences told by their ends, two in each sample: the video with text that counts, and padding."""

from __future__ import annotations

import functools
import itertools

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from original_models import VideoAndPaddedText, ends_with_padding
from test_originals import (
    EACH_WAY,
    GRIDS,
    OPTIONS,
    TIMES,
    by_blocks,
    compiled_by,
    eager,
    expect_sparse_under,
    flash_attn,  # noqa: F401
    flat,
    latents,
    told_by_pattern,
    whole,
)
from tiny_models import randomise

import lvsa_compile
from lvsa_compile.errors import SequencesError
from lvsa_compile.layout.sequences import VideoInOneSequence
from lvsa_compile.ops.sequences import SAME_SEQUENCE

WORDS = 7


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def inputs(grid, time, batch=1):
    """A text of another length in each sample and at each step."""
    drawn = torch.Generator().manual_seed(int(time))
    counted = torch.arange(WORDS) < torch.randint(1, WORDS + 1, (batch, 1), generator=drawn)
    return latents(grid, time, batch), torch.full((batch,), time), torch.randn(batch, WORDS, 16, generator=drawn), counted.long()


def made(attend=None, **more):
    return randomise(VideoAndPaddedText(attend, **more))


def told(output, twin, given, grid):
    """Which step's mask the outputs are of, those of video and text together, or "dense"."""
    return told_by_pattern(output, twin, given, grid, suffix=WORDS)


@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize(("batch", "key_heads"), [(1, 2), (2, 1)])
def test_padding_by_the_ends_of_sequences(batch, key_heads, way, flash_attn):  # noqa: F811
    model, twin = made(flash_attn, key_heads=key_heads), made(key_heads=key_heads)
    before = len(lvsa_compile.reports())
    expect_sparse_under(way, model, twin, functools.partial(inputs, batch=batch), suffix=WORDS, dense_first=way is by_blocks)
    assert len(lvsa_compile.reports()) - before <= 3


def cut_video(valid, longest):
    ends = ends_with_padding(valid, longest)
    ends[1::2] = ends[:-1:2] + 30
    return ends


def joined_samples(valid, longest):
    ends = ends_with_padding(valid, longest)
    ends[2] += 1
    return ends


CUT = "sequences told by their ends that cut the video of a sample apart or join two samples"


def as_uncompiled(compiled, twin, *given):
    return torch.equal(flat(compiled(*given)), flat(twin(*given)))


@pytest.mark.parametrize("ends", [cut_video, joined_samples])
@pytest.mark.parametrize("way", [by_blocks, eager])
def test_a_call_with_other_sequences_is_as_uncompiled(way, ends, flash_attn):  # noqa: F811
    """Between calls that are sparse, so that each call is known by its own ends."""
    grid, now = GRIDS[0], {"ends": ends_with_padding}

    def switched(valid, longest):
        return now["ends"](valid, longest)

    model, other, twin = made(flash_attn, ends=switched), made(flash_attn, ends=ends), made()
    compiled = compiled_by(way, model)
    compiled(*inputs(grid, TIMES[0], 2))
    assert told(compiled(*inputs(grid, TIMES[1], 2)), twin, inputs(grid, TIMES[1], 2), grid) == 1
    now["ends"] = ends
    assert as_uncompiled(compiled, other, *inputs(grid, TIMES[2], 2))
    if way is by_blocks:
        assert {site.detail for site in lvsa_compile.reports()[-1].sites} == {CUT}
        now["ends"] = ends_with_padding
        assert told(compiled(*inputs(grid, TIMES[0], 2)), twin, inputs(grid, TIMES[0], 2), grid) == 0
    lvsa_compile.undo(model)


@pytest.mark.parametrize("way", [whole, eager])
@pytest.mark.parametrize("ends", [cut_video, joined_samples])
def test_constant_ends_that_are_of_other_sequences(ends, way, flash_attn):  # noqa: F811
    def constant(valid, longest):
        return torch.tensor(ends([longest - 2, 2 * longest - 2], longest).tolist(), dtype=torch.int32)

    model, twin = made(flash_attn, ends=constant), made(flash_attn, ends=constant)
    compiled = compiled_by(way, model)
    assert as_uncompiled(compiled, twin, *inputs(GRIDS[0], TIMES[0], 2))
    assert {site.detail for site in lvsa_compile.reports()[-1].sites} == {CUT}
    lvsa_compile.undo(model)


@pytest.mark.parametrize("dynamic", [None, True])
def test_ends_that_a_graph_computes(dynamic, flash_attn):  # noqa: F811
    """They are known only when it runs: the op checks them, and an option leaves such calls as they are."""
    model, twin = made(flash_attn, ends=cut_video), made(flash_attn, ends=cut_video)
    given = inputs(GRIDS[0], TIMES[0], 2)
    said = r"attention blocks.0: .* The ends of sequences \(cu_seqlens\) in this call say otherwise"
    with pytest.raises(SequencesError, match=said) as error:
        whole(model, dynamic=dynamic)(*given)
    assert str(error.value).endswith("Compile with options={'lower_padding_masks': False}, which leaves such attention as it is.")
    torch._dynamo.reset()
    left = torch.compile(model, backend="lvsa", options={**OPTIONS, "lower_padding_masks": False}, dynamic=dynamic)
    assert as_uncompiled(left, twin, *given)


@given(st.data())
def test_numbers_of_sequences(data):
    samples, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    between = data.draw(st.lists(st.integers(0, samples * tokens), max_size=5).map(sorted))
    first = data.draw(st.integers(0, tokens - 1))
    stop = data.draw(st.integers(first + 1, tokens))
    ends = [0, *between, samples * tokens]
    sequence = [next(i for i in range(len(ends)) if at < ends[i]) for at in range(samples * tokens)]
    rows = [sequence[i * tokens : (i + 1) * tokens] for i in range(samples)]
    same = [[[[a == b for b in row] for a in row]] for row in rows]
    assert SAME_SEQUENCE(torch.tensor(ends, dtype=torch.int32), samples, tokens).tolist() == same
    holds = all(len(set(row[first:stop])) == 1 for row in rows) and not any(set(a) & set(b) for a, b in itertools.pairwise(rows))
    assert VideoInOneSequence(samples, tokens, first, stop).holds(numpy.array(ends), int) == holds
