"""LoSA as a policy: dense steps, one search, and from then on the fewest key blocks that hold nearly all mass (arXiv 2608.12032)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lvsa_compile.policies.block_choice import MIN_TOKENS, block_plan, check_block, check_schedule, chooses_blocks, why_no_blocks
from lvsa_compile.policies.contract import Facts, Geometry, Plan
from lvsa_compile.policies.losa.choice import check_threshold, choose_blocks
from lvsa_compile.policies.rows import Searches
from lvsa_compile.reasons import Miss

_DENSITY = 0.66
"""Kept pairs at a threshold of 0.99 as published, for Wan 2.1 1.3B; only an estimate of speed is made of it."""


@dataclass(frozen=True)
class LoSA:
    """Each query block attends the fewest key blocks that together hold ``threshold`` of its mass, as one search found them.

    The step after the dense ones searches, by its own log-sum-exp.  Steps are those of a schedule of 50; where the user says how many
    there are, as by ``lvsa_compile.step(i, of=n)``, they are ``round(step * n / 50)``.  Keys beside the video are kept in any case, and
    what mass they have counts.

    Args:
        query_block: tokens of a block of queries, 16 to 128.
        key_block: tokens of a block of keys, 16 to 128.
        threshold: the share of the mass that is kept, above 0 and at most 1.
        dense_steps: denoising steps at the start that attend everything, or the share of them, below 1.
        dense_last: denoising steps at the end that attend everything; someone must say how many there are.
        min_tokens: videos of fewer tokens stay dense.

    Raises:
        OptionError: a value that it cannot have, named with its remedy.

    Example:
        >>> compiled = torch.compile(model, backend="lvsa", options={"policy": "losa"})
    """

    name: ClassVar[str] = "losa"
    needs_horizon: ClassVar[bool] = False

    query_block: int = 128
    key_block: int = 32
    threshold: float = 0.99
    dense_steps: int | float = 3
    dense_last: int = 0
    min_tokens: int = MIN_TOKENS

    def __post_init__(self) -> None:
        check_block("query_block", self.query_block)
        check_block("key_block", self.key_block)
        check_threshold(self.threshold)
        check_schedule(self.dense_steps, self.dense_last, self.min_tokens)

    @property
    def numbers(self) -> tuple[float, ...]:
        """As its choice gets them: the threshold."""
        return (self.threshold,)

    @property
    def blocks(self) -> tuple[int, int]:
        """Tokens of a query block and of a key block."""
        return self.query_block, self.key_block

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        """Not where the video has fewer than ``min_tokens``."""
        return why_no_blocks(geometry, self.name, self.min_tokens)

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        """A row for the steps from the search on, and one for dense steps."""
        schedule = Searches((0,), self.dense_steps, self.dense_last)
        return block_plan(
            self, geometry, facts, schedule, query_block=self.query_block, key_block=self.key_block, share=self.threshold,
            density=_DENSITY, keeps_log_sum_exp=False,
        )  # fmt: skip


@chooses_blocks(LoSA.name)
def _choose(mass: Tensor, rows: Tensor, share: float) -> Tensor:
    beside = (rows - mass.double().sum(-1)).clamp(min=0.0)
    return choose_blocks(mass, rows, share, beside=beside)


POLICY = LoSA
