"""A second size of the video: sparse at each, however the model makes its tokens; text and batch stay free where they can."""

from __future__ import annotations

import itertools
import os

import einops
import oracle
import pytest
import torch
import torch.nn.functional as F
from test_graph_breaks import close, masked
from test_regional import Stack
from test_watching import in_place
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise
from torch import nn

import lvsa_compile

OPTIONS = {**EXACT, "inner": "eager"}
GRIDS = ((9, 3, 4), (12, 2, 3), (10, 3, 3), (9, 3, 4))


def by_view(x):
    b, c, f, h, w = x.shape
    x = x.view(b, c, f, h // 2, 2, w // 2, 2)
    return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, f * (h // 2) * (w // 2), c * 4)


def by_unflatten(x):
    x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def by_einops(x):
    return einops.rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", p=2, q=2)


def by_folding(x):
    b, f = x.shape[0], x.shape[2]
    patches = F.unfold(x.transpose(1, 2).flatten(0, 1), 2, stride=2)
    return patches.transpose(1, 2).unflatten(0, (b, f)).flatten(1, 2)


class Patched(nn.Module):
    """Whole patches by the usual padding, tokens in one of the spellings, text beside them."""

    def __init__(self, spell, pad=False, attend=F.scaled_dot_product_attention):
        super().__init__()
        self.attend = attend
        self.inside, self.words = nn.Linear(16, 16), nn.Linear(16, 16)
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.back, self.spell, self.pad = nn.Linear(16, 16), spell, pad

    def forward(self, latents, timestep, text):
        h, w = latents.shape[-2:]
        if self.pad:
            latents = F.pad(latents, (0, (2 - w % 2) % 2, 0, (2 - h % 2) % 2))
        b, c, f, rows, columns = latents.shape
        x = self.inside(self.spell(latents)) * (1 + timestep[:, None, None] / 1000)
        joint = torch.cat([x, self.words(text)], 1)
        q, k, v = (g(joint).unflatten(-1, (2, -1)).transpose(1, 2) for g in (self.to_q, self.to_k, self.to_v))
        joint = joint + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        x = self.back(joint[:, : x.shape[1]]).view(b, f, rows // 2, columns // 2, c, 2, 2)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(b, c, f, rows, columns)[..., :h, :w]


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def expect_sparse(compiled, model, inputs, grid, counted=None):
    """``counted``: how many words a mask of the model's own leaves."""
    lvsa_compile.reset()
    with torch.no_grad():
        output = compiled(*inputs)
        mask = oracle.token_mask(grid[0], grid[1] * grid[2], 0, reference=4, window=1, suffix=inputs[2].shape[1])
        with oracle.MaskedAttention(mask) as masked:
            if counted is not None:
                masked.replaces_masks = True
                mask[:, len(mask) - inputs[2].shape[1] + counted :] = False
            answer = model(*inputs)
    assert masked.calls == 1
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("spell", "pad"),
    [
        (by_view, True),
        (by_einops, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((by_view, False), (by_unflatten, False), (by_folding, True))),
    ],
)  # fmt: skip
def test_each_size_is_sparse(spell, dynamic, pad):
    model = randomise(Patched(spell, pad))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS, dynamic=dynamic)
    for grid in GRIDS:
        expect_sparse(compiled, model, dit_inputs(*grid), grid)


@pytest.mark.parametrize("pad", [False, True], ids=["even", "padded"])
def test_text_and_batch_stay_free(pad):
    model = randomise(Patched(by_view, pad))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS, dynamic=True)
    for grid in GRIDS[:2]:
        torch._dynamo.utils.counters.clear()
        for text, batch in ((7, 2), (11, 2), (5, 3), (23, 4)):
            expect_sparse(compiled, model, dit_inputs(*grid, text=text, batch=batch), grid)
        assert graphs() == 1
    assert any("= 12" in what for graph in lvsa_compile.reports()[-1].graphs for what in graph.specialised)


def by_products(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def by_products_of_merged_heads(q, k, v):
    lead, scale = q.shape[:2], q.shape[-1] ** -0.5
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = (torch.bmm(q, k.transpose(1, 2)) * scale).unflatten(0, lead).softmax(-1)
    return torch.bmm(scores.flatten(0, 1), v).unflatten(0, lead)


def by_sums(q, k, v):
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, v).transpose(1, 2)


def by_a_multihead_module(q, k, v):
    q, k, v = (t.transpose(1, 2).flatten(2).transpose(0, 1) for t in (q, k, v))
    one, none = torch.eye(q.shape[-1]), torch.zeros(3 * q.shape[-1])
    weights = one.repeat(3, 1)
    attended = F.multi_head_attention_forward(
        q, k, v, q.shape[-1], 2, weights, none, None, None, False, 0.0, one, none[: q.shape[-1]], training=False, need_weights=False
    )
    return attended[0].transpose(0, 1).unflatten(-1, (2, -1)).transpose(1, 2)


