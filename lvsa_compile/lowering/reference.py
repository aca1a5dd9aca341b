"""Lowering ``reference``: the op's own plain PyTorch body, right on every device and fast on none."""

from __future__ import annotations

import torch

from lvsa_compile.ops.attention import ATTENTION, attention
from lvsa_compile.selection.contract import AttentionCall, Lowering


def _unavailable(device: torch.device) -> str | None:
    return None


def _refuses(call: AttentionCall) -> str | None:
    return None


def _speedup(call: AttentionCall) -> float:
    """Never chosen for speed: it computes every score, and masks."""
    return 0.0


LOWERING = Lowering(
    "reference",
    "the op's meaning in plain PyTorch: right everywhere, fast nowhere",
    priority=100,
    body=attention,
    operator=ATTENTION,
    unavailable=_unavailable,
    refuses=_refuses,
    speedup=_speedup,
)
