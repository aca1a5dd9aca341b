"""What really ran: how often each compiled graph was called, and the clocks its calls asked.

The counts live on the device beside the graph, so that a call waits for nothing and a replayed CUDA graph counts too; they are read only
where a receipt or a report is asked for.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.forward.clock import Clock


class Calls:
    """The calls of one compiled graph."""

    def __init__(self) -> None:
        self.clocks: weakref.WeakSet[Clock] = weakref.WeakSet()
        self._counts: Tensor | None = None  # int64 [2]: calls, calls at dense steps
        self._lock = threading.Lock()

    @torch.no_grad()
    def note(self, device: torch.device, dense_step: Tensor | None = None) -> None:
        """Counts a call on ``device``; ``dense_step`` is a bool scalar, whether it runs at a dense step."""
        with self._lock, torch.inference_mode(False):
            if self._counts is None:
                self._counts = torch.zeros(2, dtype=torch.int64, device=device)
            self._counts[0].add_(1)
            if dense_step is not None:
                self._counts[1].add_(dense_step.to(device, non_blocking=True))

    def read(self) -> tuple[int, int]:
        """Calls, and calls at dense steps; waits for the device."""
        if self._counts is None:
            return 0, 0
        calls, dense = self._counts.tolist()
        return int(calls), int(dense)

    def clear(self) -> None:
        """Begins anew."""
        with self._lock:
            if self._counts is not None:
                self._counts.zero_()
        for clock in list(self.clocks):
            clock.forget_what_it_saw()

    def __deepcopy__(self, memo: object) -> Calls:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return Calls, ()  # a report that is pickled goes where nothing runs


_calls: dict[str, Calls] = dropped_on_reset({})


def calls_of(compile_id: str) -> Calls:
    """The calls of the graph that a compile made."""
    return _calls.setdefault(compile_id, Calls())
