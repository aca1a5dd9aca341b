"""Lowering ``flashinfer``: FlashInfer's block-sparse attention over latent frames (arXiv 2501.01005), text merged by log-sum-exp.

A block is a latent frame in rows and in columns.  The pattern of a phase is planned once on the host and shared by all layers.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.lowering.dense_merge import attention_dense_merge
from lvsa_compile.lowering.shared.dense_kernels import dense_attention, merge_into, why_not_dense_kernel
from lvsa_compile.ops.attention import define_attention_op, on_the_querys_device, output_like
from lvsa_compile.policies.tables import join_ranges
from lvsa_compile.selection.accelerator import why_no_gpu
from lvsa_compile.selection.contract import AttentionCall, Lowering

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128, 256)
_FEWEST_TOKENS = 16  # below, a frame is no tile, and FlashInfer goes to its decoding kernel
_WORKSPACE_BYTES = 128 * 2**20  # as FlashInfer recommends; one for all phases, layers and models of a device and stream
_PHASES_KEPT = 32  # of all patterns together; 8 MiB each, there and in pinned memory


@dataclass(frozen=True)
class FrameBlocks:
    """One phase over a video at rows and keys ``[start, start + frames * tokens)``: which frames each frame attends."""

    start: int
    tokens: int
    attended: tuple[tuple[int, ...], ...]

    @property
    def end(self) -> int:
        """The first row after the video."""
        return self.start + len(self.attended) * self.tokens


@on_the_querys_device
def attention_flashinfer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    phase: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes ``lvsa::attention`` (see ``ops.attention.attention`` for shapes and meaning); tables and phase are on the CPU.

    What is not blocks of frames, such as a step in which everything is attended, goes the way of ``dense_merge``.
    """
    ranges = key_ranges[int(phase)].contiguous().numpy()
    blocks = frame_blocks(query_bounds.numpy().tobytes(), ranges.tobytes(), ranges.shape[1], query.shape[2], key.shape[2])
    if blocks is None or key_mask is not None:
        return attention_dense_merge(query, key, value, query_bounds, key_ranges, phase, scale=scale, key_mask=key_mask)
    batch, heads, length, head_dim = query.shape
    video = slice(blocks.start, blocks.end)
    # [B * video tokens, heads, head_dim], in this order in memory too: FlashInfer takes the strides of one for those of the others
    rows = [t[:, :, video].transpose(1, 2).flatten(0, 1).contiguous() for t in (query, key, value)]
    stream = torch.cuda.current_stream(query.device).cuda_stream if query.device.type == "cuda" else 0
    planned = _planned(blocks, batch, heads, key.shape[1], head_dim, query.dtype, scale, query.device, stream)
    found, found_lse = planned.run(*rows, return_lse=True)
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    output[:, :, video] = found.unflatten(0, (batch, -1)).transpose(1, 2)
    log_sum_exp[:, :, video] = found_lse.unflatten(0, (batch, -1)).transpose(1, 2) * math.log(2.0)  # FlashInfer's is to base 2
    for around in (slice(0, blocks.start), slice(blocks.end, length)):
        if around.start < around.stop:
            part = dense_attention(query[:, :, video], key[:, :, around], value[:, :, around], scale)
            merge_into(output[:, :, video], log_sum_exp[:, :, video], *part)
            output[:, :, around], log_sum_exp[:, :, around] = dense_attention(query[:, :, around], key, value, scale)
    return output, log_sum_exp


