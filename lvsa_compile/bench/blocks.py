"""Policies that choose blocks: their kernel at random choices, and whole videos of 50 denoising steps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lvsa_compile.bench.measuring import in_turn
from lvsa_compile.bench.video_model import attention_flops, inputs_of, one_step, total_flops, wan_shaped
from lvsa_compile.forward.clock import reset
from lvsa_compile.policies.adaspa.policy import AdaSpa
from lvsa_compile.policies.block_choice import CHOICES, packed
from lvsa_compile.policies.contract import Facts, Geometry, Policy, plan_of
from lvsa_compile.policies.losa.policy import LoSA
from lvsa_compile.policies.rows import PUBLISHED_STEPS, Searches
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection.contract import AttentionCall
from lvsa_compile.selection.select import select

SHAPES = ((4096, 12, 128), (8000, 4, 64), (8000, 4, 128))
"""Tokens, heads and head dim."""
DENSITIES, BLOCKS = (0.15, 0.3, 0.5), (64, 128)
_HORIZON, _ROWS, _COLUMNS = 21, 32, 26  # latent frames, and rows and columns of a latent: 4,368 tokens
Row = dict[str, Any]


def measure_kernel(
    device: torch.device, rounds: int, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, int, int], ...]
) -> list[Row]:
    """A row per shape, block and density: attention over blocks that are kept at random, from half to one and a half times as many in
    some heads as in others, beside dense attention; and a search beside the same kernel where it is asked for no mass.
    """
    found: list[Row] = []
    with torch.no_grad():
        for dtype, (tokens, heads, width), block, density in itertools.product(dtypes, shapes, BLOCKS, DENSITIES):
            row = _kernel_row(device, rounds, dtype, tokens, heads, width, block, density)
            found += [] if row is None else [row]
    return found


def _kernel_row(
    device: torch.device, rounds: int, dtype: torch.dtype, tokens: int, heads: int, width: int, block: int, density: float
) -> Row | None:
    torch.manual_seed(0)
    span = VideoSpan(0, tokens // 16, 16, 0)
    plan = plan_of(AdaSpa(block=block, min_tokens=0), Geometry.of(span, span, heads=heads), Facts())
    call = AttentionCall(device, dtype, 1, heads, heads, width, width, plan)
    lowering = select(call).lowering
    if not lowering.expected(call):
        return None  # nothing here is meant for speed
    blocks = -(-span.length // block)
    counts = (torch.linspace(0.5, 1.5, heads) * density * blocks).round().clamp(1, blocks)
    order = torch.rand(1, heads, blocks, blocks).argsort(-1).argsort(-1)
    chosen = order < counts[:, None, None]
    query, key, value = (torch.randn(1, span.length, heads, width, dtype=dtype, device=device).transpose(1, 2) for _ in range(3))
    bounds, ranges = (torch.tensor(each, dtype=torch.int32, device=device) for each in (plan.table.query_bounds, plan.table.key_ranges))
    state = [torch.zeros((1, *each.of_call(1, width).shape), dtype=each.dtype, device=device) for each in plan.state]
    state[1][0].copy_(packed(chosen))
    entry = torch.zeros((), dtype=torch.int32, device=device)
    arguments: dict[str, Any] = {**dict(plan.arguments), "video": [0, 0, span.length]}

    def run(row: int, done: int) -> Tensor:
        state[0].fill_(done)
        at = torch.tensor(row, dtype=torch.int32, device=device)
        assert lowering.body is not None
        output: Tensor = lowering.body(query, key, value, bounds, ranges, at, entry, state, **arguments)[0]
        return output

    kept = state[1].clone()

    def search() -> None:
        run(0, 0)
        state[1].copy_(kept)

    seconds = in_turn(
        {
            "dense": lambda: scaled_dot_product_attention(query, key, value),
            "sparse": lambda: run(0, 1),
            "everything": lambda: run(2, 1),
            "search": search,
        },
        rounds,
        device,
        least_seconds=0.5,
    )
    share = float(chosen.float().mean())
    return {
        "dtype": str(dtype).removeprefix("torch."), "tokens": span.length, "heads": heads, "head_dim": width, "block": block,
        "density": share, "lowering": lowering.name, "dense": seconds["dense"].median,
        "sparse": seconds["sparse"].median, "search": seconds["search"].median,
        "share": seconds["dense"].median * share / seconds["sparse"].median, "spread": seconds["sparse"].spread,
        "search_more": seconds["search"].median / seconds["everything"].median - 1.0, "rounds": len(seconds["dense"].rounds),
    }  # fmt: skip


def measure_videos(device: torch.device, rounds: int, steps: int = PUBLISHED_STEPS, frames: int = _HORIZON) -> list[Row]:
    """A row per policy: all denoising steps of a video of the training length, beside the same model dense."""
    policies: tuple[Policy, ...] = (AdaSpa(min_tokens=0), LoSA(threshold=0.5, min_tokens=0))
    inputs = inputs_of(frames, device, rows=_ROWS, columns=_COLUMNS)
    tokens = frames * (_ROWS // 2) * (_COLUMNS // 2)
    torch.compiler.reset()
    models: dict[str, Callable[..., Any]] = {"dense": torch.compile(_model(device), dynamic=False)}
    for policy in policies:
        options: dict[str, Any] = {"policy": policy}
        models[policy.name] = torch.compile(_model(device), backend="lvsa", options=options, dynamic=False)
    kept: dict[str, list[float]] = {policy.name: [] for policy in policies}
    noting = {name: functools.partial(_noting, CHOICES[name], found) for name, found in kept.items()}
    before = dict(CHOICES)
    CHOICES.update(noting)
    try:
        with torch.no_grad():
            seconds = in_turn({name: functools.partial(_video, model, inputs, steps) for name, model in models.items()}, rounds, device)
    finally:
        CHOICES.update(before)
        torch.compiler.reset()
    dense_flops, attention = total_flops(_model(device), inputs), attention_flops(tokens)
    rows = []
    for policy in policies:
        row: Row = {"policy": str(policy), "tokens": tokens, "steps": steps}
        schedule = plan_of(policy, Geometry.of_frames(frames), Facts()).rows
        assert isinstance(schedule, Searches)
        density = sum(kept[policy.name]) / len(kept[policy.name])
        whole = sum(map(len, schedule.attends_all(steps)))
        left = steps * (dense_flops - attention) + attention * (whole + (steps - whole) * density)
        bound = steps * dense_flops / left
        found = seconds[policy.name]
        rows.append(row | {
            "density": density, "dense": seconds["dense"].median, "seconds": found.median,
            "speedup": found.times_faster_than(seconds["dense"]), "bound": bound,
            "share": found.times_faster_than(seconds["dense"]) / bound, "spread": found.spread, "rounds": len(found.rounds),
        })  # fmt: skip
    return rows


def _noting(choice: Callable[..., Tensor], found: list[float], mass: Tensor, rows: Tensor, share: float) -> Tensor:
    chosen = choice(mass, rows, share)
    found.append(float(chosen.float().mean()))
    return chosen


def _video(model: Callable[..., Any], inputs: dict[str, Any], steps: int) -> None:
    reset()
    for step in range(steps):
        one_step(model, inputs | {"timestep": inputs["timestep"] * (1.0 - step / steps)})


def _model(device: torch.device) -> nn.Module:
    return wan_shaped().to(device)
