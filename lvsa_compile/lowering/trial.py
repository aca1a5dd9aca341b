"""A lowering on a small problem of a call's kind, inside the backend call: what would fail or be wrong later is a reason now."""

from __future__ import annotations

import functools
import warnings

import torch

from lvsa_compile import compat
from lvsa_compile.errors import LvsaWarning
from lvsa_compile.lowering.attention_op import attention
from lvsa_compile.lowering.contract import AttentionCall, Lowering
from lvsa_compile.lowering.verification import TOLERANCE


def tried(lowering: Lowering, call: AttentionCall) -> str | None:
    """What went wrong, or None; compiled and run once per lowering and kind of call, and warned of once.

    Not on the CPU, where nothing can fail that a predicate does not know, and not the op's meaning itself.
    """
    if call.device.type == "cpu" or lowering.body is attention:
        return None
    return _tried(lowering, call.device, call.dtype, call.query_heads // call.key_heads, call.head_dim, call.masked)


@functools.cache
def _tried(lowering: Lowering, device: torch.device, dtype: torch.dtype, group: int, head_dim: int, masked: bool) -> str | None:
    try:
        with compat.no_modes(), torch.no_grad(), torch.random.fork_rng([device] if device.type != "cpu" else []):
            error = _error(lowering, device, dtype, group, head_dim, masked)
    except Exception as failure:  # of the compiler, the driver or the launch: whatever it is, the next lowering may do
        problem = f"its trial failed ({type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]})"
    else:
        if error <= TOLERANCE[dtype]:
            return None
        problem = f"its trial gave a wrong answer (relative error {error:.1e})"
    warnings.warn(
        f"lvsa lowering {lowering.name!r} is not used on {device} for {dtype} and head_dim {head_dim}: {problem}.",
        LvsaWarning,
        stacklevel=2,
    )
    return problem


def _error(lowering: Lowering, device: torch.device, dtype: torch.dtype, group: int, head_dim: int, masked: bool) -> float:
    """Four frames of 50 tokens and 20 of text, two phases: the largest error of the second over the largest value."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 220, n, head_dim, device=device, dtype=dtype).transpose(1, 2) for n in (group, 1, 1))
    tables = lowering.device_of_tables(device)
    bounds = torch.tensor([0, 50, 100, 150, 200, 220], dtype=torch.int32, device=tables)
    full, none = [0, 220], [0, 0]
    phases = [[[full, none]] * 5, [[[0, 100], [200, 220]], [[0, 100], [200, 220]], [[50, 220], none], [[50, 220], none], [full, none]]]
    ranges = torch.tensor(phases, dtype=torch.int32, device=tables)
    phase = torch.ones((), dtype=torch.int32, device=tables)
    key_mask = (torch.arange(220, device=device) < 210).reshape(1, 1, 1, 220) if masked else None
    found, _ = lowering.body(query, key, value, bounds, ranges, phase, key_mask=key_mask)
    meaning, _ = attention(query, key, value, bounds, ranges, phase, key_mask=key_mask)
    return float((found.float() - meaning.float()).abs().max() / meaning.float().abs().max())
