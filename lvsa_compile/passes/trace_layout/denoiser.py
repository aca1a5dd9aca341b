"""Whether what is compiled is a denoiser: only of a denoiser is the video that it attends over the one that is generated.

A VAE, an encoder, an upscaler, a classifier or a discriminator attends over videos too.  A denoiser gives back a video of the size that
it gets, as pixels of the latent or as their patches.  Where it gets no timestep either, more is asked, since an autoencoder gives back
what it gets, too: the video itself comes back, and no convolution mixes neighbouring places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Sequence

from torch import Tensor

from lvsa_compile.axes.algebra import INPUT, Axis, Size, Source, leaves, quotient, same
from lvsa_compile.axes.call import sizes_of
from lvsa_compile.axes.labels import is_generated
from lvsa_compile.passes.trace_layout.token_layout import Targets


def why_no_denoiser(
    targets: Targets, tokens: Sequence[Axis], outputs: Sequence[Tensor] | None, timed: bool, convolved: Container[str]
) -> str:
    """Why none of ``targets`` is a video that a denoiser generates; "" where one is, or nothing speaks against it.

    ``tokens`` are the token axes of all attention, ``outputs`` what is returned, None where that is not known; ``timed`` says that there
    is a timestep, ``convolved`` are the places of inputs over which a convolution with overlapping windows runs.
    """
    whys = [_why_not(_latent(place, tokens), outputs, timed, place in convolved) for place in sorted(targets)]
    return "" if not all(whys) else "; ".join(whys)


def _latent(place: str, tokens: Sequence[Axis]) -> list[Source]:
    """Frames, rows and columns of a latent; empty for packed tokens and what an earlier graph told of."""
    digits = [digit for axis in tokens for factor in leaves(axis) for digit in factor.digits if digit.source.place == place]
    sources = {digit.source.axis: digit.source for digit in digits if digit.source.kind == INPUT}
    axes = [source for _, source in sorted(sources.items()) if source.rank >= 4 and not source.made_of]
    return axes if len(axes) == 3 and not is_generated(place) else []


def _why_not(latent: list[Source], outputs: Sequence[Tensor] | None, timed: bool, convolved: bool) -> str:
    if not latent:
        return ""
    if not timed and convolved:
        return f"no timestep is among its inputs, and convolutions that overlap mix the places of {latent[0].name}"
    sizes = [source.size for source in latent]
    if outputs is None or any(_gives_back(sizes_of(output), sizes, timed) for output in outputs):
        return ""
    returned = ", ".join(str(list(output.shape)) for output in outputs) or "nothing"
    time = "" if timed else "no timestep is among its inputs, and "
    return f"{time}of the {'×'.join(map(str, sizes))} of {latent[0].name} it returns {returned}"


def _gives_back(output: Sequence[Size], video: Sequence[Size], timed: bool) -> bool:
    """Whether an output holds the video; with a timestep it may hold some of the frames, or patches as tokens or in a grid."""
    sizes = output[1:] if len(output) > 3 else output
    if any(all(map(same, some, video)) for some in itertools.combinations(sizes, 3)):
        return True
    if not timed:
        return False
    if len(output) <= 3:
        return quotient(math.prod(output), math.prod(video)) is not None
    if any(all(map(same, some, video[1:])) for some in itertools.combinations(sizes, 2)):
        return True
    return any(_is_grid_of_patches(some, sizes, video) for some in itertools.combinations(sizes, 3))


def _is_grid_of_patches(grid: Sequence[Size], sizes: Sequence[Size], video: Sequence[Size]) -> bool:
    """Whether a grid counts patches of the video, and what is left of the sizes is room for all places of a patch."""
    if any(quotient(whole, count) is None for whole, count in zip(video, grid, strict=True)):
        return False
    return quotient(math.prod(sizes), math.prod(video)) is not None
