"""What following a forward costs: 40 blocks of width 1536 with shared weights, compiled one by one, and a wholly eager forward."""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lvsa_compile.bench.measuring import in_turn
from lvsa_compile.bench.video_model import inputs_of, one_step, wan_shaped
from lvsa_compile.regional import undo
from lvsa_compile.watching.watch import watch

_BLOCKS = 40
_DENSE = {"reference_frames": 1000}
Row = dict[str, Any]


def measure(device: torch.device, rounds: int, frames: int = 3) -> list[Row]:
    """Three rows, each a forward that nobody follows against one that is followed; every forward is dense, of ``frames`` latent frames.

    The last one is of five times as many: what following costs in eager code is as much for each op, whatever its size.
    """
    longer = 5 * frames
    forwards = (("blocks compiled one by one", _compiled, frames), ("eager", _eager, frames), (f"eager, {longer} frames", _eager, longer))
    with torch.no_grad():
        rows = [_row(name, pair, device, rounds, length) for name, pair, length in forwards]
    torch.compiler.reset()
    return rows


def _row(name: str, pair: Callable[[nn.Module, nn.Module], None], device: torch.device, rounds: int, frames: int) -> Row:
    torch.compiler.reset()
    plain = _model().to(device)
    followed = copy.deepcopy(plain, {id(each): each for each in plain.parameters()})  # the same memory: where weights lie decides more
    pair(plain, followed)
    inputs = inputs_of(frames, device)
    runs = {name: functools.partial(one_step, model, inputs) for name, model in (("plain", plain), ("followed", followed))}
    for run in (*runs.values(), *runs.values()):
        run()
    seconds = in_turn(runs, rounds, device, least_seconds=10.0)
    undo(followed)
    pairs = zip(seconds["followed"].rounds, seconds["plain"].rounds, strict=True)
    more = [one - other for one, other in pairs]
    return {
        "forward": name,
        "plain": seconds["plain"].median,
        "followed": seconds["followed"].median,
        "more": statistics.median(more),
        "share": statistics.median(more) / seconds["plain"].median,
        "spread": seconds["plain"].spread,
        "rounds": len(more),
    }


def _compiled(plain: nn.Module, followed: nn.Module) -> None:
    undo(plain)
    for block in plain.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)
    for block in followed.blocks:  # type: ignore[union-attr]
        block.compile(backend="lvsa", options=_DENSE, dynamic=False)


def _eager(plain: nn.Module, followed: nn.Module) -> None:
    watch(followed, ticks=True)


def _model() -> nn.Module:
    model = wan_shaped(heads=12, ffn_dim=8960, layers=1)
    model.blocks = nn.ModuleList(copy.copy(model.blocks[0]) for _ in range(_BLOCKS))  # type: ignore[index,misc]
    return model
