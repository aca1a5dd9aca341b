"""What LVSA costs beside attention: tables, the clock, importing, building the CPU kernel."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from lvsa_compile.forward.clock import Clock
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.policies.lvsa.policy import frame_table
from lvsa_compile.policies.tables import VideoSpan

Row = dict[str, Any]
_BUILD = """
import time
from lvsa_compile import compat
from lvsa_compile.lowering import cpu
compat.load_cpp('extern "C" int nothing() { return 0; }')  # what any compiled model has loaded before
started = time.perf_counter()
cpu._kernel()
print(time.perf_counter() - started)
"""


def measure(rounds: int) -> list[Row]:
    """A row per cost."""
    return [
        _row("tables for 241 frames, all phases of the rotation", [_tables() for _ in range(rounds)]),
        _row("clock, per call of the model", [_clock() for _ in range(rounds)]),
        _row("import lvsa_compile", _beyond("import lvsa_compile", "pass", rounds)),
        _row("import the backend, torch.compile being there", _beyond("import lvsa_compile.backend", "import torch._inductor", rounds)),
        *_kernel(rounds),
    ]


def _row(cost: str, samples: list[float]) -> Row:
    return {"cost": cost, "median": statistics.median(samples), "least": min(samples), "most": max(samples), "rounds": len(samples)}


def _tables() -> float:
    span = VideoSpan(0, 241, 1560, 0)
    started = time.perf_counter()
    table = frame_table.__wrapped__(FramePattern(241), span, span)
    torch.tensor(table.key_ranges, dtype=torch.int32)
    return time.perf_counter() - started


def _clock(calls: int = 500) -> float:
    clock, timesteps = Clock(), [torch.full((1,), 1000.0 - n) for n in range(calls)]
    started = time.perf_counter()
    for timestep in timesteps:
        clock.tick(timestep)
        clock.phase(16, timestep.device)
    return (time.perf_counter() - started) / calls


def _beyond(code: str, base: str, rounds: int) -> list[float]:
    """Seconds that ``code`` takes in a fresh interpreter that ran ``base`` before."""
    program = f"import time\n{base}\nstarted = time.perf_counter()\n{code}\nprint(time.perf_counter() - started)"
    return [float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout) for _ in range(rounds)]


def _kernel(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            subprocess.run(
                [sys.executable, "-c", _BUILD], env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}, capture_output=True, text=True
            )
            for _ in range(1 + rounds)
        ]
    seconds = [float(run.stdout) for run in runs if run.returncode == 0]
    if len(seconds) != len(runs):
        return []  # no compiler; the reason is in `lvsa doctor`
    return [_row("build the CPU kernel, once per machine", seconds[:1]), _row("load the CPU kernel, once per process", seconds[1:])]
