"""Look-alikes and sites that must stay dense, each with its own true reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import EXACT, Attention, VideoDiT, dit_inputs, randomise
from torch import nn

import lvsa_compile


def explained(model: nn.Module, *inputs, **options) -> list:
    """Runs the compiled model, checks that it is the eager one, and returns the sites of its report."""
    model = randomise(model)
    with torch.no_grad():
        output, answer = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager", **options})(*inputs), model(*inputs)
    assert torch.allclose(
        output, answer, rtol=0, atol=1e-6 * float(answer.abs().max())
    )  # eager nn.MultiheadAttention has a path of its own
    return [site for report in lvsa_compile.reports() for site in report.sites]


def block(function):
    return VideoDiT(function)


def spatial(model, tokens, grid, text):
    frames, places = grid[0], grid[1] * grid[2]
    return model.attention(tokens.unflatten(1, (frames, places)).flatten(0, 1)).unflatten(0, (-1, frames)).flatten(1, 2)


def temporal(model, tokens, grid, text):
    frames = grid[0]
    rows = tokens.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
    return model.attention(rows).unflatten(0, (tokens.shape[0], -1)).transpose(1, 2).flatten(1, 2)


def reversed_frames(model, tokens, grid, text):
    return model.attention(tokens.unflatten(1, (grid[0], -1)).flip(1).flatten(1, 2))


def places_first(model, tokens, grid, text):
    return (
        model.attention(tokens.unflatten(1, (grid[0], -1)).transpose(1, 2).flatten(1, 2))
        .unflatten(1, (-1, grid[0]))
        .transpose(1, 2)
        .flatten(1, 2)
    )


def halves_swapped(model, tokens, grid, text):
    half = (grid[0] // 2) * grid[1] * grid[2]
    return model.attention(torch.cat([tokens[:, half:], tokens[:, :half]], 1))


SHUFFLE = torch.randperm(108, generator=torch.Generator().manual_seed(0))


def shuffled(model, tokens, grid, text):
    return model.attention(tokens[:, SHUFFLE])


def masked(model, tokens, grid, text):
    return model.attention(tokens, attn_mask=torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril())


def video_twice(model, tokens, grid, text):
    return model.attention(torch.cat([tokens, tokens * 2], 1))[:, : tokens.shape[1]]


def text_only(model, tokens, grid, text):
    return tokens + model.attention(text).mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "reason", "text"),
    [
        (lambda m, x, g, t: x + m.attention(x, t), "cross_attention", "query video 9×3×4, key text 7"),
        (text_only, "not_video", "query text 7, key text 7"),
        (spatial, "spatial_or_temporal", "tokens: image 12"),
        (temporal, "spatial_or_temporal", "tokens: image 9"),
        (reversed_frames, "layout_unknown", "which frame each token is of is unknown after flip, File "),
        (shuffled, "layout_unknown", "which frame each token is of is unknown after index, File "),
        (places_first, "frames_not_contiguous", "108 tokens of latents are not the video's frames, all of them, whole and in order"),
        (halves_swapped, "frames_not_contiguous", "108 tokens of latents are not the video's frames, all of them, whole and in order"),
        (masked, "mask_not_expressible", "the rows of a latent frame do not share one mask"),
        (lambda m, x, g, t: m.attention(x, is_causal=True), "causal", "The site is causal token by token."),
        (lambda m, x, g, t: m.attention(x, dropout_p=1e-9), "dropout", "dropout_p=1e-09"),
        (video_twice, "several_videos", "query video 9×3×4 | video 9×3×4"),
    ],
)
def test_dense_with_the_true_reason(function, reason, text):
    if reason == "dropout":
        torch.manual_seed(0)
        model = randomise(block(function))
        with torch.no_grad():
            torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*dit_inputs())
        (site,) = lvsa_compile.reports()[0].sites
    else:
        (site,) = explained(block(function), *dit_inputs())
    assert (site.decision, site.reason) == ("dense", reason)
    assert text in site.detail


def test_the_op_and_the_line_where_the_trail_was_lost_are_named():
    (site,) = explained(block(reversed_frames), *dit_inputs())
    assert "test_left_dense.py" in site.detail
    assert "reversed_frames" in site.detail
    assert "please open an issue with its line" in site.remedy


def test_text_as_long_as_the_video_is_still_text():
    """A length is never evidence."""
    joint = block(lambda m, x, g, t: x + m.attention(x, t))
    (site,) = explained(joint, *dit_inputs(text=9 * 3 * 4))
    assert site.reason == "cross_attention"
    torch._dynamo.reset()
    (site,) = explained(block(text_only), *dit_inputs(text=9 * 3 * 4))
    assert site.reason == "not_video"


def test_one_frame_is_an_image():
    (site,) = explained(block(None), *dit_inputs(frames=1))
    assert site.reason == "single_frame"


def test_a_video_that_is_not_the_one_generated():
    """A reference video that attends to itself: its grid never reaches the output."""

    class WithReference(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = VideoDiT(lambda m, x, grid, text: x + text)
            self.reference = VideoDiT()

        def forward(self, latents, timestep, text, reference):
            style = self.reference(reference, timestep, text).mean((1, 2, 3, 4))
            return self.inner(latents, timestep, style[:, None, None])

    (site,) = explained(WithReference(), *dit_inputs(), dit_inputs(7)[0])
    assert site.reason == "other_video"


def test_an_image_model_with_frames_nowhere():
    class ImageDiT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.attention = nn.Conv2d(4, 16, 2, 2), VideoDiT().attention

        def forward(self, image, timestep):
            x = self.patch(image)
            return self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])

    (site,) = explained(ImageDiT(), torch.randn(1, 4, 12, 8), torch.ones(1))
    assert site.reason == "no_grid"


def test_attention_in_a_nested_subgraph():
    def checkpointed(model, tokens, grid, text):
        return tokens + torch.utils.checkpoint.checkpoint(model.attention, tokens, use_reentrant=False)

    (site,) = explained(block(checkpointed), *dit_inputs())
    assert site.reason == "inside_subgraph"
    assert site.remedy == "Switch gradient checkpointing and nested compile regions off for inference."


def test_attention_that_is_sparse_already():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def flex(model, tokens, grid, text):
        heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
        mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, heads.shape[2], heads.shape[2], device="cpu")
        return flex_attention(heads, heads, heads, block_mask=mask).transpose(1, 2).flatten(2)

    def own(model, tokens, grid, text):
        heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
        return lvsa_compile.sparse_attention(heads, heads, heads, grid=tuple(grid)).transpose(1, 2).flatten(2)

    for function in (flex, own):
        torch._dynamo.reset()
        (site,) = explained(block(function), *dit_inputs())
        assert site.reason == "already_sparse"


def test_flex_attention_without_a_block_mask_is_dense_attention():
    from torch.nn.attention.flex_attention import flex_attention

    def flex(model, tokens, grid, text):
        heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
        return flex_attention(heads, heads, heads).transpose(1, 2).flatten(2)

    (site,) = explained(block(flex), *dit_inputs())
    assert (site.reason, site.detail) == ("form_not_rewritten", "flex_attention is used here, without a block mask")
    assert "leave the attention backend at its default" in site.remedy


def test_a_model_without_attention():
    assert explained(nn.Linear(4, 4), torch.randn(2, 4)) == []
    assert "no attention in this graph" in str(lvsa_compile.reports()[0])


def test_query_and_key_of_two_grids_of_equal_size():
    """Same sizes, another source: two different videos."""

    class TwoVideos(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = VideoDiT(lambda m, x, grid, text: x + m.attention(x, text))
            self.patch = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))

        def forward(self, latents, timestep, text, pose):
            return self.inner(latents, timestep, self.patch(pose).flatten(2).transpose(1, 2))

    (site,) = explained(TwoVideos(), *dit_inputs(), dit_inputs()[0] * 2)
    assert (site.decision, site.reason) == ("dense", "other_video")
    assert "query video 9×3×4, key conditioning 9×3×4" in site.detail


def test_functional_attention_with_odd_shapes_is_left_alone():
    def three_axes(model, tokens, grid, text):
        return F.scaled_dot_product_attention(tokens, tokens, tokens)

    (site,) = explained(block(three_axes), *dit_inputs())
    assert site.reason == "shape_not_supported"
    assert "query [1, 108, 16] torch.float32" in site.detail


# --- orders that writing in place can hide: each was once wrong -----------------------------------------------------------------


def reordered_in_place(model, tokens, grid, text):
    joint = torch.cat([text, tokens], 1)
    joint[:, 7:] = joint[:, 7:].unflatten(1, (grid[0], -1)).transpose(1, 2).flatten(1, 2)
    return model.attention(joint)[:, 7:]


def rolled_in_place(model, tokens, grid, text):
    tokens = tokens.clone()
    tokens[:] = tokens.roll(24, 1)
    return model.attention(tokens)


def frames_reversed_by_a_loop(model, tokens, grid, text):
    frames = tokens.unflatten(1, (grid[0], -1))
    out = frames.clone()
    for f in range(grid[0]):
        out[:, f] = frames[:, grid[0] - 1 - f]
    return model.attention(out.flatten(1, 2))


def interleaved(model, tokens, grid, text):
    out = tokens.clone()
    half = tokens.shape[1] // 2
    out[:, 0::2], out[:, 1::2] = tokens[:, :half], tokens[:, half:]
    return model.attention(out)


def view_taken_before_the_write(model, tokens, grid, text):
    out = tokens.clone()
    view = out.unflatten(1, (grid[0], -1))
    out.copy_(tokens.flip(1))
    return model.attention(view.flatten(1, 2))


def view_of_a_view_taken_before_the_write(model, tokens, grid, text):
    out = tokens.clone()
    view = out.unflatten(1, (grid[0], -1)).flatten(1, 2)
    out.copy_(tokens.flip(1))
    return model.attention(view)


@pytest.mark.parametrize(
    "function",
    [
        reordered_in_place,
        rolled_in_place,
        frames_reversed_by_a_loop,
        interleaved,
        view_taken_before_the_write,
        view_of_a_view_taken_before_the_write,
    ],
)
def test_reordering_by_writing_is_seen(function):
    (site,) = explained(block(function), *dit_inputs())
    assert (site.decision, site.reason in ("layout_unknown", "frames_not_contiguous")) == ("dense", True)


def test_a_lost_order_is_not_found_again_in_another_input():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = VideoDiT()

        def forward(self, latents, timestep, text, mask_video):
            return self.inner(latents[:, :, torch.arange(8, -1, -1)] * mask_video, timestep, text)

    (site,) = explained(Masked(), *dit_inputs(), torch.ones(1, 4, 9, 6, 8))
    assert (site.decision, site.reason) == ("dense", "frames_not_contiguous")


class Grid(nn.Module):
    """Attention over the tokens that ``tokens`` makes of any latent, and back."""

    def __init__(self, tokens, back):
        super().__init__()
        self.attention, self.tokens, self.back = VideoDiT(width=8).attention, tokens, back

    def forward(self, latents, timestep):
        return self.back(self.attention(self.tokens(latents)), latents.shape)


@pytest.mark.parametrize(
    ("shape", "tokens", "back"),
    [
        ((1, 9, 5, 3, 4, 8), lambda x: x.transpose(1, 2).flatten(0, 1).flatten(1, 3),  # [B, views, F, H, W, C], across views
         lambda x, s: x.unflatten(0, (s[0], s[2])).unflatten(2, (s[1], s[3], s[4])).transpose(1, 2)),
        ((9, 8, 3, 4), lambda x: x.permute(0, 2, 3, 1).flatten(0, 2)[None], lambda x, s: x[0].unflatten(0, (s[0], s[2], s[3]))),  # 9 images
        ((1, 18, 3, 4, 8), lambda x: x.unflatten(1, (9, 2)).transpose(1, 2).flatten(0, 1).flatten(1, 3),  # every second frame
         lambda x, s: x.unflatten(0, (s[0], 2)).unflatten(2, (9, 3, 4)).transpose(1, 2).flatten(1, 2)),
    ],
)  # fmt: skip
def test_axes_that_are_no_frames(shape, tokens, back):
    (site,) = explained(Grid(tokens, back), torch.randn(shape), torch.ones(1))
    assert site.decision == "dense"


def test_packed_tokens_whose_first_count_is_no_frame():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = VideoDiT().attention

        def forward(self, tokens, timestep):
            grid_h, grid_w, grid_f = torch.arange(9), torch.arange(4), torch.arange(3)
            table = torch.stack(torch.meshgrid(grid_h, grid_w, grid_f, indexing="ij")).flatten(1).float().sum(0)
            return self.attention(tokens * (1 + table[:, None] / 100))

    (site,) = explained(Packed(), torch.randn(1, 108, 16), torch.ones(1))
    assert site.decision == "dense"


def test_two_axes_of_one_latent_at_once_are_no_frames():
    class Plain(Grid):
        def forward(self, latents, timestep):
            return super().forward(latents + latents.transpose(2, 3), timestep)

    tokens, back = lambda x: x.flatten(2).transpose(1, 2), lambda x, s: x.transpose(1, 2).unflatten(2, s[2:])
    (site,) = explained(Plain(tokens, back), torch.randn(1, 8, 9, 9, 4), torch.ones(1))
    assert site.decision == "dense"


def einsum_written(model, tokens, grid, text):
    scores = torch.einsum("bqc,bkc->bqk", tokens, tokens) / 4
    return tokens + torch.einsum("bqk,bkc->bqc", F.dropout(F.softmax(scores, dim=-1), 0.0), tokens)


class EncoderLayer(VideoDiT):
    def __init__(self):
        super().__init__(lambda m, x, grid, text: m.layer(x))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: block(einsum_written), "written-out softmax: both factors of a product are one tensor"),
        (EncoderLayer, "_transformer_encoder_layer_fwd is used here"),
    ],
)  # fmt: skip
def test_other_forms_of_attention_are_named(model, text):
    (site,) = explained(model(), *dit_inputs())
    assert (site.decision, site.reason, site.detail) == ("dense", "form_not_rewritten", text)
    assert "scaled_dot_product_attention" in site.remedy


def linear_attention(model, tokens, grid, text):
    q, k, v = (f(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for f in (model.attention.to_q, model.attention.to_k, model.attention.to_v))
    return tokens + (q.relu() @ (k.relu().transpose(-1, -2) @ v) / 100).transpose(1, 2).flatten(2)


def test_linear_attention_is_left_alone():
    (site,) = explained(block(linear_attention), *dit_inputs())
    assert (site.reason, site.detail) == ("already_sparse", "linear attention: a product of keys and values with no softmax")


def test_a_softmax_that_is_no_attention():
    def gated(model, tokens, grid, text):
        return tokens * model.time(tokens).softmax(-1)

    assert explained(block(gated), *dit_inputs()) == []


def foreach_copied(model, tokens, grid, text):
    buffer = tokens.clone()
    torch._foreach_copy_([buffer], [tokens.unflatten(1, (grid[0], -1)).flip(1).flatten(1, 2)])
    return model.attention(buffer)


def written_by_out(model, tokens, grid, text):
    buffer = torch.empty_like(tokens)
    torch.mul(tokens.flip(1), 2, out=buffer)
    return model.attention(buffer)


def shifted_by_padding(model, tokens, grid, text):
    return model.attention(F.pad(tokens, (0, 0, 7, -7)))


def rolled_by_cat(model, tokens, grid, text):
    frames = tokens.unflatten(1, (grid[0], -1))
    rolled = torch.cat([frames[:, 5:], frames[:, :5]], 1)
    return model.attention((rolled * (1 + frames.mean((2, 3), keepdim=True))).flatten(1, 2))


def even_frames_ask_odd_ones(model, tokens, grid, text):
    even, odd = tokens[:, : 8 * 12].unflatten(1, (4, 2, -1)).unbind(2)
    out = model.attention(even.flatten(1, 2), odd.flatten(1, 2))
    return tokens + out.mean(1, keepdim=True)


def gathered_by_an_index_written_through_a_view(model, tokens, grid, text):
    order = torch.arange(tokens.shape[1])
    torch._foreach_copy_([order.view(grid[0], -1)], [torch.arange(tokens.shape[1]).flip(0).view(grid[0], -1)])
    return model.attention(tokens[:, order])


@pytest.mark.parametrize(
    "function",
    [
        gathered_by_an_index_written_through_a_view,
        foreach_copied,
        written_by_out,
        shifted_by_padding,
        rolled_by_cat,
        even_frames_ask_odd_ones,
    ],
)
def test_whatever_moves_frames_is_seen(function):
    for report in explained(block(function), *dit_inputs(), reference_frames=2):
        assert report.decision == "dense", report


def test_a_video_that_is_only_looked_at_is_not_generated():
    class Classifier(VideoDiT):
        def forward(self, latents, timestep, text):
            tokens = self.patch(latents).flatten(2).transpose(1, 2)
            return self.time(self.attention(tokens).mean(1))

    (site,) = explained(Classifier(), *dit_inputs())
    assert site.decision == "dense"


def test_channels_are_not_frames():
    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention, self.head = nn.Linear(4, 16), Attention(16, 2), nn.Linear(16, 4)

        def forward(self, image, timestep):
            b, c, h, w = image.shape
            tokens = self.embed(image.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(b, -1, 4))
            out = self.head(self.attention(tokens)).reshape(b, c, h // 2, w // 2, 2, 2)
            return out.permute(0, 1, 2, 4, 3, 5).reshape(b, c, h, w)

    (site,) = explained(Channels(), torch.randn(1, 9, 6, 8), torch.ones(1))
    assert site.decision == "dense"
