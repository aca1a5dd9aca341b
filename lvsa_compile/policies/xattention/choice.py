"""XAttention's choice of blocks in plain PyTorch: masses estimated along antidiagonals (arXiv 2503.16428)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsa_compile.errors import OptionError
from lvsa_compile.policies.blocks import check_query_and_key, in_falling_order


def estimated_mass(
    query: Tensor, key: Tensor, *, block: int, stride: int, scale: float | None = None, counts: Tensor | None = None
) -> Tensor:
    """The softmax mass of each block, estimated from one score in ``stride`` of each ``stride`` × ``stride`` tile's antidiagonals.

    Tile ``[a, b]`` has the score ``sum(query[a * stride + stride - 1 - u] · key[b * stride + u] for u in range(stride)) / stride``; the
    softmax is over tiles that hold a key.  Places behind the last token count as zero vectors in a tile that is partly there.

    Args:
        query: ``[B, H, N, head_dim]``.
        key: ``[B, key heads, N, head_dim]``; key heads divide the query's.
        block: tokens of a block, a multiple of ``stride``.
        stride: tokens of a tile's side.
        scale: of the scores, ``head_dim ** -0.5`` if None.
        counts: which keys count, bool ``[B or 1, H or 1, N]``, all if None; others are as those behind the last token.

    Returns:
        ``[B, H, query blocks, key blocks]``, in float64 of float64, else in float32; a row sums to the tiles of its query block.

    Raises:
        ShapeError: the shapes do not fit.
        OptionError: ``stride`` does not divide ``block``.

    Example:
        >>> query = key = torch.zeros(1, 1, 8, 4)
        >>> estimated_mass(query, key, block=4, stride=2)
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    check_query_and_key(query, key)
    if stride < 1 or block < 1 or block % stride:
        raise OptionError("stride", stride, f"it does not divide a block of {block} tokens", "Give 8 or 16.")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = (query.shape[-1] ** -0.5 if scale is None else scale) / stride
    query = _tiles(query.to(dtype), stride).flip(3).flatten(3)
    key = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    absent = None
    if counts is not None:
        key = key.masked_fill(~counts[..., None], 0.0)
        absent = ~_tiles(counts[..., None], stride).any(3).mT  # [B or 1, H or 1, 1, tiles]
    key = _tiles(key, stride).flatten(3)
    per_block, tiles = block // stride, key.shape[2]
    found = []
    for rows in query.split(per_block, 2):
        scores = rows @ key.mT * scale
        if absent is not None:
            scores = scores.masked_fill(absent, float("-inf"))
        weights = torch.softmax(scores, -1).nan_to_num(0.0).sum(2)
        found.append(F.pad(weights, (0, -tiles % per_block)).unflatten(-1, (-1, per_block)).sum(-1))
    return torch.stack(found, 2)


def choose_blocks(query: Tensor, key: Tensor, *, block: int, stride: int, threshold: float | Tensor, scale: float | None = None) -> Tensor:
    """The key blocks of most estimated mass that together reach ``threshold`` of each query block's, and key block 0.

    Args:
        query, key, block, stride, scale: as of ``estimated_mass``.
        threshold: a share of the mass from 0 to 1, or one for each head ``[H]``.

    Returns:
        bool ``[B, H, query blocks, key blocks]``.  Of equal masses the first comes first; the block that reaches the threshold is kept.

    Raises:
        ShapeError: the shapes do not fit.
        OptionError: ``stride`` does not divide ``block``, or ``threshold`` is no share.

    Example:
        >>> xattention.choose_blocks(query, key, block=128, stride=8, threshold=0.9)
    """
    wanted = torch.as_tensor(threshold, dtype=torch.float64, device=query.device)
    if wanted.dim() > 1 or (wanted.dim() and wanted.shape[0] != query.shape[1]) or not bool(((wanted >= 0) & (wanted <= 1)).all()):
        raise OptionError("threshold", threshold, "not shares of the mass", f"Give a number from 0 to 1, or {query.shape[1]} of them.")
    return blocks_of(estimated_mass(query, key, block=block, stride=stride, scale=scale), wanted)


def blocks_of(mass: Tensor, threshold: Tensor) -> Tensor:
    """The blocks that ``choose_blocks`` keeps of an estimated mass; ``threshold`` is float64, a scalar or ``[H]``."""
    ordered, place = in_falling_order(mass.double())
    before = ordered.cumsum(-1) - ordered
    wanted = threshold.reshape(-1, 1, 1) * ordered.sum(-1, keepdim=True)
    needed = torch.where(threshold.reshape(-1, 1, 1) >= 1.0, mass.shape[-1], (before < wanted).sum(-1, keepdim=True).clamp(min=1))
    kept: Tensor = place < needed
    kept[..., 0] = True
    return kept


def _tiles(tokens: Tensor, stride: int) -> Tensor:
    """``[B, H, N, head_dim]`` as ``[B, H, tiles, stride, head_dim]``, zeros behind the last token."""
    whole: Tensor = F.pad(tokens, (0, 0, 0, -tokens.shape[2] % stride))
    return torch.unflatten(whole, 2, (-1, stride))
