"""Choosing blocks while the model runs: what the policies that do so share.

Their ops are ``block_attention`` and ``dynamic_attention``: see ``lvsa_compile/ops``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lvsa_compile import reasons
from lvsa_compile.errors import OptionError
from lvsa_compile.policies.contract import BATCH, HEAD_DIM, Facts, Geometry, Plan, Policy, State
from lvsa_compile.policies.rows import Rows, Searches, Turn
from lvsa_compile.policies.tables import OPEN_END, KeyRangeTable, padded
from lvsa_compile.reasons import Miss

MIN_TOKENS = 8192
"""Tokens of a video below which searching is not worth it, unless the user says so."""


class Choice(Protocol):
    """Chooses blocks by their mass."""

    def __call__(self, mass: Tensor, rows: Tensor, share: float) -> Tensor:
        """Which blocks are kept, bool ``[B, heads, query blocks, key blocks]``.

        ``mass`` is that of blocks of the video, of the same shape; ``rows`` the queries of each query block; what keys beside the video
        have is what is missing to ``rows``.  They are kept in any case.
        """


CHOICES: dict[str, Choice] = {}
"""By the name that ``Plan.arguments`` has."""


def chooses_blocks(name: str) -> Callable[[Choice], Choice]:
    """Makes a function known as one that chooses blocks, for ``Plan.arguments``."""

    def register(choice: Choice) -> Choice:
        CHOICES[name] = choice
        return choice

    return register


class Estimate(Protocol):
    """Chooses blocks by queries and keys alone, in each call."""

    def __call__(
        self, query: Tensor, key: Tensor, counts: Tensor | None, numbers: Sequence[float], heads: Tensor | None, *, query_block: int,
        key_block: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """Which blocks are kept, bool ``[B, heads, query blocks, key blocks]``; asks nothing of the host.

        ``query`` and ``key`` are those of the video, ``[B, heads, tokens, head_dim]``; ``counts`` says which keys a mask leaves, bool
        ``[B or 1, heads or 1, tokens]``, all if None.  ``numbers`` are the policy's own; where these are some of the model's heads,
        ``heads`` are their numbers.
        """


_ONE_ROW = Turn(1)
ESTIMATES: dict[str, Estimate] = {}
"""By the name that ``Plan.arguments`` has."""


def estimates_blocks(name: str) -> Callable[[Estimate], Estimate]:
    """Makes a function known as one that chooses blocks by queries and keys, for ``Plan.arguments``."""

    def register(estimate: Estimate) -> Estimate:
        ESTIMATES[name] = estimate
        return estimate

    return register


def packed(kept: Tensor) -> Tensor:
    """Eight of the last axis in a byte, the first in its lowest bit; uint8 ``[..., bytes]``.

    Example:
        >>> packed(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    bits = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[-1] % 8)).unflatten(-1, (-1, 8))
    found: Tensor = (bits << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)
    return found


def unpacked(kept: Tensor, size: int) -> Tensor:
    """What ``packed`` packed: bool ``[..., size]``."""
    bits = kept[..., None] >> torch.arange(8, dtype=torch.uint8, device=kept.device) & 1
    return bits.flatten(-2)[..., :size].bool()


def why_no_blocks(geometry: Geometry, name: str, least: int) -> Miss | None:
    """Why blocks of the video cannot be chosen, or are not worth it."""
    query, key = geometry.query, geometry.key
    tokens = query.frames * query.tokens_per_frame
    if tokens != key.frames * key.tokens_per_frame:
        held = f"the queries hold {query.frames} latent frames, the keys {key.frames}"
        return reasons.POLICY_REFUSES.because(f"{held}, and policy {name!r} chooses blocks among the same")
    if tokens < least:
        return reasons.FEW_TOKENS.because(f"{tokens} tokens of the video, and policy {name!r} has min_tokens={least}")
    return None


