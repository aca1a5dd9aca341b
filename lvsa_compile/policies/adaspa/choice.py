"""AdaSpa's choice of blocks in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from lvsa_compile.errors import OptionError, ShapeError
from lvsa_compile.policies.blocks import in_falling_order

_WELL_RECALLED = 0.8
_ROUNDING = 1e-9


def recall(mass: Tensor, sparsity: float, video_blocks: int) -> Tensor:
    """The share of the mass between blocks of the video that is kept at one ``sparsity`` for all heads.

    Args:
        mass: ``[B, H, query blocks, key blocks]``, see ``block_mass``.
        sparsity: the share of key blocks that is left out, from 0 to below 1.
        video_blocks: how many blocks, from the first on, are the video.

    Returns:
        ``[B, H]``.
    """
    video = _video(mass, video_blocks)
    kept = _kept(video, sparsity)
    return (video * kept).sum((-2, -1)) / video.sum((-2, -1))


def head_sparsity(recall: Tensor, sparsity: float) -> Tensor:
    """The sparsity of each head: ``(1 + s) / 2`` for those of highest recall, ``(3 s - 1) / 2`` for as many of lowest, else ``s``.

    As many as have a recall over 0.8, at most half of the heads.

    Args:
        recall: ``[B, H]``.
        sparsity: ``s``, from 1/3 to below 1; it stays the mean.

    Returns:
        ``[B, H]`` in float64.

    Raises:
        OptionError: ``sparsity`` cannot be.
    """
    check_sparsity(sparsity)
    heads = recall.shape[-1]
    _, place = in_falling_order(recall)
    moved = (recall > _WELL_RECALLED).sum(-1, keepdim=True).clamp(max=heads // 2)
    found = torch.full_like(recall, sparsity, dtype=torch.float64)
    found = torch.where(place < moved, (1 + sparsity) / 2, found)
    return torch.where(place >= heads - moved, (3 * sparsity - 1) / 2, found)


def check_sparsity(sparsity: object) -> None:
    """Raises OptionError where a sparsity cannot be."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 1 / 3 <= sparsity < 1:
        raise OptionError("sparsity", sparsity, "heads that need more would get less than none", "Give 1/3 to below 1; the paper has 0.8.")


def choose_blocks(mass: Tensor, sparsity: float | Tensor, video_blocks: int) -> Tensor:
    """Which key blocks each query block attends: those of most mass among the video's, and all text; text attends all.

    Args:
        mass: ``[B, H, query blocks, key blocks]``.
        sparsity: the share of the video's key blocks that is left out, a number or one for each head, ``[B, H]``.
        video_blocks: how many blocks, from the first on, are the video.

    Returns:
        bool ``[B, H, query blocks, key blocks]``.

    Example:
        >>> adaspa.choose_blocks(torch.tensor([[[[3.0, 1.0], [2.0, 2.0]]]]), 0.5, 2)
        tensor([[[[ True, False],
                  [ True, False]]]])
    """
    chosen = torch.ones_like(mass, dtype=torch.bool)
    chosen[:, :, :video_blocks, :video_blocks] = _kept(_video(mass, video_blocks), sparsity)
    return chosen


def _video(mass: Tensor, video_blocks: int) -> Tensor:
    if mass.dim() != 4 or not 1 <= video_blocks <= min(mass.shape[2:]):
        problem = f"not [B, H, query blocks, key blocks] with video_blocks={video_blocks} of both"
        raise ShapeError("mass", tuple(mass.shape), problem, "Give the mass of block_mass and how many of its blocks are the video.")
    return mass[:, :, :video_blocks, :video_blocks]


def _kept(video: Tensor, sparsity: float | Tensor) -> Tensor:
    """The key blocks of most mass, for each query block."""
    given = sparsity if isinstance(sparsity, Tensor) else torch.full((), sparsity, dtype=torch.float64, device=video.device)
    share = given.to(video.device, torch.float64)
    blocks = torch.ceil((1 - share) * video.shape[-1] - _ROUNDING).clamp(min=1)
    _, place = in_falling_order(video)
    return place < (blocks[..., None, None] if blocks.dim() else blocks)
