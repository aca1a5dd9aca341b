"""Whether sequences told by their ends are, in each sample, one that holds the video and one of padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lvsa_compile.axes.values import Array
from lvsa_compile.ops.sequences import holds_videos, numbers_of


@dataclass(frozen=True)
class VideoInOneSequence:
    """That tokens ``first`` to ``stop`` of each of ``samples`` of ``tokens`` are in one sequence, and none of two samples are.

    What an input's values are ``expected`` to say, or not to say, see ``axes.values.Expectation``.
    """

    samples: Any
    tokens: Any
    first: int
    stop: int
    expected: bool = True

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The sizes that it speaks of."""
        return self.samples, self.tokens

    def holds(self, values: Array, number: Callable[[Any], int]) -> bool:
        """Whether it is as expected for ``values``, the ends of sequences, given what each size is as a ``number``."""
        ends = torch.from_numpy(values.astype("int64"))
        numbers = numbers_of(ends, number(self.samples), number(self.tokens))
        return bool(holds_videos(numbers, self.first, self.stop)) is self.expected
