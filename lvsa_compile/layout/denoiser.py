"""Whether what is compiled is a denoiser: only of a denoiser is the video that it attends over the one that is generated.

A VAE, an encoder, an upscaler, a classifier or a discriminator attends over videos too.  A denoiser gets a timestep and returns at least
as much as a video.  Where no timestep is known more is asked, since an autoencoder returns a video, too: it has the size of the one that
comes in, and on the way no convolution mixes neighbouring positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Sequence

from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, Axis, Source, leaves
from lvsa_compile.axes.carried import is_generated
from lvsa_compile.layout.token_layout import Targets


def why_no_denoiser(
    targets: Targets, tokens: Sequence[Axis], outputs: Sequence[Tensor] | None, timed: bool, convolved: Container[str]
) -> str:
    """Why none of ``targets`` is a video that a denoiser generates; "" where one is, or nothing speaks against it.

    ``tokens`` are the token axes of all attention, ``outputs`` what is returned, None where that is not known; ``timed`` says that there
    is a timestep, ``convolved`` are the names of inputs over which a convolution with overlapping windows runs.
    """
    whys = [_why_not(_latent(node_name, tokens), outputs, timed, node_name in convolved) for node_name in sorted(targets)]
    return "" if not all(whys) else "; ".join(whys)


def _latent(node_name: str, tokens: Sequence[Axis]) -> list[Source]:
    """Frames, rows and columns of a latent; empty for packed tokens and what an earlier graph told of."""
    digits = [digit for axis in tokens for factor in leaves(axis) for digit in factor.digits if digit.source.node_name == node_name]
    sources = {digit.source.axis: digit.source for digit in digits if digit.source.kind == INPUT}
    axes = [source for _, source in sorted(sources.items()) if source.rank >= 4 and not source.stands_for_axis]
    return axes if len(axes) == 3 and not is_generated(node_name) else []


def _why_not(latent: list[Source], outputs: Sequence[Tensor] | None, timed: bool, convolved: bool) -> str:
    if not latent:
        return ""
    if not timed and convolved:
        return f"no timestep is among its inputs, and convolutions that overlap mix the places of {latent[0].name}"
    if not outputs:
        return "" if outputs is None else "it returns no tensor"
    video = [compat.size_now(source.size, outputs[0]) for source in latent]
    sizes = [[compat.size_hint(size) for size in output.shape] for output in outputs]
    if any(_may_hold(output, video, timed) for output in sizes):
        return ""
    time = "" if timed else "no timestep is among its inputs, and "
    return f"{time}of the {'×'.join(map(str, video))} of {latent[0].name} it returns {', '.join(map(str, sizes))}"


def _may_hold(output: Sequence[int], video: Sequence[int], timed: bool) -> bool:
    """Whether an output can hold the generated video: one of its size, or with a timestep some of its frames, or as many numbers."""
    sizes = output[1:] if len(output) > len(video) else output

    def has(wanted: Sequence[int]) -> bool:
        return any(list(some) == list(wanted) for some in itertools.combinations(sizes, len(wanted)))

    return has(video) or (timed and (has(video[1:]) or math.prod(output) >= math.prod(video)))
