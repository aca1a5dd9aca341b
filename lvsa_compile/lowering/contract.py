"""What a lowering must say about itself, and what it is told about a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lvsa_compile import compat
from lvsa_compile.lowering.attention_op import AttentionBody
from lvsa_compile.sparsity.frame_pattern import FramePattern
from lvsa_compile.sparsity.key_ranges import VideoSpan

CPU = torch.device("cpu")


@dataclass(frozen=True)
class AttentionCall:
    """One attention site as a lowering sees it: sizes in tokens, pattern in latent frames.

    ``masked`` says that a mask leaves out keys beside those that the pattern leaves out, ``device_only`` that nothing may be asked of the
    host while it runs, as when CUDA graphs replay it.
    """

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
    masked: bool = False
    device_only: bool = False

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

    ``summary`` says in a line what it is; ``body`` computes the op, ``operator`` is the op of that body; ``unavailable`` returns why it
    cannot run on a device, or None; ``refuses`` why it cannot serve a call, or None; ``speedup`` estimates how many times faster than
    dense attention it is, 0 where it is not meant for speed: ``lowering="auto"`` takes the fastest that serves, the lowest ``priority``
    among equals.
    With ``plans_on_host`` the op's tables and phase are tensors of the CPU wherever the call runs.  ``tuned`` measures a call, with a
    function that returns the seconds of ``body`` under a name for how it is set up, and may prefer a set-up from then on.
    """

    name: str
    summary: str
    priority: int
    body: AttentionBody
    operator: compat.OpOverload
    unavailable: Callable[[torch.device], str | None]
    refuses: Callable[[AttentionCall], str | None]
    speedup: Callable[[AttentionCall], float]
    plans_on_host: bool = False
    tuned: Callable[[AttentionCall, Callable[[str], float]], float] = lambda call, seconds: seconds("")

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve a call by what it says of itself, or None: the device, then the call."""
        left_out = self.plans_on_host and call.device_only and call.device.type != "cpu"
        host = "it plans on the host, which CUDA graphs leave out" if left_out else None
        return self.unavailable(call.device) or host or self.refuses(call)

    def device_of_tables(self, device: torch.device) -> torch.device:
        """Where the op wants its tables and its phase for a call on ``device``."""
        return CPU if self.plans_on_host else device
