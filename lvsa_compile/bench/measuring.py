"""Seconds and bytes: contenders run in turn, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]
_SHORTEST_SAMPLE = 0.01  # seconds: shorter runs are repeated within a sample
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Seconds:
    """Seconds of one run, of each round; rounds of different contenders with the same number ran next to each other."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive") if len(self.rounds) > 1 else (self.median,) * 3
        return (high - low) / self.median

    def times_faster_than(self, other: Seconds) -> float:
        """The other's median over this one."""
        return other.median / self.median


def in_turn(contenders: Mapping[str, Run], rounds: int, device: torch.device, least_seconds: float = 0.0) -> dict[str, Seconds]:
    """Runs every contender once to warm it up, then ``rounds`` times in turn, or until each has run ``least_seconds``."""
    finish = _finisher(device)
    once = {}
    for name, run in contenders.items():
        run()
        finish()
        once[name] = _seconds(run, 1, finish)
    repeats = {name: max(1, round(_SHORTEST_SAMPLE / seconds)) for name, seconds in once.items()}
    longest = max(once[name] * repeats[name] for name in contenders)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(max(rounds, min(200, int(least_seconds / longest)))):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(_seconds(contenders[name], repeats[name], finish))
    return {name: Seconds(tuple(samples)) for name, samples in found.items()}


def _seconds(run: Run, times: int, finish: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(times):
        run()
    finish()
    return (time.perf_counter() - started) / times


def _finisher(device: torch.device) -> Callable[[], None]:
    """Waits for the device's queue; nothing on the CPU."""
    return (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most memory that a run held at once beside what was there before it; None where nobody counts.

    On the CPU this is resident memory as Linux reports it, so whatever allocates is counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # pages that were freed but kept would hide what the run takes
    try:
        _CLEAR.write_text("5")  # the high-water mark begins anew
    except OSError:
        return None
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
