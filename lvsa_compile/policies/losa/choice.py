"""LoSA's choice of blocks in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvsa_compile.errors import OptionError, ShapeError
from lvsa_compile.policies.blocks import in_falling_order


def check_threshold(threshold: object) -> None:
    """Raises OptionError where a threshold cannot be."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise OptionError("threshold", threshold, "it is a share of the mass", "Give a number above 0 and at most 1; the paper has 0.99.")


def choose_blocks(mass: Tensor, rows: Tensor | Sequence[int], threshold: float, *, beside: Tensor | None = None) -> Tensor:
    """The key blocks of most mass that together reach ``threshold`` of each query block's mass.

    Args:
        mass: ``[B, H, query blocks, key blocks]``, see ``block_mass``.
        rows: the queries of each block ``[query blocks]``, of which the last may have fewer; each has a mass of 1.
        threshold: the share of the mass that is kept, above 0 and at most 1.
        beside: mass ``[B, H, query blocks]`` of keys that are kept in any case, as text; it counts.

    Returns:
        bool ``[B, H, query blocks, key blocks]``, at least one in each row.

    Raises:
        OptionError: ``threshold`` cannot be.
        ShapeError: ``rows`` does not fit.

    Example:
        >>> losa.choose_blocks(torch.tensor([[[[0.1, 1.5, 0.4]]]]), [2], 0.9)
        tensor([[[[False,  True,  True]]]])
    """
    check_threshold(threshold)
    wanted = torch.as_tensor(rows, dtype=torch.float64, device=mass.device) * threshold
    if mass.dim() != 4 or wanted.shape != mass.shape[2:3]:
        problem = f"it does not fit a mass {tuple(mass.shape)}"
        raise ShapeError("rows", tuple(wanted.shape), problem, "Give the number of queries of each of its query blocks.")
    ordered, place = in_falling_order(mass.double())
    before = ordered.cumsum(-1) - ordered  # what the blocks before hold
    wanted = wanted if beside is None else wanted - beside.double()
    needed = (before < wanted[..., None]).sum(-1, keepdim=True).clamp(min=1)
    return place < needed
