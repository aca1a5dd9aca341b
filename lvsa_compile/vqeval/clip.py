"""A video read within bounds: every frame small, and some frames large; from a file or from a tensor."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy
import numpy.typing

from lvsa_compile.errors import VideoQualityError

Frames = numpy.typing.NDArray[numpy.uint8]
Numbers = numpy.typing.NDArray[numpy.float32]

MOST_FRAMES = 4096
MOST_PIXELS = 4096 * 2304
MOST_FILE_BYTES = 4 * 2**30
LEAST_FRAMES, LEAST_SIDE = 2, 16
_SMALL, _LARGE = 160, 854  # longest side in pixels
_LARGE_FRAMES, _CHOSEN = 33, 9
_SUFFIXES = (".mp4", ".mov", ".webm", ".avi", ".mkv")


@dataclass(frozen=True, eq=False)
class Clip:
    """``small`` are all frames ``[n, h, w, 3]``, longest side 160; ``large`` pairs of neighbours ``[m, 2, H, W, 3]``, longest side 854.

    ``places`` are the numbers of the first of each pair, ``size`` rows and columns of the video, ``truncated`` how many frames are left out
    because the video is longer than what is read.
    """

    name: str
    fps: float
    size: tuple[int, int]
    small: Frames
    large: Frames
    places: tuple[int, ...]
    truncated: bool = False

    @property
    def count(self) -> int:
        """Frames that were read."""
        return len(self.small)

    @cached_property
    def grey(self) -> Numbers:
        """All small frames as brightness in 0 to 1, ``[n, h, w]``."""
        return (self.small @ numpy.array([0.299, 0.587, 0.114], numpy.float32) / 255).astype(numpy.float32)

    @property
    def chosen(self) -> slice:
        """Which of the large pairs are looked at where every one would take too long: about nine, evenly over the video."""
        return slice(None, None, max(1, len(self.large) // _CHOSEN))

    @cached_property
    def large_grey(self) -> Frames:
        """The large pairs as brightness ``[m, 2, H, W]``."""
        return numpy.stack([[cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pair] for pair in self.large]).astype(numpy.uint8)


def is_video(path: Path) -> bool:
    """Whether a file is named like a video."""
    return path.suffix.lower() in _SUFFIXES


def read(path: Path) -> Clip:
    """A video file.

    Raises:
        VideoQualityError: it is not there, cannot be decoded, is too large or has too few frames.
    """
    if not path.is_file():
        raise VideoQualityError("video", str(path), "there is no such file", "Give the path of a video file.")
    if path.stat().st_size > MOST_FILE_BYTES:
        raise VideoQualityError("video", str(path), f"larger than {MOST_FILE_BYTES // 2**30} GiB", "Cut it into parts.")
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise VideoQualityError("video", str(path), "cannot be decoded", "Give a file that OpenCV reads, such as H.264 in MP4.")
        rows, columns = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        if rows * columns > MOST_PIXELS:
            raise VideoQualityError("video", str(path), f"{columns}×{rows} pixels are too many", "Scale it to 4096×2304 or less.")
        if min(rows, columns) < LEAST_SIDE:
            remedy = f"Give at least {LEAST_SIDE}×{LEAST_SIDE} pixels."
            raise VideoQualityError("video", str(path), f"{columns}×{rows} pixels are too few", remedy)
        said, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), float(capture.get(cv2.CAP_PROP_FPS))

        def frames() -> Iterator[Frames]:
            while True:
                found, frame = capture.read()
                if not found:
                    return
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(numpy.uint8)

        clip = _collected(path.name, frames(), fps if 0 < fps < 1000 else 16.0, said)
    finally:
        capture.release()
    if 0 < clip.count < min(said, MOST_FRAMES) - 2:
        problem = f"breaks off after {clip.count} of {said} frames"
        raise VideoQualityError("video", str(path), problem, "Write the file anew; a part of a video is not judged.")
    return clip


def from_frames(frames: Any, fps: Any) -> Clip:
    """A float tensor or array ``[frames, 3, H, W]`` in [0, 1].

    Raises:
        VideoQualityError: another shape, another range, or numbers that are none.
    """
    if isinstance(fps, bool) or not isinstance(fps, numbers.Real) or not 0 < float(fps) < 1000:
        raise VideoQualityError("fps", fps, "not a number of frames per second", "Give a number above 0, such as 16.")
    array = _as_array(frames)
    if array.ndim != 4 or array.shape[1] != 3 or not numpy.issubdtype(array.dtype, numpy.floating):
        remedy = "Give floating-point [frames, 3, height, width] in [0, 1]."
        raise VideoQualityError("video", f"{array.dtype} {list(array.shape)}", "not [frames, 3, height, width] of floats", remedy)
    if not (numpy.isfinite(array).all() and array.min(initial=0) >= -1e-3 and array.max(initial=0) <= 1 + 1e-3):
        low, high = float(array.min()), float(array.max())
        raise VideoQualityError("video", f"values from {low:.3g} to {high:.3g}", "not all in [0, 1]", "Scale and clamp it to [0, 1].")
    if array.shape[2] * array.shape[3] > MOST_PIXELS:
        raise VideoQualityError("video", str(list(array.shape)), "too many pixels", "Scale it to 4096×2304 or less.")
    if min(array.shape[2:]) < LEAST_SIDE:
        problem = f"a side of less than {LEAST_SIDE} pixels"
        raise VideoQualityError("video", str(list(array.shape)), problem, f"Give at least {LEAST_SIDE}×{LEAST_SIDE} pixels.")
    turned = ((frame.transpose(1, 2, 0) * 255).round().clip(0, 255).astype(numpy.uint8) for frame in array)
    return _collected("frames", turned, float(fps), len(array))


def _as_array(frames: Any) -> Any:
    """A tensor of whatever floating-point type, or an array, as an array that can be computed with."""
    if not hasattr(frames, "detach"):
        return numpy.asarray(frames)
    held = frames.detach().cpu()
    return (held.float() if held.is_floating_point() else held).numpy()


def _collected(name: str, frames: Iterator[Frames], fps: float, expected: int) -> Clip:
    """Reads frames one by one and keeps what is needed of each."""
    expected = min(max(expected, LEAST_FRAMES), MOST_FRAMES)
    wanted = sorted({int(place) for place in numpy.linspace(0, expected - 2, min(_LARGE_FRAMES, expected - 1))})
    starts, truncated = set(wanted), False
    small: list[Frames] = []
    pairs: list[Frames] = []
    places: list[int] = []
    size: tuple[int, ...] = (0, 0)
    before: Frames | None = None
    for number, frame in enumerate(frames):
        if number >= MOST_FRAMES:
            truncated = True
            break
        size = frame.shape[:2]
        small.append(_fitted(frame, _SMALL))
        if before is not None:
            pairs.append(numpy.stack([before, _fitted(frame, _LARGE)]))
            places.append(number - 1)
        before = _fitted(frame, _LARGE) if number in starts else None
    if len(small) < LEAST_FRAMES:
        raise VideoQualityError("video", name, f"has {len(small)} frames", f"Give a video of at least {LEAST_FRAMES} frames.")
    return Clip(name, fps, (size[0], size[1]), numpy.stack(small), numpy.stack(pairs), tuple(places), truncated)


def _fitted(frame: Frames, longest: int) -> Frames:
    rows, columns = frame.shape[:2]
    scale = longest / max(rows, columns)
    if scale >= 1:
        return frame
    size = (max(8, round(columns * scale)), max(8, round(rows * scale)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(numpy.uint8)
