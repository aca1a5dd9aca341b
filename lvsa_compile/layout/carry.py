"""What the next graph of a forward is told of a tensor's axes."""

from __future__ import annotations

from collections.abc import Callable

from lvsa_compile.axes.algebra import Axis, Digit, Factor, Source, axis_size, origins
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.carried import carried
from lvsa_compile.axes.pieces import in_one_piece
from lvsa_compile.layout.token_layout import UNKNOWN, VIDEO, Targets, token_layout


def handed_on(axes: Axes, targets: Targets, lost_at: Callable[[Source], str] = lambda lost: lost.name) -> Axes | None:
    """Axes for the next graph, None where they show nothing worth telling; ``lost_at`` says where a trail was lost.

    An axis of tokens that holds the generated video whole is told in one piece: it may then be cut anywhere, as parallel models do, and
    put together again.
    """
    kept = carried(axes, targets, lost_at)
    if kept is None:
        return None
    return tuple(
        _in_one_piece(told) if _holds_video(axis, targets) and origins([told]) else told for axis, told in zip(axes, kept, strict=True)
    )


def _holds_video(axis: Axis, targets: Targets) -> bool:
    if not isinstance(axis_size(axis), int):
        return False
    kinds = [segment.kind for segment in token_layout(axis, (), targets).segments]
    return kinds.count(VIDEO) == 1 and UNKNOWN not in kinds


def _in_one_piece(axis: Axis) -> Axis:
    size = axis_size(axis)
    return (Factor(size, frozenset((Digit(in_one_piece(axis), size),))),)
