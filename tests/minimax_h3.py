"""diffusers' MiniMax-H3 with small random weights: text, a conditioning frame, sound and the video packed in one sequence."""

from __future__ import annotations

import diffusers
import torch

FRAME_OF_SOUND = 0.5
SOUND = 10


def minimax_h3() -> torch.nn.Module:
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=24, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=32, in_channels=4,
        audio_in_channels=6, text_dim=16, freq_dim=32, time_embed_hidden_dim=32, time_embed_dim=16, rope_freq_dim=4,
    )  # fmt: skip


def packed(words: int = 7, grid: tuple[int, int, int] = (9, 3, 4), timestep: float = 0.9) -> dict:
    """Inputs of a forward, as the class documents them; what is not generated has timestep 0."""
    frames, rows, columns = grid
    still, video = rows * columns, frames * rows * columns
    draw = torch.Generator().manual_seed(words)
    cube = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij"), -1).reshape(-1, 3) + words
    text = torch.arange(words, dtype=torch.float32)[:, None].expand(-1, 3)
    sound = (torch.arange(SOUND) * FRAME_OF_SOUND + words)[:, None].expand(-1, 3)
    sizes = [words, still, SOUND, video]
    text_at, still_at, sound_at, video_at = torch.arange(sum(sizes)).split(sizes)
    return dict(
        hidden_states=torch.randn(1, still + video, 16, generator=draw),
        audio_hidden_states=torch.randn(1, SOUND, 6, generator=draw),
        encoder_hidden_states=torch.randn(1, words, 16, generator=draw),
        timestep=torch.tensor([timestep, 0.0]),
        timestep_indices=torch.tensor([1, 1, 0, 0]).repeat_interleave(torch.tensor(sizes)),
        token_tags=torch.tensor([1, 0, 2, 0]).repeat_interleave(torch.tensor(sizes)),
        position_ids=torch.cat([text, cube[:still], sound, cube + torch.tensor([1.0, 0.0, 0.0])]),
        video_indices=torch.cat([still_at, video_at]),
        audio_indices=sound_at,
        text_indices=text_at,
        return_dict=False,
    )
