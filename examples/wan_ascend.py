"""Wan on an Ascend NPU: seconds of a denoising step, dense and with Long Video Sparse Attention, as JSON.

    python examples/wan_ascend.py --output wan_ascend.json

It takes a transformer of Wan 2.1 1.3B's shape with random weights, which are as fast as trained ones, so that nothing has to be
downloaded.  With a checkpoint, which then also makes the video:

    python examples/wan_ascend.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --frames 321 --output wan_ascend.json

Nobody has run it on an NPU yet.  ``--device cpu --small`` shows that the script works.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.utils import export_to_video

import lvsa_compile

SHAPES = {  # of the transformer with random weights, and of the latents' rows and columns
    "wan2.1-1.3b": ({"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}, (60, 104)),
    "small": ({"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64, "num_layers": 2, "text_dim": 64}, (8, 12)),
}


def transformer(shape: str, device: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return WanTransformer3DModel(**SHAPES[shape][0]).to(dtype).eval()


def inputs(model: WanTransformer3DModel, frames: int, size: tuple[int, int], step: int) -> dict[str, Any]:
    """What a forward gets at a denoising step."""
    like = {"device": model.device, "dtype": model.dtype}
    return {
        "hidden_states": torch.randn(1, model.config.in_channels, frames, *size, **like),
        "timestep": torch.full((1,), 999.0 - 10 * step, device=model.device),
        "encoder_hidden_states": torch.randn(1, 512, model.config.text_dim, **like),
        "return_dict": False,
    }


def seconds_of_steps(model: WanTransformer3DModel, backend: Any, options: dict[str, Any], frames: int, size: tuple[int, int], steps: int):
    """Seconds of each step after a first one, which compiles; and of that."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False, options=options or None)
    taken = []
    for step in range(steps + 1):
        given = inputs(model, frames, size, step)
        started = time.perf_counter()
        with torch.no_grad():
            compiled(**given)
        if model.device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - started)
    return taken[1:], taken[0]


def dense_backend(inner: str) -> Any:
    """The same compiler without this package."""
    if inner in ("torchair", "npugraph_ex"):
        from lvsa_compile.compilers.torchair import npu_backend

        return npu_backend(inner)
    return inner


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Dense and sparse in turn, and what was decided."""
    shape = "small" if args.small else "wan2.1-1.3b"
    frames, size = (args.frames - 1) // 4 + 1, SHAPES[shape][1]
    if args.model:
        pipe = WanPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(args.device)
        model, size = pipe.transformer, (args.height // 8, args.width // 8)
    else:
        model = transformer(shape, args.device, getattr(torch, args.dtype))
    options: dict[str, Any] = {"inner": args.inner}
    dense, dense_first = seconds_of_steps(model, dense_backend(args.inner), {}, frames, size, args.steps)
    sparse, sparse_first = seconds_of_steps(model, "lvsa", options, frames, size, args.steps)
    (report,) = lvsa_compile.reports()
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "device": args.device if args.device == "cpu" else torch.get_device_module(args.device).get_device_name(),
        "machine": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "torch_npu", "diffusers", "lvsa-compile")},
        "model": args.model or f"{shape}, random weights",
        "latent_frames": frames,
        "latent_rows_columns": size,
        "dtype": args.dtype,
        "inner": args.inner,
        "seconds_per_step": {"dense": dense, "sparse": sparse},
        "seconds_of_the_first_step": {"dense": dense_first, "sparse": sparse_first},
        "speed_up_of_medians": statistics.median(dense) / statistics.median(sparse),
        "work": report.work,
        "report": report.to_dict(),
    }
    print(report)
    print(f"dense {statistics.median(dense):.3g} s, sparse {statistics.median(sparse):.3g} s: {result['speed_up_of_medians']:.2f}x")
    if args.model:
        pipe.transformer.compile(backend="lvsa", options=options)
        video = pipe("a dog runs along the beach", num_frames=args.frames, height=args.height, width=args.width).frames[0]
        export_to_video(video, str(args.output.with_suffix(".mp4")), fps=16)
    return result


def version(package: str) -> str:
    """Of a package, or that it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a Wan pipeline; by default random weights")
    parser.add_argument("--device", default="npu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--inner", default="torchair", help="torchair, npugraph_ex, inductor, aot_eager or eager")
    parser.add_argument("--frames", type=int, default=321, help="video frames, 4 n + 1")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one that compiles")
    parser.add_argument("--small", action="store_true", help="a tiny transformer, to try the script")
    parser.add_argument("--output", type=Path, default=Path("out/wan_ascend.json"))
    args = parser.parse_args()
    if args.device == "npu":
        import torch_npu  # noqa: F401 - makes the device
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(measured(args), indent=1) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
