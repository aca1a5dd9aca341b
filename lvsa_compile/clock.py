"""Which denoising step is running.

A step is a new timestep *value*, never a call: guidance calls the model twice per step, caches skip calls.  The clock lives in small
device tensors that a few ops update before each call of the compiled model, so nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import StepError

_explicit_step: contextvars.ContextVar[int | None] = contextvars.ContextVar("lvsa_step", default=None)


def step(index: int) -> contextlib.AbstractContextManager[None]:
    """Within this context (thread, task) compiled models run denoising step ``index``, whatever their timestep says.

    Args:
        index: the step's number from 0.

    Raises:
        StepError: ``index`` is not a whole number from 0.
    """
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise StepError(index)
    return _running(index)


@contextlib.contextmanager
def _running(index: int) -> Iterator[None]:
    token = _explicit_step.set(index)
    try:
        yield
    finally:
        _explicit_step.reset(token)


def explicit_step() -> int | None:
    """The step of the innermost ``step`` context, or None."""
    return _explicit_step.get()


class Clock:
    """The denoising step of one model object.

    The first timestep value is step 0; each other value is one step further, unless it jumps against the direction of the first two
    values of the video: then a new video begins, at step 0.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Tensor | None = None  # newest timestep value; NaN before the first
        self._direction: Tensor | None = None  # -1 or 1 once two values are known, else 0
        self._step: Tensor | None = None
        self._phases: dict[tuple[int, int, torch.device, int], Tensor] = {}
        self._moves = 0  # how often the step may have changed
        self._filled: dict[tuple[int, int, torch.device, int], tuple[int, int | None]] = {}  # what it was when a phase was filled

    def reset(self) -> None:
        """The next timestep begins a new video."""
        with self._lock:
            self._last = self._direction = self._step = None
            self._moves += 1

    @torch.no_grad()
    def tick(self, timestep: Tensor) -> None:
        """Notes the timestep of a call: ``[B]``, per frame or per token; conditioned frames carry 0, so the largest counts."""
        with self._lock, torch.inference_mode(False):
            self._moves += 1
            value = timestep.detach().amax().float()
            if self._last is None or self._direction is None or self._step is None or self._last.device != value.device:
                self._last = torch.full_like(value, float("nan"))
                self._direction = torch.zeros_like(value)
                self._step = torch.zeros_like(value, dtype=torch.int32)
            move = torch.sign(value - self._last)
            begins = torch.isnan(move) | (move * self._direction < 0)
            moved = (move != 0).to(torch.int32)
            self._step.copy_(torch.where(begins, 0, self._step + moved))
            self._direction.copy_(torch.where(begins, 0.0, torch.where(self._direction == 0, move, self._direction)))
            self._last.copy_(value)

    def phase(self, phases: int, device: torch.device, dense_steps: int = 0) -> Tensor:
        """The current step modulo ``phases`` as an int32 scalar on ``device``; ``phases`` itself in the first ``dense_steps`` steps.

        Always the same tensor for the same thread, as CUDA graphs need it.
        """
        key = (phases, dense_steps, device, threading.get_ident())
        explicit = explicit_step()
        with self._lock, torch.inference_mode(False), torch.no_grad():
            phase = self._phases.get(key)
            if phase is None:
                phase = self._phases[key] = torch.zeros((), dtype=torch.int32, device=device)
            if self._filled.get(key) == (self._moves, explicit):  # many graphs may ask in a step, and the host would wait for each
                return phase
            self._filled[key] = (self._moves, explicit)
            if explicit is not None or self._step is None:
                step = explicit or 0
                return phase.fill_(phases if step < dense_steps else step % phases)
            rotated = torch.remainder(self._step, phases)
            if dense_steps:
                rotated = torch.where(self._step < dense_steps, phases, rotated)
            return phase.copy_(rotated, non_blocking=device.type != "cpu")  # the host reads it at once


_clocks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of parameters and of the modules that own them
_clocks_lock = threading.Lock()
_told: WeakIdKeyDictionary = dropped_on_reset(WeakIdKeyDictionary())
_everywhere: weakref.WeakSet[Clock] = weakref.WeakSet()


def clock_of(parameter: object, model: Callable[[], object | None] = lambda: None) -> Clock:
    """The clock of the model that owns ``parameter``; Dynamo shares one graph between models of a class.

    ``model`` finds the compiled model of the call in progress.  It is asked once per parameter, so that all graphs of a model, which
    have different parameters, share its clock.
    """
    with _clocks_lock:
        clock: Clock | None = _clocks.get(parameter)
        if clock is None:
            owner = model()
            clock = _clocks.get(owner) if owner is not None else None
            if clock is None:
                clock = Clock()
                _everywhere.add(clock)
            _clocks[parameter] = clock
            if owner is not None:
                _clocks[owner] = clock
        return clock


def tells(model: object, name: str, code: str) -> None:
    """Says that the graphs of ``code``, the first of a model's forward to see a timestep, move its clock by their input ``name``."""
    _told[model] = (name, code)


def told_before(model: object, code: str) -> str:
    """The input that moves a model's clock before graphs of ``code`` run; "" where none does."""
    name, first = ("", "") if model is None else _told.get(model, ("", ""))
    return "" if first == code else name


def reset() -> None:
    """A new video: the next timestep of every model is step 0."""
    with _clocks_lock:
        clocks = list(_everywhere)
    for clock in clocks:
        clock.reset()
