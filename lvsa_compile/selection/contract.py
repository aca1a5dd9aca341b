"""What a lowering declares about itself, and the attention call it is asked to serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.errors import RateError
from lvsa_compile.ops.attention import by_heads
from lvsa_compile.policies.contract import Plan
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.rates import share_of_dense

CPU = torch.device("cpu")


class Failure(str):
    """Why a lowering cannot serve a call that it would serve, had something not failed on this machine."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention site as a lowering sees it: sizes in tokens, and the plan of its policy.

    ``masked`` says that a mask leaves out keys beside those that the plan leaves out, ``mask_heads`` how many heads it has,
    ``device_only`` that nothing may be asked of the host while it runs, as when CUDA graphs replay it; ``compiler`` names who compiles
    the graph where that is one that knows no ops of ours.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    plan: Plan
    masked: bool = False
    device_only: bool = False
    mask_heads: int = 1
    compiler: str = ""

    @property
    def query(self) -> VideoSpan:
        """Where the video lies in the query sequence."""
        return self.plan.geometry.query

    @property
    def key(self) -> VideoSpan:
        """Where the video lies in the key sequence."""
        return self.plan.geometry.key

    @property
    def density(self) -> float:
        """Attended pairs of tokens over all pairs, mean over the rows; text and conditioning attend all and are attended by all."""
        video_pairs = (self.query.video[1] - self.query.video[0]) * (self.key.video[1] - self.key.video[0])
        return 1.0 - video_pairs * (1.0 - self.plan.density) / (self.query.length * self.key.length)

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
    """One way of computing an op of a plan.

    Args:
        name: what the option ``lowering`` takes.
        summary: in a line what it is.
        priority: its number in lists, and among lowerings that are expected to be equally fast the order in which they are taken.
        unavailable: why it cannot run on a device, or None.
        refuses: why it cannot serve a call, or None.
        rates: its FLOP/s over those of the device's best dense kernel, by kind of device (``selection/rates.py``).
        speedup: how many times faster than dense attention it is expected to be on a call, instead of ``rates``; 0 where it is not meant
            for speed.  ``lowering="auto"`` takes the fastest that serves.
        op: the op of a plan that it computes.
        body: computes the op; ``operator`` is the op of that body.
        prepare: instead of both, what computes a call and tables of its own.
        traceable: whether another compiler can trace what computes a call: it is made of ops that it knows.
        plans_on_host: the op's tables and row are tensors of the CPU wherever the call runs.
        tuned: measures a call, with a function that returns the seconds of ``body`` under a name for how it is set up; it may prefer a
            set-up from then on.
        trial_tokens: tokens of a frame and of the text in its smoke test: so many that what a real model needs of it is needed.

    Raises:
        RateError: neither ``rates`` nor ``speedup`` is given, so that ``lowering="auto"`` would never take it.
    """

    name: str
    summary: str
    priority: int
    unavailable: Callable[[torch.device], str | None]
    refuses: Callable[[AttentionCall], str | None]
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    speedup: Callable[[AttentionCall], float] | None = None
    op: str = "attention"
    body: Callable[..., tuple[Tensor, Tensor]] | None = None
    operator: compat.OpOverload | None = None
    prepare: Callable[[AttentionCall], Prepared] | None = None
    traceable: bool = False
    plans_on_host: bool = False
    tuned: Callable[[AttentionCall, Callable[[str], float]], float] = lambda call, seconds: seconds("")
    smoke_test_tokens: tuple[int, int] = (72, 70)

    def __post_init__(self) -> None:
        if not self.rates and self.speedup is None:
            raise RateError(self.name)

    def expected(self, call: AttentionCall) -> float:
        """How many times faster than dense attention it is expected to be; 0 where it is not meant for speed."""
        return self.speedup(call) if self.speedup is not None else share_of_dense(self.rates, call.device) / call.density

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve a call by what it says of itself, or None: the op, the device, then the call."""
        if call.plan.op != self.op:
            return f"it computes {self.op}, and policy {call.plan.policy.name!r} wants {call.plan.op}"
        left_out = self.plans_on_host and call.device_only and call.device.type != "cpu"
        host = "it plans on the host, which CUDA graphs leave out" if left_out else None
        unknown = f"{call.compiler} compiles the graph and knows no ops of this package" if call.compiler and not self.traceable else None
        return self.unavailable(call.device) or host or unknown or self.refuses(call)

    def prepared(self, call: AttentionCall) -> Prepared:
        """What computes a call, and the tables it wants."""
        if self.prepare is not None:
            return self.prepare(call)
        assert self.body is not None
        return Prepared(by_heads(self.body), (call.plan.table.query_bounds, call.plan.table.key_ranges))

    def on_device(self, call: AttentionCall) -> Callable[..., tuple[Tensor, Tensor]]:
        """What computes a call, ``(query, key, value, phase, scale=, key_mask=)``, its tables made where it wants them."""
        ready, where = self.prepared(call), self.device_of_tables(call.device)
        tables = [torch.tensor(content, dtype=torch.int32, device=where) for content in ready.tables]

        def run(query: Tensor, key: Tensor, value: Tensor, phase: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            return ready.target(query, key, value, *tables, phase.to(where), **more)

        return run

    def device_of_tables(self, device: torch.device) -> torch.device:
        """Where the op wants its tables and its phase for a call on ``device``."""
        return CPU if self.plans_on_host else device
