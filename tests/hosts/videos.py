"""Two small videos by a host's own model, compared with explicit LVSA masks that move with the host's true step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import oracle
import torch
from tiny_pipelines import SIZE, SteppedAttention

import lvsa_compile

OPTIONS = {"reference_frames": 4, "window": 1, "inner": "eager"}
TIMES = (999.0, 937.0, 857.0, 750.0, 600.0, 376.0)
SAME, APART = 1e-4, 1e-3
CALL = {"prompt": "a dog", "negative_prompt": "blurry", "guidance_scale": 5.0, **SIZE, "output_type": "latent"}


class Masked(oracle.MaskedAttention):
    """Uncompiled attention over the video gets the mask of ``step``, joined with a mask that the model itself gives."""

    def __init__(self, frames: int = 9, tokens: int = 12) -> None:
        self.masks = [oracle.token_mask(frames, tokens, step, reference=4, window=1) for step in range(len(TIMES))]
        super().__init__(self.masks[0])

    def at(self, step: int) -> None:
        self.mask = self.masks[step]

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        own = given.get("attn_mask") if func is torch.nn.functional.scaled_dot_product_attention else None
        if own is not None and (given["query"].shape[-2], given["key"].shape[-2]) == tuple(self.mask.shape):
            self.calls += 1
            given["attn_mask"] = own & self.mask if own.dtype == torch.bool else own.masked_fill(~self.mask, -math.inf)
            return func(**given)
        return super().__torch_function__(func, types, args, kwargs)


Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Calls a model with latents, timestep and text."""
Around = Callable[[int], Any]
"""Surroundings of a denoising step, by its number."""


def video(call: Call, around: Around, masked: Masked | None = None) -> torch.Tensor:
    """A video in six denoising steps, with guidance as two calls of the model per step."""
    latents, *texts = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed, size in SIZES.items())
    with torch.no_grad():
        for step, value in enumerate(TIMES):
            if masked is not None:
                masked.at(step)
            with around(step):
                wanted, unwanted = (call(latents, torch.tensor([value]), text) for text in texts)
            latents = latents - 0.05 * (unwanted + 3 * (wanted - unwanted))
    return latents


SIZES = {1: (1, 4, 9, 6, 8), 2: (1, 7, 16), 3: (1, 7, 16)}


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def forget() -> None:
    """No compiled graph of an earlier test, and none counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def latents(pipe: Any, steps: int = 6, **more: Any) -> torch.Tensor:
    """What a Wan pipeline of diffusers makes."""
    generator = torch.Generator().manual_seed(0)
    return pipe(**CALL, num_inference_steps=steps, generator=generator, **more).frames


def answers(make: Callable[[], Any], steps: int = 6) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What an uncompiled pipeline makes, dense and under explicit masks, and how many calls of attention those were."""
    dense = latents(make(), steps)
    with SteppedAttention() as masked:
        want = latents(make(), steps, callback_on_step_end=masked.on_step_end)
    assert off(want, dense) > APART
    return dense, want, masked.calls


def exact_from_now_on(make_video: Callable[[], torch.Tensor], want: torch.Tensor) -> None:
    """That the next two videos are exact, and no graph is added."""
    compiled = graphs()
    for _ in range(2):
        lvsa_compile.reset()
        assert off(make_video(), want) < SAME
    assert graphs() == compiled


def check_pipeline(make: Callable[[], Any], enable: Callable[[Any], Any], most_graphs: int) -> int:
    """``check`` for a pipeline of diffusers; returns how many calls of attention the uncompiled one made."""
    forget()
    _, want, calls = answers(make)
    pipe = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enable(pipe)
        latents(pipe)
        assert graphs() <= most_graphs
        exact_from_now_on(lambda: latents(pipe), want)
    return calls


def check(make: Callable[[], Any], call: Callable[[Any], Call], enable: Callable[[Any], Any], around: Around, most_graphs: int) -> None:
    """That a model is exact in its second and third video, with no more than ``most_graphs`` graphs and none after the first video."""
    forget()
    dense = video(call(make()), around)
    with Masked() as masked:
        want = video(call(make()), around, masked)
    assert masked.calls
    assert off(want, dense) > APART
    lvsa_compile.reset()
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = enable(model) or model
        video(call(model), around)
        assert graphs() <= most_graphs
        exact_from_now_on(lambda: video(call(model), around), want)
