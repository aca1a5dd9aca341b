"""SVG's two kinds of heads: spatial ones attend near frames, temporal ones the same place of all frames (arXiv 2502.01776)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvsa_compile.errors import OptionError, ShapeError
from lvsa_compile.policies.blocks import check_query_and_key

_BLOCK = 128  # tokens; bands are whole blocks


def width(frames: int, tokens_per_frame: int, density: float, *, text: int = 0) -> float:
    """Half-width of the runtime band in latent frames, so that about ``density`` of all pairs are attended, text counted.

    Raises:
        OptionError: ``density`` is no share, or text alone takes more.

    Example:
        >>> width(21, 1560, 0.3)
        3.430139442784413
    """
    tokens = frames * tokens_per_frame + text
    left = density - 2 * text / tokens
    if isinstance(density, bool) or not 0 < density <= 1 or left < 0:
        raise OptionError("density", density, f"of {tokens} tokens, {text} of them text", "Give a share up to 1 that text leaves room in.")
    return tokens * (1 - math.sqrt(1 - left)) / tokens_per_frame


def profile_mask(
    frames: int, tokens_per_frame: int, *, temporal: bool, text: int = 0, band: float = 2.0, first_frame: bool = True
) -> Tensor:
    """The mask by which a head's kind is chosen, bool ``[N, N]``, text behind the video and attended by all.

    Blocks of 128 tokens attend those nearer than ``band`` latent frames; a ``temporal`` mask is the same in the order of places first,
    frames within them.  ``first_frame``: its tokens, for temporal heads as many places in that order, are attended by all.

    The code of the paper has ``band=2.0, first_frame=True`` for Wan and ``band=1.5, first_frame=False`` for HunyuanVideo.

    Example:
        >>> profile_mask(21, 1560, temporal=True).shape
        torch.Size([32760, 32760])
    """
    video = frames * tokens_per_frame
    place = torch.arange(video + text)
    if temporal:
        place[:video] = place[:video] % tokens_per_frame * frames + place[:video] // tokens_per_frame
    of_block = place // _BLOCK
    mask = (of_block[:, None] - of_block[None]).abs() < math.floor(band * tokens_per_frame / _BLOCK)
    if first_frame:
        mask |= (place < tokens_per_frame)[None]
    mask[:, video:] = True
    mask[video:] = True
    return mask


def runtime_mask(
    frames: int, tokens_per_frame: int, half_width: float, *, text: int = 0, real_text: int | None = None, first_frame: bool = True
) -> Tensor:
    """The mask of heads of both kinds, bool ``[N, N]``; tokens of temporal heads stand in the order of places first.

    With ``first_frame``, as for Wan, tokens up to ``half_width`` latent frames apart, rounded up to 128 tokens, attend each other, and
    all attend the first ``tokens_per_frame``.  Without, as for HunyuanVideo, those nearer than it, rounded down; real text attends all
    and is attended by all, and padding, text behind ``real_text``, attends padding.

    Example:
        >>> runtime_mask(5, 160, width(5, 160, 0.3)).double().mean()
        tensor(0.6543, dtype=torch.float64)
    """
    video = frames * tokens_per_frame
    number = torch.arange(video + text)
    query, key = number[:, None], number[None]
    tokens = half_width * tokens_per_frame / _BLOCK
    apart = (query - key).abs()
    near = apart <= math.ceil(tokens) * _BLOCK if first_frame else apart < math.floor(tokens) * _BLOCK
    end = video + (text if real_text is None else real_text)
    mask = near | (query >= video) | (key >= video)
    if first_frame:
        mask |= key < tokens_per_frame
    return (mask & (query < end) & (key < end)) | ((query >= end) & (key >= end))


def choose(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
    """Which heads are temporal, by the error of a few rows under both masks.

    Args:
        query, key, value: ``[B, H, N, head_dim]``.
        rows: numbers of the rows that are looked at, int64 ``[rows]``.
        spatial, temporal: masks, see ``profile_mask``; or of the rows alone, ``[rows, N]``.

    Returns:
        bool ``[B, H]``, and the mean squared errors ``[2, B, H]``, spatial first, in float64 of float64, else float32; a tie is spatial.

    Raises:
        ShapeError: the shapes do not fit.

    Example:
        >>> is_temporal, errors = choose(query, key, value, rows, profile_mask(21, 1560, temporal=False), ...)
    """
    check_query_and_key(query, key)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    key, value = (each.to(dtype).repeat_interleave(group, 1) for each in (key, value))
    scores = query[:, :, rows].to(dtype) @ key.mT * query.shape[-1] ** -0.5
    right = torch.softmax(scores, -1) @ value
    errors = []
    for name, mask in (("spatial", spatial), ("temporal", temporal)):
        if mask.shape[-1] != key.shape[2] or mask.shape[0] not in (len(rows), query.shape[2]):
            problem = f"it does not fit {key.shape[2]} keys and {len(rows)} rows"
            raise ShapeError(name, tuple(mask.shape), problem, "Give [N, N], or [rows, N].")
        of_rows = mask[rows] if mask.shape[0] != len(rows) else mask
        found = torch.softmax(scores.masked_fill(~of_rows, float("-inf")), -1).nan_to_num(0.0) @ value
        errors.append((found - right).square().mean((-2, -1)))
    found_errors = torch.stack(errors)
    return found_errors[1] < found_errors[0], found_errors
