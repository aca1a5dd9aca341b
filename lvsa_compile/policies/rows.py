"""Which row of a table a denoising step uses, computed on the device: nothing is asked of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """A rule, hashable: equal rules share what is computed for a step."""

    @property
    def count(self) -> int:
        """How many rows the rule may choose from, from row 0 on."""

    @property
    def moves(self) -> bool:
        """Whether any two steps use different rows."""

    @property
    def dense_row(self) -> int | None:
        """The row in which everything is attended, where there is one."""

    def __call__(self, step: Tensor) -> Tensor:
        """The row of a denoising step from 0, both whole numbers in scalar tensors."""


@dataclass(frozen=True)
class Turn:
    """One row after the other, and the first again after the last.

    Example:
        >>> Turn(3)(torch.tensor(4))
        tensor(1)
    """

    count: int
    dense_row: None = None

    @property
    def moves(self) -> bool:
        """Whether any two steps use different rows."""
        return self.count > 1

    def __call__(self, step: Tensor) -> Tensor:
        """The row of a denoising step."""
        return torch.remainder(step, self.count)


@dataclass(frozen=True)
class WithDenseSteps:
    """``dense_row`` in the first ``steps`` denoising steps, then as ``rows`` says."""

    rows: Rows
    steps: int
    dense_row: int

    @property
    def count(self) -> int:
        """How many rows the rule may choose from."""
        return self.dense_row + 1

    @property
    def moves(self) -> bool:
        """Whether any two steps use different rows."""
        return True

    def __call__(self, step: Tensor) -> Tensor:
        """The row of a denoising step."""
        return torch.where(step < self.steps, self.dense_row, self.rows(step))
