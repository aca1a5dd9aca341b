"""cache-dit: DBCache skips blocks by what the first of them gives, with and without a calibrator."""

from __future__ import annotations

import warnings

import pytest
import torch
from stand_ins import needs
from tiny_models import wan
from tiny_pipelines import SIZE, SteppedAttention, wan_pipeline
from videos import APART, OPTIONS, SAME, off

import lvsa_compile

needs("cache_dit")
import cache_dit  # noqa: E402

CALL = {"prompt": "a dog", "negative_prompt": "blurry", "guidance_scale": 5.0, **SIZE, "num_inference_steps": 6, "output_type": "latent"}
WAYS = {
    "whole": lambda pipe: pipe.transformer.compile(backend="lvsa", options=OPTIONS),
    "the host's blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="lvsa", options=OPTIONS),
    "our blocks": lambda pipe: lvsa_compile.compile_repeated_blocks(pipe.transformer, options=OPTIONS),
    "enabled": lambda pipe: lvsa_compile.enable(pipe, **OPTIONS),
}
GRAPHS = {"whole": 8, "the host's blocks": 2, "our blocks": 1, "enabled": 0}


def cached(calibrated):
    pipe = wan_pipeline(transformer=wan(num_layers=4))
    settings = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=10.0, max_continuous_cached_steps=1
    )
    more = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)} if calibrated else {}
    cache_dit.enable_cache(pipe, cache_config=settings, **more)
    return pipe


def latents(pipe, **more):
    return pipe(**CALL, generator=torch.Generator().manual_seed(0), **more).frames


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("way", WAYS)
def test_two_videos(way, calibrated):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dense = latents(cached(calibrated))
    with SteppedAttention() as masked:
        want = latents(cached(calibrated), callback_on_step_end=masked.on_step_end)
    assert 0 < masked.calls < 2 * 6 * 4, "some blocks are skipped"
    assert off(want, dense) > APART
    pipe = cached(calibrated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WAYS[way](pipe)
        latents(pipe)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs <= GRAPHS[way]
        for _ in range(2):
            lvsa_compile.reset()
            assert off(latents(pipe), want) < SAME
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
