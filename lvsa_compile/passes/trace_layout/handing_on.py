"""What the next graph of a forward is told of a tensor's axes."""

from __future__ import annotations

from lvsa_compile.axes.algebra import INPUT, Axis, Digit, Factor, Source, axis_size
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.labels import carried
from lvsa_compile.passes.trace_layout.token_layout import UNKNOWN, VIDEO, Targets, token_layout


def handed_on(axes: Axes, targets: Targets) -> Axes | None:
    """Axes for the next graph, None where they show nothing worth telling.

    An axis of tokens that holds the generated video whole becomes one packed axis that says so.  It may then be cut anywhere, as
    parallel models do, and put together again.
    """
    packed = tuple(_packed(axis, position, targets) if position else axis for position, axis in enumerate(axes))
    return carried(packed, targets)


def _packed(axis: Axis, position: int, targets: Targets) -> Axis:
    size = axis_size(axis)
    if not isinstance(size, int):
        return axis
    segments = token_layout(axis, (), targets).segments
    videos = [segment.grid for segment in segments if segment.kind == VIDEO and segment.grid is not None]
    if len(videos) != 1 or len(videos[0].shape) != 3 or any(segment.kind == UNKNOWN for segment in segments):
        return axis
    source = min(videos[0].frame_sources, key=lambda source: (-source.rank, source.place))
    shapes: list[tuple[int, tuple[int, int, int] | None]] = []
    for segment in segments:
        frames, rows, columns = segment.grid.shape if segment.kind == VIDEO and segment.grid is not None else (0, 0, 0)
        if frames:
            shapes.append((segment.size, (frames, rows, columns)))
        elif shapes and shapes[-1][1] is None:
            shapes[-1] = (shapes[-1][0] + segment.size, None)
        else:
            shapes.append((segment.size, None))
    whole = Source(INPUT, source.name.split("[")[0], position, size, source.place, 3, stretches=tuple(shapes))
    return (Factor(size, frozenset((Digit(whole, size),))),)
