"""A long video with Wan, once with dense and once with Long Video Sparse Attention, and the time both take.

With no arguments it builds a small WanPipeline with random weights (the video is noise; the code is the real one) and runs on a CPU in
minutes.  With real weights:

    python examples/wan_long_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --device cuda --dtype bfloat16 --frames 321 \
        --height 480 --width 832 --steps 50
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import export_to_video
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import lvsa_compile

PROMPT = "a dog runs along the beach at sunset, waves roll in"
console = Console()


def small_pipeline() -> WanPipeline:
    """A WanPipeline of the real classes with few layers and random weights, and a tokenizer of the prompt's words."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *sorted(set(PROMPT.replace(",", " ,").split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))
    transformer = WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=128,
        ffn_dim=2048,
        num_layers=3,
        text_dim=64,
        freq_dim=256,
        in_channels=16,
        out_channels=16,
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
    )


def generate(pipe: WanPipeline, backend: str, args: argparse.Namespace, options: dict[str, object]) -> tuple[float, float, Path]:
    """Compiles the transformer with a backend and makes a video -> (median seconds per step, seconds of the first step, file)."""
    torch._dynamo.reset()
    pipe.transformer.compile(backend=backend, options=options or None)
    pipe.set_progress_bar_config(desc=f"{backend:9s} (the first step compiles)")
    ends = [time.perf_counter()]

    def note_time(pipe: WanPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if args.device != "cpu":
            torch.accelerator.synchronize()
        ends.append(time.perf_counter())
        return tensors

    video = pipe(
        prompt=PROMPT,
        num_frames=args.frames,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        callback_on_step_end=note_time,
        output_type="np",
    ).frames[0]
    path = Path(args.out) / f"{'lvsa' if backend == 'lvsa' else 'dense'}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    export_to_video(video, str(path), fps=16)
    steps = [end - start for start, end in itertools.pairwise(ends)]
    return statistics.median(steps[1:] or steps), steps[0], path


def flop_bound(pipe: WanPipeline, args: argparse.Namespace, density: float) -> float:
    """How many times fewer FLOPs a step takes when video attention keeps only ``density`` of its pairs."""
    model = copy.deepcopy(pipe.transformer).to("meta")
    config = model.config
    frames = (args.frames - 1) // pipe.vae_scale_factor_temporal + 1
    rows, columns = args.height // pipe.vae_scale_factor_spatial, args.width // pipe.vae_scale_factor_spatial
    latents = torch.empty(1, config.in_channels, frames, rows, columns, device="meta", dtype=model.dtype)
    text = torch.empty(1, 512, config.text_dim, device="meta", dtype=model.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.empty(1, device="meta"), text)
    total = counter.get_total_flops()
    patch_frames, patch_rows, patch_columns = config.patch_size
    tokens = (frames // patch_frames) * (rows // patch_rows) * (columns // patch_columns)
    attention = 4 * tokens**2 * config.num_attention_heads * config.attention_head_dim * config.num_layers
    return total / (total - attention * (1 - density))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a Wan pipeline; by default a small one with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--frames", type=int, default=321, help="video frames, 4 n + 1")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)

    dtype = getattr(torch, args.dtype)
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=dtype) if args.model else small_pipeline()
    pipe.to(args.device) if dtype == torch.float32 else pipe.to(args.device, dtype)
    dense, dense_first, dense_path = generate(pipe, "inductor", args, {})
    sparse, sparse_first, sparse_path = generate(pipe, "lvsa", args, {})

    for report in lvsa_compile.reports():
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    sites = [site for report in lvsa_compile.reports() for site in report.sparse_sites]
    table = Table(title=f"{args.frames} frames at {args.width}×{args.height}, {args.dtype} on {args.device}; the first step compiles")
    for heading in ("attention", "seconds per step", "first step", "video"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("dense (inductor)", f"{dense:.2f}", f"{dense_first:.1f}", str(dense_path))
    table.add_row("sparse (lvsa)", f"{sparse:.2f}", f"{sparse_first:.1f}", str(sparse_path))
    console.print(table)
    if sites:
        bound = flop_bound(pipe, args, sites[0].density)
        console.print(f"speed-up {dense / sparse:.2f}×; counting FLOPs, at the rate of dense attention, {bound:.2f}× at this length")


if __name__ == "__main__":
    main()
