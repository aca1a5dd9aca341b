"""diffusers: a Wan pipeline under each of its step caches, whole, by blocks, and not compiled at all."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from stand_ins import needs
from tiny_pipelines import wan_pipeline
from videos import OPTIONS, SAME, answers, exact_from_now_on, forget, graphs, latents, off

import lvsa_compile

needs("vllm_omni")  # in the environment of the hosts alone, since it takes two minutes
STEPS = 5


def mag(pipe):
    ratios = torch.linspace(1.0, 0.9, STEPS)
    return diffusers.MagCacheConfig(num_inference_steps=STEPS, threshold=0.5, max_skip_steps=2, retention_ratio=0.2, mag_ratios=ratios)


def broadcast(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: pipe.current_timestep,
        spatial_attention_block_identifiers=("blocks",),
    )


def taylor(pipe):
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1, cache_identifiers=[r"blocks\.\d+\.attn1"],
        taylor_factors_dtype=torch.float32,
    )  # fmt: skip


def faster(pipe):
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda module: 0.5,
        is_guidance_distilled=True,
    )


CACHES = {
    "FirstBlockCache": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.05),
    "FirstBlockCache that skips": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=1e3),
    "MagCache": mag,
    "SEA": lambda pipe: diffusers.SeaCacheConfig(threshold=5.0),
    "PyramidAttentionBroadcast": broadcast,
    "TaylorSeer": taylor,
    "FasterCache": faster,
}
WAYS = {
    "whole": lambda pipe: pipe.transformer.compile(backend="lvsa", options=OPTIONS),
    "diffusers' blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="lvsa", options=OPTIONS),
    "our blocks": lambda pipe: lvsa_compile.compile_repeated_blocks(pipe.transformer, options=OPTIONS),
    "enabled": lambda pipe: lvsa_compile.enable(pipe, **OPTIONS),
}


def cached(cache):
    pipe = wan_pipeline()
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    return pipe


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", WAYS)
def test_two_videos(cache, way):
    forget()
    dense, want, _ = answers(lambda: cached(cache), STEPS)
    pipe = cached(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WAYS[way](pipe)
        first = latents(pipe, STEPS)
        if (cache, way) == ("MagCache", "diffusers' blocks"):  # its hooks keep Dynamo from all blocks: no graph, and nothing of ours runs
            assert (graphs(), off(first, dense)) == (0, 0.0)
            lvsa_compile.enable(pipe, **OPTIONS)
        elif way in ("our blocks", "enabled"):
            assert off(first, want) < SAME
        latents(pipe, STEPS)
        exact_from_now_on(lambda: latents(pipe, STEPS), want)
    assert way != "enabled" or graphs() == 0
