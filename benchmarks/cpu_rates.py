"""How fast each lowering is on a kind of CPU beside torch's dense attention there: what ``selection/rates.py`` is made of.

    python benchmarks/cpu_rates.py [--rounds 5] [--output benchmarks/results/cpu_rates.json]
    python benchmarks/cpu_rates.py --fit

Every kind of CPU that this machine can play is measured in a process of its own, torch's kernels and ours held to its instructions.
A kind that the machine has not keeps the rows that another machine measured.  ``--fit`` measures nothing and prints the rates that the
rows make, of the least mean square of the logarithms (scipy).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CAPABILITY = {"plain": "default", "avx2": "avx2", "avx512": "avx512", "amx": "avx512"}
LONGEST = {"plain": 2e10, "avx2": 8e10, "avx512": 8e10, "amx": 8e10}  # FLOP of the largest dense attention, for a second or so
SHAPES = (
    (9, 16, 1, 64, 4), (25, 16, 2, 64, 9), (25, 60, 1, 64, 9), (41, 32, 2, 64, 21), (25, 120, 2, 128, 9), (41, 60, 2, 128, 21),
    (81, 32, 4, 64, 21), (41, 120, 4, 128, 21), (81, 60, 4, 128, 21), (121, 60, 4, 128, 21), (65, 120, 4, 128, 33),
)  # fmt: skip
"""Frames, tokens per frame, heads, head dim, horizon."""


def measured_here(kind: str, rounds: int) -> list[dict[str, Any]]:
    import torch

    from lvsa_compile.bench.attention_sites import Measured, Site
    from lvsa_compile.bench.measuring import in_turn
    from lvsa_compile.selection.cpu_kind import cpu_kind
    from lvsa_compile.selection.select import lowerings

    assert cpu_kind() == kind, f"this is {cpu_kind()}"
    rows = []
    for dtype in ("float32", "bfloat16"):
        for frames, tokens, heads, width, reference in SHAPES:
            site = Site(frames, tokens, heads, width, reference, dtype)
            if site.flops > LONGEST[kind] / (1 if dtype == "float32" else 2):
                continue
            here = Measured(site, torch.device("cpu"))
            call = here.call
            phase = torch.tensor(here.phase, dtype=torch.int32)
            runs = {"dense": lambda here=here: torch.nn.functional.scaled_dot_product_attention(here.query, here.key, here.value)}
            for lowering in lowerings():
                if lowering.name in ("cpu", "dense_merge", "reference") and lowering.refusal(call) is None:
                    run = lowering.on_device(call)
                    runs[lowering.name] = lambda run=run, here=here, phase=phase: run(here.query, here.key, here.value, phase)
            seconds = in_turn(runs, rounds, torch.device("cpu"), least_seconds=0.3)
            rows += [
                {"kind": kind, "dtype": dtype, "lowering": name, "frames": frames, "tokens": tokens, "heads": heads, "head_dim": width,
                 "reference": reference, "dense_seconds": seconds["dense"].median, "seconds": found.median, "spread": found.spread}
                for name, found in seconds.items() if name != "dense"
            ]  # fmt: skip
            ratios = " ".join(f"{name} {seconds['dense'].median / found.median:.2f}" for name, found in seconds.items())
            print(f"{kind} {dtype} {frames} x {tokens}, {heads} heads: {ratios}", file=sys.stderr, flush=True)
    return rows


def fitted(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of dense attention FLOP/s by one thread and seconds a call; of each lowering its share of them and seconds a part."""
    import numpy as np
    import torch
    from scipy.optimize import least_squares

    from lvsa_compile.bench.attention_sites import Measured, Site

    calls = {}
    for row in rows:
        sizes = (row["frames"], row["tokens"], row["heads"], row["head_dim"], row["reference"], row["dtype"])
        calls[sizes] = calls.get(sizes) or Measured(Site(*sizes), torch.device("cpu")).call
        row["call"] = calls[sizes]

    def fit(seconds: Any, work: Any, parts: Any) -> tuple[float, float]:
        def wrong(logs: Any) -> Any:
            return np.log((work / np.exp(logs[0]) + parts * np.exp(logs[1])) / seconds)

        rate, each = np.exp(least_squares(wrong, [np.log(work.sum() / seconds.sum()), np.log(1e-5)]).x)
        return float(rate), float(each)

    def column(rows: list[dict[str, Any]], value: Any) -> Any:
        return np.array([value(row) for row in rows], dtype=float)

    one = list({id(row["call"]): row for row in rows}.values())
    flops = column(one, lambda row: row["call"].flops)
    found = {"dense": fit(column(one, lambda row: row["dense_seconds"]), flops / 2, np.ones(len(one)))}  # measured with two threads
    for name in ("cpu", "dense_merge"):
        of_lowering = [row for row in rows if row["lowering"] == name]
        if of_lowering:
            work = column(of_lowering, lambda row: row["call"].flops * row["call"].density / 2) / found["dense"][0]
            parts = column(of_lowering, lambda row: row["call"].plan.parts if row["lowering"] == "dense_merge" else 1)
            found[name] = fit(column(of_lowering, lambda row: row["seconds"]), work, parts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_rates.json"))
    parser.add_argument("--kind", help="measure this kind in this process and print its rows")
    parser.add_argument("--fit", action="store_true", help="print the rates of the rows that were measured")
    asked = parser.parse_args()
    if asked.fit:
        for kind, measured in json.loads(asked.output.read_text())["kinds"].items():
            for dtype in ("float32", "bfloat16"):
                for name, (rate, seconds) in fitted([row for row in measured["rows"] if row["dtype"] == dtype]).items():
                    print(f"{kind} {dtype} {name}: {rate:.3g}, {1e6 * seconds:.0f}e-6")
        return
    if asked.kind:
        print(json.dumps(measured_here(asked.kind, asked.rounds)))
        return
    import torch

    from lvsa_compile.bench.results import machine
    from lvsa_compile.report.report import versions
    from lvsa_compile.selection.cpu_kind import KINDS, cpu_kind

    kinds = KINDS[: KINDS.index(cpu_kind()) + 1]
    before = json.loads(asked.output.read_text())["kinds"] if asked.output.exists() else {}
    facts = {"machine": machine(torch.device("cpu")), "versions": versions(), "command": " ".join(["python", *sys.argv])}
    for kind in kinds:
        play = {"LVSA_CPU": kind, "ATEN_CPU_CAPABILITY": CAPABILITY[kind]}
        run = [sys.executable, __file__, "--kind", kind, "--rounds", str(asked.rounds)]
        done = subprocess.run(run, env={**os.environ, **play}, stdout=subprocess.PIPE, text=True, check=True)
        before[kind] = {**facts, "rows": json.loads(done.stdout)}
    asked.output.write_text(json.dumps({"kinds": before}, indent=1) + "\n")


if __name__ == "__main__":
    main()
