"""Other spellings of the same thing: all must be sparse and equal to the masked model."""

from __future__ import annotations

import einops
import oracle
import pytest
import torch
import torch.nn.functional as F
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise
from torch import nn

import lvsa_compile


def sparse_and_exact(model: nn.Module, *inputs, **layout: int) -> None:
    model = randomise(model)
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*inputs)
        with oracle.MaskedAttention(oracle.token_mask(9, 12, 0, reference=4, window=1, **layout)) as masked:
            answer = model(*inputs)
        dense = model(*inputs)
    report = lvsa_compile.reports()[-1]
    assert masked.calls
    assert report.sparse_sites, report
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max()), report
    assert float((dense - answer).abs().max()) > 1e-3 * float(answer.abs().max()), "the test could not tell sparse from dense"


def first_frame_apart(model, tokens, grid, text):
    places = grid[1] * grid[2]
    return tokens + model.attention(torch.cat([tokens[:, :places] * 0.5, tokens[:, places:]], 1))


def first_frame_written(model, tokens, grid, text):
    tokens = tokens.clone()
    tokens[:, :12] = tokens[:, :12] * 0.5
    return tokens + model.attention(tokens)


def joint(model, tokens, grid, text):
    return model.attention(torch.cat([text, tokens], 1))[:, text.shape[1] :]


def registers(model, tokens, grid, text):
    return model.attention(torch.cat([tokens, tokens.new_zeros(tokens.shape[0], 3, tokens.shape[2])], 1))[:, : tokens.shape[1]]


def text_cut_off_by_padding(model, tokens, grid, text):
    return model.attention(F.pad(torch.cat([text, tokens], 1), (0, 0, -7, 7)))[:, : tokens.shape[1]]


def normalised(model, tokens, grid, text):
    q, k, v = (f(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for f in (model.attention.to_q, model.attention.to_k, model.attention.to_v))
    return tokens + F.scaled_dot_product_attention(F.normalize(q, dim=-1) * 4, F.normalize(k, dim=-1) * 4, v).transpose(1, 2).flatten(2)


def first_frame_scaled_apart(model, tokens, grid, text):
    angles = torch.arange(grid[0])[:, None, None] + torch.arange(grid[1])[:, None] + torch.arange(grid[2])
    tokens = tokens * angles.flatten()[:, None].cos()
    return tokens + model.attention(torch.cat([tokens[:, :12] * 0.5, tokens[:, 12:]], 1))


def rearranged(model, tokens, grid, text):
    q, k, v = (
        einops.rearrange(f(tokens), "b n (h d) -> b h n d", h=2) for f in (model.attention.to_q, model.attention.to_k, model.attention.to_v)
    )
    return tokens + einops.rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def rope_in_place(model, tokens, grid, text):
    attention = model.attention
    q, k, v = (f(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for f in (attention.to_q, attention.to_k, attention.to_v))
    angle = torch.arange(tokens.shape[1])[:, None] * 0.01
    for x in (q, k):
        a, b = x[..., :4].clone(), x[..., 4:].clone()
        x[..., :4], x[..., 4:] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return tokens + attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def query_with_control(model, tokens, grid, text):
    attention = model.attention
    q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2)
               for f, x in ((attention.to_q, tokens + text), (attention.to_k, tokens), (attention.to_v, tokens)))  # fmt: skip
    return tokens + attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (None, {}), (first_frame_apart, {}), (first_frame_written, {}), (joint, {"prefix": 7}), (registers, {"suffix": 3}),
        (text_cut_off_by_padding, {"suffix": 7}), (normalised, {}), (first_frame_scaled_apart, {}),
        (rearranged, {}), (rope_in_place, {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_blocks(function, layout, batch):
    sparse_and_exact(VideoDiT(function), *dit_inputs(batch=batch), **layout)


def test_a_control_video_added_to_the_query_alone():
    class Controlled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.patch = VideoDiT(query_with_control), nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))

        def forward(self, latents, timestep, control):
            return self.inner(latents, timestep, self.patch(control).flatten(2).transpose(1, 2))

    latents, timestep, _ = dit_inputs()
    sparse_and_exact(Controlled(), latents, timestep, torch.randn(1, 4, 9, 6, 8))


