"""Packed tokens ``[B, N, C]``: the grid from where the output is unpacked and from the values of coordinates; what is read is guarded."""

from __future__ import annotations

import numpy
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import EXACT, Attention, randomise
from torch import nn

import lvsa_compile
from lvsa_compile.layout import guarded_values as reading
from lvsa_compile.layout.guarded_values import SameValue
from lvsa_compile.layout.packed_grid import stretches_of

OPTIONS = {**EXACT, "inner": "eager"}


def coordinates(frames=9, rows=3, columns=4, start=0):
    grid = torch.meshgrid(torch.arange(frames) + start, torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(grid, -1).flatten(0, 2)


class Packed(nn.Module):
    """Rotary angles from coordinates ``[N, 3]``, ``[3, N]``, ``[B, 3, N]`` or ``[B, 3, N, 2]``; text before the video if there is any."""

    def __init__(self, unpack=False, counts=False):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.unpack, self.counts = unpack, counts

    def forward(self, tokens, timestep, ids=None, text=None, grid=None):
        x = tokens * (1 + timestep[:, None, None] / 1000)
        joint = x if text is None else torch.cat([text, x], 1)
        q, k, v = (f(joint).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        if ids is not None:
            ids = ids.mean(-1) if ids.dim() == 4 else ids
            ids = ids.transpose(-1, -2) if ids.shape[-2] == 3 else ids
            q, k = (a * torch.cos(ids.float().sum(-1, keepdim=True) / 10).unsqueeze(-3) for a in (q, k))
        if self.counts:
            f, h, w = (torch.arange(n) / 10 for n in grid)
            table = (f[:, None, None] + h[:, None] + w).flatten()[:, None]
            q, k = q * table.cos(), k * table.cos()
        y = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y[:, y.shape[1] - x.shape[1] :] + x
        return y.unflatten(1, self.unpack) if self.unpack else y


def run(model, *inputs, **options):
    with torch.no_grad():
        return torch.compile(model, backend="lvsa", options={**OPTIONS, **options})(*inputs)


def inputs_of(tokens=108, batch=1):
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(tokens)), torch.full((batch,), 900.0)


def expect_sparse(model, inputs, **layout):
    model = randomise(model)
    output = run(model, *inputs)
    (site,) = lvsa_compile.reports()[-1].sites
    assert site.decision == "sparse", lvsa_compile.reports()[-1]
    mask = oracle.token_mask(layout.pop("frames", 9), layout.pop("places", 12), 0, reference=4, window=1, **layout)
    with torch.no_grad(), oracle.MaskedAttention(mask) as masked:
        answer = model(*inputs)
    assert masked.calls == 1
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
    return site


def expect_dense(model, inputs, reason, detail=""):
    model = randomise(model)
    with torch.no_grad():
        assert torch.equal(run(model, *inputs), model(*inputs))
    (site,) = lvsa_compile.reports()[-1].sites
    assert (site.decision, site.reason) == ("dense", reason), site
    assert detail in site.detail


FORMS = [
    lambda ids, batch: ids,
    lambda ids, batch: ids.T.contiguous().float() * torch.tensor([[0.32], [32.0], [32.0]]),
    lambda ids, batch: ids.T.float().expand(batch, -1, -1).contiguous(),
    lambda ids, batch: torch.stack([ids.T.float(), ids.T.float() + 1], -1).expand(batch, -1, -1, -1).contiguous(),
]


@pytest.mark.parametrize("form", FORMS, ids=["[N, 3]", "[3, N] scaled", "[B, 3, N]", "[B, 3, N, 2]"])
@pytest.mark.parametrize("batch", [1, 2])
def test_coordinates_tell_the_grid(form, batch):
    expect_sparse(Packed(), (*inputs_of(batch=batch), form(coordinates(), batch)))


def test_coordinates_tell_conditioning_frames_before_and_after():
    before, after = coordinates(1, start=3), coordinates(2, start=0)
    site = expect_sparse(Packed(), (*inputs_of(108 + 36), torch.cat([before, coordinates(), after])), prefix=12, suffix=24)
    assert site.layout == "tokens[0:12] 12 | video 9×3×4 | tokens[120:144] 24"


def test_a_still_at_the_time_of_the_first_frame_is_no_part_of_it():
    ids = torch.cat([coordinates(1), coordinates()])
    expect_sparse(Packed(), (*inputs_of(108 + 12), ids), prefix=12)


def test_coordinates_of_a_joint_sequence():
    ids = torch.cat([torch.zeros(5, 3, dtype=torch.long), coordinates()])
    expect_sparse(Packed(), (*inputs_of(), ids, torch.randn(1, 5, 16)), prefix=5)


def test_other_coordinates_compile_anew():
    model, (tokens, timestep) = randomise(Packed()), inputs_of()
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    with torch.no_grad():
        for grid, shape in (((9, 3, 4), (9, 12)), ((12, 3, 3), (12, 9)), ((9, 3, 4), (9, 12))):
            output = compiled(tokens, timestep, coordinates(*grid))
            lvsa_compile.reset()
            with oracle.MaskedAttention(oracle.token_mask(*shape, 0, reference=4, window=1)):
                answer = model(tokens, timestep, coordinates(*grid))
            assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
        assert len(lvsa_compile.reports()) == 2
        ids = coordinates()
        compiled(tokens, timestep, ids)
        ids[:] = coordinates(12, 3, 3)
        output = compiled(tokens, timestep, ids)
        with oracle.MaskedAttention(oracle.token_mask(12, 9, 0, reference=4, window=1)):
            assert float((output - model(tokens, timestep, ids)).abs().max()) < 1e-4


class Scattered(nn.Module):
    """Text and video placed in one sequence by index tensors, as packed multimodal models do."""

    def __init__(self):
        super().__init__()
        self.patch, self.attention, self.head = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2)), Attention(16, 2), nn.Linear(16, 4)

    def forward(self, latents, timestep, text, text_at, video_at):
        video = self.patch(latents).flatten(2).transpose(1, 2)[0]
        joint = video.new_zeros(len(video) + len(text), 16)
        joint[text_at] = text
        joint[video_at] = video * (1 + timestep / 1000)
        return self.head(self.attention(joint[None])[0][video_at]).unflatten(0, (9, 3, 4))


