"""AdaSpa as a policy: dense steps, two searches, and between them the key blocks of most mass (Xia et al., arXiv 2502.21079)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lvsa_compile.policies.adaspa.choice import check_sparsity, choose_blocks, head_sparsity, recall
from lvsa_compile.policies.block_choice import MIN_TOKENS, block_plan, check_block, check_schedule, chooses_blocks, why_no_blocks
from lvsa_compile.policies.contract import Facts, Geometry, Plan
from lvsa_compile.policies.rows import Searches
from lvsa_compile.reasons import Miss


@dataclass(frozen=True)
class AdaSpa:
    """Each query block attends the key blocks of most mass, as a search found them; heads that need more get more.

    A search attends everything and weighs by the log-sum-exp of the last step that did.  Steps are those of a schedule of 50; where the
    user says how many there are, as by ``lvsa_compile.step(i, of=n)``, they are ``round(step * n / 50)``.

    Args:
        block: tokens of a block, 16 to 128.
        sparsity: the share of the video's key blocks that is left out, from 1/3 to below 1.
        dense_steps: denoising steps at the start that attend everything, or the share of them, below 1.
        search_steps: denoising steps that search.  One that a cache skips is made up for at the next that runs.
        dense_last: denoising steps at the end that attend everything; someone must say how many there are.
        min_tokens: videos of fewer tokens stay dense.

    Raises:
        OptionError: a value that it cannot have, named with its remedy.

    Example:
        >>> compiled = torch.compile(model, backend="lvsa", options={"policy": AdaSpa(sparsity=0.7)})
    """

    name: ClassVar[str] = "adaspa"
    needs_horizon: ClassVar[bool] = False

    block: int = 128
    sparsity: float = 0.8
    dense_steps: int | float = 10
    search_steps: tuple[int, ...] = (10, 30)
    dense_last: int = 0
    min_tokens: int = MIN_TOKENS

    def __post_init__(self) -> None:
        check_block("block", self.block)
        check_sparsity(self.sparsity)
        check_schedule(self.dense_steps, self.dense_last, self.min_tokens, self.search_steps)

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        """Not where the video has fewer than ``min_tokens``."""
        return why_no_blocks(geometry, self.name, self.min_tokens)

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        """A row for each search, and one for dense steps."""
        schedule = Searches(self.search_steps, self.dense_steps, self.dense_last)
        return block_plan(
            self, geometry, facts, schedule, query_block=self.block, key_block=self.block, share=self.sparsity, density=1.0 - self.sparsity,
            keeps_log_sum_exp=True,
        )  # fmt: skip


@chooses_blocks(AdaSpa.name)
def _choose(mass: Tensor, rows: Tensor, share: float) -> Tensor:
    blocks = mass.shape[-1]
    return choose_blocks(mass, head_sparsity(recall(mass, share, blocks), share), blocks)


POLICY = AdaSpa
