"""All of ``lvsa bench``: what is run, on what machine, and what it comes to."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from lvsa_compile.bench import attention_sites, blocks, overheads, video_model, watching
from lvsa_compile.bench.attention_sites import Site
from lvsa_compile.errors import BenchError
from lvsa_compile.report.report import versions

PARTS = ("sites", "variants", "sweep", "growth", "model", "blocks", "policies", "watching", "overheads")
Results = dict[str, Any]
Say = Callable[[str], None]


def check(parts: Sequence[str]) -> None:
    """Whether these parts can be measured here.

    Raises:
        BenchError: a part does not exist, or needs what is not installed.
    """
    for part in parts:
        if part not in PARTS:
            raise BenchError(part, "no such part", f"Name some of: {', '.join(PARTS)}.")
    if {"model", "policies", "watching"} & set(parts):
        video_model.wan_shaped()


def run(parts: Sequence[str], device: torch.device, rounds: int, command: str, say: Say, quick: bool = False) -> Results:
    """Measures the named parts; ``quick`` takes small shapes, to see that it works and not how fast it is.

    Raises:
        BenchError: see ``check``.
    """
    check(parts)
    results: Results = {"machine": machine(device), "versions": versions(), "commands": [command]}
    for part, sites in _sites(quick).items():
        if part not in parts:
            continue
        rows = []
        for number, site in enumerate(sites, start=1):
            shape = f"{site.frames} frames × {site.tokens_per_frame} tokens, {site.heads} heads, {site.dtype}, {site.kind}"
            say(f"{part} {number}/{len(sites)}: {shape}")
            peers = part in ("sites", "variants")
            rows += attention_sites.measure(site, device, rounds, peers=peers, errors=peers)
        results[part] = rows
    if "model" in parts:
        say("model: a Wan-shaped transformer at 1 to 12 times its horizon")
        small: dict[str, Any] = {"horizons": (1, 2), "dense_up_to": 2} if quick else {}
        results["model"] = video_model.measure(device, rounds, **small)
    if "blocks" in parts:
        say("blocks: attention over chosen blocks of 64 and 128 tokens")
        dtypes = (torch.float32, torch.bfloat16)
        results["blocks"] = blocks.measure_kernel(device, rounds, dtypes, ((256, 2, 32),) if quick else blocks.SHAPES)
    if "policies" in parts:
        say("policies: videos of 50 steps at the training length")
        results["policies"] = blocks.measure_videos(device, rounds, **({"steps": 4, "frames": 2} if quick else {}))
    if "watching" in parts:
        say("watching: forwards that are followed")
        results["watching"] = watching.measure(device, rounds, frames=1 if quick else 3)
    if "overheads" in parts:
        say("overheads")
        results["overheads"] = overheads.measure(rounds)
    rounded: Results = _rounded(results)
    return rounded | {"summary": summary(rounded)}


def added_to(path: Path, results: Results) -> Results:
    """The results in a file with these parts in place of its own.

    Raises:
        BenchError: the file is of another machine or of other versions.
    """
    if not path.exists():
        return results
    before: Results = json.loads(path.read_text())
    for facts in ("machine", "versions"):
        other = {name: value for name, value in before.get(facts, {}).items() if name != "load before"}
        if other != {name: value for name, value in results[facts].items() if name != "load before"}:
            raise BenchError("--output", f"{path} was measured elsewhere: {facts} {other}", "Name another file, or remove it.")
    merged = before | results | {"commands": [*before["commands"], *results["commands"]]}
    return merged | {"summary": summary(merged)}


def _sites(quick: bool) -> dict[str, Sequence[Site]]:
    if quick:
        tiny = Site(25, 8, 2, head_dim=32, reference=9)
        return {"sites": [tiny], "variants": attention_sites.variants_of(tiny), "sweep": attention_sites.sweep()[:4], "growth": [tiny]}
    return {
        "sites": attention_sites.MAIN,
        "variants": attention_sites.VARIANTS,
        "sweep": attention_sites.sweep(),
        "growth": attention_sites.growth(),
    }


def summary(results: Results) -> dict[str, float]:
    """The figures that the rows come to, by name."""
    found: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        shares = [row["share"] for row in results.get("sites", []) if row["chosen"] and row["dtype"] == dtype]
        if shares:
            found[f"share of the bound, {dtype}, geometric mean"] = statistics.geometric_mean(shares)
            found[f"share of the bound, {dtype}, least"] = min(shares)
    plain = 1.0
    for row in results.get("variants", []):
        if row["chosen"]:
            plain = row["share"] if row["kind"] == "plain" else plain
            key = f"share of the bound against the plain case, {row['kind']}, least"
            if row["kind"] != "plain":
                found[key] = min(found.get(key, math.inf), row["share"] / plain)
    ratios = [1.0 / row["speedup"] for row in results.get("sweep", []) if row["chosen"]]
    if ratios:
        found["seconds over dense, worst of the sweep"] = max(ratios)
    memory = [
        row["temporaries"]
        for part in ("sites", "variants")
        for row in results.get(part, [])
        if row["chosen"] and row["temporaries"] is not None
    ]
    if memory:
        found["temporaries over q + k + v + o, most"] = max(memory)
    for row in results.get("model", []):
        if "share" in row:
            found[f"model at {row['horizon']}×, share of the bound"] = row["share"]
    for name, rows, seconds in (("a site", _ours(results.get("growth", [])), "seconds"), ("the model", results.get("model", []), "lvsa")):
        lengths = [row for row in rows if row["frames"] > 21]
        if len(lengths) > 2:
            found[f"exponent of seconds over frames, {name}"] = exponent([r["frames"] for r in lengths], [r[seconds] for r in lengths])
    compiles = [row for row in results.get("model", []) if "inductor_compile" in row]
    if compiles:
        found["seconds of compiling over Inductor's, geometric mean"] = statistics.geometric_mean(
            [r["lvsa_compile"] / r["inductor_compile"] for r in compiles]
        )
        longest = results["model"][-1]
        found[f"seconds of compiling at {longest['horizon']}× over those at 2×"] = (
            longest["lvsa_compile"] / results["model"][1]["lvsa_compile"]
        )
    return {name: _rounded(value) for name, value in found.items()}


def _ours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["chosen"]]


def exponent(frames: Sequence[float], seconds: Sequence[float]) -> float:
    """The ``p`` for which seconds grow like frames to the power of ``p``, by least squares of the logarithms."""
    return float(numpy.polyfit(numpy.log(frames), numpy.log(seconds), 1)[0])


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {"device": device.type, "processor": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if device.type != "cpu":
        facts["accelerator"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return facts | {"system": platform.system(), "load before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name, flags = re.search(r"model name\s*:\s*(.+)", text), re.search(r"flags\s*:\s*(.+)", text)
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flags and flag in flags[1].split()]
    return " ".join([name[1] if name else platform.processor() or platform.machine(), *([f"({', '.join(wide)})"] if wide else [])])


def _rounded(value: Any) -> Any:
    """Six digits, which is more than any timing holds."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
