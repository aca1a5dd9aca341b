"""What a policy is asked, and what it answers: which keys each query attends, at every denoising step.

A policy is a frozen dataclass whose fields are what a user may set.  It is asked with a ``Geometry`` and ``Facts`` and answers with a
``Plan``, or with a ``Miss`` that says why it does not apply.  Everybody else asks the plan: passes, lowerings, reports.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import dtype

from lvsa_compile.errors import PlanError
from lvsa_compile.policies.rows import Rows, Turn, WithDenseSteps
from lvsa_compile.policies.tables import KeyRangeTable, Range, VideoSpan
from lvsa_compile.reasons import Miss

_PIXELS_PER_LATENT = (4, 6, 8)  # of the video codecs that models have, the most frequent first; the first frame stands alone
_LIKELY_PIXELS = 49  # one model of the table was trained on as many latent frames


@dataclass(frozen=True)
class Geometry:
    """The video of one attention site.

    Args:
        query: where the video lies in the query sequence, in tokens.
        key: where it lies in the key sequence.
        grid: latent frames, and rows and columns of one of them in tokens; rows and columns are 0 where they are not known as numbers.
        first_frame: the latent frame of the whole video that the query begins with; not 0 where a process holds a part of it.
        total_frames: latent frames of the whole video.
        heads: query heads.

    Example:
        >>> span = VideoSpan(prefix=0, frames=30, tokens_per_frame=240, suffix=77)
        >>> Geometry.of(span, span, heads=12).grid
        (30, 0, 0)
    """

    query: VideoSpan
    key: VideoSpan
    grid: tuple[int, int, int]
    first_frame: int
    total_frames: int
    heads: int

    @classmethod
    def of(cls, query: VideoSpan, key: VideoSpan, rows: int = 0, columns: int = 0, heads: int = 1) -> Geometry:
        """That of a whole video."""
        return cls(query, key, (query.frames, rows, columns), 0, key.frames, heads)

    @classmethod
    def of_frames(cls, frames: int) -> Geometry:
        """That of a video of which only the number of latent frames is known: a frame is one token."""
        span = VideoSpan(0, frames, 1, 0)
        return cls.of(span, span)

    def with_prefix(self, tokens: int) -> Geometry:
        """The same where as many tokens come before the video, in the sequences in which that number is free."""
        query, key = (dataclasses.replace(span, prefix=tokens) if span.free_start else span for span in (self.query, self.key))
        return dataclasses.replace(self, query=query, key=key)


@dataclass(frozen=True)
class Horizon:
    """The training horizon in latent frames, and where it was found; ``in_table`` is that of the table where an option beats it."""

    frames: int
    found_in: str = ""
    in_table: int | None = None

    @property
    def if_pixels(self) -> int:
        """The latent frames that the horizon stands for if it was given in pixel frames; 0 where nothing speaks for that."""
        if not self.found_in.startswith("option"):
            return 0
        if self.in_table is not None:
            return self.in_table if self.frames - 1 in [per * (self.in_table - 1) for per in _PIXELS_PER_LATENT] else 0
        latent, rest = divmod(self.frames - 1, _PIXELS_PER_LATENT[0])
        return latent + 1 if self.frames >= _LIKELY_PIXELS and rest == 0 else 0


@dataclass(frozen=True)
class Facts:
    """What is known beside the geometry: the training horizon, or why it is not known."""

    horizon: Horizon | None = None
    horizon_missing: str = ""


@runtime_checkable
class Policy(Protocol):
    """How blocks are chosen: a frozen dataclass with these members.

    ``name`` is what ``options={"policy": name}`` takes; ``needs_horizon`` says that it cannot answer without the training horizon.
    """

    name: ClassVar[str]
    needs_horizon: ClassVar[bool]

    def __hash__(self) -> int:
        """Equal policies have equal plans."""

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        """Why the policy leaves a site dense, or None."""

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        """The plan of a site to which the policy applies."""


class Frames(Protocol):
    """A structure hint: the query blocks are latent frames, and each attends whole latent frames."""

    def __hash__(self) -> int:
        """Equal ones attend the same."""

    @property
    def frames(self) -> int:
        """Latent frames of the video."""

    def anchors(self, step: int) -> list[int]:
        """Frames that every frame attends in row ``step``, sorted."""

    def attended(self, frame: int, step: int) -> list[int]:
        """Frames that ``frame`` attends in row ``step``, sorted."""


@dataclass(frozen=True)
class State:
    """A tensor that an op keeps from step to step, for each video, site and guidance branch: zeros when a video begins.

    The op gets it as ``[branches, *shape]`` and writes to the entry of the branch that runs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: dtype


