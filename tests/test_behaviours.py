"""What a diffusers user does around the backend, row by row, each with a real pipeline of small random parts.

``docs/behaviours.md`` is written from the rows here.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import diffusers
import PIL.Image
import pytest
import torch
from diffusers import WanPipeline
from tiny_models import EXACT, PATTERN, randomise, wan
from tiny_pipelines import SIZE, SteppedAttention, t5, tokenizer, unipc, vace_transformer, wan_parts, wan_pipeline, wan_vae

import lvsa_compile

pytestmark = pytest.mark.pipeline

ROWS: list[tuple[str, str, str]] = []
QUICK = {**PATTERN, "inner": "eager"}
STEPS = {"num_inference_steps": 4, "output_type": "latent"}
WAN = {"prompt": "a dog", "negative_prompt": "blurry", "guidance_scale": 5.0, **SIZE, **STEPS}


def behaviour(what: str, result: str, note: str = "") -> Callable:
    """Adds a row to the table: what the user does, and "works", "dense with reason" or "error"."""
    ROWS.append((what, result, note))
    return lambda test: test


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def latents(pipe, **call) -> torch.Tensor:
    result = pipe(**call, generator=torch.Generator().manual_seed(0))
    return result.frames


def expected(pipe, frames: int = 9, tokens: int = 12, layout: dict | None = None, prepare: Callable | None = None, **call) -> torch.Tensor:
    """The uncompiled pipeline with explicit masks whose step moves at the end of each of its steps."""
    masked = SteppedAttention(frames, tokens, **(layout or {}))
    if prepare is not None:
        prepare(masked)
        masked.replaces_masks = True
    with masked:
        masked.mask = masked.masks[0]
        found = latents(pipe, **call, callback_on_step_end=masked.on_step_end)
    assert masked.calls, "no attention of that length was masked"
    return found


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return float((a - b).abs().max()) < tolerance * float(b.abs().max())


def reasons() -> set[str]:
    return {site.reason for report in lvsa_compile.reports() for site in report.sites}


def check(pipe, frames: int = 9, tokens: int = 12, layout: dict | None = None, prepare: Callable | None = None, **call) -> None:
    """Compiled equals masked, twice in a row, and masked is not dense."""
    dense, answer = latents(pipe, **call), expected(pipe, frames, tokens, layout, prepare, **call)
    assert not close(answer, dense, 1e-3), "the test could not tell sparse from dense"
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    for _ in range(2):
        assert close(latents(pipe, **call), answer)


@behaviour('Wan text-to-video, `transformer.compile(backend="lvsa")`, two videos in a row', "works", "guidance as two calls per step")
def test_wan_in_place():
    check(wan_pipeline(), **WAN)


@behaviour('Wan text-to-video, `pipe.transformer = torch.compile(pipe.transformer, backend="lvsa")`', "works")
def test_wan_wrapped():
    pipe = wan_pipeline()
    answer = expected(pipe, **WAN)
    pipe.transformer = torch.compile(pipe.transformer, backend="lvsa", options=QUICK)
    assert close(latents(pipe, **WAN), answer)


@behaviour("Wan image-to-video (first frame given)", "works")
def test_wan_image_to_video():
    parts = {**wan_parts(in_channels=12), "image_processor": None, "image_encoder": None}
    pipe = diffusers.WanImageToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    check(pipe, **WAN, image=torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(1)))


@behaviour("Wan VACE with a reference image", "works", "the reference frame is one more latent frame of the video")
def test_wan_vace():
    pipe = wan_pipeline(diffusers.WanVACEPipeline, transformer=vace_transformer())
    check(pipe, frames=10, **WAN, reference_images=[PIL.Image.new("RGB", (64, 48), (200, 90, 30))])


@behaviour("Wan 2.2 with two experts", "works", "each expert counts its own steps; with `attach` both take the pipeline's")
def test_wan_two_experts():
    pipe = wan_pipeline(transformer_2=wan(1), boundary_ratio=0.9)
    dense = latents(pipe, **WAN)
    steps: dict[int, int] = {}
    with SteppedAttention() as masked:
        for model in (pipe.transformer, pipe.transformer_2):

            def note(module, args, kwargs):
                seen = steps.setdefault(id(module), {})
                seen.setdefault(float(kwargs["timestep"].max()), len(seen))
                masked.mask = masked.masks[seen[float(kwargs["timestep"].max())]]

            model.register_forward_pre_hook(note, with_kwargs=True)
        answer = latents(pipe, **WAN)
    assert {len(seen) for seen in steps.values()} != {4}, "one expert did all steps"
    for model in (pipe.transformer, pipe.transformer_2):
        model._forward_pre_hooks.clear()
        model._forward_pre_hooks_with_kwargs.clear()
        model.compile(backend="lvsa", options=QUICK)
    assert close(latents(pipe, **WAN), answer)
    assert not close(answer, dense, 1e-3)


@behaviour("Wan 2.2 TI2V, timesteps per token", "works")
def test_wan_expanded_timesteps():
    check(wan_pipeline(expand_timesteps=True), **WAN)


@behaviour("CogVideoX, guidance in one batch", "works")
def test_cogvideox():
    torch.manual_seed(0)
    transformer = randomise(
        diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=2,
            sample_width=8,
            sample_height=6,
            sample_frames=33,
            max_text_seq_length=8,
        )
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )
    pipe = diffusers.CogVideoXPipeline(tokenizer(), t5(), vae, transformer, diffusers.CogVideoXDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    call = {**WAN, "max_sequence_length": 8}
    check(pipe, layout={"prefix": 8}, **call)


@behaviour("LTX-Video, tokens packed by the pipeline", "works")
def test_ltx():
    torch.manual_seed(0)
    transformer = randomise(
        diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=16,
        )
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    pipe = diffusers.LTXPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae, t5(), tokenizer(), transformer)
    pipe.set_progress_bar_config(disable=True)
    call = {**WAN, "height": 96, "width": 128, "num_frames": 65, "max_sequence_length": 8}
    check(pipe, **call)


@behaviour("two prompts at once and `num_videos_per_prompt=2`", "works")
def test_batches():
    pipe = wan_pipeline()
    call = {**WAN, "prompt": ["a dog", "the beach"], "negative_prompt": ["blurry", "ugly"], "num_videos_per_prompt": 2}
    check(pipe, **call)


@behaviour("no guidance", "works")
def test_no_guidance():
    check(wan_pipeline(), **{**WAN, "guidance_scale": 1.0})


@behaviour("prompt and negative prompt of different lengths", "works", "a second length compiles once more")
def test_negative_prompt_of_another_length():
    pipe = wan_pipeline()
    generator = torch.Generator().manual_seed(3)
    call = {
        **WAN,
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": torch.randn(1, 7, 16, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 5, 16, generator=generator),
    }
    check(pipe, **call)


@behaviour(
    "another number of frames, another resolution on the next call", "works", "each new size compiles once, up to Dynamo's recompile limit"
)
def test_other_sizes_on_the_next_call():
    pipe = wan_pipeline()
    sizes = [(33, 48, 9, 12), (41, 48, 11, 12), (33, 80, 9, 20)]
    answers = [expected(pipe, frames, tokens, **{**WAN, "num_frames": n, "height": h}) for n, h, frames, tokens in sizes]
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    for (n, h, _, _), answer in [*zip(sizes, answers, strict=True)] * 2:
        assert close(latents(pipe, **{**WAN, "num_frames": n, "height": h}), answer)


@behaviour("a video interrupted from `callback_on_step_end`, then another", "works")
def test_interrupted():
    pipe = wan_pipeline()
    answer = expected(pipe, **WAN)
    pipe.transformer.compile(backend="lvsa", options=QUICK)

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 1
        return tensors

    latents(pipe, **WAN, callback_on_step_end=interrupt)
    assert close(latents(pipe, **WAN), answer)


@behaviour("video-to-video with `strength` below 1", "works")
def test_video_to_video():
    pipe = wan_pipeline(diffusers.WanVideoToVideoPipeline)
    call = {k: v for k, v in WAN.items() if k != "num_frames"}
    video = torch.rand(1, 33, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    check(pipe, **{**call, "num_inference_steps": 6}, video=video, strength=0.7)


@behaviour("few-step sampling (2 steps)", "works")
def test_few_steps():
    check(wan_pipeline(), **{**WAN, "num_inference_steps": 2})


@behaviour(
    "a second-order scheduler that repeats timesteps (Heun)",
    "works",
    "a step is a new timestep value: both evaluations of one value share it",
)
def test_heun():
    pipe = wan_pipeline(scheduler=diffusers.FlowMatchHeunDiscreteScheduler())
    dense = latents(pipe, **WAN)
    seen: dict[float, int] = {}
    with SteppedAttention() as masked:

        def note(module, args, kwargs):
            value = float(kwargs["timestep"].max())
            masked.mask = masked.masks[seen.setdefault(value, len(seen))]

        handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
        answer = latents(pipe, **WAN)
        handle.remove()
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    for _ in range(2):
        assert close(latents(pipe, **WAN), answer)
    assert not close(answer, dense, 1e-3)


@behaviour("a scheduler whose timesteps ascend (Mochi's)", "works")
def test_ascending_timesteps():
    check(wan_pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), **WAN)


@behaviour(
    "diffusion forcing, where the largest timestep stays the same",
    "works",
    "the clock sees no new value and the grid stands still; wrap each step in `with lvsa_compile.step(i):`",
)
def test_constant_largest_timestep():
    model, call = wan(), None
    from tiny_models import wan_inputs

    call = wan_inputs()
    compiled = torch.compile(model, backend="lvsa", options=QUICK)
    for step in range(3):
        call["timestep"] = torch.full((1, 108), 999.0)
        call["timestep"][:, :36] = 500.0 - step
        with SteppedAttention() as masked, torch.no_grad(), lvsa_compile.step(step):
            masked.mask = masked.masks[step]
            answer = model(**call)[0]
        with torch.no_grad(), lvsa_compile.step(step):
            assert close(compiled(**call)[0], answer)


@behaviour("`enable_model_cpu_offload()`", "works")
def test_model_offload():
    pipe = wan_pipeline()
    answer = expected(pipe, **WAN)
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    pipe.enable_model_cpu_offload(device="cpu")
    assert close(latents(pipe, **WAN), answer)


@behaviour("`transformer.enable_cache(...)`", "works", "its hooks break the model into several graphs: sparse from its second forward on")
def test_enable_cache():
    pipe = wan_pipeline()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.05))
    answer = expected(pipe, **WAN)
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    latents(pipe, **WAN)
    lvsa_compile.reset()
    assert close(latents(pipe, **WAN), answer)


@behaviour(
    "a cache that skips whole calls of the transformer", "works", "skipped calls do not stall the clock: the next call is the next step"
)
def test_skipped_calls():
    model = wan()
    from tiny_models import wan_inputs

    compiled = torch.compile(model, backend="lvsa", options=QUICK)
    for reached, timestep in enumerate((999.0, 800.0, 400.0, 300.0)):  # 900, 600 and 500 were never run
        call = {**wan_inputs(), "timestep": torch.tensor([timestep])}
        with SteppedAttention() as masked, torch.no_grad():
            masked.mask = masked.masks[reached]
            answer = model(**call)[0]
        with torch.no_grad():
            assert close(compiled(**call)[0], answer)


@behaviour("LoRA loaded before or after compiling, fused, swapped", "works", "loading an adapter compiles once more")
def test_lora():
    from peft import LoraConfig

    pipe = wan_pipeline()
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    for seed, name in ((5, "first"), (6, "second")):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in pipe.transformer.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    for name in ("first", "second"):
        pipe.transformer.set_adapter(name)
        assert close(latents(pipe, **WAN), _uncompiled(pipe, **WAN))
    pipe.transformer.fuse_lora()
    assert close(latents(pipe, **WAN), _uncompiled(pipe, **WAN))


def _uncompiled(pipe, **call) -> torch.Tensor:
    """What the pipeline as it is now gives with explicit masks."""
    compiled, pipe.transformer._compiled_call_impl = pipe.transformer._compiled_call_impl, None
    try:
        return expected(pipe, **call)
    finally:
        pipe.transformer._compiled_call_impl = compiled


@behaviour("`from_pipe` sharing a compiled transformer", "works")
def test_from_pipe():
    pipe = wan_pipeline()
    answer = expected(pipe, **WAN)
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    other = WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    for shared in (pipe, other, pipe):
        assert close(latents(shared, **WAN), answer)


@behaviour("`pipe.to(dtype)` between two videos", "works")
def test_to_dtype():
    pipe = wan_pipeline()
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    latents(pipe, **WAN)
    pipe.to(torch.bfloat16)
    assert close(latents(pipe, **WAN).float(), _uncompiled(pipe, **WAN).float(), 0.06)


@behaviour("`save_pretrained` after compiling", "works")
def test_save_pretrained(tmp_path):
    pipe = wan_pipeline()
    answer = expected(pipe, **WAN)
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    latents(pipe, **WAN)
    pipe.transformer.save_pretrained(tmp_path)
    again = wan_pipeline(transformer=diffusers.WanTransformer3DModel.from_pretrained(tmp_path))
    assert close(expected(again, **WAN), answer)


@behaviour('a VAE compiled with `backend="lvsa"`', "dense with reason", "left alone, without a warning")
def test_vae():
    vae = wan_vae()
    vae.decoder.compile(backend="lvsa", options={"inner": "eager", "reference_frames": 1})
    encoded = torch.randn(1, 4, 2, 6, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", lvsa_compile.LvsaWarning)
        output = vae.decode(encoded).sample
        vae.decoder._compiled_call_impl = None
        assert torch.equal(output, vae.decode(encoded).sample)
    assert "" not in reasons()


@behaviour("HunyuanVideo, whose text padding is a mask", "works", "the mask keeps its meaning")
def test_hunyuan_video():
    torch.manual_seed(0)
    transformer = randomise(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
            num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6)
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, vae, diffusers.FlowMatchEulerDiscreteScheduler(), None, None)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    call = dict(prompt_embeds=torch.randn(1, 7, 16), pooled_prompt_embeds=torch.randn(1, 8), prompt_attention_mask=mask, **SIZE, **STEPS)

    def with_mask(masked):
        """The oracle's masks joined with the padding mask, which the model itself passes."""
        masked.masks = [m & torch.cat([torch.ones(108, dtype=torch.bool), mask[0].bool()]) for m in masked.masks]

    check(pipe, layout={"suffix": 7}, prepare=with_mask, **call)


