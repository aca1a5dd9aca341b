"""XAttention as a policy: each call attends the blocks that hold most of the mass, as antidiagonals estimate it (arXiv 2503.16428)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lvsa_compile.errors import OptionError
from lvsa_compile.policies.block_choice import MIN_TOKENS, check_block, check_schedule, dynamic_plan, estimates_blocks, why_no_blocks
from lvsa_compile.policies.contract import Facts, Geometry, Plan
from lvsa_compile.policies.xattention.choice import blocks_of, estimated_mass
from lvsa_compile.reasons import Miss

_DENSITY = 0.45
"""Kept pairs at a threshold of 0.9, a guess; only an estimate of speed is made of it."""


@dataclass(frozen=True)
class XAttention:
    """Each query block attends the fewest key blocks whose estimated mass reaches ``threshold`` of its own, and the first key block.

    The estimate is made in each call, from one score in ``stride`` of each tile of ``stride`` × ``stride``; it costs
    ``1 / (2 * stride)`` of dense attention.  Tokens beside the video are attended by every query, and attend everything.

    Args:
        block: tokens of a block, 16 to 128, a multiple of ``stride``.
        stride: tokens of a tile's side; the paper has 8 for video.
        threshold: the share of the estimated mass that is kept, from 0 to 1; or a tuple of one for each head.
        text: "keep": tokens beside the video do not compete with blocks of the video.
        min_tokens: videos of fewer tokens stay dense.

    Raises:
        OptionError: a value that it cannot have, named with its remedy.

    Example:
        >>> compiled = torch.compile(model, backend="lvsa", options={"policy": "xattention", "dense_steps": 5})
    """

    name: ClassVar[str] = "xattention"
    needs_horizon: ClassVar[bool] = False

    block: int = 128
    stride: int = 8
    threshold: float | tuple[float, ...] = 0.9
    text: str = "keep"
    min_tokens: int = MIN_TOKENS

    def __post_init__(self) -> None:
        check_block("block", self.block)
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1 or self.block % self.stride:
            raise OptionError("stride", self.stride, f"it does not divide a block of {self.block} tokens", "Give 8 or 16.")
        shares = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not shares or not all(isinstance(each, (int, float)) and not isinstance(each, bool) and 0 <= each <= 1 for each in shares):
            raise OptionError("threshold", self.threshold, "not shares of the mass", "Give a number from 0 to 1, or a tuple of them.")
        if self.text != "keep":
            problem = "text that competes with the video is not there"
            raise OptionError("text", self.text, problem, "Give 'keep': every query attends all text.")
        check_schedule(0, 0, self.min_tokens)

    @property
    def numbers(self) -> tuple[float, ...]:
        """As its estimate gets them: the stride, then thresholds."""
        return float(self.stride), *(map(float, self.threshold) if isinstance(self.threshold, tuple) else (float(self.threshold),))

    @property
    def blocks(self) -> tuple[int, int]:
        """Tokens of a query block and of a key block."""
        return self.block, self.block

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        """Not where the video has fewer than ``min_tokens``.

        Raises:
            OptionError: there are thresholds for another number of heads.
        """
        if isinstance(self.threshold, tuple) and len(self.threshold) not in (1, geometry.heads):
            raise OptionError("threshold", self.threshold, f"the model has {geometry.heads} heads", "Give each its own, or one number.")
        return why_no_blocks(geometry, self.name, self.min_tokens)

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        """A row in which blocks are chosen."""
        return dynamic_plan(self, geometry, facts, self.name, self.numbers, blocks=self.blocks, density=_DENSITY)


@estimates_blocks(XAttention.name)
def _choose(
    query: Tensor, key: Tensor, counts: Tensor | None, numbers: Sequence[float], heads: Tensor | None, *, query_block: int, key_block: int,
    scale: float,
) -> Tensor:  # fmt: skip
    stride, *shares = numbers
    one_each = [torch.full((), share, dtype=torch.float64, device=query.device) for share in shares]  # a list would be copied there
    threshold = torch.stack(one_each) if len(shares) > 1 else one_each[0].expand(query.shape[1])
    threshold = threshold if heads is None or len(shares) == 1 else threshold[heads]
    return blocks_of(estimated_mass(query, key, block=query_block, stride=int(stride), scale=scale, counts=counts), threshold)


POLICY = XAttention
