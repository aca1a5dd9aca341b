"""How fast each lowering computes the pairs it attends, beside the device's best dense kernel: what ``lowering="auto"`` weighs.

The CPU's are measured for each kind of CPU by ``python benchmarks/cpu_rates.py``, on one that has AVX-512: plain and AVX2 with torch's own
kernels held to them, too.  Those of matrix units (AMX) in bfloat16 are from an earlier machine, in float32 those of AVX-512.
Those of GPUs are expectations from published numbers, no measurements of ours: a Triton kernel of this kind reaches about 390 TFLOP/s on
Hopper where cuDNN and FlashAttention 3 (arXiv 2407.08608) reach 600 and more, and is close to FlashAttention 2 on Ampere; FlashInfer (arXiv
2501.01005) loads sparse keys by the older path on Hopper.
Those of NPUs are guesses that only put an order.
``mode="max-autotune"`` measures instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lvsa_compile.errors import RateError
from lvsa_compile.kernels.configurations import nearest
from lvsa_compile.selection.accelerator import device_target
from lvsa_compile.selection.contract import AttentionCall
from lvsa_compile.selection.cpu_kind import cpu_kind

_SHARES: dict[str, dict[str, float]] = {
    "cpu": {},  # by ``on_cpu``
    "cuda:80": {"triton": 0.85, "dense_merge": 0.80, "flashinfer": 0.80, "flex": 0.70},
    "cuda:90": {"triton": 0.62, "dense_merge": 0.85, "flashinfer": 0.60, "flex": 0.55},
    "cuda:100": {"triton": 0.55, "dense_merge": 0.85, "flashinfer": 0.40, "flex": 0.45},
    "cuda:120": {"triton": 0.80, "dense_merge": 0.80, "flashinfer": 0.70, "flex": 0.60},
    "npu": {"ascend_block_sparse": 0.85, "ascend_paged": 0.80, "ascend_gather": 0.70},
    "hip": {"triton": 0.90, "dense_merge": 0.80, "flex": 0.60},
}


@dataclass(frozen=True)
class CpuRates:
    """What a kind of CPU does in a dtype: FLOP/s of dense attention by one thread, the seconds that a call costs beside them, and the same
    of each lowering: its FLOP/s over those of dense attention, and seconds for each part that it computes by itself.
    """

    flops: float
    seconds_per_call: float
    lowerings: dict[str, tuple[float, float]]


CPU: dict[tuple[str, str], CpuRates] = {
    ("plain", "float32"): CpuRates(4.1e10, 32e-6, {"cpu": (0.75, 98e-6), "dense_merge": (0.79, 5.8e-6)}),
    ("plain", "bfloat16"): CpuRates(3.7e10, 52e-6, {"cpu": (0.83, 100e-6), "dense_merge": (0.80, 7.5e-6)}),
    ("avx2", "float32"): CpuRates(7.8e10, 26e-6, {"cpu": (1.06, 77e-6), "dense_merge": (0.74, 5.4e-6)}),
    ("avx2", "bfloat16"): CpuRates(7.4e10, 51e-6, {"cpu": (1.10, 110e-6), "dense_merge": (0.69, 6.9e-6)}),
    ("avx512", "float32"): CpuRates(7.9e10, 42e-6, {"cpu": (1.09, 110e-6), "dense_merge": (0.74, 6.4e-6)}),
    ("avx512", "bfloat16"): CpuRates(7.5e10, 51e-6, {"cpu": (1.75, 100e-6), "dense_merge": (0.69, 7.0e-6)}),
    ("amx", "float32"): CpuRates(7.9e10, 42e-6, {"cpu": (1.09, 110e-6), "dense_merge": (0.74, 6.4e-6)}),
    ("amx", "bfloat16"): CpuRates(4.7e11, 51e-6, {"dense_merge": (0.54, 7.0e-6)}),
}


def on_cpu(lowering: str, call: AttentionCall, parts: int = 1) -> float:
    """The estimate of a lowering on the CPU, dense time over sparse time; ``parts`` are the attentions that it computes by themselves.

    Nothing elsewhere.
    """
    if call.device.type != "cpu":
        return 0.0
    dtype = "float32" if call.dtype in (torch.float32, torch.float64) else "bfloat16"
    return cpu_speedup(lowering, CPU[cpu_kind(), dtype], call.flops, call.density, parts, torch.get_num_threads())


def cpu_speedup(lowering: str, rates: CpuRates, flops: float, density: float, parts: int, threads: int) -> float:
    """Dense time over sparse time; 0 for a lowering that has no rate."""
    if lowering not in rates.lowerings:
        return 0.0
    share, seconds_per_part = rates.lowerings[lowering]
    arithmetic = flops / (rates.flops * threads)
    return (arithmetic + rates.seconds_per_call) / (arithmetic * density / share + parts * seconds_per_part)


def share_of_dense(lowering: str, device: torch.device) -> float:
    """Its FLOP/s over those of the device's best dense kernel; nothing where it is not meant to run, as in Triton's interpreter."""
    return _SHARES[_class_of(device)].get(lowering, 0.0)


def by_rate(lowering: str) -> Callable[[AttentionCall], float]:
    """The estimate of a lowering for which a call costs nothing beside its FLOPs: dense time over sparse time.

    Raises:
        RateError: no kind of device has a rate for the lowering, so that ``lowering="auto"`` would never take it.
    """
    if not any(lowering in row for row in _SHARES.values()):
        raise RateError(lowering)
    return lambda call: share_of_dense(lowering, call.device) / call.density


@functools.cache
def _class_of(device: torch.device) -> str:
    """The row of the table for a device: that of the newest part that is no newer."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type if device.type in _SHARES else "cuda:80"
    return nearest(device_target(device), _SHARES)
