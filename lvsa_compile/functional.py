"""``sparse_attention``: LVSA by itself, for those who call attention and not a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import GradientError, ShapeError, StepError, UnknownOptionError
from lvsa_compile.ops.attention import accumulation_dtype, library, output_like
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.policies.lvsa.policy import plan_with
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.contract import AttentionCall, Lowering
from lvsa_compile.selection.select import select

_PATTERN_DEFAULTS = {field.name: field.default for field in fields(FramePattern) if field.name != "frames"}


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int, int],
    prefix: int = 0,
    suffix: int = 0,
    step: int | Tensor = 0,
    scale: float | None = None,
    return_lse: bool = False,
    **pattern: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Long Video Sparse Attention (arXiv 2605.31057) over ``prefix`` tokens, a video and ``suffix`` tokens.

    Video attends video by the frame pattern of ``step``; every other pair of tokens is attended.

    Args:
        query: ``[B, heads, S, head_dim]`` with ``S = prefix + frames * height * width + suffix``.
        key: ``[B, key_heads, S, head_dim]``; ``heads`` is a multiple of ``key_heads``.
        value: ``[B, key_heads, S, value_dim]``.
        grid: latent ``(frames, height, width)`` of the video in tokens.
        prefix: tokens before the video; suffix: tokens after it.
        step: denoising step from 0, an int or a scalar integer tensor; under torch.compile a tensor never recompiles.
        scale: factor on the scores, by default ``1 / sqrt(head_dim)``.
        return_lse: also return the log-sum-exp of the scores, ``[B, heads, S]``, natural logarithm.
        **pattern: ``window``, ``first_frames``, ``reference_frames``, ``sparsity_scale``, ``key_frame_interval``, ``expand_window`` of
            ``FramePattern``.

    Returns:
        ``[B, heads, S, value_dim]`` in the query's dtype and memory order, as ``scaled_dot_product_attention``; with ``return_lse`` a pair.

    Raises:
        ShapeError: tensors and grid do not fit together.
        StepError: ``step`` is negative.
        OptionError: a pattern argument has a value it cannot have, or does not exist.
        GradientError: a gradient would be needed.

    Example:
        >>> query = key = value = torch.randn(1, 12, 81 * 30 * 52, 128)
        >>> sparse_attention(query, key, value, grid=(81, 30, 52), step=3, reference_frames=21).shape
        torch.Size([1, 12, 126360, 128])
    """
    for name in pattern:
        if name not in _PATTERN_DEFAULTS:
            raise UnknownOptionError(name, pattern[name], list(_PATTERN_DEFAULTS))
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise GradientError("sparse_attention")
    if not isinstance(grid, (tuple, list)):
        raise ShapeError("grid", grid, "not three positive numbers", "Give (frames, height, width) in tokens.")
    if isinstance(step, Tensor):
        if step.is_floating_point():
            raise StepError(step.dtype)
    else:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise StepError(step)
        step = torch.full((), step, dtype=torch.int64, device=query.device)
    settings = {**_PATTERN_DEFAULTS, **pattern}
    output, log_sum_exp = torch.ops.lvsa.sparse_attention(
        query,
        key,
        value,
        step,
        list(grid),
        prefix,
        suffix,
        scale,
        settings["window"],
        settings["first_frames"],
        settings["reference_frames"],
        settings["sparsity_scale"],
        settings["key_frame_interval"],
        settings["expand_window"],
    )
    return (output, log_sum_exp) if return_lse else output


def _body(
    query: Tensor, key: Tensor, value: Tensor, step: Tensor, grid: list[int], prefix: int, suffix: int, scale: float | None, *pattern: Any
) -> Any:
    span, frame_pattern = _checked(query, key, value, grid, prefix, suffix, pattern)
    plan = plan_with(frame_pattern, span, span, heads=query.shape[1])
    batch, heads, _, head_dim = query.shape
    call = AttentionCall(query.device, query.dtype, batch, heads, key.shape[1], head_dim, value.shape[3], plan, device_only=True)
    attention = _ready(select(call).lowering, call)
    row = plan.rows(step.reshape(())).to(device=query.device, dtype=torch.int32)
    return attention(query, key, value, row, scale=scale)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, step: Tensor, grid: list[int], prefix: int, suffix: int, scale: float | None, *pattern: Any
) -> Any:
    _checked(query, key, value, grid, prefix, suffix, pattern)
    return output_like(query, value), torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype), device=query.device)


def _checked(
    query: Tensor, key: Tensor, value: Tensor, grid: list[int], prefix: int, suffix: int, pattern: tuple[Any, ...]
) -> tuple[VideoSpan, FramePattern]:
    """Span and pattern of a call whose arguments fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ShapeError(
                name, tuple(tensor.shape), "not [batch, heads, tokens, head_dim]", "Reshape it, or transpose tokens and heads."
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ShapeError(
                name, f"{tensor.dtype} on {tensor.device}", f"the query is {query.dtype} on {query.device}", "Convert one of them."
            )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != query.shape[0] or tensor.shape[2] != query.shape[2]:
            raise ShapeError(
                name, tuple(tensor.shape), f"batch and tokens differ from the query's {tuple(query.shape)}", "Give all three the same."
            )
    if key.shape[3] != query.shape[3]:
        raise ShapeError("key", tuple(key.shape), f"head_dim differs from the query's {query.shape[3]}", "Give both the same head_dim.")
    if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise ShapeError(
            "key",
            tuple(key.shape),
            f"{query.shape[1]} query heads, {key.shape[1]} key heads and {value.shape[1]} value heads do not go together",
            "Key and value need the same number of heads, and it must divide the query's.",
        )
    if len(grid) != 3 or any(n < 1 for n in grid):
        raise ShapeError("grid", tuple(grid), "not three positive numbers", "Give (frames, height, width) in tokens.")
    for name, count in (("prefix", prefix), ("suffix", suffix)):
        if count < 0:
            raise ShapeError(name, count, "negative", "Give a number of tokens, 0 or more.")
    span = VideoSpan(prefix, grid[0], grid[1] * grid[2], suffix)
    if span.length != query.shape[2]:
        raise ShapeError(
            "grid",
            tuple(grid),
            f"prefix {prefix} + {grid[0]}·{grid[1]}·{grid[2]} + suffix {suffix} = {span.length} tokens, but the query has {query.shape[2]}",
            "Make grid, prefix and suffix add up to the query's tokens.",
        )
    return span, FramePattern(grid[0], *pattern)


@dropped_on_reset
@functools.lru_cache(maxsize=32)
def _ready(lowering: Lowering, call: AttentionCall) -> Callable[..., tuple[Tensor, Tensor]]:
    """What computes a call."""
    with torch.inference_mode(False):
        return lowering.on_device(call)


library.define(
    "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor step, SymInt[] grid, SymInt prefix, SymInt suffix, float? scale,"
    " int window, int first_frames, int reference_frames, float sparsity_scale, int? key_frame_interval, bool expand_window)"
    " -> (Tensor, Tensor)",
    tags=compat.OPAQUE_OP_TAGS,
)
library.impl("sparse_attention", _body, "CompositeExplicitAutograd")
torch.library.register_fake("lvsa::sparse_attention", _fake, lib=library)
for _device in compat.AUTOCAST_KEYS:
    compat.register_autocast(library, "sparse_attention", _device, torch.ops.lvsa.sparse_attention.default)
