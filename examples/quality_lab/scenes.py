"""Scenes whose physics is known: one shape of one colour in a box, that floats straight on and bounces, or falls and bounces.

Lengths are in pixels, times in frames.  Bounces lose nothing, so that a true video keeps moving however long it is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZE = 16  # rows and columns of a frame
COLOURS = {"red": (1.0, 0.15, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.2, 0.35, 1.0), "yellow": (1.0, 0.85, 0.1)}
SHAPES = ("disc", "square", "ring")
MOTIONS = ("floats", "falls")
WORDS = (*COLOURS, *SHAPES, *MOTIONS)
CAPTIONS = tuple(itertools.product(COLOURS, SHAPES, MOTIONS))
GRAVITY = 0.12  # pixels per frame²
TEXT_DIM = 16


@dataclass(frozen=True)
class Scene:
    """One video: what moves, and where it is at each time.

    ``position`` and ``velocity`` are (across, down) at time 0; for what falls, ``velocity[1]`` is not used: it starts ``drop`` pixels above
    the floor at phase ``position[1]`` of its bounce, a share of one period.
    """

    colour: str
    shape: str
    motion: str
    radius: float
    position: tuple[float, float]
    velocity: tuple[float, float]
    drop: float

    def centres(self, frames: int) -> NDArray[np.float64]:
        """The centre at each frame, ``[frames, 2]`` (across, down)."""
        time = np.arange(frames)
        low, high = self.radius, SIZE - self.radius
        across = _reflected(self.position[0] + self.velocity[0] * time, low, high)
        if self.motion == "floats":
            return np.stack([across, _reflected(self.position[1] + self.velocity[1] * time, low, high)], 1)
        fastest = np.sqrt(2 * GRAVITY * self.drop)
        period = 2 * fastest / GRAVITY
        since = (self.position[1] * period + time) % period
        return np.stack([across, high - (fastest * since - GRAVITY * since**2 / 2)], 1)

    def frames(self, count: int) -> NDArray[np.float32]:
        """``[count, 3, SIZE, SIZE]`` in [0, 1]."""
        rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
        centres = self.centres(count)
        across, down = columns - centres[:, 0, None, None], rows - centres[:, 1, None, None]
        distance = np.hypot(across, down)
        if self.shape == "disc":
            outside = distance - self.radius
        elif self.shape == "square":
            outside = np.maximum(np.abs(across), np.abs(down)) - 0.87 * self.radius
        else:
            outside = np.abs(distance - (self.radius - 0.7)) - 0.75
        covered = np.clip(0.5 - outside, 0, 1)
        return (covered[:, None] * np.array(COLOURS[self.colour])[:, None, None]).astype(np.float32)


def _reflected(position: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """A straight way folded back at two walls."""
    along = np.mod(position - low, 2 * (high - low))
    return low + np.minimum(along, 2 * (high - low) - along)


def random_scene(generator: np.random.Generator, caption: tuple[str, str, str] | None = None) -> Scene:
    """A scene of a caption, by default of any."""
    colour, shape, motion = caption or CAPTIONS[generator.integers(len(CAPTIONS))]
    radius = float(generator.uniform(2.4, 3.0))
    speed = float(generator.uniform(0.9, 1.7))
    if motion == "floats":
        angle = float(generator.uniform(0, 2 * np.pi))
        velocity = (speed * np.cos(angle), speed * np.sin(angle))
        position = tuple(generator.uniform(radius, SIZE - radius, 2))
    else:
        velocity = (float(generator.choice([-1, 1])) * 0.7 * speed, 0.0)
        position = (generator.uniform(radius, SIZE - radius), generator.uniform(0, 1))
    drop = float(generator.uniform(4.0, SIZE - 2 * radius))
    return Scene(colour, shape, motion, radius, (float(position[0]), float(position[1])), (float(velocity[0]), float(velocity[1])), drop)


def text_of(captions: list[tuple[str, str, str]]) -> Tensor:
    """Captions as a text encoder would give them, ``[captions, words, TEXT_DIM]``: a unit vector per word."""
    vectors = torch.eye(TEXT_DIM)
    return torch.stack([torch.stack([vectors[WORDS.index(word)] for word in caption]) for caption in captions])
