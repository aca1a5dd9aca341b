"""What a policy is asked, and what it answers: which keys each query attends, at every denoising step.

A policy is a frozen dataclass whose fields are what a user may set.  It is asked with a ``Geometry`` and ``Facts`` and answers with a
``Plan``, or with a ``Miss`` that says why it does not apply.  Everybody else asks the plan: passes, lowerings, reports.
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import dtype

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import LvsaError, PlanError, PolicyError, in_a_line
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
        """Why the policy leaves a site dense, or None.

        One that needs the horizon is also asked about ``Geometry.of_frames``, to see whether a dense video is long enough to warn of.
        """

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


BATCH = -1
"""In the shape of state: as many as the call has samples."""
HEAD_DIM = -2
"""In the shape of state: the head dim of the call."""


@dataclass(frozen=True)
class State:
    """A tensor that an op keeps from step to step, for each video, site and guidance branch: zeros when a video begins.

    The op gets it as ``[entries, *shape]`` and reads and writes the entry of its call.  One that is not ``zeroed`` is what it was: the op
    knows by other state whether it holds something.
    """

    name: str
    shape: tuple[int, ...]
    dtype: dtype
    zeroed: bool = True

    def of_call(self, samples: int, head_dim: int) -> State:
        """The same for calls with as many samples and features."""
        known = {BATCH: samples, HEAD_DIM: head_dim}
        return dataclasses.replace(self, shape=tuple(known.get(size, size) for size in self.shape))


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
        arguments: further arguments of the op, by name.  One that has an argument ``video`` gets the first token of the video in the query
            and in the key sequence, and the tokens of the video.
        density: attended share of pairs of video tokens, mean over rows; by default counted in the table.
        frames: a hint for lowerings and reports, where query blocks are latent frames that attend whole frames.
        parts: a hint: into about how many dense attentions of equal shape a row falls.
        dense_steps: denoising steps at the start in which everything is attended.
        dense_row_added: whether the last row of the table, beside those of the policy, attends everything.
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
    arguments: tuple[tuple[str, int | float | str | tuple[float, ...]], ...] = ()
    density: float = dataclasses.field(default=-1.0, compare=False, repr=False)
    frames: Frames | None = dataclasses.field(default=None, compare=False, repr=False)
    parts: int = dataclasses.field(default=1, compare=False, repr=False)
    dense_steps: int = 0
    dense_row_added: bool = False
    restriction: tuple[tuple[Range, ...], ...] | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.density < 0.0:
            object.__setattr__(self, "density", self.table.density(self.geometry.query, self.geometry.key))

    @property
    def sparse_rows(self) -> int:
        """Rows of the table but the one in which everything is attended."""
        return self.table.rows - self.dense_row_added

    def with_dense_steps(self, steps: int, spare: bool = False) -> Plan:
        """The plan that attends everything in the first ``steps`` denoising steps, by one more row of the table.

        ``spare`` adds that row for no steps, too.
        """
        return _with_dense_steps(self, steps) if steps or spare else self

    def restricted(self, allowed: Sequence[Sequence[Range]]) -> Plan:
        """The plan where each query block attends nothing beside the ranges that ``allowed`` holds for it."""
        return _restricted(self, tuple(map(tuple, allowed)))

    def slopes(self) -> KeyRangeTable:
        """By how much each number of the table grows with each token more before the video, where that number is free.

        The numbers are linear in it: for ``p`` tokens they are those for one token and ``(p - 1)`` times these.
        """
        return _slopes(self)


def why_not(policy: Policy, geometry: Geometry, facts: Facts) -> Miss | None:
    """What a policy's ``applies`` answers.

    Raises:
        PolicyError: it raised, or answered with something else; names the line.
    """
    miss = _asked(policy, "applies", geometry, facts)
    if miss is None or isinstance(miss, Miss):
        return miss
    remedy = "Return None, or a Miss such as reasons.POLICY_REFUSES.because('why')."
    raise PolicyError(policy.name, "applies", f"returned {miss!r}. {remedy}")


@dropped_on_reset
@functools.lru_cache(maxsize=64)
def plan_of(policy: Policy, geometry: Geometry, facts: Facts) -> Plan:
    """The plan of a policy for a site to which it applies, made once.

    Raises:
        PolicyError: the policy raised, or answered with something else; names the line.
        PlanError: the plan does not fit the geometry; names what is wrong with it.
    """
    plan = _asked(policy, "plan", geometry, facts)
    if not isinstance(plan, Plan):
        raise PolicyError(policy.name, "plan", f"returned {plan!r}. Return a Plan.")
    return plan


def _asked(policy: Policy, method: str, geometry: Geometry, facts: Facts) -> Any:
    try:
        return getattr(policy, method)(geometry, facts)
    except LvsaError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = f'File "{frame.filename}", line {frame.lineno}, in {frame.name}'
        raise PolicyError(policy.name, method, f"raised {in_a_line(error)} ({line})") from error


@dropped_on_reset
@functools.lru_cache(maxsize=64)
def _with_dense_steps(plan: Plan, steps: int) -> Plan:
    table = plan.table.with_row_of_everything(plan.geometry.key)
    return dataclasses.replace(
        plan, table=table, rows=WithDenseSteps(plan.rows, steps, table.rows - 1), dense_steps=steps, dense_row_added=True
    )


@dropped_on_reset
@functools.lru_cache(maxsize=64)
def _restricted(plan: Plan, allowed: tuple[tuple[Range, ...], ...]) -> Plan:
    return dataclasses.replace(plan, table=plan.table.restricted(allowed), restriction=allowed)


_PROBES = (1, 2, 333)
"""Tokens before the video for which a table is asked: the third checks what the first two say."""


@dropped_on_reset
@functools.lru_cache(maxsize=64)
def _slopes(plan: Plan) -> KeyRangeTable:
    plans = (plan_of(plan.policy, plan.geometry.with_prefix(tokens), plan.facts) for tokens in _PROBES)
    tables = [each.with_dense_steps(plan.dense_steps, spare=plan.dense_row_added).table for each in plans]
    try:
        found: KeyRangeTable = _combined(tables[1], tables[0], lambda two, one: two - one)
        even = tables[2] == _combined(tables[0], found, lambda base, slope: base + (_PROBES[2] - 1) * slope)
    except ValueError:  # of another shape
        even = False
    if not even:
        problem = "it does not grow evenly with the number of tokens before the video"
        raise PlanError(plan.policy.name, "table", problem, "Let every position in it be the prefix plus a number, or a number.")
    return found


def _combined(one: Any, two: Any, combine: Callable[[int, int], int]) -> Any:
    """A table of each two numbers of two tables of one shape."""
    if isinstance(one, KeyRangeTable):
        return KeyRangeTable(_combined(one.query_bounds, two.query_bounds, combine), _combined(one.key_ranges, two.key_ranges, combine))
    return tuple(_combined(a, b, combine) for a, b in zip(one, two, strict=True)) if isinstance(one, tuple) else combine(one, two)


def _check(plan: Plan) -> None:
    table, geometry, name = plan.table, plan.geometry, plan.policy.name
    bounds, query_end, key_end = table.query_bounds, geometry.query.whole[1], geometry.key.whole[1]

    def wrong(problem: str, remedy: str, part: str = "table") -> PlanError:
        return PlanError(name, part, problem, remedy)

    if table.heads not in (1, geometry.heads):
        raise wrong(f"it has {table.heads} heads", f"Give 1 or {geometry.heads}, the query heads.")
    if bounds[0] != 0 or bounds[-1] != query_end or list(bounds) != sorted(bounds):
        wanted = f"Let query_bounds rise from 0 to geometry.query.whole[1], {query_end}."
        raise wrong(f"query_bounds are {bounds if len(bounds) < 9 else (*bounds[:4], '...', *bounds[-4:])}", wanted)
    for heads in table.key_ranges:
        if len(heads) != table.heads:
            raise wrong("its rows have different numbers of heads", "Give all rows the heads of the first.")
        for blocks in heads:
            if len(blocks) != len(bounds) - 1:
                raise wrong(f"a row has {len(blocks)} blocks, query_bounds have {len(bounds) - 1}", "Give each query block its key ranges.")
            for block, ranges in enumerate(blocks):
                outside = [each for each in ranges if not 0 <= each[0] <= each[1] <= key_end]
                if outside:
                    raise wrong(f"block {block} attends keys {outside[0]} of {key_end}", "Keep ranges within geometry.key.whole.")
                nothing = plan.restriction is None and bounds[block] < bounds[block + 1] and all(start == end for start, end in ranges)
                if nothing:
                    raise wrong(f"block {block} attends no key", "Give every query block at least one key.")
    if plan.rows.count != table.rows:
        raise wrong(f"a step chooses among {plan.rows.count} rows, the table has {table.rows}", "Give rows=Turn(number of rows).", "rows")
    if not isinstance(plan.state, tuple) or not all(isinstance(each, State) for each in plan.state):
        raise wrong(f"it is {plan.state!r}", "Give a tuple of State(name, shape, dtype).", "state")
