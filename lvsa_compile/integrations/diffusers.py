"""Denoising steps from diffusers: optional, since the clock reads timesteps by itself.

A diffusers pipeline tells its transformer the step through ``cache_context(name, step_index=...)``, where it does; ``attach`` hands
that index to ``lvsa_compile.step``.  Where a pipeline sends no index, the clock goes on reading timesteps.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lvsa_compile import compat
from lvsa_compile.errors import AttachError
from lvsa_compile.forward.explicit_step import step

_MARK = "_lvsa_attached"


def attach(pipe: Any) -> Any:
    """Makes every transformer of a pipeline take its denoising step from the pipeline; returns the pipeline.

    Raises:
        AttachError: the pipeline has no model with a ``cache_context``.

    Example:
        >>> pipe = attach(DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
    """
    models = _models(pipe)
    if not models:
        raise AttachError(type(pipe).__name__)
    for model in models:
        if _MARK not in vars(model):
            object.__setattr__(model, "cache_context", _with_step(model.cache_context, weakref.ref(pipe)))
            object.__setattr__(model, _MARK, True)
    return pipe


def detach(pipe: Any) -> Any:
    """Undoes ``attach``; returns the pipeline.

    Example:
        >>> pipe = detach(pipe)
    """
    for model in _models(pipe):
        if vars(model).pop(_MARK, False):
            vars(model).pop("cache_context", None)
    return pipe


def _models(pipe: Any) -> list[nn.Module]:
    """The models of a pipeline that have a ``cache_context``, as they are under ``torch.compile``."""
    found = (compat.uncompiled(part) for part in getattr(pipe, "components", {}).values())
    return [model for model in found if isinstance(model, nn.Module) and hasattr(model, "cache_context")]


def _with_step(cache_context: Any, pipe: Callable[[], Any]) -> Any:
    @contextlib.contextmanager
    def context(*args: Any, **information: Any) -> Iterator[Any]:
        index, steps = information.get("step_index"), getattr(pipe(), "_num_timesteps", None)
        of = steps if index is not None and isinstance(steps, int) and steps > int(index) else None
        with cache_context(*args, **information) as inner, contextlib.nullcontext() if index is None else step(int(index), of):
            yield inner

    return context