@pytest.mark.parametrize(
    "attend",
    [by_products, by_a_multihead_module, *(pytest.param(each, marks=pytest.mark.slow) for each in (by_products_of_merged_heads, by_sums))],
)
def test_attention_written_out_is_sparse_at_each_size_and_text_and_batch_stay_free(attend):
    model, alone = randomise(Patched(by_view, True, attend)), randomise(Patched(by_view, True))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS, dynamic=True)
    for grid in GRIDS[:2]:
        torch._dynamo.utils.counters.clear()
        for text, batch in ((7, 2), (5, 3)):
            expect_sparse(compiled, alone, dit_inputs(*grid, text=text, batch=batch), grid)
        assert graphs() == 1


def by_frames(x):
    frames = [x[:, :, f].unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3) for f in range(x.shape[2])]
    return torch.cat([frame.permute(0, 2, 1, 3, 4).flatten(2) for frame in frames], 1)


@pytest.mark.parametrize("spell", [by_einops, by_frames])
def test_a_graph_that_holds_no_attention_fixes_sizes_for_the_next_one(spell):
    def broken(x):
        x = spell(x)
        torch._dynamo.graph_break()
        return x

    model = randomise(Patched(broken))
    compiled = torch.compile(lvsa_compile.undo(model), backend="lvsa", options=OPTIONS)
    for grid in GRIDS:
        with torch.no_grad():
            expect_sparse(compiled, model, dit_inputs(*grid), grid)


def expect_dense(compiled, model, inputs, reason):
    lvsa_compile.reset()
    with torch.no_grad():
        output, answer = compiled(*inputs), model(*inputs)
    assert torch.equal(output, answer)
    assert lvsa_compile.reports()[-1].sites[-1].reason == reason


@pytest.mark.parametrize("spell", [by_view, by_folding])
def test_videos_that_are_too_short_leave_no_dense_graph_for_longer_ones(spell):
    model = randomise(Patched(spell, pad=True))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for grid in ((3, 3, 4), (4, 2, 3)):
        expect_dense(compiled, model, dit_inputs(*grid), "pattern_full")
    for grid in ((9, 3, 4), (12, 2, 3)):
        expect_sparse(compiled, model, dit_inputs(*grid), grid)


def test_a_size_that_is_padded_leaves_no_dense_graph_for_others():
    model = randomise(Patched(by_view, pad=True))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)

    def odd(frames, rows):
        latents, *rest = dit_inputs(frames, rows, 4)
        return latents[..., :-1].contiguous(), *rest

    expect_sparse(compiled, model, dit_inputs(9, 3, 4), (9, 3, 4))
    for rows in (3, 2):
        expect_dense(compiled, model, odd(9, rows), "layout_unknown")
    for grid in ((9, 3, 4), (12, 2, 3)):
        expect_sparse(compiled, model, dit_inputs(*grid), grid)


def test_a_mark_on_rows_is_kept_and_said():
    model = randomise(Patched(by_view, pad=True))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    inputs = dit_inputs()
    torch._dynamo.mark_dynamic(inputs[0], 3)
    with torch.no_grad():
        output, answer = compiled(*inputs), model(*inputs)
    assert torch.equal(output, answer)
    (site,) = lvsa_compile.reports()[-1].sites
    assert (site.reason, site.detail) == (
        "size_marked_dynamic", "the video is seen with its sizes as numbers, and axis 3 of L['latents'] is marked dynamic"
    )  # fmt: skip


def rows_and_columns(model, tokens, grid, text):
    """A mask of whole samples, its rows and its columns, as HunyuanVideo 1.5 makes it."""
    joint = torch.cat([tokens, text], 1)
    words = (torch.arange(text.shape[1], device=text.device) < 5)[None].expand(text.shape[0], -1)
    mask = F.pad(words, (tokens.shape[1], 0), value=True)
    columns = mask.view(mask.shape[0], 1, 1, mask.shape[1]).repeat(1, 1, mask.shape[1], 1)
    attended = model.attention(joint, attn_mask=(columns & columns.transpose(2, 3)).bool())
    return tokens + attended[:, : tokens.shape[1]]


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_mask_of_rows_and_columns_at_each_size(dynamic):
    model = randomise(VideoDiT(rows_and_columns))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS, dynamic=dynamic)
    for grid in GRIDS[:3]:
        expect_sparse(compiled, model, dit_inputs(*grid), grid, counted=5)


def whole(model, **settings):
    return torch.compile(model, **settings)


def dynamically(model, **settings):
    return torch.compile(model, dynamic=True, **settings)


def regionally(model, backend, options):
    return lvsa_compile.compile_repeated_blocks(model, options=options)


@pytest.mark.skipif(not int(os.environ.get("FUZZ", "0")), reason="make fuzz runs it")
@pytest.mark.parametrize("way", [whole, dynamically, regionally, in_place])
def test_each_of_twenty_four_sizes_is_sparse_twice(way):
    alone, model = randomise(Stack()), way(randomise(Stack()), backend="lvsa", options=OPTIONS)
    grids = list(itertools.product((9, 10, 11, 12), (2, 3), (2, 3, 4)))
    with torch.no_grad():
        model(*dit_inputs(*grids[0]))  # by blocks, the very first forward is dense
        for grid in (*grids, *grids):
            lvsa_compile.reset()
            assert close(model(*dit_inputs(*grid)), masked(alone, dit_inputs(*grid), 0, grid[0], grid[1] * grid[2])), grid
