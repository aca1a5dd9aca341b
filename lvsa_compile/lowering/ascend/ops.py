"""What the lowerings for Ascend NPUs share: torch_npu's fused attention, and scores that leave a key out.

The op (``npu_fused_infer_attention_score``) takes masks only as ``[queries, keys]``, which long videos have no room for, and lengths
only as numbers of the host.  So what must not be attended gets a score so low that its exponential underflows to zero.  That takes a few
more columns of head_dim, the *score columns*, in which the query holds a constant and the key what is to be added to its scores.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lvsa_compile.ops.attention import default_scale
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.contract import AttentionCall

_ALIGNED = 16  # of what head_dim must be a multiple
_PARTS = 3  # score columns: a float32 is three bfloat16
_LOWEST = -6e4  # that a float16 holds
_GONE = 1e4  # how far below 0 a score is that counts as not there; exp(-104) is 0 in float32
_LEAST_SCALE = 2.0**-10
_DTYPES = (torch.bfloat16, torch.float16)
_MOST_HEAD_DIM, _MOST_HEADS, _MOST_HEADS_PER_KEY_HEAD, _MOST_WIDTH, _MOST_BATCH = 512, 256, 64, 65535, 65536


def why_no_npu(device: torch.device) -> str | None:
    """Why a device is no NPU that torch_npu serves, or None."""
    if device.type != "npu":
        return f"it runs on npu, not on {device.type}"
    return None if importlib.util.find_spec("torch_npu") is not None else "torch_npu is not installed: pip install 'lvsa-compile[ascend]'"


def why_not_ascend(call: AttentionCall) -> str | None:
    """Why no lowering for Ascend can serve a call, or None; the limits are those of torch_npu's documentation of the op."""
    spans = (call.query, call.key)
    if call.plan.frames is None or call.plan.table.heads > 1:
        return f"its tables hold whole latent frames, and policy {call.plan.policy.name!r} chooses others"
    if call.dtype not in _DTYPES:
        return f"torch_npu's fused attention takes bfloat16 and float16, not {call.dtype}"
    if any(span.open_ended or span.free_start for span in spans):
        return "its tables want numbers of tokens that are known when it is compiled"
    if call.plan.restriction is not None:
        return "a constant mask leaves frames keys of their own, its tables hold whole frames"
    if call.masked and call.mask_heads not in (1, call.key_heads):
        return f"its keys have {call.key_heads} heads, the mask {call.mask_heads}"
    if call.query.tokens_per_frame < 2:
        return "frames of one token go to another kernel of torch_npu"
    if call.plan.dense_steps:
        return "dense_steps makes a step that attends everything, and its shapes are those of the sparse steps"
    width = padded_width(call.head_dim, call.value_dim, score_columns=True)
    if width > _MOST_HEAD_DIM:
        return f"torch_npu's fused attention takes head dims up to {_MOST_HEAD_DIM}, not {width}"
    if call.query_heads > _MOST_HEADS or call.query_heads // call.key_heads > _MOST_HEADS_PER_KEY_HEAD:
        return f"torch_npu's fused attention takes {_MOST_HEADS} heads, {_MOST_HEADS_PER_KEY_HEAD} to a key head, not {call.query_heads}"
    if call.query_heads * width >= _MOST_WIDTH:
        return f"torch_npu's fused attention takes fewer than {_MOST_WIDTH} columns of all heads, not {call.query_heads * width}"
    if call.batch * call.query.frames > _MOST_BATCH:
        return f"torch_npu's fused attention takes batches up to {_MOST_BATCH}, not {call.batch} of {call.query.frames} frames"
    return None


