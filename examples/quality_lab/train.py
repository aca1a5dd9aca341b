"""Trains the lab's model by flow matching (Lipman et al., arXiv 2210.02747) on scenes made on the fly, in minutes on 2 CPU cores.

    python examples/quality_lab/train.py --out out/quality_lab/shapes.safetensors

``--bfloat16`` is faster on CPUs that multiply it.  The same seed gives the same scenes and noise.  Run again after an interruption, it
goes on where it last saved.  The matrices of the blocks are trained by Muon (Jordan et al. 2024), the rest by AdamW.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from model import HORIZON, new_model, save
from rich.progress import Progress
from scenes import random_scene, text_of
from torch import Tensor

BATCH = 16
SHIFT = 3.0  # more of the noisy times, where motion is decided
SAVE_EVERY = 200


def batch_of(seed: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Videos in [-1, 1] ``[BATCH, 3, HORIZON, rows, columns]``, their text, noise, and share of noise ``[BATCH]`` of one training step."""
    generator = np.random.default_rng([seed, step])
    scenes = [random_scene(generator) for _ in range(BATCH)]
    videos = torch.from_numpy(np.stack([scene.frames(HORIZON) for scene in scenes])).transpose(1, 2) * 2 - 1
    text = text_of([(scene.colour, scene.shape, scene.motion) for scene in scenes])
    torch_generator = torch.Generator().manual_seed(int(generator.integers(2**62)))
    uniform = torch.rand(BATCH, generator=torch_generator)
    return videos, text, torch.randn(videos.shape, generator=torch_generator), SHIFT * uniform / (1 + (SHIFT - 1) * uniform)


def optimisers_of(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    matrices = [value for name, value in model.named_parameters() if name.startswith("blocks.") and value.ndim == 2]
    others = [value for name, value in model.named_parameters() if not (name.startswith("blocks.") and value.ndim == 2)]
    return (
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01),
    )


def train(out: Path, seed: int, steps: int, bfloat16: bool, log_every: int) -> None:
    """Writes the averaged weights to ``out``; ``out`` with ``.state`` beside it holds what going on needs."""
    model, averaged = new_model(seed), new_model(seed)
    optimisers = optimisers_of(model)
    rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    state = out.with_suffix(".state")
    first = 0
    if state.is_file():
        held = torch.load(state, weights_only=True)
        if (held["seed"], held["steps"]) != (seed, steps):
            raise SystemExit(
                f"{state} is of another training: seed {held['seed']}, {held['steps']} steps. Remove it, or give another --out."
            )
        model.load_state_dict(held["model"])
        averaged.load_state_dict(held["averaged"])
        for optimiser, saved in zip(optimisers, held["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = held["done"]
    out.parent.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    with Progress() as progress:
        task = progress.add_task("training", total=steps, completed=first)
        for step in range(first, steps):
            share_of_rate = min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            for group, rate in zip((group for optimiser in optimisers for group in optimiser.param_groups), rates, strict=True):
                group["lr"] = rate * share_of_rate
            videos, text, noise, share = batch_of(seed, step)
            mixed = torch.lerp(videos, noise, share[:, None, None, None, None])
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                velocity = model(mixed, share * 1000, text, return_dict=False)[0]
            loss = (velocity.float() - (noise - videos)).square().mean()
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            keep = min(0.997, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - keep)
            losses.append(float(loss.detach()))
            progress.advance(task)
            if (step + 1) % log_every == 0:
                progress.console.print(f"step {step + 1}: loss {np.mean(losses[-log_every:]):.4f}")
            if (step + 1) % SAVE_EVERY == 0:
                held = {"done": step + 1, "seed": seed, "steps": steps, "model": model.state_dict(), "averaged": averaged.state_dict()}
                held["optimisers"] = [optimiser.state_dict() for optimiser in optimisers]
                torch.save(held, state.with_suffix(".part"))
                state.with_suffix(".part").replace(state)
    save(averaged, out, f"python examples/quality_lab/train.py --seed {seed} --steps {steps}{' --bfloat16' if bfloat16 else ''}")
    state.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/quality_lab/shapes.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    train(args.out, args.seed, args.steps, args.bfloat16, args.log_every)


if __name__ == "__main__":
    main()
