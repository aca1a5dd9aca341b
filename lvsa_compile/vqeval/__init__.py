"""VQeval: whether a generated video stays alive, after the six dimensions of LVSA's evaluation (arXiv 2605.31057).

``evaluate(path_or_frames)`` returns ``Scores``; ``lvsa vqeval`` is the same at the command line.  It shares nothing with the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvsa_compile.vqeval.evaluation import evaluate
    from lvsa_compile.vqeval.loading import load_networks
    from lvsa_compile.vqeval.networks import Networks
    from lvsa_compile.vqeval.scores import Scores

_HOMES = {"Networks": "networks", "Scores": "scores", "evaluate": "evaluation", "load_networks": "loading"}
__all__ = ["Networks", "Scores", "evaluate", "load_networks"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
