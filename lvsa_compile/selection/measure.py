"""Seconds of a lowering on the real shapes of a call, measured inside the backend call and remembered beside Inductor's own caches.

What Inductor does for matrix products under ``mode="max-autotune"``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvsa_compile import compat
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import in_a_line
from lvsa_compile.selection.accelerator import random_state_kept
from lvsa_compile.selection.contract import AttentionCall, Lowering, Prepared
from lvsa_compile.selection.cpu_kind import cpu_kind
from lvsa_compile.source_stamp import source_stamp

_RUNS = 3
_remembered: dict[str, float] = dropped_on_reset({})


def seconds_of(lowering: Lowering, call: AttentionCall) -> float | str:
    """Seconds of one call, the least of three after a first; or what went wrong, such as no memory for tensors of this size."""
    if call.plan.state:
        return "ops that keep state are not measured"
    try:
        with compat.no_modes(), torch.no_grad(), random_state_kept(call.device):
            return lowering.tuned(call, functools.partial(_seconds_under, lowering, call))
    except Exception as failure:  # out of memory above all; the site itself may still find room
        return f"measuring it failed ({in_a_line(failure)})"


def seconds_of_dense(call: AttentionCall) -> float | str:
    """Seconds of dense attention on the shapes of a call, under its mask; or what went wrong."""
    return seconds_of(_DENSE, call)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, phase: Tensor, *, scale: float | None = None, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, key_mask, scale=scale, enable_gqa=grouped), query


_DENSE = Lowering(
    "dense attention", "what is compared with", 0, lambda device: None, lambda call: None, speedup=lambda call: 1.0,
    prepare=lambda call: Prepared(_dense, ()),
)  # fmt: skip


def _seconds_under(lowering: Lowering, call: AttentionCall, setup: str) -> float:
    """Seconds of a call as the lowering is set up now, remembered under the name of the set-up."""
    facts = _facts(lowering, call, setup)
    name = hashlib.sha256(facts.encode()).hexdigest()
    folder = compat.cache_folder("lvsa")
    file = None if folder is None else folder / f"{name}.json"
    seconds = _remembered.get(name) or _read(file, facts)
    if seconds is None:
        seconds = _measure(lowering, call)
        _write(file, facts, seconds)
    _remembered[name] = seconds
    return seconds


def _measure(lowering: Lowering, call: AttentionCall) -> float:
    heads = (call.query_heads, call.key_heads, call.key_heads)
    lengths, widths = (call.query.length, call.key.length, call.key.length), (call.head_dim, call.head_dim, call.value_dim)
    sizes = [(call.batch, length, n, width) for length, n, width in zip(lengths, heads, widths, strict=True)]
    query, key, value = (torch.randn(size, device=call.device, dtype=call.dtype).transpose(1, 2) for size in sizes)
    attention = lowering.on_device(call)
    phase = torch.tensor(call.plan.sparse_rows // 2, dtype=torch.int32, device=lowering.device_of_tables(call.device))
    key_mask = (torch.arange(call.key.length, device=call.device) < call.key.length - call.key.suffix // 2) if call.masked else None
    key_mask = None if key_mask is None else key_mask.reshape(1, 1, 1, -1)

    def run() -> Tensor:
        return attention(query, key, value, phase, key_mask=key_mask)[0]

    run()
    return min(_seconds(run, call.device) for _ in range(_RUNS))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def _facts(lowering: Lowering, call: AttentionCall, setup: str) -> str:
    """All that the seconds depend on, as text."""
    cpu = f"{platform.processor()} {cpu_kind()} {torch.get_num_threads()}"
    device = cpu if call.device.type == "cpu" else getattr(torch, call.device.type).get_device_name(call.device)
    return json.dumps(
        {"lowering": lowering.name, "setup": setup, "call": str(call), "table": _digest(call), "device": device, "versions": _versions()}
    )


def _digest(call: AttentionCall) -> str:
    return hashlib.sha256(repr(call.plan.table).encode()).hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    found = {"source": source_stamp(), "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in ("torch", "triton", "flashinfer-python"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read(file: Path | None, facts: str) -> float | None:
    try:
        kept = json.loads(file.read_text()) if file is not None else {}
        seconds = float(kept["seconds"])
        return seconds if kept["facts"] == facts and seconds > 0 else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours
        return None


def _write(file: Path | None, facts: str, seconds: float) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"facts": facts, "seconds": seconds}))
    except OSError:  # a cache that cannot be written is only measured again
        return
