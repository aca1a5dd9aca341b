"""The token layout of a sequence: which of its tokens are video, frame by frame, and which are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lvsa_compile.passes.trace_layout.axes import ARANGE, INPUT, OP, Axis, Concat, Digit, Factor, Size, Source, axis_size, leaves, same

VIDEO, OTHER, CONDITIONING, IMAGE, SCRAMBLED, UNKNOWN = "video", "other", "conditioning", "image", "scrambled", "unknown"


@dataclass(frozen=True)
class Grid:
    """The axes a video segment runs along: where its frames are counted, and its shape in the words of the graph."""

    frame_sources: frozenset[Source]
    frames: Size
    tokens_per_frame: Size
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind.  ``source`` names the input they come from, or the op at ``lost_at`` where the trail was lost.

    SCRAMBLED tokens come from a video, but frames are not whole, not in order or not contiguous.
    """

    kind: str
    size: Size
    source: str
    grid: Grid | None = None
    lost_at: str = ""

    def __str__(self) -> str:
        shape = "×".join(str(n) for n in self.grid.shape) if self.grid else str(self.size)
        return f"{self.kind if self.kind != OTHER else self.source} {shape}"


@dataclass(frozen=True)
class TokenLayout:
    """Segments of a sequence, in order; ``batch_frames`` says that the batch axis counts frames or places of the video."""

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


def video_inputs(outputs: Iterable[Axis]) -> frozenset[str]:
    """Places of the inputs whose grid reaches the model's outputs: what the model generates is the target video."""
    reached: dict[str, set[tuple[int, Size]]] = {}
    for axis in outputs:
        for factor in leaves(axis):
            for digit in factor.digits:
                if digit.source.kind == INPUT:  # axes of a latent, or digits of one packed axis
                    reached.setdefault(digit.source.place, set()).add((digit.source.axis, digit.stride))
    return frozenset(place for place, digits in reached.items() if len(digits) >= 3)


def token_layout(tokens: Axis, batch: Axis, targets: frozenset[str]) -> TokenLayout:
    """Reads the layout of a token axis; ``targets`` are the places of the inputs that hold the generated video."""
    along_video = any(d.source.kind == INPUT and d.source.rank >= 5 and d.source.axis > 0 for f in leaves(batch) for d in f.digits)
    return TokenLayout(tuple(_segment(part, targets) for part in _parts(tokens)), along_video)


def _parts(tokens: Axis) -> list[Axis]:
    """The pieces of a sequence; a concatenation of frames, each of the same places, is one of stretches of tokens."""
    if tokens and isinstance(tokens[0], Concat):
        return [part for frames in tokens[0].parts for part in _parts((*frames, *tokens[1:]))]
    return [tokens]


def _segment(axis: Axis, targets: frozenset[str]) -> Segment:
    size = axis_size(axis)
    factors = [factor for factor in axis if isinstance(factor, Factor)]
    digits = [digit for factor in leaves(axis) for digit in factor.digits]
    name = min((d.source.name for d in digits if d.source.kind in (INPUT, ARANGE)), default="tokens")
    if len(factors) < len(axis):
        return Segment(SCRAMBLED, size, name)  # a concatenation inside frames
    for place in sorted({d.source.place for d in digits if d.source.kind == INPUT}, key=lambda p: (p not in targets, p)):
        own = [[d for d in factor.digits if d.source.place == place] for factor in factors]
        source = next(d.source for found in own for d in found)
        grid = _latent_grid(factors, own) or _packed_grid(factors, own)
        if grid is not None:
            return Segment(VIDEO if place in targets else CONDITIONING, size, source.name, grid)
        if source.rank >= 5 and all(own):
            axes = {digits[0].source.axis for digits in own}
            return Segment(IMAGE if len(axes) < 3 else SCRAMBLED, size, source.name)
    lost = next((d.source for d in digits if d.source.kind == OP), None)
    if lost is not None:
        return Segment(UNKNOWN, size, lost.name, lost_at=lost.place)
    return Segment(OTHER, size, name)


def _latent_grid(factors: list[Factor], own: list[list[Digit]]) -> Grid | None:
    """A latent input with axes for frames, height and width, in that order in every layout (BCFHW, BFCHW, BFHWC, lists).

    The frame axis comes first in the sequence, whole and in order; inside a frame any order of places will do.
    """
    if any(not digits for digits in own):
        return None
    axes = sorted({digits[0].source.axis for digits in own})
    frame = own[0][0]
    first = [digits for digits in own if digits[0].source.axis == axes[0]]
    side_by_side = len(axes) == 3 and axes[2] - axes[1] == 1 and axes[1] - axes[0] <= 2  # at most the channels lie between
    whole = same(frame.start, 0) and same(frame.size * frame.stride, frame.source.size)
    if not (side_by_side and frame.source.axis == axes[0] and len(first) == 1 and whole):
        return None
    return _grid(factors, frozenset((frame.source,)))


def _packed_grid(factors: list[Factor], own: list[list[Digit]]) -> Grid | None:
    """Packed tokens multiplied with a rope table that was built from three counts: of frames, of rows and of columns."""
    if len(factors) != 3 or any(not digits for digits in own):
        return None
    counts = [{d.source for d in factor.digits if d.source.kind == ARANGE and same(d.size, d.source.size)} for factor in factors]
    if not all(counts) or counts[0] & counts[1] or counts[1] & counts[2] or counts[0] & counts[2]:
        return None
    sizes, packed = [factor.size for factor in factors], own[0][0].source
    strides = [digits[0].stride for digits in own]
    in_order = same(strides[2], 1) and same(strides[1], sizes[2]) and same(strides[0], sizes[1] * sizes[2])
    if not (in_order and same(sizes[0] * strides[0], packed.size)):
        return None
    return _grid(factors, frozenset((packed, *counts[0])))


def _grid(factors: list[Factor], frame_sources: frozenset[Source]) -> Grid:
    shape = tuple(factor.size for factor in factors)
    return Grid(frame_sources, shape[0], axis_size(tuple(factors[1:])), shape)
