"""Long Video Sparse Attention (LVSA, arXiv 2605.31057) as a policy: anchor frames that rotate with the denoising step, and a window."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from lvsa_compile import reasons
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import OptionError
from lvsa_compile.policies.contract import Facts, Geometry, Horizon, Plan, plan_of
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.policies.rows import Turn
from lvsa_compile.policies.tables import OPEN_END, KeyRangeTable, Range, VideoSpan, join_ranges, padded
from lvsa_compile.reasons import Miss


@dataclass(frozen=True)
class LVSA:
    """Long Video Sparse Attention: every latent frame attends to anchor frames and to a local window.

    All lengths are in latent frames.  Tokens outside the video are attended by every query, and attend everything.

    Args:
        window: half-width of the local window; 0 leaves the anchors alone.
        first_frames: how many frames at the start are always anchors.
        sparsity_scale: multiplies the budget of attended frames that the training horizon sets.
        key_frame_interval: distance of the periodic anchors; None chooses it from the horizon, 0 means none.
        expand_window: the window grows until it holds ``2 * window + 1`` frames that are not anchors.
        rotate: what the anchor grid moves by one frame with: "step", each denoising step, as published; "layer", each layer of the model;
            "both"; True is "step", and False keeps it where it is.

    Raises:
        OptionError: a value outside its range, named with its remedy.

    Example:
        >>> torch.compile(model, backend="lvsa", options={"policy": LVSA(window=2)})
    """

    name: ClassVar[str] = "lvsa"
    needs_horizon: ClassVar[bool] = True

    window: int = 3
    first_frames: int = 1
    sparsity_scale: float = 1.0
    key_frame_interval: int | None = None
    expand_window: bool = True
    rotate: bool | str = True

    def __post_init__(self) -> None:
        self.pattern(1, 1)  # which checks the numbers
        if not isinstance(self.expand_window, bool):
            raise OptionError("expand_window", self.expand_window, "not True or False", "Give True or False.")
        if problem := wrong_rotation(self.rotate):
            raise OptionError("rotate", self.rotate, *problem)

    def pattern(self, frames: int, horizon: int) -> FramePattern:
        """The frame pattern of a video of ``frames`` latent frames, for a model that was trained on ``horizon`` of them."""
        return FramePattern(
            frames, self.window, self.first_frames, horizon, self.sparsity_scale, self.key_frame_interval, self.expand_window
        )

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        """Not where every frame attends every frame at every phase, nor where the horizon is not known."""
        frames, horizon = geometry.total_frames, facts.horizon
        if horizon is None:
            return reasons.HORIZON_UNKNOWN.because(facts.horizon_missing)
        if not self.pattern(frames, horizon.frames).is_full:
            return None
        latent = horizon.if_pixels
        if latent and not self.pattern(frames, latent).is_full:
            return reasons.PIXEL_FRAMES.because(
                f"reference_frames={horizon.frames}, and the video has {frames} latent frames",
                f"Give latent frames: {horizon.frames} pixel frames are reference_frames={latent}.",
            )
        return reasons.PATTERN_FULL.because(f"{frames} latent frames, training horizon {horizon.frames} ({horizon.found_in})")

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        """A query block per latent frame, a row per phase of the rotation."""
        assert facts.horizon is not None
        pattern = self.pattern(geometry.total_frames, facts.horizon.frames)
        table = frame_table(pattern, geometry.query, geometry.key, bool(self.rotate), geometry.first_frame)
        rows = Turn(table.rows, by_step=self.rotate in (True, "step", "both"), by_layer=self.rotate in ("layer", "both"))
        return Plan(self, geometry, facts, table, rows, density=pattern.density, frames=pattern, parts=2 * (pattern.interval or 1))


POLICY = LVSA


def wrong_rotation(value: object) -> tuple[str, str] | None:
    """What is wrong with a value of ``rotate``, and the remedy; None where nothing is."""
    if isinstance(value, bool) or (isinstance(value, str) and value in ("step", "layer", "both")):
        return None
    return "not a known choice", "Choose one of: 'step', 'layer', 'both', True (which is 'step'), False."


def plan_with(pattern: FramePattern, query: VideoSpan, key: VideoSpan, *, rotate: bool | str = True, heads: int = 1) -> Plan:
    """The plan of a frame pattern for a video at ``query`` in the query and at ``key`` in the key sequence."""
    settings = (pattern.window, pattern.first_frames, pattern.sparsity_scale, pattern.key_frame_interval, pattern.expand_window)
    return plan_of(LVSA(*settings, rotate), Geometry.of(query, key, heads=heads), Facts(Horizon(pattern.reference_frames)))


@dropped_on_reset
@functools.lru_cache(maxsize=64)
def frame_table(pattern: FramePattern, query: VideoSpan, key: VideoSpan, rotate: bool = True, first_frame: int = 0) -> KeyRangeTable:
    """The table of ``pattern`` for video at ``query`` in the query and at ``key`` in the key sequence.

    ``rotate=False`` keeps phase 0 alone.  ``first_frame`` is the frame of the pattern that the query begins with.
    Tokens outside the video are attended by every row, and their rows attend everything (arXiv 2605.31057, joint attention).
    """
    bounds = [0]
    blocks: list[int | None] = []  # the latent frame of each query block, None for a block that attends everything
    for length, frame in [
        (query.prefix, None),
        *((query.tokens_per_frame, first_frame + f) for f in range(query.frames)),
        (OPEN_END if query.open_ended else query.suffix, None),
    ]:
        if length:
            bounds.append(min(bounds[-1] + length, OPEN_END))
            blocks.append(frame)
    phases = [
        [[(key.whole,) if f is None else _token_ranges(pattern.attended(f, phase), key) for f in blocks]]
        for phase in range(pattern.phases if rotate else 1)
    ]
    return padded(bounds, phases)


def _token_ranges(frames: list[int], key: VideoSpan) -> tuple[Range, ...]:
    """Token ranges of the sorted ``frames`` and of everything around the video, touching ranges joined."""
    size = key.tokens_per_frame
    pieces = [(0, key.prefix), *((key.prefix + f * size, key.prefix + (f + 1) * size) for f in frames), (key.video[1], key.whole[1])]
    return join_ranges([piece for piece in pieces if piece[0] < piece[1]])
