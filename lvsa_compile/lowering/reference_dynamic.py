"""Lowering ``reference_dynamic``: blocks that are chosen in the call, in plain PyTorch, with the scores of all keys."""

from __future__ import annotations

from lvsa_compile.lowering.reference import LOWERING as OF_RANGES
from lvsa_compile.ops.dynamic_attention import DYNAMIC_ATTENTION, dynamic_attention
from lvsa_compile.selection.contract import Lowering

LOWERING = Lowering(
    "reference_dynamic",
    "the meaning of dynamic attention in plain PyTorch, right and slow",
    priority=91,
    op="dynamic_attention",
    body=dynamic_attention,
    operator=DYNAMIC_ATTENTION,
    unavailable=OF_RANGES.unavailable,
    refuses=OF_RANGES.refuses,
    speedup=lambda call: 0.0,
)
