"""How fast each lowering computes the pairs it attends, beside the device's best dense kernel: what ``lowering="auto"`` weighs.

The CPU's are measured (docs/performance.md).  Those of GPUs are expectations from published numbers, no measurements of ours: a
Triton kernel of this kind reaches about 390 TFLOP/s on Hopper where cuDNN and FlashAttention 3 (arXiv 2407.08608) reach 600 and more,
and is close to FlashAttention 2 on Ampere; FlashInfer (arXiv 2501.01005) loads sparse keys by the older path on Hopper.
Those of NPUs are guesses that only put an order.
``mode="max-autotune"`` measures instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from lvsa_compile.errors import RateError
from lvsa_compile.kernels.configurations import nearest
from lvsa_compile.lowering.contract import AttentionCall
from lvsa_compile.lowering.gpu import device_target

_SHARES: dict[str, dict[str, float]] = {
    "cpu": {"cpu": 1.1, "dense_merge": 0.85},
    "cuda:80": {"triton": 0.85, "dense_merge": 0.80, "flashinfer": 0.80, "flex": 0.70},
    "cuda:90": {"triton": 0.62, "dense_merge": 0.85, "flashinfer": 0.60, "flex": 0.55},
    "cuda:100": {"triton": 0.55, "dense_merge": 0.85, "flashinfer": 0.40, "flex": 0.45},
    "cuda:120": {"triton": 0.80, "dense_merge": 0.80, "flashinfer": 0.70, "flex": 0.60},
    "npu": {"ascend_block_sparse": 0.85, "ascend_paged": 0.80, "ascend_gather": 0.70},
    "hip": {"triton": 0.90, "dense_merge": 0.80, "flex": 0.60},
}


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