@dataclass(frozen=True)
class Plan:
    """How one site is computed.  Two plans are equal where policy, geometry, facts and restrictions are.

    Args:
        policy: the policy that made it.
        geometry: what it was made for.
        facts: what it was made with.
        table: key ranges in tokens ``[rows, heads or 1, query_blocks, ranges, 2]``, made once.
        rows: which row of the table a denoising step uses; computed on the device.
        op: the op of ``lvsa_compile.ops``, or of one's own, that computes it; it decides which lowerings may serve.
        state: tensors that the op keeps from step to step.
        density: attended share of pairs of video tokens, mean over rows; by default counted in the table.
        frames: a hint for lowerings and reports, where query blocks are latent frames that attend whole frames.
        parts: a hint: into about how many dense attentions of equal shape a row falls.
        dense_steps: denoising steps at the start in which everything is attended.
        restriction: what a constant mask leaves each query block, None where there is no such mask.

    Raises:
        PlanError: table and rows do not fit the geometry; names what is wrong.
    """

    policy: Any
    geometry: Geometry
    facts: Facts
    table: KeyRangeTable = dataclasses.field(compare=False, repr=False)
    rows: Rows = Turn(1)  # noqa: RUF009 - frozen
    op: str = "attention"
    state: tuple[State, ...] = ()
    density: float = dataclasses.field(default=-1.0, compare=False, repr=False)
    frames: Frames | None = dataclasses.field(default=None, compare=False, repr=False)
    parts: int = dataclasses.field(default=1, compare=False, repr=False)
    dense_steps: int = 0
    restriction: tuple[tuple[Range, ...], ...] | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.density < 0.0:
            object.__setattr__(self, "density", self.table.density(self.geometry.query, self.geometry.key))

    @property
    def sparse_rows(self) -> int:
        """Rows of the table but the one in which everything is attended."""
        return self.table.rows - bool(self.dense_steps)

    def with_dense_steps(self, steps: int) -> Plan:
        """The plan that attends everything in the first ``steps`` denoising steps: by one more row of the table."""
        return _with_dense_steps(self, steps) if steps else self

    def restricted(self, allowed: Sequence[Sequence[Range]]) -> Plan:
        """The plan where each query block attends nothing beside the ranges that ``allowed`` holds for it."""
        return _restricted(self, tuple(map(tuple, allowed)))

    def slopes(self) -> KeyRangeTable:
        """By how much each number of the table grows with each token more before the video, where that number is free.

        The numbers are linear in it: for ``p`` tokens they are those for one token and ``(p - 1)`` times these.
        """
        return _slopes(self)


@functools.lru_cache(maxsize=64)
def plan_of(policy: Policy, geometry: Geometry, facts: Facts) -> Plan:
    """The plan of a policy for a site to which it applies, made once."""
    return policy.plan(geometry, facts)


@functools.lru_cache(maxsize=64)
def _with_dense_steps(plan: Plan, steps: int) -> Plan:
    table = plan.table.with_row_of_everything(plan.geometry.key)
    return dataclasses.replace(plan, table=table, rows=WithDenseSteps(plan.rows, steps, table.rows - 1), dense_steps=steps)


@functools.lru_cache(maxsize=64)
def _restricted(plan: Plan, allowed: tuple[tuple[Range, ...], ...]) -> Plan:
    return dataclasses.replace(plan, table=plan.table.restricted(allowed), restriction=allowed)


@functools.lru_cache(maxsize=64)
def _slopes(plan: Plan) -> KeyRangeTable:
    one, two = (
        plan_of(plan.policy, plan.geometry.with_prefix(tokens), plan.facts).with_dense_steps(plan.dense_steps).table for tokens in (1, 2)
    )
    found: KeyRangeTable = _difference(two, one)
    return found


def _difference(two: Any, one: Any) -> Any:
    """Each number of one table less that of another."""
    if isinstance(two, KeyRangeTable):
        return KeyRangeTable(_difference(two.query_bounds, one.query_bounds), _difference(two.key_ranges, one.key_ranges))
    return tuple(map(_difference, two, one)) if isinstance(two, tuple) else two - one


def _check(plan: Plan) -> None:
    table, geometry, name = plan.table, plan.geometry, plan.policy.name
    if table.heads not in (1, geometry.heads):
        raise PlanError(name, "table", f"it has {table.heads} heads", f"Give 1 or {geometry.heads}, the query heads.")
    if table.query_bounds[0] != 0 or table.query_bounds[-1] < geometry.query.length:
        problem = f"its query blocks hold rows {table.query_bounds[0]} to {table.query_bounds[-1]} of {geometry.query.length}"
        raise PlanError(name, "table", problem, "Let query_bounds begin at 0 and end at the query's length.")
    if any(len(blocks) != len(table.query_bounds) - 1 for heads in table.key_ranges for blocks in heads):
        raise PlanError(name, "table", "a row has more or fewer blocks than query_bounds", "Give each query block its key ranges.")
    if plan.rows.count > table.rows:
        raise PlanError(name, "rows", f"a step may choose row {plan.rows.count - 1} of {table.rows}", "Give the table more rows.")
