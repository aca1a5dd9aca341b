"""Policies that only tests know: what a policy from outside needs, and nothing of LVSA."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lvsa_compile import reasons
from lvsa_compile.lowering.reference import LOWERING as REFERENCE
from lvsa_compile.ops.attention import attention, define_stateful_op
from lvsa_compile.policies.contract import Facts, Geometry, Plan, State
from lvsa_compile.policies.tables import padded
from lvsa_compile.reasons import Miss
from lvsa_compile.selection.contract import Lowering


@dataclass(frozen=True)
class BlockDiagonal:
    """The video in 4 blocks; even heads attend their own block, odd heads their own half; text attends all and is attended by all."""

    name: ClassVar[str] = "block_diagonal"
    needs_horizon: ClassVar[bool] = False

    least_frames: int = 2

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        if geometry.total_frames < self.least_frames:
            return reasons.PATTERN_FULL.because(f"{geometry.total_frames} latent frames, policy 'block_diagonal' wants {self.least_frames}")
        return None

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        span = geometry.query
        tokens = span.frames * span.tokens_per_frame
        edges = [span.prefix + tokens * n // 4 for n in range(5)]
        bounds = sorted({0, *edges, geometry.query.whole[1]})
        text = [(0, span.prefix), (edges[-1], geometry.key.whole[1])]

        def ranges(start: int, end: int, blocks: int) -> list[tuple[int, int]]:
            if not edges[0] <= start < edges[-1]:
                return [geometry.key.whole]
            first = edges.index(start) // blocks * blocks
            return [piece for piece in (text[0], (edges[first], edges[first + blocks]), text[1]) if piece[0] < piece[1]]

        heads = [[ranges(a, b, 2 if head % 2 else 1) for a, b in itertools.pairwise(bounds)] for head in range(geometry.heads)]
        return Plan(self, geometry, facts, padded(bounds, [heads]))


@dataclass(frozen=True)
class Counting:
    """Attends everything, and multiplies by how often the site's branch was called in this video."""

    name: ClassVar[str] = "counting"
    needs_horizon: ClassVar[bool] = False

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        return None

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        table = padded((0, geometry.query.whole[1]), [[[[geometry.key.whole]]]])
        state = (State("calls", (), torch.float32), State("last", (2, 3), torch.int64))
        return Plan(self, geometry, facts, table, op="counting", state=state)


def _counting(
    query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, key_ranges: Tensor, phase: Tensor, branch: Tensor,
    state: list[Tensor], *, scale: float | None = None, key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    output, log_sum_exp = attention(query, key, value, query_bounds, key_ranges[:, 0], phase, scale=scale, key_mask=key_mask)
    calls, last = state
    here = torch.nn.functional.one_hot(branch.long(), len(calls)).to(calls.dtype)
    calls += here
    last += here.long()[:, None, None]
    return output * (calls * here).sum().to(output.dtype), log_sum_exp


COUNTING = Lowering(
    "counting", "the meaning of Counting", 90, REFERENCE.unavailable, REFERENCE.refuses, speedup=lambda call: 0.0, op="counting",
    body=_counting, operator=define_stateful_op("counting", _counting),
)  # fmt: skip


@dataclass(frozen=True)
class Refusing:
    """Answers a miss."""

    name: ClassVar[str] = "refusing"
    needs_horizon: ClassVar[bool] = False

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        return reasons.SHAPE_NOT_SUPPORTED.because(f"policy 'refusing' refuses {geometry.heads} heads of {geometry.grid}")

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        raise AssertionError("it does not apply")