def block_plan(
    policy: Policy, geometry: Geometry, facts: Facts, schedule: Searches, *, query_block: int, key_block: int, share: float, density: float,
    keeps_log_sum_exp: bool,
) -> Plan:  # fmt: skip
    """The plan of a policy that chooses blocks by ``CHOICES[policy.name]``; ``density`` is that of steps that attend chosen blocks."""
    first, stop = geometry.query.video
    state = [State("searches", (BATCH, 2), torch.int32), kept_blocks(geometry, query_block, key_block)]
    if keeps_log_sum_exp:
        state.append(State("log_sum_exp", (BATCH, geometry.heads, stop - first), torch.float32, zeroed=False))
    arguments = (
        ("choice", policy.name), ("share", share), ("query_block", query_block), ("key_block", key_block),
        ("searches", len(schedule.steps)),
    )  # fmt: skip
    return Plan(
        policy, geometry, facts, table_of_blocks(geometry, query_block, schedule.count), schedule, op="block_attention", state=tuple(state),
        arguments=arguments, density=schedule.density(density),
    )  # fmt: skip


def dynamic_plan(
    policy: Policy, geometry: Geometry, facts: Facts, choice: str, numbers: tuple[float, ...], *, blocks: tuple[int, int], density: float,
    rows: Rows = _ONE_ROW, most_drift: float | None = None, layer_gate: tuple[float, float] | None = None, relative: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a policy that chooses ``blocks`` of so many queries and keys in each call by ``ESTIMATES[choice]``.

    Where ``most_drift`` is given heads keep them, and ``CHOICES[choice]`` does, too.  In rows but the first everything is attended.
    """
    query_block, key_block = blocks
    state = [State("holds", (1,) if most_drift is None else (BATCH,), torch.int32)]
    if most_drift is not None:
        state.append(kept_blocks(geometry, query_block, key_block))
        state.append(State("means", (BATCH, 2, geometry.heads, HEAD_DIM), torch.float32, zeroed=False))
    arguments = (
        ("choice", choice), ("numbers", numbers), ("query_block", query_block), ("key_block", key_block),
        ("most_drift", -1.0 if most_drift is None else float(most_drift)), ("layer_gate", layer_gate or ()), ("relative", relative),
    )  # fmt: skip
    return Plan(
        policy, geometry, facts, table_of_blocks(geometry, query_block, rows.count), rows, op="dynamic_attention", state=tuple(state),
        arguments=arguments, density=density,
    )  # fmt: skip


def table_of_blocks(geometry: Geometry, query_block: int, rows: int = 1) -> KeyRangeTable:
    """The table in which each block of the video's queries, and what is beside the video, attends everything, alike in all rows."""
    query, (first, stop) = geometry.query, geometry.query.video
    end = [OPEN_END] if query.open_ended else [stop + query.suffix] if query.suffix else []
    bounds = sorted({0, *range(first, stop, query_block), stop, *end})
    return padded(bounds, [[[[geometry.key.whole] for _ in itertools.pairwise(bounds)]]] * rows)


def kept_blocks(geometry: Geometry, query_block: int, key_block: int) -> State:
    """A bit for each block of the video that a head attends."""
    first, stop = geometry.query.video
    rows, columns = -(-(stop - first) // query_block), -(-(stop - first) // key_block)
    return State("kept", (BATCH, geometry.heads, rows, -(-columns // 8)), torch.uint8, zeroed=False)


def check_schedule(dense_steps: object, dense_last: object, min_tokens: object, search_steps: object = (0,)) -> None:
    """Raises OptionError where a field of a schedule has a value that it cannot have."""

    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not (whole(dense_steps) or (isinstance(dense_steps, float) and 0 <= dense_steps < 1)):
        problem = "neither a number of denoising steps nor a share of them"
        raise OptionError("dense_steps", dense_steps, problem, "Give 0, 1, 2, ... steps, or a share from 0.0 to below 1.0.")
    for name, value, what in (("dense_last", dense_last, "denoising steps"), ("min_tokens", min_tokens, "tokens of the video")):
        if not whole(value):
            raise OptionError(name, value, f"not a number of {what}", "Give 0, 1, 2, ...")
    steps = list(search_steps) if isinstance(search_steps, tuple) else []
    if not steps or not all(map(whole, steps)) or steps != sorted(set(steps)):
        raise OptionError("search_steps", search_steps, "not denoising steps, rising", "Give a tuple such as (10, 30).")


def check_block(name: str, tokens: object) -> None:
    """Raises OptionError where a block cannot have so many tokens."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 16 <= tokens <= 128:
        raise OptionError(name, tokens, "a block has 16 to 128 tokens", "Give 64 or 128; the more, the less a search costs.")
