"""Which row of a table a denoising step uses, computed on the device: nothing is asked of the host."""

from __future__ import annotations

import dataclasses
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

    @property
    def by_layer(self) -> bool:
        """Whether layers use different rows at one step."""

    def later(self, layers: int) -> Rows:
        """The rule of the layer that many layers later in the model; the same one where layers are alike."""

    def __call__(self, step: Tensor) -> Tensor:
        """The row of a denoising step from 0, both whole numbers in scalar tensors."""


@dataclass(frozen=True)
class Turn:
    """One row after the other, and the first again after the last, from step to step, from layer to layer, or both.

    ``layer`` is the number of the layer that the rule is of, among the model's video attentions from 0.

    Example:
        >>> Turn(3)(torch.tensor(4))
        tensor(1)
        >>> Turn(3, by_layer=True).later(1)(torch.tensor(4))
        tensor(2)
    """

    count: int
    by_step: bool = True
    by_layer: bool = False
    layer: int = 0
    dense_row: None = None

    @property
    def moves(self) -> bool:
        """Whether any two steps use different rows."""
        return self.by_step and self.count > 1

    def later(self, layers: int) -> Turn:
        """The rule of the layer that many layers later in the model; rules that choose alike are equal."""
        return dataclasses.replace(self, layer=(self.layer + layers) % self.count) if self.by_layer else self

    def __call__(self, step: Tensor) -> Tensor:
        """The row of a denoising step."""
        return torch.remainder(step + self.layer if self.by_step else torch.full_like(step, self.layer), self.count)


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

    @property
    def by_layer(self) -> bool:
        """Whether layers use different rows at one step."""
        return self.rows.by_layer

    def later(self, layers: int) -> WithDenseSteps:
        """The rule of the layer that many layers later in the model."""
        return dataclasses.replace(self, rows=self.rows.later(layers))

    def __call__(self, step: Tensor) -> Tensor:
        """The row of a denoising step."""
        return torch.where(step < self.steps, self.dense_row, self.rows(step))
