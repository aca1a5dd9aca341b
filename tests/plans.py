"""Plans of LVSA for tests: tables and calls from a frame pattern."""

from __future__ import annotations

import torch

from lvsa_compile import FramePattern
from lvsa_compile.policies.contract import Plan
from lvsa_compile.policies.lvsa.policy import plan_with
from lvsa_compile.policies.tables import KeyRangeTable, VideoSpan
from lvsa_compile.selection.contract import AttentionCall


def plan(pattern: FramePattern, query: VideoSpan, key: VideoSpan, rotate: bool = True, dense_row: bool = False) -> Plan:
    return plan_with(pattern, query, key, rotate=rotate).with_dense_steps(int(dense_row))


def key_range_table(pattern: FramePattern, query: VideoSpan, key: VideoSpan, rotate=True, dense_row=False, allowed=None) -> KeyRangeTable:
    made = plan(pattern, query, key, rotate, dense_row)
    return (made if allowed is None else made.restricted(allowed)).table


def tables_of_body(table: KeyRangeTable) -> tuple[torch.Tensor, torch.Tensor]:
    """As the body of an op gets them: ``query_bounds``, and ``key_ranges`` without the axis of heads."""
    ranges = torch.tensor(table.key_ranges, dtype=torch.int32)
    return torch.tensor(table.query_bounds, dtype=torch.int32), ranges[:, 0]


def attention_call(
    device, dtype, batch, query_heads, key_heads, head_dim, value_dim, query, key, pattern, *, dense_steps=0, allowed=None, **more
) -> AttentionCall:
    made = plan_with(pattern, query, key).with_dense_steps(dense_steps)
    made = made if allowed is None else made.restricted(allowed)
    return AttentionCall(device, dtype, batch, query_heads, key_heads, head_dim, value_dim, made, **more)
