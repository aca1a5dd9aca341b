"""Small models for tests: the real Wan transformer with random weights, and hand-written DiTs in other spellings."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

PATTERN = {"reference_frames": 4, "window": 1}
EXACT = {**PATTERN, "inner": "aot_eager"}
CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=128,
)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that let attention matter: no gate is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.05
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def wan(seed: int = 0, **changes: object) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return randomise(WanTransformer3DModel(**{**CONFIG, **changes}), seed)


def wan_inputs(frames: int = 9, rows: int = 3, columns: int = 4, batch: int = 1, timestep: float = 900.0, channels: int = 4) -> dict:
    generator = torch.Generator().manual_seed(frames)
    return dict(
        hidden_states=torch.randn(batch, channels, frames, 2 * rows, 2 * columns, generator=generator),
        timestep=torch.full((batch,), timestep),
        encoder_hidden_states=torch.randn(batch, 7, 16, generator=generator),
        return_dict=False,
    )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, **sdpa: object) -> Tensor:
        context = x if context is None else context
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.out(F.scaled_dot_product_attention(query, key, value, **sdpa).transpose(1, 2).flatten(2))


class VideoDiT(nn.Module):
    """Conv3d patchify, one block, un-patchify; ``block`` is what a test wants to look at, ``block(self, tokens, grid, text)``."""

    def __init__(self, block=None, width: int = 16, heads: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv3d(channels, width, (1, 2, 2), (1, 2, 2))
        self.attention, self.second = Attention(width, heads), Attention(width, heads)
        self.time, self.unpatch = nn.Linear(width, width), nn.Linear(width, channels * 4)
        self.block = block or (lambda model, tokens, grid, text: tokens + model.attention(tokens))

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.patch(latents)
        grid = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        frequencies = torch.arange(8, device=timestep.device) * 0.1
        angles = timestep.float()[:, None] * frequencies
        tokens = tokens + self.time(torch.cat([angles.cos(), angles.sin()], -1))[:, None]
        tokens = self.block(self, tokens, grid, text)
        out = self.unpatch(tokens).reshape(tokens.shape[0], *grid, -1, 2, 2)
        return out.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def dit_inputs(frames: int = 9, rows: int = 3, columns: int = 4, batch: int = 1, timestep: float = 900.0, text: int = 7) -> tuple:
    generator = torch.Generator().manual_seed(frames)
    return (
        torch.randn(batch, 4, frames, 2 * rows, 2 * columns, generator=generator),
        torch.full((batch,), timestep),
        torch.randn(batch, text, 16, generator=generator),
    )


@functools.cache
def timesteps(count: int) -> tuple[float, ...]:
    """A descending schedule."""
    return tuple(float(t) for t in torch.linspace(999, 20, count))
