"""Attention in eager code: which lines of Python call it, outside of all graphs."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from lvsa_compile import compat

_OF_ATTENTION = ("scaled_dot_product", "_safe_softmax")
"""Parts of the names of ops, of which each call of ``scaled_dot_product_attention`` runs one: a kernel, or the softmax of its formula."""


class EagerAttention(compat.TorchDispatchMode):
    """Counts by line the calls of ``scaled_dot_product_attention`` while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: collections.Counter[str] = collections.Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles while it is active, and does not look at it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the op."""
        if any(name in str(func) for name in _OF_ATTENTION):
            self.lines[compat.users_line()] += 1
        return func(*args, **(kwargs or {}))

    def in_graph(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A graph, whose calls are not counted."""

        def inside(*args: Any) -> Any:
            with compat.mode_away(self):
                return run(*args)

        return inside