@behaviour("a sampler that runs in its own thread", "works")
def test_sampler_thread():
    pipe = wan_pipeline()
    answer, found = expected(pipe, **WAN), []
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    thread = threading.Thread(target=lambda: found.append(latents(pipe, **WAN)))
    thread.start()
    thread.join()
    assert close(found[0], answer)
    assert close(latents(pipe, **WAN), answer)


@behaviour("two pipelines in two threads", "works")
def test_two_pipelines_in_two_threads():
    pipes = [wan_pipeline(transformer=wan(seed), scheduler=unipc()) for seed in (0, 1)]
    answers, found = [expected(pipe, **WAN) for pipe in pipes], [None, None]
    for pipe in pipes:
        pipe.transformer.compile(backend="lvsa", options=QUICK)

    def sample(i: int) -> None:
        for _ in range(2):
            found[i] = latents(pipes[i], **WAN)

    threads = [threading.Thread(target=sample, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(close(a, b) for a, b in zip(found, answers, strict=True))


@behaviour("`lvsa_compile.integrations.diffusers.attach(pipe)`", "works", "steps come from the pipeline where it sends them")
def test_attach_and_detach():
    from lvsa_compile.integrations.diffusers import attach, detach

    pipe = wan_pipeline()
    answer = expected(pipe, **WAN)
    pipe.transformer.compile(backend="lvsa", options=QUICK)
    before = dict(vars(pipe.transformer))
    attach(attach(pipe))
    assert close(latents(pipe, **WAN), answer)
    assert "lvsa_compile.step(i)" in str(lvsa_compile.reports()[-1])
    detach(pipe)
    assert vars(pipe.transformer).keys() == before.keys()
    assert close(latents(pipe, **WAN), answer)


@behaviour("`attach` to something without a `cache_context`", "error", "names the object and the remedy")
def test_attach_to_nothing():
    from lvsa_compile.errors import AttachError
    from lvsa_compile.integrations.diffusers import attach

    with pytest.raises(AttachError) as raised:
        attach(object())
    assert str(raised.value) == (
        "attach(object): no model of it has a cache_context, through which diffusers sends the denoising step. Leave attach out; "
        "the clock reads the step from the timestep."
    )


@behaviour("gradients required", "dense with reason", "`training`, with a warning")
def test_training():
    from tiny_models import wan_inputs

    with torch.enable_grad(), pytest.warns(lvsa_compile.LvsaWarning, match="no_grad"):
        torch.compile(wan(), backend="lvsa", options=EXACT)(**wan_inputs())
    assert reasons() == {"training"}
