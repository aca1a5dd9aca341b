"""Sliding tiles: the video in boxes of tokens, each of which attends a window of boxes around it (STA, arXiv 2502.04507)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lvsa_compile.errors import OptionError, ShapeError

Sizes = Sequence[int]


def boxes(canvas_in_tiles: Sizes, window: Sizes, tile: int | Sizes) -> list[list[int]]:
    """Which tiles a tile attends along time, rows and columns: ``[[start, end], [start, end], [start, end]]``.

    The window moves at a border and never shrinks; an even one, smaller than the canvas, attends one tile more, as published.

    Args:
        canvas_in_tiles: tiles along time, rows and columns.
        window: how many of them are attended along each.
        tile: the tile that attends: its number in the order of time, rows, columns, or its three places.

    Raises:
        OptionError: the window or the tile lies outside the canvas.

    Example:
        >>> boxes((3, 6, 10), (3, 3, 3), 90)
        [[0, 3], [2, 5], [0, 3]]
    """
    _three("canvas_in_tiles", canvas_in_tiles)
    _three("window", window, canvas_in_tiles)
    if isinstance(tile, int):
        if not 0 <= tile < math.prod(canvas_in_tiles):
            raise OptionError("tile", tile, f"the canvas has {math.prod(canvas_in_tiles)} tiles", "Number them from 0.")
        tile = (
            tile // (canvas_in_tiles[1] * canvas_in_tiles[2]),
            tile // canvas_in_tiles[2] % canvas_in_tiles[1],
            tile % canvas_in_tiles[2],
        )
    found = []
    for size, wide, at in zip(canvas_in_tiles, window, tile, strict=True):
        centre = min(max(at, wide // 2), size - 1 - wide // 2)
        found.append([max(centre - wide // 2, 0), min(centre + wide // 2 + 1, size)])
    return found


def tile_order(canvas: Sizes, tile: Sizes) -> Tensor:
    """The tokens of a video in the order of tiles, and by time, rows and columns within each: int64 ``[tokens]``.

    ``x[:, tile_order(canvas, tile)]`` puts tokens ``x`` ``[B, tokens, ...]``, in the order of time, rows and columns, into that order.

    Raises:
        OptionError: tiles do not fill the canvas.

    Example:
        >>> tile_order((1, 2, 4), (1, 2, 2)).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    _three("canvas", canvas)
    _three("tile", tile)
    if any(size % side for size, side in zip(canvas, tile, strict=True)):
        raise OptionError("tile", tuple(tile), f"tiles do not fill a canvas of {tuple(canvas)} tokens", "Give sides that divide its sides.")
    number = torch.arange(math.prod(canvas)).reshape(
        [part for size, side in zip(canvas, tile, strict=True) for part in (size // side, side)]
    )
    return number.permute(0, 2, 4, 1, 3, 5).flatten()


def choose_windows(loss: Tensor, candidates: Sequence[Sizes], dense_steps: int) -> list[list[list[list[int]]]]:
    """The window of each denoising step, layer and head that loses least.

    Args:
        loss: distance of the output from that of full attention, ``[candidates, steps, layers, heads]``.
        candidates: windows in tiles.
        dense_steps: the first steps, which attend as many tiles along each axis as any candidate does: the whole canvas.

    Returns:
        Windows by step, layer and head; of equal losses the first candidate's.

    Raises:
        ShapeError: ``loss`` is not of these candidates.

    Example:
        >>> windows = choose_windows(loss, [(3, 1, 10), (1, 5, 7), (3, 6, 1)], dense_steps=12)
    """
    if loss.dim() != 4 or loss.shape[0] != len(candidates):
        remedy = "Give [candidates, steps, layers, heads]."
        raise ShapeError("loss", tuple(loss.shape), f"it does not fit {len(candidates)} candidates", remedy)
    number = torch.arange(len(candidates), device=loss.device)[:, None, None, None]
    best = torch.where(loss == loss.amin(0), number, len(candidates)).amin(0).tolist()
    full = [max(sizes) for sizes in zip(*candidates, strict=True)]
    return [
        [[list(full) if step < dense_steps else list(candidates[one]) for one in heads] for heads in layers]
        for step, layers in enumerate(best)
    ]


def attended_tiles(canvas_in_tiles: Sizes, window: Sizes) -> Tensor:
    """Which tile attends which, bool ``[tiles, tiles]``, tiles by time, rows, columns."""
    found = torch.zeros(*[math.prod(canvas_in_tiles)] * 2, dtype=torch.bool)
    of_tile = found.unflatten(1, tuple(canvas_in_tiles))
    for number, places in enumerate(itertools.product(*map(range, canvas_in_tiles))):
        time, rows, columns = (slice(*box) for box in boxes(canvas_in_tiles, window, places))
        of_tile[number, time, rows, columns] = True
    return found


def _three(name: str, sizes: Sizes, most: Sizes | None = None) -> None:
    right = len(sizes) == 3 and all(isinstance(size, int) and size >= 1 for size in sizes)
    if not right or (most is not None and any(size > limit for size, limit in zip(sizes, most, strict=True))):
        inside = "" if most is None else f" within {tuple(most)}"
        raise OptionError(name, tuple(sizes), f"not three sizes{inside}", "Give time, rows and columns, each 1 or more.")
