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
from lvsa_compile.policies.block_choice import CHOICES, ESTIMATES, packed
from lvsa_compile.policies.contract import Facts, Geometry, Policy, plan_of
from lvsa_compile.policies.given import policy_as_dict
from lvsa_compile.policies.haste.policy import Haste
from lvsa_compile.policies.losa.policy import LoSA
from lvsa_compile.policies.radial.policy import Radial
from lvsa_compile.policies.rows import PUBLISHED_STEPS, Searches
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.policies.xattention.policy import XAttention
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
    policies: tuple[Policy, ...] = (
        AdaSpa(min_tokens=0), LoSA(threshold=0.5, min_tokens=0), Radial(decay=0.2), XAttention(stride=16, threshold=0.5, min_tokens=0),
        Haste(XAttention(stride=16, threshold=0.5, min_tokens=0)),
    )  # fmt: skip
    inputs = inputs_of(frames, device, rows=_ROWS, columns=_COLUMNS)
    tokens = frames * (_ROWS // 2) * (_COLUMNS // 2)
    torch.compiler.reset()
    models: dict[str, Callable[..., Any]] = {"dense": torch.compile(_model(device), dynamic=False)}
    for policy in policies:
        options: dict[str, Any] = {"policy": policy}
        models[policy.name] = torch.compile(_model(device), backend="lvsa", options=options, dynamic=False)
    kept: dict[str, list[float]] = {policy.name: [] for policy in policies}
    heads, videos, running = dict.fromkeys(kept, 0), dict.fromkeys(models, 0), ""

    def noting(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*args: Any, **more: Any) -> Tensor:
            found = choose(*args, **more)
            kept[running].append(float(found.float().mean()))
            heads[running] += found.shape[0] * found.shape[1]
            return found

        return noted

    def video(name: str) -> None:
        nonlocal running
        running = name
        videos[name] += 1
        _video(models[name], inputs, steps)

    before = [(known, dict(known)) for known in (CHOICES, ESTIMATES)]
    for known, functions in before:
        known.update({name: noting(function) for name, function in functions.items()})  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            seconds = in_turn({name: functools.partial(video, name) for name in models}, rounds, device)
    finally:
        for known, functions in before:
            known.update(functions)  # type: ignore[arg-type]
        torch.compiler.reset()
    model = _model(device)
    dense_flops, attention = total_flops(model, inputs), attention_flops(tokens)
    all_heads = steps * sum(block.attn1.heads for block in model.blocks)  # type: ignore[union-attr]
    span, rows = VideoSpan(0, frames, tokens // frames, 0), []
    for policy in policies:
        found = seconds[policy.name]
        plan = plan_of(policy, Geometry.of(span, span), Facts())
        density = sum(kept[policy.name]) / len(kept[policy.name]) if kept[policy.name] else plan.density
        whole = sum(map(len, plan.rows.attends_all(steps))) if isinstance(plan.rows, Searches) else 0
        stride = next((value[0] for name, value in plan.arguments if name == "numbers" and isinstance(value, tuple)), None)
        estimate = 0.0 if stride is None else heads[policy.name] / (videos[policy.name] * all_heads) / (2 * stride)
        left = steps * (dense_flops - attention) + attention * (whole + (steps - whole) * density + steps * estimate)
        bound = steps * dense_flops / left
        rows.append({
            "policy": _words(policy), "tokens": tokens, "steps": steps, "density": density, "dense": seconds["dense"].median,
            "seconds": found.median, "speedup": found.times_faster_than(seconds["dense"]), "bound": bound,
            "share": found.times_faster_than(seconds["dense"]) / bound, "spread": found.spread, "rounds": len(found.rounds),
        })  # fmt: skip
    return rows


def _words(policy: Policy) -> str:
    """A policy by its name and what is not at its default."""
    fields = dict(policy_as_dict(policy))
    return f"{fields.pop('name')} {', '.join(f'{name}={value}' for name, value in fields.items() if name != 'min_tokens')}".strip()


def _video(model: Callable[..., Any], inputs: dict[str, Any], steps: int) -> None:
    reset()
    for step in range(steps):
        one_step(model, inputs | {"timestep": inputs["timestep"] * (1.0 - step / steps)})


def _model(device: torch.device) -> nn.Module:
    return wan_shaped().to(device)
