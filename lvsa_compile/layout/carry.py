"""The annotation of a tensor for the next graph of a forward."""

from __future__ import annotations

from collections.abc import Callable

from lvsa_compile.axes.algebra import CREATED, Axis, Digit, Factor, Source, axis_of, axis_size, origins
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.carried import carried, runs_along_counts, without_coordinates
from lvsa_compile.axes.opaque import opaque_source
from lvsa_compile.axes.overwriting import holds_tokens, informed
from lvsa_compile.layout.token_layout import UNKNOWN, VIDEO, Targets, token_layout


def outgoing_annotation(axes: Axes, targets: Targets, lost_at: Callable[[Source], str] = lambda lost: lost.name) -> Axes | None:
    """The axes that the next graph should know; None where they show nothing of use.  ``lost_at`` words where a trail was lost.

    A token axis that holds the whole generated video becomes opaque: context parallelism may then cut it anywhere and join it again.
    """
    annotations = carried(axes, targets, lost_at)
    if annotations is None:
        return None

    def told(axis: Axis, annotation: Axis, position: int) -> Axis:
        whole = _holds_video(axis, targets) and origins([annotation])
        return _as_opaque(without_coordinates(annotation, position, targets)) if whole else annotation

    return tuple(told(axis, annotation, position) for position, (axis, annotation) in enumerate(zip(axes, annotations, strict=True)))


def table_annotation(axes: Axes) -> Axes | None:
    """What the next graph should know of a table ``[rows, channels]`` of numbers, as of timesteps: that its rows are no tokens.

    None for other tensors, as one along counts of frames, rows and columns, which tell a grid.
    """
    if len(axes) != 2 or any(map(holds_tokens, axes)) or not informed(axes[0]) or runs_along_counts(axes[0]):
        return None
    return tuple(axis_of(Source(CREATED, "table", position, axis_size(axis))) for position, axis in enumerate(axes))


def _holds_video(axis: Axis, targets: Targets) -> bool:
    if not isinstance(axis_size(axis), int):
        return False
    kinds = [segment.kind for segment in token_layout(axis, (), targets).segments]
    return kinds.count(VIDEO) == 1 and UNKNOWN not in kinds


def _as_opaque(axis: Axis) -> Axis:
    size = axis_size(axis)
    return (Factor(size, frozenset((Digit(opaque_source(axis), size),))),)
