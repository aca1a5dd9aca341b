"""LVSA on a GPU: right, how fast at true shapes, end to end, under CUDA graphs.  One table, one JSON file.

    python benchmarks/gpu.py [correctness] [sites] [models] [graphs] [--output benchmarks/results/h200.json]

``correctness`` runs every lowering that serves against float64; ``sites`` times the attention of Wan, HunyuanVideo and CogVideoX at their
true shapes against every dense and sparse kernel there is; ``models`` runs Wan-shaped and HunyuanVideo-shaped transformers of diffusers
with random weights, as deep as ``--layers`` says, against ``backend="inductor"``; ``graphs`` shows CUDA graphs, recompiles and waits for
the host.  What cannot run is a row that says why.  ``--quick --device cpu`` shows that the script works, and no more.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import lvsa_compile
from lvsa_compile.bench.attention_sites import Measured, Site
from lvsa_compile.bench.measuring import Seconds, in_turn, peak_bytes
from lvsa_compile.bench.results import machine
from lvsa_compile.errors import in_a_line
from lvsa_compile.kernels.inspection import inspect
from lvsa_compile.ops.verified import TOLERANCE
from lvsa_compile.report.report import versions
from lvsa_compile.selection.accelerator import device_target
from lvsa_compile.selection.select import lowerings

Row = dict[str, Any]
say = functools.partial(Console(stderr=True).print, style="dim", highlight=False)

WAN = Site(41, 1560, 12, dtype="bfloat16", kind="Wan 2.1 1.3B, 480×832")
WAN_14B = replace(WAN, heads=40, kind="Wan 2.1 14B, 480×832")
HUNYUAN = Site(49, 1560, 16, reference=33, dtype="bfloat16", suffix=1985, padded=1700, kind="HunyuanVideo 1.5, padded text")
COGVIDEO = Site(26, 1350, 48, head_dim=64, reference=13, dtype="bfloat16", prefix=226, kind="CogVideoX 5B")
SITES = (
    *(replace(site, frames=frames) for site in (WAN, WAN_14B) for frames in (41, 81, 121)),
    *(replace(site, tokens_per_frame=3600, kind=site.kind.replace("480×832", "720p")) for site in (WAN, WAN_14B)),
    *(replace(HUNYUAN, frames=frames) for frames in (33, 49, 65)),
    *(replace(COGVIDEO, frames=frames) for frames in (26, 52)),
)
KEYS_BY_HEAD = "keys in the order of heads, as a norm or a rotation leaves them"
TINY = Site(25, 24, 2, head_dim=32, reference=9, kind="tiny")


def checked_sites(quick: bool, dtypes: tuple[str, ...]) -> Iterator[Site]:
    """Small sites in all that a kernel tells apart: dtype, head dim, text, padding, batch, grouped queries, tiles that straddle frames."""
    plain = replace(TINY, kind="plain") if quick else Site(41, 200, 4, kind="plain")
    text = 37
    for dtype in dtypes:
        for head_dim in (32,) if quick else (64, 80, 96, 128):
            site = replace(plain, dtype=dtype, head_dim=head_dim)
            yield site
            yield replace(site, kind="text first", prefix=text)
            yield replace(site, kind="padded text", suffix=text, padded=20)
            yield replace(site, kind="batch 2, grouped queries", batch=2, key_heads=site.heads // 2)
            yield replace(site, kind="frames of 15 tokens", tokens_per_frame=15)
            yield replace(site, kind=KEYS_BY_HEAD)


def correctness(device: torch.device, quick: bool) -> list[Row]:
    """The largest error over all phases of each lowering that serves, relative to the largest value, against float64."""
    rows = []
    for site in checked_sites(quick, ("float32",) if quick else ("bfloat16", "float16")):
        worst: dict[str, float | str] = {}
        torch.compiler.reset()
        for phase in range(site.pattern.phases):
            found = Measured(site, device, phase)
            if site.kind == KEYS_BY_HEAD:
                found.key = found.key.contiguous()
            for lowering in lowerings():
                name = f"lvsa {lowering.name}"
                if lowering.refusal(found.call) is not None or isinstance(worst.get(name), str) or lowering.name == "reference":
                    continue
                if lowering.name == "flex" and site.head_dim not in (64, 128):
                    continue  # each site is compiled anew, for minutes in all
                error = attempt(lambda found=found, name=lowering.name: found.worst_error(found.lowered(name)(), sparse=True))
                worst[name] = error if isinstance(error, str) else max(error, worst.get(name, 0.0))
        say(f"correctness: {site.dtype}, head dim {site.head_dim}, {site.kind}: {worst}")
        rows.append({"kind": site.kind, "dtype": site.dtype, "head_dim": site.head_dim, "phases": site.pattern.phases, "worst": worst})
    return rows


def dense_contenders(found: Measured) -> dict[str, Callable[[], Tensor]]:
    """Dense attention without a mask by each of torch's kernels, and with the mask that a model passes, as the model passes it."""

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(found.query, found.key, found.value, enable_gqa=found.query.shape[1] != found.key.shape[1])

    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    ways: dict[str, Callable[[], Tensor]] = {f"dense {name}": functools.partial(by, backend) for name, backend in backends.items()}
    if found.key_mask is not None:

        @functools.cache
        def pairs() -> Tensor:
            return found.key_mask & found.key_mask.transpose(2, 3)

        ways["dense, queries × keys mask"] = lambda: scaled_dot_product_attention(found.query, found.key, found.value, pairs())
    return ways


