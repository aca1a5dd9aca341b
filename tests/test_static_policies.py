"""SVG, STA and Radial: masks, orders and choices against the answers of their published codes."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from policy_inputs import ints

from lvsa_compile.errors import OptionError, ShapeError
from lvsa_compile.policies import radial, sta, svg

DATA = Path(__file__).parent / "data" / "policies"
SVG, STA, RADIAL = (json.loads((DATA / f"{name}.json").read_text()) for name in ("svg1", "sta", "radial"))
OF_MODEL = {"wan": dict(band=2.0, first_frame=True), "hunyuan": dict(band=1.5, first_frame=False)}


def digest(mask):
    return hashlib.sha256(numpy.packbits(numpy.asarray(mask).flatten()).tobytes()).hexdigest()


# --- SVG ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
@pytest.mark.parametrize("case", SVG["profile"], ids=lambda case: f"{case['model']}{case['T']}x{case['P']}")
def test_svg_profiles_by_the_published_masks(case, kind):
    right = case["masks"][kind]
    mask = svg.profile_mask(case["T"], case["P"], temporal=kind == "temporal", text=case["context"], **OF_MODEL[case["model"]])
    assert list(mask.shape) == right["shape"]
    assert int(mask.sum()) == right["ones"]
    assert digest(mask) == right["sha256_packbits"]


@pytest.mark.parametrize("case", SVG["runtime"], ids=lambda case: f"{case['model']}{case['T']}x{case['P']}")
def test_svg_runs_by_the_published_mask(case):
    half_width = svg.width(case["T"], case["P"], case["sparsity"], text=case["context"])
    assert half_width == pytest.approx(case["width_in_frames"], abs=1e-12)
    given = dict(text=case["context"], real_text=case["prompt"], first_frame=case["model"] == "wan")
    mask = svg.runtime_mask(case["T"], case["P"], half_width, **given)
    assert digest(mask) == case["sha256_packbits"]
    assert float(mask.double().mean()) == pytest.approx(case["density"], abs=1e-6)


@pytest.mark.parametrize("case", SVG["widths_at_real_sizes"], ids=lambda case: f"{case['model']}{case['P']}")
def test_svg_widths_of_real_videos(case):
    assert svg.width(case["T"], case["P"], case["sparsity"], text=case["context"]) == pytest.approx(case["width_in_frames"], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SVG["choice"], ids=lambda case: case["model"])
def test_svg_chooses_the_kind_of_heads(case, dtype):
    heads, frames, places, width, text, made = (case[name] for name in ("H", "T", "P", "D", "context", "input"))
    video, seed = frames * places, made["seed"]
    shape = (heads, video + text, width)
    directions = ints(seed + 1, (heads, max(frames, places), width), -1, 1)
    both = numpy.zeros(shape, dtype=numpy.int64)
    token = numpy.arange(video)
    for head, kind in enumerate(made["kinds"]):
        both[head, :video] = made["gain"] * directions[head, token // places if kind == "spatial" else token % places]
    query, key = (both + ints(seed + n, shape, -made["noise"], made["noise"]) for n in (2, 3))
    tensors = [torch.from_numpy(each / 16).to(dtype)[None] for each in (query, key, ints(seed + 4, shape, -32, 32))]
    rows = torch.from_numpy(ints(case["rows"]["seed"], (case["rows"]["count"],), 0, video - 1))
    assert rows[:8].tolist() == case["rows"]["first"]
    masks = [svg.profile_mask(frames, places, temporal=temporal, text=text, **OF_MODEL[case["model"]]) for temporal in (False, True)]
    temporal, errors = svg.choose(*tensors, rows, *masks)
    assert ["temporal" if each else "spatial" for each in temporal[0].tolist()] == case["choice"]
    assert torch.allclose(errors[:, 0].double(), torch.tensor(case["mse"], dtype=torch.float64), rtol=1e-3)
    of_rows, _ = svg.choose(*tensors, rows, *[mask[rows] for mask in masks])
    assert torch.equal(of_rows, temporal)


# --- STA ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STA["tile_level"], ids=lambda case: "x".join(map(str, case["canvas_in_tiles"] + case["window"])))
def test_sta_attends_the_published_boxes(case):
    canvas, window = case["canvas_in_tiles"], case["window"]
    for tile, right in case["boxes"].items():
        assert sta.boxes(canvas, window, int(tile)) == right
    mask = sta.attended_tiles(canvas, window)
    assert digest(mask) == case["sha256_packbits"]
    assert float(mask.double().mean()) == pytest.approx(case["density"], abs=1e-6)


@pytest.mark.parametrize("case", STA["token_level"], ids=lambda case: "x".join(map(str, case["canvas"] + case["window"])))
def test_sta_orders_tokens_by_tile(case):
    order = sta.tile_order(case["canvas"], case["tile"])
    assert order[:24].tolist() == case["tile_order_first"]
    assert sorted(order.tolist()) == list(range(math.prod(case["canvas"])))
    size, tiles = math.prod(case["tile"]), [a // b for a, b in zip(case["canvas"], case["tile"], strict=True)]
    attended = sta.attended_tiles(tiles, case["window"]).repeat_interleave(size, 0).repeat_interleave(size, 1)
    for row, ranges in case["row_ranges"].items():
        if int(row) < len(attended):
            inside = [[start, min(end, len(attended))] for start, end in ranges if start < len(attended)]
            found = attended[int(row)].nonzero().flatten().tolist()
            assert found == list(itertools.chain.from_iterable(range(start, end) for start, end in inside))


@pytest.mark.parametrize("case", STA["search"])
def test_sta_chooses_the_window_that_loses_least(case):
    shape = (len(case["candidates"]), case["steps"], case["layers"], case["heads"])
    loss = torch.from_numpy(ints(case["seed"], shape, 1, 1000000))
    assert sta.choose_windows(loss, case["candidates"], case["dense_steps"]) == case["strategy"]


# --- Radial -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RADIAL["frame_pairs"], ids=lambda case: f"{case['P']} {case['decay']}")
def test_radial_windows_are_the_published_ones(case):
    for distance, half_width, kept in case["rows"]:
        assert radial.frame_window(distance, case["P"], case["decay"], case["block"]) == (half_width, kept)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: svg.width(5, 160, 0.0), OptionError, "option density=0.0: of 800 tokens, 0 of them text"),
        (lambda: svg.width(5, 160, 0.1, text=400), OptionError, "Give a share up to 1 that text leaves room in"),
        (lambda: sta.boxes((3, 6), (1, 1), 0), OptionError, r"option canvas_in_tiles=\(3, 6\): not three sizes"),
        (lambda: sta.boxes((3, 6, 10), (4, 1, 1), 0), OptionError, r"option window=\(4, 1, 1\): not three sizes within \(3, 6, 10\)"),
        (lambda: sta.boxes((3, 6, 10), (1, 1, 1), 180), OptionError, "option tile=180: the canvas has 180 tiles"),
        (lambda: sta.tile_order((21, 30, 52), (6, 8, 8)), OptionError, r"tiles do not fill a canvas of \(21, 30, 52\) tokens"),
        (lambda: sta.choose_windows(torch.ones(2, 1, 1, 1), [(1, 1, 1)], 0), ShapeError, "it does not fit 1 candidates"),
        (lambda: radial.frame_window(2, 1560, 0.0), OptionError, "option decay=0.0: it multiplies the width of the band"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
