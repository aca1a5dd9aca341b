"""Lowering ``reference``: the op's own plain PyTorch body, right on every device and fast on none."""

from __future__ import annotations

import torch

from lvsa_compile.lowering.attention_op import ATTENTION
from lvsa_compile.lowering.contract import AttentionCall, Lowering


def _unavailable(device: torch.device) -> str | None:
    return None


def _refuses(call: AttentionCall) -> str | None:
    return None


def _speedup(call: AttentionCall) -> float:
    """It computes every score and masks, so it is never faster than dense attention."""
    return 0.5


LOWERING = Lowering("reference", priority=100, operator=ATTENTION, unavailable=_unavailable, refuses=_refuses, speedup=_speedup)