def sites(device: torch.device, rounds: int, quick: bool) -> list[Row]:
    """A row per contender and site; ``share of dense`` is its rate over the attended pairs beside the best dense kernel's."""
    rows = []
    for site in (TINY, replace(TINY, suffix=9, padded=4, kind="tiny, padded")) if quick else SITES:
        found = Measured(replace(site, dtype="float32") if quick else site, device)
        say(f"sites: {site.kind}, {site.frames} frames")
        torch.compiler.reset()
        contenders = dense_contenders(found)
        if not site.pattern.is_full:
            contenders |= {"FlexAttention": lambda found=found: found.flex(), "gather per frame": found.gathered}
            for lowering in lowerings():
                if lowering.name != "reference" and lowering.op == "attention":
                    refusal = lowering.refusal(found.call)
                    contenders[f"lvsa {lowering.name}"] = found.lowered(lowering.name) if refusal is None else refused(refusal)
        failed = {name: problem for name, run in contenders.items() if isinstance(problem := attempt(run), str)}
        running = {name: run for name, run in contenders.items() if name not in failed}
        seconds = in_turn(running, rounds, device) if running else {}
        best = min((seconds[name].median for name in running if name.startswith("dense")), default=None)
        for name in contenders:
            row: Row = {"kind": site.kind, "frames": site.frames, "contender": name, "density": found.density}
            if name in failed:
                rows.append(row | {"problem": failed[name]})
                continue
            pairs = 1.0 if name.startswith("dense") else found.density
            row |= {"seconds": seconds[name].median, "spread": seconds[name].spread, "rounds": len(seconds[name].rounds)}
            row |= {"tflops": found.site.flops * pairs / row["seconds"] / 1e12, "peak_bytes": peak_bytes(running[name], device)}
            row["worst_error"] = None if name.startswith("dense") else found.worst_error(running[name](), sparse=True)
            if best is not None:
                row |= {"speedup": best / row["seconds"], "share_of_dense": best * pairs / row["seconds"]}
            rows.append(row)
    return rows


def refused(why: str) -> Callable[[], Tensor]:
    """A contender that only says why it is none."""

    def run() -> Tensor:
        raise RuntimeError(why)

    return run


def attempt(run: Callable[[], Any]) -> Any:
    """What it returns, or in one line why it returned nothing."""
    try:
        with torch.no_grad():
            return run()
    except Exception as error:  # a benchmark that ends at one kernel's failure shows nothing of the others
        return in_a_line(error)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def wan(
    heads: int, layers: int, quick: bool, head_dim: int = 24, size: tuple[int, int] = (8, 8)
) -> tuple[Any, Callable[[int], dict[str, Any]], int]:
    """A Wan 2.1 transformer with random weights, its inputs for some frames, its horizon; quick ones have ``head_dim`` and ``size``."""
    from diffusers import WanTransformer3DModel

    head_dim = head_dim if quick else 128
    ffn = {12: 8960, 40: 13824}.get(heads, 4 * heads * head_dim)
    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn, num_layers=layers).eval()
    size = size if quick else (60, 104)

    def inputs(frames: int) -> dict[str, Any]:
        latents, text = torch.randn(1, 16, frames, *size), torch.randn(1, 512, 4096)
        return dict(hidden_states=latents, timestep=torch.full((1,), 900.0), encoder_hidden_states=text, return_dict=False)

    return model, inputs, 21


