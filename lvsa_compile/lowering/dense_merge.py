"""Lowering ``dense_merge``: the device's dense kernel on anchors and on windows, merged by log-sum-exp.

All sparse query blocks share some keys (anchors, text); the rest of each block's keys is a short run among the others.  So keys and
values are reordered once into [shared | rest], one dense call serves all queries on the shared keys, and the runs, which lie at equal
distances, are batches of a few more dense calls: views that overlap in memory, so that nothing is gathered per frame.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import numpy.typing
import torch
from torch import Tensor

from lvsa_compile.lowering.shared.dense_kernels import dense_attention, merge_into, why_not_dense_kernel
from lvsa_compile.ops.attention import accumulation_dtype, define_attention_op, on_the_querys_device, output_like
from lvsa_compile.policies.tables import Range, join_ranges
from lvsa_compile.selection.accelerator import why_no_gpu
from lvsa_compile.selection.contract import AttentionCall, Lowering
from lvsa_compile.selection.rates import CpuRates, on_cpu, share_of_dense

CPU_RATES = {
    ("plain", "float32"): CpuRates(0.79, 5.8e-6),
    ("plain", "bfloat16"): CpuRates(0.80, 7.5e-6),
    ("avx2", "float32"): CpuRates(0.74, 5.4e-6),
    ("avx2", "bfloat16"): CpuRates(0.69, 6.9e-6),
    ("avx512", "float32"): CpuRates(0.74, 6.4e-6),
    ("avx512", "bfloat16"): CpuRates(0.69, 7.0e-6),
    ("amx", "float32"): CpuRates(0.66, 5.3e-6),
    ("amx", "bfloat16"): CpuRates(0.36, 7.7e-6),
}
"""Measured by ``python benchmarks/cpu_rates.py``; see ``selection/rates.py``."""
GPU_RATES = {"cuda:80": 0.80, "cuda:90": 0.85, "cuda:100": 0.85, "cuda:120": 0.80, "hip": 0.80}
Mask = numpy.typing.NDArray[numpy.bool_]
_FARTHEST = 64  # how many blocks apart the next of a batch is looked for


@dataclass(frozen=True)
class Windows:
    """Query blocks of equal ``rows`` that each attend one run of ``keys`` of the rest keys, both at equal distances."""

    first_row: int
    rows: int
    row_step: int
    first_key: int
    keys: int
    key_step: int
    count: int


@dataclass(frozen=True)
class Plan:
    """One phase of a table: rows that attend everything, and sparse rows with the key ranges they share.

    ``rest`` are the key ranges that only some sparse blocks attend, ``windows`` the blocks that attend one run of them, ``others``
    rows with several runs; runs are positions among the rest keys.
    """

    dense_rows: tuple[Range, ...]
    sparse_rows: tuple[Range, ...]
    shared: tuple[Range, ...]
    rest: tuple[Range, ...]
    windows: tuple[Windows, ...]
    others: tuple[tuple[Range, tuple[Range, ...]], ...]
    some_attend_nothing: bool


@on_the_querys_device
def attention_dense_merge(
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
    """Computes ``lvsa::attention`` (see ``ops.attention.attention`` for shapes and meaning); tables and phase are on the CPU."""
    ranges = key_ranges[int(phase)].contiguous().numpy()
    plan = plan_of(query_bounds.numpy().tobytes(), ranges.tobytes(), ranges.shape[1], query.shape[2], key.shape[2])
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype), device=query.device)
    keys = _Keys(key, value, None if key_mask is None else _added_to_scores(key_mask, query.dtype))

    def attend(rows: Range, some: _Keys, merge: bool = False) -> None:
        part = slice(*rows)
        found, found_lse = dense_attention(query[:, :, part], some.key, some.value, scale, some.score_mask)
        if merge:
            merge_into(output[:, :, part], log_sum_exp[:, :, part], found, found_lse)
        else:
            output[:, :, part], log_sum_exp[:, :, part] = found, found_lse

    if not plan.shared and plan.some_attend_nothing:
        output.zero_()
        log_sum_exp.fill_(float("-inf"))
    for rows in plan.dense_rows:
        attend(rows, keys)
    if plan.shared:
        shared = keys.taken(plan.shared)
        for rows in plan.sparse_rows:
            attend(rows, shared)
    if plan.rest:
        rest = keys.taken(plan.rest)
        for rows, own in plan.others:
            attend(rows, rest.taken(own), merge=bool(plan.shared))
        for windows, sample in itertools.product(plan.windows, range(query.shape[0])):
            own_rows = functools.partial(
                _batch, sample=sample, first=windows.first_row, positions=windows.rows, step=windows.row_step, count=windows.count
            )
            found, found_lse = dense_attention(own_rows(query), *rest.runs(windows, sample, scale))
            into, into_lse = own_rows(output), own_rows(log_sum_exp.unsqueeze(-1)).squeeze(-1)
            if plan.shared:
                merge_into(into, into_lse, found, found_lse)
            else:
                into.copy_(found)
                into_lse.copy_(found_lse)
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

    def runs(self, windows: Windows, sample: int, scale: float | None) -> tuple[Tensor, Tensor, float | None, Tensor | None]:
        """Keys, values, the scale and mask of the windows of one sample, window by window."""
        of = functools.partial(_batch, first=windows.first_key, positions=windows.keys, step=windows.key_step, count=windows.count)
        mask = self.score_mask
        if mask is not None:
            mask = of(mask.transpose(2, 3), sample=sample if mask.shape[0] > 1 else 0).transpose(2, 3)
        return of(self.key, sample=sample), of(self.value, sample=sample), scale, mask


def _batch(tensor: Tensor, sample: int, first: int, positions: int, step: int, count: int) -> Tensor:
    """``[count, heads, positions, width]``: a view of positions ``[first + i * step, first + i * step + positions)`` of a sample."""
    _, heads, _, width = tensor.shape
    per_sample, per_head, per_position, per_column = tensor.stride()
    offset = tensor.storage_offset() + sample * per_sample + first * per_position
    return tensor.as_strided((count, heads, positions, width), (step * per_position, per_head, per_position, per_column), offset)


def _added_to_scores(key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    if key_mask.dtype != torch.bool:
        return key_mask.to(dtype)
    return torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device).masked_fill_(~key_mask, float("-inf"))


def _take(tensor: Tensor, ranges: tuple[Range, ...], axis: int) -> Tensor:
    """The positions of an axis in ``ranges``; a view where there is one range."""
    parts = [tensor.narrow(axis, start, end - start) for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@functools.lru_cache(maxsize=1024)
def plan_of(bounds_bytes: bytes, range_bytes: bytes, ranges_per_block: int, query_length: int, key_length: int) -> Plan:
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
    own = [(rows[block], join_ranges(_chosen(in_rest, attends[block] & used))) for block in numpy.flatnonzero(sparse)]
    by_size: dict[Range, list[tuple[int, int]]] = {}
    for (row, row_end), runs in own:
        if len(runs) == 1:
            by_size.setdefault((row_end - row, runs[0][1] - runs[0][0]), []).append((row, runs[0][0]))
    return Plan(
        dense_rows=join_ranges(_chosen(rows, everything)),
        sparse_rows=join_ranges(_chosen(rows, sparse)),
        shared=join_ranges(_chosen(intervals, shared)),
        rest=join_ranges(_chosen(intervals, used)),
        windows=tuple(windows for (of_rows, of_keys), positions in by_size.items() for windows in _batches(positions, of_rows, of_keys)),
        others=tuple((of_rows, runs) for of_rows, runs in own if len(runs) > 1),
        some_attend_nothing=any(not runs for _, runs in own),
    )


def _batches(positions: Sequence[tuple[int, int]], rows: int, keys: int) -> list[Windows]:
    """Blocks of ``rows`` rows that attend runs of ``keys`` keys, by ``(first row, first key)``, as few batches of equal steps.

    By the step that joins most blocks first, so that the phases of a rotation, which mostly differ in where they begin, come out in the
    same shapes: some dense kernels are prepared anew for each.
    """
    left = dict.fromkeys(positions)
    found: list[Windows] = []
    while left:
        steps = Counter(
            (second[0] - first[0], second[1] - first[1])
            for number, first in enumerate(left)
            for second in itertools.islice(left, number + 1, number + _FARTHEST)
            if second[1] > first[1] or (second[1] == first[1] and second[0] == first[0] + rows)
        )
        if not steps:
            return [*found, *(Windows(row, rows, 0, key, keys, 0, 1) for row, key in left)]
        (row_step, key_step), _ = max(steps.items(), key=lambda counted: (counted[1], -counted[0][0]))
        for row, key in list(left):
            count = next(n for n in itertools.count() if (row + n * row_step, key + n * key_step) not in left)
            for n in range(count if count > 1 else 0):
                del left[row + n * row_step, key + n * key_step]
            if count > 1 and key_step:
                found.append(Windows(row, rows, row_step, key, keys, key_step, count))
            elif count > 1:  # the same keys for blocks one after the other, as for the first frames: one larger block
                found.append(Windows(row, count * rows, 0, key, keys, 0, 1))
    return found


def _chosen(ranges: list[Range], mask: Mask) -> list[Range]:
    return list(itertools.compress(ranges, mask))


def _unavailable(device: torch.device) -> str | None:
    return None if device.type == "cpu" else why_no_gpu(device)


def _speedup(call: AttentionCall) -> float:
    """By rate; on the CPU each window is an attention by itself."""
    if call.device.type != "cpu":
        return share_of_dense(GPU_RATES, call.device) / call.density
    return on_cpu(CPU_RATES, call.dtype, call.flops, call.density, parts=call.plan.parts * call.batch)


LOWERING = Lowering(
    "dense_merge",
    "the device's dense kernel on anchors and on windows, merged by log-sum-exp",
    priority=20,
    body=attention_dense_merge,
    operator=define_attention_op("attention_dense_merge", attention_dense_merge, plans_on_host=True),
    unavailable=_unavailable,
    refuses=why_not_dense_kernel,
    speedup=_speedup,
    plans_on_host=True,
)
