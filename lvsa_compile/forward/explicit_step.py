"""``lvsa_compile.step``: the denoising step as the user gives it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from lvsa_compile.errors import StepError

_explicit_step: contextvars.ContextVar[tuple[int | None, int | None]] = contextvars.ContextVar("lvsa_step", default=(None, None))


def step(index: int, of: int | None = None) -> contextlib.AbstractContextManager[None]:
    """Within this context (thread, task) compiled models run denoising step ``index``, whatever their timestep says.

    Args:
        index: the step's number from 0.
        of: how many steps the video has, where that is known.

    Raises:
        StepError: ``index`` is not a whole number from 0, or ``of`` is not a whole number above it.

    Example:
        >>> for i, t in enumerate(timesteps):
        ...     with lvsa_compile.step(i, of=len(timesteps)):
        ...         noise = transformer(latents, t)
    """
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise StepError(index)
    if of is not None and (isinstance(of, bool) or not isinstance(of, int) or of <= index):
        raise StepError(index, of)
    return _running(index, of)


@contextlib.contextmanager
def _running(index: int, of: int | None) -> Iterator[None]:
    token = _explicit_step.set((index, of))
    try:
        yield
    finally:
        _explicit_step.reset(token)


def explicit_step() -> int | None:
    """The step of the innermost ``step`` context, or None."""
    return _explicit_step.get()[0]


def explicit_steps() -> int | None:
    """How many steps the video has by the innermost ``step`` context, or None."""
    return _explicit_step.get()[1]
