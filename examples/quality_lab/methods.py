"""What the lab compares: ways to make a video longer than the model was trained on, each an option of the backend or a change of the model.

All run through ``torch.compile(backend="lvsa")``; a dense one tells it to rewrite no site.  ``BUDGET`` frames are what each frame attends
to, so that the patterns differ in which frames those are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from model import HORIZON
from torch import Tensor

from lvsa_compile.options import parse_options

BUDGET = HORIZON
TOKENS_PER_FRAME = 16


@dataclass(frozen=True)
class Method:
    """``options`` of the backend, and ``prepare(model, frames)``, which may change the model for a length in frames.

    With ``spread`` the anchors are as far apart as makes ``BUDGET`` of them.
    """

    name: str
    says: str
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[WanTransformer3DModel, int], None] = lambda model, frames: None
    spread: bool = False

    @property
    def sparse(self) -> bool:
        """Whether the pattern of LVSA is used."""
        return self.options.get("max_sites") != 0

    def options_for(self, frames: int) -> dict[str, Any]:
        """The backend's options for a length in frames."""
        return self.options | ({"key_frame_interval": max(1, frames // BUDGET)} if self.spread else {})

    def interval(self, frames: int) -> int | None:
        """Distance of the anchors in frames, None where there are none."""
        return (parse_options(self.options_for(frames)).chosen_policy.pattern(frames, BUDGET).interval or None) if self.sparse else None


def riflex(model: WanTransformer3DModel, frames: int, further: int = 0) -> None:
    """RIFLEx (Zhao et al., arXiv 2502.15894): one temporal frequency gets a period beyond the video.

    Which one is chosen by the first repetition seen in long videos.  Here nothing repeats by itself; as in the reference implementation of
    LVSA it is the one whose period is nearest the horizon, or ``further`` places lower.
    """
    dim = model.rope.t_dim
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    nearest = int((2 * math.pi / frequencies - HORIZON).abs().argmin()) + further
    if frames > HORIZON:
        frequencies[nearest] = 0.9 * 2 * math.pi / frames
    angles = torch.outer(torch.arange(model.rope.freqs_cos.shape[0], dtype=torch.float64), frequencies).repeat_interleave(2, dim=1)
    model.rope.freqs_cos[:, :dim] = angles.cos().float()
    model.rope.freqs_sin[:, :dim] = angles.sin().float()


class UltraViCo:
    """Self-attention of UltraViCo (arXiv 2511.20123): positive scores of keys half a horizon away or more count nine tenths.

    The first frame attends to the first horizon alone, as in its code.  All scores are made, so it costs more than dense attention.
    """

    def __init__(self, factor: float = 0.9) -> None:
        self.factor = factor

    def __call__(self, attn: Any, hidden_states: Tensor, text: None, mask: None, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        """``hidden_states`` ``[B, S, width]`` -> the same."""
        heads = attn.heads
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        query_BHSD, key_BHSD = (_rotated(part.unflatten(2, (heads, -1)), *rotary_emb).transpose(1, 2) for part in (query, key))
        value_BHSD = value.unflatten(2, (heads, -1)).transpose(1, 2)
        scores = query_BHSD @ key_BHSD.transpose(2, 3) / math.sqrt(query_BHSD.shape[-1])
        places = torch.arange(scores.shape[-1])
        window = HORIZON * TOKENS_PER_FRAME
        far = (places[:, None] - places[None]).abs() > window // 2
        scores = torch.where(far & (scores >= 0), scores * self.factor, scores)
        scores = scores.masked_fill((places[:, None] < TOKENS_PER_FRAME) & (places[None] >= window), -1e4)
        attended = scores.softmax(-1) @ value_BHSD
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


def _rotated(heads_BSHD: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of neighbouring pairs of channels, as Wan has it."""
    pairs = torch.view_as_complex(heads_BSHD.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cosines[..., 0::2], sines[..., 1::2])).flatten(-2).type_as(heads_BSHD)


def ultravico(model: WanTransformer3DModel, frames: int) -> None:
    """Puts ``UltraViCo`` in the place of video self-attention, beyond the horizon."""
    for block in model.blocks if frames > HORIZON else ():
        block.attn1.set_processor(UltraViCo())


def _lvsa(**options: Any) -> dict[str, Any]:
    return {"reference_frames": BUDGET, **options}


DENSE = {"max_sites": 0}
METHODS = (
    Method("dense", "attention over all frames", DENSE),
    Method("lvsa", "anchors that rotate and a window of 3, which grows past anchors: the defaults", _lvsa()),
    Method("lvsa fixed", "the same, the anchors stay", _lvsa(rotate=False)),
    Method("lvsa unexpanded", "the same with rotation, the window does not grow past anchors", _lvsa(expand_window=False)),
    Method("window only", "a window alone, as wide as the horizon", _lvsa(window=BUDGET // 2, first_frames=0, key_frame_interval=0)),
    Method("anchors only", "rotating anchors alone, as many as the horizon has frames", _lvsa(window=0), spread=True),
    Method("riflex", "dense, the temporal frequency lowered whose period of 6 frames is nearest the horizon", DENSE, riflex),
    Method("riflex, next", "dense, the next frequency lowered, whose period is 29 frames", DENSE, functools.partial(riflex, further=1)),
    Method("ultravico", "dense, scores of far keys dampened", {**DENSE, "inner": "inductor"}, ultravico),  # fuses what it does to scores
)
TRADE = tuple(
    Method(f"window {window}", f"LVSA with a window of {window}, anchors for the rest of the budget", _lvsa(window=window))
    for window in (1, 2, 4, 5, 6)
)  # window 0 is "anchors only", 3 is "lvsa"
