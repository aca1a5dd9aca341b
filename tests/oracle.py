"""What LVSA must compute, written from the method's definition (arXiv 2605.31057) and sharing no code with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def interval(frames: int, window: int, first: int, reference: int, scale: float = 1.0) -> int:
    budget = max(first + 1, int(reference * scale))
    if frames <= budget:
        return 1
    need = max(first, min(budget, frames) - min(2 * window + 1, frames))
    strict = 1
    for k in range(frames, 0, -1):
        if len({*range(min(first, frames)), *range(0, frames, k)}) >= need:
            strict = k
            break
    must = 2 * window + first
    return max(strict, math.ceil(max(frames - must, budget - must) / max(budget - must, 1)))


def attended(frames: int, window: int, first: int, every: int, step: int, frame: int, expand: bool = True) -> set[int]:
    anchors = set(range(min(first, frames)))
    if every:
        anchors |= {(step % every + i * every) % frames for i in range(math.ceil(frames / every))}
    if window == 0:
        return anchors
    low, high = max(0, min(frame - window, frames - 1 - 2 * window)), min(frames - 1, max(frame + window, 2 * window))
    if expand:
        target = min(2 * window + 1, frames - len(anchors))
        count = len(set(range(low, high + 1)) - anchors)
        while count < target:
            before = (low, high)
            if low > 0:
                low -= 1
                count += low not in anchors
            if count >= target:
                break
            if high < frames - 1:
                high += 1
                count += high not in anchors
            if (low, high) == before:
                break
    return anchors | set(range(low, high + 1))


def token_mask(
    frames: int,
    tokens: int,
    step: int,
    *,
    prefix: int = 0,
    suffix: int = 0,
    window: int = 3,
    first: int = 1,
    reference: int = 21,
    every: int | None = None,
    expand: bool = True,
) -> Tensor:
    """bool ``[S, S]``, True where a query row attends a key column."""
    every = interval(frames, window, first, reference) if every is None else every
    length = prefix + frames * tokens + suffix
    mask = torch.ones(length, length, dtype=torch.bool)
    for f in range(frames):
        keep = attended(frames, window, first, every, step, f, expand)
        for g in set(range(frames)) - keep:
            mask[prefix + f * tokens : prefix + (f + 1) * tokens, prefix + g * tokens : prefix + (g + 1) * tokens] = False
    return mask


def dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Masked attention and log-sum-exp in float64, by the definition; a row without keys gives 0."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores if added is None else scores + added.double()).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ value, scores.logsumexp(-1)


class MaskedAttention(TorchFunctionMode):
    """Inside it, eager SDPA over ``length`` query and key tokens gets ``mask``; every other call is untouched."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask, self.calls, self.replaces_masks = mask, 0, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            call = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            if (call["query"].shape[-2], call["key"].shape[-2]) == tuple(self.mask.shape) and (
                call.get("attn_mask") is None or self.replaces_masks
            ):
                self.calls += 1
                return func(**{**call, "attn_mask": self.mask})
        return func(*args, **(kwargs or {}))
