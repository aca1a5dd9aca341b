"""Which layer of a model runs: its number among the layers that attend over the video, in the order in which forwards reach them."""

from __future__ import annotations

import threading
from collections.abc import Hashable


class Layers:
    """The layers of one model, in parts: what a compiled graph, or a block of a graph that serves many, holds of them.

    A part keeps its place whatever forwards leave out (caches, guidance that skips layers): a number is never a count of calls.  A part
    that was never reached before comes after the one that this thread reached last.

    Example:
        >>> layers = Layers()
        >>> layers.first_of("block 0", 2), layers.first_of("block 1", 2), layers.first_of("block 0", 2)
        (0, 2, 0)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[Hashable, int] = {}  # in order: how many layers each has
        self._first: dict[Hashable, int] = {}
        self._last: dict[int, tuple[object, Hashable]] = {}  # by thread: the forward, and the part that it reached last

    @property
    def count(self) -> int:
        """How many layers were reached."""
        return sum(self._parts.values())

    def first_of(self, part: Hashable, layers: int, forward: object = None) -> int:
        """The number of the first layer of a part, which has that many; ``forward`` is an object that each forward has its own of."""
        thread = threading.get_ident()
        with self._lock:
            if self._parts.get(part) != layers:
                before = self._last.get(thread)
                self._insert(part, layers, before[1] if before is not None and before[0] is forward else None)
            self._last[thread] = forward, part
            return self._first[part]

    def _insert(self, part: Hashable, layers: int, after: Hashable) -> None:
        order = list(self._parts)
        if part not in self._parts:
            order.insert(order.index(after) + 1 if after in self._parts else 0, part)
        self._parts = {each: layers if each == part else self._parts[each] for each in order}
        number = 0
        for each, held in self._parts.items():
            self._first[each] = number
            number += held
