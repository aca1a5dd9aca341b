"""Lowering ``reference_blocks``: blocks that a search chose, in plain PyTorch, with the scores of all keys."""

from __future__ import annotations

from lvsa_compile.lowering.reference import LOWERING as OF_RANGES
from lvsa_compile.ops.block_attention import BLOCK_ATTENTION, block_attention
from lvsa_compile.selection.contract import Lowering

LOWERING = Lowering(
    "reference_blocks",
    "the meaning of block attention in plain PyTorch, right and slow",
    priority=90,
    op="block_attention",
    body=block_attention,
    operator=BLOCK_ATTENTION,
    unavailable=OF_RANGES.unavailable,
    refuses=OF_RANGES.refuses,
    speedup=lambda call: 0.0,
)