class Latents(nn.Module):
    """A latent in another order of axes, brought to [B, C, F, H, W] and back."""

    def __init__(self, there, back):
        super().__init__()
        self.inner, self.there, self.back = VideoDiT(), there, back

    def forward(self, latents, timestep, text):
        return self.back(self.inner(self.there(latents), timestep, text))


@pytest.mark.parametrize(
    ("make", "there", "back"),
    [
        (lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
        (lambda x: x.permute(0, 2, 3, 4, 1), lambda x: einops.rearrange(x, "b f h w c -> b c f h w"), lambda x: x.movedim(1, -1)),
        (lambda x: [x[0]], lambda x: x[0][None], lambda x: x[0]),
        (lambda x: [x[0]], lambda x: torch.stack(x), lambda x: x),
    ],
)  # fmt: skip
def test_latent_layouts(make, there, back):
    latents, timestep, text = dit_inputs()
    sparse_and_exact(Latents(there, back), make(latents), timestep, text)


class Output(nn.Module):
    """The model's output in another spelling."""

    def __init__(self, out):
        super().__init__()
        self.inner, self.out = VideoDiT(), out

    def forward(self, latents, timestep, text):
        return self.out(self.inner(latents, timestep, text))


@pytest.mark.parametrize(
    "out",
    [
        lambda x: torch.stack(list(x.unbind(2)), 2), lambda x: F.interpolate(x, scale_factor=(1, 2, 2)),
        lambda x: F.pixel_shuffle(x.transpose(1, 2), 2), lambda x: x.flatten(1), lambda x: x[:, :, -3:],
        lambda x: F.conv_transpose3d(x, torch.ones(4, 2, 1, 2, 2), stride=(1, 2, 2)),
        lambda x: x.new_zeros(x.shape).index_copy(2, torch.arange(9), x),
    ],
)  # fmt: skip
def test_whatever_becomes_of_the_output(out):
    sparse_and_exact(Output(out), *dit_inputs())


def test_conv2d_per_frame_and_frames_in_the_batch():
    class PerFrame(VideoDiT):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(4, 16, 2, 2)

        def forward(self, latents, timestep, text):
            batch, frames = latents.shape[0], latents.shape[2]
            x = self.patch(latents.transpose(1, 2).flatten(0, 1))
            tokens = x.flatten(2).transpose(1, 2).unflatten(0, (batch, frames)).flatten(1, 2)
            out = self.unpatch(tokens + self.attention(tokens))
            return out.unflatten(1, (frames, *x.shape[2:]))

    for batch in (1, 2, 9):
        torch._dynamo.reset()
        sparse_and_exact(PerFrame(), *dit_inputs(batch=batch))


def test_temporal_patch_of_two():
    class Temporal(VideoDiT):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv3d(4, 16, (2, 2, 2), (2, 2, 2))

    sparse_and_exact(Temporal(), *dit_inputs(frames=18))


@pytest.mark.parametrize("form", ["row", "expanded", "two axes", "float"])
def test_key_padding_masks_keep_their_meaning(form):
    kept = torch.arange(115) < 112

    def padded(model, tokens, grid, text):
        mask = kept[None, None, None, :].expand(tokens.shape[0], 1, 1, 115)
        if form == "expanded":
            mask = mask.expand(-1, -1, 115, -1)
        if form == "two axes":
            mask = kept[None, :]
        if form == "float":
            mask = torch.zeros(1, 2, 1, 115).masked_fill(~mask, float("-inf"))
        return model.attention(torch.cat([tokens, text], 1), attn_mask=mask)[:, : tokens.shape[1]]

    model, inputs = randomise(VideoDiT(padded)), dit_inputs(batch=2)
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*inputs)
        assert lvsa_compile.reports()[0].sparse_sites, lvsa_compile.reports()[0]
        masked = oracle.MaskedAttention(oracle.token_mask(9, 12, 0, suffix=7, reference=4, window=1) & kept)
        masked.replaces_masks = True
        with masked:
            answer = model(*inputs)
        torch._dynamo.reset()
        torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager", "lower_padding_masks": False})(*inputs)
        assert lvsa_compile.reports()[0].sites[0].reason == "mask_not_expressible"
    assert masked.calls
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
