"""Blocks of tokens and what the softmax gives to each, for policies that choose blocks by it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lvsa_compile.errors import OptionError, ShapeError


def block_bounds(tokens: int, block: int, video_tokens: int | None = None) -> list[int]:
    """First token of each block, and the number of tokens: blocks of ``block``, the last one partial.

    The first ``video_tokens`` are the video; none of the blocks holds tokens of it and others.

    Example:
        >>> block_bounds(10, 4, video_tokens=6)
        [0, 4, 6, 10]
    """
    video = tokens if video_tokens is None else video_tokens
    if block < 1:
        raise OptionError("block", block, "a block has at least one token", "Give 16 to 128.")
    if not 0 <= video <= tokens:
        raise OptionError(
            "video_tokens", video_tokens, f"there are {tokens} tokens", "Give how many of them, from the first on, are video."
        )
    return [*range(0, video, block), *range(video, tokens, block), tokens]


def block_mass(
    query: Tensor,
    key: Tensor,
    *,
    block: int,
    key_block: int | None = None,
    scale: float | None = None,
    log_sum_exp: Tensor | None = None,
    video_tokens: int | None = None,
) -> Tensor:
    """The sum of softmax probabilities in each block of queries and keys.

    Args:
        query: ``[B, H, Sq, head_dim]``.
        key: ``[B, key heads, Sk, head_dim]``; key heads divide the query's.
        block: tokens of a block of queries, and of keys unless ``key_block`` says otherwise.
        scale: of the scores, ``head_dim ** -0.5`` if None.
        log_sum_exp: natural log-sum-exp of the scores of each query, ``[B, H, Sq]``, as of an earlier step; computed if None.
        video_tokens: how many tokens, from the first on, are the video, which has blocks of its own; all if None.

    Returns:
        ``[B, H, query blocks, key blocks]``, in float64 of float64, else in float32; each row sums to the queries of its block where
        ``log_sum_exp`` is that of the scores.

    Raises:
        ShapeError: the shapes do not fit.
        OptionError: ``block`` or ``video_tokens`` cannot be.

    Example:
        >>> query = key = torch.zeros(1, 1, 4, 8)
        >>> block_mass(query, key, block=2)
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    check_query_and_key(query, key)
    if log_sum_exp is not None and log_sum_exp.shape != query.shape[:3]:
        raise ShapeError("log_sum_exp", tuple(log_sum_exp.shape), f"not {tuple(query.shape[:3])}", "Give a number for each query.")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(dtype), key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = block_bounds(query.shape[2], block, video_tokens)
    columns = torch.tensor(block_bounds(key.shape[2], block if key_block is None else key_block, video_tokens), device=key.device)
    of_key = torch.repeat_interleave(torch.arange(len(columns) - 1, device=key.device), columns.diff(), output_size=key.shape[2])
    found = []
    for start, stop in itertools.pairwise(rows):
        scores = query[:, :, start:stop] @ key.mT * scale
        known = scores.logsumexp(-1) if log_sum_exp is None else log_sum_exp[:, :, start:stop].to(dtype)
        of_keys = (scores - known[..., None]).exp().sum(2)
        found.append(of_keys.new_zeros(*of_keys.shape[:2], len(columns) - 1).index_add(2, of_key, of_keys))
    return torch.stack(found, 2)


def in_falling_order(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Masses along the last axis in falling order, and the place of each in that order; of equal ones the first comes first."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(mass.shape[-1], device=mass.device).expand_as(order)
    return ordered, torch.empty_like(order).scatter(-1, order, places)


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    """Raises ShapeError where they are not ``[B, H, Sq, head_dim]`` and ``[B, key heads, Sk, head_dim]``, key heads a divisor of ``H``."""
    if query.dim() != 4:
        raise ShapeError("query", tuple(query.shape), "not [B, H, Sq, head_dim]", "Give heads an axis of their own, before the tokens.")
    fits = key.dim() == 4 and key.shape[0] == query.shape[0] and key.shape[3] == query.shape[3] and query.shape[1] % key.shape[1] == 0
    if not fits:
        problem = f"it does not fit a query {tuple(query.shape)}"
        raise ShapeError("key", tuple(key.shape), problem, "Give [B, key heads, Sk, head_dim], the key heads a divisor of the query's.")
