"""A plan as a picture: which block attends which, for reports and terminals."""

from __future__ import annotations

from dataclasses import dataclass

from lvsa_compile.policies.contract import Frames, Plan
from lvsa_compile.policies.tables import KeyRangeTable, join_ranges

_COLUMNS, _VIEWS = 128, 64


@dataclass(frozen=True)
class View:
    """What is attended in one row of the table by one head: columns ``shared`` by all, and runs ``[first, last]`` of each block's own."""

    shared: tuple[int, ...]
    own: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Picture:
    """The views of a plan, by ``turns``: denoising steps, layers or the sum of both, heads where these differ, or step by step all heads.

    Rows are query blocks; ``columns`` are latent frames (``of_frames``), or equal parts of the key sequence.
    """

    columns: int
    of_frames: bool
    turns: str
    views: tuple[View, ...]


def picture_of(plan: Plan) -> Picture:
    """The picture of a plan, without the row of its dense steps; of a table with more rows and heads the first 64 views."""
    if plan.frames is not None:
        turns_with = {(False, True): "layer", (True, True): "step + layer"}.get((plan.rows.moves, plan.rows.by_layer), "step")
        return Picture(plan.frames.frames, True, turns_with, tuple(_of_frames(plan.frames, row) for row in range(plan.sparse_rows)))
    rows, heads = plan.sparse_rows, plan.table.heads
    turns = [(row, head) for row in range(rows) for head in range(heads)][:_VIEWS]
    keys = plan.geometry.key.length
    views = tuple(_of_table(plan.table, row, head, keys) for row, head in turns)
    return Picture(min(keys, _COLUMNS), False, "step" if heads == 1 else "head" if rows == 1 else "step × head", views)


def _of_frames(frames: Frames, row: int) -> View:
    shared = frames.anchors(row)
    windows = ([f for f in frames.attended(frame, row) if f not in shared] for frame in range(frames.frames))
    return View(tuple(shared), tuple(((own[0], own[-1]),) if own else () for own in windows))


def _of_table(table: KeyRangeTable, row: int, head: int, keys: int) -> View:
    count = min(keys, _COLUMNS)
    own = []
    for ranges in table.key_ranges[row][head]:
        columns = [(start * count // keys, -(-min(end, keys) * count // keys)) for start, end in ranges if start < min(end, keys)]
        own.append(tuple((first, end - 1) for first, end in join_ranges(columns)))
    return View((), tuple(own))
