"""What a device's best dense kernel does, and estimates from it: what ``lowering="auto"`` weighs.

A lowering's own rates are in its file.  The CPU's are measured for each kind of CPU by ``python benchmarks/cpu_rates.py``: plain, AVX2 and
AVX-512 on one that has AVX-512, torch's own kernels held to each, too; those with matrix units (AMX) on one that has them.  Its ``--fit``
prints what the rows make of them; for AMX that is half as much off for the smallest call, and the rates here are between.
Those of GPUs are expectations from published numbers, no measurements of ours: a Triton kernel of this kind reaches about 390 TFLOP/s on
Hopper where cuDNN and FlashAttention 3 (arXiv 2407.08608) reach 600 and more, and is close to FlashAttention 2 on Ampere; FlashInfer (arXiv
2501.01005) loads sparse keys by the older path on Hopper.
Those of NPUs are guesses that only put an order.
``mode="max-autotune"`` measures instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lvsa_compile.kernels.configurations import nearest
from lvsa_compile.selection.accelerator import device_target
from lvsa_compile.selection.cpu_kind import cpu_kind

KINDS = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "npu", "hip")
"""Kinds of devices that lowerings give rates for: of NVIDIA's by compute capability, a newer part having those of the newest before it."""


@dataclass(frozen=True)
class DenseRates:
    """What dense attention does on a kind of CPU in a dtype: FLOP/s by one thread, and the seconds that a call costs beside them."""

    flops: float
    seconds_per_call: float


@dataclass(frozen=True)
class CpuRates:
    """What a lowering does there: its FLOP/s over those of dense attention, and seconds for each part that it computes by itself."""

    share: float
    seconds_per_part: float


CpuTable = Mapping[tuple[str, str], CpuRates]
"""By kind of CPU and dtype."""

CPU: dict[tuple[str, str], DenseRates] = {
    ("plain", "float32"): DenseRates(4.1e10, 32e-6),
    ("plain", "bfloat16"): DenseRates(3.7e10, 52e-6),
    ("avx2", "float32"): DenseRates(7.8e10, 26e-6),
    ("avx2", "bfloat16"): DenseRates(7.4e10, 51e-6),
    ("avx512", "float32"): DenseRates(7.9e10, 42e-6),
    ("avx512", "bfloat16"): DenseRates(7.5e10, 51e-6),
    ("amx", "float32"): DenseRates(1.9e11, 39e-6),
    ("amx", "bfloat16"): DenseRates(5.2e11, 55e-6),
}


def on_cpu(rates: CpuTable, dtype: torch.dtype, flops: float, density: float, parts: int = 1) -> float:
    """The estimate for attention with ``flops`` on this machine's CPU, dense time over sparse time; 0 on a kind that has no rates.

    ``parts`` are the attentions that are computed by themselves.
    """
    kind = cpu_kind(), "float32" if dtype in (torch.float32, torch.float64) else "bfloat16"
    return cpu_speedup(CPU[kind], rates[kind], flops, density, parts, torch.get_num_threads()) if kind in rates else 0.0


def cpu_speedup(dense: DenseRates, own: CpuRates, flops: float, density: float, parts: int, threads: int) -> float:
    """Dense time over sparse time of attention with ``flops``, of which a share of ``density`` is attended."""
    arithmetic = flops / (dense.flops * threads)
    return (arithmetic + dense.seconds_per_call) / (arithmetic * density / own.share + parts * own.seconds_per_part)


def share_of_dense(rates: Mapping[str, float], device: torch.device) -> float:
    """FLOP/s over those of a device's best dense kernel; nothing where there is no rate, as in Triton's interpreter."""
    return rates.get(_kind_of(device), 0.0)


@functools.cache
def _kind_of(device: torch.device) -> str:
    """The kind of a device: that of the newest part that is no newer."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cuda:80" if device.type == "cuda" else device.type
    return nearest(device_target(device), KINDS)