def test_an_order_given_by_index_values_is_read_and_guarded():
    model = randomise(Scattered())
    latents, timestep, text = torch.randn(1, 4, 9, 6, 8), torch.full((1,), 900.0), torch.randn(5, 16)
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    first, last, backwards = torch.arange(5), torch.arange(5) + 108, torch.arange(112, 4, -1)
    cases = [  # where the text is, where the video is, and what must be true of it
        (first, torch.arange(5, 113), dict(prefix=5)), (last, torch.arange(108), dict(suffix=5)),
        (first, backwards, "frames_not_contiguous"), (first, torch.arange(5, 113), dict(prefix=5)),
    ]  # fmt: skip
    for text_at, video_at, expected in cases:
        lvsa_compile.reset()
        inputs = latents, timestep, text, text_at, video_at
        with torch.no_grad():
            output = compiled(*inputs)
            layout = expected if isinstance(expected, dict) else {}
            mask = oracle.token_mask(9, 12, 0, reference=4, window=1, **layout)
            mask = mask if isinstance(expected, dict) else torch.ones(113, 113, dtype=torch.bool)
            with oracle.MaskedAttention(mask) as masked:
                answer = model(*inputs)
        assert masked.calls == 1
        assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max()), expected
    reasons = [site.reason for report in lvsa_compile.reports() for site in report.sites]
    assert reasons[0] == reasons[1] == ""
    assert reasons[2] in ("frames_not_contiguous", "layout_unknown")
    assert len(reasons) == 3


def test_writes_that_torch_does_not_count_are_seen():
    same, tensor = SameValue(torch.arange(6)), torch.arange(6)
    assert same(tensor)
    tensor.data.copy_(torch.arange(6).flip(0))
    assert not same(tensor)


def test_a_guarded_tensor_is_compared_once_until_it_changes(monkeypatch):
    monkeypatch.setattr(reading, "_waits", lambda tensor: True)

    class Counting(SameValue):
        compared = 0

        def __call__(self, tensor):
            before = self._last
            result = super().__call__(tensor)
            Counting.compared += self._last is not before or not result
            return result

    same = Counting(torch.arange(6))
    tensor = torch.arange(6)
    assert same(tensor)
    assert same(tensor)
    assert Counting.compared == 1
    assert same(tensor.clone())
    tensor[0] = 9
    assert not same(tensor)
    assert not same(torch.arange(7))
    with torch.inference_mode():
        assert same(torch.arange(6))


@pytest.mark.parametrize("unpack", [(9, 3, 4)])
def test_where_the_output_is_unpacked(unpack):
    expect_sparse(Packed(unpack=unpack), inputs_of())


def test_witnesses_that_agree_and_witnesses_that_do_not():
    ids = coordinates()
    expect_sparse(Packed(unpack=(9, 3, 4)), (*inputs_of(), ids))
    expect_sparse(Packed(unpack=(9, 3, 4), counts=True), (*inputs_of(), None, None, (9, 3, 4)))
    text = "9×4×3 (where the output is unpacked)"
    expect_dense(Packed(unpack=(9, 4, 3)), (*inputs_of(), ids), "layout_contradicted", f"9×3×4 (values of ids) against {text}")


def test_coordinates_that_show_no_frames():
    same_twice = torch.cat([coordinates(5), coordinates(5)])
    rows_first = coordinates(3, 9, 4)[:, [1, 0, 2]]
    shuffled = coordinates()[torch.randperm(108, generator=torch.Generator().manual_seed(0))]
    for ids in (same_twice, rows_first, shuffled, torch.zeros(108, 3), coordinates(1, 9, 12)):
        torch._dynamo.reset()
        expect_dense(Packed(), (*inputs_of(len(ids)), ids), "no_grid")


def test_an_output_unpacked_into_rows_and_columns_is_an_image():
    expect_dense(Packed(unpack=(9, 12)), inputs_of(), "no_grid")


@given(
    frames=st.integers(2, 7), rows=st.integers(1, 4), columns=st.integers(1, 4), before=st.integers(0, 2), after=st.integers(0, 2),
    step=st.sampled_from([1, 8]), scale=st.sampled_from([1.0, 0.32]),
)  # fmt: skip
def test_stretches_are_those_the_coordinates_were_made_of(frames, rows, columns, before, after, step, scale):
    if rows * columns < 2 or max(before, after) >= frames:
        return
    raster = [(y, x) for y in range(rows) for x in range(columns)]
    times = [10 + t for t in range(before)], [step * t for t in range(frames)], [-5 + t for t in range(after)]
    ids = numpy.array([(t * scale, y, x) for part in times for t in part for y, x in raster])
    found = stretches_of(ids)
    sizes = [n * rows * columns for n in (before, frames, after) if n]
    assert [stretch.size for stretch in found] == sizes
    assert [stretch.shape for stretch in found if stretch.shape] == [(frames, rows, columns)]
