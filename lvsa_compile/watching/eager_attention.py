"""Attention in eager code: which lines of Python call it, outside of all graphs."""

from __future__ import annotations

import collections
import functools
import types
from typing import Any

from lvsa_compile import compat
from lvsa_compile.patterns import library_ops

_OF_FORMULA = "aten._safe_softmax.default"
"""The op of which ``scaled_dot_product_attention`` runs one where it is no kernel."""


@functools.lru_cache(maxsize=4096)
def _is_attention(func: Any) -> bool:
    return str(func) == _OF_FORMULA or library_ops.is_known(func)


class EagerAttention(compat.TorchDispatchMode):
    """Counts by line the calls of attention while it is active, but for those inside compiled graphs.

    ``end`` is the code of a function around all that runs, None where there is none.
    """

    supports_higher_order_operators = True

    def __init__(self, end: types.CodeType | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._end = end
        self.lines: collections.Counter[str] = collections.Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles while it is active, and does not look at it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the op."""
        if isinstance(func, compat.OpOverload) and _is_attention(func) and not compat.in_compiled_graph(self._end):
            self.lines[compat.users_line()] += 1
        return func(*args, **(kwargs or {}))
