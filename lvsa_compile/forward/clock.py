"""Which denoising step is running.

A step is a new timestep *value*, never a call: guidance calls the model twice per step, caches skip calls.  The clock lives in small
device tensors that a few ops update before each call of the compiled model, so nothing waits for the device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.forward.doubts import Doubts
from lvsa_compile.forward.explicit_step import explicit_step, explicit_steps
from lvsa_compile.forward.layers import Layers
from lvsa_compile.forward.state import CALLERS, States
from lvsa_compile.policies.contract import State
from lvsa_compile.policies.rows import Rows, Turn

Caller = tuple[int, Hashable]
"""A thread and a size of video."""
_FIELDS = 10
_FIRST, _LAST, _DIRECTION, _STEP = range(4)
_CALLS, _STEPS_BEFORE = 6, 9
_BACK_AT_FIRST, _AT_THE_END = 0.1, 0.3
"""Against its direction a value begins a new video where it comes back to the first value, up to this share of the way that was gone; or
where the last value was as near to the end of a schedule as this share of it: to zero, or for those that rise to 1 or 1000."""
_LATE = 0.05
_NO_RISE = 2e-3
"""A move against the direction by up to this share of the first value is a step like any other: some schedules round so at their end."""
_SAME_MEAN = 1e-4


class Clock:
    """The denoising step of one model object.

    The first timestep value is step 0; each other value is one step further.  A value that goes against the direction of the first two
    begins a new video where it comes back to the first value or follows the end of a schedule; anywhere else nobody can tell what it
    means (a sampler that adds noise, requests in turns), so that the step goes on and one warning says so; as where a video
    passes the value at which the one before it stopped, which may be that one going on.

    Each thread has its own video, and each size of video in it.  A thread that is new takes over the video of the thread that called
    last where its value goes on from there, as in servers that run each step on another thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._videos: Tensor | None = None  # float32 [rows, fields]: see _moved; NaN before a video
        self._video_of: Tensor | None = None  # int64 [rows]: the video that each caller's calls belong to
        self._rows: dict[Caller, int] = {}
        self._last_caller: dict[Hashable, int] = {}  # by size of video
        self._last_of_thread: dict[int, tuple[int, Hashable]] = {}  # row and size of the last call
        self._steps: dict[int, Tensor] = {}  # by thread
        self._before: dict[int, Tensor] = {}  # by thread: the steps of the video before this one
        self._states = States()
        self.layers = Layers()
        self._call: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by thread: video, whether it begins, number of the call in its step
        self._entered: dict[int, tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = {}  # by thread: its last call, and the entry of its state
        self._untimed: dict[Caller, int] = {}  # how often models without a timestep were called
        self._scalars: dict[Hashable, Tensor] = {}
        self._moves = 0  # how often the step may have changed
        self._filled: dict[Hashable, tuple[int, int | None, int | None]] = {}  # what the step was when a scalar was filled
        self._doubts = Doubts()
        self._saw: Tensor | None = None  # float64 [6]: see ClockSaw
        self._explicit_calls = 0

    def saw(self) -> ClockSaw:
        """What it saw so far; waits for the device."""
        if self._saw is None:
            return ClockSaw()
        calls, moves, videos, doubts, least, most = self._saw.tolist()
        return ClockSaw(int(calls), int(moves), int(videos), int(doubts), least, most, self._explicit_calls)

    def forget_what_it_saw(self) -> None:
        """Counts what it sees anew; the step is what it was."""
        with self._lock:
            self._saw, self._explicit_calls = None, 0

    def reset(self) -> None:
        """The next timestep begins a new video."""
        with self._lock:
            self._videos = self._video_of = None
            self._rows.clear()
            self._last_caller.clear()
            self._forget_threads()
            self._untimed.clear()
            self._states.begin_anew()
            self._moves += 1

    @torch.no_grad()
    def tick(self, timestep: Tensor | None, size: Hashable = None) -> None:
        """Notes the timestep of a call: ``[B]``, per frame or per token; conditioned frames carry 0, so the largest counts.

        ``timestep`` is None where the model gets none; ``size`` is that of the video, if it is known.
        """
        with self._lock, torch.inference_mode(False):
            self._moves += 1
            thread = threading.get_ident()
            if timestep is None:
                self._call_untimed((thread, size))
                return
            timestep = timestep.detach().float()
            value, mean = timestep.amax(), timestep.mean()
            row = self._row((thread, size), value)
            assert self._videos is not None
            assert self._video_of is not None
            video = self._video_of[row : row + 1]
            before = self._videos.index_select(0, video)[0]
            after, moved, begins, doubtful = _moved(before, value, mean)
            self._videos.index_copy_(0, video, after[None])
            self._see(value, moved, begins, doubtful)
            self._last_caller[size], self._last_of_thread[thread] = row, (row, size)
            self._steps[thread] = after[_STEP].to(torch.int32)
            self._before[thread] = after[_STEPS_BEFORE]
            self._call[thread] = (video.clone(), begins, after[_CALLS])
            if explicit_step() is None:
                self._doubts.note(doubtful)

    def _call_untimed(self, caller: Caller) -> None:
        """A call without a timestep: only ``lvsa_compile.step`` tells steps apart."""
        if len(self._untimed) == CALLERS and caller not in self._untimed:
            self._untimed.clear()
        calls = self._untimed[caller] = self._untimed.get(caller, 0) + 1
        number = CALLERS + list(self._untimed).index(caller)
        self._call[caller[0]] = (torch.tensor([number]), torch.tensor(calls == 1), torch.tensor(float(calls)))

    def _forget_threads(self) -> None:
        for known in (self._last_of_thread, self._steps, self._before, self._call, self._entered, self._filled):
            known.clear()

    def _see(self, value: Tensor, *counted: Tensor) -> None:
        value = value.double()
        if self._saw is None or self._saw.device != value.device:
            self._saw = torch.stack([torch.zeros_like(value)] * 4 + [value, value])
        self._saw[:4].add_(torch.stack([torch.ones_like(value), *counted]))
        self._saw[4].clamp_(max=value)
        self._saw[5].clamp_(min=value)
        self._explicit_calls += explicit_step() is not None

    def _row(self, caller: Caller, value: Tensor) -> int:
        """The row of a caller; a new one gets a video of its own, or the one of the last caller where ``value`` goes on from there."""
        if self._videos is None or self._videos.device != value.device or (len(self._rows) == CALLERS and caller not in self._rows):
            self._videos = torch.full((CALLERS, _FIELDS), float("nan"), device=value.device)
            self._video_of = torch.arange(CALLERS, device=value.device)
            self._rows.clear()
            self._last_caller.clear()
            self._forget_threads()
            self._states.begin_anew()
        if caller in self._rows:
            return self._rows[caller]
        row = self._rows[caller] = len(self._rows)
        before = self._last_of_thread.get(caller[0])
        unsure = before is not None and None in (caller[1], before[1])  # a part of a forward may not show the size
        last = self._last_caller.get(caller[1], before[0] if before is not None and unsure else None)
        if last is not None:
            assert self._video_of is not None
            theirs = self._videos.index_select(0, self._video_of[last : last + 1])[0]
            goes_on = _goes_on(theirs, value) | (value == theirs[_LAST]) if unsure else _goes_on(theirs, value)
            self._video_of[row] = torch.where(goes_on, self._video_of[last], self._video_of[row])
        return row

    def phase(self, phases: Rows | int, device: torch.device, number: int = 0) -> Tensor:
        """The row that a rule chooses at the current step, as an int32 scalar on ``device``; a number ``phases`` is ``Turn(phases)``.

        Always the same tensor for the same thread and ``number``, that of the step in a graph of several, as CUDA graphs need it.
        """
        thread, rows = threading.get_ident(), Turn(phases) if isinstance(phases, int) else phases
        with self._lock, torch.inference_mode(False), torch.no_grad():
            counted, explicit, of = self._steps.get(thread), explicit_step(), explicit_steps()
            before = self._before.get(thread)
            if explicit is not None and of is None and before is not None:
                counted, explicit = torch.full((), explicit, dtype=torch.int32, device=before.device), None
            if explicit is not None or counted is None:
                return self._scalar((rows, device, thread, number), lambda: int(rows(torch.tensor(explicit or 0), of)))
            return self._scalar((rows, device, thread, number), lambda: rows(counted, of, before))

    def branch(self, device: torch.device, number: int = 0) -> Tensor:
        """Which entry of a state tensor the current call reads and writes, by video and by the call within its step (guidance).

        An int32 scalar on ``device``, always the same tensor for the same thread and ``number``, as of ``phase``.
        """
        thread = threading.get_ident()
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._scalar(("branch", device, thread, number), lambda: self._entry(thread))

    def _entry(self, thread: int) -> Tensor:
        """The entry of a call, chosen once, however many graphs ask."""
        if thread not in self._call:
            self._call_untimed((thread, None))
        call = self._call[thread]
        entered, entry = self._entered.get(thread, (None, None))
        if entered is not call or entry is None:
            entry = self._states.enter(*call, explicit_step())
            self._entered[thread] = call, entry
        return entry

    def state(self, site: Hashable, state: State, device: torch.device) -> Tensor:
        """What a site keeps; ``branch`` says which entry is that of the current call."""
        with self._lock:
            return self._states.of(site, state, device)

    def _scalar(self, key: Any, value: Callable[[], Tensor | int]) -> Tensor:
        """An int32 scalar on ``key[1]``, always the same tensor, filled once per call: many graphs may ask, and the host would wait."""
        scalar = self._scalars.get(key)
        if scalar is None:
            scalar = self._scalars[key] = torch.zeros((), dtype=torch.int32, device=key[1])
        moment = (self._moves, explicit_step(), explicit_steps())
        if self._filled.get(key) != moment:
            self._filled[key] = moment
            found = value()
            if isinstance(found, Tensor):
                scalar.copy_(found, non_blocking=scalar.device.type != "cpu")  # the host reads it at once
            else:
                scalar.fill_(found)
        return scalar


@dataclass(frozen=True)
class ClockSaw:
    """The timesteps that a clock saw: calls, how often the value was another, the videos that began, the moves that nobody can tell,
    the smallest and the largest value; ``explicit`` are the calls inside ``lvsa_compile.step``.
    """

    calls: int = 0
    moves: int = 0
    videos: int = 0
    doubts: int = 0
    least: float = 0.0
    most: float = 0.0
    explicit: int = 0

    @property
    def steps(self) -> int:
        """Denoising steps of a video, as a mean over the videos begun; 0 before any."""
        return self.moves // max(self.videos, 1) + 1 if self.calls else 0

    def __str__(self) -> str:
        if not self.calls:
            return ""
        text = f"{self.calls} calls, timesteps from {self.least:.6g} to {self.most:.6g}, {self.moves} moves, {self.videos} videos begun"
        text += f", {self.doubts} moves that do not tell the step" if self.doubts else ""
        return text + (f"; in {self.explicit} calls lvsa_compile.step(i) said the step" if self.explicit else "")


def _moved(before: Tensor, value: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A video after one more timestep; whether it moved, whether a video begins, whether nobody can tell what the timestep means.

    A video is its first and last value, direction, step, last mean, the last value of the video before it, the calls at the last value
    and at the first (guidance), whether these differ, and the steps of the video before it.  A few ops, nothing is asked of the host.
    """
    first, last, direction, step, last_mean, earlier, calls, first_calls, uneven, steps_before = before.unbind()
    move = torch.sign(value - last)
    far = (value - last).abs() > _NO_RISE * first.abs()
    against = far & (move * direction < 0)
    back_at_first = (value - first) * direction <= _BACK_AT_FIRST * (last - first).abs()
    top = torch.where(last <= 1.0, 1.0, 1000.0)
    at_the_end = torch.where(direction < 0, last < _AT_THE_END * first.abs(), (step > 1) & (last > (1.0 - _AT_THE_END) * top))
    at_the_end = at_the_end | (last == earlier)  # where the video before it ended, too
    begins = torch.isnan(last) | (against & (back_at_first | at_the_end))
    late = begins & (direction < 0) & ~back_at_first & (value.abs() < _LATE * first.abs())  # few videos begin so near the end
    uneven = torch.where(move * step != 0, torch.maximum(uneven, (calls < first_calls).to(uneven.dtype)), uneven)
    beyond = (value - earlier) * direction > 0
    of_another = begins & ~back_at_first & ((uneven > 0) | beyond)  # what seemed guidance was another video, or an earlier one goes on
    rose_once = against & ~begins & (direction > 0) & (step == 1)  # a call before the first video, whose schedule then falls
    one = torch.ones_like(value)
    first_calls = torch.where((step == 0) & (move != 0), calls, first_calls)
    calls = torch.where(begins | (move != 0), one, calls + 1)
    uneven = torch.where(begins, 0 * one, uneven)
    steps_before = torch.where(begins, step.nan_to_num(-1.0) + 1, steps_before)
    step = torch.where(begins, 0 * one, torch.where(rose_once, one, step + (move != 0)))
    direction = torch.where(begins, 0 * one, torch.where(rose_once, -one, torch.where(far & (direction == 0), move, direction)))
    first = torch.where(begins, value, torch.where(rose_once, last, first))
    over_there = ((last - earlier) * direction < 0) & ((value - earlier) * direction > 0)  # is it the earlier video that goes on?
    hidden = (move == 0) & ((mean - last_mean).abs() > _SAME_MEAN * last_mean.abs())  # frames move on while the largest value stays
    earlier = torch.where(begins, last, earlier)
    doubtful = (against & ~begins) | hidden | (over_there & ~begins) | late | of_another
    after = [first, value, direction, step, mean, earlier, calls, first_calls, uneven, steps_before]
    return torch.stack(after), move.abs() > 0, begins, doubtful


def _goes_on(video: Tensor, value: Tensor) -> Tensor:
    """Whether a value is the next one of a video, or the same again; the first of a video is also that of another."""
    again = (value == video[_LAST]) & (value != video[_FIRST])
    falls = (video[_DIRECTION] == 0) & (value < video[_LAST])
    return again | falls | ((value - video[_LAST]) * video[_DIRECTION] > 0)


_clocks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of parameters and of the modules that own them
_clocks_lock = threading.Lock()
_clock_inputs: WeakIdKeyDictionary = dropped_on_reset(WeakIdKeyDictionary())
_everywhere: weakref.WeakSet[Clock] = weakref.WeakSet()


def size_of_video(values: Iterable[object]) -> Hashable:
    """What tells videos apart that are made in turns: the sizes of the latents of five axes; None where there are none."""
    latents = sorted(tuple(value.shape[-4:]) for value in values if isinstance(value, Tensor) and value.dim() == 5)
    return tuple(latents) or None


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


def set_clock_input(model: object, name: str, code: str) -> None:
    """The graphs of ``code``, the first of a model's forward to see a timestep, move its clock by their input ``name``."""
    _clock_inputs[model] = (name, code)


def clock_input_before(model: object, code: str) -> str:
    """The input that moves a model's clock before graphs of ``code`` run; "" where none does."""
    name, first = ("", "") if model is None else _clock_inputs.get(model, ("", ""))
    return "" if first == code else name


def reset() -> None:
    """A new video: the next timestep of every model is step 0.

    The clock sees by itself that a video begins where a schedule starts again; this is for videos that were broken off.

    Example:
        >>> for prompt in prompts:
        ...     lvsa_compile.reset()
        ...     video = pipe(prompt)
    """
    with _clocks_lock:
        clocks = list(_everywhere)
    for clock in clocks:
        clock.reset()
