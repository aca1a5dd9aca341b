"""Lowering ``cpu_merge``: the CPU's dense flash kernel on anchors and on windows, merged by log-sum-exp.

It needs no compiler, and takes float64 and dense kernels that beat any of ours (matrix units for bfloat16).

All sparse query blocks share some keys (anchors, text); the rest of each block's keys is a short run among the others.  So keys and
values are reordered once into [shared | rest], one dense call serves all queries on the shared keys, one small call per block serves
its run, and the two are merged by their log-sum-exp (the merge of FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy
import numpy.typing
import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.lowering.attention_op import accumulation_dtype, define_attention_op, output_like
from lvsa_compile.lowering.contract import AttentionCall, Lowering
from lvsa_compile.sparsity.key_ranges import Range, join_ranges

Mask = numpy.typing.NDArray[numpy.bool_]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SECONDS_PER_BLOCK = 60e-6  # one more call of the kernel and its merge, measured on 2 cores
_FLOPS = 1.5e11
_SHARE_OF_BOUND = 0.75


@dataclass(frozen=True)
class _Block:
    """Query rows ``[start, end)`` and the runs of the rest keys that they attend."""

    rows: Range
    own: tuple[Range, ...]


@dataclass(frozen=True)
class _Plan:
    """One phase of a table: rows that attend everything, and sparse blocks with the key ranges they share."""

    dense_rows: tuple[Range, ...]
    sparse_rows: tuple[Range, ...]
    shared: tuple[Range, ...]
    rest: tuple[Range, ...]
    blocks: tuple[_Block, ...]


def attention_cpu_merge(
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
    """Computes ``lvsa::attention`` (see ``attention_op.attention`` for shapes and meaning) on the CPU."""
    ranges = key_ranges[int(phase)].contiguous().numpy()
    plan = _plan(query_bounds.numpy().tobytes(), ranges.tobytes(), ranges.shape[1], query.shape[2], key.shape[2])
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    keys = _Keys(key, value, None if key_mask is None else _added_to_scores(key_mask, query.dtype))

    def attend(rows: Range, some: _Keys, merge: bool = False) -> None:
        part = slice(*rows)
        found, found_lse = compat.cpu_flash_attention(query[:, :, part], some.key, some.value, scale, some.score_mask)
        if merge:
            _merge_into(output[:, :, part], log_sum_exp[:, :, part], found, found_lse)
        else:
            output[:, :, part], log_sum_exp[:, :, part] = found, found_lse

    for rows in plan.dense_rows:
        attend(rows, keys)
    if plan.shared:
        shared = keys.taken(plan.shared)
        for rows in plan.sparse_rows:
            attend(rows, shared)
    elif any(not block.own for block in plan.blocks):  # rows that a mask leaves no key
        output.zero_()
        log_sum_exp.fill_(float("-inf"))
        for rows in plan.dense_rows:
            attend(rows, keys)
    if plan.rest:
        rest = keys.taken(plan.rest)
        for block in plan.blocks:
            if block.own:
                attend(block.rows, rest.taken(block.own), merge=bool(plan.shared))
    return output, log_sum_exp


@dataclass(frozen=True)
class _Keys:
    """Keys ``[B, heads, n, head_dim]``, their values, and what is added to their scores, ``[B or 1, heads or 1, 1, n]``."""

    key: Tensor
    value: Tensor
    score_mask: Tensor | None

    def taken(self, ranges: tuple[Range, ...]) -> _Keys:
        """The keys in some ranges."""
        mask = None if self.score_mask is None else _take(self.score_mask, ranges, 3)
        return _Keys(_take(self.key, ranges, 2), _take(self.value, ranges, 2), mask)


def _added_to_scores(key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    if key_mask.dtype != torch.bool:
        return key_mask.to(dtype)
    return torch.zeros(key_mask.shape, dtype=dtype).masked_fill_(~key_mask, float("-inf"))


def _merge_into(output: Tensor, log_sum_exp: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges attention over more keys into ``output`` ``[B, heads, rows, value_dim]`` and its ``log_sum_exp``, in place."""
    weight = torch.sigmoid(part_lse - log_sum_exp).nan_to_num_(0.0).unsqueeze(-1)  # nan: no key counts on either side
    output.copy_(torch.lerp(output.to(weight.dtype), part.to(weight.dtype), weight))
    torch.logaddexp(log_sum_exp, part_lse, out=log_sum_exp)


