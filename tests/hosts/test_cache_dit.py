"""cache-dit: DBCache skips blocks by what the first of them gives, with and without a calibrator."""

from __future__ import annotations

import pytest
from stand_ins import needs
from tiny_models import wan
from tiny_pipelines import wan_pipeline
from videos import OPTIONS, check_pipeline

import lvsa_compile

needs("cache_dit")
import cache_dit  # noqa: E402

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


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("way", WAYS)
def test_two_videos(way, calibrated):
    calls = check_pipeline(lambda: cached(calibrated), WAYS[way], GRAPHS[way])
    assert 0 < calls < 2 * 6 * 4, "some blocks are skipped"
