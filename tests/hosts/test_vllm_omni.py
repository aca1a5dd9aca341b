"""vLLM-Omni: its Wan transformer, forward context and ways of compiling, over stand-ins for vLLM, of which there is no build for CPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import logging
import re
import types

import pytest
import torch
from stand_ins import needs, package, stand_in
from tiny_models import randomise
from torch import nn
from videos import OPTIONS, check

import lvsa_compile
from lvsa_compile.backend import lvsa

FOLDER = needs("vllm_omni")


class Linear(nn.Module):
    """vLLM's parallel linear layers on one device."""

    def __init__(self, input_size, output_size, bias=True, return_bias=True, **settings):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        self.bias = nn.Parameter(torch.zeros(output_size)) if bias else None
        self.return_bias, self.input_size, self.output_size = return_bias, input_size, output_size

    def forward(self, x):
        found = nn.functional.linear(x, self.weight, self.bias)
        return (found, None) if self.return_bias else found


class QKVLinear(Linear):
    def __init__(self, hidden_size, head_size, total_num_heads, total_num_kv_heads=None, bias=True, return_bias=True, **settings):
        self_and_others = total_num_heads + 2 * (total_num_kv_heads or total_num_heads)
        super().__init__(hidden_size, self_and_others * head_size, bias, return_bias)
        self.num_heads, self.num_kv_heads = total_num_heads, total_num_kv_heads or total_num_heads


class Conv3d(nn.Conv3d):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, **settings):
        super().__init__(in_channels, out_channels, kernel_size, stride)


class Platform:
    device_name = device_type = "cpu"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: False


class PlatformEnum(enum.Enum):
    CPU, UNSPECIFIED, CUDA, OOT, ROCM = range(1, 6)


class OnceLogger(logging.Logger):
    def info_once(self, *args, **kwargs): ...

    warning_once = debug_once = info_once


def dataclass(kind=None, **settings):
    return dataclasses.dataclass if kind is None else dataclasses.dataclass(kind)


def by_name(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


LAYERS, UTILS = "vllm.model_executor.layers", "vllm.model_executor.models.utils"
VLLM = {
    "vllm.__version__": "0.30.0",
    "vllm.version.__version__": "0.30.0",
    "vllm.version.__version_tuple__": (0, 30, 0),
    "vllm.logger.init_logger": OnceLogger,
    "vllm.envs.VLLM_PLUGINS": None,
    **{f"{LAYERS}.linear.{kind}Linear": Linear for kind in ("ColumnParallel", "RowParallel", "Replicated")},
    f"{LAYERS}.linear.LinearBase": Linear,
    f"{LAYERS}.linear.QKVParallelLinear": QKVLinear,
    f"{LAYERS}.conv.Conv3dLayer": Conv3d,
    f"{LAYERS}.quantization.base_config.QuantizationConfig": type("QuantizationConfig", (), {}),
    f"{LAYERS}.quantization.QUANTIZATION_METHODS": [],
    f"{UTILS}.make_layers": lambda count, make, prefix: (0, count, nn.ModuleList(make(prefix=f"{prefix}.{i}") for i in range(count))),
    f"{UTILS}.PPMissingLayer": nn.Identity,
    f"{UTILS}.extract_layer_index": lambda path: int(re.findall(r"\.(\d+)\.", f"{path}.")[0]),
    f"{UTILS}.make_empty_intermediate_tensors_factory": lambda *args: None,
    "vllm.distributed.get_tensor_model_parallel_world_size": lambda: 1,
    "vllm.distributed.get_tensor_model_parallel_rank": lambda: 0,
    "vllm.utils.import_utils.resolve_obj_by_qualname": by_name,
    "vllm.config.VllmConfig": type("VllmConfig", (), {}),
    "vllm.config.utils.config": dataclass,
    "vllm.platforms.current_platform": Platform(),
    "vllm.platforms.PlatformEnum": PlatformEnum,
    "vllm.platforms.interface.PlatformEnum": PlatformEnum,
    "vllm.triton_utils.HAS_TRITON": False,
    "vllm.sequence.IntermediateTensors": type("IntermediateTensors", (), {}),
}
stand_in("vllm", real=VLLM)
package("vllm_omni", FOLDER).__version__ = "0.30.0"
version = types.ModuleType("vllm_omni.version")
version.__version__, version.__version_tuple__ = "0.30.0", (0, 30, 0)
importlib.import_module("sys").modules["vllm_omni.version"] = version
for name in ("models.wan2_2", "models.hunyuan_video"):
    package(f"vllm_omni.diffusion.{name}", f"{FOLDER}/diffusion/{name.replace('.', '/')}")
platforms = importlib.import_module("vllm_omni.platforms")


class OmniPlatform(Platform):
    _omni_enum = importlib.import_module("vllm_omni.platforms.interface").OmniPlatformEnum.UNSPECIFIED
    compiles = True

    def get_diffusion_attn_backend_cls(self, *args, **kwargs):
        return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

    def supports_torch_inductor(self):
        return True

    def is_cuda(self):
        return self.compiles

    def get_device_capability(self, *args):
        return None


platforms._current_omni_platform = OmniPlatform()
compiling = importlib.import_module("vllm_omni.diffusion.compile")
wans = importlib.import_module("vllm_omni.diffusion.models.wan2_2.wan2_2_transformer")
contexts = importlib.import_module("vllm_omni.diffusion.forward_context")
wans.is_pipeline_first_stage = wans.is_pipeline_last_stage = lambda: True
wans.get_pipeline_parallel_world_size = lambda: 1


def make():
    torch.manual_seed(0)
    OmniPlatform.compiles = False
    model = wans.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=2, rope_max_seq_len=128, cross_attn_norm=True,
    )  # fmt: skip
    OmniPlatform.compiles = True
    return randomise(model)


def call(model):
    return lambda latents, timestep, text: model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]


progress = contexts.DenoiseProgressMixin()


@contextlib.contextmanager
def around(step):
    parallel = types.SimpleNamespace(
        sequence_parallel_size=1, use_hsdp=False, ring_degree=1, ulysses_degree=1, mask_sp_padding=False, allgather_degree=1
    )
    settings = types.SimpleNamespace(parallel_config=parallel, diffusion_kv_mode=None)
    with torch.inference_mode(), contexts.set_forward_context(vllm_config=None, omni_diffusion_config=settings):
        progress.record_denoise_step(step, 0.0)
        yield


@pytest.fixture
def default_backend():
    """``torch.compiler.set_default_backend``, which is how a plug-in makes the host compile with lvsa."""
    torch.compiler.set_default_backend(lambda graph, inputs, **more: lvsa(graph, inputs, options=OPTIONS, **more))
    yield
    torch.compiler.set_default_backend("inductor")


@pytest.mark.parametrize("dynamic", [True, False])
def test_its_regional_compile(default_backend, dynamic):
    check(make, call, lambda model: compiling.regionally_compile(model, dynamic=dynamic) and None, around, most_graphs=3)


def test_its_full_compile(default_backend):
    check(make, call, lambda model: model.compile(dynamic=None), around, most_graphs=2)


def test_eager():
    check(make, call, lambda model: lvsa_compile.enable(model, **OPTIONS), around, most_graphs=0)
