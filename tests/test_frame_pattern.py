from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvsa_compile import FramePattern, OptionError

REFERENCE = json.loads((Path(__file__).parent / "data/lvsa_reference_patterns.json").read_text())


def test_anchors_and_attended_frames_are_those_of_the_reference_implementation():
    for case in REFERENCE["patterns"]:
        pattern = FramePattern(
            case["frames"],
            case["window"],
            case["first_frames"],
            key_frame_interval=case["key_frame_interval"] or 0,
            expand_window=case["expand_window"],
        )
        assert pattern.anchors(case["offset"]) == case["anchors"], case
        for frame, runs in enumerate(case["attended"]):
            assert pattern.attended(frame, case["offset"]) == [f for start, end in runs for f in range(start, end)], (case, frame)


def test_automatic_intervals_are_those_of_the_reference_implementation():
    for case in REFERENCE["auto_key_frame_interval"]:
        pattern = FramePattern(case["frames"], case["window"], case["first_frames"], case["reference_frames"], case["sparsity_scale"])
        assert pattern.interval == case["key_frame_interval"], case


@given(
    frames=st.integers(1, 130),
    window=st.integers(0, 8),
    first=st.integers(1, 3),
    every=st.integers(0, 16),
    step=st.integers(0, 40),
    expand=st.booleans(),
    data=st.data(),
)
def test_attended_frames_follow_the_definition(frames, window, first, every, step, expand, data):
    frame = data.draw(st.integers(0, frames - 1))
    pattern = FramePattern(frames, window, first, key_frame_interval=every, expand_window=expand)
    assert pattern.attended(frame, step) == sorted(oracle.attended(frames, window, first, every, step, frame, expand))


@given(frames=st.integers(1, 300), window=st.integers(0, 8), first=st.integers(1, 4), reference=st.integers(1, 60), scale=st.floats(0.2, 3))
def test_automatic_interval_follows_the_definition(frames, window, first, reference, scale):
    assert FramePattern(frames, window, first, reference, scale).interval == oracle.interval(frames, window, first, reference, scale)


@given(frames=st.integers(1, 40), window=st.integers(0, 4), reference=st.integers(1, 24))
def test_density_and_fullness_count_pairs_over_all_phases(frames, window, reference):
    pattern = FramePattern(frames, window, reference_frames=reference)
    counts = [len(pattern.attended(f, p)) for p in range(pattern.interval) for f in range(frames)]
    assert pattern.density == pytest.approx(sum(counts) / (pattern.interval * frames**2))
    assert pattern.is_full == (min(counts) == frames)


def test_at_and_below_the_horizon_the_pattern_is_full_and_beyond_it_is_not():
    assert all(FramePattern(frames).is_full for frames in range(1, 22))
    assert not any(FramePattern(frames).is_full for frames in range(23, 130))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(frames=0), "option frames=0: smaller than 1. Give a number of latent frames, at least 1."),
        (dict(frames=9, window=-1), "option window=-1: smaller than 0. Give a number of latent frames, at least 0."),
        (dict(frames=9, first_frames=1.5), "option first_frames=1.5: not a whole number. Give a number of latent frames, at least 0."),
        (dict(frames=9, sparsity_scale=0), "option sparsity_scale=0: not a positive number. Use 1.0 for the published budget."),
        (
            dict(frames=9, window=0, first_frames=0, key_frame_interval=0),
            "option key_frame_interval=0: with window=0 and first_frames=0 no frame would attend anything. "
            "Raise window or first_frames, or leave key_frame_interval at None.",
        ),
    ],
)
def test_bad_arguments_are_named_with_value_and_remedy(arguments, text):
    with pytest.raises(OptionError) as error:
        FramePattern(**arguments)
    assert str(error.value) == text


@given(
    frames=st.integers(1, 150), window=st.integers(0, 5), first=st.integers(1, 3), reference=st.integers(4, 40),
    steps=st.integers(1, 60), layers=st.integers(1, 5),
)  # fmt: skip
def test_coverage_counts_frames_that_are_ever_an_anchor(frames, window, first, reference, steps, layers):
    pattern = FramePattern(frames, window=window, first_frames=first, reference_frames=reference)
    every = oracle.interval(frames, window, first, reference)
    ever = [
        frame
        for frame in range(frames)
        if frame < first or any((step + layer) % every == frame % every for step in range(steps) for layer in range(layers))
    ]
    wrapped = {  # the grid goes on at the beginning where the last of its anchors lies behind the end
        ((step + layer) % every + i * every) % frames
        for step in range(steps)
        for layer in range(layers)
        for i in range(-(-frames // every))
    }
    assert pattern.coverage(steps, layers) == len(set(ever) | wrapped) / frames


def test_coverage_of_short_schedules():
    assert round(FramePattern(81, reference_frames=21).coverage(4), 2) == 0.68
    assert round(FramePattern(121, reference_frames=21).coverage(4), 2) == 0.46
    assert FramePattern(81, reference_frames=21).coverage(4, layers=3) == FramePattern(81, reference_frames=21).coverage(50) == 1.0
    for arguments, name in (((0,), "steps"), ((True,), "steps"), ((4, 0), "layers"), ((4, 1.5), "layers")):
        with pytest.raises(OptionError, match=f"{name}=.*not a whole number from 1 on.*Give the number of {name}"):
            FramePattern(81).coverage(*arguments)


def test_what_the_page_on_minimax_h3_counts():
    page = (Path(__file__).parents[1] / "docs" / "h3.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")][3:]
    assert [row[0] for row in rows] == ["30", "45", "75"]
    for _, frames, share, times, steps in rows:
        pattern = FramePattern(int(frames), reference_frames=107)
        longer = (int(frames) / 107) ** 2
        assert share == f"{pattern.density:.0%}".replace("%", " %")
        assert times == f"{longer * pattern.density:.2f}, dense {longer:.2f}"
        assert pattern.coverage(int(steps)) == 1 > pattern.coverage(int(steps) - 1)
    assert f"{FramePattern(530, reference_frames=107).coverage(4):.0%}".replace("%", " %") in page