def _take(tensor: Tensor, ranges: tuple[Range, ...], axis: int) -> Tensor:
    """The places of an axis in ``ranges``; a view where there is one range."""
    parts = [tensor.narrow(axis, start, end - start) for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@functools.lru_cache(maxsize=1024)
def _plan(bounds_bytes: bytes, range_bytes: bytes, ranges_per_block: int, query_length: int, key_length: int) -> _Plan:
    """Splits a phase's key ranges into what all sparse blocks share and what each has of its own.

    Keyed by the table's content, so that any tensor that holds the same table finds the same plan.
    """
    bounds = numpy.minimum(numpy.frombuffer(bounds_bytes, dtype=numpy.int32), query_length).tolist()
    table = numpy.minimum(numpy.frombuffer(range_bytes, dtype=numpy.int32), key_length).reshape(len(bounds) - 1, ranges_per_block, 2)
    cuts = numpy.unique(numpy.append(table, [0, key_length]))
    intervals = list(itertools.pairwise(cuts.tolist()))
    covers = (table[:, :, :1] <= cuts[:-1]) & (table[:, :, 1:] >= cuts[1:])  # [query_blocks, ranges, intervals]
    attends: Mask = numpy.any(covers, axis=1)
    rows = list(itertools.pairwise(bounds))
    present: Mask = numpy.diff(bounds) > 0  # an open end may hold no row at all
    everything: Mask = numpy.all(attends, axis=1) & present
    sparse: Mask = ~numpy.all(attends, axis=1) & present
    shared: Mask = numpy.all(attends[sparse], axis=0) & sparse.any()
    used: Mask = numpy.any(attends[sparse], axis=0) & ~shared

    ends = numpy.cumsum(numpy.where(used, numpy.diff(cuts), 0)).tolist()  # where each used interval ends among the rest keys
    in_rest = [(end - (high - low), end) for end, (low, high) in zip(ends, intervals, strict=True)]
    return _Plan(
        dense_rows=join_ranges(_chosen(rows, everything)),
        sparse_rows=join_ranges(_chosen(rows, sparse)),
        shared=join_ranges(_chosen(intervals, shared)),
        rest=join_ranges(_chosen(intervals, used)),
        blocks=tuple(_Block(rows[block], join_ranges(_chosen(in_rest, attends[block] & used))) for block in numpy.flatnonzero(sparse)),
    )


def _chosen(ranges: list[Range], mask: Mask) -> list[Range]:
    return list(itertools.compress(ranges, mask))


def _unavailable(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on the CPU, not on {device.type}"


def _refuses(call: AttentionCall) -> str | None:
    if call.dtype not in _DTYPES:
        return f"the CPU flash kernel does not take {call.dtype}"
    if call.head_dim != call.value_dim:
        return f"the CPU flash kernel wants equal head dims, not {call.head_dim} and {call.value_dim}"
    return None


def _speedup(call: AttentionCall) -> float:
    """Dense seconds over sparse seconds, from counted FLOPs and the cost of one call per frame."""
    dense = call.flops / _FLOPS
    return dense / (dense * call.density / _SHARE_OF_BOUND + call.pattern.frames * _SECONDS_PER_BLOCK)


LOWERING = Lowering(
    "cpu_merge",
    priority=20,
    operator=define_attention_op("attention_cpu_merge", attention_cpu_merge),
    unavailable=_unavailable,
    refuses=_refuses,
    speedup=_speedup,
)
