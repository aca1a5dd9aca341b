"""The token layout of a sequence: which of its tokens are video, frame by frame, and which are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lvsa_compile.axes.algebra import ARANGE, INPUT, LOST, Axis, Concat, Digit, Factor, Size, Source, axis_size, leaves, origins, same
from lvsa_compile.axes.inputs import in_order, narrowed
from lvsa_compile.layout.packed_grid import may_count_frames

VIDEO, OTHER, CONDITIONING, IMAGE, SCRAMBLED, UNKNOWN, CONTRADICTED = (
    "video", "other", "conditioning", "image", "scrambled", "unknown", "contradicted"
)  # fmt: skip

_NONE: Mapping[str, str] = MappingProxyType({})

_MERGED = ({OTHER}, {IMAGE}, {SCRAMBLED}, {IMAGE, SCRAMBLED})
"""Kinds of neighbouring segments of one input that are told as one."""


Targets = Mapping[str, frozenset[int]]
"""Names of the inputs that hold the generated video, each with those of its axes, batch aside, that reach the outputs."""


@dataclass(frozen=True)
class Grid:
    """The axes a video segment runs along: where its frames are counted, and its shape in the words of the graph.

    ``first`` is the first of the video's latent frames that it holds.
    """

    frame_sources: frozenset[Source]
    frames: Size
    tokens_per_frame: Size
    shape: tuple[Size, ...]
    first: Size = 0


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind.  ``source`` names the input they come from, or the op at ``lost_at`` where the trail of
    ``origins``, names of inputs, was lost.

    CONTRADICTED tokens are packed, and the evidence of their grid disagrees: ``lost_at`` says how.  SCRAMBLED tokens come from a video,
    but frames are not whole, not in order or not contiguous; where they are a stretch of whole frames, their grid is known.
    """

    kind: str
    size: Size
    source: str
    grid: Grid | None = None
    lost_at: str = ""
    origins: frozenset[str] = frozenset()

    def __str__(self) -> str:
        shape = "×".join(str(n) for n in self.grid.shape) if self.grid and self.kind != SCRAMBLED else str(self.size)
        return f"{self.kind if self.kind != OTHER else self.source} {shape}"


@dataclass(frozen=True)
class TokenLayout:
    """Segments of a sequence, in order; ``batch_frames`` says that the batch axis counts frames or positions of the video."""

    segments: tuple[Segment, ...]
    batch_video: bool = False

    def of_kind(self, kind: str) -> list[Segment]:
        """Segments of one kind."""
        return [segment for segment in self.segments if segment.kind == kind]

    @property
    def shows_pictures(self) -> bool:
        """Whether any segment comes from a latent: the video, a conditioning video or an image."""
        return any(segment.kind in (VIDEO, CONDITIONING, IMAGE) for segment in self.segments)

    def __str__(self) -> str:
        return " | ".join(str(segment) for segment in self.segments)


def video_inputs(outputs: Iterable[Axis]) -> Targets:
    """The inputs whose grid reaches the model's outputs: what the model generates is the target video."""
    axes: dict[str, set[int]] = {}
    strides: dict[tuple[str, int], set[Size]] = {}
    for axis in outputs:
        for factor in leaves(axis):
            for digit in factor.digits:
                if digit.source.kind == INPUT and digit.source.axis > 0:
                    axes.setdefault(digit.source.node_name, set()).add(digit.source.axis)
                    strides.setdefault((digit.source.node_name, digit.source.axis), set()).add(digit.stride)
    packed = {node_name for (node_name, _), digits in strides.items() if len(digits) >= 3}
    return {node_name: frozenset(reached) for node_name, reached in sorted(axes.items()) if node_name in packed or len(reached) >= 3}


def inputs_with_grid(tokens: Axis) -> frozenset[str]:
    """Names of the inputs that show a video grid along a token axis, whether they are the target or not."""
    found = set()
    for part in _parts(tokens):
        factors = [factor for factor in part if isinstance(factor, Factor)]
        if len(factors) == len(part):
            found |= {node_name for node_name in _node_names(factors) if _grid_of(factors, node_name) is not None}
    return frozenset(found)


def token_layout(tokens: Axis, batch: Axis, targets: Targets, contradictions: Mapping[str, str] = _NONE) -> TokenLayout:
    """Reads the layout of a token axis.

    ``targets`` are the inputs that hold the generated video; ``contradictions`` those of packed inputs whose grid is not
    agreed on, with what is said of it.
    """
    taken = {d.source for f in leaves(tokens) if same(f.size, 1) for d in f.digits if not same(d.source.size, 1)}
    outside = [d.source for f in leaves(batch) for d in f.digits if d.source.kind == INPUT and d.source.axis > 0]
    packed = _packed_sources(tokens)
    along_video = any(
        (source.rank >= 5 or (source.rank == 4 and source.node_name in targets)) and packed.get(source.node_name, source) == source
        for source in outside
    )
    along = sorted(origins([tokens]) & targets.keys())
    if all(in_order(tokens, node_name) for node_name in along):
        seen = [_segments(narrowed(tokens, node_name), {node_name: targets[node_name]}, contradictions) for node_name in along]
        videos = [segments for segments in seen if any(segment.kind == VIDEO for segment in segments)]
        if videos:
            sources = frozenset[Source]().union(*(s.grid.frame_sources for some in videos for s in some if s.grid and s.kind == VIDEO))
            return TokenLayout(tuple(_running_along(segment, sources, taken) for segment in videos[0]), along_video)
    return TokenLayout(tuple(_segments(tokens, targets, contradictions)), along_video)


