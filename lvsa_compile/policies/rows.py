"""Which row of a table a denoising step uses, computed on the device: nothing is asked of the host."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lvsa_compile.errors import StepCountError


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

    def __call__(self, step: Tensor, of: int | None = None, before: Tensor | None = None) -> Tensor:
        """The row of a denoising step from 0, both whole numbers in scalar tensors.

        ``of`` is how many steps the video has, where that is known; ``before`` how many the video before it had, a scalar on the device
        of ``step``, 0 where there was none.
        """


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

    def __call__(self, step: Tensor, of: int | None = None, before: Tensor | None = None) -> Tensor:
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

    def __call__(self, step: Tensor, of: int | None = None, before: Tensor | None = None) -> Tensor:
        """The row of a denoising step."""
        return torch.where(step < self.steps, self.dense_row, self.rows(step, of, before))


PUBLISHED_STEPS = 50
"""Denoising steps of the schedules that methods were published with."""


@dataclass(frozen=True)
class Searches:
    """Row ``n`` from the denoising step on in which search ``n`` of blocks is due, and a dense row before the first and at the end.

    Steps are those of a schedule of 50: where the user says how many there are, as by ``lvsa_compile.step(i, of=n)``, they are
    ``round(step * n / 50)``.

    Args:
        steps: denoising steps of the searches, rising.
        dense: how many steps at the start are dense, or the share of the steps, below 1: of as many as the video has, else as many as the
            one before it had, else of 50.
        dense_last: how many at the end are.

    Example:
        >>> rows = Searches((10, 30), dense=10)
        >>> [int(rows(torch.tensor(step))) for step in (9, 10, 29, 30)]
        [2, 0, 0, 1]
    """

    steps: tuple[int, ...]
    dense: int | float = 0
    dense_last: int = 0
    moves: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False

    @property
    def count(self) -> int:
        """How many rows the rule may choose from."""
        return len(self.steps) + 1

    @property
    def dense_row(self) -> int:
        """The row in which everything is attended."""
        return len(self.steps)

    def later(self, layers: int) -> Searches:
        """The rule of another layer: the same."""
        return self

    def attends_all(self, of: int = PUBLISHED_STEPS) -> tuple[list[int], list[int]]:
        """The dense steps and those of searches, in both of which everything is attended, of a schedule of ``of`` steps."""
        rows = [int(self(torch.tensor(step), of)) for step in range(of)]
        searches = [rows.index(row) for row in range(self.dense_row) if row in rows]
        return [step for step, row in enumerate(rows) if row == self.dense_row], searches

    def density(self, of_others: float) -> float:
        """Attended share of pairs, mean over a schedule of 50 steps, where it is ``of_others`` in steps that do not attend everything."""
        every = sum(map(len, self.attends_all())) / PUBLISHED_STEPS
        return every + (1.0 - every) * of_others

    def words(self, of: int | None) -> str:
        """Which steps attend everything, where ``of`` is how many there are, None where nobody says so.

        Example:
            >>> Searches((10, 30), dense=10).words(of=25)
            'steps 0-4 dense, search in 5 and 15, of 25 steps, as said when this was compiled'
        """
        unknown = "nobody says how many there are, as lvsa_compile.step(i, of=n) and attach(pipe) do"
        if self.dense_last and of is None:
            return f"dense_last={self.dense_last} counts from the last step, and {unknown}: an error when it runs"
        dense, searches = self.attends_all(of or PUBLISHED_STEPS)
        runs = [list(run) for _, run in itertools.groupby(dense, key=lambda step: step - dense.index(step))]
        told = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        found = f"search in {' and '.join(map(str, searches))}" if searches else "no search"
        text = f"steps {told} dense, {found}" if dense else found
        if of is not None:
            return f"{text}, of {of} steps, as said when this was compiled"
        assumed = "as of 50 steps" if isinstance(self.dense, float) else "whatever the number of steps"
        return f"{text}, {assumed}: {unknown}"

    def scaled(self, of: int | None) -> Searches:
        """The rule with the steps that it has in a schedule of ``of`` steps."""

        def at(step: int) -> int:
            return round(step * (of or PUBLISHED_STEPS) / PUBLISHED_STEPS)

        dense = self.dense if isinstance(self.dense, float) else at(self.dense)
        return dataclasses.replace(self, steps=tuple(map(at, self.steps)), dense=dense, dense_last=at(self.dense_last))

    def __call__(self, step: Tensor, of: int | None = None, before: Tensor | None = None) -> Tensor:
        """The row of a denoising step.

        Raises:
            StepCountError: ``dense_last`` is given, and nobody says how many steps there are.
        """
        if self.dense_last and of is None:
            raise StepCountError("dense_last", self.dense_last)
        here = self.scaled(of)
        due = torch.stack([step >= at for at in here.steps]).sum(0, dtype=step.dtype)
        dense = (due == 0) | (step < _dense_at_start(here.dense, of, before))
        if of is not None:
            dense = dense | (step >= of - here.dense_last)
        return torch.where(dense, self.dense_row, due - 1)


def _dense_at_start(dense: int | float, of: int | None, before: Tensor | None) -> int | Tensor:
    if not isinstance(dense, float):
        return dense
    if of is not None or before is None:
        return round(dense * (of or PUBLISHED_STEPS))
    return torch.round(dense * torch.where(before > 0, before, PUBLISHED_STEPS))
