"""Models that other libraries have put something around: quantised, adapted, offloaded, cast, cached; rows of ``docs/behaviours.md``."""

from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from test_behaviours import behaviour
from test_graph_breaks import masked
from tiny_models import EXACT, timesteps, wan, wan_inputs

import lvsa_compile

pytestmark = pytest.mark.pipeline

LARGE = dict(num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=32, num_layers=3)
BLOCKS = "`lvsa_compile.compile_repeated_blocks`"


def int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def int4(model):
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(model.blocks, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def adapter(model):
    from peft import LoraConfig

    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def layerwise_casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(model):
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)


def cache(model):
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))


def cache_that_skips(model):
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))


def compiled(model, how):
    if how == "blocks":
        return lvsa_compile.compile_repeated_blocks(model, options=EXACT)
    return torch.compile(model, backend="lvsa", options=EXACT)


def errors(prepare, how, steps=3, around=contextlib.nullcontext, first=0):
    """Largest difference from the model with explicit masks, and from the dense one, relative to their largest value, from a step on."""
    models = [wan(**LARGE) for _ in range(3)]
    for model in models:
        prepare(model)
    run, (_, alone, dense) = compiled(models[0], how), models
    worst = [0.0, 0.0]
    for step, value in enumerate(timesteps(steps)):
        inputs = wan_inputs(timestep=value) | {"encoder_hidden_states": torch.linspace(-1, 1, 7 * 32).reshape(1, 7, 32)}

        def call(model, inputs=inputs):
            with torch.no_grad(), around(), model.cache_context("video"):
                return model(**inputs)[0]

        with torch.no_grad(), around(), models[0].cache_context("video"):
            output = run(**inputs)[0]
        answers = masked(lambda call=call: call(alone), (), step), call(dense)
        if step >= first:
            worst = [max(e, float((output - a).abs().max() / a.abs().max())) for e, a in zip(worst, answers, strict=True)]
    return worst


def sparse(prepare, how, tolerance=1e-5, **settings):
    from_masked, from_dense = errors(prepare, how, **settings)
    assert from_masked < tolerance
    assert from_dense > 5 * tolerance


@behaviour("torchao int8 and int4 weights", "works")
@pytest.mark.parametrize(("prepare", "how"), [(int8, "whole"), (int8, "blocks"), (int4, "blocks")])
def test_quantised_weights(prepare, how):
    sparse(prepare, how)


@behaviour(f"a LoRA adapter, blocks compiled by {BLOCKS}", "works")
def test_adapter():
    sparse(adapter, "blocks")


@behaviour(f"`enable_layerwise_casting(...)`, blocks compiled by {BLOCKS}", "works")
def test_layerwise_casting_by_blocks():
    sparse(layerwise_casting, "blocks")


@behaviour(
    "`enable_layerwise_casting(...)`, compiled as a whole",
    "works",
    "its hooks break the model into graphs: sparse from its second forward on",
)
def test_layerwise_casting():
    sparse(layerwise_casting, "whole", first=1)


@behaviour(f"`enable_group_offload(...)`, blocks compiled by {BLOCKS}", "works")
def test_group_offload_by_blocks():
    sparse(group_offload, "blocks")


@behaviour(
    "`enable_group_offload(...)`, compiled as a whole", "works", "its hooks break the model into graphs: sparse from its second forward on"
)
def test_group_offload():
    sparse(group_offload, "whole", first=1)


@behaviour(f"`enable_cache(...)`, blocks compiled by {BLOCKS}", "works", "blocks may be skipped")
@pytest.mark.parametrize("prepare", [cache, cache_that_skips])
def test_cache_by_blocks(prepare):
    sparse(prepare, "blocks")


@behaviour("an autocast region around the model", "works")
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_autocast(how):
    sparse(lambda model: None, how, tolerance=2e-2, around=lambda: torch.autocast("cpu", torch.bfloat16))
