"""What ``torch._dynamo.reset()`` drops of this package: compiled functions, plans, tables on devices, reports, warnings already given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_drops: list[Callable[[], object]] = []


def dropped_on_reset(cache: T) -> T:
    """Has a cache emptied by ``torch._dynamo.reset()``: a container, a function with a cache, or a function that empties one.

    For every cache that holds something of a device or of what was compiled; a decorator, too.

    Example:
        >>> @dropped_on_reset
        ... @functools.cache
        ... def workspace(device): ...
    """
    found: Any = cache
    _drops.append(getattr(found, "cache_clear", None) or getattr(found, "clear", None) or found)
    return cache


def drop_all() -> None:
    """Empties all of them."""
    for drop in _drops:
        drop()
