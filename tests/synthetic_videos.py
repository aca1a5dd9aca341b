"""Videos made by code: healthy ones, and failures of generated video at any strength from 0 (none) to 1."""

from __future__ import annotations

import functools
from pathlib import Path

import cv2
import numpy

FRAMES, ROWS, COLUMNS = 96, 120, 216


@functools.cache
def _panorama(seed: int) -> numpy.ndarray:
    """A landscape of blurred noise at several scales, larger than what is seen of it."""
    generator = numpy.random.default_rng(seed)
    picture = numpy.zeros((2 * ROWS, 4 * COLUMNS, 3), numpy.float32)
    for scale, weight in ((60, 60), (20, 30), (6, 14), (2, 8)):
        layer = cv2.GaussianBlur(generator.standard_normal(picture.shape).astype(numpy.float32), (0, 0), scale)
        picture += weight * layer / layer.std()
    return picture + 120


def frame_at(time: float, seed: int = 0, speed: float = 1.0, still_camera: bool = False) -> numpy.ndarray:
    """A frame ``[ROWS, COLUMNS, 3]`` in 0 to 255: a camera that pans, and two discs on ways that do not come back."""
    pan = 0.0 if still_camera else 2.5 * speed * time
    left, top = 40 + pan, 90 + (0 if still_camera else 50 * numpy.sin(0.013 * speed * time))
    moved = numpy.float32([[1, 0, -left], [0, 1, -top]])
    frame = cv2.warpAffine(_panorama(seed), moved, (COLUMNS, ROWS), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    for number, (colour, across, down) in enumerate([((230, 60, 40), 1.9, 0.011), ((40, 90, 220), -1.3, 0.017)]):
        way = speed * time
        x = 30 + 140 * number + across * way + 18 * numpy.sin(0.045 * way + number)
        y = ROWS / 2 + 0.3 * ROWS * numpy.sin(down * way + number)
        cv2.circle(frame, (round(x * 16), round(y * 16)), (22 - 6 * number) * 16, colour, -1, cv2.LINE_AA, 4)
    return frame


def video(times=None, grain: float = 0.6, **scene) -> numpy.ndarray:
    """Frames at some times ``[n, ROWS, COLUMNS, 3]``, with a camera's grain."""
    generator = numpy.random.default_rng(1)
    frames = [frame_at(float(time), **scene) for time in (range(FRAMES) if times is None else times)]
    return numpy.stack([frame + grain * generator.standard_normal(frame.shape) for frame in frames]).astype(numpy.float32)


def healthy(speed: float = 1.0) -> numpy.ndarray:
    """Motion that goes on."""
    return video(speed=speed)


def still_camera() -> numpy.ndarray:
    """A background that does not move, before which things do."""
    return video(still_camera=True)


def frozen(strength: float) -> numpy.ndarray:
    """The last part of the video stands still."""
    return video([min(time, (1 - strength) * FRAMES) for time in range(FRAMES)])


def slow_freeze(strength: float) -> numpy.ndarray:
    """Motion dies down, to nothing at the end at strength 1 and to nothing in the middle beyond."""
    speeds = [max(0.0, 1 - 1.8 * strength * time / FRAMES) for time in range(FRAMES)]
    return video(numpy.cumsum([0.0, *speeds[:-1]]))


def hard_loop(strength: float) -> numpy.ndarray:
    """The same again, from where it began: once at strength 0.5, three times at 0.75."""
    period = max(12.0, (1 - strength) * FRAMES)
    return video([time % period for time in range(FRAMES)])


def ping_pong(strength: float) -> numpy.ndarray:
    """Forward, then back; at strength 1 the way back is as long as the way there."""
    turn = FRAMES * (1 - strength / 2)
    return video([time if time <= turn else 2 * turn - time for time in range(FRAMES)])


def cross_fade_loop(strength: float) -> numpy.ndarray:
    """As a hard loop, its end blended into its beginning over eight frames."""
    period = max(20.0, (1 - strength) * FRAMES)
    frames = []
    for time in range(FRAMES):
        at = time % period
        frame = frame_at(at)
        if time >= period and at < 8:
            frame = frame * (at / 8) + frame_at(at + period) * (1 - at / 8)
        frames.append(frame)
    return numpy.stack(frames).astype(numpy.float32)


def flicker(strength: float) -> numpy.ndarray:
    """Brightness jumps from frame to frame."""
    jumps = numpy.random.default_rng(2).uniform(-1, 1, FRAMES)
    return video() * (1 + 0.12 * strength * jumps[:, None, None, None]).astype(numpy.float32)


def banding(strength: float) -> numpy.ndarray:
    """Fewer and fewer levels of brightness."""
    step = 1 + 15 * strength
    return numpy.round(cv2_blurred(video(grain=0.0)) / step) * step


def cv2_blurred(frames: numpy.ndarray) -> numpy.ndarray:
    """Gentle slopes, in which steps show."""
    return numpy.stack([cv2.GaussianBlur(frame, (0, 0), 6) for frame in frames])


def tiling(strength: float) -> numpy.ndarray:
    """A pattern of tiles over the picture."""
    tile = numpy.random.default_rng(3).standard_normal((30, 27, 1)).astype(numpy.float32)
    tile = cv2.GaussianBlur(tile, (0, 0), 1.5)[..., None]
    pattern = numpy.tile(tile / tile.std(), (ROWS // 30, COLUMNS // 27, 1))
    return video() + 40 * strength * pattern[None]


def halo(strength: float) -> numpy.ndarray:
    """Edges sharpened until they ring."""
    return numpy.stack([frame + 4 * strength * (frame - cv2.GaussianBlur(frame, (0, 0), 3)) for frame in video()])


def noise(strength: float) -> numpy.ndarray:
    """More and more grain."""
    return video(grain=0.6 + 25 * strength)


def blur(strength: float) -> numpy.ndarray:
    """Less and less sharp."""
    return numpy.stack([cv2.GaussianBlur(frame, (0, 0), 0.3 + 5 * strength) for frame in video()])


def jump_cuts(strength: float) -> numpy.ndarray:
    """Sudden jumps to other places, up to six."""
    cuts = round(6 * strength)
    length = FRAMES // (cuts + 1)
    return numpy.concatenate([video(range(length + (FRAMES % (cuts + 1) if n == cuts else 0)), seed=10 + n) for n in range(cuts + 1)])


FAILURES = {  # the dimension that must fall with the strength
    "frozen": (frozen, ("loop", "dynamics")),
    "slow freeze": (slow_freeze, ("dynamics",)),
    "hard loop": (hard_loop, ("loop",)),
    "ping-pong": (ping_pong, ("loop",)),
    "cross-fade loop": (cross_fade_loop, ("loop",)),
    "flicker": (flicker, ("temporal",)),
    "jump cuts": (jump_cuts, ("temporal",)),
    "banding": (banding, ("artefacts",)),
    "tiling": (tiling, ("artefacts",)),
    "halo": (halo, ("artefacts",)),
    "noise": (noise, ("artefacts",)),
    "blur": (blur, ("spatial",)),
}


def as_tensor(frames: numpy.ndarray) -> numpy.ndarray:
    """``[n, 3, ROWS, COLUMNS]`` in [0, 1]."""
    return (frames.clip(0, 255) / 255).astype(numpy.float32).transpose(0, 3, 1, 2)


def written(path: Path, frames: numpy.ndarray, fps: float = 16) -> Path:
    """A file with these frames."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frames.shape[2:0:-1])
    for frame in frames.clip(0, 255).astype(numpy.uint8):
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path
