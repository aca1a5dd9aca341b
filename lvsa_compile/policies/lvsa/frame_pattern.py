"""The frame pattern of Long Video Sparse Attention (LVSA, arXiv 2605.31057).

Each latent frame attends to the *anchors* (the first frames and every ``interval``-th frame, a grid that rotates with the denoising
step) and to a *window* of frames around itself.  All lengths are in latent frames as the transformer sees them, that is after
temporal patchify.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from lvsa_compile.errors import OptionError


@dataclass(frozen=True)
class FramePattern:
    """Which latent frames each latent frame attends to, at every denoising step.

    Args:
        frames: latent frames of the video, at least 1.
        window: half-width of the local window; 0 leaves the anchors alone.
        first_frames: how many frames at the start are always anchors.
        reference_frames: training horizon; the pattern spends about this many attended frames per frame.
        sparsity_scale: multiplies ``reference_frames``.
        key_frame_interval: distance of periodic anchors; ``None`` chooses it from the horizon, 0 means no periodic anchors.
        expand_window: the window grows until it holds ``2 * window + 1`` frames that are not anchors.

    Raises:
        OptionError: a value outside its range, named with its remedy.

    Example:
        >>> pattern = FramePattern(81, reference_frames=21)
        >>> pattern.anchors(step=0)[:3], pattern.interval, round(pattern.density, 3)
        ([0, 6, 12], 6, 0.267)
    """

    frames: int
    window: int = 3
    first_frames: int = 1
    reference_frames: int = 21
    sparsity_scale: float = 1.0
    key_frame_interval: int | None = None
    expand_window: bool = True

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("window", 0), ("first_frames", 0), ("reference_frames", 1), ("key_frame_interval", 0)):
            value = getattr(self, name)
            if name == "key_frame_interval" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise OptionError(name, value, "not a whole number", f"Give a number of latent frames, at least {least}.")
            if value < least:
                raise OptionError(name, value, f"smaller than {least}", f"Give a number of latent frames, at least {least}.")
        if not (isinstance(self.sparsity_scale, (int, float)) and math.isfinite(self.sparsity_scale) and self.sparsity_scale > 0):
            raise OptionError("sparsity_scale", self.sparsity_scale, "not a positive number", "Use 1.0 for the published budget.")
        if not (self.window or self.first_frames or self.interval):
            raise OptionError(
                "key_frame_interval",
                self.key_frame_interval,
                "with window=0 and first_frames=0 no frame would attend anything",
                "Raise window or first_frames, or leave key_frame_interval at None.",
            )

    @functools.cached_property
    def interval(self) -> int:
        """Distance of the periodic anchors in latent frames (0: none); also how many steps one turn of the grid takes."""
        if self.key_frame_interval is not None:
            return self.key_frame_interval
        frames, first = self.frames, self.first_frames
        full_window = 2 * self.window + 1
        budget = max(first + 1, int(self.reference_frames * self.sparsity_scale))
        if frames <= budget:
            return 1
        anchors_needed = max(first, budget - min(full_window, frames))
        widest = next((k for k in range(frames, 0, -1) if _anchor_count(frames, first, k) >= anchors_needed), 1)
        mandatory = 2 * self.window + first
        room = max(budget - mandatory, 1)
        return max(widest, math.ceil(max(frames - mandatory, budget - mandatory) / room))

    @property
    def phases(self) -> int:
        """How many different patterns one turn of the anchor grid goes through, at least 1."""
        return max(self.interval, 1)

    def anchors(self, step: int) -> list[int]:
        """Frames that every frame attends at denoising step ``step`` (from 0), sorted."""
        found = set(range(min(self.first_frames, self.frames)))
        if self.interval:
            offset = step % self.interval
            found.update((offset + i * self.interval) % self.frames for i in range(math.ceil(self.frames / self.interval)))
        return sorted(found)

    def attended(self, frame: int, step: int) -> list[int]:
        """Frames that ``frame`` attends at denoising step ``step``, sorted."""
        anchors = self.anchors(step)
        low, high = self._window(frame, frozenset(anchors))
        return sorted({*anchors, *range(low, high)})

    def coverage(self, steps: int, layers: int = 1) -> float:
        """Share of the frames that are an anchor at least once in ``steps`` denoising steps.

        ``layers`` counts layers that would each begin one phase later than the one before; with 1 all layers share a step's anchors.

        Raises:
            OptionError: ``steps`` or ``layers`` is not a whole number from 1 on.

        Example:
            >>> round(FramePattern(81, reference_frames=21).coverage(steps=4), 2)
            0.68
        """
        for name, value in (("steps", steps), ("layers", layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(name, value, "not a whole number from 1 on", f"Give the number of {name}.")
        phases = min(steps + layers - 1, self.phases)
        return len({frame for phase in range(phases) for frame in self.anchors(phase)}) / self.frames

    @functools.cached_property
    def density(self) -> float:
        """Attended frame pairs over all frame pairs, mean over the phases."""
        pairs = sum(len(self.attended(f, p)) for p in range(self.phases) for f in range(self.frames))
        return pairs / (self.phases * self.frames**2)

    @functools.cached_property
    def is_full(self) -> bool:
        """Whether every frame attends every frame at every phase, so that nothing is left to skip."""
        return all(len(self.attended(f, p)) == self.frames for p in range(self.phases) for f in range(self.frames))

    def _window(self, frame: int, anchors: frozenset[int]) -> tuple[int, int]:
        """``[low, high)``: shifted at the ends of the video rather than clipped, then widened left and right in turn."""
        if self.window == 0:
            return frame, frame
        last = self.frames - 1
        low = max(0, min(frame - self.window, last - 2 * self.window))
        high = min(last, max(frame + self.window, 2 * self.window))
        if not self.expand_window:
            return low, high + 1
        wanted = min(2 * self.window + 1, self.frames - len(anchors))
        held = sum(f not in anchors for f in range(low, high + 1))
        while held < wanted and (low > 0 or high < last):
            if low > 0:
                low -= 1
                held += low not in anchors
            if held < wanted and high < last:
                high += 1
                held += high not in anchors
        return low, high + 1


def _anchor_count(frames: int, first_frames: int, interval: int) -> int:
    """Size of ``{0..first_frames-1}`` united with ``range(0, frames, interval)``."""
    first = min(first_frames, frames)
    return first + len(range(-(-first // interval) * interval, frames, interval))