def hunyuan(layers: int, quick: bool) -> tuple[Any, Callable[[int], dict[str, Any]], int]:
    """A HunyuanVideo 1.5 transformer with random weights, 1985 text slots of which 300 are filled."""
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(0)
    small = dict(num_attention_heads=2, attention_head_dim=24, rope_axes_dim=(8, 8, 8)) if quick else {}
    model = HunyuanVideo15Transformer3DModel(num_layers=layers, num_refiner_layers=1, **small).eval()
    config = model.config
    size = (6, 6) if quick else (30, 52)

    def inputs(frames: int) -> dict[str, Any]:
        def text(slots: int, filled: int, width: int) -> tuple[Tensor, Tensor]:
            return torch.randn(1, slots, width), (torch.arange(slots) < filled).long()[None]

        (first, first_mask), (second, second_mask) = text(1000, 200, config.text_embed_dim), text(256, 100, config.text_embed_2_dim)
        return dict(
            hidden_states=torch.randn(1, config.in_channels, frames, *size), timestep=torch.full((1,), 900.0),
            encoder_hidden_states=first, encoder_attention_mask=first_mask, encoder_hidden_states_2=second,
            encoder_attention_mask_2=second_mask, image_embeds=torch.zeros(1, 729, config.image_embed_dim), return_dict=False,
        )  # fmt: skip

    return model, inputs, 33


def models(device: torch.device, rounds: int, layers: int, quick: bool) -> list[Row]:
    """Seconds of a forward at 1 to 6 times the horizon, by Inductor and by lvsa; beside a mask also by Inductor without it."""
    try:
        made = {
            "Wan 2.1 1.3B-shaped": lambda: wan(2 if quick else 12, layers, quick),
            "Wan 2.1 14B-shaped": lambda: wan(3 if quick else 40, layers, quick),
            "HunyuanVideo 1.5-shaped": lambda: hunyuan(layers, quick),
        }
        import diffusers  # noqa: F401
    except ImportError as error:
        return [{"model": "all", "problem": f"{error}; pip install diffusers"}]
    dtype = torch.float32 if quick else torch.bfloat16
    rows = []
    for name, build in made.items():
        plain, inputs_of, horizon = build()
        plain = plain.to(device, dtype)
        for times in (1, 2) if quick else (1, 2, 4, 6) if horizon == 21 else (1, 1.5, 2):
            torch.compiler.reset()
            frames = round(times * horizon) if times > 1 else horizon
            say(f"models: {name}, {frames} frames")
            inputs = {key: value.to(device, dtype if value.is_floating_point() and key != "timestep" else None) if isinstance(value, Tensor)
                      else value for key, value in inputs_of(frames).items()}  # fmt: skip
            compiled = {backend: torch.compile(copy.deepcopy(plain), backend=backend, dynamic=False) for backend in ("inductor", "lvsa")}
            steps = {backend: functools.partial(forward, model, inputs) for backend, model in compiled.items()}
            if horizon == 33:
                unmasked = torch.compile(copy.deepcopy(plain), backend="inductor", dynamic=False)
                steps["inductor_without_mask"] = functools.partial(without_masks, unmasked, inputs)
            failed = {backend: problem for backend, run in steps.items() if isinstance(problem := attempt(run), str)}
            row: Row = {"model": name, "layers": layers, "frames": frames, "horizons": times, "problem": "; ".join(failed.values())}
            running = {b: run for b, run in steps.items() if b not in failed}
            seconds: dict[str, Seconds] = in_turn(running, rounds, device) if running else {}
            for backend, found in seconds.items():
                row |= {backend: found.median, f"{backend}_peak_bytes": peak_bytes(steps[backend], device)}
            if {"inductor", "lvsa"} <= set(seconds):
                row["speedup"] = seconds["lvsa"].times_faster_than(seconds["inductor"])
                row["identical"] = bool(torch.equal(steps["inductor"](), steps["lvsa"]()))
            for report in lvsa_compile.reports()[-1:]:
                row["sites"] = report.summary
                row["lowerings"] = sorted({site.lowering for site in report.sparse_sites})
            rows.append(row)
        del plain
    torch.compiler.reset()
    return rows


