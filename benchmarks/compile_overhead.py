"""What finding, tracing, deciding and rewriting add to the time Inductor takes to compile a Wan transformer.

    python benchmarks/compile_overhead.py [--layers 8 40] [--rows 6 24]

Each model is compiled once with ``backend="inductor"`` and once with ``backend="lvsa"``, caches off; the passes' own seconds are set
against Inductor's.  A second grid shows that the passes do not grow with rows x columns.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.table import Table

import lvsa_compile.backend as backend

FRAMES = 41


def model_of(layers: int) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=layers, rope_max_seq_len=128,
    ).eval()  # fmt: skip


def inputs_of(rows: int) -> dict:
    return dict(hidden_states=torch.randn(1, 4, FRAMES, rows, rows), timestep=torch.full((1,), 900.0),
                encoder_hidden_states=torch.randn(1, 7, 16), return_dict=False)  # fmt: skip


def seconds_of(name: str, layers: int, rows: int) -> float:
    torch._dynamo.reset()
    model = model_of(layers)
    started = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend=name)(**inputs_of(rows))
    return time.perf_counter() - started


def passes_of(layers: int, rows: int) -> tuple[float, float]:
    """Seconds of the passes alone, and of the whole compile, with ``backend="lvsa"``."""
    spent = []
    run = backend._run

    def timed(*args):
        started = time.perf_counter()
        result = run(*args)
        spent.append(time.perf_counter() - started)
        return result

    backend._run = timed
    try:
        whole = seconds_of("lvsa", layers, rows)
    finally:
        backend._run = run
    return sum(spent), whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 40])
    parser.add_argument("--rows", type=int, nargs="+", default=[6, 24])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    seconds_of("inductor", 1, 6)  # imports and the C++ compiler's first start
    results = []
    for layers in chosen.layers:
        for rows in chosen.rows:
            inductor = seconds_of("inductor", layers, rows)
            passes, whole = passes_of(layers, rows)
            results.append(
                dict(
                    layers=layers,
                    rows=rows,
                    tokens=FRAMES * (rows // 2) ** 2,
                    inductor=inductor,
                    lvsa=whole,
                    passes=passes,
                    share=passes / inductor,
                )
            )
    table = Table("layers", "tokens", "inductor s", "lvsa s", "passes s", "passes / inductor")
    for r in results:
        table.add_row(str(r["layers"]), str(r["tokens"]), *(f"{r[k]:.2f}" for k in ("inductor", "lvsa", "passes")), f"{r['share']:.1%}")
    Console().print(table)
    if chosen.json:
        device = f"{platform.machine()}, {torch.get_num_threads()} threads"
        chosen.json.write_text(
            json.dumps(dict(device=device, torch=torch.__version__, results=results, command=shlex.join(["python", *sys.argv])), indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
