"""FastVideo: its Wan transformer keeps attention under ``torch.compiler.disable``; the host compiles block by block."""

from __future__ import annotations

import importlib
import os

import torch
from stand_ins import needs, stand_in
from tiny_models import randomise
from videos import OPTIONS, check

import lvsa_compile

needs("fastvideo")
stand_in(
    "torchvision", "av", "flask", "ray", "remote_pdb", "wandb", "gpustat", "moviepy", "datasets", "torchdata", "pyarrow", "h5py", "timm",
    "cv2", "test_tube", "watch", "fastvideo_kernel", "torchaudio", "gradio", "aiohttp", "fastapi", "decord", "torchcodec",
    "cloudpickle", "loguru", "uvicorn", "openai", "msgpack", "zmq",
)  # fmt: skip
os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", FASTVIDEO_ATTENTION_BACKEND="TORCH_SDPA")
os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 1000))
platforms = importlib.import_module("fastvideo.platforms")
type(platforms.current_platform).get_attn_backend_cls = classmethod(
    lambda cls, *args, **kwargs: "fastvideo.attention.backends.sdpa.SDPABackend"
)
importlib.import_module("fastvideo.distributed").maybe_init_distributed_environment_and_model_parallel(1, 1)
wans = importlib.import_module("fastvideo.models.dits.wanvideo")
settings = importlib.import_module("fastvideo.configs.models.dits.wanvideo")
context = importlib.import_module("fastvideo.forward_context").set_forward_context
pipelines = importlib.import_module("fastvideo.pipelines.composed_pipeline_base")


def make():
    torch.manual_seed(0)
    arch = settings.WanVideoArchConfig(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_max_seq_len=128,
    )  # fmt: skip
    return randomise(wans.WanTransformer3DModel(config=settings.WanVideoConfig(arch_config=arch), hf_config={})).requires_grad_(False)


def call(model):
    return lambda latents, timestep, text: model(hidden_states=latents, encoder_hidden_states=text, timestep=timestep)


def around(step):
    return context(current_timestep=step, attn_metadata=None, forward_batch=None)


def by_the_host(model):
    pipelines.ComposedPipelineBase._compile_with_conditions(model, {"backend": "lvsa", "options": OPTIONS})


def test_the_hosts_own_compile():
    check(make, call, by_the_host, around, most_graphs=12)


def test_whole():
    check(make, call, lambda model: model.compile(backend="lvsa", options=OPTIONS), around, most_graphs=16)


def test_eager():
    check(make, call, lambda model: lvsa_compile.enable(model, **OPTIONS), around, most_graphs=0)