@torch.no_grad()
def forward(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """One denoising step."""
    output: Tensor = model(**inputs)[0]
    return output


def without_masks(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """A denoising step whose attention gets no mask: not what the model means, but what dense attention could take."""

    def dropped(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        return scaled_dot_product_attention(query, key, value, **more)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", dropped):
        return forward(model, inputs)


def graphs(device: torch.device, layers: int, quick: bool) -> list[Row]:
    """Per mode and lowering: twelve steps against the same steps without CUDA graphs, compiles after the first step, waits for the host."""
    try:
        small = {} if quick else {"head_dim": 64, "size": (24, 24)}  # what every lowering takes
        plain, inputs_of, horizon = wan(2, layers, quick=True, **small)
    except ImportError as error:
        return [{"mode": "all", "problem": f"{error}; pip install diffusers"}]
    dtype = torch.float32 if quick else torch.bfloat16
    plain = plain.to(device, dtype)
    inputs = {key: value.to(device, dtype if key != "timestep" else None) if isinstance(value, Tensor) else value
              for key, value in inputs_of(2 * horizon).items()}  # fmt: skip
    steps = [inputs | {"timestep": torch.full((1,), 1000.0 - 50.0 * n, device=device)} for n in range(12)]
    rows: list[Row] = []
    expected: list[Tensor] = []
    names = ["auto"] if quick else ["reference", "auto", "triton", "dense_merge", "flashinfer", "flex"]
    modes = [None] if quick else [None, "reduce-overhead", "max-autotune"]
    for name, mode in [(name, mode) for name in names for mode in modes]:
        torch.compiler.reset()
        options = {"lowering": name} | ({"mode": mode} if mode else {})

        def run(options: dict[str, Any] = options) -> dict[str, Any]:
            model = torch.compile(copy.deepcopy(plain), backend="lvsa", options=options, dynamic=False)
            started = time.perf_counter()
            outputs = [forward(model, step).clone() for step in steps]
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            outputs = [forward(model, step).clone() for step in steps]
            waits = host_waits(model, steps) if device.type == "cuda" else None
            found = {"compiles_later": torch._dynamo.utils.counters["stats"]["unique_graphs"] - before, "waits_for_host": waits}
            expected[:] = expected or outputs
            worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, expected, strict=True))
            lowered = sorted({site.lowering for site in lvsa_compile.reports()[-1].sparse_sites})
            return found | {"difference": worst, "lowerings": lowered, "first_seconds": time.perf_counter() - started}

        found = attempt(run)
        rows.append({"mode": mode or "default", "lowering": name} | ({"problem": found} if isinstance(found, str) else found))
        say(f"graphs: {rows[-1]}")
    return rows


def host_waits(model: Callable[..., Any], steps: list[dict[str, Any]]) -> str:
    """ "none", or what CUDA says when something waits for the device during two steps."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps[:2]:
            forward(model, step)
    except RuntimeError as error:
        return str(error).splitlines()[0][:160]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def kernels_here(device: torch.device) -> list[Row]:
    """What Triton's compiler makes of the kernel on this machine, which may have another Triton than the one it was written with."""
    if device.type != "cuda":
        return []
    found = attempt(lambda: list(inspect([device_target(device)])))
    return [{"problem": found}] if isinstance(found, str) else [
        {"dtype": v.dtype, "head_dim": v.head_dim, "tile": f"{v.configuration.block_m}×{v.configuration.block_n}", "described": v.described,
         "registers": v.registers, "spilled_bytes": v.spilled_bytes, "problems": list(v.problems)} for v in found
    ]  # fmt: skip


def shown(title: str, rows: list[Row]) -> Table:
    """Rows as a table, one column per key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell := row.get(column, ""), float) else str(cell) for column in columns))
    return table


def main() -> None:
    """Runs the parts asked for, prints a table each and writes the JSON."""
    parts: dict[str, Callable[[argparse.Namespace, torch.device], list[Row]]] = {
        "kernels": lambda args, device: kernels_here(device),
        "correctness": lambda args, device: correctness(device, args.quick),
        "sites": lambda args, device: sites(device, args.rounds, args.quick),
        "models": lambda args, device: models(device, args.rounds, args.layers, args.quick),
        "graphs": lambda args, device: graphs(device, min(args.layers, 2), args.quick),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}; default all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4, help="of the models; seconds per layer are what is compared")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it works")
    parser.add_argument("--output", type=Path, help="JSON file; parts that it has already are replaced, others kept")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; choose some of {', '.join(parts)}")
    device = torch.device(args.device)
    results: Row = {"machine": machine(device), "versions": versions() | {"triton": triton_version()}, "python": platform.python_version()}
    if args.output is not None and args.output.exists():
        results = json.loads(args.output.read_text()) | results
    results["commands"] = [*results.get("commands", []), shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])]
    for part in args.parts or parts:
        started = time.perf_counter()
        try:
            results[part] = parts[part](args, device)
        except Exception as error:  # the other parts are worth having
            results[part] = [{"problem": f"{type(error).__name__}: {error}"[:300]}]
        Console(width=240).print(shown(f"{part}, {time.perf_counter() - started:.0f} s", results[part]))
        if args.output is not None:
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    checked = results.get("correctness", [])
    wrong = [row for row in checked if "problem" in row or any(above_tolerance(error, row["dtype"]) for error in row["worst"].values())]
    if wrong:
        raise SystemExit(f"wrong or failed: {wrong}")


def above_tolerance(error: float | str, dtype: str) -> bool:
    """Whether rounding does not explain it."""
    return isinstance(error, str) or not error <= TOLERANCE[getattr(torch, dtype)]


def triton_version() -> str:
    """The installed Triton's."""
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


if __name__ == "__main__":
    main()
