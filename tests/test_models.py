"""Video transformers of diffusers, each with small random weights, beside the same model with explicit masks of the pattern.

``docs/models.md`` is written from the rows here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from minimax_h3 import SOUND, minimax_h3, packed
from oracle import MaskedAttention, token_mask
from tiny_models import CONFIG, PATTERN, randomise, wan_inputs

import lvsa_compile

pytestmark = pytest.mark.pipeline

FRAMES, ROWS, COLUMNS, TEXT = GRID = 9, 3, 4, 7
TOKENS = ROWS * COLUMNS
VIDEO = FRAMES * TOKENS
QUICK = {**PATTERN, "inner": "eager"}
STEPS = (900.0, 700.0)


@dataclass(frozen=True)
class Model:
    """A model and what its attention over the video attends: ``before`` and ``after`` are tokens beside the video's.

    ``dense`` is the reason, where the model stays dense; ``whole`` and ``blocks`` say how it is compiled,
    ``first_dense`` that by blocks only what a forward returns shows the next ones which input is the video.
    """

    what: str
    build: Callable[[], tuple[torch.nn.Module, dict]]
    sequence: str
    before: int = 0
    after: int = 0
    dense: str = ""
    whole: bool = True
    blocks: bool = False
    fullgraph: bool = False
    first_dense: bool = False


MODELS: dict[str, Model] = {}


def model(what: str, sequence: str, **facts) -> Callable:
    """Adds a model to the table under the name of the function that builds it."""

    def add(build: Callable) -> Callable:
        MODELS[build.__name__] = Model(what, build, sequence, **facts)
        return build

    return add


def noise(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def inputs(text_width: int = 16, channels: int = 4, **more) -> dict:
    """What most of them are called with."""
    latent = noise(1, channels, FRAMES, 2 * ROWS, 2 * COLUMNS)
    text = noise(1, TEXT, text_width, seed=2)
    return dict(hidden_states=latent, timestep=torch.full((1,), 900.0), encoder_hidden_states=text, return_dict=False, **more)


def all_text(dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.ones(1, TEXT, dtype=dtype)


@model("Wan 2.1, 2.2 text-to-video", "video", blocks=True)
def wan_text_to_video():
    return diffusers.WanTransformer3DModel(**CONFIG), wan_inputs()


@model("Wan 2.2 TI2V (a timestep per token)", "video", blocks=True)
def wan_timestep_per_token():
    timestep = torch.full((1, VIDEO), 900.0)
    timestep[:, :TOKENS] = 0
    return diffusers.WanTransformer3DModel(**CONFIG), {**wan_inputs(), "timestep": timestep}


@model("Wan 2.1 image-to-video", "video", blocks=True)
def wan_image_to_video():
    config = {**CONFIG, "in_channels": 9, "image_dim": 10, "added_kv_proj_dim": 48}
    given = {**wan_inputs(channels=9), "encoder_hidden_states_image": noise(1, 5, 10, seed=3)}
    return diffusers.WanTransformer3DModel(**config), {**given, "encoder_hidden_states": noise(1, 512, 16, seed=2)}


@model("Wan VACE", "video, and a control stream like it")
def wan_vace():
    vace = diffusers.WanVACETransformer3DModel(**{**CONFIG, "num_layers": 2}, vace_layers=[0, 1], vace_in_channels=8)
    return vace, {**wan_inputs(), "control_hidden_states": noise(1, 8, FRAMES, 2 * ROWS, 2 * COLUMNS, seed=4)}


@model("SkyReels V2", "video", blocks=True)
def skyreels_v2():
    return diffusers.SkyReelsV2Transformer3DModel(**CONFIG), wan_inputs()


@model("HunyuanVideo", "video, text", after=TEXT, blocks=True)
def hunyuan_video():
    hunyuan = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    more = dict(encoder_attention_mask=all_text(), pooled_projections=noise(1, 8, seed=3), guidance=torch.full((1,), 6000.0))
    return hunyuan, inputs(**more)


@model("HunyuanVideo 1.5", "video, image and two texts", after=3 + 5 + TEXT, whole=False, blocks=True)
def hunyuan_video_15():
    hunyuan = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1, patch_size=1,
        patch_size_t=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=10, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    more = dict(
        encoder_attention_mask=all_text(), encoder_hidden_states_2=noise(1, 5, 12, seed=3),
        encoder_attention_mask_2=torch.ones(1, 5, dtype=torch.int64), image_embeds=noise(1, 3, 10, seed=4),
    )  # fmt: skip
    return hunyuan, {**inputs(**more), "hidden_states": noise(1, 9, FRAMES, ROWS, COLUMNS)}


def cogvideox(**more) -> torch.nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16, num_layers=2,
        sample_width=2 * COLUMNS, sample_height=2 * ROWS, sample_frames=4 * (FRAMES - 1) + 1, patch_size=2, max_text_seq_length=TEXT,
        **more,
    )  # fmt: skip


def frames_first(**more) -> dict:
    given = inputs(**more)
    return {**given, "hidden_states": given["hidden_states"].transpose(1, 2).contiguous(), "timestep": torch.full((1,), 900)}


@model("CogVideoX 2B", "text, video", before=TEXT)
def cogvideox_2b():
    return cogvideox(), frames_first()


@model("CogVideoX 5B", "text, video", before=TEXT)
def cogvideox_5b():
    rope = get_3d_rotary_pos_embed(embed_dim=16, crops_coords=((0, 0), (ROWS, COLUMNS)), grid_size=(ROWS, COLUMNS), temporal_size=FRAMES)
    return cogvideox(use_rotary_positional_embeddings=True), frames_first(image_rotary_emb=rope)


@model("LTX-Video", "video", blocks=True)
def ltx_video():
    ltx = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    sizes = dict(num_frames=FRAMES, height=ROWS, width=COLUMNS, rope_interpolation_scale=(8 / 25, 32, 32))
    return ltx, {**inputs(encoder_attention_mask=all_text(), **sizes), "hidden_states": noise(1, VIDEO, 8)}


@model("LTX 2", "video; audio apart", blocks=True)
def ltx_2():
    ltx = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, audio_in_channels=6,
        audio_out_channels=6, audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2,
        caption_channels=16,
    )  # fmt: skip
    more = dict(
        audio_hidden_states=noise(1, 10, 6, seed=3), audio_encoder_hidden_states=noise(1, TEXT, 16, seed=4), sigma=torch.full((1,), 0.5),
        encoder_attention_mask=all_text(), audio_encoder_attention_mask=all_text(), num_frames=FRAMES, height=ROWS, width=COLUMNS,
        fps=24.0, audio_num_frames=10,
    )  # fmt: skip
    return ltx, {**inputs(**more), "hidden_states": noise(1, VIDEO, 8)}


@model("Mochi 1", "video, text", after=TEXT, fullgraph=True)
def mochi():
    mochi = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=16,
        time_embed_dim=8,
    )  # fmt: skip
    return mochi, inputs(encoder_attention_mask=all_text(torch.bool))


@model("Allegro", "video")
def allegro():
    allegro = diffusers.AllegroTransformer3DModel(
        patch_size=2, patch_size_t=1, num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=48, sample_height=2 * ROWS, sample_width=2 * COLUMNS, sample_frames=FRAMES, caption_channels=16,
    )  # fmt: skip
    *rope, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
        embed_dim=24,
        crops_coords=((0, 0), (ROWS, COLUMNS)),
        grid_size=(ROWS, COLUMNS),
        temporal_size=FRAMES,
        interpolation_scale=(2.2, 2, 2),
    )
    places = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T.reshape(3, 1, -1).contiguous()
    more = dict(attention_mask=None, encoder_attention_mask=all_text(), image_rotary_emb=(tuple(rope), tuple(places)))
    return allegro, inputs(**more)


@model("EasyAnimate", "text, video", before=TEXT)
def easyanimate():
    easyanimate = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=2 * COLUMNS,
        sample_height=2 * ROWS, num_layers=2, mmdit_layers=1, time_embed_dim=8, text_embed_dim=16,
    )  # fmt: skip
    return easyanimate, inputs()


@model("Kandinsky 5 (full attention)", "video", blocks=True)
def kandinsky_5():
    kandinsky = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2), model_dim=32, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=True,
    )  # fmt: skip
    places = [torch.arange(size) for size in (FRAMES, ROWS, COLUMNS)]
    more = dict(visual_rope_pos=places, text_rope_pos=torch.arange(TEXT), scale_factor=(1.0, 2.0, 2.0), sparse_params=None)
    latent = noise(1, FRAMES, 2 * ROWS, 2 * COLUMNS, 9)
    return kandinsky, {**inputs(pooled_projections=noise(1, 8, seed=3), **more), "hidden_states": latent}


@model("Cosmos Predict 1", "video")
def cosmos():
    cosmos = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2.0, text_embed_dim=16,
        adaln_lora_dim=4, max_size=(16, 16, 16), patch_size=(1, 2, 2), rope_scale=(1.0, 1.0, 1.0), concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip
    return cosmos, inputs(fps=24)


@model("MiniMax-H3", "text, conditioning frame, sound, video", before=TEXT + TOKENS + SOUND, blocks=True, first_dense=True)
def minimax():
    return minimax_h3(), packed(TEXT, (FRAMES, ROWS, COLUMNS))


@model("Latte", "each frame, and each place, apart", dense="spatial_or_temporal")
def latte():
    latte = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32,
        attention_bias=True, sample_size=2 * ROWS, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=16, video_length=FRAMES,
    )  # fmt: skip
    given = inputs()
    return latte, {**given, "hidden_states": given["hidden_states"][..., : 2 * ROWS], "timestep": torch.full((1,), 900)}


@model("Sana Video", "video, by linear attention", dense="already_sparse")
def sana_video():
    sana = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16, mlp_ratio=2.0, patch_size=(1, 2, 2), rope_max_seq_len=64,
    )  # fmt: skip
    return sana, inputs(encoder_attention_mask=all_text())


def built(name: str) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    network, given = MODELS[name].build()
    return randomise(network), given


def answer(network: Callable, given: dict, timestep: float) -> torch.Tensor:
    given = {**given, "timestep": torch.where(given["timestep"] > 0, timestep, 0).to(given["timestep"].dtype)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = network(**given)
    return (found if isinstance(found, torch.Tensor) else found[0]).float()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def compiled(network: torch.nn.Module, facts: Model, way: str) -> Callable:
    if way == "whole":
        return torch.compile(network, backend="lvsa", options=QUICK, fullgraph=facts.fullgraph)
    lvsa_compile.compile_repeated_blocks(network, options=QUICK)
    return network


@pytest.mark.parametrize(("name", "way"), [
    (name, way) for name, facts in MODELS.items() for way in ("whole", "blocks") if getattr(facts, way) and not facts.dense
])  # fmt: skip
def test_it_computes_what_the_model_does_under_explicit_masks(name, way):
    facts = MODELS[name]
    network, given = built(name)
    masked, dense = [], []
    for step, timestep in enumerate(STEPS):
        mask = token_mask(FRAMES, TOKENS, step, prefix=facts.before, suffix=facts.after, window=1, reference=4)
        mode = MaskedAttention(mask)
        mode.replaces_masks = True  # those that are here leave nothing out
        dense.append(answer(network, given, timestep))
        with mode:
            masked.append(answer(network, given, timestep))
        assert mode.calls, "no attention of that length was masked"
    assert min(error(a, b) for a, b in zip(masked, dense, strict=True)) > 1e-3, "the test could not tell sparse from dense"
    forward = compiled(network, facts, way)
    if facts.first_dense and way == "blocks":
        assert torch.equal(answer(forward, given, STEPS[0]), dense[0])
    for timestep, expected in zip(STEPS, masked, strict=True):
        assert error(answer(forward, given, timestep), expected) < 1e-4
    assert any(report.sparse_sites for report in lvsa_compile.reports())


@pytest.mark.parametrize("name", [name for name, facts in MODELS.items() if facts.dense])
def test_it_stays_dense_and_says_why(name):
    network, given = built(name)
    dense = answer(network, given, STEPS[0])
    assert torch.equal(answer(torch.compile(network, backend="lvsa", options=QUICK), given, STEPS[0]), dense)
    sites = [site for report in lvsa_compile.reports() for site in report.sites]
    assert MODELS[name].dense in {site.reason for site in sites}
    assert not any(site.decision == "sparse" for site in sites)


def test_the_grid_tells_its_parts_apart():
    assert len({*GRID}) == len(GRID)
    assert math.prod(GRID[:3]) == VIDEO
