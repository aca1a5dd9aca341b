"""A lowering on a small problem of a call's kind, inside the backend call: what would fail or be wrong later is a reason now."""

from __future__ import annotations

import functools
import warnings

import torch

from lvsa_compile import compat
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import LvsaWarning, in_a_line
from lvsa_compile.ops.attention import ATTENTION, attention, by_heads
from lvsa_compile.ops.verified import TOLERANCE
from lvsa_compile.policies.contract import Facts, Geometry, Horizon, plan_of
from lvsa_compile.policies.lvsa.policy import LVSA
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.accelerator import random_state_kept
from lvsa_compile.selection.contract import AttentionCall, Failure, Lowering

_POLICY, _FRAMES, _HORIZON = LVSA(window=1), 12, Horizon(5)


def smoke_tested(lowering: Lowering, call: AttentionCall) -> str | None:
    """What went wrong, or None; compiled and run once per lowering and kind of call, and warned of once.

    Not on the CPU, where nothing can fail that a predicate does not know, not the op's meaning itself, and not ops of other policies.
    """
    if call.device.type == "cpu" or lowering.operator is ATTENTION or lowering.op != "attention":
        return None
    return _smoke_test(lowering, call.device, call.dtype, call.query_heads // call.key_heads, call.head_dim, call.masked)


@dropped_on_reset
@functools.cache
def _smoke_test(lowering: Lowering, device: torch.device, dtype: torch.dtype, group: int, head_dim: int, masked: bool) -> str | None:
    try:
        with compat.no_modes(), torch.no_grad(), random_state_kept(device):
            error = _error(lowering, device, dtype, group, head_dim, masked)
    except Exception as failure:  # of the compiler, the driver or the launch: whatever it is, the next lowering may do
        problem = f"its smoke test failed ({in_a_line(failure)})"
    else:
        if error <= TOLERANCE[dtype]:
            return None
        problem = f"its smoke test gave a wrong answer (relative error {error:.1e})"
    warnings.warn(
        f"lvsa lowering {lowering.name!r} is not used on {device} for {dtype} and head_dim {head_dim}: {problem}.",
        LvsaWarning,
        stacklevel=2,
    )
    return Failure(problem)


def _error(lowering: Lowering, device: torch.device, dtype: torch.dtype, group: int, head_dim: int, masked: bool) -> float:
    """Twelve small frames and text, keys and values in different memory orders: the largest error of two phases over the largest value."""
    torch.manual_seed(0)
    tokens, text = lowering.smoke_test_tokens
    span = VideoSpan(0, _FRAMES, tokens, text)
    plan, length = plan_of(_POLICY, Geometry.of(span, span, heads=2 * group), Facts(_HORIZON)), span.length
    query, key, value = (torch.randn(1, length, 2 * n, head_dim, device=device, dtype=dtype).transpose(1, 2) for n in (group, 1, 1))
    key = key.contiguous()
    call = AttentionCall(device, dtype, 1, 2 * group, 2, head_dim, head_dim, plan, masked)
    found_by = lowering.on_device(call)
    bounds, ranges = (torch.tensor(rows, dtype=torch.int32, device=device) for rows in (plan.table.query_bounds, plan.table.key_ranges))
    key_mask = (torch.arange(length, device=device) < length - 10).reshape(1, 1, 1, length) if masked else None
    worst = 0.0
    for step in range(2):
        phase = torch.tensor(step, dtype=torch.int32)
        found, _ = found_by(query, key, value, phase, key_mask=key_mask)
        meaning, _ = by_heads(attention)(query, key, value, bounds, ranges, phase, key_mask=key_mask)
        worst = max(worst, float((found.float() - meaning.float()).abs().max() / meaning.float().abs().max()))
    return worst