def _packed_sources(tokens: Axis) -> dict[str, Source]:
    """The axis of each input that alone holds the grid of the tokens: its other axes, as of heads, count none of it."""
    strides: dict[Source, set[Size]] = {}
    for digit in (digit for factor in leaves(tokens) for digit in factor.digits):
        strides.setdefault(digit.source, set()).add(digit.stride)
    names = [source.node_name for source in strides]
    return {source.node_name: source for source, found in strides.items() if len(found) >= 2 and names.count(source.node_name) == 1}


def _running_along(segment: Segment, sources: frozenset[Source], taken: set[Source]) -> Segment:
    """A video segment with all sources its frames run along; SCRAMBLED where it is every n-th frame of one of ``taken``."""
    if segment.kind != VIDEO or segment.grid is None:
        return segment
    if any(not same(source.size, segment.grid.frames) for source in sources & taken):
        return Segment(SCRAMBLED, segment.size, segment.source)
    return dataclasses.replace(segment, grid=dataclasses.replace(segment.grid, frame_sources=sources))


def _segments(tokens: Axis, targets: Targets, contradictions: Mapping[str, str]) -> list[Segment]:
    segments: list[Segment] = []
    for part in _parts(tokens):
        segment = _segment(part, targets, contradictions)
        before = segments[-1] if segments else None
        if before is not None and before.source == segment.source and {before.kind, segment.kind} in _MERGED:
            kind = OTHER if segment.kind == OTHER else SCRAMBLED  # slices of one video that do not follow on are not its frames in order
            segments[-1] = Segment(kind, before.size + segment.size, segment.source)
        else:
            segments.append(segment)
    return segments


def _parts(tokens: Axis) -> list[Axis]:
    """The pieces of a sequence; a concatenation of frames, each of the same positions, is one of stretches of tokens."""
    tokens = tuple(factor for factor in tokens if not same(factor.size, 1))
    if tokens and isinstance(tokens[0], Concat):
        return [part for frames in tokens[0].parts for part in _parts((*frames, *tokens[1:]))]
    return [tokens]


def _segment(axis: Axis, targets: Targets, contradictions: Mapping[str, str]) -> Segment:
    size = axis_size(axis)
    factors = [factor for factor in axis if isinstance(factor, Factor)]
    digits = sorted((digit for factor in leaves(axis) for digit in factor.digits), key=lambda d: (d.source.node_name, d.source.axis))
    name = next((d.source.name for d in digits if d.source.kind in (INPUT, ARANGE)), "tokens")
    lost = next((d.source for d in digits if d.source.kind == LOST), None)
    counted = origins([axis])
    disputed = next((contradictions[node_name] for node_name in sorted(counted) if node_name in contradictions), "")
    if disputed:
        return Segment(CONTRADICTED, size, name, lost_at=disputed)
    if lost is not None and targets and lost.origins and not counted & targets.keys():
        return Segment(OTHER, size, name if name != "tokens" else lost.name)  # in whatever order, it does not count the video
    if lost is not None and len(factors) == len(axis):
        found = _frames_in_order(factors, targets)
        if found is not None:
            return found
    if lost is not None:
        return Segment(UNKNOWN, size, lost.name, lost_at=lost.node_name, origins=counted)
    if len(factors) < len(axis):
        return Segment(SCRAMBLED, size, name)  # a concatenation inside frames
    for node_name in sorted(_node_names(factors), key=lambda p: (p not in targets, p)):
        grid = _grid_of(factors, node_name)
        if grid is not None:
            sources = {
                d.source for d in factors[0].digits if d.source.kind == INPUT and (d.source.node_name in targets) == (node_name in targets)
            }
            grid = dataclasses.replace(grid, frame_sources=frozenset(sources))
            return Segment(VIDEO if node_name in targets else CONDITIONING, size, _source(factors, node_name).name, grid)
    if any(digit.source.stands_for_axis for digit in digits):
        return Segment(SCRAMBLED, size, name)  # a video that was cut inside a frame
    for node_name in _node_names(factors):
        own = [[d for d in factor.digits if d.source.node_name == node_name] for factor in factors if not same(factor.size, 1)]
        source, axes = _source(factors, node_name), {d.source.axis for found in own for d in found}
        if all(own) and source.rank >= (4 if len(axes) >= 3 else 5):
            stretch = _grid_of(factors, node_name, stretch=True) if node_name in targets else None
            return Segment(SCRAMBLED if len(axes) >= 3 else IMAGE, size, source.name, stretch)
    return Segment(OTHER, size, name)


