"""DiffSynth-Studio: its Wan model and ``model_fn``, which calls the blocks past the forward of the model."""

from __future__ import annotations

import contextlib
import importlib
import types

import torch
from stand_ins import needs, stand_in
from tiny_models import randomise
from videos import OPTIONS, check

import lvsa_compile

needs("diffsynth")
stand_in("torchvision", "modelscope", "pandas", "librosa", "torchaudio", "av", "cv2", "torchcodec", "skimage", "decord")
dits = importlib.import_module("diffsynth.models.wan_video_dit")
pipelines = importlib.import_module("diffsynth.pipelines.wan_video")
base = importlib.import_module("diffsynth.diffusion.base_pipeline")


def make():
    torch.manual_seed(0)
    sizes = dict(dim=48, in_dim=4, ffn_dim=32, out_dim=4, text_dim=16, freq_dim=32, num_heads=2, num_layers=2)
    dit = randomise(dits.WanModel(eps=1e-6, patch_size=(1, 2, 2), has_image_input=False, **sizes))
    return types.SimpleNamespace(dit=dit, model_fn=pipelines.model_fn_wan_video, compilable_models=["dit"])


def call(pipe):
    return lambda latents, timestep, text: pipe.model_fn(dit=pipe.dit, latents=latents, timestep=timestep, context=text)


def by_function(pipe):
    pipe.model_fn = torch.compile(pipe.model_fn, backend="lvsa", options=OPTIONS)


def test_the_function_that_calls_the_blocks():
    check(make, call, by_function, lambda step: contextlib.nullcontext(), most_graphs=1)


def test_blocks_that_no_forward_calls_say_so():
    pipe = make()
    lvsa_compile.compile_repeated_blocks(pipe.dit, options=OPTIONS)
    with torch.no_grad():
        call(pipe)(torch.randn(1, 4, 9, 6, 8), torch.tensor([900.0]), torch.randn(1, 7, 16))
    reasons = {site.reason for report in lvsa_compile.reports() for site in report.sites}
    assert "forward_not_called" in reasons
