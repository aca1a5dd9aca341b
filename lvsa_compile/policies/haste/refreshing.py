"""When a head looks for blocks anew: how far the means of its queries and keys drifted (HASTE, arXiv 2605.14513)."""

from __future__ import annotations

import torch
from torch import Tensor

from lvsa_compile.errors import OptionError

_NOTHING = 1e-12


def drift(query_mean: Tensor, key_mean: Tensor, anchor_query: Tensor, anchor_key: Tensor, relative: bool = False) -> Tensor:
    """L1 distance of the means of queries and keys over tokens from those at the last refresh, ``[..., H]``.

    Args:
        query_mean, key_mean: ``[..., H, head_dim]``.
        anchor_query, anchor_key: the same at the last refresh.
        relative: each distance is divided by the L1 norm of its anchor, so that it does not depend on the model's units.

    Example:
        >>> drift(torch.ones(2, 4), torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4))
        tensor([4., 4.])
    """
    found = []
    for mean, anchor in ((query_mean, anchor_query), (key_mean, anchor_key)):
        distance = (mean - anchor).abs().sum(-1)
        found.append(distance / anchor.abs().sum(-1).clamp(min=_NOTHING) if relative else distance)
    return found[0] + found[1]


_MOST_RELATIVE = 4.0
"""A relative drift beyond which means would have to turn around and double."""


def check_refreshing(threshold: object, layer_gate: object, relative: object = False) -> None:
    """Raises OptionError where a threshold or a gate cannot be."""
    if not isinstance(relative, bool):
        raise OptionError("relative", relative, "not True or False", "Give True or False.")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
        raise OptionError("threshold", threshold, "it is a distance", "Give 0 or more; the paper has 30 for XAttention on Wan.")
    if relative and threshold > _MOST_RELATIVE:
        raise OptionError("threshold", threshold, "relative drifts hardly reach it", "Give a number such as 0.5 with relative=True.")
    if layer_gate is None:
        return
    values = layer_gate if isinstance(layer_gate, tuple) else ()
    if len(values) != 2 or not all(isinstance(each, (int, float)) for each in values) or not 0 <= values[0] <= values[1] <= 1:
        raise OptionError("layer_gate", layer_gate, "not two rising shares of the heads", "Give (0.4, 0.8), or None.")


def refresh(drift: Tensor, threshold: float, layer_gate: tuple[float, float] | None = None) -> Tensor:
    """Which heads look for blocks anew, bool ``[..., H]``: those that drifted by more than ``threshold``.

    With ``layer_gate`` a layer none of whose heads, or fewer than the first share of them, would do so keeps all; one of which more than
    the second share would do so looks for all anew.

    Raises:
        OptionError: ``threshold`` or ``layer_gate`` cannot be.

    Example:
        >>> refresh(torch.tensor([1.0, 2.0, 3.0]), 1.5, (0.4, 0.6))
        tensor([True, True, True])
    """
    check_refreshing(threshold, layer_gate)
    moved = drift > threshold
    if layer_gate is None:
        return moved
    share = moved.double().mean(-1, keepdim=True)
    found: Tensor = torch.where(share < layer_gate[0], False, torch.where(share > layer_gate[1], True, moved))
    return found