def _frames_in_order(factors: list[Factor], targets: Targets) -> Segment | None:
    """The video where the order of positions inside its frames was lost, and nothing else."""
    factors = [factor for factor in factors if not same(factor.size, 1)]
    if len(factors) < 2 or LOST in factors[0].kinds:
        return None
    for node_name, axes in targets.items():
        frame = [digit for digit in factors[0].digits if digit.source.node_name == node_name]
        inside = {digit.source.axis for factor in factors[1:] for digit in factor.digits if digit.source.node_name == node_name}
        if len(frame) != 1 or not all(node_name in origins([(factor,)]) for factor in factors[1:]):
            continue
        if _side_by_side(sorted(axes)) and frame[0].source.axis == min(axes) not in inside and frame[0].is_whole:
            size = axis_size(tuple(factors[1:]))
            grid = Grid(frozenset((frame[0].source,)), frame[0].size, size, (frame[0].size, size))
            return Segment(VIDEO, axis_size(tuple(factors)), frame[0].source.name, grid)
    return None


def _side_by_side(axes: list[int]) -> bool:
    """Whether three axes of a latent can be frames, rows and columns: at most the channels lie between."""
    return len(axes) == 3 and axes[0] >= 1 and axes[2] - axes[1] == 1 and axes[1] - axes[0] <= 2


def _node_names(factors: list[Factor]) -> list[str]:
    """Names of the inputs the factors run along."""
    return sorted({d.source.node_name for factor in factors for d in factor.digits if d.source.kind == INPUT})


def _source(factors: list[Factor], node_name: str) -> Source:
    return next(d.source for factor in factors for d in factor.digits if d.source.node_name == node_name)


def _grid_of(factors: list[Factor], node_name: str, stretch: bool = False) -> Grid | None:
    """The video grid that an input shows along the factors, or that of a ``stretch`` of its frames; None where it shows none."""
    factors = [factor for factor in factors if not same(factor.size, 1)]
    own = [[d for d in factor.digits if d.source.node_name == node_name] for factor in factors]
    if not own or any(len(digits) != 1 for digits in own):  # none, or two axes of one input at once, which is no grid
        return None
    digits = [found[0] for found in own]
    return _latent_grid(factors, digits, stretch) or (None if stretch else _packed_grid(factors, digits))


def _latent_grid(factors: list[Factor], own: list[Digit], stretch: bool) -> Grid | None:
    """A latent input with axes for frames, height and width, in that order in nearly every layout (BCFHW, BFCHW, BFHWC, lists; BCHWF).

    The frame axis comes first in the sequence, whole or a ``stretch`` of it, in order; inside a frame any order of positions will do.
    """
    axes = sorted({digit.source.axis for digit in own})
    frame = own[0]
    alone = sum(digit.source.axis == frame.source.axis for digit in own) == 1
    item_of_a_list = frame.source.name.endswith("]")  # four axes are [C, F, H, W] in a list; by themselves they are [B, C, H, W]
    if frame.source.rank < 5 and not item_of_a_list:
        return None
    if not (_side_by_side(axes) and alone and frame.is_whole is not stretch):
        return None
    if frame.source.axis != axes[0] and not _frames_come_last(own, axes):
        return None
    return dataclasses.replace(_grid(factors), frame_sources=frozenset((frame.source,)), first=frame.start)


def _frames_come_last(own: list[Digit], axes: list[int]) -> bool:
    """Whether a latent is ``[B, C, H, W, F]``: of its last axis each place is a frame, while patches are cut from the two before it."""
    frame, places = own[0], [digit for digit in own[1:] if digit.source.axis in axes[:2]]
    patch = {digit.stride for digit in places}
    ordered = [digit.source.axis for digit in places] == axes[:2]
    return frame.source.axis == axes[2] and same(frame.stride, 1) and ordered and len(patch) == 1 and not same(min(patch), 1)


def _packed_grid(factors: list[Factor], own: list[Digit]) -> Grid | None:
    """Packed tokens multiplied with a rope table that was built from three counts: of frames, of rows and of columns.

    Frames are the slowest of the three, as every packed model has it; a count whose name says otherwise contradicts.
    """
    if len(factors) != 3:
        return None
    counts = [{d.source for d in factor.digits if d.source.kind == ARANGE and same(d.size, d.source.size)} for factor in factors]
    if not all(counts) or counts[0] & counts[1] or counts[1] & counts[2] or counts[0] & counts[2]:
        return None
    if not all(may_count_frames(source) for source in counts[0]):
        return None
    sizes, packed = [factor.size for factor in factors], own[0].source
    in_order = same(own[2].stride, 1) and same(own[1].stride, sizes[2]) and same(own[0].stride, sizes[1] * sizes[2])
    if not (in_order and same(sizes[0] * own[0].stride, packed.size)):
        return None
    return _grid(factors)


def _grid(factors: list[Factor]) -> Grid:
    shape = tuple(factor.size for factor in factors)
    return Grid(frozenset(), shape[0], axis_size(tuple(factors[1:])), shape)
