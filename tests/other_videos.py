"""Videos of another kind than ``synthetic_videos``, on which no threshold was chosen: other scenes, smaller, shorter, failing otherwise.

Frames are ``[n, rows, columns, 3]`` in 0 to 1; ``time`` may be any sequence of times, in frames.
"""

from __future__ import annotations

import cv2
import numpy as np


def folded(way, length):
    way = np.mod(way, 2 * length)
    return np.where(way < length, way, 2 * length - way)


def balls(time, rows=96, columns=128, speed=2.0, seed=0, background=None):
    """Three balls that bounce, before a gradient."""
    down, across = np.mgrid[0:rows, 0:columns]
    still = np.stack([0.2 + 0.6 * across / columns, 0.3 + 0.4 * down / rows, 0.5 + 0.3 * (across + down) / (rows + columns)], -1)
    still = still if background is None else background
    generator, radius, frames = np.random.default_rng(seed + 100), max(3, min(rows, columns) // 9), []
    starts = [(*generator.uniform(0, columns, 2), generator.uniform(0, 2 * np.pi), generator.uniform(0.1, 1, 3)) for _ in range(3)]
    for at in time:
        frame = still.copy()
        for x, y, angle, colour in starts:
            x = radius + folded(x + speed * at * np.cos(angle), columns - 2 * radius)
            y = radius + folded(y + speed * at * np.sin(angle), rows - 2 * radius)
            cv2.circle(frame, (round(float(x) * 16), round(float(y) * 16)), radius * 16, colour.tolist(), -1, cv2.LINE_AA, 4)
        frames.append(frame)
    return np.stack(frames)


def texture(rows, columns, seed, coarse=8):
    generator, found = np.random.default_rng(seed), np.zeros((rows, columns, 3))
    for octave in range(4):
        cells = coarse * 2**octave
        found += cv2.resize(generator.random((cells, cells, 3)), (columns, rows), interpolation=cv2.INTER_CUBIC) / 2**octave
    return (found - found.min()) / np.ptp(found)


def pan(time, rows=64, columns=96, speed=2.0, seed=0):
    """A window that moves over a texture."""
    large = texture(2 * rows, columns + 700, seed)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moves = [np.float32([[1, 0, speed * at], [0, 1, rows / 3]]) for at in time]
    return np.stack([cv2.warpAffine(large, move, (columns, rows), flags=flags, borderMode=cv2.BORDER_REFLECT) for move in moves])


def plasma(time, rows=64, columns=96, speed=2.0, seed=0):
    """Waves of colour that never come back."""
    down, across = np.mgrid[0:rows, 0:columns] / 30 + seed
    frames = []
    for at in 0.06 * speed * np.asarray(time, float):
        red = np.sin(across * 1.3 + at) * np.cos(down + 0.7 * at)
        green, blue = np.sin(across + down - 1.3 * at), np.cos(1.7 * down - 0.41 * at + np.sin(across + at))
        frames.append(0.5 + 0.4 * np.stack([red, green, blue], -1))
    return np.stack(frames)


def crossing(time, rows=64, columns=64, speed=0.5, whole_pixels=False):
    """A square that crosses a still texture, drawn between pixels or from pixel to pixel."""
    still, side, frames = 0.2 + 0.6 * texture(rows, columns, 1, 4), rows // 8, []
    for at in time:
        frame, left = still.copy(), side + 1 + speed * at
        if whole_pixels:
            frame[rows // 3 : rows // 3 + side, int(left) : int(left) + side] = (1, 0.8, 0.2)
        else:
            middle = (round((left + side / 2) * 16), round((rows / 3 + side / 2) * 16))
            cv2.circle(frame, middle, side * 8, (1, 0.8, 0.2), -1, cv2.LINE_AA, 4)
        frames.append(frame)
    return np.stack(frames)


SCENES = {"balls": balls, "pan": pan, "plasma": plasma}
FRAMES = {"balls": 48, "pan": 32, "plasma": 64}


def times(failure, frames, strength):
    """When each frame of a failing video is."""
    time = np.arange(frames, dtype=float)
    kept = max(6, round((1 - strength) * frames))
    if failure == "frozen":
        return np.minimum(time, max(1, round((1 - strength) * frames)) - 1)
    if failure == "frozen at first":
        return np.maximum(time, round(strength * (frames - 1)))
    if failure == "dying down":
        return np.concatenate([[0], np.cumsum(np.exp(-5 * strength * time / frames))[:-1]])
    if failure == "loop":
        return time % kept
    turn = frames * (1 - strength / 2)
    return np.where(time <= turn, time, 2 * turn - time)  # there and back


def damaged(failure, frames, strength, scene):
    """Frames with something wrong in each of them, or in their order."""
    generator, (count, rows, columns, _) = np.random.default_rng(7), frames.shape
    if failure == "flicker":
        return frames * (1 + 0.3 * strength * generator.uniform(-1, 1, (count, 1, 1, 1)))
    if failure == "levels":
        steps = {0: 255, 0.5: 15, 1: 3}[strength]
        return np.round(frames * steps) / steps
    if failure == "repeated patch":
        side = max(8, min(rows, columns) // 4)
        patch = frames[:, rows // 2 : rows // 2 + side, columns // 2 : columns // 2 + side]
        return (1 - strength) * frames + strength * np.tile(patch, (1, -(-rows // side), -(-columns // side), 1))[:, :rows, :columns]
    if failure == "grid":
        lines = np.zeros((rows, columns, 1))
        lines[::12], lines[:, ::12] = 1, 1
        return frames * (1 - 0.6 * strength * lines)
    if failure == "noise":
        return frames + 0.15 * strength * generator.standard_normal(frames.shape)
    if failure == "halo":
        return np.stack([frame + 3 * strength * (frame - cv2.GaussianBlur(frame, (0, 0), 2)) for frame in frames])
    if failure == "blur":
        return np.stack([cv2.GaussianBlur(frame, (0, 0), 4 * strength) if strength else frame for frame in frames])
    cuts = round(4 * strength)
    length = -(-count // (cuts + 1))
    return np.concatenate([SCENES[scene](np.arange(length) + 17 * part, seed=part) for part in range(cuts + 1)])[:count]
