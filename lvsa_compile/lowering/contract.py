"""What a lowering must say about itself, and what it is told about a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lvsa_compile import compat
from lvsa_compile.sparsity.frame_pattern import FramePattern
from lvsa_compile.sparsity.key_ranges import VideoSpan


@dataclass(frozen=True)
class AttentionCall:
    """One attention site as a lowering sees it: sizes in tokens, pattern in latent frames."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    query: VideoSpan
    key: VideoSpan
    pattern: FramePattern

    @property
    def density(self) -> float:
        """Attended pairs of tokens over all pairs, mean over the phases; text and conditioning attend all and are attended by all."""
        video_pairs = self.pattern.frames**2 * self.query.tokens_per_frame * self.key.tokens_per_frame
        return 1.0 - video_pairs * (1.0 - self.pattern.density) / (self.query.length * self.key.length)

    @property
    def flops(self) -> float:
        """Floating-point operations of the two matrix products of dense attention."""
        width = self.head_dim + self.value_dim
        return 2.0 * self.batch * self.query_heads * self.query.length * self.key.length * width


@dataclass(frozen=True)
class Lowering:
    """One way of computing the attention op.

    ``operator`` has the schema of ``lvsa::attention``; ``unavailable`` returns why it cannot run on a device, or None; ``refuses``
    why it cannot serve a call, or None; ``trial`` runs it once on a small problem of the call's kind and returns what went wrong, or
    None; ``speedup`` estimates how many times faster than dense attention it is.  Among those that serve a call the lowest
    ``priority`` is chosen.
    """

    name: str
    priority: int
    operator: compat.OpOverload
    unavailable: Callable[[torch.device], str | None]
    refuses: Callable[[AttentionCall], str | None]
    speedup: Callable[[AttentionCall], float]
    trial: Callable[[AttentionCall], str | None] = lambda call: None

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve a call, or None: the device, the call, the trial, in this order."""
        return self.unavailable(call.device) or self.refuses(call) or self.trial(call)
