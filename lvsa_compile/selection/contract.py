"""What a lowering must say about itself, and what it is told about a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.ops.attention import AttentionBody
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.policies.tables import KeyRangeTable, VideoSpan

CPU = torch.device("cpu")


class Failure(str):
    """Why a lowering cannot serve a call that it would serve, had something not failed on this machine."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention site as a lowering sees it: sizes in tokens, pattern in latent frames.

    ``masked`` says that a mask leaves out keys beside those that the pattern leaves out, ``mask_heads`` how many heads it has,
    ``own_ranges`` that a constant mask leaves each frame key ranges of its own, ``dense_step`` that the table has a row in which
    everything is attended, ``device_only`` that nothing may be asked of the host while it runs, as when CUDA graphs replay it;
    ``compiler`` names who compiles the graph where that is one that knows no ops of ours.
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
    mask_heads: int = 1
    own_ranges: bool = False
    dense_step: bool = False
    compiler: str = ""

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
class Prepared:
    """A call made ready: ``target(query, key, value, *tables, phase, scale=, key_mask=)`` computes it; ``tables`` are nested lists."""

    target: Callable[..., tuple[Tensor, Tensor]]
    tables: tuple[Any, ...]


@dataclass(frozen=True)
class Lowering:
    """One way of computing the attention op.

    ``summary`` says in a line what it is; ``body`` computes the op, ``operator`` is the op of that body.  One that has neither is
    ``prepare``d: its target is traced into the graph as ops that other compilers know, with tables of its own.  ``unavailable`` returns
    why it cannot run on a device, or None; ``refuses`` why it cannot serve a call, or None; ``speedup`` estimates how many times faster
    than dense attention it is, 0 where it is not meant for speed: ``lowering="auto"`` takes the fastest that serves, the lowest
    ``priority`` among equals.
    With ``plans_on_host`` the op's tables and phase are tensors of the CPU wherever the call runs.  ``tuned`` measures a call, with a
    function that returns the seconds of ``body`` under a name for how it is set up, and may prefer a set-up from then on.
    ``trial_tokens`` are those of a frame and of the text on which it is tried: so many that what a real model needs of it is needed.
    """

    name: str
    summary: str
    priority: int
    unavailable: Callable[[torch.device], str | None]
    refuses: Callable[[AttentionCall], str | None]
    speedup: Callable[[AttentionCall], float]
    body: AttentionBody | None = None
    operator: compat.OpOverload | None = None
    prepare: Callable[[AttentionCall, KeyRangeTable], Prepared] | None = None
    plans_on_host: bool = False
    tuned: Callable[[AttentionCall, Callable[[str], float]], float] = lambda call, seconds: seconds("")
    trial_tokens: tuple[int, int] = (72, 70)

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve a call by what it says of itself, or None: the device, then the call."""
        left_out = self.plans_on_host and call.device_only and call.device.type != "cpu"
        host = "it plans on the host, which CUDA graphs leave out" if left_out else None
        unknown = f"{call.compiler} compiles the graph and knows no ops of this package" if call.compiler and not self.prepare else None
        return self.unavailable(call.device) or host or unknown or self.refuses(call)

    def prepared(self, call: AttentionCall, table: KeyRangeTable) -> Prepared:
        """What computes a call, and the tables it wants."""
        if self.prepare is not None:
            return self.prepare(call, table)
        assert self.body is not None
        return Prepared(self.body, (table.query_bounds, table.key_ranges))

    def on_device(self, call: AttentionCall, table: KeyRangeTable) -> Callable[..., tuple[Tensor, Tensor]]:
        """What computes a call, ``(query, key, value, phase, scale=, key_mask=)``, its tables made where it wants them."""
        ready, where = self.prepared(call, table), self.device_of_tables(call.device)
        tables = [torch.tensor(content, dtype=torch.int32, device=where) for content in ready.tables]

        def run(query: Tensor, key: Tensor, value: Tensor, phase: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            return ready.target(query, key, value, *tables, phase.to(where), **more)

        return run

    def device_of_tables(self, device: torch.device) -> torch.device:
        """Where the op wants its tables and its phase for a call on ``device``."""
        return CPU if self.plans_on_host else device
