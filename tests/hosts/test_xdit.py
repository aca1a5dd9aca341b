"""xDiT: its wrapper of diffusers' Wan transformer and its own ways of compiling, in a world of one process."""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from stand_ins import needs, package, stand_in
from tiny_models import CONFIG, randomise
from tiny_pipelines import wan_pipeline
from videos import OPTIONS, check_pipeline

import lvsa_compile
from lvsa_compile.backend import lvsa

FOLDER = needs("xfuser")
stand_in("distvae", "bs4", "av", "flask", "ray", "torchvision", "cv2")
os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 1000))
if not torch.distributed.is_initialized():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
whole = package("xfuser", FOLDER)
envs = importlib.import_module("xfuser.envs")  # asks for an accelerator where nobody says what there is
envs.get_device_version, envs.get_device, envs.get_device_name = (lambda: "0.0"), (lambda *args: torch.device("cpu")), (lambda: "cpu")
exec(compile(Path(FOLDER, "__init__.py").read_text(), "xfuser", "exec"), vars(whole))
groups = importlib.import_module("xfuser.core.distributed")
groups.init_distributed_environment(rank=0, world_size=1, local_rank=0, backend="gloo")
groups.initialize_model_parallel(backend="gloo")
wans = importlib.import_module("xfuser.model_executor.models.transformers.transformer_wan")
backends = importlib.import_module("xfuser.core.distributed.attention_backend")
runners = importlib.import_module("xfuser.model_executor.models.runner_models.base_model")


class Runtime:
    runtime_config = types.SimpleNamespace(use_spargeattn_head_balance=False, use_hybrid_attn_schedule=False)
    attention_backend = backends.AttentionBackendType.SDPA
    use_parallel_vae = False

    def increment_step_counter(self): ...

    def get_cross_attention_backend(self): ...

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


runtime = Runtime()
for module in [module for name, module in sys.modules.items() if name.startswith("xfuser") and hasattr(module, "get_runtime_state")]:
    module.get_runtime_state = lambda: runtime


def pipeline():
    torch.manual_seed(0)
    return wan_pipeline(transformer=randomise(wans.xFuserWanTransformer3DWrapper(**CONFIG)))


def by_the_host(pipe, cache):
    """``--use_torch_compile``; with a cache, or FSDP, it compiles block by block."""
    runner = types.SimpleNamespace(
        pipe=pipe,
        config=types.SimpleNamespace(fully_shard_degree=1, cache_method=cache),
        settings=types.SimpleNamespace(fsdp_strategy={"transformer": {"wrap_attrs": ["blocks"]}}),
        CUDAGRAPH_COMPILE_MODES=(),
        _enable_compute_comm_overlap=lambda: None,
        _get_compile_mode=lambda: None,
        _get_compile_dynamic=lambda: None,
        _get_compiled_pipe_components=lambda: ["transformer"],
        _get_compile_warmup_steps=lambda given: None,
        _run_compile_warmup=lambda given: None,
    )
    torch.compiler.set_default_backend(lambda graph, inputs, **more: lvsa(graph, inputs, options=OPTIONS, **more))
    try:
        runners.xFuserModel._compile_model(runner, {})
    finally:
        torch.compiler.set_default_backend("inductor")


WAYS = {
    "whole": lambda pipe: by_the_host(pipe, None),
    "its blocks": lambda pipe: by_the_host(pipe, "a cache"),
    "enabled": lambda pipe: lvsa_compile.enable(pipe, **OPTIONS),
}
GRAPHS = {"whole": 1, "its blocks": 2, "enabled": 0}


@pytest.mark.parametrize("way", WAYS)
def test_two_videos(way):
    check_pipeline(pipeline, WAYS[way], GRAPHS[way])
