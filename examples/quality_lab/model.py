"""The lab's video DiT: diffusers' own Wan transformer, a million parameters, on pixels; and how it makes videos."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from scenes import SIZE, TEXT_DIM, text_of
from torch import Tensor

HORIZON = 16  # frames of the training videos; a latent frame is a frame, since there is no VAE
CHECKPOINT = Path(__file__).parent / "shapes.safetensors"
STEPS = 24
CONFIG = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 4,
    "rope_max_seq_len": 256,
}


def new_model(seed: int = 0) -> WanTransformer3DModel:
    """Untrained."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(**CONFIG)


def load(path: Path = CHECKPOINT) -> WanTransformer3DModel:
    """Trained; weights lie in half precision and are computed with in float32."""
    model = new_model()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


def save(model: WanTransformer3DModel, path: Path, note: str) -> None:
    """Weights in half precision, with a note of how they came to be."""
    save_file({name: value.detach().half().contiguous() for name, value in model.state_dict().items()}, path, {"made": note})


def noise_of(seeds: list[int], frames: int) -> Tensor:
    """``[seeds, 3, frames, SIZE, SIZE]``; a seed's noise is the same whatever it is batched with."""
    made = [torch.randn(3, frames, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(made)


@torch.no_grad()
def generate(model: torch.nn.Module, captions: list[tuple[str, str, str]], noise: Tensor, steps: int = STEPS) -> Tensor:
    """Videos ``[captions, frames, 3, SIZE, SIZE]`` in [0, 1], by Euler's method over flow matching."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    text, latents = text_of(captions), noise
    for timestep in scheduler.timesteps:
        velocity = model(latents, timestep.expand(len(latents)), text, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return ((latents + 1) / 2).clamp(0, 1).transpose(1, 2)