def padded_width(head_dim: int, value_dim: int, score_columns: bool) -> int:
    """Columns of a head as the op gets it."""
    return -(-(max(head_dim, value_dim) + _PARTS * score_columns) // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Operands:
    """Query, key and value ``[B, S, heads, width]`` as the op wants them; ``nothing`` is a key ``[key_heads, width]`` nobody attends."""

    query: Tensor
    key: Tensor
    value: Tensor
    nothing: Tensor
    scale: float
    masked: bool


def operands(
    query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, scale: float | None, key_mask: Tensor | None, some_empty: bool
) -> Operands:
    """From ``[B, heads, S, head_dim]``, with score columns where a key mask (True is kept) or an empty slot needs them."""
    head_dim, value_dim, key_heads = query.shape[3], value.shape[3], key.shape[1]
    factor = default_scale(head_dim, scale)
    query, key, value = (tensor.to(dtype).transpose(1, 2) for tensor in (query, key, value))
    columns = some_empty or key_mask is not None
    width = padded_width(head_dim, value_dim, columns)
    nothing = torch.zeros(key_heads, width, dtype=dtype, device=key.device)
    if columns:
        if abs(factor) < _LEAST_SCALE:  # under which no score column is low enough: the query takes the scale
            query, factor = query * (factor / _LEAST_SCALE), _LEAST_SCALE
        constant = 2.0 ** max(0, math.ceil(math.log2(_GONE / -_LOWEST / abs(factor))))
        lowest = math.copysign(_LOWEST, -factor)
        nothing = torch.cat([nothing[:, :head_dim], torch.full_like(nothing[:, :1], lowest), nothing[:, head_dim + 1 :]], 1)
        constants = torch.full((*query.shape[:3], _PARTS), constant, dtype=dtype, device=query.device)
        query = torch.cat([query, constants], 3)
        key = torch.cat([key, _added(key_mask, key, constant * factor, lowest)], 3)
    query, key, value = (torch.nn.functional.pad(tensor, (0, width - tensor.shape[3])) for tensor in (query, key, value))
    return Operands(query, key, value, nothing, factor, key_mask is not None)


def _added(key_mask: Tensor | None, key: Tensor, unit: float, lowest: float) -> Tensor:
    """The score columns of keys ``[B, Sk, key_heads, head_dim]``: what a mask adds to their scores, in parts that add up to it."""
    batch, length, key_heads, _ = key.shape
    if key_mask is None:
        return key.new_zeros(batch, length, key_heads, _PARTS)
    mask = key_mask.expand(-1, -1, 1, length).squeeze(2).transpose(1, 2)  # [B or 1, Sk, heads or 1]
    if mask.dtype == torch.bool:
        added = torch.where(mask, 0.0, lowest)
    else:
        added = (mask.float() / unit).clamp(min(lowest, -lowest), max(lowest, -lowest))
    parts, left = [], added.float()
    for _ in range(_PARTS):
        parts.append(left.to(key.dtype))
        left = left - parts[-1].float()
    return torch.stack(parts, 3).expand(batch, length, key_heads, _PARTS)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, key_heads: int, block_table: Tensor | None = None, keys: int = 0
) -> tuple[Tensor, Tensor]:
    """torch_npu's attention of ``[B, S, heads, width]``: the result, and the log-sum-exp ``[B, heads, S]``.

    With a ``block_table`` ``[B, pages]`` key and value are pages ``[pages, PAGE, key_heads * width]``, of which ``keys`` tokens count.
    """
    paged = {} if block_table is None else {"block_table": block_table, "block_size": key.shape[1], "actual_seq_lengths_kv": [keys]}
    output, log_sum_exp = torch.ops.npu.npu_fused_infer_attention_score(
        query.contiguous(), key.contiguous(), value.contiguous(), num_heads=query.shape[2], num_key_value_heads=key_heads,
        input_layout="BSND", scale=scale, softmax_lse_flag=True, **paged,
    )  # fmt: skip
    return output, log_sum_exp.squeeze(3)


def of_phase(table: Tensor, phase: Tensor) -> Tensor:
    """The row of a table ``[phases, ...]`` that belongs to a phase; chosen on the device."""
    return table.index_select(0, phase.reshape(1)).squeeze(0)


def video_of(tensor: Tensor, span: VideoSpan) -> Tensor:
    """The video ``[B, frames, tokens_per_frame, ...]`` of ``[B, S, ...]``."""
    video: Tensor = tensor[:, span.prefix : span.length - span.suffix].unflatten(1, (span.frames, span.tokens_per_frame))
    return video


def around_of(tensor: Tensor, span: VideoSpan) -> Tensor:
    """What is before and after the video ``[B, tokens, ...]`` of ``[B, S, ...]``."""
    parts = [tensor[:, : span.prefix], tensor[:, span.length - span.suffix :]]
    return torch.cat(parts, 1) if span.prefix and span.suffix else parts[1] if span.suffix else parts[0]


def joined(video: tuple[Tensor, Tensor], given: Operands, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The op's results from those of the video's rows, output ``[B, tokens, heads, width]`` and log-sum-exp ``[B, heads, tokens]``.

    Rows around the video attend everything.  Rows of which a mask leaves no key are 0.
    """
    output, log_sum_exp = video
    span = call.query
    if beside := span.prefix + span.suffix:
        around = around_of(given.query, span)
        if beside == 1:  # a single row goes to the op's other kernel, which takes fewer keys
            around = around.expand(-1, 2, -1, -1)
        other, other_lse = fused_attention(around, given.key, given.value, given.scale, call.key_heads)
        parts = [other[:, : span.prefix], output, other[:, span.prefix : beside]]
        sums = [other_lse[..., : span.prefix], log_sum_exp, other_lse[..., span.prefix : beside]]
        output = torch.cat([part for part, size in zip(parts, (span.prefix, 1, span.suffix), strict=True) if size], 1)
        log_sum_exp = torch.cat([part for part, size in zip(sums, (span.prefix, 1, span.suffix), strict=True) if size], 2)
    output = output[..., : call.value_dim].transpose(1, 2)
    if given.masked:
        empty = log_sum_exp < -_GONE / 2
        output = torch.where(empty.unsqueeze(3), torch.zeros_like(output), output)
        log_sum_exp = torch.where(empty, float("-inf"), log_sum_exp)
    return output, log_sum_exp