@functools.lru_cache(maxsize=1024)
def frame_blocks(bounds_bytes: bytes, range_bytes: bytes, ranges_per_block: int, query_length: int, key_length: int) -> FrameBlocks | None:
    """A phase's key ranges as blocks of frames; None where they are not: nothing is skipped, or not by whole frames."""
    if query_length != key_length:
        return None
    bounds = numpy.minimum(numpy.frombuffer(bounds_bytes, dtype=numpy.int32), query_length).tolist()
    table = numpy.minimum(numpy.frombuffer(range_bytes, dtype=numpy.int32), key_length).reshape(-1, ranges_per_block, 2).tolist()
    attended = [join_ranges(sorted((start, end) for start, end in ranges if start < end)) for ranges in table]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    sparse = [b for b, ranges in enumerate(attended) if sizes[b] and ranges != ((0, key_length),)]
    if not sparse:
        return None
    tokens = sizes[sparse[0]]
    first, last = sparse[0], sparse[-1]
    while first > 0 and sizes[first - 1] == tokens:
        first -= 1
    while last + 1 < len(sizes) and sizes[last + 1] == tokens:
        last += 1
    frames = range(first, last + 1)
    if any(sizes[b] != tokens for b in frames):
        return None
    positions = [(bounds[b], bounds[b + 1]) for b in frames]
    around = [piece for piece in ((0, positions[0][0]), (positions[-1][1], key_length)) if piece[0] < piece[1]]
    lists = []
    for b in frames:
        inside = [n for n, (start, end) in enumerate(positions) if any(a <= start and end <= z for a, z in attended[b])]
        covered = sorted([*(positions[n] for n in inside), *around])
        if join_ranges(covered) != attended[b] or not inside:
            return None
        lists.append(tuple(inside))
    return FrameBlocks(positions[0][0], tokens, tuple(lists))


@dropped_on_reset
@functools.lru_cache(maxsize=_PHASES_KEPT)
def _planned(
    blocks: FrameBlocks,
    batch: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    scale: float | None,
    device: torch.device,
    stream: int,
) -> Any:
    """FlashInfer's wrapper, planned for ``batch`` videos one after the other, none of which attends another."""
    frames = len(blocks.attended)
    lists = [[sample * frames + frame for frame in of_frame] for sample in range(batch) for of_frame in blocks.attended]
    ends = [0, *itertools.accumulate(len(of_row) for of_row in lists)]
    indptr = torch.tensor(ends, dtype=torch.int32)
    indices = torch.tensor([frame for of_row in lists for frame in of_row], dtype=torch.int32)
    tokens = batch * frames * blocks.tokens
    wrapper = _wrapper_class()(_workspace(device, stream))
    wrapper.plan(
        indptr, indices, tokens, tokens, blocks.tokens, blocks.tokens, heads, key_heads, head_dim,
        sm_scale=scale, q_data_type=dtype, kv_data_type=dtype, o_data_type=dtype,
    )  # fmt: skip
    return wrapper


@dropped_on_reset
@functools.cache
def _workspace(device: torch.device, stream: int) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _wrapper_class() -> Any:
    from flashinfer import BlockSparseAttentionWrapper

    return BlockSparseAttentionWrapper


def _unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed: pip install flashinfer-python"
    return "FlashInfer runs on NVIDIA GPUs, not on ROCm" if torch.version.hip else why_no_gpu(device)


def _refuses(call: AttentionCall) -> str | None:
    if call.dtype not in _DTYPES:
        return f"FlashInfer does not take {call.dtype}"
    if call.masked:
        return "its blocks are whole frames, and a mask leaves out others"
    if call.head_dim not in _HEAD_DIMS or call.value_dim != call.head_dim:
        return f"FlashInfer takes equal head dims of 64, 128 or 256, not {call.head_dim} and {call.value_dim}"
    if call.query != call.key:
        return "query and key are not the same tokens"
    if call.query.tokens_per_frame < _FEWEST_TOKENS:
        return f"frames of {call.query.tokens_per_frame} tokens are too small for blocks, it wants {_FEWEST_TOKENS}"
    return why_not_dense_kernel(call)


LOWERING = Lowering(
    "flashinfer",
    "FlashInfer's block-sparse attention, a block being a latent frame",
    priority=40,
    body=attention_flashinfer,
    operator=define_attention_op("attention_flashinfer", attention_flashinfer, plans_on_host=True),
    unavailable=_unavailable,
    refuses=_refuses,
    rates={"cuda:80": 0.80, "cuda:90": 0.60, "cuda:100": 0.40, "cuda:120": 0.70},
    plans_on_host=True,
)
