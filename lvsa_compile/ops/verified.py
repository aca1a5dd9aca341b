"""Option ``verify``: each sparse site beside its meaning in float32, while the model runs.

``lvsa::verified`` passes an attention output through and notes how far it is from ``lvsa::attention`` on the same inputs.  The error
stays on the device until a report is printed, so nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.ops.attention import attention, by_heads, library

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference that rounding explains, relative to the largest value, by dtype of the site."""

_worst: dict[tuple[str, str], tuple[Tensor, float]] = dropped_on_reset({})


def seen(compile_id: str, site: str) -> tuple[float, float] | None:
    """Largest relative error seen at a site so far and the tolerance of its dtype; None where nothing was verified."""
    found = _worst.get((compile_id, site))
    return None if found is None else (float(found[0]), found[1])


def _verified(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    phase: Tensor,
    scale: float | None,
    key_mask: Tensor | None,
    compile_id: str,
    site: str,
) -> Tensor:
    query, key, value = (t if t.dtype == torch.float64 else t.to(output.dtype).float() for t in (query, key, value))
    meaning, _ = by_heads(attention)(query, key, value, query_bounds, key_ranges, phase, scale=scale, key_mask=key_mask)
    error = (output.to(meaning.dtype) - meaning).abs().amax() / meaning.abs().amax().clamp_min(torch.finfo(meaning.dtype).tiny)
    error = torch.nan_to_num(error, nan=float("inf"))
    before = _worst.get((compile_id, site))
    _worst[compile_id, site] = (error if before is None else torch.maximum(before[0], error), TOLERANCE[output.dtype])
    return output.clone()


def _fake(output: Tensor, *others: object) -> Tensor:
    return output.clone()


library.define(
    "verified(Tensor output, Tensor query, Tensor key, Tensor value, Tensor query_bounds, Tensor key_ranges, Tensor phase, float? scale,"
    " Tensor? key_mask, str compile_id, str site) -> Tensor",
    tags=compat.OPAQUE_OP_TAGS,
)
library.impl("verified", _verified, "CompositeExplicitAutograd")
torch.library.register_fake("lvsa::verified", _fake, lib=library)
VERIFIED: compat.OpOverload = torch.ops.lvsa.verified.default
